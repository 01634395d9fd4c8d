"""llama2.c's model files: their headers, and the tokenizer.bin beside them (llama2.c, export.py and tokenizer.py).

Version 0 begins with 7 integers, and a negative vocabulary says that the output matrix is not the embeddings. Versions
1 (float32) and 2 (8-bit integers) begin with a magic number, the version, the 7 integers, and a byte that says whether
the two are one. Their headers are filled up to 256 bytes.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.storage.locations import children, is_remote
from llama_jax.tokenizer import Tokenizer

MAGIC = 0x616B3432
LENGTHS = {0: 28, 1: 256, 2: 256}
TOKENIZER = "tokenizer.bin"
# What run.c and runq.c have in them.
NORM_EPS, ROPE_THETA, BOS = 1e-5, 10000.0, 1
# A score at which run.c never merges two tokens into one.
NEVER = -1e10


@dataclass(frozen=True)
class Header:
    """The sizes of a model file."""

    version: int
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    shared: bool
    """Whether the output matrix is the embeddings."""
    group: int = 0
    """Number of integers that share a scale, in version 2."""

    @property
    def is_possible(self) -> bool:
        """Whether a model can have these sizes."""
        sizes = (
            self.dim,
            self.hidden_dim,
            self.n_layers,
            self.n_heads,
            self.n_kv_heads,
            self.vocab_size,
            self.max_seq_len,
        )
        if not all(0 < size < 1 << 24 for size in sizes) or self.version not in LENGTHS:
            return False
        heads = not self.dim % self.n_heads and not self.n_heads % self.n_kv_heads and not self.dim // self.n_heads % 2
        return heads and (self.version < 2 or 0 < self.group <= self.dim)

    @property
    def size(self) -> int:
        """The number of bytes of the file."""
        kv_dim = self.dim // self.n_heads * self.n_kv_heads
        norms = (2 * self.n_layers + 1) * self.dim
        layer = 2 * self.dim * self.dim + 2 * self.dim * kv_dim + 3 * self.dim * self.hidden_dim
        matrices = self.n_layers * layer + (1 if self.shared else 2) * self.vocab_size * self.dim
        angles = self.max_seq_len * (self.dim // self.n_heads) if self.version == 0 else 0
        numbers = norms + angles + (matrices // self.group if self.version == 2 else matrices)
        return LENGTHS[self.version] + 4 * numbers + (matrices if self.version == 2 else 0)

    def pack(self) -> bytes:
        """Return the bytes of a header of version 0."""
        vocab_size = self.vocab_size if self.shared else -self.vocab_size
        sizes = self.dim, self.hidden_dim, self.n_layers, self.n_heads, self.n_kv_heads, vocab_size, self.max_seq_len
        return struct.pack("<7i", *sizes)


def read_header(path: Path) -> Header | None:
    """Return the header of llama2.c's file at ``path``, or None if it is not one.

    Raises UserError if it is one, but damaged or of an unknown version.
    """
    with path.open("rb") as file:
        start = file.read(64)
        length = file.seek(0, 2)
    if len(start) < 64:
        return None
    magic, version, *sizes = struct.unpack_from("<Ii7i", start)
    if magic == MAGIC:
        if version not in (1, 2):
            raise UserError(f"{path}: expected version 0, 1 or 2 of llama2.c's files, found {version}")
        shared, group = struct.unpack_from("<?i", start, 36)
        header = _header(version, sizes, shared, group if version == 2 else 0)
        if not header.is_possible:
            raise UserError(f"{path}: expected sizes of a model in the header, found {', '.join(map(str, sizes))}")
    else:
        sizes = list(struct.unpack_from("<7i", start))
        header = _header(0, [*sizes[:5], abs(sizes[5]), sizes[6]], sizes[5] > 0, 0)
        # Without a magic number, any file may begin so: the sizes must be those of a model, and nearly of this file.
        if not header.is_possible or not header.size / 16 < length < header.size * 16:
            return None
    if length != header.size:
        raise UserError(
            f"{path}: expected {header.size:,} bytes, as the header of llama2.c's model says, found {length:,}; the file is "
            "cut short, or another: download it or export it again"
        )
    return header


def _header(version: int, sizes: list[int], shared: bool, group: int) -> Header:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = sizes
    return Header(
        version, dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len, shared, group
    )  # fmt: skip


def model_files(folder: Path) -> list[Path]:
    """Return the model files of llama2.c in ``folder``."""
    if is_remote(folder):
        return []
    found = sorted(path for path in children(folder) if path.suffix == ".bin" and path.is_file())
    return [path for path in found if path.name != TOKENIZER and read_header(path) is not None]


def tokenizer_of(path: Path, vocab_size: int, given: str) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer of the model file at ``path``, and remarks: the one ``given``, or that of its folder.

    A tokenizer.bin lacks the settings of the SentencePiece model, so it alone is not enough, but must not contradict.
    Raises UserError if there is none, or another.
    """
    beside, folder = path.with_name(TOKENIZER), path.parent
    if not given and not (folder / "tokenizer.model").is_file():
        also = f" ({TOKENIZER} lacks its settings)" if beside.is_file() else ""
        raise UserError(
            f"{path}: expected tokenizer.model beside it, the SentencePiece model that it was trained with, found none{also}; "
            "give its path with --tokenizer: the stories models of 32,000 tokens have LLaMA 2's"
        )
    tokenizer = Tokenizer(given or folder / "tokenizer.model")
    if not beside.is_file() or tokenizer.vocab_size != vocab_size:
        return tokenizer, []
    pieces = list(read_tokenizer(beside))
    if len(pieces) != vocab_size or pieces == list(tokenizer_pieces(tokenizer, vocab_size)):
        return tokenizer, []  # a tokenizer.bin of another size belongs to another model
    differs = f"{beside} holds other pieces than {tokenizer.model_path}"
    if not given:
        raise UserError(
            f"{path}: expected one vocabulary, found two: {differs}; delete the wrong one, or give a path with --tokenizer"
        )
    return tokenizer, [f"{differs}, which is used"]


def tokenizer_pieces(tokenizer: Tokenizer, vocab_size: int) -> Iterator[tuple[bytes, float]]:
    """Yield the pieces of a vocabulary with their scores, as llama2.c spells them. Rows without a token get one."""
    spelled = {tokenizer.bos_id: "\n<s>\n", tokenizer.eos_id: "\n</s>\n"}
    for i in range(vocab_size):
        if i < tokenizer.vocab_size:
            text = spelled.get(i, tokenizer.piece(i)).replace("\u2581", " ")
            yield text.encode(), struct.unpack("<f", struct.pack("<f", tokenizer.score(i)))[0]
        else:
            yield f"<no token {i}>".encode(), NEVER


def tokenizer_bytes(tokenizer: Tokenizer, vocab_size: int) -> bytes:
    """Return the tokenizer.bin of a vocabulary: the longest piece's length; the score, length and bytes of each."""
    pieces = list(tokenizer_pieces(tokenizer, vocab_size))
    parts = [struct.pack("<I", max(len(piece) for piece, _ in pieces))]
    parts += [struct.pack("<fI", score, len(piece)) + piece for piece, score in pieces]
    return b"".join(parts)


def read_tokenizer(path: Path) -> Iterator[tuple[bytes, float]]:
    """Yield the pieces and scores of a tokenizer.bin, as far as it is one."""
    content = path.read_bytes() if path.stat().st_size < 1 << 28 else b""
    at = 4
    while at + 8 <= len(content):
        score, length = struct.unpack_from("<fI", content, at)
        yield content[at + 8 : at + 8 + length], score
        at += 8 + length
