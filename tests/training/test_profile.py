"""Traces hold the steps that were asked for, and open in the tools that they are for."""

import contextlib
import gzip
import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_jax.config import TrainArgs
from llama_jax.errors import UserError
from llama_jax.training import profile
from tests.training.test_bad_steps import spoilt, train  # noqa: F401

# Else traces would hold all that they do, and take seconds to write.
NEITHER_EVALUATED_NOR_SAVED = {"eval_interval": 20, "save_interval": 20}


def traced_steps(folder: Path) -> list[int]:
    """Numbers of the steps in the one trace of a run folder, read from the file that Perfetto opens."""
    (path,) = (folder / "profile").rglob("perfetto_trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb")), "xprof's file lies beside it"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted({int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})})


def test_a_trace_holds_just_the_steps_that_were_asked_for_and_its_folder_is_told(tmp_path: Path, spoilt: Any) -> None:  # noqa: F811
    out = train(tmp_path / "run", profile_steps="3-5", **NEITHER_EVALUATED_NOR_SAVED)
    assert traced_steps(tmp_path / "run") == [3, 4, 5]
    assert f"trace of steps 3 to 5: {tmp_path / 'run' / 'profile'}" in out


def test_a_run_that_goes_on_traces_what_is_left_of_the_range_and_one_that_ends_early_what_it_made(
    tmp_path: Path,
    spoilt: Any,  # noqa: F811
) -> None:
    train(tmp_path / "run", max_steps=4)
    train(tmp_path / "run", profile_steps="1-3", max_steps=5)
    assert not (tmp_path / "run" / "profile").exists()
    train(tmp_path / "run", profile_steps="3-20", max_steps=8, **NEITHER_EVALUATED_NOR_SAVED)
    assert traced_steps(tmp_path / "run") == [6, 7, 8]


@pytest.mark.parametrize("steps", ["5-3", "0-3", "a-b", "3-", "-3", "1,2", "1.5", " 3", "3-4-5", "²", "99999999999"])
def test_a_range_that_is_none_is_refused_in_one_line(steps: str) -> None:
    with pytest.raises(
        UserError, match=r"train.profile_steps: expected a step or first-last, as 10-15, found"
    ) as error:
        TrainArgs(profile_steps=steps).check()
    assert "\n" not in str(error.value)


def test_steps_beyond_the_runs_end_are_refused_before_it_begins(tmp_path: Path, spoilt: Any) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"train.profile_steps: expected steps of the run, which has 8, found 9-10"):
        train(tmp_path / "run", profile_steps="9-10")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("platforms", "libtpu", "refused"),
    [
        (None, "0.0.52", True),
        ("tpu,cpu", "0.0.52", True),
        (None, "0.0.42.1", False),
        (None, None, False),
        ("cpu", "0.0.52", False),
    ],
)
def test_a_libtpu_with_which_a_trace_would_crash_is_refused(
    platforms: str | None, libtpu: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if libtpu is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return libtpu

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(
        profile, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=platforms), __version__="1")
    )
    with pytest.raises(UserError, match=r"libtpu 0.0.42, .* found 0.0.52") if refused else contextlib.nullcontext():
        profile.check_profiler()
