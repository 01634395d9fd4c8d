"""A hundred training steps against PyTorch: another model, another automatic gradient, another AdamW, the same losses."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")

from benchmarks.torch_llama import TorchLlama  # noqa: E402
from llama_jax.build import make_model  # noqa: E402
from llama_jax.config import MeshArgs, ModelArgs, TrainArgs  # noqa: E402
from llama_jax.data.batches import Batch, train_batches  # noqa: E402
from llama_jax.devices.sharding import make_mesh  # noqa: E402
from llama_jax.training.step import compile_train_step, init_state, make_optimizer  # noqa: E402

STEPS = 100
MODEL = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128, multiple_of=32, max_seq_len=48)
TRAIN = TrainArgs(lr=3e-3, warmup_steps=10, max_steps=STEPS, batch_size=8, grad_clip=1.0, weight_decay=0.1)


def batches() -> list[Batch]:
    """Of a stream that can be learnt: each token is one of four that may follow the one before it."""
    rng = np.random.default_rng(0)
    follows = rng.integers(MODEL.vocab_size, size=(MODEL.vocab_size, 4))
    tokens = [0]
    for choice in rng.integers(4, size=20_000):
        tokens.append(follows[tokens[-1], choice])
    stream = np.array(tokens, np.uint16)
    return list(train_batches(stream, TRAIN.batch_size, MODEL.max_seq_len, 0, 0, STEPS))


def peer(params: Any) -> Any:
    """The PyTorch model with these parameters: its linear layers hold [out, in], a layer at a time, heads side by side."""
    model = TorchLlama(MODEL)
    layers = params["layers"]
    state = {
        "tok_embeddings.weight": params["tok_embeddings"],
        "norm.weight": params["norm"],
        "output.weight": params["output"].T,
    }
    for i in range(MODEL.n_layers):
        attention = {name: np.asarray(leaf[i]) for name, leaf in layers["attention"].items()}
        for name in ("wq", "wk", "wv"):
            state[f"layers.{i}.{name}.weight"] = attention[name].reshape(MODEL.dim, -1).T
        state[f"layers.{i}.wo.weight"] = attention["wo"].reshape(-1, MODEL.dim).T
        for name, leaf in layers["feed_forward"].items():
            state[f"layers.{i}.{name}.weight"] = leaf[i].T
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = layers[name][i]
    model.load_state_dict({name: torch.tensor(np.array(leaf)) for name, leaf in state.items()})
    return model


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch's threads, on cores that other tests use as well, would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def torch_run(model: Any, data: list[Batch]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms (before clipping), trained by torch.optim.AdamW with the LLaMA 2 paper's recipe."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": TRAIN.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(TRAIN.beta1, TRAIN.beta2),
        eps=TRAIN.eps,
    )
    losses, grad_norms = [], []
    for step, batch in enumerate(data, start=1):
        if step <= TRAIN.warmup_steps:
            rate = TRAIN.lr * step / TRAIN.warmup_steps
        else:
            done = (step - TRAIN.warmup_steps) / (STEPS - TRAIN.warmup_steps)
            rate = TRAIN.lr * (TRAIN.min_lr_ratio + (1 - TRAIN.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = model(torch.tensor(batch.inputs).long(), torch.tensor(batch.targets).long())
        loss.backward()
        grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.grad_clip)))
        optimizer.step()
        losses.append(loss.item())
    return losses, grad_norms


def test_a_hundred_steps_give_the_losses_that_pytorch_gives(one_thread: None) -> None:
    module, mesh = make_model(MODEL, "float32"), make_mesh(MeshArgs(data=1), jax.devices()[:1])
    optimizer, data = make_optimizer(TRAIN, STEPS), batches()
    state = init_state(module, optimizer, mesh, seed=0)
    expected, expected_norms = torch_run(peer(state.params), data)
    step = compile_train_step(module, optimizer, mesh, 1, data[0])
    losses, norms = [], []
    for batch in data:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))

    assert expected[-1] < 0.6 * expected[0], "it learns"
    assert max(expected_norms) > TRAIN.grad_clip > min(expected_norms), "some gradients are clipped, some are not"
    # What was asked for is 1e-4 over the first ten steps and 1e-3 over a hundred; measured is 2e-6.
    np.testing.assert_allclose(losses, expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(losses, expected, rtol=5e-5, atol=0)
    np.testing.assert_allclose(norms, expected_norms, rtol=5e-4)
