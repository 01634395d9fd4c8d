"""What a run says of its losses, where bits per byte are known and where the tokens do not hold the text."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_jax.expected_args import ExpectedArgs
from llama_jax.training.clock import Clock
from llama_jax.training.log import closing_text, evaluation_text, loss_text, speed_text, time_text
from llama_jax.training.plot import _running_mean, plot_losses
from llama_jax.training.run_folder import RunFolder

RECORDS: list[dict[str, Any]] = [
    {"step": step, "tokens": 64 * step, "train_loss": 3.0 / step, "eval_loss": 3.5 / step, "eval_bits_per_byte": 1.75 / step}
    for step in (1, 2, 3)
]  # fmt: skip
LOSSY = [record | {"eval_bits_per_byte": None} for record in RECORDS]


def test_bits_per_byte_are_told_where_they_are_known() -> None:
    assert loss_text(RECORDS[0]) == "3.5000 nats a token, 1.750 bits per byte"
    assert loss_text(LOSSY[0]) == "3.5000 nats a token"
    assert evaluation_text(RECORDS[0], 1.5, True) == (
        "step 1: eval loss 3.5000 nats a token, 1.750 bits per byte (+0.250 from the floor), the best so far"
    )
    assert evaluation_text(LOSSY[0], None, False) == "step 1: eval loss 3.5000 nats a token"


@pytest.mark.parametrize("records", [RECORDS, LOSSY], ids=["known", "not known"])
def test_losses_are_drawn_with_and_without_bits_per_byte(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    plot_losses(tmp_path / "losses.png", records, "a run")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_of_the_losses_does_not_follow_the_last_batch() -> None:
    rng = random.Random(0)
    for count in (40, 70, 700):
        losses = [1.0 + rng.gauss(0, 0.03) for _ in range(count)]
        losses[-1] = 0.5  # an easy batch
        assert _running_mean(losses)[-1] > 0.88, count
        assert max(_running_mean(losses[::-1])[9:]) < 1.05


def test_the_mean_keeps_the_fall_at_the_beginning_and_the_length() -> None:
    losses = [10.0 / (i + 1) for i in range(70)]
    means = _running_mean(losses)
    assert len(means) == 70 and means[0] == 10.0 and means[1] == pytest.approx(sum(losses[:3]) / 3)
    for count in range(1, 8):
        assert _running_mean(losses[:count]) == losses[:count], "too few for a mean"


def test_axes_say_that_they_are_logarithmic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[tuple[str, str]] = []
    original = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        for axes in (figure.axes[0], *figure.axes[0].child_axes):
            seen.append((axes.get_yscale(), axes.get_ylabel()))
            assert "log" not in axes.get_xlabel() and axes.get_xscale() == "linear"
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    plot_losses(tmp_path / "losses.png", RECORDS, "a run")
    assert len(seen) == 2 and all("(log scale)" in label for _, label in seen) and seen[0][0] == "log"


@pytest.mark.parametrize("records", [RECORDS[:2], LOSSY], ids=["known", "not known"])
def test_what_is_expected_is_drawn_where_it_is_known_in_the_unit_of_the_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]]
) -> None:
    """Two nats a token are one bit per byte here. The curve goes on to the end of a run that is at two thirds."""
    from matplotlib.figure import Figure

    seen: list[tuple[list[str], list[Any]]] = []
    original = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        axes = figure.axes[0]
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        bands = [str(band.get_label()) for band in axes.collections]
        middle = lines["eval, expected"].get_xydata().tolist() if "eval, expected" in lines else []
        seen.append((bands, middle))
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    expected = ExpectedArgs((64, 192), (1.0, 0.4), (1.5, 0.5), (2.0, 0.6))
    timed = [r | {"run_seconds": 60.0 * r["step"]} for r in records]
    plot_losses(tmp_path / "losses.png", timed, "a run", None, expected)
    plot_losses(tmp_path / "losses.png", timed, "a run of which nothing is expected")
    drawn = (["eval, expected interval"], [[64.0, pytest.approx(3.0)], [192.0, pytest.approx(1.0)]])
    assert seen == [drawn if records[0]["eval_bits_per_byte"] else ([], []), ([], [])]


def test_a_scale_of_time_stands_above_that_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second third of the run took ten times as long as each of the others; the run was stopped once in it."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    original = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        original(figure, *args, **options)
        axes = figure.axes[0]
        tops = [child for child in axes.child_axes if child.get_xlabel().startswith("time")]
        for time in tops:
            to_pixels = axes.transData.transform
            along = [time.transData.transform((minutes, 0))[0] for minutes in (0, 1, 11, 12)]
            assert along == pytest.approx([to_pixels((tokens, 1))[0] for tokens in (0, 64, 128, 192)], abs=0.5)
        found.extend(time.get_xlabel() for time in tops)

    monkeypatch.setattr(Figure, "savefig", savefig)
    timed = [r | {"run_seconds": seconds} for r, seconds in zip(RECORDS, (60.0, 660.0, 720.0), strict=True)]
    plot_losses(tmp_path / "losses.png", timed, "a run")
    plot_losses(tmp_path / "losses.png", RECORDS, "a run of before")
    plot_losses(tmp_path / "losses.png", timed[:1], "a run of a step")
    assert found == ["time, minutes"]


def panels_of(records: list[dict[str, Any]], path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The panels below the losses by their labels, each with the names of its lines that have one."""
    from matplotlib.figure import Figure

    found: dict[str, list[str]] = {}
    original = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        for axes in figure.axes[1:]:
            assert axes.get_xlim() == figure.axes[0].get_xlim()
            lines = [str(line.get_label()) for line in axes.get_lines()]
            found[axes.get_ylabel().partition("\n")[0]] = [name for name in lines if not name.startswith("_")]
        assert [bool(axes.get_xlabel()) for axes in figure.axes] == [False] * len(found) + [True]
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    plot_losses(path / "losses.png", records, "a run")
    return found


