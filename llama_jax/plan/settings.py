"""The vocabulary and the length of a run to plan, if flags and file do not state them, and their sources."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import Config
from llama_jax.data.manifest import TOKENIZER, read_manifest
from llama_jax.data.mixture import folder_of
from llama_jax.data.tokens import find_prepared
from llama_jax.plan.tuning_data import epoch_of_chats, learns_from_chats
from llama_jax.tokenizer import Tokenizer, kept_tokenizer

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
    for name in data.mixture or [data.filepath]:
        if (prepared := find_prepared(name)) is not None:
            tokenizer = kept_tokenizer(prepared / TOKENIZER)
            return Found(tokenizer.vocab_size, str(tokenizer.model_path))
    if data.filepath or data.mixture or stated:
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
    if train.decay_from:
        from llama_jax.training.rates import decay_end  # imported here, because optax takes a second

        steps = decay_end(train)
        return Found(steps * a_step, f"train.decay_from, {train.decay_from:,}, whose decay ends at step {steps:,}")
    from llama_jax.data.batches import windows_of  # imported here, because grain takes a second

    if chats := _of_chats(config):
        return chats
    found = [_prepared(config, name) for name in config.data.mixture or [config.data.filepath]]
    if None not in found:
        folders = [folder for folder, _ in filter(None, found)]
        streams = (np.broadcast_to(np.uint8(0), tokens) for _, tokens in filter(None, found))  # only lengths matter
        rows = sum(windows_of(stream, config.model.max_seq_len) for stream in streams)
        steps = train.n_epochs * -(-rows // train.batch_size)
        return Found(steps * a_step, f"{train.n_epochs} epochs of {', '.join(map(str, folders))}, {steps:,} steps")
    return Found(None, "neither train.max_steps nor prepared tokens give the length of the run; set --tokens")


def _of_chats(config: Config) -> Found | None:
    """Return the tokens of a run on one file of conversations, which are encoded for it. None: it has none.

    Raises UserError if training would refuse them.
    """
    train, length = config.train, config.model.max_seq_len
    source = "" if config.data.mixture else learns_from_chats(config.data)
    if not source:
        return None
    epoch = epoch_of_chats(config)
    if epoch is None:
        return Found(None, f"the tokenizer of {source} is not known; give --train.init-from, or set --tokens")
    steps = train.n_epochs * -(-epoch.rows // train.batch_size)
    return Found(
        steps * train.batch_size * length,
        f"{train.n_epochs} epochs of {source}, {epoch.conversations:,} conversations to train on, in {epoch.rows:,} sequences, {steps:,} steps",
    )


def _prepared(config: Config, name: str) -> tuple[Path, int] | None:
    """Return where the tokens of a text or a source are, and how many are trained on, None if they are nowhere."""
    own = Path(config.train.save_dir).expanduser() / "tokens"
    places = [found] if (found := find_prepared(name)) is not None else []
    places += [folder_of(own, name) if config.data.mixture else own] if config.train.save_dir else []
    for folder in places:
        if (manifest := read_manifest(folder)) is not None:
            return folder, manifest.tokens["train"]
    return None


def with_vocabulary(config: Config, size: int) -> Config:
    """Return the configuration with a vocabulary of ``size``."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
