"""How a model is talked to: its chat template, and the tokens that end what it says."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.chat import llama2
from llama_jax.chat.ids import Growing, encode_rendered, is_unsure, own_spans, stood_in
from llama_jax.chat.messages import Message, fit
from llama_jax.chat.named import LLAMA2, NAMED
from llama_jax.chat.renderer import MOST_TEMPLATE, render, render_many
from llama_jax.errors import UserError, quoted
from llama_jax.tokenizer import Tokenizer

# Files of a checkpoint.
TEMPLATE, GENERATION = "chat_template.jinja", "generation.json"
# A conversation to see what a template writes behind an answer.
QUESTION, ANSWER = "question", "answer"


@dataclass(frozen=True)
class ChatSetup:
    """The part of a checkpoint that is about conversations."""

    template: str = ""
    """The chat template, in Jinja. Empty: none."""
    end_ids: tuple[int, ...] = ()
    """The tokens that end a completion (eos_token_id, in transformers). Empty: EOS."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """The texts of special tokens by their names in a template, such as bos_token. Empty: the tokenizer's."""
    has_none: bool = False
    """Whether it is known that there is no template. Older checkpoints, and Meta's files, do not say."""

    @property
    def files(self) -> dict[str, bytes]:
        """The files that a checkpoint keeps, by name. None for what it does not know."""
        table: dict[str, Any] = {}
        if self.end_ids:
            table["eos_token_id"] = list(self.end_ids)
        if self.tokens:
            table["special_tokens"] = dict(self.tokens)
        if self.has_none and not self.template:
            table["chat_template"] = None
        kept = {GENERATION: json.dumps(table, indent=1).encode()} if table else {}
        return kept | ({TEMPLATE: self.template.encode()} if self.template else {})

    @classmethod
    def read(cls, folder: Path) -> "ChatSetup":
        """Read the files of a checkpoint, which older ones lack. Raises UserError if they are damaged."""
        template, table = "", {}
        if (path := folder / TEMPLATE).exists():
            template = _text(path.read_bytes(), str(path))
        if (path := folder / GENERATION).exists():
            try:
                table = json.loads(path.read_bytes())
                ends, tokens = table.get("eos_token_id", []), table.get("special_tokens", {})
                if not all(type(i) is int for i in ends) or not all(isinstance(t, str) for t in tokens.values()):
                    raise ValueError("others")
            except (ValueError, AttributeError, TypeError):
                raise UserError(f"{path}: expected eos_token_id and special_tokens, found others") from None
            return cls(template, tuple(ends), tokens, not template and "chat_template" in table)
        return cls(template)


# A conversation to render, and whether it ends with an answer.
Rendering = tuple[tuple[Message, ...], bool]


