"""The steps of adapters: gradients of a quantized base, the same numbers on every mesh, and what is not donated."""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.adapters import adapter_shapes, init_adapter
from llama_jax.config import MeshArgs, ModelArgs, TrainArgs, Weights
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import batch_sharding, make_mesh, parameter_shapes
from llama_jax.generation.serving import stacked
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.ops.loss import loss_sum
from llama_jax.ops.quantize import Adapted, Matrix
from llama_jax.training.adapting import Adapting
from llama_jax.training.step import compile_eval_step, compile_train_step, init_state, make_optimizer
from tests import numpy_llama
from tests.eight_devices import run_on_eight_devices

MODEL = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, multiple_of=32, max_seq_len=32)
LORA = LoraArgs(rank=4, targets=("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"))
TRAIN = TrainArgs(lr=1e-2, warmup_steps=1, eps=1e-3, batch_size=8)


def plain() -> Any:
    params = numpy_llama.random_params(parameter_shapes(Llama(MODEL)))
    return jax.tree.map(jnp.asarray, params)


def frozen(weights: Weights, mesh: Any) -> Any:
    params = plain()
    return stacked(jax.tree_util.tree_leaves_with_path(params), params, weights, mesh)


def dense(tree: Any) -> Any:
    """A frozen base with its matrices as plain ones of the same values."""

    def plain_matrix(w: Any) -> Any:
        if not isinstance(w, Matrix) or w.scales is None:
            return w
        values = w.values.astype(jnp.float32)
        groups = w.scales.shape[-2]
        by_group = values.reshape(*values.shape[:-2], groups, -1, values.shape[-1]) * w.scales[..., None, :]
        return Matrix(by_group.reshape(values.shape), None, w.shape)

    return jax.tree.map(plain_matrix, tree, is_leaf=lambda w: isinstance(w, Matrix))


def batch(rows: int = 8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(MODEL.vocab_size, size=(rows, 33)).astype(np.int32)
    weights = (np.arange(32) < rng.integers(1, 33, size=(rows, 1))).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights)


