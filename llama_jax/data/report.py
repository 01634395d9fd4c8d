"""The report about a corpus, and what it is made from."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.data import suspicions
from llama_jax.data.counting import Documents, Shown, Texts, Tokens
from llama_jax.data.finding import Text
from llama_jax.data.lost import Losses, examples, loss_warning
from llama_jax.data.manifest import Manifest
from llama_jax.data.odd_bytes import replacement_warning
from llama_jax.data.parts import SPLITS, Part, Skipped
from llama_jax.data.records import CorpusFile
from llama_jax.data.summary import skipped_warning
from llama_jax.tokenizer import Tokenizer

# An excerpt has so many characters, escapes included.
EXCERPT = 200
# A note names so many files.
NAMED = 3


@dataclass(frozen=True)
class Document:
    """A document of the report."""

    file: str
    """Path or address of its file; of tokens, the split."""
    record: int
    """Line, row, record or document of the file, from 1."""
    word: str
    """The word for it."""
    length: int
    excerpt: str
    """Its beginning, in which what cannot be printed is escaped."""


@dataclass(frozen=True)
class Report:
    """A description of what a corpus holds. None: not known, as tokens are without a tokenizer.

    Lengths are in ``length_unit``: in tokens without BOS and EOS, or in bytes of UTF-8.
    """

    source: str
    files: int
    """Number of files that were read."""
    length_unit: Literal["tokens", "bytes"]
    seed: int
    documents: int | None = None
    bytes: int | None = None
    """Bytes of text in UTF-8, without what stands between documents."""
    characters: int | None = None
    tokens: int | None = None
    """Tokens that training reads: with BOS and EOS of each document."""
    bytes_per_token: float | None = None
    unknown_share: float | None = None
    """Share of the tokens that stand for characters that the tokenizer does not know."""
    byte_share: float | None = None
    """Share of the tokens that stand for a single byte."""
    vocab_size: int | None = None
    used_tokens: int | None = None
    """Number of different tokens that occur, BOS and EOS aside."""
    duplicates: int | None = None
    """Number of documents that are exact copies of an earlier one."""
    duplicates_estimated: bool = False
    """Whether ``duplicates`` is an estimate, which it is for millions of different documents."""
    longest: int | None = None
    median: int | None = None
    """The length in the middle; of an even number of documents, the larger of the two."""
    histogram: list[dict[str, int]] = field(default_factory=list)
    """Number of ``documents`` with lengths ``from`` a power of two ``to`` the next, less one."""
    scripts: dict[str, float] | None = None
    """Share of each script of Unicode in the characters. Common: spaces, digits and signs, which scripts share."""
    longest_documents: list[Document] = field(default_factory=list)
    random_documents: list[Document] = field(default_factory=list)
    replaced_sequences: int = 0
    """Byte sequences that are not UTF-8 and were read as U+FFFD."""
    skipped_records: int = 0
    """Records that cannot be read and were left out."""
    empty_records: int = 0
    """Records with an empty text, which is no document."""
    notes: list[str] = field(default_factory=list)
    """Lines about what was left out on purpose, such as hidden files, and where tokens come from."""
    warnings: list[str] = field(default_factory=list)
    """Lines about what looks wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Encoded:
    """A tokenizer, how often its tokens occur in a corpus, and what it lost of the text, if that was compared."""

    tokenizer: Tokenizer
    tokens: Tokens
    losses: Losses | None = None

    def add(self, parts: Sequence[Part]) -> list[int]:
        """Encode and count the next parts of a text. Return the number of ids of each."""
        ids, lengths = self.tokenizer.encode_batch([p.text for p in parts], [p.starts for p in parts])
        self.tokens.add(ids)
        if self.losses is not None:
            self.losses.add(parts, ids, lengths)
        return [int(length) for length in lengths]

    def fields(self, count: int, size: int | None) -> dict[str, Any]:
        """Return the fields of a report of ``count`` tokens, with BOS and EOS, for ``size`` bytes of text."""
        of = self.tokens.of
        return {
            "tokens": count,
            "bytes_per_token": size / count if size and count else None,
            "unknown_share": of([self.tokenizer.unk_id]) / max(1, count),
            "byte_share": of(self.tokenizer.byte_ids) / max(1, count),
            "vocab_size": self.tokenizer.vocab_size,
            "used_tokens": self.tokens.used,
        }