@dataclass(frozen=True)
class ChatFormat:
    """A chat template with the tokenizer that it is for."""

    tokenizer: Tokenizer
    template: str
    name: str
    """Its name in errors: a file, or that of a named format."""
    tokens: Mapping[str, str]
    """The texts of special tokens by their names in the template."""
    notes: tuple[str, ...] = ()
    """Lines to tell the user about how it was chosen."""
    _foreseen: dict[Rendering, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_llama2(self) -> bool:
        """Whether it is LLaMA 2's, whose ids llama2.py makes."""
        return self.template == LLAMA2

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation to answer.

        Raises UserError if it has none, or is not what the template expects.
        """
        if self.is_llama2:
            return llama2.encode_dialog(self.tokenizer, messages)
        if not messages or messages[-1].role in ("assistant", "system"):
            found = f"the {messages[-1].role}" if messages else "none"
            raise UserError(f"messages: expected the last one from the user, to be answered, found {found}")
        self.check_roles(messages)
        return self.ids(messages)

    def check(self, system: str) -> None:
        """Raise UserError if the template does not take a message of the user, behind ``system`` unless it is empty."""
        self.encode([*([Message("system", system)] if system else []), Message("user", QUESTION)])

    def encode_answered(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation that ends with an answer, as a model is tuned on it."""
        if self.is_llama2:
            return llama2.encode_answered(self.tokenizer, messages)
        self.check_roles(messages)
        return self.ids(messages, answered=True)

    def fit(self, messages: Sequence[Message], most: int) -> tuple[list[Message], int]:
        """Drop the oldest turns until the conversation has at most ``most`` tokens; see messages.fit."""
        self.encode(messages)
        return fit(messages, most, lambda kept: len(self.encode(kept) if self.is_llama2 else self.ids(kept)))

    def said(self, text: str) -> Message:
        """Return an answer as a message of the conversation that goes on."""
        return Message("assistant", llama2.without_tags(text) if self.is_llama2 else text)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """The special token that the template writes behind an answer, if there is one."""
        if self.is_llama2:
            return frozenset({self.tokenizer.eos_id})
        messages = [Message("user", QUESTION), Message("assistant", ANSWER)]
        try:
            text = self.render(messages, answered=True)
            render = functools.partial(self.render, answered=True)
            own = own_spans(text, render, messages, tuple(self.tokenizer.specials))
        except UserError:  # a template that refuses this conversation
            return frozenset()
        behind = text.rfind(ANSWER) + len(ANSWER)
        following = next(((begin, end) for begin, end in own if begin >= behind), None)
        if ANSWER not in text or following is None or text[behind : following[0]].strip():
            return frozenset()
        return frozenset({self.tokenizer.specials[text[slice(*following)]]} - {self.tokenizer.bos_id})

    def ids(
        self, messages: Sequence[Message], answered: bool = False, start: int = 0, growing: Growing | None = None
    ) -> list[int]:
        """Return the token ids of what ``render`` makes of a conversation, from character ``start`` on.

        ``growing`` knows the beginning of the conversation, see ids.py. Roles that the template leaves out are not
        looked for; see ``check_roles``.
        """
        render = functools.partial(self.render, answered=answered)
        return encode_rendered(self.tokenizer, render, messages, start, growing)

    def foresee(self, wanted: Sequence[Rendering]) -> None:
        """Keep the texts of conversations for ``render``, which are made together. Forget those of an earlier call."""
        self._foreseen.clear()
        specials = tuple(self.tokenizer.specials)
        unsure = [
            (tuple(stood_in(text, messages, specials)), answered)
            for (messages, answered), text in self._render_all(wanted)
            if is_unsure(text, messages, specials)
        ]
        for _ in self._render_all(unsure):
            pass

    def _render_all(self, wanted: Sequence[Rendering]) -> Iterator[tuple[Rendering, str]]:
        """Yield the texts of conversations that the template does not refuse, and keep them."""
        new = list(dict.fromkeys(wanted))
        texts = render_many(self.template, [self._variables(*one) for one in new])
        for one, text in zip(new, texts, strict=True):
            if text is not None:
                self._foreseen[one] = text
                yield one, text

    def render(self, messages: Sequence[Message], answered: bool = False) -> str:
        """Return a conversation as text. ``answered``: it ends with an answer, and does not ask for one.

        Special tokens and text are not told apart in it, as ``encode`` does. Raises UserError as ``encode`` does.
        """
        if self._foreseen and (text := self._foreseen.get((tuple(messages), answered))) is not None:
            return text
        return render(self.template, self._variables(messages, answered), self.name).text

    def _variables(self, messages: Sequence[Message], answered: bool) -> dict[str, Any]:
        return {
            **self.tokens,
            "messages": [message._asdict() for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": not answered,
        }

    def _renders(self, changed: Sequence[Message], text: str) -> bool:
        """Return whether the template makes ``text`` of a conversation."""
        try:
            return text == self.render(changed)
        except UserError:  # a template that looks at the message, and so does not leave it out
            return False

    def check_roles(self, messages: Sequence[Message]) -> None:
        """Raise UserError if the template leaves out the question at the end, or a role that not every one knows."""
        others, asks = list(without_roles(messages)), bool(messages) and messages[-1].role == "user"
        text = self.render(messages) if others or asks else ""
        for i, changed in others:
            if self._renders(changed, text):
                raise UserError(
                    f"message {i + 1}: expected a role that the chat template knows ({self.name}), found {messages[i].role}, "
                    "whose messages it leaves out; leave it out, or give another with --chat-template"
                )
        if asks and (question := messages[-1].content.strip()) and question not in text:
            changed = [*messages[:-1], messages[-1]._replace(content=f"{question}x")]
            if self._renders(changed, text):
                raise UserError(
                    f"message {len(messages)}: expected a chat template that writes what the user says ({self.name}), found one that "
                    "leaves it out; give another with --chat-template"
                )


def without_roles(messages: Sequence[Message]) -> Iterator[tuple[int, list[Message]]]:
    """Yield the messages of roles that not every template knows, by their places, and a conversation with another one.

    A template writes the same of both conversations if it leaves such a message out.
    """
    for i, message in enumerate(messages):
        if message.role not in ("user", "assistant") and message.content.strip():
            yield i, [*messages[:i], message._replace(content=f"{message.content}x"), *messages[i + 1 :]]


def choose(tokenizer: Tokenizer, setup: ChatSetup, given: str, source: str) -> ChatFormat:
    """Return the format to talk to a model in.

    Arguments:
        tokenizer: the model's.
        setup: what its checkpoint knows.
        given: the name of a format or of a file with a template, which is used instead. Empty: none.
        source: the checkpoint, for errors.

    A model with LLaMA 2's vocabulary is talked to in LLaMA 2's format, unless it is known to have no template: Meta's
    chat models come without one. Raises UserError if there is no template, or it cannot be read.
    """
    tokens = dict(setup.tokens) or tokens_of(tokenizer)
    if given:
        template, notes = read_template(given, tokenizer)
        return ChatFormat(tokenizer, template, f"--chat-template {given}", tokens, notes)
    if setup.template:
        return ChatFormat(tokenizer, setup.template, f"the chat template of {source}", tokens)
    if not setup.has_none and llama2.is_llama2s(tokenizer):
        note = f"{source} has no chat template, and LLaMA 2's vocabulary: LLaMA 2's format is used; --chat-template chooses another"
        return ChatFormat(tokenizer, LLAMA2, "llama2", tokens, (note,))
    raise UserError(
        f"{source}: expected a model with a chat template, found none, as in a model that is not tuned for conversations; give "
        f"--chat-template with a file or one of {', '.join(NAMED)}, or complete texts in place of conversations"
    )


def read_template(given: str, tokenizer: Tokenizer | None = None) -> tuple[str, tuple[str, ...]]:
    """Return the template that ``given`` names, and notes about it. Raises UserError if there is none."""
    if given in NAMED:
        named = NAMED[given]
        missing = [text for text in named.tokens if tokenizer is not None and text not in tokenizer.specials]
        note = (
            f"--chat-template {given}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not a special token of "
            "this vocabulary, and read as text: was the model tuned on this format?"
        )
        return named.template, (note,) if missing else ()
    if not Path(given).is_file():
        raise UserError(f"--chat-template: expected a file or one of {', '.join(NAMED)}, found no file {quoted(given)}")
    return read_template_file(Path(given)), ()


def read_template_file(path: Path) -> str:
    """Return the template in a file. Raises UserError if it is too long, empty, or not text."""
    with path.open("rb") as file:
        content = file.read(4 * MOST_TEMPLATE + 1)
    if len(content) > 4 * MOST_TEMPLATE:
        raise UserError(f"{path}: expected a chat template of up to {MOST_TEMPLATE:,} characters, found more")
    if not content.strip():
        raise UserError(f"{path}: expected a chat template, found an empty file")
    return _text(content, str(path))


def template_digest(given: str) -> str:
    """Return the name of a format, or a digest of the template in the file ``given``. Raises UserError as above."""
    if given in NAMED:
        return given
    return hashlib.sha256(read_template(given)[0].encode()).hexdigest()[:16]


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}: expected a chat template in UTF-8, found another encoding") from None


def tokens_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of a tokenizer's special tokens by their names in a template."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    return {name: tokenizer.piece(i) for name, i in ids.items() if i is not None and i >= 0}
