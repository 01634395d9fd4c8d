"""manifest.json of a token folder: the text, the tokenizer, the files of tokens, and a digest of each and of itself."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.config import from_dict
from llama_jax.data.origin import Origin
from llama_jax.data.parts import SPLITS, TextFile
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import write_atomically
from llama_jax.tokenizer import Tokenizer

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
class ChatCounts:
    """How conversations were encoded, and what was counted of them. Dicts are by split (train, eval)."""

    settings: dict[str, str]
    """The settings that decide their tokens: chat_template (a digest), loss_on, too_long, max_seq_len."""
    template: str
    """The name of their format."""
    kinds: dict[str, int]
    """Conversations of each kind of record."""
    targets: dict[str, int]
    """Tokens that count in the loss."""
    cut: dict[str, int]
    dropped: dict[str, int]
    """Conversations that were left out because they were too long."""
    without_target: dict[str, int]
    """Conversations that were left out because nothing that counts was left of them."""
    longest: int = 0
    alike: dict[str, int] = dataclasses.field(default_factory=dict)
    """Preferences that were left out because both answers are the same."""
    unread: list[str] = dataclasses.field(default_factory=list)
    """The fields of records that were not read."""
    systems: int = 0
    """Records with a system message in a field of its own."""
    empty: dict[str, int] = dataclasses.field(default_factory=dict)
    """Answers without a text, which only end."""
    repeated: int = 0
    """Preferences whose answers both began with the prompt, which was taken off."""
    copies: int = 0
    """Held-out records that are also among those to train on."""


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
    tokenizer_files: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # digests of its files; empty: TOKENIZER alone
    tokens_sha256: str = ""  # what a run that began with an earlier version knows its tokens by
    chats: ChatCounts | None = None  # of conversations; None: a text

    @property
    def origin(self) -> Origin:
        """The origin of the tokens."""
        return Origin(
            self.source, self.text_files, self.text_sha256, self.train_size, self.separator, self.tokenizer_sha256,
            self.trained_vocab_size, self.tokens, self.tokens_sha256 or self.sha256.get(SUMS, ""), self.text_field, self.held_out,
            self.eval_source, self.eval_files, {} if self.chats is None else self.chats.settings,
        )  # fmt: skip

    @property
    def digests_of_tokenizer(self) -> dict[str, str]:
        """The SHA-256 of each file of the tokenizer, by its name."""
        return self.tokenizer_files or {TOKENIZER: self.tokenizer_sha256}

    def shard_tokens(self, split: str) -> list[int]:
        """Return the number of tokens of each file of a split."""
        return self.shards.get(split) or [self.tokens[split]]

    def lossy(self, split: str) -> bool:
        """Return whether decoding the tokens of a split loses some of its text."""
        return self.counts is not None and bool(self.counts.lost_bytes[split] or self.counts.unknown[split])


def digests_of_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the digests of a tokenizer's files by their names. Empty: it is tokenizer.model alone."""
    return {} if [*tokenizer.files] == [TOKENIZER] else {name: sha256(raw) for name, raw in tokenizer.files.items()}


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
    table = dataclasses.asdict(manifest)
    if not manifest.tokenizer_files:  # as earlier versions write it
        del table["tokenizer_files"]
    if manifest.chats is None:
        del table["chats"]
    write_atomically(folder / MANIFEST, _sealed(table))


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
        uncounted = table["counts"] is None and (table.get("made_by") or table.get("chats"))
        counts = None if uncounted else TextCounts(**table["counts"])
        files = {key: tuple(TextFile(**file) for file in table.get(key, ())) for key in ("text_files", "eval_files")}
        chats = {"chats": ChatCounts(**table["chats"])} if table.get("chats") is not None else {}
        table = {**table, "counts": counts, **files, **chats}
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
