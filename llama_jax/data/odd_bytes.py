"""Bytes of a text that are not UTF-8: how many are taken, and what is said of them."""

from llama_jax.data.kinds import is_too_odd
from llama_jax.data.parts import AnyCorpus, Unit
from llama_jax.errors import UserError


def check_is_text(name: str, read: int, bad: int) -> None:
    """Raise UserError if too many of the bytes that were read are not UTF-8."""
    if is_too_odd(bad, read):
        raise UserError(
            f"{name}: expected plain text in UTF-8, found {bad:,} of {read:,} bytes that are not; convert it, or take "
            "it as it is with --data.as-text"
        )


def note_odd(corpus: AnyCorpus, name: str, unit: Unit, read: int, bad: int) -> None:
    """Note how many of a unit's bytes are not UTF-8. Raises UserError if they are too many of a whole file."""
    if unit.is_whole:
        check_is_text(name, read, bad)
    add_odd(corpus.odd, {name: (read, bad)})


def add_odd(odd: dict[str, tuple[int, int]], more: dict[str, tuple[int, int]]) -> None:
    """Add to ``odd`` how many bytes were read of each file, and how many of them are not UTF-8."""
    for name, (read, bad) in more.items():
        before = odd.get(name, (0, 0))
        odd[name] = before[0] + read, before[1] + bad


def replacement_warning(replaced: int) -> str:
    """Return a warning if bytes were replaced, else an empty text."""
    return f"warning: {replaced:,} byte sequences are not UTF-8; each was read as U+FFFD" if replaced else ""
