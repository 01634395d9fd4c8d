"""Norms of gradients and of updates by kind of parameter: one may explode while the total looks well.

K kinds.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from llama_jax.ops.parameters import AXES, is_vector

# The names in records of parameters that have another name in a checkpoint.
RENAMED = {"tok_embeddings": "embeddings"}
KINDS = (*(RENAMED.get(name, name) for name in AXES), "norms", "biases")


class Norms(flax.struct.PyTreeNode):
    """The norms of a step, over all layers, by kind of parameter."""

    kinds: tuple[str, ...] = flax.struct.field(pytree_node=False)  # those of KINDS that the parameters have
    gradients: jax.Array  # float32 [K]: before clipping
    updates: jax.Array  # float32 [K]: of the change of the parameters

    @classmethod
    def of(cls, gradients: Any, updates: Any) -> "Norms":
        """Return the norms of two trees of sums of squares; see ``squares``."""
        sums = [_by_kind(tree) for tree in (gradients, updates)]
        kinds = tuple(kind for kind in KINDS if kind in sums[0])
        return cls(kinds, *(jnp.sqrt(jnp.stack([each[kind] for kind in kinds])) for each in sums))

    def to_dict(self) -> dict[str, Any]:
        """Return the norms, which are on the host, by their keys in a record: "grad_norm/wq"."""
        named = ("grad_norm", self.gradients), ("update_norm", self.updates)
        return {f"{name}/{kind}": value for name, norms in named for kind, value in zip(self.kinds, norms, strict=True)}


def squares(tree: Any) -> Any:
    """Return the sum of the squares of each array of a tree, float32 scalars."""
    return jax.tree.map(lambda x: optax.tree.norm(x.astype(jnp.float32), squared=True), tree)


def kind_of(path: KeyPath) -> str:
    """Return the kind of the parameter at ``path``. Both factors of an adapter are of their matrix's kind."""
    names = [key.key for key in path]  # type: ignore[attr-defined]
    if is_vector(path):
        return "norms" if "norm" in names[-1] else "biases"
    name = next(name for name in reversed(names) if name in AXES)
    return RENAMED.get(name, name)


def _by_kind(tree: Any) -> dict[str, jax.Array]:
    sums: dict[str, jax.Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        kind = kind_of(path)
        sums[kind] = sums[kind] + value if kind in sums else value
    return sums
