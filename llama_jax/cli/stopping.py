"""Ending a run on a signal: SIGTERM, SIGHUP (a closed terminal) and Ctrl-C, at any moment of a run, once or many times.

A run that has nothing to save ends at once, even while its main thread waits for a compiler. From the first step on a signal
is noted, and the training loop saves and leaves after the step under way. A second signal changes nothing.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any, Literal

from llama_jax.errors import INTERRUPTED, STOPPED

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGINT: "Ctrl-C"}
# What a signal does now: end the process, as nothing would be lost; be noted; or nothing, as the run has ended.
Mode = Literal["leave", "note", "ignore"]


def status_of(number: int) -> int:
    """The exit status of a run that a signal ended, saved."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


class StopSignals:
    """Notes the signals that end a run.

    with StopSignals() as signals:
        ...                     # a signal ends the process here
        signals.set_mode("note")
        while not signals.received: ...

    Signals that were ignored before, as under nohup, stay so. Outside the main thread nothing is changed: Python lets no
    other thread handle signals.
    """

    def __init__(self, at_exit: bool = False) -> None:
        """at_exit: the process ends behind the block, and signals are ignored from there on."""
        self.received = 0
        self._at_exit = at_exit
        self.before_leaving: list[Callable[[], object]] = []
        self._mode: Mode = "leave"
        self._lock = threading.Lock()
        self._handlers: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # The C handler writes the signal's number there at once, whatever the main thread is doing.
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="signals", daemon=True).start()
        for number in NAMES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._at_exit else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])  # the thread reads the end, and closes its own side

    @property
    def name(self) -> str:
        """The signal that was received, in words; empty where there was none."""
        return NAMES.get(self.received, "")  # type: ignore[call-overload]

    def set_mode(self, mode: Mode) -> None:
        """Say what a signal does from now on."""
        with self._lock:
            self._mode = mode

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in self._handlers:
                    self._note(number)
        os.close(pipe)

    def _note(self, number: int) -> None:
        with self._lock:
            if self._mode == "ignore":
                return
            first, self.received = not self.received, self.received or number
            if self._mode == "leave":
                self._leave()
            if first:
                _tell(f"{self.name}: the run saves after this step and ends")

    def _leave(self) -> None:
        _tell(f"stopped by {self.name}, with nothing to save yet; the same command begins again where this one did")
        for act in self.before_leaving:
            with contextlib.suppress(Exception):
                act()
        # Not sys.exit: the main thread may be deep in a compiler.
        os._exit(status_of(self.received))


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{text}" if sys.stderr is not None and sys.stderr.isatty() else text, flush=True)


@contextlib.contextmanager
def output_may_vanish() -> Iterator[None]:
    """Within the block a terminal that was closed, or a reader that has gone, costs the output and not the run."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Sturdy(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Sturdy:
    """A stream that goes to nowhere from the moment that it cannot be written."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                # The descriptor itself: libraries and the interpreter's own end write there too.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
