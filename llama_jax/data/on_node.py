"""Encodes a task on a node of a Ray cluster: see on_ray.py, whose command sends the work."""

import contextlib
import functools
import hashlib
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import llama_jax
from llama_jax.data.encode import Job, encode_task
from llama_jax.data.manifest import sha256
from llama_jax.data.places import Place
from llama_jax.data.workers import naming_the_disk
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wanted:
    """The work for the nodes, and what tells whether a node sees the same files.

    ``mark`` is the name of a file in the job's folder. ``files`` are the files of the corpus, each with what its node
    must find it to be ("": it is at an address).
    """

    job: Job
    tasks: tuple[int, ...]
    mark: str
    here: str
    tokenizer_sha256: str
    files: tuple[tuple[Place, str], ...]


def encode_on_node() -> Callable[[bytes, str, int], str]:
    """Return the function that nodes run. Ray sends it as it stands, since a node may lack this package."""

    def encode(wanted: bytes, version: str, task: int) -> str:
        import socket

        place = f"on every node, found on node {socket.gethostname()}"
        advice = "install the same on all nodes, and start them in that environment"
        try:
            import llama_jax

            if llama_jax.__version__ != version.partition(" ")[0]:
                return f"--ray: expected llama-jax {version} {place}: {llama_jax.__version__}; {advice}"
            from llama_jax.data import on_node
        except ImportError as error:
            return f"--ray: expected llama-jax {version} {place} none that can be imported ({error}); {advice}"
        if on_node.version() != version:
            return f"--ray: expected llama-jax {version} {place}: {on_node.version()}; {advice}"
        return on_node.encode_here(wanted, task)

    return encode


@functools.cache
def version() -> str:
    """Return the version of this package, with a digest of its code, since a version may have several states."""
    root, sha = Path(llama_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root)} {sha256(path.read_bytes())}".encode())
    return f"{llama_jax.__version__} (code {sha.hexdigest()[:8]})"


def encode_here(wanted: bytes, task: int) -> str:
    """Encode a task on this node. Return what is wrong, in one line, or an empty text."""
    work: Wanted = pickle.loads(wanted)
    try:
        _check_shared(work, task)
        with naming_the_disk(work.job):
            encode_task(work.job, task, _tokenizer(work.job.tokenizer, work.tokenizer_sha256))
    except UserError as error:
        return str(error)
    return ""


def _check_shared(work: Wanted, task: int) -> None:
    """Raise UserError if this node does not see the same folder, tokenizer and files as the command."""
    job = work.job
    if not (job.folder / work.mark).exists():
        raise _not_shared(job.folder.parent, "", "--output")
    if not job.tokenizer.exists():
        raise _not_shared(job.tokenizer, "No such file or directory")
    if _tokenizer(job.tokenizer, work.tokenizer_sha256).digest != work.tokenizer_sha256:
        _tokenizer.cache_clear()
        raise _not_shared(job.tokenizer, "another tokenizer")
    with contextlib.suppress(OSError):  # a file that is named by its full path needs no folder
        os.chdir(work.here)
    for number in dict.fromkeys(unit.file for unit in job.tasks[task]):
        place, known = work.files[number]
        if not known:
            continue
        path = Path(work.here, place.name)
        if not path.exists():
            raise _not_shared(path, "no such file")
        if place.mark() != known:
            raise _not_shared(path, "a file of another size or time")


def _not_shared(path: Path, found: str, key: str = "") -> UserError:
    where = f"{key}: " if key else ""
    return UserError(
        f"{where}{path}: expected to be on a disk that all nodes share, found {found or 'that this is not so'} on node "
        f"{socket.gethostname()}; put it on a shared disk, under the same path on all nodes"
    )


@functools.cache
def _tokenizer(path: Path, _: str) -> Tokenizer:
    return Tokenizer(path)
