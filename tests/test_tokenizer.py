"""The tokenizer: every text comes back, long texts as short ones, LLaMA 2's own ids, streaming."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer, split_text, train_tokenizer
from llama_jax.tokenizers.sentencepiece import WORTH_WORDS

# SentencePiece writes a space as U+2581, and UTF-8 holds no surrogates.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
texts = st.text(characters) | st.text(st.sampled_from(" \n\t\r\0ab1é字😀\u0301\u200d\ufeff\ufffd\u3000"), max_size=40)
AWKWARD = [
    "",
    " ",
    "   leading",
    "trailing   ",
    "\n",
    "\n\n x",
    "\t",
    "a\r\nb\r\n",
    "nul\0nul\0",
    "\ufeffmark",
    "<s>x</s><unk><pad>",
    "<0x0A><0xFF>",
    "👩‍👩‍👧‍👦 🇫🇷",
    "e\u0301 vs \u00e9 \ufb01 \uff21 \u00a0",  # what normalization would change
    "ﷺ ⁇ \ufffd",
    "1234567890",
    "x" * 5000,
]


def sentencepiece_of(tokenizer):
    return spm.SentencePieceProcessor(model_proto=tokenizer.model_bytes)


@settings(max_examples=300)
@given(text=texts)
def test_every_text_comes_back_through_a_trained_vocabulary(small_tokenizer, text):
    assert small_tokenizer.decode(small_tokenizer.encode(text, bos=True, eos=True)) == text


@settings(max_examples=300)
@given(text=texts)
def test_every_text_comes_back_through_llama2s_vocabulary(llama2_tokenizer, text):
    assert llama2_tokenizer.decode(llama2_tokenizer.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:8]))
def test_awkward_texts_come_back(small_tokenizer, llama2_tokenizer, text):
    for tokenizer in (small_tokenizer, llama2_tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_the_replacement_character(small_tokenizer):
    assert small_tokenizer.decode(small_tokenizer.encode("a\udcffb")) == "a\ufffdb"


def test_llama2s_reference_tokenizations_are_reproduced(shared, llama2_tokenizer):
    references = json.loads((shared / "tokenizers" / "llama2" / "reference_tokenizations.json").read_text())
    assert len(references) == 48
    wrong = [r["text"] for r in references if llama2_tokenizer.encode(r["text"]) != r["ids"]]
    assert wrong == []
    assert [
        r["text"] for r in references if llama2_tokenizer.decode(r["ids"]) != r["text"].replace("\u2581", " ")
    ] == []


def test_bos_and_eos_stand_once_where_asked(small_tokenizer, llama2_tokenizer):
    for tokenizer in (small_tokenizer, llama2_tokenizer):
        bare = tokenizer.encode("a fox </s>", bos=False)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(bare)
        assert tokenizer.encode("a fox </s>") == [tokenizer.bos_id, *bare]
        assert tokenizer.encode("a fox </s>", eos=True) == [tokenizer.bos_id, *bare, tokenizer.eos_id]
        assert tokenizer.encode("") == [tokenizer.bos_id]
        assert tokenizer.encode("<s>a").count(tokenizer.bos_id) == 1


def long_text(length: int, seed: int) -> str:
    rng = random.Random(seed)
    words = ["the", "fox", "éléphant", "河", "1987", "😀", "x" * 30, "don't", "\t", "a\r", "\u3000"]
    gaps = [" "] * 10 + ["\n", "\n\n", "  ", " \n ", "\n    "]
    pieces = [" "]
    while sum(map(len, pieces)) < length:
        pieces += [rng.choice(words) + rng.choice(gaps) for _ in range(200)]
    return "".join(pieces)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_text_has_the_ids_that_sentencepiece_gives_the_whole(small_tokenizer, llama2_tokenizer, seed):
    text = long_text(100_000, seed)
    assert len(list(split_text(text))) >= 3
    for tokenizer in (small_tokenizer, llama2_tokenizer):
        assert tokenizer.encode(text, bos=False) == sentencepiece_of(tokenizer).encode(text)


@settings(max_examples=200)
@given(
    words=st.lists(st.text(characters, max_size=8) | st.sampled_from([" ", "  ", "\n", "\n\n", " a", "\nb", " c d"])),
    part_chars=st.integers(1, 40),
)
def test_a_text_cut_in_parts_has_the_ids_of_the_whole(small_tokenizer, llama2_tokenizer, words, part_chars):
    text = "".join(words)
    parts = list(split_text(text, part_chars))
    assert "".join(parts) == text and all(len(part) <= 4 * part_chars for part in parts)
    # A part that is as long as may be was cut by force, in a text without a border.
    forced = any(len(part) == 4 * part_chars for part in parts)
    for tokenizer in (small_tokenizer, llama2_tokenizer):
        rows = tokenizer.encode_parts(parts, [i == 0 for i in range(len(parts))])
        joined = [i for row in rows for i in row]
        assert tokenizer.decode(joined) == text
        if not forced:
            assert joined == sentencepiece_of(tokenizer).encode(text)


def test_much_text_in_small_batches_is_encoded_word_by_word_too(small_tokenizer):
    tokenizer = Tokenizer(small_tokenizer.model_path)
    batch = ["the fox went to the river"] * 100
    for _ in range(WORTH_WORDS // (100 * len(batch[0])) + 1):
        assert "_words" not in vars(tokenizer._reader)
        tokenizer.encode_batch(batch, [True] * len(batch))
    assert "_words" in vars(tokenizer._reader)


@pytest.mark.parametrize("text", [c * 300_000 for c in "x \n字"], ids=lambda text: ascii(text[0]))
def test_a_long_text_without_any_border_comes_back(small_tokenizer, text):
    assert small_tokenizer.decode(small_tokenizer.encode(text)) == text


def test_parts_are_encoded_the_same_by_many_threads(small_tokenizer):
    parts = list(split_text(long_text(5_000, 1), 100))
    starts = [i % 7 == 0 for i in range(len(parts))]
    assert [len(row) for row in small_tokenizer.encode_parts(parts, starts)] == small_tokenizer.encode_batch(
        parts, starts
    )[1].tolist()


# SentencePiece models that are not LLaMA 2's: how they are trained.
OTHERS = {
    "unigram": {"model_type": "unigram"},
    "normalized, white space kept": {"model_type": "bpe", "remove_extra_whitespaces": False},
    "without bytes": {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "without a space before": {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True},
    "a space behind": {"model_type": "bpe", "treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    tokenizers = {}
    for name, options in OTHERS.items():
        model = io.BytesIO()
        lines = ["the owl said it saw the fox", "owls and foxes in the river"] * 60
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=300,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        path = tmp_path_factory.mktemp("others") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        tokenizers[name] = Tokenizer(path)
    return tokenizers


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("before", "behind"), [("the fox\n", "owl said"), ("the fox", " owl said"), ("saw\n", "the river")]
)
def test_a_part_of_a_document_loses_nothing_with_any_kind_of_model(others, name, before, behind):
    tokenizer = others[name]
    rows = tokenizer.encode_parts([before, behind], [True, False])
    text = tokenizer.decode([i for row in rows for i in row]).replace("\u2047", " ")
    assert text.split() == (before + behind).split()
    assert tokenizer.decode_part(rows[1], start=False).split() == behind.split()


@settings(max_examples=100)
@given(text=texts)
def test_a_part_is_decoded_to_what_it_was(small_tokenizer, llama2_tokenizer, text):
    for tokenizer in (small_tokenizer, llama2_tokenizer):
        for start in (True, False):
            (ids,) = tokenizer.encode_parts([text], [start])
            assert tokenizer.decode_part(ids, start) == text


def test_leading_spaces_are_kept(small_tokenizer, llama2_tokenizer):
    for tokenizer in (small_tokenizer, llama2_tokenizer):
        ids = [tokenizer.encode(" " * n + "fox") for n in range(5)]
        assert len(set(map(tuple, ids))) == 5
        assert [tokenizer.decode(i) for i in ids] == [" " * n + "fox" for n in range(5)]


def test_a_trained_vocabulary_has_llamas_settings(small_tokenizer):
    sp = sentencepiece_of(small_tokenizer)
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (0, 1, 2, -1)
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{i:02X}>" for i in range(256)] and all(sp.is_byte(i) for i in range(3, 259))
    assert small_tokenizer.vocab_size == len(pieces) == 400
    assert (small_tokenizer.bos_id, small_tokenizer.eos_id) == (1, 2)


def test_a_trained_vocabulary_splits_digits(tmp_path):
    tokenizer = train_tokenizer(["1987 1987 1987 in 1987"] * 50, 300, tmp_path / "m.model")
    sp = sentencepiece_of(tokenizer)
    assert [p for p in map(sp.id_to_piece, range(259, sp.vocab_size())) if sum(c.isdigit() for c in p) > 1] == []
    assert len(tokenizer.encode("1987", bos=False)) == 5  # the space before, and four digits


def test_a_trained_vocabulary_spells_what_it_has_not_seen_in_bytes(small_tokenizer):
    ids = small_tokenizer.encode("字", bos=False)
    assert sentencepiece_of(small_tokenizer).id_to_piece(ids)[1:] == ["<0xE5>", "<0xAD>", "<0x97>"]


def test_a_trained_vocabulary_keeps_white_space_and_may_join_it(tmp_path):
    text = "def f():\n        return 1\n" * 50
    tokenizer = train_tokenizer([text], 320, tmp_path / "m.model")
    sp = sentencepiece_of(tokenizer)
    assert any(set(p) == {"▁"} and len(p) > 1 for p in map(sp.id_to_piece, range(259, sp.vocab_size())))
    assert tokenizer.decode(tokenizer.encode(text + "   ")) == text + "   "


def test_a_trained_vocabulary_normalizes_nothing(small_tokenizer):
    texts = ["\u00e9", "e\u0301", "\ufb01", "fi", "\uff21", "A", "\u00a0", " "]
    assert len({tuple(small_tokenizer.encode(text)) for text in texts}) == len(texts)


def test_the_same_text_trains_the_same_vocabulary(tmp_path, small_tokenizer):
    lines = ["the fox and the owl went to the river\n" * 20]
    first = train_tokenizer(lines, 300, tmp_path / "a.model")
    assert first.model_bytes == train_tokenizer(lines, 300, tmp_path / "b" / "b.model").model_bytes
    assert first.model_bytes == (tmp_path / "a.model").read_bytes() == Tokenizer(tmp_path / "a.model").model_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.model", "b"]


def test_a_text_with_more_characters_than_the_vocabulary_has_room_for_trains_one(tmp_path):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 3000))) + " the fox the fox" * 20
    tokenizer = train_tokenizer([text], 320, tmp_path / "m.model")
    assert tokenizer.vocab_size <= 320
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("the fox", bos=False)) <= 3  # the frequent is still joined


@pytest.mark.parametrize("text", ["a b a b c d e f g", "\t\t\t\ta\tb", "abcabcabc"], ids=ascii)
@pytest.mark.parametrize("vocab_size", [262, 263, 264, 270])
def test_the_smallest_vocabularies_can_be_trained(tmp_path, vocab_size, text):
    tokenizer = train_tokenizer([text], vocab_size, tmp_path / "m.model")
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode(text)) == text


ODD = "".join(
    map(chr, [*range(1, 32), 127, 0x85, 0xA0, 0x301, 0x2028, 0x3000, 0xFEFF, 0xFFFD, 0x4E2D, 0x1F600, 0xE000])
)


@settings(max_examples=60)
@given(
    text=st.text(st.sampled_from(ODD + " ab1"), min_size=1, max_size=120) | st.just(ODD),
    vocab_size=st.sampled_from([262, 263, 266, 280, 1024]),
)
def test_a_vocabulary_of_any_size_is_trained_on_the_oddest_characters(tmp_path_factory, text, vocab_size):
    path = tmp_path_factory.getbasetemp() / "odd.model"
    if not text.strip():
        with pytest.raises(UserError, match="white space"):
            train_tokenizer([text], vocab_size, path)
        return
    tokenizer = train_tokenizer([text], vocab_size, path)
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["a", "the fox\r\n" * 3, "nul\0nul", "x" * 20_000, "\ud800 fox", "\ufffd"], ids=lambda text: ascii(text[:8])
)
def test_a_vocabulary_is_trained_on_any_text_that_is_not_blank(tmp_path, text):
    tokenizer = train_tokenizer([text], 1024, tmp_path / "m.model")
    clean = text.replace("\ud800", "\ufffd")
    assert tokenizer.decode(tokenizer.encode(clean)) == clean


def test_a_long_line_counts_in_a_trained_vocabulary_to_its_end(tmp_path):
    text = "aa bb " * 5000 + "zebra " * 500
    tokenizer = train_tokenizer([text], 300, tmp_path / "m.model")
    assert len(tokenizer.encode("zebra", bos=False)) == 1


@pytest.mark.parametrize("lines", [[], [""], [" \n\t ", "\n"], ["\0"]], ids=ascii)
def test_no_vocabulary_is_trained_on_blank_text(tmp_path, lines):
    with pytest.raises(UserError, match="expected text"):
        train_tokenizer(lines, 300, tmp_path / "m.model")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=200)
@given(prompt=texts, text=texts, chunk=st.integers(1, 5), bos=st.booleans())
def test_streamed_pieces_join_to_the_whole_text(small_tokenizer, prompt, text, chunk, bos):
    prompt_ids = small_tokenizer.encode(prompt, bos=bos)
    ids = small_tokenizer.encode(prompt + text, bos=bos)
    if ids[: len(prompt_ids)] != prompt_ids:  # another way to write the prompt: let the model go on after it
        ids = prompt_ids + small_tokenizer.encode(text, bos=False)
    whole = small_tokenizer.decode(ids)
    stream = small_tokenizer.stream(prompt_ids)
    new = ids[len(prompt_ids) :]
    pieces = [stream.push(new[i : i + chunk]) for i in range(0, len(new), chunk)] + [stream.flush()]
    assert prompt + "".join(pieces) == whole
    assert stream.flush() == ""


@settings(max_examples=200)
@given(data=st.data())
def test_streamed_pieces_of_any_tokens_join_to_the_whole_text(small_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, small_tokenizer.vocab_size - 1), max_size=30))
    stream = small_tokenizer.stream([small_tokenizer.bos_id])
    pieces = [stream.push([i]) for i in ids] + [stream.flush()]
    assert "".join(pieces) == small_tokenizer.decode(ids)


def test_a_stream_never_shows_half_a_character(small_tokenizer):
    text = "an owl 🦉 in 木 and é👩‍🚀"
    ids = small_tokenizer.encode(text)
    stream = small_tokenizer.stream(ids[:1])
    shown = ""
    for i in ids[1:]:
        shown += stream.push([i])
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""


def test_a_stream_shows_text_as_soon_as_it_is_certain(small_tokenizer):
    ids = small_tokenizer.encode("by the river")
    stream = small_tokenizer.stream(ids[:1])
    for end in range(2, len(ids) + 1):
        assert stream.push(ids[end - 1 : end]) != "" or small_tokenizer.decode(ids[:end]) == ""


def test_a_stream_keeps_the_space_between_prompt_and_first_word(small_tokenizer):
    prompt = small_tokenizer.encode("by the")
    stream = small_tokenizer.stream(prompt)
    whole = small_tokenizer.encode("by the river")
    assert whole[: len(prompt)] == prompt
    assert stream.push(whole[len(prompt) :]) == " river"


def test_a_stream_does_not_change_the_prompt_it_is_given(small_tokenizer):
    prompt = small_tokenizer.encode("by the")
    before = list(prompt)
    small_tokenizer.stream(prompt).push([5])
    assert prompt == before


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "bytes", "cut", "under a file"])
def test_what_is_not_a_model_is_refused_by_its_path(tmp_path, small_tokenizer, kind):
    path = tmp_path / "tokenizer.model"
    contents = {
        "empty": b"",
        "text": b"not a model, just some text\n",
        "bytes": bytes(range(256)) * 8,
        "cut": small_tokenizer.model_bytes[:777],
        "under a file": b"",
    }
    if kind == "folder":
        path.mkdir()
    elif kind in contents:
        path.write_bytes(contents[kind])
    if kind == "under a file":
        path = path / "tokenizer.model"
    with pytest.raises(UserError) as error:
        Tokenizer(path)
    message = str(error.value)
    assert message.startswith(f"{path}: expected ") and "found" in message and "\n" not in message


def test_ids_may_be_numpys(small_tokenizer):
    ids = small_tokenizer.encode("a small brown fox")
    for dtype in (np.uint16, np.int32, np.int64):
        assert small_tokenizer.decode(np.array(ids, dtype)) == "a small brown fox"
        stream = small_tokenizer.stream(np.array(ids[:1], dtype))
        assert stream.push(np.array(ids[1:], dtype)) + stream.flush() == "a small brown fox"


def test_ids_outside_the_vocabulary_are_refused(small_tokenizer):
    last = small_tokenizer.vocab_size - 1
    small_tokenizer.decode([0, last])
    for bad in (-1, last + 1, 2**40):
        with pytest.raises(UserError, match=f"expected 0 to {last}, found {bad}"):
            small_tokenizer.decode([5, bad])
    for odd in (1.5, "a", None, np.float32(7)):
        with pytest.raises(UserError, match=r"^token ids: expected whole numbers, found \[5, "):
            small_tokenizer.decode([5, odd])


def test_a_stream_reads_a_long_text_once(small_tokenizer, monkeypatch):
    ids = small_tokenizer.encode("The fox saw 12 boats by the river. " * 100)
    stream, read = small_tokenizer.stream(ids[:50]), []
    decode = small_tokenizer.decode
    monkeypatch.setattr(small_tokenizer, "decode", lambda ids: read.append(len(ids)) or decode(ids))
    for token in ids[50:]:
        stream.push([token])
    assert sum(read) < 4 * len(ids) + 100, "and not all that came before at every token"


def test_many_texts_are_encoded_as_each_is(small_tokenizer):
    texts = [*AWKWARD, "lone \ud800 surrogate", "long word " * 5000]
    assert small_tokenizer.encode_all(texts) == [small_tokenizer.encode(text) for text in texts]
    assert small_tokenizer.encode_all([]) == []


def test_a_piece_that_is_not_utf8_is_told_with_the_file(small_tokenizer, tmp_path):
    content = small_tokenizer.model_bytes
    at = content.index("▁the".encode())
    (path := tmp_path / "t.model").write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(UserError) as refused:
        Tokenizer(path)
    assert str(refused.value).startswith(f"{path}: expected pieces in UTF-8, found b") and "damaged" in str(
        refused.value
    )


def test_a_damaged_model_is_told_or_works(small_tokenizer, tmp_path):
    rng = random.Random(0)
    for _ in range(100):
        content = bytearray(small_tokenizer.model_bytes)
        for _ in range(rng.choice([1, 3, 30])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (path := tmp_path / "t.model").write_bytes(content)
        try:
            tokenizer = Tokenizer(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            tokenizer.encode("The fox \n é 🦊")
            tokenizer.decode(range(tokenizer.vocab_size))


@pytest.mark.parametrize("path", [None, 5, b"tokenizer.model", "", ["a"]], ids=repr)
def test_what_is_no_path_is_no_tokenizer(path: Any) -> None:
    with pytest.raises(UserError, match=r"^tokenizer: expected a path, a string or a Path, found "):
        Tokenizer(path)


@pytest.mark.parametrize("name", ["bos", "eos", "specials"])
@pytest.mark.parametrize("value", [2, -1, None, "no", 0.5])
def test_a_switch_of_encoding_is_true_or_false(small_tokenizer: Tokenizer, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name}: expected True or False, found "):
        small_tokenizer.encode("a", **{name: value})
    assert small_tokenizer.encode("a", **{name: np.bool_(True)}) == small_tokenizer.encode("a", **{name: True})


@pytest.mark.parametrize("ids", [{5, 6}, {5: 6}, b"ab", bytearray(b"ab"), "5", [True], [5, False], 5, None], ids=repr)
def test_what_is_no_list_of_ids_has_no_text(small_tokenizer: Tokenizer, ids: Any) -> None:
    with pytest.raises(UserError, match=r"^token ids: expected whole numbers, found "):
        small_tokenizer.decode(ids)


def test_many_texts_come_from_any_order_of_them_and_from_nothing_else(small_tokenizer: Tokenizer) -> None:
    texts = ["a fox", "", "the river"]
    wanted = [small_tokenizer.encode(text) for text in texts]
    for any_order in (texts, tuple(texts), iter(texts), np.array(texts)):
        assert small_tokenizer.encode_all(any_order) == wanted  # type: ignore[arg-type]
    for other in ("ab", b"ab", None, {"a"}, {"a": 1}, [None], ["a", b"a"]):
        with pytest.raises(UserError, match=r"^texts: expected .*strings, found "):
            small_tokenizer.encode_all(other)  # type: ignore[arg-type]


def test_one_text_is_no_list_of_sentences(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^sentences: expected a list of strings, found 'Once'; put the text in a list"
    ):
        train_tokenizer("Once", 300, tmp_path / "tokenizer.model")
