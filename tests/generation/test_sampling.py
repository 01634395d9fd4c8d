"""Sampling: every setting against a literal loop over one row, alone and beside others."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import SampleArgs
from llama_jax.generation import sampling
from llama_jax.generation.sampling import Sampler, keep_top, make_sampler, sample

OPEN = SampleArgs(temperature=1.0, top_p=1.0)
GREEDY = SampleArgs(temperature=0.0, top_p=1.0)
LOGITS = np.log([0.1, 0.4, 0.05, 0.25, 0.2]).astype(np.float32)


def literal_probs(logits: np.ndarray, args: SampleArgs, prompt: Sequence[int], made: Sequence[int]) -> np.ndarray:
    """Probabilities of one row's next token, step by step as SampleArgs documents them: float64 [V]."""
    x = np.asarray(logits, np.float64).copy()
    for token in {*prompt, *made}:
        x[token] = x[token] / args.repetition_penalty if x[token] > 0 else x[token] * args.repetition_penalty
    for token in set(made):
        x[token] -= args.presence_penalty + args.frequency_penalty * list(made).count(token)
    for token, bias in args.logit_bias.items():
        x[token] += bias
    if args.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(float)
    # As the samplers of float32 do, from the largest, so that none overflows.
    probs = np.exp((x - x.max()) / args.temperature)
    probs /= probs.sum()
    order = sorted(range(len(x)), key=lambda i: (-probs[i], i))
    if args.top_k:
        probs[order[args.top_k :]] = 0
        probs /= probs.sum()
    before = 0.0
    cut = probs.copy()
    for token in order:
        cut[token] = probs[token] if before <= args.top_p else 0
        before += probs[token]
    cut[cut < args.min_p * cut.max()] = 0
    return cut / cut.sum()


jitted = jax.jit(sample)


def draw(rows: list[tuple[Sequence[int], SampleArgs, int]], logits: np.ndarray, steps: int = 1) -> np.ndarray:
    """The rows' tokens, where the model says the same logits [B, V] at every step: [B, steps]."""
    sampler, ids = make_sampler(rows, logits.shape[1]), []
    for step in range(steps):
        new, _, sampler = jitted(sampler, jnp.asarray(logits, jnp.float32), jnp.full(len(rows), step, jnp.int32))
        ids.append(np.asarray(new))
    return np.stack(ids, axis=1)


many = jax.jit(jax.vmap(sample, (None, None, 0)))


def after(sampler: Sampler, made: Sequence[int]) -> Sampler:
    """The sampler of one row when it has made these tokens."""
    if sampler.penalties is None:
        return sampler
    counts = np.bincount(np.array(made, int), minlength=sampler.penalties.counts.shape[1])[None]
    return sampler.replace(penalties=sampler.penalties.replace(counts=jnp.asarray(counts, jnp.int32)))


def shares(
    logits: np.ndarray, args: SampleArgs, prompt: Sequence[int] = (), made: Sequence[int] = (), count: int = 20_000
) -> np.ndarray:
    """How often each token comes, drawn under as many numbers."""
    sampler = after(make_sampler([(prompt, args, 0)], len(logits)), made)
    ids, _, _ = many(sampler, jnp.asarray(logits, jnp.float32)[None], jnp.arange(count, dtype=jnp.int32)[:, None])
    return np.bincount(np.asarray(ids)[:, 0], minlength=len(logits)) / count


def literal_top_p(probs: np.ndarray, p: float) -> np.ndarray:
    """Meta's sample_top_p (llama/generation.py): which of the sorted probabilities stay."""
    probs_sort = np.sort(probs)[::-1]
    probs_sum = np.cumsum(probs_sort)
    mask = probs_sum - probs_sort > p
    return ~mask


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 50), min_size=8, max_size=8),
    st.floats(0.01, 0.99).filter(lambda p: abs(p * 1000 - round(p * 1000)) > 1e-3),
    st.randoms(use_true_random=False),
)
def test_top_p_keeps_what_metas_rule_keeps(counts: list[int], p: float, random: Any) -> None:
    probs = np.sort(np.array(counts) / sum(counts))[::-1].astype(np.float32)
    before = np.cumsum(probs.astype(np.float64)) - probs
    clear = np.abs(before - p) > 1e-5  # beside the border, rounding decides
    wanted = literal_top_p(probs, p)
    # In any order of the tokens; of equal ones the earlier are before the later.
    order = sorted(range(8), key=lambda _: random.random())
    order = [*order]
    for value in set(probs.tolist()):
        places = [i for i, token in enumerate(order) if probs[token] == value]
        for place, token in zip(places, sorted(order[i] for i in places), strict=True):
            order[place] = token
    shuffled = probs[order]
    (kept,) = np.asarray(keep_top(jnp.asarray(shuffled)[None], jnp.asarray(shuffled)[None], jnp.array([p])))
    np.testing.assert_array_equal(kept[clear[order]], wanted[order][clear[order]])
    assert kept[order.index(0)]


