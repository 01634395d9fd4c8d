"""The gate of a feed-forward layer, beside the formula."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ops.gate import gated


def plain(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def operands(dtype: str) -> list[jax.Array]:
    return [jax.random.normal(key, (64, 128), dtype) * 3 for key in jax.random.split(jax.random.key(0), 3)]


def test_values_and_gradients_are_those_of_the_formula() -> None:
    gate, up, dy = operands("float32")
    found, back = jax.vjp(gated, gate, up)
    wanted, plain_back = jax.vjp(plain, gate, up)
    np.testing.assert_array_equal(found, wanted)
    for one, other in zip(back(dy), plain_back(dy), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_of_bfloat16_are_nearer_to_those_of_float32_than_jaxs_own() -> None:
    gate, up, dy = operands("bfloat16")
    exact = jax.vjp(plain, gate.astype("float32"), up.astype("float32"))[1](dy.astype("float32"))

    def error(function: object) -> float:
        made = jax.vjp(function, gate, up)[1](dy)
        return max(float(jnp.max(jnp.abs(a.astype("float32") - b))) for a, b in zip(made, exact, strict=True))

    assert error(gated) < 0.6 * error(plain)
