"""Traces of chosen steps, for xprof and Perfetto."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llama_jax.cli.progress import print_above
from llama_jax.compat.jax_internals import libtpu_version
from llama_jax.devices.distributed import is_main
from llama_jax.errors import UserError
from llama_jax.training import log
from llama_jax.training.clock import Clock


def check_profiler() -> None:
    """Raise UserError if a trace would crash the process, because libtpu is not the version that jax requires."""
    if "tpu" not in (jax.config.jax_platforms or "tpu"):  # type: ignore[attr-defined]
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("libtpu")
        made_for = libtpu_version()
        if made_for and not found.startswith(made_for + "."):
            raise UserError(
                f"train.profile_steps: expected libtpu {made_for}, which jax {jax.__version__} requires, found {found}; "
                f"pip install 'libtpu=={made_for}.*', or, without a TPU, set JAX_PLATFORMS=cpu or cuda"
            )


class Profile:
    """Traces the steps of train.profile_steps into ``folder``, on process 0. Steps already taken are left out.

    Example:
        with Profile(args.profile_range, folder, clock) as profile:
            with profile.step(step, pending):
                state, metrics = compiled(state, batch)
            profile.stop_after(step, metrics)
    """

    def __init__(self, steps: range, folder: Path, clock: Clock):
        self._steps, self._folder, self._clock = steps, folder, clock
        self._traced: list[int] = []

    @contextlib.contextmanager
    def step(self, step: int, before: Any) -> Iterator[None]:
        """Trace the dispatch of a step in the block, if it is to be traced.

        ``before`` are results of earlier steps. The first traced step waits for them.
        """
        if step not in self._steps:
            yield
            return
        if not self._traced:
            jax.block_until_ready(before)
            if is_main():
                jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
        self._traced.append(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def stop_after(self, step: int, results: Any) -> None:
        """Write the trace if ``step`` is its last one, after waiting for ``results``."""
        if self._traced and step == self._steps[-1]:
            jax.block_until_ready(results)
            self._write()

    def _write(self) -> None:
        if is_main():
            with self._clock.spent_on("saving"):
                jax.profiler.stop_trace()
            print_above(log.trace_text(self._traced[0], self._traced[-1], self._folder))
        self._traced = []

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        """Write the trace of the steps taken, if the run ends before the last step to trace."""
        if self._traced:
            self._write()
