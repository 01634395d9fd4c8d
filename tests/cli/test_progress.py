"""Progress: a bar that fits its terminal, lines where no terminal is, what goes on in silences, and amounts that read well."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from llama_jax.cli import progress as module
from llama_jax.cli.progress import Progress, bytes_text, duration, working
from tests.commands import ROOT

# What a step of a large run on a TPU has to say, of trouble too.
LONG = "loss 2.345, 1,234,567 tokens/s a device, 12 bad, data 4 s, saving 31 s, MFU 45%, 78.12 GB"


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
    assert re.fullmatch(r"tokens 3.50 MB, [\d.,]+ GB/s\n", capsys.readouterr().out)


def test_quick_work_prints_nothing(capsys):
    with Progress("converting", 10, "B") as progress:
        progress.update(10)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    """A standard error that says that somebody watches it."""

    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Have standard error be a terminal; called in the test, as pytest puts its own there before."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def bar(columns: int, text: str, done: int = 123_456, total: int = 500_000, pace: float | None = 0.1) -> str:
    """The line of a bar in a terminal of so many columns."""
    progress = Progress("step", total, "step", start=done)
    progress.note(text, pace)
    progress._bar.dynamic_ncols, progress._bar.ncols = None, columns
    line = str(progress._bar)
    progress._bar.close()
    return line


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
def test_the_bar_fits_its_terminal_and_leaves_out_whole_parts_the_least_important_first(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(monkeypatch)
    line = bar(columns, LONG)
    assert len(line) < columns
    shown = re.split(r"\|", line)[-1].strip().split(", ")
    assert shown == [*LONG.split(", ")[: len(shown) - 1], "10 h 27 min 35 s to go"]
    assert line.startswith("123,456/500,000  25%") and "loss 2.345" in shown


def test_at_80_columns_a_usual_step_shows_loss_speed_memory_time_and_a_bar(monkeypatch) -> None:
    watched(monkeypatch)
    line = bar(80, "loss 0.993, 18,746 tokens/s, 1.29 GB", 360, 700, 2048 / 18746)
    assert re.fullmatch(r"360/700  51% \|.{6,}\| loss 0.993, 18,746 tokens/s, 1.29 GB, 38 s to go", line), line


def test_the_time_to_go_is_that_of_the_speed_that_is_shown(capsys, monkeypatch) -> None:
    """500 steps of 100 tokens at 50 tokens/s are 1,000 s, whatever the bar's own clock would say."""
    watched(monkeypatch)
    assert bar(80, "50 tokens/s", 500, 1000, pace=2.0).endswith("50 tokens/s, 16 min 40 s to go")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(Progress, "SECONDS", 0)
    with Progress("step", 1000, "step", start=499) as progress:
        progress.note("50 tokens/s", 2.0)
        progress.update()
    assert capsys.readouterr().out == "step 500 of 1,000, 50 tokens/s, 16 min 40 s to go\n"


def test_the_bar_says_what_goes_on_while_no_step_is_made(monkeypatch) -> None:
    terminal = watched(monkeypatch)
    with Progress("step", 10, "step") as progress:
        progress.note("loss 1.0", 1.0)
        progress.update()
        with progress.busy("evaluating step 1"):
            line = str(progress._bar)
        after = str(progress._bar)
    assert line.endswith("loss 1.0, evaluating step 1, 1 s") and "evaluating step 1" in terminal.getvalue()
    assert after.endswith("loss 1.0, 9 s to go")


def beats(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once something was told in a silence, of which a beat is told at once."""
    told, original = threading.Event(), module._ticking

    def ticking(tell, every):
        def noted(seconds):
            if not told.is_set():
                tell(every + 0.5)
                told.set()

        return original(noted, 0.001)

    monkeypatch.setattr(module, "_ticking", ticking)
    return told


def test_a_silence_is_explained_in_a_plain_line_where_no_terminal_is(capsys, monkeypatch) -> None:
    told = beats(monkeypatch)
    with working("compiling the training step"):
        assert told.wait(30)
    out, err = capsys.readouterr()
    assert (out, err) == ("compiling the training step: 31 s so far\n", "")


def test_a_silence_may_be_explained_on_standard_error_where_the_output_is_a_result(capsys, monkeypatch) -> None:
    told = beats(monkeypatch)
    with working("loading a model", sys.stderr):
        assert told.wait(30)
    assert capsys.readouterr() == ("", "loading a model: 31 s so far\n")


def test_on_a_terminal_the_line_about_a_silence_goes_when_it_ends(monkeypatch) -> None:
    terminal = watched(monkeypatch)
    told = beats(monkeypatch)
    with working("compiling the training step"):
        assert told.wait(30)
    assert terminal.getvalue() == "\rcompiling the training step: 1 s\x1b[K\r\r\x1b[K"


def test_short_work_and_work_that_is_not_to_be_shown_say_nothing(capsys, monkeypatch) -> None:
    terminal = watched(monkeypatch)
    with working("compiling"):
        pass
    beats(monkeypatch)
    with working("compiling", shown=False):
        time.sleep(0.01)
    assert terminal.getvalue() == "" == capsys.readouterr().out


def test_the_width_is_that_of_the_terminal_that_shows_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct
    import termios

    above, below = pty.openpty()
    try:
        fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 64, 0, 0))
        with os.fdopen(os.dup(below), "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            with Progress("step", 500_000, "step", start=123_456) as progress:
                progress.note(LONG, 0.1)
                progress._bar.refresh()
                assert 40 < len(str(progress._bar)) < 64
    finally:
        os.close(above)
        os.close(below)


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


def test_a_bar_takes_nothing_of_the_system_that_a_sudden_end_would_leave_behind() -> None:
    """On macOS, where processes are spawned, Python warned of a semaphore behind each error."""
    code = """if True:
        import multiprocessing, os, sys
        multiprocessing.set_start_method("spawn")
        from llama_jax.cli.progress import Progress, print_above
        with Progress("reading", total=1, unit="B") as progress:
            progress.update(1)
            print_above("error: one line", sys.stderr)
        os._exit(2)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: one line\n")
