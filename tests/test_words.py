"""The word encoder: SentencePiece's own ids for every text, whatever it remembers, with every kind of model."""

import concurrent.futures
import functools
import io
import itertools
import multiprocessing
import pickle
import random
import sys

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax import words as words_module
from llama_jax.tokenizer import Tokenizer, split_text
from llama_jax.tokenizers import sentencepiece as sentencepiece_module
from llama_jax.words import Words, can_encode

LINES = [
    "the owl said it saw  the fox,",
    "owls and foxes in the river (1987)",
    "    if fox: return 'owl'",
    "le hibou, déjà",
] * 40
OURS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}
# Models that words are encoded with: options of SentencePiece's trainer.
BY_WORDS = {
    "as LLaMA 2": OURS,
    "tiny": {**OURS, "vocab_size": 292},
    "numbers": {**OURS, "split_digits": False, "split_by_number": False, "split_by_unicode_script": False},
    "no runs of spaces": {**OURS, "allow_whitespace_only_pieces": False},
    "own symbols": {**OURS, "user_defined_symbols": ["fox", "▁owl", "<sep>", "\n\tif", "▁▁▁", ">>"]},
    "control symbols": {**OURS, "control_symbols": ["<fox>", "é"]},
}
# Models with which SentencePiece encodes all.
WHOLE = {
    "unigram": {**OURS, "model_type": "unigram"},
    "characters": {**OURS, "model_type": "char"},
    "normalized": {**OURS, "normalization_rule_name": "nmt_nfkc"},
    "spaces collapsed": {**OURS, "remove_extra_whitespaces": True},
    "no bytes": {**OURS, "byte_fallback": False},
    "no space before": {**OURS, "add_dummy_prefix": False},
    "a space behind": {**OURS, "treat_whitespace_as_suffix": True},
    "pieces across spaces": {**OURS, "split_by_whitespace": False},
    "a symbol across spaces": {**OURS, "user_defined_symbols": ["the▁fox"]},
    "a symbol with a space": {**OURS, "user_defined_symbols": ["the fox"]},
    "lines in a symbol": {**OURS, "user_defined_symbols": ["\n\n"]},
    "a line behind a space": {**OURS, "user_defined_symbols": ["▁\n"]},
    "as SentencePiece trains": {},
}
ATOMS = [
    *" \n\t\r\0\x85\xa0,.(=\"'{}<>1290aebox", "  ", "   ", "\u2581", "\u2581 ", " \u2581", "\n\n", "\r\n", " \n", "\n ", "\n    ",
    "\x1e", "\x1f", "\u2028", "\u3000", "\u200b", "\ufeff", "\ufffd", "\u0301", "\u200d", "é", "É", "Ж", "字", "漢字", "ﬁ", "😀", "👩‍🚀", "\U0010ffff",
    "<s>", "</s>", "<unk>", "<0x0A>", "<fox>", "<sep>", "the", " the", "fox", " fox", "foxes", " owl", "the fox", "\n\tif", "rive", "1987",
    "saidsaid", "x" * 40, " " * 17,
]  # fmt: skip
texts = st.lists(st.sampled_from(ATOMS), max_size=25).map("".join) | st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module", autouse=True)
def every_text_is_encoded_by_words():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_module, "WORTH_WORDS", 0)
        patch.setattr(words_module, "MOST_UNSEEN", 1e9)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = {}
    for name, options in {**BY_WORDS, **WHOLE}.items():
        model = io.BytesIO()
        kinds = {"vocab_size": 420, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1} | options
        spm.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **kinds)
        path = tmp_path_factory.mktemp("models") / "tokenizer.model"
        path.write_bytes(model.getvalue())
        found[name] = Tokenizer(path)
    return found


@functools.cache
def processor(model):
    return spm.SentencePieceProcessor(model_proto=model)


def bare(tokenizer):
    return processor(tokenizer.model_bytes)


def check_equal(tokenizer, documents):
    """Compare with SentencePiece's ids of each document, given whole and as one of several texts."""
    expected = bare(tokenizer).encode(documents, num_threads=1)
    ids, lengths = tokenizer.encode_batch(documents, [True] * len(documents))
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [i for row in expected for i in row]


@pytest.mark.parametrize("name", [*BY_WORDS, *WHOLE])
def test_only_models_whose_borders_are_safe_are_encoded_by_words(models, name):
    assert can_encode(models[name].model_bytes) == (models[name]._reader._words is not None) == (name in BY_WORDS)


def test_llama2s_model_and_those_trained_here_are_encoded_by_words(small_tokenizer, llama2_tokenizer):
    assert small_tokenizer._reader._words and llama2_tokenizer._reader._words


def test_a_model_with_unused_pieces_is_not_encoded_by_words(models):
    model = models["as LLaMA 2"].model_bytes
    piece = b"\x0a\x06zzqzzq\x18\x05"  # its text, and its type: unused
    assert not can_encode(b"\x0a" + bytes([len(piece)]) + piece + model)


