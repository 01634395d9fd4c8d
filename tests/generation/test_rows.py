"""Completions by their rows: settings of each, ends, stop strings, and the passes that they are made in."""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Completion, Model, passes
from llama_jax.generation.decode import CHUNK
from llama_jax.generation.rows import PartialCompletion, Row, first_end, held_back
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build, speaking

ARGS = SampleArgs(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=4)
PROMPTS = ["Once upon a time", "", "The owl saw the fox by the river. " * 3]


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return speaking(build(small_tokenizer))


def pass_bytes(model: Llama, rows: Sequence[Row]) -> int:
    longest = max(len(prompt) for prompt, _, _ in rows)
    return len(rows) * passes.row_bytes(model, longest, passes.new_tokens(model.args, rows))


def with_args(**changes: object) -> SampleArgs:
    return dataclasses.replace(ARGS, **changes)


def same(one: Sequence[Completion], other: Sequence[Completion]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_rows_with_settings_of_their_own_equal_single_generations(model: Model) -> None:
    given = [
        with_args(temperature=0.0, max_new_tokens=3),
        with_args(top_k=5, repetition_penalty=1.3, seed=9),
        with_args(top_p=0.7, logit_bias={70: 3.0}, max_new_tokens=CHUNK),
    ]
    together = model.generate(PROMPTS, given)
    same(together, [model.generate([prompt], args)[0] for prompt, args in zip(PROMPTS, given, strict=True)])
    assert [len(c.token_ids) for c in together] == [3, 40, CHUNK]


def test_n_completions_a_prompt_come_in_order_and_differ(model: Model) -> None:
    done = model.generate(PROMPTS[:2], [with_args(n=3, max_new_tokens=12), with_args(n=1, max_new_tokens=12)])
    assert len(done) == 4 and len({tuple(c.token_ids) for c in done[:3]}) == 3
    same([done[0], done[3]], model.generate(PROMPTS[:2], with_args(max_new_tokens=12)))
    same(done[:2], model.generate(PROMPTS[:1], with_args(n=2, max_new_tokens=12)))


def test_as_many_settings_as_prompts_are_asked_for(model: Model) -> None:
    with pytest.raises(UserError, match="args: expected one SampleArgs, or 3, one a prompt; found 2"):
        model.generate(PROMPTS, [ARGS, ARGS])


@pytest.mark.parametrize("token", [-1, 400, 10**12])
def test_a_bias_of_no_token_is_refused(model: Model, token: int) -> None:
    with pytest.raises(
        UserError, match=f"logit_bias: expected ids from 0 to {model.args.vocab_size - 1}, found {token}"
    ):
        model.generate(["a"], with_args(logit_bias={token: 1.0}))


def test_one_completion_is_asked_of_a_stream_and_an_answer(model: Model) -> None:
    with pytest.raises(UserError, match="n: expected 1 for a stream, found 2"):
        model.stream("a", with_args(n=2))


def test_a_stop_string_across_tokens_cuts_text_tokens_and_logprobs(model: Model) -> None:
    (free,) = model.generate(["The fox"], ARGS)
    prompt = model.tokenizer.encode("The fox")
    before = len(model.tokenizer.decode(prompt))

    def text(count: int) -> str:
        return model.tokenizer.decode([*prompt, *free.token_ids[:count]])[before:]

    for start in range(0, len(free.text) - 3, 5):
        stop = free.text[start : start + 3]
        (done,) = model.generate(["The fox"], with_args(stop=("never said", stop)))
        cut = free.text.index(stop)
        assert done.text == free.text[:cut] and done.finish_reason == "stop"
        count = len(done.token_ids)
        assert done.token_ids == free.token_ids[:count] and len(done.logprobs) == count
        np.testing.assert_allclose(done.logprobs, free.logprobs[:count], atol=1e-4)
        assert text(count).startswith(done.text)
        assert count == 0 or not text(count - 1).startswith(done.text), "no token is left that begins behind the cut"
        assert "".join(model.stream("The fox", with_args(stop=("never said", stop)))) == done.text


def test_a_stop_string_that_never_comes_changes_nothing(model: Model) -> None:
    same(model.generate(PROMPTS, ARGS), model.generate(PROMPTS, with_args(stop=("never said", "nor this"))))


class Letters:
    """A tokenizer whose tokens are texts."""

    eos_id = 0

    def __init__(self, pieces: Sequence[str]):
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i - 1] for i in ids)

    stream = Tokenizer.stream


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 1 << 16),
)
def test_what_is_streamed_is_never_taken_back_however_the_text_is_cut(
    pieces: list[str], stop: list[str], seed: int
) -> None:
    def grow(chunks: Sequence[int]) -> tuple[Completion, list[str]]:
        row = PartialCompletion(Letters(pieces), [], SampleArgs(stop=tuple(stop), max_new_tokens=len(pieces)), 10**6)  # type: ignore[arg-type]
        taken, at = [], 0
        for size in chunks:
            if not row.finish_reason:
                row.push(np.arange(at, at + size) + 1, np.zeros(size))
                taken.append(row.take())
            at += size
        return row.completion(), taken

    whole, _ = grow([len(pieces)])
    single, shown = grow([1] * len(pieces))
    assert whole == single and "".join(shown) == whole.text
    cut = random.Random(seed).randint(0, len(pieces))
    assert grow([cut, len(pieces) - cut])[0] == whole
    text = "".join(pieces)
    assert whole.finish_reason == ("stop" if any(s in text for s in stop) else "length")
    assert not any(s in whole.text for s in stop)


