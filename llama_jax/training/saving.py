"""Saves a run's checkpoints while training continues, and deletes old ones."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from llama_jax.chat.formats import ChatSetup
from llama_jax.checkpoint import ModelFiles, ModelFilesHandler, is_whole, losses_of
from llama_jax.checkpoint.adapter_record import AdapterRecord
from llama_jax.compat.orbax_internals import COMMITTED, TEMPORARY
from llama_jax.config import ModelArgs, TrainArgs
from llama_jax.storage.checksums import write_checksums
from llama_jax.storage.locations import absolute, children, is_remote, user_errors
from llama_jax.tokenizer import Tokenizer

# Seconds after which orbax gives up a save. The largest models take minutes.
SAVE_SECONDS = 2 * 3600


class CheckpointWriter:
    """Saves checkpoints into a folder of steps. It keeps the newest, the best, those at regular steps and a given one.

    Arguments:
        store: the folder.
        keep: number of newest checkpoints to keep.
        keep_every: keep checkpoints at multiples of this step. 0: none.
        chat: the chat template and end tokens of the model.
        keep_step: a step whose checkpoint is kept. None: none.
        measured_from: a step up to which losses do not compare with those after it.

    Every process of a job has a writer. Process 0 writes the small files and deletes.
    """

    def __init__(
        self,
        store: Path,
        keep: int = 3,
        keep_every: int = 0,
        chat: ChatSetup = ChatSetup(),
        keep_step: int | None = None,
        measured_from: int = 0,
    ):
        self._store, self._keep, self._keep_every, self._chat = store, keep, keep_every, chat
        self._keep_step = keep_step
        self._is_main = jax.process_index() == 0
        with user_errors(store, "write"):
            store.mkdir(parents=True, exist_ok=True)
            if self._is_main:
                self._clear_unfinished()
            self._steps = sorted(int(path.name) for path in children(store) if path.name.isdecimal())
        losses = losses_of(store, self._steps)
        self._losses = {step: loss for step, loss in losses.items() if step > measured_from}
        # Until an evaluation compares, the best of before stays, which best.json names.
        self._before = {} if self._losses else losses
        handlers = ocp.CompositeCheckpointHandler(
            params=ocp.StandardCheckpointHandler(),
            state=ocp.StandardCheckpointHandler(),
            model=ModelFilesHandler(),
            metrics=ocp.JsonCheckpointHandler(filename="metrics"),
        )
        self._checkpointer = ocp.AsyncCheckpointer(handlers, timeout_secs=SAVE_SECONDS)
        self._thread = ThreadPoolExecutor(1, "saving")
        self._under_way: Future[None] | None = None

    def save(
        self,
        step: int,
        params: Any,
        state: Any,
        model: ModelArgs,
        tokenizer: Tokenizer,
        eval_loss: float | None = None,
        origin: dict[str, Any] | None = None,
        adapter: AdapterRecord | None = None,
    ) -> None:
        """Start to save. Returns once the arrays may change again. Raises UserError if an earlier save failed."""
        self.wait()
        items = {
            "params": ocp.args.StandardSave(params),
            "state": ocp.args.StandardSave(state),
            "model": ModelFiles(model, tokenizer, origin=origin, chat=self._chat, adapter=adapter),
        }
        if eval_loss is not None:
            items["metrics"] = ocp.args.JsonSave({"eval_loss": eval_loss})
            self._losses[step] = eval_loss
        folder = self._store / str(step)
        with user_errors(folder, "write"):
            self._checkpointer.save(absolute(folder), args=ocp.args.Composite(**items))
        self._under_way = self._thread.submit(self._finish, step)

    def add_loss(self, step: int, eval_loss: float) -> None:
        """Add the held-out loss to a checkpoint that was saved without one. Process 0 calls this."""
        self._losses[step] = eval_loss
        folder = self._store / str(step)
        with user_errors(folder, "write"):
            (folder / "metrics").mkdir(exist_ok=True)
            (folder / "metrics" / "metrics").write_text(json.dumps({"eval_loss": eval_loss}))
            write_checksums(folder)

    def check(self) -> bool:
        """Return whether everything saved is on disk. Raises UserError if a save failed."""
        if self._under_way is not None and self._under_way.done():
            self.wait()
        return self._under_way is None

    def wait(self) -> None:
        """Wait until everything saved is on disk. Raises UserError if a save failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    @property
    def steps(self) -> list[int]:
        """The steps on disk, in ascending order, as process 0 knows them."""
        return list(self._steps)

    def _finish(self, step: int) -> None:
        """Wait for orbax, add the checksums and delete checkpoints that are no longer needed."""
        with user_errors(self._store / str(step), "write"):
            self._checkpointer.wait_until_finished()
            if self._is_main:
                write_checksums(self._store / str(step))
                self._steps = sorted({*self._steps, step})
                needed = {self._keep_step} | kept(
                    self._steps, self._losses or self._before, self._keep, self._keep_every
                )
                for old in sorted(set(self._steps) - needed):
                    self._steps.remove(old)
                    delete_step(self._store / str(old))

    def _clear_unfinished(self) -> None:
        """Delete what a killed save or a killed deletion left behind."""
        for path in children(self._store):
            if TEMPORARY in path.name or (path.name.isdecimal() and not is_whole(path)):
                epath.Path(path).rmtree()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait, stop the threads and delete what a failed save left behind. Raises UserError if a save failed."""
        if kind is not None and jax.process_count() > 1:
            return  # the other processes may never reach the point where this one would wait for them
        try:
            if kind is None:
                self.wait()
            else:  # the exception that is being raised already says what is wrong
                with contextlib.suppress(Exception):
                    self.wait()
            self._checkpointer.close()
        finally:
            self._thread.shutdown()
            if self._is_main:
                with contextlib.suppress(Exception):  # the next start deletes it, too
                    self._clear_unfinished()


def keep_every_note(train: TrainArgs) -> str:
    """Return a line if fewer checkpoints are saved than train.keep_every would keep, or ""."""
    every, interval = train.keep_every, train.save_interval
    if not every or every % interval == 0:
        return ""
    return (
        f"train.keep_every {every:,} keeps what is saved, which is every {interval:,} steps (train.save_interval) and at each best "
        f"evaluation: those of every {math.lcm(every, interval):,} steps are sure to stay"
    )


def kept(steps: Iterable[int], losses: Mapping[int, float], keep: int, keep_every: int) -> set[int]:
    """Return the steps to keep: the last ``keep``, the one with the lowest loss, and multiples of ``keep_every``."""
    steps = sorted(steps)
    evaluated = [step for step in steps if step in losses]
    best = [min(evaluated, key=lambda step: losses[step])] if evaluated else []
    regular = [step for step in steps if keep_every and step % keep_every == 0]
    return {*steps[-keep:], *best, *regular}


def delete_step(folder: Path) -> None:
    """Delete a checkpoint. Its marker of completeness goes first, so that a kill leaves nothing that looks complete."""
    if is_remote(folder):
        (folder / COMMITTED).unlink(missing_ok=True)
        epath.Path(folder).rmtree()
    else:
        doomed = folder.with_name(f"{folder.name}{TEMPORARY}-deleted")
        folder.rename(doomed)
        epath.Path(doomed).rmtree()
