"""Prefill and decode: what comes out of the cache is what the whole model says, row by row, whatever stands beside a row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import SampleArgs
from llama_jax.generation import Model
from llama_jax.generation import decode as decoding
from llama_jax.generation.decode import BUCKETS, CHUNK, CPU_PREFILL, prompt_slots, slots_read
from llama_jax.generation.sampling import make_sampler
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import decode, decode_rows, full_log_probs, never_ending, prompts_of_lengths

CONTEXT = 1024
# The same programs run both.
GREEDY = SampleArgs(temperature=0.0, top_p=1.0)
FREE = SampleArgs(temperature=1.0, top_p=1.0)
# Log-probabilities that are nearer to each other than this are equal up to rounding.
ALIKE = 1e-4


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return never_ending(small_tokenizer, max_seq_len=CONTEXT)


def assert_greedy(model: Model, prompt: list[int], row: np.ndarray, logprobs: np.ndarray) -> None:
    """Every token is the likeliest that the whole model has behind those before it; of tokens alike, any."""
    made = row.tolist()
    full = full_log_probs(model, prompt + made)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(logprobs, full[np.arange(len(made)), made], atol=ALIKE)
    assert (logprobs >= full.max(axis=-1) - 2 * ALIKE).all()


def assert_same(model: Model, prompt: list[int], a: np.ndarray, b: np.ndarray) -> None:
    """Two greedy completions are the same, at least up to where the whole model has two tokens alike."""
    differs = np.flatnonzero(a != b)
    if len(differs):
        at = int(differs[0])
        full = full_log_probs(model, prompt + a[:at].tolist())[-1]
        assert abs(full[a[at]] - full[b[at]]) < 2 * ALIKE, f"token {at}: {a[at]} and {b[at]}"


def random_lengths(batch: int) -> list[int]:
    """Of 1 to 8 prompts of 1 to 300 tokens; the first batch has the shortest and the longest beside each other."""
    rows = [8, 3, 6][batch]
    lengths = np.random.default_rng(batch).integers(1, 301, size=rows).tolist()
    return [1, 300, 2, 299, *lengths[4:]] if batch == 0 else lengths


@pytest.mark.parametrize("batch", range(3))
def test_greedy_rows_of_a_ragged_batch_are_each_prompts_own(model: Model, batch: int) -> None:
    prompts = prompts_of_lengths(model, random_lengths(batch), seed=batch)
    ids, logprobs = decode(model, prompts, GREEDY, 32)
    for prompt, row, row_logprobs in zip(prompts, ids, logprobs, strict=True):
        assert_greedy(model, prompt, row, row_logprobs)
        (alone,), _ = decode(model, [prompt], GREEDY, 32)
        assert_same(model, prompt, row, alone)


def test_prompts_read_in_several_passes_are_read_as_in_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of_lengths(model, [1, 31, 32, 33, 64, 65, 130, 200])
    whole, whole_logprobs = decode(model, prompts, GREEDY, 20)
    monkeypatch.setattr(decoding, "CPU_PREFILL", 32)
    monkeypatch.setattr(decoding, "BUCKETS", (16, 32))
    assert prompt_slots(200) == 224  # seven passes; a row of one token is padding in six
    parts, logprobs = decode(model, prompts, GREEDY, 20)
    for i, prompt in enumerate(prompts):
        assert_greedy(model, prompt, parts[i], logprobs[i])
        assert_same(model, prompt, parts[i], whole[i])
    same = (parts == whole).all(axis=1)
    assert same.sum() > 4
    np.testing.assert_allclose(logprobs[same], whole_logprobs[same], atol=ALIKE)


@pytest.mark.parametrize("args", [GREEDY, FREE], ids=["greedy", "sampled"])
def test_steps_between_two_looks_change_nothing(model: Model, args: SampleArgs) -> None:
    prompts = prompts_of_lengths(model, [3, 40])
    many, many_logprobs = decode(model, prompts, args, CHUNK + 3)
    ids, logprobs = decode(model, prompts, args, CHUNK + 3, steps=1)
    np.testing.assert_array_equal(ids, many)
    np.testing.assert_allclose(logprobs, many_logprobs, atol=ALIKE)


@pytest.mark.parametrize("border", [16, 64, 128, 256, 512])
def test_prompts_around_the_border_of_a_bucket_are_read_whole(model: Model, border: int) -> None:
    assert border in BUCKETS
    prompts = prompts_of_lengths(model, [border - 1, border, border + 1, 3], seed=border)
    for batch in (prompts[:2], prompts[2:]):
        ids, logprobs = decode(model, batch, GREEDY, 4)
        for prompt, row, row_logprobs in zip(batch, ids, logprobs, strict=True):
            assert_greedy(model, prompt, row, row_logprobs)


def test_a_completion_goes_on_over_the_slots_that_are_read_at_first(model: Model) -> None:
    """Of the cache more is read when more is filled: 256, 512, then 1024 slots."""
    prompts = prompts_of_lengths(model, [1, 230, 250])
    ids, logprobs = decode(model, prompts, GREEDY, 300)
    assert slots_read(prompt_slots(250) + 16) == 512 and slots_read(prompt_slots(250) + 300) == 1024
    for prompt, row, row_logprobs in zip(prompts, ids, logprobs, strict=True):
        assert_greedy(model, prompt, row, row_logprobs)


def test_a_row_may_fill_the_context(model: Model) -> None:
    (prompt,) = prompts_of_lengths(model, [CONTEXT - 5])
    ids, logprobs = decode(model, [prompt, prompt[:3]], GREEDY, 5)
    assert_greedy(model, prompt, ids[0], logprobs[0])
    assert_greedy(model, prompt[:3], ids[1], logprobs[1])


def test_buckets_hold_their_prompts() -> None:
    for tokens in range(1, 2000):
        slots = prompt_slots(tokens)
        assert slots >= tokens and (slots in BUCKETS or slots % CPU_PREFILL == 0)
        assert slots < 2 * max(tokens, 8) or slots == 256 or slots - tokens < CPU_PREFILL
        assert slots_read(tokens) >= max(tokens, 256) and slots_read(tokens) < max(2 * tokens, 257)


def test_prefill_sees_every_prompt_token_and_no_padding(model: Model) -> None:
    (prompt,) = prompts_of_lengths(model, [30])
    _, (before,) = decode(model, [prompt], GREEDY, 1)
    for t in (0, 15, 29):
        changed = [*prompt[:t], (prompt[t] + 1) % model.args.vocab_size, *prompt[t + 1 :]]
        _, (after,) = decode(model, [changed], GREEDY, 1)
        assert before[0] != after[0]


def mixed_rows(model: Model) -> list[Any]:
    prompts = prompts_of_lengths(model, [5, 100, 7, 1])
    settings = [
        SampleArgs(temperature=0.8, top_p=0.9, seed=3),
        GREEDY,
        SampleArgs(
            temperature=1.2, top_k=20, min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.2,
            logit_bias={5: 3.0, 7: -np.inf}, seed=3,
        ),
        FREE,
    ]  # fmt: skip
    return [(prompt, args, i % 3) for i, (prompt, args) in enumerate(zip(prompts, settings, strict=True))]


def test_a_sampled_row_is_the_same_in_every_batch_and_place(model: Model) -> None:
    rows = mixed_rows(model)
    together, logprobs = decode_rows(model, rows, 24)
    for i, row in enumerate(rows):
        alone, alone_logprobs = decode_rows(model, [row], 24)
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_allclose(alone_logprobs[0], logprobs[i], atol=ALIKE)
        full = full_log_probs(model, [*row[0], *alone[0].tolist()])[len(row[0]) - 1 : -1]
        np.testing.assert_allclose(alone_logprobs[0], full[np.arange(24), alone[0]], atol=ALIKE)
    for order in ([3, 2, 1, 0], [2, 0, 0, 3]):
        turned, _ = decode_rows(model, [rows[i] for i in order], 24)
        np.testing.assert_array_equal(turned, together[order])


def test_penalties_count_what_a_row_has_made(model: Model) -> None:
    prompts = prompts_of_lengths(model, [5, 20])
    never_twice = dataclasses.replace(GREEDY, frequency_penalty=1000.0)
    ids, _ = decode(model, prompts, never_twice, 60)
    assert all(len(set(row)) == 60 for row in ids.tolist())
    nor_the_prompts = dataclasses.replace(GREEDY, repetition_penalty=1e6, frequency_penalty=1e6)
    ids, _ = decode(model, prompts, nor_the_prompts, 30)
    assert not any(set(row) & set(prompt) for row, prompt in zip(ids.tolist(), prompts, strict=True))


def test_samples_of_a_prompt_differ_and_keep_their_numbers(model: Model) -> None:
    (prompt,) = prompts_of_lengths(model, [12])
    ids, _ = decode_rows(model, [(prompt, FREE, number) for number in range(4)], 16)
    assert len({tuple(row) for row in ids.tolist()}) == 4
    (third,), _ = decode_rows(model, [(prompt, FREE, 2)], 16)
    np.testing.assert_array_equal(third, ids[2])


@pytest.mark.parametrize("args", [SampleArgs(temperature=0.0), SampleArgs(top_p=0.9, repetition_penalty=1.1)])
def test_the_first_chunk_is_compiled_once_while_the_prompt_is_read(
    model: Model, args: SampleArgs, caplog: pytest.LogCaptureFixture
) -> None:
    jax.config.update("jax_log_compiles", True)  # the context manager would hold for this thread alone
    try:
        with caplog.at_level("WARNING"):
            for count in (9, 6):
                decode(model, [[1, 5, 6]], args, count, steps=3)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.threadName for r in caplog.records if "XLA compilation of jit(decode_chunk)" in r.getMessage()]
    assert compiled == ["compiling"]


def test_a_cache_is_written_where_it_lies(model: Model) -> None:
    """A compiled step holds no second cache."""
    B, slots = 8, 1024
    rows = [(prompt, GREEDY, 0) for prompt in prompts_of_lengths(model, [4] * B)]
    first = jnp.zeros(B, jnp.int32)
    cache = jax.eval_shape(lambda: decoding.KVCache.empty(model.args, first, slots, jnp.float32))
    logits = jax.ShapeDtypeStruct((B, model.args.vocab_size), jnp.float32)
    state = decoding.DecodeState(cache, logits, make_sampler(rows, model.args.vocab_size), jnp.zeros(B, jnp.int32))
    lowered = decoding.decode_chunk.lower(model.module, model.serving, state, steps=4, end=slots)
    memory = lowered.compile().memory_analysis()
    one = 2 * model.args.n_layers * B * slots * model.args.kv_heads * model.args.head_width * 4
    assert memory.alias_size_in_bytes >= one
    assert memory.temp_size_in_bytes < one / 2


def test_rows_in_bfloat16_decode_as_their_full_forward(model: Model) -> None:
    args = dataclasses.replace(model.args, max_seq_len=128)
    half = dataclasses.replace(model, args=args, module=Llama(args, dtype=jnp.bfloat16))
    prompts = prompts_of_lengths(model, [3, 70])
    ids, logprobs = decode(half, prompts, GREEDY, 20)
    for prompt, row, row_logprobs in zip(prompts, ids.tolist(), logprobs, strict=True):
        full = full_log_probs(half, prompt + row)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(row_logprobs, full[np.arange(len(row)), row], atol=0.15)
