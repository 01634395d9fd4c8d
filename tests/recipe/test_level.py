"""The level of a text: what counts and a compressor say of it, against a literal sum and known texts."""

import collections
import math
import random

import numpy as np
import pytest

from llama_jax.recipe.level import ORDER, compressed_level, counted_level, frequency_level


def literal(train: bytes, held_out: bytes) -> float:
    """Witten and Bell's method C, context by context, in dictionaries."""
    counts: dict[bytes, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    padded, asked = bytes(ORDER) + train, bytes(ORDER) + held_out
    for i in range(ORDER, len(padded)):
        for length in range(ORDER + 1):
            counts[padded[i - length : i]][padded[i]] += 1
    bits = 0.0
    for i in range(ORDER, len(asked)):
        probability = 1 / 256
        for length in range(ORDER + 1):
            seen = counts.get(asked[i - length : i])
            if seen:
                total, kinds = sum(seen.values()), len(seen)
                probability = (seen[asked[i]] + kinds * probability) / (total + kinds)
        bits -= math.log2(probability)
    return bits / len(held_out)


def test_counts_mix_as_by_the_literal_sum() -> None:
    rng = random.Random(0)
    words = ["the fox ", "a river ", "über ", "\n", "狐 "]
    train, held_out = ("".join(rng.choices(words, k=k)).encode() for k in (300, 60))
    assert counted_level(train, held_out) == pytest.approx(literal(train, held_out), rel=1e-9)


@pytest.mark.parametrize("level", [counted_level, compressed_level])
def test_a_text_that_repeats_is_easier_than_words_and_words_than_noise(level: object) -> None:
    rng = random.Random(0)
    words = [bytes(rng.choices(range(97, 123), k=5)) + b" " for _ in range(50)]
    texts = [b"the fox " * 4000, b"".join(rng.choices(words, k=5000)), rng.randbytes(30_000)]
    found = [level(text[:-3000], text[-3000:]) for text in texts]  # type: ignore[operator]
    assert found[0] < 0.1 < 0.8 < found[1] < 3 < 7.9 < found[2]


@pytest.mark.parametrize("train", [b"a", b"ab", b"\x00"])
def test_the_shortest_texts_have_a_level(train: bytes) -> None:
    assert 0 < counted_level(train, b"b") < 16 and compressed_level(train, b"b") > 0


def test_who_knows_the_frequencies_of_tokens_needs_their_entropy() -> None:
    train = np.array([0] * 500 + [1] * 250 + [2] * 250)
    assert frequency_level(train, train[::3], 3) == pytest.approx(1.5, abs=0.01)
    assert frequency_level(train, np.array([3, 3]), 4) == pytest.approx(-math.log2(0.5 / 1002)), (
        "one that did not occur"
    )
    assert frequency_level(train, np.array([], np.int64), 3) == math.inf
