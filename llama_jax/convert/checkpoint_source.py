"""Our own checkpoints, as source and as destination of a conversion."""

import contextlib
import functools
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

from llama_jax.checkpoint import Checkpoint, save_within
from llama_jax.checkpoint.stored_array import ArrayOnDisk, create_array
from llama_jax.config import ModelArgs, Weights
from llama_jax.convert.layout import EMBEDDINGS, OUTPUT, Tensor, from_ours, tensors_of, tile, to_ours
from llama_jax.convert.source import Block, ReadBlocks, Source
from llama_jax.foreign.family import family_of
from llama_jax.ops.quantize import Matrix, quantize

# Number of blocks that are still being written while the next one is prepared.
WRITE_BEHIND = 2


class OwnSource:
    """A checkpoint of this project: a run folder, a step folder or a converted checkpoint."""

    def __init__(self, path: Path):
        self._checkpoint = Checkpoint.find(path)
        self._checkpoint.check_plain("--input")
        self.args, self.tokenizer = self._checkpoint.args, self._checkpoint.tokenizer
        self.chat = self._checkpoint.chat
        self.family = family_of(self.args, "model.json")
        self.decided = f"{self._checkpoint.folder / 'model' / 'model.json'}"
        self.description = f"{self._checkpoint.folder}: a checkpoint of llama-jax"
        self.unknown: list[str] = []
        self.warnings: list[str] = []
        self.checklists: list[Path] = []
        self._arrays = {tensor.name: self._checkpoint.open_array(tensor.name) for tensor in tensors_of(self.args)}
        self.dtypes = {name: array.dtype.numpy_dtype for name, array in self._arrays.items()}

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Read rows; see Source."""
        unit = tensor.unit(self.args)
        place = slice(start // unit, stop // unit)
        index = tuple(place if axis == tensor.rows[0] else slice(None) for axis in tensor.axes)
        array = self._arrays[tensor.name]
        return from_ours(tensor, array[(layer, *index) if tensor.layered else index].read().result())

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's name; see Source."""
        return f"params/{tensor.name}" + (f"[{layer}]" if tensor.layered else "")

    def release(self) -> None:
        """Do nothing, since no file is mapped; see Source."""

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify checksums; see Source."""
        return self._checkpoint.verified()


class Part(NamedTuple):
    """An array of a checkpoint: a tensor, or the integers or scales of a quantized one."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    tile: tuple[int, ...]


def write_own(source: Source, folder: Path, read_blocks: ReadBlocks, weights: Weights = "auto") -> None:
    """Write a checkpoint: first its arrays, block by block, under temporary names, then the rest with orbax.

    ``weights`` is the quantization of matrices, which are stored as generation uses them (generation/serving.py).
    Blocks are quantized independently, because inputs that share a scale are in one row and blocks have whole rows.
    """
    stores = {}
    tree: dict[str, Any] = {}
    for part in parts(source, weights):
        array = ArrayOnDisk(folder / part.name.replace("/", "."), part.shape, part.dtype)
        stores[part.name] = create_array(array.folder, part.shape, part.dtype, part.tile)
        _put(tree, part.name, array)
    writing = deque[ts.WriteFutures]()
    for block in read_blocks():
        for name, place, values in _values(block, source.args, weights):
            store = stores[name]
            writing.append((store[block.layer] if block.tensor.layered else store)[place].write(values))
        while len(writing) > WRITE_BEHIND:
            writing.popleft().result()
    for write in writing:
        write.result()
    save_within(folder, tree, source.args, source.tokenizer, weights, source.chat)


def parts(source: Source, weights: Weights) -> Iterator[Part]:
    """Yield every array of a checkpoint."""
    args = source.args
    tied = args.tie_embeddings and weights != "auto"
    for tensor in (*tensors_of(args), *([OUTPUT] if tied else [])):
        dtype = source.dtypes[EMBEDDINGS.name if tied and tensor == OUTPUT else tensor.name]
        layers, one = ((args.n_layers,), (1,)) if tensor.layered else ((), ())
        shape, tiles = tensor.sizes(args), tile(tensor, args, dtype.itemsize)
        if not _quantized(tensor, weights):
            yield Part(tensor.name, layers + shape, dtype, one + tiles)
            continue
        rows, columns = _flat(tensor, tiles)
        matrix = jax.ShapeDtypeStruct(_flat(tensor, shape), dtype)
        values, scales = jax.tree.leaves(jax.eval_shape(lambda w: quantize(w, 1, weights), matrix))
        yield Part(f"{tensor.name}/values", layers + values.shape, values.dtype, (*one, rows, columns))
        yield Part(f"{tensor.name}/scales", layers + scales.shape, scales.dtype, (*one, len(scales), columns))


def _values(block: Block, args: ModelArgs, weights: Weights) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
    """Yield the arrays to write for a block: name, index (after the layer axis) and values.

    Rows of tied embeddings are also those of the output matrix, of which a quantized checkpoint has one.
    """
    tensor, start, rows = block.tensor, block.start, block.rows
    if tensor == EMBEDDINGS and args.tie_embeddings and weights != "auto":
        yield from _values(block._replace(tensor=OUTPUT), args, weights)
    if not _quantized(tensor, weights):
        yield tensor.name, *to_ours(tensor, args, rows, start)
        return
    place = slice(None), slice(start, start + len(rows))
    matrix = _quantize(jax.device_put(rows, jax.local_devices(backend="cpu")[0]), weights)
    yield f"{tensor.name}/values", place, np.asarray(matrix.values)
    yield f"{tensor.name}/scales", place, np.asarray(matrix.scales)


def _quantized(tensor: Tensor, weights: Weights) -> bool:
    return weights != "auto" and tensor.multiplied


def _flat(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a matrix or of a tile."""
    inputs = len(tensor.axes) - len(tensor.rows)
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def quantized_rows(rows: np.ndarray, weights: Weights) -> np.ndarray:
    """Return rows (out, in) of a matrix as their quantization has them, float32."""
    matrix = _quantize(jax.device_put(rows, jax.local_devices(backend="cpu")[0]), weights)
    return np.asarray(matrix.dequantized()).T


@functools.partial(jax.jit, static_argnames="weights")
def _quantize(rows: jax.Array, weights: Weights) -> Matrix:
    """Quantize rows (out, in) of a matrix, transposed to (in, out)."""
    return quantize(rows.T, 1, weights)


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split("/")
    for key in path:
        tree = tree.setdefault(key, {})
    tree[last] = value
