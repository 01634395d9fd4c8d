"""The vocabulary and the length of a run to plan, if flags and file do not state them, and their sources."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import Config
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.manifest import TOKENIZER, read_manifest
from llama_jax.data.mixture import folder_of
from llama_jax.data.tokens import find_prepared
from llama_jax.plan.tuning_data import chat_sources, count_chats, named, sources_here
from llama_jax.tokenizer import Tokenizer, kept_tokenizer
from llama_jax.training.objective import make_objective

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


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the data of a run: the sequences, and of conversations or preferences how many there are."""

    rows: int
    records: int | None  # None: a text
    most_pairs: int
    source: str

    def steps(self, config: Config, epochs: int = 1) -> int:
        """Return the number of steps of a run of this many epochs."""
        return BatchSizes.of(config.train).steps(epochs * self.rows)


def epoch_of(config: Config) -> tuple[Epoch | None, str]:
    """Return an epoch of a run, or None and why it is not known.

    Prepared tokens are counted, and conversations and preferences, which are encoded for it. Raises UserError if
    training would refuse them.
    """
    from llama_jax.data.batches import windows_of  # imported here, because grain takes a second

    data, length = config.data, config.model.max_seq_len
    names, talks = list(data.mixture or [data.filepath]), chat_sources(data)
    if config.train.objective == "dpo" and not talks:
        talks = sources_here(data)  # which training refuses
    chats = count_chats(config, talks) if talks else {}
    if chats is None:
        return None, f"the tokenizer of {named(talks[0], data)} is not known; give --train.init-from, or set --tokens"
    rows, places = 0, []
    for name in names:
        if name in chats:
            rows += chats[name].rows
            places.append(named(name, data))
        elif found := _prepared(config, name):
            rows += windows_of(np.broadcast_to(np.uint8(0), found[1]), length)  # only the length matters
            places.append(str(found[0]))
        else:
            return None, "neither train.max_steps nor prepared tokens give the length of the run; set --tokens"
    records = sum(chat.records for chat in chats.values()) if chats else None
    most = max((chat.most_pairs for chat in chats.values()), default=1)
    return Epoch(rows, records, most, ", ".join(places)), ""


def run_tokens(config: Config, given: float | None = None, known: tuple[Epoch | None, str] | None = None) -> Found:
    """Return the tokens of the whole run: ``given``, or from its steps, or from its epochs if its data are here.

    ``known`` is the result of ``epoch_of``. None: it is called if it is needed.
    """
    train = config.train
    if given is not None:
        return Found(given, "--tokens")
    sizes, positions = BatchSizes.of(train), make_objective(config).length(config.model)
    if train.max_steps is not None:
        return Found(sizes.rows(train.max_steps) * positions, f"train.max_steps, {train.max_steps:,}")
    if train.decay_from:
        from llama_jax.training.rates import decay_end  # imported here, because optax takes a second

        steps = decay_end(train)
        return Found(
            sizes.rows(steps) * positions, f"train.decay_from, {train.decay_from:,}, whose decay ends at step {steps:,}"
        )
    epoch, why = known or epoch_of(config)
    if epoch is None:
        return Found(None, why)
    steps = epoch.steps(config, train.n_epochs)
    what = ""
    if epoch.records is not None:
        kind = "pairs of answers" if train.objective == "dpo" else "conversations"
        what = f"{epoch.records:,} {kind} to train on, in {epoch.rows:,} sequences, "
    return Found(sizes.rows(steps) * positions, f"{train.n_epochs} epochs of {epoch.source}, {what}{steps:,} steps")


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
