"""What a converter reads from: a checkpoint of any format, in blocks of rows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llama_jax.config import ModelArgs
from llama_jax.convert.layout import Tensor
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import Tokenizer

MAX_LAYERS = 1000


class Source(Protocol):
    """A checkpoint, its tensors all found and of the right shapes."""

    args: ModelArgs
    dtype: np.dtype
    tokenizer: Tokenizer
    description: str
    """Where it is and what it is, for the report."""
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


class Block(NamedTuple):
    """Some rows of a tensor."""

    tensor: Tensor
    layer: int
    start: int
    rows: np.ndarray


# Begins to read all of a source, tensor by tensor, in the order of a forward pass.
ReadBlocks = Callable[[], Iterator[Block]]


def read_json(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """A JSON object out of a file of up to ``limit`` bytes. Raises UserError where there is none."""
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a JSON file, found none") from None
    if len(raw) > limit:
        raise UserError(f"{path}: expected a JSON file of up to {limit:,} bytes, found a larger one")
    if raw.lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: expected JSON, found an HTML page, as failed downloads leave behind; download it again"
        )
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {quoted(str(error))}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found another value")
    return found


def take(table: dict[str, Any], key: str, kind: type, path: Path, default: Any = ...) -> Any:
    """``table[key]``, of type int, float, str or bool; None and a missing key mean ``default``. Raises UserError."""
    value = table.get(key)
    if value is None:
        if default is ...:
            raise UserError(f"{path}: expected the key {key}, found none")
        return default
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}: {key}: expected {kind.__name__}, found {quoted(value)}")
    return value


def find_tokenizer(given: str, folder: Path) -> Tokenizer:
    """The tokenizer that ``given`` names, or the one beside the weights, or in the parent folder, as Meta ships it."""
    if given:
        return Tokenizer(given)
    for place in (folder, folder.absolute().parent):
        if (place / "tokenizer.model").is_file():
            return Tokenizer(place / "tokenizer.model")
    raise UserError(
        f"{folder}: expected tokenizer.model there or in the folder above, found none; give its path with --tokenizer"
    )


def check_vocabulary(args: ModelArgs, tokenizer: Tokenizer, source: Path) -> None:
    """Raise UserError where the tokenizer is not the model's."""
    if args.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source}: expected the {tokenizer.vocab_size:,} rows of {tokenizer.model_path}, found {args.vocab_size:,} "
            "embeddings; give the model's own tokenizer with --tokenizer"
        )


def check_arguments(args: ModelArgs, path: Path) -> ModelArgs:
    """``args``, if a model can be like that. Raises UserError that names the file ``path``."""
    for name in ("dim", "n_layers", "n_heads", "kv_heads", "multiple_of", "max_seq_len", "vocab_size"):
        if not 0 < getattr(args, name) < 1 << 24:
            raise UserError(f"{path}: {name}: expected a size of a model, found {getattr(args, name)}")
    if args.n_layers > MAX_LAYERS:
        raise UserError(f"{path}: n_layers: expected up to {MAX_LAYERS}, found {args.n_layers}")
    try:
        args.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return args


def raise_together(folder: Path, config: str, errors: list[str]) -> None:
    """Raise one UserError for all ``errors`` in the tensors of ``folder``, if there are any."""
    if errors:
        shown = "; ".join(sorted(errors)[:8]) + (f"; and {len(errors) - 8} more" if len(errors) > 8 else "")
        raise UserError(f"{folder}: expected the tensors that {config} describes, found: {shown}")
