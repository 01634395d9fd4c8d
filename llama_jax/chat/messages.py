"""The messages of a conversation: read from JSON, checked, and forgotten from the oldest on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.cli.json_argument import load_json
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import clean

# The roles that published templates know.
ROLES = ("system", "user", "assistant", "tool", "ipython", "function", "developer")


class Message(NamedTuple):
    """A message of one side of a conversation."""

    role: str
    """"system", "user" or "assistant"; others, such as "tool", if the chat template knows them."""
    content: str


def as_messages(found: Any, where: str = "messages") -> list[Message]:
    """Return a conversation that is a list of Messages or of {"role": ..., "content": ...}.

    Raises a UserError that begins with ``where`` if it is something else.
    """
    if not isinstance(found, Sequence) or isinstance(found, str | bytes) or not found:
        raise UserError(
            f'{where}: expected a list of messages {{"role": "user", "content": "..."}}, found {_kind(found)}'
        )
    messages = []
    for i, item in enumerate(found, 1):
        table = item._asdict() if isinstance(item, Message) else item
        if not isinstance(table, Mapping) or set(table) != {"role", "content"} or not isinstance(table["content"], str):
            raise UserError(f"{where}: message {i}: expected a role and a text as content, found {quoted(item)}")
        if table["role"] not in ROLES:
            raise UserError(
                f"{where}: message {i}: expected system, user or assistant (or tool), found {quoted(table['role'])}"
            )
        messages.append(Message(table["role"], clean(table["content"])))
    return messages


def _kind(found: Any) -> str:
    return "an empty one" if isinstance(found, list) else f"another value, {quoted(found, 40)}"


def read_messages(path: Path) -> list[Message]:
    """Read a conversation from a JSON file: a list of {"role": ..., "content": ...}.

    Raises UserError if it is not one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a JSON file of messages, found no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found {quoted(str(error))}") from None
    return as_messages(load_json(text, str(path)), str(path))


def fit(
    messages: Sequence[Message], most: int, length: Callable[[Sequence[Message]], int]
) -> tuple[list[Message], int]:
    """Drop the oldest turns until the conversation has at most ``most`` tokens by ``length``.

    A turn is a message of the user and what follows it. Return the conversation and the number of turns dropped. System
    messages at the start and the last turn stay, even if they alone are longer.
    """
    start = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    kept, dropped = list(messages), 0
    while length(kept) > most:
        later = [i for i in range(start + 1, len(kept)) if kept[i].role == "user"]
        if not later:
            break
        del kept[start : later[0]]
        dropped += 1
    return kept, dropped
