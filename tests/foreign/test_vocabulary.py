"""The tokenizer of a folder of weights: its own, or the folder above's where that is known to be the same."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError
from llama_jax.foreign.tokenizer_json import SPACE, tokenizer_json
from llama_jax.foreign.vocabulary import MOST_PADDING, difference, find_tokenizer, fit_vocabulary
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from tests.conftest import TEXT
from tests.foreign.test_layouts import ARGS
from tests.foreign.test_tokenizer_json import NOT_WRITTEN, trained

Table = dict[str, Any]


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One of as many pieces as the small one, of another text."""
    return train_tokenizer([TEXT[::-1]], 400, tmp_path_factory.mktemp("other") / "tokenizer.model")


@pytest.fixture
def table(small_tokenizer: Tokenizer) -> Table:
    made, _ = tokenizer_json(small_tokenizer)
    assert made is not None
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    return tmp_path / "models" / "llama"


def rows(count: int) -> ModelArgs:
    return dataclasses.replace(ARGS, vocab_size=count)


def put(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)


def put_table(folder: Path, table: Table) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(table))


def test_a_folder_s_own_wins_over_the_one_above(
    folder: Path, small_tokenizer: Tokenizer, other_tokenizer: Tokenizer
) -> None:
    put(folder, small_tokenizer)
    put(folder.parent, other_tokenizer)
    found, said = find_tokenizer("", folder)
    assert found.model_bytes == small_tokenizer.model_bytes and not said


def test_the_one_above_is_taken_where_the_weights_have_none(folder: Path, small_tokenizer: Tokenizer) -> None:
    put(folder.parent, small_tokenizer)
    found, said = find_tokenizer("", folder)
    assert found.model_path == folder.parent / "tokenizer.model" and not said


def test_the_one_above_is_taken_and_told_where_a_tokenizer_json_says_the_same(
    folder: Path, small_tokenizer: Tokenizer, table: Table
) -> None:
    put(folder.parent, small_tokenizer)
    put_table(folder, table)
    found, said = find_tokenizer("", folder)
    assert found.model_bytes == small_tokenizer.model_bytes and "in the folder above" in said[0]


