"""Generation: what a model's functions make of what decode says."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.evaluate import evaluate
from llama_jax.generation import Model
from llama_jax.generation.decode import CHUNK
from llama_jax.generation.speculative import Draft
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
    with pytest.raises(UserError, match="prompts: expected a list of strings, found None"):
        model.generate(None)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("draft", [None, Draft(4)])
def test_any_of_several_tokens_ends_a_row(model: Model, draft: Draft | None) -> None:
    prompts, args = ["Once upon a time", "The owl saw", "A boat"], dataclasses.replace(GREEDY, max_new_tokens=40)
    free = model.generate(prompts, args)
    ends = (free[0].token_ids[5], free[1].token_ids[9])
    ending = dataclasses.replace(model, end_ids=ends, draft=draft)
    for before, after, text in zip(free, ending.generate(prompts, args), prompts, strict=True):
        at = min((before.token_ids.index(end) for end in ends if end in before.token_ids), default=40)
        assert after.token_ids == before.token_ids[:at]
        assert after.finish_reason == ("stop" if at < 40 else "length")
        assert "".join(ending.stream(text, args)) == after.text


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


BAD = {
    "NaN in a layer": ("layers/feed_forward/w1", np.nan),
    "infinity in a norm": ("norm", np.inf),
    "infinity in one token's output": ("output", np.inf),
    "minus infinity there": ("output", -np.inf),
}


def with_bad_value(model: Model, name: str, value: float) -> Model:
    """The model with a value in a weight that every token meets."""
    tree = jax.tree.map(np.array, model.params)
    *path, last = name.split("/")
    inner = tree
    for key in path:
        inner = inner[key]
    inner[last].reshape(-1)[0] = value
    return dataclasses.replace(model, params=jax.tree.map(jnp.asarray, tree), source="runs/bad")


@pytest.mark.parametrize("bad", BAD)
def test_a_model_that_makes_nan_or_infinity_is_told_at_every_door(model: Model, bad: str, tmp_path: Path) -> None:
    broken = with_bad_value(model, *BAD[bad])
    words = r"runs/bad: expected finite logits, found NaN or infinity"
    with pytest.raises(UserError, match=words):
        broken.logits([[1, 5, 6]])
    for args in (GREEDY, SampleArgs(seed=3, n=2)):
        with pytest.raises(UserError, match=words):
            broken.generate(["The fox"], args)
    with pytest.raises(UserError, match=words):
        list(broken.stream("The fox", GREEDY))
    with pytest.raises(UserError, match=words):
        dataclasses.replace(broken, draft=Draft(3)).generate(["The fox"], GREEDY)
    (tmp_path / "text.txt").write_text("The owl saw the fox by the river.")
    for cache_dtype in (None, jnp.int8):
        with pytest.raises(UserError, match=words):
            evaluate(dataclasses.replace(broken, cache_dtype=cache_dtype), tmp_path / "text.txt", batch_size=1)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "prompt 2: expected one or more token ids, found none; an empty text is"),
        ([-1], "prompt 2: expected token ids from 0 to"),
        ([10**6], "prompt 2: expected token ids from 0 to"),
        ([1, 2.5], "prompt 2: expected token ids, a list of whole numbers"),
        ([1] * CONTEXT, f"prompt 2 .*: expected fewer than {CONTEXT} tokens, the model's context, found {CONTEXT}"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_ids_that_are_no_prompt_are_refused_by_number(model: Model, ids: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.generate_ids([[1, 5], ids], GREEDY)
    with pytest.raises(UserError, match=words.replace("prompt 2", "prompt 1")):
        model.stream_ids(ids, GREEDY)


def test_ids_may_be_numpys(model: Model) -> None:
    (one,), (other,) = model.generate_ids([[1, 5]], GREEDY), model.generate_ids([np.array([1, 5])], GREEDY)
    assert one.token_ids == other.token_ids


def test_settings_of_a_prompt_are_refused_by_number(model: Model) -> None:
    with pytest.raises(UserError, match="prompt 2: temperature: expected"):
        model.generate(["a", "b"], [GREEDY, SampleArgs(temperature=-1.0)])


def test_logits_of_nothing_are_nothing(model: Model) -> None:
    assert model.logits(np.zeros((2, 0), int)).shape == (2, 0, model.args.vocab_size)


def test_a_bias_that_forbids_every_token_is_refused_and_all_but_one_is_not(model: Model) -> None:
    vocab = model.args.vocab_size
    bias = {token: -np.inf for token in range(vocab)}
    for least in (-np.inf, -1e300):  # which float32 has as infinite, too
        with pytest.raises(UserError, match=f"logit_bias: expected a token that may be said, found all {vocab}"):
            model.generate(["a"], SampleArgs(logit_bias=bias | {7: least}))
    for args in (GREEDY, SampleArgs(temperature=1e-40), SampleArgs(temperature=5.0)):
        args = dataclasses.replace(args, logit_bias={t: -np.inf for t in range(vocab) if t != 7}, max_new_tokens=3)
        assert model.generate(["a"], args)[0].token_ids == [7, 7, 7]
    with pytest.raises(UserError, match=r"logit_bias: expected numbers up to 3.4e\+38, found 1e\+300"):
        model.generate(["a"], SampleArgs(logit_bias={5: 1e300}))


def test_a_temperature_that_float32_does_not_hold_is_0(model: Model) -> None:
    (wanted,) = model.generate(["The fox"], GREEDY)
    for temperature in (1e-40, 5e-324):
        assert model.generate(["The fox"], dataclasses.replace(GREEDY, temperature=temperature)) == [wanted]


def test_pasted_tags_are_warned_of(model: Model) -> None:
    with pytest.warns(UserWarning, match=r"<s> and \[INST\] in a prompt are read as plain text"):
        model.generate(["<s>[INST] Who? [/INST]"], dataclasses.replace(GREEDY, max_new_tokens=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(["Who?"], dataclasses.replace(GREEDY, max_new_tokens=1))
