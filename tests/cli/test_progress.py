"""Progress: lines where no terminal is, and amounts that read well."""

import pytest

from llama_jax.cli.progress import Progress, bytes_text, duration


def test_without_a_terminal_lines_say_how_far_how_fast_and_how_long(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS", 0)
    with Progress("step", 1000, "step", start=998) as progress:
        progress.note("loss 1.0")
        progress.update()
        progress.update()
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("step 999 of 1,000, loss 1.0, ") and first.endswith(" to go")
    assert second == "step 1,000 of 1,000, loss 1.0, 0 s to go"
    assert err == ""


def test_bytes_are_told_in_units_and_a_total_may_be_unknown(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS", 0)
    with Progress("tokens", None, "B") as progress:
        progress.update(3_500_000)
    assert capsys.readouterr().out == "tokens 3.50 MB\n"


def test_quick_work_prints_nothing(capsys):
    with Progress("converting", 10, "B") as progress:
        progress.update(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (0.2, "1 s"), (90, "1 min 30 s"), (7322, "2 h 2 min 2 s"), (3600, "1 h 0 s")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 kB"), (1500, "1.50 kB"), (2_340_000, "2.34 MB"), (13_476_939_616, "13.48 GB")]
)
def test_sizes_read_well(count: int, text: str) -> None:
    assert bytes_text(count) == text