def report_of_text(text: Text, files: Sequence[CorpusFile], texts: Texts, encoded: Encoded | None, seed: int) -> Report:
    """Return the report about a text that was read from ``files``."""
    corpus, documents = text.corpus, texts.documents

    def named(shown: Shown) -> Document:
        file = files[shown.file]
        word = "document" if file.format == "text" else file.word
        return Document(file.name, shown.record, word, shown.length, excerpt(str(shown.head)))

    empty = [file.name for file in files if file.place.size == 0]
    are = "file is" if len(empty) == 1 else "files are"
    note = f"{len(empty):,} {are} empty: {', '.join(empty[:NAMED])}{', ...' * (len(empty) > NAMED)}"
    return Report(
        text.source, len(files), "tokens" if encoded else "bytes", seed,
        bytes=texts.bytes,
        characters=texts.characters,
        scripts=texts.scripts(),
        replaced_sequences=corpus.replaced,
        notes=[*text.notes, *([note] if empty else [])],
        warnings=_warnings(
            suspicions.of_characters(texts),
            suspicions.of_documents(documents, corpus.separator == b"" and not corpus.text_field),
            suspicions.of_tokens(encoded.tokenizer, encoded.tokens) if encoded else [],
            _losses(encoded.losses) if encoded and encoded.losses else [],
            [replacement_warning(corpus.replaced), skipped_warning(corpus.skipped)],
        ),
        **_of_skipped(corpus.skipped),
        **_of_documents(documents, named),
        **(encoded.fields(encoded.tokens.total + 2 * documents.count, texts.bytes) if encoded else {}),
    )  # fmt: skip


def report_of_tokens(
    source: str, manifest: Manifest, documents: Documents | None, encoded: Encoded, seed: int
) -> Report:
    """Return the report about tokens that were read. ``documents`` is None if nothing tells where one begins."""

    def named(shown: Shown) -> Document:
        begins = encoded.tokenizer.decode([i for i in shown.head if isinstance(i, int)])
        return Document(SPLITS[shown.file], shown.record, "document", shown.length, excerpt(begins))

    made = f"token files of {manifest.made_by}" if manifest.made_by else f"tokens of {manifest.source or 'a text'}"
    counts = " and ".join(
        f"{manifest.tokens[split]:,}{f' in {manifest.documents[split]:,} documents' * (documents is not None)} {words}"
        for split, words in zip(SPLITS, ("to train on", "held out"), strict=True)
    )
    size = sum(manifest.text_bytes.values()) or None
    skipped = Skipped(manifest.skipped_records, manifest.skipped_examples, manifest.empty_records)
    return Report(
        source, len({*manifest.text_files, *manifest.eval_files}), "tokens", seed,
        bytes=size,
        replaced_sequences=manifest.replaced_sequences,
        notes=[f"{source}: {made}: {counts}"],
        warnings=_warnings(
            suspicions.of_documents(documents, False) if documents else [],
            suspicions.of_tokens(encoded.tokenizer, encoded.tokens),
            [replacement_warning(manifest.replaced_sequences), skipped_warning(skipped)],
        ),
        **_of_skipped(skipped),
        **(_of_documents(documents, named) if documents else {}),
        **encoded.fields(sum(manifest.tokens.values()), size),
    )  # fmt: skip


def excerpt(text: str) -> str:
    """Return the beginning of a text, in which what cannot be printed is escaped."""
    shown = ""
    for char in text[:EXCERPT]:
        piece = char if char.isprintable() else char.encode("unicode_escape").decode()
        if len(shown) + len(piece) > EXCERPT:
            break
        shown += piece
    return shown


def _of_documents(documents: Documents, named: Callable[[Shown], Document]) -> dict[str, Any]:
    return {
        "documents": documents.count,
        "duplicates": documents.duplicates,
        "duplicates_estimated": documents.distinct.is_estimate,
        "longest": documents.longest_length,
        "median": documents.median,
        "histogram": [{"from": low, "to": high, "documents": count} for low, high, count in documents.histogram()],
        "longest_documents": [named(shown) for shown in documents.longest],
        "random_documents": [named(shown) for shown in documents.random],
    }


def _of_skipped(skipped: Skipped) -> dict[str, Any]:
    return {"skipped_records": skipped.count, "empty_records": skipped.empty}


def _losses(losses: Losses) -> list[str]:
    most = examples(losses.chars) if losses.lost else []
    return [loss_warning(losses.lost, losses.compared, losses.unknown, most)]


def _warnings(*groups: Sequence[str]) -> list[str]:
    return [line.removeprefix("warning: ") for group in groups for line in group if line]
