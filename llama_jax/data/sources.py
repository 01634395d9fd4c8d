"""Finds the files of a path or an address: a file, a folder or a glob.

Each file is read once, and what is left out is reported.
"""

import collections
import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llama_jax.data.beside import (
    BLOBS,
    DELTA,
    ENGINES,
    REVISIONS,
    earlier_revisions,
    is_unfinished,
    names_of,
    texts_beside,
)
from llama_jax.data.corpus_file import CorpusFile
from llama_jax.data.formats import examine, is_read_in_a_folder, may_be_read
from llama_jax.data.places import Place, at_once, files_at
from llama_jax.data.record_fields import TEXT
from llama_jax.data.records import also_chats, with_field
from llama_jax.data.splits import missing_shards, of_one_split
from llama_jax.errors import UserError, quoted
from llama_jax.storage.files import is_address

# A note counts this many kinds of files.
KINDS = 5
# The names of files of records end so.
RECORDS = {".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather"}


class Found(NamedTuple):
    """The files of a text, sorted by path, and a line about each kind of thing left out."""

    files: list[CorpusFile]
    notes: list[str]

    @property
    def paths(self) -> list[Path]:
        """The paths of files on disk."""
        return [Path(file.name) for file in self.files]


def find_files(
    filepath: str, key: str = "data.filepath", as_text: bool = False, text_field: str = "", by_name: bool = True
) -> Found:
    """Find the text files of ``filepath`` (a file, a folder or a glob, on disk or behind an address).

    ``as_text`` accepts files that do not look like text, as text. ``text_field`` is the field of records with the text.
    ``by_name``: of files that are named by their splits, only one split is read, and what by its name is no part of a
    folder's corpus is not. Raises a UserError that names the option ``key`` if there are no files, if one cannot be
    read, or if one is neither plain text nor records.
    """
    search = _Search(key, text_field, as_text, by_name)
    _check_name(filepath, search)
    if is_address(filepath):
        places = list(search.find_remote(filepath))
    else:
        paths = search.find(Path(filepath).expanduser(), filepath)
        places = list(search.once([Place(os.fspath(path), _size(path, key)) for path in paths]))
    if not places:
        raise UserError(f"{key}: expected {search.expected}, found {search.left_out() or 'nothing'} at {filepath}")
    if not any(place.size for place in places):
        raise UserError(f"{key}: expected text, found {filepath} empty")
    files = at_once(lambda place: search.known.get(place.name) or _examined(place, key, as_text), places)
    if len(files) > 1 and by_name:
        files, notes = of_one_split(files, held_out=key != "data.filepath")
        search.splits += notes
    if os.path.basename(filepath) != os.path.basename(files[0].name):  # a single file was meant to be one
        search.splits += missing_shards(files)
    if not as_text:
        search.splits += [*_named_otherwise(files), *_also_unpacked(files), *texts_beside(files)]
        files = at_once(lambda file: file if file.format == "text" else with_field(file, text_field, key), files)
        search.splits += [] if text_field else _fields_taken(files)
        if not text_field and (beside := also_chats(files[0])):
            search.splits.append(
                f"records have text and {beside}: text is taken; --data.text-field {beside} takes these"
            )
    if text_field and all(file.format == "text" for file in files):
        search.splits.append("--data.text-field: no effect on plain text, which has no fields")
    return Found(files, search.notes())


def _check_name(filepath: str, search: "_Search") -> None:
    """Raise UserError if no file can have the name ``filepath``, as if it were the text itself, or nothing."""
    wrong = "an empty name" if not filepath else ""
    try:
        os.stat(filepath)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a ValueError: a byte of zero
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            wrong = f"{quoted(filepath, 40)}, which no file is named"
    if wrong:
        raise UserError(
            f"{search.key}: expected {search.expected}, found {wrong}; write the text to a file, and give its path"
        )


def _named_otherwise(files: Sequence[CorpusFile]) -> list[str]:
    """Return a line about plain texts whose names say that they are records, none if there are none."""
    named = [
        os.path.basename(file.name)
        for file in files
        if file.format == "text" and RECORDS & {suffix.lower() for suffix in Path(file.name).suffixes}
    ]
    return [f"read as plain text, though named as records: {names_of(named)}"] if named else []


def _also_unpacked(files: Sequence[CorpusFile]) -> list[str]:
    """Return a line about compressed files whose content, by their names, is there decompressed, too."""
    names = {file.name for file in files}
    both = [file.name for file in files if file.compression and os.path.splitext(file.name)[0] in names]
    return [
        f"warning: read compressed and decompressed, perhaps the same twice: {names_of(list(map(os.path.basename, both)))}"
    ] if both else []  # fmt: skip


def _fields_taken(files: Sequence[CorpusFile]) -> list[str]:
    """Return a line about each field other than "text" that was taken because it alone holds texts."""
    taken = collections.Counter(
        file.field for file in files if file.format != "text" and not file.chats and file.field != TEXT
    )
    return [
        f"the text is taken from the field {quoted(field)}, the only one with texts{f', of {count:,} files' if count > 1 else ''}; "
        "--data.text-field names another"
        for field, count in taken.items()
    ]


