"""benchmarks/sweep.py: which runs it trains, how it orders them, and that a second call trains none again."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_jax.config import Config, ModelArgs, TrainArgs, to_toml
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.training.flops import step_flops
from tests import commands
from tests.commands import ROOT

SCRIPT = ROOT / "benchmarks" / "sweep.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    return commands.script("benchmarks/sweep.py")


def result(lr: str, seed: int, bits: float) -> dict[str, Any]:
    return {"settings": {"train.lr": lr}, "seed": seed, "bits_per_byte": bits, "tflop": 1.0, "seconds": 2.0}


def test_all_combinations_are_trained_or_as_many_as_are_drawn(sweep: ModuleType) -> None:
    vary = ["train.lr=1e-3,2e-3,4e-3", "train.optimizer=adamw,muon"]
    found = sweep.combinations(vary)
    assert len(found) == 6 and {"train.lr": "2e-3", "train.optimizer": "muon"} in found
    drawn = sweep.combinations(vary, 4)
    assert len(drawn) == 4 and all(one in found for one in drawn) and drawn == sweep.combinations(vary, 4)
    assert sweep.combinations(vary, 9) == found


def test_the_best_median_over_the_seeds_is_first(sweep: ModuleType, tmp_path: Path) -> None:
    results = [
        result("1e-3", 0, 2.2),
        result("1e-3", 1, 2.3),
        result("2e-3", 0, 2.0),
        result("2e-3", 1, 2.4),
        result("2e-3", 2, 2.1),
    ]
    found = sweep.medians(results)
    assert [(settings["train.lr"], bits) for settings, bits, _ in found] == [
        ("2e-3", [2.0, 2.4, 2.1]),
        ("1e-3", [2.2, 2.3]),
    ]
    sweep.plot(results, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_the_best_value_lies_where_a_parabola_in_its_logarithm_has_its_least(sweep: ModuleType) -> None:
    def loss(x: float) -> float:
        return 2.0 + 0.3 * math.log(x / 0.003) ** 2

    points = [(x, loss(x)) for x in (1e-3, 2e-3, 4e-3, 5e-3)]
    assert sweep.optimum(points) == pytest.approx((0.003, 2.0))
    assert sweep.optimum(points[2:]) is None is sweep.optimum([(-1.0, 2.0), (1.0, 1.0), (2.0, 2.0)])
    assert sweep.optimum([(1.0, math.inf), (2.0, 1.0), (3.0, 2.0)]) is None is sweep.optimum([(1.0, 1.0)] * 3)
    results = [result(f"{x}", 0, y) for x, y in points]
    assert sweep.by_first_number(results) == ("train.lr", {"": [(x, [y]) for x, y in points]})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--vary", "train.lr"], "--vary: expected a field and its values"),
        (["--vary", "train.lr=1e-3", "--", "--train.seed", "3"], "--train.seed: expected none"),
        (["--vary", "train.lr=1e-3", "--", "--train.save_dir=x"], "--train.save-dir: expected none after --"),
        (["--vary", "train.seed=0,1"], "--train.seed: expected none --vary"),
        (["--vary", "train.lr=1e-3", "--vary", "train.lr=2e-3"], "found train.lr twice"),
        (["--vary", "train.weight_decay=0,1", "--", "--train.weight-decay", "1"], "found it in both"),
        (["--vary", "train.nesterov=true,false", "--", "--train.no-nesterov"], "found it in both"),
        (["--vary", "train.lr=1e-3", "--seeds", "0"], "--seeds and --random: expected 1 or more"),
        (["--vary", "train.lr=1e-3", "--output", __file__], "--output: expected a folder or a new one, found a file"),
    ],
)
def test_what_it_cannot_vary_is_refused(
    sweep: ModuleType, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sweep.arguments(["--output", "x", *flags])
    assert ended.value.code == 2 and named in capsys.readouterr().err


def test_the_flops_are_of_the_tokens_that_were_read(sweep: ModuleType, tmp_path: Path) -> None:
    """With a batch that grows, they are fewer than the steps times the batch."""
    train = TrainArgs(batch_size=8, batch_start=2, batch_ramp_steps=4, max_steps=8)
    config = Config(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=64, max_seq_len=16), train=train)
    tokens = BatchSizes.of(train).rows(8) * 16
    record = {"step": 8, "tokens": tokens, "eval_loss": 3.0, "eval_bits_per_byte": 2.0, "run_step_seconds": 1.0}
    (tmp_path / "config.toml").write_text(to_toml(config))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert tokens < 8 * 8 * 16
    assert sweep.reached(tmp_path)["tflop"] == pytest.approx(step_flops(config, tokens, 8) / 1e12, rel=1e-3)


def test_a_field_that_is_on_or_off_is_varied_by_its_two_flags(sweep: ModuleType) -> None:
    assert sweep.flags_of({"train.nesterov": "true", "train.lr": "1e-3"}) == ["--train.nesterov", "--train.lr", "1e-3"]
    assert sweep.flags_of({"train.nesterov": "False"}) == ["--train.no-nesterov"]


def test_runs_of_a_file_with_another_content_are_others(sweep: ModuleType, tmp_path: Path) -> None:
    def run() -> Any:
        return sweep.identity(
            {"train.lr": "1e-3"}, 0, [f"--config={tmp_path / 'a.toml'}", "--data.filepath", str(tmp_path / "t")]
        )

    (tmp_path / "a.toml").write_text("[train]\nlr = 1\n")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "x.txt").write_text("one")
    first = run()
    assert run() == first and len(first["files"]) == 2
    (tmp_path / "t" / "y.txt").write_text("two")
    second = run()
    (tmp_path / "a.toml").write_text("[train]\nlr = 2\n")
    assert first != second != run()


def test_a_line_that_was_cut_short_costs_itself_alone(sweep: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert sweep.known_results(file) == []
    file.write_text('{"seed": 0}\n{"se')
    assert sweep.known_results(file) == [{"seed": 0}] == sweep.known_results(file)
    assert file.read_text() == '{"seed": 0}\n'


def test_a_run_that_diverged_is_last_and_does_not_end_the_sweep(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = iter(
        [(2, "error: train: expected a finite loss, found nan at step 3"), (2, "error: train.lr: expected above 0")]
    )

    def run(command: Any, **_: Any) -> Any:
        status, text = next(outputs)
        return subprocess.CompletedProcess(command, status, text + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    one = sweep.identity({"train.lr": "9"}, 0, [])
    diverged = sweep.train(one, tmp_path)
    assert diverged["bits_per_byte"] is None and diverged["why"].endswith("found nan at step 3")
    results = [diverged, result("1e-3", 0, 2.0)]
    assert [settings["train.lr"] for settings, _, _ in sweep.medians(results)] == ["1e-3", "9"]
    sweep.plot(results, tmp_path / "sweep.png")
    with pytest.raises(SystemExit) as ended:
        sweep.train(one, tmp_path)
    assert ended.value.code == 2 and "train.lr 9, seed 0: train.py ended with exit status 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_call_trains_nothing_again_and_a_failed_run_ends_it(tmp_path: Path) -> None:
    def call(rates: str) -> Any:
        return subprocess.run(
            [
                sys.executable, SCRIPT, "--output", tmp_path, "--vary", f"train.lr={rates}", "--", "--config", "tiny",
                "--data.stories", "200", "--model.dim", "32", "--train.max-steps", "3", "--train.eval-iters", "1",
            ],
            capture_output=True, text=True, cwd=ROOT, timeout=600, check=False,
        )  # fmt: skip

    first = call("1e-3")
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "results.jsonl").read_text()
    found = json.loads(lines)
    assert (
        found["settings"] == {"train.lr": "1e-3"}
        and found["step"] == 3
        and found["bits_per_byte"] > 0
        and found["tflop"] > 0
    )
    again = call("1e-3")
    assert "1 runs, 1 of them done before" in again.stdout and (tmp_path / "results.jsonl").read_text() == lines
    failed = call("1e-3,-1")
    assert failed.returncode == 2 and "train.lr: expected" in failed.stderr
    assert (tmp_path / "results.jsonl").read_text() == lines
