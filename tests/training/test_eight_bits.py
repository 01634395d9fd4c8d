"""Training in eight bits: it learns as well, in the same way on every mesh and after a resume, and says what it does."""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.chips import EIGHT_BIT_FLOPS, TPU_KINDS
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.ops.eight_bit import EightBit
from llama_jax.training.eight_bits import asked, check_units, copies, in_step, products_text
from llama_jax.training.step import (
    batch_shapes,
    compile_train_step,
    init_state,
    make_optimizer,
    make_train_step,
    shardings_of,
)
from tests.eight_devices import run_on_eight_devices

MODEL = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32, max_seq_len=32)
TRAIN = TrainArgs(lr=3e-3, warmup_steps=10, batch_size=16, weight_decay=0.0)
INT8 = dataclasses.replace(TRAIN, products="int8")


def batches(steps: int, model: ModelArgs = MODEL) -> Any:
    """Texts of a random table of likely successors, which a model can learn."""
    rng = np.random.default_rng(0)
    table = rng.permuted(np.tile(np.arange(model.vocab_size), (model.vocab_size, 1)), axis=1)[:, :4]
    for _ in range(steps):
        rows = np.zeros((TRAIN.batch_size, model.max_seq_len + 1), np.int32)
        rows[:, 0] = rng.integers(0, model.vocab_size, len(rows))
        for i in range(model.max_seq_len):
            rows[:, i + 1] = table[rows[:, i], rng.choice(4, len(rows), p=[0.7, 0.1, 0.1, 0.1])]
        yield Batch(rows[:, :-1], rows[:, 1:], np.ones((len(rows), model.max_seq_len), np.float32))


@functools.cache
def losses(
    args: TrainArgs, steps: int, sizes: tuple[int, ...] = (1, 1, 1, 1), remat: str = "none", stop: int = 0
) -> np.ndarray:
    """The losses of a run, float32 [steps], which stops after ``stop`` steps and goes on from its state alone."""
    mesh = make_mesh(MeshArgs(*sizes), jax.devices()[: int(np.prod(sizes))])
    model, optimizer = Llama(MODEL, remat=remat), make_optimizer(args, steps)
    accumulation = args.gradient_accumulation_steps
    shapes = batch_shapes(args, MODEL, mesh)
    step = compile_train_step(model, optimizer, mesh, accumulation, shapes, eight=asked(args))
    state, found = init_state(model, optimizer, mesh, args.seed), list[float]()
    for batch in batches(steps):
        if stop and len(found) == stop:
            shardings = shardings_of(state)
            state = jax.device_put(jax.device_get(state), shardings)
            step = compile_train_step(model, optimizer, mesh, accumulation, shapes, eight=asked(args))
        state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
        found.append(float(metrics.loss))
    return np.array(found)


KINDS = {"int8": INT8, "fp8": dataclasses.replace(TRAIN, products="fp8")}


