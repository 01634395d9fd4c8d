"""The tensors of a LLaMA in three layouts: ours, Meta's and Hugging Face's.

Letters as in model.py: D dim, N query heads, K KV heads, H head_dim, F hidden, V vocab. Meta and Hugging Face store a
matrix as (out, in). Ours is (in, out), with heads as a separate axis. A block of rows of theirs is a block of ours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from llama_jax.config import ModelArgs

# A matrix is stored in tiles, at least this many along each side, so that a device can read its own part alone. It is
# converted in blocks of rows of about this many bytes, so that little of it is in memory.
TILES = 4
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Tensor:
    """A line of the table. ``{}`` in a name stands for the layer."""

    name: str
    axes: str
    """The axes of our array, without the layer axis."""
    meta: str
    huggingface: str
    rows: str
    """The axes that form the rows of their matrix; the others form the columns."""
    shard_axis: int | None
    """The axis of Meta's (out, in) that is split over shards. None: every shard holds the whole tensor."""
    rotary: bool = False
    """Whether rotary embedding applies to the heads, so that Meta's rows have another order."""
    field: str = ""
    """The argument of the model that says whether there is such a tensor. Empty: every model has it."""

    @property
    def layered(self) -> bool:
        """Whether each layer has such a tensor."""
        return self.name.startswith("layers/")

    @property
    def multiplied(self) -> bool:
        """Whether hidden states are multiplied by it, as by all tensors except embeddings, norms and biases."""
        return self.name != "tok_embeddings" and self.rows != self.axes

    def sizes(self, args: ModelArgs) -> tuple[int, ...]:
        """Return the shape of our array without the layer axis."""
        sizes = axis_sizes(args)
        return tuple(sizes[axis] for axis in self.axes)

    def matrix(self, args: ModelArgs) -> tuple[int, ...]:
        """Return the shape of their matrix: (out, in), or (out,) for a norm or bias."""
        sizes = axis_sizes(args)
        rows = math.prod(sizes[axis] for axis in self.rows)
        columns = [sizes[axis] for axis in self.axes if axis not in self.rows]
        return (rows, math.prod(columns)) if columns else (rows,)

    def unit(self, args: ModelArgs) -> int:
        """Return the number of rows that belong together: those of a head, or one."""
        sizes = axis_sizes(args)
        return math.prod(sizes[axis] for axis in self.rows[1:])


TABLE = (
    Tensor("tok_embeddings", "VD", "tok_embeddings.weight", "model.embed_tokens.weight", "V", 1),
    Tensor("layers/attention_norm", "D", "layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", "D", None),
    Tensor("layers/attention/wq", "DNH", "layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", "NH", 0, True),
    Tensor("layers/attention/wk", "DKH", "layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", "KH", 0, True),
    Tensor("layers/attention/wv", "DKH", "layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", "KH", 0),
    Tensor("layers/attention/wo", "NHD", "layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", "D", 1),
    Tensor("layers/ffn_norm", "D", "layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", "D", None),
    Tensor("layers/feed_forward/w1", "DF", "layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight", "F", 0),
    Tensor("layers/feed_forward/w3", "DF", "layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight", "F", 0),
    Tensor("layers/feed_forward/w2", "FD", "layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight", "D", 1),
    # Meta's code has no biases.
    Tensor("layers/attention/wq_bias", "NH", "", "model.layers.{}.self_attn.q_proj.bias", "NH", 0, True, "attention_bias"),
    Tensor("layers/attention/wk_bias", "KH", "", "model.layers.{}.self_attn.k_proj.bias", "KH", 0, True, "attention_bias"),
    Tensor("layers/attention/wv_bias", "KH", "", "model.layers.{}.self_attn.v_proj.bias", "KH", 0, False, "attention_bias"),
    Tensor("layers/attention/wo_bias", "D", "", "model.layers.{}.self_attn.o_proj.bias", "D", None, False, "attention_bias"),
    Tensor("layers/feed_forward/w1_bias", "F", "", "model.layers.{}.mlp.gate_proj.bias", "F", 0, False, "mlp_bias"),
    Tensor("layers/feed_forward/w3_bias", "F", "", "model.layers.{}.mlp.up_proj.bias", "F", 0, False, "mlp_bias"),
    Tensor("layers/feed_forward/w2_bias", "D", "", "model.layers.{}.mlp.down_proj.bias", "D", None, False, "mlp_bias"),
    Tensor("norm", "D", "norm.weight", "model.norm.weight", "D", None),
    Tensor("output", "DV", "output.weight", "lm_head.weight", "V", 0),
)  # fmt: skip


