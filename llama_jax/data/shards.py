"""Makes a token folder out of a corpus: its tasks are encoded, and what is done stays done after a kill; then joined.

The tasks depend on the corpus alone, so that the shards are the same for any number of workers and of restarts.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.cli.progress import Progress
from llama_jax.data.encode import Job, read_result
from llama_jax.data.joining import check_expected, join
from llama_jax.data.manifest import (
    DTYPES,
    VERSION,
    Manifest,
    read_manifest,
    sha256,
    write_manifest,
)
from llama_jax.data.origin import Origin
from llama_jax.data.parts import AnyCorpus, Unit
from llama_jax.data.tokens import TokenSet, open_tokens, token_files
from llama_jax.data.workers import Run, run_tasks
from llama_jax.errors import UserError
from llama_jax.storage.files import write_atomically
from llama_jax.tokenizer import Tokenizer

# A task is this much text, in bytes, or up to twice as much; of a large corpus, a thousandth of it, up to a limit.
TASK_BYTES, LARGEST_TASK_BYTES, TASKS = 1 << 24, 1 << 28, 1024
# The form of tasks' results. Those of another form, which an earlier version left unfinished, are made again.
RESULTS = 1
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
    of: str = "",
) -> TokenSet:
    """Return the tokens of ``corpus``, from ``folder`` if it holds exactly these, else newly made there.

    Memory is bounded for any length of text. Unfinished tokens never look finished, and old files stay until the new
    tokens are complete. Tasks that an earlier start finished are not done again. ``others`` says what to do about
    unfinished tokens of another text, which are removed without it. ``expected`` is what the tokens must be; raises
    UserError if they are not. ``run`` encodes the tasks. Progress says ``of`` what.
    """
    text_sha256, tokenizer_sha256 = corpus.digest(), tokenizer.digest
    if (kept := _kept(folder, corpus, tokenizer_sha256, expected)) is not None:
        check_expected(folder, expected, kept.manifest)
        return kept
    job = job_of(corpus, tokenizer, folder, f"{text_sha256} {tokenizer_sha256}", others, {"source": source})
    with _results_kept(job):
        encode_tasks(job, range(len(job.tasks)), tokenizer, workers, run, of)
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
    key = sha256(f"{VERSION} {RESULTS} {largest} {len(tasks)} {made_from}".encode())[:12]
    results = folder / f"{UNFINISHED_TASKS}{key}"
    for other in unfinished_in(folder):
        if other == results:
            continue
        found = _described(other, are_parts="data" in about)
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


def _described(results: Path, are_parts: bool) -> str:
    """Return what the results of another job are, for an error. ``are_parts`` says whether parts were asked for."""
    about: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((results / ABOUT).read_bytes())
    source = about.get("source", "a text")
    if "data" in about and not are_parts:
        return f"parts of {source}, which prepare --part made of it, and which merge joins,"
    return f"unfinished tokens of {source}, of another state of it or with other settings,"


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


def encode_tasks(
    job: Job, chosen: Sequence[int], tokenizer: Tokenizer, workers: int, run: Run = run_tasks, of: str = ""
) -> None:
    """Encode the chosen tasks by ``run``, apart from those that are done. Progress says ``of`` what."""
    waiting = [task for task in chosen if read_result(job, task) is None]
    if done := len(chosen) - len(waiting):
        print(f"{job.folder.parent}: {done:,} of {len(chosen):,} shards are there from an earlier start", flush=True)
    sizes = {task: sum(unit.size for unit in job.tasks[task]) for task in chosen}
    start = sum(sizes.values()) - sum(sizes[task] for task in waiting)
    with Progress(f"tokens{of}", sum(sizes.values()), "B", start) as progress:
        run(job, waiting, tokenizer, workers, progress.update)


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
