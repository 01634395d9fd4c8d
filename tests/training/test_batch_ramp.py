"""Batches that grow: which sequences each step reads, the same however often a run stops, and what a run says of it."""

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.config import Config, DataArgs, MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batch_sizes import BatchSizes, with_size
from llama_jax.data.batches import train_batches, train_windows
from llama_jax.data.mixture import Mixed, Schedule
from llama_jax.errors import UserError
from llama_jax.plan.settings import Epoch, run_tokens
from llama_jax.training import loop, samples
from tests.eight_devices import run_on_eight_devices
from tests.training.test_resuming import assert_same, records, write_text

MODEL = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
RUN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=8, batch_size=8, batch_start=2, batch_ramp_steps=5, eval_interval=8, eval_iters=1,
    log_interval=1, save_interval=1, keep=9,
)  # fmt: skip
# Two doublings in five steps: the first is after step 3 (of 2.5), the second after step 5.
SIZES = [2, 2, 2, 4, 4, 8, 8, 8]


@pytest.fixture(autouse=True, scope="module")
def undrawn() -> Iterator[None]:
    """Runs are not drawn here, nor do they tell samples, which these tests are not about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "show", lambda *_: 0)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        yield


def train(folder: Path, mesh: MeshArgs = MeshArgs(), **changes: Any) -> str:
    """What a run in ``folder`` prints; its text lies beside it."""
    args = dataclasses.replace(RUN, save_dir=str(folder), **changes)
    data = DataArgs(str(write_text(folder.parent)), vocab_size=280)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        loop.train(Config(MODEL, data, args, mesh=mesh))
    return out.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(folder)


@pytest.mark.parametrize(("start", "size", "ramp"), [(2, 8, 5), (1, 16, 4), (4, 8, 100), (3, 48, 33), (0, 7, 0)])
def test_sizes_double_until_the_batch_is_whole(start: int, size: int, ramp: int) -> None:
    sizes = BatchSizes(size, start, ramp)
    each = [sizes.size_of(step) for step in range(1, ramp + 20)]
    assert each[0] == (start or size) and each[ramp:] == [size] * (len(each) - ramp)
    assert all(after in (before, 2 * before) for before, after in itertools.pairwise(each))
    lengths = [each[:ramp].count(one) for one in set(each[:ramp])]
    assert not ramp or (max(lengths) - min(lengths) <= 1 and each[ramp - 1] < size)
    for step in range(len(each)):
        rows = sum(each[:step])
        assert sizes.rows(step) == rows and sizes.steps(rows) == step and sizes.steps(rows + 1) == step + 1
        stages = sizes.between(step, len(each))
        assert [stage.size for stage in stages] == list(dict.fromkeys(each[step:]))
        assert all(stage.row == sum(each[: stage.step]) for stage in stages) and stages[0].step == step


def read(source: Any, sizes: BatchSizes, start: int, stop: int) -> np.ndarray:
    """The inputs that steps ``start`` + 1 to ``stop`` read, in the order in which a run reads them."""
    stages, rows = sizes.between(start, stop), []
    for stage, end in zip(stages, [*(stage.step for stage in stages[1:]), stop], strict=True):
        rows += [b.inputs for b in train_batches(source, stage.size, 8, 5, stage.step, end, before=stage.row)]
    return np.concatenate(rows)


def test_the_sequences_of_a_run_are_those_of_one_without_a_ramp_in_the_same_order() -> None:
    sizes, ids = BatchSizes(8, 2, 5), np.arange(160, dtype=np.uint16)
    count = sizes.rows(20)
    expected = np.concatenate([batch.inputs for batch in train_batches(ids, 1, 8, 5, 0, count)])
    for start in (0, 2, 3, 4, 5, 9):
        np.testing.assert_array_equal(read(ids, sizes, start, 20), expected[sizes.rows(start) :])
    assert train_windows(ids, sizes, 8, 5, 4)[""].size == 10 and train_windows(ids, sizes, 8, 5, 6)[""].size == 20
    first = read(ids, sizes, 0, sizes.steps(20))[:20]  # an epoch
    assert len({row.tobytes() for row in first}) == 20 and len(np.unique(first)) == 160


def test_a_mixture_keeps_its_place_in_each_source_when_weights_change_within_the_ramp() -> None:
    sizes = BatchSizes(8, 2, 5)
    streams = {"a": np.arange(160, dtype=np.uint16), "b": np.arange(1000, 1240, dtype=np.uint16)}
    schedule = Schedule.of(Schedule.of([], {"a": 0.75, "b": 0.25}, 0, sizes).to_list(), {"a": 0.5, "b": 0.5}, 4, sizes)
    found = read(Mixed(streams, schedule), sizes, 0, 7)
    of_b = found[:, 0] >= 1000
    assert len(found) == 30 and of_b[:10].sum() in (2, 3) and of_b[10:].sum() == 10
    assert schedule.rows_before(4) == {"a": int((~of_b[:10]).sum()), "b": int(of_b[:10].sum())}
    assert schedule.rows_before(7) == {"a": int((~of_b).sum()), "b": int(of_b.sum())}
    np.testing.assert_array_equal(read(Mixed(streams, schedule), sizes, 3, 7), found[6:])


def test_tokens_and_what_the_run_announces_count_the_smaller_batches(whole: tuple[Path, str]) -> None:
    folder, text = whole
    found = records(folder)
    assert [record["tokens"] for record in found] == np.cumsum([16 * size for size in SIZES]).tolist()
    assert "8 steps of 32 to 128 tokens" in text
    assert "batch  sequences a step: 2 from step 1, 4 from step 4, 8 from step 6" in text
    assert "batch  3 programs to compile" in text and "3 sizes of the step compiled" in text


@pytest.mark.parametrize("step", [2, 3, 4, 7])
def test_a_run_that_stops_within_the_ramp_goes_on_bit_for_bit(
    whole: tuple[Path, str], step: int, tmp_path: Path
) -> None:
    run = shutil.copytree(whole[0], tmp_path / "run")
    text = train(run, resume_step=step)
    left = len(set(SIZES[step:]))
    assert f"{left} program{'s' * (left > 1)} to compile" in text
    assert_same(whole[0], run)


def test_microbatches_keep_their_shape_and_the_losses_are_the_same(whole: tuple[Path, str], tmp_path: Path) -> None:
    assert [with_size(dataclasses.replace(RUN, gradient_accumulation_steps=2), n).gradient_accumulation_steps for n in (2, 4, 8)] == [1, 1, 2]  # fmt: skip
    text = train(tmp_path / "run", gradient_accumulation_steps=4)
    assert "batch  microbatches a step: 1, 2, 4" in text
    losses = ([record["train_loss"] for record in records(folder)] for folder in (whole[0], tmp_path / "run"))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_an_epoch_has_as_many_steps_as_its_sequences_need(tmp_path: Path) -> None:
    train(tmp_path / "run", max_steps=None, log_interval=1000, save_interval=1000, eval_interval=1000)
    last = records(tmp_path / "run")[-1]
    manifest = json.loads((tmp_path / "run" / "tokens" / "manifest.json").read_text())
    windows = -(-manifest["tokens"]["train"] // 16)
    assert windows <= last["tokens"] // 16 < windows + 8
    assert last["step"] == 5 + -(-(windows - 14) // 8)


def test_another_ramp_is_refused_on_resume(whole: tuple[Path, str]) -> None:
    for name, value in (("batch_start", 4), ("batch_ramp_steps", 6)):
        with pytest.raises(UserError, match=f"train.{name}: expected {getattr(RUN, name)}, with which the run"):
            train(whole[0], **{name: value})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_start": 0}, "train.batch_ramp_steps: expected train.batch_start beside it"),
        ({"batch_start": 3}, "train.batch_start: expected train.batch_size = 8 divided by 2, 4, 8"),
        ({"batch_start": 8}, "train.batch_start: expected train.batch_size = 8 divided"),
        ({"batch_start": 16}, "train.batch_start: expected train.batch_size = 8 divided"),
        ({"batch_start": 1, "batch_ramp_steps": 2}, "train.batch_ramp_steps: expected at least 3"),
        ({"batch_size": 12, "batch_start": 6, "gradient_accumulation_steps": 3}, "the 4 sequences of a microbatch"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused_in_one_line(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(RUN, **changes).check()
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_plan_counts_the_tokens_of_a_run_with_a_ramp() -> None:
    config = Config(MODEL, train=RUN)
    assert run_tokens(config).value == 16 * sum(SIZES)
    of_epochs = Config(MODEL, train=dataclasses.replace(RUN, max_steps=None, n_epochs=2))
    epoch = Epoch(rows=20, records=None, most_pairs=1, source="a text")
    assert epoch.steps(of_epochs, 2) == 5 + 4 and epoch.steps(of_epochs) == 6  # 14 sequences in the ramp, then 26 or 6
    assert run_tokens(of_epochs, known=(epoch, "")).value == 16 * (14 + 4 * 8)


def test_epochs_are_as_many_steps_as_their_sequences_fill() -> None:
    config = Config(MODEL, train=TrainArgs(batch_size=8))
    epoch = Epoch(rows=9, records=None, most_pairs=1, source="a text")
    assert [epoch.steps(config, epochs) for epochs in (1, 2, 3, 8)] == [2, 3, 4, 9]


MESHES = {"fsdp": MeshArgs(data=1, fsdp=2, tensor=2, sequence=2), "data": MeshArgs(data=2, tensor=2, sequence=2)}


@pytest.mark.parametrize("mesh", ["fsdp", pytest.param("data", marks=pytest.mark.slow)])
def test_every_mesh_has_the_same_losses_and_a_batch_that_it_does_not_divide_is_refused(
    mesh: str, whole: tuple[Path, str], tmp_path: Path
) -> None:
    found = run_on_eight_devices("tests.training.test_batch_ramp", mesh, str(tmp_path))
    one = [record["train_loss"] for record in records(whole[0])]
    np.testing.assert_allclose(found["losses"], one, rtol=5e-4)
    assert found["refusal"] == (
        "train.batch_start: expected a multiple of mesh.data x mesh.fsdp = 4, found 2; change one of them"
    )


def on_eight_devices(mesh: str, folder: Path) -> dict[str, Any]:
    """The losses on a mesh, and the refusal of another."""
    train(folder / "spread", MESHES[mesh])
    losses = [record["train_loss"] for record in records(folder / "spread")]
    try:
        train(folder / "refused", MeshArgs(data=2, fsdp=2, tensor=2))
    except UserError as error:
        return {"losses": losses, "refusal": str(error)}
    return {}


if __name__ == "__main__":
    import sys

    samples.show, samples.draw_losses = (lambda *_: 0), (lambda *_: None)  # type: ignore[assignment]
    print(json.dumps(on_eight_devices(sys.argv[1], Path(sys.argv[2]))))
