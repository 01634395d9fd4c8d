"""Matrix products of the model: an einsum with a gradient that keeps the weight's layout."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The name by which rematerialisation policies know the results (model.py).
PROJECTION = "projection"


def linear(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(equation, x, w), where w has no batch axis: ``linear("BTD,DNH->BTNH", x, wq)``.

    Same values and gradients as jnp.einsum. JAX's own gradient of x @ w is (dy^T x)^T, which XLA on a CPU begins by copying
    the wider operand transposed. Written with the narrower operand first, a training step of the 15M model is a quarter
    faster there; other compilers choose the layout by themselves and are not hindered.
    """
    return checkpoint_name(_einsum(equation, x, w), PROJECTION)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, w)


def _forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(equation, x, w), (x, w)


def _backward(equation: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    operands, y_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    dx = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w)
    n_in = sum(a in x_axes for a in w_axes)
    x2 = x.reshape(-1, math.prod(w.shape[:n_in]))
    dy2 = dy.reshape(-1, math.prod(w.shape[n_in:]))
    tokens = (((0,), (0,)), ((), ()))
    if x2.shape[1] <= dy2.shape[1]:
        dw = jax.lax.dot_general(x2, dy2, tokens)
    else:
        dw = jax.lax.dot_general(dy2, x2, tokens).T
    return dx.astype(x.dtype), dw.reshape(w.shape).astype(w.dtype)


_einsum.defvjp(_forward, _backward)
