"""The output of evaluation on tasks: remarks, the table, and the file of --output."""

import json
import os
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from llama_jax.cli.progress import Progress
from llama_jax.errors import UserError
from llama_jax.evaluate.tasks import Item, Task, joined
from llama_jax.storage.files import is_stream, write_atomically

# The measures of the table by kind of task, each with its standard error.
MEASURES: dict[str, dict[str, str]] = {
    "choices": {"accuracy": "stderr", "accuracy_norm": "stderr_norm"},
    "answers": {"accuracy": "stderr", "perplexity": ""},
    "chats": {"accuracy": "stderr", "perplexity": ""},
    "texts": {"perplexity": "", "bits_per_byte": ""},
}


def remarks(task: Task, summary: dict[str, Any], context: int) -> list[str]:
    """Return lines about what was decided for the person: what was cut, and settings without effect."""
    lines = []
    if summary["cut"]:
        lines.append(
            f"{task.name}: {summary['cut']} of {summary['n']} items exceed the context of {context} tokens and lose their beginning"
        )
    if equal := sum(_has_equal_choices(item) for item in task.items):
        lines.append(
            f"{task.name}: {equal} of {summary['n']} items have a choice twice; the first of equal ones is taken, and answer decides"
        )
    if task.kind == "texts" and summary["bits_per_byte"] is None:
        lines.append(f"{task.name}: bits_per_byte is null, since the tokenizer does not restore all of the text")
    return lines


def _has_equal_choices(item: Item) -> bool:
    return len({joined(item.prompt, choice) for choice in item.choices}) < len(item.choices)


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """Return the scores as a table: a row per task and measure, a column per checkpoint."""
    checkpoints = list(dict.fromkeys(summary["ckpt"] for summary in summaries))
    rows = [["task", "n", "score", *checkpoints]]
    for name in dict.fromkeys(summary["task"] for summary in summaries):
        of_task = {summary["ckpt"]: summary for summary in summaries if summary["task"] == name}
        first = of_task[checkpoints[0]]
        start = [name, f"{first['n']:,}"]
        for measure, error in MEASURES[first["kind"]].items():
            rows.append([*start, measure, *(_cell(of_task[path], measure, error) for path in checkpoints)])
            start = ["", ""]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numeric = [False, True, False, *(True for _ in checkpoints)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )


def _cell(summary: dict[str, Any], measure: str, error: str) -> str:
    value = summary[measure]
    if value is None:
        return "-"
    deviation = summary[error] if error else None
    return f"{value:.4f}" + ("" if deviation is None else f" +- {deviation:.4f}")


def counting(progress: Progress) -> Callable[[int], None]:
    """Return a function that counts finished items in a progress bar, with their rate."""
    began, done = time.monotonic(), 0

    def count(items: int) -> None:
        nonlocal done
        done += items
        progress.note(f"{done / max(time.monotonic() - began, 1e-9):,.1f} items/s")
        progress.update(items)

    return count


def check_output(path: Path, wanted: AbstractSet[tuple[str, str]]) -> list[str]:
    """Return a line about results in the file ``path`` that will be replaced, of others than ``wanted`` (ckpt, task).

    Raises UserError if a file of results cannot be written to ``path``, or something else is there.
    """
    if path.is_dir():
        raise UserError(f"--output: expected a file, found the folder {path}; name a file in it")
    if is_stream(path):
        raise UserError(f"--output: expected a file, found {path}, a pipe or a device; name a file, or leave it out")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--output: expected a file in a folder that can be written, found {path}; make {path.parent} first"
        )
    if not path.exists() or path.stat().st_size == 0:
        return []
    there = []
    with path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict) or not {"task", "ckpt", "per_item"} <= set(found):
                raise UserError(
                    f"--output: expected a new file, or results to replace, found another file in {path}; choose another"
                )
            there.append((str(found["ckpt"]), str(found["task"])))
    lost = [f"{task} of {ckpt}" for ckpt, task in there if (ckpt, task) not in wanted]
    shown = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
    return [f"--output: {path} is replaced, with its scores of {shown}"] if lost else []


def write_output(path: Path, lines: Sequence[str]) -> None:
    """Write the results so far to ``path``, in place of earlier ones."""
    write_atomically(path, "".join(line + "\n" for line in lines))
