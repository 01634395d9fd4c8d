"""The optimizer in pieces: its updates beside those of numpy and optax, on every mesh, in parts, and resumed."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llama_jax.checkpoint import Checkpoint
from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.model import Llama
from llama_jax.ops.noise import noise
from llama_jax.training.pieces import PiecesState, narrow
from llama_jax.training.step import TrainState, compile_train_step, init_state, make_optimizer, state_shapes
from tests.eight_devices import run_on_eight_devices

MODEL = ModelArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128, multiple_of=32, max_seq_len=16)
LLAMA = Llama(MODEL)
ROWS, STEPS = 8, 50
ARGS = TrainArgs(lr=3e-3, warmup_steps=5, max_steps=STEPS, batch_size=ROWS, eps=1e-8, grad_clip=0.5)
MESH = make_mesh(MeshArgs(data=1), jax.devices()[:1])


def batch(seed: int, rows: int = ROWS) -> Batch:
    """Rows that count up by steps of their own, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    tokens = (rng.integers(48, size=(rows, 1)) + np.arange(17) * rng.integers(1, 4, size=(rows, 1))) % 48
    weights = (np.arange(16) < rng.integers(4, 17, size=(rows, 1))).astype(np.float32)
    return Batch(tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), weights)


@functools.cache
def compiled(args: TrainArgs, accumulation: int = 1) -> Any:
    return compile_train_step(LLAMA, make_optimizer(args, STEPS), MESH, accumulation, batch(0))


@functools.cache
def losses(args: TrainArgs, accumulation: int = 1, steps: int = STEPS) -> np.ndarray:
    state, found = init_state(LLAMA, make_optimizer(args, STEPS), MESH, seed=0), []
    for i in range(steps):
        state, metrics = compiled(args, accumulation)(state, batch(i))
        found.append(float(metrics.loss))
    return np.array(found)


SMALL = {
    "int8": {"moments": "int8"},
    "compensated": {"param_dtype": "bfloat16", "rounding": "compensated"},
    "bfloat16, int8": {"param_dtype": "bfloat16", "moments": "int8"},
}


@pytest.mark.parametrize("name", SMALL)
def test_fifty_steps_are_close_to_those_in_float32(name: str) -> None:
    plain, small = losses(ARGS), losses(dataclasses.replace(ARGS, **SMALL[name]))
    assert plain[-1] < 0.7 * plain[0]
    bound = 0.02 if "param_dtype" in SMALL[name] else 0.005
    assert np.abs(small - plain).max() < bound * plain[0] and not np.array_equal(small, plain)


def tree(rng: np.random.Generator, dtype: Any = np.float32) -> Any:
    """A tree like the model's: two stacked layers and the rest."""
    shapes = {"layers": {"w": (2, 256, 8), "norm": (2, 8)}, "output": (8, 128), "norm": (8,)}

    def make(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    made = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return narrow(jax.tree.map(jnp.asarray, made), TrainArgs(param_dtype=jnp.dtype(dtype).name))  # type: ignore[arg-type]


def run(args: TrainArgs, steps: int = 5) -> tuple[Any, Any, list[Any]]:
    """Parameters before and after updates by random gradients, which are returned as well."""
    optimizer, rng = make_optimizer(args, 10), np.random.default_rng(0)
    before = params = tree(rng, args.param_dtype)
    grads = [tree(rng, args.param_dtype) for _ in range(steps)]
    state = optimizer.init(params)
    apply = jax.jit(optimizer.apply)  # type: ignore[union-attr]
    for g in grads:
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), g))
        params, state, _ = apply(g, state, params, loss=jnp.ones(()), grad_norm=norm)
    return before, (params, state), grads