def axis_sizes(args: ModelArgs) -> dict[str, int]:
    """Return the size of each axis by its letter."""
    return {
        "D": args.dim, "N": args.n_heads, "K": args.kv_heads, "H": args.head_width, "F": args.hidden_width, "V": args.vocab_size
    }  # fmt: skip


EMBEDDINGS, OUTPUT = TABLE[0], TABLE[-1]


def tensors_of(args: ModelArgs) -> tuple[Tensor, ...]:
    """Return the lines of the table that a model has. With tied embeddings it has no output matrix of its own."""
    table = TABLE[:-1] if args.tie_embeddings else TABLE
    return tuple(tensor for tensor in table if not tensor.field or getattr(args, tensor.field))


def all_tensors(args: ModelArgs) -> Iterator[tuple[Tensor, int]]:
    """Yield every tensor of a model with its layer (0 if it has none), in the order of a forward pass."""
    table = tensors_of(args)
    layered = [tensor for tensor in table if tensor.layered]
    first, last = table.index(layered[0]), table.index(layered[-1])
    yield from ((tensor, 0) for tensor in table[:first])
    yield from ((tensor, layer) for layer in range(args.n_layers) for tensor in layered)
    yield from ((tensor, 0) for tensor in table[last + 1 :])


def blocks(tensor: Tensor, args: ModelArgs, itemsize: int) -> list[tuple[int, int]]:
    """Return the ranges of rows to convert at once. They consist of whole heads and whole tiles."""
    rows, *columns = tensor.matrix(args)
    unit = tensor.unit(args)
    count = max(TILES if columns else 1, -(-rows * math.prod(columns) * itemsize // BLOCK_BYTES))
    step = -(-rows // unit // count) * unit
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def tile(tensor: Tensor, args: ModelArgs, itemsize: int) -> tuple[int, ...]:
    """Return the shape of the tiles of our array, without the layer axis."""
    start, stop = blocks(tensor, args, itemsize)[0]
    sizes = axis_sizes(args)
    split = next((axis for axis in tensor.axes if axis not in tensor.rows), "")
    tiles = {tensor.rows[0]: (stop - start) // tensor.unit(args)}
    if split:
        tiles[split] = -(-sizes[split] // TILES)
    return tuple(tiles.get(axis, sizes[axis]) for axis in tensor.axes)


def to_ours(tensor: Tensor, args: ModelArgs, rows: np.ndarray, start: int) -> tuple[tuple[slice, ...], np.ndarray]:
    """Convert a block of their rows from row ``start``. Return the index of the block in our array, and the block."""
    sizes = axis_sizes(args)
    unit = tensor.unit(args)
    columns = "".join(axis for axis in tensor.axes if axis not in tensor.rows)
    theirs = tensor.rows + columns
    split = rows.reshape(-1, *(sizes[axis] for axis in theirs[1:]))
    block = split.transpose([theirs.index(axis) for axis in tensor.axes])
    first = tensor.rows[0]
    place = slice(start // unit, start // unit + split.shape[0])
    return tuple(place if axis == first else slice(None) for axis in tensor.axes), contiguous(block)


def from_ours(tensor: Tensor, block: np.ndarray) -> np.ndarray:
    """Convert a block of ours to their rows, (out, in) or (dim,): the reverse of ``to_ours``."""
    columns = "".join(axis for axis in tensor.axes if axis not in tensor.rows)
    theirs = block.transpose([tensor.axes.index(axis) for axis in tensor.rows + columns])
    rows = math.prod(theirs.shape[: len(tensor.rows)])
    theirs = contiguous(theirs)
    return theirs.reshape(rows, -1) if columns else theirs.reshape(rows)


def contiguous(view: np.ndarray) -> np.ndarray:
    """Return a contiguous copy. For a transposed matrix XLA works by tiles and is seven times as fast as numpy."""
    return np.asarray(jax.device_put(view, jax.local_devices(backend="cpu")[0]))


def interleaved_to_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows [n H, in] of whole heads from Meta's order (neighbours rotate together) to ours (halves do)."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halves_to_interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from our order to Meta's: the reverse of ``interleaved_to_halves``."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
