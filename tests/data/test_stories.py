"""The built-in stories: what they look like, and that their information content and entropy are what they claim."""

import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import stories as grammar
from llama_jax.data import story_rules
from llama_jax.data.stories import Choice, Node, Slot, Story, entropy, stories, story, vocabulary

PINNED = (
    "Once upon a time an eager duck named Nora Duck lived in a pretty burrow near the cheerful market."
    " Nora wished for a white playhouse, and on Tuesday Nora began to build it near the hidden harbour"
    ". Milo Rabbit, a warm-hearted rabbit, came to help with a ladder, four nails and pears. But one w"
    'arm morning a sudden wind came, and the playhouse broke with a bump. "Think of brave knights and '
    'windy days," said Milo Rabbit, "and let us try again!" Nora and Milo brought six longer logs, and'
    " soon the white playhouse was ready. That night Nora Duck dreamed of the sea, sleepy owls and Mil"
    "o Rabbit."
)

SAMPLE = list(itertools.islice(stories(seed=1), 4000))


def test_a_seed_and_an_index_name_a_story_forever() -> None:
    assert story(0, 0).text == PINNED
    assert story(7, 3) == story(7, 3) != story(7, 4) != story(8, 3)


def test_stories_count_from_start() -> None:
    assert list(itertools.islice(stories(5, start=40), 3)) == [story(5, index) for index in (40, 41, 42)]


@settings(max_examples=50)
@given(st.integers(), st.integers())
def test_any_seed_and_index_will_do(seed: int, index: int) -> None:
    assert story(seed, index).text.startswith("Once upon a time")


def test_stories_look_like_stories() -> None:
    for told in SAMPLE:
        text = told.text
        assert text.startswith("Once upon a time") and re.search(r'[.!]"?$', text)
        assert text.isascii() and not re.search(r"[\[\]{}|\n]|  | [.,!?]", text)
        assert 400 < len(text) < 750
        sentences = re.split(r'(?<=[.!?])"? (?="?[A-Z])', text)
        assert 5 <= len(sentences) <= 9, text
        assert all(re.match(r'"?[A-Z]', sentence) for sentence in sentences), text
        assert text.count('"') % 2 == 0


def test_stories_differ() -> None:
    assert len({told.text for told in SAMPLE}) == len(SAMPLE)


def test_articles_agree_with_the_word_behind_them() -> None:
    for told in SAMPLE:
        for article, word in re.findall(r"\b([Aa]n?) ([a-z-]+)", told.text):
            assert (article.lower() == "an") == (word[0] in "aeiou"), f"{article} {word}"
            assert not re.match(r"hour|honest|heir|uni|use|one|eu", word), "the first letter misleads"


def test_pronouns_agree_with_the_hero() -> None:
    pronouns = {"he", "his", "him", "she", "her"}
    for told in SAMPLE:
        hero = next(re.finditer(r"named (\w+)", told.text)).group(1)
        own = {"he", "his", "him"} if hero in story_rules.BOYS else {"she", "her"}
        assert pronouns & set(re.findall(r"[a-z]+", told.text.lower())) <= own, told.text


def test_hero_and_friend_have_different_names() -> None:
    names = set(story_rules.BOYS + story_rules.GIRLS)
    assert len(names) == len(story_rules.BOYS) + len(story_rules.GIRLS)
    for told in SAMPLE:
        assert len(names & set(re.findall(r"[A-Z][a-z]+", told.text))) == 2, told.text


def test_vocabulary_holds_the_words_of_the_stories() -> None:
    told = {word for each in SAMPLE for word in re.findall(r"[a-z-]+", each.text.lower())}
    assert len(vocabulary()) > 500
    assert told <= vocabulary()
    assert len(told) > 0.99 * len(vocabulary())


def test_every_rule_is_used() -> None:
    lines = " ".join(
        [story_rules.OPENING, *story_rules.PLOTS.values(), story_rules.ENDING, *story_rules.RULES.values()]
    )
    used = {piece.split()[-1].rstrip("0123456789") for piece in re.findall(r"[\[{]([\w ]+)[\]}]", lines.lower())}
    assert used - {"he", "his", "him"} == set(story_rules.RULES)


