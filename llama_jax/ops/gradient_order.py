"""The order in which a gradient is computed, where XLA would choose one that takes memory."""

import jax


def known_after(dy: jax.Array, x: jax.Array) -> jax.Array:
    """Return x, which the compiler for a CPU takes to be known only once dy is.

    A trick: XLA on a CPU computes what a gradient needs of the forward pass, such as a transposed copy, as soon as it
    can, and keeps it. It cannot know that 0 * dy is zero. Other compilers compute it late by themselves.
    """
    return jax.lax.platform_dependent(
        x, dy, cpu=lambda x, dy: x + (0 * dy.ravel()[0]).astype(x.dtype), default=lambda x, _: x
    )
