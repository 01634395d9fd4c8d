"""Generation: what a model's functions make of what decode says."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.generation.decode import CHUNK
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from tests.generation.models import decode, never_ending

CONTEXT = 256
GREEDY = SampleArgs(temperature=0.0, max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = ["Once upon a time there was a fox.", "The owl saw the fox by the river.", "A boat came."]
    return train_tokenizer(lines, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    return never_ending(tokenizer, max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def ending(model: Model) -> Model:
    """A model that says EOS always."""
    params = model.params
    eos = model.tokenizer.eos_id
    # Every token's embedding has a huge first feature, so the normed hidden state has one too; EOS alone reads it.
    embeddings = params["tok_embeddings"].at[:, 0].set(100.0)
    output = params["output"].at[0, :].set(0.0).at[:, eos].set(0.0).at[0, eos].set(100.0)
    return dataclasses.replace(model, params=params | {"tok_embeddings": embeddings, "output": output})


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
    model = never_ending(tokenizer, max_seq_len=24)
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
