"""The interface of checkpoints that a converter reads: any format, in blocks of rows."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llama_jax.chat.formats import ChatSetup
from llama_jax.config import ModelArgs
from llama_jax.convert.layout import Tensor
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer


class Source(Protocol):
    """A checkpoint whose tensors have been found, with the right shapes."""

    args: ModelArgs
    dtype: np.dtype
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

        They may be a mapped file.
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


class Block(NamedTuple):
    """Consecutive rows of a tensor, from row ``start``."""

    tensor: Tensor
    layer: int
    start: int
    rows: np.ndarray


# Starts to read all blocks of a source, tensor by tensor, in the order of a forward pass.
ReadBlocks = Callable[[], Iterator[Block]]


def raise_together(folder: Path, config: str, stated: str, errors: list[str]) -> None:
    """Raise one UserError for all ``errors`` in the tensors of ``folder``, if there are any.

    ``config`` is the file that describes the tensors, and ``stated`` shows the keys that do.
    """
    if errors:
        shown = "; ".join(sorted(errors)[:8]) + (f"; and {len(errors) - 8} more" if len(errors) > 8 else "")
        raise UserError(f"{folder}: expected the tensors that {config} describes ({stated}), found: {shown}")
