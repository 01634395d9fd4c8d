"""The run folder: config.toml, tokenizer.model, metrics.jsonl, losses.png, best.json, run.json, checkpoints/."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import checkpoints_of
from llama_jax.config import Config, load_toml, to_toml
from llama_jax.devices.distributed import is_main
from llama_jax.errors import UserError
from llama_jax.fields import hints_of, typed
from llama_jax.storage.files import write_atomically
from llama_jax.training.tensorboard import Events


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The content of run.json. Folders of earlier versions have the defaults."""

    id: str = ""
    """A unique id of the run. A copy of the folder has the same one."""
    store: str = ""
    """The folder of the run's checkpoints."""
    saved: int = 0
    """The newest step that was saved."""
    text: dict[str, Any] | None = None
    """A description of the text that the run is trained on."""
    went_back_to: int = 0
    """The train.resume_step that the run has already gone back to."""
    held_lr: float | None = None
    """The learning rate that train.hold_lr keeps."""
    measured_from: int = 0
    """The last step whose evaluation measured something else than those after it, as a setting was changed there."""
    stable_until: int | None = None
    """The last step of the stable phase of train.schedule wsd."""
    mixture: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The weights of a mixture's sources, from each step on at which they changed."""
    reference: dict[str, str] = dataclasses.field(default_factory=dict)
    """A description of the model that a run on preferences began with (reference.py)."""
    began_with: str = ""
    """The digest of the parameters of the model that the run began with (train.init_from)."""
    spent: float = 0.0
    """The seconds of all starts up to the last one that ended by itself.

    Records end before its last save and sample."""
    config: str = ""
    """The digest of config.toml as the last start wrote it."""
    tasks: dict[str, str] = dataclasses.field(default_factory=dict)
    """The digest of each task that was scored last by its name (train.eval_tasks)."""
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """The time, host, step and changed settings of every start."""

    @classmethod
    def of(cls, table: dict[str, Any], where: str) -> "RunRecord":
        """Return the record that ``table`` is; its other keys do not count.

        Raises UserError, which begins with ``where``, if a value has another type, and AttributeError if it is no
        table.
        """
        known = hints_of(RunRecord)
        values = {key: value for key, value in table.items() if key in known}
        return cls(**{key: typed(value, known[key], f"{where}: {key}") for key, value in values.items()})

    @property
    def kept(self) -> dict[str, Any]:
        """All but the text and the starts, which checkpoints tell for the case that run.json is lost."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("text", "starts")}


class RunFolder:
    """The paths and records of a run. A record is written whole or not at all. Process 0 reads and writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.plot_path = self.path / "losses.png"
        self.tokenizer_path = self.path / "tokenizer.model"
        self.best_path = self.path / "best.json"
        self.config_path = self.path / "config.toml"
        self.record_path = self.path / "run.json"
        self.records: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []  # evaluations that checkpoints tell of, and no record
        self.measured_from = 0  # evaluations up to this step do not compare with those after it
        self.spent, self.spent_in_steps = 0.0, 0.0  # seconds of earlier starts: in all, and on steps that were not lost
        self._events: Events | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return checkpoints_of(self.path)

    def make(self) -> None:
        """Create the folder. Raises UserError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(None, "Permission denied")
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"train.save_dir: expected a folder to write to, found {self.path}: {reason}") from None

    def read_record(self) -> RunRecord:
        """Return the content of run.json. Raises UserError if it is damaged."""
        try:
            return RunRecord.of(json.loads(self.record_path.read_text()), str(self.record_path))
        except FileNotFoundError:
            return RunRecord()
        except (ValueError, AttributeError):
            raise UserError(
                f"{self.record_path}: expected the record of a run, found another or a damaged file; restore it from a copy, "
                "or choose another --train.save-dir"
            ) from None

    def write_record(self, record: RunRecord) -> None:
        """Write run.json."""
        if is_main():
            write_atomically(self.record_path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")

    def stored_config(self) -> Config | None:
        """Return the settings of the previous start, or None if there are none.

        Raises UserError if the file is damaged.
        """
        if not self.config_path.exists():
            return None
        if (config := load_toml(self.config_path)) == Config():
            raise UserError(
                f"{self.config_path}: expected the settings of the run, found none; restore the file from a copy, or delete it to go on by "
                "the settings in the newest checkpoint"
            )
        return config

    def write_config(self, config: Config) -> str:
        """Write config.toml with all values resolved. Return its digest."""
        text = to_toml(config).encode()
        if is_main():
            write_atomically(self.config_path, text)
        return hashlib.sha256(text).hexdigest()

    def edited(self, record: RunRecord) -> bool:
        """Return whether config.toml is another one than the last start wrote. Earlier versions did not note which."""
        return bool(record.config) and hashlib.sha256(self.config_path.read_bytes()).hexdigest() != record.config

    def read_metrics(self, step: int) -> list[str]:
        """Read the records up to ``step``, from which training resumes, and the time that all records took.

        Return a warning for each line that is not a record. If the last line is not one, a kill cut it; it is dropped
        silently.
        """
        self.records, self.spent, warnings = [], 0.0, []
        lines = self.metrics_path.read_text(errors="replace").split("\n") if self.metrics_path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if _is_record(record):
                if record["step"] <= step:
                    self.records.append(record)
                self.spent = record.get("run_seconds", 0.0)
            elif number < len(lines):
                warnings.append(f"{self.metrics_path}: line {number} is not a record and is left out")
        by_step = {record["step"]: record for record in self.records}
        if list(by_step) != sorted(by_step) or len(by_step) < len(self.records):
            warnings.append(
                f"{self.metrics_path}: its records are not in order of their steps, or some stand twice; of these the last counts"
            )
            self.records = [by_step[each] for each in sorted(by_step)]
        self.spent_in_steps = self.records[-1].get("run_step_seconds", 0.0) if self.records else 0.0
        return warnings

    @property
    def recorded(self) -> int:
        """The step of the last record, or 0 if there is none."""
        return self.records[-1]["step"] if self.records else 0

    def lacks_records(self, step: int, interval: int, losses: Mapping[int, float]) -> str:
        """Return a warning if the records end more than ``interval`` steps before ``step``, or "".

        ``losses`` are the held-out losses that checkpoints after ``recorded`` tell, which count for the best.
        """
        last = self.recorded
        self.told = [{"step": each, "eval_loss": loss} for each, loss in losses.items()]
        if last > step - interval:
            return ""
        return (
            f"warning: {self.metrics_path} has no records of steps after {last:,}, up to {step:,}, which losses.png lacks from now on; the best "
            "step is found with the losses that the checkpoints have"
        )

    def write_metrics(self) -> None:
        """Rewrite metrics.jsonl with the current records."""
        if is_main():
            write_atomically(self.metrics_path, "".join(json.dumps(record) + "\n" for record in self.records))

    def write_events(self, start: int) -> None:
        """Write records as TensorBoard events, too, from now on. The first step is ``start`` + 1."""
        self._events = Events(self.path / "tensorboard", start)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl, whole or not at all. Raises UserError if the disk is full."""
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
        self._write_event(record)

    def add_to_last(self, values: dict[str, Any]) -> None:
        """Add to the last record the results of an evaluation that the previous start did not get to."""
        self.records[-1] = self.records[-1] | values
        self.write_metrics()
        self._write_event({"step": self.records[-1]["step"]} | values)

    def _write_event(self, record: dict[str, Any]) -> None:
        if self._events is not None:
            self._events.write(record)

    def close(self) -> None:
        """Close the event file. No more records follow."""
        if self._events is not None:
            self._events.close()

    def best(self, steps: Collection[int] | None = None) -> dict[str, Any] | None:
        """Return the record with the lowest eval_loss of those that compare with the next one, or None.

        steps: those whose records count. None: all.
        """
        found = [r for r in [*self.told, *self.records] if "eval_loss" in r and r["step"] > self.measured_from]
        if steps is not None:
            found = [r for r in found if r["step"] in steps]
        return min(found, key=lambda r: r["eval_loss"], default=None)

    def write_best(self, steps: list[int]) -> None:
        """Write to best.json the best evaluation whose checkpoint is on disk, which is to say in ``steps``.

        Nothing is written as long as no evaluation compares with the next one.
        """
        if is_main() and (best := self.best(steps)) is not None:
            found = {key: best[key] for key in ("step", "eval_loss", "eval_bits_per_byte") if key in best}
            write_atomically(self.best_path, json.dumps(found) + "\n")

    def best_of(self, steps: Sequence[int]) -> int:
        """Return the one of ``steps`` with the best evaluation, or 0 if there is none."""
        best = self.best(steps)
        return 0 if best is None else int(best["step"])


def _is_record(found: Any) -> bool:
    """Return whether a line of metrics.jsonl is a record: an object with a step, and with numbers where they count."""
    if not isinstance(found, dict) or not {"tokens", "train_loss"} <= found.keys():
        return False
    numbers = ("tokens", "eval_loss", "run_seconds", "run_step_seconds")
    return type(found.get("step")) is int and all(type(found.get(name, 0.0)) in (int, float) for name in numbers)
