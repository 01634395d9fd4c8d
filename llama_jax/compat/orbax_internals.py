"""Orbax: the names and the format of its files, and the texts of its errors."""

import json
import re
from pathlib import Path

# Part of the name of a folder that orbax has not finished.
TEMPORARY = ".orbax-checkpoint-tmp"
# The file that marks a finished folder in object storage, where folders are not renamed.
COMMITTED = "commit_success.txt"
# The file that says how the arrays of a folder are stored.
METADATA = "_METADATA"
# Words in the errors that orbax raises in a process that waits for another one that does not answer.
LOST_PROCESS = (" barrier.",)


def storage_format(folder: Path) -> tuple[bool, bool]:
    """Return whether orbax stored the arrays in ``folder`` in an OCDBT database, and whether in zarr 3 format.

    Raises ValueError, KeyError or OSError if its metadata cannot be read.
    """
    saved = json.loads((folder / METADATA).read_text())
    return bool(saved["use_ocdbt"]), bool(saved["use_zarr3"])


def reason_of(message: str) -> str:
    """Return the text of an error in one line, without orbax's reference to the full text."""
    return " ".join(message.split()).split(". See full")[0]


def is_echo(message: str) -> bool:
    """Return whether an error that nobody can catch only follows from one that was raised.

    After one of orbax's readers fails, the others report such errors.
    """
    return "Event loop is closed" in message


def system_error(message: str) -> int:
    """Return the number of the system's error that an error of tensorstore, orbax's storage, reports, or 0."""
    found = re.search(r"\[os_error_code='(\d{1,5})'\]", message)
    return int(found[1]) if found else 0
