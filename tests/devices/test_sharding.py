"""The mesh and its table; and that training on eight devices, however laid out, is training on one."""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from llama_jax.checkpoint import Checkpoint
from llama_jax.config import MeshArgs, ModelArgs, SampleArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.devices.sharding import (
    RULES,
    batch_sharding,
    check_divisible,
    describe,
    make_mesh,
    mesh_axes_of,
    on_mesh,
    parameter_shardings,
    spec,
)
from llama_jax.errors import UserError
from llama_jax.generation.decode import decode_chunk, empty_state
from llama_jax.generation.sampling import make_sampler
from llama_jax.generation.serving import generation_shapes
from llama_jax.model import Llama
from llama_jax.training.step import batch_shapes, compile_train_step, make_optimizer
from tests.eight_devices import run_on_eight_devices

MODEL = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=96, multiple_of=32, max_seq_len=32)
TRAIN = TrainArgs(batch_size=16)


def abstract_mesh(**sizes: int) -> Any:
    """What check_divisible looks at in a mesh: its shape."""
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | sizes
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


def test_an_unknown_logical_axis_is_told() -> None:
    with pytest.raises(UserError, match="embeddings"):
        mesh_axes_of("embeddings")
    with pytest.raises(UserError, match="embeddings"):
        spec("batch", "embeddings")


@pytest.mark.parametrize(
    "axes", [("batch", "embed"), ("heads", "mlp"), ("vocab", "kv_heads"), ("length", None, "length")]
)
def test_a_mesh_axis_used_twice_is_told(axes: tuple[str | None, ...]) -> None:
    with pytest.raises(UserError, match="each mesh axis once"):
        spec(*axes)


def test_a_spec_is_the_tables() -> None:
    assert spec("batch", "length", None) == PartitionSpec(("data", "fsdp"), ("sequence",), None)
    assert spec("layers", "embed", "heads", "head_dim") == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert spec() == PartitionSpec()


def test_every_rule_names_axes_of_the_mesh() -> None:
    known = set(make_mesh(MeshArgs(data=1), jax.devices()[:1]).axis_names)
    assert known == {"data", "fsdp", "tensor", "sequence"}
    assert {axis for name in RULES for axis in mesh_axes_of(name)} == known


def test_one_device_is_a_mesh_of_ones() -> None:
    mesh = make_mesh(MeshArgs(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert describe(dict(mesh.shape)) == "one device"
    assert describe({"data": 2, "fsdp": 1, "tensor": 4}) == "data 2 x tensor 4"
    shardings = jax.tree.leaves(parameter_shardings(Llama(MODEL), mesh))
    assert len(shardings) == 12 and all(s.is_fully_replicated for s in shardings)


@pytest.mark.parametrize("sizes", [{"data": 2}, {"tensor": 3}, {"data": 1, "fsdp": 2}])
def test_sizes_that_do_not_make_up_the_devices_are_told(sizes: dict[str, int]) -> None:
    with pytest.raises(
        UserError, match=rf"^mesh: .*1 devices.*, or give --mesh\.{max(sizes, key=lambda name: sizes[name])}$"
    ):
        make_mesh(MeshArgs(**sizes), jax.devices()[:1])


@pytest.mark.parametrize(
    ("sizes", "key", "found"),
    [
        ({"data": 3}, "train.batch_size", 16),
        ({"data": 4, "fsdp": 8}, "train.batch_size", 16),
        ({"sequence": 5}, "model.max_seq_len", 32),
        ({"tensor": 5}, "model.vocab_size", 96),
        ({"tensor": 32}, "model.n_heads", 8),
        ({"tensor": 4}, "model.n_kv_heads", 2),
    ],
)
def test_a_size_that_does_not_divide_names_its_key(sizes: dict[str, int], key: str, found: int) -> None:
    with pytest.raises(UserError, match=f"^{key}.* found {found}") as caught:
        check_divisible(abstract_mesh(**sizes), MODEL, TRAIN)
    assert "\n" not in str(caught.value)


def test_the_width_must_divide_over_fsdp_and_the_feed_forward_over_tensor() -> None:
    with pytest.raises(UserError, match=r"^model.dim.*mesh.fsdp = 128"):
        check_divisible(abstract_mesh(fsdp=128), MODEL, TrainArgs(batch_size=128))
    odd = ModelArgs(dim=64, n_heads=8, vocab_size=96, multiple_of=1, max_seq_len=32, ffn_dim_multiplier=0.9)
    assert odd.hidden_width % 2 == 1
    with pytest.raises(UserError, match=f"feed-forward width.* found {odd.hidden_width}"):
        check_divisible(abstract_mesh(tensor=2), odd, TRAIN)


def test_a_part_of_an_accumulated_batch_must_divide() -> None:
    mesh = abstract_mesh(data=8)
    check_divisible(mesh, MODEL, TrainArgs(batch_size=16, gradient_accumulation_steps=2))
    with pytest.raises(UserError, match=r"train.gradient_accumulation_steps.* found 4"):
        check_divisible(mesh, MODEL, TrainArgs(batch_size=16, gradient_accumulation_steps=4))


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"sequence": 2, "data": 4}])
def test_what_divides_passes(sizes: dict[str, int]) -> None:
    check_divisible(abstract_mesh(**sizes), MODEL, TRAIN)


