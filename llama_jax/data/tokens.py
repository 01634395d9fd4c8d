"""Token folders: a text encoded once, with a description.

A folder holds train.bin and eval.bin (uint16, or uint32 for large vocabularies, little endian). Large ones come in
shards: train-00000.bin and so on. checksums.bin has a uint32 crc32 for each block of each of them, documents.bin the
positions at which documents begin, uint64, of train and then of eval. manifest.json is written last; it describes the
text and the tokenizer and has a digest of each file and of itself. ``prepare`` also puts tokenizer.model there.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import DataArgs, from_dict
from llama_jax.data.cache import TokenCache, cache_folder
from llama_jax.data.origin import Origin
from llama_jax.data.parts import SPLITS, TextFile
from llama_jax.data.places import at_once
from llama_jax.data.remote import Bucket, RemoteStream, cache_text, keep_small_files
from llama_jax.data.stream import BLOCK_BYTES, Shard, TokenStream, check_in_background, checksums
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import is_address, write_atomically

VERSION = 3
# This version had no checksums, and found other documents if there was a separator.
FIRST_VERSION = 2
DTYPES = ("<u2", "<u4")
SUMS = "checksums.bin"
DOCUMENTS = "documents.bin"
TOKENIZER = "tokenizer.model"
# The names of files of tokens.
TOKEN_FILE = re.compile(rf"({'|'.join(SPLITS)})(-\d{{5,}})?\.bin")
MANIFEST = "manifest.json"
# This file exists while ``prepare`` makes tokens in the folder.
UNFINISHED = ".unfinished"
# The key of the manifest's digest of itself.
SEAL = "manifest_sha256"
# The check on opening takes at most this many seconds.
OPENING_SECONDS = 0.3
# The positions of so many documents are checked on opening. Those of more are checked when they are read.
FEW_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class TextCounts:
    """Counts made while a text was encoded, by split (train, eval) or for both."""

    median: dict[str, int]
    """Tokens of a document, without BOS and EOS."""
    longest: dict[str, int]
    unknown: dict[str, int]
    """Tokens for characters that the tokenizer does not know."""
    byte_tokens: dict[str, int]
    compared_bytes: dict[str, int]
    """Bytes of text that were compared with the decoded tokens."""
    lost_bytes: dict[str, int]
    """Bytes that were compared and differ."""
    lost_examples: list[str]
    copies: int
    """Held-out documents that are exact copies of training documents, estimated if there are many documents."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. Dicts are by split (train, eval); text is counted in bytes."""

    version: int
    text_sha256: str
    train_size: float
    separator: str
    tokenizer_sha256: str
    trained_vocab_size: int  # the requested size if the tokenizer was trained on this text, else 0
    dtype: str
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    documents: dict[str, int]
    replaced_sequences: int
    # Since version 3:
    source: str = ""
    text_files: tuple[TextFile, ...] = ()
    vocab_size: int = 0
    largest_id: dict[str, int] = dataclasses.field(default_factory=dict)
    counts: TextCounts | None = None
    block_bytes: int = 0  # size of a block with a checksum; 0: no checksums
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)  # digests of the folder's files
    # Later additions to version 3:
    text_field: str = ""  # the field of the records that held the text
    held_out: str = "end"  # how the held-out part was chosen (parts.HeldOut)
    eval_source: str = ""  # a held-out text of its own
    eval_files: tuple[TextFile, ...] = ()
    skipped_records: int = 0
    skipped_examples: list[str] = dataclasses.field(default_factory=list)
    empty_records: int = 0
    made_by: str = ""  # the programs that made the token files, if others did
    shards: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # tokens of each shard; empty: one file
    tokens_sha256: str = ""  # what a run that began with an earlier version knows its tokens by

    @property
    def origin(self) -> Origin:
        """The origin of the tokens."""
        return Origin(
            self.source, self.text_files, self.text_sha256, self.train_size, self.separator, self.tokenizer_sha256,
            self.trained_vocab_size, self.tokens, self.tokens_sha256 or self.sha256.get(SUMS, ""), self.text_field, self.held_out,
            self.eval_source, self.eval_files,
        )  # fmt: skip

    def lossy(self, split: str) -> bool:
        """Return whether decoding the tokens of a split loses some of its text."""
        return self.counts is not None and bool(self.counts.lost_bytes[split] or self.counts.unknown[split])


