"""The optimizer and the training step: accumulation, AdamW, decay, clipping, the schedule, donation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import make_mesh
from llama_jax.model import Llama
from llama_jax.training.rates import learning_rate
from llama_jax.training.step import (
    TrainState,
    compile_train_step,
    eval_step,
    init_state,
    make_optimizer,
    state_shapes,
)

MODEL = Llama(ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=20, multiple_of=8, max_seq_len=12))
# The epsilon is large, so that updates are smooth in the gradient and rounding is not magnified.
ARGS = TrainArgs(lr=1e-2, warmup_steps=2, max_steps=10, batch_size=6, eps=1e-2)
CLIPPED = dataclasses.replace(ARGS, grad_clip=0.05, eps=1e-3, weight_decay=0.5, beta1=0.8, beta2=0.9)
NOT_CLIPPED = dataclasses.replace(CLIPPED, grad_clip=0.0, min_lr_ratio=0.5)
MESH = make_mesh(MeshArgs(data=1), jax.devices()[:1])


def ragged_batch(seed: int = 0, rows: int = 6, length: int = 12) -> Batch:
    """Rows of 1 to ``length`` counted tokens; the last row counts for nothing."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(MODEL.args.vocab_size, size=(rows, length + 1)).astype(np.int32)
    lengths = rng.integers(1, length + 1, size=rows)
    lengths[-1] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], (np.arange(length) < lengths[:, None]).astype(np.float32))


@functools.cache
def compiled(args: TrainArgs, accumulation: int = 1) -> Any:
    optimizer = make_optimizer(args, args.max_steps or 1)
    return compile_train_step(MODEL, optimizer, MESH, accumulation, ragged_batch())


@functools.cache
def initial() -> TrainState:
    return init_state(MODEL, make_optimizer(ARGS, 10), MESH, seed=0)


def fresh() -> TrainState:
    """A new initial state, to be donated; no option changes it."""
    return jax.tree.map(jnp.copy, initial())


def literal_loss(params: Any, batch: Batch) -> jax.Array:
    """Mean over the counted tokens of the plain cross entropy."""
    logits = MODEL.apply({"params": params}, batch.inputs)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(nll * batch.weights) / jnp.sum(batch.weights)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("accumulation", [2, 6])
def test_accumulation_over_ragged_rows_equals_the_whole_batch(accumulation: int) -> None:
    whole, parts = fresh(), fresh()
    for seed in range(2):
        whole, expected = compiled(ARGS)(whole, ragged_batch(seed))
        parts, found = compiled(ARGS, accumulation)(parts, ragged_batch(seed))
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        np.testing.assert_allclose(found.grad_norm, expected.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(flat(parts.params), flat(whole.params), atol=2e-6)
        np.testing.assert_allclose(flat(parts.opt_state), flat(whole.opt_state), atol=2e-6)


def test_loss_is_the_mean_over_counted_tokens_and_the_norm_is_taken_before_clipping() -> None:
    state, batch = fresh(), ragged_batch()
    loss, grads = jax.jit(jax.value_and_grad(literal_loss))(state.params, batch)
    total, weight = eval_step(MODEL, state.params, batch)
    _, metrics = compiled(CLIPPED)(state, batch)
    assert float(metrics.grad_norm) > CLIPPED.grad_clip
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(flat(grads)), rtol=1e-4)
    np.testing.assert_allclose(float(total), float(loss) * batch.weights.sum(), rtol=1e-5)
    assert float(weight) == batch.weights.sum()


def is_norm(path: Any) -> bool:
    return path[-1].key in ("attention_norm", "ffn_norm", "norm")


def test_without_gradient_matrices_decay_by_lr_times_weight_decay_and_norms_stay() -> None:
    before = jax.tree.map(np.array, fresh().params)
    nothing = Batch(*(np.zeros_like(x) for x in ragged_batch()))
    after, metrics = compiled(NOT_CLIPPED)(fresh(), nothing)
    decay = literal_rate(NOT_CLIPPED, 1, 10) * NOT_CLIPPED.weight_decay
    assert float(metrics.loss) == 0.0 == float(metrics.grad_norm)

    def check(path: Any, old: np.ndarray, new: jax.Array) -> None:
        if is_norm(path):
            np.testing.assert_array_equal(new, old)
        else:
            np.testing.assert_allclose(new, old * (1 - decay), rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, before, after.params)


def literal_rate(args: TrainArgs, step: int, steps: int) -> float:
    """Of step 1, 2, ...: a line from 0 to lr at the last warm-up step, then half a cosine to min_lr_ratio x lr."""
    if step <= args.warmup_steps:
        return args.lr * step / args.warmup_steps
    done = (step - args.warmup_steps) / (steps - args.warmup_steps)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + np.cos(np.pi * done)) / 2)


