"""Finds the base of an adapter: by the path that the adapter's checkpoint has, or where the user says it is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llama_jax.chat.formats import ChatSetup
from llama_jax.checkpoint import Checkpoint, steps_in
from llama_jax.checkpoint.identity import are_parameters, digest_of_parameters
from llama_jax.config import ModelArgs, Weights
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs
from llama_jax.programs import typed
from llama_jax.tokenizer import Tokenizer

MOVED = "name the base with --ckpt, and the adapter with --adapter"


@dataclass(frozen=True)
class WholeModel:
    """A whole model: a checkpoint and, perhaps, an adapter of it."""

    base: Checkpoint
    adapter: Checkpoint | None = None

    @classmethod
    def find(
        cls,
        path: str | Path,
        adapter: str | Path = "",
        remedy: str = MOVED,
        opened: Callable[[str | Path], Checkpoint] = Checkpoint.find,
    ) -> "WholeModel":
        """Open the checkpoint at ``path``, with the base if it is an adapter, or with ``adapter``.

        remedy: what to do if the base of an adapter is not where it was. opened: opens the checkpoint at a path. Raises
        UserError if there is no checkpoint, or if the base is missing or another one.
        """
        found = opened(path)
        if not adapter:
            return cls(found) if found.adapter is None else cls(base_of_adapter(found, remedy), found)
        tuned = Checkpoint.find(adapter)
        if tuned.adapter is None:
            raise UserError(
                f"adapter: expected a low-rank adapter, found a whole model in {tuned.folder}; load it with --ckpt alone"
            )
        if found.adapter is not None:
            raise UserError(
                f"ckpt: expected the base of adapters, found an adapter in {found.folder}; name its base, "
                f"{found.adapter.base}, or leave --adapter out"
            )
        check_base(found, tuned, "choose an adapter of this base, or its own base")
        return cls(found, tuned)

    @property
    def described(self) -> Checkpoint:
        """The checkpoint that has the model arguments and the tokenizer: the adapter's, if there is one."""
        return self.base if self.adapter is None else self.adapter

    @property
    def args(self) -> ModelArgs:
        """The model arguments. The context is the base's, even if the adapter was trained on shorter sequences."""
        longest = max(self.base.args.max_seq_len, self.described.args.max_seq_len)
        return replace(self.described.args, max_seq_len=longest)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.described.tokenizer

    @property
    def chat(self) -> ChatSetup:
        """The chat template and end tokens."""
        return self.described.chat

    @property
    def folder(self) -> Path:
        """The folder of the adapter, if there is one, else of the checkpoint."""
        return self.described.folder

    @property
    def lora(self) -> LoraArgs | None:
        """The settings of the adapter."""
        return None if self.adapter is None or self.adapter.adapter is None else self.adapter.adapter.lora

    def chosen(self, weights: Weights) -> Weights:
        """Return the quantization of matrices to use if ``weights`` is requested. Raises UserError if it cannot be.

        auto: as stored or, of an adapter, as in its training.
        """
        if weights == "auto" and self.lora is not None and self.base.weights == "auto":
            return self.lora.base_weights
        return self.base.chosen(weights)

    def note(self, weights: Weights) -> str:
        """Return a line that says how matrices are quantized if that is not what ``weights`` says, or ""."""
        chosen = self.chosen(weights)
        if self.lora is None or chosen == weights or self.base.weights != "auto":
            return ""
        return f"matrices are quantized to {chosen}, with which the adapter was trained (--weights chooses another one)"


def digest_of(base: Checkpoint) -> str:
    """Return the digest of a base's parameters, from the table of checksums. It takes no time."""
    return digest_of_parameters(base.folder)


def base_of_adapter(tuned: Checkpoint, remedy: str) -> Checkpoint:
    """Return the base of an adapter where it was. Raises UserError if it is gone or has changed."""
    assert tuned.adapter is not None
    place = tuned.adapter.base
    try:
        base = Checkpoint.find(place)
    except UserError as error:
        raise UserError(
            f"{tuned.folder}: expected the base of this adapter in {place or 'a folder'}, found none ({error}); {remedy}"
        ) from None
    check_base(base, tuned, remedy)
    return base


def check_base(base: Checkpoint, tuned: Checkpoint, remedy: str) -> None:
    """Raise UserError if ``base`` has other parameters than the base that ``tuned`` was trained with."""
    assert tuned.adapter is not None
    if base.adapter is not None or not are_parameters(base.folder, tuned.adapter.digest):
        raise UserError(
            f"{tuned.folder}: expected the base of this adapter, whose parameters have the digest {tuned.adapter.digest} "
            f"(it was in {tuned.adapter.base}), found {digest_of(base)} in {base.folder}, another model, one that has changed, or the "
            f"same in other files, as a conversion writes it; {_step_with(tuned.adapter.digest, base.folder) or remedy}"
        )


def _step_with(digest: str, beside: Path) -> str:
    """Return a line that names the step with the parameters of ``digest`` in the run of the step ``beside``, or ""."""
    if not beside.name.isdecimal():
        return ""
    steps = [beside.parent / str(step) for step in steps_in(beside.parent)]
    same = next((step for step in steps if are_parameters(step, digest)), None)
    return "" if same is None else f"that base is an earlier step of the same run: give {same}"


def check_whole(found: Checkpoint, what: str) -> None:
    """Raise UserError if a checkpoint is an adapter. ``what`` names the user of it that needs a whole model."""
    if found.adapter is not None:
        raise UserError(
            f"{what}: expected a whole model, found a low-rank adapter in {found.folder}; merge it first: "
            f"{typed('convert')} --input {found.folder} --output merged"
        )
