"""Refuses regular expressions of a tokenizer.json that could take forever on some text.

The tokenizers library matches with Oniguruma, which backtracks. An expression takes time exponential in a text's length
if a repetition holds another repetition, or choices, and polynomial time of a high degree if many follow one another.
No tokenizer of the LLaMA family has such an expression.
"""

import re

LONGEST = 4000
# The most repetitions of many in one alternative of an expression.
MOST_REPEATS = 2
# A repetition of at most this many is one of few.
FEW = 16
# The most ways in which the repetitions of few in one alternative may match.
MOST_WAYS = 4096
_ESCAPE = r"\\(?:[pPx]\{[^{}]*\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.)"
_TOKEN = re.compile(
    rf"""(?P<open>\((?:\?(?:[imsx-]*:|<[=!]|[=!>]))?)|(?P<close>\))|(?P<bar>\|)
    |(?P<repeat>[*+?]|\{{\d+(?:,\d*)?\}}|\{{,\d+\}})(?P<how>[?+])?
    |(?P<char>{_ESCAPE}|[^\\\[\](){{}}|*+?])|(?P<class>\[)""",
    re.DOTALL | re.VERBOSE,
)
_IN_CLASS = re.compile(rf"{_ESCAPE}|\[:\^?\w+:\]|(?P<open>\[)|(?P<close>\])|[^\\\[\]]", re.DOTALL)


class _Group:
    """A group of an expression as far as it was read: whether it is simple, and the repetitions of its alternatives."""

    def __init__(self) -> None:
        self.is_simple = True
        self.repeats = self.most_repeats = 0  # of the last alternative, and the most of any
        self.ways = self.most_ways = 1

    def end(self) -> None:
        """Count what the last alternative has, and begin another."""
        self.most_repeats, self.most_ways = max(self.most_repeats, self.repeats), max(self.most_ways, self.ways)
        self.repeats, self.ways = 0, 1


def why_refused(pattern: str) -> str:
    """Say why an expression is not run: it could take forever, or is not understood. Empty if it is run."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern):,} characters"
    groups, last, at = [_Group()], None, 0
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        if match is None:
            return f"it cannot be understood at character {at + 1}"
        at = match.end()
        group = groups[-1]
        if match["open"]:
            groups.append(_Group())
            last = None
        elif match["close"]:
            if len(groups) == 1:
                return "it closes a group that is not open"
            last = groups.pop()
            last.end()
            groups[-1].repeats += last.most_repeats
            groups[-1].ways *= last.most_ways
            groups[-1].is_simple &= last.is_simple
        elif match["bar"]:
            group.end()
            group.is_simple, last = False, None
        elif match["repeat"]:
            least, most = _range(match["repeat"])
            if most > 1 and last is not None and not last.is_simple:
                return "it repeats a group of repetitions or choices"
            if 1000 < most < 1 << 30:
                return f"it has a repetition of {most:,}"
            group.is_simple = False
            last = _Group()
            last.is_simple = False
            group.repeats += most > FEW
            group.ways *= most - least + 1 if most <= FEW else 1
        if groups[-1].repeats > MOST_REPEATS or groups[-1].ways > MOST_WAYS:
            return "it has too many repetitions in a row"
        if match["char"] or match["class"]:
            if match["char"] and re.fullmatch(r"\\[1-9kg]", match["char"]):
                return "it refers back to a group"
            if match["class"]:
                at = _end_of_class(pattern, at)
                if at < 0:
                    return "it has a class of characters that does not end"
            last = None
    return "" if len(groups) == 1 else "it has a group that does not end"


def _range(repeat: str) -> tuple[int, int]:
    """Return how often a repetition matches, at least and at most. 1 << 30: without a bound."""
    if repeat in "*+?":
        return int(repeat == "+"), 1 if repeat == "?" else 1 << 30
    low, comma, high = repeat[1:-1].partition(",")
    least = int(low[:9] or 0)
    return least, int(high[:9] or 1 << 30) if comma else least


def _end_of_class(pattern: str, at: int) -> int:
    """Return where the class ends whose bracket ends at ``at``. -1: nowhere. Classes may be nested."""
    depth = 1
    if pattern[at : at + 1] == "^":
        at += 1
    while depth:
        match = _IN_CLASS.match(pattern, at)
        if match is None:
            return -1
        at = match.end()
        depth += bool(match["open"]) - bool(match["close"])
    return at
