"""TensorBoard events hold what metrics.jsonl holds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from tests.training.test_bad_steps import Killed, not_finite_at, spoilt, train  # noqa: F401

ROOT = Path(__file__).parents[2]


def events(path: Path) -> list[Event]:
    """The events of a file: each a length, its checksum, the bytes and theirs (TensorFlow's TFRecord)."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        body, checksum = data[12 : 12 + length], data[12 + length : 16 + length]
        assert int.from_bytes(checksum, "little") == masked_crc32c(body)
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """Values by step, over all starts, whose files are named by their seconds; a start's SessionLog hides the steps after it, as TensorBoard has it."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.iterdir()):
        for event in events(path):
            if event.HasField("session_log"):
                found = {step: values for step, values in found.items() if step < event.step}
            for value in event.summary.value:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


def test_events_are_the_records_of_metrics_jsonl_also_after_a_kill(tmp_path: Path, spoilt: Any) -> None:  # noqa: F811
    def killed_at_6(step: int, batch: Any) -> Any:
        if step == 6:
            raise Killed
        return not_finite_at(2)(step, batch)

    spoilt(killed_at_6)
    choice: Any = {"tensorboard": True, "bad_steps": "skip", "save_interval": 3}
    with pytest.raises(Killed):
        train(tmp_path / "run", **choice)
    spoilt(not_finite_at(2))
    train(tmp_path / "run", **choice)
    found = scalars(tmp_path / "run" / "tensorboard")
    expected = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(found) == [record["step"] for record in expected] == list(range(1, 9))
    for record in expected:
        numbers = {name: value for name, value in record.items() if name != "step" and value is not None}
        assert found[record["step"]] == pytest.approx(numbers, rel=1e-6)
    assert "train_loss" not in found[2] and "eval_loss" in found[8]


def test_without_the_library_one_line_says_what_to_install_before_any_work(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['tensorboardX'] = None; sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = [sys.executable, "-c", hide, str(ROOT / "train.py"), "--train.tensorboard", "--train.save-dir", "run"]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: train.tensorboard: expected the package tensorboardX") and "pip install" in line
    assert result.stdout == "" and list(tmp_path.iterdir()) == []
