"""Token files of other programs, read as they are: nanoGPT's .bin, llm.c's .bin, Megatron's .bin with its .idx.

nanoGPT's are ids and nothing else, uint16. llm.c's begin with 256 int32: a magic number, a version and the number of
tokens. Megatron's index has the type of the ids, and where the documents begin.
"""

import glob
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.beside import is_describing
from llama_jax.data.kinds import kind_of
from llama_jax.data.parts import TextFile
from llama_jax.data.splits import split_of
from llama_jax.data.stream import TokenStream, read_at, reading
from llama_jax.errors import UserError

# The magic numbers of llm.c, with the version and the type that belong to each.
LLM_C: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
HEADER_BYTES = 1024
MEGATRON = b"MMIDIDX\0\0"
# The types of ids by their codes in Megatron's index. The others are floating point.
CODES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Files are examined in blocks of this many tokens.
BLOCK = 1 << 22
# Names of texts and of records, which are read in place of token files beside them.
TEXTS = {".txt", ".jsonl", ".ndjson", ".parquet", ".arrow"}
# Kinds of files that ids of two bytes may look like.
LIKE_IDS = ("binary data", "text in UTF-", "text in another encoding")


@dataclass(frozen=True)
class TokenFile:
    """Ids in a file: ``count`` of them from byte ``offset`` on. ``starts`` are those that begin documents, if known."""

    path: Path
    program: str
    dtype: np.dtype
    offset: int
    count: int
    starts: np.ndarray | None = None  # int64 [documents]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return ids ``start`` to ``stop``. Raises UserError if some are missing."""
        first, count = self.offset + start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            raw = read_at(file.fileno(), first, count)
        if len(raw) < count:
            raise UserError(f"{self.path}: expected {self.count:,} tokens, found it cut meanwhile; restore it")
        return np.frombuffer(raw, self.dtype)


