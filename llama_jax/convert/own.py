"""Our own checkpoints, as what a conversion reads and as what it writes."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llama_jax.checkpoint import Checkpoint, save_checkpoint
from llama_jax.convert.layout import TABLE, Tensor, from_ours, tile, to_ours
from llama_jax.convert.source import ReadBlocks, Source
from llama_jax.errors import UserError
from llama_jax.stored_array import StoredArray, create_array

# Blocks that are still being written while the next one is prepared.
WRITE_BEHIND = 2


class OwnSource:
    """A checkpoint of ours: a run folder, a step folder, or a converted checkpoint."""

    def __init__(self, path: Path):
        self._checkpoint = Checkpoint.find(path)
        self.args, self.tokenizer = self._checkpoint.args, self._checkpoint.tokenizer
        self.description = f"a checkpoint of llama-jax in {self._checkpoint.folder}"
        self.warnings: list[str] = []
        self.checklists: list[Path] = []
        self._arrays = {tensor.name: self._checkpoint.open_array(tensor.name) for tensor in TABLE}
        dtypes = {array.dtype.numpy_dtype for array in self._arrays.values()}
        if len(dtypes) != 1:
            raise UserError(f"{path}: expected parameters of one type, found {', '.join(sorted(map(str, dtypes)))}")
        (self.dtype,) = dtypes

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """See Source."""
        unit = tensor.unit(self.args)
        place = slice(start // unit, stop // unit)
        index = tuple(place if axis == tensor.rows[0] else slice(None) for axis in tensor.axes)
        array = self._arrays[tensor.name]
        return from_ours(tensor, array[(layer, *index) if tensor.layered else index].read().result())

    def origin(self, tensor: Tensor, layer: int) -> str:
        """See Source."""
        return f"params/{tensor.name}" + (f"[{layer}]" if tensor.layered else "")

    def release(self) -> None:
        """See Source."""


def write_own(source: Source, folder: Path, read_blocks: ReadBlocks) -> None:
    """Write a checkpoint: its arrays block by block, under temporary names, and then the rest by orbax."""
    args, dtype = source.args, source.dtype
    stores = {}
    tree: dict[str, Any] = {}
    for tensor in TABLE:
        layers, one = ((args.n_layers,), (1,)) if tensor.layered else ((), ())
        array = StoredArray(folder / tensor.name.replace("/", "."), layers + tensor.sizes(args), dtype)
        stores[tensor.name] = create_array(array.folder, array.shape, dtype, one + tile(tensor, args, dtype.itemsize))
        _put(tree, tensor.name, array)
    writing = deque[ts.WriteFutures]()
    for tensor, layer, start, rows in read_blocks():
        place, block = to_ours(tensor, args, rows, start)
        store = stores[tensor.name]
        writing.append((store[layer] if tensor.layered else store)[place].write(block))
        if len(writing) > WRITE_BEHIND:
            writing.popleft().result()
    for write in writing:
        write.result()
    save_checkpoint(folder / "checkpoint", tree, args, source.tokenizer)
    for path in (folder / "checkpoint").iterdir():
        path.rename(folder / path.name)
    (folder / "checkpoint").rmdir()


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split("/")
    for key in path:
        tree = tree.setdefault(key, {})
    tree[last] = value