def test_the_token_that_crosses_the_border_stays_and_the_next_goes() -> None:
    probs = jnp.array([[0.5, 0.25, 0.125, 0.125]])

    def kept(p: float) -> list[bool]:
        return keep_top(probs, probs, jnp.array([p]))[0].tolist()

    assert kept(0.6) == kept(0.5) == [True, True, False, False]
    assert kept(0.49) == kept(1e-9) == [True, False, False, False]
    assert kept(0.875) == kept(1.0) == [True, True, True, True]
    # The first of two equal tokens crosses the border, the second is behind it.
    assert kept(0.8) == [True, True, True, False]


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=3, max_size=3), st.data())
def test_weights_of_one_keep_the_k_likeliest_and_of_equal_ones_the_first(
    values: list[list[int]], data: st.DataObject
) -> None:
    probs = np.array(values, np.float32) / 40
    k = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    kept = keep_top(jnp.asarray(probs), jnp.ones_like(probs), jnp.array(k, jnp.float32) - 1)
    for row, count, mask in zip(probs, k, np.asarray(kept), strict=True):
        order = sorted(range(9), key=lambda i: (-row[i], i))
        assert np.flatnonzero(mask).tolist() == sorted(order[:count])


def test_keep_top_orders_probabilities_of_every_size() -> None:
    probs = np.array([1e-30, 0.7, 0.0, 1e-8, 0.2, 1e-20, 0.1, np.nextafter(np.float32(0.2), 1)], np.float32)
    order = np.argsort(-probs)
    for k in range(1, 9):
        (kept,) = keep_top(jnp.asarray(probs)[None], jnp.ones((1, 8)), jnp.array([k - 1.0]))
        assert np.flatnonzero(kept).tolist() == sorted(order[:k].tolist())


