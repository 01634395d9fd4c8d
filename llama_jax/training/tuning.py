"""A run that trains adapters: its base, how the base is held, and what checkpoints record of both."""

from dataclasses import dataclass, fields, replace
from typing import Any

import jax

from llama_jax.adapters import check_targets, count_adapter
from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.adapted import WholeModel, check_base, digest_of
from llama_jax.checkpoint.adapter_record import AdapterRecord
from llama_jax.checkpoint.identity import are_parameters
from llama_jax.config import Config, ModelArgs, Weights
from llama_jax.convert.once import open_model
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.errors import UserError
from llama_jax.generation.loading import load_frozen
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.storage.locations import absolute
from llama_jax.training.adapting import Adapting
from llama_jax.training.opening import Opened

# Settings that a run which continues an adapter has in common with it.
SAME = ("rank", "strength", "targets", "rslora")
ELSEWHERE = "give its new place with --train.init-from"


@dataclass(frozen=True)
class Tuning:
    """The base of a run's adapters, and what the compiled steps and the checkpoints know of it."""

    base: Checkpoint
    adapting: Adapting
    record: AdapterRecord

    @classmethod
    def of(cls, config: Config, opened: Opened, found: WholeModel | None) -> "Tuning":
        """Return the base of a new run, ``found``, or else of the run that is resumed.

        Raises UserError if the settings do not fit the base or the adapter to continue, or if a resumed run's base is
        gone or has changed.
        """
        lora = config.lora
        if found is None:
            base, before = _base_of_run(config, opened)
            lora = replace(lora, base_weights=before.base_weights)
        else:
            base = found.base
            check_targets(found.args, lora)
            if found.lora is not None:
                lora = _continued(lora, found.lora, found)
        weights = _weights(lora, base)
        known = replace(lora, base_weights=weights if base.weights == "auto" else "auto")
        record = AdapterRecord(str(absolute(base.folder)), digest_of(base), known)
        return cls(base, Adapting(lora, weights, config.train.seed), record)

    def load_base(self, module: Llama, mesh: jax.sharding.Mesh) -> Any:
        """Load the frozen base onto the mesh."""
        return load_frozen(self.base, module, mesh, self.adapting.weights)

    def rows(self, module: Llama) -> list[tuple[str, str]]:
        """Return what a run prints about its adapters and their base."""
        lora, weights = self.adapting.lora, self.adapting.weights
        form = f"matrices in {weights}" if weights != "auto" else f"in {module.dtype.name}"
        size = self.adapting.bytes_of_state(module)["base"] / 1e6
        context, length = self.base.args.max_seq_len, module.args.max_seq_len
        kept = f"; its context of {context:,} stays, beyond the {length:,} of training" if length < context else ""
        rows = [
            ("adapters", lora.text(count_adapter(module.args, lora))),
            ("base", f"{self.base.folder}, frozen, {form}: {size:,.0f} MB{kept}"),
        ]
        if self.base.folder.name.isdecimal():
            rows.append(
                (
                    "",
                    "which the adapter needs: copy it if its run is to go on, since that deletes old steps (train.keep)",
                )
            )
        return rows


def check_has_base(config: Config) -> None:
    """Raise UserError if there are adapters to train, or preferences, and no checkpoint to begin with."""
    if config.lora.rank and not config.train.init_from:
        raise UserError(
            "lora.rank: expected train.init_from beside it, the checkpoint to fine-tune, found none; give --train.init-from, or "
            "leave lora.rank out"
        )
    if config.train.objective == "dpo" and not config.train.init_from:
        raise UserError(
            "train.objective: expected train.init_from beside dpo, the model to train and to compare it with, found none; give "
            "--train.init-from"
        )


