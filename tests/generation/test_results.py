"""Files of results: each says what it was made with; a stopped job goes on; two do not write at once."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llama_jax.checkpoint.identity import identity
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation.prompts import Asked, Job
from llama_jax.generation.results import SKIPPED, Results, result
from llama_jax.generation.rows import Completion

ARGS = SampleArgs(seed=3)
DONE = Completion("é\u2028 b", [5, 6], [-0.5, -1.0], "length")
SETTINGS = {"ckpt": "runs/tiny", "exact": False, "model": "abc"}


def asked(*jobs: Job) -> list[Asked]:
    return [Asked(job, [1, 2]) for job in jobs]


JOBS = asked(Job("a", SampleArgs(n=2, stop=("x",), logit_bias={3: -math.inf})), Job("b\n", ARGS))


def write(path: Path, count: int, jobs: list[Asked] = JOBS) -> None:
    with Results(str(path), jobs, SETTINGS) as results:
        for _ in range(count):
            results.add(DONE)


def test_results_stand_in_order_each_with_what_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 3)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == ["a", "a", "b\n"]
    assert lines[0]["completion"] == DONE.text and lines[0]["completion_tokens"] == 2
    assert lines[2]["made_with"]["seed"] == 3 and lines[0]["made_with"]["logit_bias"] == {"3": "-inf"}


def test_a_job_goes_on_behind_what_is_done_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    write(whole, 3)
    content = whole.read_bytes()
    for size in range(0, len(content) + 1, 7):
        path.write_bytes(content[:size])
        results = Results(str(path), JOBS, SETTINGS)
        assert results.done == content[:size].count(b"\n")
        write(path, 3 - results.done)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("jobs", "settings", "words"),
    [
        (
            asked(Job("z", JOBS[0].job.args), JOBS[1].job),
            SETTINGS,
            "line 1: expected a result of the prompt 'z', found 'a'",
        ),
        (
            asked(JOBS[0].job, Job("b\n", SampleArgs(seed=4))),
            SETTINGS,
            "line 3: expected a result made with seed 4, found 3",
        ),
        (JOBS, {"ckpt": "other"}, "line 1: expected a result made with ckpt 'other', found 'runs/tiny'"),
        (JOBS[:1], SETTINGS, "expected up to 2 results, one a completion, found 3"),
    ],
)
def test_results_of_another_job_are_refused_and_left_alone(
    tmp_path: Path, jobs: list[Asked], settings: dict[str, str], words: str
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 3)
    before = path.read_bytes()
    with pytest.raises(UserError) as refused:
        Results(str(path), jobs, settings)
    assert f"{path}: {words}" in str(refused.value) and "another --output" in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["hello", "[]", "{}", '{"prompt": "a"}', '{"prompt": "a", "made_with": 1}', "\xff"])
def test_other_files_are_no_results(tmp_path: Path, line: str) -> None:
    (tmp_path / "out").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match="line 1: expected"):
        Results(str(tmp_path / "out"), JOBS, SETTINGS)


def test_a_file_of_one_line_that_is_no_torn_result_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("my notes")
    with pytest.raises(UserError, match="expected results of this command, found 'my notes'"):
        write(tmp_path / "out", 1)
    assert (tmp_path / "out").read_text() == "my notes"


def test_where_results_cannot_be_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output: expected a file in a folder, found no folder"):
        Results(str(tmp_path / "no" / "out"), JOBS, SETTINGS)
    with pytest.raises(UserError, match="--output: expected a file, found the folder"):
        Results(str(tmp_path), JOBS, SETTINGS)
    Results(str(tmp_path / "out"), JOBS, SETTINGS)
    assert not (tmp_path / "out").exists(), "nothing is made before the job begins"


def test_two_do_not_write_one_file_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = Results(str(path), JOBS, SETTINGS)
    with first:
        first.add(DONE)
        with pytest.raises(UserError, match=r"--output: .*out.jsonl in use by another command; wait"):
            write(path, 3)
        before = path.read_bytes()
    assert path.read_bytes() == before
    # One that is killed leaves its lock to nobody.
    child = os.fork()
    if not child:
        Results(str(path), JOBS, SETTINGS).__enter__().add(DONE)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert Results(str(path), JOBS, SETTINGS).done == 2
    write(path, 1)
    assert Results(str(path), JOBS, SETTINGS).all_done


def test_what_the_first_has_written_since_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    late = Results(str(path), JOBS, SETTINGS)
    write(path, 2)
    with late:
        assert late.done == 2
        late.add(DONE)
    assert len(path.read_bytes().splitlines()) == 3


def test_a_file_that_nothing_came_of_is_not_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(ZeroDivisionError), Results(str(path), JOBS, SETTINGS):
        raise ZeroDivisionError
    assert not path.exists()
    path.touch()
    with Results(str(path), JOBS, SETTINGS):
        pass
    assert path.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "xyz"}, "expected a result of the model that is in 'runs/tiny' now, found one of another model"),
        ({"model": "xyz", "ckpt": "other"}, "expected a result of the model that is in 'other' now"),
        ({"exact": True}, "expected a result made with exact True, found False"),
    ],
)
def test_another_model_under_the_same_path_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write(path := tmp_path / "out.jsonl", 3)
    with pytest.raises(UserError, match=f"line 1: {words}"):
        Results(str(path), JOBS, SETTINGS | changes)


def test_a_copy_of_the_model_goes_on_and_so_do_results_of_before_models_were_named(tmp_path: Path) -> None:
    write(path := tmp_path / "out.jsonl", 2)
    assert Results(str(path), JOBS, SETTINGS | {"ckpt": "a/copy"}).done == 2
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for line in lines:
        del line["made_with"]["model"], line["made_with"]["exact"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Results(str(path), JOBS, SETTINGS).done == 2
    for changes in ({"ckpt": "other"}, {"exact": True}):
        with pytest.raises(UserError, match="expected a result made with"):
            Results(str(path), JOBS, SETTINGS | changes)


def test_skipped_and_cut_prompts_say_so_and_another_choice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fine, long = JOBS[1], JOBS[1]._replace(ids=[1] * 99)
    with Results(str(path), [long._replace(skipped=True), fine], SETTINGS) as results:
        results.add(SKIPPED)
        results.add(DONE)
    first, second = (json.loads(line) for line in path.read_text().split("\n")[:-1])
    assert (first["finish_reason"], first["prompt_tokens"], first["completion"]) == ("too_long", 99, "")
    assert "too_long" not in second["made_with"] and "cut_tokens" not in second
    with pytest.raises(UserError, match="line 1: expected a result made with too_long 'cut', found 'skip'"):
        Results(str(path), [long._replace(cut=3), fine], SETTINGS)
    with pytest.raises(UserError, match="line 1: expected a result made with too_long 'refuse', found 'skip'"):
        Results(str(path), [fine, fine], SETTINGS)
    assert result(long._replace(cut=3), DONE)["cut_tokens"] == 3


def test_a_pipe_and_the_like_are_written_to_and_not_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(fifo := tmp_path / "pipe")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write(fifo, 3)
    assert len(os.read(reader, 1 << 16).splitlines()) == 3
    os.close(reader)
    for _ in range(2):
        write(Path("/dev/null"), 3)
        write(Path("/dev/stdout"), 2)
    monkeypatch.chdir(tmp_path)
    write(Path("-"), 1)
    lines = capfd.readouterr().out.split("\n")[:-1]
    assert len(lines) == 5 and all(json.loads(line)["completion"] == DONE.text for line in lines)
    assert not Results("/dev/null", [], SETTINGS).all_done
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_bytes_that_are_no_text_in_settings_do_not_stop_a_job(tmp_path: Path) -> None:
    settings = SETTINGS | {"ckpt": "runs/\udcff"}
    with Results(str(tmp_path / "out"), JOBS, settings) as results:
        results.add(DONE)
    assert Results(str(tmp_path / "out"), JOBS, settings).done == 1


def test_a_model_is_told_by_what_it_is_made_of(tmp_path: Path) -> None:
    def checkpoint(name: str, weights: bytes = b"w" * 300_000, **more: bytes) -> Path:
        for path, content in {"params/d/1": weights, "model/model.json": b"{}", "state/1": b"s"}.items():
            (tmp_path / name / path).parent.mkdir(parents=True)
            (tmp_path / name / path).write_bytes(content)
        for file, content in more.items():
            (tmp_path / name / file.replace("_", ".")).write_bytes(content)
        return tmp_path / name

    one = checkpoint("one")
    assert identity(one) == identity(checkpoint("copy"))
    (one / "state" / "1").write_bytes(b"another")
    assert identity(one) == identity(tmp_path / "copy")
    others = [b"x" + b"w" * 299_999, b"w" * 299_999 + b"x", b"w" * 299_999]
    found = {identity(checkpoint(f"other {i}", weights)) for i, weights in enumerate(others)}
    assert len(found | {identity(one)}) == 4
    # The table of checksums tells more, and is read in place of the files.
    row = {"size": 300_000, "crc32": "0a"}
    tables = [{"params/d/1": row, "state/1": {}}, {"params/d/1": row}, {"params/d/1": row | {"crc32": "0b"}}]
    named = [
        identity(checkpoint(f"table {i}", checksums_json=json.dumps({"files": table}).encode()))
        for i, table in enumerate(tables)
    ]
    assert named[0] == named[1] != named[2] and identity(one) not in named
