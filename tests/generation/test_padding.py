"""Rows of a model that have no token are never sampled, in any way of decoding, however likely they are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ModelArgs, SampleArgs
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.generation import Model
from llama_jax.generation.sampling import make_sampler, sample
from llama_jax.generation.speculative import Draft
from llama_jax.model import Llama
from llama_jax.ops import exact
from llama_jax.tokenizer import Tokenizer
from tests import numpy_llama

TOKENS = 400
SHAPE = {"n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 8, "max_seq_len": 256}
WAYS = {
    "greedy": SampleArgs(temperature=0.0, max_new_tokens=24),
    "sampled": SampleArgs(temperature=1.3, top_p=1.0, seed=3, max_new_tokens=24),
    "penalised": SampleArgs(
        temperature=0.9, repetition_penalty=1.5, frequency_penalty=2.0, logit_bias={5: 3.0}, max_new_tokens=24
    ),
}


def padded(tokenizer: Tokenizer, rows: int, dim: int = 16, exactly: bool = False) -> Model:
    """A model that finds every row without a token likelier than all others, and never says EOS of itself."""
    args = ModelArgs(vocab_size=rows, dim=dim, **SHAPE)
    module = Llama(args, exact_rows=exact.CPU_ROWS) if exactly else Llama(args)
    params = jax.tree.map(jnp.asarray, numpy_llama.random_params(parameter_shapes(module)))
    embeddings = params["tok_embeddings"].at[:, 0].set(30.0)  # every hidden state has a large first feature
    output = params["output"].at[0, :].set(0.0).at[0, TOKENS:].set(20.0).at[0, tokenizer.eos_id].set(-100.0)
    return Model(args, params | {"tok_embeddings": embeddings, "output": output}, tokenizer, module)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["plain", "exact", "lookup", "a draft of more rows", "a draft of fewer rows"])
def test_a_row_without_a_token_is_never_sampled(how: str, way: str, small_tokenizer: Tokenizer) -> None:
    assert small_tokenizer.vocab_size == TOKENS
    plain = model = padded(small_tokenizer, 448, exactly=how == "exact")
    if how == "lookup":
        model = dataclasses.replace(model, draft=Draft(3))
    elif how.startswith("a draft"):
        other = padded(small_tokenizer, 512 if "more" in how else TOKENS, dim=8)
        model = dataclasses.replace(model, draft=Draft(3, other.module, other.serving))
    prompts = ["the fox", "Once upon a time there was a small brown fox who lived by the river"]
    found = model.generate(prompts, WAYS[way])
    for prompt, each in zip(prompts, found, strict=True):
        assert len(each.token_ids) == 24 and max(each.token_ids) < TOKENS
        ids = [*small_tokenizer.encode(prompt), *each.token_ids]
        logits = np.asarray(plain.logits(np.array([ids])))[0]
        assert np.all(logits.argmax(axis=-1) >= TOKENS), "without the rule, padding would be said at every place"
        known = np.asarray(jax.nn.log_softmax(logits[:, :TOKENS]))
        expected = [known[len(ids) - 25 + i, token] for i, token in enumerate(each.token_ids)]
        np.testing.assert_allclose(each.logprobs, expected, atol=1e-4)
    if how != "plain":
        like = [each.token_ids for each in padded(small_tokenizer, 448).generate(prompts, WAYS[way])]
        assert [each.token_ids for each in found] == like


def test_a_stream_says_no_padding(small_tokenizer: Tokenizer) -> None:
    model = padded(small_tokenizer, 448)
    text = "".join(model.stream("the fox", WAYS["greedy"]))
    assert text == model.generate(["the fox"], WAYS["greedy"])[0].text


def test_a_vocabulary_without_padding_costs_nothing_and_damage_is_still_told() -> None:
    rows: Any = [([1], SampleArgs(temperature=0.0), 0)]
    assert make_sampler(rows, 4, np.zeros(4, bool)).absent is None and make_sampler(rows, 4).absent is None
    sampler = make_sampler(rows, 4, np.array([False, False, False, True]))
    logits = jnp.array([[0.0, 1.0, 0.5, 9.0]])
    (token,), (logprob,), _ = sample(sampler, logits, jnp.array([0]))
    assert token == 1 and np.isclose(logprob, jax.nn.log_softmax(logits[0, :3])[1])
    _, (damaged,), _ = sample(sampler, logits.at[0, 0].set(jnp.nan), jnp.array([0]))
    assert np.isnan(damaged)
