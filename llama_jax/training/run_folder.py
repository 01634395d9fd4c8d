"""The run folder: config.toml, tokenizer.model, metrics.jsonl, losses.png, best.json, checkpoints/."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoint import Checkpoint, checkpoints_of, steps_of
from llama_jax.config import Config, ModelArgs, TrainArgs, load_toml, to_toml
from llama_jax.distributed import is_main
from llama_jax.errors import UserError
from llama_jax.files import write_atomically
from llama_jax.storage import PROBE, absolute, check_writable, children, is_remote, location
from llama_jax.training.tensorboard import Events

# What a run cannot change between two starts: its model, and which tokens a step reads.
FIXED = {
    "model": tuple(field.name for field in dataclasses.fields(ModelArgs)),
    "data": ("train_size", "separator", "vocab_size", "stories"),  # and the text and tokenizer themselves, see data/
    "train": ("batch_size", "seed"),
}


def starting_model(train: TrainArgs) -> ModelArgs:
    """Model arguments of the checkpoint that a run with ``init_from`` starts from: its own last one, if it has one already.

    Raises UserError where there is none.
    """
    run = Path(train.save_dir).expanduser()
    saved = steps_of(run)
    return (Checkpoint.find(checkpoints_of(run) / str(saved[-1])) if saved else base_of(train)).args


def base_of(train: TrainArgs) -> Checkpoint:
    """The checkpoint that ``init_from`` names. Raises UserError where there is none, or its matrices are quantized."""
    checkpoint = Checkpoint.find(train.init_from)
    checkpoint.check_plain("train.init_from")
    return checkpoint


class RunFolder:
    """Paths and records of a run; every record appears whole or not at all. All processes have them, process 0 writes them."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.metrics_path = self.path / "metrics.jsonl"
        self.plot_path = self.path / "losses.png"
        self.tokenizer_path = self.path / "tokenizer.model"
        self.best_path = self.path / "best.json"
        self.config_path = self.path / "config.toml"
        self.records: list[dict[str, Any]] = []
        self.spent, self.spent_well = 0.0, 0.0  # seconds of earlier starts; in steps of which a checkpoint tells
        self._events: Events | None = None

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return checkpoints_of(self.path)

    def create(self, checkpoint_dir: str = "") -> None:
        """Make the folder, and have its checkpoints lie in ``checkpoint_dir``. Raises UserError where that is not possible."""
        if not is_main():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"train.save_dir: expected a folder to write to, found {self.path}: {reason}") from None
        here = self.path / "checkpoints"
        new = not here.exists()
        folder = location(checkpoint_dir) if checkpoint_dir and new else self.checkpoints
        if checkpoint_dir and str(absolute(folder)) != str(absolute(location(checkpoint_dir))):
            raise UserError(
                f"train.checkpoint_dir: expected {folder}, where this run's checkpoints are, found {checkpoint_dir}; "
                "leave it out, or choose another --train.save-dir"
            )
        if checkpoint_dir and new and any(path.name != PROBE for path in children(folder)):
            raise UserError(
                f"train.checkpoint_dir: expected a new or an empty folder for a new run, found {checkpoint_dir} in use; "
                "choose another"
            )
        if is_remote(folder):
            check_writable(folder, "train.checkpoint_dir")
        if checkpoint_dir and new:
            write_atomically(here, str(absolute(folder)) + "\n")

    def check_shared(self, start: int) -> None:
        """Raise UserError where this process does not see the folder, or process 0's last checkpoint, that of step ``start``."""
        needed = self.checkpoints / str(start) if start else self.path
        if not needed.is_dir():
            raise UserError(
                f"train.save_dir: expected a folder on a disk that all processes share, found that process "
                f"{jax.process_index()} does not see {needed}; choose another --train.save-dir"
            )

    def check_config(self, config: Config) -> None:
        """Raise UserError where the run in this folder was started as another one."""
        if not self.config_path.exists():
            return
        stored = load_toml(self.config_path)
        for section, names in FIXED.items():
            before, now = getattr(stored, section), getattr(config, section)
            for name in names:
                old, new = getattr(before, name), getattr(now, name)
                unresolved = (section, name) == ("model", "vocab_size") and -1 in (old, new)
                if old != new and not unresolved:
                    raise UserError(
                        f"{section}.{name}: expected {old!r}, as the run in {self.path} began with, found {new!r}; "
                        f"choose another --train.save-dir, or delete {self.path}"
                    )

    def write_config(self, config: Config) -> None:
        """Write config.toml, all values resolved."""
        if is_main():
            write_atomically(self.config_path, to_toml(config))

    def resume_metrics(self, step: int) -> None:
        """Keep the records up to ``step``, the checkpoint that training goes on from, and the time that all of them took."""
        self.records, self.spent = [], 0.0
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    if record["step"] <= step:
                        self.records.append(record)
                    self.spent = record.get("run_seconds", 0.0)
                except (ValueError, TypeError, KeyError):
                    break  # the last line of a run that was killed while writing it
        self.spent_well = self.records[-1].get("run_step_seconds", 0.0) if self.records else 0.0
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        if is_main():
            write_atomically(self.metrics_path, text)

    def write_events(self, start: int) -> None:
        """From now on records, of steps after ``start``, are TensorBoard events as well."""
        self._events = Events(self.path / "tensorboard", start)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, whole or not at all. Raises UserError where the disk does not take it."""
        self.records.append(record)
        if not is_main():
            return
        line = json.dumps(record, allow_nan=False) + "\n"
        size = self.metrics_path.stat().st_size
        try:
            with open(self.metrics_path, "a") as file:
                file.write(line)
        except OSError as error:
            os.truncate(self.metrics_path, size)
            raise UserError(
                f"{self.metrics_path}: expected room for a record, found: {error.strerror}; free some disk"
            ) from None
        if self._events is not None:
            self._events.write(record)

    def close(self) -> None:
        """No more records come."""
        if self._events is not None:
            self._events.close()

    def best(self) -> dict[str, Any] | None:
        """The record with the lowest eval_loss so far."""
        evaluated = [r for r in self.records if "eval_loss" in r]
        return min(evaluated, key=lambda r: r["eval_loss"]) if evaluated else None

    def write_best(self, steps: list[int]) -> None:
        """Point best.json at the best evaluation whose checkpoint (one of ``steps``) is on disk."""
        saved = [r for r in self.records if "eval_loss" in r and r["step"] in steps]
        if saved and is_main():
            best = min(saved, key=lambda r: r["eval_loss"])
            write_atomically(
                self.best_path, json.dumps({k: best[k] for k in ("step", "eval_loss", "eval_bits_per_byte")}) + "\n"
            )