def test_entropy_is_the_mean_over_stories() -> None:
    _assert_mean(entropy().bits_per_story, [told.bits for told in SAMPLE])
    _assert_mean(entropy().bytes_per_story, [float(len(told.text.encode())) for told in SAMPLE])
    assert entropy().bits_per_byte == entropy().bits_per_story / entropy().bytes_per_story
    assert 0.2 < entropy().bits_per_byte < 0.9


def _assert_mean(expected: float, sample: list[float]) -> None:
    error = statistics.stdev(sample) / math.sqrt(len(sample))
    assert statistics.fmean(sample) == pytest.approx(expected, abs=4 * error)


def test_probability_and_entropy_by_enumeration() -> None:
    """A grammar with all there is in the real one, small enough to tell in every way."""
    words = {"ash": "an ash", "oak": "an oak", "fir": "a fir", "birch": "a birch"}
    first, second = Slot("tree", "tree", words), Slot("tree", "tree2", {word: word for word in words})
    parts: tuple[Node, ...] = (
        "Look: ",
        Choice(((first, "; "), ("trees; ",), (second, " or ", first, "; "))),
        second,
        ".",
    )
    told = list(_all_tellings(parts, {}))
    texts = [text for text, _ in told]
    assert len(set(texts)) == len(texts) == 4 * 3 + 4 + 4 * 3
    assert sum(p for _, p in told) == pytest.approx(1.0)
    _, bits, length = grammar._expect(parts, {frozenset(): 1.0})
    assert bits == pytest.approx(-sum(p * math.log2(p) for _, p in told))
    assert length == pytest.approx(sum(p * len(text) for text, p in told))


def _all_tellings(parts: Sequence[Node], memory: dict[str, str]) -> Iterator[tuple[str, float]]:
    """Every text of ``parts`` behind ``memory`` (all of one rule), and its probability."""
    if not parts:
        yield "", 1.0
        return
    part, rest = parts[0], parts[1:]
    if isinstance(part, str):
        yield from ((part + text, p) for text, p in _all_tellings(rest, memory))
    elif isinstance(part, Choice):
        for option in part.options:
            yield from ((text, p / len(part.options)) for text, p in _all_tellings((*option, *rest), memory))
    else:
        told = memory.get(part.variable)
        words = [told] if told else [word for word in part.forms if word not in memory.values()]
        for word in words:
            for text, p in _all_tellings(rest, {**memory, part.variable: word}):
                yield part.forms[word] + text, p / len(words)


def test_bits_belong_to_the_text() -> None:
    """Read back without knowing how it was told, a text has one derivation, and its bits are those of the story."""
    for told in SAMPLE[:100]:
        assert _tellings(told) == [pytest.approx(told.bits)], told.text


def _tellings(told: Story) -> list[float]:
    """The bits of each derivation of a text, by a parser that tries all of them."""
    ends = _read((grammar.grammar(),), told.text, [(0, {}, 0.0)])
    return [bits for position, _, bits in ends if position == len(told.text)]


# Where a reader stands: a position in the text, the variables read so far, and the bits of the choices so far.
_Reader = tuple[int, dict[str, str], float]


def _read(parts: Sequence[Node], text: str, readers: list[_Reader]) -> list[_Reader]:
    for part in parts:
        after: list[_Reader] = []
        for position, memory, bits in readers:
            if isinstance(part, str):
                if text.startswith(part, position):
                    after.append((position + len(part), memory, bits))
            elif isinstance(part, Choice):
                cost = math.log2(len(part.options))
                for option in part.options:
                    after += _read(option, text, [(position, memory, bits + cost)])
            else:
                taken = {word for variable, word in memory.items() if variable.rstrip("0123456789") == part.rule}
                told = part.variable in memory
                words = [memory[part.variable]] if told else [word for word in part.forms if word not in taken]
                for word in words:
                    if text.startswith(part.forms[word], position):
                        cost = 0.0 if told else math.log2(len(words))
                        after.append((position + len(part.forms[word]), {**memory, part.variable: word}, bits + cost))
        readers = after
        if not readers:
            break
    return readers


