"""Meta's layout: params.json and consolidated.NN.pth, each with a shard of every tensor. Read, checked and written."""

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ModelArgs
from llama_jax.convert.layout import (
    EMBEDDINGS,
    OUTPUT,
    TABLE,
    Tensor,
    all_tensors,
    blocks,
    halves_to_interleaved,
    interleaved_to_halves,
    tensors_of,
)
from llama_jax.convert.source import Block, ReadBlocks, Source, raise_together, tied_by_contents, types_of
from llama_jax.convert.torch_file import TorchFile, TorchFileWriter
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.chat_files import metas_chat
from llama_jax.foreign.family import family_of, is_llama3
from llama_jax.foreign.keys import read_json
from llama_jax.foreign.layouts import PARAMS, shard_files
from llama_jax.foreign.params_json import check_params, check_ties, read_params, stated, width, write_params
from llama_jax.foreign.vocabulary import find_tokenizer, fit_vocabulary
from llama_jax.storage.files import write_atomically
from llama_jax.tokenizers.files import MODEL

# Meta stores this next to the weights, but it is a function of the configuration.
IGNORED = {"rope.freqs"}
QUERIES = next(tensor for tensor in TABLE if tensor.name == "layers/attention/wq")


class MetaSource:
    """A folder in Meta's layout. Raises one UserError with all errors in it."""

    def __init__(self, folder: Path, decided: str, tokenizer: str, max_seq_len: int, stack: ExitStack):
        self._paths = shard_files(folder)
        table = read_json(folder / PARAMS)
        check_params(table, folder / PARAMS)
        self._shards = [stack.enter_context(TorchFile.open(path)) for path in self._paths]
        rows, columns = self._shape_of_embeddings(folder)
        # LLaMA 2's code splits the embeddings by columns, LLaMA 3's by rows.
        self._by_rows = len(self._shards) > 1 and columns == width(table)
        rows *= len(self._shards) if self._by_rows else 1
        params = read_params(table, folder / PARAMS, rows, max_seq_len)
        self.args = params.args
        if not any(OUTPUT.meta in shard.tensors for shard in self._shards):
            self.args = replace(self.args, tie_embeddings=True)
        raise_together(folder, PARAMS, stated(table), list(self._errors()))
        found, said = find_tokenizer(tokenizer, folder)
        self.tokenizer, fitted = fit_vocabulary(self.args, found, folder)
        self.chat, of_chat = metas_chat(folder, self.tokenizer, self.args.vocab_size, tokenizer)
        self.dtypes, widened = types_of(self._types())
        tied = tied_by_contents(self, functools.partial(self._rows, verify=False))
        check_ties(table, self.args, folder / PARAMS)
        self.family = family_of(self.args, PARAMS)
        self.decided = decided
        self.description = f"{folder}: {len(self._shards)} shard{'s'[: len(self._shards) > 1]}"
        self.unknown = list(params.unknown)
        self.warnings = [*params.warnings, *tied, *widened, *said, *fitted, *of_chat]
        self.checklists = find_checklists(folder, self.tokenizer.model_path)

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Read rows; see Source."""
        return self._rows(tensor, layer, start, stop)

    def _rows(self, tensor: Tensor, layer: int, start: int, stop: int, verify: bool = True) -> np.ndarray:
        """Read rows. ``verify`` is that of TorchFile.read."""
        name, axis = tensor.meta.format(layer), shard_axis(tensor, self._by_rows)
        if axis is None:
            return self._shards[0].read(name, start, stop, verify)
        if axis == 1:
            rows = self._joined(tensor, [shard.read(name, start, stop, verify) for shard in self._shards], axis=1)
        else:
            size = tensor.matrix(self.args)[0] // len(self._shards)
            parts = []
            for i in range(start // size, -(-stop // size)):
                parts.append(self._shards[i].read(name, max(start - i * size, 0), min(stop - i * size, size), verify))
            rows = self._joined(tensor, parts, axis=0)
        return interleaved_to_halves(rows, self.args.head_width) if tensor.rotary else rows

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's name; see Source."""
        split = {None: "copied", 0: "rows", 1: "columns"}[shard_axis(tensor, self._by_rows)]
        return tensor.meta.format(layer) + (
            f" ({split} of {len(self._shards)} shards)" if len(self._shards) > 1 else ""
        )

    def release(self) -> None:
        """Free memory; see Source."""
        for shard in self._shards:
            shard.release()

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify nothing here; see Source."""
        return contextlib.nullcontext()

    def _joined(self, tensor: Tensor, parts: list[np.ndarray], axis: int) -> np.ndarray:
        """Return the parts of several shards as one array, of the tensor's type."""
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part.astype(self.dtypes[tensor.name], copy=False) for part in parts], axis=axis)

    def _types(self) -> Iterator[tuple[Tensor, int, np.dtype]]:
        """Yield every tensor with its layer and its type in each shard."""
        for tensor, layer in all_tensors(self.args):
            for shard in self._shards:
                yield tensor, layer, shard.tensors[tensor.meta.format(layer)].dtype

    def _view(self, shard: int, name: str) -> Any:
        return self._shards[shard].tensors[name]

    def _shape_of_embeddings(self, folder: Path) -> tuple[int, int]:
        """Return the shape of the embeddings in the first shard. Raises UserError if a shard has none."""
        name = TABLE[0].meta
        for path, shard in zip(self._paths, self._shards, strict=True):
            if name not in shard.tensors or len(shard.tensors[name].shape) != 2:
                raise UserError(f"{path}: expected the matrix {name}, found none; is {folder} a LLaMA checkpoint?")
        rows, columns = self._view(0, name).shape
        return rows, columns

    def _errors(self) -> Iterator[str]:
        """Yield all errors in the tensors of all shards."""
        count = len(self._shards)
        expected: dict[str, tuple[int, ...]] = {}
        for tensor, layer in all_tensors(self.args):
            name, shape, axis = tensor.meta.format(layer), tensor.matrix(self.args), shard_axis(tensor, self._by_rows)
            if axis is not None and shape[axis] % count:
                yield f"{name}: {list(shape)} cannot be split into {count} shards"
            expected[name] = shard_shape(tensor, self.args, count, self._by_rows)
        for path, shard in zip(self._paths, self._shards, strict=True):
            for name in expected.keys() - shard.tensors.keys():
                yield f"{path.name}: {name} is missing"
            for name in shard.tensors.keys() - expected.keys() - IGNORED:
                yield f"{path.name}: {quoted(name)} is not a tensor of this model"
            for name in expected.keys() & shard.tensors.keys():
                view = shard.tensors[name]
                if view.shape != expected[name]:
                    yield f"{path.name}: {name} has shape {list(view.shape)}, expected {list(expected[name])}"
        yield from self._differing_norms(expected)
        yield from self._equal_shards()

    def _differing_norms(self, expected: dict[str, tuple[int, ...]]) -> Iterator[str]:
        for tensor, layer in all_tensors(self.args):
            name = tensor.meta.format(layer)
            if tensor.shard_axis is None:
                holders = [shard for shard in self._shards if name in shard.tensors]
                if any(shard.tensors[name].shape != expected[name] for shard in holders):
                    continue
                copies = {shard.read(name, verify=False).tobytes() for shard in holders}
                if len(copies) > 1:
                    yield f"{name}: differs from shard to shard"

    def _equal_shards(self) -> Iterator[str]:
        """Yield shards that hold the same part of a matrix, as if one file had been downloaded under two names."""
        name = QUERIES.meta.format(0)
        seen: dict[bytes, str] = {}
        for path, shard in zip(self._paths, self._shards, strict=True):
            if name not in shard.tensors:
                return
            values = shard.read(name, verify=False)
            digest = hashlib.sha256(values.tobytes()).digest()
            if digest in seen and (values != values.flat[0]).any():
                yield f"{path.name}: holds the same part of {name} as {seen[digest]}: one of them was copied twice"
            seen.setdefault(digest, path.name)


