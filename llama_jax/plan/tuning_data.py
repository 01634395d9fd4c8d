"""Conversations that a run to plan learns from: told by their file, and counted in its sequences."""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from llama_jax.chat.formats import ChatSetup
from llama_jax.config import Config, DataArgs
from llama_jax.data.conversations import Conversations
from llama_jax.data.finding import find_text, is_chats
from llama_jax.data.tokens import find_prepared
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address


class Epoch(NamedTuple):
    """The number of conversations of an epoch, and of the sequences that they are packed into."""

    conversations: int
    rows: int


def learns_from_chats(data: DataArgs) -> str:
    """Return the conversations among the data of a run, or an empty text.

    A file that is elsewhere is not looked for: a plan may be made where the data are not.
    """
    if data.chats and not data.filepath and not data.mixture:
        return f"{data.chats:,} built-in conversations"
    for name in data.mixture or [data.filepath]:
        if not name or is_address(name) or not Path(name).expanduser().exists() or find_prepared(name) is not None:
            continue
        with contextlib.suppress(UserError), tempfile.TemporaryDirectory() as folder:
            one = dataclasses.replace(data, filepath=name, mixture={}, eval_filepath="")
            if is_chats(find_text(one, Path(folder))):
                return name
    return ""


def with_masks(config: Config) -> tuple[Config, list[str]]:
    """Return the configuration with the document masks that training turns on for conversations, and notes."""
    if config.data.document_mask or not (found := learns_from_chats(config.data)):
        return config, []
    data = dataclasses.replace(config.data, document_mask=True)
    return dataclasses.replace(config, data=data), [f"document masks, as {found} are conversations, each by itself"]


def epoch_of_chats(config: Config) -> Epoch | None:
    """Return what an epoch of the conversations has, encoded as training does. None: their tokenizer is not known.

    Raises UserError if training would refuse them.
    """
    from llama_jax.convert.once import open_model  # imported here, because orbax takes seconds
    from llama_jax.data import Data, Talking, load_data
    from llama_jax.data.batches import windows_of

    train, data, length = config.train, config.data, config.model.max_seq_len
    setup, source = ChatSetup(has_none=True), "the model"
    if train.init_from:
        base = open_model(train.init_from)
        setup, source = base.chat, str(base.folder)
        data = dataclasses.replace(data, tokenizer_model_path=str(base.tokenizer.place))
    if not data.tokenizer_model_path:
        return None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        at = Path(folder)
        found = load_data(data, at / "tokens", at / "tokenizer.model", talking=Talking(setup, source, length))
        assert isinstance(found, Data)
        stream = found.tokens.train
        assert isinstance(stream, Conversations)
        return Epoch(stream.count, windows_of(stream, length))