@pytest.mark.parametrize(("warmup", "ratio", "steps"), [(10, 0.1, 50), (1, 0.0, 7), (0, 0.1, 20), (5, 1.0, 30)])
def test_learning_rate_rises_to_lr_and_ends_at_its_share(warmup: int, ratio: float, steps: int) -> None:
    args = TrainArgs(lr=3e-4, warmup_steps=warmup, min_lr_ratio=ratio)
    rates = np.array([float(learning_rate(args, steps)(step)) for step in range(1, steps + 1)])
    np.testing.assert_allclose(rates, [literal_rate(args, s, steps) for s in range(1, steps + 1)], rtol=1e-4, atol=1e-9)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(3e-4) == rates.max()
    assert rates[-1] == pytest.approx(3e-4 * ratio, abs=1e-9)
    assert rates[0] > 0


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_shorter_than_its_warm_up_still_moves_and_never_exceeds_lr(steps: int) -> None:
    args = TrainArgs(lr=3e-4, warmup_steps=100)
    rates = [float(learning_rate(args, steps)(step)) for step in range(1, steps + 1)]
    assert all(0 < rate <= 3e-4 * (1 + 1e-6) for rate in rates)
    assert rates[-1] == pytest.approx(3e-5)


def literal_adamw(args: TrainArgs, params: Any, batches: list[Batch]) -> Any:
    """Loshchilov and Hutter, 2019, algorithm 2, with clipping, leaf by leaf in float64."""
    gradient = jax.jit(jax.grad(literal_loss))
    named = {path: np.asarray(leaf, np.float64) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    structure = jax.tree.structure(params)
    m = {path: np.zeros_like(leaf) for path, leaf in named.items()}
    v = {path: np.zeros_like(leaf) for path, leaf in named.items()}
    for t, batch in enumerate(batches, start=1):
        current = jax.tree.unflatten(structure, [leaf.astype(np.float32) for leaf in named.values()])
        grads = dict(jax.tree_util.tree_leaves_with_path(gradient(current, batch)))
        norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values()))
        rate = literal_rate(args, t, args.max_steps or 1)
        for path, leaf in named.items():
            g = np.asarray(grads[path], np.float64) * (min(1.0, args.grad_clip / norm) if args.grad_clip else 1.0)
            m[path] = args.beta1 * m[path] + (1 - args.beta1) * g
            v[path] = args.beta2 * v[path] + (1 - args.beta2) * g**2
            update = m[path] / (1 - args.beta1**t) / (np.sqrt(v[path] / (1 - args.beta2**t)) + args.eps)
            decay = 0.0 if is_norm(path) else args.weight_decay
            named[path] = leaf - rate * (update + decay * leaf)
    return jax.tree.unflatten(structure, list(named.values()))


@pytest.mark.parametrize("args", [CLIPPED, NOT_CLIPPED], ids=["clipped", "not clipped"])
def test_five_steps_equal_a_literal_adamw(args: TrainArgs) -> None:
    batches = [ragged_batch(seed) for seed in range(5)]
    state = fresh()
    start = jax.tree.map(np.array, state.params)
    expected = literal_adamw(args, start, batches)
    for batch in batches:
        state, metrics = compiled(args)(state, batch)
        assert float(metrics.grad_norm) > 0.05  # the clipping bites
    assert np.abs(flat(expected) - flat(start)).max() > 1e-3
    np.testing.assert_allclose(flat(state.params), flat(expected), atol=1e-5)


PERTURBED = {
    "lr": 2e-2,
    "schedule": "wsd",
    "min_lr_ratio": 0.9,
    "warmup_steps": 3,
    "max_steps": 5,
    "weight_decay": 0.4,
    "beta1": 0.5,
    "beta2": 0.5,
    "eps": 1e-3,
    "grad_clip": 0.01,
    "nesterov": True,
}


@functools.cache
def after_four_steps(args: TrainArgs) -> np.ndarray:
    """Parameters after four updates of one tiny problem; an epsilon that counts makes clipping count."""
    optimizer = make_optimizer(args, args.max_steps or 1)
    params: Any = {"w": jnp.array([[1.0, -2.0]]), "norm": jnp.ones(2)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(4):
        grads = {"w": jnp.array([[0.3, step - 1.0]]), "norm": jnp.array([0.1, -0.2 * step])}
        updates, state = update(grads, state, params, loss=jnp.ones(()), grad_norm=jnp.ones(()))
        params = optax.apply_updates(params, updates)
    return flat(params)


@pytest.mark.parametrize("field", PERTURBED)
def test_optimizer_field_changes_the_parameters(field: str) -> None:
    other = dataclasses.replace(ARGS, **{field: PERTURBED[field]})
    assert np.abs(after_four_steps(ARGS) - after_four_steps(other)).max() > 1e-5


def test_the_state_is_donated_and_keeps_its_shapes_and_its_count() -> None:
    state = fresh()
    old = jax.tree.leaves(state.params)
    new, _ = compiled(ARGS)(state, ragged_batch())
    assert all(leaf.is_deleted() for leaf in old)
    shapes = state_shapes(MODEL, make_optimizer(ARGS, 10), MESH)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new.params))
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new.opt_state) if "count" in str(path[-1])]
    assert counts and all(int(count) == 1 for count in counts)


def test_a_seed_names_the_initial_parameters() -> None:
    first = flat(initial().params)
    again, other = (flat(init_state(MODEL, make_optimizer(ARGS, 10), MESH, seed).params) for seed in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
