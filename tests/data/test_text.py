"""From files to documents: what is read, where it is cut, what is refused."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import text as text_module
from llama_jax.data.text import Corpus, find_files, separator_bytes
from llama_jax.errors import UserError

TEXTS = {
    "plain": "The fox.\nThe owl.\n",
    "no final newline": "The fox.\nThe owl.",
    "CRLF": "The fox.\r\nThe owl.\r\n\r\n",
    "NUL": "a\0b\0\0c and the rest of the line",
    "emoji": "👩‍👩‍👧‍👦" * 40,
    "one long line": "the fox and the owl " * 3000,
    "one long word": "fox" * 30_000,
    "spaces": "   \n\n\t  the fox   \n\n   ",
    "two bytes": "é",
    "one byte": "a",
}


def corpus_of(folder, *contents: bytes, separator: bytes = b"", train_size: float = 0.9) -> Corpus:
    paths = []
    for i, content in enumerate(contents):
        paths.append(folder / f"{i}.txt")
        paths[-1].write_bytes(content)
    return Corpus(paths, separator, train_size)


def joined(corpus: Corpus, split: str) -> str:
    return "".join(part.text for part in corpus.parts(split))


def documents(corpus: Corpus, split: str) -> list[tuple[str, bool]]:
    """Each document's text and whether it is marked as ended."""
    found: list[tuple[str, bool]] = []
    for part in corpus.parts(split):
        if part.starts:
            found.append((part.text, part.ends))
        else:
            before, ended = found.pop()
            assert not ended
            found.append((before + part.text, part.ends))
    return found


