"""The built-in conversations: little stories of two animals, and questions about them.

They are made of the words of the built-in stories (stories.py), whose notation the templates below use. So the model
of the first minute knows every word, and fine-tuning teaches it to answer.

A conversation is about one of SUBJECTS: the user tells a story, introduces two animals, or has the assistant play one
of them (in the system message). Then come one to MOST_QUESTIONS questions. Some system messages ask for short answers.

An eighth of all pairs of animals, such as Nora Duck and Max Rabbit, is held out: they meet in no conversation to train
on, and all held-out conversations are about such a pair. So no held-out story has been told, and no answer can be
recalled.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.data.stories import Choice, Node, dice, draw, parse, parse_steps, tell
from llama_jax.storage.files import write_atomically

Memory = dict[str, dict[str, str]]
# One pair of animals in this many is held out.
HELD_OUT = 8
# The most questions of a conversation. So many fit into a context of 256 tokens, with a story.
MOST_QUESTIONS = 4
# Held-out questions to judge a model by, and the seeds of these and of the conversations to train on.
QUESTIONS, QUESTIONS_SEED, SEED = 200, 1, 0
QUESTIONS_FILE = "questions.jsonl"
# The share of conversations with a system message that asks for short answers.
SHORT_SHARE = 0.25
SHORT = "Answer in one word."

LOST = """
    - One [weather] [daytime] {a trait} {animal} named {name} {Animal} lost {a colour} {thing} [spot].
      On [weekday] {name} {Animal}, {a trait} {animal}, lost {a thing} {at place} the [scenic] {place}.
    - {A trait2} {animal2} named {name2} {Animal2} [ran] over and found it.
      But then {name2} {Animal2}, {a trait2} {animal2}, found it [spot].
"""
MEAL = """
    - One [weather] [daytime] {a trait} {animal} named {name} {Animal} [ran] to the {place} with [tasty] {food}.
      {name} {Animal}, {a trait} {animal}, had a [basket] of [tasty] {food}.
    - There sat {name2} {Animal2}, {a trait2} {animal2}, {sad} and hungry.
      Then came {a trait2} {animal2} named {name2} {Animal2}, who was hungry.
"""
BUILT = """
    - On [weekday] {name} {Animal}, {a trait} {animal}, began to build {a colour} {project}.
      {A trait} {animal} named {name} {Animal} began to build {a project} {at place} the {place}.
    - {A trait2} {animal2} named {name2} {Animal2} [ran] over to help with {a tool}.
      {name2} {Animal2}, {a trait2} {animal2}, came to help with [number] [material].
"""
PRESENT = """
    - It was the birthday of {name} {Animal}, {a trait} {animal}.
      On [weekday] {a trait} {animal} named {name} {Animal} had a birthday.
    - {A trait2} {animal2} named {name2} {Animal2} [ran] over and gave {him} {a colour} {thing}.
      {name2} {Animal2}, {a trait2} {animal2}, brought {a colour} {thing} and [tasty] {food}.
"""
INTRODUCTION = """
    - Hello, I am {name} {Animal}, {a trait} {animal}.
      Hello, I am {a trait} {animal} named {name} {Animal}.
    - This is my friend {name2} {Animal2}, {a trait2} {animal2}.
      I came with {a trait2} {animal2} named {name2} {Animal2}.
"""
ROLE = """
    - Let us play that you are {name} {Animal}, {a trait} {animal},
      Be {a trait} {animal} named {name} {Animal},
    - and I am {a trait2} {animal2} named {name2} {Animal2}.
      and I am {name2} {Animal2}, {a trait2} {animal2}.
