"""Counts what a training step needs of memory before it is compiled: arrays exactly, activations roughly."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from llama_jax.build import count_parameters
from llama_jax.config import Config, ModelArgs, TrainArgs
from llama_jax.devices.memory import bytes_of
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.model import Llama
from llama_jax.ops.remat import kept_values
from llama_jax.train_args import layer_policies
from llama_jax.training.adapting import Adapting
from llama_jax.training.muon import at_once, matrix_sizes
from llama_jax.training.objective import make_objective
from llama_jax.training.pieces import narrow_shapes
from llama_jax.training.step import make_optimizer

# The settings that decide the bytes of a parameter and of what belongs to it.
OF_STATE = ("param_dtype", "rounding", "optimizer", "moments")


def state_bytes(model: ModelArgs, train: TrainArgs) -> dict[str, int]:
    """Return the bytes, over all devices, of the parameters, their gradients and the optimizer's state, by part.

    Beside them are the matrices' copies for products in eight bits, without their scales.
    """
    plain = dataclasses.replace(TrainArgs(), **{name: getattr(train, name) for name in OF_STATE})
    parts = dict(_parts(model, plain))
    if train.gradient_accumulation_steps > 1:
        parts["gradients so far"] = parts["gradients"]
    if train.products != "float":
        matrices = model.n_layers * sum(map(math.prod, matrix_sizes(model)))
        parts["copies in eight bits"] = matrices * sum(name in train.products_of for name in ("forward", "input"))
    return {part: size for part, size in parts.items() if size}


@functools.cache
def _parts(model: ModelArgs, train: TrainArgs) -> tuple[tuple[str, int], ...]:
    params = narrow_shapes(parameter_shapes(Llama(model)), train)
    state = jax.eval_shape(make_optimizer(train, 1).init, params)
    residue = bytes_of(getattr(state[0], "residue", ()))
    size, moments = bytes_of(params), bytes_of(state) - residue
    parts = ("parameters", size), ("gradients", size), ("moments", moments), ("rounding", residue)
    return tuple(part for part in parts if part[1])


def adapter_bytes(config: Config) -> dict[str, int]:
    """Return the bytes, over all devices, of a frozen base and of its adapters with gradients and moments, by part.

    Raises UserError if the rank is too large for a matrix.
    """
    module = Llama(config.model, jnp.dtype(config.train.compute_dtype))
    return Adapting.of(config).bytes_of_state(module)


def activation_bytes(config: Config) -> float:
    """Estimate the bytes per device besides the state: kept activations, and the work of a layer and of the logits.

    The mesh of ``config`` has no -1.
    """
    m, mesh, train = config.model, config.mesh, config.train
    rows, t = rows_of(config), mesh.tensor
    positions = positions_of(config)
    tokens = rows * positions / mesh.sequence
    size = 4 if train.compute_dtype == "float32" else 2
    keys_and_values = 2 * m.kv_heads * m.head_width
    policies = layer_policies(train.remat, m.n_layers)
    kept = sum((end - first) * (m.dim + kept_features(m, name, t)) for name, first, end in policies)
    tables = 1 if m.tie_embeddings else 2
    layer = (count_parameters(m) - tables * m.vocab_size * m.dim) / m.n_layers
    working = 2 * size * layer / t + size * tokens * (3 * m.hidden_width / t + 6 * m.dim)
    if mesh.sequence > 1:
        working += size * rows * positions * keys_and_values / t
    # Beside a frozen output matrix, its copy for the products; of one that is trained, also the gradient.
    vocabulary = (2 * size if config.lora.rank else 8) * m.vocab_size * m.dim / t
    return tokens * size * kept + working + vocabulary


def kept_features(m: ModelArgs, policy: str, tensor: int) -> float:
    """Return the features per token that a layer keeps by a policy of remat, besides the residual stream before it.

    tensor: the shards of heads and of the hidden features.
    """
    Q, KV, F = m.n_heads * m.head_width, m.kv_heads * m.head_width, m.hidden_width
    if policy == "none":
        return 9 * m.dim + (3 * Q + 2 * KV + 6 * F) / tensor
    if policy == "offload":
        return 0.0
    # The result of w2 is not read again.
    features = dict.fromkeys(("wq", "query", "attention"), Q / tensor) | {
        "wo": m.dim,
        "after_attention": m.dim,
        "w2": 0,
    }
    features |= dict.fromkeys(("wk", "key", "wv", "value"), KV / tensor) | dict.fromkeys(("w1", "w3"), F / tensor)
    return float(sum(features[name] for name in kept_values(policy)))


def update_bytes(config: Config) -> float:
    """Estimate the bytes per device of an update besides the state: 0 of AdamW.

    Muon holds the matrices of one shape twice, each device its share of them, and four more of those at work. Padding
    fills the last share. The mesh of ``config`` has no -1.
    """
    if config.train.optimizer != "muon":
        return 0.0
    m, mesh = config.model, config.mesh
    size = 4 if config.train.compute_dtype == "float32" else 2
    devices, sizes = mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence, matrix_sizes(m)
    shares = {one: math.ceil(m.n_layers * sizes.count(one) / devices) for one in sizes}
    return max(size * math.prod(one) * (2 * share + 4 * at_once(one, share)) for one, share in shares.items())


def working_bytes(config: Config) -> float:
    """Estimate the bytes per device besides the state and gradients: of the passes or of the update after them."""
    return max(activation_bytes(config), update_bytes(config))


def positions_of(config: Config) -> int:
    """Return the number of positions of a sequence. One of preferences has room for two answers."""
    return make_objective(config).length(config.model)


def rows_of(config: Config) -> int:
    """Return the number of sequences that a device on the batch axes processes at once."""
    train, mesh = config.train, config.mesh
    return train.batch_size // (train.gradient_accumulation_steps * mesh.data * mesh.fsdp)
