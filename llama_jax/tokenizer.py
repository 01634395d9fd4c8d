"""SentencePiece tokenizers: load, train with LLaMA 2's settings, encode, decode, stream."""

import collections
import functools
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece as spm

from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import location, user_errors
from llama_jax.words import SPACE_MARK, Encoded, Words, can_encode, encode_whole

# SentencePiece holds a whole string in memory, so longer texts are encoded in parts of about this many characters.
PART_CHARS = 32_768
# With less text than this, SentencePiece is done before the word encoder is made.
WORTH_WORDS = 1 << 18
# SentencePiece's trainer skips longer sentences (trainer_spec.max_sentence_length).
MAX_SENTENCE_BYTES = 4192


class Tokenizer:
    """A SentencePiece model, with LLaMA 2's use of BOS and EOS.

    Raises UserError if ``model_path`` is not a SentencePiece model.

    Example:
        tokenizer = Tokenizer("tokenizer.model")
        tokenizer.decode(tokenizer.encode("Once upon a time"))  # "Once upon a time"
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
        except (RuntimeError, TypeError, UnicodeDecodeError):  # UnicodeDecodeError if its message quotes invalid bytes
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
        # A model without BOS (T5's, for example) separates documents with EOS instead.
        bos, eos = self._sp.bos_id(), self._sp.eos_id()
        if bos < 0 and eos < 0:
            raise UserError(f"{model_path}: expected a vocabulary with BOS or EOS, found neither")
        self.bos_id: int = bos if bos >= 0 else eos
        self.eos_id: int = eos if eos >= 0 else bos
        self.unk_id: int = self._sp.unk_id()
        # SentencePiece prepends a space to its input, and some models strip white space. Each later part of a document
        # is therefore encoded after a mark (a newline or a letter) whose ids are then removed; see encode_parts.
        self._marks = next((marks for marks in _MARKS if self._reads_whole(*marks)), ("", ""))

    def piece(self, token_id: int) -> str:
        """Return a token's entry in the vocabulary, for example "<s>" for BOS."""
        return self._sp.id_to_piece(token_id)

    def score(self, token_id: int) -> float:
        """Return a token's score. In a BPE vocabulary it is minus the token's rank."""
        return self._sp.get_score(token_id)

    def is_text(self, token_id: int) -> bool:
        """Return whether a token stands for text: it is not a control token, unknown, unused or a byte."""
        sp = self._sp
        return not (
            sp.is_control(token_id) or sp.is_unknown(token_id) or sp.is_byte(token_id) or sp.is_unused(token_id)
        )

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that a checkpoint keeps, by name."""
        return {"tokenizer.model": self.model_bytes}

    @functools.cached_property
    def specials(self) -> Mapping[str, int]:
        """The ids of the control tokens by their texts, such as "<s>". In plain text these texts are text."""
        sp = self._sp
        return {sp.id_to_piece(i): i for i in range(self.vocab_size) if sp.is_control(i) or sp.is_unknown(i)}

    @functools.cached_property
    def byte_ids(self) -> list[int]:
        """The ids of the tokens that stand for single bytes of UTF-8."""
        return [i for i in range(self._sp.vocab_size()) if self._sp.is_byte(i)]

    def encode(self, text: str, bos: bool = True, eos: bool = False, specials: bool = False) -> list[int]:
        """Return the token ids of ``text``, with BOS first and EOS last if asked.

        ``specials``: the texts of special tokens that stand in ``text``, such as "<s>", become these tokens. Otherwise
        they are text. ``decode`` restores the text, except U+2581, which SentencePiece uses for a space. Lone
        surrogates, which UTF-8 cannot represent, become U+FFFD.
        """
        ids: list[int] = []
        for stretch in self._special_pattern.split(clean(text)) if specials else [clean(text)]:
            if specials and stretch in self.specials:
                ids.append(self.specials[stretch])
            else:
                parts = list(split_text(stretch))
                ids += self.encode_batch(parts, _starts(parts))[0].tolist()
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """A pattern of the special tokens' texts, the longest first."""
        return re.compile(f"({'|'.join(map(re.escape, sorted(self.specials, key=len, reverse=True)))})")

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``encode(text)`` for each text. It is several times faster for many short texts."""
        documents = [list(split_text(clean(text))) for text in texts]
        rows = iter(self.encode_parts(list(chain(*documents)), list(chain(*map(_starts, documents)))))
        return [[self.bos_id, *chain.from_iterable(itertools.islice(rows, len(parts)))] for parts in documents]

    def encode_parts(self, parts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        """Return the token ids of each part. The parts may belong to one document or to several.

        ``starts`` says of each part whether it begins its document. For parts cut by ``split_text``, the joined rows of
        a document equal the ids of its whole text.
        """
        ids, lengths = self.encode_batch(parts, starts)
        row_ids = iter(ids.tolist())
        return [list(itertools.islice(row_ids, length)) for length in lengths.tolist()]

    def encode_batch(self, parts: Sequence[str], starts: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """Return what ``encode_parts`` returns as arrays: all ids, int32 [tokens], and each part's number of ids.

        The numbers are int64 [parts]. This is the fastest way to encode much text.
        """
        marks = ["" if start else self._mark(part) for part, start in zip(parts, starts, strict=True)]
        ids, lengths = self._encode([mark + part for mark, part in zip(marks, parts, strict=True)])
        if any(marks):
            of_mark = {mark: len(self._sp.encode(mark)) for mark in {*marks}}
            cuts = np.minimum([of_mark[mark] for mark in marks], lengths)
            place = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # of each id in its part
            ids, lengths = ids[place >= np.repeat(cuts, lengths)], lengths - cuts
        return ids, lengths

    def _encode(self, texts: list[str]) -> Encoded:
        if "_words" not in self.__dict__ and sum(map(len, texts)) < WORTH_WORDS:
            return encode_whole(self._sp, texts)
        return self._words.encode(texts) if self._words else encode_whole(self._sp, texts)

    @functools.cached_property
    def _words(self) -> Words | None:
        return Words(self.model_bytes) if can_encode(self.model_bytes) else None

    def decode_part(self, ids: Sequence[int], start: bool) -> str:
        """Return the text of the ids of one part from ``encode_parts``, without unknown tokens.

        ``start`` says whether the part begins its document.
        """
        known = [i for i in ids if i != self.unk_id]
        if start or not self._marks[0]:
            return self._sp.decode(known)
        mark = [i for i in self._sp.encode(self._marks[0]) if i != self.unk_id]
        return self._sp.decode(mark + known).removeprefix(self._sp.decode(mark))

    def _mark(self, part: str) -> str:
        return self._marks[part.startswith(" ")]

    def _reads_whole(self, after_line: str, after_word: str) -> bool:
        """Return whether parts encoded after these marks get the same ids as in the whole text, for a few samples."""
        probes = [("a", " b"), ("a\n", "b"), ("the fox\n", "owl saw"), ("1\n", "\u4e2d"), ("a.\n", "Zebra  x")]
        for before, part in probes:
            mark = after_word if part.startswith(" ") else after_line
            row = self._sp.encode(mark + part)[len(self._sp.encode(mark)) :]
            if self._sp.encode(before) + row != self._sp.encode(before + part):
                return False
        return True

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Return the text of token ids. Control tokens such as BOS and EOS have none; invalid UTF-8 becomes U+FFFD.

        ``specials``: the texts of control tokens are shown. Raises UserError on an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id: expected 0 to {self.vocab_size - 1}, found {i}")
        if not specials:
            return self._sp.decode(ids)
        shown = set(self.specials.values())
        groups = itertools.groupby(ids, shown.__contains__)
        return "".join(
            "".join(map(self.piece, group)) if special else self._sp.decode([*group]) for special, group in groups
        )

    def stream(self, prompt_ids: Sequence[int]) -> "TextStream":
        """Return a stream that decodes the tokens after ``prompt_ids`` piece by piece."""
        return TextStream(self, prompt_ids)


def _kind(content: bytes) -> str:
    """Describe a file that is not a SentencePiece model, for an error message."""
    first = content[:200].lstrip()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", first):
        return "a tiktoken vocabulary, as LLaMA 3 has, which is not read; use a model with SentencePiece's, such as LLaMA 2"
    if first.startswith(b"{"):
        return "JSON, such as Hugging Face's tokenizer.json, which is not read; give the tokenizer.model"
    if first.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with git lfs pull"
    if first.startswith(b"<"):
        return "an HTML page, as failed downloads leave behind; download it again"
    return "something else"


class TextStream:
    """Decodes a growing list of tokens piece by piece, without split characters or misplaced spaces.

    The joined pieces equal decode(prompt + tokens) without the leading decode(prompt).
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        # The tokens that the coming text depends on: _before of them have their text shown, the rest follow.
        self._ids = list(prompt_ids)
        self._before = len(self._ids)
        self._shown = len(tokenizer.decode(self._ids))  # number of characters of the text of _ids that are shown

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens. Return the new text that no later token can change, possibly empty."""
        self._ids += [int(i) for i in ids]
        text = self._tokenizer.decode(self._ids)
        # A trailing U+FFFD may be the start of a character whose last bytes are still to come.
        new = self._advance(text, len(text.rstrip("\ufffd")))
        if self._shown == len(text):
            self._forget()
        return new

    def flush(self) -> str:
        """Return the text that was held back for more tokens. Call it at the end."""
        text = self._tokenizer.decode(self._ids)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _forget(self) -> None:
        """Drop the tokens that the coming text does not depend on, after all text is shown.

        Decoding all tokens again at each new one would take time quadratic in the length of the text. A token's text
        depends on whether it is the first token with any text, so at least one such token is kept.
        """
        kept = self._ids[self._before :]
        if shown := len(self._tokenizer.decode(kept)):
            self._ids, self._before, self._shown = kept, len(kept), shown


def clean(text: str) -> str:
    """Return ``text`` with lone surrogates (from undecodable arguments, say), which UTF-8 lacks, replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


