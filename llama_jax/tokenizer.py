"""SentencePiece tokens: load a model, train one with LLaMA 2's settings, encode, decode, stream."""

import collections
import functools
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece as spm

from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import location, user_errors

# SentencePiece reads a string as a whole; longer texts are encoded in parts of about this many characters.
PART_CHARS = 32_768
# SentencePiece's mark of a space.
SPACE_MARK = "\u2581"
# SentencePiece's trainer passes over sentences longer than this many bytes (trainer_spec.max_sentence_length).
MAX_SENTENCE_BYTES = 4192


class Tokenizer:
    """A SentencePiece model, with LLaMA 2's use of BOS and EOS.

    Raises UserError where ``model_path`` is not a SentencePiece model.
    """

    def __init__(self, model_path: str | Path):
        self.model_path = location(model_path)
        with user_errors(self.model_path, "read"):
            try:
                self.model_bytes = self.model_path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise UserError(f"{model_path}: expected a SentencePiece model, found no such file") from None
        self._sp = spm.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(self.model_bytes)
            self.vocab_size: int = self._sp.vocab_size()
        except (RuntimeError, TypeError, UnicodeDecodeError):  # the last, where it quotes what it found
            raise UserError(
                f"{model_path}: expected a SentencePiece model (tokenizer.model), found {_kind(self.model_bytes)}"
            ) from None
        if self.vocab_size == 0:
            raise UserError(f"{model_path}: expected a SentencePiece model, found an empty one")
        try:
            self._sp.id_to_piece(list(range(self.vocab_size)))
            self._sp.decode([max(self._sp.unk_id(), 0)])
        except UnicodeDecodeError as error:
            raise UserError(
                f"{model_path}: expected pieces in UTF-8, found {quoted(error.object)}; the file is damaged, use another copy"
            ) from None
        # A model without BOS, as T5's, has EOS stand between documents instead.
        bos, eos = self._sp.bos_id(), self._sp.eos_id()
        if bos < 0 and eos < 0:
            raise UserError(f"{model_path}: expected a vocabulary with BOS or EOS, found neither")
        self.bos_id: int = bos if bos >= 0 else eos
        self.eos_id: int = eos if eos >= 0 else bos
        self.unk_id: int = self._sp.unk_id()
        # SentencePiece puts a space before what it reads, and some models strip white space. So a later part of a document is
        # read behind what stood before it, a newline or else a letter, whose ids are cut off; see encode_parts.
        self._marks = next((marks for marks in _MARKS if self._reads_whole(*marks)), ("", ""))

    def piece(self, token_id: int) -> str:
        """The text by which the vocabulary lists a token: "<s>" for BOS."""
        return self._sp.id_to_piece(token_id)

    def score(self, token_id: int) -> float:
        """A token's score: of a BPE vocabulary, minus its rank."""
        return self._sp.get_score(token_id)

    def is_text(self, token_id: int) -> bool:
        """Whether a token stands for text: it is no control, no unknown, and no byte."""
        sp = self._sp
        return not (
            sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_byte(token_id) or sp.is_unused(token_id)
        )

    @functools.cached_property
    def byte_ids(self) -> list[int]:
        """The tokens that stand for single bytes of UTF-8."""
        return [i for i in range(self._sp.vocab_size()) if self._sp.is_byte(i)]

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of ``text``; ``decode`` gives it back, but for U+2581, SentencePiece's own mark of a space.

        Lone surrogates, which no UTF-8 text holds, become U+FFFD.
        """
        parts = list(split_text(clean(text)))
        rows = self.encode_parts(parts, [True] + [False] * (len(parts) - 1))
        return [self.bos_id] * bos + [i for row in rows for i in row] + [self.eos_id] * eos

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, several times as fast where they are many and short."""
        short = [clean(text) for text in texts if len(text) <= PART_CHARS]
        rows = iter(self._sp.encode(short, num_threads=os.cpu_count() or 1))
        return [[self.bos_id, *next(rows)] if len(text) <= PART_CHARS else self.encode(text) for text in texts]

    def encode_parts(self, parts: Sequence[str], starts: Sequence[bool], num_threads: int = 1) -> list[list[int]]:
        """Token ids of each part of a document or of several; ``starts``: the part begins its document.

        Joined, a document's rows are the ids of its whole text, where the parts are cut as ``split_text`` cuts.
        """
        marks = ["" if start else self._mark(part) for part, start in zip(parts, starts, strict=True)]
        rows = self._sp.encode([mark + part for mark, part in zip(marks, parts, strict=True)], num_threads=num_threads)
        cuts = {mark: len(self._sp.encode(mark)) for mark in {*marks}}
        return [row[cuts[mark] :] if mark else row for row, mark in zip(rows, marks, strict=True)]

    def decode_part(self, ids: Sequence[int], start: bool) -> str:
        """The text of a part as ``encode_parts`` read it, without what is unknown; ``start``: the part begins its document."""
        known = [i for i in ids if i != self.unk_id]
        if start or not self._marks[0]:
            return self._sp.decode(known)
        mark = [i for i in self._sp.encode(self._marks[0]) if i != self.unk_id]
        return self._sp.decode(mark + known).removeprefix(self._sp.decode(mark))

    def _mark(self, part: str) -> str:
        return self._marks[part.startswith(" ")]

    def _reads_whole(self, behind_line: str, behind_word: str) -> bool:
        """Whether parts that are read behind these marks, as ``encode_parts`` does, have the ids that they have in a whole text."""
        probes = [("a", " b"), ("a\n", "b"), ("the fox\n", "owl saw"), ("1\n", "\u4e2d"), ("a.\n", "Zebra  x")]
        for before, part in probes:
            mark = behind_word if part.startswith(" ") else behind_line
            row = self._sp.encode(mark + part)[len(self._sp.encode(mark)) :]
            if self._sp.encode(before) + row != self._sp.encode(before + part):
                return False
        return True

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ``ids``; BOS, EOS and other controls have none, bytes that are not UTF-8 become U+FFFD.

        Raises UserError on an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id: expected 0 to {self.vocab_size - 1}, found {i}")
        return self._sp.decode(ids)

    def stream(self, prompt_ids: Sequence[int]) -> "TextStream":
        """A stream of the text that follows ``prompt_ids``."""
        return TextStream(self, prompt_ids)


