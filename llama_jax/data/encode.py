"""Encodes documents into a token folder in bounded memory, with counts. Files get their names when all are complete."""

import collections
import contextlib
import functools
import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.cli.progress import Progress
from llama_jax.data.lost import Losses, examples
from llama_jax.data.origin import Origin, difference
from llama_jax.data.parts import AnyCorpus, Part, Skipped
from llama_jax.data.stream import BLOCK_BYTES, checksums
from llama_jax.data.tokens import (
    DTYPES,
    MANIFEST,
    SPLITS,
    SUMS,
    VERSION,
    Manifest,
    TextCounts,
    TokenSet,
    open_tokens,
    read_manifest,
    sha256,
    write_manifest,
)
from llama_jax.errors import UserError
from llama_jax.storage.files import replacing
from llama_jax.tokenizer import Tokenizer

# Limits of a batch, which is encoded by all workers at once: parts and bytes.
PARTS_AT_ONCE, BYTES_AT_ONCE = 2048, 1 << 22
# At most this many digests of documents are kept to find copies; beyond it, a sample.
DIGESTS = 1 << 22


def prepare(
    corpus: AnyCorpus,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int = 1,
    trained_vocab_size: int = 0,
    source: str = "",
    expected: Origin | None = None,
    eval_source: str = "",
) -> TokenSet:
    """Return the tokens of ``corpus``, from ``folder`` if it holds exactly these, else newly made there.

    Memory is bounded for any length of text. Unfinished tokens never look finished, and old files stay until the new
    tokens are complete. ``expected`` is what the tokens must be; raises UserError if they are not.
    """
    text_sha256, tokenizer_sha256 = corpus.digest(), sha256(tokenizer.model_bytes)
    if (kept := _kept(folder, corpus, tokenizer_sha256, expected)) is not None:
        _check_expected(folder, expected, kept.manifest)
        return kept
    dtype = np.dtype(DTYPES[tokenizer.vocab_size > 1 << 16])
    corpus.replaced, corpus.skipped = 0, Skipped()
    writers = {split: _Writer(tokenizer, dtype, corpus.text_bytes, workers) for split in SPLITS}
    with contextlib.ExitStack() as files:
        # Files are moved into place in reverse order of this list.
        paths = {name: files.enter_context(replacing(folder / name)) for name in (SUMS, "eval.bin", "train.bin")}
        _write(corpus, writers, {split: paths[f"{split}.bin"] for split in SPLITS})
        sums = np.concatenate([np.array(writers[split].sums, "<u4") for split in SPLITS]).tobytes()
        paths[SUMS].write_bytes(sums)
        corpus.check_unchanged()

        of_each = functools.partial(_of_each, writers)
        manifest = Manifest(
            version=VERSION,
            text_sha256=text_sha256,
            train_size=corpus.train_size,
            separator=corpus.separator.decode(),
            tokenizer_sha256=tokenizer_sha256,
            trained_vocab_size=trained_vocab_size,
            dtype=dtype.str,
            tokens=of_each("tokens"),
            text_bytes={split: writers[split].losses.read for split in SPLITS},
            documents=of_each("documents"),
            replaced_sequences=corpus.replaced,
            source=source,
            text_files=corpus.files,
            vocab_size=tokenizer.vocab_size,
            largest_id=of_each("largest_id"),
            counts=_counts(writers),
            block_bytes=BLOCK_BYTES,
            sha256={f"{split}.bin": writers[split].sha.hexdigest() for split in SPLITS} | {SUMS: sha256(sums)},
            text_field=corpus.text_field,
            held_out=corpus.held_out,
            eval_source=eval_source,
            eval_files=corpus.eval_files,
            skipped_records=corpus.skipped.count,
            skipped_examples=corpus.skipped.examples,
            empty_records=corpus.skipped.empty,
        )
        _check_expected(folder, expected, manifest)
        (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, manifest)
    return open_tokens(folder)


def _check_expected(folder: Path, expected: Origin | None, manifest: Manifest) -> None:
    if expected is not None and (found := difference(expected, manifest.origin)):
        raise UserError(
            f"{folder}: expected the tokens that the run began with, found that {found}; go on with the version that made them, or "
            "choose another --train.save-dir"
        )


def _write(corpus: AnyCorpus, writers: "dict[str, _Writer]", paths: dict[str, Path]) -> None:
    """Encode the corpus, unit by unit, into the file of each split."""
    with contextlib.ExitStack() as files, Progress("tokens", None, "B") as progress:
        opened = {split: files.enter_context(open(paths[split], "wb")) for split in SPLITS}
        for unit in corpus.units():
            for split, part in corpus.read(unit):
                progress.update(writers[split].add(part, opened[split]))
        for split in SPLITS:
            writers[split].finish(opened[split])


def _kept(folder: Path, corpus: AnyCorpus, tokenizer_sha256: str, expected: Origin | None) -> TokenSet | None:
    """Return the tokens in ``folder`` if they are intact and belong to the corpus and the tokenizer, else None."""
    try:
        manifest = read_manifest(folder)
        if manifest is None or (manifest.text_sha256, manifest.tokenizer_sha256) != (corpus.digest(), tokenizer_sha256):
            return None
        if manifest.version < VERSION and corpus.separator and expected is None:
            return None  # earlier versions left line ends around separators in the documents
        if not any((folder / f"{split}.bin").exists() for split in SPLITS):
            return None  # a run on prepared tokens has only a copy of their manifest
        return open_tokens(folder)
    except UserError as error:
        print(f"warning: {error}: made again from the text", flush=True)
        return None


