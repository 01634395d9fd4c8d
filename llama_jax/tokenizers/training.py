"""Trains a SentencePiece model with LLaMA 2's settings."""

import collections
import io
import itertools
from collections.abc import Iterable, Iterator

import sentencepiece as spm

from llama_jax.errors import UserError
from llama_jax.tokenizers.reader import clean

# SentencePiece's trainer skips longer sentences (trainer_spec.max_sentence_length).
MAX_SENTENCE_BYTES = 4192


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
