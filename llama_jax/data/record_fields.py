"""The fields of records: which of them hold texts, also within others (``meta.text``), and what the others hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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
        kinds = [f"{name} ({self.others[name]})" if name == asked else name for name in others]
        texts = f"the fields {_listed([*self.texts])}" if self.texts else "no field with texts"
        rest = f" (and {_listed(kinds)} without texts)" if kinds else ""
        return texts + rest + (f", but texts within them, {_listed([*self.within])}," if self.within else "")

    @property
    def advice(self) -> str:
        """The next step of a person who is told the fields."""
        if self.texts or self.within:
            example = f" {next(iter(self.within))}" if not self.texts else ""
            return f"name the field with --data.text-field{example}"
        return "write the texts to a field first"


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
