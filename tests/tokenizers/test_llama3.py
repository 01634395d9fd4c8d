"""LLaMA 3's tokenizer, both files of it: ids equal the tokenizers library's, on texts that it was not made for."""

import base64
import json
from pathlib import Path

import pytest

from llama_jax.tokenizer import Tokenizer, split_text
from llama_jax.tokenizers import tiktoken
from tests.tokenizers.made import BOS, EOS, Table, library, long_text, random_texts


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    found = shared / "tokenizers" / "llama3"
    if not found.is_dir():
        pytest.skip("needs LLaMA 3's tokenizer in the folder ../shared, which is not part of the repository")
    return found


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    found: Table = json.loads((folder / "tokenizer.json").read_bytes())
    return found


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def ranked(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Meta's file of the same vocabulary, made from the other one."""
    path = tmp_path_factory.mktemp("meta") / "tokenizer.model"
    path.write_bytes(rank_file(table))
    return Tokenizer(path)


def rank_file(table: Table) -> bytes:
    """A byte-level vocabulary as tiktoken writes it: a line per piece."""
    byte_of = {letter: byte for byte, letter in enumerate(tiktoken.byte_letters())}
    pieces = sorted(table["model"]["vocab"].items(), key=lambda item: item[1])
    raw = [bytes(byte_of[letter] for letter in piece) for piece, _ in pieces]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(raw))


def real_texts(shared: Path) -> list[str]:
    """A thousand real texts: paragraphs of plays."""
    return (shared / "data" / "tinyshakespeare.txt").read_text().split("\n\n")[:1000]


def compare(texts: list[str], table: Table, *tokenizers: Tokenizer) -> None:
    plain, shown = library(table), library(table, specials=True)
    expected = [found.ids for found in plain.encode_batch(texts, add_special_tokens=False)]
    for tokenizer in tokenizers:
        assert tokenizer.encode_parts(texts, [True] * len(texts)) == expected
        some = range(0, len(texts), max(1, len(texts) // 1000))
        assert [tokenizer.encode(texts[i]) for i in some] == [[128_000, *expected[i]] for i in some]
        found = [tokenizer.encode(texts[i], bos=False, specials=True) for i in some]
        assert found == [shown.encode(texts[i], add_special_tokens=False).ids for i in some]
        assert [tokenizer.decode(expected[i]) for i in some] == [texts[i] for i in some]


def test_the_second_implementations_tokenizations(folder: Path, tokenizer: Tokenizer, ranked: Tokenizer) -> None:
    for known in json.loads((folder / "reference_tokenizations.json").read_bytes()):
        for each in (tokenizer, ranked):
            assert each.encode(known["text"], bos=False, specials=True) == known["ids"]


def test_a_thousand_random_and_a_thousand_real_texts(
    shared: Path, table: Table, tokenizer: Tokenizer, ranked: Tokenizer
) -> None:
    compare(random_texts(1000, seed=5), table, tokenizer, ranked)
    compare(real_texts(shared), table, tokenizer, ranked)


@pytest.mark.slow
def test_a_hundred_thousand_random_texts(table: Table, tokenizer: Tokenizer, ranked: Tokenizer) -> None:
    compare(random_texts(100_000, seed=6), table, tokenizer, ranked)


def test_ids_are_tiktokens_too(table: Table, ranked: Tokenizer, tmp_path: Path) -> None:
    """Meta's code encodes with the library of that name."""
    library_of_meta = pytest.importorskip("tiktoken")
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(rank_file(table).splitlines())}
    meta = library_of_meta.Encoding(
        "llama3", pat_str=tiktoken.PATTERN, mergeable_ranks=ranks, special_tokens=dict(ranked.specials)
    )
    for text in random_texts(1000, seed=10):
        assert ranked.encode(text, bos=False) == meta.encode(text, disallowed_special=()), text
        assert ranked.encode(text, bos=False, specials=True) == meta.encode(text, allowed_special="all"), text
        assert ranked.decode(ranked.encode(text, bos=False)) == text


def test_both_files_have_the_same_tokens_and_specials(tokenizer: Tokenizer, ranked: Tokenizer) -> None:
    assert dict(ranked.specials) == dict(tokenizer.specials) and len(ranked.specials) == 256
    assert (ranked.bos_id, ranked.eos_id) == (tokenizer.bos_id, tokenizer.eos_id) == (128_000, 128_001)
    assert ranked.vocab_size == tokenizer.vocab_size == 128_256
    assert [ranked.piece(i) for i in range(128_256)] == [tokenizer.piece(i) for i in range(128_256)]
    assert (
        ranked.specials[BOS] == 128_000 and ranked.specials[EOS] == 128_001 and ranked.specials["<|eot_id|>"] == 128_009
    )
    assert [*ranked.files] == ["tokenizer.model"] and "tokenizer.json" in tokenizer.files


def test_a_long_text_has_the_ids_of_the_whole(table: Table, tokenizer: Tokenizer) -> None:
    text = long_text(7, 100_000)
    parts = list(split_text(text, 100, everywhere=False))
    rows = tokenizer.encode_parts(parts, [i == 0 for i in range(len(parts))])
    expected = library(table).encode(text, add_special_tokens=False).ids
    assert [i for row in rows for i in row] == expected == tokenizer.encode(text, bos=False)


def test_a_stream_shows_no_half_characters(tokenizer: Tokenizer) -> None:
    for text in [text for text in random_texts(100, seed=8) if "\ufffd" not in text]:
        stream = tokenizer.stream(tokenizer.encode("The"))
        pieces = [stream.push([i]) for i in tokenizer.encode(text, bos=False)] + [stream.flush()]
        assert "".join(pieces) == text
