"""Jobs of several processes: the numbers of one, whatever the mesh; how they stop, end, and refuse."""

import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.checkpoint import steps_of
from llama_jax.config import DistributedArgs
from llama_jax.data.batches import OwnRows, Windows, eval_batches, train_batches
from llama_jax.devices import distributed
from llama_jax.devices.distributed import start_job
from llama_jax.devices.sharding import _grid
from llama_jax.errors import UserError
from tests import processes
from tests.jax_internals import cloud_tpu_cluster
from tests.processes import end, flags, start
from tests.survival import KILLED, same, survive, survived

# Processes, devices of each, mesh. More meshes: tests/devices/test_sharding.py. Each goes on from where the one before it stopped.
LAYOUTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "4 processes": (4, 1, {"data": 1, "fsdp": 4}),
    "8 devices": (1, 8, {"data": 1, "tensor": 2, "fsdp": 4}),
    "one device": (1, 1, {}),
    "2 processes": (2, 2, {"data": 2, "fsdp": 2}),
}
FEW = ["one device", "2 processes"]
STEPS, MORE = 30, 3


def train_several(runs: list[list[str]]) -> None:
    """train.py, once for each list of arguments, in this process; without its picture, which takes longer than the steps."""
    from llama_jax.commands import train
    from llama_jax.training import samples

    samples.draw_losses = lambda run: None
    job = sys.argv[2:]
    for argv in runs:
        sys.argv = ["train.py", *argv, *job]
        train(sys.argv[1:])


def argv_of(folder: Path, name: str, steps: int) -> list[str]:
    mesh = {f"mesh__{axis}": size for axis, size in LAYOUTS[name][2].items()}
    return flags(**mesh, train__save_dir=folder / name, train__max_steps=steps)


@dataclass(frozen=True)
class Trained:
    """Records of each layout's run, and of the steps that it made from the checkpoint of the one before it (the first: of the last)."""

    runs: dict[str, list[dict[str, Any]]]
    resumed: dict[str, list[dict[str, Any]]]


