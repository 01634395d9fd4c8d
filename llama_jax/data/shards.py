"""Makes a token folder out of a corpus: its tasks are encoded, and what is done stays done after a kill; then joined.

The tasks depend on the corpus alone, so that the shards are the same for any number of workers and of restarts.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.cli.progress import Progress
from llama_jax.data.counts import Counts, Digests, text_counts
from llama_jax.data.encode import Job, Result, read_result, tokens_path
from llama_jax.data.manifest import (
    DOCUMENTS,
    DTYPES,
    MANIFEST,
    SUMS,
    VERSION,
    Manifest,
    digests_of_files,
    read_manifest,
    sha256,
    write_manifest,
)
from llama_jax.data.origin import Origin, difference
from llama_jax.data.parts import SPLITS, AnyCorpus, Skipped, Unit
from llama_jax.data.stream import BLOCK_BYTES
from llama_jax.data.text import add_odd, check_is_text
from llama_jax.data.tokens import TokenSet, legacy_sums, open_tokens, shard_names, token_files
from llama_jax.data.workers import Run, run_tasks
from llama_jax.errors import UserError
from llama_jax.storage.files import replacing, write_atomically
from llama_jax.tokenizer import Tokenizer

# A task is this much text, in bytes, or up to twice as much; of a large corpus, a thousandth of it, up to a limit.
TASK_BYTES, LARGEST_TASK_BYTES, TASKS = 1 << 24, 1 << 28, 1024
# The results of tasks are in a folder of this name, with a digest of what they are made from.
UNFINISHED_TASKS = "unfinished-"
# A file there, which says of what text they are.
ABOUT = "about.json"


class RefuseOthers(NamedTuple):
    """The wish that results of another text or other settings are refused, by a UserError that names ``key``."""

    key: str


def prepare(
    corpus: AnyCorpus,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int = 1,
    trained_vocab_size: int = 0,
    source: str = "",
    expected: Origin | None = None,
    eval_source: str = "",
    others: RefuseOthers | None = None,
    run: Run = run_tasks,
) -> TokenSet:
    """Return the tokens of ``corpus``, from ``folder`` if it holds exactly these, else newly made there.

    Memory is bounded for any length of text. Unfinished tokens never look finished, and old files stay until the new
    tokens are complete. Tasks that an earlier start finished are not done again. ``others`` says what to do about
    unfinished tokens of another text, which are removed without it. ``expected`` is what the tokens must be; raises
    UserError if they are not. ``run`` encodes the tasks.
    """
    text_sha256, tokenizer_sha256 = corpus.digest(), tokenizer.digest
    if (kept := _kept(folder, corpus, tokenizer_sha256, expected)) is not None:
        _check_expected(folder, expected, kept.manifest)
        return kept
    job = job_of(corpus, tokenizer, folder, f"{text_sha256} {tokenizer_sha256}", others, {"source": source})
    with _results_kept(job):
        encode_tasks(job, range(len(job.tasks)), tokenizer, workers, run)
    with _results_kept(job, unless=UserError):
        corpus.check_unchanged()
        manifest = join(
            job,
            tokenizer,
            folder,
            expected,
            trained_vocab_size=trained_vocab_size,
            source=source,
            eval_source=eval_source,
        )
    return finish(job, folder, manifest)


def finish(job: Job, folder: Path, manifest: Manifest) -> TokenSet:
    """Write the manifest of what ``join`` put into ``folder``, remove what it replaced, and open the tokens."""
    write_manifest(folder, manifest)
    shutil.rmtree(job.folder)
    for path in token_files(folder):
        if path.name not in manifest.sha256:
            path.unlink()
    return open_tokens(folder)


def job_of(
    corpus: AnyCorpus,
    tokenizer: Tokenizer,
    folder: Path,
    made_from: str,
    others: RefuseOthers | None,
    about: dict[str, Any],
) -> Job:
    """Return the tasks of a corpus, with a folder for their results in ``folder``, in which ``about`` is noted.

    ``made_from`` tells the results of one corpus from those of another. ``others`` is as for ``prepare``.
    """
    largest = min(LARGEST_TASK_BYTES, max(TASK_BYTES, 1 << (corpus.text_bytes // TASKS).bit_length()))
    tasks = tasks_of(corpus.units(largest), largest)
    key = sha256(f"{VERSION} {largest} {len(tasks)} {made_from}".encode())[:12]
    results = folder / f"{UNFINISHED_TASKS}{key}"
    for other in unfinished_in(folder):
        if other == results:
            continue
        found = f"unfinished tokens of {_source_of(other)}, of another state of it or with other settings,"
        if others is not None:
            raise UserError(
                f"{others.key}: expected a new folder, or one with the requested tokens, found {found} in {other}; repeat their command "
                f"to go on, delete {other}, or choose another {others.key}"
            )
        print(f"{other}: {found} are removed", flush=True)
        shutil.rmtree(other)
    results.mkdir(parents=True, exist_ok=True)
    if not (results / ABOUT).exists():
        write_atomically(results / ABOUT, json.dumps(about))
    dtype = DTYPES[tokenizer.vocab_size > 1 << 16]
    return Job(corpus, tasks, Path(tokenizer.place).absolute(), dtype, results.absolute())


def unfinished_in(folder: Path) -> list[Path]:
    """Return the folders with the results of unfinished jobs."""
    return sorted(path for path in folder.glob(f"{UNFINISHED_TASKS}*") if path.is_dir())


def _source_of(results: Path) -> str:
    try:
        return str(json.loads((results / ABOUT).read_bytes())["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a text"


def tasks_of(units: Sequence[Unit], largest: int) -> tuple[tuple[Unit, ...], ...]:
    """Return consecutive units in groups of ``largest`` bytes or somewhat more."""
    tasks: list[list[Unit]] = []
    size = largest
    for unit in units:
        if size >= largest:
            tasks.append([])
            size = 0
        tasks[-1].append(unit)
        size += unit.size
    return tuple(tuple(task) for task in tasks)


def encode_tasks(job: Job, chosen: Sequence[int], tokenizer: Tokenizer, workers: int, run: Run = run_tasks) -> None:
    """Encode the chosen tasks by ``run``, apart from those that are done."""
    waiting = [task for task in chosen if read_result(job, task) is None]
    if done := len(chosen) - len(waiting):
        print(f"{job.folder.parent}: {done:,} of {len(chosen):,} shards are there from an earlier start", flush=True)
    sizes = {task: sum(unit.size for unit in job.tasks[task]) for task in chosen}
    start = sum(sizes.values()) - sum(sizes[task] for task in waiting)
    with Progress("tokens", sum(sizes.values()), "B", start) as progress:
        run(job, waiting, tokenizer, workers, progress.update)


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
    corpus = job.corpus
    counts = {split: Counts() for split in SPLITS}
    digests = {split: Digests() for split in SPLITS}
    shards: dict[str, list[tuple[int, int, str]]] = {split: [] for split in SPLITS}  # task, tokens, sha256
    sums: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    replaced, skipped, odd = 0, Skipped(), dict[str, tuple[int, int]]()
    for task, result in _results(job):
        replaced += result.replaced
        skipped = skipped.and_of(result.skipped)
        add_odd(odd, result.odd)
        for split, shard in result.shards.items():
            counts[split].add(shard.counts)
            digests[split].join(shard.digests)
            if shard.counts.tokens:
                shards[split].append((task, shard.counts.tokens, shard.sha256))
                sums[split].append(shard.sums)
    for name, (read, bad) in odd.items():
        check_is_text(name, read, bad)
    names = {split: shard_names(split, len(shards[split])) for split in SPLITS}
    checksums = np.concatenate([np.zeros(0, "<u4"), *sums["train"], *sums["eval"]]).astype("<u4").tobytes()
    digest_of = {
        name: shard[2] for split in SPLITS for name, shard in zip(names[split], shards[split], strict=False)
    }  # an empty split has one file, and no shard
    empty = {names[split][0]: sha256(b"") for split in SPLITS if not shards[split]}
    with contextlib.ExitStack() as files:
        # Files are moved into place in reverse order of this list.
        made = {name: files.enter_context(replacing(folder / name)) for name in (DOCUMENTS, SUMS, *empty)}
        documents = _write_documents(job, made[DOCUMENTS])
        made[SUMS].write_bytes(checksums)
        for name in empty:
            made[name].touch()
        manifest = Manifest(
            version=VERSION,
            text_sha256=corpus.digest(),
            train_size=corpus.train_size,
            separator=corpus.separator.decode(),
            tokenizer_sha256=tokenizer.digest,
            tokenizer_files=digests_of_files(tokenizer),
            trained_vocab_size=trained_vocab_size,
            dtype=job.dtype,
            tokens={split: counts[split].tokens for split in SPLITS},
            text_bytes={split: counts[split].text_bytes for split in SPLITS},
            documents={split: counts[split].documents for split in SPLITS},
            replaced_sequences=replaced,
            source=source,
            text_files=corpus.files,
            vocab_size=tokenizer.vocab_size,
            largest_id={split: counts[split].largest_id for split in SPLITS},
            counts=text_counts(counts, digests["train"].copies_in(digests["eval"])),
            block_bytes=BLOCK_BYTES,
            sha256=digest_of | empty | {SUMS: sha256(checksums), DOCUMENTS: documents},
            text_field=corpus.text_field,
            held_out=corpus.held_out,
            eval_source=eval_source,
            eval_files=corpus.eval_files,
            skipped_records=skipped.count,
            skipped_examples=skipped.examples,
            empty_records=skipped.empty,
            shards={split: [tokens for _, tokens, _ in shards[split]] for split in SPLITS},
        )
        paths = {split: [tokens_path(job.folder, task, split) for task, _, _ in shards[split]] for split in SPLITS}
        manifest = _as_expected(folder, expected, manifest, paths)
        (folder / MANIFEST).unlink(missing_ok=True)
        for split in SPLITS:
            for name, path in zip(names[split], paths[split], strict=False):
                _link(path, folder / name)
    return manifest


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
    _check_expected(folder, expected, manifest)
    return manifest


def _check_expected(folder: Path, expected: Origin | None, manifest: Manifest) -> None:
    if expected is not None and (found := difference(expected, manifest.origin)):
        raise UserError(
            f"{folder}: expected the tokens that the run began with, found that {found}; go on with the version that made them, or "
            "choose another --train.save-dir"
        )


def _kept(folder: Path, corpus: AnyCorpus, tokenizer_sha256: str, expected: Origin | None) -> TokenSet | None:
    """Return the tokens in ``folder`` if they are intact and belong to the corpus and the tokenizer, else None."""
    try:
        manifest = read_manifest(folder)
        if manifest is None or (manifest.text_sha256, manifest.tokenizer_sha256) != (corpus.digest(), tokenizer_sha256):
            return None
        if manifest.version < VERSION and corpus.separator and expected is None:
            return None  # earlier versions left line ends around separators in the documents
        if not any(token_files(folder)):
            return None  # a run on prepared tokens has only a copy of their manifest
        return open_tokens(folder)
    except UserError as error:
        print(f"warning: {error}: made again from the text", flush=True)
        return None


@contextlib.contextmanager
def _results_kept(job: Job, unless: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Keep the results of a job for the next start if the block fails.

    Remove them if there are none, and on errors of the type ``unless``.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, unless) or not any(job.folder.glob("[0-9]*.json")):
            shutil.rmtree(job.folder, ignore_errors=True)
        raise
