"""Muon: its updates are those of the formula and of optax, on every mesh; the rest of the model is AdamW's."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest

import llama_jax
from llama_jax.adapters import LoraArgs
from llama_jax.build import count_parameters
from llama_jax.checkpoint import Checkpoint
from llama_jax.config import Config, DataArgs, MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.memory import bytes_of
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.training import clock, loop, muon, samples
from llama_jax.training.account import activation_bytes, state_bytes, update_bytes
from llama_jax.training.announcing import optimizer_text
from llama_jax.training.clock import TIMES, Clock, Recorder
from llama_jax.training.flops import step_flops, train_flops_per_token, update_flops
from llama_jax.training.muon import COEFFICIENTS, ITERATIONS, matrix_sizes, orthogonalize
from llama_jax.training.step import (
    TrainState,
    compile_train_step,
    init_state,
    learning_rate,
    make_optimizer,
    state_shapes,
)
from tests.eight_devices import run_on_eight_devices
from tests.training.test_clock import metrics

# Grouped queries and biases; matrices that are wide, tall and square, in a number of layers that no mesh divides.
MODEL = ModelArgs(
    dim=32, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=40, multiple_of=8, max_seq_len=16, attention_bias=True,
    mlp_bias=True,
)  # fmt: skip
LLAMA = Llama(MODEL)
ARGS = TrainArgs(
    lr=1e-2, warmup_steps=2, max_steps=20, batch_size=8, eps=1e-3, weight_decay=0.3, grad_clip=0.5, optimizer="muon",
    muon_momentum=0.9,
)  # fmt: skip
MESH = make_mesh(MeshArgs(data=1), jax.devices()[:1])
Named = dict[str, np.ndarray]
# The axes of the inputs of each matrix of the layers, in a stack.
INPUTS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w1": 1, "w3": 1, "w2": 1}


def batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(MODEL.vocab_size, size=(8, 17)).astype(np.int32)
    weights = (np.arange(16) < rng.integers(1, 17, size=(8, 1))).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def named(tree: Any) -> Named:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path: str) -> str:
    return path.split("'")[-2]


def is_muons(path: str) -> bool:
    return "layers" in path and name_of(path) in INPUTS


@functools.cache
def compiled(args: TrainArgs, accumulation: int = 1) -> Any:
    return compile_train_step(LLAMA, make_optimizer(args, 20), MESH, accumulation, batch(0))


@functools.cache
def initial() -> TrainState:
    return init_state(LLAMA, make_optimizer(ARGS, 20), MESH, seed=0)


def fresh() -> TrainState:
    """A new initial state, to be donated."""
    return jax.tree.map(jnp.copy, initial())


def iterated(matrix: np.ndarray) -> np.ndarray:
    """The quintic iteration of one matrix, as Jordan writes it, in float64."""
    a, b, c = COEFFICIENTS
    x = matrix / (np.sqrt((matrix**2).sum()) + 1e-8)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def literal_gradients(params: Any, data: Batch) -> Named:
    def loss(params: Any) -> jax.Array:
        logits = LLAMA.apply({"params": params}, data.inputs)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, data.targets)
        return jnp.sum(nll * data.weights) / jnp.sum(data.weights)

    return {path: g.astype(np.float64) for path, g in named(jax.jit(jax.grad(loss))(params)).items()}


def literal_step(args: TrainArgs, t: int, params: Named, grads: Named, m: Named, v: Named) -> None:
    """Step ``t`` of both optimizers in float64, matrix by matrix, in place."""
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    rate = float(learning_rate(args, 20)(t))
    for path, g in grads.items():
        g = g * min(1.0, args.grad_clip / norm)
        decay = 0.0 if "norm" in path or "bias" in path else args.weight_decay
        if is_muons(path):
            beta = args.muon_momentum
            m[path] = beta * m[path] + (1 - beta) * g
            ahead = beta * m[path] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            update = np.empty_like(g)
            for layer in range(MODEL.n_layers):
                shape = g[layer].shape
                matrix = ahead[layer].reshape(math.prod(shape[: INPUTS[name_of(path)]]), -1)
                update[layer] = (0.2 * math.sqrt(max(matrix.shape)) * iterated(matrix)).reshape(shape)
        else:
            m[path] = args.beta1 * m[path] + (1 - args.beta1) * g
            v[path] = args.beta2 * v[path] + (1 - args.beta2) * g**2
            update = m[path] / (1 - args.beta1**t) / (np.sqrt(v[path] / (1 - args.beta2**t)) + args.eps)
        params[path] = params[path] - rate * (update + decay * params[path])


def test_five_steps_equal_a_literal_muon_in_float64_matrix_by_matrix() -> None:
    state = fresh()
    structure = jax.tree.structure(state.params)
    start = {path: x.astype(np.float64) for path, x in named(state.params).items()}
    expected = dict(start)
    m, v = ({path: np.zeros_like(x) for path, x in start.items()} for _ in range(2))
    for t in range(1, 6):
        current = jax.tree.unflatten(structure, [x.astype(np.float32) for x in expected.values()])
        literal_step(ARGS, t, expected, literal_gradients(current, batch(t)), m, v)
        state, _ = compiled(ARGS)(state, batch(t))
    found = named(state.params)
    assert sum(map(is_muons, found)) == 7 and len(found) == 19
    for path, x in expected.items():
        assert np.abs(x - start[path]).max() > 1e-3, path
        np.testing.assert_allclose(found[path], x, atol=2e-5, err_msg=path)


def gradients(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), initial().params)


def updates_of(optimizer: Any, steps: int = 3, **extra: Any) -> Any:
    """The last of some updates by random gradients, of parameters that stay as they are."""
    params = initial().params
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for seed in range(steps):
        updates, state = update(gradients(seed), state, params, **extra)
    return updates


EXTRA: dict[str, Any] = {"loss": jnp.ones(()), "grad_norm": jnp.ones(())}


@functools.cache
def muons() -> Named:
    return named(updates_of(make_optimizer(ARGS, 20), **EXTRA))


def test_updates_are_those_of_optaxs_muon() -> None:
    args = dataclasses.replace(ARGS, grad_clip=0.0, weight_decay=0.0)
    axes = {"wq": ((1,), (2, 3)), "wk": ((1,), (2, 3)), "wv": ((1,), (2, 3)), "wo": ((1, 2), (3,))}

    def numbers(params: Any) -> Any:
        def one(path: Any, _: Any) -> Any:
            text = jax.tree_util.keystr(path)
            if not is_muons(text):
                return None
            return optax.contrib.MuonDimensionNumbers(*axes.get(name_of(text), ((1,), (2,))))

        return jax.tree_util.tree_map_with_path(one, params)

    theirs = optax.contrib.muon(
        lambda count: learning_rate(args, 20)(count + 1), beta=args.muon_momentum, adam_b1=args.beta1, adam_b2=args.beta2,
        muon_weight_dimension_numbers=numbers, consistent_rms=0.2,
    )  # fmt: skip
    found, expected = named(updates_of(make_optimizer(args, 20), **EXTRA)), named(updates_of(theirs))
    for path in filter(is_muons, found):
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-3, atol=1e-6, err_msg=path)


def test_all_else_takes_exactly_the_update_of_adamw() -> None:
    plain = dataclasses.replace(ARGS, optimizer="adamw", muon_momentum=0.95)
    adamw = named(updates_of(make_optimizer(plain, 20), **EXTRA))
    for path, update in muons().items():
        assert np.array_equal(update, adamw[path]) != is_muons(path), path


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors(shape: tuple[int, int]) -> None:
    """Its singular values are the polynomial's, all near 1, of the normed ones."""
    x = np.random.default_rng(0).normal(size=(2, *shape))
    for matrix, found in zip(x, orthogonalize(jnp.asarray(x, jnp.float32)), strict=True):
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        values /= np.sqrt((values**2).sum())
        (a, b, c), are_seen = COEFFICIENTS, values > 0.01
        for _ in range(ITERATIONS):
            values = a * values + b * values**3 + c * values**5
        np.testing.assert_allclose(found, u * values @ vt, atol=1e-4)
        assert are_seen.sum() > 14 and np.all((values[are_seen] > 0.6) & (values[are_seen] < 1.25))


