"""Token files: a text encoded once, memory-mapped afterwards.

A folder holds train.bin and eval.bin (uint16, or uint32 where the vocabulary needs it, little endian) and manifest.json,
written last, which says of what text and tokenizer they are.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llama_jax.config import from_dict
from llama_jax.data.text import Corpus, Part
from llama_jax.errors import UserError
from llama_jax.files import replacing, write_atomically
from llama_jax.progress import Progress
from llama_jax.tokenizer import Tokenizer

VERSION = 2
SPLITS = ("train", "eval")
DTYPES = ("<u2", "<u4")
# Parts that are encoded at once, by as many threads as there are workers.
PARTS_AT_ONCE = 64


@dataclass(frozen=True)
class Manifest:
    """What a token folder holds. Lengths are tokens and bytes of text, each of train and eval."""

    version: int
    text_sha256: str
    train_size: float
    separator: str
    tokenizer_sha256: str
    trained_vocab_size: int  # that was asked for, where the tokenizer was trained for this text; else 0
    dtype: str
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    documents: dict[str, int]
    replaced_sequences: int


@dataclass(frozen=True)
class TokenSet:
    """The two token streams of a text, memory-mapped: documents one after the other, each from BOS to EOS."""

    train: np.ndarray
    eval: np.ndarray
    manifest: Manifest

    @property
    def eval_bytes_per_token(self) -> float:
        """Bytes of held-out text that a token that is predicted stands for (the first token of a stream never is)."""
        return self.manifest.text_bytes["eval"] / max(1, self.manifest.tokens["eval"] - 1)


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished token folder, or None where there is none that this version reads."""
    try:
        manifest = from_dict(Manifest, json.loads((folder / "manifest.json").read_text()), "manifest.json")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, UserError):
        return None
    counts = (manifest.tokens, manifest.text_bytes, manifest.documents)
    whole = all(c.keys() == set(SPLITS) and all(type(n) is int and n >= 0 for n in c.values()) for c in counts)
    return manifest if manifest.version == VERSION and manifest.dtype in DTYPES and whole else None


def open_tokens(folder: Path) -> TokenSet:
    """Map a token folder. Raises UserError where it is not one, or not whole."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: expected a folder of prepared tokens with manifest.json, found none; make it again")
    streams = []
    for split in SPLITS:
        path, count = folder / f"{split}.bin", manifest.tokens[split]
        dtype = np.dtype(manifest.dtype)
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            raise UserError(
                f"{path}: expected {count} tokens of {dtype}, found another size; delete {folder} to make it again"
            )
        streams.append(np.memmap(path, dtype, mode="r") if count else np.zeros(0, dtype))
    return TokenSet(streams[0], streams[1], manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    write_atomically(folder / "manifest.json", json.dumps(asdict(manifest), indent=1))


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int = 1, trained_vocab_size: int = 0
) -> TokenSet:
    """The tokens of ``corpus``: taken from ``folder`` if it holds just these, else made there.

    Memory is bounded whatever the text's length; nothing unfinished ever looks finished.
    """
    keys = corpus.digest(), sha256(tokenizer.model_bytes)
    manifest = read_manifest(folder)
    if manifest is not None and (manifest.text_sha256, manifest.tokenizer_sha256) == keys:
        with contextlib.suppress(UserError):  # the tokens themselves may be gone
            return open_tokens(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    dtype = np.dtype(DTYPES[tokenizer.vocab_size > 1 << 16])
    counts: dict[str, tuple[int, int, int]] = {}
    corpus.replaced = 0
    for split in SPLITS:
        with replacing(folder / f"{split}.bin") as temporary:
            counts[split] = _write_stream(corpus.parts(split), tokenizer, dtype, temporary, workers, split)
    tokens, text_bytes, documents = ({s: counts[s][i] for s in SPLITS} for i in range(3))
    text_sha256, tokenizer_sha256 = keys
    manifest = Manifest(
        VERSION, text_sha256, corpus.train_size, corpus.separator.decode(), tokenizer_sha256, trained_vocab_size,
        dtype.str, tokens, text_bytes, documents, corpus.replaced,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return open_tokens(folder)


def _write_stream(
    parts: Iterator[Part], tokenizer: Tokenizer, dtype: np.dtype, path: Path, workers: int, split: str
) -> tuple[int, int, int]:
    """Encode ``parts`` into a file; returns tokens, bytes of text and documents."""
    tokens = text_bytes = documents = 0
    with open(path, "wb") as file, Progress(f"tokens ({split})", None, "B") as progress:
        while batch := list(itertools.islice(parts, PARTS_AT_ONCE)):
            ids = np.array(_encode(batch, tokenizer, workers), dtype)
            file.write(ids.tobytes())
            size = sum(part.size for part in batch)
            tokens, text_bytes = tokens + len(ids), text_bytes + size
            documents += sum(part.starts for part in batch)
            progress.update(size)
        file.flush()
        os.fsync(file.fileno())
    return tokens, text_bytes, documents


def _encode(parts: list[Part], tokenizer: Tokenizer, workers: int) -> list[int]:
    """Tokens of consecutive parts, each document between BOS and EOS."""
    rows = tokenizer.encode_parts([part.text for part in parts], [part.starts for part in parts], workers)
    ids: list[int] = []
    for part, row in zip(parts, rows, strict=True):
        ids += [tokenizer.bos_id] * part.starts + row + [tokenizer.eos_id] * part.ends
    return ids
