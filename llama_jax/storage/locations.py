"""Locations of checkpoints: a folder on disk, or in Google's object storage (gs://bucket/folder, by gcsfs)."""

import base64
import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tensorstore as ts
from etils import epath

from llama_jax.compat import orbax_internals
from llama_jax.errors import UserError, is_lost_process, lost_process
from llama_jax.programs import install_command
from llama_jax.storage.files import copying, is_address

PROBE = ".writable"


def location(path: str | Path) -> Path:
    """Return a path on disk or in object storage. Raises UserError on other addresses, or if gcsfs is not installed."""
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
    import fsspec  # imported here, as folders on disk need it not

    # TensorFlow, where it is installed, would take the place of gcsfs, and the accelerator's memory with it.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # gcsfs would remember what a folder held, and so miss the arrays, which tensorstore writes past it, and what other
    # processes do.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def is_remote(path: Path) -> bool:
    """Return whether ``path`` is in object storage."""
    return str(path).startswith("gs://")


def on_disk(path: str, key: str) -> Path:
    """Return a path on disk. Raises a UserError that names ``key`` on an address in object storage."""
    if is_address(path):
        raise UserError(f"{key}: expected a folder on disk, found {path}; write to one, then copy it{copying(path)}")
    return _expanded(path)


def folder_on_disk(path: str, key: str) -> Path:
    """Return the path of a folder on disk, which need not exist. Raises a UserError that names ``key`` on others."""
    folder = on_disk(path, key)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{key}: expected a folder, found the file {place}; choose another")
    return folder


def _expanded(path: str) -> Path:
    """Expand a leading ~ in ``path`` if it stands for a user's home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user, but a folder may have that name
        return Path(path)


def real_name(path: Path) -> str:
    """Return the name of a folder with all links resolved. It is equal for two names of the same folder."""
    return str(path) if is_remote(path) else os.path.realpath(path)


def absolute(path: Path) -> Path:
    """Return an absolute path, as orbax requires. An address stays as it is."""
    return path if is_remote(path) else path.absolute()


def kvstore(folder: Path) -> dict[str, Any]:
    """Return tensorstore's specification of ``folder``."""
    if not is_remote(folder):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, _, inside = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{inside}/" if inside else ""}


def children(folder: Path) -> list[Path]:
    """Return the content of ``folder``, empty if it is not a folder. Raises UserError if it cannot be listed.

    In object storage, ``is_dir`` is also False without permission to look. Relying on it, a run would start over and
    overwrite the old one.
    """
    with user_errors(folder, "read"):
        try:
            found = dict.fromkeys(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        # Object storage lists a file, and the placeholder of a folder, as their own children.
        return [path for path in found if path.name != folder.name or path.exists()]


def objects_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size, and MD5 if known, of each object below ``folder`` in object storage, by relative path."""
    import fsspec

    prefix = str(folder).removeprefix("gs://").rstrip("/") + "/"
    found = fsspec.filesystem("gcs", finalize_on_close=True).find(prefix, detail=True)
    return {
        name.removeprefix(prefix): {"size": int(known["size"])}
        | ({"md5": base64.b64decode(known["md5Hash"]).hex()} if known.get("md5Hash") else {})
        for name, known in found.items()
        if not name.endswith("/")
    }


def check_writable(folder: Path, key: str) -> None:
    """Raise a UserError that names ``key`` if ``folder``, in object storage, cannot be written.

    A test file is written the way of small files and read the way of arrays, since the two find credentials
    differently.
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
    """Turn errors of orbax, tensorstore and gcsfs, such as a full disk or a truncated file, into a UserError."""
    try:
        yield
    except (UserError, NameError, AttributeError, AssertionError):
        raise
    except Exception as error:  # orbax raises plain Exception, too
        if is_lost_process(error):
            raise lost_process(error) from error
        reason = orbax_internals.reason_of(str(error))[:200] or type(error).__name__
        what, hint = {
            "read": ("intact files", "use another copy of it, or another step"),
            "write": ("space and permission to write", "free some disk, or choose another folder"),
        }[verb]
        if is_remote(folder):
            what = f"permission to {verb} there" + (", and intact files" if verb == "read" else "")
            hint = (
                "check the address, who you are (gcloud auth application-default login), and that this account has the roles "
                "storage.objectUser and storage.legacyBucketReader on the bucket"
            )
        raise UserError(f"{f'{key}: ' if key else ''}{folder}: expected {what}, found: {reason}; {hint}") from error
