"""The settings of a SentencePiece model, which the sentencepiece library reads but does not expose."""

import dataclasses
from collections.abc import Iterator
from typing import Any

BPE = 2  # TrainerSpec.ModelType
USER_DEFINED, UNUSED = 4, 5  # ModelProto.SentencePiece.Type


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a SentencePiece model besides its pieces."""

    model_type: int = 1
    byte_fallback: bool = False
    suffix: bool = False
    """Whether a word's space mark follows it."""
    charsmap: bool = False
    """Whether characters are normalized, for example by nmt_nfkc."""
    dummy_prefix: bool = True
    collapse: bool = True
    """Whether spaces at both ends and repeated spaces are dropped."""
    escape: bool = True

    @classmethod
    def of(cls, model: bytes) -> "Settings":
        """Read the settings from the bytes of a tokenizer.model."""
        parts: dict[int, list[bytes]] = {2: [], 3: []}
        for number, value in _fields(model[_end_of_pieces(model) :]):
            parts.setdefault(number, []).append(value)
        trainer, normalizer = (dict(_fields(b"".join(parts[number]))) for number in (2, 3))
        return cls(
            model_type=trainer.get(3, 1),
            byte_fallback=bool(trainer.get(35, False)),
            suffix=bool(trainer.get(24, False)),
            charsmap=bool(normalizer.get(2)),
            dummy_prefix=bool(normalizer.get(3, True)),
            collapse=bool(normalizer.get(4, True)),
            escape=bool(normalizer.get(5, True)),
        )


def piece_types(model: bytes) -> frozenset[int]:
    """Return the types of the pieces in the bytes of a tokenizer.model."""
    return frozenset(dict(_fields(piece)).get(3, 1) for number, piece in _fields(model) if number == 1)


def _end_of_pieces(model: bytes) -> int:
    """Return where the short pieces end that a model begins with."""
    at = 0  # reading them field by field takes a tenth of a second
    while model[at : at + 1] == b"\x0a" and at + 1 < len(model) and model[at + 1] < 128:
        at += 2 + model[at + 1]
    return at


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer: integers, and the bytes of texts and messages.

    sentencepiece reads the model but does not expose its settings. Its own protocol buffer would need another library,
    and clash with transformers' copy of it in the same process.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
        elif kind in (1, 2, 5):
            size = varint() if kind == 2 else 8 if kind == 1 else 4
            yield number, message[at : at + size]
            at += size
        else:  # a group, which SentencePiece does not use
            return
