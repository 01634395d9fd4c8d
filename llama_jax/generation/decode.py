"""Prefill and decoding: the prompts are read in passes, then tokens are generated in compiled chunks of steps.

B rows, one per completion; T tokens of a pass; D dim; V vocab.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llama_jax.config import SampleArgs
from llama_jax.devices.compiling import GenerationProgram
from llama_jax.devices.sharding import mesh_axes_of, mesh_of, on_every_device, on_mesh, spec, with_shardings
from llama_jax.generation.sampling import Sampler, likeliest_tokens, make_sampler, sample
from llama_jax.model import Llama
from llama_jax.ops.cache import KVCache

# Tokens per row that a call of the compiled program generates. Between calls, the caller checks which rows have ended.
CHUNK = 16
# Prompts are read in passes of this many tokens, so that long ones need no more memory. Shorter prompts are padded to a
# bucket, so that few programs are compiled.
PREFILL, CPU_PREFILL = 2048, 512
BUCKETS = (16, 64, 128, 256, 512, 1024, 2048)
# Attention reads a power of two of the cache's slots, at least this many.
FEWEST_READ = 256

# The prompt, the settings, and the row's number among the completions of its prompt.
Row = tuple[Sequence[int], SampleArgs, int]


class DecodeState(flax.struct.PyTreeNode):
    """The state between two steps of decoding."""

    cache: KVCache
    logits: jax.Array  # float32 [B, V], of the next token
    sampler: Sampler
    made: jax.Array  # int32 [B], the number of tokens generated so far


class Sampled(NamedTuple):
    """The tokens of a chunk, and their log-probabilities under the model at temperature 1, over all tokens.

    Programs return jax.Arrays, generators yield NumPy's. The last two are None unless alternatives are asked for.
    """

    ids: Any  # int32 [B, tokens of the chunk]
    logprobs: Any  # float32 [B, tokens of the chunk]
    top_ids: Any = None  # int32 [B, tokens of the chunk, alternatives]
    top_logprobs: Any = None  # float32, of the same shape

    def fetched(self, rows: int) -> "Sampled":
        """Return the first ``rows`` rows in the host's memory."""
        return Sampled(*(None if x is None else np.asarray(x)[:rows] for x in self))

    def of(self, row: int) -> tuple[Any, ...]:
        """Return the fields of one row, without the axis of rows."""
        return tuple(None if x is None else x[row] for x in self)


def bytes_read(model: Llama, params: Any, state: DecodeState, *_: Any, **__: Any) -> int:
    """Return the bytes of a layer's keys on a device, given the arguments of a decoding step."""
    return state.cache.layer_bytes


@functools.partial(GenerationProgram, static_argnames=("model", "end"), donate_argnames=("cache",))
def prefill(
    model: Llama, params: Any, tokens: jax.Array, cache: KVCache, end: int, last: ArrayLike | None = None
) -> tuple[jax.Array, KVCache]:
    """Read tokens of the prompts, int [B, T], into the cache. Return logits, float32 [B, V], and the cache.

    end: the number of the cache's slots to read. last: int [B], the column of each row whose logits are returned.
    None: the last column.
    """

    def column(hidden: jax.Array) -> jax.Array:
        if last is None:
            return hidden[:, -1:]
        return jnp.take_along_axis(hidden, jnp.asarray(last)[:, None, None], axis=1)

    logits, cache = next_logits(model, params, tokens, cache, end, column)
    return logits[:, 0], cache


def next_logits(
    model: Llama,
    params: Any,
    tokens: jax.Array,
    cache: KVCache,
    end: int,
    of: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
) -> tuple[jax.Array, KVCache]:
    """Return the logits of tokens [B, T] that follow the cached ones, float32 [B, T, V], and the cache with them added.

    end: the number of the cache's slots to read. of: selects, from hidden states [B, T, D], those whose logits to
    compute.
    """
    hidden, cache = cast(Any, model.apply({"params": params}, tokens, cache, end, method="next_hidden"))
    return cast(jax.Array, model.apply({"params": params}, of(hidden), method="logits")), cache


