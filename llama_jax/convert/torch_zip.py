"""A strict reader of the zip archives of torch.save. It finds where each entry's bytes are in the file.

It is stricter than zipfile, so that no archive can be read in two ways. An archive is accepted only if it begins with
its first entry and ends with its only directory. Entries must be stored plainly (not compressed, not encrypted), follow
each other without gaps, and have the same name in the directory and in their own headers.

The format: PKWARE's APPNOTE.TXT, sections 4.3 (records) and 4.5.3 (zip64).
"""

import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from llama_jax.errors import UserError, quoted

LOCAL, CENTRAL, END, END64, LOCATOR64, DESCRIPTOR = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08"
LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
CENTRAL_HEADER = struct.Struct("<4sHHHHHHIIIHHHHHII")
END_RECORD = struct.Struct("<4sHHHHIIH")
END64_RECORD = struct.Struct("<4sQHHIIQQQQ")
END64_LOCATOR = struct.Struct("<4sIQI")
# Flags of an entry: its sizes follow in a data descriptor; its name is UTF-8. All other flags are refused.
DESCRIPTOR_FOLLOWS, UTF8_NAME = 1 << 3, 1 << 11
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF  # the value is in the zip64 field
_DATE = 1 | 1 << 5  # 1 January 1980, so that the same weights give the same file
# LLaMA 2 70B has about 730 entries per file.
MAX_ENTRIES, MAX_NAME = 20_000, 255
# Number of bytes to check at once.
PIECE = 1 << 26


@dataclass(frozen=True)
class Entry:
    """The position of an entry's bytes in the file."""

    name: str
    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Listed:
    """An entry of the directory. ``offset`` is that of its own header."""

    name: str
    flags: int
    crc: int
    size: int
    offset: int


def read_directory(data: memoryview, path: Path) -> dict[str, Entry]:
    """Return the entries of an archive by name. ``data`` is the mapped file, of which only headers are read.

    Raises UserError on anything except a plain archive of stored entries.
    """
    return _Archive(data, path).entries()


def refused(path: Path, message: str) -> UserError:
    """Return the error for a file that is not read. It says what to do, if ``message`` does not."""
    advice = "download it again, or load it with torch, if you trust its source, and save its state_dict alone"
    return UserError(f"{path}: {message}" + ("" if ";" in message else f"; {advice}"))


def check_crc(data: memoryview, entry: Entry, path: Path, release: Callable[[], None] = lambda: None) -> None:
    """Raise UserError if the bytes of ``entry`` do not have its checksum. ``release`` is called between pieces."""
    found, stop = 0, entry.offset + entry.size
    for start in range(entry.offset, stop, PIECE):
        found = zlib.crc32(data[start : min(start + PIECE, stop)], found)
        release()
    if found != entry.crc:
        raise UserError(
            f"{path}: {entry.name}: expected the checksum {entry.crc:08x}, found {found:08x}: the file is damaged; "
            "download it again"
        )


