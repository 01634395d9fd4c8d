"""Attention against a literal loop over queries and heads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ops import attention as module
from llama_jax.ops.attention import attention, cached_attention
from llama_jax.ops.cache import KVArray


def literal(q: np.ndarray, k: np.ndarray, v: np.ndarray, slot: int = 0, first: np.ndarray | None = None) -> np.ndarray:
    """Each query alone, over the keys that it may see; padding queries are left zero."""
    B, T, N, H = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        begin = 0 if first is None else int(first[b])
        for t in range(T):
            if slot + t < begin:
                continue
            for n in range(N):
                keys = k[b, begin : slot + t + 1, n // group].astype(np.float64)
                values = v[b, begin : slot + t + 1, n // group]
                scores = keys @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ values / weights.sum()
    return out


def random_qkv(B: int, T: int, S: int, N: int, K: int, H: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("T", [1, 5, 64, 65, 130])
def test_attention_equals_the_literal_one_below_at_and_above_a_block(T: int) -> None:
    q, k, v = random_qkv(2, T, T, 4, 2, 8)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), literal(q, k, v), atol=1e-5)


def test_blocks_grow_where_their_number_would_not_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "MAX_BLOCKS", 3)
    q, k, v = random_qkv(1, 50, 50, 2, 1, 4)
    # A function of its own: the programs of the true sizes are cached under the other.
    np.testing.assert_allclose(jax.jit(lambda *qkv: attention(*qkv))(q, k, v), literal(q, k, v), atol=1e-5)
    assert str(jax.make_jaxpr(lambda *qkv: attention(*qkv))(q, k, v)).count("dot_general") == 2 * 3


def test_the_backward_pass_keeps_the_softmax_once_and_few_arrays_beside_it() -> None:
    """Of 12 arrays of the queries' size a layer, the softmax's weights of 512 positions are 4.5."""
    q = random_qkv(1, 512, 512, 2, 2, 64)[0]

    def loss(x: jax.Array) -> jax.Array:
        for _ in range(6):
            x = x + attention(x, 2 * x, 3 * x)
        return jnp.sum(x)

    memory = jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 6 * 12 * q.nbytes


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (4, 4), (6, 2), (1, 1)])
def test_query_heads_read_their_groups_kv_head(heads: int, kv_heads: int) -> None:
    q, k, v = random_qkv(2, 9, 9, heads, kv_heads, 4)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), literal(q, k, v), atol=1e-5)


def test_a_uniform_query_averages_just_the_visible_values() -> None:
    v = np.array([1.0, 3.0, 5.0, 7.0], np.float32).reshape(1, 4, 1, 1)
    zeros = np.zeros_like(v)
    np.testing.assert_allclose(attention(zeros, zeros, v).ravel(), [1.0, 2.0, 3.0, 4.0], rtol=1e-6)
    # In a cache: queries at slots 2 and 3; row 0 holds tokens from slot 0 on, row 1 from slot 1, row 2 from slot 3.
    rows = np.repeat(v, 3, axis=0)
    queries = np.zeros((3, 2, 1, 1), np.float32)
    out = over_cache(queries, np.zeros_like(rows), rows, 2, np.array([0, 1, 3]))[:, :, 0, 0]
    np.testing.assert_allclose(out[0], [3.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(out[1], [4.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(out[2, 1], 7.0, rtol=1e-6)
    assert np.isfinite(out).all()


@jax.jit
def cached(q: Any, k: Any, v: Any, cached_k: KVArray, cached_v: KVArray, slot: Any, first: Any) -> jax.Array:
    """cached_attention of new keys and values as they will be stored."""
    return cached_attention(q, cached_k.stored(k), cached_v.stored(v), cached_k, cached_v, slot, first)


def stored(x: np.ndarray, slots: int, dtype: Any = jnp.float32) -> KVArray:
    """Tokens [B, S, K, H] in the first of a layer's slots, with 9 in all others."""
    B, _, K, H = x.shape
    scales = jnp.full((B, K, slots), 9 / 127) if dtype == jnp.int8 else None
    empty = KVArray(jnp.full((B, K, slots, H), 127 if dtype == jnp.int8 else 9, dtype), scales)
    return empty.write(empty.stored(jnp.asarray(x)), jnp.int32(0))


def over_cache(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, slot: int, first: np.ndarray, dtype: Any = jnp.float32
) -> np.ndarray:
    """Attention of queries [B, T, N, H] from ``slot`` on, over keys and values [B, >= slot + T, K, H] of which the earlier ones
    are cached."""
    end = slot + q.shape[1]
    old_k, old_v = stored(k[:, :slot], 80, dtype), stored(v[:, :slot], 80, dtype)
    return np.asarray(cached(q, k[:, slot:end], v[:, slot:end], old_k, old_v, jnp.int32(slot), jnp.asarray(first)))


@settings(max_examples=25)
@given(data=st.data(), T=st.sampled_from([1, 2, 70]), slot=st.integers(0, 80), seed=st.integers(0, 99))
def test_cached_attention_equals_the_literal_one_and_padding_stays_finite(
    data: st.DataObject, T: int, slot: int, seed: int
) -> None:
    first = np.array(data.draw(st.lists(st.integers(0, slot + T - 1), min_size=3, max_size=3)), np.int32)
    q, k, v = random_qkv(3, T, slot + T, 4, 2, 4, seed)
    out = over_cache(q, k, v, slot, first)
    assert np.isfinite(out).all()
    tokens = slot + np.arange(T) >= first[:, None]
    np.testing.assert_allclose(out[tokens], literal(q, k, v, slot, first)[tokens], atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 4), (6, 2), (1, 1)])
