"""Learning rates by width: a rate that was chosen on a narrow model serves a wide one.

A step should change the outputs of each product as much on a wide model as on a narrow one (maximal-update
parametrization: Yang et al., 2022, "Tensor Programs V", table 8). Adam changes each number by about the rate. In a
product, the changes of all inputs add up along one direction, so the rate of a matrix falls by the width. What no sum
over the width reaches, embeddings and vectors, keeps its rate. Muon's update is orthogonal, scaled to the root mean
square of Adam's: its largest singular value grows by the root of the width, and the rate falls by this root.

Initial deviations are the model's own at every width (ops/parameters.py). In the paper a wide model's output begins
smaller than by its fan-in. As it does not here, steps change a wide model a little more, and the rates fall a little
faster: by a power of 9/8, not 1, as was measured (docs/recipes.md).
"""

from typing import Any, Literal

import jax
import optax
from jax.tree_util import KeyPath, tree_map_with_path

from llama_jax.config import TrainArgs
from llama_jax.ops.parameters import is_vector

Kind = Literal["matrices", "embeddings", "output", "norms"]
# The powers of the width by which the rates of Adam's and Adafactor's updates fall. Biases are with the norms.
POWERS: dict[Kind, float] = {"matrices": 1.125, "embeddings": 0.0, "output": 1.125, "norms": 0.0}
MUON_POWER = 0.5


def rate_factors(args: TrainArgs, dim: int) -> dict[Kind, float]:
    """Return what lr is multiplied by for each kind of parameter of a model of width ``dim``: 1 without rate_width."""
    if args.rate_width is None:
        return dict.fromkeys(POWERS, 1.0)
    powers = POWERS | ({"matrices": MUON_POWER} if args.optimizer == "muon" else {})
    return {kind: (args.rate_width / dim) ** power for kind, power in powers.items()}


def by_width(direction: optax.GradientTransformation, args: TrainArgs) -> optax.GradientTransformation:
    """Return ``direction`` with its updates multiplied by ``rate_factors``. Its state stays as it is.

    ``direction`` makes updates of the whole model, or of a piece of it, before weight decay is added. So the decay of a
    step, lr times weight_decay, is the same at every width: scaled with the rate, a wide model would hardly decay
    (Wang and Aitchison, 2024, "How to set AdamW's weight decay as you scale model and dataset size").
    """
    if args.rate_width is None:
        return direction
    made = optax.with_extra_args_support(direction)

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = made.update(grads, state, params, **extra)
        factors = rate_factors(args, _width_of(updates))
        return tree_map_with_path(lambda path, u: factors[_kind_of(path, updates)] * u, updates), state

    return optax.GradientTransformationExtraArgs(made.init, update)


def _width_of(piece: Any) -> int:
    """Return the width of a model: the size of its RMSNorms, of which each layer and the rest of the model have one."""
    leaves = jax.tree_util.tree_leaves_with_path(piece)
    return int(next(leaf.shape[-1] for path, leaf in leaves if path[-1].key.endswith("norm")))  # type: ignore[attr-defined]


def _kind_of(path: KeyPath, piece: Any) -> Kind:
    """Return the kind of the parameter at ``path``. Tied embeddings are the output matrix, whose rate they need."""
    name = path[-1].key  # type: ignore[attr-defined]
    if is_vector(path):
        return "norms"
    if name == "tok_embeddings":
        return "embeddings" if "output" in piece else "output"
    return "output" if name == "output" else "matrices"


def widths_text(args: TrainArgs, dim: int) -> str:
    """Return what a run says of its rates by width."""
    factors = ", ".join(f"{kind} x{factor:.3g}" for kind, factor in rate_factors(args, dim).items())
    return f"{factors}, for width {dim:,}; the learning rate was chosen at width {args.rate_width:,}"