PLAIN = TrainArgs(lr=1e-2, warmup_steps=2, weight_decay=0.3, grad_clip=3.0, beta1=0.8, beta2=0.9, eps=1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("moments", "most", "mean"), [("int8", 0.15, 0.01), ("bfloat16", 0.02, 0.003)])
def test_only_the_moments_of_matrices_differ_from_the_plain_optimizers(
    moments: Any, most: float, mean: float, nesterov: bool
) -> None:
    args = dataclasses.replace(PLAIN, nesterov=nesterov)
    before, (params, _), grads = run(dataclasses.replace(args, moments=moments))
    plain = make_optimizer(args, 10)
    expected, state = before, plain.init(before)
    for g in grads:
        extra = {"loss": jnp.ones(()), "grad_norm": optax.tree.norm(g)}
        updates, state = plain.update(g, state, expected, **extra)  # type: ignore[union-attr]
        expected = optax.apply_updates(expected, updates)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found = functools.reduce(lambda at, key: at[key.key], path, params)
        start = functools.reduce(lambda at, key: at[key.key], path, before)
        if "norm" in path[-1].key:
            np.testing.assert_allclose(found, leaf, rtol=1e-6)
        else:
            assert np.abs(found - leaf).max() < most * np.abs(leaf - start).max()
            assert np.abs(found - leaf).mean() < mean * np.abs(leaf - start).mean()


def test_adafactor_is_optaxs_by_itself_layer_by_layer() -> None:
    args = dataclasses.replace(PLAIN, optimizer="adafactor", weight_decay=0.0, grad_clip=0.0)
    before, (params, _), grads = run(args)
    rates = [float(make_optimizer(args, 10).rate(step)) for step in range(1, 6)]  # type: ignore[union-attr]
    pieces = [{k: v for k, v in before.items() if k != "layers"}]
    pieces += [jax.tree.map(lambda x, i=i: x[i], before["layers"]) for i in range(2)]
    found = [{k: v for k, v in params.items() if k != "layers"}]
    found += [jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(2)]
    for number, (piece, new) in enumerate(zip(pieces, found, strict=True)):
        adafactor = optax.adafactor(lambda count: jnp.asarray(rates)[count], multiply_by_parameter_scale=False)
        state = adafactor.init(piece)
        for g in grads:
            part = {k: v for k, v in g.items() if k != "layers"}
            part = jax.tree.map(lambda x, i=number: x[i - 1], g["layers"]) if number else part
            updates, state = adafactor.update(part, state, piece)
            piece = optax.apply_updates(piece, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, piece)


def literal_adamw(args: TrainArgs, before: Any, grads: list[Any], add: Any) -> Any:
    """AdamW in float32 by numpy; ``add`` rounds a sum, given the value and an update, leaf by leaf."""
    flat = {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(before)}
    m = {name: np.zeros(x.shape, np.float64) for name, x in flat.items()}
    v = {name: np.zeros(x.shape, np.float64) for name, x in flat.items()}
    for t, tree in enumerate(grads, start=1):
        wide = {
            jax.tree_util.keystr(p): np.asarray(x, np.float64) for p, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        norm = np.sqrt(sum((g**2).sum() for g in wide.values()))
        rate = float(make_optimizer(args, 10).rate(t))  # type: ignore[union-attr]
        for name, g in wide.items():
            g = g * min(1.0, args.grad_clip / norm)
            m[name] = args.beta1 * m[name] + (1 - args.beta1) * g
            v[name] = args.beta2 * v[name] + (1 - args.beta2) * g**2
            first = m[name] / (1 - args.beta1**t)
            if args.nesterov:  # Dozat, 2016, algorithm 2
                first = args.beta1 * m[name] / (1 - args.beta1 ** (t + 1)) + (1 - args.beta1) * g / (1 - args.beta1**t)
            update = first / (np.sqrt(v[name] / (1 - args.beta2**t)) + args.eps)
            flat[name] = add(name, flat[name], -rate * update, 0.0 if "norm" in name else rate * args.weight_decay)
    return flat


@pytest.mark.parametrize("nesterov", [False, True])
def test_compensated_updates_are_numpys_formula(nesterov: bool) -> None:
    """Value and residue are a number of 16 bits, which follows the update in float64 to a few of them."""
    args = dataclasses.replace(PLAIN, param_dtype="bfloat16", rounding="compensated", nesterov=nesterov)
    before, (params, (state, _)), grads = run(args)

    def exactly(name: str, value: np.ndarray, update: np.ndarray, decay: float) -> np.ndarray:
        return value.astype(np.float64) * (1 - decay) + update

    expected = literal_adamw(args, before, grads, exactly)
    for (path, value), rest in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(state.residue), strict=True
    ):
        exact = expected[jax.tree_util.keystr(path)]
        both = np.asarray(value, np.float64) + np.asarray(rest, np.float64)
        np.testing.assert_allclose(both, exact, rtol=len(grads) * 2.0**-16, atol=1e-6)
        if value.dtype == jnp.bfloat16:
            assert np.all(np.abs(np.asarray(rest, np.float64)) <= np.abs(np.asarray(value, np.float64)) * 2.0**-8)
            assert np.any(np.asarray(rest, np.float64))


