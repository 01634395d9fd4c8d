"""Command lines: flags of several values take no argument that is not theirs, escapes are understood, nothing goes silently."""

import dataclasses
from typing import Annotated, Any, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.cli.flags import (
    ESCAPED,
    given_twice,
    parse_flags,
    refuse_empty,
    take_option,
    texts_given_twice,
    unescape,
)
from llama_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Section:
    """A part."""

    names: tuple[str, ...] = ("wq",)
    """Texts."""
    kinds: tuple[Literal["a", "b"], ...] = ()
    """Choices."""
    mixture: dict[str, float] = dataclasses.field(default_factory=lambda: {"old": 1.0})
    """Shares."""
    loud: bool = False
    """A switch."""


@dataclasses.dataclass(frozen=True)
class WithTexts:
    """A command that takes texts."""

    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts."""
    stop: tuple[str, ...] = dataclasses.field(default=(), metadata=ESCAPED)
    """Texts."""
    say: str = dataclasses.field(default="", metadata=ESCAPED)
    """A text."""
    sizes: tuple[int, ...] = (1, 8)
    """Numbers."""
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Numbers by number."""
    json: bool = False
    """A switch."""
    part: Section = Section()


@dataclasses.dataclass(frozen=True)
class WithoutTexts:
    """A command that takes flags alone."""

    part: Section = Section()
    sizes: list[int] = dataclasses.field(default_factory=list)
    """Numbers."""


def parse(*argv: str, kind: Any = WithTexts) -> dict[str, Any]:
    """What flags changed, and nothing else."""
    found, default = dataclasses.asdict(parse_flags(kind, argv, kind(), "command", "")), dataclasses.asdict(kind())
    found |= {f"part.{name}": value for name, value in found.pop("part").items()}
    default |= {f"part.{name}": value for name, value in default.pop("part").items()}
    return {name: value for name, value in found.items() if value != default[name]}


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--stop", ".", "Once"], {"stop": (".",), "texts": ("Once",)}),
        (["--stop=.", "Once", "Twice"], {"stop": (".",), "texts": ("Once", "Twice")}),
        (["a", "--stop", ".", "--stop", "!", "b"], {"stop": (".", "!"), "texts": ("a", "b")}),
        (["--sizes", "3", "4", "5 x", "6"], {"sizes": (3, 4), "texts": ("5 x", "6")}),
        (["--sizes", "3", "a", "--sizes", "4"], {"sizes": (3, 4), "texts": ("a",)}),
        (["--bias", "5", "1", "7", "-inf", "9"], {"bias": {5: 1.0, 7: float("-inf")}, "texts": ("9",)}),
        (["--bias", "5", "1", "--bias", "7", "2", "a"], {"bias": {5: 1.0, 7: 2.0}, "texts": ("a",)}),
        (["--part.names", "wo", "a"], {"part.names": ("wo",), "texts": ("a",)}),
        (["--part.kinds", "a", "b", "c.txt"], {"part.kinds": ("a", "b"), "texts": ("c.txt",)}),
        (["--part.kinds", "a", "--", "c"], {"part.kinds": ("a",), "texts": ("c",)}),
        (["--part.mixture", "web/", "0.7", "b", "0.3", "my.txt"], {"part.mixture": {"web/": 0.7, "b": 0.3}, "texts": ("my.txt",)}),
        (["--part.loud", "a"], {"part.loud": True, "texts": ("a",)}),
        (["--json=true", "a"], {"json": True, "texts": ("a",)}),
        (["--json", "--json=False"], {}),
        (["--part.loud=TRUE"], {"part.loud": True}),
        (["--json", "true story"], {"json": True, "texts": ("true story",)}),
        (["--json", "--", "true"], {"json": True, "texts": ("true",)}),
        (["--", "--stop", "-x"], {"texts": ("--stop", "-x")}),
        (["--stop", "- x", "--stop", "-", "--stop", "-1", "--stop=--y"], {"stop": ("- x", "-", "-1", "--y")}),
        (["--say", r"a\nb", r"c\nd"], {"say": "a\nb", "texts": (r"c\nd",)}),
        ([r"--say=\\n", r"--stop=\t", "--stop", r"\w"], {"say": r"\n", "stop": ("\t", r"\w")}),
    ],
    ids=str,
)  # fmt: skip
def test_a_flag_takes_its_values_and_leaves_the_texts(argv: list[str], wanted: dict[str, Any]) -> None:
    assert parse(*argv) == wanted


