"""A tokenizer.json made to harm: refused in one line, in little memory, without an expression of it run."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests.commands import PEAK, ROOT
from tests.tokenizers.made import CONFIG, Table, bytewise, put


def at(*path: Any) -> Callable[[Any], Callable[[Table], None]]:
    """Return what makes a change: it puts a value at a path of the table."""

    def with_value(value: Any) -> Callable[[Table], None]:
        def change(table: Table) -> None:
            place: Any = table
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return change

    return with_value


def split(expression: str) -> Table:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def replace(pattern: Table, content: str) -> Table:
    return {"type": "Replace", "pattern": pattern, "content": content}


def nested(step: Table, depth: int) -> Table:
    for _ in range(depth):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


MODEL, VOCAB, ADDED = at("model"), at("model", "vocab"), at("added_tokens")
FIRST, THEN = at("normalizer"), at("pre_tokenizer")
TOKEN = {"id": 420, "content": "<x>", "special": True}
CHANGES: dict[str, tuple[Callable[[Table], None], str]] = {
    "no model": (MODEL(None), r"model: expected the vocabulary"),
    "a list for a model": (MODEL([]), r"model: expected the vocabulary"),
    "another type": (at("model", "type")("Exec"), r"expected a tokenizer that the tokenizers library"),
    "no vocabulary": (VOCAB(None), r"model\.vocab: expected the pieces"),
    "an empty vocabulary": (VOCAB({}), r"model\.vocab: expected the pieces"),
    "a vocabulary of numbers": (VOCAB([1, 2]), r"model\.vocab: expected pieces with scores"),
    "a negative id": (at("model", "vocab", "a")(-1), r"expected ids from 0 to .*, found -1"),
    "a huge id": (at("model", "vocab", "a")(1 << 31), r"found 2147483648"),
    "a larger one": (at("model", "vocab", "a")(1 << 70), r"expected ids from 0"),
    "a float for an id": (at("model", "vocab", "a")(1.5), r"found 1\.5"),
    "a bool for an id": (at("model", "vocab", "a")(True), r"found True"),
    "a text for an id": (at("model", "vocab", "a")("7"), r"found '7'"),
    "an id twice": (at("model", "vocab", "a")(5), r"expected one piece per id"),
    "merges of another kind": (at("model", "merges")("a b"), r"model\.merges: expected a list"),
    "merges of nothing": (at("model", "merges")([["q", "zzzz"]]), r"expected a tokenizer that the tokenizers library"),
    "merges of numbers": (at("model", "merges")([[1, 2]]), r"expected a tokenizer that the tokenizers library"),
    "added tokens of another kind": (ADDED({}), r"added_tokens: expected a list"),
    "an added text": (ADDED(["<x>"]), r"added_tokens: expected tokens"),
    "an added token without text": (ADDED([TOKEN | {"content": ""}]), r"added_tokens: expected tokens"),
    "an added token of a number": (ADDED([TOKEN | {"content": 5}]), r"added_tokens: expected tokens"),
    "an added token of a negative id": (ADDED([TOKEN | {"id": -5}]), r"added_tokens: expected tokens"),
    "an added token of a huge id": (ADDED([TOKEN | {"id": 1 << 40}]), r"added_tokens: expected tokens"),
    "an added id twice": (ADDED([TOKEN, TOKEN | {"content": "<y>"}]), r"expected different ids"),
    "an added text twice": (ADDED([TOKEN, TOKEN | {"id": 421}]), r"expected different texts"),
    "added novels": (ADDED([TOKEN | {"content": "x" * 2_000_000}]), r"characters, found 2,000,000"),
    "nested repetitions": (THEN(split(r"(a+)+$")), r"takes little time, found '\(a\+\)\+\$'"),
    "repeated choices": (THEN(split(r"(?:a|aa)*b")), r"repeats a group"),
    "many repetitions": (THEN(split(r".*.*.*.*=.*")), r"too many repetitions"),
    "many optional ones": (THEN(split("a?" * 40 + "a" * 40)), r"too many repetitions"),
    "a reference": (THEN(split(r"(a*)\1b")), r"refers back"),
    "a huge repetition": (THEN(split(r"\p{L}{90000}")), r"repetition of 90,000"),
    "one in a normalizer": (FIRST(replace({"Regex": r"(x+x+)+y"}, "")), r"normalizer: .*takes little time"),
    "one deep inside": (FIRST(nested(replace({"Regex": r"(x+x+)+y"}, ""), 20)), r"normalizer: .*takes little time"),
    "one that is none": (THEN(split(r"[")), r"class of characters that does not end"),
    "a text that grows": (FIRST(replace({"String": " "}, "y" * 1000)), r"keep a text's length"),
    "a text that doubles": (FIRST({"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 20}), r"keep a text's length"),
    "a text put before": (FIRST({"type": "Prepend", "prepend": "y" * 10_000_000}), r"keep a text's length"),
    "many steps": (FIRST({"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10_000}), r"a few steps"),
    "sequences of sequences": (FIRST(nested({"type": "NFC"}, 90)), r"a few steps"),
    "an unknown step": (FIRST({"type": "Exec", "command": "touch hacked"}), r"expected a tokenizer that the tokenizers library"),
    "a step of nothing": (THEN({"type": "FixedLength", "length": 0}), r"length: expected 1 or more"),
    "a damaged map": (FIRST({"type": "Precompiled", "precompiled_charsmap": "AAAA" * 50}), r"expected a tokenizer that the tokenizers library"),
    "another pipeline": (at("decoder")(5), r"expected a tokenizer that the tokenizers library"),
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Table:
    return bytewise()


@pytest.mark.parametrize("name", CHANGES)
def test_a_table_made_to_harm_is_refused_in_one_line(
    name: str, table: Table, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, words = CHANGES[name]
    hostile = copy.deepcopy(table)
    change(hostile)
    with pytest.raises(UserError, match=words) as caught:
        Tokenizer(put(tmp_path, hostile, CONFIG))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "tokenizer.json")) and "\n" not in message and len(message) < 1000
    assert capfd.readouterr() == ("", ""), "the library's own report of a panic is not shown"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 1_000_000, "expected a JSON object"),
        ('{"a":' * 100_000, "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ('{"model": NaN}', "model: expected"),
        ('{"model": {"vocab": {"a": 1, "a": 2}}}', "expected the key once"),
        ("", "expected a JSON object"),
        ("\x00" * 100, "expected a JSON object"),
        ("{}\n{}\n", "use another file, for this one is JSON lines"),
        ('{"model":[' + "[]," * 1_000_000 + "[]]}", "millions of values"),
        ('{"model":{"merges":[' + '"a b",' * 2_500_000 + '"a b"]}}', "millions of values"),
    ],
    ids=range(10),
)
def test_a_file_made_to_harm_is_refused_in_one_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        folder = tmp_path / name.partition(".")[0]
        put(folder, bytewise(), CONFIG)
        with open(folder / name, "wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(UserError, match=r"expected a tokenizer of up to .* bytes, found a larger file"):
            Tokenizer(folder)


MEASURED = f"""{PEAK}
import sys
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
try:
    Tokenizer(sys.argv[1])
    print("opened")
