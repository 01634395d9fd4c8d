"""The checkpoint that a command is given, in any form: a model of another project is converted once into a cache.

The cache holds a folder for each conversion, named by a digest of what decides its content: the names, sizes and times
of the model's files, the bytes of the small ones, and the version below. So a model that changes is converted again.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.adapted import MOVED, WholeModel
from llama_jax.cli.progress import bytes_text
from llama_jax.cli.telling import tell
from llama_jax.config import ModelArgs
from llama_jax.convert import ConvertArgs, is_own, open_source, write
from llama_jax.convert.output import new_folder
from llama_jax.convert.source import Source, unread_text
from llama_jax.convert.summary import disk_for, stored_bytes
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.errors import UserError
from llama_jax.foreign.chat_files import MORE_TEMPLATES
from llama_jax.foreign.commands import convert_command
from llama_jax.foreign.layouts import Found, find_layout
from llama_jax.foreign.vocabulary import MODEL
from llama_jax.storage.files import user_cache, write_atomically
from llama_jax.storage.locations import is_remote, location
from llama_jax.storage.owner import InUse

# To be raised when the same files would become another checkpoint.
VERSION = 2
# A file beside each conversion, which says of what it was made.
SOURCE = "converted_from.json"
# Files that decide what a model, its tokenizer and its settings are.
DECIDING = re.compile(
    r".*\.(safetensors|bin|pth|chk)|.*\.(safetensors|bin)\.index\.json|tokenizer[._].*|chat_template.*|tiktoken\.model|"
    r"(config|params|generation_config|adapter_config|special_tokens_map|added_tokens|vocab|tekken)\.json|merges\.txt"
)
# Bytes up to which a file counts with all its bytes.
SMALL = 1 << 24
LOOK_SECONDS = 0.5
# Paths of which it has been told that their conversion is used.
_told: set[str] = set()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of this project, or a model of Meta's, Hugging Face's, Mistral's or llama2.c's.

    A model of another project is converted into the cache, unless it is there already. Lines on standard error say so.
    Raises UserError if ``path`` is none of these, or cannot be converted.
    """
    place = location(path)
    found = _foreign(place)
    if found is None:
        return Checkpoint.find(path)
    folder = _conversion(place, found)
    remedy = f"delete {folder}, and {place} is converted again"
    try:
        return dataclasses.replace(Checkpoint.find(folder), remedy=remedy)
    except UserError as error:
        raise UserError(
            f"{place}: expected its conversion in {folder} to be whole, found: {error}; {remedy}"
        ) from error


def open_model(path: str | Path, adapter: str | Path = "", remedy: str = MOVED) -> WholeModel:
    """Open what ``open_checkpoint`` opens, with the base if it is an adapter, or with ``adapter``.

    See WholeModel.find.
    """
    return WholeModel.find(path, adapter, remedy, open_checkpoint)


def model_arguments(path: str | Path) -> ModelArgs:
    """Return the model arguments of what ``open_checkpoint`` opens, without converting it."""
    place = location(path)
    if _foreign(place) is None:
        return Checkpoint.find(path).args
    with contextlib.ExitStack() as stack:
        return _opened(place, stack).args


def _foreign(place: Path) -> Found | None:
    """Return the layout of a model of another project on disk, or None. Checkpoint.find explains everything else."""
    if is_remote(place):
        return None
    with contextlib.suppress(OSError):  # Checkpoint.find says what cannot be read
        if place.is_file():
            return find_layout(place)
        if is_own(place) or not place.is_dir():
            return None
        with contextlib.suppress(UserError):
            return find_layout(place)
    return None


def _conversion(place: Path, found: Found) -> Path:
    """Return the folder of the cache that holds the model in ``place``, which is converted if necessary."""
    folder = user_cache() / "converted" / _key(found)
    waited = False
    while not folder.exists():
        try:
            _convert(place, found, folder)
        except InUse as error:
            if not waited:
                tell(f"{place}: another process converts it, into {folder}; waiting for it ({error})")
            waited = True
            time.sleep(LOOK_SECONDS)
        except UserError:
            if not folder.exists():  # else another process was faster
                raise
        else:
            _told.add(str(place))
    if str(place) not in _told:
        _told.add(str(place))
        tell(f"{place}: its conversion is used, {folder}")
    return folder


