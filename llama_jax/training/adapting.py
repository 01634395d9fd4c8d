"""The part of training adapters that the compiled steps know: how adapter and frozen base become a model."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import optax

from llama_jax.adapters import adapter_shapes, count_adapter, joined, row_keys
from llama_jax.config import Config, ModelArgs, Weights
from llama_jax.devices.memory import bytes_of
from llama_jax.devices.sharding import with_shardings
from llama_jax.generation.serving import generation_shardings, stacked_shapes
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.training.pieces import PiecesState


@dataclass(frozen=True)
class Adapting:
    """The adapters' settings, the quantization of the base, and the seed of the adapters and of dropout."""

    lora: LoraArgs
    weights: Weights = "auto"
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> "Adapting":
        """Return what a configuration says. A quantized checkpoint to begin with decides by itself how it is held."""
        return cls(config.lora, config.lora.base_weights, config.train.seed)

    def suited(self, module: Llama) -> Llama:
        """Return the module as a frozen base is trained best.

        Layers that are quantized are not unrolled, since XLA on a CPU would then keep each dequantized matrix of the
        forward pass for the backward one.
        """
        return module if self.weights == "auto" else module.clone(unroll=1)

    def adapter_shapes(self, args: ModelArgs, mesh: jax.sharding.Mesh) -> Any:
        """Return the shapes of what is trained, with their shardings."""
        return adapter_shapes(args, self.lora, mesh)

    def base_shapes(self, model: Llama, mesh: jax.sharding.Mesh) -> Any:
        """Return the shapes of the frozen base, with their shardings. Plain matrices have the model's dtype."""
        shapes = stacked_shapes(model, self.weights)
        return with_shardings(shapes, generation_shardings(shapes, mesh))

    def bytes_of_state(self, model: Llama) -> dict[str, int]:
        """Return the bytes, over all devices, of the base, and of the adapters with their gradients and moments."""
        base = bytes_of(stacked_shapes(model, self.weights))
        return {"base": base, "adapters": 16 * count_adapter(model.args, self.lora)}

    def whole(self, args: ModelArgs, base: Any, adapter: Any) -> Any:
        """Return the parameters of the adapted model, without dropout."""
        return joined(base, adapter, self.lora, args)

    def in_step(self, args: ModelArgs, base: Any, adapter: Any, opt_state: Any, rows: jax.Array) -> Any:
        """Return the parameters for ``rows``, int [B], of the batch of the step that ``opt_state`` has reached.

        Dropout follows from the seed, the step, the row, the layer and the matrix, so that it is the same on every
        mesh and however the batch is split.
        """
        keys = row_keys(self.seed, steps_taken(opt_state), rows) if self.lora.dropout else None
        return joined(base, adapter, self.lora, args, keys)


def steps_taken(opt_state: Any) -> jax.Array:
    """Return the number of steps in the state of step.make_optimizer, int32 []. Skipped steps count."""
    counting = optax.ScaleByScheduleState, PiecesState
    states = jax.tree.leaves(opt_state, is_leaf=lambda state: isinstance(state, counting))
    state = next(state for state in states if isinstance(state, counting))
    return cast(jax.Array, state.step if isinstance(state, PiecesState) else state.count)
