"""Conversations for Python programs: the messages, and LLaMA 2's format. See the room chat/ for all formats."""

from collections.abc import Sequence

from llama_jax.chat.llama2 import TAGS, encode_dialog, without_tags
from llama_jax.chat.messages import Message, fit, read_messages
from llama_jax.tokenizer import Tokenizer

__all__ = ["TAGS", "Message", "encode_dialog", "fit_dialog", "read_messages", "without_tags"]


def fit_dialog(tokenizer: Tokenizer, messages: Sequence[Message], most: int) -> tuple[list[Message], int]:
    """Drop the oldest turns until a conversation in LLaMA 2's format has at most ``most`` tokens.

    Return it and the number of turns dropped. The system prompt and the last message stay, even if they alone are
    longer.
    """
    return fit(messages, most, lambda kept: len(encode_dialog(tokenizer, kept)))
