"""From files to documents: what is read, where it is cut, what is refused."""

import errno
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import documents as documents_module
from llama_jax.data import text as text_module
from llama_jax.data.documents import Reader
from llama_jax.data.text import Corpus, check_separator, separator_bytes
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


@settings(max_examples=100)
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
    wanted = [text.strip("\n") for text in content.decode().split(separator.decode())]
    assert [text for text, _ in whole] == [text for text in wanted if text]
    for cut in range(1, len(content)):
        corpus = corpus_of(tmp_path, content, separator=separator, train_size=cut / len(content) + 1e-9)
        assert corpus.cut == cut
        train, held_out = documents(corpus, "train"), documents(corpus, "eval")
        if train and not train[-1][1]:  # the cut goes through a document: put its halves together
            train, held_out = train[:-1], [(train[-1][0] + held_out[0][0], held_out[0][1]), *held_out[1:]]
        assert train + held_out == whole, cut


def test_a_long_line_and_one_that_is_not_utf_8_leave_the_other_lines_together(tmp_path):
    lines = [b"line %d" % i for i in range(3000)]
    lines[700], lines[2100] = b"x" * (text_module.PART_BYTES + 10), b"caf\xe9"
    corpus = corpus_of(tmp_path, b"\n".join(lines), separator=b"\n", train_size=1.0)
    assert documents(corpus, "train") == [(line.decode("utf-8", "replace"), True) for line in lines]
    groups = [parts for unit in corpus.units(1 << 24) for _, parts in corpus.groups(unit)]
    assert len(groups) < 40 and sum(map(len, groups)) >= 3000


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


# Each text in LF; a separator, as it is typed; and its documents.
SEPARATED = {
    "a marker on a line of its own": ("one\nmore\n<|x|>\ntwo\n<|x|>\n", "<|x|>", ["one\nmore", "two"]),
    "a marker within a line": ("one<|x|>two", "<|x|>", ["one", "two"]),
    "a marker at a line's end": ("one<|x|>\ntwo<|x|>\n", "<|x|>", ["one", "two"]),
    "blank lines around a marker": ("\n\none\n\n<|x|>\n \n\ntwo\n\n\n<|x|>", "<|x|>", ["one", "two"]),
    "white space on the marker's line": ("one\n  <|x|> \ntwo", "<|x|>", ["one", "two"]),
    "indentation and ends of lines stay": ("<|x|>\n    one  \n<|x|>\n\ttwo ", "<|x|>", ["    one  ", "\ttwo "]),
    "a marker with its line ends": ("one\n<|x|>\ntwo\n<|x|>\n", r"\n<|x|>\n", ["one", "two"]),
    "lines": ("one two\n\n  three\n   \nfour", r"\n", ["one two", "  three", "four"]),
    "paragraphs": ("one\nmore\n\ntwo\n\n\n\nthree\n", r"\n\n", ["one\nmore", "two", "three"]),
    "paragraphs, more line ends than a separator has": ("\n\n\none\n\n\ntwo\n", r"\n\n", ["one", "two"]),
    "nothing but separators and blank lines": ("\n\n \n\n\n", r"\n\n", []),
    "tabs": ("one\ttwo\t\tthree", r"\t", ["one", "two", "three"]),
    "a backslash": (r"one\two", r"\\", ["one", "two"]),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=ascii)
@pytest.mark.parametrize("name", SEPARATED)
def test_a_line_end_is_a_line_end_whatever_its_bytes_and_documents_begin_and_end_with_text(tmp_path, name, line_end):
    text, separator, wanted = SEPARATED[name]
    for typed in {separator, separator.replace(r"\n", r"\r\n"), separator.replace(r"\n", r"\r")}:
        content = text.replace("\n", line_end).encode()
        corpus = corpus_of(tmp_path, content, content, separator=separator_bytes(typed), train_size=1.0)
        found = [text for text, _ in documents(corpus, "train")]
        assert found == [text.replace("\n", line_end) for text in wanted] * 2
        assert corpus.separates()


def reference(text: str, separator: str) -> list[str]:
    """The documents of a text, by one regular expression."""
    line_end = r"(?:\r\n|\n|\r(?!\n))"
    pattern = line_end.join(map(re.escape, re.split(r"\r\n|\n|\r", separator)))
    trimmed = [re.sub(r"\A([ \t]*[\r\n])+|([\r\n][ \t]*)+\Z", "", found) for found in re.split(pattern, text)]
    return [found for found in trimmed if found.strip(" \t\r\n")]


