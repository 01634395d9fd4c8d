"""Encodes conversations in all cores: many together, in order, and in processes of their own where there are many.

A process is a command of its own, as those of workers.py are. It gets the chat format once, then lists of
conversations, each of which it answers with their token ids.
"""

import base64
import contextlib
import itertools
import os
import pickle
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np

from llama_jax.chat.examples import chat_examples
from llama_jax.chat.formats import ChatFormat
from llama_jax.chat.messages import Message
from llama_jax.data.workers import Process, Said, answering, cores, running_process
from llama_jax.errors import UserError

# Records that are encoded together, and those that are encoded before processes are worth their start.
TOGETHER, WORTH_PROCESSES = 64, 2048
# Lists that a process has at a time: one to encode, and one that waits.
AT_A_TIME = 2


class Ids(NamedTuple):
    """A conversation of n tokens."""

    ids: np.ndarray  # int32 [n]
    counts: np.ndarray  # uint8 [n], 1 where the token counts in the loss


T = TypeVar("T")
# The conversations of a record, or what is wrong with it.
Asked = Sequence[Sequence[Message]] | UserError
# The same, encoded.
Encoded = list[Ids] | UserError


class Task(NamedTuple, Generic[T]):
    """A record, and the conversations in it."""

    record: T
    conversations: Asked


def encode_tasks(tasks: Iterable[Task[T]], chat_format: ChatFormat, workers: int) -> Iterator[tuple[T, Encoded]]:
    """Yield each record with its conversations encoded, in order. The result is the same for any number of ``workers``.

    Where there are many records, up to ``workers`` processes encode them, no more than there are cores. An error that
    ``tasks`` raises is raised once the records before it were yielded. Raises UserError if a process ends.
    """
    lists = _lists(tasks)
    for some in itertools.islice(lists, WORTH_PROCESSES // TOGETHER):
        yield from _with_records(some, _encode([task.conversations for task in some.tasks], chat_format))
    if (more := next(lists, None)) is None:
        return
    lists = itertools.chain([more], lists)
    if (count := min(workers, cores())) < 2:
        for some in lists:
            yield from _with_records(some, _encode([task.conversations for task in some.tasks], chat_format))
        return
    with _Pool(chat_format, count) as pool:
        for some, encoded in pool.answers(lists):
            yield from _with_records(some, encoded)


class _Some(NamedTuple):
    """Some tasks, and the error that ended these."""

    tasks: list[Task[Any]]
    error: UserError | None = None


def _lists(tasks: Iterable[Task[T]]) -> Iterator[_Some]:
    """Yield the tasks in lists."""
    left = iter(tasks)
    while True:
        some: list[Task[Any]] = []
        try:
            for task in itertools.islice(left, TOGETHER):
                some.append(task)
        except UserError as error:
            yield _Some(some, error)
            return
        if not some:
            return
        yield _Some(some)


def _with_records(some: _Some, encoded: list[Encoded]) -> Iterator[tuple[Any, Encoded]]:
    for task, one in zip(some.tasks, encoded, strict=True):
        yield task.record, one
    if some.error is not None:
        raise some.error


def _encode(asked: Sequence[Asked], chat_format: ChatFormat) -> list[Encoded]:
    """Return the conversations of records, encoded."""
    every = [one for found in asked if not isinstance(found, UserError) for one in found]
    results = iter(chat_examples(chat_format, every))
    encoded: list[Encoded] = []
    for found in asked:
        if isinstance(found, UserError):
            encoded.append(found)
            continue
        own, failed = [], None
        for result in itertools.islice(results, len(found)):
            if isinstance(result, UserError):
                failed = failed or result
            else:
                own.append(Ids(np.array(result[0], np.int32), np.array(result[1], np.uint8)))
        encoded.append(failed or own)
    return encoded


class _Pool:
    """The processes, and what each of them was asked."""

    def __init__(self, chat_format: ChatFormat, count: int):
        self._stack = contextlib.ExitStack()
        self._format, self._count = pickle.dumps(chat_format), count
        self._said = queue.SimpleQueue[Said]()

    def __enter__(self) -> "_Pool":
        with contextlib.ExitStack() as stack:
            self._running = [stack.enter_context(running_process(__name__, self._said)) for _ in range(self._count)]
            for process in self._running:
                process.send(self._format)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def answers(self, lists: Iterator[_Some]) -> Iterator[tuple[_Some, list[Encoded]]]:
        """Yield what the processes answer, in the order of the lists."""
        waiting: deque[int] = deque()
        asked: dict[int, _Some] = {}
        answered: dict[int, list[Encoded]] = {}
        numbers: dict[Process, deque[int]] = {process: deque() for process in self._running}
        count = itertools.count()

        def give(process: Process) -> None:
            if (some := next(lists, None)) is not None:
                asked[number := next(count)] = some
                waiting.append(number)
                numbers[process].append(number)
                process.send(pickle.dumps([task.conversations for task in some.tasks]))

        for _ in range(AT_A_TIME):
            for process in self._running:
                give(process)
        while waiting:
            process, word, value = self._said.get()
            if word == "ended":
                raise UserError(
                    f"data.filepath: expected {self._count} processes to encode conversations, found that one ended "
                    f"({process.reason()}); start again"
                )
            answered[numbers[process].popleft()] = pickle.loads(base64.b64decode(value))
            give(process)
            while waiting and waiting[0] in answered:
                number = waiting.popleft()
                yield asked.pop(number), answered.pop(number)


def main() -> None:
    """Encode the lists of conversations that come on standard input, after the format. End when it ends."""
    say = answering()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is a process per core already
    lists = queue.SimpleQueue[list[Asked]]()
    chat_format: ChatFormat = pickle.load(sys.stdin.buffer)  # of the process that started this one
    threading.Thread(target=_read, args=(sys.stdin.buffer, lists), daemon=True).start()
    while True:
        encoded = _encode(lists.get(), chat_format)
        say("encoded", base64.b64encode(pickle.dumps(encoded)).decode())


def _read(stream: BinaryIO, lists: "queue.SimpleQueue[list[Asked]]") -> None:
    with contextlib.suppress(EOFError):
        while True:
            lists.put(pickle.load(stream))
    os._exit(0)  # nobody waits for the conversations in progress any more