@functools.partial(
    GenerationProgram,
    cache_bytes=bytes_read,
    static_argnames=("model", "steps", "end", "alternatives"),
    donate_argnames=("state",),
)
def decode_chunk(
    model: Llama, params: Any, state: DecodeState, steps: int, end: int, alternatives: int = 0
) -> tuple[DecodeState, Sampled]:
    """Run ``steps`` steps. Each samples a token per row and computes the logits of the next one.

    end: the number of the cache's slots to read, at least as many as are filled after the last step. alternatives: the
    number of likeliest tokens to return for each token. Returns the new state and the tokens.
    """

    def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[jax.Array, ...]]:
        made, sampler = choose(model, state.sampler, state.logits, state.made, alternatives)
        logits, cache = next_logits(model, params, made[0][:, None], state.cache, end)
        return DecodeState(cache, logits[:, 0], sampler, state.made + 1), made

    state, made = jax.lax.scan(step, state, None, length=steps)
    # Every process reads the results.
    return state, Sampled(*(on_every_device(x.swapaxes(0, 1)) for x in made))


def choose(
    model: Llama, sampler: Sampler, logits: jax.Array, number: jax.Array, alternatives: int
) -> tuple[tuple[jax.Array, ...], Sampler]:
    """Run ``sample`` on logits [B, V].

    Return the fields of Sampled for one step, each [B, ...], and the new sampler.
    """
    exact = bool(model.exact_rows)
    ids, logprobs, sampler = sample(sampler, logits, number, exact)
    if alternatives and sampler.absent is not None:
        logits = jnp.where(sampler.absent, -jnp.inf, logits)
    top = likeliest_tokens(logits, alternatives, exact) if alternatives else ()
    return (ids, logprobs, *top), sampler


@functools.partial(jax.jit, static_argnames=("model", "alternatives"), donate_argnames=("state",))
def sample_once(
    model: Llama, state: DecodeState, alternatives: int, allowed: ArrayLike | None = None
) -> tuple[DecodeState, Sampled]:
    """Sample a token of each row, which no cache holds yet. Return the state and the tokens.

    allowed: the tokens that each row may sample, as bits, uint32 [B, W]. None: all.
    """
    sampler = state.sampler.replace(allowed=allowed)
    made, sampler = choose(model, sampler, state.logits, state.made, alternatives)
    state = state.replace(sampler=sampler.replace(allowed=None), made=state.made + 1)
    return state, Sampled(*(on_every_device(x[:, None]) for x in made))


@functools.partial(GenerationProgram, static_argnames=("model", "cache_dtype"))
def logits_of_tokens(model: Llama, params: Any, token_ids: jax.Array, cache_dtype: Any) -> jax.Array:
    """Return the logits of the token after each position: int [B, T] -> float32 [B, T, V].

    Keys and values are rounded as a cache of ``cache_dtype`` would store them.
    """
    B, T = token_ids.shape
    cache = empty_cache(model, jnp.zeros(B, jnp.int32), slots_read(T), cache_dtype, jnp.full(B, T, jnp.int32))
    return next_logits(model, params, token_ids, cache, 0)[0]