def shard_axis(tensor: Tensor, by_rows: bool) -> int | None:
    """Return the axis of a tensor that is split over shards. None: every shard holds the whole tensor.

    by_rows: the embeddings are split by rows, as in LLaMA 3's code.
    """
    return 0 if by_rows and tensor.name == "tok_embeddings" else tensor.shard_axis


def shard_shape(tensor: Tensor, args: ModelArgs, shards: int, by_rows: bool) -> tuple[int, ...]:
    """Return the shape of a tensor in each of ``shards`` shards."""
    shape, axis = list(tensor.matrix(args)), shard_axis(tensor, by_rows)
    if axis is not None:
        shape[axis] //= shards
    return tuple(shape)


def write_meta(source: Source, folder: Path, read_blocks: ReadBlocks, shards: int) -> str:
    """Write a model in Meta's layout, in ``shards`` files. Return a remark about its tokenizer, or "".

    Raises UserError if its sizes are not divisible.
    """
    args, params = source.args, write_params(source.args)
    untied, by_rows = replace(args, tie_embeddings=False), is_llama3(args)
    for tensor in tensors_of(untied):
        axis = shard_axis(tensor, by_rows)
        size = 0 if axis is None else tensor.matrix(args)[axis]
        if size % shards:
            raise UserError(f"--shards: expected a divisor of {size} ({tensor.name}), found {shards}")
    types = {OUTPUT.name: source.dtypes[EMBEDDINGS.name]} | source.dtypes
    shapes = {t.meta.format(layer): shard_shape(t, args, shards, by_rows) for t, layer in all_tensors(untied)}
    dtypes = {t.meta.format(layer): types[t.name] for t, layer in all_tensors(untied)}
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TorchFileWriter(folder / f"consolidated.{i:02}.pth", dtypes, shapes))
            for i in range(shards)
        ]
        for tensor, layer, start, rows in _with_output(source, read_blocks):
            rows = halves_to_interleaved(rows, args.head_width) if tensor.rotary else rows
            for i, part in _split(tensor, args, shards, by_rows, start, rows):
                writers[i].write(tensor.meta.format(layer), part)
    write_atomically(folder / "params.json", params)
    files = source.tokenizer.files
    for name in [MODEL] if MODEL in files else files:
        write_atomically(folder / name, files[name])
    if MODEL in files:
        return ""
    return f"there is no {MODEL}, which Meta's code reads, since the model came without; its {', '.join(sorted(files))} are there"


