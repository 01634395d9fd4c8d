"""Token files: the whole text as tokens, made once, never half made."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import encode as encode_module
from llama_jax.data import text as text_module
from llama_jax.data.manifest import read_manifest, sha256
from llama_jax.data.shards import prepare
from llama_jax.data.text import Corpus
from llama_jax.data.tokens import TokenSet, open_tokens
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer, train_tokenizer

FILES = ("checksums.bin", "documents.bin", "eval.bin", "manifest.json", "train.bin")


def corpus_of(folder: Path, *contents: bytes, separator: bytes = b"", train_size: float = 0.9) -> Corpus:
    folder.mkdir(exist_ok=True)
    paths = []
    for i, content in enumerate(contents):
        paths.append(folder / f"{i}.txt")
        paths[-1].write_bytes(content)
    return Corpus(paths, separator, train_size)


def documents(stream: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """The stream, parted before every BOS."""
    ids = stream.tolist()
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_id]
    assert not ids or starts[0] == 0
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=False)]  # an empty stream has none


def text_of(tokens: TokenSet, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.decode(d) for s in (tokens.train, tokens.eval) for d in documents(s, tokenizer))


CONTENTS = {
    "plain": "The fox.\nThe owl.\n",
    "no final newline": "The fox.\nThe owl.",
    "CRLF": "The fox.\r\nThe owl.\r\n\r\n" * 9,
    "NUL": "a\0b\0\0c and the rest of the line",
    "emoji": "👩‍👩‍👧‍👦🦉" * 100,
    "a line of 300,000 characters": "the fox and the owl " * 15_000,
    "a word of 300,000 characters": "fox" * 100_000,
    "white space": "   \n\n\t  the fox   \n\n   ",
    "a line that the seed would cut": "word " * 1000 + "\nend",
    "controls in the text": "<s>a fox</s><unk>" * 9,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_the_tokens_of_train_and_eval_are_the_whole_text(tmp_path, small_tokenizer, name):
    text = CONTENTS[name]
    tokens = prepare(corpus_of(tmp_path / "text", text.encode()), small_tokenizer, tmp_path / "tokens")
    assert text_of(tokens, small_tokenizer) == text
    assert len(documents(tokens.train, small_tokenizer)) == len(documents(tokens.eval, small_tokenizer)) == 1


def test_the_tokens_of_many_files_are_the_texts_of_all_of_them(tmp_path, small_tokenizer):
    contents = ["\ufeffone fox\n".encode(), b"", b" two owls", "Où?\r\n".encode() * 50, b"end"]
    tokens = prepare(corpus_of(tmp_path / "text", *contents), small_tokenizer, tmp_path / "tokens")
    assert text_of(tokens, small_tokenizer) == b"".join(contents).decode("utf-8-sig")


@pytest.mark.parametrize(
    ("contents", "separator", "texts"),
    [
        ((b"one fox\n\ntwo", b"three"), b"", ["one fox\n\ntwo", "three"]),
        ((b"one fox\n\ntwo\n", b"three"), b"\n\n", ["one fox", "two", "three"]),
        ((b"one fox\r\n<x>\r\n two\n<x>", b"three<x>"), b"<x>", ["one fox", " two", "three"]),
        ((b"one fox\n\n two\n", b"three"), b"\n", ["one fox", " two", "three"]),
    ],
    ids=["a file", "a separator", "a marker on a line", "a line"],
)
def test_a_document_stands_between_bos_and_eos(tmp_path, small_tokenizer, contents, separator, texts):
    corpus = corpus_of(tmp_path / "text", *contents, separator=separator, train_size=1.0)
    tokens = prepare(corpus, small_tokenizer, tmp_path / "tokens")
    wanted = [i for text in texts for i in small_tokenizer.encode(text, bos=True, eos=True)]
    assert tokens.train.tolist() == wanted
    assert len(tokens.eval) == 0
    assert tokens.manifest.documents == {"train": len(texts), "eval": 0}


@settings(max_examples=60)
@given(
    words=st.lists(
        st.sampled_from(["the", "fox", "12", "a\tb", "don't", "\0", "(", "\r", "é", "<s>", "\u3000x"]), max_size=60
    ),
    gaps=st.lists(st.sampled_from([" ", " ", "\n", "\n\n", "  ", " \n", "\n    ", "\r\n"]), min_size=60, max_size=60),
    part_bytes=st.integers(16, 40),
    workers=st.integers(1, 3),
)
def test_a_document_read_in_parts_has_the_ids_of_the_whole(
    tmp_path_factory, small_tokenizer, llama2_tokenizer, words, gaps, part_bytes, workers
):
    # Each pair of words in plain letters is a border; the longest stretch without one must fit in a part.
    text = "".join(f"{word}{gap}some words" for word, gap in zip(words, gaps, strict=False)) or "x"
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PART_BYTES", part_bytes)
        patch.setattr(encode_module, "PARTS_AT_ONCE", 3)
        for i, tokenizer in enumerate((small_tokenizer, llama2_tokenizer)):
            corpus = corpus_of(folder / "text", text.encode(), train_size=1.0)
            tokens = prepare(corpus, tokenizer, folder / str(i), workers)
            assert tokens.train.tolist() == tokenizer.encode(text, bos=True, eos=True)


@settings(max_examples=30)
@given(
    words=st.lists(
        st.sampled_from(
            [
                "который",
                "воспоминания",
                "λόγος",
                "मैं",
                "हिन्दी",
                "שלום",
                "اللغة",
                "한국어",
                "\uff37ide",
                "\u3164",
                "e\u0301",
            ]
        ),
        min_size=20,
        max_size=60,
    ),
    gaps=st.lists(st.sampled_from([" ", " ", "\n", ", ", "\u3000", "\xa0 "]), min_size=60, max_size=60),
)
def test_words_in_letters_of_any_script_are_never_cut(tmp_path_factory, small_tokenizer, llama2_tokenizer, words, gaps):
    """Where no two letters of ASCII's stand around a space, documents were cut every four parts, within words."""
    text = "".join(f"{word}{gap}слово слово" for word, gap in zip(words, gaps, strict=False))
    folder = tmp_path_factory.mktemp("letters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PART_BYTES", 32)
        for i, tokenizer in enumerate((small_tokenizer, llama2_tokenizer)):
            tokens = prepare(corpus_of(folder / "text", text.encode(), train_size=1.0), tokenizer, folder / str(i))
            assert tokens.train.tolist() == tokenizer.encode(text, bos=True, eos=True)


