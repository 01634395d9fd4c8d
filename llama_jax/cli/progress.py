"""Progress bars, progress lines for work that prints nothing itself, and the format of durations and sizes."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

# Seconds between two lines about work that prints nothing itself, if standard error is not a terminal.
BEAT = 30
# The bar is left out if it would have fewer columns than this.
NARROWEST_BAR = 6


class Progress:
    """A progress bar on standard error if that is a terminal, else a line every ``SECONDS`` seconds.

    These lines go to ``stream``, by default standard output, so that standard error contains only errors.

    Example:
        with Progress("converting", total=size, unit="B") as progress:
            progress.update(len(block))
    """

    SECONDS = 10

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        start: int = 0,
        shown: bool = True,
        stream: TextIO | None = None,
    ):
        self._what, self._total, self._start, self._done = what, total, start, start
        self._in_bytes, self._named, self._shown = unit == "B", what != unit, shown
        self._parts: list[str] = []
        self._pace: float | None = None
        self._busy: tuple[str, float] | None = None
        self._stream = stream
        self._began = self._printed = time.monotonic()
        self._bar = _Bar(
            self._bar_text, total=total, initial=start, unit=unit, dynamic_ncols=True, disable=None if shown else True,
            delay=1 if self._in_bytes else 0,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def note(self, text: str, pace: float | None = None) -> None:
        """Show ``text`` next to the bar from now on.

        text: parts separated by ", ", the most important first. A narrow terminal shows as many as fit.
        pace: seconds per unit, used to estimate the remaining time. None: the mean since the beginning.
        """
        self._parts, self._pace = text.split(", "), pace

    def update(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._shown and self._bar.disable and now - self._printed >= self.SECONDS:
            self._printed = now
            parts = self._parts or [self._rate(now)]
            self._print(", ".join(filter(None, [self._amount(" of "), *parts, self._left(now)])))

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show that ``what`` is in progress while the block runs, in which no unit is completed."""
        if not self._shown:
            yield
            return
        if self._bar.disable:
            with _ticking(lambda seconds: self._print(f"{what}: {duration(seconds)} so far"), BEAT):
                yield
            return
        self._busy = what, time.monotonic()
        self._bar.refresh()
        try:
            with _ticking(lambda _: self._bar.refresh(), 1):
                yield
        finally:
            self._busy = None

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _bar_text(self, width: int) -> tuple[str, str]:
        """Return the texts at the left and at the right of the bar in a terminal of ``width`` columns."""
        left = self._amount("/") if self._named else self._amount("/").removeprefix(f"{self._what} ")
        if self._total:
            left += f" {self._done / self._total:4.0%}"
        now = time.monotonic()
        if self._busy is not None:
            end = f"{self._busy[0]}, {duration(now - self._busy[1])}"
        else:
            end = "" if self._done == self._total else self._left(now)
        parts = list(self._parts) or [self._rate(now)]
        room = width - len(left) - len(" | ")
        while parts and len(", ".join([*parts, end])) > room:
            parts.pop()
        return left, ", ".join(filter(None, [*parts, end]))

    def _amount(self, of: str) -> str:
        done, total = (bytes_text(n or 0) if self._in_bytes else f"{n or 0:,}" for n in (self._done, self._total))
        return f"{self._what} {done}" + (f"{of}{total}" if self._total else "")

    def _rate(self, now: float) -> str:
        done, seconds = self._done - self._start, now - self._began
        return f"{bytes_text(done / seconds)}/s" if self._in_bytes and done and seconds else ""

    def _left(self, now: float) -> str:
        done = self._done - self._start
        if not self._total or not (done or self._pace):
            return ""
        pace = (now - self._began) / done if self._pace is None else self._pace
        return f"{duration(pace * (self._total - self._done))} to go"


class _Bar(tqdm):
    """A bar of tqdm between two texts, which ``text`` returns for the terminal's number of columns."""

    def __init__(self, text: Callable[[int], tuple[str, str]], **options: Any):
        self._text = text
        super().__init__(**options)

    def __str__(self) -> str:
        width = (self.format_dict["ncols"] or 80) - 1  # a full line would make some terminals begin the next one
        left, right = (text.replace("{", "{{").replace("}", "}}") for text in self._text(width))
        room = width - len(left) - len(right) - len(" || ")
        between = " |{bar}| " if self.total and room >= NARROWEST_BAR else " | " if right else ""
        return self.format_meter(
            self.n, self.total or 0, 0, ncols=width, ascii=self.ascii, bar_format=left + between + right
        )


# Bars are drawn by threads of one process. tqdm's own lock also takes a semaphore of the system, which a process that
# ends at once would leave behind: on macOS Python warns of it, behind the error.
_Bar.set_lock(threading.RLock())


def print_above(text: str, file: TextIO | None = None) -> None:
    """Print a line, by default on standard output, without breaking a bar."""
    with _Bar.external_write_mode(file):
        print(text, file=file, flush=True)


@contextlib.contextmanager
def working(what: str, stream: TextIO | None = None, shown: bool = True) -> Iterator[None]:
    """Show that ``what`` is in progress while the block, which prints nothing itself, runs for a second or longer.

    If standard error is a terminal, a line there counts the seconds and is removed when the block ends. Otherwise a
    line goes to ``stream``, by default standard output, every ``BEAT`` seconds.
    """
    if not shown:
        yield
        return
    if sys.stderr is None or not sys.stderr.isatty():
        with _ticking(lambda seconds: print(f"{what}: {duration(seconds)} so far", file=stream, flush=True), BEAT):
            yield
        return
    terminal, told = sys.stderr, False

    def tell(seconds: float) -> None:
        nonlocal told
        told = True
        # The cursor returns to the start of the line, so that other output overwrites it.
        print(f"\r{what}: {math.floor(seconds)} s\x1b[K\r", end="", file=terminal, flush=True)

    try:
        with _ticking(tell, 1):
            yield
    finally:
        if told:
            print("\r\x1b[K", end="", file=terminal, flush=True)


@contextlib.contextmanager
def _ticking(tell: Callable[[float], None], every: float) -> Iterator[None]:
    """Pass the seconds so far to ``tell`` every ``every`` seconds while the block runs, on a separate thread."""
    done, began = threading.Event(), time.monotonic()

    def tick() -> None:
        with contextlib.suppress(OSError, ValueError):  # if the stream is closed, only these lines are lost
            while not done.wait(every):
                tell(time.monotonic() - began)

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def duration(seconds: float) -> str:
    """Return seconds as text: 90 -> "1 min 30 s"."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + (f"{minutes} min " if minutes else "") + f"{seconds} s"


def bytes_text(count: float) -> str:
    """Return a size as text: 13476939616 -> "13.48 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:,.2f} kB"
