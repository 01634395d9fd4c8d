"""Finds where a run's checkpoints lie, and checks that they are its own."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import ORIGIN, steps_in
from llama_jax.errors import UserError
from llama_jax.storage import owner
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import PROBE, absolute, children, is_remote, location, real_name
from llama_jax.training.run_folder import RunFolder, RunRecord

ELSEWHERE = "choose another --train.save-dir"


def find_store(folder: RunFolder, record: RunRecord, asked: str) -> Path:
    """Return the folder of the run's checkpoints.

    Raises UserError if they are in another one than the user asks for.
    """
    here = folder.path / "checkpoints"
    if not asked:
        known = folder.checkpoints
        return (
            location(record.store) if record.store and not here.exists() and steps_in(location(record.store)) else known
        )
    there = location(asked)
    if not here.exists():
        if not record.id and any(path.name not in (PROBE, owner.NAME) for path in children(there)):
            raise UserError(
                f"train.checkpoint_dir: expected a new or an empty folder for a new run, found {asked} in use; choose another"
            )
        return there
    known = folder.checkpoints
    moved = str(absolute(known)) != str(absolute(there))
    own = moved and not lies_within(known, folder.path) and _has_copies(there, record)
    if moved and not own and (steps_in(known) or not steps_in(there)):
        raise UserError(
            f"train.checkpoint_dir: expected {known}, where this run's checkpoints are, found {asked}; leave it out, or {ELSEWHERE}"
        )
    return there


def _has_copies(store: Path, record: RunRecord) -> bool:
    """Return whether ``store`` has checkpoints of the run, as a copy of the run needs them for itself."""
    steps = steps_in(store)
    return bool(steps and record.id) and origin_of(store / str(steps[-1])).get("run") == record.id


def lies_within(store: Path, folder: Path) -> bool:
    """Return whether a run's checkpoints lie in its folder."""
    return not is_remote(store) and store.resolve().is_relative_to(folder.resolve())


def point_to(folder: RunFolder, store: Path) -> None:
    """Write into the run folder where its checkpoints are."""
    here = folder.path / "checkpoints"
    if not here.is_dir():
        write_atomically(here, f"{absolute(store)}\n")


def check_in_sight(folder: RunFolder, record: RunRecord, store: Path, steps: list[int]) -> str:
    """Return a warning if the newest checkpoint that the run has saved is not among ``steps``, or "".

    Raises UserError if it has saved checkpoints and none can be found.
    """
    saved = record.saved
    if not saved and not steps and folder.best_path.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = int(json.loads(folder.best_path.read_text())["step"])
    if saved and not steps:
        places = f"{store}" + (f", or in {record.store}" if record.store not in ("", str(store)) else "")
        raise UserError(
            f"train.save_dir: expected the checkpoints of the run in {folder.path}, which saved step {saved:,}, found none in "
            f"{places}; mount the disk or move them back (--train.checkpoint-dir says where they are), or {ELSEWHERE} to begin anew"
        )
    if not steps or steps[-1] >= saved:
        return ""
    found = "not whole" if saved in numbered_in(store) else "gone"
    return f"warning: step {saved:,} was saved, and its checkpoint is {found}; the newest is of step {steps[-1]:,}"


def numbered_in(store: Path) -> list[int]:
    """Return the steps that have something in ``store``, whole or not, in ascending order."""
    return sorted(int(path.name) for path in children(store) if path.name.isdecimal())


def origin_of(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint says about the run that made it. It is empty for checkpoints of earlier versions."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((checkpoint / "model" / ORIGIN).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def check_is_ours(folder: RunFolder, record: RunRecord, store: Path, steps: list[int]) -> str:
    """Return a line if the run has moved, or "".

    Raises UserError if the checkpoints belong to another run, or to the run that this folder is a copy of.
    """
    origin = origin_of(store / str(steps[-1]))
    maker, place = origin.get("run"), str(origin.get("folder", ""))
    if not maker:
        return ""
    remedy = f"copy them to another folder and name it with --train.checkpoint-dir, or {ELSEWHERE}"
    if record.id and maker != record.id:
        raise UserError(
            f"train.checkpoint_dir: expected the checkpoints of the run in {folder.path}, found those of the run in {place} "
            f"in {store}; {remedy}"
        )
    if lies_within(store, folder.path) or not place or _same_folder(place, folder.path):
        return ""
    if origin.get("store") != real_name(store):
        return ""  # the checkpoints were copied or moved, so no other run has its checkpoints here
    here = origin.get("host") == socket.gethostname()
    there = RunFolder(place)
    if (here or there.path.exists()) and there.read_record().id != maker:
        return f"the run has moved here from {place}"
    raise UserError(
        f"train.checkpoint_dir: expected checkpoints of this run alone in {store}, found those of the run in "
        f"{place}{'' if here else ' on host ' + str(origin.get('host'))}, of which {folder.path} is a copy; {remedy}"
    )


def _same_folder(place: str, folder: Path) -> bool:
    return os.path.realpath(place) == os.path.realpath(folder)
