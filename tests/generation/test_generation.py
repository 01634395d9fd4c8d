"""Generation: what comes out of the cache is what the whole model says, row by row."""

import dataclasses
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import ModelArgs, SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.generation.decode import CHUNK, generate_chunks
from llama_jax.generation.sampling import keep_top_p, sample_token
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from tests import numpy_llama

CONTEXT = 256
GREEDY = SampleArgs(temperature=0.0, max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = ["Once upon a time there was a fox.", "The owl saw the fox by the river.", "A boat came."]
    return train_tokenizer(lines, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def build(tokenizer: Tokenizer, **args: Any) -> Model:
    defaults = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "max_seq_len": CONTEXT}
    model_args = ModelArgs(vocab_size=tokenizer.vocab_size, **(defaults | args))
    module = Llama(model_args)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    params = jax.tree.map(jnp.asarray, numpy_llama.random_params(shapes))
    return Model(model_args, params, tokenizer, module)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    """A model that never says EOS of itself: its logit is 0 always, far below the largest of 300."""
    model = build(tokenizer)
    output = model.params["output"].at[:, tokenizer.eos_id].set(0.0)
    return dataclasses.replace(model, params=model.params | {"output": output})


@pytest.fixture(scope="module")
def ending(model: Model) -> Model:
    """A model that says EOS always."""
    params = model.params
    eos = model.tokenizer.eos_id
    # Every token's embedding has a huge first feature, so the normed hidden state has one too; EOS alone reads it.
    embeddings = params["tok_embeddings"].at[:, 0].set(100.0)
    output = params["output"].at[0, :].set(0.0).at[:, eos].set(0.0).at[0, eos].set(100.0)
    return dataclasses.replace(model, params=params | {"tok_embeddings": embeddings, "output": output})


def prompts_of_lengths(model: Model, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[1, *rng.integers(3, model.args.vocab_size, size=n - 1).tolist()] for n in lengths]


def decode(model: Model, prompts: list[list[int]], args: SampleArgs, count: int) -> tuple[np.ndarray, np.ndarray]:
    chunks = list(generate_chunks(model.module, model.params, prompts, args, count))
    ids, logprobs = (np.concatenate(part, axis=1) for part in zip(*chunks, strict=True))
    return ids[:, :count], logprobs[:, :count]


def full_log_probs(model: Model, ids: list[int]) -> np.ndarray:
    """Log-probabilities after each position of one sequence: float32 [T, V]; padded behind, to compile one shape."""
    padded = np.array([ids + [0] * (CONTEXT - len(ids))])
    return np.asarray(jax.nn.log_softmax(model.logits(padded)))[0, : len(ids)]


LENGTHS = [1, 2, 7, 63, 64, 65, 150]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_decode_of_a_ragged_batch_equals_each_prompts_own_full_forward(model: Model, temperature: float) -> None:
    prompts = prompts_of_lengths(model, LENGTHS)
    ids, logprobs = decode(model, prompts, SampleArgs(temperature=temperature, top_p=1.0), 40)
    for prompt, row, row_logprobs in zip(prompts, ids.tolist(), logprobs, strict=True):
        full = full_log_probs(model, prompt + row)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(row_logprobs, full[np.arange(len(row)), row], atol=1e-4)
        if temperature == 0:
            # The likeliest; where two are alike up to rounding, either.
            assert (row_logprobs >= full.max(axis=-1) - 1e-4).all()
            assert np.mean(np.array(row) == full.argmax(axis=-1)) > 0.9


def test_prefill_sees_every_prompt_token_and_no_padding(model: Model) -> None:
    prompt = prompts_of_lengths(model, [30])[0]
    first = [full_log_probs(model, prompt)[-1]]
    alone, _ = decode(model, [prompt], GREEDY, 1)
    assert alone[0, 0] == first[0].argmax()
    for t in (0, 15, 29):
        changed = [*prompt[:t], (prompt[t] + 1) % model.args.vocab_size, *prompt[t + 1 :]]
        _, (before,) = decode(model, [prompt], GREEDY, 1)
        _, (after,) = decode(model, [changed], GREEDY, 1)
        assert before[0] != after[0]


def test_a_sampled_row_does_not_depend_on_the_batch_it_shares(model: Model) -> None:
    prompts = prompts_of_lengths(model, [5, 20, 100])
    args = SampleArgs(temperature=0.8, top_p=0.9, seed=3)
    together, together_logprobs = decode(model, prompts, args, 30)
    for i, prompt in enumerate(prompts):
        alone, alone_logprobs = decode(model, [prompt], args, 30)
        np.testing.assert_array_equal(alone[0], together[i])
        np.testing.assert_allclose(alone_logprobs[0], together_logprobs[i], atol=1e-4)
    turned, _ = decode(model, prompts[::-1], args, 30)
    np.testing.assert_array_equal(turned[::-1], together)


def test_generate_is_what_decode_says_with_prompts_in_order(model: Model) -> None:
    texts = ["Once upon a time", "", "The owl saw the fox by the river. " * 3]
    done = model.generate(texts, GREEDY)
    prompts = [model.tokenizer.encode(text) for text in texts]
    ids, logprobs = decode(model, prompts, GREEDY, 20)
    for completion, prompt, row, row_logprobs in zip(done, prompts, ids, logprobs, strict=True):
        assert completion.token_ids == row.tolist()
        assert completion.logprobs == pytest.approx(row_logprobs.tolist())
        assert completion.finish_reason == "length"
        whole = model.tokenizer.decode(prompt + completion.token_ids)
        assert model.tokenizer.decode(prompt) + completion.text == whole


def test_no_prompts_have_no_completions(model: Model) -> None:
    assert model.generate([]) == []


def test_one_string_is_not_a_list_of_prompts(model: Model) -> None:
    with pytest.raises(UserError, match="put it in a list"):
        model.generate("Once")


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_max_new_tokens_are_made_and_no_more(model: Model, count: int) -> None:
    (done,) = model.generate(["The fox"], dataclasses.replace(GREEDY, max_new_tokens=count))
    assert len(done.token_ids) == len(done.logprobs) == count
    assert done.finish_reason == "length"


def test_the_context_ends_a_completion_and_its_last_token_is_the_full_forwards(tokenizer: Tokenizer) -> None:
    model = build(tokenizer, max_seq_len=24)
    output = model.params["output"].at[:, tokenizer.eos_id].set(0.0)
    model = dataclasses.replace(model, params=model.params | {"output": output})
    prompts = ["The fox", "Once upon"]
    for prompt, done in zip(
        prompts, model.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=100)), strict=True
    ):
        ids = tokenizer.encode(prompt)
        assert len(ids) + len(done.token_ids) == 24
        assert done.finish_reason == "length"
        full = np.asarray(jax.nn.log_softmax(model.logits([ids + done.token_ids])))[0]
        expected = full[np.arange(len(ids) - 1, 23), done.token_ids]
        np.testing.assert_allclose(done.logprobs, expected, atol=1e-4)


