"""Speculative decoding makes the tokens of plain decoding, whoever guesses; good guesses are kept."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import SampleArgs
from llama_jax.generation import Model
from llama_jax.generation.speculative import LONGEST_RUN, Draft, Runs, generate_speculatively, look_up
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build, decode_rows, never_ending, prompts_of_lengths

COUNT = 40
SETTINGS = {
    "greedy": SampleArgs(temperature=0.0),
    "sampled": SampleArgs(temperature=0.8, seed=5),
    "all at once": SampleArgs(
        temperature=1.2, top_k=20, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4
    ),
}


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return never_ending(small_tokenizer, max_seq_len=512)


@pytest.fixture(scope="module")
def drafts(model: Model, small_tokenizer: Tokenizer) -> dict[str, Draft]:
    other = build(small_tokenizer, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=512)
    return {
        "lookup": Draft(4),
        "another model": Draft(3, other.module, other.serving),
        "the model itself": Draft(4, model.module, model.serving),
    }


def speculate(
    model: Model, rows: Any, draft: Draft, end_id: int = -1, cache_dtype: Any = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids and log-probabilities, each [B, COUNT], and how many passes over the model they took."""
    ends = [{end_id} for _ in rows]
    chunks = list(generate_speculatively(model.module, model.serving, rows, COUNT, draft, ends, cache_dtype))
    ids, logprobs = (np.concatenate([chunk[part] for chunk in chunks], axis=1) for part in (0, 1))
    return ids[:, :COUNT], logprobs[:, :COUNT], len(chunks)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("guesser", ["lookup", "another model", "the model itself"])
def test_the_tokens_are_those_of_plain_decoding(
    model: Model, drafts: dict[str, Draft], guesser: str, settings: str
) -> None:
    args = SETTINGS[settings]
    prompts = prompts_of_lengths(model, [3, 17, 90])
    rows = [(prompt, dataclasses.replace(args, seed=args.seed + i), i) for i, prompt in enumerate(prompts)]
    wanted, wanted_logprobs = decode_rows(model, rows, COUNT)
    ids, logprobs, passes = speculate(model, rows, drafts[guesser])
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4)
    if guesser == "the model itself":
        # With the same random numbers every guess is right, 4 and one more a pass; the first token comes alone.
        assert passes == 1 + -(-(COUNT - 1) // 5)


@pytest.mark.parametrize("guesser", ["lookup", "the model itself"])
def test_with_a_cache_of_int8_too(model: Model, drafts: dict[str, Draft], guesser: str) -> None:
    """A checked guess reads its neighbours' keys and values rounded, as a token that is decoded alone does."""
    rows = [(prompt, SETTINGS["greedy"], 0) for prompt in prompts_of_lengths(model, [3, 17, 90, 40, 5])]
    wanted, wanted_logprobs = decode_rows(model, rows, COUNT, cache_dtype=jnp.int8)
    ids, logprobs, _ = speculate(model, rows, drafts[guesser], cache_dtype=jnp.int8)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-3)


def test_a_row_is_not_waited_for_once_it_has_ended(model: Model, drafts: dict[str, Draft]) -> None:
    prompts = prompts_of_lengths(model, [5, 30])
    rows = [(prompt, SETTINGS["greedy"], 0) for prompt in prompts]
    plain, _ = decode_rows(model, rows, COUNT)
    eos_id = next(token for token in plain[0].tolist() if token not in plain[1])
    _, _, alone = speculate(model, rows[1:], drafts["another model"])
    ids, _, together = speculate(model, rows, drafts["another model"], eos_id)
    np.testing.assert_array_equal(ids[1], plain[1])
    # Until it says EOS, a row may hold the other back.
    assert together <= alone + plain[0].tolist().index(eos_id) + 1


@pytest.mark.parametrize("args", [SETTINGS["greedy"], dataclasses.replace(SETTINGS["sampled"], n=2)])
def test_a_model_with_a_draft_says_and_streams_what_it_says_without(
    model: Model, drafts: dict[str, Draft], args: SampleArgs
) -> None:
    prompts = ["The fox saw the river.", "", "An owl. An owl. An owl."]
    args = dataclasses.replace(args, max_new_tokens=30, stop=("zz",))
    for draft in drafts.values():
        quick = dataclasses.replace(model, draft=draft)
        for found, wanted in zip(quick.generate(prompts, args), model.generate(prompts, args), strict=True):
            assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
            assert found.finish_reason == wanted.finish_reason
            np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)
        one = dataclasses.replace(args, n=1)
        assert "".join(quick.stream(prompts[0], one)) == model.generate(prompts[:1], one)[0].text


def test_the_end_of_the_context_is_reached_with_guesses_too(small_tokenizer: Tokenizer) -> None:
    model = never_ending(small_tokenizer, max_seq_len=32)
    args = SampleArgs(temperature=0.0, max_new_tokens=100)
    (wanted,) = model.generate(["The fox"], args)
    (found,) = dataclasses.replace(model, draft=Draft(5)).generate(["The fox"], args)
    assert found.token_ids == wanted.token_ids and found.finish_reason == "length"


def test_text_that_repeats_is_looked_up(model: Model) -> None:
    assert look_up([1, 2, 3, 4, 5, 9, 2, 3, 4], 3) == [5, 9, 2]
    assert look_up([7, 8, 5, 8, 6, 8], 2) == [6, 8]  # the latest
    assert look_up([1, 2, 3], 2) == [3, 3]  # nothing of the kind came before
    assert look_up([1], 2) == [1, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.data())
def test_a_row_that_grows_is_looked_up_as_one_that_is_new(row: list[int], tokens: int, data: st.DataObject) -> None:
    def by_hand(row: list[int]) -> list[int]:
        for length in range(min(LONGEST_RUN, len(row) - 1), 0, -1):
            for start in range(len(row) - length - 1, -1, -1):
                if row[start : start + length] == row[-length:]:
                    found = row[start + length : start + length + tokens]
                    return found + [row[-1]] * (tokens - len(found))
        return [row[-1]] * tokens

    runs, end = Runs(), 0
    while end < len(row):
        end = data.draw(st.integers(end + 1, len(row)))
        assert runs.look_up(row[:end], tokens) == by_hand(row[:end]) == look_up(row[:end], tokens)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6))
def test_a_guess_is_what_followed_a_run_like_the_last(row: list[int], tokens: int) -> None:
    guess = look_up(row, tokens)
    assert len(guess) == tokens
    if row[-1] in row[:-1]:
        assert any(row[i] == row[-1] and row[i + 1] == guess[0] for i in range(len(row) - 1))