def test_stochastic_updates_are_the_exact_ones_rounded_to_a_neighbour() -> None:
    args = dataclasses.replace(PLAIN, param_dtype="bfloat16")
    before, (params, _), grads = run(args, steps=1)
    expected = literal_adamw(
        args, before, grads, lambda _, value, update, decay: value.astype(np.float64) * (1 - decay) + update
    )
    up = 0
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        exact = expected[jax.tree_util.keystr(path)]
        if value.dtype == jnp.bfloat16:
            error = np.asarray(value, np.float64) - exact
            assert np.abs(error).max() < (np.abs(exact) * 2.0**-7).max()
            assert np.all(np.abs(error) <= np.abs(exact) * 2.0**-7 * 1.01 + 1e-6)
            up += np.sign(error).sum()
    assert abs(up) < 5 * np.sqrt(2 * 256 * 8 + 8 * 128)


def test_random_bits_follow_from_the_seed_and_the_step() -> None:
    args = dataclasses.replace(PLAIN, param_dtype="bfloat16", moments="int8")
    first, again, other = (run(a)[1] for a in (args, args, dataclasses.replace(args, seed=1)))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert not all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other)))


def test_a_skipped_step_changes_nothing_but_its_number() -> None:
    args = dataclasses.replace(PLAIN, param_dtype="bfloat16", rounding="compensated", moments="int8", bad_steps="skip")
    optimizer, rng = make_optimizer(args, 10), np.random.default_rng(0)
    params = tree(rng, "bfloat16")
    state = optimizer.init(params)
    good, bad = tree(rng, "bfloat16"), jax.tree.map(lambda x: x * jnp.nan, params)
    apply = jax.jit(optimizer.apply)  # type: ignore[union-attr]
    one, (state, history), _ = apply(good, state, params, loss=jnp.ones(()), grad_norm=jnp.ones(()))
    two, (after, history), changed = apply(bad, (state, history), one, loss=jnp.ones(()), grad_norm=jnp.float32(np.nan))
    assert int(history.skipped_steps) == 1 and int(after.step) == 2
    assert not any(map(float, jax.tree.leaves(changed)))
    before = (one, state._replace(step=after.step))
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves((two, after))))


def test_gradients_in_parts_add_up_to_those_of_the_batch() -> None:
    """Each sum is rounded at random, which over eight parts is a hundredth of a gradient, and nothing in float32."""
    whole = losses(ARGS)[:10]
    for name, parts, bound in (("int8", 4, 1e-3), ("bfloat16, int8", 8, 1e-2)):
        args = dataclasses.replace(ARGS, **SMALL[name])
        assert losses(args, parts, 10) == pytest.approx(whole, rel=bound)


def test_the_sum_of_many_equal_parts_is_unbiased() -> None:
    """To the nearest, the sum would stop to grow at 256."""
    optimizer: Any = make_optimizer(TrainArgs(param_dtype="bfloat16"), 10)
    one = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    state = (PiecesState(jnp.zeros((), jnp.int32), {}, {}), None)
    total, _ = jax.lax.scan(lambda s, i: (optimizer.add(s, one, state, i), None), one, jnp.arange(1, 1000))
    assert np.asarray(total["w"], np.float64).mean() == pytest.approx(1000, rel=2e-3)


