"""Conversations and preferences that a run to plan learns from: told by their files, and counted in its sequences."""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.chat.formats import ChatSetup
from llama_jax.config import Config, DataArgs
from llama_jax.data.conversations import Pairs
from llama_jax.data.finding import find_text, is_chats
from llama_jax.data.manifest import TOKENIZER
from llama_jax.data.tokens import find_prepared
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address


class Chats(NamedTuple):
    """The conversations or pairs of an epoch of a source, the sequences that hold them, and the most pairs of one."""

    records: int
    rows: int
    most_pairs: int = 1


def chat_sources(data: DataArgs) -> list[str]:
    """Return the names of the conversations among the data of a run, "" for the built-in ones.

    A file that is elsewhere is not looked for: a plan may be made where the data are not.
    """
    if data.chats and not data.filepath and not data.mixture:
        return [""]
    found = []
    for name in sources_here(data):
        if find_prepared(name) is not None:
            continue
        with contextlib.suppress(UserError), tempfile.TemporaryDirectory() as folder:
            one = dataclasses.replace(data, filepath=name, mixture={}, eval_filepath="")
            if is_chats(find_text(one, Path(folder))):
                found.append(name)
    return found


def sources_here(data: DataArgs) -> list[str]:
    """Return the names of the files and folders of a run that are on this machine."""
    return [
        name
        for name in data.mixture or [data.filepath]
        if name and not is_address(name) and Path(name).expanduser().exists()
    ]


def named(source: str, data: DataArgs) -> str:
    """Return a source as text."""
    return source or f"{data.chats:,} built-in conversations"


def with_masks(config: Config) -> tuple[Config, list[str]]:
    """Return the configuration with the document masks that training turns on for conversations, and notes."""
    if config.data.document_mask:
        return config, []
    why = "each answer to a prompt is a document" if config.train.objective == "dpo" else ""
    if not why and (sources := chat_sources(config.data)):
        why = f"{named(sources[0], config.data)} are conversations, each by itself"
    if not why:
        return config, []
    data = dataclasses.replace(config.data, document_mask=True)
    return dataclasses.replace(config, data=data), [f"document masks, as {why}"]


def count_chats(config: Config, sources: list[str]) -> dict[str, Chats] | None:
    """Return what an epoch has of conversations, encoded as training does. None: their tokenizer is not known.

    Raises UserError if training would refuse them.
    """
    from llama_jax.convert.once import open_model  # imported here, because orbax takes seconds
    from llama_jax.data import Data, MixedData, Talking, load_data
    from llama_jax.data.mixing import source_args
    from llama_jax.data.opened import chat_format_of

    train, data, length = config.train, config.data, config.model.max_seq_len
    setup, origin = ChatSetup(has_none=True), "the model"
    if train.init_from:
        base = open_model(train.init_from)
        setup, origin = base.chat, train.init_from
        data = dataclasses.replace(data, tokenizer_model_path=str(base.tokenizer.place))
    if not data.tokenizer_model_path:
        prepared = [place for name in data.mixture if (place := find_prepared(name)) is not None]
        if not prepared:
            return None
        data = dataclasses.replace(data, tokenizer_model_path=str(prepared[0] / TOKENIZER))
    talking = Talking(setup, origin, length, train.objective == "dpo")
    opened, counted = {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        at = Path(folder)
        for number, name in enumerate(sources):
            one = source_args(data, name) if data.mixture else data
            found = load_data(one, at / str(number), at / "tokenizer.model", talking=talking)
            assert isinstance(found, Data)
            opened[name], counted[name] = found, _counted(found, length)
        chat_format_of(MixedData(opened, {}, found.tokenizer))
    return counted


def _counted(data: Any, length: int) -> Chats:
    """Return what an epoch has of the conversations or preferences that were loaded."""
    from llama_jax.data.batches import windows_of  # imported here, because grain takes a second

    streams = data.tokens.train, data.tokens.eval
    most = max((stream.most_pairs(length) for stream in streams if isinstance(stream, Pairs)), default=1)
    return Chats(streams[0].records, windows_of(streams[0], length), max(1, most))
