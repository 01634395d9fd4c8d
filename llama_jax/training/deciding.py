"""Settings of which two decide the same thing: one of them counts, which is told."""

import dataclasses
from typing import Any

from llama_jax.config import Config

# Pairs of settings that decide the same thing. If both are given, the second one wins.
PAIRS = (
    ("train.n_epochs", "train.max_steps"),
    ("train.n_epochs", "train.decay_from"),
    ("data.vocab_size", "data.tokenizer_model_path"),
    ("data.stories", "data.filepath"),
    ("data.stories", "data.mixture"),
    ("data.stories", "data.chats"),
    ("data.chats", "data.filepath"),
    ("data.chats", "data.mixture"),
    ("data.filepath", "data.chats"),
    ("data.mixture", "data.chats"),
    ("data.filepath", "data.mixture"),
    ("data.mixture", "data.filepath"),
    ("model.ffn_dim_multiplier", "model.hidden_dim"),
    ("model.multiple_of", "model.hidden_dim"),
)


def decide(config: Config, given: set[str]) -> tuple[Config, list[str]]:
    """Resolve conflicts between two settings that decide the same thing: a flag wins.

    Return a note for each conflict.
    """
    notes = []
    for first, second in PAIRS:
        if first in given and get(config, second):
            if second in given:
                notes.append(
                    f"{first} {get(config, first)} is not used, as {second} {get(config, second)} decides the same"
                )
            else:
                notes.append(
                    f"{second} {get(config, second)} of the file is not used, as --{first} {get(config, first)} decides the same"
                )
                config = with_value(config, second, get(Config(), second))
    return config, notes


def get(config: Config, name: str) -> Any:
    """Return the value of a setting, named as ``train.lr``."""
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def with_value(config: Config, name: str, value: Any) -> Config:
    """Return the configuration with another value of a setting."""
    section, field = name.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})