@pytest.fixture(
    scope="module", params=[FEW, pytest.param(list(LAYOUTS), marks=pytest.mark.slow)], ids=lambda names: f"{len(names)}"
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("layouts")
    resumed = folder / "resumed"

    def records(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    names = request.param
    for before, name in zip([None, *names], [*names, names[0]], strict=True):
        runs = [] if (folder / name).exists() else [argv_of(folder, name, STEPS)]
        if before:
            shutil.copytree(folder / before, resumed / name)
            runs.append(argv_of(resumed, name, STEPS + MORE))
        count, devices, _ = LAYOUTS[name]
        for ended in end(start(["-m", "tests.devices.test_distributed", json.dumps(runs)], count, devices)):
            assert ended.status == 0, ended.err[-3000:]
    return Trained(
        {name: records(folder / name) for name in names},
        {name: records(resumed / name)[STEPS:] for name in names},
    )


def assert_same_numbers(records: list[dict[str, Any]], others: list[dict[str, Any]], tolerance: float) -> None:
    assert [r["step"] for r in records] == [r["step"] for r in others]
    for key, rel in (("train_loss", tolerance), ("grad_norm", 10 * tolerance)):
        assert [r[key] for r in records] == pytest.approx([r[key] for r in others], rel=rel), key


def test_thirty_steps_have_the_numbers_of_one_device_on_any_processes(trained: Trained) -> None:
    one = trained.runs["one device"]
    assert len(one) == STEPS and one[-1]["train_loss"] < 0.75 * one[0]["train_loss"] and len(trained.runs) > 1
    for other in trained.runs.values():
        assert_same_numbers(other[:5], one[:5], 1e-5)
        assert_same_numbers(other, one, 1e-4)


def test_what_stopped_on_some_processes_goes_on_on_others_with_the_same_batches(trained: Trained) -> None:
    first, *others = trained.resumed.values()
    assert len(first) == MORE and first[-1]["step"] == STEPS + MORE and others
    for other in others:
        assert_same_numbers(other, first, 1e-4)


def step_of(folder: Path) -> int:
    """The newest step in metrics.jsonl; 0 before the first."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(folder: Path, step: int, job: list[Any]) -> None:
    deadline = time.monotonic() + 120
    while step_of(folder) < step:
        assert time.monotonic() < deadline and all(p.poll() is None for p in job), [p.communicate() for p in job]
        time.sleep(0.02)


def test_a_signal_to_one_process_stops_all_at_the_same_step_saved_and_the_loss_of_one_ends_the_others(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    argv = ["train.py", *flags(train__save_dir=folder, train__max_steps=100_000,
                               train__save_interval=100_000)]  # fmt: skip
    reached = 0
    for number, to, status, said in ((signal.SIGTERM, 1, 75, "SIGTERM"), (signal.SIGINT, 0, 130, "Ctrl-C")):
        job = start(argv, 2, fork=False)
        wait_for_step(folder, reached + 5, job)
        job[to].send_signal(number)
        main, other = end(job)
        assert (main.status, other.status) == (status, status), (main.err, other.err)
        (line,) = [line for line in main.out.splitlines() if line.startswith("stopped by ")]
        reached = step_of(folder)
        assert line.startswith(f"stopped by {said} at step {reached:,}, saved")
        assert steps_of(folder)[-1] == reached
        assert (main.err, other.err, other.out) == ("", "", ""), (
            "nothing but errors goes there, and process 0 alone prints"
        )

    job = start(argv, 2, fork=False)
    wait_for_step(folder, reached + 5, job)
    job[1].kill()
    (main,) = end(job[:1], 110)
    assert main.status == 76
    assert "lost another" in main.err.splitlines()[-1] and "Traceback" not in main.err


@pytest.mark.slow
def test_a_run_survives_kills_of_its_processes_bit_for_bit(tmp_path: Path) -> None:
    figures = survive(tmp_path, kills=6, seed=0, notice_seconds=2)
    assert figures["kills"] == 6 and survived(figures), json.dumps(figures)
    assert figures["kills that left a checkpoint"], json.dumps(figures)


def test_what_a_run_did_not_survive_is_seen() -> None:
    good = {f"same {what}": True for what in ("metrics", "parameters", "optimizer state")}
    good |= {"newest checkpoints that could not be read": False, "exit statuses of those not killed": [76, KILLED]}
    assert survived(good) and not survived(good | {"exit statuses of those not killed": [76, 2]})
    assert not any(survived(good | {key: not value}) for key, value in good.items() if isinstance(value, bool))
    zero, other = ({"mu": np.array([value, np.nan], np.float32)} for value in (0.0, -0.0))
    assert same(zero, zero) and not same(zero, other) and not same({}, {}) and not same(zero, zero | {"nu": zero["mu"]})


def test_who_waits_in_vain_says_where_and_for_whom() -> None:
    def waiting(address: str, **seconds: int) -> list[Any]:
        common = [f"--distributed.coordinator-address={address}", "--distributed.num-processes=3"]
        return [
            process
            for i, limit in seconds.items()
            for process in start(
                ["train.py", *common, f"--distributed.process-id={i}", f"--distributed.timeout-seconds={limit}"]
            )
        ]

    nobody, address = processes.free_address(), processes.free_address()
    alone, two = waiting(nobody, **{"1": 2}), waiting(address, **{"0": 12, "2": 3})
    (ended,) = end(alone)
    (line,) = ended.err.splitlines()
    assert ended.status == 2 and "process 1" in line and "found nothing there" in line and "start process 0" in line
    # Process 0 waits longer: it is still there when process 2 gives up.
    for i, seconds, (status, _, err) in zip((0, 2), (12, 3), end(two), strict=True):
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and f"process {i}" in line and address in line and f"within {seconds} s" in line
        assert "not all" in line


def test_processes_with_unlike_settings_are_refused_and_the_setting_is_named(tmp_path: Path) -> None:
    address = processes.free_address()
    job = [f"--distributed.coordinator-address={address}", "--distributed.num-processes=2"]
    both = [
        start(["train.py", *flags(train__save_dir=tmp_path / "run", train__max_steps=steps), *job, f"--distributed.process-id={i}"])[0]
        for i, steps in enumerate((2, 3))
    ]  # fmt: skip
    lines = []
    for status, _, err in end(both):
        lines += [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2, err
    assert lines == [
        "error: distributed: expected the settings of process 0 everywhere, found others in process 1; start all processes with the same settings",
        "error: train.max_steps: expected 2, as process 0 has it, found 3 in process 1; start all processes with the same settings",
    ]
    assert not (tmp_path / "run").exists()


CLUSTERS: dict[str, tuple[dict[str, str], tuple[str, int, int]]] = {
    "slurm": (
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
        ("node07:61441", 4, 2),
    ),
    "slurm, one task": (
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "node07", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        ("", 1, 0),
    ),
    "open mpi": (
        {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        ("10.96.0.1:62624", 2, 1),
    ),
    "gke, cloud tpu": ({"TPU_WORKER_HOSTNAMES": "localhost,host-1", "TPU_WORKER_ID": "1"}, ("localhost:8482", 2, 1)),
    "a pod of no job": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ("", 1, 0)),
    "no cluster": ({}, ("", 1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("cluster", list(CLUSTERS))
def test_processes_find_each_other_by_the_clusters_environment(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, found = CLUSTERS[cluster]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_HOSTNAMES" in environment)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert distributed._find(DistributedArgs()) == found
    given = DistributedArgs("10.0.0.1:1234", 8, 5)
    assert distributed._find(given) == ("10.0.0.1:1234", 8, 5), "what is given wins"


def test_under_open_mpi_5_the_address_alone_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(UserError, match=r"^distributed\.coordinator_address: expected"):
        start_job(DistributedArgs())
    assert distributed._find(DistributedArgs("10.0.0.1:1234")) == ("10.0.0.1:1234", 2, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert distributed._find(DistributedArgs()) == ("", 1, 0)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (DistributedArgs("10.0.0.1:1234"), "num_processes"),
        (DistributedArgs(num_processes=2), "coordinator_address"),
        (DistributedArgs("10.0.0.1:1234", num_processes=2), "process_id"),
        (DistributedArgs("10.0.0.1:1234", process_id=0), "num_processes"),
    ],
)
def test_an_incomplete_section_names_the_key_that_is_missing(args: DistributedArgs, key: str) -> None:
    args.check()
    with pytest.raises(UserError, match=rf"^distributed\.{key}: .*found none"):
        start_job(args)


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (DistributedArgs("10.0.0.1"), "coordinator_address"),
        (DistributedArgs("host:port"), "coordinator_address"),
        (DistributedArgs(num_processes=0), "num_processes"),
        (DistributedArgs(process_id=-1), "process_id"),
        (DistributedArgs(num_processes=2, process_id=2), "process_id"),
        (DistributedArgs(timeout_seconds=0), "timeout_seconds"),
    ],
)
def test_an_impossible_section_is_told(args: DistributedArgs, key: str) -> None:
    with pytest.raises(UserError, match=rf"^distributed\.{key}: expected"):
        args.check()


class Held:
    """A sharding of which this process holds some rows and columns."""

    def __init__(self, *held: tuple[slice, slice]):
        self.held = held

    def addressable_devices_indices_map(self, shape: tuple[int, int]) -> dict[int, tuple[slice, slice]]:
        return dict(enumerate(self.held))


def test_a_process_reads_its_own_rows_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, read = np.arange(1, 400, dtype=np.uint16), []
    whole = list(train_batches(stream, 6, 8, seed=3, start=2, stop=9))
    original = Windows.row
    monkeypatch.setattr(Windows, "row", lambda self, i, w: read.append(i) or original(self, i, w))
    # Two parts of the same rows, as with a sequence axis, and rows that do not lie together.
    columns = slice(0, 4), slice(4, 8)
    own = OwnRows(Held((slice(0, 2), columns[0]), (slice(0, 2), columns[1]), (slice(4, 5), columns[0])), 6, 8)  # type: ignore[arg-type]
    assert own.rows.tolist() == [0, 1, 4]
    part = list(train_batches(stream, 6, 8, seed=3, start=2, stop=9, own=own.rows))
    assert sorted(read) == [step * 6 + row for step in range(2, 9) for row in (0, 1, 4)]
    parts, wholes = [*part, *eval_batches(stream, 6, 8, own=own.rows)], [*whole, *eval_batches(stream, 6, 8)]
    for batch, all_rows in zip(parts, wholes, strict=True):
        for mine, every in zip(batch, all_rows, strict=True):
            np.testing.assert_array_equal(mine, every[[0, 1, 4]])


@dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "made up"


@pytest.mark.parametrize(
    ("sizes", "across"), [([4, 2, 1, 1], [2, 1, 1, 1]), ([1, 8, 1, 1], [1, 2, 1, 1]), ([1, 1, 8, 1], [1, 1, 2, 1])]
)
def test_slices_lie_along_the_outermost_axis_and_all_others_within_a_slice(sizes: list[int], across: list[int]) -> None:
    # Devices as they come: of one slice and of the other, in turn.
    grid = _grid(sizes, [FakeDevice(i, i % 2) for i in range(8)])  # type: ignore[misc]
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    axis = across.index(2)
    first, second = np.split(slices, 2, axis=axis)
    assert grid.shape == tuple(sizes) and (first == 0).all() and (second == 1).all()


if __name__ == "__main__":
    train_several(json.loads(sys.argv[1]))
