"""Tokenizers of every kind behind one class: load, encode, decode, stream. Training is SentencePiece's.

The readers of the kinds are in tokenizers/.
"""

import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError, quoted
from llama_jax.fields import given_path
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import children
from llama_jax.tokenizers import files as of_files
from llama_jax.tokenizers import tiktoken
from llama_jax.tokenizers.borders import PART_CHARS, split_text
from llama_jax.tokenizers.files import MODEL, TABLE, Files
from llama_jax.tokenizers.reader import Added, Reader, clean
from llama_jax.tokenizers.sentencepiece import SentencePieceReader
from llama_jax.tokenizers.training import trained_model
from llama_jax.words import SPACE_MARK

__all__ = [
    "PART_CHARS",
    "SPACE_MARK",
    "TextStream",
    "Tokenizer",
    "clean",
    "split_text",
    "train_tokenizer",
    "trained_model",
]


class Tokenizer:
    """A tokenizer of any kind, with LLaMA's use of BOS and EOS.

    ``path`` is a tokenizer.model (SentencePiece's, or LLaMA 3's of tiktoken), a tokenizer.json, or a folder with these.
    Raises UserError if it is none of them, or if nothing says which token ends a text.

    Example:
        tokenizer = Tokenizer("tokenizer.model")
        tokenizer.decode(tokenizer.encode("Once upon a time"))  # "Once upon a time"
    """

    def __init__(self, path: str | Path):
        self._open(of_files.read_files(given_path(path, "tokenizer")), None)

    def _open(self, files: Files, rows: int | None) -> None:
        """Open the files. Added tokens whose ids are not below ``rows`` are left out."""
        self._files = files
        self.place, self.model_path = files.place, files.path
        # What a checkpoint keeps, by name.
        self.files: Mapping[str, bytes] = files.contents
        # Lines about what was decided, which commands print.
        self.notes: list[str] = []
        self._reader = self._read(files, rows)
        self.vocab_size: int = self._reader.vocab_size
        if rows is not None and self.vocab_size > rows:
            raise UserError(
                f"{self.model_path}: expected up to {rows:,} tokens, one per row of the model's embeddings, found {self.vocab_size:,}; "
                "give the model's own tokenizer"
            )
        self.unk_id: int = self._reader.unk_id
        # The ids of control tokens and added tokens by their texts, such as "<s>".
        self.specials: Mapping[str, int] = self._reader.specials
        self.bos_id, self.eos_id, self.adds_bos = self._ends()

    def _read(self, files: Files, rows: int | None) -> Reader:
        more = [token for token in of_files.more_tokens(files) if rows is None or token.id < rows]
        flagged = of_files.flagged_tokens(files)
        name = str(files.path)
        if files.main == TABLE:
            return _table_reader(files.tables[TABLE], name, more, rows, of_files.named_specials(files), flagged)
        model = files.contents[MODEL]
        if tiktoken.is_tiktoken(model):
            return _table_reader(tiktoken.table_of(model, name), name, [], rows)
        named = of_files.named_specials(files)
        listed = [*of_files.added_of(files.tables.get(TABLE, {})), *flagged]
        listed = [token for token in listed if rows is None or token.id < rows]
        return SentencePieceReader(model, name, [*listed, *more], *of_files.behind_specials(files), named=named)

    def _ends(self) -> tuple[int, int, bool]:
        """Return the ids of BOS and EOS, and whether BOS begins a text."""
        reader, files = self._reader, self._files
        self.notes += self._lost()
        if isinstance(reader, SentencePieceReader):
            # A model without BOS (T5's, for example) separates documents with EOS instead.
            bos, eos = reader.bos_id, reader.eos_id
            own = {"bos": bos if bos >= 0 else eos, "eos": eos if eos >= 0 else bos}
            ids = {text: i for text, i in reader.specials.items() if i >= reader.own_size}
            named, told = of_files.named_ids(files, ids)
            self.notes += told
            ends = own | named
            self.notes += of_files.other_ends(files, [reader.piece(ends["bos"])])
            return ends["bos"], ends["eos"], True
        if files.main == MODEL:
            return reader.specials[tiktoken.BOS], reader.specials[tiktoken.EOS], True
        named, told = of_files.named_ids(
            files, {reader.piece(i): i for i in range(reader.vocab_size)} | {**reader.specials}
        )
        self.notes += told
        if "eos" not in named:
            raise UserError(
                f"{files.path}: expected {of_files.CONFIG} or {of_files.MAP} beside it to name eos_token, one of the tokenizer's, found none "
                "that does; copy the model's own files there"
            )
        if "bos" not in named:
            self.notes.append("the tokenizer has no BOS: a text begins without, and EOS stands between documents")
            self.notes += of_files.other_ends(files, [])
            return named["eos"], named["eos"], False
        first = self._reader.piece(named["bos"])
        begins = of_files.begins_with_bos(files, first)
        if begins is False:
            self.notes.append(f"a text begins without BOS, as {of_files.said_by(files)} says")
        if begins is None and of_files.around(files) == ([], []):
            self.notes.append(
                f"{files.path.name} does not say that BOS begins a text, as it does here and in Meta's code; add_bos_token in {of_files.CONFIG} decides"
            )
        else:
            self.notes += of_files.other_ends(files, [] if begins is False else [first])
        return named["bos"], named["eos"], begins is not False

    def _lost(self) -> list[str]:
        """Return lines about what the files say of tokens and their text, and what is not done here."""
        if not self._files.tables:
            return []

        def is_known(text: str) -> bool:
            return text in self.specials or any(self.piece(i) == text for i in range(self.vocab_size))

        told = of_files.without_id(self._files, is_known)
        if self._files.main != TABLE:
            return told
        return told + of_files.decoding_told(self._files) + of_files.pipeline_told(self._files)

    def within(self, rows: int) -> "Tokenizer":
        """Return the tokenizer of a model with ``rows`` embeddings: without added tokens that have none.

        They are text, since no model could read them. Raises UserError if other tokens have no row.
        """
        if self.vocab_size <= rows:
            return self
        fitting = Tokenizer.__new__(Tokenizer)
        fitting._open(self._files, rows)
        lost = sorted(self.specials.keys() - fitting.specials.keys())
        shown = ", ".join(quoted(text, 30) for text in lost[:4])
        fitting.notes.append(
            f"{len(lost):,} added token{'s'[: len(lost) > 1]} ({shown}) without a row in the model: {'they are' if len(lost) > 1 else 'it is'} text"
        )
        return fitting

    @functools.cached_property
    def digest(self) -> str:
        """The digest of what decides the ids. Of a SentencePiece model alone it is the file's SHA-256."""
        main = hashlib.sha256(self.model_bytes).hexdigest()
        added = sorted(of_files.more_tokens(self._files))
        if isinstance(self._reader, SentencePieceReader):
            added = sorted({*added, *of_files.added_of(self._files.tables.get(TABLE, {}))})
            added = [token for token in added if token.id >= self._reader.own_size or not token.special]
        if self._files.main == MODEL and not added:
            return main
        # The flag normalized came later: of what earlier versions have encoded, the digest must stay.
        about = [main, self.bos_id, self.eos_id, self.adds_bos, [list(token[:6]) for token in added]]
        if self._files.main == TABLE:
            own = {token.text: token.normalized for token in of_files.added_of(self._files.tables[TABLE])}
            others = [token.text for token in added if token.normalized != own.get(token.text, False)]
            about += [others] if others else []
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    @property
    def is_sentencepiece(self) -> bool:
        """Whether the vocabulary is SentencePiece's."""
        return isinstance(self._reader, SentencePieceReader)

    @property
    def begins_elsewhere(self) -> bool | None:
        """Whether transformers begins a text with BOS, by the files. None: they do not say."""
        files = self._files
        if TABLE in files.tables:
            return of_files.around(files)[0][:1] == [self.piece(self.bos_id)]
        return of_files.begins_with_bos(files, self.piece(self.bos_id))

    @property
    def model_bytes(self) -> bytes:
        """The content of the file that holds the vocabulary."""
        return self.files[self._files.main]

    def piece(self, token_id: int) -> str:
        """Return a token's entry in the vocabulary, for example "<s>" for BOS, or "" for an id without a token."""
        return self._reader.piece(token_id)

    def score(self, token_id: int) -> float:
        """Return a token's score in a SentencePiece model. In a BPE vocabulary it is minus the token's rank."""
        assert isinstance(self._reader, SentencePieceReader)
        return self._reader.score(token_id)

    def is_text(self, token_id: int) -> bool:
        """Return whether a token stands for text: it is not a special token, unknown, unused or a byte."""
        return self._reader.is_text(token_id)

    def absent(self, rows: int) -> np.ndarray:
        """Say of each of a model's rows whether it has no token: bool [rows]. Such a row is padding."""
        known = self._known_ids
        return ~np.pad(known, (0, max(0, rows - len(known))))[:rows]

    @functools.cached_property
    def _known_ids(self) -> np.ndarray:
        return np.array([self.piece(i) != "" for i in range(self.vocab_size)], bool)

    @property
    def divides(self) -> bool:
        """Whether a special token always divides a text, so that each side is encoded without a look at the other."""
        return self._reader.divides

    @property
    def byte_ids(self) -> Sequence[int]:
        """The ids of the tokens that stand for single bytes, which are no characters of their own."""
        return self._reader.byte_ids

    def encode(self, text: str, bos: bool = True, eos: bool = False, specials: bool = False) -> list[int]:
        """Return the token ids of ``text``, with BOS first and EOS last if asked.

        ``specials``: the texts of special tokens that stand in ``text``, such as "<s>", become these tokens. Otherwise
        they are text. Tokens that a fine-tune added as ordinary ones are always found, as by transformers. A tokenizer
        whose files say so (``adds_bos``) begins no text with BOS. ``decode`` restores the text, except what the
        tokenizer normalizes: SentencePiece uses U+2581 for a space. Lone surrogates, which UTF-8 cannot represent,
        become U+FFFD. Raises UserError if ``text`` is no string, or another argument is neither True nor False.
        """
        if not isinstance(text, str):
            raise UserError(f"text: expected a string, found {quoted(text)}; encode one text at a time")
        for name, value in (("bos", bos), ("eos", eos), ("specials", specials)):
            if not isinstance(value, bool | np.bool_):
                raise UserError(f"{name}: expected True or False, found {quoted(value)}")
        ids = self._reader.encode(clean(text), bool(specials))
        return self._begun(ids, bos) + ([self.eos_id] if eos else [])

    def _begun(self, ids: list[int], bos: bool = True) -> list[int]:
        """Return a text's ids with BOS first, if asked and if the tokenizer does so. An empty text is BOS alone."""
        return [self.bos_id, *ids] if bos and (self.adds_bos or not ids) else ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``encode(text)`` for each text. It is several times faster for many short texts.

        Raises UserError if ``texts`` is something else than a list of strings, or another iterable with an order.
        """
        if isinstance(texts, str | bytes | Mapping | AbstractSet) or not isinstance(texts, Iterable):
            raise UserError(f"texts: expected a list of strings, found {quoted(texts)}; put the texts in a list")
        texts = list(texts)
        if other := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"texts: expected strings, found {quoted(other[0])}")
        whole = {i for i, text in enumerate(texts) if len(text) > PART_CHARS}
        short = [clean(text) for i, text in enumerate(texts) if i not in whole]
        rows = iter(self.encode_parts(short, [True] * len(short)))
        return [self.encode(text) if i in whole else self._begun(next(rows)) for i, text in enumerate(texts)]

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
        return self._reader.encode_batch(parts, starts)

    def decode_part(self, ids: Sequence[int], start: bool) -> str:
        """Return the text of the ids of one part from ``encode_parts``, without unknown tokens.

        ``start`` says whether the part begins its document.
        """
        return self._reader.decode_part(ids, start)

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """Return the text of token ids. Control tokens such as BOS and EOS have none; invalid UTF-8 becomes U+FFFD.

        ``specials``: the texts of control tokens are shown. Raises UserError on an id outside the vocabulary, and on
        what is no list of ids, or another iterable of them with an order.
        """
        given = ids
        try:
            if isinstance(given, str | bytes | bytearray | Mapping | AbstractSet):
                raise TypeError
            ids = [*map(_whole, given)]
        except TypeError:
            raise UserError(f"token ids: expected whole numbers, found {quoted(given)}") from None
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"token id: expected 0 to {self.vocab_size - 1}, found {i}")
        return self._reader.decode(ids, specials)

    def stream(self, prompt_ids: Sequence[int]) -> "TextStream":
        """Return a stream that decodes the tokens after ``prompt_ids`` piece by piece."""
        return TextStream(self, prompt_ids)


def _whole(number: object) -> int:
    """Return a whole number as an int. Raises TypeError if it is none; True and False are none."""
    if isinstance(number, bool):
        raise TypeError
    return operator.index(number)  # type: ignore[arg-type]


def keep_tokenizer(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """Keep a tokenizer at ``path``, a run's or token folder's tokenizer.model, or its files beside it, by their names.

    Raises UserError if other files of a tokenizer are there, which would be read with these.
    """
    folder, names = path.parent, tokenizer.files.keys()
    if others := sorted(name for name in {*of_files.KEPT} - names if (folder / name).exists()):
        raise UserError(
            f"{folder}: expected no files of another tokenizer, found {', '.join(others)}; delete them, or choose another folder"
        )
    for name, content in tokenizer.files.items():
        write_atomically(path if [*names] == [MODEL] else folder / name, content)
    return tokenizer


def is_kept(path: Path) -> bool:
    """Return whether ``keep_tokenizer`` has kept a tokenizer at ``path``."""
    return path.exists() or (path.parent / TABLE).exists()


def kept_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer that ``keep_tokenizer`` has kept at ``path``. Raises UserError if there is none."""
    found = {child.name for child in children(path.parent)}
    return Tokenizer(path.parent if found & {*of_files.KEPT[1:]} else path)


def _table_reader(
    table: Mapping[str, object],
    name: str,
    more: Sequence[Added],
    rows: int | None,
    named: Sequence[str] = (),
    flagged: Sequence[Added] = (),
) -> Reader:
    """Return the reader of a tokenizer.json's table. The library is imported late, because not all need it."""
    from llama_jax.tokenizers.table import check_table
    from llama_jax.tokenizers.table_reader import TableReader

    found = dict(table)
    check_table(found, name)
    if rows is not None:
        listed = found.get("added_tokens")
        found["added_tokens"] = [token for token in listed if token["id"] < rows] if isinstance(listed, list) else None
    return TableReader(found, name, more, named, flagged)


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


def train_tokenizer(sentences: Iterable[str], vocab_size: int, output: Path) -> Tokenizer:
    """Train a vocabulary (``trained_model``), save it as ``output`` and return its tokenizer.

    Raises UserError if ``sentences`` is one text, whose characters would be taken for sentences.
    """
    if isinstance(sentences, str | bytes):
        raise UserError(f"sentences: expected a list of strings, found {quoted(sentences)}; put the text in a list")
    write_atomically(output, trained_model(sentences, vocab_size))
    return Tokenizer(output)
