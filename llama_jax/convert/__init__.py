"""Conversion between Meta's, Hugging Face's and our checkpoints: exact, in little memory, running no code of files."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llama_jax.chat.formats import read_template
from llama_jax.checkpoint import Checkpoint
from llama_jax.cli.progress import Progress
from llama_jax.config import ModelArgs, Weights
from llama_jax.convert import summary
from llama_jax.convert.adapter import export_adapter, import_adapter
from llama_jax.convert.checkpoint_source import OwnSource, write_own
from llama_jax.convert.huggingface import HuggingFaceSource, check_config, write_huggingface
from llama_jax.convert.llama2c import Llama2cSource, check_llama2c, write_llama2c
from llama_jax.convert.merged import MergedSource, base_at
from llama_jax.convert.meta import MetaSource, verify_checklist, write_meta
from llama_jax.convert.mistral import MistralSource
from llama_jax.convert.output import check_new, new_folder
from llama_jax.convert.reader import Reader
from llama_jax.convert.source import Source
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.errors import UserError
from llama_jax.foreign.folders import found_in, hub_hint
from llama_jax.foreign.layouts import Found, Layout, find_layout, is_adapter
from llama_jax.foreign.params_json import check_writable, usual_context
from llama_jax.storage.locations import is_remote, location, on_disk

Format = Literal["llama-jax", "huggingface", "meta", "peft", "llama2c"]
CHECKS: dict[str, Callable[[ModelArgs], None]] = {"huggingface": check_config, "meta": check_writable}
# Formats that do not keep what is known about conversations.
NO_CHAT = {"meta": "Meta's layout", "llama2c": "llama2.c's file"}
SOURCES: dict[str, Callable[..., Source]] = {
    "huggingface": HuggingFaceSource,
    "meta": MetaSource,
    "mistral": MistralSource,
    "llama2c": Llama2cSource,
}


@dataclass(frozen=True)
class ConvertArgs:
    """Convert a LLaMA model between Meta's layout, Hugging Face's layout and the checkpoints of this project."""

    input: str = ""
    """Folder to read. It holds config.json and *.safetensors or pytorch_model*.bin (Hugging Face), params.json and
    consolidated.*.pth (Meta) or consolidated*.safetensors (Mistral), or a checkpoint of training or of this command.
    Of llama2.c, a model file (stories15M.bin).
    A low-rank adapter is merged into its base, unless it is written as peft. An adapter of PEFT needs --base."""
    output: str = ""
    """Folder to write. It must not exist."""
    to: Format = "llama-jax"
    """Format to write. peft: an adapter, not merged, as PEFT reads it."""
    base: str = ""
    """Checkpoint of the model that the adapter in --input adapts.
    Empty: the one that it was trained on, if it is there."""
    weights: Weights = "auto"
    """Quantization of the matrices in a llama-jax checkpoint.
    auto: none.
    int8: one scale per output channel.
    int4: one scale per group of 32 inputs.
    int4-64: one scale per group of 64 inputs."""
    layout: Layout = "auto"
    """Model to read if the folder holds several.
    auto: the one that transformers would load, else Meta's, else Mistral's."""
    tokenizer: str = ""
    """Path of the tokenizer: tokenizer.model, tokenizer.json, or a folder with them.
    Empty: the one next to the weights, else tokenizer.model in the folder above."""
    chat_template: str = ""
    """Chat template to keep, instead of the input's own: a file, or llama2, llama3, chatml, zephyr, vicuna,
    plain or instruction."""
    max_seq_len: int = 0
    """Context length, in tokens. 0: use the input's value, else the family's: 4096, of LLaMA 3 8192, of 3.1 131072."""
    shards: int = 1
    """Number of files to split Meta's layout into. Meta's own code wants one per GPU."""
    dry_run: bool = False
    """Check the input and print what would be done, but write nothing."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        for name in ("input",) if self.dry_run else ("input", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name}: expected a folder, found none")
        if self.max_seq_len < 0:
            raise UserError(f"--max-seq-len: expected 0 or more, found {self.max_seq_len}")
        if self.shards < 1 or (self.shards > 1 and self.to != "meta"):
            raise UserError(f"--shards: expected 1, or more with --to meta, found {self.shards} with --to {self.to}")
        if self.weights != "auto" and self.to != "llama-jax":
            raise UserError(
                f"--weights: expected auto with --to {self.to}, found {self.weights}; leave one of them out"
            )


def convert(args: ConvertArgs) -> None:
    """Convert as ``args`` say, and print a report. Raises UserError, leaving nothing that looks finished."""
    args.check()
    output = on_disk(args.output, "--output")
    if not args.dry_run:
        check_new(output)
    folder = location(args.input)
    note = skip_absent_tpu("converting")
    if args.layout == "auto" and folder.is_dir() and is_adapter(folder):
        return import_adapter(folder, args, output)
    if args.to == "peft":
        return export_adapter(folder, args, output)
    with contextlib.ExitStack() as stack:
        source = _with_template(open_source(folder, args, stack), args)
        if isinstance(source, OwnSource) and not args.dry_run:
            _check_outside(output, folder)
        if args.to == "llama2c":
            check_llama2c(source)
        summary.announce(source, args.to, output, args.weights)
        if args.to in CHECKS:
            CHECKS[args.to](source.args)
        if note:
            print(f"{'note':>10}  {note}")
        summary.check_space(source, output, args.to, args.weights, args.dry_run)
        if args.dry_run:
            summary.print_table(source)
            _verify_checklists(source)
            summary.close_dry_run()
            return
        with new_folder(output) as temporary:
            began = time.perf_counter()
            reader, remark = write(source, temporary, args)
        seconds = time.perf_counter() - began
        warnings = list(filter(None, [remark, reader.not_finite()]))
        summary.close(source, args.to, output, args.weights, reader.digest(), seconds, warnings)


