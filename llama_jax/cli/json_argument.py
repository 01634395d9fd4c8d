"""Flags whose value is JSON, or the name of a file that holds it."""

import json
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError, quoted


def json_argument(value: str, name: str) -> str:
    """Return the JSON text that ``value`` is, or that is in the file that it names, in one line.

    Text begins with a brace, or is true or false. Raises UserError, after ``name``, if it is neither JSON nor a file.
    """
    given = value.strip()
    where, text = name, given
    if not (given.startswith("{") or given in ("true", "false")):
        where = f"{name}: {value}"
        try:
            text = Path(value).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, OSError, ValueError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise UserError(f"{where}: expected JSON in UTF-8, found other bytes; convert the file") from None
            raise UserError(
                f"{name}: expected JSON or a file that holds it, found no file {quoted(value)}; a schema of any JSON is {{}}"
            ) from None
    return json_line(load_json(text, where))


def json_line(found: Any) -> str:
    """Return a value as JSON in one line, with the keys in the given order."""
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"))


def load_json(text: str, where: str, kind: str = "JSON") -> Any:
    """Return the value of a JSON text.

    ``kind`` names what is expected, in errors. Raises UserError, after ``where``, if it is not JSON, or an object has a
    key twice.
    """
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            twice.extend(key for key in keys if keys.count(key) > 1)
        return found

    try:
        found = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected {kind}, found {quoted(str(error))}") from None
    if twice:
        raise UserError(f"{where}: {quoted(twice[0], 40)}: expected a key once, found it twice")
    return found
