"""What the benchmarks share: peers in processes of their own, and ratios of pairs."""

import contextlib
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

# Seconds between two measurements: threads of the one before, which wait for more work awake, have gone to sleep.
PAUSE = 0.5


@contextlib.contextmanager
def worker(serve: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """The connection to a process that runs ``serve(*args, connection)``; the process ends with the context."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(*args, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a process that fails ends our waiting
    try:
        yield ours
    finally:
        process.terminate()
        process.join()


def ratio(name: str, ratios: list[float]) -> dict[str, Any]:
    """The median of the pairs' ratios, above 1 where we are faster, and how far they lie apart."""
    return {name: round(statistics.median(ratios), 3), f"{name}_range": [round(min(ratios), 3), round(max(ratios), 3)]}
