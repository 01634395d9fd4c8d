"""The model's forward pass over a cache: the same blocks as in training, one after the other.

B rows, T tokens, D dim, V vocab, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import ModelArgs
from llama_jax.model import Block, Cached, KeysValues, Llama, rms_norm, rotary_table
from llama_jax.ops.cache import KVCache
from llama_jax.ops.linear import linear


def forward(model: Llama, params: Any, tokens: jax.Array, cache: KVCache, end: int) -> tuple[jax.Array, KVCache]:
    """Normed hidden states of the next tokens: int [B, T] -> [B, T, D], and the cache that holds them."""
    x, made = hidden_and_new(model, params, tokens, cache, end)
    if model.exact_rows:
        k, v = zip(*made, strict=True)
        return x, cache.replace(k=k, v=v, slot=cache.slot + tokens.shape[1])
    # Nothing but zeros, which XLA does not know: the cache is written behind its last read, and so in place.
    behind = 0 * x[:, :, 0]

    def later(made: jax.Array) -> jax.Array:
        return made + jnp.expand_dims(behind, range(2, made.ndim)).astype(made.dtype)

    return x, cache.write(jax.tree.map(later, made))


def hidden_and_new(
    model: Llama, params: Any, tokens: jax.Array, cache: KVCache, end: int
) -> tuple[jax.Array, list[KeysValues]]:
    """Normed hidden states of the next tokens, int [B, T] -> [B, T, D], and each layer's keys and values of them.

    ``end``: the number of the cache's slots that are read, at least as many as are filled. Positions are counted from each
    row's first slot.
    """
    args, T = model.args, tokens.shape[1]
    slots = jnp.reshape(cache.slot, (-1, 1)) + jnp.arange(T)
    positions = jnp.maximum(slots - cache.first[:, None], 0)  # a padding slot is at 0
    cos, sin = (
        jnp.asarray(table)[positions] for table in rotary_table(args.max_seq_len, args.head_dim, args.rope_theta)
    )
    block = Block(args, model.kernel, model.exact_rows)
    x = params["tok_embeddings"][tokens].astype(model.dtype)
    made: list[Any] = []
    for layer, weights in enumerate(params["layers"]):
        stored = cache.layer(layer, cache.slots if model.exact_rows else end)
        cached = Cached(*stored, cache.slot, cache.first)
        x, keys_values = block.apply({"params": with_heads(weights, args)}, x, cached, (cos, sin))
        made.append(keys_values)
    return rms_norm(x, params["norm"], args.norm_eps, model.exact_rows), made


def with_heads(weights: Any, args: ModelArgs) -> Any:
    """A layer's parameters in the serving form, attention's with heads as axes."""
    attention = dict(weights["attention"])
    for name, heads in (("wq", args.n_heads), ("wk", args.kv_heads), ("wv", args.kv_heads)):
        attention[name] = attention[name].reshape(args.dim, heads, args.head_dim)
    attention["wo"] = attention["wo"].reshape(args.n_heads, args.head_dim, args.dim)
    return weights | {"attention": attention}


def logits_of(model: Llama, params: Any, hidden: jax.Array) -> jax.Array:
    """[B, T, D] -> float32 [B, T, V]."""
    return linear("BTD,DV->BTV", hidden, params["output"], jnp.float32, model.exact_rows)
