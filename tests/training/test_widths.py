"""Rates by width: each kind of parameter takes its own rate, and a step changes models of all widths about as much."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.training.pieces import InPieces
from llama_jax.training.rates import learning_rate
from llama_jax.training.step import compile_train_step, init_state, make_optimizer
from llama_jax.training.widths import by_width, rate_factors
from tests.eight_devices import run_on_eight_devices
from tests.training.test_resuming import MODEL as RUN_MODEL
from tests.training.test_resuming import assert_same, records, train, undrawn  # noqa: F401

MODEL = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, multiple_of=8, max_seq_len=16, attention_bias=True
)
LLAMA = Llama(MODEL)
# Chosen at an eighth of the width.
EIGHTH = 8**-1.125
ARGS = TrainArgs(
    lr=1e-2, rate_width=4, warmup_steps=2, max_steps=10, batch_size=8, eps=1e-3, weight_decay=0.3, grad_clip=0.5
)
PLAIN = dataclasses.replace(ARGS, rate_width=None)
MESH = make_mesh(MeshArgs(data=1), jax.devices()[:1])
EXTRA: dict[str, Any] = {"loss": jnp.ones(()), "grad_norm": jnp.ones(())}
MATRICES = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}


def batch(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(MODEL.vocab_size, size=(8, 17)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 16), np.float32))


def factor(path: Any, matrices: float, tied: bool = False) -> float:
    """What the rate of a parameter is multiplied by, said once more."""
    name = path[-1].key
    if name in MATRICES:
        return matrices
    return EIGHTH if name == "output" or (tied and name == "tok_embeddings") else 1.0


@functools.cache
def params_of(tied: bool = False) -> Any:
    model = Llama(dataclasses.replace(MODEL, tie_embeddings=tied))
    return init_state(model, make_optimizer(PLAIN, 10), MESH, seed=0).params


def gradients(seed: int, params: Any) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


@functools.cache
def change(args: TrainArgs, tied: bool) -> Any:
    """What the second of two updates by random gradients changes of parameters that are zero."""
    params, optimizer = jax.tree.map(jnp.zeros_like, params_of(tied)), make_optimizer(args, 10)
    state, norm = optimizer.init(params), {"loss": jnp.ones(()), "grad_norm": jnp.float32(30.0)}
    step = jax.jit(optimizer.apply if isinstance(optimizer, InPieces) else optimizer.update)
    for seed in range(2):
        found, state = step(gradients(seed, params), state, params, **norm)[:2]
    return found


KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({}, EIGHTH),
    "muon": ({"optimizer": "muon"}, 8**-0.5),
    "adafactor": ({"optimizer": "adafactor"}, EIGHTH),
    "int8 moments": ({"moments": "int8"}, EIGHTH),
}


@pytest.mark.parametrize("tied", [False, True], ids=["an output matrix", "tied embeddings"])
@pytest.mark.parametrize("name", KINDS)
def test_the_update_of_each_parameter_is_its_kinds_share_of_the_one_at_lr(name: str, tied: bool) -> None:
    settings, matrices = KINDS[name]
    expected = change(dataclasses.replace(PLAIN, **settings), tied)
    found = change(dataclasses.replace(ARGS, **settings), tied)

    def check(path: Any, ours: jax.Array, whole: jax.Array) -> None:
        assert np.abs(whole).max() > 0
        np.testing.assert_allclose(ours, factor(path, matrices, tied) * whole, rtol=1e-6, atol=1e-9, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, found, expected)


def test_five_steps_are_those_of_an_adamw_for_each_kind_whose_decay_is_that_of_lr() -> None:
    """Optax's own, each with its rate, and a decay that makes up for it: clipping is over all kinds together."""

    def adamw(share: float, decay: float) -> optax.GradientTransformation:
        def rate(count: jax.Array) -> jax.Array:
            return share * learning_rate(ARGS, 10)(count + 1)  # type: ignore[return-value]

        return optax.adamw(rate, b1=ARGS.beta1, b2=ARGS.beta2, eps=ARGS.eps, weight_decay=decay / share)

    def label(path: Any, _: Any) -> str:
        name = path[-1].key
        if "norm" in name or "bias" in name:
            return "vectors"
        return "embeddings" if name == "tok_embeddings" else "narrower"

    decay = ARGS.weight_decay
    each = {"vectors": adamw(1.0, 0.0), "embeddings": adamw(1.0, decay), "narrower": adamw(EIGHTH, decay)}
    theirs = optax.chain(
        optax.clip_by_global_norm(ARGS.grad_clip),
        optax.partition(each, jax.tree_util.tree_map_with_path(label, params_of())),
    )
    ours: Any = make_optimizer(ARGS, 10)
    found, expected = params_of(), params_of()
    state, other = ours.init(found), theirs.init(expected)
    update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
    for seed in range(5):
        grads = gradients(seed, found)
        updates, state = update(grads, state, found, **EXTRA)
        found = optax.apply_updates(found, updates)
        updates, other = their_update(grads, other, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_a_rate_that_was_chosen_at_the_models_own_width_is_everyones_bit_for_bit() -> None:
    own = dataclasses.replace(ARGS, rate_width=MODEL.dim)
    assert set(rate_factors(own, MODEL.dim).values()) == {1.0} == set(rate_factors(PLAIN, 7).values())
    for settings, _ in KINDS.values():
        found, expected = (change(dataclasses.replace(args, **settings), False) for args in (own, PLAIN))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_without_a_width_the_optimizer_is_as_it_was_and_its_state_has_one_form() -> None:
    adam = optax.scale_by_adam()
    assert by_width(adam, PLAIN) is adam
    for settings, _ in KINDS.values():
        with_it, without = (
            jax.eval_shape(make_optimizer(dataclasses.replace(args, **settings), 10).init, params_of())
            for args in (ARGS, PLAIN)
        )
        assert with_it == without


def test_accumulation_equals_the_whole_batch() -> None:
    def after(accumulation: int) -> Any:
        optimizer = make_optimizer(ARGS, 10)
        step, state = compile_train_step(LLAMA, optimizer, MESH, accumulation, batch(0)), None
        state = init_state(LLAMA, optimizer, MESH, seed=0)
        for seed in range(3):
            state, _ = step(state, batch(seed))
        return state.params

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after(4), after(1))


