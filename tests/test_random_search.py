"""benchmarks/random_search.py: draws fill the budget, and a second call trains nothing again."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_jax.config import ModelArgs, TrainArgs
from llama_jax.errors import UserError
from llama_jax.training.flops import train_flops_per_token, update_flops
from tests import commands


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return commands.script("benchmarks/random_search.py")


def test_every_draw_fills_its_budget_to_a_step(script: ModuleType) -> None:
    rng, flops = random.Random(1), 2e12
    for settings in filter(None, (script.draw(rng, flops) for _ in range(200))):
        value = {name.partition(".")[2].replace("-", "_"): text for name, text in settings.items()}
        names = ("dim", "n_layers", "n_heads", "max_seq_len", "vocab_size")
        model = replace(ModelArgs(multiple_of=32), **{name: int(value[name]) for name in names})
        per_step = int(value["batch_size"]) * model.max_seq_len * train_flops_per_token(model)
        per_step += update_flops(model, TrainArgs())
        steps = int(value["max_steps"])
        assert steps >= 100 and steps * per_step <= flops < (steps + 1) * per_step


def test_a_second_call_trains_nothing_again_and_another_budget_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, calls = tmp_path / "a.txt", list[Any]()
    text.write_text("".join(f"On day {i} the {i * 7919 % 97} ships sail.\n" for i in range(900)))

    def train(run: dict[str, Any], output: Path) -> dict[str, Any]:
        calls.append(run["settings"])
        return run | {"bits_per_byte": 2.0 + len(calls) / 10, "tflop": 1.0}

    monkeypatch.setattr(script, "train", train)
    flags = ["x", "--filepath", str(text), "--output", str(tmp_path / "out"), "--runs", "3", "--flops"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*flags, "2e11"])
        script.main()
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "{")
    assert first == last and len(calls) == 4 and calls[0] == {}
    assert first["recipe"] == 2.1 and first["best"] == 2.2 and first["draws"] == pytest.approx([2.2, 2.3, 2.4])
    monkeypatch.setattr(sys, "argv", [*flags, "3e11"])
    with pytest.raises(UserError, match=r"found one of .*200000000000"):
        script.main()
