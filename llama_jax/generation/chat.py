"""Conversations in the format of Meta's LLaMA 2 chat models (llama/generation.py, chat_completion).

<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {assistant} </s><s>[INST] {user} [/INST]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import Tokenizer, clean

INSTRUCTION, END_INSTRUCTION = "[INST]", "[/INST]"
SYSTEM, END_SYSTEM = "<<SYS>>", "<</SYS>>"
TAGS = (INSTRUCTION, END_INSTRUCTION, SYSTEM, END_SYSTEM)


class Message(NamedTuple):
    """A message of one side of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation to answer: an optional system prompt, then user and assistant in turn.

    Each pair of a user's message and its answer is between BOS and EOS. Raises UserError if the roles do not alternate,
    if the last message is not the user's, or if a message contains the format's tags.
    """
    system = messages[0].content if messages and messages[0].role == "system" else None
    turns = list(messages[system is not None :])
    for i, message in enumerate(messages):
        for tag in TAGS:
            if tag in message.content:
                raise UserError(
                    f"message {i + 1}: expected text without {tag}, which the chat format uses itself, found it"
                )
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            raise UserError(
                f"message {i + 1 + (system is not None)}: expected the {expected}, found the {message.role}"
            )
    if len(turns) % 2 == 0:
        raise UserError("messages: expected the last one from the user, to be answered, found none")
    if system is not None:
        turns[0] = Message("user", f"{SYSTEM}\n{system}\n{END_SYSTEM}\n\n{turns[0].content}")
    ids: list[int] = []
    for user, answer in zip(turns[:-1:2], turns[1::2], strict=True):
        text = f"{INSTRUCTION} {user.content.strip()} {END_INSTRUCTION} {answer.content.strip()} "
        ids += tokenizer.encode(text, bos=True, eos=True)
    return ids + tokenizer.encode(f"{INSTRUCTION} {turns[-1].content.strip()} {END_INSTRUCTION}", bos=True)


def fit_dialog(tokenizer: Tokenizer, messages: Sequence[Message], most: int) -> tuple[list[Message], int]:
    """Drop the oldest turns until the conversation has at most ``most`` tokens.

    Return it and the number of turns dropped.

    The system prompt and the last message stay, even if they alone are longer.
    """
    start = int(bool(messages) and messages[0].role == "system")
    kept, dropped = list(messages), 0
    while len(kept) > start + 1 and len(encode_dialog(tokenizer, kept)) > most:
        del kept[start : start + 2]
        dropped += 1
    return kept, dropped


def without_tags(text: str) -> str:
    """Return an answer without the format's tags, so that it can be part of the conversation."""
    while any(tag in text for tag in TAGS):
        for tag in TAGS:
            text = text.replace(tag, "")
    return text


def read_messages(path: Path) -> list[Message]:
    """Read a conversation from a JSON file: a list of {"role": ..., "content": ...}.

    Raises UserError if it is not one.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a JSON file of messages, found no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {quoted(str(error))}") from None
    if not isinstance(found, list) or not found:
        raise UserError(
            f'{path}: expected a list of messages {{"role": "user", "content": "..."}}, found another value'
        )
    messages = []
    for i, item in enumerate(found):
        if not isinstance(item, dict) or set(item) != {"role", "content"} or not isinstance(item["content"], str):
            raise UserError(f"{path}: message {i + 1}: expected a role and a text as content, found {quoted(item)}")
        if item["role"] not in ("system", "user", "assistant"):
            raise UserError(
                f"{path}: message {i + 1}: expected system, user or assistant, found {quoted(item['role'])}"
            )
        messages.append(Message(item["role"], clean(item["content"])))
    return messages
