"""Torch archives made by hand, byte for byte, so that each of their parts can be made wrong."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", kind: str = "torch.FloatStorage", numel: int = 6, location: str = "cpu") -> bytes:
    return b"(" + text("storage") + named(kind) + text(key) + text(location) + number(numel) + b"tQ"


def tensor(
    shape: Sequence[int] = (2, 3),
    strides: Sequence[int] | None = None,
    offset: int = 0,
    of: bytes | None = None,
    function: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    hooks = named("collections.OrderedDict") + b")R"
    arguments = (of or storage()) + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks
    return named(function) + b"(" + arguments + b"tR"


def pickle_of(items: dict[str, bytes] | bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    body = items if isinstance(items, bytes) else b"}(" + b"".join(text(k) + v for k, v in items.items()) + b"u"
    return b"\x80\x02" + before + body + after + b"."


@dataclass
class Member:
    """An entry of a zip, with everything that its headers can say."""

    name: bytes
    content: bytes
    local_name: bytes | None = None
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    stored: int | None = None
    local_size: int | None = None
    local_crc: int | None = None
    offset: int | None = None
    attributes: int = 0
    made_by: int = 20
    extra: bytes = b""
    local_extra: bytes = b""
    comment: bytes = b""
    after: bytes = b""
    disk: int = 0


@dataclass
class Zip:
    """A zip archive of such entries."""

    members: list[Member]
    before: bytes = b""
    between: bytes = b""
    after: bytes = b""
    comment: bytes = b""
    count: int | None = None
    size: int | None = None
    start: int | None = None
    disks: tuple[int, int] = (0, 0)
    end64: bytes = b""
    listed: list[Member] | None = field(default=None)

    def build(self) -> bytes:
        out = bytearray(self.before)
        offsets: dict[int, int] = {}
        for m in self.members:
            offsets[id(m)] = len(out)
            size = len(m.content) if m.size is None else m.size
            crc = zlib.crc32(m.content) if m.crc is None else m.crc
            local_size = size if m.local_size is None else m.local_size
            name = m.name if m.local_name is None else m.local_name
            out += struct.pack(
                "<4sHHHHHIIIHH", b"PK\3\4", 20, m.flags, m.method, 0, 33, crc if m.local_crc is None else m.local_crc,
                local_size, local_size, len(name), len(m.local_extra),
            )  # fmt: skip
            out += name + m.local_extra + m.content + m.after
        out += self.between
        start = len(out)
        listed = self.members if self.listed is None else self.listed
        for m in listed:
            size = len(m.content) if m.size is None else m.size
            crc = zlib.crc32(m.content) if m.crc is None else m.crc
            offset = offsets.get(id(m), 0) if m.offset is None else m.offset
            out += struct.pack(
                "<4sHHHHHHIIIHHHHHII", b"PK\1\2", m.made_by, 20, m.flags, m.method, 0, 33, crc,
                size if m.stored is None else m.stored, size, len(m.name), len(m.extra), len(m.comment), m.disk, 0,
                m.attributes, offset,
            )  # fmt: skip
            out += m.name + m.extra + m.comment
        size = len(out) - start if self.size is None else self.size
        out += self.end64
        count = len(listed) if self.count is None else self.count
        start = start if self.start is None else self.start
        out += struct.pack("<4sHHHHIIH", b"PK\5\6", *self.disks, count, count, size, start, len(self.comment))
        return bytes(out + self.comment + self.after)


FLOATS = np.arange(6, dtype="<f4").tobytes()


def members(pickle: bytes | None = None, storages: dict[str, bytes] | None = None, **others: bytes) -> list[Member]:
    """The usual entries: data.pkl, the storages, version, byteorder."""
    found = [Member(b"archive/data.pkl", pickle_of({"w": tensor()}) if pickle is None else pickle)]
    found += [
        Member(f"archive/data/{k}".encode(), v) for k, v in ({"0": FLOATS} if storages is None else storages).items()
    ]
    found += [Member(b"archive/version", b"3\n"), Member(b"archive/byteorder", b"little")]
    return found + [Member(f"archive/{k}".encode(), v) for k, v in others.items()]


def save(path: Path, archive: Zip | bytes) -> Path:
    path.write_bytes(archive.build() if isinstance(archive, Zip) else archive)
    return path