def factors(lora: LoraArgs = LORA) -> Any:
    """An adapter that changes its model: b is not zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), jnp.float32), adapter_shapes(MODEL, lora))


def one_device() -> Any:
    return make_mesh(MeshArgs(data=1), jax.devices()[:1])


@pytest.mark.parametrize(
    ("weights", "remat"), [("int8", "full"), ("int4", "none"), pytest.param("int4-64", "dots", marks=pytest.mark.slow)]
)
def test_gradients_beside_a_quantized_base_are_those_beside_its_values(weights: Weights, remat: Any) -> None:
    model, adapting = Llama(MODEL, remat=remat), Adapting(LORA, weights)
    base = frozen(weights, one_device())

    def loss(adapter: Any, base: Any) -> jax.Array:
        return loss_sum(model, adapting.whole(MODEL, base, adapter), *batch())

    found = jax.jit(jax.value_and_grad(loss))(factors(), base)
    wanted = jax.jit(jax.value_and_grad(loss))(factors(), dense(base))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_gradients_are_those_of_the_whole_models_through_the_merged_matrices() -> None:
    """By the chain rule: the gradient of b is scale a^T dW."""
    model, adapting, base, adapter = Llama(MODEL), Adapting(LORA), frozen("auto", one_device()), factors()
    whole = adapting.whole(MODEL, base, adapter)

    def merged(w: Any) -> Any:
        if not isinstance(w, Adapted):
            return w
        stack = jax.vmap(lambda one: one.merged()) if w.a.ndim == 3 else lambda one: one.merged()
        return stack(w)

    dense = jax.tree.map(merged, whole, is_leaf=lambda w: isinstance(w, Adapted))
    of_whole = jax.jit(jax.grad(lambda params: loss_sum(model, params, *batch())))(dense)
    found = jax.jit(jax.grad(lambda adapter: loss_sum(model, adapting.whole(MODEL, base, adapter), *batch())))(adapter)
    for part, name in (("attention", "wo"), ("feed_forward", "w1")):
        a, b = (adapter["layers"][part][name][key] for key in "ab")
        dw = of_whole["layers"][part][name].reshape(2, a.shape[1], b.shape[2])
        wanted_b, wanted_a = LORA.scale * a.swapaxes(1, 2) @ dw, LORA.scale * dw @ b.swapaxes(1, 2)
        np.testing.assert_allclose(found["layers"][part][name]["b"], wanted_b, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["layers"][part][name]["a"], wanted_a, rtol=1e-3, atol=1e-4)


def test_first_values_are_pefts_and_follow_from_the_seed() -> None:
    first = init_adapter(MODEL, LORA, 0)
    a, b = (first["layers"]["feed_forward"]["w2"][key] for key in "ab")
    bound = MODEL.hidden_width**-0.5
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.95 * bound and not np.any(b)
    assert (a[0] != a[1]).any()
    jax.tree.map(np.testing.assert_array_equal, first, init_adapter(MODEL, LORA, 0))
    assert (init_adapter(MODEL, LORA, 1)["output"]["a"] != first["output"]["a"]).any()


def test_the_step_gives_the_base_back_and_donates_the_adapter() -> None:
    mesh, adapting = one_device(), Adapting(LORA, "int8")
    optimizer = make_optimizer(TRAIN, 4)
    step = compile_train_step(Llama(MODEL), optimizer, mesh, 1, batch(), adapting)
    state, base = init_state(Llama(MODEL), optimizer, mesh, 0, None, adapting), frozen("int8", mesh)
    before = jax.tree.map(np.array, base)
    new, _ = step(state, batch(), base)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, base), before)
    assert jax.tree.structure(new.params) == jax.tree.structure(adapter_shapes(MODEL, LORA))


MESHES = {
    "one device": {"data": 1},
    "fsdp 8, 2 parts": {"fsdp": 8, "data": 1, "parts": 1},
    "tensor 2 x fsdp 4": {"tensor": 2, "fsdp": 4, "data": 1, "parts": 2},
    "sequence 2 x data 4": {"sequence": 2, "data": 4},
}


def train_on(sizes: dict[str, int], weights: Weights, dropout: float) -> dict[str, Any]:
    sizes = dict(sizes)
    parts = sizes.pop("parts", 1)
    mesh = make_mesh(MeshArgs(**sizes), jax.devices()[: 1 if sizes == {"data": 1} else 8])
    lora = dataclasses.replace(LORA, dropout=dropout)
    model, adapting, optimizer = Llama(MODEL), Adapting(lora, weights), make_optimizer(TRAIN, 6)
    shapes = adapting.base_shapes(model, mesh)
    base = jax.device_put(frozen(weights, one_device()), jax.tree.map(lambda s: s.sharding, shapes))
    given = jax.device_put(batch(16), batch_sharding(mesh))
    step = compile_train_step(model, optimizer, mesh, parts, given, adapting)
    state = init_state(model, optimizer, mesh, 0, None, adapting)
    losses = []
    for seed in range(6):
        state, metrics = step(state, jax.device_put(batch(16, seed), batch_sharding(mesh)), base)
        losses += [float(metrics.loss), float(metrics.grad_norm)]
    evaluation = compile_eval_step(model, mesh, dataclasses.replace(TRAIN, batch_size=16), MODEL, False, adapting)
    losses.append(float(evaluation(state.params, given, base)[0]) / 100)
    shards = state.params["layers"]["attention"]["wo"]
    return {
        "losses": losses,
        "shards": [list(shards[key].addressable_shards[0].data.shape) for key in "ab"],
        "base": list(base["layers"]["attention"]["wo"].values.addressable_shards[0].data.shape),
    }


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What train_on says of few meshes or of all, in a process with eight devices."""
    return run_on_eight_devices("tests.training.test_adapting", request.param)


def test_six_steps_with_dropout_on_eight_devices_and_in_parts_equal_those_on_one(trained: dict[str, Any]) -> None:
    for name, found in trained.items():
        one = trained[f"one device {name.split()[-1]}"]
        assert len(set(one["losses"])) == len(one["losses"])
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-4), name


def test_factors_and_base_lie_in_shards_of_their_sides(trained: dict[str, Any]) -> None:
    assert trained["one device int4"]["shards"] == [[2, 64, 4], [2, 4, 64]]
    assert trained["tensor 2 x fsdp 4 int4"]["shards"] == [[2, 32, 4], [2, 4, 16]]
    assert trained["tensor 2 x fsdp 4 int4"]["base"] == [2, 32, 16]


if __name__ == "__main__":
    asked: dict[Any, list[str]] = {"auto": list(MESHES), "int4": list(MESHES)}
    if sys.argv[1] == "few":
        asked = {"int4": ["one device", "tensor 2 x fsdp 4"]}
    found = {f"{name} {kind}": train_on(MESHES[name], kind, 0.2) for kind, names in asked.items() for name in names}
    print(json.dumps(found))
