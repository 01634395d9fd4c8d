"""llama2.c's model files (foreign/llama2c.py): read in all three versions, written in version 0, which run.c reads.

run.c rotates neighbours, as Meta's code does. All tensors of one kind stand together, and all matrices are (out, in).
"""

import contextlib
import dataclasses
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llama_jax.chat.formats import ChatSetup
from llama_jax.config import ModelArgs
from llama_jax.convert.layout import TABLE, Tensor, halves_to_interleaved, interleaved_to_halves, tensors_of
from llama_jax.convert.mapped import mapped
from llama_jax.convert.source import ReadBlocks, Source, is_tied
from llama_jax.errors import UserError
from llama_jax.foreign.config_json import feed_forward_rule
from llama_jax.foreign.family import family_of
from llama_jax.foreign.keys import check_arguments
from llama_jax.foreign.llama2c import (
    BOS,
    LENGTHS,
    NORM_EPS,
    ROPE_THETA,
    TOKENIZER,
    Header,
    read_header,
    tokenizer_bytes,
    tokenizer_of,
)
from llama_jax.foreign.vocabulary import fit_vocabulary
from llama_jax.sentencepiece_settings import BPE, Settings
from llama_jax.storage.files import raw_bytes, write_atomically
from llama_jax.tokenizer import Tokenizer

