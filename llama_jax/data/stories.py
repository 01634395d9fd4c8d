"""The built-in training text: an endless supply of children's stories from a grammar with known entropy.

The grammar is data: see story_rules.py. This file reads it, tells stories and computes their entropy.
"""

import functools
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llama_jax.data.story_rules import BOYS, ENDING, OPENING, PLACES, PLOTS, RULES, WEEKDAYS, words


def _article(word: str) -> str:
    # The rules hold no "hour" and no "unicorn": the first letter decides.
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


FORMS: dict[str, Callable[[str], str]] = {
    "": lambda word: word,
    "a": _article,
    "at": lambda place: PLACES[place],
    "he": lambda name: "he" if name in BOYS else "she",
    "his": lambda name: "his" if name in BOYS else "her",
    "him": lambda name: "him" if name in BOYS else "her",
    "child": lambda name: "boy" if name in BOYS else "girl",
    "next": lambda day: WEEKDAYS[(WEEKDAYS.index(day) + 1) % len(WEEKDAYS)],
}


@dataclass(frozen=True)
class Slot:
    """A remembered word of a rule, as ``{a colour2}``."""

    rule: str
    variable: str
    forms: Mapping[str, str]
    """The spelling of each word of the rule in this place."""


@dataclass(frozen=True)
class Choice:
    """One of several sequences, all equally likely, drawn afresh."""

    options: tuple[tuple["Node", ...], ...]


Node = str | Slot | Choice


def _rule(variable: str) -> str:
    return variable.rstrip("0123456789")


def parse(template: str) -> tuple[Node, ...]:
    """Return the parts of a line; see story_rules.py for its notation."""
    pieces = re.split(r"(\{[^{}]*\}|\[[^\[\]]*\])", template)
    return tuple(_parse_piece(piece) for piece in pieces if piece)


def _parse_piece(piece: str) -> Node:
    if piece[0] not in "[{":
        return piece
    inside = piece[1:-1]
    if "|" in inside:
        return Choice(tuple(map(parse, inside.split("|"))))
    form, _, variable = (inside[0].lower() + inside[1:]).rpartition(" ")
    if variable in FORMS:
        form, variable = variable, "name"
    rule = _rule(variable)
    forms = {word: FORMS[form](word) for word in words(RULES[rule])}
    if inside[0].isupper():
        forms = {word: text[0].upper() + text[1:] for word, text in forms.items()}
    return Slot(rule, variable, forms) if piece[0] == "{" else Choice(tuple(map(parse, forms.values())))


def parse_steps(text: str) -> tuple[Node, ...]:
    """Return the parts of steps, each a choice of its lines, with spaces between them."""
    parts: list[Node] = []
    for step in re.split(r"^\s*- ", text.strip(), flags=re.MULTILINE)[1:]:
        parts += [Choice(tuple(parse(line.strip()) for line in step.strip().splitlines())), " "]
    return tuple(parts[:-1])


@functools.cache
def grammar() -> Choice:
    """Return the grammar of all stories."""
    return Choice(tuple(parse_steps(OPENING + plot + ENDING) for plot in PLOTS.values()))


@dataclass(frozen=True)
class Story:
    """A story and its information content."""

    text: str
    """One paragraph of ASCII, without a final newline."""
    bits: float
    """Information content: -log2 of the probability of this text under the grammar."""


@dataclass(frozen=True)
class Entropy:
    """Exact means over all stories of the grammar."""

    bits_per_story: float
    bytes_per_story: float

    @property
    def bits_per_byte(self) -> float:
        """The lowest possible loss of a language model on single stories, in bits per byte."""
        return self.bits_per_story / self.bytes_per_story


def story(seed: int, index: int) -> Story:
    """Return story ``index`` of ``seed``, which is the same on every machine and Python version."""
    pieces: list[str] = []
    ways = tell((grammar(),), dice(seed, index), {}, pieces)
    return Story("".join(pieces), math.log2(ways))


def dice(*seeds: object) -> random.Random:
    """Return random numbers that are the same on every machine. Only ``random()`` is so in every Python version."""
    digest = hashlib.blake2b(" ".join(map(str, seeds)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


def stories(seed: int, start: int = 0) -> Iterator[Story]:
    """Return an endless iterator over the stories of ``seed``, from number ``start``."""
    return (story(seed, index) for index in itertools.count(start))


def tell(parts: Sequence[Node], rng: random.Random, memory: dict[str, dict[str, str]], pieces: list[str]) -> int:
    """Append the text of ``parts`` to ``pieces``. Return the number of equally likely texts it was chosen from.

    ``memory`` maps each rule to its variables drawn so far and their words.
    """
    ways = 1
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Choice):
            ways *= len(part.options) * tell(part.options[draw(len(part.options), rng)], rng, memory, pieces)
        else:
            told = memory.setdefault(part.rule, {})
            if part.variable not in told:
                untold = [word for word in part.forms if word not in told.values()]
                ways *= len(untold)
                told[part.variable] = untold[draw(len(untold), rng)]
            pieces.append(part.forms[told[part.variable]])
    return ways


def draw(number: int, rng: random.Random) -> int:
    """Return a number from 0 to ``number`` - 1, all equally likely."""
    # random() is the only method of random.Random whose results stay the same across Python versions.
    return int(rng.random() * number)


# Sets of variables drawn so far, with their probabilities.
_States = dict[frozenset[str], float]


@functools.cache
def entropy() -> Entropy:
    """Compute the exact means over all stories by recursion over the grammar."""
    _, bits, length = _expect((grammar(),), {frozenset(): 1.0})
    return Entropy(bits, length)


def _expect(parts: Sequence[Node], states: _States) -> tuple[_States, float, float]:
    """Process ``parts`` from all ``states`` at once. Return the states after them, the mean bits and the mean bytes.

    It is enough to know which variables were drawn. By symmetry, every word of a rule is equally likely for every
    variable, and no choice depends on a word.
    """
    bits = length = 0.0
    for part in parts:
        weight = sum(states.values())
        if isinstance(part, str):
            length += weight * len(part)  # all text is ASCII, so a letter is a byte
        elif isinstance(part, Choice):
            bits += weight * math.log2(len(part.options))
            share = {state: p / len(part.options) for state, p in states.items()}
            states = {}
            for option in part.options:
                ends, option_bits, option_length = _expect(option, share)
                bits += option_bits
                length += option_length
                for state, p in ends.items():
                    states[state] = states.get(state, 0.0) + p
        else:
            length += weight * sum(map(len, part.forms.values())) / len(part.forms)
            before, states = states, {}
            for state, p in before.items():
                if part.variable not in state:
                    told = sum(_rule(variable) == part.rule for variable in state)
                    bits += p * math.log2(len(part.forms) - told)
                state |= {part.variable}
                states[state] = states.get(state, 0.0) + p
    return states, bits, length


@functools.cache
def vocabulary() -> frozenset[str]:
    """Return all words of the stories, in lower case."""
    return frozenset(re.findall(r"[a-z-]+", " ".join(_texts((grammar(),))).lower()))


def _texts(parts: Sequence[Node]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Slot):
            yield from part.forms.values()
        else:
            for option in part.options:
                yield from _texts(option)
