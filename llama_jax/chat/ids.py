"""The token ids of a rendered conversation: a template's special tokens are tokens, a message's are text.

A message may hold the text of a special token, such as "<|eot_id|>". In the rendered text nothing tells it from the
template's own. So the conversation is rendered once more, with stand-ins for the characters of special tokens in its
messages. A special token of that text was written by the template. With the stand-ins replaced again, both texts must
be equal. They are not if the template looks for such characters in a message (for "</think>", say). Then only special
tokens in messages get a stand-in, or, if no special token comes from a message, the plain text is right.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from llama_jax.chat.messages import Message
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

Render = Callable[[Sequence[Message]], str]
Mark = Callable[[str, Mapping[str, str], tuple[str, ...]], str]
# Stand-ins are taken from these characters, which Unicode leaves to private use.
PRIVATE = range(0xF0000, 0xFFFFE)
# The start and end of a special token in a text.
Span = tuple[int, int]


class Growing:
    """Encodes the texts of a conversation that grows, each from the last special token of the one before on.

    A special token divides a text, so that the ids before it do not depend on what follows. Texts that begin otherwise
    than the one before are encoded whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._divides = getattr(tokenizer, "divides", False)  # another kind of tokenizer may not say
        self._begun, self._at, self._ids = "", 0, list[int]()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text in which special tokens are tokens."""
        ids: list[int] = []
        found = spans(text, tuple(self._tokenizer.specials)) if self._divides else []
        if self._begun and text.startswith(self._begun) and (self._at, len(self._begun)) in found:
            rest = self._tokenizer.encode(text[self._at :], bos=False, specials=True)
            ids = self._ids + rest[1:] if rest[:1] == self._ids[-1:] else []
        ids = ids or self._tokenizer.encode(text, bos=False, specials=True)
        self._keep(text, found, ids)
        return ids

    def _keep(self, text: str, found: list[Span], ids: list[int]) -> None:
        """Keep the ids up to the last special token of a text, if it stands there for sure."""
        self._begun, self._at, self._ids = "", 0, []
        specials = self._tokenizer.specials
        names = [text[begin:end] for begin, end in found]
        if (
            not found
            or self._tokenizer.is_text(last := specials[names[-1]])
            or ids.count(last) != names.count(names[-1])
        ):
            return
        place = len(ids) - ids[::-1].index(last)
        self._begun, self._at, self._ids = text[: found[-1][1]], found[-1][0], ids[:place]


def encode_rendered(
    tokenizer: Tokenizer, render: Render, messages: Sequence[Message], start: int = 0, growing: Growing | None = None
) -> list[int]:
    """Return the token ids of the text that ``render`` makes of ``messages``, from character ``start`` on.

    No token begins before ``start``, even if the whole text has one there. ``growing``: what knows the beginning of the
    conversation. Raises UserError if a template changes a message in such a way that its text and a special token
    cannot be told apart.
    """
    text = render(messages)
    specials = tokenizer.specials
    names_of_all = tuple(specials)
    own = own_spans(text, render, messages, names_of_all)
    every = spans(text, names_of_all)
    if own == every and not start:  # all are the template's
        return (growing or Growing(tokenizer)).encode(text)
    begins = start == 0 or any(end == start for _, end in own)
    own = [span for span in own if span[0] >= start]
    names = {text[begin:end] for begin, end in own}
    # Ordinary tokens that somebody has added are found in every text, but not those that the template writes itself.
    kept = {name for name, i in specials.items() if not tokenizer.is_text(i)} | names
    typed = [text[begin:end] for begin, end in set(every) - set(own)]
    if kept.isdisjoint(typed) and not start:
        return tokenizer.encode(text, bos=False, specials=True)
    ids: list[int] = []
    fresh = _starts_anew(tokenizer)
    for at, (begin, end) in zip([start, *(end for _, end in own)], [*own, (len(text), len(text))], strict=True):
        if at < begin:
            parts = _cut(text[at:begin], tuple(name for name in names if tokenizer.is_text(specials[name])))
            starts = [at == 0 or (fresh and (begins or at != start))] + [False] * (len(parts) - 1)
            ids += itertools.chain.from_iterable(tokenizer.encode_parts(parts, starts))
        if begin < end:
            ids.append(specials[text[begin:end]])
    return ids


def _cut(text: str, names: tuple[str, ...]) -> list[str]:
    """Return ``text`` in parts, none of which holds one of ``names`` whole."""
    cuts = [begin + 1 for begin, end in spans(text, names) if end - begin > 1]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def own_spans(text: str, render: Render, messages: Sequence[Message], specials: tuple[str, ...]) -> list[Span]:
    """Return where the special tokens stand in ``text`` that the template itself has written. Raises UserError."""
    found = spans(text, specials)
    if not is_unsure(text, messages, specials):
        return found
    stand_ins = _stand_ins(text, messages, specials)
    sure = None  # the template's special tokens, as far as it writes the same with stand-ins
    for mark in (_mark_characters, _mark_tokens):
        try:
            marked = render(_marked(messages, mark, stand_ins, specials))
        except UserError:  # a template that looks into its messages
            continue
        spelled = marked.translate({ord(new): old for old, new in stand_ins.items()})
        own = spans(marked, specials)
        names = [marked[begin:end] for begin, end in own]
        sure = names if mark is _mark_characters else sure
        if spelled == text and names == sure:
            return own
    if sure == [text[begin:end] for begin, end in found]:
        return found
    raise UserError(
        f"messages: expected text without {_first_special(messages, specials)}, which is a special token of the model and "
        "which the chat template would not keep as text; leave it out"
    )


def is_unsure(text: str, messages: Sequence[Message], specials: tuple[str, ...]) -> bool:
    """Return whether a special token of a rendered text may come from a message."""
    return any(_is_suspect(message.content, specials) for message in messages) and bool(spans(text, specials))


def stood_in(text: str, messages: Sequence[Message], specials: tuple[str, ...]) -> list[Message]:
    """Return the messages that ``own_spans`` renders first, if it is unsure of ``text``."""
    return _marked(messages, _mark_characters, _stand_ins(text, messages, specials), specials)


def _marked(
    messages: Sequence[Message], mark: Mark, stand_ins: Mapping[str, str], specials: tuple[str, ...]
) -> list[Message]:
    return [m._replace(content=mark(m.content, stand_ins, specials)) for m in messages]


def spans(text: str, specials: tuple[str, ...]) -> list[Span]:
    """Return where special tokens stand in ``text``, from the left, the longest first."""
    return [match.span() for match in _pattern(specials).finditer(text)]


@functools.lru_cache(4)
def _pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or "(?!)")


def _is_suspect(content: str, specials: tuple[str, ...]) -> bool:
    """Return whether a special token of the rendered text could have characters of ``content``."""
    return bool(set(content) & _marks(specials)) or _is_inside(content, specials)


def _is_inside(content: str, specials: tuple[str, ...]) -> bool:
    """Return whether a message is a part of a special token, which a template would write around it."""
    word = content.strip()
    return bool(word) and len(word) <= _longest(specials) and any(word in special for special in specials)


@functools.lru_cache(4)
def _longest(specials: tuple[str, ...]) -> int:
    return max(map(len, specials), default=0)


@functools.lru_cache(4)
def _marks(specials: tuple[str, ...]) -> frozenset[str]:
    """Return the characters of special tokens to replace: their signs, or, of a token without any, its first letter."""
    found: set[str] = set()
    for special in filter(None, specials):
        signs = {c for c in special if not c.isalnum() and not c.isspace() and c != "_"}
        found |= signs or {special[0].lower(), special[0].upper()}
    return frozenset(c for c in found if len(c) == 1)


def _stand_ins(text: str, messages: Sequence[Message], specials: tuple[str, ...]) -> dict[str, str]:
    """Return a stand-in for each character that may be replaced, none of which occurs in the conversation."""
    inside = {c for m in messages if _is_inside(m.content, specials) for c in m.content if not c.isspace()}
    taken = set(itertools.chain(text, *(message.content for message in messages)))
    free = (chr(code) for code in PRIVATE if chr(code) not in taken)
    return dict(zip(sorted(_marks(specials) | inside), free, strict=False))


def _mark_characters(content: str, stand_ins: Mapping[str, str], specials: tuple[str, ...]) -> str:
    """Return a message with a stand-in for every sign of special tokens, and for all characters of a part of one."""
    chosen = set(content) if _is_inside(content, specials) else _marks(specials)
    return content.translate({ord(old): new for old, new in stand_ins.items() if old in chosen})


def _mark_tokens(content: str, stand_ins: Mapping[str, str], specials: tuple[str, ...]) -> str:
    """Return a message with a stand-in for the first character of each special token in it."""
    first = [begin for begin, _ in spans(content, specials) if content[begin] in stand_ins]
    characters = list(content)
    for begin in first:
        characters[begin] = stand_ins[content[begin]]
    return "".join(characters)


def _first_special(messages: Sequence[Message], specials: tuple[str, ...]) -> str:
    """Return the special token that a message holds, for an error."""
    found = [m.content[begin:end] for m in messages for begin, end in spans(m.content, specials)]
    return found[0] if found else "the characters of special tokens"


def _starts_anew(tokenizer: Tokenizer) -> bool:
    """Return whether text behind a special token is encoded like a text of its own, as most tokenizers do."""
    special = next(iter(tokenizer.specials), "")
    return not special or tokenizer.encode(f"{special}a", bos=False, specials=True)[1:] == tokenizer.encode(
        "a", bos=False
    )