def test_a_prompt_as_long_as_the_context_is_told_in_one_line(model: Model) -> None:
    fits = "1"  # digits are tokens of their own
    fits += "1" * (CONTEXT - 1 - len(model.tokenizer.encode(fits)))
    assert len(model.tokenizer.encode(fits)) == CONTEXT - 1
    (done,) = model.generate([fits], GREEDY)
    assert len(done.token_ids) == 1
    with pytest.raises(UserError, match=f"fewer than {CONTEXT} tokens.*found {CONTEXT}") as caught:
        model.generate(["The fox", fits + "1"], GREEDY)
    assert "\n" not in str(caught.value)


def test_eos_stops_and_is_cut(ending: Model) -> None:
    for args in (GREEDY, SampleArgs(max_new_tokens=5)):
        for done in ending.generate(["The fox", ""], args):
            assert done.finish_reason == "stop"
            assert (done.token_ids, done.logprobs, done.text) == ([], [], "")


def test_each_row_ends_at_its_own_eos(model: Model) -> None:
    prompts = ["Once upon a time", "The owl saw", "A boat"]
    free = model.generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=40))
    # Declare a token that the first row makes to be the end: the same tokens come, cut before it.
    end = free[0].token_ids[5]
    tokenizer = Tokenizer(model.tokenizer.model_path)
    tokenizer.eos_id = end
    cut = dataclasses.replace(model, tokenizer=tokenizer).generate(
        prompts, dataclasses.replace(GREEDY, max_new_tokens=40)
    )
    assert cut[0].finish_reason == "stop" and len(cut[0].token_ids) <= 5
    for before, after in zip(free, cut, strict=True):
        at = before.token_ids.index(end) if end in before.token_ids else 40
        assert after.token_ids == before.token_ids[:at]
        assert after.finish_reason == ("stop" if at < 40 else "length")


@pytest.mark.parametrize("args", [GREEDY, SampleArgs(temperature=1.0, top_p=1.0, max_new_tokens=60, seed=5)])
def test_a_stream_joins_to_the_text_of_generate(model: Model, args: SampleArgs) -> None:
    for prompt in ("Once upon a time", ""):
        pieces = list(model.stream(prompt, args))
        assert "".join(pieces) == model.generate([prompt], args)[0].text
        assert len(pieces) > 1


def test_a_stream_of_a_model_that_ends_at_once_is_empty(ending: Model) -> None:
    assert "".join(ending.stream("The fox", GREEDY)) == ""


def test_a_seed_names_the_text(model: Model) -> None:
    def text(seed: int) -> list[int]:
        args = SampleArgs(temperature=1.0, top_p=1.0, max_new_tokens=16, seed=seed)
        return model.generate(["The fox"], args)[0].token_ids

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(6)}) == 6


