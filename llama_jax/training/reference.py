"""The reference of preferences: the log-likelihoods that the model which training began with gives to every answer.

They are computed once, before the first step, and kept in the run folder, in reference/. So a step runs one model
alone, whether adapters or the whole model is trained. A start that is killed meanwhile loses a minute of this work.

A file has the log-likelihoods of a split's sequences, float32 [sequences, positions]. NaN: not computed yet.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from llama_jax.checkpoint.adapted import WholeModel, digest_of
from llama_jax.checkpoint.identity import are_parameters
from llama_jax.cli.progress import Progress, bytes_text
from llama_jax.config import Config
from llama_jax.data import AnyData
from llama_jax.data.batch_sizes import BatchSizes
from llama_jax.data.batches import OwnRows, batches_of, eval_windows, train_windows
from llama_jax.data.conversations import Pairs
from llama_jax.data.manifest import sha256
from llama_jax.devices.distributed import from_main, is_main, main_first, text_from_main
from llama_jax.devices.sharding import batch_sharding, on_mesh
from llama_jax.errors import UserError
from llama_jax.storage.files import remove_leftovers, replacing
from llama_jax.training.run import Run
from llama_jax.training.start import Settled
from llama_jax.training.step import compile_reference_step

FOLDER = "reference"
# What is computed is written after so many seconds.
SAVE_SECONDS = 60


@dataclass(frozen=True)
class Part:
    """The preferences of one split of a source: which of their sequences a run reads, and the file of their values."""

    path: Path
    pairs: Pairs
    needed: np.ndarray

    def load(self, length: int) -> str:
        """Read the file, if there is one. Return a line about one that cannot be used."""
        shape, note = (self.pairs.sequences(length), self.pairs.positions(length)), ""
        values = np.full(shape, np.nan, np.float32)
        if self.path.exists():
            try:
                found = np.load(self.path)
                if found.shape != shape or found.dtype != np.float32:
                    raise ValueError(f"found {found.dtype} {list(found.shape)}")
                values = found
            except (ValueError, OSError, EOFError) as error:
                note = f"{self.path}: expected the reference's log-likelihoods, float32 {list(shape)}: {error}; they are computed again"
        self.pairs.reference = values
        return note

    def save(self) -> None:
        """Write the values, whole or not at all. Process 0 does."""
        if is_main():
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                np.save(file, cast(np.ndarray, self.pairs.reference))

    @property
    def missing(self) -> np.ndarray:
        """The sequences that a run reads whose values are not known yet."""
        return self.needed[np.isnan(cast(np.ndarray, self.pairs.reference)[self.needed, 0])]


def parts_of(config: Config, settled: Settled, data: AnyData, folder: Path) -> list[Part]:
    """Return the preferences that a run reads: those of all its steps, and those held out that evaluations read."""
    train, length = config.train, config.model.max_seq_len
    sizes = BatchSizes.of(train)
    read = train_windows(data.rows(settled.schedule), sizes, length, train.seed, settled.steps)
    parts = []
    for name, text in data.sources.items():
        for split, stream in (("train", text.tokens.train), ("eval", text.tokens.eval)):
            assert isinstance(stream, Pairs)
            needed = read[name] if split == "train" else eval_windows(stream, length, train.eval_iters)
            needed = needed[needed < stream.sequences(length)]  # the last group of an evaluation is padded
            known = f"{sorted(text.tokens.manifest.sha256.items())} {length}"
            parts.append(Part(folder / FOLDER / f"{sha256(known.encode())[:12]}-{split}.npy", stream, needed))
    return parts


def identity_of(run: Run, found: WholeModel) -> dict[str, str]:
    """Return what decides the values besides the answers: the parameters, and the types that they are held in."""
    return {
        "model": str(found.folder.absolute()),
        "base": digest_of(found.base),
        "adapter": "" if found.adapter is None else digest_of(found.adapter),
        "weights": _weights(run),
        "dtype": run.module.dtype.name,
    }


def prepare(run: Run, parts: list[Part], found: WholeModel | None) -> bool:
    """Read the values that are known. Return whether some are missing. Process 0 reads first.

    found: the model that a new run begins with. Values of another one, which an earlier start has left, are deleted.
    """
    folder = run.folder.path / FOLDER
    if is_main():
        if found is not None:
            wanted = identity_of(run, found)
            if run.opened.record.reference != wanted:
                shutil.rmtree(folder, ignore_errors=True)
                run.opened.record = replace(run.opened.record, reference=wanted)
                run.folder.write_record(run.opened.record)
        if folder.is_dir():
            remove_leftovers(folder)
    length = run.config.model.max_seq_len

    def load() -> list[str]:
        return [note for part in parts if (note := part.load(length))]

    for note in main_first(load, load):
        print(note)
    missing = sum(len(part.missing) for part in parts)
    if from_main(missing) != missing:
        raise UserError(
            f"{folder}: expected the same files on all machines of the job, found others; put train.save_dir on a shared disk"
        )
    return missing > 0


def check_reference(run: Run, found: WholeModel) -> None:
    """Raise UserError if ``found`` is not the model that the run began with."""
    table = json.loads(text_from_main(json.dumps(run.opened.record.reference)))
    base, adapter = (str(table.get(name, "")) for name in ("base", "adapter"))
    same = table.get("weights") == _weights(run) and are_parameters(found.base.folder, base)
    if not same or not (not adapter if found.adapter is None else are_parameters(found.adapter.folder, adapter)):
        raise UserError(
            f"train.init_from: expected the model that this run began with{_named(table)}, to be the reference of more preferences, "
            f"found another one, or a changed one, in {found.folder}; name the former, or choose another --train.save-dir"
        )


def _weights(run: Run) -> str:
    return "auto" if run.tuning is None else run.tuning.adapting.weights


def _named(table: dict[str, Any]) -> str:
    return f" ({table['model']})" if "model" in table else ""


def compute(run: Run, parts: list[Part], params: Any) -> None:
    """Compute the values that are missing, with the reference's ``params``, and write them.

    Raises UserError if one of them is not finite.
    """
    train, objective, length = run.config.train, run.settled.objective, run.config.model.max_seq_len
    adapting = None if run.tuning is None else run.tuning.adapting
    rows, positions = train.batch_size // train.gradient_accumulation_steps, objective.length(run.config.model)
    own = OwnRows(batch_sharding(run.mesh), rows, positions)
    program = compile_reference_step(run.module, run.mesh, train, run.config.model, adapting, objective)
    total = sum(len(part.missing) for part in parts)
    saved = time.monotonic()
    with Progress("reference", total, "sequences", shown=is_main()) as progress, on_mesh(run.mesh):
        for part in parts:
            left, values = part.missing, cast(np.ndarray, part.pairs.reference)
            batches = batches_of(part.pairs, left, rows, length, own.rows)
            for first, batch in zip(range(0, len(left), rows), batches, strict=True):
                now = left[first : first + rows]
                values[now] = np.asarray(program(params, own.assemble(cast(Any, batch)), *run.frozen))[: len(now)]
                if not np.isfinite(values[now]).all():
                    raise UserError(
                        f"train.init_from: expected a model with finite log-likelihoods, found others in {run.config.train.init_from}; "
                        "take another checkpoint, or compute in float32 (--train.compute-dtype float32)"
                    )
                progress.update(len(now))
                if time.monotonic() - saved > SAVE_SECONDS:
                    part.save()
                    saved = time.monotonic()
            if len(left):
                part.save()
    if is_main():
        size = sum(part.path.stat().st_size for part in parts if part.path.exists())
        print(f"{'reference':>10}  computed, {bytes_text(size)} in {run.folder.path / FOLDER}")
