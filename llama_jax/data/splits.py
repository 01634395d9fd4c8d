"""The splits of a data set, as the file names of Hugging Face's data sets have them: train, validation, test."""

import os
import re
from collections.abc import Sequence

from llama_jax.data.beside import SHOWN, names_of
from llama_jax.data.corpus_file import CorpusFile

SPLITS = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "validset", "valset", "devset"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout", "testset", "evalset"),
}
HELD_OUT = re.compile(r"(held|hold)[-_. ]out")
# A word begins here, too: trainData.
INSIDE = re.compile(r"(?<=[a-z])(?=[A-Z])")


def split_of(name: str) -> str:
    """Return the split that a path within a data set names, else an empty text.

    The file's name decides ("train-00000-of-00012.parquet", "wiki.train.jsonl"), and then the folders above it, the
    nearest first.
    """
    for part in reversed(name.split("/")):
        words = _words(part)
        for split, keywords in SPLITS.items():
            if any(word in keywords for word in words):
                return split
    return ""


def _words(name: str) -> list[str]:
    """Return the words of a name in small letters, each but the first after what stands between it and the last one."""
    return re.split(r"([^a-z]+)", HELD_OUT.sub(r"\1out", INSIDE.sub(" ", name).lower()))


def of_one_split(files: Sequence[CorpusFile], held_out: bool = False) -> tuple[list[CorpusFile], list[str]]:
    """Return the files without those of other splits than train, and a line about these.

    Of a ``held_out`` text, the validation split is returned, else the test split. All files are returned if none is of
    the train split; those of other splits are then named in a warning, if there are files besides.
    """
    # A folder that all files have above them tells nothing. Names may be addresses.
    first, last = min(file.name for file in files), max(file.name for file in files)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    root = first[:same].rpartition("/")[0]
    inside = {file.name: file.name.removeprefix(root).strip("/") for file in files}
    texts = _splits_of_texts([inside[file.name] for file in files if file.format == "text"])
    splits = {file.name: texts.get(inside[file.name], split_of(inside[file.name])) for file in files}
    named = [split for split in ("validation", "test") if split in splits.values()]
    if "train" not in splits.values():
        mixed = len({*splits.values()}) > 1 and not held_out
        notes = [_also_read(inside, splits, split) for split in named if mixed]
        return list(files), notes or ([] if held_out else _doubtful(inside, files))
    taken = {named[0]} if held_out and named else {"", "train"}
    kept = [file for file in files if splits[file.name] in taken]
    notes = [] if held_out else _doubtful(inside, kept)
    for split in ("train", *named):
        names = [inside[file.name] for file in files if splits[file.name] == split]
        if split not in taken:
            hint = "" if held_out else "; evaluate on them with --data.eval-filepath"
            notes.append(f"not read, as their names say that they are the {split} split: {names_of(names)}{hint}")
    folders = sorted({os.path.dirname(inside[file.name]) for file in kept if splits[file.name] == "train"})
    if len(folders) > 1 and not texts:
        notes.append(
            f"the train splits of {len(folders):,} folders are read ({', '.join(folders[:SHOWN])}"
            f"{', ...' if len(folders) > SHOWN else ''}); name one of them to read it alone"
        )
    return kept, notes


def _also_read(inside: dict[str, str], splits: dict[str, str], split: str) -> str:
    """Return a warning about the files of a split, which are read as there is no train split to read alone."""
    names = [inside[name] for name, of in splits.items() if of == split]
    return (
        f"warning: read to train on, though their names say that they are the {split} split: {names_of(names)}; move them elsewhere, "
        "and evaluate on them with --data.eval-filepath"
    )


def _doubtful(inside: dict[str, str], files: Sequence[CorpusFile]) -> list[str]:
    """Return warnings about plain texts among ``files`` that have the word of a held-out split, beside one of train."""
    words = {file.name: split_of(os.path.basename(file.name)) for file in files if file.format == "text"}
    beside_train = "train" in words.values()
    return [_also_read(inside, words, s) for s in ("validation", "test") if beside_train and s in words.values()]


def _splits_of_texts(names: Sequence[str]) -> dict[str, str]:
    """Return the splits of plain texts, "" for none.

    Any text may have "test" or "train" in its name. They are splits if a folder or a file has the split as its name, or
    if the names of two files are the same but for the split: stories-train.txt, stories-valid.txt.
    """
    found = dict.fromkeys(names, "")
    alike: dict[str, dict[str, str]] = {}
    for name in names:
        *folders, file = name.split("/")
        words = _words(file)
        marked = next((i for i, word in enumerate(words) if _split_named(word)), None)
        split = _split_named(words[marked]) if marked is not None else ""
        rest = words if marked is None else [*words[:marked], *words[marked + 1 :]]
        alike.setdefault("/".join([*folders, " ".join(re.findall(r"[a-z0-9]+", "".join(rest)))]), {})[name] = split
        if not re.search("[a-z]", "".join(rest).partition(".")[0]):
            found[name] = split
        found[name] = next(filter(None, map(_split_named, map(str.lower, reversed(folders)))), found[name])
    for group in alike.values():
        if len(set(group.values())) > 1:
            found |= group
    return found


def _split_named(word: str) -> str:
    return next((split for split, keywords in SPLITS.items() if word in keywords), "")


def missing_shards(files: Sequence[CorpusFile]) -> list[str]:
    """Return lines about files that are absent though others count them: train-00001-of-00003.parquet."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if shard := re.fullmatch(r"(.*?)(\d{4,})-of-(\d{4,})(.*)", file.name):
            found.setdefault((shard[1], shard[3], shard[4]), set()).add(int(shard[2]))
    lines = []
    for (before, count, behind), numbers in found.items():
        # Most count from 0, some from 1.
        first = 1 if int(count) in numbers else 0
        missing = sorted(set(range(first, int(count) + first)) - numbers)
        if missing:
            name = os.path.basename(f"{before}{missing[0]:0{len(count)}d}-of-{count}{behind}")
            lines.append(
                f"warning: {len(missing):,} of {int(count):,} files that their names count are missing: {name}"
                f"{' and others' if len(missing) > 1 else ''}; the others are read"
            )
    return lines
