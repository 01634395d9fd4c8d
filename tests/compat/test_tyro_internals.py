"""Tyro still words its errors as llama_jax/compat/tyro_internals.py reads them: each pattern has a command line that needs it."""

import contextlib
import dataclasses
import io
import re
from typing import Literal

import pytest
import tyro

from llama_jax.compat import tyro_internals


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of each kind."""

    size: int = 1
    """A number."""
    share: float | None = None
    """A number or none."""
    kind: Literal["a", "b"] = "a"
    """A choice."""
    pair: tuple[int, int] = (1, 2)
    """Two numbers."""


EXAMPLES = {
    "--size x": "--size: expected a whole number, found 'x'",
    "--share x": "--share: expected a number or None, found ['x']",
    "--kind c": "--kind: expected one of 'a', 'b', found 'c'",
    "--size": "--size: expected a value, found none",
    "--sise 3": "--sise: expected a flag of this command, found another; perhaps you meant --size",
    "extra": "extra: expected a flag before it, found none that takes it",
}


def panel_of(words: str, encoding: str = "utf-8") -> str:
    """What tyro prints on a command line that is wrong, where standard output has this encoding."""
    heard = io.StringIO()
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(heard), pytest.raises(SystemExit):
        tyro.cli(Flags, args=words.split())
    return heard.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("words", list(EXAMPLES))
def test_an_error_of_tyro_is_told_in_one_line(words: str, encoding: str) -> None:
    panel = panel_of(words, encoding)
    assert panel.isascii() == (encoding == "ascii")
    told = tyro_internals.one_line(panel)
    assert told == EXAMPLES[words], f"tyro {tyro.__version__} says {told!r}; see llama_jax/compat/tyro_internals.py"


def test_every_pattern_is_needed() -> None:
    messages = [" ".join(line.strip("╭╮╰╯│─ ") for line in panel_of(words).splitlines()) for words in EXAMPLES]
    for pattern, _ in tyro_internals.FLAG_ERRORS:
        assert any(re.search(pattern, message) for message in messages), pattern
