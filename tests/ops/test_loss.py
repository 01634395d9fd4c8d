"""The chunked cross entropy against the plain one on whole logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.ops.loss import cross_entropy, negative_log_likelihood, token_log_likelihoods


def plain(hidden: jax.Array, output: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(jnp.einsum("BTD,DV->BTV", hidden, output))
    return -jnp.sum(weights * jnp.sum(log_probs * jax.nn.one_hot(targets, output.shape[1]), axis=-1))


def case(B: int, T: int, D: int = 6, V: int = 13, seed: int = 0) -> tuple[Any, ...]:
    """Hidden states, output, targets, and weights of which some are zero and some between 0 and 2."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0, 2, (B, T)) * (rng.uniform(size=(B, T)) < 0.7)
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
        rng.integers(V, size=(B, T)),
        weights.astype(np.float32),
    )


def assert_equal_to_plain(args: tuple[Any, ...], *chunk: int) -> None:
    expected, wanted = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(*args)
    value, found = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(*a, *chunk), argnums=(0, 1)))(*args)
    np.testing.assert_allclose(jax.jit(lambda *a: cross_entropy(*a, *chunk))(*args), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 1024), (1, 1000), (5, 257)])
def test_values_and_gradients_are_those_of_plain_cross_entropy(shape: tuple[int, int]) -> None:
    assert_equal_to_plain(case(*shape))


@pytest.mark.parametrize("chunk", [1, 7, 24, 60, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    assert_equal_to_plain(case(2, 18), chunk)


def test_positions_of_weight_zero_add_nothing_to_loss_or_gradients() -> None:
    hidden, output, targets, weights = case(2, 600)
    changed = np.where(weights[..., None] == 0, 100.0, hidden), output, np.where(weights == 0, 0, targets), weights
    np.testing.assert_array_equal(cross_entropy(*changed), cross_entropy(hidden, output, targets, weights))
    d_hidden, d_output = jax.grad(cross_entropy, argnums=(0, 1))(*changed)
    assert not np.any(d_hidden[weights == 0])
    expected = jax.grad(cross_entropy, argnums=1)(hidden, output, targets, weights)
    np.testing.assert_array_equal(d_output, expected)


def test_all_weights_zero_give_zero() -> None:
    hidden, output, targets, weights = case(1, 7)
    assert float(cross_entropy(hidden, output, targets, 0 * weights)) == 0.0


def test_gradients_scale_with_what_stands_behind_the_loss() -> None:
    hidden, output, targets, weights = case(2, 40)
    once = jax.grad(cross_entropy, argnums=(0, 1))(hidden, output, targets, weights)
    thrice = jax.grad(lambda *a: 3 * cross_entropy(*a), argnums=(0, 1))(hidden, output, targets, weights)
    for a, b in zip(once, thrice, strict=True):
        np.testing.assert_allclose(b, 3 * a, rtol=1e-5, atol=1e-6)


def test_a_sure_and_right_model_has_no_loss_and_a_sure_and_wrong_one_no_infinity() -> None:
    output = np.eye(4, dtype=np.float32) * 1000
    hidden, ones = np.eye(4, dtype=np.float32)[None], np.ones((1, 4), np.float32)
    right, wrong = np.arange(4)[None], np.roll(np.arange(4), 1)[None]
    assert float(cross_entropy(hidden, output, right, ones)) == 0.0
    assert float(cross_entropy(hidden, output, wrong, ones)) == pytest.approx(4000.0)
    assert float(jax.value_and_grad(cross_entropy)(hidden, output, wrong, ones)[0]) == pytest.approx(4000.0)


def test_negative_log_likelihood_is_minus_log_softmax() -> None:
    logits, targets = np.random.default_rng(0).normal(size=(3, 4, 7)) * 5, np.arange(12).reshape(3, 4) % 7
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(negative_log_likelihood(jnp.asarray(logits), targets), expected, atol=1e-5)


@pytest.mark.parametrize("T", [1024, 1000, 1021], ids=["power of two", "multiple of 8", "prime"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_logits_of_the_whole_batch_never_exist(T: int, differentiated: bool) -> None:
    hidden, output, targets, weights = case(4, T, D=8, V=640)
    function = jax.value_and_grad(cross_entropy, argnums=(0, 1)) if differentiated else cross_entropy
    compiled = jax.jit(function).lower(hidden, output, targets, weights).compile()
    whole = 4 * T * 640 * 4  # bytes of float32 [B, T, V]
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2


def plain_likelihoods(hidden: jax.Array, output: jax.Array, targets: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_softmax(jnp.einsum("BTD,DV->BTV", hidden, output))
    return jnp.sum(log_probs * jax.nn.one_hot(targets, output.shape[1]), axis=-1)


@pytest.mark.parametrize(("shape", "chunk"), [((1, 1), 512), ((3, 40), 7), ((5, 257), 100)])
@pytest.mark.parametrize("tied", [False, True])
def test_log_likelihoods_and_their_gradients_are_those_of_log_softmax(
    shape: tuple[int, int], chunk: int, tied: bool
) -> None:
    """For any cotangent: each position has one of its own, of either sign."""
    hidden, output, targets, _ = case(*shape)
    cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def ours(hidden: jax.Array, output: jax.Array) -> jax.Array:
        return token_log_likelihoods(hidden, output.T if tied else output, targets, chunk, "VD" if tied else "DV")

    found, pull = jax.vjp(jax.jit(ours), hidden, output)
    expected, plain_pull = jax.vjp(lambda h, o: plain_likelihoods(h, o, targets), hidden, output)
    for a, b in zip((found, *pull(cotangent)), (expected, *plain_pull(cotangent)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_the_whole_batch_need_no_logits_of_it() -> None:
    hidden, output, targets, weights = case(4, 1000, D=8, V=640)

    def total(hidden: jax.Array, output: jax.Array) -> jax.Array:
        return jnp.sum(weights * token_log_likelihoods(hidden, output, targets) ** 2)

    compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(hidden, output).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 1000 * 640 * 4 / 2