def test_query_heads_read_their_groups_kv_head_in_a_cache(heads: int, kv_heads: int) -> None:
    q, k, v = random_qkv(2, 3, 12, heads, kv_heads, 4)
    first = np.array([0, 4])
    np.testing.assert_allclose(over_cache(q, k, v, 9, first), literal(q, k, v, 9, first), atol=1e-5)


@pytest.mark.parametrize(("kv_heads", "rows"), [(8, 1), (32, 1), (8, 4), (6, 1), (5, 2), (1, 1), (4, 16)])
def test_scores_of_several_heads_at_once_are_those_of_each(kv_heads: int, rows: int) -> None:
    """A TPU's way, which multiplies the rows of as many heads as its matrix unit takes."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, kv_heads, rows, 4)), rng.normal(size=(2, kv_heads, 10, 4))
    found = jax.jit(module._scores_by_group)(q.astype(np.float32), k.astype(np.float32))
    np.testing.assert_allclose(found, np.einsum("bkrh,bksh->bkrs", q, k), atol=1e-5)


def test_slots_before_the_first_token_and_from_the_next_one_on_are_never_read() -> None:
    q, k, v = random_qkv(2, 3, 11, 2, 1, 4)
    slot, first, new = jnp.int32(8), jnp.array([2, 5]), (k[:, 8:], v[:, 8:])
    before = cached(q, *new, stored(k[:, :8], 20), stored(v[:, :8], 20), slot, first)
    changed_k, changed_v = (np.random.default_rng(i).normal(size=(2, 20, 1, 4)) * 50 for i in (1, 2))
    for row, begin in enumerate([2, 5]):
        changed_k[row, begin:8], changed_v[row, begin:8] = k[row, begin:8], v[row, begin:8]
    after = cached(q, *new, stored(changed_k, 20), stored(changed_v, 20), slot, first)
    np.testing.assert_array_equal(after, before)


def test_slots_that_hold_tokens_are_read_each() -> None:
    q, k, v = random_qkv(2, 2, 10, 2, 1, 4)
    first = np.array([2, 5])
    before = over_cache(q, k, v, 8, first)
    for slot in range(9):
        changed = v.copy()
        changed[:, slot] += 1
        differs = np.any(over_cache(q, k, changed, 8, first) != before, axis=(1, 2, 3))
        np.testing.assert_array_equal(differs, slot >= first)


@pytest.mark.parametrize("T", [1, 5])
def test_an_int8_cache_is_within_its_rounding_of_the_float_one(T: int) -> None:
    q, k, v = random_qkv(2, T, 60 + T, 4, 2, 64)
    first = np.array([0, 33])
    exact, rounded = (over_cache(q, k, v, 60, first, dtype) for dtype in (jnp.float32, jnp.int8))
    # Of values up to about 4, half a step of 4 / 127, less for being a mean; scores move by about as much.
    assert 0 < np.abs(rounded - exact).max() < 0.02
    for x in (k, v):
        held = stored(x[:, :60], 80, jnp.int8)
        assert held.values.dtype == jnp.int8 and held.scales is not None
        found = (held.values * held.scales[..., None])[:, :, :60].swapaxes(1, 2)
        steps = np.abs(x[:, :60]).max(axis=-1, keepdims=True) / 127
        assert (np.abs(found - x[:, :60]) <= 0.501 * steps).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_tokens_that_are_fed_together_are_read_as_those_that_are_fed_one_by_one(dtype: Any) -> None:
    q, k, v = random_qkv(2, 6, 46, 4, 2, 16)
    first = np.array([0, 7])
    together = over_cache(q, k, v, 40, first, dtype)
    for t in range(6):
        alone = over_cache(q[:, t : t + 1], k, v, 40 + t, first, dtype)
        np.testing.assert_allclose(alone[:, 0], together[:, t], atol=1e-6)


def test_cached_attention_of_bfloat16_is_near_the_exact_one_for_large_scores_too() -> None:
    q, k, v = (np.asarray(x.astype(jnp.bfloat16)) for x in random_qkv(2, 3, 40, 4, 2, 16))
    first = np.array([0, 7])
    for scale in (1, 1000):
        out = over_cache(q * scale, k, v, 37, first, jnp.bfloat16)
        assert out.dtype == jnp.bfloat16
        exact = literal(*(x.astype(np.float32) for x in (q * scale, k, v)), 37, first)
        assert np.isfinite(out.astype(np.float32)).all()
        if scale == 1:
            np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.03)


def test_softmax_is_float32_for_bfloat16_inputs() -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(1, 40, 40, 2, 1, 16))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exps = [line for line in str(jax.make_jaxpr(attention)(q, k, v)).splitlines() if " exp " in line]
    assert exps and all("f32[" in line for line in exps)
    exact = literal(*(np.asarray(x, np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = random_qkv(1, 8, 8, 2, 1, 4)
    np.testing.assert_allclose(attention(q * 1000, k, v), literal(q * 1000, k, v), atol=1e-3)


def test_gradients_reach_no_future_key() -> None:
    q, k, v = random_qkv(1, 70, 70, 2, 1, 4)
    gradient = jax.jit(jax.grad(lambda k, v, t: jnp.sum(attention(q, k, v)[:, t]), argnums=(0, 1)))
    for t in (0, 10, 63, 64, 68):
        dk, dv = gradient(k, v, jnp.int32(t))
        assert np.isfinite(dk).all() and np.isfinite(dv).all()
        assert not np.any(dk[:, t + 1 :]) and not np.any(dv[:, t + 1 :])
        assert np.all(dv[:, : t + 1])
