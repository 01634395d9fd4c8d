"""Estimates how to lay a model over a slice for decoding, and which settings make it fit, without compiling."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import Cache, Config, MeshArgs, Weights
from llama_jax.devices.memory import bytes_of
from llama_jax.errors import UserError
from llama_jax.generation.serving import generation_shapes
from llama_jax.model import Llama
from llama_jax.ops.cache import CACHE_DTYPES, KVCache
from llama_jax.plan import Decoding
from llama_jax.plan.estimate import divisors
from llama_jax.plan.topology import HOST_CHIPS, Topology

# Seconds of latency per message between neighbouring chips. The compiler's schedule does not include it.
HOP = 1e-6
# The share of a chip's memory for parameters and cache. The rest of a step is small.
USABLE = 0.98
# Options from the largest numbers to the smallest, and replacements to try, those with the least loss of quality first.
WEIGHTS: tuple[Weights, ...] = ("auto", "int8", "int4")
CACHES: tuple[Cache, ...] = ("auto", "int8")
SMALLER: tuple[tuple[Weights, Cache], ...] = (
    ("auto", "int8"), ("int8", "auto"), ("int8", "int8"), ("int4", "auto"), ("int4", "int8"),
)  # fmt: skip
# Above this number, sequences are advised in multiples of it.
ROUND = 8
# Slots are halved down to this number.
FEWEST_SLOTS = 256


@dataclass(frozen=True)
class Layout:
    """A mesh on a slice, or on a part of it, with estimates for a decoding step: bytes per chip and seconds."""

    topology: Topology
    mesh: MeshArgs
    bytes: float
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether it fits by the estimate."""
        return self.bytes <= USABLE * self.topology.chip.hbm_bytes


def lay_out(config: Config, topology: Topology, decoding: Decoding, whole: bool = False) -> Layout:
    """Return the fastest layout that fits, or else the one that needs the least memory.

    Heads, hidden units and vocabulary are sharded over chips as in sample.py. With many sequences and chips, several
    copies of the model share the sequences. Chips that neither can use stay idle, unless ``whole`` requires all chips
    of the slice. Raises UserError if there is no layout.
    """
    found = [layout for layout in _layouts(config, topology, decoding) if layout.topology == topology or not whole]
    if not found:
        copies = min(copies for _, _, copies in _cuts(config, topology))
        raise UserError(
            f"--batch: expected a multiple of {copies}, the fewest copies of the model that make up {topology.name}, found "
            f"{decoding.batch}; change it, or give a mesh (--mesh.data, --mesh.tensor)"
        )
    fitting = [layout for layout in found if layout.fits]
    if fitting:
        return min(fitting, key=lambda layout: (layout.seconds, layout.topology.device_count))
    return min(found, key=lambda layout: layout.bytes)


def fewest_chips(config: Config, topology: Topology, weights: Weights) -> int:
    """Return the number of chips that sample.py uses by default: the fewest of a host that hold the parameters."""
    need = parameter_bytes(config, weights)
    most = min(topology.chips, HOST_CHIPS[topology.version]) * topology.chip.devices
    counts = [n for n in range(1, most + 1) if _spreads(config, n)]
    return next((n for n in counts if need / n <= topology.chip.hbm_bytes), counts[-1])


def fewer(
    config: Config, topology: Topology, decoding: Decoding, whole: bool = False
) -> Iterator[tuple[str, Decoding, Layout]]:
    """Yield what fits in place of ``decoding`` on the same slice: flags, settings and layout.

    There is one of each kind: smaller numbers for weights and cache, fewer sequences, fewer slots. ``whole``: use all
    chips, and first try another layout of the same settings.
    """
    found = False

    def first(options: Iterable[tuple[str, Decoding]]) -> Iterator[tuple[str, Decoding, Layout]]:
        nonlocal found
        for flags, smaller in options:
            with contextlib.suppress(UserError):  # this many sequences cannot be divided over the chips
                layout = lay_out(config, topology, smaller, whole)
                if layout.fits:
                    found = True
                    yield flags, smaller, layout
                    return

    def fewer_sequences(flags: str, settings: Decoding) -> Iterable[tuple[str, Decoding]]:
        most = _most_sequences(config, topology, settings, whole)
        if most < settings.batch:
            for batch in range(most, 0, -ROUND if most > ROUND else -1):
                yield f"{flags} --batch {batch}".strip(), replace(settings, batch=batch)

    smaller_numbers = list(_with_smaller_numbers(decoding))
    if whole:  # another mesh may suffice
        yield from first([("", decoding)])
    yield from first(smaller_numbers)
    yield from first(fewer_sequences("", decoding))
    sizes = [decoding.slots >> n for n in range(1, 32) if decoding.slots >> n >= FEWEST_SLOTS]
    yield from first((f"--slots {slots}", replace(decoding, slots=slots)) for slots in sizes)
    if not found and smaller_numbers:
        yield from first(fewer_sequences(*smaller_numbers[-1]))


