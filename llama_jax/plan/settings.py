"""What plan takes for a run's vocabulary and length where flags and file leave them open, and where it found them."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import Config
from llama_jax.data.tokens import read_manifest
from llama_jax.tokenizer import Tokenizer

# LLaMA 2's vocabulary.
VOCAB_SIZE = 32000


class Found(NamedTuple):
    """A number, None where it cannot be known, and where it comes from."""

    value: float | None
    source: str


def vocabulary(config: Config, stated: bool = False) -> Found:
    """The vocabulary that ``train.py`` would have. stated: data.vocab_size was given, by a flag or by the file.

    Raises UserError where a tokenizer that the configuration names cannot be read.
    """
    model, data = config.model, config.data
    if model.vocab_size != -1:
        return Found(model.vocab_size, "model.vocab_size")
    if data.tokenizer_model_path:
        return Found(Tokenizer(data.tokenizer_model_path).vocab_size, data.tokenizer_model_path)
    prepared = Path(data.filepath).expanduser()
    if data.filepath and read_manifest(prepared) is not None:
        path = prepared / "tokenizer.model"
        return Found(Tokenizer(path).vocab_size, str(path))
    if data.filepath or stated:
        return Found(data.vocab_size, "data.vocab_size, of the tokenizer that the run will train")
    return Found(
        VOCAB_SIZE,
        "LLaMA 2's, taken because the configuration names no tokenizer; --data.tokenizer-model-path names one",
    )


def run_tokens(config: Config, given: float | None = None) -> Found:
    """Tokens that the whole run trains on: those ``given``, those of its steps, or those of its epochs where its text is prepared."""
    train = config.train
    if given is not None:
        return Found(given, "--tokens")
    a_step = train.batch_size * config.model.max_seq_len
    if train.max_steps is not None:
        return Found(train.max_steps * a_step, f"train.max_steps, {train.max_steps:,}")
    from llama_jax.data.batches import steps_per_epoch  # grain takes a second

    folders = [Path(config.data.filepath).expanduser()] if config.data.filepath else []
    folders += [Path(train.save_dir).expanduser() / "tokens"] if train.save_dir else []
    for folder in folders:
        if (manifest := read_manifest(folder)) is not None:
            stream = np.broadcast_to(np.uint8(0), manifest.tokens["train"])  # its length is what counts
            steps = train.n_epochs * steps_per_epoch(stream, train.batch_size, config.model.max_seq_len)
            return Found(steps * a_step, f"{train.n_epochs} epochs of {folder}, {steps:,} steps")
    return Found(None, "neither train.max_steps nor prepared tokens say how long the run is; --tokens does")


def with_vocabulary(config: Config, size: int) -> Config:
    """The configuration with a vocabulary of ``size``."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