def lower(table: Table) -> None:
    table["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})


def no_prefix(table: Table) -> None:
    del table["normalizer"]["normalizers"][0]


def split(table: Table) -> None:
    table["pre_tokenizer"] = {"type": "Whitespace"}


def swap(table: Table) -> None:
    vocab = table["model"]["vocab"]
    a, b = list(vocab)[300], list(vocab)[301]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def fewer_merges(table: Table) -> None:
    table["model"]["merges"].pop()


def other_order(table: Table) -> None:
    table["model"]["merges"].reverse()


def no_bytes(table: Table) -> None:
    table["model"]["byte_fallback"] = False


def renamed(table: Table) -> None:
    table["added_tokens"] = [{"id": 2, "content": "<|end|>", "special": True}]


def another_kind(table: Table) -> None:
    table["model"]["type"] = "WordPiece"


CHANGES: list[Callable[[Table], None]] = [
    lower, no_prefix, split, swap, fewer_merges, other_order, no_bytes, renamed, another_kind,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_one_above_is_refused_where_a_tokenizer_json_says_otherwise(
    change: Callable[[Table], None], folder: Path, small_tokenizer: Tokenizer, table: Table
) -> None:
    put(folder.parent, small_tokenizer)
    change(table)
    put_table(folder, table)
    with pytest.raises(
        UserError, match=r"found tokenizer\.json alone, .* in the folder above, to differ: .*--tokenizer"
    ):
        find_tokenizer("", folder)
    found, said = find_tokenizer(str(folder.parent / "tokenizer.model"), folder)
    assert found.model_bytes == small_tokenizer.model_bytes and "differs from" in said[0]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_two_vocabularies_side_by_side_are_refused_and_other_rules_are_told(
    change: Callable[[Table], None], folder: Path, small_tokenizer: Tokenizer, table: Table
) -> None:
    put(folder, small_tokenizer)
    change(table)
    put_table(folder, table)
    if change in (swap, renamed):
        with pytest.raises(UserError, match=r"expected one vocabulary, found two: .* pieces differ"):
            find_tokenizer("", folder)
    else:
        assert "differs from tokenizer.model, which is used" in find_tokenizer("", folder)[1][0]


@pytest.mark.parametrize(
    "table",
    [
        {}, {"model": None}, {"model": []}, {"model": {"vocab": "abc"}}, {"model": {"vocab": [1, [], ["a", 0.5], [{}]]}},
        {"model": {"vocab": {"a": [], "b": None}, "merges": [1, [2, 3], {}]}}, {"added_tokens": [1, {"id": []}, {}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_json_of_anything_is_another_vocabulary(table: Table, small_tokenizer: Tokenizer) -> None:
    pieces, _ = difference(table, small_tokenizer)
    assert "400 of 400 pieces differ" in pieces


def test_ways_to_write_the_same_are_the_same(table: Table, small_tokenizer: Tokenizer) -> None:
    table["model"]["merges"] = [" ".join(pair) for pair in table["model"]["merges"]]
    assert difference(table, small_tokenizer) == ("", "")
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    assert difference(table | {"normalizer": None, "pre_tokenizer": metaspace}, small_tokenizer) == ("", "")
    added = [{"id": 1, "content": "<s>"}, {"id": 400, "content": "[PAD]"}]
    assert difference(table | {"added_tokens": added}, small_tokenizer) == ("", "")


def test_a_unigram_table_is_compared_by_its_pieces(tmp_path: Path) -> None:
    tokenizer = trained(NOT_WRITTEN["unigram"][0], tmp_path)
    vocab = [[tokenizer.piece(i), tokenizer.score(i)] for i in range(tokenizer.vocab_size)]
    assert difference({"model": {"type": "Unigram", "vocab": vocab}}, tokenizer) == ("", "")
    assert difference({"model": {"type": "BPE", "vocab": vocab}}, tokenizer)[1]


def test_a_tokenizer_json_that_names_no_end_of_text_is_refused_alone(folder: Path, table: Table) -> None:
    put_table(folder, table)
    with pytest.raises(UserError, match=r"tokenizer\.json: expected .* to name eos_token, .* found none"):
        find_tokenizer("", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    found, _ = find_tokenizer("", folder)
    assert (found.bos_id, found.eos_id) == (1, 2) and found.model_path == folder / "tokenizer.json"


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tekken.json"])
def test_another_kind_of_vocabulary_is_not_passed_over(name: str, folder: Path, small_tokenizer: Tokenizer) -> None:
    put(folder.parent, small_tokenizer)
    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=rf"another kind of vocabulary \({name}\)"):
        find_tokenizer("", folder)


def test_a_tokenizer_that_was_not_downloaded_is_not_replaced(folder: Path, small_tokenizer: Tokenizer) -> None:
    put(folder.parent, small_tokenizer)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(UserError, match=r"tokenizer_class 'PreTrainedTokenizerFast' in tokenizer_config\.json"):
        find_tokenizer("", folder)
    path.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    assert find_tokenizer("", folder)[0].model_bytes == small_tokenizer.model_bytes


def test_what_is_wrong_with_a_folder_s_own_tokenizer_is_told_whatever_lies_above(
    folder: Path, small_tokenizer: Tokenizer, table: Table
) -> None:
    put(folder.parent, small_tokenizer)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    put_table(folder, table | {"model": {"type": "Fox"}})
    with pytest.raises(UserError) as own:
        Tokenizer(folder)
    with pytest.raises(UserError) as told:
        find_tokenizer("", folder)
    assert str(told.value) == str(own.value)


def test_above_a_linked_folder_means_above_what_it_points_to_as_well(
    tmp_path: Path, folder: Path, small_tokenizer: Tokenizer, other_tokenizer: Tokenizer
) -> None:
    (tmp_path / "work").mkdir()
    link = tmp_path / "work" / "linked"
    link.symlink_to(folder)
    put(folder.parent, small_tokenizer)
    assert find_tokenizer("", link)[0].model_bytes == small_tokenizer.model_bytes
    put(tmp_path / "work", other_tokenizer)
    with pytest.raises(UserError, match=r"found others above the link and above what it points to"):
        find_tokenizer("", link)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", {"add_bos_token": False}, "add_bos_token false"),
        ("tokenizer_config.json", {"add_eos_token": True}, "add_eos_token true"),
        ("tokenizer_config.json", {"bos_token": "<|begin|>"}, "bos_token '<|begin|>'"),
        ("tokenizer_config.json", {"eos_token": {"content": "<|end|>"}}, "eos_token '<|end|>'"),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>"}, "eos_token '<|im_end|>'"),
        ("config.json", {"eos_token_id": 399}, "eos_token_id 399"),
        ("config.json", {"bos_token_id": 0}, "bos_token_id 0"),
        ("generation_config.json", {"eos_token_id": [2, 399]}, "eos_token_id [2, 399]"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}}, "'<|im_end|>' as token 2"),
        ("added_tokens.json", {"[PAD]": 3}, "'[PAD]' as token 3"),
        ("tokenizer_config.json", "<html>", "HTML page"),
    ],
)  # fmt: skip
def test_what_small_files_say_otherwise_is_told(
    name: str, content: Any, words: str, folder: Path, small_tokenizer: Tokenizer
) -> None:
    put(folder, small_tokenizer)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (warning,) = find_tokenizer("", folder)[1]
    assert words in warning and name in warning


def test_what_small_files_say_rightly_is_not_told(folder: Path, small_tokenizer: Tokenizer) -> None:
    put(folder, small_tokenizer)
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False,
              "added_tokens_decoder": {"1": {"content": "<s>"}, "2": {"content": "</s>"}}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": None}))
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2]}))
    assert find_tokenizer("", folder)[1] == []


