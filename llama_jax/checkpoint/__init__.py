"""The checkpoint format: a folder, written by orbax, that holds all that a model needs to run.

    <step>/params/                  the parameters: model.py's tree in float32, or quantized, or an adapter's
    <step>/model/model.json         the model arguments; "weights" if they are quantized; "adapter" of an adapter
    <step>/model/tokenizer.model    the tokenizer; of another kind tokenizer.json and the files that came with it
    <step>/model/chat_template.jinja  its chat template, if it has one
    <step>/model/generation.json    its end tokens, if they are not the tokenizer's (chat/formats.py)
    <step>/model/origin.json        the run that made it and its training text, if a run made it
    <step>/state/                   the optimizer's state, if training can resume from it
    <step>/metrics/metrics          the held-out loss, if the step was evaluated
    <step>/checksums.json           checksums of all other files, written last to mark the checkpoint as complete

A run folder holds such folders under checkpoints/, or has a file of that name with their location (see
``checkpoints_of``). Orbax writes each under a temporary name and renames it. Object storage cannot rename, so there it
adds the file commit_success.txt instead. Checkpoints of earlier versions are complete without checksums.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import KeyPath, tree_leaves_with_path
from tensorstore import TensorStore

from llama_jax.chat.formats import ChatSetup
from llama_jax.checkpoint.adapter_record import AdapterRecord
from llama_jax.checkpoint.stored_array import open_array, saver_of_stored_arrays
from llama_jax.cli.telling import tell
from llama_jax.compat.orbax_internals import COMMITTED
from llama_jax.config import ModelArgs, Weights, from_dict
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.folders import found_in
from llama_jax.storage import checksums
from llama_jax.storage.locations import absolute, children, is_remote, location, user_errors
from llama_jax.tokenizer import Tokenizer, kept_tokenizer

ORIGIN = "origin.json"
# The key of model.json which says that checksums.json is written last.
PROMISE = "checksums"
DAMAGED = "use another copy of it, or another step"


class ModelFilesHandler(ocp.CheckpointHandler):
    """An orbax handler that writes the small files next to the arrays. They are read without orbax."""

    def save(self, directory: Any, args: "ModelFiles") -> None:
        """Write the files into ``directory`` on process 0."""
        if jax.process_index():
            return
        folder = epath.Path(directory)
        table = dataclasses.asdict(args.model) | ({} if args.weights == "auto" else {"weights": args.weights})
        table |= {} if args.adapter is None else {"adapter": dataclasses.asdict(args.adapter)}
        (folder / "model.json").write_text(json.dumps(table | {PROMISE: True}, indent=1))
        for name, content in {**args.tokenizer.files, **args.chat.files}.items():
            (folder / name).write_bytes(content)
        if args.origin:
            (folder / ORIGIN).write_text(json.dumps(args.origin, indent=1))

    def restore(self, directory: Any, args: Any = None) -> None:
        """Not used; ``Checkpoint`` reads the files."""
        raise NotImplementedError


@ocp.args.register_with_handler(ModelFilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ModelFiles(ocp.args.CheckpointArgs):
    """The arguments of ModelFilesHandler."""

    model: ModelArgs
    tokenizer: Tokenizer
    weights: Weights = "auto"
    origin: dict[str, Any] | None = None
    chat: ChatSetup = ChatSetup()
    adapter: AdapterRecord | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: folder, model arguments and tokenizer. ``restore`` reads the arrays."""

    folder: Path
    args: ModelArgs
    tokenizer: Tokenizer
    weights: Weights = "auto"
    """The quantization of its matrices. auto: none."""
    chat: ChatSetup = ChatSetup()
    """Its chat template and end tokens."""
    adapter: AdapterRecord | None = None
    """The base and settings of its parameters, if they are a low-rank adapter (adapted.py). None: a whole model."""
    remedy: str = DAMAGED
    """An error about damaged files ends with this advice."""

    @classmethod
    def find(cls, path: str | Path) -> "Checkpoint":
        """Open a run folder or folder of steps (the best step, else the last), a step folder or a converted checkpoint.

        Raises UserError if ``path`` is none of these.
        """
        path = location(path)
        found = children(path)
        with user_errors(path, "read"):
            if not found and not path.is_dir():
                raise UserError(f"{path}: expected a checkpoint folder, {found_in(path)}")
            names = {child.name for child in found}
            is_checkpoint = "model" in names and ("params" in names or (path / "model" / "model.json").exists())
            folder = path if is_checkpoint else _best_step(path, found)
            if is_checkpoint and (missing := _missing_mark(folder)):
                raise UserError(
                    f"{folder}: expected a whole checkpoint, found no {missing} in it, which is written last; choose another "
                    "step, or wait until it is saved"
                )
            source = folder / "model" / "model.json"
            try:
                table = json.loads(source.read_text())
                if not isinstance(table, dict):
                    raise ValueError("not an object")
            except (OSError, ValueError) as error:
                if not (folder / "model").is_dir():  # another project's steps
                    raise UserError(f"{folder}: expected a checkpoint of this project, {found_in(folder)}") from None
                raise UserError(f"{source}: expected the model arguments of a checkpoint, found {error}") from None
        table.pop(PROMISE, None)
        weights = table.pop("weights", "auto")
        if weights not in get_args(Weights):
            raise UserError(
                f"{source}: weights: expected one of {', '.join(get_args(Weights))}, found {quoted(weights)}"
            )
        adapter = None if "adapter" not in table else AdapterRecord.read(table.pop("adapter"), str(source))
        args = from_dict(ModelArgs, table, str(source))
        args.check()
        tokenizer = kept_tokenizer(folder / "model" / "tokenizer.model")
        try:
            tokenizer = tokenizer.within(args.vocab_size)
        except UserError:
            raise UserError(
                f"{source}: expected vocab_size {tokenizer.vocab_size} or more, the size of its tokenizer, found {args.vocab_size}"
            ) from None
        with user_errors(folder, "read"):
            chat = ChatSetup.read(folder / "model")
        return cls(folder, args, tokenizer, weights, chat, adapter)

    def chosen(self, weights: Weights) -> Weights:
        """Return the quantization to use if ``weights`` is requested. auto: as stored.

        Raises UserError if the matrices are stored with another quantization.
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
        """Raise UserError if the matrices are quantized.

        ``what`` names the user of the checkpoint that needs plain ones.
        """
        if self.weights != "auto":
            raise UserError(
                f"{what}: expected a checkpoint that is not quantized, found {self.weights} in {self.folder}; "
                "take the one that it was made from"
            )

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify all files' checksums in parallel to the block, which reads them.

        Raises UserError if a file is damaged.
        """
        return checksums.verified(self.folder, self.remedy)

    def arrays(self, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the arrays of ``item`` by name, empty if it is missing. Raises UserError if they cannot be read."""
        folder = self.folder / item
        if not folder.is_dir():
            return {}
        # A checkpointer would log that the item has no metadata of a step, which is in the folder above.
        with user_errors(folder, "read"), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            return _shapes(handler.metadata(epath.Path(absolute(folder))))

    def restore(self, item: str, target: Any) -> Any:
        """Read ``item`` ("params" or "state") into ``target``, a tree of ShapeDtypeStructs with shardings.

        Raises UserError if the files hold other arrays.
        """
        folder = self._holding(item, target)
        with user_errors(folder, "read"), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(absolute(folder), target)

    def restore_one_by_one(self, item: str, target: Any) -> Iterator[tuple[KeyPath, jax.Array]]:
        """Yield the arrays of ``restore`` with their paths one by one, the largest first. Raises UserError likewise."""
        folder = self._holding(item, target)
        with user_errors(folder, "read"), ocp.PyTreeCheckpointer() as checkpointer:
            for path, shape in sorted(tree_leaves_with_path(target), key=lambda leaf: -leaf[1].size):
                alone: Any = shape
                for key in reversed(path):
                    alone = {key_name(key): alone}
                how = ocp.checkpoint_utils.construct_restore_args(alone)
                arguments = ocp.args.PyTreeRestore(item=alone, restore_args=how, partial_restore=True)
                (array,) = jax.tree.leaves(checkpointer.restore(absolute(folder), args=arguments))
                yield path, array

    def _holding(self, item: str, target: Any) -> Path:
        """Return the folder of ``item``. Raises UserError if it holds other arrays than ``target``."""
        folder = self.folder / item
        if not folder.is_dir():
            raise UserError(
                f"{self.folder}: expected {item} of a checkpoint, found none; choose a step folder that has them"
            )
        _check_shapes(folder, self.arrays(item), _shapes(target))
        return folder

    def open_array(self, name: str) -> TensorStore:
        """Open parameter ``name`` ("layers/attention/wq") for reading by region. Raises UserError if it is missing."""
        with user_errors(self.folder / "params", "read"):
            return open_array(self.folder / "params", name)


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "/".join(map(key_name, path)): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in tree_leaves_with_path(tree)
    }


def _check_shapes(
    folder: Path, found: dict[str, jax.ShapeDtypeStruct], expected: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Raise a UserError that names the array if those found in ``folder`` differ from those expected."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise UserError(
                f"{folder}: expected the array {name}, found none; files of this checkpoint are missing or damaged"
            )
        if name not in expected or found[name].shape != expected[name].shape:
            shape = f"of shape {list(expected[name].shape)}" if name in expected else "to be absent"
            raise UserError(
                f"{folder}: expected the array {name} {shape}, found {list(found[name].shape)}; this is a checkpoint of another model"
            )


def key_name(key: Any) -> str:
    """Return a component of a path as text. Orbax restores dicts, tuples and named tuples as dicts and lists."""
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def checkpoints_of(run: Path) -> Path:
    """Return where a run's checkpoints are: in its folder checkpoints/, or where a file of that name says."""
    here = run / "checkpoints"
    return location(here.read_text().strip()) if here.is_file() else here


def steps_of(run: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, ascending. Raises UserError if they cannot be listed."""
    return steps_in(checkpoints_of(run))


def steps_in(store: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, ascending.

    Raises UserError if they cannot be listed.
    """
    return _steps_in(store, children(store))


def _steps_in(folder: Path, found: Sequence[Path]) -> list[int]:
    with user_errors(folder, "read"):
        return sorted(int(path.name) for path in found if path.name.isdecimal() and is_whole(path))


def is_whole(folder: Path) -> bool:
    """Return whether a checkpoint without a temporary name was saved completely."""
    return not _missing_mark(folder)


def _missing_mark(folder: Path) -> str:
    """Return the name of the marker file that is missing, or "" if the checkpoint is complete."""
    if is_remote(folder) and not (folder / COMMITTED).exists():
        return COMMITTED
    if (folder / checksums.NAME).exists():
        return ""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if json.loads((folder / "model" / "model.json").read_text())[PROMISE]:
            return checksums.NAME
    return ""  # an earlier version, without checksums


def _best_step(path: Path, found: Sequence[Path]) -> Path:
    """Return the best step, else the last, of the run folder or folder of steps ``path``, which contains ``found``."""
    is_of_steps = any(child.name.isdecimal() for child in found)
    folder = path if is_of_steps else checkpoints_of(path)
    steps = _steps_in(folder, found if is_of_steps else children(folder))
    if not steps:
        raise UserError(f"{path}: expected a run folder, a step folder or a converted checkpoint, {found_in(path)}")
    best = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (best := int(json.loads((path / "best.json").read_text())["step"])) in steps:
            return folder / str(best)
    losses = losses_of(folder, steps)
    step = min(losses, key=lambda step: losses[step], default=steps[-1])
    if best is not None:
        tell(
            f"warning: {path}: the best step is {best:,} by best.json, and its checkpoint is gone; step {step:,} is read instead"
        )
    return folder / str(step)


def losses_of(store: Path, steps: Sequence[int]) -> dict[int, float]:
    """Return the held-out losses of the steps that were evaluated."""
    losses = {}
    for step in steps:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            losses[step] = float(json.loads((store / str(step) / "metrics" / "metrics").read_text())["eval_loss"])
    return losses


def save_checkpoint(
    folder: Path,
    params: Any,
    model: ModelArgs,
    tokenizer: Tokenizer,
    weights: Weights = "auto",
    chat: ChatSetup = ChatSetup(),
    adapter: AdapterRecord | None = None,
) -> None:
    """Write a checkpoint without optimizer state, as converters do.

    Leaves of ``params`` are arrays or ArrayOnDisk. ``weights`` is their quantization. ``adapter`` describes an adapter.
    Raises UserError if ``folder`` exists.
    """
    if folder.exists():
        raise UserError(f"{folder}: expected a new folder, found one that exists; choose another")
    files = ModelFiles(model, tokenizer, weights, chat=chat, adapter=adapter)
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(params), model=files)
    handlers = ocp.CompositeCheckpointHandler(params=saver_of_stored_arrays(), model=ModelFilesHandler())
    with user_errors(folder, "write"):
        with ocp.Checkpointer(handlers) as checkpointer:
            checkpointer.save(folder.absolute(), args=args)
        checksums.write_checksums(folder)


def save_within(folder: Path, *args: Any, **kwargs: Any) -> None:
    """Write what ``save_checkpoint`` does, with its arguments, into a folder that may hold arrays already."""
    save_checkpoint(folder / "checkpoint", *args, **kwargs)
    for path in (folder / "checkpoint").iterdir():
        path.rename(folder / path.name)
    (folder / "checkpoint").rmdir()