@settings(max_examples=300)
@given(
    pieces=st.lists(
        st.sampled_from(["\n", "\r", "\r\n", " ", "\t", "a", "b c", "<x>", "<x", "é", "\n\n"]), max_size=60
    ),
    separator=st.sampled_from(["\n", "\n\n", "\r\n", "<x>", "\n<x>", "<x>\n", "\n<x>\n", "a", "x\n\n"]),
    part_bytes=st.integers(4, 9),
    buffer_bytes=st.integers(1, 20),
)
def test_documents_are_those_of_one_regular_expression_wherever_buffers_end(
    tmp_path_factory, pieces, separator, part_bytes, buffer_bytes
):
    text = "".join(pieces)
    corpus = corpus_of(tmp_path_factory.getbasetemp(), text.encode(), separator=separator.encode(), train_size=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PART_BYTES", part_bytes)
        patch.setattr(documents_module, "LOOK_BYTES", part_bytes)
        patch.setattr(documents_module, "BUFFER_BYTES", buffer_bytes)
        found = [text for text, _ in documents(corpus, "train")]
        occurs = corpus.separates()
    assert found == reference(text, separator)
    assert occurs == bool(
        re.search(r"(?:\r\n|\n|\r(?!\n))".join(map(re.escape, re.split(r"\r\n|\n|\r", separator))), text)
    )


@pytest.mark.parametrize("separator", ["\n", "<x>"])
def test_evaluation_begins_where_training_ended_whether_that_was_read_or_not(tmp_path, separator):
    content = separator.join(f"document {i}" for i in range(50)).encode()
    for train_size in (0.01, 0.3, 0.5, 0.77, 0.99):
        options = {"separator": separator.encode(), "train_size": train_size}
        after = corpus_of(tmp_path, content, **options)
        train = documents(after, "train")
        alone = documents(corpus_of(tmp_path, content, **options), "eval")
        assert documents(after, "eval") == alone == documents(after, "eval")
        whole = [text for text, _ in train + alone]
        if train and not train[-1][1]:
            whole[len(train) - 1 : len(train) + 1] = ["".join(whole[len(train) - 1 : len(train) + 1])]
        assert whole == content.decode().split(separator)


def test_a_text_without_a_separator_keeps_every_byte(tmp_path):
    text = "\r\n\n  one\r\n\r\rtwo \n\n"
    assert documents(corpus_of(tmp_path, text.encode(), train_size=1.0), "train") == [(text, True)]


@pytest.mark.parametrize(
    ("text", "separator", "hint"),
    [
        ("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", "<|endoftxt|>", r"'<\|endoftext\|>' \(2 times\)"),
        ("one\n<|endoftext|>\ntwo", "<|EndOfText|>", r"'<\|endoftext\|>' \(1 times\)"),
        ("one <eot> two", " <eot>\n", r"'<eot>' \(1 times\)"),
        ("one\n\ntwo\n", "\\n\\n", r"'\\n\\n' \(1 times\)"),
        ("one two", "\n", "leave it out where a file is a document"),
    ],
    ids=ascii,
)
def test_a_separator_that_occurs_nowhere_is_an_error_that_tells_what_does(tmp_path, text, separator, hint):
    corpus = corpus_of(tmp_path, text.encode(), b"more", separator=separator.encode())
    with pytest.raises(UserError, match=r"data\.separator: expected .* nowhere in my text; .*" + hint):
        check_separator(corpus, "my text")
    check_separator(corpus_of(tmp_path, b"more", text.encode()), "my text")
    check_separator(corpus_of(tmp_path, b"more", text.encode() + separator.encode(), separator=separator.encode()), "x")


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    corpus = corpus_of(tmp_path, b"the first file\n" * 10, b"the fox\n" * 500_000, train_size=1.0)
    parts = corpus.parts("train")
    next(parts), next(parts)
    os.truncate(tmp_path / "1.txt", 2_000_000)
    with pytest.raises(
        UserError, match=r"1\.txt: expected 4,000,000 bytes, as there were at first, found it cut to 2,000,000"
    ):
        list(parts)
    with pytest.raises(UserError, match=r"1\.txt: expected 4,000,000 bytes"):
        corpus.digest()


@pytest.mark.parametrize("number", ["EIO", "ESTALE"])
def test_a_disk_that_fails_in_the_middle_is_told_with_the_file(tmp_path, monkeypatch, number):
    corpus = corpus_of(tmp_path, b"one\n" * 10, b"two\n" * 10, train_size=1.0)
    original = Reader._read

    def fail(self, count):
        if self.path.name == "1.txt":
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        return original(self, count)

    monkeypatch.setattr(Reader, "_read", fail)
    for read in (corpus.digest, lambda: list(corpus.parts("train"))):
        with pytest.raises(UserError, match=r"1\.txt: expected a file that can be read, found: "):
            read()


def test_a_file_that_goes_away_is_named(tmp_path):
    corpus = corpus_of(tmp_path, b"one\n" * 10, b"two\n" * 10, train_size=1.0)
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.txt: expected a file that can be read, found: No such file"):
        list(corpus.parts("train"))


def test_a_text_that_is_written_meanwhile_is_told_and_one_that_is_only_appended_to_is_not(tmp_path):
    corpus = corpus_of(tmp_path, b"one\n" * 10)
    corpus.digest()
    with open(tmp_path / "0.txt", "ab") as file:
        file.write(b"more")
    corpus.check_unchanged()
    assert joined(corpus, "train") + joined(corpus, "eval") == "one\n" * 10
    (tmp_path / "0.txt").write_bytes(b"two\n" * 10)
    with pytest.raises(UserError, match=r"0\.txt: expected a file that nobody writes"):
        corpus.check_unchanged()


def test_a_file_with_many_bytes_that_are_not_utf8_is_refused_when_all_of_it_has_been_read(tmp_path):
    content = b"The fox went to the river.\n" * 1000
    for bad, refused in ((b"\xff" * 2, False), (b"\xff" * 100, False), (b"\xff" * 1000, True)):
        corpus = corpus_of(tmp_path, content, content + bad, content, train_size=1.0)
        corpus.any_bytes = False
        if refused:
            with pytest.raises(UserError, match=r"1\.txt: expected plain text in UTF-8, found 1,000 of 28,000 bytes"):
                list(corpus.parts("train"))
        else:
            list(corpus.parts("train"))
        corpus.any_bytes = True
        assert joined(corpus, "train").count("\ufffd") == len(bad)


def test_a_separator_may_be_spelled_with_backslashes():
    assert separator_bytes(r"\n\n") == separator_bytes("\n\n") == b"\n\n"
    assert separator_bytes(r"\r\n\t") == b"\r\n\t"
    assert separator_bytes(r"\\n \q") == rb"\n \q"
    assert separator_bytes("<|endoftext|>é") == "<|endoftext|>é".encode()
    assert separator_bytes("") == b""