def test_no_text_can_be_told_in_two_ways() -> None:
    """A proof over the whole grammar, in two steps.

    Let memory go first: where a variable stands, any of its words may. That grammar is a graph, with pieces of text on
    its edges, and it has all derivations of the real one. No two paths through it spell the same text, so a text fixes
    all choices. It fixes the words of the variables too, since each is spelled out in the line where it is first met.
    """
    edges: _Edges = defaultdict(list)
    _draw_graph((grammar.grammar(),), 0, 1, edges, itertools.count(2))
    assert _twice_spelled(edges) is None
    _assert_spelled_out((grammar.grammar(),))


_Edges = dict[int, list[tuple[str, int]]]


@pytest.mark.parametrize(
    ("first", "second", "ambiguous"),
    [
        (("a", "ab"), ("c", "d"), False),
        (("a", "ab"), ("b", "bc"), False),
        (("a", "ab"), ("bc", "c"), True),
        (("an apple", "an apple pie"), (" pie.", "."), True),
        (("x", "x"), ("y", "z"), True),
    ],
)
def test_the_proof_finds_what_is_ambiguous(first: Sequence[str], second: Sequence[str], ambiguous: bool) -> None:
    parts = [Choice(tuple((text,) for text in texts)) for texts in (first, second)]
    edges: _Edges = defaultdict(list)
    _draw_graph(parts, 0, 1, edges, itertools.count(2))
    assert (_twice_spelled(edges) is not None) == ambiguous


def _draw_graph(parts: Sequence[Node], start: int, end: int, edges: _Edges, fresh: Iterator[int]) -> None:
    for i, part in enumerate(parts):
        after = end if i == len(parts) - 1 else next(fresh)
        if isinstance(part, str):
            assert part, "an empty piece of text would hide a choice"
            edges[start].append((part, after))
        elif isinstance(part, Choice):
            for option in part.options:
                assert option
                _draw_graph(option, start, after, edges, fresh)
        else:
            edges[start] += [(text, after) for text in dict.fromkeys(part.forms.values())]
        start = after


def _twice_spelled(edges: _Edges) -> tuple[int, int] | None:
    """Two nodes between which two paths spell the same text, or None."""
    todo: list[tuple[int, int, int, str]] = []
    for node, leaving in edges.items():
        # In sorted order, the texts that begin with a text follow it directly.
        leaving = sorted(leaving)
        for i, (short, behind) in enumerate(leaving):
            for text, ahead in leaving[i + 1 :]:
                if not text.startswith(short):
                    break
                todo.append((node, behind, ahead, text[len(short) :]))
    seen: set[tuple[int, int, str]] = set()
    while todo:
        # Two paths have parted at ``origin``; the one that is ahead has spelled ``lead`` more than the other.
        origin, behind, ahead, lead = todo.pop()
        if behind == ahead and not lead:
            return origin, ahead
        if (behind, ahead, lead) in seen:
            continue
        seen.add((behind, ahead, lead))
        for text, node in edges.get(behind, ()):
            if text.startswith(lead):
                todo.append((origin, ahead, node, text[len(lead) :]))
            elif lead.startswith(text):
                todo.append((origin, node, ahead, lead[len(text) :]))
    return None


def _assert_spelled_out(parts: Sequence[Node]) -> None:
    slots = [part for part in parts if isinstance(part, Slot)]
    plain = {slot.variable for slot in slots if len(set(slot.forms.values())) == len(slot.forms)}
    # The hero's name is told by every opening, before any pronoun.
    assert {slot.variable for slot in slots} <= plain | {"name"}
    for part in parts:
        if isinstance(part, Choice):
            for option in part.options:
                _assert_spelled_out(option)


def test_every_opening_names_the_hero() -> None:
    openings = story_rules.OPENING.split("\n")[1:-1]
    assert all("named {name}" in line.split("{his}")[0].split("{he}")[0] for line in openings)