def change_of_logits(width: int, rate_width: int | None) -> float:
    """The root mean square by which four steps on a batch change the logits of a model of some width."""
    args = TrainArgs(lr=4e-3, rate_width=rate_width, warmup_steps=0, batch_size=8, eps=1e-10, schedule="linear")
    model = Llama(dataclasses.replace(MODEL, dim=width, n_heads=width // 8, n_kv_heads=width // 8))
    optimizer, one = make_optimizer(args, 1000), batch(0)
    state = init_state(model, optimizer, MESH, seed=0)
    before = model.apply({"params": state.params}, one.inputs)
    step = compile_train_step(model, optimizer, MESH, 1, one)
    for _ in range(4):
        state, _ = step(state, one)
    after = model.apply({"params": state.params}, one.inputs)
    return float(jnp.sqrt(jnp.mean((after - before) ** 2)))


def test_steps_change_the_logits_of_a_wide_model_about_as_much_as_of_a_narrow_one() -> None:
    narrow = change_of_logits(16, None)
    assert change_of_logits(128, 16) < 1.6 * narrow
    assert change_of_logits(128, None) > 3 * narrow, "one rate for all kinds changes a wide model more"


def test_a_run_says_its_rates_resumes_bit_for_bit_and_says_another_width(tmp_path: Path) -> None:
    said = train(tmp_path / "whole", rate_width=4)
    assert "rates  matrices x0.21, embeddings x1, output x0.21, norms x1, for width 16; " in said
    assert "the learning rate was chosen at width 4" in said
    train(tmp_path / "run", rate_width=4, max_steps=8)
    train(tmp_path / "run", rate_width=4, resume_step=4)
    assert_same(tmp_path / "run", tmp_path / "whole")
    train(tmp_path / "plain")
    assert "rates  " not in train(tmp_path / "plain", max_steps=9)
    losses = [[r["train_loss"] for r in records(tmp_path / name)] for name in ("whole", "plain")]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]
    assert "changed  train.rate_width 4 -> None" in train(tmp_path / "whole", max_steps=9)
    assert RUN_MODEL.dim == 16


def test_adapters_are_refused_beside_a_width() -> None:
    config = Config(train=TrainArgs(rate_width=128, init_from="base"), lora=LoraArgs(rank=4))
    with pytest.raises(
        UserError, match=r"^train.rate_width: expected none beside lora.rank, .*found 128; leave it out"
    ):
        config.check()


MESHES = {"one device": {"data": 1}, "fsdp 4 x tensor 2": {"data": 1, "fsdp": 4, "tensor": 2}}


def train_on_meshes() -> dict[str, list[float]]:
    found = {}
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshArgs(**sizes), jax.devices()[: 1 if name == "one device" else 8])
        optimizer, losses = make_optimizer(ARGS, 10), []
        step = compile_train_step(LLAMA, optimizer, mesh, 1, jax.device_put(batch(0), batch_sharding(mesh)))
        state = init_state(LLAMA, optimizer, mesh, seed=0)
        for i in range(10):
            state, metrics = step(state, jax.device_put(batch(i % 2), batch_sharding(mesh)))
            losses.append(float(metrics.loss))
        found[name] = losses
    return found


def test_a_mesh_has_the_losses_of_one_device() -> None:
    one, many = run_on_eight_devices("tests.training.test_widths").values()
    assert one[-1] < one[0]
    np.testing.assert_allclose(many, one, rtol=2e-4)


if __name__ == "__main__":
    print(json.dumps(train_on_meshes()))
