"""Files of prompts and of results: what is read, what is refused, and how a stopped job goes on."""

import json
import math
from pathlib import Path

import pytest

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation.jobs import Job, Results, read_prompts
from llama_jax.generation.rows import Completion

ARGS = SampleArgs(seed=3)
DONE = Completion("é\u2028 b", [5, 6], [-0.5, -1.0], "length")
SETTINGS = {"ckpt": "runs/tiny"}


def prompts(tmp_path: Path, text: str, name: str = "p.txt") -> list[Job]:
    (tmp_path / name).write_bytes(text.encode())
    return read_prompts(tmp_path / name, ARGS)


def test_a_line_is_a_prompt(tmp_path: Path) -> None:
    assert prompts(tmp_path, "\ufeffone \r\n\n two\u2028three") == [Job("one ", ARGS), Job(" two\u2028three", ARGS)]


def test_an_object_a_line_has_settings_of_its_own(tmp_path: Path) -> None:
    text = '{"prompt": ""}\n{"prompt": "b", "top-k": 4, "stop": "x", "logit_bias": {"5": -1}, "n": 2}\n'
    text += '{"prompt": "c", "stop": ["a", "b"], "temperature": 1}'
    jobs = prompts(tmp_path, text, "p.jsonl")
    assert jobs[0] == Job("", ARGS)
    assert jobs[1] == Job("b", SampleArgs(seed=3, top_k=4, stop=("x",), logit_bias={5: -1.0}, n=2))
    assert jobs[2] == Job("c", SampleArgs(seed=3, stop=("a", "b"), temperature=1.0))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected a JSON object"), ("[" * 100_000, "expected a JSON object"), ("[1]", "prompt"), ("{}", "prompt"),
        ('{"prompt": 3}', "prompt"), ('{"prompt": "a", "temprature": 1}', "unknown key temprature"),
        ('{"prompt": "a", "temperature": -1}', "temperature: expected"), ('{"prompt": "a", "top_p": 2}', "top_p: expected"),
        ('{"prompt": "a", "n": 0}', "n: expected"), ('{"prompt": "a", "n": "2"}', "n: expected"),
        ('{"prompt": "a", "stop": [1]}', "stop: expected"), ('{"prompt": "a", "stop": ""}', "stop: expected"),
        ('{"prompt": "a", "logit_bias": {"a": 1}}', "logit_bias: expected"),
        ('{"prompt": "a", "logit_bias": {"1": "x"}}', "logit_bias: expected"),
        ('{"prompt": "a", "logit_bias": [1]}', "logit_bias: expected"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        prompts(tmp_path, '{"prompt": "good"}\n' + line, "p.jsonl")
    assert f"{tmp_path / 'p.jsonl'}: line 2: " in str(refused.value) and words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="--prompts-file: expected a file of prompts, found no file"):
            read_prompts(path, ARGS)
    with pytest.raises(UserError, match="expected one or more prompts, found none"):
        prompts(tmp_path, "\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="expected text in UTF-8"):
        read_prompts(tmp_path / "latin.txt", ARGS)


JOBS = [Job("a", SampleArgs(n=2, stop=("x",), logit_bias={3: -math.inf})), Job("b\n", ARGS)]


def write(path: Path, count: int, jobs: list[Job] = JOBS) -> None:
    with Results(path, jobs, SETTINGS) as results:
        for _ in range(count):
            results.add(2, DONE)


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
        results = Results(path, JOBS, SETTINGS)
        assert results.done == content[:size].count(b"\n")
        write(path, 3 - results.done)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("jobs", "settings", "words"),
    [
        ([Job("z", JOBS[0].args), JOBS[1]], SETTINGS, "line 1: expected a result of the prompt 'z', found 'a'"),
        ([JOBS[0], Job("b\n", SampleArgs(seed=4))], SETTINGS, "line 3: expected a result made with seed 4, found 3"),
        (JOBS, {"ckpt": "other"}, "line 1: expected a result made with ckpt 'other', found 'runs/tiny'"),
        (JOBS[:1], SETTINGS, "expected up to 2 results, one a completion, found 3"),
    ],
)
def test_results_of_another_job_are_refused_and_left_alone(
    tmp_path: Path, jobs: list[Job], settings: dict[str, str], words: str
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, 3)
    before = path.read_bytes()
    with pytest.raises(UserError) as refused:
        Results(path, jobs, settings)
    assert f"{path}: {words}" in str(refused.value) and "another --output" in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["hello", "[]", "{}", '{"prompt": "a"}', '{"prompt": "a", "made_with": 1}', "\xff"])
def test_other_files_are_no_results(tmp_path: Path, line: str) -> None:
    (tmp_path / "out").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match="line 1: expected"):
        Results(tmp_path / "out", JOBS, SETTINGS)


def test_a_file_of_one_line_that_is_no_torn_result_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("my notes")
    with pytest.raises(UserError, match="expected results of this command, found 'my notes'"):
        write(tmp_path / "out", 1)
    assert (tmp_path / "out").read_text() == "my notes"


def test_where_results_cannot_be_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output: expected a file in a folder, found no folder"):
        Results(tmp_path / "no" / "out", JOBS, SETTINGS)
    with pytest.raises(UserError, match="--output: expected a file, found the folder"):
        Results(tmp_path, JOBS, SETTINGS)
    Results(tmp_path / "out", JOBS, SETTINGS)
    assert not (tmp_path / "out").exists(), "nothing is made before the job begins"
