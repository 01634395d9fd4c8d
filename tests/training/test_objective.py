"""The DPO loss against the formula in numpy, its gradients against differences in float64, on every mesh."""

import dataclasses
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.adapters import adapter_shapes
from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import PairBatch
from llama_jax.devices.sharding import batch_sharding, make_mesh, on_mesh, parameter_shapes
from llama_jax.generation.serving import stacked
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.ops.loss import log_likelihoods
from llama_jax.training.adapting import Adapting
from llama_jax.training.objective import Dpo
from llama_jax.training.step import compile_eval_step, compile_train_step, init_state, make_optimizer
from tests import numpy_llama
from tests.eight_devices import run_on_eight_devices

MODEL = ModelArgs(dim=32, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=48, multiple_of=16, max_seq_len=16)
TRAIN = TrainArgs(lr=1e-2, warmup_steps=1, eps=1e-3, batch_size=8)
LENGTH = 32
DPO = Dpo(beta=0.3, label_smoothing=0.0, most_pairs=3, positions=LENGTH)
SMOOTHED = dataclasses.replace(DPO, label_smoothing=0.2)

Answers = tuple[list[int], int]  # the tokens of a prompt with an answer, and how many of them are the prompt


def pairs(seed: int = 0, rows: int = 8) -> list[list[tuple[Answers, Answers]]]:
    """Rows of one to three pairs; an answer and its prompt have 5 tokens at most. The last row has none."""
    rng = np.random.default_rng(seed)

    def tokens(n: int) -> list[int]:
        return rng.integers(MODEL.vocab_size, size=n).tolist()

    def pair() -> tuple[Answers, Answers]:
        prompt = tokens(int(rng.integers(1, 4)))
        chosen, rejected = (prompt + tokens(int(rng.integers(1, 3))) for _ in range(2))
        return (chosen, len(prompt)), (rejected, len(prompt))

    return [[pair() for _ in range(int(rng.integers(1, 4)))] for _ in range(rows - 1)] + [[]]


def packed(rows: list[list[tuple[Answers, Answers]]], reference: Any) -> PairBatch:
    """The rows as a batch. ``reference`` gives the log-likelihoods of an answer's tokens but the first."""
    batch = PairBatch(
        *(np.zeros((len(rows), LENGTH), dtype) for dtype in (int, int, np.float32, int, int)),
        np.full((len(rows), LENGTH), np.nan, np.float32),
    )
    for r, row in enumerate(rows):
        at = 0
        for s, ((ids, prompt), sign) in enumerate(zip((a for pair in row for a in pair), [1, -1] * 3, strict=False)):
            end = at + len(ids) - 1
            batch.inputs[r, at:end], batch.targets[r, at:end] = ids[:-1], ids[1:]
            batch.segments[r, at:end], batch.positions[r, at:end] = s, np.arange(end - at)
            batch.weights[r, at + prompt - 1 : end] = sign
            batch.reference[r, at + prompt - 1 : end] = reference(ids)[prompt - 1 :]
            at = end
        batch.segments[r, at:] = 2 * len(row)
        batch.positions[r, at:] = np.arange(LENGTH - at) % MODEL.max_seq_len
    return batch._replace(
        **{k: getattr(batch, k).astype(np.int32) for k in ("inputs", "targets", "segments", "positions")}
    )


def likelihoods(params: Any, ids: list[int]) -> np.ndarray:
    """log p of each token but the first, in float64."""
    logits = numpy_llama.llama(params, np.array([ids[:-1]]), MODEL)[0]
    log_probs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return log_probs[np.arange(len(ids) - 1), ids[1:]]


