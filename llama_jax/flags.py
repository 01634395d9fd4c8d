"""Command lines: dataclass fields as flags, by tyro, with errors in one line."""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

from llama_jax.errors import UserError

T = TypeVar("T")


def parse_flags(kind: type[T], argv: Sequence[str] | None, default: T, prog: str, description: str) -> T:
    """Read command-line flags over ``default``, by tyro; ``--help`` prints the help and exits with status 0.

    Raises UserError, in one line, on an unknown flag or a value of the wrong type.
    """
    import tyro

    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            args = list(sys.argv[1:] if argv is None else argv)
            return tyro.cli(kind, args=args, default=default, prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(heard.getvalue()) + f"; `{prog} --help` lists all flags") from None


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE`` or ``--name=VALUE``, None where it is not given, and the arguments without it."""
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key == name:
            rest = i + 1 if equals else i + 2
            value = value if equals else "".join(argv[i + 1 : i + 2])
            if not value or value.startswith("--"):
                raise UserError(f"{name}: expected a TOML file, found none; see configs/ for examples")
            return value, argv[:i] + argv[rest:]
    return None, argv


def unescape(text: str) -> str:
    r"""``text`` with ``\n``, ``\r``, ``\t`` and ``\\`` taken for what they stand for; any other backslash stays as it is."""
    meant = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda found: meant[found[1]], text)


# tyro's messages, and the same in the words of all others here.
_FLAG_ERRORS = (
    (r"Error parsing (\S+): .*?('.*'|\[.*\]).*", r"\1: expected {kind}, found \2"),
    (r"invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*?)\).*", r"\2: expected one of \3, found \1"),
    (r"Missing value for argument '(\S+)'.*", r"\1: expected a value, found none"),
    (r"Unrecognized options: (\S+?),?( .*)?", r"\1: expected a flag of this command, found another"),
)
_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "{None}|INT": "a whole number or None",
    "{None}|FLOAT": "a number or None",
}


def _one_line(panel: str) -> str:
    """The message of tyro's framed error panel, and the flag that it proposes, in one line."""
    lines = [line.strip("╭╮╰╯│─ ") for line in panel.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines[1:]:
        parts.append([]) if not line else parts[-1].append(line)
    message = " ".join(parts[0]) or " ".join(filter(None, lines))
    # The second line of a hint is the flag with the kind of its value.
    flags = {part[0].split(":")[0]: part[1] for part in parts[1:] if len(part) > 1}
    kind = flags.get("Argument helptext", "").partition(" ")[2]
    for pattern, words in _FLAG_ERRORS:
        if match := re.fullmatch(pattern, message):
            message = match.expand(words).replace("{kind}", _KINDS.get(kind, kind))
            break
    proposed = next((flag for title, flag in flags.items() if title.startswith("Perhaps you meant")), "")
    return message + (f"; perhaps you meant {proposed.split(' ')[0]}" if proposed else "")
