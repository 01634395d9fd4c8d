"""Checksums of a folder's files: written when the folder is complete, verified before its content is used.

    checksums.json    {"files": {"params/d/1f3a": {"size": 4096, "crc32": "0a1b2c3d"}, ...}, "sha256": ...}

``sha256`` is the digest of the table. On disk every file has a CRC-32, as in a zip. In Google's object storage it has
the MD5 that the service keeps of each object and returns in a listing, so nothing is downloaded to write or verify the
table.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import is_remote, objects_below, user_errors

NAME = "checksums.json"
PIECE_BYTES = 1 << 22
MOST_THREADS = 16

# File attributes (size, crc32 or md5) by path relative to the folder.
Table = dict[str, dict[str, Any]]


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json`` for all files below ``folder``. They must not change after this."""
    table = _objects(folder) if is_remote(folder) else _files(folder, dict.fromkeys(_names(folder), "crc32"))
    if is_remote(folder):
        (folder / NAME).write_text(_text(table))  # object storage writes are atomic
    else:
        write_atomically(folder / NAME, _text(table))


def verify(folder: Path, advice: str) -> None:
    """Compare the files below ``folder`` with its table. Without a table, do nothing.

    Raises a UserError that names missing or damaged files and ends with ``advice``.
    """
    with user_errors(folder, "read"):
        table = read_table(folder, advice)
        if table is None:
            return
        if is_remote(folder):
            found = _objects(folder)
        else:
            kinds = {name: "md5" if "md5" in known else "crc32" for name, known in table.items()}
            found = _files(folder, {name: kind for name, kind in kinds.items() if (folder / name).is_file()})
    wrong = [f"{name} is missing" for name in sorted(table.keys() - found.keys())]
    for name in sorted(table.keys() & found.keys()):
        # A copy in a bucket of files that were written on disk is compared by size only.
        both = table[name].keys() & found[name].keys()
        if any(table[name][key] != found[name][key] for key in both):
            wrong.append(f"{name} is damaged")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{folder}: expected the files that {NAME} lists, found that {', '.join(wrong[:3])}{more}; {advice}"
        )


@contextlib.contextmanager
def verified(folder: Path, advice: str) -> Iterator[None]:
    """Run ``verify`` in parallel to the block, which reads the files, too. Its error is raised at the block's end."""
    with ThreadPoolExecutor(1) as executor:
        verification = executor.submit(verify, folder, advice)
        try:
            yield
        except Exception:
            verification.result()  # a damaged file is the better explanation
            raise
        verification.result()


def read_table(folder: Path, advice: str) -> Table | None:
    """Return the table of ``folder``, or None. Raises a UserError that ends with ``advice`` if it is damaged."""
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = ""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        table = json.loads(text)["files"]
        if text == _text(table):
            return table
    raise UserError(f"{folder / NAME}: expected a table of checksums, found a damaged one; {advice}")


def _text(table: Table) -> str:
    """Return the content of ``checksums.json``. A file that differs from it in any byte is damaged."""
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": table, "sha256": digest}, indent=1)


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _files(folder: Path, kinds: dict[str, str]) -> Table:
    """Return size and checksum ("crc32" or "md5") of each file. Several files are read in parallel."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as executor:
        made: dict[str, Future[dict[str, Any]]] = {
            name: executor.submit(_file, folder / name, kind) for name, kind in kinds.items() if name != NAME
        }
    return {name: future.result() for name, future in made.items()}


def _file(path: Path, kind: str) -> dict[str, Any]:
    size, crc, md5 = 0, 0, hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            size += len(piece)
            if kind == "md5":
                md5.update(piece)
            else:
                crc = zlib.crc32(piece, crc)
    return {"size": size, kind: md5.hexdigest() if kind == "md5" else f"{crc:08x}"}


def _objects(folder: Path) -> Table:
    return {name: known for name, known in objects_below(folder).items() if name != NAME}
