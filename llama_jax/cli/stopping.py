"""Stops a run on SIGTERM, SIGHUP (a closed terminal) or Ctrl-C, at any moment and however often they arrive.

A run that has nothing to save ends at once, even while its main thread waits for a compiler. From the first step on, a
signal is noted, and the training loop saves and exits after the current step. A second signal changes nothing.
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
# What a signal does: end the process (leave), be noted for the training loop (note), or nothing (ignore).
Mode = Literal["leave", "note", "ignore"]


def status_of(number: int) -> int:
    """Return the exit status of a run that a signal ended after saving."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


class StopSignals:
    """Notes the signals that end a run.

    Signals that were ignored before, as under nohup, stay ignored. Outside the main thread nothing changes, because
    Python handles signals only there.

    Example:
        with StopSignals() as signals:
            ...                     # a signal ends the process here
            signals.set_mode("note")
            while not signals.received: ...
    """

    def __init__(self, at_exit: bool = False) -> None:
        """``at_exit``: the process ends after the block, and signals are ignored from then on."""
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
        # The C handler writes the signal's number into the pipe at once, whatever the main thread is doing.
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
        os.close(self._pipe[1])  # the thread then reads the end of the pipe and closes its side

    @property
    def name(self) -> str:
        """The name of the signal received, or ""."""
        return NAMES.get(self.received, "")  # type: ignore[call-overload]

    def set_mode(self, mode: Mode) -> None:
        """Set what a signal does from now on."""
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
        _tell(f"stopped by {self.name} with nothing to save yet; rerun the same command to start again")
        for act in self.before_leaving:
            with contextlib.suppress(Exception):
                act()
        # Not sys.exit, because the main thread may be inside a compiler.
        os._exit(status_of(self.received))


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{text}" if sys.stderr is not None and sys.stderr.isatty() else text, flush=True)


@contextlib.contextmanager
def output_may_vanish() -> Iterator[None]:
    """Let the block survive a closed terminal or a reader that is gone. Only the output is lost."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else _Sturdy(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Sturdy:
    """A stream that discards its output once it cannot be written."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write buffered text."""
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                # Redirect the descriptor itself, because libraries and the exiting interpreter write there, too.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
