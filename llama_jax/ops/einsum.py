"""The product of training, and its gradient, in which the narrower operand stands first."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Compute jnp.einsum(equation, x, w). Its gradients have the types of x and w."""
    return jnp.einsum(equation, x, w)


def _forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return einsum(equation, x, w), (x, w)


def _backward(equation: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    return input_gradient(equation, dy, w).astype(x.dtype), weight_gradient(equation, x, dy).astype(w.dtype)


einsum.defvjp(_forward, _backward)


def axes_of(equation: str) -> tuple[str, str, str]:
    """Return the axes of x, w and y in "x,w->y"."""
    operands, y_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    return x_axes, w_axes, y_axes


def input_gradient(equation: str, dy: jax.Array, w: jax.Array) -> jax.Array:
    """Return the gradient of ``einsum`` for x, in the type of the product of dy and w."""
    x_axes, w_axes, y_axes = axes_of(equation)
    return jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w)


def weight_gradient(equation: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Return the gradient of ``einsum`` for w, in the type of the product of x and dy."""
    x_axes, w_axes, y_axes = axes_of(equation)
    if x.size <= dy.size:
        return jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy)
    if len(w_axes) == 2:
        # Asked for [outputs, inputs], the operands keep this order.
        return jnp.einsum(f"{y_axes},{x_axes}->{w_axes[::-1]}", dy, x).T
    return jnp.einsum(f"{y_axes},{x_axes}->{w_axes}", dy, x)


@jax.custom_vjp
def few_outputs(x: jax.Array, a: jax.Array) -> jax.Array:
    """Compute x a for an a of few columns, such as an adapter's first factor: [B, T, I], [I, R] -> [B, T, R]."""
    return jnp.einsum("BTI,IR->BTR", x, a)


def few_outputs_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Return the gradient of ``few_outputs`` for a: [B, T, I], [B, T, R] -> [I, R]. It is made transposed.

    XLA on a CPU would multiply x, transposed, by a few columns, which takes six times as long.
    """
    # A trick: without the barrier, XLA would make one product of the product and the transposition.
    return jax.lax.optimization_barrier(jnp.einsum("BTR,BTI->RI", dy, x)).T


def _few_outputs_forward(x: jax.Array, a: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return few_outputs(x, a), (x, a)


def _few_outputs_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, a = saved
    return jnp.einsum("BTR,IR->BTI", dy, a).astype(x.dtype), few_outputs_gradient(x, dy).astype(a.dtype)


few_outputs.defvjp(_few_outputs_forward, _few_outputs_backward)