class _Archive:
    def __init__(self, data: memoryview, path: Path):
        self._data, self._path = data, path

    def entries(self) -> dict[str, Entry]:
        """Return the entries by name; see ``read_directory``."""
        data = self._data
        if bytes(data[:4]) != LOCAL:
            self._refuse_other_formats()
        count, start, end = self._find_directory()
        if count > MAX_ENTRIES:
            self._refuse(f"expected up to {MAX_ENTRIES:,} entries, found {count:,}")
        listed = list(self._list(count, start, end))
        if len({entry.name for entry in listed}) != len(listed):
            self._refuse("expected every name once, found one twice")
        found: dict[str, Entry] = {}
        border = 0
        for entry in sorted(listed, key=lambda entry: entry.offset):
            if entry.offset != border:
                self._refuse(f"expected an entry at byte {border}, found {quoted(entry.name)} at {entry.offset}")
            found[entry.name], border = self._locate(entry, start)
        if border != start:
            self._refuse(f"expected the directory at byte {border}, behind the last entry, found it at {start}")
        return found

    def _find_directory(self) -> tuple[int, int, int]:
        """Return the number of entries, and where the directory begins and ends."""
        data = self._data
        at = len(data) - END_RECORD.size
        if at < 0 or bytes(data[at : at + 4]) != END:
            self._refuse("expected a zip directory at the end, found none: the file is cut short, or more follows it")
        _, disk, first_disk, here, count, size, start, comment = END_RECORD.unpack_from(data, at)
        end = at
        locator = at - END64_LOCATOR.size
        if locator >= 0 and bytes(data[locator : locator + 4]) == LOCATOR64:
            _, disk64, end, disks = END64_LOCATOR.unpack_from(data, locator)
            if disk64 or disks > 1 or end + END64_RECORD.size != locator or bytes(data[end : end + 4]) != END64:
                self._refuse("expected one zip64 end record right before its locator, found it elsewhere")
            _, length, _, _, d0, d1, here64, count64, size64, start64 = END64_RECORD.unpack_from(data, end)
            short = (disk, first_disk, here, count, size, start)
            long = (d0, d1, here64, count64, size64, start64)
            full = (FULL16, FULL16, FULL16, FULL16, FULL32, FULL32)
            if length != END64_RECORD.size - 12 or any(
                s not in (wide, limit) for s, wide, limit in zip(short, long, full, strict=True)
            ):
                self._refuse("expected the zip64 end record to agree with the plain one, found another")
            disk, first_disk, here, count, size, start = long
        if disk or first_disk or here != count or comment:
            self._refuse("expected one volume and no comment, found several or one")
        if start + size != end:
            self._refuse(f"expected the directory to end at byte {end}, found its end at {start + size}")
        return count, start, end

    def _list(self, count: int, at: int, end: int) -> Iterator[_Listed]:
        """Yield the entries of the directory."""
        data = self._data
        for _ in range(count):
            if at + CENTRAL_HEADER.size > end or bytes(data[at : at + 4]) != CENTRAL:
                self._refuse(f"expected {count} entries in the directory, found fewer")
            (_, made_by, _, flags, method, _, _, crc, stored, size, name_len, extra_len, comment, disk, _, mode, offset
             ) = CENTRAL_HEADER.unpack_from(data, at)  # fmt: skip
            at += CENTRAL_HEADER.size
            if at + name_len + extra_len + comment > end:
                self._refuse("expected names within the directory, found one that reaches beyond it")
            name = self._name(bytes(data[at : at + name_len]))
            extra = bytes(data[at + name_len : at + name_len + extra_len])
            at += name_len + extra_len + comment
            size, stored, offset = self._zip64(name, extra, (size, stored, offset))
            if flags & ~(DESCRIPTOR_FOLLOWS | UTF8_NAME):
                self._refuse(f"{quoted(name)}: expected a plain entry, found flags {flags:#x} (encrypted, or patched)")
            if method or stored != size:
                self._refuse(f"{quoted(name)}: expected an entry that is stored, found one that is compressed")
            kind = stat.S_IFMT(mode >> 16) if made_by >> 8 == 3 else 0  # 3 stands for Unix, with its file modes
            if disk or comment or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                self._refuse(f"{quoted(name)}: expected a plain file, found a link or another special entry")
            yield _Listed(name, flags, crc, size, offset)
        if at != end:
            self._refuse(f"expected {count} entries in the directory, found more")

    def _name(self, raw: bytes) -> str:
        """Return a name that cannot lead outside a folder, or refuse it."""
        name = raw.decode("ascii", errors="backslashreplace")
        parts = name.removesuffix("/").split("/")
        if (
            len(raw) > MAX_NAME
            or not (raw.isascii() and name.isprintable())
            or "\\" in name
            or ":" in name
            or any(part in ("", ".", "..") for part in parts)
        ):
            self._refuse(f"expected plain names of entries, found {quoted(name)}")
        return name

    def _zip64(self, name: str, extra: bytes, fields: tuple[int, ...]) -> tuple[int, ...]:
        """Return the fields, with full ones replaced from the zip64 extra field (APPNOTE 4.5.3)."""
        at, wide = 0, b""
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if at + 4 + length > len(extra):
                break  # the rest is padding
            if kind == 1:
                if wide:
                    self._refuse(f"{quoted(name)}: expected one zip64 field, found two")
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        full = sum(field == FULL32 for field in fields)
        if not wide and not full:
            return fields
        if len(wide) < 8 * full:
            self._refuse(f"{quoted(name)}: expected {full} zip64 sizes, found {len(wide)} bytes of them")
        values = iter(struct.unpack_from(f"<{full}Q", wide))
        return tuple(next(values) if field == FULL32 else field for field in fields)

    def _locate(self, entry: _Listed, limit: int) -> tuple[Entry, int]:
        """Return an entry, checked against its own header, and where the next one begins.

        ``limit``: where the directory begins.
        """
        data, at, name = self._data, entry.offset, quoted(entry.name)
        if at + LOCAL_HEADER.size > limit or bytes(data[at : at + 4]) != LOCAL:
            self._refuse(f"{name}: expected its header at byte {at}, found none")
        _, _, flags, method, _, _, crc, stored, size, name_len, extra_len = LOCAL_HEADER.unpack_from(data, at)
        at += LOCAL_HEADER.size
        start = at + name_len + extra_len
        if start + entry.size > limit:
            self._refuse(f"{name}: expected {entry.size} bytes, found the directory before their end")
        if bytes(data[at : at + name_len]).decode("ascii", errors="replace") != entry.name:
            self._refuse(f"{name}: expected the same name in its own header, found another")
        size, stored = self._zip64(entry.name, bytes(data[at + name_len : start]), (size, stored))
        described = bool(flags & DESCRIPTOR_FOLLOWS)
        same = (size, stored, crc) == (entry.size, entry.size, entry.crc)
        if flags != entry.flags or method or not (same or (described and (size, stored, crc) == (0, 0, 0))):
            self._refuse(f"{name}: expected the same size, checksum and flags in its own header, found others")
        end = start + entry.size
        return Entry(entry.name, start, entry.size, entry.crc), end + (self._descriptor(entry, end) if described else 0)

    def _descriptor(self, entry: _Listed, at: int) -> int:
        """Return the length of the data descriptor at ``at``, which repeats checksum and sizes (APPNOTE 4.3.9)."""
        for signature in (DESCRIPTOR, b""):
            for width in "IQ":
                record = signature + struct.pack("<I", entry.crc)
                if width == "Q" or entry.size <= FULL32:
                    record += struct.pack(f"<2{width}", entry.size, entry.size)
                    follows = bytes(self._data[at + len(record) : at + len(record) + 4])
                    if bytes(self._data[at : at + len(record)]) == record and follows in (LOCAL, CENTRAL):
                        return len(record)
        self._refuse(f"{quoted(entry.name)}: expected its size and checksum behind it, found others")

    def _refuse_other_formats(self) -> NoReturn:
        head = bytes(self._data[:512])
        found = "something else"
        if not head:
            found = "an empty file"
        elif head[:1] == b"\x80" or head[257:262] == b"ustar":
            found = "a file as torch before 1.6 saved it; save it again with a current torch: torch.save(torch.load(F, weights_only=True), F)"
        elif head.lstrip()[:1] == b"<":
            found = "an HTML page, as failed downloads leave behind; download it again"
        elif head.startswith(b"version https://git-lfs"):
            found = "a Git LFS pointer; fetch the file itself with git lfs pull"
        self._refuse(f"expected a zip archive as torch.save writes, found {found}")

    def _refuse(self, message: str) -> NoReturn:
        raise refused(self._path, message)


