"""The one checkpoint form: a folder that holds all that a model needs to run, written by orbax.

    <step>/params/                  the parameters (model.py's tree, float32 from training; or quantized, as generation holds them)
    <step>/model/model.json         the model arguments; "weights", where they are quantized
    <step>/model/tokenizer.model    the tokenizer
    <step>/state/                   the optimizer's state; only in checkpoints that training can resume from
    <step>/metrics/metrics          the held-out loss; of an evaluated step

A run folder holds such folders under checkpoints/, or a file of that name that says where they lie (see ``checkpoints_of``).
Orbax writes each under a temporary name and renames it when it is whole; in object storage, where nothing is renamed, it adds
the file commit_success.txt instead.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import KeyPath, tree_leaves_with_path
from orbax.checkpoint import checkpoint_managers
from tensorstore import TensorStore

from llama_jax.config import ModelArgs, Weights, from_dict
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.folders import found_in
from llama_jax.storage import absolute, children, is_remote, location, told
from llama_jax.stored_array import open_array, saver_of_stored_arrays
from llama_jax.tokenizer import Tokenizer

# When a save fails, orbax raises the first error, which is told (see storage.py), and logs it as well, traceback and all; and it
# leaves its other futures unread, which asyncio would log as the process ends.
for name in ("asyncio", "absl"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

TEMPORARY = ".orbax-checkpoint-tmp"
COMMITTED = "commit_success.txt"


class ModelFilesHandler(ocp.CheckpointHandler):
    """Orbax handler that writes the small files beside the arrays; they are read without orbax."""

    def save(self, directory: Any, args: "ModelFiles") -> None:
        """Write the files into ``directory``, from process 0."""
        if jax.process_index():
            return
        folder = epath.Path(directory)
        table = dataclasses.asdict(args.model) | ({} if args.weights == "auto" else {"weights": args.weights})
        (folder / "model.json").write_text(json.dumps(table, indent=1))
        (folder / "tokenizer.model").write_bytes(args.tokenizer.model_bytes)

    def restore(self, directory: Any, args: Any = None) -> None:
        """Not used: see ``Checkpoint``."""
        raise NotImplementedError


@ocp.args.register_with_handler(ModelFilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ModelFiles(ocp.args.CheckpointArgs):
    """What ModelFilesHandler writes."""

    model: ModelArgs
    tokenizer: Tokenizer
    weights: Weights = "auto"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, its model arguments and its tokenizer. Arrays are read by ``restore``."""

    folder: Path
    args: ModelArgs
    tokenizer: Tokenizer
    weights: Weights = "auto"
    """How its matrices are quantized; auto: they are not."""

    @classmethod
    def find(cls, path: str | Path) -> "Checkpoint":
        """Open a run folder or a folder of steps (its best, or else its last), a step folder or a converted checkpoint.

        Raises UserError where ``path`` is none of these.
        """
        path = location(path)
        found = children(path)
        with told(path, "read"):
            if not found and not path.is_dir():
                raise UserError(f"{path}: expected a checkpoint folder, {found_in(path)}")
            names = {child.name for child in found}
            is_checkpoint = "model" in names and ("params" in names or (path / "model" / "model.json").exists())
            folder = path if is_checkpoint else _best_step(path, found)
            if is_checkpoint and not is_whole(folder):
                raise UserError(
                    f"{folder}: expected a whole checkpoint, found no {COMMITTED} in it, which is added last; choose another "
                    "step, or wait until it is saved"
                )
            source = folder / "model" / "model.json"
            try:
                table = json.loads(source.read_text())
                if not isinstance(table, dict):
                    raise ValueError("not an object")
            except (OSError, ValueError) as error:
                if not (folder / "model").is_dir():  # steps of another project
                    raise UserError(f"{folder}: expected a checkpoint of this project, {found_in(folder)}") from None
                raise UserError(f"{source}: expected the model arguments of a checkpoint, found {error}") from None
        weights = table.pop("weights", "auto")
        if weights not in get_args(Weights):
            raise UserError(
                f"{source}: weights: expected one of {', '.join(get_args(Weights))}, found {quoted(weights)}"
            )
        args = from_dict(ModelArgs, table, str(source))
        args.check()
        tokenizer = Tokenizer(folder / "model" / "tokenizer.model")
        if tokenizer.vocab_size != args.vocab_size:
            raise UserError(
                f"{source}: expected vocab_size {tokenizer.vocab_size} as its tokenizer has, found {args.vocab_size}"
            )
        return cls(folder, args, tokenizer, weights)

    def chosen(self, weights: Weights) -> Weights:
        """How matrices are to be quantized where ``weights`` is asked for; auto: as they are stored.

        Raises UserError where they are stored in another way.
        """
        if self.weights == "auto" or weights == self.weights:
            return weights
        if weights == "auto":
            return self.weights
        raise UserError(
            f"weights: expected auto or {self.weights}, as {self.folder} stores them, found {weights}; leave it out, or take "
            "the checkpoint that it was made from"
        )

    def check_plain(self, what: str) -> None:
        """Raise UserError where the matrices are quantized, which ``what`` cannot use."""
        if self.weights != "auto":
            raise UserError(
                f"{what}: expected a checkpoint that is not quantized, found {self.weights} in {self.folder}; "
                "take the one that it was made from"
            )

    def arrays(self, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of ``item`` by name, none where it is not there. Raises UserError where they cannot be read."""
        folder = self.folder / item
        if not folder.is_dir():
            return {}
        with told(folder, "read"), ocp.StandardCheckpointer() as checkpointer:
            return _shapes(checkpointer.metadata(absolute(folder)).item_metadata)

    def restore(self, item: str, target: Any) -> Any:
        """Read ``item`` ("params" or "state") into ``target``, a tree of ShapeDtypeStructs with shardings.

        Raises UserError where the files do not hold just these arrays.
        """
        folder = self._holding(item, target)
        with told(folder, "read"), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(absolute(folder), target)

    def restore_one_by_one(self, item: str, target: Any) -> Iterator[tuple[KeyPath, jax.Array]]:
        """What ``restore`` reads, array by array with their paths, the largest first. Raises UserError likewise."""
        folder = self._holding(item, target)
        with told(folder, "read"), ocp.PyTreeCheckpointer() as checkpointer:
            for path, shape in sorted(tree_leaves_with_path(target), key=lambda leaf: -leaf[1].size):
                alone: Any = shape
                for key in reversed(path):
                    alone = {key_name(key): alone}
                how = ocp.checkpoint_utils.construct_restore_args(alone)
                arguments = ocp.args.PyTreeRestore(item=alone, restore_args=how, partial_restore=True)
                (array,) = jax.tree.leaves(checkpointer.restore(absolute(folder), args=arguments))
                yield path, array

    def _holding(self, item: str, target: Any) -> Path:
        """The folder of ``item``. Raises UserError where it does not hold just the arrays of ``target``."""
        folder = self.folder / item
        if not folder.is_dir():
            raise UserError(
                f"{self.folder}: expected {item} of a checkpoint, found none; choose a step folder that has them"
            )
        _check_shapes(folder, self.arrays(item), _shapes(target))
        return folder

    def open_array(self, name: str) -> TensorStore:
        """Parameter ``name`` ("layers/attention/wq"), to be read region by region. Raises UserError where it is not there."""
        with told(self.folder / "params", "read"):
            return open_array(self.folder / "params", name)


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "/".join(map(key_name, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in tree_leaves_with_path(tree)
    }


def _check_shapes(
    folder: Path, found: dict[str, jax.ShapeDtypeStruct], expected: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Raise UserError, which names the array, where those found in ``folder`` are not those expected."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise UserError(
                f"{folder}: expected the array {name}, found none; files of this checkpoint are missing or damaged"
            )
        if name not in expected or found[name].shape != expected[name].shape:
            shape = f"of shape {list(expected[name].shape)}" if name in expected else "to be none of it"
            raise UserError(
                f"{folder}: expected the array {name} {shape}, found {list(found[name].shape)}; this is a checkpoint of another model"
            )


def key_name(key: Any) -> str:
    """A part of a path: of a dict, a tuple or a named tuple; orbax restores all as dicts and lists."""
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def checkpoints_of(run: Path) -> Path:
    """Where a run's checkpoints lie: in its folder checkpoints/, or where a file of that name says."""
    here = run / "checkpoints"
    return location(here.read_text().strip()) if here.is_file() else here


def steps_of(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, ascending. Raises UserError where they cannot be found out."""
    folder = checkpoints_of(run)
    return _steps_in(folder, children(folder))


def _steps_in(folder: Path, found: Sequence[Path]) -> list[int]:
    with told(folder, "read"):
        return sorted(int(path.name) for path in found if path.name.isdecimal() and is_whole(path))


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint, which is not under a temporary name, was saved to its end."""
    return not is_remote(folder) or (folder / COMMITTED).exists()


def _best_step(path: Path, found: Sequence[Path]) -> Path:
    """The best step, or else the last, of a run folder or of a folder of steps, ``path``, in which ``found`` lies."""
    is_of_steps = any(child.name.isdecimal() for child in found)
    folder = path if is_of_steps else checkpoints_of(path)
    steps = _steps_in(folder, found if is_of_steps else children(folder))
    if not steps:
        raise UserError(f"{path}: expected a run folder, a step folder or a converted checkpoint, {found_in(path)}")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (best := json.loads((path / "best.json").read_text())["step"]) in steps:
            return folder / str(best)
    losses = {}
    for step in steps:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            losses[step] = float(json.loads((folder / str(step) / "metrics" / "metrics").read_text())["eval_loss"])
    return folder / str(min(losses, key=lambda step: losses[step], default=steps[-1]))


class CheckpointWriter:
    """Saves a run's checkpoints while training goes on; keeps the latest and the one with the best evaluation."""

    def __init__(self, run: Path):
        def loss(metrics: Any) -> float:
            return metrics["eval_loss"]

        best = checkpoint_managers.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        # Without best_fn losses would not be stored, and a run that goes on would not know which of its steps was the best.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(1), best]),
            best_fn=loss,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._folder = checkpoints_of(run)
        with told(self._folder, "write"):
            self._manager = ocp.CheckpointManager(absolute(self._folder), options=options)

    def save(
        self, step: int, params: Any, state: Any, model: ModelArgs, tokenizer: Tokenizer, eval_loss: float | None
    ) -> None:
        """Begin to save; returns when the arrays may change again. Raises UserError where an earlier save failed."""
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(state),
            model=ModelFiles(model, tokenizer),
        )
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        with told(self._folder / str(step), "write"):
            self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Wait until what was saved is on disk. Raises UserError where that failed."""
        with told(self._folder, "write"):
            self._manager.wait_until_finished()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait, end the threads, and clear away what a failed save left. Raises UserError where a save failed."""
        if kind is not None and jax.process_count() > 1:
            return  # the others may never come to where they would be waited for
        try:
            if kind is None:
                self.wait()
            else:  # the exception under way says what is wrong
                with contextlib.suppress(Exception):
                    self._manager.wait_until_finished()
            self._manager.close()
        finally:
            if jax.process_index() == 0:
                with contextlib.suppress(Exception):  # the next start clears it away, too
                    for path in children(self._folder):
                        if TEMPORARY in path.name or (path.name.isdecimal() and not is_whole(path)):
                            epath.Path(path).rmtree()


def save_checkpoint(
    folder: Path, params: Any, model: ModelArgs, tokenizer: Tokenizer, weights: Weights = "auto"
) -> None:
    """Write a checkpoint without optimizer state, as converters do; arrays may be StoredArrays.

    weights: how the matrices of ``params`` are quantized. Raises UserError where ``folder`` exists.
    """
    if folder.exists():
        raise UserError(f"{folder}: expected a new folder, found one that exists; choose another")
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(params), model=ModelFiles(model, tokenizer, weights))
    handlers = ocp.CompositeCheckpointHandler(params=saver_of_stored_arrays(), model=ModelFilesHandler())
    with told(folder, "write"), ocp.Checkpointer(handlers) as checkpointer:
        checkpointer.save(folder.absolute(), args=args)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the sharding that each array is to be restored into."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
