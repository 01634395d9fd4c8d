"""Conversations as training reads them: packed into sequences, with a mask of what counts in the loss.

Their folder is that of a text's tokens (tokens.py), whose documents they are. Of each split it also has a bit a token,
which says whether the token counts: counted-train.bin and counted-eval.bin, the first token in the lowest bit.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.data.manifest import Manifest, sha256
from llama_jax.data.packing import Packing, pack
from llama_jax.data.stream import Tokens, TokenStream
from llama_jax.data.tokens import TokenSet, document_starts, open_tokens
from llama_jax.errors import UserError

# The key of the settings in a manifest by which conversations are pairs of answers.
PAIRED = "objective"


def counted_name(split: str) -> str:
    """Return the name of the file that says which tokens of a split count."""
    return f"counted-{split}.bin"


class PackedRow(NamedTuple):
    """A sequence of T positions that holds conversations, each by itself; see batches.PackedBatch."""

    inputs: np.ndarray  # int32 [T]
    targets: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]
    segments: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]


class PairRow(NamedTuple):
    """A sequence of T positions that holds pairs of answers, each answer by itself; see batches.PairBatch."""

    inputs: np.ndarray  # int32 [T]
    targets: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]
    segments: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]
    reference: np.ndarray  # float32 [T]


class Conversations:
    """The conversations of a split.

    A conversation of n tokens takes n - 1 positions of a sequence: all but the last token are inputs, all but the first
    are targets. Which conversations share a sequence depends on their lengths alone, so it is the same in every epoch,
    process and run.
    """

    readers = 2

    def __init__(self, stream: TokenStream, starts: np.ndarray, counted: np.ndarray, all_count: bool):
        """``starts``: uint64 [conversations], their first tokens. ``counted``: uint8, eight tokens each.

        ``all_count``: every token that is predicted counts.
        """
        self.stream, self.size = stream, stream.size
        self._starts = np.append(starts.astype(np.int64), stream.size)
        self._counted, self.all_count = counted, all_count

    def __len__(self) -> int:
        return self.size

    @property
    def count(self) -> int:
        """The number of conversations."""
        return len(self._starts) - 1

    def conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a conversation, and which of them are of answers: int32 [n] and bool [n]."""
        start, stop = int(self._starts[number]), int(self._starts[number + 1])
        bits = np.unpackbits(self._counted[start // 8 : -(-stop // 8)], bitorder="little")
        first = start % 8
        return self.stream[start:stop].astype(np.int32), bits[first : first + stop - start].astype(bool)

    def asked(self, record: int) -> int:
        """Return the conversation that is asked about of a record, of which there are ``records``."""
        return record

    @property
    def records(self) -> int:
        """The number of records that the conversations are of."""
        return self.count

    def sequences(self, length: int) -> int:
        """Return the number of sequences of ``length`` positions that hold all conversations once."""
        return self.packing(length).windows

    def packing(self, length: int) -> Packing:
        """Return where each conversation is in sequences of ``length`` positions."""
        return self._packed(length)[0]

    def members(self, length: int, sequence: int) -> list[int]:
        """Return the conversations in a sequence, in their order there."""
        _, order, firsts = self._packed(length)
        return order[firsts[sequence] : firsts[sequence + 1]].tolist()

    @functools.lru_cache(maxsize=2)  # noqa: B019  a run has one or two of these objects, and keeps them
    def _packed(self, length: int) -> tuple[Packing, np.ndarray, np.ndarray]:
        return _with_members(pack(np.diff(self._starts) - 1, length))

    def padding(self, length: int) -> PackedRow | PairRow:
        """Return a sequence that holds nothing."""
        return padding(length)

    def row(self, length: int, sequence: int) -> PackedRow | PairRow:
        """Return a sequence of ``length`` positions. What no conversation fills is padding, a segment of its own."""
        row = padding(length)
        at = self._fill(row, self.members(length, sequence))
        if self.all_count:
            row.weights[:at] = 1
        row.positions[at:] = np.arange(length - at)
        return row

    def _fill(self, row: PackedRow | PairRow, numbers: Sequence[int]) -> int:
        """Write conversations to the beginning of a sequence, then padding. Return where the padding begins."""
        at = 0
        for segment, number in enumerate(numbers):
            ids, counted = self.conversation(number)
            end = at + len(ids) - 1
            row.inputs[at:end], row.targets[at:end] = ids[:-1], ids[1:]
            row.weights[at:end] = counted[1:]
            row.segments[at:end] = segment
            row.positions[at:end] = np.arange(end - at)
            at = end
        row.segments[at:] = len(numbers)
        return at


def _with_members(packing: Packing) -> tuple[Packing, np.ndarray, np.ndarray]:
    """Return a packing, its documents sorted by their windows, and the first of each window among these."""
    order = np.argsort(packing.window, kind="stable")
    return packing, order, np.searchsorted(packing.window[order], np.arange(packing.windows + 1))


def padding(length: int) -> PackedRow:
    """Return a sequence that holds nothing."""
    inputs, targets, segments = (np.zeros(length, np.int32) for _ in range(3))
    return PackedRow(inputs, targets, np.zeros(length, np.float32), segments, np.arange(length, dtype=np.int32))


class Pairs(Conversations):
    """The preferences of a split.

    Conversation 2i is the chosen answer of pair i with its prompt, and 2i + 1 the rejected one.
    A sequence has twice the positions of the model's context, ``length``. So a pair has room in one, whatever fits the
    model, and the loss of a pair is that of one row.
    """

    reference: np.ndarray | None = None
    """The log-likelihoods of the reference, float32 [sequences, positions]. None: they are not known yet."""

    @property
    def records(self) -> int:
        """The number of pairs."""
        return self.count // 2

    def asked(self, record: int) -> int:
        """Return the chosen answer of a pair."""
        return 2 * record

    @staticmethod
    def positions(length: int) -> int:
        """Return the number of positions of a sequence."""
        return 2 * length

    def most_pairs(self, length: int) -> int:
        """Return the most pairs of a sequence."""
        return int(np.bincount(self.packing(length).window).max()) if self.count else 0

    @functools.lru_cache(maxsize=2)  # noqa: B019  as above
    def _packed(self, length: int) -> tuple[Packing, np.ndarray, np.ndarray]:
        sizes = (np.diff(self._starts) - 1).reshape(-1, 2).sum(axis=1)
        return _with_members(pack(sizes, self.positions(length)))

    def padding(self, length: int) -> PairRow:
        """Return a sequence that holds nothing."""
        row = padding(self.positions(length))
        row.positions[length:] -= length
        return PairRow(*row, np.full(self.positions(length), np.nan, np.float32))

    def row(self, length: int, sequence: int) -> PairRow:
        """Return a sequence of pairs. Tokens of chosen answers have the weight 1, those of rejected ones -1."""
        row = self.padding(length)
        pairs = self.members(length, sequence)
        at = self._fill(row, [side for pair in pairs for side in (2 * pair, 2 * pair + 1)])
        row.weights[:at] *= np.where(row.segments[:at] % 2, -1, 1)
        row.positions[at:] = np.arange(len(row.positions) - at) % length
        return row if self.reference is None else row._replace(reference=self.reference[sequence])


# What a run reads: the tokens of a text, or conversations.
Stream = Tokens | Conversations


@dataclass(frozen=True)
class ChatTokens:
    """The conversations of both splits, as TokenSet has the two streams of a text."""

    train: Conversations
    eval: Conversations
    manifest: Manifest
    notes: tuple[str, ...] = ()
    _streams: TokenSet | None = None

    def bits_per_byte(self, loss: float, document_mask: bool = False) -> None:
        """Return None: of a conversation only some tokens count, which are not a text by themselves."""

    def check_in_background(self) -> None:
        """Check the tokens in a thread while they are used; see TokenSet."""
        if self._streams is not None:
            self._streams.check_in_background()


def open_chats(folder: Path) -> ChatTokens:
    """Open a folder of encoded conversations. Raises a UserError that names the file if one is missing or damaged."""
    tokens = open_tokens(folder)
    manifest = tokens.manifest
    assert manifest.chats is not None
    starts = document_starts(folder, manifest)
    all_count = manifest.chats.settings["loss_on"] == "all"
    kind = Pairs if PAIRED in manifest.chats.settings else Conversations
    splits = {}
    for split, stream in (("train", tokens.train), ("eval", tokens.eval)):
        path = folder / counted_name(split)
        raw = path.read_bytes() if path.is_file() else b""
        if sha256(raw) != manifest.sha256.get(path.name):
            raise UserError(
                f"{path}: expected the mask of these conversations, found another, or none; delete {folder} and make it again"
            )
        splits[split] = kind(stream, starts[split], np.frombuffer(raw, np.uint8), all_count)
    return ChatTokens(splits["train"], splits["eval"], manifest, _streams=tokens)


def runs_of(counted: np.ndarray) -> Iterator[tuple[bool, slice]]:
    """Yield the stretches of a conversation that count and those that do not, in order: bool [n]."""
    borders = [0, *(np.flatnonzero(np.diff(counted)) + 1).tolist(), len(counted)]
    for first, last in itertools.pairwise(borders):
        yield bool(counted[first]), slice(first, last)