def test_in_bfloat16_the_products_are_close_and_zeros_stay_zeros() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 32, 48))
    exact, found = orthogonalize(x), orthogonalize(x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert np.linalg.norm(found.astype(jnp.float32) - exact) < 0.1 * np.linalg.norm(exact)
    np.testing.assert_array_equal(orthogonalize(jnp.zeros((1, 8, 4), jnp.bfloat16)), 0)


def test_products_are_of_float32_on_a_cpu_and_of_bfloat16_elsewhere_unless_float32_is_asked_for() -> None:
    tree = {"layers": {"w1": jax.ShapeDtypeStruct((2, 128, 256), jnp.float32)}}

    def types(platform: str, dtype: Any) -> set[str]:
        optimizer = muon.scale_by_muon(0.9, dtype)
        traced = jax.jit(lambda g: optimizer.update(g, optimizer.init(g))[0]).trace(tree)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products
        return {line.split("x")[-1].rstrip("> )").split(">")[0].split()[0] for line in products}

    assert types("cpu", "auto") == types("cpu", "bfloat16") == types("cuda", "float32") == {"f32"}
    assert types("cuda", "auto") == types("tpu", "bfloat16") == {"bf16"}


def test_large_matrices_are_taken_few_at_a_time_with_the_same_result() -> None:
    x = jax.random.normal(jax.random.key(0), (5, 8, 12))
    whole = orthogonalize(x)
    for most in (1, 2 * 8 * 12, 10**6):
        np.testing.assert_allclose(muon._some_at_once(x, most), whole, atol=1e-5)


def test_accumulation_equals_the_whole_batch() -> None:
    whole, parts = fresh(), fresh()
    for seed in range(3):
        whole, expected = compiled(ARGS)(whole, batch(seed))
        parts, found = compiled(ARGS, 4)(parts, batch(seed))
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    for path, x in named(whole.params).items():
        np.testing.assert_allclose(named(parts.params)[path], x, atol=2e-5, err_msg=path)


def test_the_momentum_counts() -> None:
    other = named(updates_of(make_optimizer(dataclasses.replace(ARGS, muon_momentum=0.5), 20), **EXTRA))
    for path, update in muons().items():
        assert np.array_equal(update, other[path]) != is_muons(path), path


def test_a_skipped_step_changes_neither_parameters_nor_momentum() -> None:
    args = dataclasses.replace(ARGS, bad_steps="skip")
    optimizer, params = make_optimizer(args, 20), initial().params
    bad = jax.tree.map(lambda x: x * jnp.nan, gradients(0))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)  # type: ignore[union-attr]
    _, state = update(gradients(0), state, params, **EXTRA)
    updates, after = update(bad, state, params, **EXTRA | {"grad_norm": jnp.float32(np.nan)})
    assert not any(map(np.any, jax.tree.leaves(updates))) and int(after[-1].skipped_steps) == 1
    for before, new in zip(jax.tree.leaves(state[1]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_array_equal(before, new)


def test_the_matrices_of_the_layers_keep_one_moment() -> None:
    parts, everything = state_bytes(MODEL, ARGS), count_parameters(MODEL)
    inner = MODEL.n_layers * sum(m * n for m, n in matrix_sizes(MODEL))
    state = initial()
    assert parts["moments"] == bytes_of(state.opt_state) == pytest.approx(8 * everything - 4 * inner, abs=64)
    plain = dataclasses.replace(ARGS, optimizer="adamw", muon_momentum=0.95)
    assert parts["moments"] < 0.75 * state_bytes(MODEL, plain)["moments"]


def test_an_update_of_large_matrices_on_one_device_needs_more_than_few_activations() -> None:
    model = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256, max_seq_len=64)
    config = Config(model, train=dataclasses.replace(ARGS, batch_size=256, compute_dtype="bfloat16", remat="full"))
    one, many = (dataclasses.replace(config, mesh=MeshArgs(1, fsdp)) for fsdp in (1, 256))
    assert update_bytes(one) > 16e9 and update_bytes(many) < 0.6e9 < activation_bytes(many)
    assert update_bytes(dataclasses.replace(one, train=TrainArgs())) == 0


def test_the_counted_flops_are_those_of_the_compiled_iteration() -> None:
    def flops(*shape: int) -> float:
        analysis: Any = jax.jit(orthogonalize).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().cost_analysis()
        return float(analysis["flops"])

    model = ModelArgs(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=512, vocab_size=64, max_seq_len=128)
    expected = 2 * (2 * flops(256, 256) + 2 * flops(256, 128) + 2 * flops(256, 512) + flops(512, 256))
    train = TrainArgs(optimizer="muon")
    assert update_flops(model, train) == pytest.approx(expected, rel=0.02)
    assert update_flops(model, TrainArgs()) == 0
    config = Config(model, train=train)
    per_token = train_flops_per_token(model)
    assert step_flops(config, 100) == 100 * per_token + update_flops(model, train)
    assert step_flops(dataclasses.replace(config, train=TrainArgs()), 100) == 100 * per_token


def test_mfu_counts_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "peak_flops", lambda _: 1e9)
    plain = TrainArgs(batch_size=4)
    timed = Clock()
    timed.seconds["step"] = 1.0
    records = [
        Recorder(Config(MODEL, train=train), MESH, 10, 0, timed).record(2, metrics())
        for train in (plain, dataclasses.replace(plain, optimizer="muon"))
    ]
    rates = [record["tokens_per_second_per_device"] / record["mfu"] for record in records]
    tokens = 4 * MODEL.max_seq_len
    ratio = step_flops(Config(MODEL, train=dataclasses.replace(plain, optimizer="muon")), tokens) / tokens
    assert rates == [pytest.approx(1e9 / train_flops_per_token(MODEL)), pytest.approx(1e9 / ratio)]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"moments": "int8"}, "train.moments: expected float32 beside train.optimizer muon, found int8; leave it out"),
        ({"moments": "bfloat16"}, "train.moments: expected float32 beside train.optimizer muon, found bfloat16"),
        (
            {"param_dtype": "bfloat16"},
            "train.param_dtype: expected float32 beside train.optimizer muon, found bfloat16",
        ),
        ({"muon_momentum": 1.0}, "train.muon_momentum: expected"),
        ({"optimizer": "adamw"}, "train.muon_momentum: expected train.optimizer muon beside it, found train.optimizer"),
    ],
)
def test_what_muon_does_not_go_with_is_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    ARGS.check()
    with pytest.raises(UserError) as caught:
        dataclasses.replace(ARGS, **changes).check()
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_adapters_are_not_trained_by_muon() -> None:
    config = Config(train=TrainArgs(optimizer="muon", init_from="base"), lora=LoraArgs(rank=4))
    with pytest.raises(
        UserError, match=r"^train.optimizer: expected adamw beside lora.rank, .*found muon; leave it out"
    ):
        config.check()