def larger(config: Config, topology: Topology, decoding: Decoding) -> Layout | None:
    """Return the layout on the first larger slice that holds ``decoding``, or None."""
    for slice_ in topology.larger():
        with contextlib.suppress(UserError):
            if (layout := lay_out(config, slice_, decoding)).fits:
                return layout
    return None


def parameter_bytes(config: Config, weights: Weights) -> int:
    """Return the bytes of all parameters in the form for generation."""
    return _parameter_bytes(_module(config), weights)


def slot_bytes(config: Config, cache: Cache) -> int:
    """Return the bytes of cache per token of a sequence."""
    return _slot_bytes(_module(config), cache)


@functools.cache
def _parameter_bytes(module: Llama, weights: Weights) -> int:
    return bytes_of(generation_shapes(module, weights))


@functools.cache
def _slot_bytes(module: Llama, cache: Cache) -> int:
    dtype: Any = CACHE_DTYPES[cache] or module.dtype
    found = jax.eval_shape(lambda: KVCache.empty(module.args, jnp.zeros(1, jnp.int32), 1, dtype))
    return bytes_of((found.k, found.v))


def _module(config: Config) -> Llama:
    """Return the model as TPUs run it, without make_model, which would start JAX's backends."""
    name = config.train.compute_dtype
    return Llama(config.model, jnp.dtype("bfloat16" if name == "auto" else name))


def _layouts(config: Config, topology: Topology, decoding: Decoding) -> Iterator[Layout]:
    """Yield the layouts that divide the sizes and the number of sequences."""
    parameters = parameter_bytes(config, decoding.weights)
    cache = decoding.batch * decoding.slots * slot_bytes(config, decoding.cache)
    m, chip = config.model, topology.chip
    for part, tensor, copies in _cuts(config, topology):
        if decoding.batch % copies == 0:
            held = parameters / tensor + cache / part.device_count
            sums = 2 * m.n_layers * 2 * 2 * decoding.batch / copies * m.dim / chip.link_bytes * (tensor > 1)
            hops = 2 * m.n_layers * HOP * (tensor - 1)
            yield Layout(part, MeshArgs(data=copies, tensor=tensor), held, held / chip.hbm_bandwidth + sums + hops)


def _cuts(config: Config, topology: Topology) -> Iterator[tuple[Topology, int, int]]:
    """Yield every part of the slice, with the number of chips per copy of the model and the number of copies."""
    for part in topology.parts():
        for tensor in divisors(part.device_count // part.slices):
            if _spreads(config, tensor):
                yield part, tensor, part.device_count // tensor


def _spreads(config: Config, chips: int) -> bool:
    m = config.model
    return not any(size % chips for size in (m.kv_heads, m.hidden_width, m.vocab_size))


def _most_sequences(config: Config, topology: Topology, decoding: Decoding, whole: bool) -> int:
    """Return the largest number of sequences that fits with the other settings of ``decoding``, or 0."""
    parameters, room = parameter_bytes(config, decoding.weights), USABLE * topology.chip.hbm_bytes
    a_sequence = decoding.slots * slot_bytes(config, decoding.cache)
    most = max(
        int(max(0.0, room - parameters / tensor) * tensor / a_sequence) * copies
        for part, tensor, copies in _cuts(config, topology)
        if part == topology or not whole
    )
    return most - most % ROUND if most > ROUND else most


def _with_smaller_numbers(decoding: Decoding) -> Iterator[tuple[str, Decoding]]:
    kind: Weights = "int4" if decoding.weights == "int4-64" else decoding.weights
    for weights, cache in SMALLER:
        stronger = WEIGHTS.index(weights) > WEIGHTS.index(kind), CACHES.index(cache) > CACHES.index(decoding.cache)
        if any(stronger) and (stronger[0] or weights == kind) and (stronger[1] or cache == decoding.cache):
            flags = [f"--weights {weights}"] * stronger[0] + [f"--cache {cache}"] * stronger[1]
            kept = weights if stronger[0] else decoding.weights
            yield " ".join(flags), replace(decoding, weights=kept, cache=cache)
