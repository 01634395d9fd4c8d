"""Norms by kind of parameter: those of the gradients and of the change of the parameters, on every mesh."""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.training.norms import KINDS, Norms, kind_of
from llama_jax.training.step import compile_train_step, init_state, make_optimizer, make_train_step
from tests.eight_devices import run_on_eight_devices
from tests.training.test_step import CLIPPED, literal_loss, ragged_batch
from tests.training.test_step import MODEL as ONE_LAYER

ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=16, max_seq_len=16, attention_bias="qkv"
)
TRAIN = TrainArgs(lr=1e-2, warmup_steps=1, eps=1e-3, grad_clip=0.5)


def norms_of(train: TrainArgs, sizes: dict[str, int], parts: int = 1) -> tuple[Norms, float, Any, Any]:
    """The norms of the second step, its global norm, and the parameters before and after it."""
    mesh = make_mesh(MeshArgs(**sizes), jax.devices()[: 1 if sizes == {"data": 1} else 8])
    rng = np.random.default_rng(0)
    tokens = rng.integers(ARGS.vocab_size, size=(8, 17)).astype(np.int32)
    host = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 16), np.float32))
    batch = jax.device_put(host, batch_sharding(mesh))
    model, optimizer = Llama(ARGS), make_optimizer(train, 10)
    step = compile_train_step(model, optimizer, mesh, parts, batch)
    state, _ = step(init_state(model, optimizer, mesh, 0), batch)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(jax.tree.map(jnp.copy, state), batch)
    return metrics.norms, float(metrics.grad_norm), before, jax.tree.map(np.asarray, state.params)


def literal(tree: Any) -> dict[str, float]:
    """Norms by the names of parameters, in float64."""
    found: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path[-1].key
        kind = "norms" if "norm" in name else "biases" if "bias" in name else name
        found.setdefault({"tok_embeddings": "embeddings"}.get(kind, kind), []).append(
            np.asarray(leaf, np.float64).ravel()
        )
    return {kind: float(np.linalg.norm(np.concatenate(leaves))) for kind, leaves in found.items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "muon"}, {"moments": "int8"}, {"param_dtype": "bfloat16"}, {"optimizer": "adafactor"}],
    ids=lambda settings: " ".join(settings.values()) or "adamw",
)
def test_update_norms_are_those_of_what_changed_in_the_step(settings: dict[str, Any]) -> None:
    norms, _, before, after = norms_of(dataclasses.replace(TRAIN, **settings), {"data": 1})
    changed = literal(jax.tree.map(lambda old, new: new.astype(np.float64) - old.astype(np.float64), before, after))
    assert dict(zip(norms.kinds, norms.updates.tolist(), strict=True)) == pytest.approx(changed, rel=1e-3)
    assert norms.kinds == KINDS


def test_gradient_norms_are_those_before_clipping_and_make_up_the_global_norm() -> None:
    optimizer, batch = make_optimizer(CLIPPED, 10), ragged_batch()
    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    state = init_state(ONE_LAYER, optimizer, mesh, 0)
    grads = literal(jax.jit(jax.grad(literal_loss))(state.params, batch))
    _, metrics = jax.jit(make_train_step(ONE_LAYER, optimizer, 1))(state, batch)
    found = metrics.norms.to_dict()
    assert {key.partition("/")[2] for key in found if key.startswith("grad_norm/")} == set(
        grads
    ) and "biases" not in grads
    for kind, norm in grads.items():
        assert float(found[f"grad_norm/{kind}"]) == pytest.approx(norm, rel=1e-4)
    total = np.sqrt(np.sum(np.square(np.asarray(metrics.norms.gradients, np.float64))))
    assert total == pytest.approx(float(metrics.grad_norm), rel=1e-6) and total > CLIPPED.grad_clip


MESHES: list[tuple[dict[str, int], int]] = [
    ({"data": 1}, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 1), ({"fsdp": 4, "tensor": 2}, 2),
]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_every_mesh_and_accumulation_has_the_norms_of_one_device(optimizer: str) -> None:
    one, *others = run_on_eight_devices("tests.training.test_norms", optimizer)
    assert len(others) == 2
    for other in others:
        np.testing.assert_allclose(other["gradients"], one["gradients"], rtol=1e-4)
        np.testing.assert_allclose(other["updates"], one["updates"], rtol=1e-3)


def on_meshes(optimizer: Any) -> list[dict[str, list[float]]]:
    """The norms on each of the meshes."""
    found = [norms_of(dataclasses.replace(TRAIN, optimizer=optimizer), *mesh)[0] for mesh in MESHES]
    return [{"gradients": norms.gradients.tolist(), "updates": norms.updates.tolist()} for norms in found]


def test_a_skipped_step_has_no_update() -> None:
    optimizer = make_optimizer(dataclasses.replace(CLIPPED, bad_steps="skip"), 10)
    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    state = init_state(ONE_LAYER, optimizer, mesh, 0)
    broken = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    _, metrics = jax.jit(make_train_step(ONE_LAYER, optimizer, 1))(broken, ragged_batch())
    assert not np.any(metrics.norms.updates) and np.isnan(np.asarray(metrics.norms.gradients)).all()


def test_both_factors_of_an_adapter_are_of_the_kind_of_their_matrix() -> None:
    from llama_jax.adapters import adapter_shapes

    shapes = adapter_shapes(ARGS, LoraArgs(rank=2, targets=("wq", "w2", "output")))
    kinds = {kind_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    assert kinds == {"wq", "w2", "output"}


if __name__ == "__main__":
    print(json.dumps(on_meshes(sys.argv[1])))
