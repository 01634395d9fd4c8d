"""Measures where a run's time goes and makes the records of metrics.jsonl."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import jax

from llama_jax.config import Config
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.devices.memory import memory_in_use
from llama_jax.training.flops import peak_flops, step_flops
from llama_jax.training.rates import learning_rate
from llama_jax.training.step import StepMetrics

T = TypeVar("T")
Activity = Literal["start", "step", "data", "evaluation", "saving", "sample"]
ACTIVITIES: tuple[Activity, ...] = ("start", "step", "data", "evaluation", "saving", "sample")
# The values of a record that depend on timing. All others are the same in every run.
TIMES = (
    "step_seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "memory_bytes", "goodput",
    "run_seconds", "run_step_seconds",
    *(f"{activity}_seconds" for activity in ACTIVITIES),
)  # fmt: skip


class Clock:
    """Assigns every second since the start to one activity: steps, waiting for data, evaluation and so on.

    Steps are dispatched long before they finish, so a thread waits for each result and notes the time. Waiting for data
    is counted only while the devices are idle.
    """

    def __init__(self) -> None:
        self.seconds: dict[Activity, float] = dict.fromkeys(ACTIVITIES, 0.0)
        self.activity: Activity = "start"
        self.finished = 0  # the newest step whose result has arrived
        self.recorded = 0, 0.0  # tokens of this start that records count, and the seconds that they took
        self.alive_at = time.perf_counter()  # when a step last finished, or an activity began or ended
        self._since = self._finished_at = self.alive_at
        self._dispatched = 0
        self._results: queue.SimpleQueue[tuple[int, jax.Array] | None] = queue.SimpleQueue()

    @contextlib.contextmanager
    def spent_on(self, activity: Activity) -> Iterator[None]:
        """Count the time of the block as ``activity``."""
        before = self.activity
        self._turn_to(activity)
        try:
            yield
        finally:
            self._turn_to(before)

    def waiting_for(self, activity: Activity, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count the time spent waiting for each as ``activity``."""
        iterator = iter(items)
        while True:
            with self.spent_on(activity):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    @contextlib.contextmanager
    def steps(self, start: int) -> Iterator[None]:
        """Count the time of the block as steps, unless it is spent on something else.

        ``start`` is the last step done.
        """
        self.finished = self._dispatched = start
        thread = threading.Thread(target=self._note_results, name="results", daemon=True)
        thread.start()
        with self.spent_on("step"):
            try:
                yield
            finally:
                self._results.put(None)

    def dispatched(self, step: int, result: jax.Array) -> None:
        """Note that step ``step`` was dispatched to the devices. It is finished when ``result`` arrives."""
        self._dispatched = step
        self._results.put((step, result))

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return sum(self.seconds.values()) + time.perf_counter() - self._since

    @property
    def goodput(self) -> float:
        """The share of the time since the start that was spent on steps."""
        running = time.perf_counter() - self._since if self.activity == "step" else 0.0
        return (self.seconds["step"] + running) / self.total

    def _note_results(self) -> None:
        while (result := self._results.get()) is not None:
            with contextlib.suppress(Exception):  # the error of a failed step is raised where its metrics are read
                result[1].block_until_ready()
            self._finished_at = self.alive_at = time.perf_counter()
            self.finished = result[0]

    def _turn_to(self, activity: Activity) -> None:
        now = time.perf_counter()
        if self.activity == "data":
            busy_until = self._finished_at if self.finished == self._dispatched else now
            overlapped = max(0.0, busy_until - self._since)
            self.seconds["step"] += overlapped
            self._since += overlapped
        self.seconds[self.activity] += now - self._since
        self.activity, self._since, self.alive_at = activity, now, now


class Recorder:
    """Makes the records of metrics.jsonl."""

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        steps: int,
        start: int,
        clock: Clock,
        spent: float = 0.0,
        spent_in_steps: float = 0.0,
        held: float | None = None,
        positions: int = 0,
    ):
        """``positions``: those of a batch's rows. 0: the model's context."""
        # Seconds of earlier starts: in all, and on steps that were not lost.
        self._spent, self._spent_in_steps = spent, spent_in_steps
        self._clock, self._schedule = clock, learning_rate(config.train, steps, held)
        self._sizes, self._positions = BatchSizes.of(config.train), positions or config.model.max_seq_len
        self._devices, self._mesh, self._config = mesh.devices.size, mesh, config
        self._peak = peak_flops(mesh.devices.flat[0])
        self._step = start
        self._before: dict[Activity, float] = dict.fromkeys(ACTIVITIES, 0.0)

    def record(self, step: int, metrics: StepMetrics) -> dict[str, Any]:
        """Return the record of ``step``. ``metrics`` are on the host.

        Its seconds count from the previous record.
        """
        with self._clock.spent_on("step"):  # brings the clock's seconds up to date
            now = dict(self._clock.seconds)
        since = {activity: now[activity] - self._before[activity] for activity in ACTIVITIES}
        steps, read = step - self._step, self._tokens(step) - self._tokens(self._step)
        seconds = (since["step"] + since["data"]) / steps
        tokens, so_far = self._clock.recorded
        self._clock.recorded = tokens + read, so_far + since["step"] + since["data"]
        self._before, self._step = now, step
        rate = read / steps / seconds
        record = {
            "step": step,
            "tokens": self._tokens(step),
            "train_loss": _finite(metrics.loss),
            "lr": float(self._schedule(step)),
            "grad_norm": _finite(metrics.grad_norm),
            "bad_steps": int(metrics.history.bad_steps),
            "skipped_steps": int(metrics.history.skipped_steps),
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / self._devices,
            "goodput": self._clock.goodput,
            "run_seconds": self._spent + self._clock.total,
            "run_step_seconds": self._spent_in_steps + now["step"],
        }
        record |= {f"{activity}_seconds": since[activity] for activity in ACTIVITIES if activity != "step"}
        record |= {name: _finite(value) for name, value in (metrics.rewards or {}).items()}
        if metrics.norms is not None:
            record |= {name: _finite(value) for name, value in metrics.norms.to_dict().items()}
        if self._peak is not None:
            record["mfu"] = step_flops(self._config, read, steps) / steps / seconds / self._devices / self._peak
        if (memory := memory_in_use(self._mesh.local_devices)) is not None:
            record["memory_bytes"] = memory
        return record

    def _tokens(self, step: int) -> int:
        """Return the tokens of steps 1 to ``step``."""
        return self._sizes.rows(step) * self._positions


def _finite(value: Any) -> float | None:
    """Return a number, or None if it is not finite, as JSON has no such numbers."""
    return float(value) if math.isfinite(value) else None
