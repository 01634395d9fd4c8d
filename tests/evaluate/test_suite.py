"""The small suite: the same everywhere, each right choice right, and written once."""

import hashlib
import re
from pathlib import Path

import pytest

from llama_jax.data.story_rules import PLACES
from llama_jax.errors import UserError
from llama_jax.evaluate.suite import ITEMS, NUMBERS, TASKS, make_suite, records
from llama_jax.evaluate.tasks import read_tasks

DIGESTS = {
    "agreement": "2f7543067c619762",
    "names": "face52607c445669",
    "counting": "fc94bae2a6e378f0",
    "arithmetic": "2bb330aa19d1d968",
}


def test_the_files_are_the_same_on_every_machine_and_are_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_suite(str(tmp_path / "suite"))
    assert "--tasks " + str(tmp_path / "suite") in capsys.readouterr().out
    found = {path.stem: path.read_bytes() for path in (tmp_path / "suite").iterdir()}
    assert {name: hashlib.sha256(content).hexdigest()[:16] for name, content in found.items()} == DIGESTS
    tasks = read_tasks([str(tmp_path / "suite")])
    assert [task.name for task in tasks] == sorted(TASKS)
    assert all(len({item.prompt for item in task.items}) == ITEMS for task in tasks)
    make_suite(str(tmp_path / "suite"))  # a second time: nothing to do
    (tmp_path / "suite" / "names.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"names\.jsonl: expected the suite or nothing there, found something else"):
        make_suite(str(tmp_path / "suite"))
    assert (tmp_path / "suite" / "names.jsonl").read_text() == "mine"


@pytest.mark.parametrize("task", TASKS)
def test_right_choices_are_in_every_place_and_no_choice_stands_twice(task: str) -> None:
    made = records(task)
    assert all(len({*one["choices"]}) == len(one["choices"]) for one in made)
    counts = [sum(one["answer"] == i for one in made if len(one["choices"]) == 4) for i in range(4)]
    assert min(counts) > sum(counts) / 8


def test_sums_are_right() -> None:
    for one in records("arithmetic"):
        first, verb, second = re.fullmatch(
            r"\w+ had (\w+) [\w-]+ and (found|gave) (\w+) (?:more|to \w+)\. Now \w+ had", one["context"]
        ).groups()  # type: ignore[union-attr]
        sign = 1 if verb == "found" else -1
        right = NUMBERS.index(first) + sign * NUMBERS.index(second)
        assert NUMBERS[right] == one["choices"][one["answer"]] and 1 <= right <= 9


def test_counts_are_right() -> None:
    for one in records("counting"):
        right = one["choices"][one["answer"]]
        if one["context"].endswith(","):
            row = [NUMBERS.index(word) for word in one["context"].partition(": ")[2].rstrip(",").split(", ")]
            assert row == list(range(row[0], row[0] + len(row))) and NUMBERS.index(right) == row[-1] + 1
        else:
            assert NUMBERS.index(right.removesuffix(" things")) == len(re.findall(r"\ban? ", one["context"]))


def test_names_are_those_that_the_story_gave() -> None:
    for one in records("names"):
        name = one["context"].split()[-1].strip('"')
        right = one["choices"][one["answer"]]
        assert f"{name} {right}" in one["context"]
        assert not any(f"{name} {other}" in one["context"] for other in one["choices"] if other != right)


def test_words_agree() -> None:
    for one in records("agreement"):
        right = one["choices"][one["answer"]]
        first, _, rest = right.partition(" ")
        if first in ("a", "an"):
            assert (first == "an") == (rest[0] in "aeiou")
        elif rest:
            assert PLACES[rest.split()[-1]] == first