def test_a_large_seed_is_refused_or_a_seed_of_its_own(model: Model) -> None:
    args = SampleArgs(temperature=1.0, top_p=1.0, max_new_tokens=16)
    for small, large in ((0, 2**32), (7, 2**40 + 7)):
        try:
            (other,) = model.generate(["The fox"], dataclasses.replace(args, seed=large))
        except UserError as error:
            assert "seed" in str(error)
            continue
        (one,) = model.generate(["The fox"], dataclasses.replace(args, seed=small))
        assert one.token_ids != other.token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("seed", -1),
    ],
)
def test_impossible_sampling_is_named(model: Model, field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{field}: "):
        model.generate(["The fox"], dataclasses.replace(SampleArgs(), **{field: value}))


@pytest.mark.parametrize(
    "token_ids", [[1, 2], [[1.0]], [[[1]]], [[-1]], [[10**6]], [[1] * (CONTEXT + 1)]], ids=lambda ids: str(ids)[:12]
)
def test_logits_refuse_what_is_not_a_batch_of_token_ids(model: Model, token_ids: Any) -> None:
    with pytest.raises(UserError, match=r"^token_ids: expected"):
        model.logits(token_ids)


def test_logits_are_float32_and_take_a_sequence_as_long_as_the_context(model: Model) -> None:
    logits = model.logits([[1] * CONTEXT])
    assert logits.shape == (1, CONTEXT, model.args.vocab_size) and logits.dtype == jnp.float32


def literal_top_p(probs: np.ndarray, p: float) -> np.ndarray:
    """Meta's sample_top_p (llama/generation.py): which of the sorted probabilities stay."""
    probs_sort = np.sort(probs)[::-1]
    probs_sum = np.cumsum(probs_sort)
    mask = probs_sum - probs_sort > p
    return ~mask


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 50), min_size=8, max_size=8),
    st.floats(0.01, 0.99).filter(lambda p: abs(p * 1000 - round(p * 1000)) > 1e-3),
)
def test_top_p_keeps_what_metas_rule_keeps(counts: list[int], p: float) -> None:
    probs = np.sort(np.array(counts) / sum(counts))[::-1].astype(np.float32)
    before = np.cumsum(probs.astype(np.float64)) - probs
    kept = np.asarray(keep_top_p(jnp.asarray(probs), p))
    clear = np.abs(before - p) > 1e-5  # beside the border, rounding decides
    np.testing.assert_array_equal(kept[clear], literal_top_p(probs, p)[clear])
    assert kept[0]


def test_the_token_that_crosses_the_border_stays_and_the_next_goes() -> None:
    probs = jnp.array([0.5, 0.25, 0.125, 0.125])
    assert keep_top_p(probs, 0.6).tolist() == [True, True, False, False]
    assert keep_top_p(probs, 0.5).tolist() == [True, True, False, False]
    assert keep_top_p(probs, 0.49).tolist() == [True, False, False, False]
    assert keep_top_p(probs, 1e-9).tolist() == [True, False, False, False]
    assert keep_top_p(probs, 1.0).all()


many = jax.jit(jax.vmap(sample_token, (0, None, None, None)))


def shares(logits: np.ndarray, temperature: float, top_p: float, count: int = 20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    ids = many(keys, jnp.asarray(logits, jnp.float32), jnp.float32(temperature), jnp.float32(top_p))
    counts = Counter(np.asarray(ids).tolist())
    return np.array([counts[i] for i in range(len(logits))]) / count


def test_samples_are_distributed_as_the_tempered_softmax_cut_by_top_p() -> None:
    logits = np.log([0.1, 0.4, 0.05, 0.25, 0.2])
    np.testing.assert_allclose(shares(logits, 1.0, 1.0), [0.1, 0.4, 0.05, 0.25, 0.2], atol=0.015)
    squared = np.array([0.1, 0.4, 0.05, 0.25, 0.2]) ** 2
    np.testing.assert_allclose(shares(logits, 0.5, 1.0), squared / squared.sum(), atol=0.015)
    # 0.4 + 0.25 < 0.7 < 0.4 + 0.25 + 0.2: three tokens stay, renormalised; no other is ever drawn.
    found = shares(logits, 1.0, 0.7)
    np.testing.assert_allclose(found, np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85, atol=0.015)
    assert found[0] == found[2] == 0


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-30, 1e-40])
def test_temperature_0_or_as_good_as_0_takes_the_likeliest(temperature: float) -> None:
    found = shares(np.array([0.0, 3.0, 2.9, -1.0, 1.0]), temperature, 0.9, count=200)
    assert found.tolist() == [0, 1, 0, 0, 0]


def test_rows_in_bfloat16_decode_as_their_full_forward(model: Model) -> None:
    half = dataclasses.replace(model, module=Llama(model.args, dtype=jnp.bfloat16))
    prompts = prompts_of_lengths(model, [3, 70])
    ids, logprobs = decode(half, prompts, GREEDY, 20)
    for prompt, row, row_logprobs in zip(prompts, ids.tolist(), logprobs, strict=True):
        full = full_log_probs(half, prompt + row)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(row_logprobs, full[np.arange(len(row)), row], atol=0.15)