def test_panels_show_what_the_records_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of before has only losses; one that was resumed has the other numbers in its later records alone."""
    norms = {
        "grad_norm": 1.0,
        "grad_norm/wq": 0.5,
        "update_norm/wq": 0.0,
        "grad_norm/norms": None,
        "update_norm/norms": 0.1,
    }
    with_all = [record | {"tokens_per_second": 100.0, **norms} for record in RECORDS]
    expected = {"tokens a second": [], "gradient norm": ["all", "wq"], "update norm": ["norms"]}
    assert panels_of(RECORDS, tmp_path, monkeypatch) == {}
    assert panels_of(with_all, tmp_path, monkeypatch) == expected
    assert panels_of([*RECORDS[:2], with_all[2]], tmp_path, monkeypatch) == expected
    assert panels_of([r | {"update_norm/norms": 0.0} for r in with_all], tmp_path, monkeypatch)["update norm"] == []


def test_the_mean_speed_at_the_end_is_that_of_the_records() -> None:
    """Two records of 192 and 64 tokens, at 96 and 32 tokens/s: 256 tokens in 4 seconds."""
    clock = Clock()
    assert speed_text(clock, []) == ""
    clock.recorded = 256, 4.0
    assert speed_text(clock, RECORDS) == ", 64 tokens/s in steps on average"


def test_the_end_tells_how_long_the_steps_waited_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader delays each of four batches by 2 seconds, and the devices are idle meanwhile."""
    now = 0.0

    def batches() -> Iterator[int]:
        nonlocal now
        for batch in range(4):
            now += 2
            yield batch

    monkeypatch.setattr("llama_jax.training.clock.time.perf_counter", lambda: now)
    clock = Clock()
    with clock.spent_on("step"):
        for _ in clock.waiting_for("data", batches()):
            now += 10
    assert time_text(clock, clock.total, 0, 0) == (
        "goodput: 83.3% of 48 s were spent in steps; start 0.0 s, waiting for data 8.0 s, evaluation 0.0 s, saving 0.0 s, "
        "samples 0.0 s"
    )
    assert time_text(clock, clock.total, 52, 40).endswith(
        "\nover all starts: 80.0% of 100 s, not counting repeated steps"
    )


@pytest.mark.parametrize(("context", "wanted"), [(64, 64), (128, 128), (4096, 256)])
def test_no_more_tokens_are_suggested_at_the_end_than_the_context_has(
    tmp_path: Path, context: int, wanted: int
) -> None:
    last = closing_text(RunFolder(tmp_path), 10, Clock(), "Once", context).splitlines()[-1]
    assert last.endswith(f"sample.py --ckpt {tmp_path} Once --max-new-tokens {wanted}")
