"""A run while it trains: what stays the same over its steps, and what is due by time."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from llama_jax.chat.formats import ChatSetup
from llama_jax.cli.stopping import StopSignals
from llama_jax.config import Config, TrainArgs
from llama_jax.data import AnyData
from llama_jax.data.batches import Batch, PackedBatch, PairBatch
from llama_jax.data.document_mask import masked
from llama_jax.devices.distributed import Consensus, is_main
from llama_jax.training.answers import Question
from llama_jax.training.clock import Clock
from llama_jax.training.opening import Opened
from llama_jax.training.run_folder import RunFolder
from llama_jax.training.saving import CheckpointWriter
from llama_jax.training.start import Settled
from llama_jax.training.tasks import EncodedTask
from llama_jax.training.tuning import Tuning


@dataclass
class Run:
    """Everything that stays the same over a run's steps."""

    config: Config
    folder: RunFolder
    opened: Opened
    settled: Settled
    data: AnyData
    mesh: jax.sharding.Mesh
    module: Any
    writer: CheckpointWriter
    prompt: str
    clock: Clock
    signals: StopSignals
    consensus: Consensus
    timer: "Timer"
    evaluate: Callable[..., Any] | None = None  # the compiled eval_step; None if nothing is held out
    tuning: Tuning | None = None  # the adapters that are trained; None: the whole model is
    frozen: tuple[Any, ...] = ()  # the base of adapters, a further argument of the compiled steps
    tasks: Sequence[EncodedTask] = ()  # train.eval_tasks
    chat: ChatSetup = ChatSetup()  # what checkpoints keep about conversations
    questions: Sequence[Question] = ()  # of conversations that are held out

    @property
    def steps(self) -> int:
        """The total number of steps of the run."""
        return self.settled.steps

    @property
    def positions(self) -> int:
        """The number of positions of a batch's rows."""
        return self.settled.objective.length(self.config.model)

    @property
    def bos_id(self) -> int:
        """The token that begins a document."""
        return self.data.tokenizer.bos_id

    def whole(self, params: Any) -> Any:
        """Return the parameters of the model that is trained, from those that a step changes."""
        if self.tuning is None:
            return params
        (base,) = self.frozen
        return self.tuning.adapting.whole(self.config.model, base, params)

    def masked(self, batches: Iterator[Batch | PackedBatch | PairBatch]) -> Iterator[Any]:
        """Return the batches, with their documents if data.document_mask asks for them."""
        return masked(batches, self.bos_id) if self.config.data.document_mask else batches

    def best_saved(self) -> int:
        """Return the step of the best checkpoint, or 0 if there is none."""
        return self.folder.best_of(self.writer.steps)

    def stop_asked(self) -> int:
        """Return the signal that all processes stop for, or 0. All processes must call this equally often."""
        return self.consensus(self.signals.received, 0, 0)[0]


@dataclass
class Timer:
    """Says on process 0 when a checkpoint or an evaluation is due by time."""

    args: TrainArgs
    saved: float = field(default_factory=time.monotonic)
    evaluated: float = field(default_factory=time.monotonic)

    def save_is_due(self) -> bool:
        """Return whether the last checkpoint is train.save_minutes old."""
        return self._over(self.args.save_minutes, self.saved)

    def evaluation_is_due(self) -> bool:
        """Return whether the last evaluation is train.eval_minutes old."""
        return self._over(self.args.eval_minutes, self.evaluated)

    def _over(self, minutes: float, since: float) -> bool:
        return bool(minutes) and is_main() and time.monotonic() - since >= 60 * minutes
