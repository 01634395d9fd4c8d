"""Conversations in the format of Meta's LLaMA 2 chat models (llama/generation.py, chat_completion).

<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {assistant} </s><s>[INST] {user} [/INST]
"""

from collections.abc import Sequence

from llama_jax.chat.messages import Message
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

INSTRUCTION, END_INSTRUCTION = "[INST]", "[/INST]"
SYSTEM, END_SYSTEM = "<<SYS>>", "<</SYS>>"
TAGS = (INSTRUCTION, END_INSTRUCTION, SYSTEM, END_SYSTEM)
# Ids of LLaMA 2's vocabulary, of 32,000 pieces, and their pieces. With it come Meta's chat models without a template.
PIECES = {518: "\u2581[", 25580: "INST", 29962: "]"}


def is_llama2s(tokenizer: Tokenizer) -> bool:
    """Return whether a vocabulary is LLaMA 2's, perhaps with tokens added behind it."""
    return tokenizer.vocab_size >= 32_000 and all(tokenizer.piece(i) == piece for i, piece in PIECES.items())


def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation to answer: an optional system prompt, then user and assistant in turn.

    Each pair of a user's message and its answer is between BOS and EOS. Raises UserError if the roles do not alternate,
    if the last message is not the user's, or if a message contains the format's tags.
    """
    turns = _turns(messages)
    if len(turns) % 2 == 0:
        found = f"the {messages[-1].role}" if messages else "none"
        raise UserError(f"messages: expected the last one from the user, to be answered, found {found}")
    last = tokenizer.encode(f"{INSTRUCTION} {turns[-1].content.strip()} {END_INSTRUCTION}", bos=True)
    return _encode_pairs(tokenizer, turns[:-1]) + last


def encode_answered(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a conversation that ends with an answer. Raises UserError as ``encode_dialog`` does."""
    turns = _turns(messages)
    if not turns or len(turns) % 2:
        raise UserError("messages: expected the last one from the assistant, found another")
    return _encode_pairs(tokenizer, turns)


def texts_of_pairs(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return for each answer the text of its pair, and the one that generation is fed for the user's turn of it.

    A pair is between BOS and EOS, and what is fed is behind BOS. Raises UserError as ``encode_answered`` does.
    """
    turns = _turns(messages)
    if not turns or len(turns) % 2:
        raise UserError("messages: expected the last one from the assistant, found another")
    return [
        (_pair(user, answer), f"{INSTRUCTION} {user.content.strip()} {END_INSTRUCTION}")
        for user, answer in zip(turns[::2], turns[1::2], strict=True)
    ]


def _turns(messages: Sequence[Message]) -> list[Message]:
    """Return the messages of user and assistant. The first has the system prompt in it."""
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
    if system is not None and turns:
        turns[0] = Message("user", f"{SYSTEM}\n{system}\n{END_SYSTEM}\n\n{turns[0].content}")
    return turns


def _encode_pairs(tokenizer: Tokenizer, turns: Sequence[Message]) -> list[int]:
    ids: list[int] = []
    for user, answer in zip(turns[::2], turns[1::2], strict=True):
        ids += tokenizer.encode(_pair(user, answer), bos=True, eos=True)
    return ids


def _pair(user: Message, answer: Message) -> str:
    return f"{INSTRUCTION} {user.content.strip()} {END_INSTRUCTION} {answer.content.strip()} "


def without_tags(text: str) -> str:
    """Return an answer without the format's tags, so that it can be part of the conversation."""
    while any(tag in text for tag in TAGS):
        for tag in TAGS:
            text = text.replace(tag, "")
    return text
