"""The whole of training: resume, kill, signals, run folder, bad input; as a user runs it."""

import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import steps_of
from llama_jax.errors import STOPPED
from llama_jax.training.clock import TIMES
from tests import inside

ROOT = Path(__file__).parents[2]
SMALL = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.multiple_of": 16,
    "model.max_seq_len": 32,
    "data.vocab_size": 300,
    "train.batch_size": 4,
    "train.warmup_steps": 3,
    "train.max_steps": 10,
    "train.eval_interval": 4,
    "train.eval_iters": 2,
    "train.save_interval": 2,
    "train.log_interval": 1,
    "train.lr": 1e-2,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = [
        w
        for w in [
            "the",
            "cat",
            "sat",
            "on",
            "a",
            "mat",
            "and",
            "saw",
            "the",
            "dog",
            "who",
            "ran",
            "to",
            "the",
            "old",
            "barn",
            "by",
            "the",
            "sea",
        ]
    ]
    rng = random.Random(0)
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(400)))
    return path


def command(text: Path | str, save_dir: Path, **changes) -> list[str]:
    flags = {**SMALL, "data.filepath": text, "train.save_dir": save_dir}
    flags |= {k.replace("__", "."): v for k, v in changes.items()}
    return [sys.executable, str(ROOT / "train.py")] + [f"--{k}={v}" for k, v in flags.items()]


def run(argv: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, **kwargs)


