"""benchmarks/accelerator.py: the order, the time, what fails, a second start, and the table."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_jax.errors import UserError
from tests.commands import ROOT

SCRIPT = ROOT / "benchmarks" / "accelerator.py"
CONDITIONS = {
    "device": "Chip 9", "backend": "CUDA", "driver": "1", "jax": "0.11", "jaxlib": "0.11", "flax": "1", "torch": "3", "python": "3.12",
    "commit": "abc", "toy": False, "cpu_cores": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module. It imports those beside it by their bare names."""
    sys.path.insert(0, str(SCRIPT.parent))
    before = set(sys.modules)
    try:
        import accelerator

        yield accelerator
    finally:
        while str(SCRIPT.parent) in sys.path:
            sys.path.remove(str(SCRIPT.parent))
        for name in ("accelerator", "accelerator_table", "decode", "train_step", "peers"):
            if name not in before:
                sys.modules.pop(name, None)


def decoded(tokens: float) -> dict[str, Any]:
    return {
        "status": "measured", "benchmark": "decode", "batch": 1, "decode_tokens_per_second": tokens, "first_token_seconds": 0.048,
        "bandwidth_ratio": 0.75, "bandwidth_measured": 2.71e12, "bandwidth_measured_by": "copy",
    }  # fmt: skip


def stepped(tokens: float) -> dict[str, Any]:
    return {
        "status": "measured", "benchmark": "train_step", "tokens_per_second": {"jax": tokens}, "mfu": {"jax": 0.55},
        "memory_bytes": {"jax": 3 << 30}, "step_seconds": 0.364,
    }  # fmt: skip


class Asked:
    """Answers in place of processes, on a clock of its own: each measurement takes the seconds that are expected."""

    def __init__(self, **failing: str) -> None:
        self.now, self.failing, self.what = 0.0, failing, list[str]()

    def __call__(self, measurement: Any, rows: list[str], limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
        self.what.append(measurement.what)
        self.now += measurement.seconds
        for row in rows:
            if reason := next((reason for part, reason in self.failing.items() if part in row), None):
                yield row, {"status": "failed", "reason": reason}
            else:
                yield row, decoded(100.0) if row.startswith("decoding") else stepped(2000.0)


def start(script: ModuleType, path: Path, asked: Asked, minutes: float = 12.0, **changed: Any) -> dict[str, Any]:
    results = script.Results.open(path, CONDITIONS | changed, script.measurements(False))
    results.announce(minutes)
    script.measure_all(results, asked.now + 60 * minutes, asked, lambda: asked.now)
    results.conclude()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_all_fits_in_twelve_minutes_and_the_most_wanted_come_first(script: ModuleType, tmp_path: Path) -> None:
    asked = Asked()
    found = start(script, tmp_path / "a.json", asked)
    assert asked.what[:3] == ["training step, bfloat16", "training step, fp8", "decoding, bfloat16"]
    assert {entry["status"] for entry in found["rows"].values()} == {"measured"} and asked.now < 12 * 60
    assert {row for each in script.measurements(False) for row in each.rows} == set(found["rows"])


def test_what_the_time_does_not_suffice_for_is_named_and_shorter_ones_are_tried(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Asked()
    start(script, tmp_path / "a.json", asked, minutes=4.6)
    masks = "training step, bfloat16, document masks"
    assert asked.what == ["training step, bfloat16", "training step, fp8", "decoding, bfloat16", masks]
    told = capsys.readouterr().out
    assert "decoding, int4, 1 sequence: left out: about 100 s are needed, 66 s of the time were left" in told
    assert "not measured: decoding, int8, 1 sequence; " in told


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "fp8"),
        ("NVIDIA A100-SXM4-80GB", "int8"),
        ("TPU v5 lite", "int8"),
        ("a newer one", "fp8"),
        ("cpu", "fp8"),
    ],
)
def test_the_step_in_eight_bits_is_of_the_kind_that_the_device_multiplies(
    script: ModuleType, device: str, kind: str
) -> None:
    found = {each.what: each for each in script.measurements(False, device)}
    step = found[f"training step, {kind}"]
    assert step.args.products == kind and step.rows == {step.what: ("training step, bfloat16",)}
    assert sum(each.args.products != "float" for each in found.values() if each.what.startswith("training")) == 1


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = Asked()
    with pytest.raises(OSError, match="file"):
        start(script, tmp_path / "file" / "a.json", asked)
    assert not asked.what
    start(script, tmp_path / "new" / "folder" / "b.json", asked)
    assert asked.what


