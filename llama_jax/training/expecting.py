"""Compares a run's evaluations with what is expected of it, and says when it leaves that, and when it is back."""

from collections.abc import Sequence
from typing import Any, Literal

from llama_jax.build import count_parameters
from llama_jax.config import Config
from llama_jax.expected_args import ExpectedArgs

# A model of this share more or fewer parameters than the expectation's is another one. A vocabulary may miss some pieces.
OTHER_MODEL = 0.1
CAUSES = {
    "above": "usual causes are a learning rate that is too high or too low, another text than the recipe's, and a tokenizer "
    "that was not made for this text",
    "below": "the usual cause is that held-out text stands in the training text, too",
}
Side = Literal["above", "below", ""]


def expected_of(config: Config, tokens: int) -> tuple[ExpectedArgs, str]:
    """Return what is expected of a run that reads ``tokens`` in all.

    The second result is a note if the configuration has an expectation that is for another run. The configuration's
    vocabulary size must be known.
    """
    given = config.expected
    if not given.tokens:
        return given, ""
    parameters = count_parameters(config.model)
    if given.tokens[-1] != tokens:
        what = f"a run of {given.tokens[-1]:,} tokens, and this one reads {tokens:,}"
    elif given.parameters and abs(parameters / given.parameters - 1) > OTHER_MODEL:
        what = f"a model of {given.parameters:,} parameters, and this one has {parameters:,}"
    else:
        return given, ""
    return (
        ExpectedArgs(),
        f"no loss is expected: [expected] of the settings is for {what}; make a new recipe for these settings",
    )


def rows(expected: ExpectedArgs) -> list[tuple[str, str]]:
    """Return what a run prints at its start about what is expected of it."""
    if not expected.tokens:
        return []
    last = expected.at(expected.tokens[-1])
    assert last is not None
    from_share = expected.tokens[0] / expected.tokens[-1]
    return [
        (
            "expected",
            f"{last.bits_per_byte:.3f} bits per byte held out at the end, {last.low:.3f} to {last.high:.3f}; the curve is in "
            f"losses.png, and an evaluation outside of it is told, from {from_share:.0%} of the run on",
        )
    ]


def values_at(expected: ExpectedArgs, tokens: int) -> dict[str, float]:
    """Return the expectation after ``tokens`` as values of a record. They are none where nothing is expected."""
    found = expected.at(tokens)
    return {} if found is None else {f"expected_{name}": value for name, value in found._asdict().items()}


def leaving_text(before: Sequence[dict[str, Any]], record: dict[str, Any]) -> str:
    """Return a line if an evaluation leaves what is expected, or comes back to it; else an empty text.

    before: the records before this one. The last one with an expectation tells on which side the run was, so that a
    run that resumes does not repeat what it has said.
    """
    side = _side(record)
    was = next((known for known in map(_side, reversed(before)) if known is not None), "")
    if side is None or side == was:
        return ""
    loss = f"{record['eval_bits_per_byte']:.3f} bits per byte"
    interval = f"the expected {record['expected_low']:.3f} to {record['expected_high']:.3f}"
    if not side:
        return f"step {record['step']:,}: the held-out loss, {loss}, is back within {interval}"
    return f"step {record['step']:,}: warning: the held-out loss, {loss}, is {side} {interval}; {CAUSES[side]}"


def _side(record: dict[str, Any]) -> Side | None:
    """Return on which side of the interval an evaluation lies. Empty: within it. None: nothing is compared."""
    bits = record.get("eval_bits_per_byte")
    if bits is None or "expected_low" not in record:
        return None
    return "above" if bits > record["expected_high"] else "below" if bits < record["expected_low"] else ""
