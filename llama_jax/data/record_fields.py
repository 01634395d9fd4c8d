"""The fields of records: which of them hold texts, also within others (``meta.text``), and what the others hold."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

# The field that holds the text, if a record has it.
TEXT = "text"
# What tokenizers make. A list of numbers in a field of such a name is token ids.
TOKENS = {"input_ids", "token_ids", "tokens"}
# The last word of a field's name that says that what it holds is no text to train on, but describes it.
DESCRIBES = {
    "id", "ids", "url", "urls", "uri", "uuid", "hash", "sha", "sha1", "sha256", "md5", "path", "filename", "lang", "language",
    "license", "licence", "date", "time", "timestamp", "at", "version", "split", "label", "labels",
}  # fmt: skip
# Texts are looked for in objects within objects, so many levels deep.
LEVELS = 4
# An error lists this many fields.
LISTED = 20


@dataclass
class Fields:
    """The fields of records, by their names: what each holds that holds no texts, in words."""

    texts: dict[str, None] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    within: dict[str, None] = field(default_factory=dict)
    """The texts within other fields, such as meta.text."""

    @property
    def names(self) -> list[str]:
        """The fields, without those within others: first those with texts."""
        return [*self.texts, *(name for name in self.others if name not in self.texts)]

    def has(self, name: str) -> bool:
        """Return whether a field holds texts, in records or within their fields."""
        return name in self.texts or name in self.within

    @property
    def chosen(self) -> str:
        """The field to take where none is asked for: text, or the only one with texts. It is empty if that is unclear.

        That is so beside a field text of something else, a text within another field, or token ids.
        """
        if TEXT in self.texts or len(self.texts) != 1:
            return TEXT if TEXT in self.texts else ""
        only = next(iter(self.texts))
        within = any(name.endswith(f".{TEXT}") for name in self.within)
        return "" if TEXT in self.others or within or self._ids() or _describes(only) else only

    def _ids(self) -> list[str]:
        """Return the fields that hold token ids, by their names."""
        lists = [name for name, kind in self.others.items() if "list" in kind and not re.search("texts|string", kind)]
        return [name for name in lists if name in TOKENS]

    def add(self, value: dict[str, Any]) -> int:
        """Add the fields of a record. Return how many characters its texts have."""
        size = 0
        for name, content in value.items():
            if isinstance(content, str):
                size += len(content)
                self.texts[name] = None
            else:
                self.others[name] = named(content)
                self.within.update(dict.fromkeys(_texts_within(name, content, LEVELS)))
        return size

    def found(self, asked: str) -> str:
        """Say which fields there are. Of the one that is ``asked`` for, say what it holds in place of texts."""
        others = [name for name in self.others if name not in self.texts]
        told = {asked, *self._ids()}
        kinds = [f"{name} ({self.others[name]})" if name in told else name for name in others]
        texts = f"the fields {_listed([*self.texts])}" if self.texts else "no field with texts"
        rest = f" (and {_listed(kinds)} without texts)" if kinds else ""
        if len(self.texts) == 1 and _describes(next(iter(self.texts))):
            texts = f"the field {_listed([*self.texts])}, which by its name describes the text"
        return texts + rest + (f", but texts within them, {_listed([*self.within])}," if self.within else "")

    @property
    def advice(self) -> str:
        """The next step of a person who is told the fields."""
        if self._ids():
            return "give the texts that its token ids were made from"
        if self.texts or self.within:
            inner = next((name for name in self.within if name.endswith(f".{TEXT}")), next(iter(self.within), ""))
            example = f" {inner}" if inner and (not self.texts or inner.endswith(f".{TEXT}")) else ""
            return f"name the field with --data.text-field{example}"
        return "write the texts to a field first"


def _describes(name: str) -> bool:
    """Return whether a field's name says that it holds no text to train on, such as url or docId."""
    words = re.findall("[A-Z]?[a-z0-9]+|[A-Z0-9]+", name)
    return bool(words) and words[-1].lower() in DESCRIBES


def _texts_within(name: str, content: Any, levels: int) -> Iterable[str]:
    """Yield the names of the texts in an object that stands in the field ``name``."""
    if not isinstance(content, dict) or not levels:
        return
    for key, value in content.items():
        if isinstance(value, str):
            yield f"{name}.{key}"
        else:
            yield from _texts_within(f"{name}.{key}", value, levels - 1)


def content_of(value: dict[str, Any], name: str) -> Any:
    """Return what a record has in a field, or within one (``meta.text``), None if it has no such field."""
    if name in value or "." not in name:
        return value.get(name)
    content: Any = value
    for key in name.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def named(value: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return "a list of texts"
    names = {
        type(None): "null",
        bool: "true or false",
        list: "a list",
        dict: "an object",
        str: "a text",
        bytes: "bytes",
    }
    return names.get(type(value), "a number")


def _listed(fields: Sequence[str]) -> str:
    names = [name if name.isprintable() and name.isascii() else ascii(name) for name in fields[:LISTED]]
    return ", ".join(names) + (", ..." if len(fields) > LISTED else "")