FLOAT32 = np.dtype("<f4")
MODEL = "model.bin"
ANGLES = "angles"  # tables of cosines and sines, which only early versions of run.c read
NORMS = ("layers/attention_norm", "layers/ffn_norm", "norm")
ATTENTION = tuple(f"layers/attention/{name}" for name in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = tuple(f"layers/feed_forward/{name}" for name in ("w1", "w2", "w3"))
# The order of the tensors in a file, by its version. The output stands last, unless it is the embeddings.
ORDER = {
    0: ("tok_embeddings", NORMS[0], *ATTENTION, NORMS[1], *FEED_FORWARD, NORMS[2], ANGLES),
    1: (*NORMS, "tok_embeddings", *ATTENTION, *FEED_FORWARD),
    2: (*NORMS, "tok_embeddings", *ATTENTION, *FEED_FORWARD),
}
# Fields of ModelArgs that a file states, or that other fields decide.
STATED = frozenset(
    [
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "vocab_size",
        "multiple_of",
        "ffn_dim_multiplier",
        "hidden_dim",
        "max_seq_len",
        "tie_embeddings",
    ]
)


class Llama2cSource:
    """A model file of llama2.c. Raises UserError if it is damaged."""

    def __init__(self, path: Path, decided: str, tokenizer: str, max_seq_len: int, stack: ExitStack):
        header = read_header(path)
        if header is None:
            raise UserError(f"{path}: expected a model file of llama2.c, found another file")
        self._path, self._header = path, header
        self.args = _arguments(header, path, max_seq_len)
        self._places = places(header, self.args)
        self._map: mmap.mmap = stack.enter_context(mapped(path))
        found, said = tokenizer_of(path, header.vocab_size, tokenizer)
        self.tokenizer, fitted = fit_vocabulary(self.args, found, path)
        self.chat = ChatSetup(has_none=True)
        self.dtypes = {tensor.name: FLOAT32 for tensor in tensors_of(self.args)}
        self.family = family_of(self.args, path.name)
        self.decided = decided
        kind = f"8-bit integers in groups of {header.group}" if header.version == 2 else "float32"
        self.description = f"{path}: version {header.version}, of {kind}"
        self.unknown: list[str] = []
        self.warnings = [*self._remarks(max_seq_len), *said, *fitted]
        self.checklists: list[Path] = []

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Read rows; see Source."""
        name, shape = tensor.name, tensor.matrix(self.args)
        columns = math.prod(shape[1:])
        first, count = start * columns, (stop - start) * columns
        offset = self._places[name] + layer * self._bytes(name, math.prod(shape))
        if self._header.version == 2 and name not in NORMS:
            values = self._dequantized(name, offset, math.prod(shape), first, count)
        else:
            values = self._read(FLOAT32, offset + 4 * first, count)
        rows = values.reshape(stop - start, *shape[1:])
        return interleaved_to_halves(rows, self.args.head_width) if tensor.rotary else rows

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's place; see Source."""
        return f"{tensor.name.rpartition('/')[2]}" + (f" of layer {layer}" if tensor.layered else "")

    def release(self) -> None:
        """Free memory; see Source."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify nothing here; see Source."""
        return contextlib.nullcontext()

    def _read(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        return np.ndarray(count, dtype, buffer=self._map, offset=offset)

    def _bytes(self, name: str, count: int) -> int:
        """Return the bytes of ``count`` numbers of a tensor."""
        return _bytes_of(self._header, name, count)

    def _dequantized(self, name: str, offset: int, size: int, first: int, count: int) -> np.ndarray:
        """Return ``count`` numbers from the one at ``first`` on, of a matrix of ``size`` integers and their scales."""
        group = self._header.group
        begin, end = first // group, -(-(first + count) // group)
        scales = self._read(FLOAT32, offset + size + 4 * begin, end - begin)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise UserError(
                f"{self._path}: {name}: expected scales of 0 or more behind its integers, as runq.c reads them, found other "
                "numbers: the file is damaged, or an early version of export.py wrote it; export the model again"
            )
        integers = self._read(np.dtype("i1"), offset + first, count)
        return integers * np.repeat(scales, group)[first - begin * group :][:count]

    def _remarks(self, max_seq_len: int) -> Iterator[str]:
        header = self._header
        if header.version == 2:
            yield "the matrices are of 8-bit integers: they are multiplied by their scales and stored as float32"
        if max_seq_len > header.max_seq_len:
            yield f"the context is {max_seq_len:,} tokens, and the file says {header.max_seq_len:,}"
        if header.version == 0:
            tables = self._read(FLOAT32, self._places[ANGLES], header.max_seq_len * self.args.head_width)
            expected = angle_tables(header.max_seq_len, self.args.head_width)
            if not np.allclose(tables, expected.ravel(), atol=1e-3):
                yield (
                    f"the file's tables of angles are not those of rope_theta {ROPE_THETA:g}, which run.c takes whatever they "
                    "are, and which is taken here"
                )


def _arguments(header: Header, path: Path, max_seq_len: int) -> ModelArgs:
    """Return the model arguments of a file, with what run.c has in it."""
    multiple_of, multiplier = feed_forward_rule(header.dim, header.hidden_dim, path)
    args = ModelArgs(
        dim=header.dim,
        n_layers=header.n_layers,
        n_heads=header.n_heads,
        n_kv_heads=header.n_kv_heads,
        vocab_size=header.vocab_size,
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        max_seq_len=max_seq_len or header.max_seq_len,
        tie_embeddings=header.shared,
    )
    return check_arguments(args, path, {})


def _bytes_of(header: Header, name: str, count: int) -> int:
    """Return the bytes of ``count`` numbers of the tensor ``name`` in a file."""
    return count + count // header.group * 4 if header.version == 2 and name not in NORMS else 4 * count


def places(header: Header, args: ModelArgs) -> dict[str, int]:
    """Return the offset in the file of each kind of tensor, by our names."""
    counts = {t.name: (math.prod(t.matrix(args)), args.n_layers if t.layered else 1) for t in TABLE}
    counts[ANGLES] = (header.max_seq_len * args.head_width, 1)
    at, found = LENGTHS[header.version], {}
    for name in (*ORDER[header.version], *(() if header.shared else ("output",))):
        count, layers = counts[name]
        found[name] = at
        at += layers * _bytes_of(header, name, count)
    return found


def angle_tables(positions: int, head_dim: int) -> np.ndarray:
    """Return the cosines and then the sines of run.c's rotary embedding: float32 [2, positions, H/2]."""
    frequencies = 1 / ROPE_THETA ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies.astype(np.float32))
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def check_llama2c(source: Source) -> None:
    """Raise a UserError that names the key if run.c cannot compute the model or encode its texts."""
    args, default = source.args, ModelArgs()
    expected = {"norm_eps": NORM_EPS, "rope_theta": ROPE_THETA, "head_dim": args.dim // args.n_heads}
    for field in dataclasses.fields(ModelArgs):
        name, found = field.name, getattr(args, field.name)
        wanted = expected.get(name, getattr(default, name))
        if name in STATED or found in (wanted, None) or (name == "sliding_window" and args.window is None):
            continue
        raise UserError(
            f"--to llama2c: {name}: expected {wanted}, which run.c has in it, found {found}; use another format"
        )
    if not getattr(source.tokenizer, "is_sentencepiece", True):
        raise UserError(
            f"--to llama2c: expected a SentencePiece model, whose pieces run.c reads, found {source.tokenizer.model_path}; use "
            "another format"
        )
    if source.tokenizer.bos_id != BOS:
        raise UserError(
            f"--to llama2c: expected the BOS id {BOS}, which run.c has in it, found {source.tokenizer.bos_id} in "
            f"{source.tokenizer.model_path}; use another format"
        )


def write_llama2c(source: Source, folder: Path, read_blocks: ReadBlocks) -> str:
    """Write model.bin in version 0, in float32, tokenizer.bin and tokenizer.model. Return a remark, or ""."""
    args = source.args
    check_llama2c(source)
    header = Header(
        0, args.dim, args.hidden_width, args.n_layers, args.n_heads, args.kv_heads, args.vocab_size, args.max_seq_len,
        shared=is_tied(source, source.rows),
    )  # fmt: skip
    at = places(header, args)
    with open(folder / MODEL, "wb") as file:
        file.truncate(header.size)
        file.write(header.pack())
        for tensor, layer, start, rows in read_blocks():
            if tensor.name not in at:
                continue  # the output, which is the embeddings
            rows = halves_to_interleaved(rows, args.head_width) if tensor.rotary else rows
            shape = tensor.matrix(args)
            file.seek(at[tensor.name] + 4 * (layer * math.prod(shape) + start * math.prod(shape[1:])))
            file.write(raw_bytes(rows.astype(FLOAT32)))
        file.seek(at[ANGLES])
        file.write(raw_bytes(angle_tables(args.max_seq_len, args.head_width)))
        file.flush()
        os.fsync(file.fileno())
    write_atomically(folder / TOKENIZER, tokenizer_bytes(source.tokenizer, args.vocab_size))
    write_atomically(folder / "tokenizer.model", source.tokenizer.model_bytes)
    return _remark(source.tokenizer)


def written_bytes(source: Source) -> int:
    """Return the most bytes that ``write_llama2c`` writes into model.bin."""
    a = source.args
    sizes = a.dim, a.hidden_width, a.n_layers, a.n_heads, a.kv_heads, a.vocab_size, a.max_seq_len
    return Header(0, *sizes, shared=a.tie_embeddings).size


def _remark(tokenizer: Tokenizer) -> str:
    """Return a remark if run.c encodes some texts differently from ``tokenizer``, or ""."""
    settings = Settings.of(tokenizer.model_bytes)
    plain = settings.model_type == BPE and settings.dummy_prefix and not settings.collapse and not settings.charsmap
    if plain and tokenizer.vocab_size > 3 and tokenizer.piece(3) == "<0x00>":
        return ""
    return (
        "run.c encodes some texts in another way than tokenizer.model: it merges pieces by their scores, begins each text with "
        "a space, keeps all spaces, and takes the bytes of unknown characters from token 3 on"
    )
