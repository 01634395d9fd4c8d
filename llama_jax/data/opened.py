"""The data of a run, opened: one text, or a mixture of several."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.chat.formats import ChatFormat
from llama_jax.data.conversations import ChatTokens, Stream
from llama_jax.data.mixture import Mixed, Schedule
from llama_jax.data.origin import Origin
from llama_jax.data.tokens import TokenSet
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

# The key of a run's record under which it describes the texts of a mixture.
MIXTURE = "mixture"


@dataclass(frozen=True)
class Data:
    """The data of a run on one text.

    ``floor`` is the entropy of the text in bits per byte, if it is known (the built-in stories). ``notes`` are lines to
    print about what was left out and other surprises.
    """

    tokens: TokenSet | ChatTokens
    tokenizer: Tokenizer
    source: str
    floor: float | None = None
    notes: tuple[str, ...] = ()
    chat: ChatFormat | None = None
    """The format of conversations. None: a text."""

    @property
    def sources(self) -> "dict[str, Data]":
        """The texts by their names. That of a single one is empty."""
        return {"": self}

    def rows(self, schedule: Schedule | None) -> Stream | Mixed:
        """Return what training reads rows from."""
        return self.tokens.train

    def record(self) -> dict[str, Any]:
        """Return a description of the text for the record of a run, which ``origins`` reads."""
        return self.tokens.manifest.origin.to_dict()

    def combine(self, losses: Mapping[str, float], document_mask: bool) -> tuple[float, float | None]:
        """Return the held-out loss, in nats a token, and in bits per byte if that is known."""
        (loss,) = losses.values()
        return loss, self.tokens.bits_per_byte(loss, document_mask)


@dataclass(frozen=True)
class MixedData:
    """The data of a run on a mixture: its texts by their names, and the share of the rows that each is to have."""

    sources: dict[str, Data]
    shares: dict[str, float]
    tokenizer: Tokenizer

    floor = None

    @property
    def source(self) -> str:
        """The mixture in words."""
        return "a mixture of " + ", ".join(f"{name} ({percent(share)})" for name, share in self.shares.items())

    def rows(self, schedule: Schedule | None) -> Stream | Mixed:
        """Return what training reads rows from."""
        assert schedule is not None
        return Mixed({name: data.tokens.train for name, data in self.sources.items()}, schedule)

    def record(self) -> dict[str, Any]:
        """Return a description of the texts for the record of a run, which ``origins`` reads."""
        return {MIXTURE: {name: data.record() for name, data in self.sources.items()}}

    def combine(self, losses: Mapping[str, float], document_mask: bool) -> tuple[float, float | None]:
        """Return the mean held-out loss of the sources by their shares, in nats a token, and in bits per byte.

        A source without held-out text has no loss, and no part in the mean.
        """
        shares = np.array([self.shares[name] for name in losses])
        loss = float(np.average(list(losses.values()), weights=shares))
        bits: list[float | None] = [self.sources[name].tokens.bits_per_byte(1.0, document_mask) for name in losses]
        if None in bits:
            return loss, None
        # One nat a token is ``bits`` bits a byte, so that a token has log2(e) / bits bytes.
        bytes_a_token = float(np.average(1 / (math.log(2) * np.array(bits, float)), weights=shares))
        return loss, loss / math.log(2) / bytes_a_token


AnyData = Data | MixedData


def chats_in(data: AnyData) -> "dict[str, Data]":
    """Return the sources that are conversations, by their names."""
    return {name: source for name, source in data.sources.items() if source.chat is not None}


def chat_format_of(data: AnyData) -> ChatFormat | None:
    """Return the format of all conversations, None of texts. Raises UserError if sources have different ones."""
    found = {name: source.chat for name, source in chats_in(data).items() if source.chat is not None}
    if len({chat.template for chat in found.values()}) > 1:
        formats = ", ".join(f"{name} has {chat.name}" for name, chat in found.items())
        raise UserError(
            f"data.chat_template: expected one format for all conversations, found that {formats}; choose one with --data.chat-template"
        )
    return next(iter(found.values()), None)


def origins(record: dict[str, Any]) -> dict[str, Origin]:
    """Return the texts that a run's record describes, by their names. That of a single one is empty.

    Raises TypeError, KeyError or AttributeError on anything else.
    """
    if MIXTURE in record:
        return {name: Origin.from_dict(table) for name, table in record[MIXTURE].items()}
    return {"": Origin.from_dict(record)}


def other_names(data: AnyData, before: Mapping[str, Origin]) -> dict[str, str]:
    """Return the names of a mixture's sources that a run has read under other names ``before``, each with that name.

    A source that moved has the same text and the same tokens.
    """
    gone = {name: origin for name, origin in before.items() if name not in data.sources}
    found: dict[str, str] = {}
    for name, source in data.sources.items():
        now = source.tokens.manifest.origin
        for old, was in gone.items() if name not in before else ():
            if old not in found.values() and _tokens(was) == _tokens(now):
                found[name] = old
                break
    return found


def _tokens(origin: Origin) -> tuple[str, str, str]:
    return origin.text_sha256, origin.tokenizer_sha256, origin.tokens_sha256


def with_earlier(record: dict[str, Any], before: Mapping[str, Origin], names: Collection[str]) -> dict[str, Any]:
    """Return a mixture's ``record`` with those sources of ``names`` that this start leaves out, as they were before."""
    if MIXTURE not in record:
        return record
    left_out = {name: before[name].to_dict() for name in before if name in names and name not in record[MIXTURE]}
    return {MIXTURE: left_out | record[MIXTURE]}


def percent(share: float) -> str:
    """Return a share as text: 0.3 -> "30%"."""
    return f"{100 * share:.4g}%"
