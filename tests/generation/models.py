"""Small random models to generate with, and what the whole model says of a sequence."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelArgs, SampleArgs
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.generation import Model
from llama_jax.generation.decode import CHUNK, generate_chunks
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests import numpy_llama


def build(tokenizer: Tokenizer, **args: Any) -> Model:
    defaults = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "max_seq_len": 256}
    model_args = ModelArgs(vocab_size=tokenizer.vocab_size, **(defaults | args))
    module = Llama(model_args)
    params = jax.tree.map(jnp.asarray, numpy_llama.random_params(parameter_shapes(module)))
    return Model(model_args, params, tokenizer, module)


def speaking(model: Model) -> Model:
    """The model, but that it never says EOS, nor what has no text."""
    silent = jnp.array([model.tokenizer.eos_id, model.tokenizer.bos_id, model.tokenizer.unk_id])
    # Every token's embedding has a large first feature, so the normed hidden state has one; what is silent reads it.
    embeddings = model.params["tok_embeddings"].at[:, 0].set(30.0)
    output = model.params["output"].at[0, :].set(0.0).at[0, silent].set(-100.0)
    return dataclasses.replace(model, params=model.params | {"tok_embeddings": embeddings, "output": output})


def never_ending(tokenizer: Tokenizer, **args: Any) -> Model:
    """A model that never says EOS of itself: its logit is 0 always, far below the largest of 300."""
    model = build(tokenizer, **args)
    output = model.params["output"].at[:, tokenizer.eos_id].set(0.0)
    return dataclasses.replace(model, params=model.params | {"output": output})


def prompts_of_lengths(model: Model, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, model.args.vocab_size, size=n - 1).tolist()] for n in lengths]


def decode_rows(
    model: Model, rows: Sequence[Any], count: int, steps: int = CHUNK, cache_dtype: Any = None, params: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities, each [B, count], of rows of (prompt, settings, number)."""
    params = model.serving if params is None else params
    chunks = list(generate_chunks(model.module, params, rows, count, steps=steps, cache_dtype=cache_dtype))
    assert len(chunks) == -(-count // steps) and all(chunk.ids.shape == (len(rows), steps) for chunk in chunks)
    ids, logprobs = (np.concatenate([chunk[part] for chunk in chunks], axis=1) for part in (0, 1))
    return ids[:, :count], logprobs[:, :count]


def decode(
    model: Model, prompts: Sequence[list[int]], args: SampleArgs, count: int, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    return decode_rows(model, [(prompt, args, 0) for prompt in prompts], count, **how)


def full_log_probs(model: Model, ids: list[int]) -> np.ndarray:
    """Log-probabilities after each position of one sequence: float32 [T, V]; padded behind, to compile one shape."""
    padded = np.array([ids + [0] * (model.args.max_seq_len - len(ids))])
    return np.asarray(jax.nn.log_softmax(model.logits(padded)))[0, : len(ids)]