def _with_output(source: Source, read_blocks: ReadBlocks) -> Iterator[Block]:
    """Yield every block, and those of the output matrix of tied embeddings, which Meta's files have in every model."""
    yield from read_blocks()
    dtype = source.dtypes[EMBEDDINGS.name]
    for start, stop in blocks(EMBEDDINGS, source.args, dtype.itemsize) if source.args.tie_embeddings else ():
        yield Block(OUTPUT, 0, start, source.rows(EMBEDDINGS, 0, start, stop).astype(dtype, copy=False))
        source.release()


def _split(
    tensor: Tensor, args: ModelArgs, shards: int, by_rows: bool, start: int, rows: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each shard's number and its part of a block of rows."""
    axis = shard_axis(tensor, by_rows)
    if axis is None:
        yield from ((i, rows) for i in range(shards))
    elif axis == 1:
        yield from enumerate(np.split(rows, shards, axis=1))
    else:
        size = tensor.matrix(args)[0] // shards
        for i in range(start // size, -(-(start + len(rows)) // size)):
            yield i, rows[max(i * size - start, 0) : (i + 1) * size - start]


def find_checklists(folder: Path, tokenizer: Path) -> list[Path]:
    """Return the md5 lists that Meta ships next to the shards and the tokenizer."""
    paths = folder / "checklist.chk", tokenizer.parent / "tokenizer_checklist.chk"
    return [path for path in paths if path.is_file()]


def verify_checklist(path: Path, progress: Callable[[int], object]) -> int:
    """Compare files with a checklist ("<md5>  <name>" per line, as md5sum writes). Return the number of files.

    ``progress`` is called with the number of bytes read. Raises UserError if a file is missing or differs.
    """
    with open(path, "rb") as file:
        raw = file.read(1 << 20)
    if raw.lstrip()[:1] == b"<":
        raise UserError(
            f"{path}: expected md5 sums, found an HTML page: its download failed, and perhaps others; download again"
        )
    lines = raw.decode("latin-1").split("\n")
    entries = [re.fullmatch(r"([0-9a-fA-F]{32}) [ *]([^/\\\0]+)", line.rstrip("\r")) for line in lines if line.strip()]
    if not entries or not all(entries):
        raise UserError(
            f"{path}: expected lines of an md5 sum and a file name, found others; delete it or download it again"
        )
    wrong = []
    for entry in filter(None, entries):
        expected, name = entry.groups()
        target = path.parent / name
        if not target.is_file():
            wrong.append(f"{quoted(name)} is missing")
        elif _md5(target, progress) != expected.lower():
            wrong.append(f"{quoted(name)} is damaged")
    if wrong:
        raise UserError(f"{path}: expected files as it lists them, found: {'; '.join(wrong)}; download them again")
    return len(entries)


def _md5(path: Path, progress: Callable[[int], object]) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()