@settings(max_examples=400)
@given(documents=st.lists(texts, max_size=4))
def test_every_text_has_sentencepieces_ids(models, small_tokenizer, llama2_tokenizer, documents):
    for tokenizer in (small_tokenizer, llama2_tokenizer, *(models[name] for name in BY_WORDS)):
        check_equal(tokenizer, documents)


@settings(max_examples=50)
@given(documents=st.lists(texts, max_size=4))
def test_every_text_has_sentencepieces_ids_with_the_other_models(models, documents):
    for name in WHOLE:
        check_equal(models[name], documents)


@settings(max_examples=250)
@given(documents=st.lists(texts, min_size=1, max_size=3), part_chars=st.integers(1, 30))
def test_parts_behind_marks_have_the_ids_that_sentencepiece_gives_them(models, llama2_tokenizer, documents, part_chars):
    cut = [list(split_text(text, part_chars)) for text in documents]
    parts = [part for of_one in cut for part in of_one]
    starts = [i == 0 for of_one in cut for i in range(len(of_one))]
    for tokenizer in (llama2_tokenizer, *models.values()):
        sp, expected = bare(tokenizer), []
        for part, start in zip(parts, starts, strict=True):
            mark = "" if start else tokenizer._reader._marks[part.startswith(" ")]
            expected.append(sp.encode(mark + part)[len(sp.encode(mark)) :])
        assert tokenizer.encode_parts(parts, starts) == expected
        ids, lengths = tokenizer.encode_batch(parts, starts)
        assert ids.tolist() == [i for row in expected for i in row] and lengths.tolist() == [*map(len, expected)]


LONG = {
    "no space": "abcdefoxowl" * 10_000,
    "spaces": " " * 100_000,
    "marks": "\u2581" * 30_000 + " x",
    "newlines": "\n" * 50_000,
    "characters without spaces": "字漢é" * 20_000,
    "long words": " ".join("fox" * n for n in range(200)),
    "odd": "".join(random.Random(0).choices(ATOMS, k=30_000)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_have_sentencepieces_ids(models, llama2_tokenizer, name):
    for tokenizer in (llama2_tokenizer, models["as LLaMA 2"], models["own symbols"]):
        check_equal(tokenizer, [LONG[name], "", "the fox", LONG[name][:777]])


@pytest.mark.parametrize(("attribute", "value"), [("MEMORY_BYTES", 3000), ("LONGEST", 2), ("CHARS_AT_ONCE", 1)])
def test_the_ids_do_not_depend_on_what_is_remembered(models, monkeypatch, attribute, value):
    monkeypatch.setattr(words_module, attribute, value)
    rng = random.Random(1)
    words = Words(models["own symbols"].model_bytes)
    for _ in range(60):
        documents = ["".join(rng.choices(ATOMS, k=rng.randrange(60))) for _ in range(3)]
        ids, lengths = words.encode(documents)
        expected = bare(models["own symbols"]).encode(documents, num_threads=1)
        assert ids.tolist() == [i for row in expected for i in row] and lengths.tolist() == [*map(len, expected)]


def test_memory_is_bounded(models, monkeypatch):
    monkeypatch.setattr(words_module, "MEMORY_BYTES", limit := 100_000)
    words, most = Words(models["as LLaMA 2"].model_bytes), 0
    for i in range(200):
        words.encode([" ".join(f"w{i}x{j}😀" for j in range(50)) + " " + "y" * 500 + str(i)])
        dicts = (words._known, words._known_runs)
        known = [*dicts[0].items(), *dicts[1].items()]
        most = max(most, sum(map(sys.getsizeof, dicts)) + sum(sys.getsizeof(a) + sys.getsizeof(b) for a, b in known))
        assert all(len(word) <= words_module.LONGEST for word, _ in known)
    assert limit / 2 < most < limit


@pytest.mark.parametrize("name", [*BY_WORDS])
def test_no_piece_goes_across_the_borders_of_runs(models, llama2_tokenizer, name):
    for tokenizer in (models[name], llama2_tokenizer):
        runs = Words(tokenizer.model_bytes)._runs_of
        sp = bare(tokenizer)
        for i in range(sp.vocab_size()):
            if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)):
                assert len(runs.findall(sp.id_to_piece(i).replace(words_module.SPACE_MARK, " "))) == 1


def test_source_code_is_cut_into_runs_that_come_again(llama2_tokenizer):
    words = Words(llama2_tokenizer.model_bytes)
    cut = words._runs_of.findall("    self.assertEqual(fox_1, 'owl')" + words_module.END)
    assert cut == ["    self", ".", "assertEqual", "(", "fox", "_", "1", ",", " '", "owl", "')", words_module.END]
    words.encode(["self.assertEqual(fox_1, 'owl')", "fox.assertEqual(self_1, 'owl')"])
    assert {"assertEqual", "fox", "_", ".", "')"} < {*words._known_runs} and "assertEqual" not in words._known


