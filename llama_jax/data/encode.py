"""Encodes one task: some units of a corpus, whose tokens become a shard of each split.

A task depends on nothing but the corpus and the tokenizer. It can be done by any process, and again after a kill.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_jax.data.counts import Counts, Digests
from llama_jax.data.lost import Losses
from llama_jax.data.parts import SIZE, SPLITS, AnyCorpus, Part, Skipped, Unit
from llama_jax.data.stream import BLOCK_BYTES, checksums
from llama_jax.storage.files import replacing, write_atomically
from llama_jax.tokenizer import Tokenizer

# Limits of a batch, which is encoded at once: parts and bytes.
PARTS_AT_ONCE, BYTES_AT_ONCE = 2048, 1 << 22


@dataclass(frozen=True)
class Job:
    """The tasks of a corpus, each of which is a list of units, and the folder for their results."""

    corpus: AnyCorpus
    tasks: tuple[tuple[Unit, ...], ...]
    tokenizer: Path
    dtype: str
    folder: Path


@dataclass(frozen=True)
class Shard:
    """The tokens of a task in one split, and what was counted of them."""

    counts: Counts
    sha256: str
    sums: np.ndarray  # uint32 [blocks]: the checksum of each block of the file
    starts: np.ndarray  # uint32 [documents]: the tokens at which documents begin
    digests: np.ndarray  # uint64: digests of documents, see Digests


@dataclass(frozen=True)
class Result:
    """The result of a task."""

    shards: dict[str, Shard]
    replaced: int
    skipped: Skipped
    odd: dict[str, tuple[int, int]]


def tokens_path(folder: Path, task: int, split: str) -> Path:
    """Return the file with the tokens of a task."""
    return folder / f"{task:06d}.{split}.bin"


def encode_task(job: Job, task: int, tokenizer: Tokenizer, tell: Callable[[int], None] = lambda _: None) -> None:
    """Encode a task into the job's folder. Its description is written last, once all else is on the disk.

    ``tell`` is called with the number of bytes of text that were encoded since the last call. Raises UserError if the
    text cannot be read.
    """
    corpus = job.corpus
    corpus.replaced, corpus.skipped, corpus.odd = 0, Skipped(), {}
    size = sum(unit.size for tasks in job.tasks for unit in tasks)
    dtype = np.dtype(job.dtype)
    shards = {}
    with (
        replacing(tokens_path(job.folder, task, "train")) as train,
        replacing(tokens_path(job.folder, task, "eval")) as held_out,
        open(train, "wb") as first,
        open(held_out, "wb") as second,
    ):
        files = {"train": first, "eval": second}
        encoders = {split: _Encoder(tokenizer, dtype, size, files[split], tell) for split in SPLITS}
        for unit in job.tasks[task]:
            for split, parts in corpus.groups(unit):
                encoders[split].add(parts)
        for split in SPLITS:
            shards[split] = encoders[split].finish()
    arrays = {f"{name} {split}": getattr(shards[split], name) for split in SPLITS for name in _ARRAYS}
    with replacing(job.folder / f"{task:06d}.npz") as path, open(path, "wb") as file:
        np.savez(file, **arrays)
    described = {split: {"counts": shards[split].counts.to_dict(), "sha256": shards[split].sha256} for split in SPLITS}
    table = {"replaced": corpus.replaced, "skipped": asdict(corpus.skipped), "odd": corpus.odd, **described}
    write_atomically(job.folder / f"{task:06d}.json", json.dumps(table))


_ARRAYS = ("sums", "starts", "digests")


def read_result(job: Job, task: int) -> Result | None:
    """Return the result of a task, or None if it is not done, or not whole."""
    try:
        table: dict[str, Any] = json.loads((job.folder / f"{task:06d}.json").read_bytes())
        with np.load(job.folder / f"{task:06d}.npz", allow_pickle=False) as arrays:
            shards = {
                split: Shard(
                    Counts.from_dict(table[split]["counts"]),
                    table[split]["sha256"],
                    *(arrays[f"{name} {split}"] for name in _ARRAYS),
                )
                for split in SPLITS
            }
        for split in SPLITS:
            size = shards[split].counts.tokens * np.dtype(job.dtype).itemsize
            if tokens_path(job.folder, task, split).stat().st_size != size:
                return None
        odd = {name: (int(read), int(bad)) for name, (read, bad) in table["odd"].items()}
        return Result(shards, int(table["replaced"]), Skipped(**table["skipped"]), odd)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class _Encoder:
    """Encodes a split into a file, batch by batch, and counts."""

    def __init__(
        self, tokenizer: Tokenizer, dtype: np.dtype, corpus_bytes: int, file: BinaryIO, tell: Callable[[int], None]
    ):
        self._tokenizer, self._dtype, self._file, self._tell = tokenizer, dtype, file, tell
        self._counts, self._digests, self._losses = Counts(), Digests(), Losses(tokenizer, corpus_bytes)
        self._sums, self._starts = array("I"), array("I")
        self._sha = hashlib.sha256()
        self._is_byte = np.zeros(tokenizer.vocab_size, bool)
        self._is_byte[tokenizer.byte_ids] = True
        self._batch: list[Part] = []
        self._batch_bytes = 0
        self._rest = b""

    def add(self, parts: list[Part]) -> None:
        """Add the next parts of the split."""
        for start in range(0, len(parts), PARTS_AT_ONCE):
            some = parts[start : start + PARTS_AT_ONCE]
            self._batch += some
            self._batch_bytes += sum(map(SIZE, some))
            if len(self._batch) >= PARTS_AT_ONCE or self._batch_bytes >= BYTES_AT_ONCE:
                self._encode()

    def finish(self) -> Shard:
        """Encode what is left, bring the file to the disk, and return what was counted."""
        self._encode()
        self._put(self._rest)
        self._file.flush()
        os.fsync(self._file.fileno())
        counts, losses = self._counts, self._losses
        counts.text_bytes, counts.unknown, counts.compared = losses.read, losses.unknown, losses.compared
        counts.chars = losses.chars
        sums, starts = np.array(self._sums, "<u4"), np.array(self._starts, "<u4")
        return Shard(counts, self._sha.hexdigest(), sums, starts, self._digests.kept)

    def _encode(self) -> None:
        """Encode the parts that were added into the file."""
        batch, size = self._batch, self._batch_bytes
        if not batch:
            return
        texts, _, starts, ends, _ = zip(*batch, strict=True)
        ids, lengths = self._tokenizer.encode_batch(texts, starts)
        self._losses.add(batch, ids, lengths)
        self._digests.add(batch)
        raw = self._rest + self._joined(np.array(starts), np.array(ends), ids, lengths).tobytes()
        whole = len(raw) // BLOCK_BYTES * BLOCK_BYTES
        self._rest = raw[whole:]
        self._put(raw[:whole])
        self._batch, self._batch_bytes = [], 0
        self._tell(size)

    def _put(self, raw: bytes) -> None:
        self._file.write(raw)
        self._sha.update(raw)
        self._sums.extend(checksums(raw))

    def _joined(self, starts: np.ndarray, ends: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the tokens of consecutive parts, with BOS and EOS around each document, and count them."""
        after = np.cumsum(starts + lengths + ends)  # where the next part begins
        bos, eos = (after - ends - lengths - starts)[starts], (after - 1)[ends]
        tokens = np.empty(int(after[-1]), self._dtype)
        is_text = np.ones(len(tokens), bool)
        is_text[bos] = is_text[eos] = False
        tokens[is_text], tokens[bos], tokens[eos] = ids, self._tokenizer.bos_id, self._tokenizer.eos_id
        self._starts.extend((self._counts.tokens + bos).tolist())
        self._counts.add_parts(starts, lengths)
        self._counts.tokens += len(tokens)
        self._counts.byte_tokens += int(np.count_nonzero(self._is_byte[tokens]))
        self._counts.largest_id = max(self._counts.largest_id, int(tokens.max(initial=0)))
        return tokens
