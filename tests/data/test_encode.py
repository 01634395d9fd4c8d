"""What is counted while a text is encoded, and what its tokens do not hold."""

import collections
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import encode as encode_module
from llama_jax.data import lost as lost_module
from llama_jax.data import text as text_module
from llama_jax.data.counts import SHORT, Digests, digests_of
from llama_jax.data.lost import examples, loss_warning, share
from llama_jax.data.manifest import TextCounts
from llama_jax.data.shards import prepare
from llama_jax.data.text import Corpus, Part
from llama_jax.data.tokens import TokenSet
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

TEXT = "The fox went to the river.\nThe owl said: 12 boats!\n" * 30


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Tokenizers that do not give back what they read."""
    tokenizers = {}
    for name, options in {
        "unknown": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "collapsed": {"byte_fallback": True, "normalization_rule_name": "identity"},
        "normalized": {"byte_fallback": True, "remove_extra_whitespaces": False},
        "lower case": {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc_cf"},
    }.items():
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()), model_writer=model, model_type="bpe", vocab_size=320,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        path = tmp_path_factory.mktemp(name) / "tokenizer.model"
        path.write_bytes(model.getvalue())
        tokenizers[name] = Tokenizer(path)
    return tokenizers


def tokens_of(folder: Path, text: str, tokenizer: Tokenizer, separator: str = "", train_size: float = 0.5) -> TokenSet:
    (folder / "a.txt").write_bytes(text.encode())
    return prepare(Corpus([folder / "a.txt"], separator.encode(), train_size), tokenizer, folder / "tokens")


def counts_of(tokens: TokenSet) -> TextCounts:
    assert tokens.manifest.counts is not None
    return tokens.manifest.counts


@settings(max_examples=30)
@given(
    texts=st.lists(st.text("abc dé字", min_size=1).filter(lambda text: text.strip()), min_size=2, max_size=12),
    train_size=st.floats(0.1, 1.0),
    at_once=st.integers(1, 5),
)
def test_counts_are_those_of_the_documents_one_by_one(
    tmp_path_factory: pytest.TempPathFactory,
    small_tokenizer: Tokenizer,
    texts: list[str],
    train_size: float,
    at_once: int,
) -> None:
    folder = tmp_path_factory.mktemp("counts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "PARTS_AT_ONCE", at_once)
        tokens = tokens_of(folder, "\n".join(texts), small_tokenizer, "\n", train_size)
    counts, manifest = counts_of(tokens), tokens.manifest
    for split, stream in (("train", tokens.train), ("eval", tokens.eval)):
        ids = np.asarray(stream)
        documents = np.split(ids, np.flatnonzero(ids == small_tokenizer.bos_id))[1:]
        lengths = sorted(int(((d != small_tokenizer.bos_id) & (d != small_tokenizer.eos_id)).sum()) for d in documents)
        assert manifest.documents[split] == len(documents)
        assert counts.longest[split] == max(lengths, default=0)
        assert counts.median[split] == (lengths[len(lengths) // 2] if lengths else 0)
        assert counts.byte_tokens[split] == np.isin(ids, small_tokenizer.byte_ids).sum()
        assert manifest.largest_id[split] == (ids.max() if len(ids) else 0)
        assert counts.unknown[split] == counts.lost_bytes[split] == 0
        assert counts.compared_bytes[split] == manifest.text_bytes[split]


def test_copies_of_documents_across_the_split_are_counted(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    train = ["the fox", "the owl", "a river", "x" * 70_000]
    held_out = ["the owl", "a boat", "the owl", "x" * 70_000, "the owl ", "x" * 70_001]
    text = "\n".join([*train, *held_out])
    cut = (len("\n".join(train)) + 1) / len(text)
    tokens = tokens_of(tmp_path, text, small_tokenizer, "\n", cut)
    assert tokens.manifest.documents == {"train": 4, "eval": 6}
    assert counts_of(tokens).copies == 3


def test_copies_among_many_documents_are_estimated_in_bounded_memory() -> None:
    train, held_out = Digests(limit=500), Digests(limit=500)
    for i in range(20_000):
        train.add([Part(f"document {i}", 1, True, True)])
    for i in range(15_000, 25_000):
        held_out.add([Part(f"document {i}", 1, True, True)])
    assert len(train._kept) <= 500 * 8 and len(held_out._kept) <= 500 * 8
    assert 3_500 < train.copies_in(held_out) < 6_500  # 5,000


@given(st.lists(st.text(max_size=30) | st.text(st.characters(codec="ascii"), max_size=30), max_size=40))
@settings(max_examples=200)
def test_texts_have_the_same_digest_if_they_are_the_same_whatever_stands_beside_them(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    found = digests_of(texts)
    assert found.dtype == np.uint64 and len(found) == len(texts)
    assert len(set(found.tolist())) == len(set(texts))
    assert [int(digests_of([text])[0]) for text in texts] == found.tolist()


def test_a_million_lines_have_as_many_digests_as_there_are_lines() -> None:
    lines = [f"{'ab' * (i % 7)}{i:x}{' ' * (i % 5)}" for i in range(1_000_000)]
    found = np.concatenate([digests_of(lines[i : i + 4096]) for i in range(0, len(lines), 4096)])
    assert len(np.unique(found)) == len(set(lines))
    # As samples of documents are those whose digests end in zeros.
    assert abs(np.mean(found % 256 == 0) * 256 - 1) < 0.1


@pytest.mark.parametrize("char", ["x", "é", "🦊"])
def test_the_longest_short_document_and_the_shortest_long_one_are_known_again(char: str) -> None:
    train, held_out = Digests(), Digests()
    for size in (SHORT - 1, SHORT, SHORT + 1):
        train.add([Part(char * size, 1, True, True)])
        held_out.add([Part("the fox", 7, True, True), Part(char * size, 1, True, True)])
    assert train.copies_in(held_out) == 3


def test_an_unfinished_document_is_no_copy() -> None:
    train, held_out = Digests(), Digests()
    train.add([Part("the fox", 7, True, False)])
    held_out.add([Part("the fox", 7, True, True)])
    assert train.copies_in(held_out) == 0


CODE = "def f(x):\n    if x:\n        return 1\n" * 10
CHINESE = "幸福的家庭都是相似的。\n" * 10
LOSSES = [
    ("unknown", CHINESE, 1.0, "家 (10)"),
    ("unknown", "the fox\n" * 50, 1 / 8, "line ends (50)"),
    ("collapsed", CODE, 0.3, "spaces"),
    ("normalized", "ﬁne ½ ＡＢ" * 20, 0.7, "ﬁ (20)"),  # noqa: RUF001
    ("normalized", "the fox\n" * 50, 1 / 8, "line ends (50)"),
    ("lower case", "THE fox " * 50, 3 / 8, "T (50)"),
]


@pytest.mark.parametrize(
    ("name", "text", "lost_share", "example"), LOSSES, ids=[f"{n}-{t[:6]!a}" for n, t, *_ in LOSSES]
)
def test_what_a_tokenizer_does_not_give_back_is_measured_and_bits_per_byte_are_not_told(
    tmp_path: Path, lossy: dict[str, Tokenizer], name: str, text: str, lost_share: float, example: str
) -> None:
    tokens = tokens_of(tmp_path, text, lossy[name])
    counts = counts_of(tokens)
    assert sum(counts.compared_bytes.values()) == len(text.encode())
    assert sum(counts.lost_bytes.values()) / len(text.encode()) == pytest.approx(lost_share, abs=0.12)
    assert any(example in found for found in counts.lost_examples), counts.lost_examples
    assert tokens.manifest.lossy("train") and tokens.manifest.lossy("eval") and tokens.bits_per_byte(1.0) is None
    assert (sum(counts.unknown.values()) > 0) == (name == "unknown")


@pytest.mark.parametrize("name", ["unknown", "collapsed", "normalized", "lower case"])
def test_a_text_that_a_lossy_tokenizer_gives_back_is_not_lost(
    tmp_path: Path, lossy: dict[str, Tokenizer], name: str
) -> None:
    tokens = tokens_of(tmp_path, "the fox went to the owl said " * 20 + "the", lossy[name])
    assert sum(counts_of(tokens).lost_bytes.values()) <= 1  # a space at the cut
    if name == "unknown":
        assert not tokens.manifest.lossy("train") and tokens.bits_per_byte(1.0) is not None


def test_sentencepieces_mark_of_a_space_is_lost_where_there_are_many(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    assert counts_of(tokens_of(tmp_path, TEXT * 3 + "a\u2581b" + TEXT * 3, small_tokenizer)).lost_bytes == {
        "train": 0,
        "eval": 0,
    }
    many = counts_of(tokens_of(tmp_path, "a\u2581b " * 100, small_tokenizer))
    assert sum(many.lost_bytes.values()) == 300


def test_of_a_long_text_parts_are_compared_that_are_spread_over_it(
    tmp_path: Path, lossy: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_module, "COMPARED_BYTES", 40_000)
    monkeypatch.setattr(lost_module, "PART_BYTES", 1000)
    monkeypatch.setattr(text_module, "PART_BYTES", 1000)
    plain = ("the fox went to the owl " * 50)[:1000]
    for place in range(0, 150, 30):  # a stretch of 10,000 bytes, somewhere in 160,000
        text = plain * place + "Ｔhe fox " * 1000 + plain * (150 - place)  # noqa: RUF001
        counts = counts_of(tokens_of(tmp_path, text, lossy["normalized"], train_size=1.0))
        assert 30_000 < counts.compared_bytes["train"] < 60_000
        assert counts.lost_bytes["train"] > 0


def test_the_warning_tells_the_share_and_examples() -> None:
    assert loss_warning(0, 100, 0, []) == ""
    text = loss_warning(25, 100, 7, ["家 (10)", "spaces (3)"])
    assert "does not restore 25.00% of its bytes" in text and "7 tokens are unknown" in text
    assert "mostly 家 (10), spaces (3)" in text and "\n" not in text


def test_shares_are_never_rounded_to_nothing() -> None:
    assert [share(n, 10**6) for n in (0, 1, 99, 100, 500_000)] == [
        "0%",
        "less than 0.01%",
        "less than 0.01%",
        "0.01%",
        "50.00%",
    ]
    assert share(0, 0) == "0%"


def test_control_characters_are_named_in_ascii() -> None:
    assert examples(collections.Counter("\x07\x07 \n家")) == ["'\\x07' (2)", "spaces (1)", "line ends (1)", "家 (1)"]


def test_a_file_that_is_no_text_further_on_ends_the_encoding_and_leaves_nothing(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "b.txt").write_bytes(TEXT.encode() + b"\xff" * 200)
    corpus = Corpus([tmp_path / "a.txt", tmp_path / "b.txt"], b"", 1.0, any_bytes=False)
    with pytest.raises(UserError, match=r"b\.txt: expected plain text in UTF-8"):
        prepare(corpus, small_tokenizer, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_text_that_is_written_while_it_is_encoded_ends_the_encoding(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    original = Tokenizer.encode_batch

    def write_meanwhile(self: Tokenizer, *args: object) -> list[list[int]]:
        path.write_bytes(TEXT.upper().encode())
        return original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Tokenizer, "encode_batch", write_meanwhile)
    with pytest.raises(UserError, match=r"a\.txt: expected a file that nobody writes, found it changed meanwhile"):
        prepare(Corpus([path], b"", 0.9), small_tokenizer, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []
