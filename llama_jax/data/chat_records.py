"""Records of conversations, told by their fields, and read from JSON as messages.

    messages                      [{"role": "user", "content": "..."}, ...]
    conversations                 [{"from": "human", "value": "..."}, ...]
    prompt, completion            two texts
    instruction, input, output    texts; input may be absent or empty
    prompt, chosen, rejected      texts or messages: an answer that is preferred to another. Without a prompt, both are
                                  conversations, whose common beginning is the prompt

Each of them may have a text in a field system, which is the system message. Other fields are not read, and are named.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_jax.chat.examples import check_turns
from llama_jax.chat.messages import ROLES, Message
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import clean

PREFERENCES = "preferences"
# The fields that a record of each kind has, the most telling first.
KINDS: dict[str, tuple[str, ...]] = {
    PREFERENCES: ("chosen", "rejected"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
}
KNOWN = "messages; conversations; prompt, completion; instruction, (input,) output; prompt, chosen, rejected"
SYSTEM = "system"
# Fields that records of a kind may have besides.
OPTIONAL: dict[str, tuple[str, ...]] = {PREFERENCES: ("prompt",), "instruction and output": ("input",)}
FIELDS_READ = {SYSTEM, *(name for kind in KINDS for name in (*KINDS[kind], *OPTIONAL.get(kind, ())))}
# Kinds of which all messages are in one field, a list.
LISTS = ("messages", "conversations")
# The names of the sides in records with from and value, as they are usual.
SIDES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
# What begins a turn in a dialogue that is one text, as in the HH sets.
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
# Between an instruction and its input, in a format that does not say otherwise, and in the layout "instruction".
INPUT, INPUT_HEADING = "\n\n", "\n\n### Input:\n"


class Conversation(NamedTuple):
    """A record that ends with an answer."""

    kind: str
    messages: tuple[Message, ...]
    context: str = ""
    """The input of an instruction, which belongs to the first message of the user: how it does, a format decides."""

    def written(self, separator: str = INPUT) -> list[Message]:
        """Return the messages, with the input of an instruction behind ``separator``."""
        asked = next(i for i, message in enumerate(self.messages) if message.role != SYSTEM)
        before, first, rest = self.messages[:asked], self.messages[asked], self.messages[asked + 1 :]
        more = separator + self.context if self.context else ""
        return [*before, first._replace(content=first.content + more), *rest]


class Preference(NamedTuple):
    """A record of two answers to a prompt, the first of which is preferred."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


def kind_of_fields(fields: Mapping[str, Any] | list[str]) -> str:
    """Return the kind of records with these fields, or an empty text if none is known."""
    return next((kind for kind, needed in KINDS.items() if all(name in fields for name in needed)), "")


def kind_of_name(wanted: str) -> str:
    """Return the kind of records that names of fields choose, such as "messages" or "instruction,output", or ""."""
    names = {name.strip() for name in wanted.split(",")}
    return next(
        (kind for kind, needed in KINDS.items() if {*needed} <= names <= {*needed, *OPTIONAL.get(kind, ())}), ""
    )


def unread(record: Any, only: str = "") -> list[str]:
    """Return the fields of a record that have a value and are not read."""
    fields = _with_values(record) if isinstance(record, Mapping) else {}
    kind = only or kind_of_fields(fields)
    return [name for name in fields if name not in (SYSTEM, *KINDS.get(kind, ()), *OPTIONAL.get(kind, ()))]


def parsed(record: Any, only: str = "") -> Conversation | Preference:
    """Return a record as messages. It is of the kind that its fields tell, or of the kind ``only``.

    Raises a UserError that says what is wrong with it, but not where it stands.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"expected an object, found {quoted(record, 40)}")
    fields = _with_values(record)
    kind = only or kind_of_fields(fields)
    if not kind or not all(name in fields for name in KINDS[kind]):
        names = ", ".join(map(str, fields)) or "none"
        wanted = f"the fields {', '.join(KINDS[only])}" if only else f"a conversation, by the fields {KNOWN}"
        raise UserError(f"expected {wanted}; found the fields {names}")
    if kind == PREFERENCES:
        found = _preference(fields)
        return found._replace(prompt=tuple(_with_system(fields, [*found.prompt])))
    if kind in LISTS:
        messages = _with_system(fields, _messages(fields[kind], kind))
        check_turns(messages)
        return Conversation(kind, tuple(messages))
    question, answer = KINDS[kind]
    context = _text(fields, "input") if kind.startswith("instruction") and "input" in fields else ""
    both = [Message("user", _text(fields, question)), Message("assistant", _text(fields, answer))]
    return Conversation(kind, tuple(_with_system(fields, both)), context if context.strip() else "")


def _with_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that have a value. A table has all fields in all rows."""
    return {name: value for name, value in record.items() if value is not None}