def open_source(folder: Path, args: ConvertArgs, stack: contextlib.ExitStack) -> Source:
    """Open the checkpoint in ``folder``, in any format. Raises UserError if there is none."""
    if not is_remote(folder) and not folder.exists():
        raise UserError(f"--input: expected a folder, found nothing at {folder}{hub_hint(folder)}")
    if not is_remote(folder) and not folder.is_dir() and find_layout(folder) is None:
        raise UserError(f"--input: {folder}: expected a folder, {found_in(folder)}")
    found = None if args.layout == "auto" and is_own(folder) else find_layout(folder, args.layout)
    if args.layout != "auto":
        _check_layout(folder, args.layout, found)
    if found is None:
        return _own(folder, args)
    if args.base:
        raise UserError(
            f"--base: expected an adapter as --input beside it, found a whole model in {folder}; leave it out"
        )
    if is_remote(folder):
        raise UserError(
            f"--input: expected Meta's or Hugging Face's files on disk, found {folder}; copy them (gcloud storage cp -r)"
        )
    return SOURCES[found.layout](found.path, found.decided, args.tokenizer, args.max_seq_len, stack)


def _check_layout(folder: Path, wanted: Layout, found: Found | None) -> None:
    """Raise UserError if ``folder`` holds no files of the ``wanted`` layout, of which ``found`` was found."""
    if found is not None or (wanted == "llama-jax" and is_own(folder)):
        return
    if other := "llama-jax" if is_own(folder) else getattr(find_layout(folder), "layout", ""):
        raise UserError(
            f"--layout: expected files of {wanted} in {folder}, found those of {other} alone; leave it out to read these"
        )


def is_own(folder: Path) -> bool:
    """Return whether ``folder`` is a run or a checkpoint of this project, whatever else is in it."""
    is_run = (folder / "config.toml").is_file() and (folder / "checkpoints").exists()
    return is_run or (folder / "model" / "model.json").is_file()


def _with_template(source: Source, args: ConvertArgs) -> Source:
    """Return the source with the chat template of --chat-template, and with warnings about templates."""
    if args.chat_template:
        template, notes = read_template(args.chat_template, source.tokenizer)
        source.chat = replace(source.chat, template=template, has_none=False)
        source.warnings += notes
    if (whose := NO_CHAT.get(args.to)) and (source.chat.template or source.chat.end_ids):
        source.warnings.append(f"{whose} has no place for a chat template and end tokens, which are left out")
    context = source.args.max_seq_len
    if args.to == "meta" and context != usual_context(source.args.vocab_size, source.args.rope_scaling):
        source.warnings.append(
            f"Meta's layout has no place for the context of {context:,} tokens; convert it back with --max-seq-len {context}"
        )
    return source


def _own(folder: Path, args: ConvertArgs) -> OwnSource:
    checkpoint = Checkpoint.find(folder)
    if checkpoint.adapter is None and args.base:
        raise UserError(
            f"--base: expected an adapter as --input beside it, found a whole model in {folder}; leave it out"
        )
    source = OwnSource(folder) if checkpoint.adapter is None else MergedSource(base_at(checkpoint, args.base))
    if args.tokenizer or args.max_seq_len:
        raise UserError(
            "--tokenizer and --max-seq-len: expected none with a checkpoint of llama-jax, which has its own"
        )
    return source


def _check_outside(output: Path, folder: Path) -> None:
    """Raise UserError if ``output`` would be inside a run or checkpoint, and be taken for a part of it."""
    if not is_remote(folder) and folder.resolve() in output.resolve().parents:
        raise UserError(f"--output: expected a folder outside of --input, found {output} in {folder}; choose another")


def _verify_checklists(source: Source) -> None:
    """Compare files with the md5 lists next to them, if there are any."""
    for path in source.checklists:
        size = sum(p.stat().st_size for p in path.parent.glob("consolidated.*.pth")) * (path.name == "checklist.chk")
        with Progress(f"checking {path.name}", size or None, "B") as progress:
            count = verify_checklist(path, progress.update)
        print(f"{'checksums':>10}  {count} files match {path}")


def write(source: Source, folder: Path, args: ConvertArgs) -> tuple[Reader, str]:
    """Verify the model's checklists and write it into ``folder`` as ``args`` say.

    Return the reader, which has seen all values, and a remark about the result.
    """
    _verify_checklists(source)
    with Progress("converting", summary.weight_bytes(source), "B") as progress, source.verified():
        reader = Reader(source, progress)
        remark = ""
        if args.to == "llama-jax":
            write_own(source, folder, reader.blocks, args.weights)
        elif args.to == "huggingface":
            remark = write_huggingface(source, folder, reader.blocks)
        elif args.to == "llama2c":
            remark = write_llama2c(source, folder, reader.blocks)
        else:
            remark = write_meta(source, folder, reader.blocks, args.shards)
    return reader, remark