def test_the_types_are_those_asked_for_and_vectors_are_float32() -> None:
    args = dataclasses.replace(ARGS, param_dtype="bfloat16", moments="int8")
    state = init_state(LLAMA, make_optimizer(args, STEPS), MESH, seed=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        assert leaf.dtype == (jnp.float32 if "norm" in path[-1].key else jnp.bfloat16)
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held < 4.4 * sum(x.size for x in jax.tree.leaves(state.params))
    plain = init_state(LLAMA, make_optimizer(ARGS, STEPS), MESH, seed=0)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), state.params, plain.params)


MESHES: dict[str, dict[str, int]] = {
    "one device": {"data": 1}, "fsdp 8": {"data": 1, "fsdp": 8}, "tensor 2 x fsdp 4": {"data": 1, "tensor": 2, "fsdp": 4},
}  # fmt: skip
ON_MESHES = {name: SMALL[name] for name in ("compensated", "bfloat16, int8")} | {
    "adafactor": {"param_dtype": "bfloat16", "optimizer": "adafactor"}
}


def train_on_meshes(kind: str, folder: Path) -> dict[str, Any]:
    """Losses of a kind on each mesh, and those of steps that resume what another mesh has saved."""
    found: dict[str, Any] = {}
    args = dataclasses.replace(ARGS, **ON_MESHES[kind])
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshArgs(**sizes), jax.devices()[: 1 if name == "one device" else 8])
        optimizer = make_optimizer(args, STEPS)
        step = compile_train_step(LLAMA, optimizer, mesh, 1, jax.device_put(batch(0), batch_sharding(mesh)))
        state, numbers = init_state(LLAMA, optimizer, mesh, seed=0), []
        for i in range(12):
            if i == 6 and name == "one device":
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(folder / "params", state.params)
                    checkpointer.save(folder / "state", state.opt_state)
            state, metrics = step(state, jax.device_put(batch(i), batch_sharding(mesh)))
            numbers.append((float(metrics.loss), float(metrics.grad_norm)))
        shapes, source = state_shapes(LLAMA, optimizer, mesh), Checkpoint(folder, MODEL, None)  # type: ignore[arg-type]
        state = TrainState(source.restore("params", shapes.params), source.restore("state", shapes.opt_state))
        resumed = []
        for i in range(6, 12):
            state, metrics = step(state, jax.device_put(batch(i), batch_sharding(mesh)))
            resumed.append((float(metrics.loss), float(metrics.grad_norm)))
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
        share = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
        found[name] = {"numbers": numbers, "resumed": resumed, "share": share}
    bits = jax.jit(lambda: noise(jnp.array([3, 5], jnp.uint32), (16, 8)), out_shardings=batch_sharding(mesh))()
    return found | {"bits": np.asarray(bits).tolist()}


# Random rounding and moments in integers, together, are the kind that says most about meshes.
@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind != "bfloat16, int8")) for kind in ON_MESHES],
)
def on_meshes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_on_eight_devices("tests.training.test_pieces", request.param)


def test_every_mesh_has_the_losses_of_one_device(on_meshes: dict[str, Any]) -> None:
    one = on_meshes["one device"]
    for name in MESHES:
        found = on_meshes[name]
        np.testing.assert_allclose(found["numbers"][0], one["numbers"][0], rtol=1e-3)
        np.testing.assert_allclose(np.array(found["numbers"])[:, 0], np.array(one["numbers"])[:, 0], rtol=2e-3)
        assert found["share"] < (1.01 if name == "one device" else 0.17)


def test_a_resumed_state_goes_on_bit_for_bit_and_on_other_meshes(on_meshes: dict[str, Any]) -> None:
    one = on_meshes["one device"]
    assert one["resumed"] == one["numbers"][6:]
    for name in MESHES:
        np.testing.assert_allclose(
            np.array(on_meshes[name]["resumed"])[:, 0], np.array(one["resumed"])[:, 0], rtol=2e-3
        )


def test_random_bits_are_the_same_on_every_mesh(on_meshes: dict[str, Any]) -> None:
    np.testing.assert_array_equal(on_meshes["bits"], noise(jnp.array([3, 5], jnp.uint32), (16, 8)))


if __name__ == "__main__":
    import json
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train_on_meshes(sys.argv[1], Path(folder))))
    sys.stdout.flush()