@dataclass(frozen=True)
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


def sha256(content: bytes) -> str:
    """Return the hex digest of ``content``."""
    return hashlib.sha256(content).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a finished token folder, or None if there is none.

    Raises UserError if it is damaged or of an unknown version.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_manifest(content, str(folder), (folder / "train.bin").exists())


def parse_manifest(content: bytes, folder: str, is_ours: bool = False) -> Manifest | None:
    """Return the manifest that ``content`` is, or None if it is another program's. ``is_ours``: its name is ours.

    Raises UserError if it is damaged or of an unknown version.
    """
    path = f"{folder}/{MANIFEST}"
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        table = None
    ours = {"text_sha256", "tokenizer_sha256", "text_bytes"}
    if not (ours & table.keys() if isinstance(table, dict) else is_ours):
        return None
    try:
        if table["version"] not in (FIRST_VERSION, VERSION):
            raise UserError(
                f"{path}: expected prepared tokens of version {VERSION} or {FIRST_VERSION}, found version "
                f"{quoted(table['version'])}; delete {folder} and make it again"
            )
        if table["version"] == VERSION and content != _sealed(table):
            raise ValueError
        return _parse(table)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path}: expected a manifest of prepared tokens, found it damaged; delete {folder} and make it again"
        ) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    write_atomically(folder / MANIFEST, _sealed(dataclasses.asdict(manifest)))


def _sealed(table: dict[str, Any]) -> bytes:
    """Return a manifest as JSON, with a digest of the rest as its last key."""
    table = {key: value for key, value in table.items() if key != SEAL}
    digest = sha256(json.dumps(table).encode())
    return json.dumps(table | {SEAL: digest}, indent=1).encode() + b"\n"


def _parse(table: dict[str, Any]) -> Manifest:
    """Parse a manifest from JSON. Raises ValueError, TypeError or KeyError if it is invalid."""
    fields = [field.name for field in dataclasses.fields(Manifest)]
    if table["version"] == FIRST_VERSION:
        if table.keys() != set(fields[: fields.index("source")]):
            raise KeyError
    else:
        counts = TextCounts(**table["counts"]) if table["counts"] is not None or not table.get("made_by") else None
        files = {key: tuple(TextFile(**file) for file in table.get(key, ())) for key in ("text_files", "eval_files")}
        table = {**table, "counts": counts, **files}
        table.pop(SEAL)
    try:
        manifest = from_dict(Manifest, table, "manifest.json")
    except UserError:
        raise TypeError from None
    by_split = (manifest.tokens, manifest.text_bytes, manifest.documents)
    whole = all(c.keys() == set(SPLITS) and all(type(n) is int and n >= 0 for n in c.values()) for c in by_split)
    if not whole or manifest.dtype not in DTYPES:
        raise ValueError
    return manifest


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
    if is_address(os.fspath(folder)):
        return _open_at(os.fspath(folder), cache_gb)
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: expected a folder of prepared tokens with manifest.json, found none; make it again")
    dtype = np.dtype(manifest.dtype)
    tokenizer = folder / TOKENIZER
    if manifest.block_bytes and tokenizer.exists() and sha256(tokenizer.read_bytes()) != manifest.tokenizer_sha256:
        raise UserError(
            f"{tokenizer}: expected the tokenizer that made these tokens, found another, or a damaged one; restore it, or delete "
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
    digests = {MANIFEST: sha256(content), TOKENIZER: manifest.tokenizer_sha256, SUMS: manifest.sha256[SUMS]}
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
        counts = manifest.shards.get(split) or [manifest.tokens[split]]
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
    shards = {split: manifest.shards.get(split) or [manifest.tokens[split]] for split in SPLITS}
    blocks = [sum(-(-count * size // BLOCK_BYTES) for count in shards[split]) for split in SPLITS]
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