def literal(params: Any, reference: Any, rows: list[Any], objective: Dpo = DPO) -> dict[str, float]:
    """Equation 7 of the paper, pair by pair, and the mean rewards."""
    found = []
    for chosen, rejected in (pair for row in rows for pair in row):
        ratios = []
        for ids, prompt in (chosen, rejected):
            answer = slice(prompt - 1, None)
            ratios.append(likelihoods(params, ids)[answer].sum() - likelihoods(reference, ids)[answer].sum())
        margin = objective.beta * (ratios[0] - ratios[1])
        loss = -math.log(1 / (1 + math.exp(-margin))) * (1 - objective.label_smoothing)
        loss -= math.log(1 / (1 + math.exp(margin))) * objective.label_smoothing
        found.append((loss, margin, float(margin > 0), *(objective.beta * ratio for ratio in ratios)))
    names = ("loss", "reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def params_of(seed: int, args: ModelArgs = MODEL) -> Any:
    return numpy_llama.random_params(parameter_shapes(Llama(args)), seed)


def near(params: Any, seed: int = 5) -> Any:
    """Parameters not far away, so that margins are of both signs and none is huge."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (p + 0.05 * p.std() * rng.normal(size=p.shape)).astype(np.float32), params)


REFERENCE = params_of(0)
POLICY = near(REFERENCE)


def given(rows: list[Any]) -> PairBatch:
    return packed(rows, lambda ids: likelihoods(REFERENCE, ids))


def mean_loss(params: Any, batch: PairBatch, objective: Dpo = DPO) -> jax.Array:
    return objective.sums(Llama(MODEL, loss_chunk=24), params, batch)[0] / objective.count(batch)


@pytest.mark.parametrize("objective", [DPO, SMOOTHED])
def test_loss_and_rewards_are_the_formulas(objective: Dpo) -> None:
    rows = pairs()
    batch = given(rows)
    wanted = literal(POLICY, REFERENCE, rows, objective)
    total, rewards = jax.jit(lambda p: objective.sums(Llama(MODEL), p, batch))(POLICY)
    count = float(objective.count(batch))
    assert count == sum(map(len, rows))
    assert 0 < wanted["reward_accuracy"] < 1
    found = {name: float(value) / count for name, value in ({"loss": total} | rewards).items()}
    assert found == pytest.approx(wanted, abs=1e-5)


def test_gradients_are_the_formulas_in_every_array_of_parameters() -> None:
    """Along a random direction of each array: central differences of the literal loss in float64."""
    rows = pairs(1, rows=3)
    batch = given(rows)
    grads = jax.jit(jax.grad(mean_loss))(POLICY, batch)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(POLICY)
    for i, leaf in enumerate(leaves):
        direction = rng.normal(size=leaf.shape) / np.sqrt(leaf.size)

        def along(step: float, i: int = i, leaf: Any = leaf, direction: Any = direction) -> float:
            moved = [*leaves[:i], leaf.astype(np.float64) + step * direction, *leaves[i + 1 :]]
            return literal(jax.tree.unflatten(tree, moved), REFERENCE, rows)["loss"]

        difference = (along(1e-4) - along(-1e-4)) / 2e-4
        assert float(np.sum(np.asarray(jax.tree.leaves(grads)[i]) * direction)) == pytest.approx(difference, abs=1e-5)


def test_a_model_at_its_reference_has_the_loss_log_2_and_its_ties_count_half() -> None:
    rows = pairs(2)
    batch = given(rows)
    model = Llama(MODEL)
    same = jax.jit(lambda p: log_likelihoods(model, p, batch.inputs, batch.targets, batch.segments, batch.positions))
    at_start = batch._replace(reference=np.asarray(same(REFERENCE)))
    total, rewards = DPO.of_likelihoods(same(REFERENCE), at_start)
    count = float(DPO.count(batch))
    assert float(total) / count == pytest.approx(math.log(2), rel=1e-6)
    assert {name: float(value) / count for name, value in rewards.items()} == {
        "reward_margin": 0.0, "reward_accuracy": 0.5, "reward_chosen": 0.0, "reward_rejected": 0.0
    }  # fmt: skip


def test_neither_padding_nor_prompts_nor_an_unknown_reference_behind_them_reach_loss_or_gradients() -> None:
    rows = pairs(3)
    batch = given(rows)
    assert np.isnan(batch.reference).any()
    other = batch._replace(
        reference=np.where(batch.weights == 0, 1e9, batch.reference),
        targets=np.where(batch.weights == 0, 7, batch.targets),
    )
    step = jax.jit(jax.value_and_grad(mean_loss))
    for a, b in zip(jax.tree.leaves(step(POLICY, batch)), jax.tree.leaves(step(POLICY, other)), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_array_equal(a, b)


def test_a_pair_has_the_same_loss_alone_and_beside_others() -> None:
    rows = pairs(4)
    alone = [[pair] for row in rows for pair in row]
    loss = jax.jit(mean_loss)
    a, b = loss(POLICY, given(rows)), loss(POLICY, given(alone))
    assert float(a) == pytest.approx(float(b), abs=1e-6)


def adapter() -> Any:
    lora = LoraArgs(rank=4, targets=("wq", "wo", "w1", "w2", "output"))
    rng = np.random.default_rng(1)
    shapes = adapter_shapes(MODEL, lora)
    return lora, jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.1, s.shape), jnp.float32), shapes)


def results(sizes: dict[str, int], parts: int = 1, tuned: str = "whole") -> list[float]:
    """Losses and rewards of three steps and of an evaluation, on a mesh."""
    mesh = make_mesh(MeshArgs(**{"data": 1} | sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    tied = tuned == "tied"
    args = dataclasses.replace(MODEL, tie_embeddings=tied)
    reference = params_of(0, args)
    adapting, params, base = None, near(reference), ()
    if tuned in ("auto", "int8"):
        lora, params = adapter()
        adapting = Adapting(lora, tuned)  # type: ignore[arg-type]
        with on_mesh(mesh):
            base = (stacked(jax.tree_util.tree_leaves_with_path(reference), reference, tuned, mesh),)  # type: ignore[arg-type]
    model, optimizer = Llama(args, loss_chunk=24), make_optimizer(TRAIN, 10)
    shapes = init_state(model, optimizer, mesh, 0, None, adapting)
    params = jax.tree.map(lambda p, s: jax.device_put(p, s.sharding), params, shapes.params)
    state = init_state(model, optimizer, mesh, 0, params, adapting)
    batches = [packed(pairs(seed), lambda ids: -3.0 * np.ones(len(ids) - 1)) for seed in (0, 1)]
    placed = [jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), batch) for batch in batches]
    step = compile_train_step(model, optimizer, mesh, parts, placed[0], adapting, DPO)
    found: list[float] = []
    for i in range(3):
        state, metrics = step(state, placed[i % 2], *base)
        found += [float(metrics.loss), float(metrics.grad_norm), *map(float, metrics.rewards.values())]
    evaluation = compile_eval_step(model, mesh, TRAIN, args, True, adapting, DPO)
    return found + [float(x) for x in evaluation(state.params, placed[0], *base)]


@pytest.mark.parametrize("tuned", ["whole", pytest.param("int8", marks=pytest.mark.slow)])
def test_accumulation_is_the_large_batch(tuned: str) -> None:
    np.testing.assert_allclose(results({"data": 1}, 4, tuned), results({"data": 1}, 1, tuned), rtol=2e-5, atol=1e-6)


MESHES = {
    "fsdp 8": {"fsdp": 8},
    "tensor 2 x fsdp 4": {"tensor": 2, "fsdp": 4},
    "sequence 2 x data 4": {"sequence": 2, "data": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("tuned", ["whole", "tied", "auto", "int8"])
def test_every_mesh_has_the_numbers_of_one_device(tuned: str) -> None:
    found = run_on_eight_devices("tests.training.test_objective", tuned)
    for name in MESHES:
        np.testing.assert_allclose(found[name], found["one"], rtol=3e-5, atol=1e-6, err_msg=name)


if __name__ == "__main__":
    every = {"one": {"data": 1}} | MESHES
    print(json.dumps({name: results(sizes, 1, sys.argv[1]) for name, sizes in every.items()}))