MESHES = {
    "one device": {"data": 1},
    "data 8": {"data": 8},
    "fsdp 8, 2 parts": {"fsdp": 8, "data": 1, "parts": 2},
    "tensor 2 x fsdp 4": {"tensor": 2, "fsdp": 4, "data": 1},
    "sequence 2 x data 4": {"sequence": 2, "data": 4},
}
FEW = [name for name in MESHES if name != "data 8"]  # each axis is in one of them

STEPS = 30


class Trainer:
    """A compiled step on a mesh, and the batches for it: ``STEPS`` and one more."""

    def __init__(self, sizes: dict[str, int]):
        from llama_jax.training.step import compile_train_step, make_optimizer

        sizes = dict(sizes)
        parts = sizes.pop("parts", 1)
        self.mesh = make_mesh(MeshArgs(**sizes), jax.devices()[: 1 if sizes == {"data": 1} else 8])
        check_divisible(self.mesh, MODEL, TRAIN)
        args = TrainArgs(lr=1e-2, warmup_steps=1, eps=1e-3)
        self.model, self.optimizer = Llama(MODEL), make_optimizer(args, STEPS + 1)
        self.batches = [self.batch(seed) for seed in range(STEPS + 1)]
        self.step = compile_train_step(self.model, self.optimizer, self.mesh, parts, self.batches[0])

    def batch(self, seed: int) -> Any:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(MODEL.vocab_size, size=(16, 33)).astype(np.int32)
        weights = (np.arange(32) < rng.integers(1, 33, size=(16, 1))).astype(np.float32)
        return jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], weights), batch_sharding(self.mesh))

    def train(self, folder: Path) -> dict[str, Any]:
        """Losses, norms of the gradients, the parameters' fingerprint after three steps, shards; and a checkpoint."""
        from llama_jax.training.step import init_state

        state = init_state(self.model, self.optimizer, self.mesh, seed=0)
        losses, norms, fingerprint = [], [], {}
        for i, batch in enumerate(self.batches[:STEPS]):
            state, metrics = self.step(state, batch)
            losses.append(float(metrics.loss))
            norms.append(float(metrics.grad_norm))
            if i == 2:
                fingerprint = {name: np.asarray(leaf).ravel()[::37].tolist() for name, leaf in named(state.params)}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "params", state.params)
            checkpointer.save(folder / "state", state.opt_state)
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        shards = {name: leaf.addressable_shards[0].data.shape for name, leaf in named(state.params)}
        share = sum(leaf.addressable_shards[0].data.size for leaf in moments) / sum(leaf.size for leaf in moments)
        return {"losses": losses, "norms": norms, "params": fingerprint, "shards": shards, "moments": share}

    def resume(self, folder: Path) -> tuple[float, float]:
        """Loss and norm of the step that follows a checkpoint."""
        from llama_jax.training.step import TrainState, state_shapes

        shapes = state_shapes(self.model, self.optimizer, self.mesh)
        saved = Checkpoint(folder, MODEL, tokenizer=None)  # type: ignore[arg-type]
        state = TrainState(saved.restore("params", shapes.params), saved.restore("state", shapes.opt_state))
        _, metrics = self.step(state, self.batches[STEPS])
        return float(metrics.loss), float(metrics.grad_norm)


def named(params: Any) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [("/".join(key.key for key in path), leaf) for path, leaf in leaves]