# Candidate marks to encode a part after: (if a line ended before the part, if a word did).
_MARKS = (("\n", "\n"), ("a\n", "a"))
_SURROGATE = re.compile("[\ud800-\udfff]")
# A position that no token crosses: after a newline, or before a space, if no white space follows.
_BORDER = re.compile(rf"(?<=\n)(?=[^\s{SPACE_MARK}])|(?<=[^\s{SPACE_MARK}])(?= [^\s{SPACE_MARK}])")


def _starts(parts: Sequence[str]) -> list[bool]:
    """Say of each part of one document whether it begins the document."""
    return [i == 0 for i in range(len(parts))]


def split_text(text: str, part_chars: int = PART_CHARS) -> Iterator[str]:
    """Yield ``text`` in consecutive parts of about ``part_chars`` characters, cut where no token crosses.

    If there is no such place (a single enormous word), a part is cut at four times that length.
    """
    start = 0
    while len(text) - start > part_chars:
        border = _BORDER.search(text, start + part_chars, min(len(text), start + 4 * part_chars))
        end = border.start() if border else min(len(text), start + 4 * part_chars)
        yield text[start:end]
        start = end
    yield text[start:]


def train_tokenizer(sentences: Iterable[str], vocab_size: int, output: Path) -> Tokenizer:
    """Train a vocabulary (``trained_model``), save it as ``output`` and return its tokenizer."""
    write_atomically(output, trained_model(sentences, vocab_size))
    return Tokenizer(output)


