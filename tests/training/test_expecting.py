"""A run that leaves what is expected of it says so once, and once more when it is back; any other run is silent."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from llama_jax.build import count_parameters
from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs
from llama_jax.expected_args import ExpectedArgs
from llama_jax.training import loop, samples
from llama_jax.training.expecting import expected_of, leaving_text, rows, values_at

WIDE = ExpectedArgs((64, 256), (0.001, 0.001), (1.0, 1.0), (1e3, 1e3))
LOW = ExpectedArgs((128, 256), (0.001, 0.001), (0.002, 0.002), (0.003, 0.003))
# Steps of 64 tokens.
TRAIN = TrainArgs(
    lr=1e-2, warmup_steps=1, max_steps=4, batch_size=4, eval_interval=1, eval_iters=1, log_interval=1, save_interval=1, keep=9
)  # fmt: skip


def told(losses: list[float | None]) -> list[str]:
    """What is said of evaluations, one a step, of which 1 to 2 bits per byte are expected."""
    lines: list[str] = []
    records: list[dict[str, Any]] = []
    for step, bits in enumerate(losses, 1):
        records.append({"step": step - 0.5})  # a step that is logged without an evaluation
        record = {"step": step, "eval_bits_per_byte": bits, "expected_low": 1.0, "expected_high": 2.0}
        lines.append(leaving_text(records, record))
        records.append(record)
    return lines


def test_leaving_and_coming_back_are_told_once_each() -> None:
    assert told([1.5, 1.0, 2.0, None]) == [""] * 4
    found = told([1.5, 2.5, 2.6, None, 2.4, 1.9, 1.8, 0.9, 0.8, 3.0])
    assert found[1] == (
        "step 2: warning: the held-out loss, 2.500 bits per byte, is above the expected 1.000 to 2.000; usual causes are a "
        "learning rate that is too high or too low, another text than the recipe's, and a tokenizer that was not made for this text"
    )
    assert found[5] == "step 6: the held-out loss, 1.900 bits per byte, is back within the expected 1.000 to 2.000"
    assert (
        "step 8: warning: " in found[7] and "is below the expected" in found[7] and "held-out text stands" in found[7]
    )
    assert "step 10: warning: " in found[9] and "is above the expected" in found[9]
    assert [bool(line) for line in found] == [False, True, False, False, False, True, False, True, False, True]


def test_nothing_is_expected_before_the_first_point() -> None:
    assert values_at(LOW, 127) == {} == values_at(ExpectedArgs(), 200) and rows(ExpectedArgs()) == []
    assert values_at(LOW, 200) == pytest.approx(
        {"expected_low": 0.001, "expected_bits_per_byte": 0.002, "expected_high": 0.003}
    )
    assert leaving_text([], {"step": 1, "eval_bits_per_byte": 9.0}) == ""
    ((name, text),) = rows(LOW)
    assert name == "expected" and text.startswith("0.002 bits per byte held out at the end, 0.001 to 0.003; ")
    assert text.endswith("from 50% of the run on")


def test_what_was_expected_of_another_run_is_not_expected_and_a_note_says_why() -> None:
    model = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16, vocab_size=280)
    given = dataclasses.replace(LOW, parameters=count_parameters(model))
    config = Config(model, expected=given)
    assert expected_of(config, 256) == (given, "") and expected_of(Config(model), 256) == (ExpectedArgs(), "")
    other, note = expected_of(config, 300)
    assert other == ExpectedArgs() and "is for a run of 256 tokens, and this one reads 300" in note
    other, note = expected_of(dataclasses.replace(config, model=dataclasses.replace(model, dim=32)), 256)
    assert other == ExpectedArgs() and f"is for a model of {given.parameters:,} parameters, and this one has" in note


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expecting")
    (folder / "a.txt").write_text("\n".join(f"the {i} cats sat on {i % 7} mats by the sea" for i in range(300)))
    return folder


def trained(folder: Path, name: str, expected: ExpectedArgs, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
    """What a small run prints, and its records."""
    train = dataclasses.replace(TRAIN, save_dir=str(folder / name), **changes)
    model = ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=16)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "show", lambda *_, **__: 0)
        patch.setattr(samples, "draw_losses", lambda *_: None)
        run = loop.train(Config(model, DataArgs(str(folder / "a.txt"), vocab_size=280), train, expected=expected))
    return printed.getvalue(), [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def test_a_run_outside_warns_once_and_not_again_when_it_resumes(folder: Path) -> None:
    printed, records = trained(folder, "outside", LOW)
    assert printed.count("warning: the held-out loss") == 1 and "step 2: warning: the held-out loss" in printed
    assert "expected  0.002 bits per byte held out at the end" in printed
    compared = [record["step"] for record in records if "expected_bits_per_byte" in record]
    assert compared == [2, 3, 4], "the first point lies after the first step"
    again, now = trained(folder, "outside", LOW, resume_step=3)
    assert "warning: the held-out loss" not in again and "changed" not in again.replace(
        "changed  train.resume_step", ""
    )
    assert [record["eval_loss"] for record in now] == [record["eval_loss"] for record in records]
    before, _ = trained(folder, "outside", LOW, resume_step=1)
    assert before.count("warning: the held-out loss") == 1, "what was said after step 1 is forgotten"


def test_a_run_inside_is_silent_and_takes_the_same_steps(folder: Path) -> None:
    printed, records = trained(folder, "inside", WIDE)
    assert "warning: the held-out loss" not in printed and "back within" not in printed
    plain, others = trained(folder, "plain", ExpectedArgs())
    assert "expected" not in plain and not any(key.startswith("expected") for record in others for key in record)
    assert [r["eval_loss"] for r in records] == [r["eval_loss"] for r in others]
    longer, _ = trained(folder, "longer", WIDE, max_steps=5)
    assert "note  no loss is expected: [expected] of the settings is for a run of 256 tokens" in longer
