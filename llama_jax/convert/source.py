"""What a converter reads from: a checkpoint of any format, in blocks of rows."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llama_jax.config import ModelArgs
from llama_jax.convert.layout import Tensor
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer


class Source(Protocol):
    """A checkpoint, its tensors all found and of the right shapes."""

    args: ModelArgs
    dtype: np.dtype
    tokenizer: Tokenizer
    family: str
    """Which model it is, in whose layout, for the report."""
    decided: str
    """The files that say so, and those beside them that are not read."""
    description: str
    """Where it is and what it is."""
    unknown: list[str]
    """Keys of its configuration that were not read."""
    warnings: list[str]
    checklists: list[Path]
    """Lists of md5 sums that came along."""

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor as (out, in) or (dim,), heads in the order in which halves rotate. Perhaps on a mapped file."""
        ...

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Where a tensor comes from."""
        ...

    def release(self) -> None:
        """Give back the memory of what has been read."""
        ...

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify checksums of whole files beside the block, which reads them all. Raises UserError at its end."""
        ...


class Block(NamedTuple):
    """Some rows of a tensor."""

    tensor: Tensor
    layer: int
    start: int
    rows: np.ndarray


# Begins to read all of a source, tensor by tensor, in the order of a forward pass.
ReadBlocks = Callable[[], Iterator[Block]]


def raise_together(folder: Path, config: str, stated: str, errors: list[str]) -> None:
    """Raise one UserError for all ``errors`` in the tensors of ``folder``, if there are any.

    config, stated: the file that describes the tensors, and the keys by which it does.
    """
    if errors:
        shown = "; ".join(sorted(errors)[:8]) + (f"; and {len(errors) - 8} more" if len(errors) > 8 else "")
        raise UserError(f"{folder}: expected the tensors that {config} describes ({stated}), found: {shown}")
