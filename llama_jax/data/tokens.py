"""Token folders: a text encoded once, with a description.

A folder holds train.bin and eval.bin (uint16, or uint32 for large vocabularies, little endian). Large ones come in
shards: train-00000.bin and so on. checksums.bin has a uint32 crc32 for each block of each of them, documents.bin the
positions at which documents begin, uint64, of train and then of eval. manifest.json is written last; it describes the
text and the tokenizer and has a digest of each file and of itself. ``prepare`` also puts tokenizer.model there.
"""

import hashlib
import math
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import DataArgs
from llama_jax.data.cache import TokenCache, cache_folder
from llama_jax.data.manifest import (
    DOCUMENTS,
    MANIFEST,
    SUMS,
    TOKEN_FILE,
    Manifest,
    parse_manifest,
    read_manifest,
    sha256,
)
from llama_jax.data.parts import SPLITS
from llama_jax.data.places import at_once
from llama_jax.data.remote import Bucket, RemoteStream, cache_text, keep_small_files
from llama_jax.data.stream import BLOCK_BYTES, Shard, TokenStream, check_in_background, checksums
from llama_jax.errors import UserError
from llama_jax.fields import given_path
from llama_jax.storage.files import is_address

# The check on opening takes at most this many seconds.
OPENING_SECONDS = 0.3
# The positions of so many documents are checked on opening. Those of more are checked when they are read.
FEW_DOCUMENTS = 1_000_000


@dataclass(frozen=True, eq=False)
class TokenSet:
    """The two token streams of a text. Documents follow each other, each from BOS to EOS."""

    train: TokenStream
    eval: TokenStream
    manifest: Manifest
    notes: tuple[str, ...] = ()
    """Lines to print about where the tokens are kept."""

    def bits_per_byte(self, loss: float, document_mask: bool = False) -> float | None:
        """Convert a held-out loss in nats per token to bits per byte.

        None if the tokens lose text, since it would be wrong, and if the size of their text is unknown.

        The first token of a stream is never predicted; with a document mask, nor is that of any document.
        """
        if self.manifest.lossy("eval") or not self.manifest.text_bytes["eval"]:
            return None
        never = self.manifest.documents["eval"] if document_mask else 1
        bytes_per_token = self.manifest.text_bytes["eval"] / max(1, self.manifest.tokens["eval"] - never)
        return loss / math.log(2) / bytes_per_token

    def check(self, seconds: float = math.inf) -> None:
        """Compare the tokens with their checksums: all of them, or a spread sample if ``seconds`` run out.

        Raises UserError if a block differs.
        """
        end = time.monotonic() + seconds
        for i in spread(self.eval.blocks + self.train.blocks):
            if time.monotonic() > end:
                return
            if i < self.eval.blocks:
                self.eval.check_block(i)
            else:
                self.train.check_block(i - self.eval.blocks)

    def check_in_background(self) -> None:
        """Check the rest in a thread while the tokens are used.

        After damage, the next read raises an error with the file.
        """
        check_in_background([stream for stream in (self.train, self.eval) if not stream.checked_at_each_read])


