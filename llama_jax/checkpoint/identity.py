"""A short id of the model in a checkpoint. Copies have the same id, other models have others."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from llama_jax.compat.orbax_internals import COMMITTED
from llama_jax.storage import checksums
from llama_jax.storage.locations import children, user_errors

# The parts of a checkpoint that make the model, without the optimizer's state and the losses.
PARTS = ("model", "params")
# Without a table of checksums: bytes to read at both ends of a file, and how many files to read, spread evenly.
ENDS, MOST_READ = 1 << 16, 256


def identity(folder: Path) -> str:
    """Return a digest of the checkpoint in ``folder``, from its checksums or else its files' names, sizes and ends.

    If values differ, compressed arrays differ throughout, so their ends distinguish two trainings or steps.
    """
    with user_errors(folder, "read"):
        if (table := folder / checksums.NAME).exists():
            return _digest(_of_table(table, PARTS))
        return _digest(_of_files(folder, PARTS))


def digest_of_parameters(folder: Path) -> str:
    """Return a digest of the parameters in ``folder``, as ``identity`` does of the whole checkpoint.

    It leaves out the time at which they were written, so that another conversion of the same model has the same digest.
    """
    return _of_parameters(folder, COMMITTED)


def are_parameters(folder: Path, digest: str) -> bool:
    """Return whether ``digest`` is that of the parameters in ``folder``.

    Earlier versions did not leave out the time. What they have written is known by their digest.
    """
    return digest == digest_of_parameters(folder) or digest == _of_parameters(folder)


def _of_parameters(folder: Path, without: str = "") -> str:
    with user_errors(folder, "read"):
        if (table := folder / checksums.NAME).exists():
            return _digest(_of_table(table, ("params",), without))
        return _digest(_of_files(folder, ("params",), without))


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


def _of_table(table: Path, parts: tuple[str, ...], without: str = "") -> Iterator[bytes]:
    rows = json.loads(table.read_bytes())["files"]
    kept = {k: row for k, row in rows.items() if k.split("/")[0] in parts and k.split("/")[-1] != without}
    yield json.dumps(kept, sort_keys=True).encode()


def _of_files(folder: Path, parts: tuple[str, ...], without: str = "") -> Iterator[bytes]:
    files = [path for part in parts for path in _files_in(folder / part) if path.name != without]
    read = set(files[:: -(-len(files) // MOST_READ) or 1])
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            yield f"{path.relative_to(folder)} {size}".encode()
            if path in read:
                file.seek(0)
                yield file.read(ENDS)
                file.seek(max(ENDS, size - ENDS))
                yield file.read(ENDS)


def _files_in(folder: Path) -> Iterator[Path]:
    for path in sorted(children(folder)):
        if path.is_dir():
            yield from _files_in(path)
        else:
            yield path