def check_arguments(base: WholeModel, model: ModelArgs, keeps_context: bool = False) -> list[str]:
    """Return a line about each argument of the model that a run changes, beside the one that it begins with.

    ``keeps_context``: training on shorter sequences leaves the context as it is, as adapters do. Raises UserError if
    the parameters would have other shapes.
    """
    before = base.args
    changed = [f.name for f in fields(ModelArgs) if getattr(before, f.name) != getattr(model, f.name)]
    lines = []
    for name in changed:
        old, new = getattr(before, name), getattr(model, name)
        if (name == "vocab_size" and new == -1) or (name == "max_seq_len" and keeps_context and new < old):
            continue
        if not _same_shapes(before, replace(before, **{name: new})):
            raise UserError(
                f"model.{name}: expected {old}, as the model in {base.folder} has it, whose parameters are trained further, found {new}; "
                "leave it out"
            )
        lines.append(f"model.{name} is {new}, and was {old} in {base.folder}")
    return lines


def _same_shapes(one: ModelArgs, other: ModelArgs) -> bool:
    try:
        shapes = [jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(Llama(args))) for args in (one, other)]
    except (ValueError, TypeError, ZeroDivisionError, UserError):  # no model has one argument without the others
        return False
    return bool(shapes[0] == shapes[1])


def _weights(lora: LoraArgs, base: Checkpoint) -> Weights:
    """Return the quantization of the base in training. Raises UserError if it is stored with another one."""
    if base.weights != "auto" and lora.base_weights not in ("auto", base.weights):
        raise UserError(
            f"lora.base_weights: expected auto or {base.weights}, as {base.folder} stores its matrices, found "
            f"{lora.base_weights}; leave it out, or take the checkpoint that it was made from"
        )
    return base.chosen(lora.base_weights)


def _continued(lora: LoraArgs, before: LoraArgs, found: WholeModel) -> LoraArgs:
    """Return the settings of a run that continues an adapter. Raises UserError if the adapter has others."""
    for name in SAME:
        old, new = getattr(before, name), getattr(lora, name)
        if (sorted(old) != sorted(new)) if name == "targets" else old != new:
            key = "alpha" if name == "strength" else name
            raise UserError(
                f"lora.{key}: expected {_shown(old)}, as the adapter in {found.folder} has it, found {_shown(new)}; give "
                f"{before.flags}, or begin a new adapter on its base, --train.init-from {found.base.folder}"
            )
    if lora.base_weights not in ("auto", before.base_weights):
        raise UserError(
            f"lora.base_weights: expected {before.base_weights}, with which the adapter in {found.folder} was trained, found "
            f"{lora.base_weights}; leave it out"
        )
    return replace(lora, base_weights=before.base_weights)


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else f"{value}"


def _base_of_run(config: Config, opened: Opened) -> tuple[Checkpoint, LoraArgs]:
    """Return the base and the settings of the run that is resumed.

    The base is where it was or, if it moved, where train.init_from is.

    Raises UserError if neither is the base.
    """
    own = Checkpoint.find(opened.checkpoint)
    if own.adapter is None:
        raise UserError(
            f"lora.rank: expected 0, as the run in {opened.folder.path} trains the whole model, found {config.lora.rank}; "
            "choose another --train.save-dir"
        )
    if opened.stored is not None and opened.stored.train.init_from != config.train.init_from:
        _check_is_base(config.train.init_from, own, opened)
    problem: UserError | None = None
    for place in dict.fromkeys((own.adapter.base, config.train.init_from)):
        try:
            base = open_model(place).base
            check_base(base, own, ELSEWHERE)
            return base, own.adapter.lora
        except UserError as error:
            problem = problem or error
    raise UserError(
        f"{own.folder}: expected the base of this run's adapters in {own.adapter.base}, found none or another one: {problem}"
        + ("" if str(problem).endswith(ELSEWHERE) else f"; {ELSEWHERE}")
    )


def _check_is_base(asked: str, own: Checkpoint, opened: Opened) -> None:
    """Raise UserError if ``asked``, another train.init_from than before, is another model than the base of ``own``.

    Where none is found, the base is perhaps where it was.
    """
    assert own.adapter is not None
    try:
        found = open_model(asked).base
    except UserError:
        return
    if not are_parameters(found.folder, own.adapter.digest):
        raise UserError(
            f"train.init_from: expected the base of this run's adapters, which was in {own.adapter.base}, found another model in {asked}; "
            f"give that one, wherever it is now, or choose another --train.save-dir than {opened.folder.path}"
        )
