"""The interface of checkpoints that a converter reads: any format, in blocks of rows."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llama_jax.chat.formats import ChatSetup
from llama_jax.config import ModelArgs
from llama_jax.convert.layout import EMBEDDINGS, OUTPUT, Tensor, all_tensors, blocks
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import Tokenizer

# The type that holds the values of all others exactly.
WIDEST = np.dtype("<f4")


class Source(Protocol):
    """A checkpoint whose tensors have been found, with the right shapes."""

    args: ModelArgs
    dtypes: dict[str, np.dtype]
    """The type of each tensor of ours, by its name. All layers of a tensor have one type."""
    tokenizer: Tokenizer
    chat: ChatSetup
    """Its chat template and end tokens."""
    family: str
    """The model family and layout, for the report."""
    decided: str
    """The files that decide the family, and files that are ignored."""
    description: str
    """The location and kind of the checkpoint."""
    unknown: list[str]
    """Keys of its configuration that were not read."""
    warnings: list[str]
    checklists: list[Path]
    """Lists of md5 sums that belong to the files."""

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Return rows of a tensor, (out, in) or (dim,), with heads ordered for rotating halves.

        They may be a mapped file, and of a type that the tensor's type in ``dtypes`` holds exactly.
        """
        ...

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the name of a tensor in the files."""
        ...

    def release(self) -> None:
        """Free the memory of what has been read."""
        ...

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify checksums in parallel to the block, which reads all files.

        Raises UserError at the end of the block.
        """
        ...


def unread_text(source: Source) -> str:
    """Return a line about the keys of a configuration that were not read, or an empty text if all were."""
    shown = ", ".join(quoted(key, 40) for key in source.unknown[:20])
    return f"keys of the configuration that were not read: {shown}" if source.unknown else ""


def is_tied(source: Source, rows: Callable[..., np.ndarray]) -> bool:
    """Return whether the output matrix of a source is the embeddings, or equals them to the bit.

    ``rows`` reads as ``source.rows`` does. Matrices that are not tied differ in the first row, and no more is read.
    """
    if source.args.tie_embeddings:
        return True
    dtype = source.dtypes[EMBEDDINGS.name]
    if source.dtypes[OUTPUT.name] != dtype:
        return False
    for start, stop in blocks(EMBEDDINGS, source.args, dtype.itemsize):
        for end in (start + 1, stop):
            one, other = (_bits(rows(tensor, 0, start, end)) for tensor in (EMBEDDINGS, OUTPUT))
            if not np.array_equal(one, other):
                return False
        source.release()
    return True


def tie(source: Source) -> None:
    """Remove the output matrix of a source, which equals its embeddings."""
    source.args = dataclasses.replace(source.args, tie_embeddings=True)
    source.dtypes.pop(OUTPUT.name, None)


def tied_by_contents(source: Source, rows: Callable[..., np.ndarray]) -> list[str]:
    """Set ``tie_embeddings`` of a source in Meta's names if its tensors are tied, which params.json does not say.

    Return a remark if they are. ``rows`` reads as ``source.rows`` does. A source without an output matrix is tied.
    """
    if not is_tied(source, rows):
        return []
    found = f"there is no {OUTPUT.meta}" if source.args.tie_embeddings else f"{OUTPUT.meta} equals {EMBEDDINGS.meta}"
    tie(source)
    return [f"{found}: the embeddings are the output matrix too, as in LLaMA 3.2 1B and 3B"]


def _bits(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


class Block(NamedTuple):
    """Consecutive rows of a tensor, from row ``start``."""

    tensor: Tensor
    layer: int
    start: int
    rows: np.ndarray


# Starts to read all blocks of a source, tensor by tensor, in the order of a forward pass.
ReadBlocks = Callable[[], Iterator[Block]]


def main_type(source: Source) -> np.dtype:
    """Return the type of most parameters."""
    counts: dict[np.dtype, int] = {}
    for tensor, _ in all_tensors(source.args):
        dtype = source.dtypes[tensor.name]
        counts[dtype] = counts.get(dtype, 0) + math.prod(tensor.matrix(source.args))
    return max(counts, key=lambda dtype: counts[dtype])


def types_of(found: Iterable[tuple[Tensor, int, np.dtype]]) -> tuple[dict[str, np.dtype], list[str]]:
    """Return the type of each tensor of ours, and remarks, from the types that are found in each layer.

    Layers of several types get the narrowest type that holds all their values exactly.
    """
    kinds: dict[str, set[np.dtype]] = {}
    for tensor, _, dtype in found:
        kinds.setdefault(tensor.name, set()).add(dtype)
    types = {name: one.copy().pop() if len(one) == 1 else WIDEST for name, one in kinds.items()}
    remarks = [
        f"{name} is of {' and '.join(sorted(kind.name for kind in one))} in different layers: all of it is stored as "
        f"{WIDEST.name}, which holds these values exactly"
        for name, one in kinds.items()
        if len(one) > 1
    ]
    return types, remarks


def raise_together(folder: Path, config: str, stated: str, errors: list[str]) -> None:
    """Raise one UserError for all ``errors`` in the tensors of ``folder``, if there are any.

    ``config`` is the file that describes the tensors, and ``stated`` shows the keys that do.
    """
    if errors:
        shown = "; ".join(sorted(errors)[:8]) + (f"; and {len(errors) - 8} more" if len(errors) > 8 else "")
        raise UserError(
            f"{folder}: expected the tensors that {config} describes ({stated}), found: {shown}; "
            f"{config} and the weights are of two models, or this project has no such model: get all files from one place"
        )
