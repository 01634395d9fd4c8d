"""What tokens were made of is compared in words: grown, another text, another separator, another tokenizer."""

import json
from pathlib import Path

import pytest

from llama_jax.data.origin import Origin, difference
from llama_jax.data.shards import prepare
from llama_jax.data.text import Corpus
from llama_jax.tokenizer import Tokenizer, train_tokenizer

FILES = {"a.txt": b"The fox went to the river.\n" * 20, "b.txt": b"The owl saw 12 boats.\n" * 20}


def origin(
    folder: Path, tokenizer: Tokenizer, files: dict[str, bytes], separator: bytes = b"", train_size: float = 0.9
) -> Origin:
    """Of the tokens of ``files``, written anew."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths = sorted(folder / name for name in files)
    corpus = Corpus(paths, separator, train_size)
    return prepare(corpus, tokenizer, folder / "tokens", source="my text").manifest.origin


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "my text is another text (it was 2 files of 980 bytes and is 0 files of 0 bytes now)"),
        ({"a.txt": FILES["a.txt"] + b"more"}, "my text has grown by 4 bytes since"),
        ({"b.txt": FILES["b.txt"] + b"more\n"}, "my text has grown by 5 bytes since"),
        ({"a.txt": FILES["a.txt"] * 2, "b.txt": FILES["b.txt"] * 2}, "my text has grown by 980 bytes since"),
        ({"c.txt": b"more"}, "my text has grown by 4 bytes since"),
        ({"0.txt": b"more", "b.txt": FILES["b.txt"] + b"more"}, "my text has grown by 8 bytes since"),
        ({"a.txt": FILES["a.txt"][:-1]}, "another text, as {a} is (it was 2 files of 980 bytes and is 2 files of 979 bytes now)"),
        ({"a.txt": FILES["a.txt"].upper()}, "my text is another text, as {a} is"),
        ({"a.txt": b"x" + FILES["a.txt"]}, "my text is another text, as {a} is"),
        ({"a.txt": FILES["b.txt"], "b.txt": FILES["a.txt"]}, "the files of my text are the same in another order"),
    ],
    ids=str,
)  # fmt: skip
def test_a_text_that_grew_is_told_from_another_text(
    tmp_path: Path, small_tokenizer: Tokenizer, files: dict[str, bytes], words: str
) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    now = origin(tmp_path / "text", small_tokenizer, FILES | files if files else {})
    assert difference(before, before) == "" and difference(now, now) == ""
    assert words.format(a=tmp_path / "text" / "a.txt") in difference(before, now)


def test_a_text_that_moved_and_was_renamed_is_the_same(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    assert difference(before, origin(tmp_path / "elsewhere", small_tokenizer, FILES)) == ""
    renamed = {"x.txt": FILES["a.txt"], "y.txt": FILES["b.txt"]}
    assert difference(before, origin(tmp_path / "text", small_tokenizer, renamed)) == ""


def test_a_text_that_moved_and_grew_has_grown(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    now = origin(tmp_path / "elsewhere", small_tokenizer, FILES | {"b.txt": FILES["b.txt"] + b"more"})
    assert difference(before, now) == "my text has grown by 4 bytes since"


def test_all_that_changed_is_named(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    other = train_tokenizer(["the fox and the owl " * 20], 300, tmp_path / "other.model")
    now = origin(tmp_path / "text", other, {"a.txt": b"The fox\n" * 9}, separator=b"\n", train_size=0.5)
    assert difference(before, now).split(", and ") == [
        r"the separator was '' and is '\n' now",
        "train_size was 0.9 and is 0.5 now",
        "my text is another text (it was 2 files of 980 bytes and is 1 file of 72 bytes now)",
        "the tokenizer is another one",
    ]


def test_how_a_vocabulary_was_to_be_trained_counts_while_it_is_not_there() -> None:
    known = Origin(text_sha256="x", tokenizer_sha256="abc", trained_vocab_size=300)
    assert difference(known, Origin(text_sha256="x", trained_vocab_size=300)) == ""
    assert "was trained with vocab_size 300 and is trained with vocab_size 400 now" in difference(
        known, Origin(text_sha256="x", trained_vocab_size=400)
    )
    assert difference(known, Origin(text_sha256="x", tokenizer_sha256="abc")) == ""
    assert difference(known, Origin(text_sha256="x", tokenizer_sha256="other")) == "the tokenizer is another one"


def test_other_tokens_of_the_same_text_and_tokenizer_are_told(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    for change in ({"tokens_sha256": "other"}, {"tokens": {"train": 1, "eval": 2}}):
        assert "made by another version" in difference(before, Origin.from_dict(before.to_dict() | change))


def test_an_origin_of_an_earlier_version_knows_no_files(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    old = Origin.from_dict(before.to_dict() | {"files": [], "tokens_sha256": "", "source": ""})
    assert difference(old, before) == ""
    grown = origin(tmp_path / "text", small_tokenizer, FILES | {"c.txt": b"more"})
    assert difference(old, grown) == "the text is another one"


def test_an_origin_goes_through_json_and_says_what_it_is(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    before = origin(tmp_path / "text", small_tokenizer, FILES)
    assert Origin.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    assert str(before).endswith("tokens of my text (2 files, 980 bytes, separator '', train_size 0.9)")