def _with_system(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Return messages behind the text in the field system, if there is one.

    Raises UserError if they have another system message.
    """
    given = Message(SYSTEM, _text(fields, SYSTEM) if SYSTEM in fields else "")
    if not given.content.strip() or messages[:1] == [given]:
        return messages
    if messages[0].role == SYSTEM:
        raise UserError("system: expected one system message, found a field system and another one in the messages")
    return [given, *messages]


def _messages(found: Any, name: str) -> list[Message]:
    """Return a list of messages. Raises UserError if it is another value."""
    who, what = ("from", "value") if name == "conversations" else ("role", "content")
    if isinstance(found, list) and found and isinstance(found[0], Mapping) and who not in found[0]:
        # Both spellings are met under both names.
        other = ("role", "content") if who == "from" else ("from", "value")
        who, what = other if other[0] in found[0] else (who, what)
    if not isinstance(found, list) or not found:
        what_is = "an empty one" if isinstance(found, list) else quoted(found, 40)
        raise UserError(f'{name}: expected a list of messages {{"{who}": ..., "{what}": ...}}, found {what_is}')
    return [_message(item, f"{name}: message {i}", who, what) for i, item in enumerate(found, 1)]


def _message(item: Any, where: str, who: str, what: str) -> Message:
    if not isinstance(item, Mapping) or who not in item or what not in item:
        fields = f"the fields {', '.join(map(str, item))}" if isinstance(item, Mapping) and item else quoted(item, 40)
        raise UserError(f"{where}: expected the fields {who} and {what}, found {fields}")
    if others := [name for name, value in item.items() if name not in (who, what) and value not in (None, "", [], {})]:
        raise UserError(f"{where}: expected {who} and {what} alone, found {', '.join(map(str, others))} as well")
    role, content = item[who], item[what]
    role = SIDES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(
            f"{where}: expected {who} to be system, user or assistant (human, gpt), found {quoted(role, 40)}"
        )
    if not isinstance(content, str):
        raise UserError(f"{where}: expected a text as {what}, found {quoted(content, 40)}")
    return Message(role, clean(content))


def _text(fields: Mapping[str, Any], name: str) -> str:
    if not isinstance(fields[name], str):
        raise UserError(f"{name}: expected a text, found {quoted(fields[name], 40)}")
    return clean(fields[name])


def _preference(fields: Mapping[str, Any]) -> Preference:
    """Return a preference. The answers may be texts, messages, or whole conversations that begin with the prompt."""
    given = fields.get("prompt") or None
    begins = len(fields["prompt"]) if repeats_prompt(fields) else 0
    chosen, rejected = (
        _side(fields[name][begins:] if begins else fields[name], name) for name in ("chosen", "rejected")
    )
    prompt, start = [], 0
    if given is not None:
        prompt = _asked(given) if isinstance(given, str) else _messages(given, "prompt")
    if given is None or all(side[0].role != "assistant" for side in (chosen, rejected)):
        both = _common(chosen, rejected)
        start = len(both)
        shorter, longer = sorted((prompt, both), key=len)
        if longer[len(longer) - len(shorter) :] != shorter and longer[: len(shorter)] != shorter:
            raise UserError("prompt: expected the beginning of both chosen and rejected, found another one")
        prompt = longer
    sides = []
    for name, answer in (("chosen", chosen[start:]), ("rejected", rejected[start:])):
        try:
            check_turns([*prompt, *answer])
        except UserError as error:
            raise UserError(f"prompt and {name}: {error}") from None
        sides.append(tuple(answer))
    return Preference(tuple(prompt), *sides)


def repeats_prompt(record: Mapping[str, Any]) -> bool:
    """Return whether both answers of a preference are texts that begin with the prompt, which is taken off them.

    Dialogues are not: they are conversations, of which the prompt is the beginning.
    """
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return False
    answers = [text for text in (record.get("chosen"), record.get("rejected")) if isinstance(text, str)]
    return len(answers) == 2 and all(
        text.startswith(prompt) and text != prompt and not _dialogue(text) for text in answers
    )


def _asked(prompt: str) -> list[Message]:
    """Return the messages of a prompt: one, or those of a dialogue that asks the assistant for the next."""
    turns = _dialogue(prompt) or [Message("user", clean(prompt))]
    return turns[:-1] if turns[-1] == Message("assistant", "") else turns


def _side(found: Any, name: str) -> list[Message]:
    """Return an answer, or a whole conversation. A whole one may be a text, in the layout of the HH sets."""
    if isinstance(found, str):
        return _dialogue(found) or [Message("assistant", clean(found))]
    return _messages([found] if isinstance(found, Mapping) else found, name)


def _dialogue(text: str) -> list[Message]:
    """Return the turns of a text of \\n\\nHuman: ... \\n\\nAssistant: ..., of other texts none."""
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 4 or parts[1] != "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], clean(what.strip())) for who, what in zip(parts[1::2], parts[2::2], strict=True)]


def _common(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return the beginning that two conversations have in common, up to an answer.

    Raises UserError if there is none.
    """
    most = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    while same and not (chosen[same].role == rejected[same].role == "assistant"):
        same -= 1
    if not same:
        raise UserError(
            "expected the fields prompt, chosen and rejected, found no prompt, and no common beginning of conversations in chosen and "
            "rejected; add the prompt"
        )
    return chosen[:same]
