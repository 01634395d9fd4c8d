"""The vocabulary and the length of a run to plan, if flags and file do not state them, and their sources."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import Config
from llama_jax.data.tokens import TOKENIZER, find_prepared, read_manifest
from llama_jax.tokenizer import Tokenizer

# LLaMA 2's vocabulary.
VOCAB_SIZE = 32000


class Found(NamedTuple):
    """A number, or None if it is unknown, and its source."""

    value: float | None
    source: str


def vocabulary(config: Config, stated: bool = False) -> Found:
    """Return the vocabulary size that ``train.py`` would use.

    ``stated``: a flag or the file gives data.vocab_size. Raises UserError if the configured tokenizer cannot be read.
    """
    model, data = config.model, config.data
    if model.vocab_size != -1:
        return Found(model.vocab_size, "model.vocab_size")
    if data.tokenizer_model_path:
        return Found(Tokenizer(data.tokenizer_model_path).vocab_size, data.tokenizer_model_path)
    if (prepared := find_prepared(data.filepath)) is not None:
        path = prepared / TOKENIZER
        return Found(Tokenizer(path).vocab_size, str(path))
    if data.filepath or stated:
        return Found(data.vocab_size, "data.vocab_size, of the tokenizer that the run will train")
    return Found(
        VOCAB_SIZE,
        "LLaMA 2's, because the configuration names no tokenizer; set --data.tokenizer-model-path to change it",
    )


def run_tokens(config: Config, given: float | None = None) -> Found:
    """Return the tokens of the whole run: ``given``, or from its steps, or from its epochs if its text is prepared."""
    train = config.train
    if given is not None:
        return Found(given, "--tokens")
    a_step = train.batch_size * config.model.max_seq_len
    if train.max_steps is not None:
        return Found(train.max_steps * a_step, f"train.max_steps, {train.max_steps:,}")
    from llama_jax.data.batches import steps_per_epoch  # imported here, because grain takes a second

    prepared = find_prepared(config.data.filepath)
    for folder in filter(None, [prepared, Path(train.save_dir).expanduser() / "tokens" if train.save_dir else None]):
        if (manifest := read_manifest(folder)) is not None:
            stream = np.broadcast_to(np.uint8(0), manifest.tokens["train"])  # only its length matters
            steps = train.n_epochs * steps_per_epoch(stream, train.batch_size, config.model.max_seq_len)
            return Found(steps * a_step, f"{train.n_epochs} epochs of {folder}, {steps:,} steps")
    return Found(None, "neither train.max_steps nor prepared tokens give the length of the run; set --tokens")


def with_vocabulary(config: Config, size: int) -> Config:
    """Return the configuration with a vocabulary of ``size``."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