def _convert(place: Path, found: Found, folder: Path) -> None:
    """Convert the model in ``place`` into ``folder``. Raises UserError, and InUse if another process does so."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise UserError(
            f"{place}: expected a checkpoint of this project, since the job has several processes, found a model to convert; "
            f"convert it once before: {convert_command(place)}"
        )
    with contextlib.ExitStack() as stack:
        # What the converter prints is no result of this command.
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if note := skip_absent_tpu("converting"):
            tell(note)
        source = _opened(place, stack)
        need = stored_bytes(source, "llama-jax", "auto")
        _check_space(place, folder, need)
        try:
            temporary = stack.enter_context(new_folder(folder))
        except OSError as error:
            raise UserError(
                f"{folder}: expected to write a conversion of {place} there, found: {error.strerror}; set XDG_CACHE_HOME to a "
                f"folder that you may write to, or convert it yourself: {convert_command(place)}"
            ) from error
        tell(
            f"{place}: converting {source.family.partition(':')[0]} once into {folder}, {bytes_text(need)}; it is used from now on"
        )
        for earlier in _earlier(place, folder):
            tell(f"{place}: an earlier conversion of it is {earlier}; delete it if nothing uses it")
        # Where a folder holds more than one model, which one it is must be seen.
        chosen = f"decided by {source.decided}" if "; not read: " in source.decided else ""
        for warning in filter(None, [chosen, unread_text(source), *source.warnings]):
            tell(f"warning: {warning}")
        reader, _ = write(source, temporary, ConvertArgs())
        if _key(found) != folder.name:
            raise UserError(
                f"{place}: expected files that do not change while they are converted, found that they did; wait until its "
                "download or copy is done, and start again"
            )
        write_atomically(temporary / SOURCE, json.dumps({"path": str(place.absolute()), "decided": source.decided}))
        if damage := reader.not_finite():
            tell(f"warning: {damage}")


def _opened(place: Path, stack: contextlib.ExitStack) -> Source:
    """Open the model in ``place``. Raises a UserError that says what to do with other flags of the converter."""
    try:
        return open_source(place, ConvertArgs(input=str(place)), stack)
    except UserError as error:
        flags = re.search(r"--(tokenizer|layout|max-seq-len)\b", str(error))
        where = f"; the command that takes {flags[0]}: {convert_command(place)}" if flags else ""
        raise UserError(f"{place}: expected a model that can be converted, found: {error}{where}") from error


def _check_space(place: Path, folder: Path, need: int) -> None:
    _, free, fits = disk_for(folder, need)
    if not fits:
        raise UserError(
            f"{folder}: expected {bytes_text(need)} of free disk for a conversion of {place}, found {bytes_text(free)}; free "
            f"some, set XDG_CACHE_HOME to a folder on another disk, or convert it to one yourself: {convert_command(place)}"
        )


def _key(found: Found) -> str:
    """Return a digest of what decides the checkpoint that is made of a model."""
    digest = hashlib.sha256(f"{VERSION} {found.layout}".encode())
    for path in _deciding(found):
        status = path.stat()
        content = path.read_bytes() if status.st_size <= SMALL else b""
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns} ".encode())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:24]


def _deciding(found: Found) -> Iterator[Path]:
    """Yield the files that decide what a model is, in a fixed order."""
    folder = found.path if found.path.is_dir() else found.path.parent
    for path in sorted(folder.iterdir()):
        other = (
            found.path.is_file() and path.suffix in (".bin", ".safetensors", ".pth") and path.name != "tokenizer.bin"
        )
        if DECIDING.fullmatch(path.name) and path.is_file() and (path == found.path or not other):
            yield path
    yield from sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    if not (folder / MODEL).is_file():  # then the one above counts, where Meta's downloads have it
        above = (place / MODEL for place in dict.fromkeys((folder.absolute().parent, folder.resolve().parent)))
        yield from (path for path in above if path.is_file())


def _earlier(place: Path, folder: Path) -> Iterator[Path]:
    """Yield the conversions of what was in ``place`` before."""
    for record in sorted(folder.parent.glob(f"*/{SOURCE}")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(record.read_text()).get("path") == str(place.absolute()):
                yield record.parent
