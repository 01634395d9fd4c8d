"""linear: the values and gradients of jnp.einsum, for every product of the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.linear import linear

SIZES = {"B": 2, "T": 5, "C": 3, "D": 6, "N": 4, "K": 2, "H": 3, "F": 16, "V": 11}
EQUATIONS = [
    "BTD,DNH->BTNH",
    "BTD,DKH->BTKH",
    "BTNH,NHD->BTD",
    "BTD,DF->BTF",
    "BTF,FD->BTD",
    "BCD,DV->BCV",
]


def operands(equation: str, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    axes = equation.replace("->", ",").split(",")
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, [SIZES[a] for a in part]).astype(dtype) for key, part in zip(keys, axes, strict=True)
    ]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_values_and_gradients_are_those_of_einsum(equation: str) -> None:
    x, w, dy = operands(equation)
    y, pull = jax.vjp(lambda x, w: linear(equation, x, w), x, w)
    expected, pull_expected = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for found, wanted in zip(pull(dy), pull_expected(dy), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_bfloat16_operands_have_bfloat16_results_and_gradients(equation: str) -> None:
    x, w, dy = operands(equation, jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: linear(equation, x, w), x, w)
    exact, pull_exact = jax.vjp(
        lambda x, w: jnp.einsum(equation, x, w), x.astype(jnp.float32), w.astype(jnp.float32)
    )
    found, wanted = (y, *pull(dy)), (exact, *pull_exact(dy.astype(jnp.float32)))
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))