def train(folder: Path, **changes: Any) -> str:
    """What a run prints."""
    text = folder.parent / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the sea\n" * 100)
    small = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
    args = TrainArgs(
        lr=1e-2, warmup_steps=1, max_steps=6, batch_size=4, eval_interval=6, eval_iters=1, log_interval=1, save_interval=3,
        keep=9, optimizer="muon", save_dir=str(folder),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "show", lambda *_: 0)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        loop.train(Config(small, DataArgs(str(text), vocab_size=280), dataclasses.replace(args, **changes)))
    return out.getvalue()


def outcome(folder: Path) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    params = llama_jax.load(str(folder / "checkpoints" / "6")).params
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records], list(
        map(np.asarray, jax.tree.leaves(params))
    )


def test_a_run_says_what_muon_does_resumes_bit_for_bit_and_cannot_change_it(tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    out = train(whole)
    assert "optimizer  Muon for the 7 matrices of the layers (3,328 parameters), momentum 0.95, " in out
    origin = json.loads((whole / "checkpoints" / "6" / "model" / "origin.json").read_text())
    assert origin["optimizer"] == "muon"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "6")
    for name in ("best.json", "losses.png"):
        (run / name).unlink(missing_ok=True)
    assert "resumed  at step 3" in train(run)
    ours, expected = outcome(run), outcome(whole)
    assert ours[0] == expected[0] and all(map(np.array_equal, ours[1], expected[1]))
    with pytest.raises(
        UserError, match=r"^train.optimizer: expected 'muon', with which the run in .*, found 'adamw'; "
    ):
        train(run, max_steps=9, optimizer="adamw")
    assert "train.muon_momentum 0.95 -> 0.9" in train(run, max_steps=9, muon_momentum=0.9)
    assert "optimizer " not in train(tmp_path / "plain", optimizer="adamw")
    # The checkpoints say which, where the run's settings were deleted. A refused start writes none.
    (run / "config.toml").unlink()
    with pytest.raises(
        UserError, match=r"^train.optimizer: expected 'muon', with which the checkpoint of step \d+ was"
    ):
        train(run, max_steps=12, optimizer="adamw")
    assert not (run / "config.toml").exists()


