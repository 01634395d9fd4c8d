"""Which files a tokenizer is read from, which tokens are BOS and EOS, what is added, and what a checkpoint keeps."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import processors

from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer, is_kept, keep_tokenizer, kept_tokenizer
from tests.conftest import TEXT
from tests.tokenizers.made import (
    BOS,
    CONFIG,
    EOS,
    LLAMA2,
    TURN,
    Table,
    bytewise,
    library,
    put,
    random_texts,
    spaced,
    table_of,
)

PAD = {"content": "[PAD]", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def with_pad(table: Table, **flags: Any) -> Table:
    """A table with one added token more, behind all."""
    top = max([*table["model"]["vocab"].values(), *(token["id"] for token in table["added_tokens"])])
    return table | {"added_tokens": [*table["added_tokens"], PAD | {"id": top + 1} | flags]}


@pytest.fixture(scope="module")
def table() -> Table:
    return bytewise()


def test_a_file_and_a_folder_open_the_same(table: Table, tmp_path: Path) -> None:
    put(tmp_path, table, CONFIG)
    folder, file = Tokenizer(tmp_path), Tokenizer(tmp_path / "tokenizer.json")
    assert folder.encode("a fox") == file.encode("a fox") and folder.digest == file.digest
    assert {*folder.files} == {"tokenizer.json", "tokenizer_config.json"} and folder.files == file.files
    assert Tokenizer(folder.place).digest == Tokenizer(file.place).digest == folder.digest


def test_sentencepieces_model_is_read_where_tokenizer_json_has_no_more(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    put(tmp_path, spaced(small_tokenizer), LLAMA2)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.is_sentencepiece and tokenizer.digest == small_tokenizer.digest
    assert {*tokenizer.files} == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert Tokenizer(tmp_path / "tokenizer.model").files == small_tokenizer.files


@pytest.mark.parametrize("way", ["prepend", "first", "always"])
def test_a_tokenizer_json_with_more_tokens_is_the_fine_tunes(
    way: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    table = with_pad(spaced(small_tokenizer, way))
    tokenizer = Tokenizer(put(tmp_path, table, LLAMA2))
    assert not tokenizer.is_sentencepiece and tokenizer.vocab_size == small_tokenizer.vocab_size + 1
    assert tokenizer.specials["[PAD]"] == 400 and tokenizer.digest != small_tokenizer.digest
    plain, shown = library(table), library(table, specials=True)
    for text in random_texts(200, seed=9):
        assert tokenizer.encode(text, bos=False) == plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=False, specials=True) == shown.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("way", ["prepend", "first", "always"])
def test_text_around_special_tokens_is_what_tokenizer_json_makes_of_it(
    way: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    table = spaced(small_tokenizer, way)
    tokenizer, shown = Tokenizer(put(tmp_path, table, LLAMA2)), library(table, specials=True)
    assert tokenizer.is_sentencepiece
    for text in [
        "<s>a",
        "<s> a",
        "<s>[INST] a fox [/INST]</s><s>the owl",
        "a</s>",
        "<s>",
        "the<s>fox river",
        "a </s>\n b",
    ]:
        assert tokenizer.encode(text, bos=False, specials=True) == shown.encode(text, add_special_tokens=False).ids, (
            text
        )


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}


@pytest.mark.parametrize(
    "settings", [{}, {"pad_token": "<|x|>"}, {"image_token": "<|x|>"}], ids=["plain", "pad", "image"]
)
@pytest.mark.parametrize("listed", [True, False], ids=["in both", "in the settings alone"])
@pytest.mark.parametrize("flag", [*FLAGS, ""])
def test_flags_of_added_tokens_are_those_of_the_settings_as_in_transformers(
    flag: str, listed: bool, settings: Table, table: Table, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")
    table = json.loads(json.dumps(table))
    number = max(token["id"] for token in table["added_tokens"]) + 1
    if listed:
        table["added_tokens"].append(FLAGS | {"id": number, "content": "<|x|>"})
    table["normalizer"] = {"type": "Lowercase"}
    decoder = {"added_tokens_decoder": {str(number): FLAGS | {"content": "<|x|>"} | ({flag: True} if flag else {})}}
    put(tmp_path, table, CONFIG | {"eos_token": EOS} | settings | (decoder if flag or not listed else {}))
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["a<|x|>b", "a <|x|> b", "the <|X|> fox", "<|x|>", " <|x|>."]:
        for specials in (True, False):
            expected = theirs(text, add_special_tokens=False, split_special_tokens=not specials)["input_ids"]
            assert ours.encode(text, bos=False, specials=specials) == expected, (text, specials)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_a_sentencepiece_model_alone(special: bool, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    decoder = {"400": PAD | {"content": "<|im_end|>", "special": special}}
    # A token that has a name is special, as in transformers.
    config = LLAMA2 | {"added_tokens_decoder": decoder} | ({"eos_token": "<|im_end|>"} if special else {})
    tokenizer = Tokenizer(put(tmp_path, None, config))
    assert (
        tokenizer.vocab_size == 401 and tokenizer.specials["<|im_end|>"] == 400 and tokenizer.piece(400) == "<|im_end|>"
    )
    assert tokenizer.eos_id == (400 if special else 2) and tokenizer.bos_id == small_tokenizer.bos_id
    text = "the fox<|im_end|> owl"
    asked = [1, *small_tokenizer.encode("the fox", bos=False), 400, *small_tokenizer.encode(" owl", bos=False)]
    assert tokenizer.encode(text, specials=True) == asked
    assert tokenizer.encode(text) == (small_tokenizer.encode(text) if special else asked)
    ids, lengths = tokenizer.encode_batch([text, "a"], [True, True])
    assert ids.tolist() == [
        *tokenizer.encode(text, bos=False),
        *tokenizer.encode("a", bos=False),
    ] and lengths.sum() == len(ids)
    assert tokenizer.decode(asked, specials=True).endswith("<|im_end|> owl")
    assert ("<|im_end|>" in tokenizer.decode(asked)) is not special
    assert tokenizer.digest != small_tokenizer.digest


def test_added_tokens_json_adds_behind_the_vocabulary(small_tokenizer: Tokenizer, table: Table, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    beside = {"special_tokens_map": {"pad_token": "[PAD]"}, "added_tokens": {"[PAD]": 400}}
    tokenizer = Tokenizer(put(tmp_path / "a", None, None, **beside))
    assert tokenizer.vocab_size == 401 and tokenizer.encode("[PAD]") == small_tokenizer.encode("[PAD]")
    assert tokenizer.encode("[PAD]", specials=True) == [1, 400]
    (tmp_path / "a" / "added_tokens.json").write_text(json.dumps({"[PAD]": 400, "[OLD]": 400}))
    with pytest.raises(UserError, match=r"expected one added token per id"):
        Tokenizer(tmp_path / "a")
    grown = Tokenizer(put(tmp_path / "b", table, CONFIG | {"added_tokens_decoder": {"423": PAD}}))
    assert grown.vocab_size == 424 and grown.encode("[PAD]", bos=False, specials=True) == [423]


@pytest.mark.parametrize(
    ("others", "ends"),
    [
        ({"tokenizer_config": {"bos_token": BOS, "eos_token": TURN}}, (420, 422, True)),
        ({"special_tokens_map": {"bos_token": {"content": BOS}, "eos_token": {"content": EOS}}}, (420, 421, True)),
        ({"generation_config": {"bos_token_id": 420, "eos_token_id": [422, 421]}}, (420, 422, True)),
        ({"config": {"bos_token_id": 420, "eos_token_id": 421}}, (420, 421, True)),
        ({"tokenizer_config": {"bos_token": None, "eos_token": EOS}}, (421, 421, False)),
        ({"tokenizer_config": {**CONFIG, "add_bos_token": False}}, (420, 421, False)),
    ],
    ids=str,
)  # fmt: skip
def test_the_files_say_what_bos_and_eos_are(
    others: Any, ends: tuple[int, int, bool], table: Table, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(put(tmp_path, table, **others))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == ends
    assert any("EOS is" in note for note in tokenizer.notes)
    expected = library(table).encode("a fox", add_special_tokens=False).ids
    assert tokenizer.encode("a fox") == [tokenizer.bos_id] * ends[2] + expected
    assert tokenizer.encode("") == [tokenizer.bos_id] and tokenizer.encode_all(["", "a fox"]) == [
        [ends[0]],
        tokenizer.encode("a fox"),
    ]
    keep_tokenizer(tokenizer, tmp_path / "kept" / "tokenizer.model")
    again = kept_tokenizer(tmp_path / "kept" / "tokenizer.model")
    assert (again.bos_id, again.eos_id, again.adds_bos, again.digest) == (*ends, tokenizer.digest)


@pytest.mark.parametrize(
    "config", [None, {}, {"eos_token": "<nowhere>"}, {"eos_token": 3}, {"bos_token": BOS}], ids=str
)
def test_a_tokenizer_json_whose_end_of_text_is_unknown_is_refused(config: Any, table: Table, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: expected .* to name eos_token, .* found none"):
        Tokenizer(put(tmp_path, table, config))


def test_a_table_that_does_not_put_bos_first_is_told(table: Table, tmp_path: Path) -> None:
    told = Tokenizer(put(tmp_path, table | {"post_processor": None}, CONFIG))
    assert told.adds_bos and any("does not say that BOS begins a text" in note for note in told.notes)


def test_a_template_that_puts_nothing_before_a_text_says_that_it_begins_without_bos(
    table: Table, tmp_path: Path
) -> None:
    # transformers 5 writes such a template, and no add_bos_token, for a tokenizer that adds none.
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library(table | {"post_processor": None}), bos_token=BOS, eos_token=EOS
    )
    made.save_pretrained(tmp_path)
    tokenizer, again = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("a fox") == again.encode("a fox") and not tokenizer.adds_bos
    assert "a text begins without BOS, as the post_processor of tokenizer.json says" in tokenizer.notes


NAMES = CONFIG | {"eos_token": EOS}  # as transformers reads it
NAMED = {
    "bos and eos": ({"tokenizer_config": {**NAMES}}, {BOS, EOS}),
    "in the older file": ({"special_tokens_map": {"bos_token": {"content": BOS}, "eos_token": EOS}}, {BOS, EOS}),
    "without a name": ({"tokenizer_config": {**NAMES, "additional_special_tokens": [TURN]}}, {BOS, EOS, TURN}),
    "with names of their own": ({"tokenizer_config": {**NAMES, "extra_special_tokens": {"turn": TURN}}}, {BOS, EOS, TURN}),
    "to fill rows": ({"tokenizer_config": {**NAMES, "pad_token": TURN}}, {BOS, EOS, TURN}),
    "by its number": ({"tokenizer_config": {**NAMES, "added_tokens_decoder": {"422": PAD | {"content": TURN}}}}, {BOS, EOS, TURN}),
    "to fill rows, a letter": ({"tokenizer_config": {**NAMES, "pad_token": "a"}}, {BOS, EOS}),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_pieces_that_the_files_name_as_special_tokens_are_special_tokens(
    case: str, table: Table, tmp_path: Path
) -> None:
    others, special = NAMED[case]
    own = {token["content"]: token["id"] for token in table["added_tokens"]}
    plain = table | {"added_tokens": [], "model": table["model"] | {"vocab": table["model"]["vocab"] | own}}
    tokenizer = Tokenizer(put(tmp_path, plain, **others))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert {*tokenizer.specials} == special
    for text in (f"a{BOS}fox", f"{TURN} a", f"the {EOS}\n{TURN}{TURN}"):
        ids = tokenizer.encode(text, bos=False, specials=True)
        if case != "to fill rows, a letter":
            assert ids == theirs.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_pieces_of_a_sentencepiece_model_that_the_files_name_are_special_tokens(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        user_defined_symbols=["<|im_end|>", "<|im_start|>"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    alone = Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["<|im_end|>"]}))
    tokenizer = Tokenizer(tmp_path)
    end, start = (alone.encode(text, bos=False)[-1] for text in ("<|im_end|>", "<|im_start|>"))
    assert tokenizer.specials == alone.specials | {"<|im_end|>": end} and tokenizer.digest == alone.digest
    ids = tokenizer.encode("a<|im_end|>fox<|im_start|>", bos=False, specials=True)
    assert {end, start} < {*ids} and tokenizer.decode(ids) == "a fox<|im_start|>"
    assert tokenizer.decode(ids, specials=True).count("<|im_end|>") == 1
    assert not tokenizer.is_text(end) and alone.is_text(end)
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "\\ud800", "pad_token": 3}')
    assert Tokenizer(tmp_path).specials == alone.specials


def test_special_tokens_that_no_file_gives_an_id_are_told(table: Table, tmp_path: Path) -> None:
    config = NAMES | {"pad_token": "[PAD]", "additional_special_tokens": [TURN, "<new>"]}
    (told,) = (note for note in Tokenizer(put(tmp_path, table, config)).notes if "gives an id" in note)
    assert told.startswith("tokenizer_config.json names '[PAD]', '<new>', which no file gives an id")
    assert not [
        n for n in Tokenizer(put(tmp_path, with_pad(table), NAMES | {"pad_token": "[PAD]"})).notes if "gives an id" in n
    ]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_rules_of_a_table_that_transformers_replaces_by_its_own_are_told(
    kind: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    table = spaced(small_tokenizer)
    table["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    put(tmp_path, table, LLAMA2 | {"tokenizer_class": kind})
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs("The Owl", add_special_tokens=False)["input_ids"]
    same = ours.encode("The Owl", bos=False) == expected
    assert same is (kind != "LlamaTokenizer")
    assert ["rules of its own" in line for line in ours.notes].count(True) == (not same)


def test_spaces_that_transformers_takes_out_of_a_text_are_told_where_it_does(table: Table, tmp_path: Path) -> None:
    config = NAMES | {"clean_up_tokenization_spaces": True}
    assert not [n for n in Tokenizer(put(tmp_path, table, config)).notes if "clean_up" in n]  # of BPE it does not
    words = {"type": "WordLevel", "vocab": {"a": 0, ",": 1, BOS: 2, EOS: 3}, "unk_token": "a"}
    plain = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
             "post_processor": None, "decoder": None, "model": words}  # fmt: skip
    tokenizer = Tokenizer(put(tmp_path, plain, config))
    assert [n for n in tokenizer.notes if "clean_up_tokenization_spaces" in n]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([0, 1, 0]) == "a , a" and theirs.decode([0, 1, 0]) == "a, a"


def ends(before: list[str], behind: list[str]) -> Any:
    """A post-processor that puts these special tokens around a text."""
    ids = {BOS: 420, EOS: 421, TURN: 422}
    return processors.TemplateProcessing(single=" ".join([*before, "$A", *behind]), special_tokens=[*ids.items()])


PROCESSORS = {
    "BOS": ends([BOS], []),
    "BOS and EOS": ends([BOS], [EOS]),
    "EOS": ends([], [EOS]),
    "BOS and another": ends([BOS, TURN], []),
    "another": ends([TURN], []),
    "BERT": processors.BertProcessing((EOS, 421), (BOS, 420)),
    "RoBERTa": processors.RobertaProcessing((EOS, 421), (BOS, 420)),
    "two steps": processors.Sequence([ends([TURN], []), ends([BOS], [EOS])]),
}


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_that_transformers_puts_around_a_text_and_this_project_does_not_are_told(
    name: str, stated: bool | None, table: Table, tmp_path: Path
) -> None:
    made = tokenizers.Tokenizer.from_str(json.dumps(table))
    made.post_processor = PROCESSORS[name]
    settings = CONFIG if stated is None else CONFIG | {"add_bos_token": stated}
    tokenizer = Tokenizer(put(tmp_path, table_of(made), settings))
    notes = [note for note in tokenizer.notes if note.startswith("by the post_processor")]
    theirs, plain = made.encode("a fox").ids, made.encode("a fox", add_special_tokens=False).ids
    if theirs == tokenizer.encode("a fox"):
        assert not notes
        return
    at = next(i for i in range(len(theirs)) if theirs[i : i + len(plain)] == plain)
    before, behind = (
        " and ".join(repr(made.id_to_token(i)) for i in ids) or "nothing"
        for ids in (theirs[:at], theirs[at + len(plain) :])
    )
    ours = repr(BOS) if tokenizer.adds_bos else "nothing"
    assert tokenizer.adds_bos is (stated if stated is not None else name != "EOS")
    assert notes == [
        f"by the post_processor of tokenizer.json, transformers 5 puts {before} before a text and {behind} behind it; this "
        f"project puts {ours} before it, and nothing behind it"
    ]


def test_a_model_with_fewer_rows_has_no_added_tokens_beyond(
    table: Table, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(put(tmp_path / "json", with_pad(table), CONFIG))
    assert tokenizer.within(424) is tokenizer and tokenizer.within(500) is tokenizer
    fitting = tokenizer.within(423)
    assert fitting.vocab_size == 423 and "[PAD]" not in fitting.specials and "'[PAD]'" in fitting.notes[-1]
    assert fitting.encode("[PAD]", specials=True) == fitting.encode("[PAD]") and fitting.digest == tokenizer.digest
    with pytest.raises(UserError, match=r"expected up to 419 tokens, one per row .* found 420"):
        tokenizer.within(419)
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    grown = Tokenizer(put(tmp_path, None, None, added_tokens={"[PAD]": 400}))
    assert grown.within(400).vocab_size == 400 and grown.within(400).encode("[PAD] a") == small_tokenizer.encode(
        "[PAD] a"
    )
    with pytest.raises(UserError, match=r"found 400"):
        grown.within(399)


def test_what_is_kept_is_opened_again_and_never_mixed_with_another(
    table: Table, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path, made = tmp_path / "run" / "tokenizer.model", Tokenizer(put(tmp_path / "from", table, CONFIG))
    assert not is_kept(path)
    keep_tokenizer(made, path)
    assert is_kept(path) and not path.exists() and kept_tokenizer(path).digest == made.digest
    assert (path.parent / "tokenizer.json").read_bytes() == (tmp_path / "from" / "tokenizer.json").read_bytes()
    with pytest.raises(
        UserError, match=r"expected no files of another tokenizer, found tokenizer\.json, tokenizer_config\.json"
    ):
        keep_tokenizer(small_tokenizer, path)
    assert kept_tokenizer(path).digest == made.digest
    other = tmp_path / "other" / "tokenizer.model"
    keep_tokenizer(small_tokenizer, other)
    assert [child.name for child in other.parent.iterdir()] == ["tokenizer.model"]
    with pytest.raises(UserError, match=r"found tokenizer\.model; delete them, or choose another folder"):
        keep_tokenizer(made, other)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "a token for each of the 256 bytes"),
        ("tokenizer.model", b"IQ== 0\nIQ== 1\n", "line 2: expected a new token"),
        ("tokenizer.model", b"IQ== 0\nIg== 7\n", "expected the ranks 0 to 1, found none with 1"),
        ("tokenizer.model", b"hello", "found something else"),
        ("tokenizer.model", b"<html>", "an HTML page"),
        ("tokenizer.json", b"version https://git-lfs", "found a Git LFS pointer"),
        ("tokenizer_config.json", b"{}", "found tokenizer_config.json alone"),
        ("note.txt", b"", "found a folder with neither"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused_in_one_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
