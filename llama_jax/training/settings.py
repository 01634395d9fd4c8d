"""Settings that change when a run is resumed: some are refused, the others are printed with the old and new value."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.identity import digest_of_parameters
from llama_jax.config import Config, DataArgs, DistributedArgs, ModelArgs, TrainArgs, from_dict, to_toml
from llama_jax.devices.distributed import from_all, text_from_main
from llama_jax.errors import UserError
from llama_jax.training.rates import learning_rate

# Settings that a run cannot change: its model, those that decide which tokens a step reads, and the form of its state.
FIXED = {
    "model": tuple(field.name for field in dataclasses.fields(ModelArgs)),
    # data/ compares the text and the tokenizer themselves.
    "data": ("train_size", "separator", "vocab_size", "stories", "chats"),
    # A checkpoint holds the parameters and the optimizer's state in these forms.
    "train": (
        *("minutes", "batch_size", "batch_start", "batch_ramp_steps", "seed", "objective", "schedule"),
        *("param_dtype", "rounding", "optimizer", "moments"),
    ),
    "lora": ("rank", "strength", "targets", "base_weights", "rslora"),
}
# Settings that decide what an evaluation measures: losses before and after a change are not comparable.
MEASURES = {
    *("data.document_mask", "data.mixture", "data.chat_template", "data.loss_on", "data.too_long", "data.text_field"),
    *("train.eval_iters", "train.dpo_beta", "train.dpo_label_smoothing"),
}
# Settings of places, which do not affect the results.
PLACES = {"train.save_dir", "train.checkpoint_dir", "train.resume_step", "train.decay_run", "data.cache_gb"}


class Change(NamedTuple):
    """A setting that differs from the previous start."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}"


def changes(stored: Config, now: Config, folder: Path, began_with: str = "") -> list[Change]:
    """Return the settings that this start changes. Raises UserError if the run in ``folder`` cannot change one.

    began_with: the digest of the whole model that the run began with. Empty: unknown, or none.
    """
    found = []
    if stored.train.init_from != now.train.init_from:  # first, as other settings follow from it
        _check_begins_alike(stored.train.init_from, now.train, folder, "" if now.lora.rank else began_with)
    for section in ("model", "data", "train", "mesh", "lora", "expected"):
        before, after = getattr(stored, section), getattr(now, section)
        for field in dataclasses.fields(before):
            name, old, new = f"{section}.{field.name}", getattr(before, field.name), getattr(after, field.name)
            unresolved = name == "model.vocab_size" and -1 in (old, new)
            if old == new or unresolved or name in PLACES:
                continue
            key = "strength" if name == "lora.alpha" else field.name
            if key in FIXED.get(section, ()):
                check_same(stored, now, folder, section, key)
            if name == "lora.alpha":  # None and its value are one strength
                continue
            if name == "train.init_from" and not now.lora.rank and now.train.objective != "dpo":
                new = f"{new}, which is not read, as the run goes on from its own checkpoint"
            found.append(Change(name, old, new))
    return found


def check_alike(config: Config) -> None:
    """Raise UserError on all processes of a job if one of them has other settings than process 0.

    Each compiles its own program, so unlike settings would mix numbers, or wait for each other.

    All processes call this.
    """
    if jax.process_count() == 1:
        return
    mine = _without_own(config)
    theirs = from_dict(Config, tomllib.loads(text_from_main(to_toml(mine))), "process 0")
    unlike = next(
        (
            f"{section.name}.{field.name}: expected {old!r}, as process 0 has it, found {new!r} in process {jax.process_index()}"
            for section in dataclasses.fields(Config)
            for field in dataclasses.fields(getattr(mine, section.name))
            for old, new in [[getattr(getattr(each, section.name), field.name) for each in (theirs, mine)]]
            if old != new
        ),
        "",
    )
    others = [process for process, differs in enumerate(from_all(int(bool(unlike)))) if differs]
    if others:
        unlike = (
            unlike or f"distributed: expected the settings of process 0 everywhere, found others in process {others[0]}"
        )
        raise UserError(f"{unlike}; start all processes with the same settings")


def _without_own(config: Config) -> Config:
    """Return the settings without those that each process may have of its own."""
    data = dataclasses.replace(config.data, cache_gb=DataArgs.cache_gb)
    return dataclasses.replace(config, distributed=DistributedArgs(), data=data)


def check_fixed(stored: Config, now: Config, folder: Path, continued: bool = False) -> None:
    """Raise UserError if a setting that a run cannot change, and that no text decides, is another one.

    continued: the run in ``folder`` is continued in another folder.
    """
    remedy = "leave it out, as a run that is continued keeps it" if continued else ""
    for section in ("train", "lora"):
        for field in FIXED[section]:
            check_same(stored, now, folder, section, field, remedy)


def check_same(stored: Config, now: Config, folder: Path, section: str, field: str, remedy: str = "") -> None:
    """Raise UserError, with a ``remedy``, if a setting has not the value with which the run in ``folder`` began."""
    old, new = (getattr(getattr(config, section), field) for config in (stored, now))
    name = "alpha" if field == "strength" else field
    if old != new:
        raise UserError(
            f"{section}.{name}: expected {old!r}, with which the run in {folder} began, found {new!r}; "
            + (remedy or f"give the same value, choose another --train.save-dir, or delete {folder}")
        )


def _check_begins_alike(old: str, now: TrainArgs, folder: Path, began_with: str) -> None:
    """Raise UserError if the run in ``folder`` began with a model, ``old``, and this start with none.

    The other way round is an error, too, and so is another model than ``began_with``, its digest. One that moved is
    the same.
    """
    new = now.init_from
    if bool(old) == bool(new):
        if began_with and _digest(new) not in ("", began_with):
            raise UserError(
                f"train.init_from: expected {old!r}, with which the run in {folder} began, found another model in {new}; give the same, "
                "or choose another --train.save-dir"
            )
        return
    began = (
        f"{old!r}, with which the run in {folder} began"
        if old
        else f"none, as the run in {folder} began without a model"
    )
    raise UserError(
        f"train.init_from: expected {began}, found {new or 'none'}; "
        + ("give the same" if old else "leave it out to resume that run")
        + ", or choose another --train.save-dir"
    )


def _digest(place: str) -> str:
    """Return a digest of the parameters of a checkpoint, or "" if there is none, as where it has moved."""
    try:
        return digest_of_parameters(Checkpoint.find(place).folder)
    except (UserError, OSError):
        return ""


def check_made_by(origin: dict[str, Any], train: TrainArgs, step: int) -> None:
    """Raise UserError if another optimizer made the checkpoint of ``step``, of which ``origin`` says where it is from.

    Of a run whose settings are known, ``changes`` compares them.
    """
    made_by = origin.get("optimizer", train.optimizer)
    if made_by != train.optimizer:
        raise UserError(
            f"train.optimizer: expected {made_by!r}, with which the checkpoint of step {step:,} was made, found {train.optimizer!r}; "
            "give the same value, or choose another --train.save-dir"
        )


def rate_text(stored: Config, before: int, now: Config, steps: int, held: float | None, step: int) -> str:
    """Return the learning rate of ``step`` by the previous start's schedule (of ``before`` steps) and by this one's.

    The text is empty if they are equal as they are printed: two computations of one rate may differ in their last bits.
    """
    rates = learning_rate(stored.train, before), learning_rate(now.train, steps, held)
    old, new = (f"{float(rate(step)):.3g}" for rate in rates)
    return f"learning rate at step {step:,}: {old} as it was, {new} now" if old != new else ""
