"""Conversions of adapters that are not merged: from PEFT's layout, and to it."""

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from llama_jax.adapters import count_adapter
from llama_jax.chat.formats import ChatSetup, read_template
from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.adapted import check_base, check_whole
from llama_jax.config import ModelArgs
from llama_jax.convert.output import new_folder
from llama_jax.convert.peft import CONFIG, read_peft, save_adapter, write_peft
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.chat_files import read_chat
from llama_jax.foreign.keys import read_json
from llama_jax.lora_args import LoraArgs
from llama_jax.programs import typed
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizers.files import MODEL, TABLE


class Asked(Protocol):
    """The arguments of the converter that adapters have."""

    @property
    def to(self) -> str: ...
    @property
    def base(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def layout(self) -> str: ...
    @property
    def tokenizer(self) -> str: ...
    @property
    def chat_template(self) -> str: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def dry_run(self) -> bool: ...


def import_adapter(folder: Path, args: Asked, output: Path) -> None:
    """Read an adapter in PEFT's layout and write it as a checkpoint that knows its base. Print a report."""
    _check_alone(args)
    if args.to != "llama-jax":
        raise UserError(
            f"--to: expected llama-jax with an adapter of PEFT as --input, found {args.to}; convert it first, and the result then"
        )
    place = str(read_json(folder / CONFIG).get("base_model_name_or_path"))
    made_for = quoted(place)
    if not args.base:
        is_ours = (Path(place) / "model" / "model.json").is_file()
        advice = (
            f"name it: --base {shlex.quote(place)}"
            if is_ours
            else "convert that model, and name it: --base checkpoints/x"
        )
        raise UserError(
            f"--base: expected the checkpoint of the model that the adapter in {folder} adapts ({made_for}, it says), found "
            f"none; {advice}"
        )
    base = Checkpoint.find(args.base)
    check_whole(base, "--base")
    lora, tree = read_peft(folder, base)
    own, warnings = read_chat(folder, base.tokenizer, base.args.vocab_size)
    # Tuning may have been in another format than the base's, which then is beside the adapter.
    chat = replace(own, end_ids=own.end_ids or base.chat.end_ids) if own.template else base.chat
    chat, whose = _asked(chat, args, base), folder if own.template else base.folder
    of_base = f"{base.folder} (made for {made_for}, says {CONFIG})"
    _announce(f"{folder}: an adapter of PEFT", base.args, lora, of_base, chat, args.chat_template or f"{whose}")
    for warning in [*warnings, *_more_tokens(folder, base)]:
        print(f"{'warning':>10}  {warning}")
    if args.dry_run:
        return
    with new_folder(output) as temporary:
        save_adapter(temporary, base, lora, tree, chat)
    words = "--chat" if chat.template else '"Once upon a time"'
    print(f"{output}: done\nnow try:\n  {typed('sample')} --ckpt {shlex.quote(str(output))} {words}")


def export_adapter(folder: Path, args: Asked, output: Path) -> None:
    """Write an adapter of this project in PEFT's layout. Print a report."""
    _check_alone(args)
    adapter = Checkpoint.find(folder)
    if adapter.adapter is None:
        raise UserError(
            f"--to peft: expected an adapter as --input, found a whole model in {adapter.folder}; write it with --to huggingface"
        )
    if args.base:
        check_base(Checkpoint.find(args.base), adapter, "name its own base, or leave --base out")
    record, chat = adapter.adapter, _asked(adapter.chat, args, adapter)
    whose = args.chat_template or f"{adapter.folder}"
    _announce(f"{adapter.folder}: an adapter of llama-jax", adapter.args, record.lora, record.base, chat, whose)
    if record.lora.base_weights != "auto":
        print(
            f"{'note':>10}  it was trained beside matrices in {record.lora.base_weights}; beside others it computes slightly "
            "other numbers"
        )
    if args.dry_run:
        return
    with new_folder(output) as temporary, adapter.verified():
        write_peft(adapter, temporary, chat.template)
    print(f"{output}: done\nnow try:\n  peft.PeftModel.from_pretrained(model, {str(output)!r})")


def _more_tokens(folder: Path, base: Checkpoint) -> Iterator[str]:
    """Yield what the tokenizer beside an adapter has that the base's, which is used, has not."""
    if not any((folder / name).is_file() for name in (MODEL, TABLE)):
        return
    try:
        own = Tokenizer(folder)
    except UserError as error:
        yield f"the tokenizer in {folder} is not used, and cannot be read: {error}"
        return
    lost = sorted((i, text) for text, i in own.specials.items() if base.tokenizer.specials.get(text) != i)
    ends = [which for which in ("bos_id", "eos_id") if getattr(own, which) != getattr(base.tokenizer, which)]
    if lost or ends:
        shown = [f"{quoted(text, 30)} ({i})" for i, text in lost[:4]] + [
            f"another {which[:3].upper()}" for which in ends
        ]
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        yield (
            f"the tokenizer in {folder} has {', '.join(shown)}{more}, which that of the base has not, and the base's is used: "
            f"if the adapter was trained with them, convert the base anew with --tokenizer {shlex.quote(str(folder))}"
        )


def _asked(chat: ChatSetup, args: Asked, model: Checkpoint) -> ChatSetup:
    """Return what is known about conversations, with the template of --chat-template if one is asked for."""
    if not args.chat_template:
        return chat
    template, notes = read_template(args.chat_template, model.tokenizer)
    for note in notes:
        print(f"{'warning':>10}  {note}")
    return replace(chat, template=template, has_none=False)


def _check_alone(args: Asked) -> None:
    """Raise UserError on arguments that only whole models have."""
    asked = {
        "--weights": args.weights != "auto",
        "--layout": args.layout != "auto",
        "--tokenizer": bool(args.tokenizer),
        "--max-seq-len": bool(args.max_seq_len),
    }
    for name, given in asked.items():
        if given:
            raise UserError(f"{name}: expected none with an adapter that is not merged, found one; leave it out")


def _announce(found: str, args: ModelArgs, lora: LoraArgs, base: str, chat: ChatSetup, whose: str) -> None:
    rows = {
        "input": found,
        "adapter": f"{count_adapter(args, lora):,} parameters: rank {lora.rank}, scale {lora.scale:g}, on {', '.join(lora.targets)}",
        "base": base,
        **({"chat": f"a chat template of {len(chat.template):,} characters, of {whose}"} if chat.template else {}),
    }
    for name, text in rows.items():
        print(f"{name:>10}  {text}")