MIXED = SampleArgs(
    temperature=0.7, top_k=4, top_p=0.85, min_p=0.1, repetition_penalty=1.3, presence_penalty=0.2,
    frequency_penalty=0.15, logit_bias={2: 1.0, 4: -0.5},
)  # fmt: skip
CASES = {
    "nothing": OPEN,
    "temperature": SampleArgs(temperature=0.5, top_p=1.0),
    "hot": SampleArgs(temperature=3.0, top_p=1.0),
    "top_p": SampleArgs(temperature=1.0, top_p=0.7),
    "top_k": SampleArgs(temperature=1.0, top_p=1.0, top_k=2),
    "top_k above the vocabulary": SampleArgs(temperature=1.0, top_p=1.0, top_k=99),
    "min_p": SampleArgs(temperature=1.0, top_p=1.0, min_p=0.4),
    "min_p 1": SampleArgs(temperature=1.0, top_p=1.0, min_p=1.0),
    "repetition": SampleArgs(temperature=1.0, top_p=1.0, repetition_penalty=1.5),
    "reward": SampleArgs(temperature=1.0, top_p=1.0, repetition_penalty=0.7),
    "presence": SampleArgs(temperature=1.0, top_p=1.0, presence_penalty=1.0),
    "frequency": SampleArgs(temperature=1.0, top_p=1.0, frequency_penalty=0.4),
    "negative penalties": SampleArgs(temperature=1.0, top_p=1.0, presence_penalty=-1.0, frequency_penalty=-0.4),
    "bias": SampleArgs(temperature=1.0, top_p=1.0, logit_bias={0: 2.0, 1: -1.0}),
    "forbidden": SampleArgs(temperature=1.0, top_p=1.0, logit_bias={1: -np.inf, 3: -np.inf}),
    "forced": SampleArgs(temperature=1.0, top_p=1.0, logit_bias={2: 1e6}),
    "all": MIXED,
    # Each of these says another thing in another order.
    "top_k before top_p": SampleArgs(temperature=1.0, top_k=2, top_p=0.6),
    "top_p before min_p": SampleArgs(temperature=1.0, top_p=0.75, min_p=0.45),
    "temperature before top_p": SampleArgs(temperature=2.0, top_p=0.6),
    "temperature before min_p": SampleArgs(temperature=2.0, top_p=1.0, min_p=0.45),
    "penalties before bias": SampleArgs(temperature=1.0, top_p=1.0, repetition_penalty=2.0, logit_bias={1: 3.0}),
    "penalties before temperature": SampleArgs(temperature=0.5, top_p=1.0, presence_penalty=0.7),
    "bias before top_k": SampleArgs(temperature=1.0, top_p=1.0, top_k=1, logit_bias={2: 5.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_shares_of_tokens_are_those_of_the_literal_sampler(name: str) -> None:
    args, prompt, made = CASES[name], [0, 1, 1], [3, 3, 3, 2]
    for logits in (LOGITS, LOGITS + 2):  # negative ones, and of both signs
        wanted = literal_probs(logits, args, prompt, made)
        found = shares(logits, args, prompt, made)
        # Five standard deviations of the largest share.
        np.testing.assert_allclose(found, wanted, atol=5 * (0.25 / 20_000) ** 0.5)
        assert not found[wanted == 0].any()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("top_k before top_p", {1}),
        ("top_p before min_p", {1, 3, 4}),
        ("temperature before top_p", {1, 3, 4}),
        ("temperature before min_p", {0, 1, 3, 4}),
        ("bias before top_k", {2}),
    ],
)
def test_settings_apply_in_the_documented_order(name: str, kept: set[int]) -> None:
    """In the other order each of these would keep other tokens, by hand."""
    assert set(np.flatnonzero(literal_probs(LOGITS, CASES[name], [], [])).tolist()) == kept
    assert set(np.flatnonzero(shares(LOGITS, CASES[name])).tolist()) == kept


@settings(max_examples=40)
@given(
    st.lists(st.integers(-40, 40), min_size=8, max_size=8, unique=True),
    st.lists(st.integers(0, 7), max_size=6),
    st.floats(0.5, 2.0),
    st.floats(-2.0, 2.0),
    st.floats(-1.0, 1.0),
    st.dictionaries(st.integers(0, 7), st.floats(-5.0, 5.0) | st.just(-np.inf), max_size=4),
)
def test_greedy_rows_take_the_likeliest_after_penalties_and_bias(
    logits: list[int], prompt: list[int], repetition: float, presence: float, frequency: float, bias: dict[int, float]
) -> None:
    args = dataclasses.replace(
        GREEDY, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias,
        top_k=3, top_p=0.5, min_p=0.5,
    )  # fmt: skip
    x = np.array(logits, np.float32) / 10
    made: list[int] = []
    sampler = make_sampler([(prompt, args, 0)], 8)
    for step in range(5):
        (token,), (logprob,), sampler = jitted(sampler, jnp.asarray(x)[None], jnp.array([step]))
        best = literal_probs(x, dataclasses.replace(args, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), prompt, made)
        assert best[int(token)] >= best.max() * (1 - 1e-4)  # of tokens alike up to rounding, either
        assert float(logprob) == pytest.approx(x[int(token)] - np.log(np.exp(x.astype(float)).sum()), abs=1e-5)
        made.append(int(token))


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-30, 1e-38])
def test_temperature_0_or_as_good_as_0_takes_the_likeliest(temperature: float) -> None:
    for top_p in (0.9, 1.0):
        args = SampleArgs(temperature=temperature, top_p=top_p)
        found = shares(np.array([0.0, 3.0, 2.9, -1.0, 1.0]), args, count=200)
        assert found.tolist() == [0, 1, 0, 0, 0]


def test_logits_of_every_size_are_sampled_without_overflow() -> None:
    for scale in (1e4, 1e30):
        assert shares(np.array([0.0, 1.0, 0.9]) * scale, OPEN, count=50).tolist() == [0, 1, 0]
    assert (shares(np.full(3, -1e30), OPEN, count=200) > 0.2).all()


def test_a_forbidden_token_never_comes_and_its_log_probability_is_the_models() -> None:
    args = SampleArgs(temperature=0.0, logit_bias={1: -np.inf})
    (token,), (logprob,), _ = sample(make_sampler([([], args, 0)], 5), jnp.asarray(LOGITS)[None], jnp.array([0]))
    assert int(token) == 3
    assert float(logprob) == pytest.approx(np.log(0.25), abs=1e-5)