def test_a_device_that_does_not_answer_ends_the_command(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __enter__(self) -> "Silent":
            return self

        def __exit__(self, *_: object) -> None: ...

        def poll(self, seconds: float) -> bool:
            return False

    monkeypatch.setattr(script, "worker", lambda _: Silent())
    with pytest.raises(UserError, match="device: expected one that answers within 120 s, found none; end what else"):
        script.conditions(False)


def test_one_that_fails_is_a_line_with_its_reason_and_a_second_start_tries_it_alone(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    found = start(script, path, Asked(QLoRA="RESOURCE_EXHAUSTED: out of | memory"))
    row = next(row for row in found["rows"] if "QLoRA" in row)
    assert f"| {row} | failed: RESOURCE_EXHAUSTED: out of \\| memory |" in path.with_suffix(".md").read_text()
    capsys.readouterr()
    again = Asked()
    found = start(script, path, again)
    assert again.what == [row] and found["rows"][row]["status"] == "measured"
    assert "has results of an earlier start" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "changed",
    [{"device": "Chip 10"}, {"toy": True}, {"jax": "0.12"}, {"commit": "abd"}, {"torch": "4"}, {"driver": "2"}],
)
def test_results_of_other_conditions_are_not_mixed(script: ModuleType, tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    start(script, path, Asked())
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"expected results of {next(iter(changed))} .*choose another --output"):
        start(script, path, Asked(), **changed)
    assert path.read_bytes() == before
    for text in ("[]", '{"conditions": 1, "rows": 2}', '{"conditions": {'):
        path.write_text(text)
        with pytest.raises(UserError, match="expected results of this script"):
            start(script, path, Asked())


def test_the_table_compares_with_the_fastest_beside_it(script: ModuleType) -> None:
    results = script.Results(Path("a.json"), {}, script.measurements(False))
    compiled, eager = script.PEERS.values()
    rows = {
        "decoding, int8, 1 sequence": decoded(260.0), "decoding, bfloat16, 1 sequence": decoded(130.0),
        "training step, bfloat16": stepped(90_000.0), compiled: stepped(60_000.0), eager: stepped(50_000.0),
    }  # fmt: skip
    text = script.table({"conditions": CONDITIONS, "rows": rows}, results.beside)
    assert text.startswith("Chip 9, 16 CPU cores, jax 0.11, torch 3, driver 1, commit abc. Medians")
    assert (
        "| decoding, int8, 1 sequence | 260 | a step 3.846 ms, the first token 48 ms | 75% of 2.71 TB/s, by copy |  "
        "| 2.00 times decoding, bfloat16, 1 sequence |" in text
    )
    assert f"| training step, bfloat16 | 90,000 | a step 364 ms | 55.0% MFU | 3.0 GiB | 1.50 times {compiled} |" in text
    assert "| decoding, int4, 32 sequences | missing: not tried yet |" in text


class Sent:
    """The end of a process's connection that it sends by."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def send(self, answer: Any) -> None:
        self.answers.append(answer)


def test_a_process_that_cannot_measure_says_why(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    ours = next(each for each in script.measurements(True) if each.what == "training step, bfloat16")

    def said(measurement: Any) -> Any:
        sent = Sent()
        script._serve(measurement, list(measurement.rows), sent)
        (answer,) = sent.answers
        return answer

    monkeypatch.setattr(script.train_step, "alone", lambda name, args: {"of": name})
    assert said(ours) == (ours.what, {"status": "measured", "of": "jax"})

    def exhausted(name: str, args: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED:\nout of memory " + "x" * 1000)

    monkeypatch.setattr(script.train_step, "alone", exhausted)
    row, entry = said(ours)
    assert row is None and entry["status"] == "failed"
    assert entry["reason"].startswith("RuntimeError: RESOURCE_EXHAUSTED: out of memory") and len(entry["reason"]) < 250
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    peer = next(each for each in script.measurements(True) if each.runner != "jax")
    assert said(peer) == (None, {"status": "absent", "reason": "torch is not installed"})


def test_one_number_of_sequences_that_fails_does_not_cost_the_other(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = next(each for each in script.measurements(True) if each.what == "decoding, bfloat16")

    def measure(args: Any, module: Any, params: Any, readers: Any, batch: int) -> Any:
        if batch == 1:
            raise UserError("--new-tokens: expected longer steps")
        return [], {"batch": batch}

    monkeypatch.setattr("llama_jax.devices.compiling.use_compilation_cache", lambda: None)
    monkeypatch.setattr(script.decode, "measure", measure)
    monkeypatch.setattr(script.decode, "random_parameters", lambda *_: None)
    monkeypatch.setattr(script.decode, "memory_readers", lambda *_: {})
    first, second = script.measured(decoding, list(decoding.rows))
    assert first[1] == {"status": "failed", "reason": "UserError: --new-tokens: expected longer steps"}
    assert second == ("decoding, bfloat16, 32 sequences", {"status": "measured", "batch": 32})


@pytest.mark.slow
def test_a_rehearsal_at_toy_sizes_measures_all_and_again_nothing(tmp_path: Path) -> None:
    def call() -> Any:
        return subprocess.run(
            [sys.executable, SCRIPT, "--toy", "--output", tmp_path / "a.json"],
            capture_output=True, text=True, cwd=ROOT, timeout=800, check=False,
        )  # fmt: skip

    first = call()
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    pytest.importorskip("torch", reason="the peer is absent without it, as is said")
    assert {row: entry["status"] for row, entry in rows.items()} == dict.fromkeys(rows, "measured") and len(rows) == 11
    assert rows["decoding, int4, 1 sequence"]["bandwidth_by_way"]["copy"] > 0
    again = call()
    assert again.returncode == 0 and json.loads((tmp_path / "a.json").read_text())["rows"] == rows
    assert "not measured" not in again.stdout