def test_texts_of_unseen_words_are_given_to_sentencepiece_as_they_are(models, monkeypatch):
    monkeypatch.setattr(words_module, "MOST_UNSEEN", 0.75)
    words, expected = Words(models["as LLaMA 2"].model_bytes), bare(models["as LLaMA 2"])
    for text, known in (("the fox saw", set()), ("the owl " * 20, {"the", "owl", ""}), ("a fox", {"the", "owl", ""})):
        assert words.encode([text, ""])[0].tolist() == expected.encode(text)
        assert set(words._known) == {words_module.END, *known}


def test_new_words_that_are_long_are_not_cut_into_runs(models, monkeypatch):
    monkeypatch.setattr(words_module, "MOST_UNSEEN", 0.75)
    words, expected = Words(models["as LLaMA 2"].model_bytes), bare(models["as LLaMA 2"])
    text = ",".join(map(str, range(1000, 1100)))
    assert words.encode([text])[0].tolist() == expected.encode(text)
    assert set(words._known) == set(words._known_runs) == {words_module.END}


@pytest.mark.parametrize("text", [f"a{words_module.END}b", f"a {words_module.SPACE}b", words_module.END])
def test_texts_with_the_encoders_own_control_characters_are_given_to_sentencepiece(models, text):
    words = Words(models["as LLaMA 2"].model_bytes)
    words.encode(["the fox"])
    ids, lengths = words.encode(["the fox", text, ""])
    rows = bare(models["as LLaMA 2"]).encode(["the fox", text, ""], num_threads=1)
    assert ids.tolist() == [*itertools.chain(*rows)] and lengths.tolist() == [*map(len, rows)]
    assert set(words._known) == {words_module.END, "the", "fox"}


def test_a_little_text_makes_no_word_encoder(models, monkeypatch):
    monkeypatch.setattr(sentencepiece_module, "WORTH_WORDS", 100)
    tokenizer = Tokenizer(models["as LLaMA 2"].model_path)
    for times in (1, 9, 1):
        assert tokenizer.encode("the fox saw " * times, bos=False) == bare(tokenizer).encode("the fox saw " * times)
        assert ("_words" in tokenizer._reader.__dict__) == (times == 9 or "_words" in tokenizer._reader.__dict__)
    assert tokenizer._reader._words


def test_nothing_has_no_ids(models):
    for tokenizer in models.values():
        for ids, lengths in (tokenizer.encode_batch([], []), tokenizer.encode_batch([""], [True])):
            assert ids.dtype == np.int32 and lengths.dtype == np.int64 and len(ids) == lengths.sum() == 0
        assert tokenizer.encode_parts(["", ""], [True, False]) == [[], []] and tokenizer.encode_parts([], []) == []


def test_threads_may_share_a_tokenizer(models, monkeypatch):
    monkeypatch.setattr(words_module, "MEMORY_BYTES", 20_000)
    tokenizer = Tokenizer(models["as LLaMA 2"].model_path)
    documents = [["".join(random.Random(seed).choices(ATOMS, k=400))] * 3 for seed in range(40)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda some: tokenizer.encode_parts(some, [True] * 3), documents))
    assert found == [bare(tokenizer).encode(some, num_threads=1) for some in documents]


def encoded(tokenizer):
    return tokenizer.encode_batch(["the fox saw", " it"], [True, False])[0].tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_may_be_given_a_tokenizer(models, method):
    tokenizer = models["as LLaMA 2"]
    here = encoded(tokenizer)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(encoded, (tokenizer,)) == here
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert len(tokenizer._reader._words._known) > 1 and len(sent._reader._words._known) == 1, "the words stay behind"


def test_the_shared_texts_have_sentencepieces_ids(shared, llama2_tokenizer, small_tokenizer):
    text = (shared / "data" / "tinyshakespeare.txt").read_text()[:300_000]
    for tokenizer in (llama2_tokenizer, small_tokenizer):
        check_equal(tokenizer, text.split("\n"))
        assert tokenizer.encode(text, bos=False) == bare(tokenizer).encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama 2", "own symbols"])
def test_a_million_random_texts_have_sentencepieces_ids(models, request, kind):
    tokenizer = request.getfixturevalue("llama2_tokenizer") if kind == "llama 2" else models[kind]
    rng, sp = random.Random(0), bare(tokenizer)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size) if tokenizer.is_text(i)]
    for _ in range(1000):
        atoms = [*ATOMS, *rng.sample(pieces, 60), *map(chr, rng.sample(range(0xD800), 60)), *(" " * 8)]
        documents = ["".join(rng.choices(atoms, k=rng.randrange(12))) for _ in range(1000)]
        expected = sp.encode(documents, num_threads=1)
        ids, lengths = tokenizer.encode_batch(documents, [True] * len(documents))
        assert lengths.tolist() == [*map(len, expected)] and ids.tolist() == [i for row in expected for i in row]


@pytest.mark.slow
def test_the_whole_shared_text_has_sentencepieces_ids(shared, llama2_tokenizer, small_tokenizer):
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    for tokenizer in (llama2_tokenizer, small_tokenizer):
        check_equal(tokenizer, [text, *text.split("\n"), *split_text(text)])