except UserError as error:
    print(error)
print(peak())
"""


def large_vocabulary(pieces: int) -> Table:
    table = bytewise()
    table["model"]["vocab"] |= {f"q{i:09}": 10_000 + i for i in range(pieces)}
    return table


LARGE: dict[str, Callable[[], Table]] = {
    "as many pieces as are read": lambda: large_vocabulary(599_000),
    "more": lambda: large_vocabulary(1_500_000),
    "a tree": lambda: bytewise() | {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[f"{i:05}" * 12, 0.0] for i in range(33_000)]}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_files_take_less_than_a_gigabyte(name: str, tmp_path: Path) -> None:
    put(tmp_path, LARGE[name](), CONFIG)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout.splitlines()[-1]) < 1000, done.stdout
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2


def test_small_files_of_anything_are_read_or_refused(table: Table, tmp_path: Path) -> None:
    for config in (
        [],
        {"bos_token": [], "eos_token": {}},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": 1, "5": 2, "-1": {}}},
    ):
        put(tmp_path, table, None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"a": "b", "c": [1], "d": -1, "e": 1 << 60}))
        (tmp_path / "special_tokens_map.json").write_text(
            json.dumps({"eos_token": "<|end_of_text|>", "additional_special_tokens": 5})
        )
        try:
            assert Tokenizer(tmp_path).eos_id == 421
        except UserError as error:
            assert "expected a JSON object" in str(error)