def test_the_stop_string_that_is_whole_first_ends_the_text() -> None:
    assert first_end("xxabc", ["abc", "b"]) == 3
    assert first_end("xxabc", ["c", "abc"]) == 2, "of two that end together, the longer"
    assert first_end("xxabc", ["d"]) is None
    assert held_back("xxab", ["abc", "bxx"]) == 2 and held_back("xx", ["abc"]) == 0


def test_rows_beyond_memory_are_made_in_passes_in_the_prompts_order(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a" * (1 + 7 * i % 30) for i in range(10)]
    args = with_args(max_new_tokens=6)
    at_once = model.generate(prompts, args)
    rows = model.rows([model.encode(prompt) for prompt in prompts], args)
    room = pass_bytes(model.module, [max(rows, key=lambda row: len(row[0]))] * 3)
    monkeypatch.setattr(passes, "free_memory", lambda _: room)
    seen: list[passes.Step] = []
    same(model.generate(prompts, args, seen.append), at_once)
    begun = [step for step in seen if step.steps == 0]
    assert [step.number for step in begun] == list(range(1, begun[0].passes + 1))
    assert len(begun) >= 3 and sum(step.rows for step in begun) == 10
    assert sum(step.finished for step in seen) == 10
    assert sum(step.tokens for step in seen) == sum(len(c.token_ids) for c in at_once)
    monkeypatch.setattr(passes, "free_memory", lambda _: 0)
    seen.clear()
    model.generate(prompts[:2], args, seen.append)
    assert seen[0].passes == 2, "a row that does not fit is tried alone"


def test_rows_of_like_length_share_a_pass(model: Model) -> None:
    rows = model.rows([[1] * n for n in (5, 200, 6, 190, 7, 180)], with_args(max_new_tokens=6))
    free = pass_bytes(model.module, [rows[1]] * 3)
    assert passes.split(model.module, rows, range(6), free)[0] == [1, 3, 5]


@given(st.lists(st.tuples(st.integers(1, 250), st.integers(1, 300)), min_size=1, max_size=40), st.integers(0, 50))
def test_a_pass_has_as_many_rows_as_memory_holds(model: Model, rows: list[tuple[int, int]], room: int) -> None:
    given = [([1] * length, with_args(max_new_tokens=new), 0) for length, new in rows]
    free = room * passes.row_bytes(model.module, 100, 100)
    parts = passes.split(model.module, given, range(len(given)), free)
    assert sorted(i for part in parts for i in part) == list(range(len(given)))
    lengths = [len(given[i][0]) for part in parts for i in part]
    assert lengths == sorted(lengths, reverse=True)
    for part, following in itertools.pairwise([*parts, []]):
        held = [given[i] for i in part]
        assert len(part) == 1 or pass_bytes(model.module, held) <= free
        if following and len(part) < passes.CPU_MOST_ROWS:
            assert pass_bytes(model.module, [*held, given[following[0]]]) > free


def test_ten_thousand_prompts_are_laid_out_without_tracing_a_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = model.rows([[1, 5 + i % 7] * (1 + i % 9) for i in range(10_000)], ARGS)
    passes.slot_bytes(model.module)
    monkeypatch.setattr(passes.jax, "eval_shape", None)
    assert sum(map(len, passes.split(model.module, rows, range(10_000), 1e12))) == 10_000


def test_windows_come_as_they_are_done(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "WINDOW", 2)
    seen: list[passes.Step] = []
    rows = model.rows([[1, 5], [1, 5, 6], [1], [1, 7]], with_args(max_new_tokens=2))
    made = model.completions(rows, seen.append)
    next(made)
    assert max(step.number for step in seen) == 1 and seen[0].passes == 2
    assert len(list(made)) == 3


def test_a_batch_is_done_when_its_last_row_is(model: Model) -> None:
    (free,) = model.generate(["The fox"], ARGS)
    seen: list[passes.Step] = []
    model.generate(["The fox"], with_args(stop=(free.text[:2],), max_new_tokens=200), seen.append)
    assert [step.steps for step in seen] == [0, CHUNK]


def test_an_empty_prompt_is_bos_alone(model: Model) -> None:
    same(model.generate([""], ARGS), model.generate_ids([[model.tokenizer.bos_id]], ARGS))


def test_text_is_streamed_a_token_at_a_time(model: Model) -> None:
    seen: list[passes.Step] = []
    pieces = model.stream("Once", ARGS, seen.append)
    next(pieces)
    assert [step.steps for step in seen] == [0, 1]
    assert len(list(pieces)) == 39
