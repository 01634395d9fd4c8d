"""The plan command: what it says of a small model on a small slice, and of what cannot be planned."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_jax.chips import TPUS
from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs, to_toml
from llama_jax.errors import UserError
from llama_jax.plan import _needed_bytes
from llama_jax.plan.cost import schedule_of
from llama_jax.plan.hlo import Program
from llama_jax.plan.topology import Topology
from llama_jax.training.flops import train_flops_per_token
from tests import forked
from tests.plan import ENVIRONMENT, needs_libtpu

MODEL = ModelArgs(dim=256, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=512, multiple_of=128, max_seq_len=256)
TRAIN = TrainArgs(batch_size=8, remat="attention", max_steps=10)
CONFIG = Config(MODEL, train=TRAIN, mesh=MeshArgs(data=1, fsdp=4))


def plan(folder: Path, *flags: str, config: Config = CONFIG) -> Any:
    (folder / "c.toml").write_text(to_toml(config))
    return subprocess.run(
        [sys.executable, "-m", "llama_jax.plan", "--config", str(folder / "c.toml"), "--output", "", *flags],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=Path(__file__).parents[2],
        timeout=500,
    )


def refused(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "c.toml").write_text(to_toml(CONFIG))
    return forked.run(
        ["-m", "llama_jax.plan", "--config", str(folder / "c.toml"), *flags], folder, environment=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of the small model on four chips, with the folder that holds the program's text and the picture."""
    folder = tmp_path_factory.mktemp("plan")
    done = plan(
        folder, "--topology", "v5e:2x2", "--json", "--hlo", str(folder / "o.hlo"), "--output", str(folder / "p.png")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line) | {"folder": folder}


@needs_libtpu
def test_a_step_that_fits_is_told_with_its_size_and_speed(planned: dict[str, Any]) -> None:
    assert planned["fits"] is True
    assert planned["hbm_per_device"] == int(TPUS["v5e"].hbm_bytes)
    assert planned["tokens_per_step"] == 8 * 256
    assert planned["flops_per_step"] == pytest.approx(8 * 256 * train_flops_per_token(MODEL))
    peak = 4 * TPUS["v5e"].peak_flops
    assert planned["mfu"] == pytest.approx(planned["flops_per_step"] / planned["step_seconds"] / peak)
    assert planned["tokens_per_second"] == pytest.approx(8 * 256 / planned["step_seconds"])
    assert planned["days"] == pytest.approx(2e12 / planned["tokens_per_second"] / 86400)
    assert (planned["attention"], planned["devices"], planned["mesh"]["fsdp"]) == ("splash", 4, 4)


@needs_libtpu
def test_the_parts_add_up(planned: dict[str, Any]) -> None:
    parts = planned["parts"]
    assert sum(parts["bytes"].values()) == pytest.approx(planned["bytes_per_device"], rel=0.01)
    assert sum(parts["seconds"].values()) == pytest.approx(planned["step_seconds"])
    assert parts["seconds"]["blocking_collectives"] == pytest.approx(
        sum(c["seconds"] for c in parts["collectives"] if c["blocking"])
    )
    by_part = parts["seconds_by_part"]
    assert {"attention", "feed-forward", "loss", "embedding", "optimizer"} <= set(by_part)
    assert sum(by_part.values()) == pytest.approx(parts["seconds"]["matrix"] + parts["seconds"]["other"])


@needs_libtpu
def test_parameters_and_optimizer_take_a_quarter_on_each_of_four_chips(planned: dict[str, Any]) -> None:
    D, K, H, F, V, L = 256, 1, 128, MODEL.hidden_dim, 512, 2
    matrices = L * (2 * D * D + 2 * D * K * H + 3 * D * F) + 2 * V * D
    norms = (2 * L + 1) * D
    assert planned["parts"]["bytes"]["parameters"] == matrices + 4 * norms  # a quarter of 4 bytes each; norms are whole
    assert planned["parts"]["bytes"]["optimizer"] == pytest.approx(2 * (matrices + 4 * norms), abs=64)


@needs_libtpu
def test_each_kernel_runs_once_a_layer_though_the_layer_is_computed_again(planned: dict[str, Any]) -> None:
    assert set(planned["parts"]["kernels"].values()) == {MODEL.n_layers}


@needs_libtpu
def test_the_text_that_is_written_is_the_program_that_was_counted(planned: dict[str, Any]) -> None:
    schedule = schedule_of(Program.parse((planned["folder"] / "o.hlo").read_text()), TPUS["v5e"])
    assert schedule.seconds == pytest.approx(planned["step_seconds"])


