"""The splits of a data set, as the file names of Hugging Face's data sets have them: train, validation, test."""

import os
import re
from collections.abc import Sequence

from llama_jax.data.corpus_file import CorpusFile

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# A note shows this many names.
SHOWN = 3


def split_of(name: str) -> str:
    """Return the split that a path within a data set names, else an empty text.

    The file's name decides ("train-00000-of-00012.parquet"), and then the folders above it, the nearest first.
    """
    *folders, file = name.split("/")
    for part in [file.split(".")[0], *reversed(folders)]:
        words = re.split(r"[^a-z]+", part.lower())
        for split, keywords in SPLITS.items():
            if any(word in keywords for word in words):
                return split
    return ""


def of_one_split(files: Sequence[CorpusFile]) -> tuple[list[CorpusFile], list[str]]:
    """Return the files of records without those of other splits than train, and a line about these.

    All files are returned if none is of the train split. Plain texts have no splits.
    """
    # A folder that all files have above them tells nothing. Names may be addresses.
    first, last = min(file.name for file in files), max(file.name for file in files)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    root = first[:same].rpartition("/")[0]
    inside = {file.name: file.name.removeprefix(root).strip("/") for file in files}
    splits = {file.name: split_of(inside[file.name]) if file.format != "text" else "" for file in files}
    if "train" not in splits.values():
        return list(files), []
    kept = [file for file in files if splits[file.name] in ("", "train")]
    notes = []
    for split in ("validation", "test"):
        names = [inside[file.name] for file in files if splits[file.name] == split]
        if names:
            shown = ", ".join(ascii(name)[1:-1] for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            notes.append(
                f"not read, as their names say that they are the {split} split: {len(names):,} ({shown}); evaluate on them "
                "with --data.eval-filepath"
            )
    folders = sorted({os.path.dirname(inside[file.name]) for file in kept if splits[file.name] == "train"})
    if len(folders) > 1:
        notes.append(
            f"the train splits of {len(folders):,} folders are read ({', '.join(folders[:SHOWN])}"
            f"{', ...' if len(folders) > SHOWN else ''}); name one of them to read it alone"
        )
    return kept, notes