def test_settings_that_an_optimizer_does_not_use_are_told() -> None:
    def told(**changes: Any) -> str:
        return optimizer_text(Config(MODEL, train=TrainArgs(**changes)), 1024, 4)

    assert "train.beta1, train.beta2 and train.eps are not used" in told(optimizer="adafactor", beta2=0.5)
    assert told(optimizer="muon", nesterov=True).endswith(
        "AdamW for all else; train.nesterov is of this AdamW, as Muon always looks ahead"
    )
    assert told(optimizer="muon").endswith("AdamW for all else")


MESHES: dict[str, dict[str, int]] = {
    "one device": {"data": 1}, "tensor 2 x fsdp 4": {"data": 1, "tensor": 2, "fsdp": 4},
    "data 2 x sequence 2 x fsdp 2": {"data": 2, "sequence": 2, "fsdp": 2}, "fsdp 8": {"data": 1, "fsdp": 8},
    "data 8": {"data": 8}, "data 2 x sequence 2 x tensor 2": {"data": 2, "sequence": 2, "tensor": 2},
}  # fmt: skip
FEW = 3  # of which each axis is in one
NAMES = {"few": list(MESHES)[:FEW], "rest": ["one device", *list(MESHES)[FEW:]]}
STEPS = 20


def train_on_meshes(folder: Path, names: list[str]) -> dict[str, Any]:
    """Losses of meshes, of steps that resume what one device has saved, and how many matrices a device takes."""
    found: dict[str, Any] = {}
    counts: list[tuple[int, ...]] = []
    original = muon.at_once

    def noted(sides: tuple[int, ...], count: int, most: int) -> int:
        if most == 1:  # the branch of a CPU
            counts.append((*sides, count))
        return original(sides, count, most)

    muon.at_once = noted  # type: ignore[assignment]
    for name in names:
        mesh = make_mesh(MeshArgs(**MESHES[name]), jax.devices()[: 1 if name == "one device" else 8])
        optimizer = make_optimizer(ARGS, STEPS)
        counts.clear()
        step = compile_train_step(LLAMA, optimizer, mesh, 1, jax.device_put(batch(0), batch_sharding(mesh)))
        taken = sorted(counts)
        state, losses = init_state(LLAMA, optimizer, mesh, seed=0), []
        for i in range(STEPS):
            if i == STEPS // 2 and name == "one device":
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(folder / "params", state.params)
                    checkpointer.save(folder / "state", state.opt_state)
            state, metrics = step(state, jax.device_put(batch(i), batch_sharding(mesh)))
            losses.append(float(metrics.loss))
        shapes, source = state_shapes(LLAMA, optimizer, mesh), Checkpoint(folder, MODEL, None)  # type: ignore[arg-type]
        state, resumed = (
            TrainState(source.restore("params", shapes.params), source.restore("state", shapes.opt_state)),
            [],
        )
        for i in range(STEPS // 2, STEPS):
            state, metrics = step(state, jax.device_put(batch(i), batch_sharding(mesh)))
            resumed.append(float(metrics.loss))
        mine = [leaf for leaf in jax.tree.leaves(state.opt_state[1]) if leaf.ndim]
        share = sum(leaf.addressable_shards[0].data.size for leaf in mine) / sum(leaf.size for leaf in mine)
        found[name] = {"losses": losses, "resumed": resumed, "share": share, "taken": taken}
    return found


@pytest.fixture(scope="module", params=["few", pytest.param("rest", marks=pytest.mark.slow)])
def on_meshes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return run_on_eight_devices("tests.training.test_muon", request.param)


def test_every_mesh_has_the_losses_of_one_device(on_meshes: dict[str, Any]) -> None:
    one = on_meshes["one device"]
    assert one["losses"][-1] < one["losses"][0]
    for found in on_meshes.values():
        np.testing.assert_allclose(found["losses"], one["losses"], rtol=2e-4)


def test_a_state_is_resumed_bit_for_bit_and_on_other_meshes(on_meshes: dict[str, Any]) -> None:
    one = on_meshes["one device"]
    assert one["resumed"] == one["losses"][STEPS // 2 :]
    for found in on_meshes.values():
        np.testing.assert_allclose(found["resumed"], one["resumed"], rtol=2e-4)


def test_devices_share_the_matrices_and_hold_shards_of_the_momentum(on_meshes: dict[str, Any]) -> None:
    """Each takes an eighth of the matrices of a shape, rounded up: 6 of wq and wo, 6 of wk and wv, 9 of w1, w2 and w3."""
    D, KV, F = 32, 8, MODEL.hidden_width
    for name, found in on_meshes.items():
        if name == "one device":
            assert sum(count for *_, count in found["taken"]) == 21
        else:
            assert found["taken"] == [[D, KV, 1], [D, D, 1], [D, F, 2]]
            assert found["share"] == pytest.approx(
                1 / math.prod(MESHES[name].get(axis, 1) for axis in ("fsdp", "tensor"))
            )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as at:
        print(json.dumps(train_on_meshes(Path(at), NAMES[sys.argv[1]])))
    sys.stdout.flush()
