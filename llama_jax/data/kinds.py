"""Recognizes by their bytes files that are not plain text in UTF-8, so that nobody trains on them by accident."""

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llama_jax.data.tables import columns_in_json, is_table

# Files up to WHOLE bytes are examined in full, larger ones in WINDOWS windows of WINDOW bytes, spread evenly.
WHOLE, WINDOWS, WINDOW = 1 << 20, 16, 1 << 16
# Plain text has at most this share, or at most so few, bytes that are not UTF-8, and likewise control characters.
MOST_BAD, FEW_BAD = 0.005, 2
MOST_CONTROLS, FEW_CONTROLS = 0.1, 8
# From this share of NUL bytes a file may be UTF-16.
MANY_NULS = 0.02
# Number of lines of JSON lines to examine.
LINES = 200


# How the texts in a file are stored: as the file itself, or as a field of records.
Format = Literal["text", "json lines", "json", "parquet", "arrow file", "arrow stream"]


@dataclass(frozen=True)
class Kind:
    """A kind of file that is not plain text, and what to do about it.

    ``format`` tells how its records are read, "text" if they are not.
    """

    name: str
    advice: str
    format: Format = "text"


UNPACK = "decompress it first"
EXTRACT = "write its text to a .txt file first"
TEXT_FIRST = "give the text itself"
# Kinds of files by their first bytes.
MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip file", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd file", UNPACK),
    (b"\xfd7zXZ\0", "an xz file", UNPACK),
    (b"BZh", "a bzip2 file", UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 file", UNPACK),
    (b"\x5d\0\0", "an lzma file", UNPACK),
    (b"LZIP", "an lzip file", UNPACK),
    (b"\x1f\x9d", "a compressed file (.Z)", UNPACK),
    (b"\xff\x06\0\0sNaPpY", "a snappy file", UNPACK),
    (b"PK\3\4", "a zip archive (or a .docx, .xlsx, .epub, .npz, .pt)", UNPACK),
    (b"PK\5\6", "an empty zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\7", "a rar archive", UNPACK),
    (b"PAR1", "a parquet file", EXTRACT),
    (b"ARROW1\0\0", "an arrow file", EXTRACT),
    (b"\xff\xff\xff\xff", "an arrow stream", EXTRACT),
    (b"FEA1", "a feather file", EXTRACT),
    (b"ORC", "an ORC file", EXTRACT),
    (b"Obj\1", "an avro file", EXTRACT),
    (b"SQLite format 3\0", "an SQLite database", EXTRACT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXTRACT),
    (b"\x93NUMPY", "a numpy array", EXTRACT),
    (b"%PDF-", "a PDF file", EXTRACT),
    (b"%!PS", "a PostScript file", EXTRACT),
    (b"{\\rtf", "an RTF file", EXTRACT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (.doc, .xls)", EXTRACT),
    (b"bplist00", "a property list of macOS", TEXT_FIRST),
    (b"\0\5\x16\7", "a companion file of macOS (AppleDouble)", TEXT_FIRST),
    (b"\0\5\x16\0", "a companion file of macOS (AppleSingle)", TEXT_FIRST),
    (b"GGUF", "weights of a model (GGUF)", TEXT_FIRST),
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)", TEXT_FIRST),
    (b"\xff\xd8\xff", "a picture (JPEG)", TEXT_FIRST),
    (b"GIF8", "a picture (GIF)", TEXT_FIRST),
    (b"II*\0", "a picture (TIFF)", TEXT_FIRST),
    (b"MM\0*", "a picture (TIFF)", TEXT_FIRST),
    (b"RIFF", "sound or pictures (RIFF)", TEXT_FIRST),
    (b"OggS", "sound (Ogg)", TEXT_FIRST),
    (b"fLaC", "sound (FLAC)", TEXT_FIRST),
    (b"ID3", "sound (MP3)", TEXT_FIRST),
    (b"\x7fELF", "a program (ELF)", TEXT_FIRST),
    (b"MZ", "a program (.exe)", TEXT_FIRST),
    (b"\xca\xfe\xba\xbe", "a program", TEXT_FIRST),
    (b"\xcf\xfa\xed\xfe", "a program (Mach-O)", TEXT_FIRST),
    (b"\0asm", "a program (WebAssembly)", TEXT_FIRST),
    (b"PACK\0", "a pack of git", TEXT_FIRST),
    (b"MMIDIDX", "the index of a Megatron token file", TEXT_FIRST),
    ((20240520).to_bytes(4, "little"), "a token file of llm.c", TEXT_FIRST),
    ((20240801).to_bytes(4, "little"), "a token file of llm.c", TEXT_FIRST),
)
FORMATS: dict[bytes, Format] = {b"PAR1": "parquet", b"ARROW1\0\0": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
JSON_LINES = Kind("JSON lines", "write their texts to a .txt file first", "json lines")
# Encodings by byte order mark, and by trying to decode. The first that fits wins.
MARKS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
WIDE = ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")
COLUMNS = Kind(
    "a table in JSON, column by column", "write a record a line (pandas: to_json(orient='records', lines=True))"
)
TABLE = Kind("a table", "write its column of texts to a .txt file, or its rows as JSON lines, first")
# A line that is an object, but perhaps not JSON: a comma follows, or Python printed it.
OBJECT = re.compile(r"\s*\{\s*[\"'].*\}\s*,?\s*")
# What a page of HTML begins with, comments aside.
HTML = re.compile(r"(?:<!--.*?-->\s*)*<(?:!doctype html|(?:html|head|body)\b[^<>]*>)", re.IGNORECASE | re.DOTALL)
# Whole numbers and what stands between them, of which so many are not the digits of one.
NUMBERS = re.compile(r"[\d\s,;\[\]()]+")
FEWEST_NUMBERS = 64
# Short texts that servers send in place of a file.
NO_FILE = re.compile(
    r"(4\d\d[: ].{0,40}|not found|(entry|repository|revision) not found\W*|access denied\W*|accessdenied|forbidden|unauthorized|"
    r"invalid username or password\W*|too many requests\W*|moved permanently\W*|found\. redirecting to .*)",
    re.IGNORECASE,
)


def kind_of(path: Path, size: int) -> Kind | None:
    """Return the kind of a file of ``size`` bytes, None for plain text. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        if size <= WHOLE:
            windows = [file.read(size)]
        else:
            windows = []
            for i in range(WINDOWS):
                file.seek((size - WINDOW) * i // (WINDOWS - 1))
                windows.append(file.read(WINDOW))
    return kind_of_bytes(windows, size, path.name)


def kind_of_bytes(windows: Sequence[bytes], size: int, name: str) -> Kind | None:
    """Return the kind of a file of ``size`` bytes by some ``windows`` of it. The first is its beginning.

    Its ``name`` tells only tables without the names of columns from text, and a file with few JSON lines.
    """
    head = windows[0]
    return by_first_bytes(head, size) or _by_encoding(windows) or _by_structure(head, len(head) == size, name)


def is_too_odd(bad: int, size: int) -> bool:
    """Return whether ``bad`` of ``size`` bytes are more invalid UTF-8 than a text has by accident."""
    return bad > max(FEW_BAD, size * MOST_BAD)


def decoded(raw: bytes) -> tuple[str, int]:
    """Return bytes as text, and how many sequences of them were not UTF-8 and became U+FFFD."""
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = raw.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def bad_bytes(raw: bytes) -> int:
    """Return how many bytes are not part of a UTF-8 character."""
    return len(raw) - len(raw.decode("utf-8", "ignore").encode())


def by_first_bytes(head: bytes, size: int) -> Kind | None:
    """Return the kind of a file of ``size`` bytes that begins with ``head``, if its first bytes tell it, or None."""
    for magic, name, advice in MAGIC:
        # Some marks (BZh, ORC, MZ, RIFF) may also begin a text.
        if head.startswith(magic) and (not magic.isalnum() or _controls(head[:4096]) or bad_bytes(head[:4096]) > 3):
            return Kind(name, advice, FORMATS.get(magic, "text"))
    if head[257:262] == b"ustar":
        return Kind("a tar archive", "unpack it first")
    if head[4:8] == b"ftyp" and head[0] == 0:
        return Kind("a film (MP4)", TEXT_FIRST)
    if head[:2] == b"BM" and int.from_bytes(head[2:6], "little") == size:
        return Kind("a picture (BMP)", TEXT_FIRST)
    if re.match(rb"[\x50-\x5f]\x2a\x4d\x18", head):
        return Kind("a zstd or lz4 file", UNPACK)
    if re.match(rb"\x80[\2-\5][\x95}\](cX\x8a]|\((?:lp|dp)\d+\n", head):
        return Kind("a pickle (or a .pt, .bin or .pth file of PyTorch)", EXTRACT)
    if (
        re.match(rb"(?s).{8}\{\s*\"", head)
        and 0 < int.from_bytes(head[:8], "little") < min(size, 1 << 27)
        and head[7] == 0
    ):
        return Kind("weights of a model (safetensors)", TEXT_FIRST)
    if head[:1] == b"\n" and (b"\n\5<unk>" in head[:64] or b"\n\3<s>" in head[:64]):
        return Kind("a SentencePiece model", "give the text, and the model as the tokenizer model's path")
    return None


def _by_encoding(windows: Sequence[bytes]) -> Kind | None:
    """Recognize files by bytes that are not UTF-8, and by control characters."""
    head = windows[0]
    for mark, name in MARKS:
        if head.startswith(mark):
            return _encoded(name)
    size = sum(map(len, windows))
    bad = sum(map(_bad_in_window, windows))
    odd = is_too_odd(bad, size)
    if (odd or head.count(0) > MANY_NULS * len(head)) and (codec := wide_encoding(head)):
        return _encoded(codec)
    if sum(map(_controls, windows)) > max(FEW_CONTROLS, size * MOST_CONTROLS):
        return Kind("binary data" + (", perhaps token ids" if _are_token_ids(head) else ""), TEXT_FIRST)
    if not odd:
        return None
    mostly_ascii = sum(byte < 0x80 for byte in head[:4096]) > 0.6 * len(head[:4096])
    guess = "WINDOWS-1252" if mostly_ascii else "ENCODING"
    return Kind(
        f"text in another encoding ({bad / size:.2%} of its bytes are not UTF-8)",
        f"convert it (iconv -f {guess} -t UTF-8)",
    )


def _encoded(name: str) -> Kind:
    return Kind(f"text in {name}", f"convert it, for example with iconv -f {name} -t UTF-8")


def _bad_in_window(window: bytes) -> int:
    """Return the number of bytes of a window that are not UTF-8, ignoring characters cut at its ends."""
    start = next((i for i, byte in enumerate(window[:3]) if byte & 0xC0 != 0x80), 3)
    text, read = codecs.utf_8_decode(window[start:], "ignore", False)
    return read - len(text.encode())


def _controls(raw: bytes) -> int:
    """Return the number of control characters that texts do not contain, including NUL."""
    texts = bytes(c for c in range(256) if c >= 32 and c != 127) + b"\t\n\v\f\r\b\x1b"
    return len(raw.translate(None, texts))


def wide_encoding(head: bytes) -> str:
    """Return the encoding of two or four bytes a character in which bytes are text, by iconv's name. "": none."""
    return next((codec for codec in WIDE if _is_text_in(codec, head)), "")


def _is_text_in(codec: str, head: bytes) -> bool:
    """Return whether bytes are text in UTF-16 or UTF-32 without a byte order mark."""
    try:
        text = codecs.getincrementaldecoder(codec)().decode(head[:WINDOW])  # ignores a cut last character
    except UnicodeDecodeError:
        return False
    codes = np.array(list(map(ord, text)), np.int32)
    ascii_text = ((codes >= 32) & (codes < 127)) | np.isin(codes, (9, 10, 13))
    asian = ((codes >= 0x3000) & (codes < 0xA000)) | ((codes >= 0xAC00) & (codes < 0xD7B0)) | (codes >= 0xFF00)
    controls = (codes < 32) & ~ascii_text
    if not len(codes) or controls.mean() > 0.01:
        return False
    if ascii_text.mean() > 0.95:
        return True
    # A script has its letters within 256 codes, or is one of the large Asian ones. Token ids are spread everywhere.
    script = max(int(np.bincount(codes[~ascii_text] >> 8).max()), int(asian.sum()))
    spaced = np.isin(codes, (10, 32, 0x3000, 0x3001, 0x3002, 0xFF0C)).mean() > 0.02
    return bool(spaced and ascii_text.sum() + script > 0.9 * len(codes))


def _are_token_ids(head: bytes) -> bool:
    """Return whether 16-bit numbers stay below the size of usual vocabularies."""
    return len(head) >= 64 and len(head) % 2 == 0 and int(np.frombuffer(head, "<u2").max()) < 50_400


def _by_structure(head: bytes, whole: bool, name: str) -> Kind | None:
    """Recognize files that are text, but not the text that a person means."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if HTML.match(text):
        return Kind("a page of HTML", "see whether a download failed; " + EXTRACT)
    if text.startswith("<?xml"):
        return Kind("XML", "see whether a download failed; " + EXTRACT)
    if text.startswith("WARC/1."):
        return Kind("a web archive (WARC)", EXTRACT)
    if re.match(r"<doc id=\"[^<>]*>\s", text):
        return Kind("articles between tags, as WikiExtractor writes them", "write them with its option --json")
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return Kind("a pointer of Git LFS in place of the file", "fetch the file itself (git lfs pull)")
    if whole and len(text) < 200 and NO_FILE.fullmatch(text.strip()):
        return Kind(f"a server's answer in place of the file ({text.strip()!a})", "download it again")
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if found := _json_lines(text, whole, bool({".jsonl", ".ndjson"} & {*suffixes})) or _json(text, whole):
        return found
    if NUMBERS.fullmatch(text) and len(re.findall(r"\d+", text)) >= FEWEST_NUMBERS:
        return Kind("numbers, perhaps token ids", TEXT_FIRST)
    # White space may begin a row.
    return TABLE if is_table(head.decode("utf-8", "replace").lstrip("\ufeff\r\n"), whole, suffixes[-1:]) else None


def _json_lines(text: str, whole: bool, named: bool) -> Kind | None:
    """Recognize JSON lines: most lines are objects. In a file that is ``named`` so, one is enough."""
    complete = text if whole else text.rpartition("\n")[0]
    if not complete and text.startswith("{") and _is_cut_record(text):
        return JSON_LINES  # the first record is longer than the sample
    lines = [line for line in complete.split("\n") if line.strip()][:LINES]
    if len(lines) == 1 and not named and columns_in_json(lines[0]):
        return COLUMNS
    records = sum(_is_record(line) for line in lines)
    if records and (named or (records >= 0.5 * len(lines) and (len(lines) > 1 or text.startswith("{")))):
        return JSON_LINES
    for kind, found in ((list, "JSON lines of lists"), (str, "JSON lines of texts")):
        # A line in quotation marks may also be prose: then no mark within it is escaped.
        sure = kind is list or named or any("\\" in line for line in lines)
        if sure and len(lines) > 1 and sum(_is_record(line, kind) for line in lines) >= 0.9 * len(lines):
            return Kind(found, EXTRACT)
    if len(lines) > 1 and sum(OBJECT.fullmatch(line) is not None for line in lines) >= 0.9 * len(lines):
        return Kind("lines of objects that are not JSON", "write each with json.dumps")
    return None


def _json(text: str, whole: bool) -> Kind | None:
    """Recognize other JSON. An array of objects has records, too."""
    if text[:1] not in ("{", "["):
        return None
    # It is an array even where it is damaged, so that the damage is named when it is read.
    is_array = re.match(r"\[\s*\{\s*\"", text) is not None
    found = Kind("a JSON array", EXTRACT, "json") if is_array else Kind("JSON", EXTRACT)
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        # The JSON is cut where the sample ends.
        at = error.pos if isinstance(error, json.JSONDecodeError) else len(text)
        cut = not whole and (at > len(text) - 32 or "Unterminated string" in str(error))
        return found if cut or is_array else None
    following = text[end:].lstrip()
    return found if isinstance(value, (dict, list)) and (not following or following[0] in "{[") else None


def _is_record(line: str, kind: type = dict) -> bool:
    if not line.lstrip().startswith({"dict": "{", "list": "[", "str": '"'}[kind.__name__]):
        return False
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False


def _is_cut_record(text: str) -> bool:
    """Return whether ``text`` is the beginning of a JSON object."""
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos > len(text) - 32 or "Unterminated string" in str(error)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return False
    return False
