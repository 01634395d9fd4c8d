"""Recognizes tables in plain text and in JSON, whose columns nobody means to train on together."""

import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

# Number of rows to examine.
ROWS = 200
# The names of columns of a table in a file of any name, of which one is usual for texts, and the fewest rows below them.
NAME = re.compile(r"\w[\w .-]{0,40}|")
COLUMNS = {
    "text",
    "content",
    "body",
    "document",
    "title",
    "id",
    "url",
    "label",
    "prompt",
    "completion",
    "question",
    "answer",
}
FEWEST_ROWS = 3
# Rows without the names of columns are a table if there are so many, each with as many tabs between words.
FEWEST_NAMELESS = 10


def is_table(text: str, whole: bool, suffix: Sequence[str]) -> bool:
    """Return whether ``text``, all of a file if ``whole``, is a table. A file that is named one needs less for it.

    ``suffix`` is [".csv"] or [".tsv"] for such a file.
    """
    if suffix and suffix[0] in (".csv", ".tsv"):
        return _is_as_named(text, whole, "\t" if suffix[0] == ".tsv" else ",")
    return _has_names(text, whole) or _has_tabs(text, whole)


def columns_in_json(line: str) -> bool:
    """Return whether a line is an object of columns: {"text": {"0": ..., "1": ...}}, or {"text": [..., ...]}."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(column, (dict, list)) and len(column) > 1 for column in columns):
        return False
    if all(isinstance(column, dict) for column in columns):
        return all([*column] == [str(i) for i in range(len(column))] for column in columns)
    return all(isinstance(column, list) for column in columns) and _are_as_long(columns)


def _are_as_long(columns: Sequence[list[Any]]) -> bool:
    """Return whether lists have one length, and one of them holds nothing but texts."""
    as_long = len({len(column) for column in columns}) == 1
    return as_long and any(all(isinstance(entry, str) for entry in column) for column in columns)


def _has_names(text: str, whole: bool) -> bool:
    """Return whether rows of one length stand below the names of columns, one of which is usual."""
    heading, _, below = (text if whole else text.rpartition("\n")[0]).partition("\n")
    for delimiter in ",\t;|":
        names = [name.strip(' "\r\ufeff') for name in heading.split(delimiter)]
        if len(names) < 2 or not all(map(NAME.fullmatch, names)) or not {name.lower() for name in names} & COLUMNS:
            continue
        try:
            rows = [row for row in itertools.islice(csv.reader(io.StringIO(below), delimiter=delimiter), ROWS) if row]
        except csv.Error:
            continue
        rows = rows if whole else rows[:-1]  # the last one may be cut
        if len(rows) >= FEWEST_ROWS and {len(row) for row in rows} == {len(names)}:
            return True
    return False


def _has_tabs(text: str, whole: bool) -> bool:
    """Return whether all lines have the same number of tabs, each between words."""
    lines = [line for line in (text if whole else text.rpartition("\n")[0]).split("\n")[:ROWS] if line.strip()]
    rows = [[field.strip() for field in line.split("\t")] for line in lines]
    widths = {len(row) for row in rows}
    return len(rows) >= FEWEST_NAMELESS and len(widths) == 1 and widths != {1} and all(map(all, rows))


def _is_as_named(text: str, whole: bool, delimiter: str) -> bool:
    """Return whether a .csv or .tsv file has rows of one length, fields in quotation marks, or a column's name."""
    lines = (text if whole else text.rpartition("\n")[0]).splitlines()[:ROWS]
    try:
        widths = {len(row) for row in csv.reader(lines, delimiter=delimiter) if row}
    except csv.Error:
        return False
    quoted = any(line.startswith('"') for line in lines)
    named = bool(lines) and lines[0].strip().lower() in COLUMNS
    return bool(widths) and (quoted or named or (len(widths) == 1 and max(widths) > 1))
