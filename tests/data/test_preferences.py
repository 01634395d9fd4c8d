"""Records of preferences: the forms that published sets have, what counts of them, and their sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.chat.messages import Message
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.batches import batches_of, eval_windows, train_windows
from llama_jax.data.chat_records import Preference, parsed, repeats_prompt
from llama_jax.data.conversations import Pairs
from llama_jax.errors import UserError

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
WANTED = Preference((U("q"),), (A("good"),), (A("bad"),))


def messages(*found: Message) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in found]


def turns(*found: Message) -> list[dict[str, str]]:
    return [{"from": {"user": "human", "assistant": "gpt"}[m.role], "value": m.content} for m in found]


FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": messages(U("q")), "chosen": messages(A("good")), "rejected": messages(A("bad"))},
    "a text and messages": {"prompt": "q", "chosen": messages(A("good")), "rejected": messages(A("bad"))},
    "one message": {"prompt": "q", "chosen": turns(A("good"))[0], "rejected": turns(A("bad"))[0]},
    "from and value": {"prompt": turns(U("q")), "chosen": turns(A("good")), "rejected": turns(A("bad"))},
    "whole": {"chosen": messages(U("q"), A("good")), "rejected": messages(U("q"), A("bad"))},
    "whole, with the prompt": {
        "prompt": "q", "chosen": messages(U("q"), A("good")), "rejected": messages(U("q"), A("bad"))
    },
    "whole, with an empty prompt": {
        "prompt": None, "chosen": messages(U("q"), A("good")), "rejected": messages(U("q"), A("bad"))
    },
    "a dialogue to answer": {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
    "dialogues that begin with the prompt": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "a dialogue as a text": {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_preference(form: str) -> None:
    assert parsed(FORMS[form] | {"score": 3}) == WANTED


def test_a_prompt_with_which_both_texts_begin_is_taken_off_them() -> None:
    record = {"prompt": "Who is it?", "chosen": "Who is it? An owl.", "rejected": "Who is it? A fox."}
    assert parsed(record) == Preference((U("Who is it?"),), (A(" An owl."),), (A(" A fox."),)) and repeats_prompt(
        record
    )
    for chosen in ("An owl.", "Who is it?"):  # nothing is taken off an answer that alone begins so, nor all of it
        found = parsed(record | {"chosen": chosen})
        assert found == Preference((U("Who is it?"),), (A(chosen),), (A("Who is it? A fox."),))
        assert not repeats_prompt(record | {"chosen": chosen})


def test_a_dialogue_of_several_turns_is_a_prompt() -> None:
    prompt = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    found = parsed({"prompt": prompt, "chosen": " x", "rejected": " y", "system": "s"})
    assert found == Preference((S("s"), U("q"), A("a"), U("r")), (A(" x"),), (A(" y"),))


def test_the_common_beginning_of_conversations_is_the_prompt() -> None:
    start = [S("s"), U("q"), A("a"), U("r")]
    found = parsed({"chosen": messages(*start, A("good")), "rejected": messages(*start, A("bad"))})
    assert found == Preference(tuple(start), (A("good"),), (A("bad"),))
    asked = parsed(
        {"prompt": "q", "chosen": messages(S("s"), U("q"), A("x")), "rejected": messages(S("s"), U("q"), A("y"))}
    )
    assert asked.prompt == (S("s"), U("q"))
    # They part at a question: the answers before it are common, but no prompt ends there.
    parted = parsed(
        {"chosen": messages(U("q"), A("a"), U("r"), A("x")), "rejected": messages(U("q"), A("a"), U("t"), A("y"))}
    )
    assert parted == Preference((U("q"),), (A("a"), U("r"), A("x")), (A("a"), U("t"), A("y")))
    equal = parsed({"chosen": messages(U("q"), A("a")), "rejected": messages(U("q"), A("a"))})
    assert equal == Preference((U("q"),), (A("a"),), (A("a"),))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"chosen": "good", "rejected": "bad"}, "no prompt"),
        ({"chosen": messages(U("q"), A("x")), "rejected": messages(U("r"), A("y"))}, "no common beginning"),
        (
            {"prompt": "z", "chosen": messages(U("q"), A("x")), "rejected": messages(U("q"), A("y"))},
            "prompt: expected the beginning",
        ),
        ({"prompt": "q", "chosen": messages(U("q")), "rejected": messages(U("q"))}, "expected"),
        ({"prompt": "q", "chosen": [], "rejected": "bad"}, "chosen: expected"),
        ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "chosen: expected"),
        ({"prompt": messages(U("q"), A("a")), "chosen": "good", "rejected": "bad"}, "prompt and chosen: message 3"),
        ({"prompt": 5, "chosen": "good", "rejected": "bad"}, "prompt: expected"),
    ],
)
def test_a_wrong_record_is_told_in_one_line(record: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(record)
    assert words in str(caught.value) and "\n" not in str(caught.value)


LENGTH = 9


def pairs_of(sizes: list[tuple[int, int]], seed: int = 0) -> tuple[Pairs, list[np.ndarray], list[np.ndarray]]:
    """Pairs of answers of these numbers of tokens, and the ids and the mask of each answer."""
    rng = np.random.default_rng(seed)
    lengths = [n for pair in sizes for n in pair]
    ids = [rng.integers(1, 99, n).astype(np.uint16) for n in lengths]
    counted = [np.arange(n) >= rng.integers(1, n) for n in lengths]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.uint64)
    bits = np.packbits(np.concatenate(counted), bitorder="little")
    return Pairs(np.concatenate(ids), starts, bits, False), ids, counted  # type: ignore[arg-type]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(2, LENGTH + 1), st.integers(2, LENGTH + 1)), min_size=1, max_size=12),
    st.integers(0, 9),
)
def test_each_pair_is_in_one_sequence_and_each_token_of_its_answers_counts_once(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    """Even a pair whose answers both fill the context."""
    pairs, ids, counted = pairs_of(sizes, seed)
    found: dict[tuple[int, ...], int] = {}
    for sequence in range(pairs.sequences(LENGTH)):
        row = pairs.row(LENGTH, sequence)
        assert all(len(part) == 2 * LENGTH for part in row) and row.positions.max() < LENGTH
        members = pairs.members(LENGTH, sequence)
        assert len(members) <= pairs.most_pairs(LENGTH)
        assert (row.weights[row.segments >= 2 * len(members)] == 0).all()
        for segment in range(2 * len(members)):
            where = row.segments == segment
            number = 2 * members[segment // 2] + segment % 2
            np.testing.assert_array_equal(row.inputs[where], ids[number][:-1])
            np.testing.assert_array_equal(row.targets[where], ids[number][1:])
            np.testing.assert_array_equal(row.positions[where], np.arange(len(ids[number]) - 1))
            np.testing.assert_array_equal(row.weights[where], counted[number][1:] * (1 - 2 * (segment % 2)))
            found[(number,)] = found.get((number,), 0) + 1
    assert found == {(number,): 1 for number in range(2 * len(sizes))}


def test_batches_bring_the_reference_and_are_padded_behind_the_last_sequence() -> None:
    pairs, *_ = pairs_of([(5, 7)] * 7)
    count = pairs.sequences(LENGTH)
    pairs.reference = np.arange(count * 2 * LENGTH, dtype=np.float32).reshape(count, -1)
    windows = np.array([2, 0, count])  # the last one is behind the end, as in the last group of an evaluation
    (batch,) = batches_of(pairs, windows, 4, LENGTH, np.arange(4))
    np.testing.assert_array_equal(batch.reference[:2], pairs.reference[[2, 0]])  # type: ignore[union-attr]
    assert not batch.weights[2:].any() and np.isnan(batch.reference[2:]).all()  # type: ignore[union-attr]
    assert eval_windows(pairs, LENGTH).tolist() == list(range(count))


def test_the_windows_of_a_run_are_those_that_its_batches_read(tmp_path: Path) -> None:
    from llama_jax.data.batches import train_batches

    pairs, *_ = pairs_of([(9, 9)] * 11)
    pairs.reference = np.arange(11, dtype=np.float32)[:, None] + np.zeros((11, 2 * LENGTH), np.float32)
    for steps in (1, 3, 4, 9):
        read = train_windows(pairs, BatchSizes(3), LENGTH, 5, steps)[""]
        batches = train_batches(pairs, 3, LENGTH, 5, 0, steps)
        seen = {int(x) for batch in batches for x in np.unique(batch.reference)}  # type: ignore[union-attr]
        assert read.tolist() == sorted(seen)