def run_inside(argv: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """What ``command`` gives, in this process. Runs that are to be stopped or killed are started."""
    return inside.run(["train.py", *argv[2:]], cwd)


def train(text: Path, save_dir: Path, **changes) -> subprocess.CompletedProcess:
    result = run_inside(command(text, save_dir, **changes))
    assert result.returncode == 0, result.stderr
    return result


def metrics(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def parameters(run_dir: Path, step: int | None = None) -> list[np.ndarray]:
    model = llama_jax.load(str(run_dir / "checkpoints" / str(step or steps_of(run_dir)[-1])))
    return [np.asarray(x) for x in jax.tree.leaves(model.params)]


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert steps_of(a)[-1] == steps_of(b)[-1]
    for x, y in zip(parameters(a), parameters(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def reference(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    train(text, folder)
    return folder


def test_run_folder_holds_what_is_promised(reference):
    names = {p.name for p in reference.iterdir()}
    assert {"config.toml", "tokenizer.model", "metrics.jsonl", "losses.png", "checkpoints", "best.json"} <= names
    records = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 11))
    required = {"step", "tokens", "train_loss", "lr", "grad_norm", "step_seconds", "tokens_per_second"}
    assert all(required <= set(r) for r in records)
    assert [r["step"] for r in records if "eval_loss" in r and "eval_bits_per_byte" in r] == [4, 8, 10]
    assert records[-1]["tokens"] == 10 * 4 * 32
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    best = min((r for r in records if "eval_loss" in r), key=lambda r: r["eval_loss"])
    assert json.loads((reference / "best.json").read_text())["step"] == best["step"]
    assert set(steps_of(reference)) == {best["step"], 6, 8, 10}
    assert (reference / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_learning_rate_reaches_its_peak_and_falls_to_a_tenth(reference):
    rates = {r["step"]: r["lr"] for r in metrics(reference)}
    assert max(rates.values()) == pytest.approx(1e-2, rel=1e-6)
    assert rates[10] == pytest.approx(1e-3, rel=1e-6)


def test_a_run_stopped_and_started_again_equals_an_uninterrupted_one(text, reference, tmp_path):
    process = subprocess.Popen(
        command(text, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    _out, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED, err
    assert "Traceback" not in err
    train(text, tmp_path / "run")
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("kills", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_kill_at_any_moment_then_the_same_command_gives_the_same_run(kills, text, reference, tmp_path):
    folder, rng = tmp_path / "run", random.Random(1)
    for _ in range(kills):
        process = subprocess.Popen(command(text, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = (steps_of(folder) or [0])[-1] + 1
        assert wait_for_step(folder, min(target, 10), process) or target > 1
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.wait()
        if steps_of(folder):
            llama_jax.load(str(folder))
    train(text, folder)
    assert_same_run(folder, reference)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> bool:
    """Wait for a record of ``step``; whether it came before the process ended."""
    path, deadline = folder / "metrics.jsonl", time.time() + 120
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert time.time() < deadline
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def test_a_finished_run_started_again_changes_nothing(text, reference):
    before = metrics(reference), steps_of(reference)
    tokens = reference / "tokens" / "train.bin"
    made = tokens.stat().st_mtime_ns
    result = train(text, reference)
    assert "has its 10 steps" in result.stdout
    assert (metrics(reference), steps_of(reference)) == before
    assert tokens.stat().st_mtime_ns == made


def test_what_is_printed_ends_with_the_command_that_samples(text, reference):
    result = train(text, reference)
    line = next(line.strip() for line in result.stdout.splitlines() if "python sample.py" in line)
    sampled = run(["bash", "-c", line.replace("python sample.py", f"{sys.executable} {ROOT / 'sample.py'}")])
    assert sampled.returncode == 0, sampled.stderr
    assert len(sampled.stdout) > 10


def test_fine_tuning_starts_from_the_checkpoint(text, reference, tmp_path):
    train(text, tmp_path / "tuned", **{"train.init_from": reference, "train.max_steps": 1, "train.lr": 1e-9})
    before, after = (
        parameters(reference, json.loads((reference / "best.json").read_text())["step"]),
        parameters(tmp_path / "tuned"),
    )
    for x, y in zip(before, after, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_non_finite_loss_stops_the_run_with_a_message(text, tmp_path):
    result = run_inside(
        command(text, tmp_path / "run", **{"train.lr": 1e30, "train.grad_clip": 0, "train.warmup_steps": 0})
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: train: expected a finite ") and "step" in last
    assert "Traceback" not in result.stderr


def test_metrics_of_another_seed_differ(text, reference, tmp_path):
    train(text, tmp_path / "run", **{"train.seed": 1})
    assert metrics(tmp_path / "run")[0]["train_loss"] != metrics(reference)[0]["train_loss"]


BAD = [
    ({"data.filepath": "missing.txt"}, ["data.filepath", "missing.txt"]),
    ({"data.filepath": "empty.txt"}, ["data.filepath", "empty"]),
    ({"data.filepath": "folder"}, ["data.filepath", "folder"]),
    ({"data.tokenizer_model_path": "text.txt"}, ["text.txt", "SentencePiece"]),
    ({"model.n_heads": 5}, ["model.n_heads", "32", "5"]),
    ({"model.n_kv_heads": 3}, ["model.n_kv_heads", "3"]),
    ({"model.n_layers": "x"}, ["model.n-layers", "x"]),
    ({"train.nonsense": 1}, ["train.nonsense"]),
    ({"train.batch_size": 0}, ["train.batch_size", "0"]),
    ({"train.init_from": "folder"}, ["folder", "checkpoint"]),
    ({"mesh.tensor": 3}, ["mesh", "3"]),
    ({"config": "missing.toml"}, ["missing.toml"]),
    ({"config": "unknown.toml"}, ["unknown.toml", "model.depth"]),
    ({"config": "wrong.toml"}, ["wrong.toml", "model.dim", "int", "'wide'"]),
    ({"train.save_dir": "text.txt"}, ["text.txt"]),
]


@pytest.mark.parametrize(
    ("changes", "named"), BAD, ids=[next(iter(c)) + "=" + str(next(iter(c.values()))) for c, _ in BAD]
)
def test_bad_input_ends_in_one_line_and_status_2(changes, named, text, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    (tmp_path / "unknown.toml").write_text("[model]\ndepth = 3\n")
    (tmp_path / "wrong.toml").write_text('[model]\ndim = "wide"\n')
    result = run_inside(command("text.txt", Path("run"), **changes), tmp_path)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(name in lines[0] for name in named), lines[0]


def test_a_run_of_another_model_in_the_folder_is_refused(text, reference):
    result = run_inside(command(text, reference, **{"model.dim": 64}))
    assert result.returncode == 2
    assert "model.dim" in result.stderr and "save-dir" in result.stderr


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(text, reference, tmp_path):
    """The reference has compiled its steps already: the compilation cache needs no room."""
    folder = tmp_path / "run"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1][1]))
    try:
        result = run_inside(command(text, folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert steps_of(folder) == []


def test_checkpoints_may_lie_elsewhere_and_the_run_folder_finds_them(text, reference, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "bucket" / "run"
    train(text, run, **{"train.checkpoint_dir": elsewhere})
    assert (run / "checkpoints").read_text().strip() == str(elsewhere)
    assert metrics(run) == metrics(reference)
    assert sorted(int(p.name) for p in elsewhere.iterdir()) == steps_of(run) == steps_of(reference)
    for step in steps_of(reference):
        elsewhere_too = llama_jax.load(str(elsewhere / str(step)))
        for x, y in zip(jax.tree.leaves(elsewhere_too.params), parameters(reference, step), strict=True):
            np.testing.assert_array_equal(x, y)
    assert llama_jax.load(str(run)).args == llama_jax.load(str(reference)).args
    train(text, run, **{"train.max_steps": 12})  # goes on from there, though it is not said again
    assert metrics(run)[-1]["step"] == 12 and steps_of(run)[-1] == 12


@pytest.mark.parametrize("used", ["by another run", "by this run, elsewhere"])
def test_a_place_for_checkpoints_that_is_in_use_is_refused(text, reference, tmp_path, used):
    run, other = tmp_path / "run", tmp_path / "other"
    if used == "by another run":
        (other / "7").mkdir(parents=True)
    else:
        (run / "checkpoints" / "3").mkdir(parents=True)
    done = run_inside(command(text, run, **{"train.checkpoint_dir": other}))
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.checkpoint_dir: expected") and done.stderr.count("\n") == 1
