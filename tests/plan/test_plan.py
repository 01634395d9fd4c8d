"""The plan command: what it says of a small model on a small slice, and of what cannot be planned."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from llama_jax.compat.jax_internals import needed_bytes
from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs, to_toml
from llama_jax.devices.chips import TPUS
from llama_jax.errors import UserError
from llama_jax.plan import __main__, _text, command
from llama_jax.plan.cost import schedule_of
from llama_jax.plan.hlo import Program
from llama_jax.plan.picture import is_picture
from llama_jax.plan.topology import Topology
from llama_jax.training.flops import train_flops_per_token
from tests import forked
from tests.plan import ENVIRONMENT, needs_libtpu

ROOT = Path(__file__).parents[2]
MODEL = ModelArgs(dim=256, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=256, multiple_of=128, max_seq_len=128)
TRAIN = TrainArgs(batch_size=4, remat="attention", max_steps=10)
CONFIG = Config(MODEL, train=TRAIN, mesh=MeshArgs(data=1, fsdp=4))
TINY = ModelArgs(dim=128, n_layers=2, n_heads=1, vocab_size=128, multiple_of=128, max_seq_len=128)


def plan(folder: Path, *flags: str, config: Config = CONFIG) -> Any:
    """The command as users start it."""
    (folder / "c.toml").write_text(to_toml(config))
    return subprocess.run(
        [sys.executable, "-m", "llama_jax.plan", "--config", str(folder / "c.toml"), "--output", "", *flags],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=500,
    )  # fmt: skip


def forked_plan(
    folder: Path, *flags: str, config: Config = CONFIG, module: tuple[str, ...] = ("llama_jax.plan",)
) -> subprocess.CompletedProcess[str]:
    """The command in a fork, which need not import JAX."""
    (folder / "c.toml").write_text(to_toml(config))
    argv = ["-m", *module, "--config", str(folder / "c.toml"), *flags]
    return forked.run(argv, folder, environment=ENVIRONMENT | {"PYTHONPATH": os.fspath(ROOT)})


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of the small model on four chips, with the folder that holds the program's text and the picture, and with what was
    said on standard error."""
    folder = tmp_path_factory.mktemp("plan")
    done = plan(
        folder, "--topology", "v5e:2x2", "--json", "--hlo", str(folder / "o.hlo"), "--output", str(folder / "p.png")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    return json.loads(line) | {"folder": folder, "said": done.stderr}


@needs_libtpu
def test_a_step_that_fits_is_told_with_its_size_and_speed(planned: dict[str, Any]) -> None:
    assert planned["fits"] is True and planned["advice"] == []
    assert planned["hbm_per_device"] == int(TPUS["v5e"].hbm_bytes)
    assert planned["tokens_per_step"] == 4 * 128
    assert planned["flops_per_step"] == pytest.approx(4 * 128 * train_flops_per_token(MODEL))
    peak = 4 * TPUS["v5e"].peak_flops
    assert planned["mfu"] == pytest.approx(planned["flops_per_step"] / planned["step_seconds"] / peak)
    assert planned["tokens_per_second"] == pytest.approx(4 * 128 / planned["step_seconds"])
    assert (planned["attention"], planned["devices"], planned["mesh"]["fsdp"]) == ("splash", 4, 4)
    assert planned["compute_dtype"] == "bfloat16"


@needs_libtpu
def test_days_and_chip_hours_are_those_of_the_configurations_own_steps(planned: dict[str, Any]) -> None:
    seconds = 10 * planned["step_seconds"]
    assert planned["tokens"] == 10 * 4 * 128 and "max_steps" in planned["tokens_from"]
    assert planned["days"] == pytest.approx(seconds / 86400)
    assert planned["chip_hours"] == pytest.approx(4 * seconds / 3600)


@needs_libtpu
def test_beside_json_all_that_is_said_goes_to_standard_error(planned: dict[str, Any]) -> None:
    said = planned["said"]
    assert "vocabulary  256" in said and "compiling" in said
    assert str(planned["folder"] / "o.hlo") in said and str(planned["folder"] / "p.png") in said


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
    D, K, H, F, V, L = 256, 1, 128, MODEL.hidden_width, 256, 2
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
    # The other count leaves out reshapes and roots outside of fusions, a sixteenth of what this small program has.
    assert 1e3 * seconds["other"] == pytest.approx(float(found["est_other_ms"]), rel=0.08)
    assert 1e3 * seconds["blocking_collectives"] == pytest.approx(float(found["coll_sync_ms"]), rel=0.05)


@needs_libtpu
def test_the_picture_is_a_png(planned: dict[str, Any]) -> None:
    assert (planned["folder"] / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in planned["folder"].iterdir()) == ["c.toml", "o.hlo", "p.png"]


@needs_libtpu
def test_a_document_mask_is_compiled_into_splash_and_its_cost_is_told(tmp_path: Path) -> None:
    """On a mesh that spreads positions, too: the segment of every key comes to each chip."""
    config = replace(CONFIG, model=replace(MODEL, max_seq_len=256), mesh=MeshArgs(data=1, fsdp=2, sequence=2))
    done = forked_plan(
        tmp_path, "--output=", "--topology=v5e:2x2", "--data.document-mask", "--json", config=config
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    kernels = found["parts"]["kernels"]
    assert found["attention"] == "splash" and found["document_mask"] is True
    assert len(kernels) == 3 and all("segmented" in name for name in kernels)
    assert set(kernels.values()) == {MODEL.n_layers}
    cost, now = found["document_mask_cost"], {name: found[name] for name in ("step_seconds", "bytes_per_device")}
    now |= {name: found["parts"][name] for name in ("hbm_bytes", "compiled_flops_per_device")}
    for name, value in now.items():
        assert cost[name] == pytest.approx(value - cost["without"][name])
    assert any(cost[name] for name in now) and "document masks cost " in done.stderr


@needs_libtpu
def test_a_decoding_step_is_set_against_the_reading_of_its_bytes(tmp_path: Path) -> None:
    """Of the configuration, the mesh is for training: one head of keys lies on a chip, the sequences on four."""
    done = forked_plan(tmp_path, "--output=", "--topology=v5e:2x2", "--decode", "--batch=4", "--slots=512", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert "[mesh] in the file is for training" in done.stderr and "--mesh.data 4" in done.stderr
    assert "more than the model's context, 128" in done.stderr
    cache = 2 * MODEL.n_layers * 1 * 512 * 1 * 128 * 2  # a sequence a chip, bfloat16
    assert found["parts"]["bytes"]["cache"] == cache
    read = cache + found["parts"]["bytes"]["parameters"]
    assert found["memory_seconds"] == pytest.approx(read / TPUS["v5e"].hbm_bandwidth)
    assert found["step_seconds"] > found["memory_seconds"]
    assert found["tokens_per_second"] == pytest.approx(4 / found["step_seconds"])


@needs_libtpu
def test_heads_are_spread_for_decoding_and_the_cache_is_no_longer_than_the_context(tmp_path: Path) -> None:
    model = ModelArgs(dim=256, n_layers=1, n_heads=4, vocab_size=256, multiple_of=128, max_seq_len=256)
    done = forked_plan(
        tmp_path,
        "--output=",
        "--topology=v5e:2x4",
        "--decode",
        "--batch=1",
        "--json",
        config=Config(model, mesh=MeshArgs(1, -1)),
    )
    found = json.loads(done.stdout)
    assert found["fits"] and found["slots"] == 256
    assert found["devices"] == found["mesh"]["tensor"] and found["idle_devices"] == 8 - found["devices"] >= 4


@needs_libtpu
@pytest.mark.parametrize(
    "weights", [pytest.param("auto", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow), "int4"]
)
def test_the_parameters_are_as_large_as_the_program_takes_them(tmp_path: Path, weights: str) -> None:
    """Four bits a number for int4, as they lie in a chip's memory."""
    model = ModelArgs(dim=512, n_layers=2, n_heads=4, vocab_size=512, multiple_of=128, max_seq_len=256)
    text = tmp_path / "decode.hlo"
    done = forked_plan(
        tmp_path, "--output=", "--topology=v5e:1x1", "--decode", "--batch=1", "--slots=256", f"--weights={weights}",
        f"--hlo={text}", "--json", config=Config(model, mesh=MeshArgs(data=1)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    parts = json.loads(done.stdout)["parts"]["bytes"]
    program = Program.parse(text.read_text())
    given = sum(i.size for i in program.computations[program.entry] if i.opcode == "parameter")
    assert given == pytest.approx(parts["parameters"] + parts["cache"], rel=0.02)


LARGE = ModelArgs(dim=4096, n_layers=8, n_heads=32, vocab_size=32000, multiple_of=256, max_seq_len=1024)
WIDE = ModelArgs(dim=16384, n_layers=1, n_heads=128, vocab_size=1024, multiple_of=128, max_seq_len=4096)


@needs_libtpu
def test_a_step_that_does_not_fit_ends_with_status_1_and_what_would_fit(tmp_path: Path) -> None:
    config = Config(LARGE, train=TrainArgs(batch_size=4, max_steps=7), mesh=MeshArgs(data=4))
    hlo = tmp_path / "o.hlo"
    done = plan(tmp_path, "--topology", "v5e:2x2", "--json", "--advice", "0", "--hlo", str(hlo), config=config)
    assert done.returncode == 1, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] is False and found["step_seconds"] is None and found["days"] is None
    assert found["parts"]["bytes"]["optimizer"] > found["hbm_per_device"] / 2
    assert found["bytes_per_device"] == pytest.approx(sum(found["parts"]["bytes"].values()))
    assert found["bytes_per_device"] > found["parts"]["bytes"]["optimizer"] * 1.5
    (advice,) = found["advice"]
    assert "--mesh.fsdp" in advice["flags"] and advice["verified"] is False
    assert advice["bytes_per_device"] < found["hbm_per_device"] and advice["topology"] == "v5e:2x2"
    assert not hlo.exists() and "is not written" in done.stderr


@needs_libtpu
def test_what_is_advised_fits(tmp_path: Path) -> None:
    """On a chip of 30 MB, the advice that was compiled, typed, makes the step fit; no advice to halve the batch forever."""
    config = Config(TINY, train=TrainArgs(batch_size=8, max_steps=7), mesh=MeshArgs(data=1, fsdp=-1))
    small = "tests.plan.small_chip", "30"
    done = forked_plan(tmp_path, "--output=", "--topology=v5e:1x1", config=config, module=small)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = re.findall(r"change  (.*)", done.stdout)
    flags, _, verdict = line.partition(": ")
    assert "DOES NOT FIT" in done.stdout and "(compiled)" in verdict and f"trying {flags}" in done.stdout
    again = forked_plan(
        tmp_path, "--output=", "--topology=v5e:1x1", "--json", *shlex.split(flags), config=config, module=small
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["fits"]


@needs_libtpu
def test_a_decoding_step_that_does_not_fit_is_advised_for_decoding(tmp_path: Path) -> None:
    flags = ["--topology=v5e:1x1", "--decode", "--batch=64", "--slots=4096", "--output="]
    done = forked_plan(tmp_path, *flags, "--advice=1", config=Config(WIDE))
    assert done.returncode == 1, done.stdout + done.stderr
    change = done.stdout[done.stdout.index("change") :].splitlines()
    assert re.fullmatch(r"change  --cache int8: fits, .* \(compiled\)", change[0])
    assert "--batch 32: about" in change[1] and "--train" not in done.stdout


@needs_libtpu
def test_a_search_that_finds_nothing_ends_with_status_1_and_the_smallest_slice(tmp_path: Path) -> None:
    config = Config(LARGE, train=TrainArgs(batch_size=1, max_steps=7))
    done = forked_plan(tmp_path, "--topology=v5e:1x1", "--search", "--json", config=config)
    assert done.returncode == 1, done.stdout + done.stderr
    (only,) = json.loads(done.stdout)
    assert only["errors"]["bytes"] == {"estimated": None, "expected": None}
    assert only["fits"] is False and only["advice"][0]["flags"].startswith("--topology v5e:")


@pytest.mark.parametrize(
    ("refusal", "needed"),
    [
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (32.15G) exceeds (15.75G)", 32.15),
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", 17.5),
        ("Ran out of something else", 0),
    ],
)
def test_what_the_compiler_needs_is_read_from_its_refusal(refusal: str, needed: float) -> None:
    assert needed_bytes(refusal) == int(needed * (1 << 30))


@needs_libtpu
def test_two_devices_a_chip_are_counted_and_told(tmp_path: Path) -> None:
    config = Config(TINY, train=TrainArgs(batch_size=8, gradient_accumulation_steps=1, max_steps=7))
    done = forked_plan(tmp_path, "--topology=v7x:2x2x1", "--json", "--output=", config=config)
    assert "two devices a chip of v7x: 4 chips, 8 devices" in done.stderr
    if done.returncode == 2:  # the next test
        assert "error: plan: expected a compiled program that jax" in done.stderr and done.stdout == ""
        assert jax.__version_info__ < (0, 12)
        pytest.skip("this jax cannot read the programs that libtpu compiles for v7x")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"] and found["devices"] == 8 and found["hbm_per_device"] == int(TPUS["v7x"].hbm_bytes)
    assert found["chip_hours"] == pytest.approx(4 * found["days"] * 24)
    assert found["mfu"] == pytest.approx(found["flops_per_step"] / found["step_seconds"] / (4 * 2307e12))


def test_a_jax_that_cannot_read_a_compiled_program_is_told_from_a_fault() -> None:
    class Unreadable:
        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have\n 1 operands but sees 2")

    with pytest.raises(UserError, match=r"^plan: expected .* v7x:2x2x1 .*1 operands but sees 2.*newer jax") as told:
        _text(Unreadable(), Topology.parse("v7x:2x2x1"))  # type: ignore[arg-type]
    assert "\n" not in str(told.value)


@pytest.mark.slow
@needs_libtpu
def test_a_search_ranks_what_it_compiled(tmp_path: Path) -> None:
    config = Config(TINY, train=TrainArgs(batch_size=4, max_steps=7))
    done = forked_plan(tmp_path, "--topology=v5e:2x2", "--search", "--compiles=2", "--json", config=config)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout)
    assert first["fits"] and second["fits"] and first["step_seconds"] <= second["step_seconds"]
    assert first["flags"] != second["flags"] and is_picture((tmp_path / "plan.png").read_bytes()[:4096])
    expected = [entry["expected"]["step_seconds"] / entry["step_seconds"] - 1 for entry in (first, second)]
    assert first["errors"] == second["errors"] and first["errors"]["seconds"]["expected"]["count"] == 1
    assert abs(first["errors"]["seconds"]["expected"]["median"]) in [pytest.approx(abs(e)) for e in expected]
    again = forked_plan(tmp_path, "--topology=v5e:2x2", "--output=", "--json", *first["flags"].split(), config=config)
    assert json.loads(again.stdout)["step_seconds"] == pytest.approx(first["step_seconds"])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--topology", "v9:2x2"], ["--topology", "v5e:16x16", "'v9:2x2'"]),
        (["--topology", "v5e-16"], ["--topology", "v5e:4x4"]),
        (["--topology", ""], ["--topology", "found none"]),
        (["--topology", "v5e:2x2", "--slots", "0"], ["--slots", "found 0"]),
        (["--topology", "v5e:2x2", "--train.remat", "all"], ["train.remat", "'all'"]),
        (["--topology", "v5e:2x2", "--hlo", "c.toml"], ["--hlo", "c.toml"]),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(tmp_path: Path, flags: list[str], parts: list[str]) -> None:
    done = forked_plan(tmp_path, *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


@needs_libtpu
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--topology", "v5e:3x5"], ["--topology", "v5e:3x5", "v5e:2x4 of 8 chips or v5e:4x4 of 16 chips"]),
        (["--topology", "v5e:10x10"], ["--topology", "v5e:10x10", "v5e:8x8"]),  # the compiler says so
        (["--topology", "v5e:2x32"], ["--topology", "v5e:2x32", "v5e:8x8", "Check failed"]),  # it ends its process
        (["--topology", "v5e:2x32", "--decode"], ["--topology", "v5e:2x32", "v5e:8x8"]),
        (["--topology", "v5e:2x4"], ["mesh", "8 devices", "fsdp 4"]),
        (["--topology", "v5e:2x2", "--train.batch-size", "6"], ["train.batch_size", "found 6"]),
        (["--topology", "v5e:2x2", "--mesh.fsdp", "1", "--mesh.tensor", "4"], ["model.n_heads", "found 2"]),
        (["--topology", "v5e:2x2", "--train.attention", "cudnn"], ["train.attention", "NVIDIA GPU", "tpu"]),
        (["--topology", "v5e:2x2", "--decode", "--batch", "3", "--mesh.data", "4"], ["--batch", "found 3"]),
    ],
)
def test_what_the_slice_cannot_do_is_told_in_one_line(tmp_path: Path, flags: list[str], parts: list[str]) -> None:
    done = forked_plan(tmp_path, *flags, "--json")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and all(part in done.stderr for part in parts), done.stderr


def test_a_fault_of_plans_own_does_not_look_like_a_step_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> int:
        raise KeyError("a fault")

    monkeypatch.setattr(command, "run", fail)
    monkeypatch.setattr(sys, "argv", ["plan", "--topology", "v5e:2x2"])
    for name in __main__.ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == __main__.EX_SOFTWARE and "a fault" in capsys.readouterr().err


def test_without_the_tpu_compiler_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from jax.experimental import topologies

    from llama_jax.plan import topology

    def fail(**_: Any) -> None:
        raise RuntimeError("no such plugin")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    monkeypatch.setattr(topology, "_has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"libtpu; install it with: pip install -e '\.\[tpu\]'"):
        Topology.parse("v5e:2x2").devices()
