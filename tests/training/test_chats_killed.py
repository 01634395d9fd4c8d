"""Runs on conversations that are killed and started again, and runs of two processes, end with the numbers of a whole one."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_jax.checkpoint import steps_of
from llama_jax.tokenizer import Tokenizer
from tests import processes
from tests.survival import outcome, same

WORDS = ["the", "owl", "fox", "river", "tree", "12", "boats", "duck"]
LORA = ["--lora.rank=4"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> list[str]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    rng = random.Random(0)
    with open(folder / "chats.jsonl", "w") as file:
        for i in range(5000):
            texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 6))) for _ in range(2 + 2 * (i % 3))]
            messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            file.write(json.dumps({"messages": messages}) + "\n")
    given = {
        "model.dim": 32, "model.n_layers": 2, "model.n_heads": 4, "model.n_kv_heads": 2, "model.multiple_of": 32, "model.max_seq_len": 64,
        "data.filepath": folder / "chats.jsonl", "data.tokenizer_model_path": folder / "tokenizer.model", "data.chat_template": "zephyr",
        "train.batch_size": 8, "train.warmup_steps": 1, "train.lr": 1e-2, "train.max_steps": 24, "train.log_interval": 1,
        "train.save_interval": 2, "train.eval_interval": 12, "train.eval_iters": 2,
    }  # fmt: skip
    return ["train.py", *(f"--{key}={value}" for key, value in given.items())]


def ended(argv: list[str], folder: Path, count: int = 1) -> None:
    for done in processes.end(processes.start([*argv, f"--train.save-dir={folder}"], count)):
        assert done.status == 0, done.err


def killed_when(argv: list[str], folder: Path, is_time: Callable[[], bool]) -> None:
    (process,) = processes.start([*argv, f"--train.save-dir={folder}"])
    until = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode


def saved(run: Path) -> int:
    return (steps_of(run) or [0])[-1]


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_encodes_and_while_it_trains_ends_as_a_whole_one(
    argv: list[str], tmp_path: Path
) -> None:
    run, tokens = tmp_path / "killed", tmp_path / "killed" / "tokens"

    def written() -> int:
        return sum(path.stat().st_size for path in tokens.glob("*") if path.exists())

    killed_when(argv, run, tokens.exists)
    killed_when(argv, run, lambda: written() > 300_000)  # when the first records are done, and processes encode
    assert not (tokens / "manifest.json").exists()
    killed_when(argv, run, lambda: saved(run) > 0)
    killed_when(argv, run, lambda: saved(run) > 8)
    ended(argv, run)
    ended(argv, tmp_path / "whole")
    (records, params, state), (others, other_params, other_state) = outcome(run), outcome(tmp_path / "whole")
    assert records == others and len(records) == 24
    assert same(params, other_params) and same(state, other_state)
    for name in ("train.bin", "counted-train.bin", "eval.bin", "counted-eval.bin", "manifest.json"):
        assert (tokens / name).read_bytes() == (tmp_path / "whole" / "tokens" / name).read_bytes()
    assert (run / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_two_processes_have_the_losses_of_one(argv: list[str], tmp_path: Path, more: list[str]) -> None:
    if more:
        ended([*argv, "--train.max-steps=2"], tmp_path / "base")
        more = [*more, f"--train.init-from={tmp_path / 'base'}"]
        argv = [word for word in argv if not word.startswith(("--model.", "--data.tokenizer"))]
    one, two = tmp_path / "one", tmp_path / "two"
    ended([*argv, *more], one)
    ended([*argv, *more, "--mesh.data=1", "--mesh.fsdp=2"], two, count=2)
    losses = [
        [
            (record["step"], record["train_loss"], record.get("eval_loss") or 0.0, record["target_tokens"])
            for record in outcome(run)[0]
        ]
        for run in (one, two)
    ]
    assert len(losses[0]) == len(losses[1]) == 24
    for a, b in zip(*losses, strict=True):
        assert a == pytest.approx(b, rel=2e-4)