def trained_model(sentences: Iterable[str], vocab_size: int) -> bytes:
    """Train a BPE vocabulary with LLaMA 2's settings. Return the content of its SentencePiece model.

    ``sentences`` are lines of text of any length. The vocabulary is smaller than ``vocab_size`` if the text has too few
    different pairs to fill it. Raises UserError if there is no text.
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
    return model.getvalue()


def _spell_rare_characters(lines: list[str], vocab_size: int) -> list[str]:
    """Split lines at characters too rare to get a vocabulary entry of their own, which are encoded as bytes.

    The 256 bytes and three control tokens come first; single characters get at most half of the remaining entries.
    """
    counts = collections.Counter(char for char in itertools.chain.from_iterable(lines) if char != " ")
    room = max(1, (vocab_size - 259) // 2)
    marks = [char for char, _ in counts.most_common() if not char.isspace()]
    # White space other than the space gets the entries that are left, minus one for the space itself.
    white = [char for char, _ in counts.most_common() if char.isspace()]
    left = vocab_size - 260 - min(room, len(marks))
    rare = marks[room:] + white[left:]
    if not rare:
        return lines
    border = {ord(char): "\n" for char in rare}
    return [part for line in lines for part in line.translate(border).split("\n") if part.strip()]


def _short_lines(sentences: Iterable[str]) -> Iterator[str]:
    """Yield lines that the trainer accepts: not empty, not too long, and without NUL."""
    step = MAX_SENTENCE_BYTES // 4  # a character has at most 4 bytes
    for sentence in sentences:
        for line in clean(sentence).replace("\0", " ").split("\n"):
            yield from (line[i : i + step] for i in range(0, len(line), step) if line[i : i + step].strip())