@settings(max_examples=40)
@given(content=st.binary(max_size=200), train_size=st.floats(0.05, 1), part_bytes=st.integers(4, 40))
def test_any_bytes_become_tokens_of_the_text_that_they_decode_to(
    tmp_path_factory, small_tokenizer, content, train_size, part_bytes
):
    folder = tmp_path_factory.mktemp("bytes")
    content = b"x" + content.replace("\u2581".encode(), b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PART_BYTES", part_bytes)
        corpus = corpus_of(folder / "text", content, train_size=train_size)
        tokens = prepare(corpus, small_tokenizer, folder / "tokens")
    text = content.decode("utf-8", errors="replace")
    # A border in the midst of bytes that are no character may count them apart.
    assert text_of(tokens, small_tokenizer).replace("\ufffd", "") == text.replace("\ufffd", "")
    assert (tokens.manifest.replaced_sequences > 0) == (text.count("\ufffd") > content.count("\ufffd".encode()))


def test_bytes_that_are_not_utf8_are_counted_in_the_manifest(tmp_path, small_tokenizer):
    tokens = prepare(corpus_of(tmp_path / "text", b"good \xff bad \xe2\x82 end" * 9), small_tokenizer, tmp_path / "t")
    assert tokens.manifest.replaced_sequences == 18
    assert text_of(tokens, small_tokenizer) == "good \ufffd bad \ufffd end" * 9


def test_the_manifest_says_how_many_tokens_and_bytes_there_are(tmp_path, small_tokenizer):
    text = "Où est le hibou?\n" * 50
    tokens = prepare(corpus_of(tmp_path / "text", text.encode()), small_tokenizer, tmp_path / "tokens")
    manifest = tokens.manifest
    assert manifest.tokens == {"train": len(tokens.train), "eval": len(tokens.eval)}
    assert sum(manifest.text_bytes.values()) == len(text.encode())
    held_out = small_tokenizer.decode(tokens.eval)
    assert manifest.text_bytes["eval"] == len(held_out.encode())
    assert tokens.bits_per_byte(math.log(2)) == (len(tokens.eval) - 1) / len(held_out.encode())
    assert manifest.tokenizer_sha256 == sha256(small_tokenizer.model_bytes)
    assert read_manifest(tmp_path / "tokens") == manifest


def test_a_large_vocabulary_has_tokens_of_four_bytes(tmp_path, small_tokenizer, monkeypatch):
    ids = {"<u2": 65_535, "<u4": 70_000}
    for dtype, top in ids.items():
        monkeypatch.setattr(small_tokenizer, "vocab_size", top + 1)
        batch = np.array([top]), np.array([1])
        monkeypatch.setattr(small_tokenizer, "encode_batch", lambda texts, starts, batch=batch: batch)
        monkeypatch.setattr(small_tokenizer, "decode_part", lambda ids, start: "x")
        tokens = prepare(corpus_of(tmp_path / "text", b"x", train_size=1.0), small_tokenizer, tmp_path / dtype)
        assert tokens.train.dtype == np.dtype(dtype) and tokens.train.max() == top


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {name: (os.stat(folder / name).st_mtime_ns, os.stat(folder / name).st_ino) for name in FILES}


def test_tokens_are_made_once_and_used_again(tmp_path, small_tokenizer, monkeypatch):
    first = prepare(corpus_of(tmp_path / "text", b"the fox " * 50), small_tokenizer, tmp_path / "tokens")
    before = stamps(tmp_path / "tokens")
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # whoever encodes now, fails
    again = prepare(corpus_of(tmp_path / "text", b"the fox " * 50), small_tokenizer, tmp_path / "tokens")
    assert stamps(tmp_path / "tokens") == before
    assert np.array_equal(first.train, again.train) and again.manifest == first.manifest
    assert sorted(p.name for p in (tmp_path / "tokens").iterdir()) == sorted(FILES)


def test_tokens_are_made_again_when_the_text_the_split_or_the_tokenizer_changes(tmp_path, small_tokenizer):
    def made(content: bytes, tokenizer: Tokenizer, **options) -> TokenSet:
        return prepare(corpus_of(tmp_path / "text", content, **options), tokenizer, tmp_path / "tokens")

    other = train_tokenizer(["the fox and the owl " * 20], 300, tmp_path / "other.model")
    assert text_of(made(b"the fox " * 50, small_tokenizer), small_tokenizer) == "the fox " * 50
    # as long as before, and another text
    assert text_of(made(b"the owl " * 50, small_tokenizer), small_tokenizer) == "the owl " * 50
    tokens = made(b"the owl " * 50, other)
    assert text_of(tokens, other) == "the owl " * 50
    assert tokens.manifest.tokenizer_sha256 == sha256(other.model_bytes)
    assert len(made(b"the owl " * 50, other, train_size=0.5).eval) > 2 * len(tokens.eval)
    assert made(b"the owl " * 50, other, separator=b" ").manifest.documents["train"] > 10


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", range(1, 14))
def test_an_interrupted_write_leaves_nothing_that_looks_finished(tmp_path, small_tokenizer, monkeypatch, failure, call):
    folder = tmp_path / "tokens"
    prepare(corpus_of(tmp_path / "text", b"old text " * 50), small_tokenizer, folder)
    contents = [b"the fox " * 50, b"the owl " * 50, b"12 boats " * 50]
    corpus = corpus_of(tmp_path / "text", *contents)
    monkeypatch.setattr(encode_module, "PARTS_AT_ONCE", 1)
    calls, failed = 0, ""

    def fails_at_last(step):
        def counted(*args, **options):
            nonlocal calls, failed
            calls += 1
            if calls == call:
                failed = step.__name__
                raise failure
            return step(*args, **options)

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", fails_at_last(Tokenizer.encode_batch))
        patch.setattr(encode_module.os, "replace", fails_at_last(os.replace))
        with pytest.raises((OSError, UserError) if isinstance(failure, OSError) else failure):
            prepare(corpus, small_tokenizer, folder)
    assert not list(folder.glob("**/*.tmp"))
    in_place = failed == "replace" and call > 1 + 4 + 4  # about.json, four batches, and four files of the only task
    if not in_place:  # the old tokens are whole
        assert text_of(open_tokens(folder), small_tokenizer) == "old text " * 50
    else:
        assert read_manifest(folder) is None
        with pytest.raises(UserError, match="manifest"):
            open_tokens(folder)
    again = prepare(corpus, small_tokenizer, folder)
    assert text_of(again, small_tokenizer) == b"".join(contents).decode()
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", ["short", "missing", "not json", "other version", "missing key", "extra key"])
def test_a_damaged_token_folder_is_refused(tmp_path, small_tokenizer, damage):
    folder = tmp_path / "tokens"
    prepare(corpus_of(tmp_path / "text", b"the fox " * 50), small_tokenizer, folder)
    open_tokens(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if damage == "short":
        os.truncate(folder / "train.bin", 10)
    elif damage == "missing":
        (folder / "eval.bin").unlink()
    elif damage == "not json":
        (folder / "manifest.json").write_text("{")
    else:
        changed = {
            "other version": manifest | {"version": -1},
            "missing key": {k: v for k, v in manifest.items() if k != "dtype"},
            "extra key": manifest | {"more": 1},
        }
        (folder / "manifest.json").write_text(json.dumps(changed[damage]))
    with pytest.raises(UserError) as error:
        open_tokens(folder)
    assert str(folder) in str(error.value) and "expected" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("folder", [None, 5, b"tokens", "", ["tokens"]], ids=repr)
def test_what_is_no_path_is_no_folder_of_tokens(folder):
    with pytest.raises(UserError, match=r"^folder: expected a path, a string or a Path, found "):
        open_tokens(folder)


def test_openings_of_a_folder_are_compared_and_hashed(tmp_path, small_tokenizer):
    prepare(corpus_of(tmp_path / "text", b"The fox and the owl."), small_tokenizer, tmp_path / "tokens")
    first, second = open_tokens(tmp_path / "tokens"), open_tokens(str(tmp_path / "tokens"))
    assert first != second and len({first, second, first}) == 2
