"""Finds the files of a path: a file, a folder or a glob. Each file is read once, and what is left out is reported."""

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

from llama_jax.data.kinds import kind_of
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address

# A note shows this many names.
SHOWN = 3


class Found(NamedTuple):
    """The files of a text, sorted by path, and a line about each kind of thing left out."""

    paths: list[Path]
    notes: list[str]


def find_files(filepath: str, key: str = "data.filepath", as_text: bool = False) -> Found:
    """Find the text files of ``filepath`` (a file, a folder or a glob).

    ``as_text`` accepts files that do not look like text. Raises a UserError that names the option ``key`` if there are
    no files, if one cannot be read, or if one is not plain text.
    """
    if is_address(filepath):
        raise UserError(f"{key}: expected a text on disk, found the address {filepath}; copy it to a disk first")
    search = _Search(key)
    candidates = list(search.find(Path(filepath).expanduser(), filepath))
    if not candidates:
        raise UserError(f"{key}: expected {search.expected}, found {search.left_out() or 'nothing'} at {filepath}")
    sizes = {path: _size(path, key) for path in candidates}
    paths = list(search.once(candidates))
    if not any(sizes.values()):
        raise UserError(f"{key}: expected text, found {filepath} empty")
    for path in paths:
        _check_readable(path, sizes[path], key, as_text)
    return Found(paths, search.notes())


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
    expected: str = "a text file, a folder or a glob"
    hidden: list[str] = field(default_factory=list)
    others: collections.Counter[str] = field(default_factory=collections.Counter)
    folders: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def find(self, path: Path, filepath: str) -> Iterator[Path]:
        """Return the candidates, sorted. Several may be the same file."""
        if path.is_dir():
            self.expected = "*.txt files in the folder"
            return iter(sorted(self._in_folder(path)))
        if path.exists() or path.is_symlink():
            return iter([path])
        if "**" in path.parts:
            return iter(sorted(self._deep(path)))
        return iter(sorted(self._files(map(Path, glob.glob(os.fspath(path))))))

    def once(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Yield ``paths`` without those that lead to the same file as an earlier one."""
        seen: set[tuple[int, int]] = set()
        for path in paths:
            status = path.stat()
            if (identity := (status.st_dev, status.st_ino)) in seen:
                self.again.append(path.name)
            else:
                seen.add(identity)
                yield path

    def notes(self) -> list[str]:
        """Return a line for each kind of thing left out."""
        told = {
            "not read, as they are hidden: ": _names(self.hidden),
            "not read, as their names do not end in .txt: ": self._others(),
            "not read, as they are folders (** in a glob goes into them): ": _names(self.folders),
            "read once, though more than one name or link leads to them: ": _names(self.again),
        }
        return [words + names for words, names in told.items() if names]

    def left_out(self) -> str:
        """Return what was left out, for an error if nothing was found."""
        parts = {"hidden ones": _names(self.hidden), "others": self._others(), "folders": _names(self.folders)}
        found = [f"{words} ({names})" for words, names in parts.items() if names]
        return "only " + " and ".join(found) if found else ""

    def _others(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.others.most_common(SHOWN + 2))

    def _in_folder(self, folder: Path) -> Iterator[Path]:
        for path in self._walk(folder, with_hidden=False):
            if path.name.endswith(".txt"):
                yield path
            else:
                self.others[f"*{path.suffix}" if path.suffix else "without a suffix"] += 1

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
                linked = [name for name in sorted(names) if os.path.islink(os.path.join(folder, name))]
                waiting.extend(Path(folder, name) for name in linked)
                names[:] = sorted(set(names) - set(linked))
                yield from (Path(folder, name) for name in files)

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


def _names(names: list[str]) -> str:
    """Return "3 (a, b, c)", or an empty text if there are none."""
    shown = ", ".join(ascii(name)[1:-1] for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names):,} ({shown})" if names else ""


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


def _check_readable(path: Path, size: int, key: str, as_text: bool) -> None:
    """Raise UserError if a file cannot be read or is not plain text."""
    try:
        kind = kind_of(path, size)
    except OSError as error:
        reason = "no permission to read it" if isinstance(error, PermissionError) else error.strerror
        raise UserError(
            f"{key}: expected a file that can be read, found {path}: {reason}; correct it, or leave it out"
        ) from None
    if kind is not None and not as_text:
        option = "--data.as-text" if key.startswith("data.") else "--as-text"
        raise UserError(
            f"{key}: expected plain text in UTF-8, found {kind.name}: {path}; {kind.advice}, or take it as it is with {option}"
        )
