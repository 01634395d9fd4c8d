"""Reads the keys of a configuration by type. Unsupported keys are refused by name, unknown ones are listed."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import check_downloaded

MAX_LAYERS = 1000


@dataclasses.dataclass(frozen=True)
class Neutral:
    """A key that this project does not support: the values at which it changes nothing, and advice on others."""

    values: tuple[Any, ...]
    advice: str = "this project has no such model"
    null: bool = True
    """Whether null is as good as no key."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """All known keys of a file, by their treatment. To support a key, move it to ``read``."""

    read: frozenset[str]
    neutral: Mapping[str, Neutral]
    ignored: frozenset[str]
    """Keys that do not change the logits."""

    def check(self, table: dict[str, Any], path: Path) -> None:
        """Raise UserError if an unsupported key has a value that is not neutral."""
        for key in sorted(table.keys() & self.neutral.keys()):
            found, neutral = table[key], self.neutral[key]
            if (found is not None or not neutral.null) and not any(is_same(found, value) for value in neutral.values):
                expected = " or ".join(json.dumps(value) for value in neutral.values) or "null"
                raise UserError(f"{path}: {key}: expected {expected}, found {quoted(found)}; {neutral.advice}")

    def unknown(self, table: dict[str, Any]) -> list[str]:
        """Return the keys that are in none of the lists."""
        return sorted(table.keys() - self.read - self.neutral.keys() - self.ignored)


def names(text: str) -> frozenset[str]:
    """Return the words of ``text``."""
    return frozenset(text.split())


def is_same(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal. true is not 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def read_json(path: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """Read a JSON object from a file of up to ``limit`` bytes.

    Raises UserError if it has none, or a key has two values.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a JSON file, found none") from None
    if len(raw) > limit:
        raise UserError(f"{path}: expected a JSON file of up to {limit:,} bytes, found a larger one")
    check_downloaded(raw, str(path))
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found and not is_same(found[key], value):
                twice.append(key)
            found[key] = value
        return found

    try:
        found = json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found {quoted(str(error))}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found another value")
    if twice:
        raise UserError(
            f"{path}: {quoted(twice[0])}: expected the key once, found it twice with different values; delete one"
        )
    return found


def take(table: dict[str, Any], key: str, kind: type, path: Path | str, default: Any = ...) -> Any:
    """Return ``table[key]`` as int, float, str or bool. ``default`` replaces null and a missing key.

    Raises a UserError that names ``path``.
    """
    value = table.get(key)
    if value is None:
        if default is ...:
            raise UserError(f"{path}: expected the key {key}, found none")
        return default
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{path}: {key}: expected {kind.__name__}, found {quoted(value)}")
    return value


def check_arguments(args: ModelArgs, path: Path, names: Mapping[str, str]) -> ModelArgs:
    """Return ``args`` if such a model can exist. Raises a UserError that names the file ``path`` and its key."""

    def named(argument: str) -> str:
        return f"{names[argument]} ({argument})" if argument in names else argument

    for argument in ("dim", "n_layers", "n_heads", "kv_heads", "multiple_of", "max_seq_len", "vocab_size"):
        if not 0 < getattr(args, argument) < 1 << 24:
            found = getattr(args, argument)
            argument = "n_kv_heads" if argument == "kv_heads" else argument
            raise UserError(f"{path}: {named(argument)}: expected a size of a model, found {found}")
    if args.n_layers > MAX_LAYERS:
        raise UserError(f"{path}: {named('n_layers')}: expected up to {MAX_LAYERS}, found {args.n_layers}")
    try:
        args.check()
    except UserError as error:
        message = re.sub(r"\bmodel\.(\w+)", lambda match: named(match[1]), str(error))
        raise UserError(f"{path}: {message}") from None
    return args