def generate_chunks(
    model: Llama,
    params: Any,
    rows: Sequence[Row],
    max_new_tokens: int,
    steps: int = CHUNK,
    cache_dtype: Any = None,
    absent: np.ndarray | None = None,
) -> Iterator[Sampled]:
    """Yield the tokens that follow the prompts, ``steps`` at a time, until there are ``max_new_tokens`` or more.

    params: in the form for generation (serving.py). Rows and heads are sharded over their mesh. cache_dtype: the type
    of keys and values. None: the type of activations. absent: bool [V], ids without a token, which are never sampled.
    Rows continue after EOS, and the caller cuts them. The result of a row does not depend on the other rows.
    """
    mesh = mesh_of(params)
    count, alternatives = len(rows), alternatives_of(rows)
    rows = pad_rows(rows, mesh)
    longest = prompt_slots(max(len(prompt) for prompt, _, _ in rows))
    slots = slots_read(longest + max_new_tokens + steps)
    static = steps, slots_read(longest + steps), alternatives
    compiled_meanwhile = functools.partial(_chunk_compiled_meanwhile, model, params, static)
    with on_mesh(mesh):
        state = read_prompts(
            model, params, rows, longest, slots, cache_dtype or model.dtype, compiled_meanwhile, absent
        )
    waiting = None
    for done in range(0, max_new_tokens, steps):
        # Start the next chunk before this one is yielded, so that the device computes while the caller works.
        end = slots_read(longest + done + steps)
        with on_mesh(mesh):
            state = state.replace(cache=ensure_slots(state.cache, end))
            state, made = decode_chunk(model, params, state, steps, end, alternatives)
        if waiting is not None:
            yield waiting.fetched(count)
        waiting = made
    if waiting is not None:
        yield waiting.fetched(count)


def alternatives_of(rows: Sequence[Row]) -> int:
    """Return the number of alternatives of the row that asks for most. Callers leave out what others do not ask for."""
    return max(args.logprobs for _, args, _ in rows)


def _chunk_compiled_meanwhile(
    model: Llama, params: Any, static: tuple[int, int, int], state: DecodeState
) -> contextlib.AbstractContextManager[None]:
    """Compile the chunk that follows ``state``, for ``static`` (steps, end, alternatives), while the block runs.

    This is half the wait for the first token of a deep model. It is for one device: on several, the compiler decides
    how the state is sharded after the prompts are read.
    """
    mesh = mesh_of(params)
    if mesh.size > 1:
        return contextlib.nullcontext()
    shapes = jax.eval_shape(lambda state: state.replace(cache=ensure_slots(state.cache, static[1])), state)
    state = with_shardings(shapes, state_shardings(shapes, mesh))
    return decode_chunk.compiled_meanwhile(model, params, state, *static)


def pad_rows(rows: Sequence[Row], mesh: jax.sharding.Mesh) -> Sequence[Row]:
    """Append copies of the last row, so that the mesh divides the rows. Callers drop the results of the copies."""
    parts = math.prod(mesh.shape[name] for name in mesh_axes_of("batch"))
    return [*rows, *[rows[-1]] * (-len(rows) % parts)]


def read_prompts(
    model: Llama,
    params: Any,
    rows: Sequence[Row],
    longest: int,
    slots: int,
    cache_dtype: Any,
    meanwhile: Callable[[DecodeState], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    absent: np.ndarray | None = None,
) -> DecodeState:
    """Read the prompts in passes, under the mesh, and return the state after them.

    longest: the slots that the longest prompt takes. slots: the slots of a cache that does not grow. meanwhile: given
    the state before any prompt is read, the context in which they are read. absent: bool [V], ids without a token.
    """
    mesh = mesh_of(params)
    slots = slots_read(longest) if caches_grow() else slots
    lengths = np.array([len(prompt) for prompt, _, _ in rows], np.int32)
    first = np.zeros_like(lengths) if model.exact_rows else longest - lengths
    tokens = np.zeros((len(rows), longest), np.int32)
    for row, begin, (prompt, _, _) in zip(tokens, first, rows, strict=True):
        row[begin : begin + len(prompt)] = prompt
    sampler = make_sampler(rows, model.args.vocab_size, absent)
    state = _state_on(mesh, model, sampler, first, slots, cache_dtype, lengths)
    logits, cache = state.logits, state.cache
    with meanwhile(state):
        for start in range(0, longest, tokens_a_pass()):
            part = tokens[:, start : start + tokens_a_pass()]
            end = min(slots, slots_read(start)) if start else 0
            if model.exact_rows:
                last = lengths - 1 - start
                found, cache = prefill(model, params, part, cache, end, np.clip(last, 0, part.shape[1] - 1))
                logits = jnp.where((last >= 0)[:, None], found, logits)
            else:
                logits, cache = prefill(model, params, part, cache, end)
    if model.exact_rows:
        cache = cache.replace(slot=jnp.asarray(lengths))
    return state.replace(cache=cache, logits=logits)


def ensure_slots(cache: KVCache, slots: int) -> KVCache:
    """Return a cache of at least ``slots`` slots: the given one if it has them, otherwise a larger copy."""
    return cache if cache.slots >= slots else _grown(cache, slots)


@functools.partial(jax.jit, static_argnames=("slots",))
def _grown(cache: KVCache, slots: int) -> KVCache:
    return cache.grown(slots)


@functools.partial(jax.jit, static_argnames=("mesh", "model", "slots", "cache_dtype"))
def _state_on(
    mesh: jax.sharding.Mesh,
    model: Llama,
    sampler: Sampler,
    first: ArrayLike,
    slots: int,
    cache_dtype: Any,
    prompts: ArrayLike,
) -> DecodeState:
    """Build ``empty_state`` on the mesh. Each device creates its own part."""
    state = empty_state(model, sampler, first, slots, cache_dtype, prompts)
    return jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))


