"""Reads a source block by block, ahead of the writer, and computes a digest and statistics of the values."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from llama_jax.cli.progress import Progress
from llama_jax.convert.layout import Tensor, all_tensors, blocks
from llama_jax.convert.source import Block, Source
from llama_jax.storage.files import raw_bytes

# Number of blocks to read ahead of the one being written.
READ_AHEAD = 2
# Values to examine together, few enough to stay in a core's cache.
LOOKED_AT = 1 << 17


class Reader:
    """Reads a source once. ``digest`` and ``not_finite`` describe the blocks read so far."""

    def __init__(self, source: Source, progress: Progress):
        self.source = source
        self._progress = progress
        self._digests: dict[str, hashlib._Hash] = {}
        self._not_finite: dict[str, int] = {}

    def blocks(self) -> Iterator[Block]:
        """Yield every block, tensor by tensor, in the order of a forward pass."""
        waiting: deque[Future[Block]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for tensor, layer in all_tensors(self.source.args):
                itemsize = self.source.dtypes[tensor.name].itemsize
                for start, stop in blocks(tensor, self.source.args, itemsize):
                    waiting.append(thread.submit(self._read, tensor, layer, start, stop))
                    if len(waiting) > READ_AHEAD:
                        yield from self._pass_on(waiting.popleft())
            while waiting:
                yield from self._pass_on(waiting.popleft())

    def _read(self, tensor: Tensor, layer: int, start: int, stop: int) -> Block:
        found = self.source.rows(tensor, layer, start, stop)
        rows = np.array(found, self.source.dtypes[tensor.name])  # a copy, because the mapped pages are freed
        self.source.release()
        name = f"{tensor.name}/{layer}"
        digest = self._digests.setdefault(name, hashlib.sha256())
        digest.update(raw_bytes(rows))
        if count := count_not_finite(rows):
            origin = self.source.origin(tensor, layer)
            self._not_finite[origin] = self._not_finite.get(origin, 0) + count
        return Block(tensor, layer, start, rows)

    def _pass_on(self, block: Future[Block]) -> Iterator[Block]:
        yield block.result()
        self._progress.update(block.result().rows.nbytes)

    def digest(self) -> str:
        """Return the sha256 of the sorted names and sha256 of all tensors.

        It is equal for equal weights in any layout.
        """
        lines = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def not_finite(self) -> str:
        """Return a warning about NaN and infinities in the weights, or ""."""
        if not self._not_finite:
            return ""
        counts = sorted(self._not_finite.items(), key=lambda item: -item[1])
        shown = "; ".join(f"{count:,} in {name}" for name, count in counts[:8])
        rest = f"; and in {len(counts) - 8} more tensors" if len(counts) > 8 else ""
        total = sum(self._not_finite.values())
        return (
            f"{total:,} values of the weights are NaN or infinite ({shown}{rest}): the model is damaged, and so is the "
            "converted one; its text will be meaningless"
        )


def count_not_finite(values: np.ndarray) -> int:
    """Count NaN and infinite values, whose exponent bits are all set, in float32, float16 or bfloat16.

    Viewed as signed integers they are the largest positive values, viewed as unsigned integers the largest of all.
    """
    exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[values.dtype.name]
    sign = 1 << (8 * values.itemsize - 1)
    unsigned = np.ascontiguousarray(values).reshape(-1).view(f"u{values.itemsize}")
    signed = unsigned.view(f"i{values.itemsize}")
    count = 0
    for start in range(0, unsigned.size, LOOKED_AT):
        some = slice(start, start + LOOKED_AT)
        if signed[some].max() >= exponent or unsigned[some].max() >= exponent | sign:
            count += int(np.count_nonzero(unsigned[some] & exponent == exponent))
    return count
