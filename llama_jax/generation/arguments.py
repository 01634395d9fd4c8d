"""The arguments that a caller of a model gives: prompts, token ids and settings. What is something else is refused."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from llama_jax.config import MeshArgs, SampleArgs
from llama_jax.errors import UserError, quoted

# The kinds of numpy's types of whole numbers. Spans of time, which numpy counts among them, are none.
WHOLE = ("i", "u")
ONE_EACH = "give one for all prompts, or a list with one for each"


def is_series(values: Any) -> bool:
    """Return whether values follow each other in an order, as in a list. One text, a file or a table is no series."""
    others = (str, bytes, bytearray, memoryview, Mapping, AbstractSet, io.IOBase)
    return isinstance(values, Iterable) and not isinstance(values, others) and getattr(values, "ndim", 1) > 0


def has_whole_numbers(array: np.ndarray, given: Any) -> bool:
    """Return whether an array is whole numbers alone. If True or masked elements were ``given``, it is not."""
    truths = isinstance(given, list | tuple) and any(isinstance(x, bool | np.bool_) for x in given)
    return array.dtype.kind in WHOLE and not truths and not isinstance(given, np.ma.MaskedArray)


def texts_of(prompts: Any) -> list[str]:
    """Return prompts as a list. Raises UserError if they are one text, or have no order."""
    if isinstance(prompts, str | bytes):
        raise UserError("prompts: expected a list of strings, found one string; put it in a list")
    if not is_series(prompts):
        raise UserError(f"prompts: expected a list of strings, found {quoted(prompts)}; put the texts in a list")
    return list(prompts)


def ids_of(prompts: Any) -> list[list[int]]:
    """Return prompts that are token ids as lists of ints. Raises UserError if one is something else."""
    if not is_series(prompts):
        raise UserError(
            f"prompts: expected a list of prompts, each a list of token ids, found {quoted(prompts)}; put each in a list"
        )
    return [one_prompt(prompt, number) for number, prompt in enumerate(prompts, 1)]


def one_prompt(prompt: Any, number: int = 1) -> list[int]:
    """Return a prompt of token ids as ints. Raises UserError if the ``number``-th prompt is something else."""
    try:
        ids: Any = np.asarray(prompt) if is_series(prompt) else np.zeros((0, 0))
    except ValueError:  # rows of different lengths
        ids = np.zeros((0, 0))
    if ids.ndim != 1 or (ids.size and not has_whole_numbers(ids, prompt)):
        raise UserError(
            f"prompt {number}: expected token ids, a list of whole numbers, found {quoted(prompt)}; encode a text first "
            "(model.tokenizer.encode), and put the ids of each prompt in a list of their own"
        )
    return [int(token) for token in ids.tolist()]


def settings_of(args: Any, count: int) -> list[SampleArgs]:
    """Return the settings of each of ``count`` prompts. Raises UserError if there are others, more or fewer."""
    if isinstance(args, SampleArgs):
        return [args] * count
    if not isinstance(args, Sequence) or not all(isinstance(one, SampleArgs) for one in args):
        raise UserError(f"args: expected SampleArgs, found {quoted(args)}; {ONE_EACH}")
    if len(args) != count:
        raise UserError(f"args: expected one SampleArgs, or {count}, one a prompt; found {len(args)}; {ONE_EACH}")
    return list(args)


def check_one(args: Any, what: str) -> None:
    """Raise UserError if ``args`` are no settings, or ask for more than one completion of ``what``, which has one."""
    if not isinstance(args, SampleArgs):
        raise UserError(
            f"args: expected SampleArgs for {what}, found {quoted(args)}; make them with llama_jax.SampleArgs"
        )
    if args.n != 1:
        raise UserError(f"n: expected 1 for {what}, found {args.n}")


def check_loading(path: Any, mesh: Any, **others: Any) -> None:
    """Raise UserError if what a model is loaded from or with is of another type.

    ``others`` are paths that may be empty.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or isinstance(os.fspath(path), bytes):
        raise UserError(
            f"path: expected the folder of a checkpoint, a string or a Path, found {quoted(path)}; give a run folder, such as "
            "runs/tiny"
        )
    for name, value in others.items():
        if not isinstance(value, str | os.PathLike | None):
            raise UserError(f"{name}: expected a string or a Path, found {quoted(value)}; give one, or leave it out")
    if mesh is not None and not isinstance(mesh, MeshArgs):
        raise UserError(
            f"mesh: expected MeshArgs or None, found {quoted(mesh)}; give llama_jax.config.MeshArgs(tensor=2)"
        )