def spread(count: int) -> Iterator[int]:
    """Return 0 to ``count`` - 1 in an order whose first elements are spread out (by bit reversal)."""
    bits = max(1, (count - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return (i for i in order if i < count)


def find_prepared(filepath: str) -> Path | None:
    """Return the folder with manifest.json and tokenizer.model of prepared tokens, or None if ``filepath`` has none.

    The folder of tokens behind an address is in the cache, into which these files are fetched. Raises UserError if a
    manifest is damaged.
    """
    if not filepath:
        return None
    if is_address(filepath):
        found = _description_at(filepath)
        return None if found is None else found.folder
    folder = Path(filepath).expanduser()
    return folder if read_manifest(folder) is not None else None


def open_tokens(folder: str | Path, cache_gb: float = DataArgs.cache_gb) -> TokenSet:
    """Open a token folder. A small one is checked completely, a large one in part, and the rest as it is read.

    ``folder`` may be an address, such as gs://bucket/tokens. What is read of it is kept on the local disk, in up to
    ``cache_gb`` gigabytes for all token folders.

    Returns a TokenSet whose ``train`` and ``eval`` can be sliced like arrays of shape [tokens]. Raises a UserError that
    names the file if something is missing or damaged.

    Example:
        tokens = open_tokens("tokens")
        tokens.train[:8]
    """
    given = given_path(folder, "folder")
    if is_address(given):
        return _open_at(given, cache_gb)
    folder = Path(given)
    manifest = read_manifest(folder)
    if manifest is None:
        inside = folder / "tokens"
        hint = f"give {inside}, which has it" if (inside / MANIFEST).exists() else "make it again"
        raise UserError(f"{folder}: expected a folder of prepared tokens with manifest.json, found none; {hint}")
    dtype = np.dtype(manifest.dtype)
    for name, digest in manifest.digests_of_tokenizer.items():
        path = folder / name
        if not manifest.block_bytes or not path.exists() or sha256(path.read_bytes()) == digest:
            continue
        raise UserError(
            f"{path}: expected the tokenizer that made these tokens, found another, or a damaged one; restore it, or delete "
            f"{folder} and prepare them again"
        )
    sums = _read_sums(folder, manifest)
    shards = _shards(manifest, folder)
    every = [*shards["train"], *shards["eval"]]
    for (path, count), size in zip(every, at_once(_size_of, [shard.path for shard in every]), strict=True):
        if size != count * dtype.itemsize:
            found = "none" if size is None else f"{size:,}"
            raise UserError(
                f"{path}: expected a file of {count * dtype.itemsize:,} bytes, found {found}; delete {folder} and make it again"
            )
    streams = [TokenStream(shards[split], dtype, manifest.vocab_size, sums[split]) for split in SPLITS]
    if DOCUMENTS in manifest.sha256 and sum(manifest.documents.values()) <= FEW_DOCUMENTS:
        document_starts(folder, manifest)
    tokens = TokenSet(streams[0], streams[1], manifest)
    tokens.check(OPENING_SECONDS)
    return tokens


class _Description(NamedTuple):
    """The small files of tokens behind an address, in a folder of the cache."""

    bucket: Bucket
    folder: Path
    manifest: Manifest


def _description_at(address: str) -> _Description | None:
    """Fetch the small files of tokens behind an address. Return None if there is no manifest of ours."""
    # A Path of an address has lost its second slash.
    address = re.sub(r"^(\w+):/(?=[^/])", lambda found: f"{found[1]}://{'/' * (found[1] == 'file')}", address)
    if any(mark in address for mark in "*?["):
        return None  # a glob, or a query
    bucket = Bucket(address)
    content = bucket.find(MANIFEST)
    manifest = None if content is None else parse_manifest(content, bucket.address)
    if content is None or manifest is None:
        return None
    if not manifest.block_bytes:
        raise UserError(
            f"{bucket.name_of(MANIFEST)}: expected tokens with checksums, found those of an earlier version, without; prepare them again"
        )
    folder = cache_folder() / sha256(content)[:16]
    digests = {MANIFEST: sha256(content), SUMS: manifest.sha256[SUMS], **manifest.digests_of_tokenizer}
    if DOCUMENTS in manifest.sha256 and sum(manifest.documents.values()) <= FEW_DOCUMENTS:
        digests[DOCUMENTS] = manifest.sha256[DOCUMENTS]
    keep_small_files(bucket, folder, digests)
    return _Description(bucket, folder, manifest)


def _open_at(address: str, cache_gb: float) -> TokenSet:
    """Open tokens behind an address; see ``open_tokens``."""
    description = _description_at(address)
    if description is None:
        raise UserError(
            f"{address}: expected a folder of prepared tokens with manifest.json, found none; upload them first"
        )
    bucket, folder, manifest = description
    dtype, sums, shards = np.dtype(manifest.dtype), _read_sums(folder, manifest), _shards(manifest)
    every = [*shards["train"], *shards["eval"]]
    bucket.check_sizes({path.name: count * dtype.itemsize for path, count in every})
    cache = TokenCache(folder.name, int(cache_gb * 1e9))
    cache.make_room(*(manifest.tokens[split] * dtype.itemsize for split in SPLITS))
    note = cache_text(bucket.address, cache, sum(manifest.tokens.values()) * dtype.itemsize, len(every))
    vocab_size = manifest.vocab_size
    train, held_out = (RemoteStream(bucket, cache, shards[split], dtype, vocab_size, sums[split]) for split in SPLITS)
    tokens = TokenSet(train, held_out, manifest, (note,))
    tokens.check(OPENING_SECONDS)
    return tokens


def _shards(manifest: Manifest, folder: Path = Path()) -> dict[str, list[Shard]]:
    """Return the files of each split."""
    found = {}
    for split in SPLITS:
        counts = manifest.shard_tokens(split)
        found[split] = [
            Shard(folder / name, count) for name, count in zip(shard_names(split, len(counts)), counts, strict=True)
        ]
    return found


def _size_of(path: Path) -> int | None:
    """Return the size of a file in bytes, None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def shard_names(split: str, count: int) -> list[str]:
    """Return the names of a split's files of tokens. A single one has no number."""
    return [f"{split}.bin"] if count <= 1 else [f"{split}-{i:05d}.bin" for i in range(count)]


def token_files(folder: Path) -> Iterator[Path]:
    """Yield the files of tokens in a folder."""
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if TOKEN_FILE.fullmatch(path.name))


def document_starts(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the positions at which the documents of each split begin, uint64 [documents].

    Raises UserError if they are damaged, or if the folder is of an earlier version, which has none.
    """
    path = folder / DOCUMENTS
    content = path.read_bytes() if path.is_file() else b""
    if DOCUMENTS not in manifest.sha256 or sha256(content) != manifest.sha256[DOCUMENTS]:
        raise UserError(
            f"{path}: expected the positions of the documents, found others, or none; delete {folder} and make it again"
        )
    starts = np.frombuffer(content, "<u8")
    return {"train": starts[: manifest.documents["train"]], "eval": starts[manifest.documents["train"] :]}


def legacy_sums(paths: dict[str, list[Path]]) -> str:
    """Return the digest of the checksums that earlier versions kept, of the tokens of each split in one file."""
    sha = hashlib.sha256()
    for split in SPLITS:
        rest = b""
        for path in paths[split]:
            with open(path, "rb") as file:
                while block := file.read(16 * BLOCK_BYTES):
                    rest += block
                    whole = len(rest) // BLOCK_BYTES * BLOCK_BYTES
                    sha.update(np.array(checksums(rest[:whole]), "<u4").tobytes())
                    rest = rest[whole:]
        sha.update(np.array(checksums(rest), "<u4").tobytes())
    return sha.hexdigest()


def _read_sums(folder: Path, manifest: Manifest) -> dict[str, np.ndarray | None]:
    """Return the uint32 checksums of the blocks of each split. Old folders have None."""
    if not manifest.block_bytes:
        return dict.fromkeys(SPLITS)
    path = folder / SUMS
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    size = np.dtype(manifest.dtype).itemsize
    blocks = [sum(-(-count * size // BLOCK_BYTES) for count in manifest.shard_tokens(split)) for split in SPLITS]
    if (
        sha256(content) != manifest.sha256[SUMS]
        or manifest.block_bytes != BLOCK_BYTES
        or len(content) != 4 * sum(blocks)
    ):
        raise UserError(
            f"{path}: expected the checksums of these tokens, found others, or none; delete {folder} and make it again"
        )
    sums = np.frombuffer(content, "<u4")
    return {"train": sums[: blocks[0]], "eval": sums[blocks[0] :]}