@pytest.mark.parametrize("train_size", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", TEXTS)
def test_the_two_splits_are_the_whole_text_cut_at_the_byte(tmp_path, name, train_size):
    text = TEXTS[name]
    corpus = corpus_of(tmp_path, text.encode(), train_size=train_size)
    train, held_out = joined(corpus, "train"), joined(corpus, "eval")
    assert train + held_out == text
    wanted = int(len(text.encode()) * train_size)
    assert wanted - 3 <= len(train.encode()) <= wanted
    assert corpus.replaced == 0


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4),
    train_size=st.floats(0.01, 1),
    part_bytes=st.integers(4, 30),
)
def test_no_character_of_any_text_is_lost_or_cut_in_two(tmp_path_factory, texts, train_size, part_bytes):
    contents = [text.encode() for text in texts]
    corpus = corpus_of(tmp_path_factory.getbasetemp(), *contents, train_size=train_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PART_BYTES", part_bytes)
        train, held_out = joined(corpus, "train"), joined(corpus, "eval")
    assert train + held_out == "".join(content.decode("utf-8-sig") for content in contents)
    assert corpus.replaced == 0


def test_the_eval_part_is_the_end_of_the_text_over_all_files_and_is_never_in_training(tmp_path):
    contents = [b"A" * 50, b"B" * 30, b"C" * 20]
    corpus = corpus_of(tmp_path, *contents)
    assert joined(corpus, "train") == "A" * 50 + "B" * 30 + "C" * 10
    assert joined(corpus, "eval") == "C" * 10
    corpus = corpus_of(tmp_path, *contents, train_size=0.6)
    assert joined(corpus, "train") == "A" * 50 + "B" * 10
    assert joined(corpus, "eval") == "B" * 20 + "C" * 20


def test_the_cut_moves_before_a_character_that_it_would_go_through(tmp_path):
    text = "abc" + "😀" + "d"  # 8 bytes, the character from 3 to 7
    for train_size, train in ((0.49, "abc"), (0.6, "abc"), (0.75, "abc"), (0.876, "abc😀")):
        corpus = corpus_of(tmp_path, text.encode(), train_size=train_size)
        assert (joined(corpus, "train"), joined(corpus, "eval")) == (train, text.removeprefix(train))


def test_a_file_is_a_document_from_start_to_end(tmp_path):
    corpus = corpus_of(tmp_path, b"one\n\ntwo", b"", b"three", train_size=1.0)
    assert documents(corpus, "train") == [("one\n\ntwo", True), ("three", True)]
    assert documents(corpus, "eval") == []


def test_a_separator_parts_documents_and_is_not_part_of_them(tmp_path):
    corpus = corpus_of(tmp_path, b"one\ntwo\n\nthree\n\n\n\nfour", b"five\n\n", separator=b"\n\n", train_size=1.0)
    assert documents(corpus, "train") == [("one\ntwo", True), ("three", True), ("four", True), ("five", True)]


def test_a_line_can_be_a_document(tmp_path):
    corpus = corpus_of(tmp_path, b"one two\n\n  three\nfour", separator=b"\n", train_size=1.0)
    assert documents(corpus, "train") == [("one two", True), ("  three", True), ("four", True)]


def test_the_document_that_the_cut_goes_through_is_open_in_training_and_ends_in_eval(tmp_path):
    corpus = corpus_of(tmp_path, b"0123456789", train_size=0.5)
    assert documents(corpus, "train") == [("01234", False)]
    assert documents(corpus, "eval") == [("56789", True)]
    corpus = corpus_of(tmp_path, b"ab|cdefg|h", separator=b"|", train_size=0.5)
    assert documents(corpus, "train") == [("ab", True), ("cd", False)]
    assert documents(corpus, "eval") == [("efg", True), ("h", True)]


@pytest.mark.parametrize(
    ("content", "separator"),
    [
        (b"abc<sep>defg", b"<sep>"),
        (b"ab\n\n\n\ncd", b"\n\n"),
        (b"ab\n\n\n\n\ncd\n\n", b"\n\n"),
        (b"\n\n\nab\n\n", b"\n\n"),
        ("é — è —".encode(), "—".encode()),
    ],
    ids=ascii,
)
def test_wherever_the_cut_is_no_separator_is_in_either_part_and_whole_documents_are_ended(tmp_path, content, separator):
    whole = documents(corpus_of(tmp_path, content, separator=separator, train_size=1.0), "train")
    assert [text for text, _ in whole] == [d for d in content.decode().split(separator.decode()) if d]
    for cut in range(1, len(content)):
        corpus = corpus_of(tmp_path, content, separator=separator, train_size=cut / len(content) + 1e-9)
        assert corpus.cut == cut
        train, held_out = documents(corpus, "train"), documents(corpus, "eval")
        if train and not train[-1][1]:  # the cut goes through a document: put its halves together
            train, held_out = train[:-1], [(train[-1][0] + held_out[0][0], held_out[0][1]), *held_out[1:]]
        assert train + held_out == whole, cut


def test_a_document_is_read_in_parts_that_start_and_end_it_once(tmp_path):
    corpus = corpus_of(tmp_path, TEXTS["one long line"].encode() * 5, train_size=1.0)
    parts = list(corpus.parts("train"))
    assert len(parts) > 3
    assert [p.starts for p in parts] == [True] + [False] * (len(parts) - 1)
    assert [p.ends for p in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(p.text) for p in parts) <= 4 * text_module.PART_BYTES


def test_a_byte_order_mark_is_left_out_at_a_files_start_only(tmp_path):
    bom = b"\xef\xbb\xbf"
    corpus = corpus_of(tmp_path, bom + b"one" + bom + b"two", bom + b"three", train_size=1.0)
    assert documents(corpus, "train") == [("one\ufefftwo", True), ("three", True)]
    for cut in range(1, 8):
        corpus = corpus_of(tmp_path, bom + b"four", train_size=cut / 7 + 1e-9)
        assert joined(corpus, "train") + joined(corpus, "eval") == "four"


def test_bytes_that_are_not_utf8_are_replaced_and_counted(tmp_path):
    corpus = corpus_of(tmp_path, b"good \xff\xfe bad \xe2\x82 half, and \xef\xbf\xbd that is meant", train_size=1.0)
    assert joined(corpus, "train") == "good \ufffd\ufffd bad \ufffd half, and \ufffd that is meant"
    assert corpus.replaced == 3


def test_a_text_of_continuation_bytes_only_is_read_to_its_end(tmp_path):
    corpus = corpus_of(tmp_path, b"\x80" * 1000, train_size=0.5)
    assert joined(corpus, "train") + joined(corpus, "eval") == "\ufffd" * 1000


def test_the_digest_changes_with_anything_that_changes_the_tokens(tmp_path):
    def digest(*contents, **options):
        return corpus_of(tmp_path, *contents, **options).digest()

    same = digest(b"ab", b"cd")
    assert same == digest(b"ab", b"cd")
    others = [
        digest(b"ab", b"ce"),
        digest(b"abc", b"d"),
        digest(b"abcd"),
        digest(b"ab", b"cd", separator=b"\n"),
        digest(b"ab", b"cd", train_size=0.5),
        digest(b"cd", b"ab"),
    ]
    assert len({same, *others}) == 7


def test_a_file_a_folder_and_a_glob_are_found_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    a, b, c = (tmp_path / name for name in ("a.txt", "b.txt", "deep/er/c.txt"))
    assert find_files(str(tmp_path / "notes.md")) == [tmp_path / "notes.md"]
    assert find_files(str(tmp_path)) == [a, b, c]
    assert find_files(str(tmp_path / "*.txt")) == [a, b]
    assert find_files(str(tmp_path / "**" / "*.txt")) == [a, b, c]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    for name in ("[a].txt", "a.txt"):
        (tmp_path / name).write_text("x")
    assert find_files(str(tmp_path / "[a].txt")) == [tmp_path / "[a].txt"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert find_files("~/a.txt") == [tmp_path / "a.txt"]


@pytest.mark.parametrize(
    ("contents", "target", "words"),
    [
        ({}, "missing.txt", "found nothing at"),
        ({}, "*.txt", "found nothing at"),
        ({"notes.md": b"x"}, ".", "found none"),
        ({"a.txt": b""}, "a.txt", "empty"),
        ({"a.txt": b"", "b.txt": b""}, ".", "empty"),
        ({"a.txt": "the fox".encode("utf-16")}, "a.txt", "UTF-16"),
        ({"a.txt": b"ok", "b.txt": b"\xfe\xff\0a"}, ".", "UTF-16"),
    ],
)
def test_what_holds_no_text_is_refused_in_one_line(tmp_path, contents, target, words):
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        find_files(str(tmp_path / target))
    message = str(error.value)
    assert message.startswith("data.filepath: expected ") and words in message and "\n" not in message
    assert str(tmp_path) in message


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every file")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    with pytest.raises(UserError, match="permission"):
        find_files(str(path))


def test_a_separator_may_be_spelled_with_backslashes():
    assert separator_bytes(r"\n\n") == separator_bytes("\n\n") == b"\n\n"
    assert separator_bytes(r"\r\n\t") == b"\r\n\t"
    assert separator_bytes("<|endoftext|>é") == "<|endoftext|>é".encode()
    assert separator_bytes("") == b""
