"""Progress bars, and how times and sizes are written."""

import math
import time

from tqdm import tqdm


class Progress:
    """A progress bar on standard error if that is a terminal, else a line on standard output every ``SECONDS``.

    So without a terminal, standard error holds only errors.

    Example:
        with Progress("converting", total=size, unit="B") as progress:
            progress.update(len(block))
    """

    SECONDS = 10

    def __init__(self, what: str, total: int | None, unit: str, start: int = 0, shown: bool = True):
        self._what, self._total, self._start, self._done = what, total, start, start
        self._in_bytes = unit == "B"
        self._note = ""
        self._began = self._printed = time.monotonic()
        self._bar = tqdm(
            desc=what if self._in_bytes else None, total=total, initial=start, unit=unit, unit_scale=self._in_bytes,
            dynamic_ncols=True, smoothing=0.05, disable=None if shown else True, delay=1 if self._in_bytes else 0,
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def note(self, text: str) -> None:
        """Show ``text`` next to the bar from now on."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def update(self, count: int = 1) -> None:
        """Count ``count`` more units as done."""
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= self.SECONDS:
            self._printed = now
            print(", ".join(filter(None, [self._amount(), self._note, self._left(now)])), flush=True)

    def _amount(self) -> str:
        done, total = (bytes_text(n or 0) if self._in_bytes else f"{n or 0:,}" for n in (self._done, self._total))
        return f"{self._what} {done}" + (f" of {total}" if self._total else "")

    def _left(self, now: float) -> str:
        if not self._total:
            return ""
        seconds = (now - self._began) / (self._done - self._start) * (self._total - self._done)
        return f"{duration(seconds)} to go"


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
