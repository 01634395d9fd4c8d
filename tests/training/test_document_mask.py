"""With a document mask, the step of a packed batch is that of its documents, each alone: on every mesh, with every kernel."""

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch, PackedBatch
from llama_jax.data.document_mask import with_documents
from llama_jax.devices.sharding import batch_sharding, make_mesh, on_mesh, parameter_shapes
from llama_jax.model import Llama
from llama_jax.ops.attention import Documents
from llama_jax.train_args import AttentionKernel, Remat
from llama_jax.training.bad_steps import LossHistory
from llama_jax.training.step import (
    TrainState,
    batch_shapes,
    compile_train_step,
    eval_step,
    shardings_of,
    state_shapes,
)
from tests.data.test_document_mask import BOS, EOS, documents
from tests.eight_devices import run_on_eight_devices
from tests.numpy_llama import llama, random_params
from tests.ops.test_attention_kernels import interpreted

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=16, max_seq_len=256)
ROWS, LENGTH = 8, ARGS.max_seq_len
# Each with a number of parts, a kernel and what is kept for the backward pass.
MESHES: dict[str, tuple[dict[str, int], int, AttentionKernel, Remat]] = {
    "one device": ({"data": 1}, 1, "xla", "none"),
    "one device, plain, 4 parts": ({"data": 1}, 4, "plain", "none"),
    "data 8": ({"data": 8}, 1, "xla", "full"),
    "fsdp 4, 2 parts": ({"data": 1, "fsdp": 4}, 2, "xla", "attention"),
    "fsdp 4 x tensor 2": ({"data": 1, "fsdp": 4, "tensor": 2}, 1, "xla", "dots"),
    "data 2 x sequence 4": ({"data": 2, "sequence": 4}, 1, "xla", "attention"),
    "fsdp 2 x tensor 2 x sequence 2, 2 parts": ({"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}, 2, "xla", "none"),
    "tensor 2": ({"data": 1, "tensor": 2}, 1, "xla", "none"),
    "fsdp 2 x tensor 2, splash": ({"data": 1, "fsdp": 2, "tensor": 2}, 1, "splash", "attention"),
    "data 2 x sequence 2, splash": ({"data": 2, "sequence": 2}, 1, "splash", "none"),
}
FEW = ["fsdp 2 x tensor 2 x sequence 2, 2 parts", "data 2 x sequence 2, splash"]  # each axis is in one of them


def asked(meshes: str) -> list[str]:
    """The names of few meshes, or of the rest."""
    return FEW if meshes == "few" else [name for name in MESHES if name not in FEW]


@functools.cache
def tokens() -> np.ndarray:
    """Windows of a stream of documents of 0 to 400 tokens: int [ROWS, LENGTH + 1]."""
    rng = np.random.default_rng(0)
    lengths = (400 * rng.random(100) ** 4).astype(int)
    stream = np.concatenate([[BOS, *rng.integers(3, ARGS.vocab_size, size=size), EOS] for size in lengths])
    starts = rng.integers(len(stream) - LENGTH, size=ROWS)
    return np.stack([stream[start : start + LENGTH + 1] for start in starts]).astype(np.int32)


def packed() -> PackedBatch:
    inputs, targets = tokens()[:, :-1], tokens()[:, 1:]
    return with_documents(Batch(inputs, targets, np.ones(inputs.shape, np.float32)), BOS)


def alone() -> Batch:
    """Each document in a row of its own, at its start; what follows it there has no weight."""
    rows: list[list[np.ndarray]] = []
    for row in tokens():
        for first, end in documents(row):
            targets = row[first + 1 : end + 1]
            parts = row[first:end], targets, (targets != BOS).astype(np.float32)
            rows.append([np.pad(part, (0, LENGTH - (end - first))) for part in parts])
    return Batch(*(np.stack(column) for column in zip(*rows, strict=True)))


def side_by_side(of_documents: np.ndarray) -> np.ndarray:
    """Put the documents' logits [documents, LENGTH, V] where the documents are: [ROWS, LENGTH, V]."""
    rest = iter(of_documents)
    return np.stack([np.concatenate([next(rest)[: end - at] for at, end in documents(row)]) for row in tokens()])


def parameters() -> Any:
    return random_params(parameter_shapes(Llama(ARGS)))


@functools.cache
def reference() -> tuple[np.ndarray, float, list[np.ndarray]]:
    """Logits, mean loss and its gradient of the documents alone, by the plain formula without any mask."""
    model, batch, params = Llama(ARGS), alone(), parameters()

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, batch.inputs)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return jnp.sum(nll * batch.weights) / jnp.sum(batch.weights), logits

    (mean, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return side_by_side(np.asarray(logits)), float(mean), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


def keeping_gradients() -> optax.GradientTransformationExtraArgs:
    """An optimizer that changes nothing, whose state is the last gradient."""

    def update(grads: Any, state: Any, params: Any, **_: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, grads), (grads, state[1])

    return optax.GradientTransformationExtraArgs(
        lambda p: (jax.tree.map(jnp.zeros_like, p), LossHistory.empty()), update
    )


def differences(name: str) -> dict[str, float]:
    """How far the packed batch's logits, losses and gradient on a mesh are from those of the documents alone."""
    sizes, parts, kernel, remat = MESHES[name]
    logits, mean, gradient = reference()
    mesh = make_mesh(MeshArgs(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    model, optimizer = Llama(ARGS, remat=remat, kernel=kernel, loss_chunk=100), keeping_gradients()
    batch: Any = jax.device_put(packed(), batch_sharding(mesh))
    shapes = batch_shapes(TrainArgs(batch_size=ROWS), ARGS, mesh, document_mask=True)
    step = compile_train_step(model, optimizer, mesh, parts, shapes)
    state = jax.device_put(
        TrainState(parameters(), optimizer.init(parameters())), shardings_of(state_shapes(model, optimizer, mesh))
    )

    def without_gradient(params: Any, b: PackedBatch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = model.apply({"params": params}, b.inputs, Documents(b.segments, b.positions))
        return logits, eval_step(model, params, b)

    with on_mesh(mesh):
        found, (total, weight) = jax.jit(without_gradient)(state.params, batch)
    state, metrics = step(state, batch)
    return {
        "logits": float(np.abs(found - logits).max()),
        "loss": abs(float(metrics.loss) - mean),
        "held-out loss": abs(float(total) / float(weight) - mean),
        "gradient": max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(jax.tree.leaves(state.opt_state[0]), gradient, strict=True)
        ),
    }


@pytest.mark.parametrize("meshes", ["few", pytest.param("rest", marks=pytest.mark.slow)])
def test_a_packed_batch_has_the_logits_the_loss_and_the_gradient_of_its_documents_alone(meshes: str) -> None:
    found = run_on_eight_devices("tests.training.test_document_mask", meshes)
    assert set(found) == set(asked(meshes))
    for mesh, of_mesh in found.items():
        assert all(difference < 1e-5 for difference in of_mesh.values()), (mesh, of_mesh)


def test_the_reference_is_llama_on_each_document() -> None:
    batch = alone()
    short = np.flatnonzero(batch.weights.sum(1) < 30)[:5]
    wanted = llama(parameters(), batch.inputs[short, :30], ARGS)
    found = jax.jit(lambda ids: Llama(ARGS).apply({"params": parameters()}, ids))(batch.inputs[short, :30])
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    cut = [row for row in tokens() if row[0] != BOS]
    assert len(cut) > 1 and len(batch.inputs) > 3 * ROWS and batch.weights.sum() < ROWS * LENGTH


def test_without_the_mask_the_step_knows_of_no_documents() -> None:
    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    shapes = batch_shapes(TrainArgs(batch_size=ROWS), ARGS, mesh)
    assert type(shapes) is Batch and len(shapes) == 3


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        interpreted(patch)
        print(json.dumps({name: differences(name) for name in asked(sys.argv[1])}))
