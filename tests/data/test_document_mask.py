"""Which document a token is of, against a literal walk along the row; and which tokenizers mark documents."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data.batches import Batch, eval_batches, train_batches
from llama_jax.data.document_mask import check_documents, check_marks, masked, with_documents
from llama_jax.errors import UserError

BOS, EOS = 1, 2


def documents(tokens: np.ndarray) -> list[tuple[int, int]]:
    """Where each document of a row's inputs begins and ends; the row has one token more, the last target."""
    starts = [0] + [t for t in range(1, len(tokens) - 1) if tokens[t] == BOS]
    return list(zip(starts, [*starts[1:], len(tokens) - 1], strict=True))


@given(st.lists(st.lists(st.integers(0, 5), min_size=13, max_size=13), min_size=1, max_size=4))
def test_segments_positions_and_weights_are_those_of_a_walk_along_the_row(rows: list[list[int]]) -> None:
    tokens = np.array(rows, np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((len(rows), 12), np.float32))
    found: Any = with_documents(batch, BOS)
    for row, segments, positions, weights in zip(tokens, found.segments, found.positions, found.weights, strict=True):
        walked = documents(row)
        assert len(set(segments.tolist())) == len(walked)
        for first, end in walked:
            assert len(set(segments[first:end].tolist())) == 1
            assert positions[first:end].tolist() == list(range(end - first))
        assert weights.tolist() == [float(target != BOS) for target in row[1:]]
    assert (found.segments.dtype, found.positions.dtype, found.weights.dtype) == (np.int32, np.int32, np.float32)
    np.testing.assert_array_equal(found.inputs, batch.inputs)
    np.testing.assert_array_equal(found.targets, batch.targets)


def test_every_token_but_the_first_of_a_document_is_a_target_once_in_an_evaluation() -> None:
    rng = np.random.default_rng(0)
    stream = np.concatenate([[BOS, *rng.integers(3, 9, size=size), EOS] for size in rng.integers(0, 30, size=40)])
    batches = list(masked(eval_batches(stream, 4, 16), BOS))
    counted = np.concatenate([batch.targets[batch.weights == 1] for batch in batches])
    np.testing.assert_array_equal(counted, stream[stream != BOS])


def test_a_ring_that_ends_within_a_document_does_not_join_it_to_the_first() -> None:
    stream = np.array([BOS, 5, 6, EOS, BOS, 7])
    (batch,) = masked(train_batches(stream, 8, 12, 0, 0, 1), BOS)
    joins = (batch.inputs == 7) & (batch.targets == BOS)
    assert joins.any() and not batch.weights[joins].any()
    assert not batch.positions[batch.inputs == BOS].any()


def test_padding_stays_without_weight() -> None:
    batch = Batch(np.array([[BOS, 5, 0, 0]]), np.array([[5, 0, 0, 0]]), np.array([[1, 0, 0, 0]], np.float32))
    np.testing.assert_array_equal(with_documents(batch, BOS).weights, batch.weights)


def test_a_tokenizer_that_marks_one_end_is_refused_in_one_line() -> None:
    check_marks(SimpleNamespace(bos_id=1, eos_id=2))  # type: ignore[arg-type]
    one = SimpleNamespace(bos_id=1, eos_id=1, model_path="t5.model", piece=lambda i: "</s>")
    with pytest.raises(UserError, match=r"^data\.document_mask: expected .* t5\.model .*'</s>' alone") as caught:
        check_marks(one)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_tokens_in_which_no_document_begins_are_refused_in_one_line() -> None:
    check_documents(np.array([BOS, 5, 6]), BOS, "tokens")
    with pytest.raises(
        UserError, match=r"^data\.document_mask: expected .* BOS \(id 1\), found none .* 3 tokens of a\.bin; "
    ) as caught:
        check_documents(np.array([5, EOS, 6]), BOS, "a.bin")
    assert "\n" not in str(caught.value)
