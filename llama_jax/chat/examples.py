"""Conversations to learn from: their token ids, and which of these a model has to produce.

A token counts if generation, fed the conversation up to a user's turn, would have to produce it: the answer, and the
token that ends it. What the template writes behind that token does not count, nor does anything of the user's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from llama_jax.chat import llama2
from llama_jax.chat.formats import ChatFormat, ChatSetup, Rendering, choose, without_roles
from llama_jax.chat.ids import Growing
from llama_jax.chat.messages import Message, as_messages
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

# What may follow a message of each role. Roles of tools are between an answer and the next one.
LEADING = ("system", "developer")
ASKING = ("user", "tool", "ipython", "function")

T = TypeVar("T")
# Token ids, and of each whether it counts, 0 or 1.
Example = tuple[list[int], list[int]]


def chat_example(
    tokenizer: Tokenizer,
    messages: Sequence[Message | Mapping[str, str]],
    chat_format: ChatFormat | str | None = None,
) -> Example:
    """Return the token ids of a conversation, and of each whether it counts in the loss, 0 or 1.

    Arguments:
        tokenizer: the model's.
        messages: Messages or {"role": ..., "content": ...}: perhaps a system message, then user and assistant in turn,
            the last one from the assistant.
        chat_format: the format of the model (``llama_jax.load(CHECKPOINT).chat_format``), or the name of one, such as
            "llama2", or of a file with a template. None: LLaMA 2's, if the tokenizer is LLaMA 2's.

    Every answer counts. Raises UserError, in one line, if the conversation ends without an answer, its roles are out of
    turn, no format is known, or the format does not keep what generation would be fed.

    Example:
        ids, counts = chat_example(tokenizer, [Message("user", "Hello"), Message("assistant", "Hi")])
        tokenizer.decode([i for i, counted in zip(ids, counts) if counted])  # "Hi"
    """
    chosen = chat_format if isinstance(chat_format, ChatFormat) else _chosen(tokenizer, chat_format or "")
    (example,) = chat_examples(chosen, [messages])
    if isinstance(example, UserError):
        raise example
    return example


def _chosen(tokenizer: Tokenizer, name: str) -> ChatFormat:
    """Return a format by its name or, without one, by the tokenizer. Raises UserError if that tells none."""
    if not name and not llama2.is_llama2s(tokenizer):
        raise UserError(
            f"chat_format: expected one beside a tokenizer that is not LLaMA 2's ({tokenizer.model_path}), found none; give "
            'llama_jax.load(CHECKPOINT).chat_format, or a name, such as "llama2"'
        )
    try:
        return choose(tokenizer, ChatSetup(), name, str(tokenizer.model_path))
    except UserError as error:
        raise UserError(str(error).replace("--chat-template", "chat_format", 1)) from None


def chat_examples(
    chat_format: ChatFormat, conversations: Sequence[Sequence[Message | Mapping[str, str]]]
) -> list[Example | UserError]:
    """Return what ``chat_example`` returns of each conversation, or raises. Many are much faster than one by one."""
    checked = [_result(_checked, messages) for messages in conversations]
    fine = [messages for messages in checked if not isinstance(messages, UserError)]
    if chat_format.is_llama2:
        results = _of_pairs(chat_format.tokenizer, fine)
    else:
        if len(fine) > 1 or sum(message.role == "assistant" for messages in fine for message in messages) > 1:
            chat_format.foresee([one for messages in fine for one in _renderings(messages)])
        results = (_result(_of_template, chat_format, messages) for messages in fine)
    return [messages if isinstance(messages, UserError) else next(results) for messages in checked]


def _result(call: Callable[..., T], *args: Any) -> T | UserError:
    try:
        return call(*args)
    except UserError as error:
        return error


def _checked(messages: Sequence[Message | Mapping[str, str]]) -> list[Message]:
    found = as_messages(messages)
    check_turns(found)
    return found


def check_turns(messages: Sequence[Message]) -> None:
    """Raise UserError if roles are out of turn, or if the last message is not an answer."""
    before = ""
    for i, message in enumerate(messages, 1):
        role = message.role
        if role in LEADING:
            fits, expected = before in ("", *LEADING), "the user or the assistant, as system messages come first"
        elif role == "assistant":
            fits, expected = before in ASKING, "the user"
        elif role == "user":
            fits, expected = before in ("", *LEADING, "assistant"), "the assistant"
        else:
            fits, expected = before in ("assistant", *ASKING[1:]), "the user, as a tool answers the assistant"
        if not fits:
            raise UserError(f"message {i}: expected {expected}, found the {role}; correct the order of the messages")
        before = role
    if before != "assistant":
        raise UserError(
            f"message {len(messages)}: expected an answer of the assistant at the end, found the {before}; add the answer, or "
            "leave the message out"
        )


def _of_pairs(tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]]) -> Iterator[Example | UserError]:
    """Yield examples in LLaMA 2's format, in which a user's message and its answer are between BOS and EOS."""
    texts = [_result(llama2.texts_of_pairs, messages) for messages in conversations]
    pairs_of_all = [pair for found in texts if not isinstance(found, UserError) for pair in found]
    rows = iter(tokenizer.encode_all([text for pair in pairs_of_all for text in pair]))
    for found in texts:
        if isinstance(found, UserError):
            yield found
        else:
            pairs = [([*next(rows), tokenizer.eos_id], next(rows)) for _ in found]
            yield _result(_joined, pairs)


def _joined(pairs: Sequence[tuple[list[int], list[int]]]) -> Example:
    """Return the example of pairs, each of which has its token ids, and those that generation is fed."""
    ids: list[int] = []
    counts: list[int] = []
    for pair, fed in pairs:
        if pair[: len(fed)] != fed:
            raise UserError(
                f"messages: expected tokens of an answer that begin behind {llama2.END_INSTRUCTION}, found that this tokenizer joins "
                "both; choose another format with --data.chat-template"
            )
        ids += pair
        counts += [0] * len(fed) + [1] * (len(pair) - len(fed))
    return ids, counts


def _renderings(messages: Sequence[Message]) -> Iterator[Rendering]:
    """Yield the conversations that ``_of_template`` renders."""
    if others := list(without_roles(messages[:-1])):
        yield tuple(messages[:-1]), False
    for _, changed in others:
        yield tuple(changed), False
    for i, message in enumerate(messages):
        if message.role == "assistant":
            yield tuple(messages[:i]), False
            yield tuple(messages[: i + 1]), True


def _of_template(chat_format: ChatFormat, messages: Sequence[Message]) -> Example:
    """Return an example in the format of a template: what generation is fed for each answer, and the answer."""
    chat_format.check_roles(messages[:-1])
    ids: list[int] = []
    counts: list[int] = []
    behind: list[int] = []
    growing = Growing(chat_format.tokenizer)
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        fed = chat_format.ids(messages[:i], growing=growing)
        if fed[: len(ids)] != ids:
            raise UserError(
                f"message {i + 1}: expected a template that keeps earlier messages as they are, found that what is fed to answer "
                f"here begins with other tokens than the conversation before it ({chat_format.name}); make a record of each "
                "answer, or choose another format with --data.chat-template"
            )
        answer, behind = _answer(chat_format, messages[: i + 1], fed, growing)
        counts += [0] * (len(fed) - len(ids)) + [1] * len(answer)
        ids = fed + answer
    return ids + behind, counts + [0] * len(behind)


def _answer(
    chat_format: ChatFormat, messages: Sequence[Message], fed: list[int], growing: Growing
) -> tuple[list[int], list[int]]:
    """Return the token ids of the last message with the one that ends it, and those that the template writes behind.

    ``fed`` are those that generation would be fed. Where a tokenizer joins the end of these with the beginning of the
    answer, the answer's text is encoded by itself, since generation cannot take back a token that it was fed.
    """
    whole = chat_format.ids(messages, answered=True, growing=growing)
    rest = whole[len(fed) :]
    if whole[: len(fed)] != fed:
        before, text = chat_format.render(messages[:-1]), chat_format.render(messages, answered=True)
        if not text.startswith(before):
            raise UserError(
                f"message {len(messages)}: expected an answer behind what generation is fed, found that the template "
                f"({chat_format.name}) writes the conversation in another way once it is answered; choose another format with "
                "--data.chat-template"
            )
        rest = chat_format.ids(messages, answered=True, start=len(before))
    ends = chat_format.end_ids or {chat_format.tokenizer.eos_id}
    end = next((n for n, i in enumerate(rest, 1) if i in ends), 0)
    if not end:
        raise UserError(
            f"message {len(messages)}: expected a special token behind the answer, which tells a model where to stop, found none in "
            f"{chat_format.name}; choose a format whose tokens this vocabulary has, with --data.chat-template"
        )
    return rest[:end], rest[end:]