@needs_libtpu
def test_times_agree_with_an_independent_count(planned: dict[str, Any], shared: Path) -> None:
    done = subprocess.run(
        [sys.executable, shared / "tools" / "hlo_cost.py", planned["folder"] / "o.hlo", "v5e"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    seconds = planned["parts"]["seconds"]
    assert 1e3 * seconds["matrix"] == pytest.approx(float(found["est_mm_ms"]), rel=0.05)
    assert 1e3 * seconds["other"] == pytest.approx(float(found["est_other_ms"]), rel=0.05)
    assert 1e3 * seconds["blocking_collectives"] == pytest.approx(float(found["coll_sync_ms"]), rel=0.05)


@needs_libtpu
def test_the_picture_is_a_png(planned: dict[str, Any]) -> None:
    assert (planned["folder"] / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in planned["folder"].iterdir()) == ["c.toml", "o.hlo", "p.png"]


@needs_libtpu
def test_a_decoding_step_is_set_against_the_reading_of_its_bytes(tmp_path: Path) -> None:
    done = plan(tmp_path, "--topology", "v5e:2x2", "--decode", "--batch", "4", "--slots", "512", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    cache = 2 * MODEL.n_layers * 1 * 512 * 1 * 128 * 2  # a sequence a chip, bfloat16
    assert found["parts"]["bytes"]["cache"] == cache
    read = cache + found["parts"]["bytes"]["parameters"]
    assert found["memory_seconds"] == pytest.approx(read / TPUS["v5e"].hbm_bandwidth)
    assert found["step_seconds"] > found["memory_seconds"]
    assert found["tokens_per_second"] == pytest.approx(4 / found["step_seconds"])


@needs_libtpu
def test_a_step_that_does_not_fit_is_told_with_what_to_change(tmp_path: Path) -> None:
    large = ModelArgs(dim=4096, n_layers=8, n_heads=32, vocab_size=32000, multiple_of=256, max_seq_len=1024)
    config = Config(large, train=TrainArgs(batch_size=4, remat="none"), mesh=MeshArgs(data=4))
    done = plan(tmp_path, "--topology", "v5e:2x2", "--json", config=config)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] is False and found["step_seconds"] is None
    assert found["parts"]["bytes"]["optimizer"] > found["hbm_per_device"] / 2
    assert found["bytes_per_device"] == pytest.approx(sum(found["parts"]["bytes"].values()))
    assert found["bytes_per_device"] > found["parts"]["bytes"]["optimizer"] * 1.5
    text = plan(tmp_path, "--topology", "v5e:2x2", config=config).stdout
    assert "DOES NOT FIT" in text and "--mesh.fsdp" in text


@pytest.mark.parametrize(
    ("refusal", "needed"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (32.15G) exceeds (15.75G)", 32.15),
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5),
        ("Ran out of something else", 0),
    ],
)
def test_what_the_compiler_needs_is_read_from_its_refusal(refusal: str, needed: float) -> None:
    assert _needed_bytes(refusal) == int(needed * (1 << 30))


@needs_libtpu
def test_a_search_ranks_what_it_compiled(tmp_path: Path) -> None:
    small = ["--model.n-layers=1", "--model.vocab-size=256", "--model.max-seq-len=128"]
    done = plan(tmp_path, "--topology", "v5e:2x2", *small, "--search", "--compiles", "2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout)
    assert first["fits"] and second["fits"] and first["step_seconds"] <= second["step_seconds"]
    assert first["flags"] != second["flags"]
    again = plan(tmp_path, "--topology", "v5e:2x2", *small, "--json", *first["flags"].split())
    assert json.loads(again.stdout)["step_seconds"] == pytest.approx(first["step_seconds"])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--topology", "v9:2x2"], ["--topology", "v5e:16x16", "'v9:2x2'"]),
        (["--topology", "v5e:2x2x2"], ["--topology", "2 sizes", "'v5e:2x2x2'"]),
        (["--topology", "v5p:4x4"], ["--topology", "3 sizes"]),
        (["--topology", "v5e:0x4"], ["--topology", "v5e:0x4"]),
        (["--topology", "2xv4:2x2x1"], ["--topology", "one slice of v4"]),
        (["--topology", ""], ["--topology", "found none"]),
        (["--topology", "v5e:2x2", "--slots", "0"], ["--slots", "found 0"]),
        (["--topology", "v5e:2x2", "--train.remat", "all"], ["--train.remat", "'all'"]),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(tmp_path: Path, flags: list[str], parts: list[str]) -> None:
    done = refused(tmp_path, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--topology", "v5e:3x5"], ["--topology", "v5e:3x5"]),
        (["--topology", "v5e:2x4"], ["mesh", "8 devices", "fsdp 4"]),
        (["--topology", "v5e:2x2", "--train.batch-size", "6"], ["train.batch_size", "found 6"]),
        (["--topology", "v5e:2x2", "--mesh.fsdp", "1", "--mesh.tensor", "4"], ["model.n_heads", "found 2"]),
        (["--topology", "v5e:2x2", "--train.attention", "cudnn"], ["train.attention", "NVIDIA GPU", "tpu"]),
        (["--topology", "v5e:2x2", "--decode", "--batch", "3"], ["--batch", "found 3"]),
    ],
)
def test_what_the_slice_cannot_do_is_told_in_one_line(tmp_path: Path, flags: list[str], parts: list[str]) -> None:
    done = refused(tmp_path, *flags)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


def test_without_the_tpu_compiler_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    from llama_jax.plan import topology

    def fail(**_: Any) -> None:
        raise RuntimeError("no such plugin")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    monkeypatch.setattr(topology, "_has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"libtpu; install it with: pip install -e '\.\[tpu\]'"):
        Topology.parse("v5e:2x2").devices()
