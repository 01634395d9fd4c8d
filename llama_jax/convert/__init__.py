"""Conversion between Meta's, Hugging Face's and our checkpoints: exact, in little memory, never running what is in a file."""

import contextlib
import hashlib
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llama_jax.config import Weights
from llama_jax.convert import report
from llama_jax.convert.huggingface import HuggingFaceSource, write_huggingface
from llama_jax.convert.layout import Tensor, all_tensors, blocks
from llama_jax.convert.meta import MetaSource, verify_checklist, write_meta
from llama_jax.convert.own import OwnSource, write_own
from llama_jax.convert.source import Block, Source
from llama_jax.errors import UserError
from llama_jax.files import raw_bytes
from llama_jax.progress import Progress
from llama_jax.storage import children, is_remote, location, on_disk

Format = Literal["llama-jax", "huggingface", "meta"]
# Blocks that are read ahead of the one being written.
READ_AHEAD = 2


@dataclass(frozen=True)
class ConvertArgs:
    """Convert a LLaMA between Meta's layout, Hugging Face's and the checkpoints of this project."""

    input: str = ""
    """A folder with params.json and consolidated.*.pth (Meta), with config.json and *.safetensors (Hugging Face), or a checkpoint of train.py or of this command."""
    output: str = ""
    """The folder to write; it must not exist."""
    to: Format = "llama-jax"
    """What to write."""
    weights: Weights = "auto"
    """Matrices of a checkpoint of this project: auto, as they are; int8, with a scale an output; int4, a scale for 32 inputs of an output; int4-64, for 64."""
    tokenizer: str = ""
    """The SentencePiece model. Empty: tokenizer.model beside the weights, or in the folder above."""
    max_seq_len: int = 0
    """Context, in tokens. 0: what the input says, or 4096, where it says nothing."""
    shards: int = 1
    """Files that Meta's layout is split into; its own code wants one a GPU."""
    dry_run: bool = False
    """Check the input and say what would be done; write nothing."""

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
    """Convert as ``args`` say, and report. Raises UserError; then nothing is left that looks finished."""
    args.check()
    output = on_disk(args.output, "--output")
    if output.exists() and not args.dry_run:
        raise UserError(f"--output: expected a folder that does not exist, found {args.output}; choose another")
    folder = location(args.input)
    with contextlib.ExitStack() as stack:
        source = open_source(folder, args, stack)
        report.announce(source, args.to, output, args.weights)
        report.check_space(source, output, args.weights, args.dry_run)
        if args.dry_run:
            report.print_table(source)
            _verify_checklists(source)
            report.close_dry_run()
            return
        _verify_checklists(source)
        began = time.perf_counter()
        digest = _write(source, output, args)
        report.close(source, args.to, output, args.weights, digest, time.perf_counter() - began)


def open_source(folder: Path, args: ConvertArgs, stack: contextlib.ExitStack) -> Source:
    """The checkpoint in ``folder``, of whichever format. Raises UserError where there is none."""
    if is_remote(folder):
        if any(path.name in ("params.json", "config.json") for path in children(folder)):
            raise UserError(
                f"--input: expected Meta's or Hugging Face's files on disk, found {folder}; copy them (gcloud storage cp -r)"
            )
        return _own(folder, args)
    if not folder.is_dir():
        raise UserError(f"--input: expected a folder, found {'a file' if folder.exists() else 'nothing'} at {folder}")
    if any(folder.glob("consolidated.*")) or (folder / "params.json").exists():
        return MetaSource(folder, args.tokenizer, args.max_seq_len, stack)
    if (folder / "config.json").exists():
        return HuggingFaceSource(folder, args.tokenizer, args.max_seq_len, stack)
    return _own(folder, args)


def _own(folder: Path, args: ConvertArgs) -> OwnSource:
    if args.tokenizer or args.max_seq_len:
        raise UserError(
            "--tokenizer and --max-seq-len: expected none with a checkpoint of llama-jax, which has its own"
        )
    return OwnSource(folder)


def _verify_checklists(source: Source) -> None:
    """Compare files with the md5 lists beside them, where there are any."""
    for path in source.checklists:
        size = sum(p.stat().st_size for p in path.parent.glob("consolidated.*.pth")) * (path.name == "checklist.chk")
        with Progress(f"checking {path.name}", size or None, "B") as progress:
            count = verify_checklist(path, progress.update)
        print(f"{'checksums':>10}  {count} files are as {path} lists them")


def _write(source: Source, output: Path, args: ConvertArgs) -> str:
    """Write under a temporary name, then rename; the digest of what was written."""
    temporary = output.with_name(output.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with Progress("converting", report.weight_bytes(source), "B") as progress:
            reader = Reader(source, progress)
            if args.to == "llama-jax":
                write_own(source, temporary, reader.blocks, args.weights)
            elif args.to == "huggingface":
                write_huggingface(source, temporary, reader.blocks)
            else:
                write_meta(source, temporary, reader.blocks, args.shards)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return reader.digest()


class Reader:
    """Reads a source block by block, a little ahead of the writer; counts and digests what has passed."""

    def __init__(self, source: Source, progress: Progress):
        self.source = source
        self._progress = progress
        self._digests: dict[str, hashlib._Hash] = {}

    def blocks(self) -> Iterator[Block]:
        """Every block, tensor by tensor, in the order of a forward pass."""
        waiting: deque[Future[Block]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for tensor, layer in all_tensors(self.source.args):
                for start, stop in blocks(tensor, self.source.args, self.source.dtype.itemsize):
                    waiting.append(thread.submit(self._read, tensor, layer, start, stop))
                    if len(waiting) > READ_AHEAD:
                        yield from self._pass_on(waiting.popleft())
            while waiting:
                yield from self._pass_on(waiting.popleft())

    def _read(self, tensor: Tensor, layer: int, start: int, stop: int) -> Block:
        rows = np.array(self.source.rows(tensor, layer, start, stop))  # a copy: the mapped file is given back
        self.source.release()
        name = f"{tensor.name}/{layer}"
        digest = self._digests.setdefault(name, hashlib.sha256())
        digest.update(raw_bytes(rows))
        return Block(tensor, layer, start, rows)

    def _pass_on(self, block: Future[Block]) -> Iterator[Block]:
        yield block.result()
        self._progress.update(block.result().rows.nbytes)

    def digest(self) -> str:
        """sha256 over the tensors' names and sha256, sorted: the same for equal weights, whatever their layout."""
        lines = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()