def train_on(names: list[str], every_pair: bool, folder: Path) -> dict[str, Any]:
    """What Trainer says of each mesh, and of each resuming what the one before it, or each, has saved."""
    trainers = {name: Trainer(MESHES[name]) for name in names}
    found = {name: trainer.train(folder / name) for name, trainer in trainers.items()}
    for before, (name, trainer) in zip([names[-1], *names], trainers.items(), strict=False):
        found[name]["resumed"] = [trainer.resume(folder / other) for other in (names if every_pair else [before])]
    return found


def test_the_programs_of_one_device_gather_and_sum_over_no_other() -> None:
    """A collective of one device is a copy: the embeddings' cost a third of a decoding step on a CPU."""
    mesh, model = make_mesh(MeshArgs(data=1), jax.devices()[:1]), Llama(MODEL)
    batch = batch_shapes(TrainArgs(batch_size=2), MODEL, mesh)
    step = compile_train_step(model, make_optimizer(TRAIN, 10), mesh, 1, batch)
    with on_mesh(mesh):
        params = generation_shapes(model, "auto")
        sampler = make_sampler([([1], SampleArgs(), 0)], MODEL.vocab_size)
        state = jax.eval_shape(lambda: empty_state(model, sampler, np.zeros(1, np.int32), 16, np.float32))
        decoding = decode_chunk.lower(model, params, state, 2, 16).compile()
    for program in (step, decoding):
        assert not re.findall(r" = .* ((?:all|collective|reduce-scatter)[\w-]*)\(", program.as_text())


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What train_on says of few meshes or of all, in a process with eight devices."""
    return run_on_eight_devices("tests.devices.test_sharding", request.param)


def test_thirty_steps_on_eight_devices_equal_those_on_one(trained: dict[str, Any]) -> None:
    one = trained["one device"]
    assert len(set(one["losses"])) == len(one["losses"]) == STEPS and len(trained) >= len(FEW)
    for eight in trained.values():
        for steps, rel in ((5, 1e-5), (STEPS, 1e-4)):
            assert eight["losses"][:steps] == pytest.approx(one["losses"][:steps], rel=rel)
            assert eight["norms"][:steps] == pytest.approx(one["norms"][:steps], rel=10 * rel)
        for name, values in one["params"].items():
            assert eight["params"][name] == pytest.approx(values, abs=2e-5), name


def test_a_checkpoint_of_any_mesh_is_resumed_on_any_other(trained: dict[str, Any]) -> None:
    """Each on the next one; of all meshes, each on each."""
    loss, norm = trained["one device"]["resumed"][0]
    assert loss not in trained["one device"]["losses"]
    for found in trained.values():
        assert len(found["resumed"]) == (1 if len(trained) == len(FEW) else len(MESHES))
        for step in found["resumed"]:
            assert step == [pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3)]


def test_parameters_and_moments_lie_in_shards_as_the_table_says(trained: dict[str, Any]) -> None:
    whole = trained["one device"]["shards"]
    L, D, N, K, H, F, V = 2, 64, 8, 2, 8, MODEL.hidden_width, 96
    assert whole["layers/attention/wq"] == [L, D, N, H]
    for name in trained.keys() & {"data 8", "sequence 2 x data 4"}:
        assert trained[name]["shards"] == whole and trained[name]["moments"] == 1.0
    fsdp = trained["fsdp 8, 2 parts"]["shards"]
    assert fsdp["layers/attention/wq"] == [L, D // 8, N, H]
    assert fsdp["layers/attention/wo"] == [L, N, H, D // 8]
    assert fsdp["output"] == [D // 8, V]
    assert fsdp["norm"] == [D]
    assert trained["fsdp 8, 2 parts"]["moments"] < 0.13
    both = trained["tensor 2 x fsdp 4"]["shards"]
    assert both["tok_embeddings"] == [V // 2, D // 4]
    assert both["layers/attention/wq"] == [L, D // 4, N // 2, H]
    assert both["layers/attention/wk"] == [L, D // 4, K // 2, H]
    assert both["layers/feed_forward/w1"] == [L, D // 4, F // 2]
    assert both["layers/feed_forward/w2"] == [L, F // 2, D // 4]
    assert trained["tensor 2 x fsdp 4"]["moments"] < 0.13


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        names = FEW if sys.argv[1] == "few" else list(MESHES)
        print(json.dumps(train_on(names, sys.argv[1] == "all", Path(folder))))
