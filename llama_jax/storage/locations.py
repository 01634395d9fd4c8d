"""Where checkpoints lie: in a folder on disk, or in Google's object storage (gs://bucket/folder), by etils.epath and gcsfs."""

import base64
import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import tensorstore as ts
from etils import epath

from llama_jax.cli.programs import install_command
from llama_jax.compat import orbax_internals
from llama_jax.errors import UserError, is_lost_process, lost_process
from llama_jax.storage.files import is_address

PROBE = ".writable"


def location(path: str | Path) -> Path:
    """A path on disk, or in object storage. Raises UserError on an address of any other kind, or where gcsfs is not installed."""
    text = os.fspath(path)
    if not is_address(text):
        return _expanded(text)
    if not re.match(r"gs://[^/]", text):
        raise UserError(
            f"{text}: expected a folder on disk or gs://bucket/folder, found an address of another kind; give one of these, or "
            "mount it as a folder"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: expected gcsfs, which reads gs://, found it not installed; {install_command('gcs')}")
    _prepare_gcsfs()
    return epath.Path(text)


@functools.cache
def _prepare_gcsfs() -> None:
    """Set up etils.epath and gcsfs for this process, once an address in object storage is used."""
    # TensorFlow, where it is installed, would take the place of gcsfs, and the accelerator's memory with it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # gcsfs would remember what a folder held, and so miss the arrays, which tensorstore writes past it, and what other
    # processes do.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def is_remote(path: Path) -> bool:
    """Whether ``path`` lies in object storage."""
    return str(path).startswith("gs://")


def on_disk(path: str, key: str) -> Path:
    """A path on disk. Raises UserError, which names ``key``, on an address in object storage."""
    if is_address(path):
        raise UserError(
            f"{key}: expected a folder on disk, found {path}; write to one, then copy it (gcloud storage cp -r)"
        )
    return _expanded(path)


def _expanded(path: str) -> Path:
    """``path`` with a leading ~ taken for a home folder, where that is somebody's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user; a folder may have the name
        return Path(path)


def real_name(path: Path) -> str:
    """The name of a folder behind all links: two that name the same folder are equal."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def absolute(path: Path) -> Path:
    """As orbax wants it."""
    return path if is_remote(path) else path.absolute()


def kvstore(folder: Path) -> dict[str, Any]:
    """``folder`` as tensorstore names it."""
    if not is_remote(folder):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, _, inside = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/" if inside else ""}


def children(folder: Path) -> list[Path]:
    """What lies in ``folder``, nothing where it is no folder. Raises UserError where that cannot be found out.

    Of object storage, ``is_dir`` says no as well where it was not allowed to look: a run would begin anew, over the old one.
    """
    with user_errors(folder, "read"):
        try:
            found = dict.fromkeys(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        # In object storage a file, and a folder's own placeholder, are listed as if they lay within themselves.
        return [path for path in found if path.name != folder.name or path.exists()]


def objects_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Size, and MD5 where the service keeps one, of each object below ``folder`` of object storage, by its path from there."""
    prefix = str(folder).removeprefix("gs://").rstrip("/") + "/"
    found = fsspec.filesystem("gcs", finalize_on_close=True).find(prefix, detail=True)
    return {
        name.removeprefix(prefix): {"size": int(known["size"])}
        | ({"md5": base64.b64decode(known["md5Hash"]).hex()} if known.get("md5Hash") else {})
        for name, known in found.items()
        if not name.endswith("/")
    }


def check_writable(folder: Path, key: str) -> None:
    """Raise UserError, which names ``key``, where ``folder``, of object storage, cannot be written to.

    A file goes there as small files do, and comes back as arrays do, which find their credentials in their own way.
    """
    bucket = kvstore(folder)["bucket"]
    probe = folder / PROBE
    with user_errors(folder, "write", key):
        try:
            probe.write_bytes(b"1")
        except FileNotFoundError:
            raise UserError(
                f"{key}: expected {folder} to be in a bucket that exists, found none of the name {bucket}; correct it, or "
                f"create it (gcloud storage buckets create gs://{bucket})"
            ) from None
        found = ts.KvStore.open(kvstore(folder)).result().read(PROBE).result()
        if found.value != b"1":
            raise UserError(f"{key}: expected {probe}, which was just written, found that tensorstore does not see it")
        probe.unlink()


@contextlib.contextmanager
def user_errors(folder: Path, verb: Literal["read", "write"], key: str = "") -> Iterator[None]:
    """Turn what orbax, tensorstore and gcsfs raise, for a disk that is full or a file that is cut, into a UserError."""
    try:
        yield
    except (UserError, NameError, AttributeError, AssertionError):
        raise
    except Exception as error:  # orbax raises Exception itself, too
        if is_lost_process(error):
            raise lost_process(error) from error
        reason = orbax_internals.reason_of(str(error))[:200] or type(error).__name__
        what, hint = {
            "read": ("files that are whole", "use another copy of it, or another step"),
            "write": ("room and permission to write", "make room, or choose another folder"),
        }[verb]
        if is_remote(folder):
            what = f"to be allowed to {verb} there" + (", and files that are whole" if verb == "read" else "")
            hint = (
                "check the address, who you are (gcloud auth application-default login), and that this account has the roles "
                "storage.objectUser and storage.legacyBucketReader on the bucket"
            )
        raise UserError(f"{f'{key}: ' if key else ''}{folder}: expected {what}, found: {reason}; {hint}") from error
