"""Command lines: dataclass fields as flags, by tyro, with one-line errors."""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from os.path import exists
from types import UnionType
from typing import Any, NamedTuple, TypeVar

from llama_jax.compat.tyro_internals import one_line
from llama_jax.errors import UserError

T = TypeVar("T")


def parse_flags(kind: type[T], argv: Sequence[str] | None, default: T, prog: str, description: str) -> T:
    """Read command-line flags over ``default`` with tyro. ``--help`` prints the help and exits with status 0.

    Flags with several values are read here first (``_take_lists``), because tyro would let them take all words that
    follow. They may be repeated, and they take no argument that belongs to no flag. Raises a one-line UserError on an
    unknown flag or a value of the wrong type.
    """
    import tyro

    args = list(sys.argv[1:] if argv is None else argv)
    args, default = _take_lists(kind, args, default)
    panel = io.StringIO()
    try:
        with contextlib.redirect_stderr(panel):
            return tyro.cli(kind, args=args, default=default, prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        message = one_line(panel.getvalue())
        if re.match("-[^-]", message) and _has_positional(kind):
            message += "; put -- before a text that begins with a hyphen"
        raise UserError(f"{message}; `{prog} --help` lists all flags") from None


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of ``--name FILE`` or ``--name=FILE``, or None, and the other arguments.

    Raises UserError if the value is missing or the option is given twice.
    """
    found, rest = None, []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        key, equals, value = word.partition("=")
        if key != name:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise UserError(f"{name}: expected a TOML file or the name of a configuration, found {value or 'none'}")
        if found is not None:
            raise UserError(f"{name}: expected one file, found {found} and {value}; leave one out")
        found = value
    return found, rest


def texts_given_twice(argv: Sequence[str]) -> str:
    """Return a warning if a flag of a text (``--filepath``) has several values, of which the last one counts."""
    for name, values, others in _given_several(argv):
        if name.endswith("filepath"):
            return (
                f"warning: {name} is given {len(values)} times: {values[-1]} is read, and not {', '.join(others)}; several texts are "
                "a folder, or a glob in quotes"
            )
    return ""


def given_twice(kind: type[Any], argv: Sequence[str] | None) -> list[str]:
    """Return warnings about flags of a single value that have several, of which the last one counts.

    ``kind`` is the dataclass of the flags.
    """
    single = {name for name, flag in _flags_of(kind) if _element_types(flag.hint) is None and flag.hint is not bool}
    return [
        f"warning: {name} is given {len(values)} times: {values[-1]} counts, and not {', '.join(others)}"
        for name, values, others in _given_several(sys.argv[1:] if argv is None else argv)
        if name in single
    ]


def _given_several(argv: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """Return each flag that unlike words follow, its values if it takes one: all, and those that are not the last."""
    given: dict[str, list[str]] = {}
    for word, following in itertools.pairwise([*argv, ""]):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            given.setdefault(name.replace("_", "-"), []).append(value if equals else following)
    several = []
    for name, values in given.items():
        if others := [value for value in dict.fromkeys(values) if value != values[-1]]:
            several.append((name, values, others))
    return several


def unescape(text: str) -> str:
    r"""Return ``text`` with the escapes ``\n``, ``\r``, ``\t`` and ``\\`` replaced, which are hard to type in a shell.

    Any other backslash stays.
    """
    return re.sub(r"\\([nrt\\])", lambda escape: _ESCAPES[escape[1]], text)


_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
# The metadata of a dataclass field whose flag is unescaped. In TOML and Python it is a plain string.
ESCAPED = {"escaped": True}
# The metadata of a field of texts whose flag takes all that follow it, in a command with positional arguments, too.
SEVERAL = {"several": True}


class _Flag(NamedTuple):
    """A flag, and the field that it sets."""

    path: tuple[str, ...]  # names of the sections and of the field
    hint: Any
    escaped: bool
    several: bool


def _flags_of(kind: Any, prefix: str = "", path: tuple[str, ...] = ()) -> Iterator[tuple[str, _Flag]]:
    """Yield all flags of a dataclass of dataclasses with their names."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, *notes = typing.get_args(hints[field.name]) if _is_annotated(hints[field.name]) else (hints[field.name],)
        name = next((note.name for note in notes if getattr(note, "name", None) is not None), field.name)
        inner = (*path, field.name)
        if dataclasses.is_dataclass(hint):
            yield from _flags_of(hint, f"{prefix}{name}." if name else prefix, inner)
        elif not _is_positional(notes):
            flag = "--" + (prefix + name).replace("_", "-")
            yield flag, _Flag(inner, hint, *(bool(field.metadata.get(name)) for name in ("escaped", "several")))


def _is_annotated(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Annotated


def _is_positional(notes: Sequence[Any]) -> bool:
    import tyro

    return tyro.conf.Positional in notes


def _has_positional(kind: Any) -> bool:
    hints = typing.get_type_hints(kind, include_extras=True).values()
    return any(_is_annotated(hint) and _is_positional(typing.get_args(hint)[1:]) for hint in hints)


def _take_lists(kind: type[T], argv: Sequence[str], default: T) -> tuple[list[str], T]:
    """Return ``argv`` without flags of several values, and ``default`` with their values. Escapes are resolved.

    Such a flag takes one group of values (a value, or a key and its value) and then as many more as have its type. In a
    command with positional arguments, a flag of plain texts takes one, unless it is marked as ``SEVERAL``:
    ``--stop . --stop ! "Once upon a time"``.
    """
    flags, one_text = dict(_flags_of(kind)), _has_positional(kind)
    lists: dict[str, list[tuple[Any, ...]]] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        flag = flags.get(name) if word.startswith("--") else None
        if word.startswith("--"):
            _refuse_loose_value(flags, name, value if equals else None, words)
        if flag is None:
            rest.append(word)
        elif (types := _element_types(flag.hint)) is not None:
            words = [value, *words] if equals else words
            if words[:1] == ["None"] and _several(flag.hint) is not flag.hint:
                del words[0]
                default = _with(default, flag.path, None)
                continue
            once = _is_group(flag.hint) or (one_text and types == (str,) and not flag.several)
            lists.setdefault(name, []).extend(_take_groups(name, words, types, bool(equals), once))
        elif flag.hint is bool and equals:
            rest.append(_switch(name, value))
        elif flag.escaped and (equals or (words and not _is_flag(words[0]))):
            rest.append(f"{name}={unescape(value if equals else words.pop(0))}")
        else:
            rest.append(word)
    for name, groups in lists.items():
        if _is_group(flags[name].hint):
            if len(groups) > 1:
                raise UserError(f"{name}: expected it once, found it {len(groups)} times; leave the others out")
            default = _with(default, flags[name].path, groups[0])
            continue
        hint, escaped = _several(flags[name].hint), flags[name].escaped
        if escaped:
            groups = [tuple(unescape(x) if isinstance(x, str) else x for x in group) for group in groups]
        if typing.get_origin(hint) is dict and len({key for key, *_ in groups}) < len(groups):
            keys = [key for key, *_ in groups]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(
                f"{name}: expected each once, found {twice} {keys.count(twice)} times; leave the others out"
            )
        values = dict(groups) if typing.get_origin(hint) is dict else typing.get_origin(hint)(x for (x,) in groups)
        default = _with(default, flags[name].path, values)
    return rest, default


def _take_groups(
    name: str, words: list[str], types: tuple[Any, ...], first_is_given: bool, once: bool
) -> Iterator[tuple[Any, ...]]:
    """Take groups of values from the front of ``words``, or one if ``once``. Raises UserError if there is none."""
    expected = " and ".join(_words_of(kind) for kind in types)
    group = _group(words, types, first_is_given)
    if group is None:
        found = " ".join(map(repr, words[: len(types)])) or "none"
        hint = f"; write {name}={words[0]} if that is the value" if words and _is_flag(words[0]) else ""
        raise UserError(f"{name}: expected {expected}, found {found}{hint}")
    while group is not None:
        del words[: len(types)]
        yield group
        group = None if once else _group(words, types, False)
    # A misspelt name is not a text that follows: this would be a file, or more than a word.
    if typing.get_origin(types[0]) is typing.Literal and words and words[0].isidentifier() and not exists(words[0]):
        raise UserError(f"{name}: expected {expected}, found {words[0]!r}")


def _group(words: Sequence[str], types: tuple[Any, ...], first_is_given: bool) -> tuple[Any, ...] | None:
    """Return the values at the front of ``words``, or None if they have other types.

    ``first_is_given``: the first one was given as ``--flag=value``.
    """
    if len(words) < len(types):
        return None
    values = []
    for i, (word, kind) in enumerate(zip(words, types, strict=False)):
        if _is_flag(word) and not (i == 0 and first_is_given):
            return None
        if typing.get_origin(kind) is typing.Literal:
            if word not in typing.get_args(kind):
                return None
            values.append(word)
            continue
        try:
            values.append(_value_of(word, kind))
        except ValueError:
            return None
    return tuple(values)


def _value_of(word: str, kind: Any) -> Any:
    """Return a word as a value of type ``kind``. Raises ValueError if it is none.

    Of a union it is the first type that fits: a number, true or false, a text.
    """
    if not isinstance(kind, UnionType):
        return kind(word)
    options = typing.get_args(kind)
    if bool in options and word.lower() in ("true", "false"):
        return word.lower() == "true"
    for option in (option for option in options if option is not bool):
        with contextlib.suppress(ValueError):
            return option(word)
    raise ValueError(word)


def _several(hint: Any) -> Any:
    """Return the type of several values in a hint that also allows None. Other hints are returned unchanged."""
    several = [option for option in typing.get_args(hint) if typing.get_origin(option) in (dict, list, tuple)]
    return several[0] if isinstance(hint, UnionType) and several else hint


def _element_types(hint: Any) -> tuple[Any, ...] | None:
    """Return the types of a group of values if a flag takes groups of values, else None."""
    hint = _several(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return arguments
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return arguments[:1]
    return arguments if _is_group(hint) else None


def _is_group(hint: Any) -> bool:
    """Return whether a flag takes one group of values: it is a tuple of a fixed length."""
    return typing.get_origin(hint) is tuple and ... not in typing.get_args(hint)


def _is_flag(word: str) -> bool:
    """Return whether a word looks like a flag: it starts with a hyphen, and is neither a number nor several words."""
    if not word.startswith("-") or word == "-" or " " in word:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


# What stands in the flag that says no to a field: --data.no-document-mask.
_NO = re.compile(r"^(--(?:.*\.)?)no-")


def _refuse_loose_value(flags: dict[str, _Flag], name: str, value: str | None, words: list[str]) -> None:
    """Raise UserError if true or false stands behind a switch, where it would be taken for a text.

    The flag that says no takes no value at all.
    """
    yes = name if name in flags else _NO.sub(r"\1", name)
    if yes not in flags or flags[yes].hint is not bool or (value is not None and yes == name):
        return
    word = value if value is not None else words[0] if words else ""
    if value is not None or word.lower() in ("true", "false"):
        raise UserError(f"{name}: expected no value, found {word}; write {name} alone, or {yes}=true or {yes}=false")


def _switch(name: str, value: str) -> str:
    """Return ``--name=true`` or ``--name=false`` in tyro's spelling. Raises UserError on another value."""
    if value.lower() not in ("true", "false"):
        raise UserError(f"{name}: expected no value, true or false, found {value!r}")
    section, dot, field = name.removeprefix("--").rpartition(".")
    return name if value.lower() == "true" else f"--{section}{dot}no-{field}"


def _with(section: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return a dataclass of dataclasses with ``value`` at ``path``."""
    if len(path) > 1:
        value = _with(getattr(section, path[0]), path[1:], value)
    return dataclasses.replace(section, **{path[0]: value})


def _words_of(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, UnionType):
        return "a value"
    return {str: "a text", int: "a whole number", float: "a number"}.get(kind, f"a {getattr(kind, '__name__', kind)}")


def given_flags(argv: Sequence[str]) -> set[str]:
    """Return the names of the flags on a command line, spelled as fields: {"mesh.tensor", "hlo"}."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}


def refuse_empty(argv: Sequence[str] | None, args: Any, names: Iterable[str]) -> None:
    """Raise UserError if a flag of ``names`` is given without a value, which would be as good as no flag.

    So is a variable of the shell that is not set.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    given = given_flags(words[: words.index("--")] if "--" in words else words)
    for name in names:
        if name in given and not getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: expected a value, found an empty text; give one, or leave the flag out")
