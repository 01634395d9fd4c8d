"""A watchdog that ends a run that hangs, and says where it hung."""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax

from llama_jax.errors import LOST
from llama_jax.training.clock import Activity, Clock

DOING: dict[Activity, str] = {
    "start": "getting ready",
    "step": "waiting for the devices",
    "data": "waiting for data",
    "evaluation": "evaluating",
    "saving": "saving",
    "sample": "making a sample and the plot",
}
LOOKS = 20  # in the allowed seconds
WRITING_SECONDS = 10


class Watchdog:
    """Ends the process with status LOST if for ``seconds`` no step finishes and no other activity begins or ends.

    A hung collective never returns if a process is missing, and a restarted run resumes from its last checkpoint. So
    ending the process is the remedy. One line on stderr names the step and the activity; the stacks of all threads go
    to the run folder. With 0 seconds the watchdog does nothing.
    """

    def __init__(self, clock: Clock, seconds: float, folder: Path, end: Callable[[int], object] = os._exit):
        self._clock, self._seconds, self._end = clock, seconds, end
        self._stacks = folder / f"hang-{jax.process_index()}.txt"
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        # Count looks, not seconds: a process that was suspended for an hour has not hung.
        seen, idle = self._clock.alive_at, 0
        while not self._over.wait(self._seconds / LOOKS):
            idle = idle + 1 if self._clock.alive_at == seen else 0
            seen = self._clock.alive_at
            if idle == LOOKS:
                self._stop()

    def _stop(self) -> None:
        # In a thread, because the disk itself may be what hangs.
        writer = threading.Thread(target=self._write_stacks, daemon=True)
        writer.start()
        writer.join(WRITING_SECONDS)
        process = f"process {jax.process_index()}, " if jax.process_count() > 1 else ""
        text = (
            f"error: train: {process}step {self._clock.finished + 1:,}: expected progress within "
            f"{self._seconds:g} s (train.watchdog_seconds), found none while {DOING[self._clock.activity]}; "
            f"see {self._stacks}, then rerun the command, which resumes from the last checkpoint"
        )
        print(text, file=sys.stderr, flush=True)
        self._end(LOST)

    def _write_stacks(self) -> None:
        with contextlib.suppress(OSError), open(self._stacks, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
