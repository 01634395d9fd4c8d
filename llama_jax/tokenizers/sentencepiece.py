"""The reader of SentencePiece's tokenizer.model, and of tokens that files add to it."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import sentencepiece as spm

from llama_jax.errors import UserError, quoted
from llama_jax.tokenizers import borders
from llama_jax.tokenizers.reader import Added, Finder
from llama_jax.words import NOTHING, Encoded, Words, can_encode, encode_whole

# Once so many characters were encoded, the word encoder is made. With fewer, SentencePiece is done before that.
WORTH_WORDS = 1 << 18
# Candidate marks to encode a part after; see borders.find_marks.
MARKS = (("\n", "\n"), ("a\n", "a"))


class SentencePieceReader:
    """Reads a SentencePiece model, with tokens that other files add to it.

    Arguments:
        model: the content of tokenizer.model.
        name: the file's path, for errors.
        added: tokens beyond the model's own, and flags of those that it has.
        named: texts that other files name as special tokens. Pieces of the model with these texts are such tokens.
        joined: whether text behind a special token goes on without a space mark before its first word. Otherwise it
            begins as a text of its own does, as in Meta's code.
        spares: whether it does so where it begins with a space.

    Raises UserError if ``model`` is no SentencePiece model.
    """

    def __init__(
        self,
        model: bytes,
        name: str,
        added: Sequence[Added] = (),
        joined: bool = False,
        spares: bool = False,
        named: Sequence[str] = (),
    ):
        self._model, self._joined, self._spares = model, joined, spares
        self._sp = loaded(model, name)
        self.own_size: int = self._sp.vocab_size()
        ids = [*range(self.own_size)]
        special = np.array(self._sp.is_control(ids)) | np.array(self._sp.is_unknown(ids))
        own = {self._sp.id_to_piece(i): i for i in np.flatnonzero(special).tolist()}
        texts = dict.fromkeys([*named, *(token.text for token in added if token.special)])
        pieces = {text: i for text in texts if self._sp.id_to_piece(i := self._sp.piece_to_id(text)) == text}
        # Ordinary pieces that the files take for special tokens.
        self._taken = {*pieces.values()} - {*own.values()}
        own |= pieces
        # A token of the model that is listed among the added ones is found as these are.
        added = [token for token in added if token.id >= self.own_size or own.get(token.text) == token.id]
        self._added = {text: Added(i, text) for text, i in own.items()} | {token.text: token for token in added}
        self._pieces = {token.id: token.text for token in self._added.values() if token.id >= self.own_size}
        if len(self._added) != len({token.id for token in self._added.values()}):
            raise UserError(f"{name}: expected one added token per id in the files next to it, found two; delete one")
        self.vocab_size = max([self.own_size, *(i + 1 for i in self._pieces)])
        self.unk_id: int = self._sp.unk_id()
        self.specials: Mapping[str, int] = {text: token.id for text, token in self._added.items()}
        self._hidden = {token.id for token in self._added.values() if token.special}
        self.divides = not any(token.lstrip or token.rstrip or token.single_word for token in self._added.values())
        self.always = always = [token for token in self._added.values() if not token.special]
        # By whether special tokens are asked for.
        self._finders = {True: Finder(self._added.values()), False: Finder(always) if always else None}
        self._encoded = 0  # characters, of all texts so far
        self._marks = borders.find_marks(self._sp.encode, MARKS) or borders.NO_MARKS

    @property
    def bos_id(self) -> int:
        """The id of the model's BOS. -1: it has none."""
        return self._sp.bos_id()

    @property
    def eos_id(self) -> int:
        """The id of the model's EOS. -1: it has none."""
        return self._sp.eos_id()

    def score(self, token_id: int) -> float:
        """Return a token's score. In a BPE vocabulary it is minus the token's rank."""
        return self._sp.get_score(token_id)

    def piece(self, token_id: int) -> str:
        """Return a token's entry; see Reader."""
        return self._sp.id_to_piece(token_id) if token_id < self.own_size else self._pieces.get(token_id, "")

    def is_text(self, token_id: int) -> bool:
        """Return whether a token stands for text; see Reader."""
        if token_id >= self.own_size:
            return token_id in self._pieces and token_id not in self._hidden
        sp = self._sp
        return not (
            token_id in self._taken
            or sp.is_control(token_id)
            or sp.is_unknown(token_id)
            or sp.is_byte(token_id)
            or sp.is_unused(token_id)
        )

    @functools.cached_property
    def byte_ids(self) -> list[int]:
        """The ids of the tokens that stand for single bytes of UTF-8."""
        return np.flatnonzero(self._sp.is_byte([*range(self.own_size)])).tolist()

    def encode(self, text: str, specials: bool) -> list[int]:
        """Return the ids of a text; see Reader."""
        return self._row(text, True, self._finders[specials])

    def _plain(self, text: str, start: bool) -> list[int]:
        parts = list(borders.split_text(text))
        starts = [start and i == 0 for i in range(len(parts))]
        return self._encode_parts(parts, starts).ids.tolist()

    def encode_batch(self, parts: Sequence[str], starts: Sequence[bool]) -> Encoded:
        """Return the ids of parts; see Reader."""
        if self._finders[False] is None:
            return self._encode_parts(parts, starts)
        rows = [self._row(part, start, self._finders[False]) for part, start in zip(parts, starts, strict=True)]
        ids = np.concatenate([NOTHING.ids, *(np.array(row, np.int32) for row in rows)])
        return Encoded(ids, np.array([len(row) for row in rows], np.int64))

    def _row(self, part: str, start: bool, finder: Finder | None) -> list[int]:
        """Return the ids of a part in which the tokens of ``finder`` may stand."""
        if finder is None:
            return self._plain(part, start)
        ids: list[int] = []
        for token, stretch in finder.split(part):
            goes_on = bool(ids) and (self._joined or (self._spares and stretch.startswith(" ")))
            ids += [token.id] if token is not None else self._plain(stretch, (start or bool(ids)) and not goes_on)
        return ids

    def _encode_parts(self, parts: Sequence[str], starts: Sequence[bool]) -> Encoded:
        return borders.encode_with_marks(
            self._encode, lambda mark: len(self._sp.encode(mark)), self._marks, parts, starts
        )

    def _encode(self, texts: list[str]) -> Encoded:
        if "_words" not in self.__dict__:
            self._encoded += sum(map(len, texts))
            if self._encoded < WORTH_WORDS:
                return encode_whole(self._sp, texts)
        return self._words.encode(texts) if self._words else encode_whole(self._sp, texts)

    @functools.cached_property
    def _words(self) -> Words | None:
        return Words(self._model) if can_encode(self._model) else None

    def decode(self, ids: Sequence[int], specials: bool) -> str:
        """Return the text of ids; see Reader."""
        shown = {*self._pieces, *(self._hidden if specials else ())}
        if not shown.intersection(ids):
            return self._sp.decode([i for i in ids if i < self.own_size and i not in self._taken])
        visible = [i for i in ids if specials or i not in self._hidden]
        text = ""
        for is_shown, group in itertools.groupby(visible, shown.__contains__):
            own = [*group]
            if is_shown:
                text += "".join(self.piece(i) for i in own)
            else:
                text += self._continued(own) if text and self._joined else self._sp.decode(own)
        return text

    def decode_part(self, ids: Sequence[int], start: bool) -> str:
        """Return the text of a part, without unknown tokens; see Reader."""
        known = [i for i in ids if i != self.unk_id]
        if start or not self._marks[0] or any(i >= self.own_size for i in known):
            return self.decode(known, False)
        return self._continued(known)

    def _continued(self, ids: list[int]) -> str:
        mark = [i for i in self._sp.encode(self._marks[0]) if i != self.unk_id]
        return self._sp.decode(mark + ids).removeprefix(self._sp.decode(mark))


def loaded(model: bytes, name: str) -> spm.SentencePieceProcessor:
    """Return a processor of a model. Raises a UserError that names ``name`` if it is none."""
    sp = spm.SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(model)
        size: int = sp.vocab_size()
    except (RuntimeError, TypeError, UnicodeDecodeError):  # UnicodeDecodeError if its message quotes invalid bytes
        raise UserError(f"{name}: expected a SentencePiece model (tokenizer.model), found {kind_of(model)}") from None
    if size == 0:
        raise UserError(f"{name}: expected a SentencePiece model, found an empty one")
    try:
        sp.id_to_piece(list(range(size)))
        sp.decode([max(sp.unk_id(), 0)])
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: expected pieces in UTF-8, found {quoted(error.object)}; the file is damaged, use another copy"
        ) from None
    if sp.bos_id() < 0 and sp.eos_id() < 0:
        raise UserError(f"{name}: expected a vocabulary with BOS or EOS, found neither")
    return sp


def kind_of(content: bytes) -> str:
    """Describe a file that is not a SentencePiece model, for an error message."""
    first = content[:200].lstrip()
    if first.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with git lfs pull"
    if first.startswith(b"<"):
        return "an HTML page, as failed downloads leave behind; download it again"
    return "something else"
