"""Joins the results of a corpus's tasks into a token folder."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llama_jax.data.counts import Counts, Digests, text_counts
from llama_jax.data.encode import Job, Result, Shard, read_result, tokens_path
from llama_jax.data.manifest import DOCUMENTS, MANIFEST, SUMS, VERSION, Manifest, digests_of_files, sha256
from llama_jax.data.odd_bytes import add_odd, check_is_text
from llama_jax.data.origin import Origin, difference
from llama_jax.data.parts import SPLITS, Skipped
from llama_jax.data.stream import BLOCK_BYTES
from llama_jax.data.tokens import legacy_sums, shard_names
from llama_jax.errors import UserError
from llama_jax.storage.files import replacing
from llama_jax.tokenizer import Tokenizer


@dataclass
class _Split:
    """It holds what all tasks have of one split: counts, and the files of tokens that are not empty."""

    counts: Counts = field(default_factory=Counts)
    digests: Digests = field(default_factory=Digests)
    tasks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sha256: list[str] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)

    def add(self, task: int, shard: Shard) -> None:
        """Add what a task has."""
        self.counts.add(shard.counts)
        self.digests.join(shard.digests)
        if shard.counts.tokens:
            self.tasks.append(task)
            self.tokens.append(shard.counts.tokens)
            self.sha256.append(shard.sha256)
            self.sums.append(shard.sums)


@dataclass
class _Joined:
    """It holds what the results of all tasks have together."""

    splits: dict[str, _Split] = field(default_factory=lambda: {split: _Split() for split in SPLITS})
    replaced: int = 0
    skipped: Skipped = field(default_factory=Skipped)

    def names(self, split: str) -> list[str]:
        """Return the names of a split's files. One without tokens has one file, which is empty."""
        return shard_names(split, len(self.splits[split].tasks))

    @property
    def empty(self) -> list[str]:
        """The names of the files without tokens."""
        return [self.names(split)[0] for split in SPLITS if not self.splits[split].tasks]

    @property
    def checksums(self) -> bytes:
        """The checksum of each block, uint32, of train and then of eval."""
        sums = [each for split in SPLITS for each in self.splits[split].sums]
        return np.concatenate([np.zeros(0, "<u4"), *sums]).astype("<u4").tobytes()

    @property
    def sha256(self) -> dict[str, str]:
        """The digest of each file of tokens."""
        found = {name: sha256(b"") for name in self.empty}
        for split in SPLITS:
            found |= zip(self.names(split), self.splits[split].sha256, strict=False)
        return found

    def of_each(self, count: str) -> dict[str, int]:
        """Return one of the counts, by name, for each split."""
        return {split: getattr(each.counts, count) for split, each in self.splits.items()}


def join(
    job: Job,
    tokenizer: Tokenizer,
    folder: Path,
    expected: Origin | None = None,
    *,
    trained_vocab_size: int = 0,
    source: str = "",
    eval_source: str = "",
) -> Manifest:
    """Move the results of all tasks into ``folder``. Return the manifest, which the caller writes last.

    Raises UserError if the tokens are not those that are ``expected``; then nothing is moved.
    """
    joined = _joined(job)
    checksums = joined.checksums
    paths = {split: [tokens_path(job.folder, task, split) for task in joined.splits[split].tasks] for split in SPLITS}
    with contextlib.ExitStack() as files:
        # Files are moved into place in reverse order of this list.
        made = {name: files.enter_context(replacing(folder / name)) for name in (DOCUMENTS, SUMS, *joined.empty)}
        digests = {SUMS: sha256(checksums), DOCUMENTS: _write_documents(job, made[DOCUMENTS])}
        made[SUMS].write_bytes(checksums)
        for name in joined.empty:
            made[name].touch()
        manifest = _manifest(job, tokenizer, joined, digests, trained_vocab_size, source, eval_source)
        manifest = _as_expected(folder, expected, manifest, paths)
        (folder / MANIFEST).unlink(missing_ok=True)
        for split in SPLITS:
            for name, path in zip(joined.names(split), paths[split], strict=False):
                _link(path, folder / name)
    return manifest


