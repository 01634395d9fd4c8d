"""What a start changes of a run's settings: refused, or told with the old value and the new one."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from llama_jax.config import Config, ModelArgs
from llama_jax.errors import UserError
from llama_jax.training.step import learning_rate

# What a run cannot change between two starts: its model, and which tokens a step reads.
FIXED = {
    "model": tuple(field.name for field in dataclasses.fields(ModelArgs)),
    "data": ("train_size", "separator", "vocab_size", "stories"),  # and the text and tokenizer themselves, see data/
    "train": ("batch_size", "seed"),
}
# Where things are, and how processes meet: they change nothing of the run.
PLACES = {"train.save_dir", "train.checkpoint_dir", "train.resume_step"}


class Change(NamedTuple):
    """A setting that is another one than at the start before."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.name} {self.old} -> {self.new}"


def changes(stored: Config, now: Config, folder: Path) -> list[Change]:
    """The settings that this start changes. Raises UserError where the run in ``folder`` cannot change one."""
    found = []
    for section in ("model", "data", "train", "mesh"):
        before, after = getattr(stored, section), getattr(now, section)
        for field in dataclasses.fields(before):
            name, old, new = f"{section}.{field.name}", getattr(before, field.name), getattr(after, field.name)
            unresolved = name == "model.vocab_size" and -1 in (old, new)
            if old == new or unresolved or name in PLACES:
                continue
            if field.name in FIXED.get(section, ()):
                raise UserError(
                    f"{name}: expected {old!r}, as the run in {folder} began with, found {new!r}; "
                    f"choose another --train.save-dir, or delete {folder}"
                )
            found.append(Change(name, old, new))
    return found


def rate_text(stored: Config, before: int, now: Config, steps: int, held: float | None, step: int) -> str:
    """The learning rate of ``step`` as the start before would have had it, of ``before`` steps, and as this one has it."""
    old = float(learning_rate(stored.train, before)(step))
    new = float(learning_rate(now.train, steps, held)(step))
    return f"learning rate at step {step:,}: {old:.3g} as it was, {new:.3g} now" if old != new else ""
