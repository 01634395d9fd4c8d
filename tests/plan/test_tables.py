"""What plan says, without compiling."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_jax.config import Config, DataArgs, ModelArgs, TrainArgs
from llama_jax.devices.chips import TPU_KINDS, GiB
from llama_jax.plan import Decoding, Plan
from llama_jax.plan.advice import Advice
from llama_jax.plan.arguments import read_request
from llama_jax.plan.command import BEAT, Console, _undecided
from llama_jax.plan.cost import Cost, Schedule
from llama_jax.plan.extras import mask_cost, mask_rows
from llama_jax.plan.settings import Found
from llama_jax.plan.summaries import decode_summary, summary
from llama_jax.plan.tables import _group_rows, advice_rows, figure, training_text
from llama_jax.plan.topology import Topology
from llama_jax.training.eight_bits import check_units

TOPOLOGY = Topology.parse("v5e:2x2")
PLAN = Plan(
    Config(ModelArgs(vocab_size=512, max_seq_len=1024), train=TrainArgs(batch_size=8)), TOPOLOGY, {"data": 4}, "bfloat16", "splash",
    1 << 30, {"parameters": 1 << 30}, Schedule(Cost(matrix=0.25), TOPOLOGY.chip), "", 1.0,
)  # fmt: skip


def test_a_run_takes_its_steps_times_a_steps_time() -> None:
    found = summary(PLAN, Found(8 * 1024 * 1e6, "train.max_steps"))
    assert found["days"] == pytest.approx(1e6 * 0.25 / 86400)
    assert found["chip_hours"] == pytest.approx(4 * 1e6 * 0.25 / 3600)
    text = training_text(PLAN, Found(8 * 1024 * 1e6, "train.max_steps, 1,000,000"))
    assert "for  8,192,000,000 tokens (train.max_steps, 1,000,000): 2.9 days, 278 chip-hours" in text
    assert "(train.max_steps, 8): 2 s, 0.0022 chip-hours" in training_text(PLAN, Found(8 * 8192, "train.max_steps, 8"))


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.0, 1, "0.0"), (0.004, 1, "0.004"), (0.0312, 2, "0.031"), (0.96, 1, "0.96"), (1.0, 1, "1.0"), (3579.84, 1, "3,579.8"),
        (0.42, 0, "0.42"), (9.6, 0, "9.6"), (1722.3, 0, "1,722"), (14.516, 2, "14.52"),
    ],
)  # fmt: skip
def test_what_a_small_model_takes_is_not_told_as_nothing(value: float, decimals: int, text: str) -> None:
    assert figure(value, decimals) == text


def test_a_small_models_step_has_no_figure_of_zero_but_what_is_zero() -> None:
    cost = Cost(matrix=4e-5, other=2e-6, flops=3e9, hbm_bytes=4e7)
    small = replace(PLAN, bytes=1 << 20, bytes_by_part={"parameters": 1 << 19}, schedule=Schedule(cost, TOPOLOGY.chip))
    text = training_text(small, Found(1.0, ""))
    for told in (
        "fits: 0.00098 of 15.75",
        "0.00049 GiB  parameters",
        "0.04 ms   matrix",
        "0.003 TFLOP",
        "0.002 ms",
        "0.04 GB",
    ):
        assert told in text
    assert "0.0 ms   collectives that block" in text


@pytest.mark.parametrize(
    ("topology", "kind", "told"),
    [("v4:2x2x1", "int8", "is no faster than bfloat16"), ("v5e:2x2", "int8", "was not timed")],
)
def test_what_eight_bits_are_on_the_chip_is_told(topology: str, kind: Any, told: str) -> None:
    slice_ = Topology.parse(topology)
    (device,) = (
        name for name, version in TPU_KINDS.items() if version == slice_.version and name.endswith(slice_.version)
    )
    note = check_units(kind, SimpleNamespace(device_kind=device, platform="tpu"))  # type: ignore[arg-type]
    config = replace(PLAN.config, train=replace(PLAN.config.train, products=kind))
    plan = replace(PLAN, config=config, note=note)
    assert told in training_text(plan, Found(1.0, "")) and told in summary(plan, Found(1.0, ""))["products_note"]


def test_a_configuration_without_a_model_is_told_to_be_of_the_default_one(tmp_path: Path) -> None:
    """As those for tuning are, whose model is that of a checkpoint."""
    own = tmp_path / "own.toml"
    own.write_text("[model]\ndim = 64\nn_heads = 2\n")

    def notes(*flags: str) -> str:
        return " ".join(_undecided(read_request([*flags, "--topology", "v5e:1x1"])))

    assert "no setting of [model]: the model is the default one; --train.init-from" in notes("--config", "lora")
    assert not notes("--config", str(own)) and not notes("--config", "lora", "--model.dim", "512")
    assert notes().startswith("no --config: settings are the defaults and the flags; train.py without --config takes")
    assert "train.py" not in notes("--decode")


LISTED = (
    "fits", "bytes_per_device", "hbm_per_device", "tokens_per_step", "flops_per_step", "step_seconds", "mfu", "tokens_per_second",
    "parts",
)  # fmt: skip


@pytest.mark.parametrize("fits", [True, False])
def test_training_and_decoding_have_the_same_first_keys(fits: bool) -> None:
    parts = {"parameters": 1 << 20, "cache": 1 << 20}
    decoded = replace(PLAN, decoding=Decoding(8, 512), bytes_by_part=parts)
    if not fits:
        decoded = replace(decoded, schedule=None, bytes=1 << 40)
    of_training = summary(replace(decoded, decoding=None), Found(None, "why"))
    of_decoding = decode_summary(decoded, TOPOLOGY)
    assert set(LISTED) <= set(of_training) and set(LISTED) <= set(of_decoding)
    assert (of_decoding["mfu"] is None) == (of_decoding["step_seconds"] is None) == (not fits)


def test_a_decoding_steps_flops_are_those_of_its_matrices_and_of_the_keys_that_are_seen() -> None:
    shape = ModelArgs(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, hidden_dim=96, max_seq_len=512, sliding_window=128
    )
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # with its norms
    token = 2 * (3 * layer + 64 + 64 * 100) + 2 * 2 * 3 * 64 * 128
    plan = replace(
        PLAN, config=Config(shape), decoding=Decoding(5, 512), bytes_by_part={"parameters": 1, "cache": 1}
    )  # fmt: skip
    found = decode_summary(plan, TOPOLOGY)
    assert found["flops_per_step"] == 5 * token
    assert found["mfu"] == pytest.approx(5 * token / 0.25 / (4 * 197e12))
    tied = replace(plan, config=Config(replace(shape, tie_embeddings=True, sliding_window=None)))
    assert decode_summary(tied, TOPOLOGY)["flops_per_step"] == 5 * (token + 2 * 2 * 3 * 64 * (512 - 128))


def test_fewer_inputs_with_a_scale_than_asked_for_are_told() -> None:
    """The largest divisor counts, by an independent search."""
    (row,) = _group_rows(ModelArgs(dim=200, n_heads=4, hidden_dim=512), "int4")
    assert row[1].startswith("int4: 25 inputs share a scale, as 32 does not divide 200")
    assert max(size for size in range(33) if 200 % max(1, size) == 0) == 25
    assert _group_rows(ModelArgs(dim=256, n_heads=4, hidden_dim=514), "int4-64")[0][1].startswith("int4-64: 2 inputs")
    assert not _group_rows(ModelArgs(dim=256, n_heads=4, hidden_dim=512), "int4-64")
    assert not _group_rows(ModelArgs(dim=200, n_heads=4), "int8") and not _group_rows(ModelArgs(), "auto")


def test_no_days_are_told_of_a_run_whose_length_is_not_known() -> None:
    unknown = Found(None, "nothing says it; --tokens does")
    found = summary(PLAN, unknown)
    assert (found["tokens"], found["days"], found["chip_hours"]) == (None, None, None)
    assert "for  a run whose length is not known: nothing says it; --tokens does" in training_text(PLAN, unknown)


def test_what_goes_to_the_host_is_told_and_said_not_to_be_timed() -> None:
    offloading = replace(PLAN, schedule=Schedule(Cost(matrix=0.25, host_bytes=3e9), TOPOLOGY.chip))
    assert "3.0 GB to and from the host's memory (time not counted)" in training_text(offloading, Found(1.0, ""))
    assert "host" not in training_text(PLAN, Found(1.0, ""))


def test_advice_says_whether_it_was_compiled() -> None:
    compiled = Advice("--train.remat full", "v5e:2x2", True, 10 * GiB, 1.5)
    assert advice_rows(TOPOLOGY, [compiled]) == [
        ("change", "--train.remat full: fits, 10.00 of 15.75 GiB a chip, 1,500 ms a step (compiled)")
    ]
    estimated = Advice("--topology v5e:4x4", "v5e:4x4", False, 12 * GiB, None)
    (label, none), (_, larger) = advice_rows(TOPOLOGY, [estimated])
    assert label == "change" and none == "no settings were found that fit on v5e:2x2"
    assert larger == "--topology v5e:4x4: about 12.00 GiB a chip (estimated, not compiled)"
    assert "no slice holds it" in advice_rows(TOPOLOGY, [])[1][1]


def test_the_document_mask_costs_what_one_step_takes_more_than_the_other() -> None:
    masked = replace(
        PLAN, config=replace(PLAN.config, data=DataArgs(document_mask=True)), bytes=3 << 29,
        schedule=Schedule(Cost(matrix=0.26, flops=3e12, hbm_bytes=5e9, kernels={"splash": 2}), TOPOLOGY.chip),
    )  # fmt: skip
    cost = mask_cost(masked, PLAN)
    assert cost is not None and cost["without"]["step_seconds"] == 0.25
    assert cost["step_seconds"] == pytest.approx(0.01) and cost["bytes_per_device"] == 1 << 29
    assert (cost["compiled_flops_per_device"], cost["hbm_bytes"]) == (3e12, 5e9)
    (name, time), (_, moved), (_, kernels) = mask_rows(masked, cost)
    assert name == "mask" and time == "document masks cost +10.00 ms a step, +4.00% of 250 ms without them"
    assert moved.startswith("+3.000 TFLOP and +5.000 GB from and to memory a chip, +0.500 GiB")
    assert "not estimated" in kernels
    assert (
        "with document masks" in training_text(masked, Found(1.0, ""))
        and summary(masked, Found(1.0, ""))["document_mask"]
    )
    assert mask_cost(masked, None) is None and "not known" in mask_rows(masked, None)[0][1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_long_work_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    """A line now and then in a file; on a terminal one that changes, and goes at the end."""
    monkeypatch.setattr("sys.stderr", stream)
    with Console(as_json=True).working() as beat:
        for seconds in range(1, 2 * BEAT + 1):
            beat(seconds)
    said = stream.getvalue()
    assert f"compiling for {BEAT} s so far" in said
    if stream.isatty():
        assert "\n" not in said and said.count("\r") == 2 * BEAT + 1 and said.endswith("\r\x1b[K")
    else:
        assert said.count("\n") == 2 and "\r" not in said
