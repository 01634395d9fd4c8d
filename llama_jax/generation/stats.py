"""Statistics of generation: tokens per second, and memory read per second."""

import time
from collections.abc import Callable
from typing import Any

import jax

from llama_jax.cli.progress import bytes_text
from llama_jax.devices.chips import BANDWIDTH
from llama_jax.devices.memory import bytes_of
from llama_jax.generation import Model
from llama_jax.generation.passes import Step, slot_bytes


def step_bytes(params: Any, cached_bytes: int) -> int:
    """Return the bytes that a decoding step reads, for any number of rows: the parameters and the filled part of the
    cache.

    The embedding table is left out unless it is the output matrix too, because only one row per token is read from it.
    """
    looked_up = ("tok_embeddings",) if "output" in params else ()
    return bytes_of({name: part for name, part in params.items() if name not in looked_up}) + cached_bytes


class Meter:
    """Counts the tokens and times of generation. Call ``begin``, and pass the meter as ``on_progress``.

    Several generations are counted together, without the time between them.
    """

    def __init__(self, model: Model, clock: Callable[[], float] = time.monotonic):
        self.tokens, self.seconds = 0, 0.0
        self.first: float | None = None  # seconds until the first token
        self._clock = clock
        self._step_bytes, self._slot_bytes = step_bytes(model.params, 0), slot_bytes(model.module, model.cache_dtype)
        devices = sorted(jax.tree.leaves(model.params)[0].sharding.device_set, key=lambda device: device.id)
        self._bandwidth = BANDWIDTH.get(devices[0].device_kind, 0.0) * len(devices)
        # These exclude the first chunk of each generation, in which programs are compiled.
        self._later_tokens, self._later_seconds, self._later_bytes = 0, 0.0, 0

    def begin(self) -> None:
        """Start to count a generation."""
        self._began = self._last = self._clock()
        self._warm = False

    def __call__(self, step: Step) -> None:
        """Count a chunk."""
        if not step.steps:
            return
        now = self._clock()
        self.tokens += step.tokens
        self.seconds += now - self._last
        if self._warm:
            self._later_tokens += step.tokens
            self._later_seconds += now - self._last
            self._later_bytes += step.steps * (self._step_bytes + step.filled * self._slot_bytes)
        elif self.first is None:
            self.first = now - self._began
        self._last, self._warm = now, True

    def line(self) -> str:
        """Return all in a line: "128 tokens in 3.1 s: first after 0.21 s, then 41.2 tokens/s, 18.00 GB/s of memory
        read"."""
        text = f"{self.tokens:,} token{'s' * (self.tokens != 1)} in {self.seconds:,.1f} s"
        if self.first is None or not self.tokens:
            return text
        text += f": first after {self.first:,.2f} s"
        if not self._later_tokens or not self._later_seconds:
            return text
        rate = self._later_bytes / self._later_seconds
        text += f", then {self._later_tokens / self._later_seconds:,.1f} tokens/s, {bytes_text(rate)}/s of memory read"
        return text + (f" ({rate / self._bandwidth:.0%} of the device's bandwidth)" if self._bandwidth else "")
