"""Settings that change when a run is resumed, without a run."""

import dataclasses
from pathlib import Path

import pytest

from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs
from llama_jax.training.settings import changes, rate_text

RUN = Path("runs/x")
BEGAN = Config(train=TrainArgs(init_from="base"), lora=LoraArgs(rank=8))


def test_the_default_strength_written_out_is_no_change() -> None:
    assert changes(BEGAN, dataclasses.replace(BEGAN, lora=LoraArgs(rank=8, alpha=16.0)), RUN) == []


def test_another_strength_is_refused_in_numbers() -> None:
    with pytest.raises(
        UserError, match=r"^lora\.alpha: expected 16\.0, with which the run in runs/x began, found 3\.0"
    ):
        changes(BEGAN, dataclasses.replace(BEGAN, lora=LoraArgs(rank=8, alpha=3.0)), RUN)


@pytest.mark.parametrize(("before", "now"), [("", "base"), ("base", "")])
def test_a_run_begins_with_a_model_or_without(before: str, now: str) -> None:
    old, new = (Config(train=TrainArgs(init_from=name)) for name in (before, now))
    with pytest.raises(
        UserError, match=r"^train\.init_from: expected .*, found .*; .*choose another --train\.save-dir"
    ):
        changes(old, new, RUN)


def test_a_model_that_a_run_did_not_begin_with_is_refused_before_what_follows_from_it() -> None:
    # The vocabulary of a start with a model is the model's, so that another size could not be given back.
    old = Config(data=DataArgs(vocab_size=300), model=ModelArgs(dim=32, n_heads=2))
    with pytest.raises(UserError, match=r"^train\.init_from: expected none, .* leave it out to resume that run"):
        changes(old, Config(train=TrainArgs(init_from="base")), RUN)


def test_a_base_that_was_moved_is_told() -> None:
    moved = dataclasses.replace(BEGAN, train=TrainArgs(init_from="elsewhere"))
    assert [str(change) for change in changes(BEGAN, moved, RUN)] == ["train.init_from base -> elsewhere"]


@pytest.mark.parametrize(("step", "told"), [(5, ""), (6, "learning rate at step 6: 0.0004 as it was, 0.004 now")])
def test_a_rate_that_is_the_same_in_what_is_printed_is_not_told_as_another(step: int, told: str) -> None:
    """The sixth of six steps is the decay of wsd, which of twelve begins at the tenth."""
    runs = [
        Config(train=TrainArgs(schedule="wsd", lr=4e-3, warmup_steps=2, max_steps=steps, min_lr_ratio=0.1))
        for steps in (6, 12)
    ]
    assert rate_text(runs[0], 6, runs[1], 12, None, step) == told
