"""The next token from its logits: greedy, temperature, and Meta's top-p rule."""

import jax
import jax.numpy as jnp


def keep_top_p(probs: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Mask of the likeliest tokens that hold ``top_p`` of the probability together: float32 [..., V] sorted descending.

    Meta's rule (llama/generation.py, sample_top_p): a token goes when those before it hold more than top_p; the one that
    crosses the border stays, and so does the first always.
    """
    before = jnp.cumsum(probs, axis=-1) - probs
    return (before <= top_p).at[..., 0].set(True)


def sample_token(key: jax.Array, logits: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """A token for one row: logits float32 [V] -> int32 []. At temperature 0 the likeliest."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(-scaled)
    probs = jax.nn.softmax(scaled[order])
    kept = jnp.where(keep_top_p(probs, top_p), jnp.log(probs), -jnp.inf)
    sampled = order[jax.random.categorical(key, kept)]
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits)).astype(jnp.int32)