def test_rows_without_a_token_are_told_and_other_models_tokenizers_refused(
    folder: Path, small_tokenizer: Tokenizer
) -> None:
    assert fit_vocabulary(rows(400), small_tokenizer, folder) == (small_tokenizer, [])
    found, (told,) = fit_vocabulary(rows(448), small_tokenizer, folder)
    assert found is small_tokenizer and "48 of the model's 448 rows have no token" in told
    with pytest.raises(
        UserError, match=r"for each of the model's 4,497 rows, or a few without, found 400 tokens .* --tokenizer"
    ):
        fit_vocabulary(rows(401 + MOST_PADDING), small_tokenizer, folder)
    with pytest.raises(UserError, match=r"expected up to 399 tokens, one per row .* found 400"):
        fit_vocabulary(rows(399), small_tokenizer, folder)


def test_added_tokens_without_a_row_are_told_and_left_out(folder: Path, small_tokenizer: Tokenizer) -> None:
    put(folder, small_tokenizer)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 400}))
    tokenizer, said = find_tokenizer("", folder)
    assert not said and tokenizer.specials["[PAD]"] == 400
    assert fit_vocabulary(rows(401), tokenizer, folder) == (tokenizer, [])
    fitting, (told,) = fit_vocabulary(rows(400), tokenizer, folder)
    assert fitting.vocab_size == 400 and "'[PAD]'" in told and "without a row" in told


def test_a_fine_tunes_tokenizer_json_wins_over_the_bases_model_beside_it_and_above(
    folder: Path, small_tokenizer: Tokenizer, table: Table
) -> None:
    put(folder, small_tokenizer)
    put(folder.parent, small_tokenizer)
    table["added_tokens"] = [{"id": 400, "content": "<|im_end|>", "special": True}]
    put_table(folder, table)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    for _ in range(2):
        found, said = find_tokenizer("", folder)
        assert found.model_path == folder / "tokenizer.json" and found.eos_id == 400 and found.bos_id == 1
        assert any("EOS is '<|im_end|>'" in line for line in said)
        (folder / "tokenizer.model").unlink(missing_ok=True)


def test_an_unreadable_tokenizer_json_is_told_beside_a_model_and_refused_alone(
    folder: Path, small_tokenizer: Tokenizer
) -> None:
    put(folder, small_tokenizer)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in find_tokenizer("", folder)[1][0]
    os.rename(folder / "tokenizer.model", folder.parent / "tokenizer.model")
    with pytest.raises(UserError, match="Git LFS pointer"):
        find_tokenizer("", folder)
