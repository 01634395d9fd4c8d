"""Orbax: the names and the format of its files, and words of its errors."""

import json
from pathlib import Path

# Part of the name of a folder that orbax has not finished.
TEMPORARY = ".orbax-checkpoint-tmp"
# The file that marks a finished folder in object storage, where nothing is renamed.
COMMITTED = "commit_success.txt"
# The file that says how the arrays of a folder are stored.
METADATA = "_METADATA"
# Words in what orbax raises on a process that waits for another one in vain.
LOST_PROCESS = (" barrier.",)


def storage_format(folder: Path) -> tuple[bool, bool]:
    """Whether orbax stored the arrays in ``folder`` in one OCDBT database, and whether as zarr 3.

    Raises ValueError, KeyError or OSError where its metadata cannot be read.
    """
    saved = json.loads((folder / METADATA).read_text())
    return bool(saved["use_ocdbt"]), bool(saved["use_zarr3"])


def reason_of(message: str) -> str:
    """The text of an error in one line, without orbax's advice to look at a longer one."""
    return " ".join(message.split()).split(". See full")[0]


def is_echo(message: str) -> bool:
    """Whether an error that nobody can catch is only the echo of one that was raised: of readers behind one that failed."""
    return "Event loop is closed" in message