"""


@dataclass(frozen=True)
class Question:
    """Ways to ask for something, and its answer."""

    ask: tuple[Node, ...]
    answer: tuple[Node, ...]
    short: tuple[Node, ...]
    """The answer in one word."""


def _question(ask: str, answer: str, short: str) -> Question:
    """Return a question whose ways to ask are separated by slashes."""
    ways = Choice(tuple(parse(way.strip()) for way in ask.split("/")))
    return Question((ways,), parse(answer), parse(short))


def _of_both(*rows: tuple[str, ...]) -> list[Question]:
    """Return questions about the first animal, and the same about the second."""
    second = [[re.sub(r"\{(\w+ )?(\w+)\}", r"{\g<1>\g<2>2}", text) for text in row] for row in rows]
    return [_question(*row) for row in (*rows, *second)]


@dataclass(frozen=True)
class Subject:
    """A subject of conversations."""

    name: str
    share: int
    """How many conversations of ten are about it."""
    teller: str
    """The story stands here: user (before the first question), before (a message of its own) or system."""
    told: tuple[Node, ...]
    """The story, which is told before the questions."""
    questions: list[Question]


EITHER = _of_both(("Was {name} a boy or a girl?", "{name} was a {child name}.", "{child name}"))
SUBJECTS = (
    Subject("lost", 2, "user", parse_steps(LOST), [
        _question("Who lost the {thing}? / Tell me who lost the {thing}.", "{name} lost it.", "{name}"),
        _question("Who found the {thing}? / Tell me who found the {thing}.", "{name2} found it.", "{name2}"),
        *EITHER,
    ]),
    Subject("meal", 2, "user", parse_steps(MEAL), [
        _question("Who had the {food}? / Tell me who had the {food}.", "{name} had the food.", "{name}"),
        _question("Who was hungry? / Tell me who was hungry.", "{name2} was hungry.", "{name2}"),
        *EITHER,
    ]),
    Subject("built", 2, "user", parse_steps(BUILT), [
        _question("Who began to build? / Tell me who began to build the {project}.", "{name} began to build it.", "{name}"),
        _question("Who came to help? / Tell me who came to help.", "{name2} came to help.", "{name2}"),
        *EITHER,
    ]),
    Subject("present", 2, "user", parse_steps(PRESENT), [
        _question("Who had a birthday? / Tell me who had a birthday.", "{name} had a birthday.", "{name}"),
        _question("Who gave the {thing}? / Tell me who gave the {thing}.", "{name2} gave it.", "{name2}"),
        *EITHER,
    ]),
    Subject("introduction", 1, "before", parse_steps(INTRODUCTION), [
        _question("What is my name? / Who am I?", "It is {name}.", "{name}"),
        _question("Who is my friend? / Tell me who came with me.", "It is {name2}.", "{name2}"),
        *EITHER,
    ]),
    Subject("role", 1, "system", parse_steps(ROLE), [
        _question("What is your name? / Who are you?", "I am {name}.", "{name}"),
        _question("What animal are you? / Tell me what animal you are.", "I am {a animal}.", "{animal}"),
        _question("Who am I? / What is my name?", "It is {name2}.", "{name2}"),
    ]),
)  # fmt: skip
GREETING = parse("Hello, {name}!")


@dataclass(frozen=True)
class Conversation:
    """A conversation that ends with an answer."""

    subject: str
    messages: tuple[dict[str, str], ...]
    """Each has a "role" and its "content"."""
    people: frozenset[str]
    """The two of whom it tells."""

    @property
    def record(self) -> dict[str, Any]:
        """The conversation as a record to train on."""
        return {"messages": list(self.messages)}

    @property
    def question(self) -> dict[str, Any]:
        """The conversation as a record to evaluate: the messages before the last answer, and that answer."""
        return {"messages": list(self.messages[:-1]), "answer": self.messages[-1]["content"]}


def chat(seed: int, index: int, held_out: bool = False) -> Conversation:
    """Return conversation ``index`` of ``seed``, the same on every machine: to train on, or held out.

    The pair of animals that it tells of is held out or is not, accordingly.
    """
    rng = dice("chat", held_out, seed, index)
    subjects = [subject for subject in SUBJECTS for _ in range(subject.share)]
    subject = subjects[draw(len(subjects), rng)]
    while True:
        memory: Memory = {}
        told = _text(subject.told, rng, memory)
        if is_held_out(people := _people(memory)) == held_out:
            return _conversation(subject, told, _some(subject.questions, rng), people, rng, memory)


def chats(seed: int, held_out: bool = False) -> Iterator[Conversation]:
    """Return an endless iterator over the conversations of ``seed``."""
    return (chat(seed, index, held_out) for index in itertools.count())


def is_held_out(people: frozenset[str]) -> bool:
    """Return whether conversations with these two, such as Nora Duck and Max Rabbit, are held out."""
    return dice("held out", *sorted(people)).random() * HELD_OUT < 1


def _people(memory: Memory) -> frozenset[str]:
    names, animals = memory["name"], memory["animal"]
    return frozenset(
        f"{names[name]} {animals[animal].capitalize()}" for name, animal in (("name", "animal"), ("name2", "animal2"))
    )


def is_right(said: str, answer: str) -> bool:
    """Return whether what a model says is the answer. Case, white space and the final full stop do not matter."""
    return _normal(said) == _normal(answer)


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".! ")


def _conversation(
    subject: Subject, told: str, questions: list[Question], people: frozenset[str], rng: random.Random, memory: Memory
) -> Conversation:
    """Return the messages in which ``told`` is told and the questions are asked and answered."""
    short = rng.random() < SHORT_SHARE
    system = " ".join([told] * (subject.teller == "system") + [SHORT] * short)
    messages = [_message("system", system)] if system else []
    if subject.teller == "before":
        messages += [_message("user", told), _message("assistant", _text(GREETING, rng, memory))]
    for i, question in enumerate(questions):
        asked = _text(question.ask, rng, memory)
        if subject.teller == "user" and i == 0:
            asked = f"{told} {asked}"
        answer = _text(question.short if short else question.answer, rng, memory)
        messages += [_message("user", asked), _message("assistant", answer)]
    return Conversation(subject.name, tuple(messages), people)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text(parts: tuple[Node, ...], rng: random.Random, memory: Memory) -> str:
    pieces: list[str] = []
    tell(parts, rng, memory, pieces)
    return "".join(pieces)


def _some(questions: list[Question], rng: random.Random) -> list[Question]:
    """Return one to MOST_QUESTIONS of the questions, in random order."""
    count = 1 + draw(MOST_QUESTIONS, rng)
    order = sorted((rng.random(), i) for i in range(len(questions)))
    return [questions[i] for _, i in order[:count]]


def questions(count: int = QUESTIONS) -> list[dict[str, Any]]:
    """Return the first ``count`` held-out questions, all different, as records of a task (evaluate/tasks.py)."""
    found: dict[str, dict[str, Any]] = {}
    for asked in chats(QUESTIONS_SEED, held_out=True):
        record = asked.question
        found.setdefault(json.dumps(record["messages"]), record)
        if len(found) == count:
            break
    return list(found.values())


def write_chats(folder: Path, count: int) -> tuple[Path, Path]:
    """Write ``count`` conversations to ``folder`` as JSON lines, a ninth as many held-out ones, and held-out questions.

    Files that are there are left if they hold the same. Return the paths of the conversations to train on and of the
    held-out ones.
    """
    held_out = [chat(SEED, index, held_out=True).record for index in range(-(-count // 9))]
    contents = {
        f"chats-{count}.jsonl": [chat(SEED, index).record for index in range(count)],
        f"chats-{count}-held-out.jsonl": held_out,
        QUESTIONS_FILE: questions(),
    }
    for name, records in contents.items():
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
    first, second, _ = (folder / name for name in contents)
    return first, second