def test_a_token_that_was_cut_is_not_drawn_where_sums_in_parallel_are_out_of_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random number that falls just upon the running sum, which rounding moves to and fro over tokens of no probability."""
    V = 4096
    logits = jax.random.normal(jax.random.key(0), (1, V)) * 3
    top = np.sort(np.asarray(logits)[0])[-50:]
    probs = jnp.where(logits >= top[0], jnp.exp(logits - top[-1]), 0.0)
    sums = np.asarray(jnp.cumsum(probs / jnp.sum(probs), axis=-1))[0].astype(np.float64)
    steps = np.unique(np.round(sums / sums[-1] * 2**23)[:, None] + [-1, 0, 1])
    numbers = jnp.asarray(steps[(steps >= 0) & (steps < 2**23)] / 2**23, jnp.float32)
    monkeypatch.setattr(jax.random, "fold_in", lambda key, number: number)
    monkeypatch.setattr(jax.random, "uniform", lambda number, dtype: numbers[number].astype(dtype))
    B = len(numbers)
    temperature, top_k = jnp.ones(B), jnp.full(B, 50, jnp.int32)
    sampler = Sampler(jnp.zeros(B), temperature, {"top_k": top_k}, None, None)
    ids = np.asarray(sampling._draw(sampler, jnp.broadcast_to(logits, (B, V)), jnp.arange(B)))
    assert B > 100
    assert (np.asarray(logits)[0, ids] >= top[0]).all()
    assert len(set(ids.tolist())) == 50


def test_rows_with_settings_of_their_own_are_what_each_is_alone() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(5, size=3).tolist(), dataclasses.replace(args, seed=i % 3), i % 4)
        for i, args in enumerate([*CASES.values(), GREEDY, dataclasses.replace(MIXED, temperature=0.0)])
    ]
    logits = rng.normal(size=(len(rows), 5)) * 2
    together = draw(rows, logits, steps=12)
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(draw([row], logits[i : i + 1], steps=12)[0], together[i], str(row))
    order = rng.permutation(len(rows))
    np.testing.assert_array_equal(draw([rows[i] for i in order], logits[order], steps=12), together[order])


def test_a_rows_draw_does_not_depend_on_its_place() -> None:
    row = ([1], dataclasses.replace(OPEN, seed=7), 0)
    other = ([2], dataclasses.replace(MIXED, seed=8), 1)
    wanted = draw([row], np.zeros((1, 50)), steps=20)[0]
    for place in range(5):
        rows = [other] * place + [row] + [other] * (4 - place)
        np.testing.assert_array_equal(draw(rows, np.zeros((5, 50)), steps=20)[place], wanted)


def test_samples_of_a_prompt_differ_and_so_do_seeds_and_steps() -> None:
    keys = [(seed, number) for seed in (0, 1, 2**32 - 1) for number in range(4)]
    rows = [([1], dataclasses.replace(OPEN, seed=seed), number) for seed, number in keys]
    ids = draw(rows, np.zeros((len(rows), 1000)), steps=20)
    assert len({tuple(row) for row in ids.tolist()}) == len(rows)
    assert len(np.unique(ids)) > 0.8 * ids.size  # of 240 draws of 1000, about 213 differ
    np.testing.assert_array_equal(ids, draw(rows, np.zeros((len(rows), 1000)), steps=20))


def test_samples_of_a_prompt_are_independent_of_each_other() -> None:
    """Pairs of the samples 0 and 1, and pairs of neighbouring tokens, are as frequent as chance has it."""
    rows = [([], dataclasses.replace(OPEN, seed=seed), number) for seed in range(2000) for number in (0, 1)]
    ids = draw(rows, np.zeros((len(rows), 4)), steps=2)
    for pairs in (np.stack([ids[::2, 0], ids[1::2, 0]]), ids.T):
        counts = np.bincount(pairs[0] * 4 + pairs[1], minlength=16) / pairs.shape[1]
        np.testing.assert_allclose(counts, 1 / 16, atol=0.03)


def test_what_no_row_asks_for_is_not_computed() -> None:
    sampler = make_sampler([([1], GREEDY, 0), ([2], OPEN, 0)], 5)
    assert (sampler.filters, sampler.bias, sampler.penalties) == ({}, None, None)