def close(kind: str, steps: int, least: float) -> None:
    """A run's last losses are within 1% of float32's, whose loss fell to ``least`` of the first."""
    plain, found = losses(TRAIN, steps), losses(KINDS[kind], steps)
    last = slice(-(steps // 8), None)
    assert plain[last].mean() < least * plain[0]
    assert found[last].mean() == pytest.approx(plain[last].mean(), rel=0.01)
    assert not np.array_equal(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_forty_steps_learn_as_those_of_floats(kind: str) -> None:
    close(kind, 40, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_steps_learn_as_those_of_floats(kind: str) -> None:
    close(kind, 300, 0.4)


def test_other_arithmetic_is_other_numbers_and_the_same_settings_the_same_ones() -> None:
    found = losses(INT8, 5)
    for changes in ({"products_of": "forward"}, {"products_of": "forward,input"}, {"products_of": "weight"}):
        assert not np.array_equal(losses(dataclasses.replace(INT8, **changes), 5), found)
    losses.cache_clear()
    np.testing.assert_array_equal(losses(INT8, 5), found)


def alike(found: Any, wanted: Any) -> None:
    """Two runs' losses differ as much as the last bit of a float may change, by which a few values round another way.

    Products of the same values are the same ones: tests/ops/test_eight_bit.py.
    """
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def rounded(jaxpr: Any, loops: int = 0) -> list[tuple[int, tuple[int, ...]]]:
    """The shapes of all that a program rounds to integers, each with the number of loops around it."""
    found = [(loops, eqn.outvars[0].aval.shape) for eqn in jaxpr.eqns if eqn.primitive.name == "round"]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                found += rounded(inner, loops + (eqn.primitive.name == "scan"))
    return found


def test_matrices_are_quantized_once_a_step_and_not_in_each_layer_of_each_part() -> None:
    args = dataclasses.replace(INT8, gradient_accumulation_steps=2)
    model, optimizer, mesh = Llama(MODEL), make_optimizer(args, 1), make_mesh(MeshArgs(), jax.devices()[:1])
    state, batch = init_state(model, optimizer, mesh, 0), next(batches(1))
    program = jax.make_jaxpr(make_train_step(model, optimizer, 2, eight=args))(state, batch)
    found = rounded(program.jaxpr)
    matrices = [w.shape for w in jax.tree.leaves(state.params["layers"]) if w.ndim > 2]
    assert len(matrices) == 7
    assert sorted(shape for loops, shape in found if not loops) == sorted(2 * matrices)
    inside = {shape for loops, shape in found if loops}
    assert inside and not inside & {one for shape in matrices for one in (shape, shape[1:])}


def test_a_run_that_goes_on_from_its_state_has_the_same_numbers_to_the_bit() -> None:
    np.testing.assert_array_equal(losses(INT8, 5, stop=3), losses(INT8, 5))


@pytest.mark.parametrize("remat", ["dots", "full", "dots:1"])
def test_what_is_computed_again_is_the_same(remat: str) -> None:
    alike(losses(INT8, 5, remat=remat), losses(INT8, 5))


@pytest.mark.parametrize("changes", [{"param_dtype": "bfloat16", "moments": "int8"}, {"optimizer": "muon"}])
def test_it_stands_beside_every_optimizer(changes: dict[str, Any]) -> None:
    plain, found = (losses(dataclasses.replace(args, **changes), 5) for args in (TRAIN, INT8))
    assert 0 < np.abs(found - plain).max() < 0.02 * plain[0]


def seeds(step: int, row: int, seed: int = 0) -> set[tuple[int, ...]]:
    """The seeds of all matrices and layers in a step, for a part of the batch that begins with a row."""
    params = nn.unbox(Llama(MODEL).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    state = (optax.ScaleByScheduleState(jnp.array(step)),)
    args = dataclasses.replace(INT8, seed=seed)
    made = in_step(args, params, copies(args, params), state, jnp.array([row]))
    leaves = jax.tree.leaves(made, is_leaf=lambda w: isinstance(w, EightBit))
    matrices = [w for w in leaves if isinstance(w, EightBit)]
    assert len(matrices) == 7 and len(leaves) == 7 + len(("tok_embeddings", "output", "norm", "two norms", "of layers"))
    return {tuple(row) for w in matrices for row in np.asarray(w.seed).tolist()}


def test_random_bits_differ_by_seed_step_part_layer_and_matrix() -> None:
    groups = [seeds(0, 0), seeds(1, 0), seeds(0, 1), seeds(0, 0, 1)]
    assert all(len(group) == 7 * MODEL.n_layers for group in groups)
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert seeds(0, 0) == groups[0]


MESHES = {"one device": (1, 1, 1, 1), "fsdp": (2, 4, 1, 1), "tensor and sequence": (1, 2, 2, 2)}


def on_meshes(kind: str) -> list[list[float]]:
    """The losses of six steps of a kind on each mesh. Where a few values round another way, losses part with every step."""
    runs = {"int8": dataclasses.replace(INT8, gradient_accumulation_steps=2), "fp8": KINDS["fp8"]}
    return [losses(runs[kind], 6, sizes).tolist() for sizes in MESHES.values()]


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_losses_are_the_same_on_every_mesh(kind: str) -> None:
    one, *others = run_on_eight_devices("tests.training.test_eight_bits", kind)
    assert len(others) == 2
    for other in others:
        alike(other, one)


def device(kind: str, platform: str = "tpu") -> Any:
    return SimpleNamespace(device_kind=kind, platform=platform)


@pytest.mark.parametrize(
    ("kind", "name", "has"),
    [("fp8", "TPU v5 lite", "bfloat16 and int8"), ("fp8", "TPU v6e", "int8"), ("fp8", "NVIDIA A100-SXM4-40GB", "int8")],
)
def test_a_device_without_units_is_refused_in_one_line_that_says_what_it_has(kind: str, name: str, has: str) -> None:
    with pytest.raises(UserError) as error:
        check_units(kind, device(name))
    message = str(error.value)
    assert message.startswith("train.products: expected ") and "\n" not in message
    assert name in message and has in message and message.endswith("--train.products int8")


def test_a_run_says_what_is_known_of_eight_bits_on_its_device() -> None:
    assert "no faster than bfloat16" in check_units("int8", device("TPU v4"))
    assert "for tests" in check_units("int8", device("cpu", "cpu"))
    assert "not known" in check_units("fp8", device("NVIDIA B300", "gpu"))
    assert not check_units("float", device("TPU v4"))
    assert "not timed" in check_units("int8", device("TPU v5 lite"))
    assert "not timed" in check_units("fp8", device("NVIDIA H200", "gpu"))
    known = {name for peaks in EIGHT_BIT_FLOPS.values() for name in peaks if name.startswith("TPU")}
    assert TPU_KINDS.keys() == known
    with pytest.raises(UserError, match=r"TPU7x multiplies, bfloat16 and fp8, found int8; give --train.products fp8$"):
        check_units("int8", device("TPU7x"))


def test_a_run_says_which_products_and_what_stays() -> None:
    text = products_text(dataclasses.replace(INT8, products_of="forward,input"), "bfloat16")
    assert text.startswith("8-bit integers for forward, input of the layers' matrices, gradients rounded at random")
    assert "weight in bfloat16" in text and "evaluation included" in text and "bfloat16's peak" in text
    assert "e5m2" in products_text(KINDS["fp8"], "bfloat16")


@pytest.mark.parametrize(
    ("config", "key", "found"),
    [
        (Config(train=TrainArgs(products_of="forward,sideways")), "train.products_of", "'forward,sideways'"),
        (
            Config(train=dataclasses.replace(INT8, products_of="forward,forward")),
            "train.products_of",
            "forward,forward",
        ),
        (Config(train=dataclasses.replace(INT8, products_of="")), "train.products_of", "''"),
        (Config(train=TrainArgs(products_of="forward")), "train.products_of", "train.products float"),
        (Config(train=INT8, lora=LoraArgs(rank=4)), "train.products", "int8"),
        (Config(train=dataclasses.replace(INT8, objective="dpo")), "train.products", "int8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Config, key: str, found: str) -> None:
    with pytest.raises(UserError) as error:
        config.check()
    assert str(error.value).startswith(f"{key}: expected ") and found in str(error.value).split("found ")[1]


if __name__ == "__main__":
    print(json.dumps(on_meshes(sys.argv[1])))