def _kind(content: bytes) -> str:
    """What a file is that is no SentencePiece model."""
    first = content[:200].lstrip()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", first):
        return "a vocabulary of tiktoken, as LLaMA 3 has, which is not read; take a model that has SentencePiece's, such as LLaMA 2"
    if first.startswith(b"{"):
        return "JSON, such as Hugging Face's tokenizer.json, which is not read; give the tokenizer.model"
    if first.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with git lfs pull"
    if first.startswith(b"<"):
        return "an HTML page, as failed downloads leave behind; download it again"
    return "something else"


class TextStream:
    """Text of a growing list of tokens, piece by piece: no half characters, and every space in its place.

    What all pieces join to equals decode(prompt + tokens) with decode(prompt) cut off its front.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        # The last tokens, as far back as their text depends on: those before them, whose text is shown, and those after.
        self._ids = list(prompt_ids)
        self._before = len(self._ids)
        self._shown = len(tokenizer.decode(self._ids))  # characters of the text of ``_ids``

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; the text that is now certain, possibly empty."""
        self._ids += [int(i) for i in ids]
        text = self._tokenizer.decode(self._ids)
        # A trailing U+FFFD may be the beginning of a character whose last bytes are still to come.
        new = self._advance(text, len(text.rstrip("\ufffd")))
        if self._shown == len(text):
            self._forget()
        return new

    def flush(self) -> str:
        """The text that was held back, at the end."""
        text = self._tokenizer.decode(self._ids)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _forget(self) -> None:
        """Drop the tokens that the text to come does not depend on, now that all text is shown: reading them again at every token
        would take a time that grows with the square of the text.

        A token's text depends on whether it is the first one that has any.
        """
        kept = self._ids[self._before :]
        if shown := len(self._tokenizer.decode(kept)):
            self._ids, self._before, self._shown = kept, len(kept), shown


def clean(text: str) -> str:
    """``text`` with what UTF-8 cannot hold (lone surrogates, as of undecodable arguments) replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


# What a part of a document may be read behind: where a line ended before it, and where a word did.
_MARKS = (("\n", "\n"), ("a\n", "a"))
_SURROGATE = re.compile("[\ud800-\udfff]")
# A border that no token crosses: behind a newline, or before a space, where what follows is no white space.
_BORDER = re.compile(r"(?<=\n)(?=[^\s▁])|(?<=[^\s▁])(?= [^\s▁])")


def split_text(text: str, part_chars: int = PART_CHARS) -> Iterator[str]:
    """``text`` in consecutive parts of about ``part_chars`` characters, cut where no token reaches across.

    A text without such a border (a single enormous word) is cut at four times that length.
    """
    start = 0
    while len(text) - start > part_chars:
        border = _BORDER.search(text, start + part_chars, min(len(text), start + 4 * part_chars))
        end = border.start() if border else min(len(text), start + 4 * part_chars)
        yield text[start:end]
        start = end
    yield text[start:]


def train_tokenizer(sentences: Iterable[str], vocab_size: int, output: Path) -> Tokenizer:
    """Train a BPE vocabulary with LLaMA 2's settings and save it as ``output``.

    sentences: lines of text, of any length. The vocabulary comes out smaller than ``vocab_size`` where the text has too
    few different pairs to fill it. Raises UserError where there is no text.
    """
    lines = _spell_rare_characters(list(_short_lines(sentences)), vocab_size)
    if not lines:
        raise UserError("data.filepath: expected text to train a vocabulary on, found nothing but white space")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=0.99995,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        max_sentence_length=MAX_SENTENCE_BYTES,
        num_threads=1,
        minloglevel=2,
    )
    write_atomically(output, model.getvalue())
    return Tokenizer(output)


def _spell_rare_characters(lines: list[str], vocab_size: int) -> list[str]:
    """Lines cut at the characters that are too rare for a piece of their own, and will be spelled in bytes.

    Single characters get at most half of the room that the 256 bytes and the three controls leave in the vocabulary.
    """
    counts = collections.Counter(char for char in itertools.chain.from_iterable(lines) if char != " ")
    room = max(1, (vocab_size - 259) // 2)
    marks = [char for char, _ in counts.most_common() if not char.isspace()]
    # White space other than the space takes what is left: the space has a piece of its own.
    white = [char for char, _ in counts.most_common() if char.isspace()]
    left = vocab_size - 260 - min(room, len(marks))
    rare = marks[room:] + white[left:]
    if not rare:
        return lines
    border = {ord(char): "\n" for char in rare}
    return [part for line in lines for part in line.translate(border).split("\n") if part.strip()]


def _short_lines(sentences: Iterable[str]) -> Iterator[str]:
    """Lines that the trainer takes: neither empty nor longer than it reads, without NUL, which it refuses."""
    step = MAX_SENTENCE_BYTES // 4  # a character has 4 bytes at most
    for sentence in sentences:
        for line in clean(sentence).replace("\0", " ").split("\n"):
            yield from (line[i : i + step] for i in range(0, len(line), step) if line[i : i + step].strip())
