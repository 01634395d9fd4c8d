"""Checks of settings, their types and ranges, and of paths that a caller gives, in one line that names the key."""

import functools
import math
import os
import re
import types
import typing
from typing import Any, Literal

from llama_jax.errors import UserError, quoted

SURROGATE = re.compile("[\ud800-\udfff]")
LARGEST, HUGE = (1 << 31) - 1, 1e300
TINY, BELOW_1, LARGEST_FLOAT32 = 1e-30, math.nextafter(1, 0), 3.4e38
# Ranges are (lowest, highest), both included. COUNT is for counts, POSITIVE for floats above 0.
COUNT = (1, LARGEST)
POSITIVE = (TINY, HUGE)


def typed(value: Any, hint: Any, where: str) -> Any:
    """Return ``value`` if it has the type ``hint``. An int is converted to a float. Raises UserError otherwise."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        expected = "one of " + ", ".join(map(repr, typing.get_args(hint)))
    else:
        if typing.get_origin(hint) is tuple and type(value) in (list, tuple):  # TOML has lists
            return tuple(typed(each, typing.get_args(hint)[0], where) for each in value)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(option) or option for option in options)
        if type(value) in kinds:
            return value
        if float in kinds and type(value) is int and abs(value) < 1 << 1000:
            return float(value)
        expected = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
    raise UserError(f"{where}: expected {expected}, found {value!r}")


# What a TOML file and JSON call the types that have other names there.
_WORDS = {type(None): "nothing", tuple: "a list", dict: "a table"}


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields.

    Cached, because each of thousands of prompts may bring its own settings.
    """
    return typing.get_type_hints(kind)


def given_path(path: Any, key: str) -> str:
    """Return the path that a caller gave as text. Raises UserError, which names ``key``, if it is none, or empty.

    An empty path would be the folder that the process is in.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise UserError(f"{key}: expected a path, a string or a Path, found {quoted(path)}; give one")
    return text


def own_table(args: Any, name: str) -> None:
    """Give a frozen dataclass a copy of the dict that is its field ``name``, which the caller may change later."""
    if isinstance(table := getattr(args, name), dict):
        object.__setattr__(args, name, dict(table))


def check_fields(args: Any, prefix: str, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise UserError if a field of a dataclass has the wrong type or a number outside its range (lowest, highest)."""
    for name, hint in hints_of(type(args)).items():  # type: ignore[arg-type]
        key, value = prefix + name, getattr(args, name)
        typed(value, hint, key)
        if isinstance(value, str):
            expect(value.isascii() or not SURROGATE.search(value), key, "text in UTF-8", ascii(value))
        if name in ranges and value is not None:
            low, high = ranges[name]
            expected = (
                f"{low:,} to {high:,}" if isinstance(high, int) and isinstance(low, int) else _float_range(low, high)
            )
            expect(low <= value <= high, key, expected, value)


def _float_range(low: float, high: float) -> str:
    start = "above 0" if low == TINY else f"{low} or more"
    return start + {HUGE: "", BELOW_1: ", below 1"}.get(high, f", up to {high:g}")


def expect(holds: bool, key: str, expected: str, found: object) -> None:
    """Raise UserError, which names ``key`` and what was expected and found, unless a condition ``holds``."""
    if not holds:
        raise UserError(f"{key}: expected {expected}, found {found}")