def test_a_command_without_texts_takes_several_at_a_time_with_hyphens_and_underscores() -> None:
    found = parse("--part.names", "wq", "wk", "--sizes", "1", "2", "--part.mixture", "a", "1", kind=WithoutTexts)
    assert found == {"part.names": ("wq", "wk"), "sizes": [1, 2], "part.mixture": {"a": 1.0}}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stop"], "--stop: expected a text, found none"),
        (["--stop", "--json"], "--stop: expected a text, found '--json'; write --stop=--json if that is the value"),
        (["--sizes", "many"], "--sizes: expected a whole number, found 'many'"),
        (["--bias", "7"], "--bias: expected a whole number and a number, found '7'"),
        (["--bias", "7", "x"], "--bias: expected a whole number and a number, found '7' 'x'"),
        (["--part.kinds", "c"], "--part.kinds: expected one of 'a', 'b', found 'c'"),
        (["--part.kinds", "a", "c", "x.txt"], "--part.kinds: expected one of 'a', 'b', found 'c'"),
        (["--json=maybe"], "--json: expected no value, true or false, found 'maybe'"),
        (
            ["--json", "True", "a"],
            "--json: expected no value, found True; write --json alone, or --json=true or --json=false",
        ),
        (
            ["--part.no-loud", "false"],
            "--part.no-loud: expected no value, found false; write --part.no-loud alone, or --part.loud=true",
        ),
        (["--part.no-loud=true"], "--part.no-loud: expected no value, found true; write"),
        (["--jsn"], "--jsn: expected a flag of this command, found another; perhaps you meant --json;"),
        (["-Once"], "-Once: expected a flag of this command, found another; put -- before a text"),
    ],
    ids=str,
)
def test_what_a_flag_cannot_take_is_told(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(*argv)
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


def test_a_text_without_a_flag_is_told_where_a_command_has_none() -> None:
    with pytest.raises(UserError, match=r"my.txt: expected a flag before it, found none that takes it"):
        parse("my.txt", kind=WithoutTexts)


def test_values_replace_those_of_the_default_and_leave_the_others() -> None:
    default = WithTexts(sizes=(5,), part=Section(names=("a", "b"), loud=True))
    found = parse_flags(WithTexts, ["--part.names", "c"], default, "command", "")
    assert found == dataclasses.replace(default, part=Section(names=("c",), loud=True))


@given(st.text(st.sampled_from("\\nrtx \n"), max_size=12))
def test_escapes_are_a_line_feed_a_carriage_return_a_tab_and_a_backslash(text: str) -> None:
    expected, rest = "", text
    while rest:
        pair = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}.get(rest[:2])
        expected, rest = (expected + pair, rest[2:]) if pair else (expected + rest[0], rest[1:])
    assert unescape(text) == expected
    assert unescape(text.replace("\\", r"\\")) == text


def test_an_option_of_its_own_is_taken_once() -> None:
    assert take_option(["a", "--config", "x.toml", "b"], "--config") == ("x.toml", ["a", "b"])
    assert take_option(["--config=x.toml"], "--config") == ("x.toml", [])
    assert take_option(["a", "--", "--config", "x"], "--config") == (None, ["a", "--", "--config", "x"])
    for argv, words in (
        (["--config"], "found none"),
        (["--config="], "found none"),
        (["--config", "--train.lr", "1"], "found --train.lr"),
        (["--config", "a.toml", "--config=b.toml"], "found a.toml and b.toml"),
    ):
        with pytest.raises(UserError, match=f"--config: expected .*{words}"):
            take_option(argv, "--config")


@dataclasses.dataclass(frozen=True)
class Paths:
    """Paths, none by default."""

    chat_template: str = ""
    """A file."""
    draft: str = ""
    """A folder."""


@pytest.mark.parametrize("argv", [["--chat-template", ""], ["--chat_template="], ["--draft", "x", "--chat-template="]])
def test_a_flag_without_a_value_is_not_as_good_as_none(argv: list[str]) -> None:
    args = parse_flags(Paths, argv, Paths(), "program", "")
    with pytest.raises(UserError, match=r"^--chat-template: expected a value, found an empty text"):
        refuse_empty(argv, args, ("chat_template", "draft"))
    refuse_empty(["--", "--chat-template"], args, ("chat_template",))
    refuse_empty([], Paths(), ("chat_template", "draft"))


def test_of_a_text_that_is_given_twice_the_last_one_counts_and_that_is_told() -> None:
    told = texts_given_twice(["--data.filepath", "a", "--x", "--data.filepath=b"])
    assert "--data.filepath is given 2 times: b is read, and not a; several texts are a folder" in told
    for argv in (
        [],
        ["--filepath", "a"],
        ["--filepath", "a", "--filepath", "a", "--", "--filepath", "b"],
        ["--x", "1", "--x", "2"],
    ):
        assert texts_given_twice(argv) == ""


def test_of_a_flag_with_one_value_that_is_given_twice_the_last_one_counts_and_that_is_told() -> None:
    told = given_twice(
        WithTexts, ["--say", "a", "--stop", "x", "--stop", "y", "--say=b", "--sizes", "1", "--sizes", "2"]
    )
    assert told == ["warning: --say is given 2 times: b counts, and not a"]
    assert given_twice(WithTexts, ["--say", "a", "--say", "a", "--", "--say", "b"]) == []