# Writing uses the same form: sizes and checksums in the headers, wide fields only if they are needed.

_VERSION, _VERSION64 = 20, 45  # version of the format needed to read an entry: plain, zip64
_PADDING = 0x4246  # torch's extra field "FB", which aligns the bytes after it


def local_header(name: str, offset: int, size: int, crc: int, alignment: int) -> bytes:
    """Return the header of an entry, padded so that its bytes begin at a multiple of ``alignment``."""
    wide = size >= FULL32
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    short = FULL32 if wide else size
    begin = offset + LOCAL_HEADER.size + len(name) + len(extra) + 4
    padding = -begin % alignment
    extra += struct.pack("<HH", _PADDING, padding) + b"Z" * padding
    version = _VERSION64 if wide else _VERSION
    fixed = LOCAL_HEADER.pack(LOCAL, version, 0, 0, 0, _DATE, crc, short, short, len(name), len(extra))
    return fixed + name.encode() + extra


def central_header(name: str, offset: int, size: int, crc: int) -> bytes:
    """Return the directory's record of an entry."""
    wide = [field for field in (size, size, offset) if field >= FULL32]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = _VERSION64 if wide else _VERSION
    short, short_offset = min(size, FULL32), min(offset, FULL32)
    fixed = CENTRAL_HEADER.pack(
        CENTRAL, version, version, 0, 0, 0, _DATE, crc, short, short, len(name), len(extra), 0, 0, 0, 0, short_offset
    )
    return fixed + name.encode() + extra


def end_records(count: int, start: int, size: int) -> bytes:
    """Return the records after the directory."""
    records = b""
    if count >= FULL16 or start >= FULL32 or size >= FULL32:
        records += END64_RECORD.pack(END64, 44, _VERSION64, _VERSION64, 0, 0, count, count, size, start)
        records += END64_LOCATOR.pack(LOCATOR64, 0, start + size, 1)
    count, start, size = min(count, FULL16), min(start, FULL32), min(size, FULL32)
    return records + END_RECORD.pack(END, 0, 0, count, count, size, start, 0)
