"""Processes that encode tasks of a job. Each of them reads its own part of the corpus and writes its own shards.

They are commands of their own, so that a job may begin in a notebook, or in a script that is not to be imported again.
"""

import contextlib
import gc
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import llama_jax
from llama_jax.data.encode import Job, encode_task
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

KEPT = "what is done is kept"
# Seconds that a process gets to end, once it is told to.
PATIENCE = 5


class Run(Protocol):
    """A way to encode tasks of a job, such as ``run_tasks``, and with its arguments."""

    def __call__(
        self, job: Job, tasks: Sequence[int], tokenizer: Tokenizer, workers: int, tell: Callable[[int], None], /
    ) -> None: ...


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(job: Job, tasks: Sequence[int], tokenizer: Tokenizer, workers: int, tell: Callable[[int], None]) -> None:
    """Encode tasks of a job in up to ``workers`` processes, no more than there are cores; one alone is this process.

    ``tell`` is called with the bytes of text that were encoded since the last call. Raises UserError if a text cannot
    be read or tokens cannot be written.
    """
    count = min(workers, cores(), len(tasks))
    if count == cores() < workers:
        print(f"{count} process{'es' * (count > 1)} encode, as many as there are cores, not {workers}", flush=True)
    if count < 2:
        for task in tasks:
            with naming_the_disk(job):
                encode_task(job, task, tokenizer, tell)
        return
    waiting, said = iter(tasks), queue.SimpleQueue[Said]()
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(running_process(__name__, said)) for _ in range(count)]
        pickled = pickle.dumps(job)
        for process in started:
            process.send(pickled)
            process.give(next(waiting, None))
        left = len(tasks)
        while left:
            process, word, value = said.get()
            if word == "encoded":
                tell(int(value))
            elif word == "done":
                left -= 1
                process.give(next(waiting, None))
            elif word == "failed":
                raise UserError(str(value))
            elif process.is_busy:
                raise UserError(
                    f"--workers: expected {count} processes to encode, found that one ended ({process.reason()}); start again with "
                    f"fewer, {KEPT}"
                )


class Said(NamedTuple):
    """A message of a process: how many bytes it encoded, that a task is done or failed, or that it ended."""

    process: "Process"
    word: str
    value: Any


class Process:
    """A process that encodes one task after the other."""

    def __init__(self, running: "subprocess.Popen[bytes]"):
        self._running, self.is_busy = running, False

    def give(self, task: int | None) -> None:
        """Let it encode a task next. None: there is none."""
        self.is_busy = task is not None
        if task is not None:
            self.send(f"{task}\n".encode())

    def send(self, content: bytes) -> None:
        """Write to its standard input."""
        if self._running.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended, which is told at its end of the output
                self._running.stdin.write(content)
                self._running.stdin.flush()

    def reason(self) -> str:
        """Say how the process ended."""
        status = self._running.wait()
        return f"signal {-status}; 9 may be for memory" if status < 0 else f"status {status}"


@contextlib.contextmanager
def running_process(
    module: str, said: "queue.SimpleQueue[Said]", *argv: str, stderr: int | None = None
) -> Iterator[Process]:
    """Start a module of the package as a process. What it says goes to ``said``. It ends with the block."""
    place = str(Path(llama_jax.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH", "")]))
    running = subprocess.Popen(
        # -P: a file in this folder that is called as a module of Python's is not taken for it.
        [sys.executable, "-P", "-c", f"from {module} import main; main()", *argv],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert running.stdin is not None and running.stdout is not None
    process = Process(running)

    def listen(stream: Any) -> None:
        for line in stream:
            said.put(Said(process, *json.loads(line)))
        said.put(Said(process, "ended", None))

    thread = threading.Thread(target=listen, args=(running.stdout,), name="worker", daemon=True)
    try:
        thread.start()
        yield process
    finally:
        with contextlib.suppress(OSError):
            running.stdin.close()
        try:
            running.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        thread.join()
        running.stdout.close()


@contextlib.contextmanager
def naming_the_disk(job: Job) -> Iterator[None]:
    """Turn an OSError in the block into a UserError with the folder of the results."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or job.folder}: expected to write tokens, found: {error.strerror or error}; correct it and start "
            f"again, {KEPT}"
        ) from None


def answering() -> Callable[[str, Any], None]:
    """Return a function that says a word and a value to the process that started this one. Ctrl-C is left to that one.

    Whatever else is printed from now on goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(word: str, value: Any) -> None:
        print(json.dumps((word, value)), file=output, flush=True)

    return say


def main() -> None:
    """Encode the tasks whose numbers come on standard input, after the job. End when it ends."""
    say = answering()
    job: Job = pickle.load(sys.stdin.buffer)  # of the process that started this one
    tasks = queue.SimpleQueue[int]()
    threading.Thread(target=_read_tasks, args=(sys.stdin.buffer, tasks), daemon=True).start()

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is a process per core already
    tokenizer = Tokenizer(job.tokenizer)
    # Documents are many tuples, none of them in a cycle. To look for cycles in them took a fifth of the time.
    gc.freeze()
    gc.set_threshold(100_000)
    while True:
        try:
            with naming_the_disk(job):
                encode_task(job, task := tasks.get(), tokenizer, lambda size: say("encoded", size))
            say("done", task)
        except UserError as error:
            say("failed", str(error))


def _read_tasks(stream: BinaryIO, tasks: "queue.SimpleQueue[int]") -> None:
    for line in stream:
        tasks.put(int(line))
    os._exit(0)  # nobody waits for the task in progress any more