def _joined(job: Job) -> _Joined:
    """Return what the results of all tasks have together. Raises UserError if one is missing, or is not of text."""
    joined, odd = _Joined(), dict[str, tuple[int, int]]()
    for task, result in _results(job):
        joined.replaced += result.replaced
        joined.skipped = joined.skipped.and_of(result.skipped)
        add_odd(odd, result.odd)
        for split, shard in result.shards.items():
            joined.splits[split].add(task, shard)
    for name, (read, bad) in odd.items():
        check_is_text(name, read, bad)
    return joined


def _manifest(
    job: Job,
    tokenizer: Tokenizer,
    joined: _Joined,
    digests: dict[str, str],
    trained_vocab_size: int,
    source: str,
    eval_source: str,
) -> Manifest:
    """Return the manifest of what is joined. ``digests`` are those of the other files."""
    corpus, splits, skipped = job.corpus, joined.splits, joined.skipped
    copies = splits["train"].digests.copies_in(splits["eval"].digests)
    return Manifest(
        version=VERSION,
        text_sha256=corpus.digest(),
        train_size=corpus.train_size,
        separator=corpus.separator.decode(),
        tokenizer_sha256=tokenizer.digest,
        tokenizer_files=digests_of_files(tokenizer),
        trained_vocab_size=trained_vocab_size,
        dtype=job.dtype,
        tokens=joined.of_each("tokens"),
        text_bytes=joined.of_each("text_bytes"),
        documents=joined.of_each("documents"),
        replaced_sequences=joined.replaced,
        source=source,
        text_files=corpus.files,
        vocab_size=tokenizer.vocab_size,
        largest_id=joined.of_each("largest_id"),
        counts=text_counts({split: each.counts for split, each in splits.items()}, copies),
        block_bytes=BLOCK_BYTES,
        sha256=joined.sha256 | digests,
        text_field=corpus.text_field,
        held_out=corpus.held_out,
        eval_source=eval_source,
        eval_files=corpus.eval_files,
        skipped_records=skipped.count,
        skipped_examples=skipped.examples,
        empty_records=skipped.empty,
        shards={split: each.tokens for split, each in splits.items()},
    )


def _results(job: Job) -> Iterator[tuple[int, Result]]:
    """Yield the result of each task. Raises UserError if one is missing."""
    for task in range(len(job.tasks)):
        result = read_result(job, task)
        if result is None:
            raise UserError(
                f"{job.folder}: expected the result of task {task:,}, found none, or a damaged one; start again"
            )
        yield task, result


def _write_documents(job: Job, path: Path) -> str:
    """Write the position of each document's first token, uint64, of train and then of eval. Return a digest."""
    sha = hashlib.sha256()
    with open(path, "wb") as file:
        for split in SPLITS:
            before = 0
            for _, result in _results(job):
                shard = result.shards[split]
                raw = (shard.starts.astype("<u8") + np.uint64(before)).tobytes()
                file.write(raw)
                sha.update(raw)
                before += shard.counts.tokens
    return sha.hexdigest()


def _link(path: Path, final: Path) -> None:
    """Copy a result to its final place, by a link if possible. It stays until all are there."""
    if final.exists() and os.path.samefile(path, final):
        return
    with replacing(final) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # some file systems have no links
            shutil.copyfile(path, temporary)


def _as_expected(folder: Path, expected: Origin | None, manifest: Manifest, paths: dict[str, list[Path]]) -> Manifest:
    """Return the manifest of the tokens that are ``expected``. Raises UserError if they are others."""
    known = expected.tokens_sha256 if expected is not None else ""
    if known and known != manifest.origin.tokens_sha256:
        # Earlier versions kept all tokens of a split in one file, with other checksums.
        manifest = dataclasses.replace(manifest, tokens_sha256=legacy_sums(paths))
    check_expected(folder, expected, manifest)
    return manifest


def check_expected(folder: Path, expected: Origin | None, manifest: Manifest) -> None:
    """Raise UserError if a folder's tokens are not those that are ``expected``."""
    if expected is not None and (found := difference(expected, manifest.origin)):
        raise UserError(
            f"{folder}: expected the tokens that the run began with, found that {found}; go on with the version that made them, or "
            "choose another --train.save-dir"
        )