def empty_state(
    model: Llama, sampler: Sampler, first: ArrayLike, slots: int, cache_dtype: Any, prompts: ArrayLike | None = None
) -> DecodeState:
    """Return the state before any prompt is read.

    first: int32 [B], the slots that the rows' first tokens go to. prompts: int32 [B], the lengths of the prompts.
    """
    first = jnp.asarray(first)
    B = len(first)
    cache = empty_cache(model, first, slots, cache_dtype, None if prompts is None else jnp.asarray(prompts))
    logits = jnp.zeros((B, model.args.vocab_size), jnp.float32)
    return DecodeState(cache, logits, sampler, jnp.zeros(B, jnp.int32))


def empty_cache(
    model: Llama, first: jax.Array, slots: int, cache_dtype: Any, prompts: jax.Array | None = None
) -> KVCache:
    """Return an empty cache of ``slots`` slots for rows whose first tokens go to slots ``first`` [B].

    prompts: int32 [B], the lengths of the prompts.
    """
    return KVCache.empty(model.args, first, slots, cache_dtype, bool(model.exact_rows), prompts)


def state_shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return a NamedSharding per array of a DecodeState, or of its shapes. Rows, heads and vocabulary are sharded."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> jax.NamedSharding:
        cached = getattr(path[-1], "name", "") in ("values", "scales")
        axes = ("batch", "kv_heads", None, None) if cached else ("batch", "vocab")
        return jax.NamedSharding(mesh, spec(*axes[: leaf.ndim]))

    return jax.tree_util.tree_map_with_path(sharding, state)


def caches_grow() -> bool:
    """Return whether a cache starts small and grows as it fills.

    A TPU reads part of a buffer in place, so its cache has all slots from the start. Elsewhere, XLA would copy the
    part.
    """
    return jax.default_backend() != "tpu"


def prompt_slots(tokens: int) -> int:
    """Return the slots that prompts of up to ``tokens`` tokens take: a bucket, or a multiple of a pass."""
    most = tokens_a_pass()
    return next((bucket for bucket in BUCKETS if tokens <= bucket <= most), -(-tokens // most) * most)


def tokens_a_pass() -> int:
    """Return the number of prompt tokens per prefill pass: small for a CPU's caches, large for an accelerator."""
    return CPU_PREFILL if jax.default_backend() == "cpu" else PREFILL


def slots_read(filled: int) -> int:
    """Return the number of the cache's slots to read if ``filled`` slots are filled, which is a power of two."""
    return max(FEWEST_READ, 1 << (filled - 1).bit_length())
