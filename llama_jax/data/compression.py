"""Compressed files, told apart by their first bytes, and read as streams: gzip, bzip2, xz and zstd."""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

from llama_jax.data.places import BLOCK_BYTES
from llama_jax.errors import UserError
from llama_jax.programs import install_command

# The first bytes of each kind of file. Those of bzip2 alone may also begin a text.
MAGIC: dict[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    # Also a frame that readers skip, with which some tools begin.
    "zstd": re.compile(rb"(?:\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"),
}
# So many compressed bytes are taken at once: few, since a few of them may stand for very many.
FEED_BYTES = 1 << 14
# zstd --long=31 refers back by up to this many bytes.
ZSTD_WINDOW = 1 << 31


def compression_of(head: bytes) -> str:
    """Return how a file that begins with ``head`` is compressed, or an empty text."""
    return next((name for name, magic in MAGIC.items() if magic.match(head)), "")


def decompressed(file: BinaryIO, compression: str, name: str) -> BinaryIO:
    """Return the decompressed content of ``file`` as a stream. It is ``file`` itself if it is not compressed.

    A read raises a UserError with the file's ``name`` if the content is damaged or cut.
    """
    return io.BufferedReader(_Decompressed(file, compression, name), BLOCK_BYTES) if compression else file


class _Decompressed(io.RawIOBase):
    """The decompressed content of a file. Several compressed streams may follow each other in it."""

    def __init__(self, file: BinaryIO, compression: str, name: str):
        self._file, self._compression, self._name = file, compression, name
        self._new = _decompressor(compression, name)
        self._stream: Any = None
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._packed and not (packed := self._file.read(FEED_BYTES)):
                if self._stream is not None:
                    self._damaged("it ends too early")
                return 0
            elif not self._packed:
                self._packed = packed
            self._ready = memoryview(self._decompress())
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _decompress(self) -> bytes:
        """Return what the next compressed bytes stand for, possibly nothing."""
        if self._stream is None:
            if self._compression in ("gzip", "xz"):
                self._packed = self._packed.lstrip(b"\0")  # streams may be padded
            if not self._packed:
                return b""
            self._stream = self._new()
        try:
            text: bytes = self._stream.decompress(self._packed)
        except Exception as error:  # each library has its own
            self._damaged(" ".join(str(error).split())[:100])
        self._packed = b""
        if self._stream.eof:
            self._packed, self._stream = self._stream.unused_data, None
        return text

    def _damaged(self, found: str) -> NoReturn:
        raise UserError(
            f"{self._name}: expected a whole {self._compression} file, found it damaged ({found}); download or make it again, or "
            "leave it out"
        )


def _decompressor(compression: str, name: str) -> Callable[[], Any]:
    """Return a function that makes a decompressor. Raises UserError if its package is not installed."""
    if compression == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    if compression == "bzip2":
        return bz2.BZ2Decompressor
    if compression == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{name}: expected zstandard, which reads zstd files, found it not installed; {install_command('data')}"
        ) from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()