@dataclass
class _Writer:
    """Encodes a split into a file, batch by batch, and counts."""

    tokenizer: Tokenizer
    dtype: np.dtype
    corpus_bytes: int
    workers: int
    tokens: int = 0
    documents: int = 0
    byte_tokens: int = 0
    largest_id: int = 0
    sums: array = field(default_factory=lambda: array("I"))
    lengths: collections.Counter[int] = field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self.sha = hashlib.sha256()
        self.losses = Losses(self.tokenizer, self.corpus_bytes)
        self.digests = Digests()
        self._is_byte = np.zeros(self.tokenizer.vocab_size, bool)
        self._is_byte[self.tokenizer.byte_ids] = True
        self._length = 0
        self._batch: list[Part] = []
        self._batch_bytes = 0
        self._rest = b""

    def add(self, part: Part, file: BinaryIO) -> int:
        """Add the next part of the split. Return the bytes of text that were encoded by it: none, or a whole batch."""
        self._batch.append(part)
        self._batch_bytes += part.size
        if len(self._batch) < PARTS_AT_ONCE and self._batch_bytes < BYTES_AT_ONCE:
            return 0
        return self._encode(file)

    def finish(self, file: BinaryIO) -> None:
        """Encode what is left, and bring the file to the disk."""
        self._encode(file)
        self._put(file, self._rest)
        if self.documents:
            self.lengths[self._length] += 1
        file.flush()
        os.fsync(file.fileno())

    def _encode(self, file: BinaryIO) -> int:
        """Encode the parts that were added into the file. Return their size."""
        batch, size = self._batch, self._batch_bytes
        if not batch:
            return 0
        rows = self.tokenizer.encode_parts([p.text for p in batch], [p.starts for p in batch], self.workers)
        self._count(batch, rows)
        raw = self._rest + self._joined(batch, rows).tobytes()
        whole = len(raw) // BLOCK_BYTES * BLOCK_BYTES
        self._rest = raw[whole:]
        self._put(file, raw[:whole])
        self._batch, self._batch_bytes = [], 0
        return size

    def _put(self, file: BinaryIO, raw: bytes) -> None:
        file.write(raw)
        self.sha.update(raw)
        self.sums.extend(checksums(raw))

    def _joined(self, parts: Sequence[Part], rows: Sequence[list[int]]) -> np.ndarray:
        """Return the tokens of consecutive parts, with BOS and EOS around each document."""
        ids: list[int] = []
        for part, row in zip(parts, rows, strict=True):
            ids += [self.tokenizer.bos_id] * part.starts + row + [self.tokenizer.eos_id] * part.ends
        tokens = np.array(ids, self.dtype)
        self.tokens += len(tokens)
        self.byte_tokens += int(np.count_nonzero(self._is_byte[tokens]))
        self.largest_id = max(self.largest_id, int(tokens.max()))
        return tokens

    def _count(self, parts: Sequence[Part], rows: Sequence[list[int]]) -> None:
        self.losses.add(parts, rows)
        for part, row in zip(parts, rows, strict=True):
            if part.starts:
                if self.documents:
                    self.lengths[self._length] += 1
                self.documents += 1
                self._length = 0
            self._length += len(row)
            self.digests.add(part)

    @property
    def median(self) -> int:
        """The median number of tokens of a document."""
        left = sum(self.lengths.values()) // 2
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left < 0:
                return length
        return 0

    @property
    def longest(self) -> int:
        """The number of tokens of the longest document."""
        return max(self.lengths, default=0)


class Digests:
    """8-byte digests of documents.

    If there are too many, only those that end in some zero bits are kept, as a sample.
    """

    def __init__(self, limit: int = DIGESTS):
        self._limit, self._zeros = limit, 0
        self._kept = bytearray()
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, part: Part) -> None:
        """Add the next part of a document. A document cut at the end of a split gets no digest."""
        if part.starts:
            self._hash = hashlib.blake2b(part.text.encode(), digest_size=8)
        else:
            self._hash.update(part.text.encode())
        if part.ends:
            digest = self._hash.digest()
            if self._zeros and int.from_bytes(digest, "little") & ((1 << self._zeros) - 1):
                return
            self._kept += digest
            while len(self._kept) > 8 * self._limit:
                self._zeros += 1
                self._kept = bytearray(self._sample(self._zeros).tobytes())

    def copies_in(self, others: "Digests") -> int:
        """Return how many documents of ``others`` are also here, estimated if either is a sample."""
        zeros = max(self._zeros, others._zeros)
        return int(np.isin(others._sample(zeros), self._sample(zeros)).sum()) << zeros

    def _sample(self, zeros: int) -> np.ndarray:
        digests = np.frombuffer(bytes(self._kept), "<u8")
        return digests[digests & np.uint64((1 << zeros) - 1) == 0]


def _of_each(writers: dict[str, _Writer], name: str) -> dict[str, int]:
    return {split: int(getattr(writers[split], name)) for split in SPLITS}


def _counts(writers: dict[str, _Writer]) -> TextCounts:
    of_each = functools.partial(_of_each, writers)
    losses = {split: writers[split].losses for split in SPLITS}
    return TextCounts(
        median=of_each("median"),
        longest=of_each("longest"),
        unknown={split: losses[split].unknown for split in SPLITS},
        byte_tokens=of_each("byte_tokens"),
        compared_bytes={split: losses[split].compared for split in SPLITS},
        lost_bytes={split: losses[split].lost for split in SPLITS},
        lost_examples=examples(
            sum((losses[split].chars for split in SPLITS if losses[split].lost), collections.Counter())
        ),
        copies=writers["train"].digests.copies_in(writers["eval"].digests),
    )
