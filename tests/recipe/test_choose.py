"""The choice: sane and monotone over budgets and texts, as large as the budget allows, and with what was given."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.build import count_parameters
from llama_jax.config import Config, ModelArgs, TrainArgs
from llama_jax.errors import UserError
from llama_jax.recipe.choose import (
    Budget,
    Choice,
    Task,
    Unit,
    bytes_within,
    choose,
    context_for,
    parameters_of,
    with_curve,
)
from llama_jax.recipe.laws import Laws, TextLevel
from llama_jax.recipe.text import Counted, vocabulary_for
from llama_jax.train_args import ScheduleName
from llama_jax.training.flops import step_flops


def text(size: float, vocab_size: int = 0) -> Counted:
    vocab_size = vocab_size or vocabulary_for(size)
    return Counted("my.txt", size, vocab_size, 2.5, TextLevel(2.4, 2.2), 1000, vocab_size, size / 20)


def chosen(
    size: float, flops: float, base: Config = Config(), kept: frozenset[str] = frozenset(), rows: int = 1
) -> Choice:
    budget = Budget("flops", flops, "--flops")
    counted = text(size, vocabulary_for(min(size, bytes_within(budget))))
    return choose(Task(base, kept, counted, rows), budget)


sizes, budgets = st.floats(4.5, 9).map(lambda x: 10**x), st.floats(11.5, 18).map(lambda x: 10**x)


@settings(max_examples=60)
@given(sizes, budgets)
def test_a_choice_passes_the_checks_and_uses_its_budget_or_says_what_it_leaves(size: float, flops: float) -> None:
    found = chosen(size, flops)
    found.config.check()
    config, tokens = found.config, found.config.train.batch_size * found.config.model.max_seq_len
    assert found.tokens == found.steps * tokens and found.steps >= 1
    sized = replace(config, model=replace(config.model, vocab_size=config.data.vocab_size))
    if found.steps > 60:
        assert found.flops == pytest.approx(found.steps * step_flops(sized, tokens), rel=1e-6)
        assert found.flops / flops == pytest.approx(1 - found.unused, abs=0.03)
    assert found.low < found.expected < found.high
    assert config.train.warmup_steps <= found.steps and config.train.eval_interval <= found.steps


@settings(max_examples=60)
@given(sizes, budgets, st.floats(1.5, 30))
def test_more_is_never_expected_to_be_worse_nor_chosen_smaller(size: float, flops: float, times: float) -> None:
    less, more = chosen(size, flops), chosen(size, times * flops)
    assert more.expected <= less.expected * 1.003
    assert more.parameters >= less.parameters * 0.7
    assert more.config.train.lr <= less.config.train.lr * 1.2
    longer = chosen(size * times, flops)
    assert longer.expected <= less.expected * 1.02, "more text of the same level does no harm"


@settings(max_examples=30, deadline=None)
@given(sizes, budgets, st.sampled_from(["linear", "wsd", "cosine"]))
def test_the_curve_ends_at_what_is_expected_and_falls_and_narrows_towards_it(
    size: float, flops: float, schedule: ScheduleName
) -> None:
    found = chosen(size, flops, Config(train=TrainArgs(schedule=schedule)), frozenset({"train.schedule"}))
    curve = with_curve(Task(found.config, frozenset(), text(size, found.config.data.vocab_size)), found).config.expected
    curve.check()
    assert (curve.tokens[-1], curve.parameters) == (found.tokens, found.parameters)
    end = curve.at(found.tokens)
    assert end is not None and end == pytest.approx((found.low, found.expected, found.high), rel=1e-4)
    widths = [high / low for low, high in zip(curve.low, curve.high, strict=True)]
    assert all(a >= b * (1 - 1e-4) for a, b in pairwise(widths))
    if found.epochs < 2:  # else the end of a run may learn its text by heart
        bits = curve.bits_per_byte
        assert all(a >= b for a, b in pairwise(bits)) and bits[0] > bits[-1]


def test_a_rate_that_has_not_decayed_costs_what_recorded_runs_say() -> None:
    """Of three of the recorded runs: parameters, bytes read and to train on; bits per byte at quarters of each."""
    for parameters, read, unique, bits in (
        (1942848, 2.2e6, 1.0e6, (2.567, 2.334, 2.235, 2.161)),
        (975744, 1.2e6, 0.9e6, (2.946, 2.718, 2.594, 2.543)),
        (1237888, 1.4e6, 2.7e6, (2.368, 2.169, 2.059, 2.007)),
    ):
        laws, level = Laws(), TextLevel(2.0, 2.0)
        law = [laws.bits_per_byte(level, parameters, s * read, unique, 1 - s) for s in (0.25, 0.5, 0.75, 1.0)]
        for s, found in enumerate(law[:-1]):
            assert bits[s] / bits[-1] == pytest.approx(found / law[-1], rel=0.04)
            assert found / law[-1] > 1.01, "and the law alone is lower"


def test_a_run_that_learns_the_frequencies_of_tokens_alone_lies_outside_where_more_was_always_learned() -> None:
    """As one does whose rate is much too high. Where little is expected of a run, nothing is known of it."""
    laws, flops = Laws(), 1e13
    for frequencies in (2.0 * 1.5, 2.0 * 2.0):
        low, high = laws.interval(2.0, flops, 0.0, frequencies)
        assert (low, laws.interval(2.0, flops)[1]) == pytest.approx(
            (2 * math.exp(-laws.spread), 2 * math.exp(laws.spread))
        )
        assert 2.0 < high < frequencies and high <= laws.interval(2.0, flops)[1]
    little = 2.0 * math.exp(0.5 * laws.least_learned)
    assert laws.interval(2.0, flops, 0.0, little) == laws.interval(2.0, flops) == laws.interval(2.0, flops, 0.0, 1.9)


def test_a_small_text_is_not_learned_by_heart_however_long_the_time() -> None:
    short, long, longest = (chosen(3e4, flops) for flops in (1e13, 1e16, 1e20))
    assert long.unused > 0.9 and longest.config == long.config
    assert long.epochs < 60 and long.parameters <= short.parameters * 4
    assert chosen(3e7, 1e13).unused == 0


def test_a_megabyte_gets_a_model_of_the_size_that_tuned_runs_have() -> None:
    found = chosen(1e6, 1.6e13)
    assert 128 <= found.config.model.dim <= 256 and 0.7e6 < found.parameters < 5e6
    assert found.config.data.vocab_size == 2048 and found.config.train.optimizer == "adamw"
    tokens = found.config.train.batch_size * found.config.model.max_seq_len
    assert 2e-3 <= found.config.train.lr <= 4e-3 and 512 <= tokens <= 2048


def test_contexts_grow_with_what_a_run_reads_and_are_bounded_by_model_and_text() -> None:
    assert [context_for(1e6, read, 1e9) for read in (1e5, 1.7e6, 7e6, 1e9)] == [64, 128, 256, 256]
    assert [context_for(size, 1e12, 1e12) for size in (1e6, 2e7, 2e8, 1e9)] == [256, 512, 1024, 2048]
    assert context_for(1e6, 1e9, 2000) == 64 and context_for(1e6, 1e9, 100) == 32


@pytest.mark.parametrize("unit", ["tokens", "flops", "parameters"])
def test_a_budget_beyond_what_helps_a_small_text_is_left_whatever_it_is_counted_in(unit: Unit) -> None:
    """A text is not read 80 million times, nor is a model that is too large for it trained for a step."""
    task = Task(Config(), frozenset(), text(3e4))
    amounts = {"tokens": 1e12, "flops": 1e24, "parameters": 1e8}
    found = choose(task, Budget(unit, amounts[unit], f"--{unit}"))
    assert found.unused > 0.8 and 1 < found.epochs < 60 and found.expected < 4


@pytest.mark.parametrize("budget", [Budget("tokens", 10, "--tokens 10"), Budget("tokens", 63, "--tokens 63")])
def test_tokens_below_a_step_are_refused(budget: Budget) -> None:
    with pytest.raises(UserError, match=rf"^{budget.name}: expected enough for a step"):
        choose(Task(Config(), frozenset(), text(3e6)), budget)


@pytest.mark.parametrize("amount", [10, 4e4, 1e12])
def test_parameters_that_no_shape_has_are_refused(amount: float) -> None:
    with pytest.raises(UserError, match=r"^--parameters 5: expected about [\d,]+ to [\d,]+, .*, found [\d,]+;"):
        choose(Task(Config(), frozenset(), text(3e6)), Budget("parameters", amount, "--parameters 5"))


@settings(max_examples=8, deadline=None)
@given(sizes, st.floats(300, 1e9))
def test_a_run_reads_no_more_tokens_than_it_may(size: float, amount: float) -> None:
    assert choose(Task(Config(), frozenset(), text(size)), Budget("tokens", amount, "--tokens")).tokens <= amount


def test_nothing_worse_is_expected_than_of_a_model_that_knows_nothing() -> None:
    task = Task(Config(), frozenset(), text(3e4))
    found = choose(task, Budget("tokens", 100, "--tokens"))
    assert found.steps == 1 and found.config.train.warmup_steps == 0
    assert found.expected == pytest.approx(math.log2(task.text.vocab_size) / 2.5)


@pytest.mark.parametrize("amount", [3e5, 3e6, 3e7])
def test_tokens_and_parameters_are_as_asked(amount: float) -> None:
    task = Task(Config(), frozenset(), text(3e7))
    by_tokens = choose(task, Budget("tokens", amount, "--tokens"))
    assert by_tokens.tokens == pytest.approx(amount, rel=0.03)
    by_parameters = choose(task, Budget("parameters", amount * 10, "--parameters"))
    assert by_parameters.parameters == pytest.approx(amount * 10, rel=0.35)


def test_what_is_given_is_kept_and_the_rest_is_chosen_around_it() -> None:
    base = Config(
        model=ModelArgs(dim=96, n_layers=5, n_heads=3, max_seq_len=64),
        train=TrainArgs(lr=1e-2, batch_size=6, moments="int8"),
    )
    kept = frozenset(
        {"model.dim", "model.n_layers", "model.max_seq_len", "train.lr", "train.batch_size", "train.moments"}
    )
    found = chosen(1e6, 3e12, base, kept)
    model, train = found.config.model, found.config.train
    assert (model.dim, model.n_layers, model.max_seq_len, train.lr, train.batch_size) == (96, 5, 64, 1e-2, 6)
    assert train.moments == "int8"
    assert found.flops == pytest.approx(3e12, rel=0.03)


def test_no_model_is_chosen_that_the_machine_cannot_hold() -> None:
    task = Task(Config(), frozenset(), text(1e9), most_parameters=5e6)
    limited = choose(task, Budget("flops", 1e18, "--flops"))
    free = choose(replace(task, most_parameters=math.inf), Budget("flops", 1e18, "--flops"))
    assert 2e6 < limited.parameters <= 5e6 < free.parameters and limited.expected > free.expected
    given = replace(task, base=Config(ModelArgs(dim=1024)), given=frozenset({"model.dim"}))
    with pytest.raises(UserError, match=r"^memory: expected a model of up to 5,000,000 parameters"):
        choose(given, Budget("flops", 1e18, "--flops"))


def test_a_batch_is_shared_by_all_devices() -> None:
    assert all(chosen(1e7, 1e13, rows=rows).config.train.batch_size % rows == 0 for rows in (1, 2, 3, 8, 16))


def test_a_budget_below_a_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--flops: expected enough for a step"):
        chosen(1e6, 1e6)


@pytest.mark.parametrize(
    "args", [ModelArgs(dim=64, n_layers=2, n_heads=4), ModelArgs(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, tie_embeddings=True, attention_bias=True, mlp_bias=True)],
)  # fmt: skip
def test_parameters_by_arithmetic_are_those_that_exist(args: ModelArgs) -> None:
    assert parameters_of(args, 300) == count_parameters(replace(args, vocab_size=300))


def test_repeated_bytes_are_worth_less_and_less() -> None:
    laws = Laws()
    fresh = [laws.fresh_bytes(epochs * 1e6, 1e6) / 1e6 for epochs in (0.5, 1, 2, 5, 20, 1000)]
    assert (
        fresh[:2] == [0.5, 1] and 1.9 < fresh[2] < 2 and 4 < fresh[3] < 5 and fresh[5] == pytest.approx(1 + laws.worth)
    )
    narrow, wide = (laws.interval(2.0, flops) for flops in (1e13, 1e20))
    assert wide[0] < narrow[0] < 2 < narrow[1] < wide[1], "far from the runs that were fitted, less is known"