class JoinedStream(TokenStream):
    """Parts of token files, joined, as an array of shape [tokens]: uint16, or uint32 if one of them needs it.

    Each part is a file with its first and its last token. Nothing is copied to the disk or kept in memory.
    """

    def __init__(self, parts: Sequence[tuple[TokenFile, int, int]]):
        self.parts = [part for part in parts if part[2] > part[1]]
        self._ends = np.cumsum([0] + [stop - start for _, start, stop in self.parts])
        wide = any(file.dtype.itemsize > 2 or file.dtype.kind == "i" for file, _, _ in self.parts)
        self.path = self.parts[0][0].path if self.parts else Path()
        self.dtype = np.dtype("<u4" if wide else "<u2")
        self.size = int(self._ends[-1])
        self.shape = (self.size,)
        self.damage = ""
        self._checked, self._all_checked = bytearray(), True

    @property
    def starts(self) -> np.ndarray | None:
        """The positions at which documents begin, int64 [documents]. None if a file does not know them."""
        found = []
        for (file, start, stop), before in zip(self.parts, self._ends, strict=False):
            if file.starts is None:
                return None
            inside = file.starts[(file.starts >= start) & (file.starts < stop)]
            found.append(inside - start + before)
        return np.concatenate([np.zeros(0, np.int64), *found])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._read(0, self.size), dtype or self.dtype)

    def _within(self, number: int, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop`` of a part."""
        file, first, _ = self.parts[number]
        return file.read(first + start, first + stop).astype(self.dtype)


def find_token_files(filepath: str) -> list[TokenFile]:
    """Return the token files of a path: a file, a folder, a glob, or the path of Megatron's two files without .bin.

    It is empty if it is none of them, or if there are texts in the folder. Raises UserError if one is damaged, or is
    something else than the others.
    """
    path = Path(filepath).expanduser()
    if path.is_dir():
        paths = sorted(path.glob("*.bin"))
        if not paths or any(TEXTS & {*other.suffixes} and not is_describing(other.name) for other in path.rglob("*")):
            return []
    elif path.exists():
        paths = [path.with_suffix(".bin") if path.suffix == ".idx" else path]
    elif path.with_name(path.name + ".idx").exists():
        paths = [path.with_name(path.name + ".bin")]
    else:
        paths = sorted(p for p in map(Path, glob.glob(os.fspath(path), recursive=True)) if p.suffix == ".bin")
    found = {path: _opened(path) for path in paths if path.is_file() and os.access(path, os.R_OK)}
    files = [file for file in found.values() if file is not None]
    if files and (others := [path for path, file in found.items() if file is None]):
        raise UserError(
            f"{others[0]}: expected token files alone, as {files[0].path.name} of {files[0].program} is one, found something else; move "
            "it elsewhere"
        )
    return files


def by_split(files: Sequence[TokenFile]) -> dict[str, list[TokenFile]]:
    """Return the files by the split that their names tell, "" for none."""
    found: dict[str, list[TokenFile]] = {}
    for file in files:
        found.setdefault(split_of(file.path.name), []).append(file)
    return found


def cut_at(files: Sequence[TokenFile], share: float) -> tuple[JoinedStream, JoinedStream]:
    """Cut files into a first part with ``share`` of the tokens and a second with the rest.

    The cut moves back to the beginning of a document, if that is known.
    """
    whole = JoinedStream([(file, 0, file.count) for file in files])
    cut = int(whole.size * share)
    if cut < whole.size and (starts := whole.starts) is not None:
        cut = int(starts[max(0, int(np.searchsorted(starts, cut, "right")) - 1)])
    first, second, before = [], [], 0
    for file in files:
        at = min(max(cut - before, 0), file.count)
        first.append((file, 0, at))
        second.append((file, at, file.count))
        before += file.count
    return JoinedStream(first), JoinedStream(second)


@dataclass(frozen=True)
class Examined:
    """The content of a stream: the digests of its files, the largest and smallest id, and the number of documents."""

    files: tuple[TextFile, ...]
    largest: int
    smallest: int
    documents: int


def examined(stream: JoinedStream, bos_id: int) -> Examined:
    """Read a stream once. Documents are counted by Megatron's index, or else by how often ``bos_id`` occurs."""
    digests, largest, smallest, documents = [], 0, 0, 0
    for file, first, last in stream.parts:
        sha = hashlib.sha256()
        for start in range(first, last, BLOCK):
            ids = file.read(start, min(last, start + BLOCK))
            sha.update(ids.tobytes())
            largest, smallest = max(largest, int(ids.max())), min(smallest, int(ids.min()))
            documents += int(np.count_nonzero(ids == bos_id))
        digests.append(TextFile(str(file.path.absolute()), (last - first) * file.dtype.itemsize, sha.hexdigest()))
    if (starts := stream.starts) is not None:
        documents = len(starts)
        digests = [
            replace(d, sha256=hashlib.sha256(f"{d.sha256} {starts.tobytes()!r}".encode()).hexdigest()) for d in digests
        ]
    return Examined(tuple(digests), largest, smallest, documents)


def _opened(path: Path) -> TokenFile | None:
    """Return a token file, None if it is something else. Raises UserError if it is damaged."""
    size = path.stat().st_size
    index = path.with_suffix(".idx")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if index.is_file() and index.read_bytes()[: len(MEGATRON)] == MEGATRON:
        return _megatron(path, index, size)
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(numbers) and int(numbers[0]) in LLM_C:
        return _llm_c(path, numbers, size)
    if path.suffix != ".bin" or size == 0 or size % 2:
        return None
    kind = kind_of(path, size)
    if kind is None or not kind.name.startswith(LIKE_IDS):
        return None
    if _is_wider(np.frombuffer(head[: len(head) // 4 * 4], "<u2")):
        raise UserError(
            f"{path}: expected ids of two bytes, as nanoGPT writes them, found ids of four or eight; write them with numpy as uint16, "
            "or behind a header of llm.c"
        )
    if _is_narrower(np.frombuffer(head, "u1")):
        raise UserError(
            f"{path}: expected ids of two bytes, as nanoGPT writes them, found ids of one; write them with numpy as uint16"
        )
    return TokenFile(path, "nanoGPT", np.dtype("<u2"), 0, size // 2)


def _is_wider(pairs: np.ndarray) -> bool:
    """Return whether the beginning of a file, as uint16, is of wider ids: the second of each two is next to nothing."""
    low, high = pairs[::2], pairs[1::2]
    return bool(len(high) >= 8 and high.max() <= 3 and low.max() > 3)


def _is_narrower(numbers: np.ndarray) -> bool:
    """Return whether the beginning of a file, as bytes, is of ids of one byte: first and second ones are alike.

    Of ids of two bytes, the first ones are spread over all values, or the second ones are 0.
    """
    low, high = numbers[: len(numbers) // 2 * 2 : 2], numbers[1::2]
    return bool(len(high) >= 64 and low.max() < 200 and high.max() > low.max() // 2)


def _llm_c(path: Path, header: np.ndarray, size: int) -> TokenFile:
    version, dtype = LLM_C[int(header[0])]
    count = (size - HEADER_BYTES) // dtype.itemsize
    if len(header) < HEADER_BYTES // 4 or int(header[1]) != version or int(header[2]) != count:
        found = f"version {header[1]} and {header[2]:,} tokens" if len(header) > 2 else "a part of it"
        raise UserError(
            f"{path}: expected a token file of llm.c with the header of version {version} and of the {count:,} tokens that "
            f"follow, found {found}; download or make it again"
        )
    return TokenFile(path, "llm.c", dtype, HEADER_BYTES, count)


def _megatron(path: Path, index: Path, size: int) -> TokenFile:
    """Return the tokens of Megatron's two files. Sequences are joined; a document is one of them, or several."""
    raw = index.read_bytes()
    again = "download or make it again"
    try:
        version = int.from_bytes(raw[9:17], "little")
        if version != 1:
            raise UserError(f"{index}: expected Megatron's index of version 1, found version {version}; {again}")
        if (code := CODES.get(raw[17])) is None:
            raise UserError(f"{index}: expected the code of an integer type, found {raw[17]}; give the text itself")
        dtype = np.dtype(code)
        sequences, documents = (int(n) for n in np.frombuffer(raw, "<u8", 2, 18))
        lengths = np.frombuffer(raw, "<i4", sequences, 34).astype(np.int64)
        pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
        borders = np.frombuffer(raw, "<i8", documents, 34 + 12 * sequences)
    except (ValueError, IndexError):
        raise UserError(f"{index}: expected Megatron's index, found it cut; {again}") from None
    begins = np.concatenate([[0], np.cumsum(lengths)])
    in_order = np.array_equal(pointers, begins[:-1] * dtype.itemsize)
    whole = documents > 0 and borders[0] == 0 and borders[-1] == sequences and bool(np.all(np.diff(borders) >= 0))
    if not in_order or not whole or begins[-1] * dtype.itemsize != size:
        raise UserError(
            f"{path}: expected the {begins[-1]:,} tokens of its index, sequence after sequence, found {size:,} bytes of "
            f"{dtype.itemsize} a token, or other positions; {again}"
        )
    starts = begins[borders[:-1]]
    return TokenFile(path, "Megatron", dtype, 0, int(begins[-1]), np.unique(starts[starts < begins[-1]]))