def files_as_before(filepath: str) -> list[Path]:
    """Return the files that earlier versions read, for runs that began with them.

    They include hidden files and duplicates under several names, and exclude linked folders.
    """
    path = Path(filepath).expanduser()
    if path.is_dir():
        return sorted(p for p in path.rglob("*.txt") if p.is_file())
    if path.exists():
        return [path]
    return sorted(p for p in map(Path, glob.glob(os.fspath(path), recursive=True)) if p.is_file())


@dataclass
class _Search:
    """A search, and what it left out."""

    key: str
    text_field: str = ""
    as_text: bool = False
    by_name: bool = True
    expected: str = "a text file, a folder or a glob"
    known: dict[str, CorpusFile] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    others: collections.Counter[str] = field(default_factory=collections.Counter)
    folders: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def find(self, path: Path, filepath: str) -> Iterator[Path]:
        """Return the candidates, sorted. Several may be the same file."""
        if path.is_dir():
            self.expected = "*.txt files or files of records in the folder"
            return iter(sorted(self._in_folder(path)))
        if path.exists() or path.is_symlink():
            return iter([path])
        if "**" in path.parts:
            return iter(sorted(self._deep(path)))
        return iter(sorted(self._files(map(Path, glob.glob(os.fspath(path))))))

    def find_remote(self, address: str) -> Iterator[Place]:
        """Return the candidates at an address. A folder is searched as on disk."""
        found = files_at(address)
        shown = []
        for place in found.places:
            inside = place.name.removeprefix(found.root).strip("/").split("/")
            if len(found.places) > 1 and any(part.startswith(".") for part in inside):
                self.hidden.append(inside[-1])
            elif len(found.places) > 1 and self.by_name and (kept := ENGINES.intersection(inside)):
                self._left_to_engines(sorted(kept))
            else:
                shown.append(place)
        return iter(self._taken(shown) if found.is_folder else shown)

    def once(self, places: Iterable[Place]) -> Iterator[Place]:
        """Yield ``places`` without those that lead to the same file as an earlier one."""
        seen: set[tuple[int, int]] = set()
        for place in places:
            if place.is_remote:
                yield place
                continue
            status = os.stat(place.name)
            if (identity := (status.st_dev, status.st_ino)) in seen:
                self.again.append(os.path.basename(place.name))
            else:
                seen.add(identity)
                yield place

    def notes(self) -> list[str]:
        """Return a line for each kind of thing left out."""
        told = {
            "not read, as they are hidden: ": names_of(self.hidden),
            "not read, as Spark, Dask or Delta Lake keep them beside their data: ": names_of(self.engines),
            "not read, as the hub's cache has the files of the main revision by their names: ": names_of(
                self.revisions
            ),
            "not read, as their names say that they are unfinished, or copies: ": names_of(self.unfinished),
            "not read, as their names do not end in .txt: ": self._others(),
            "not read, as they are folders (** in a glob goes into them): ": names_of(self.folders),
            "read once, though more than one name or link leads to them: ": names_of(self.again),
        }
        return [words + names for words, names in told.items() if names] + self.splits

    def left_out(self) -> str:
        """Return what was left out, for an error if nothing was found."""
        parts = {
            "hidden ones": names_of(self.hidden), "unfinished ones": names_of(self.unfinished), "others": self._others(),
            "folders": names_of(self.folders),
        }  # fmt: skip
        found = [f"{words} ({names})" for words, names in parts.items() if names]
        return "only " + " and ".join(found) if found else ""

    def _others(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.others.most_common(KINDS))

    def _in_folder(self, folder: Path) -> Iterator[Path]:
        paths = list(self._walk(folder, with_hidden=False))
        # What is not a file is named later, if it would have been read.
        places = [Place(os.fspath(path), path.stat().st_size if _is_file(path) else 0) for path in paths]
        return (Path(place.name) for place in self._taken(places))

    def _taken(self, places: Sequence[Place]) -> Iterator[Place]:
        """Yield the files in a folder that are read: *.txt, also compressed, and records. Count the others."""
        for place, file in zip(places, at_once(self._recognized, places), strict=True):
            if file is not None and self.by_name and is_unfinished(place.name):
                self.unfinished.append(os.path.basename(place.name))
                continue
            if file is not None:
                self.known[place.name] = file
            if file is not None or place.name.endswith(".txt"):
                yield place
                continue
            suffix = os.path.splitext(place.name)[1]
            self.others[f"*{suffix}" if suffix else "without a suffix"] += 1

    def _recognized(self, place: Place) -> CorpusFile | None:
        """Return how a file that is not a *.txt is read as a part of a folder, None if it is not."""
        if self.as_text or place.name.endswith(".txt") or not may_be_read(place):
            return None
        file, kind = examine(place)
        return file if kind is None and is_read_in_a_folder(file, self.text_field) else None

    def _deep(self, pattern: Path) -> Iterator[Path]:
        """Yield the files that match a glob with **."""
        parts = pattern.parts
        first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root, rest = Path(*parts[:first]), parts[first:]
        with_hidden = any(part.startswith(".") for part in rest)
        if root.is_dir():
            for path in self._walk(root, with_hidden):
                if _matches(path.relative_to(root).parts, rest):
                    yield path

    def _files(self, paths: Iterable[Path]) -> Iterator[Path]:
        for path in paths:
            if path.is_dir():
                self.folders.append(path.name)
            else:
                yield path

    def _walk(self, root: Path, with_hidden: bool) -> Iterator[Path]:
        """Yield all files under ``root``, including linked folders. A folder with several names is visited once."""
        waiting, seen = collections.deque([root]), set()
        while waiting:
            for folder, names, files in os.walk(waiting.popleft(), onerror=self._raise):
                status = os.stat(folder)
                if (identity := (status.st_dev, status.st_ino)) in seen:
                    self.again.append(os.path.basename(folder))
                    names.clear()
                    continue
                seen.add(identity)
                if not with_hidden:
                    self.hidden += [name for name in sorted(names + files) if name.startswith(".")]
                    names[:] = [name for name in names if not name.startswith(".")]
                    files = [name for name in files if not name.startswith(".")]
                if self.by_name:
                    files = self._without_others(Path(folder), names, files)
                linked = [name for name in sorted(names) if os.path.islink(os.path.join(folder, name))]
                waiting.extend(Path(folder, name) for name in linked)
                names[:] = sorted(set(names) - set(linked))
                yield from (Path(folder, name) for name in files)

    def _without_others(self, folder: Path, names: list[str], files: list[str]) -> list[str]:
        """Take out of the ``names`` of folders those with no part of the corpus, and return ``files`` without them."""
        if {BLOBS, REVISIONS} <= {*names}:
            self.revisions.append(BLOBS)
            names.remove(BLOBS)
        if folder.name == REVISIONS and (folder.parent / BLOBS).is_dir():
            earlier = earlier_revisions(folder.parent)
            self.revisions += earlier
            names[:] = [name for name in names if name not in earlier]
        self._left_to_engines(sorted(ENGINES.intersection([*names, *files])))
        names[:] = [name for name in names if name not in ENGINES]
        return [name for name in files if name not in ENGINES]

    def _left_to_engines(self, names: list[str]) -> None:
        """Note what an engine keeps. Beside a log of Delta Lake, there may be files that the table no longer has."""
        self.engines += [name for name in names if name not in self.engines]
        if DELTA in names:
            self.splits.append(
                "warning: a table of Delta Lake: all its files are read, also those that later versions removed; export the current "
                "version to read it alone"
            )

    def _raise(self, error: OSError) -> None:
        raise UserError(
            f"{self.key}: expected a folder that can be read, found {error.filename}: {error.strerror}; correct its "
            "permissions, or move it elsewhere"
        )


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a glob, both given in parts. As in a shell, * does not match a leading dot."""
    if not pattern or not parts:
        return not pattern and not parts
    hidden = parts[0].startswith(".")
    if pattern[0] == "**":
        if len(pattern) == 1:
            return not any(part.startswith(".") for part in parts)
        return _matches(parts, pattern[1:]) or (not hidden and _matches(parts[1:], pattern))
    fits = fnmatch.fnmatchcase(parts[0], pattern[0]) and (not hidden or pattern[0].startswith("."))
    return fits and _matches(parts[1:], pattern[1:])


def _size(path: Path, key: str) -> int:
    """Return a file's size. Raises UserError if it is not a file."""
    try:
        status = path.stat()
    except OSError as error:
        found = "a link that leads nowhere" if path.is_symlink() else error.strerror
        if error.errno == errno.ELOOP:
            found = "a link that leads to itself"
        raise UserError(f"{key}: expected a file, found {path}: {found}; correct it, or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{key}: expected a file, found a pipe or a device, {path}; write what comes out of it to a file first"
        )
    return status.st_size


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _examined(place: Place, key: str, as_text: bool) -> CorpusFile:
    """Return how a file is read. Raises UserError if it cannot be read, or is neither plain text nor records."""
    try:
        file, kind = examine(place)
    except OSError as error:
        reason = "no permission to read it" if isinstance(error, PermissionError) else error.strerror
        raise UserError(
            f"{key}: expected a file that can be read, found {place.name}: {reason}; correct it, or leave it out"
        ) from None
    if as_text:
        return CorpusFile(place)
    if kind is not None:
        option = "--data.as-text" if key.startswith("data.") else "--as-text"
        raise UserError(
            f"{key}: expected plain text in UTF-8, or records, found {kind.name}: {place.name}; {kind.advice}, or take it as it "
            f"is with {option}"
        )
    return file
