"""A small suite of tasks, made here, in the world of the built-in stories (data/story_rules.py).

agreement and names are asked in the middle of stories that no training has seen. counting and arithmetic use the
stories' words, and ask for what no story tells. All are multiple choice; the same records are made everywhere.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.data.stories import story
from llama_jax.data.story_rules import BOYS, GIRLS, PLACES, RULES
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.storage.files import write_atomically

Record = dict[str, Any]
# Records of a task.
ITEMS = 200
# The stories' seed. Training has others.
SEED = 20_011
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PREPOSITIONS = sorted({*PLACES.values()})
FEW = 4  # choices, where they are numbers or animals


def words(rule: str) -> list[str]:
    """Return the words of a rule of the stories."""
    return [" ".join(word.split()) for word in RULES[rule].split(",")]


# Alternatives of regular expressions.
FAMILY, NAMES = "|".join(words("family")), "|".join(BOYS + GIRLS)
ANIMALS = "|".join(map(str.capitalize, words("animal")))


class Dice:
    """Random draws that are the same on every machine and Python version."""

    def __init__(self, *seeds: object):
        digest = hashlib.blake2b(" ".join(map(str, seeds)).encode(), digest_size=16).digest()
        # random() is the only method of random.Random whose results stay the same across Python versions.
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def some(self, values: list[Any], count: int) -> list[Any]:
        """Return ``count`` of the values, without repetition, in random order."""
        order = sorted((self._random(), i) for i in range(len(values)))
        return [values[i] for _, i in order[:count]]

    def one(self, values: list[Any]) -> Any:
        """Return one of the values."""
        return self.some(values, 1)[0]


def record(dice: Dice, context: str, right: str, wrong: list[str]) -> Record:
    """Return a record of multiple choice, its choices in random order."""
    choices = dice.some([right, *wrong], len(wrong) + 1)
    return {"context": context, "choices": choices, "answer": choices.index(right)}


def agreement(dice: Dice, text: str) -> Record | None:
    """Ask for the word that another one decides: he or she, a or an, "in the forest" or "on the hill"."""
    found: list[tuple[int, str, list[str]]] = []
    for match in re.finditer(r"(?<= )(his|him)(?= )", text):
        found.append((match.start(), match[1], ["her"]))
    for match in re.finditer(rf"(?<= )her(?= (?:{FAMILY}) )", text):
        found.append((match.start(), "her", ["his"]))
    for match in re.finditer(r"(?<= )(an?) ([a-z-]+)", text):
        other = "a" if match[1] == "an" else "an"
        found.append((match.start(), match[0], [f"{other} {match[2]}"]))
    for match in re.finditer(r"(?<= )(\w+) (the (?:[\w-]+ )?(\w+))", text):
        if PLACES.get(match[3]) == match[1]:
            found.append((match.start(), match[0], [f"{at} {match[2]}" for at in PREPOSITIONS if at != match[1]]))
    if not found:
        return None
    # Each kind as often as any other, though articles are the most frequent.
    kind = dice.one(sorted({right.split()[0] for _, right, _ in found}))
    start, right, wrong = dice.one([one for one in found if one[1].split()[0] == kind])
    return record(dice, text[: start - 1], right, wrong)


def names(dice: Dice, text: str) -> Record | None:
    """Ask for the second name of somebody whom the story has named before, far back or nearby."""
    people = re.findall(rf"\b({NAMES}) ({ANIMALS})\b", text)
    again = [
        match
        for match in re.finditer(rf"\b({NAMES}) (?=[A-Z])", text)
        if any(re.finditer(rf"\b{match[1]} [A-Z]", text[: match.start()]))
    ]
    if not again or len({*people}) < 2:
        return None
    match = dice.one(again)
    right = dict(people)[match[1]]
    others = [animal for name, animal in dict(people).items() if animal != right]
    strangers = [word.capitalize() for word in words("animal") if word.capitalize() not in (right, *others)]
    wrong = [*others, *dice.some(strangers, FEW - 1 - len(others))]
    return record(dice, text[: match.end() - 1], right, wrong)


def counting(dice: Dice, _: str) -> Record:
    """Ask for the next number of a row, or for the number of things in a list."""
    name = dice.one(BOYS + GIRLS)
    if dice.one([True, False]):
        first, count = dice.one([1, 2, 3, 4]), dice.one([3, 4, 5])
        row = ", ".join(NUMBERS[first : first + count])
        context, answer = f"{name} counted the {dice.one(words('pet'))}: {row},", first + count
        return record(dice, context, NUMBERS[answer], _other_numbers(dice, answer))
    count = dice.one([2, 3, 4, 5])
    things = [f"a {word}" if word[0] not in "aeiou" else f"an {word}" for word in dice.some(words("thing"), count)]
    context = f"{name} had {', '.join(things[:-1])} and {things[-1]}. So {name} had"
    wrong = [f"{number} things" for number in _other_numbers(dice, count, least=2)]
    return record(dice, context, f"{NUMBERS[count]} things", wrong)


def arithmetic(dice: Dice, _: str) -> Record:
    """Ask for a sum or a difference of one digit."""
    name, other = dice.some(BOYS + GIRLS, 2)
    food = dice.one([word for word in words("food") if word.endswith("s")])
    if dice.one([True, False]):
        result = dice.one(list(range(3, 10)))
        first = dice.one(list(range(1, result)))
        verb = f"found {NUMBERS[result - first]} more"
    else:
        first = dice.one(list(range(3, 10)))
        result = dice.one(list(range(1, first)))
        verb = f"gave {NUMBERS[first - result]} to {other}"
    context = f"{name} had {NUMBERS[first]} {food} and {verb}. Now {name} had"
    return record(dice, context, NUMBERS[result], _other_numbers(dice, result))


def _other_numbers(dice: Dice, right: int, least: int = 1) -> list[str]:
    """Return numbers near the right one, ``least`` or more."""
    near = [number for number in range(least, 11) if 0 < abs(number - right) <= FEW]
    return [NUMBERS[number] for number in dice.some(near, FEW - 1)]


TASKS: dict[str, Callable[[Dice, str], Record | None]] = {
    function.__name__: function for function in (agreement, names, counting, arithmetic)
}


def records(task: str, count: int = ITEMS) -> list[Record]:
    """Return the first ``count`` records of a task, all different."""
    found: dict[str, Record] = {}
    for index, text in _texts():
        made = TASKS[task](Dice(task, index), text)
        if made is not None:
            found.setdefault(made["context"], made)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("stories do not end")


def _texts() -> Iterator[tuple[int, str]]:
    index = 0
    while True:
        yield index, story(SEED, index).text
        index += 1


def make_suite(folder: str) -> None:
    """Write the suite's files to ``folder``, and print what to type next.

    Files that hold the suite already are left. Raises UserError if others of the same names are there.
    """
    path = Path(folder)
    contents = {path / f"{task}.jsonl": "".join(json.dumps(made) + "\n" for made in records(task)) for task in TASKS}
    for file, content in contents.items():
        if file.exists() and (not file.is_file() or file.read_bytes() != content.encode()):
            raise UserError(f"{file}: expected the suite or nothing there, found something else; choose another folder")
    for file, content in contents.items():
        if not file.exists():
            write_atomically(file, content)
        print(f"{file}: {ITEMS} records")
    print(f"now try:\n  {typed('evaluate')} --ckpt runs/tiny --tasks {folder}")
