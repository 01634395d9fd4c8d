"""Prepares tokens ahead: ``python -m llama_jax.data prepare --filepath TEXT --tokenizer-model-path M --output DIR``."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama_jax.cli.flags import given_flags, parse_flags, refuse_empty
from llama_jax.cli.progress import working
from llama_jax.config import DataArgs
from llama_jax.data import Data, Text, encode_text, find_text, origin_of
from llama_jax.data.finding import cut_at_end
from llama_jax.data.manifest import DOCUMENTS, MANIFEST, SUMS, TOKENIZER, UNFINISHED, read_manifest
from llama_jax.data.origin import difference
from llama_jax.data.partial import PartOf, prepare_part
from llama_jax.data.places import BLOCK_BYTES
from llama_jax.data.reading import ReadingArgs
from llama_jax.data.shards import RefuseOthers, unfinished_in
from llama_jax.data.summary import documents_text, held_out_text, remarks
from llama_jax.data.token_files import find_token_files
from llama_jax.data.tokens import SPLITS, find_prepared, open_tokens, token_files
from llama_jax.data.workers import Run, run_tasks
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.storage.files import is_address, remove_leftovers
from llama_jax.storage.locations import folder_on_disk
from llama_jax.storage.owner import owning
from llama_jax.tokenizer import Tokenizer, is_kept, kept_tokenizer
from llama_jax.tokenizers.files import KEPT

# The --filepath that stands for it.
STANDARD_INPUT = "-"
NAMES = (*(f"{split}.bin" for split in SPLITS), SUMS, DOCUMENTS, *KEPT)


@dataclass(frozen=True)
class PrepareArgs(ReadingArgs):
    """Encode a text once. Training then takes the output folder as --data.filepath."""

    filepath: str = ""
    """Text to encode: a file, a folder, a glob, an address (gs://, s3://, https://), or - for standard input.
    It is plain text, JSON lines, parquet or arrow, also compressed, as its bytes tell.
    Of a folder all *.txt and all files of records are read, recursively."""
    tokenizer_model_path: str = ""
    """Path of a tokenizer: tokenizer.model, tokenizer.json, or a folder with them.
    Empty: train a BPE vocabulary on the text."""
    output: str = ""
    """Folder to write: train.bin, eval.bin, checksums.bin, the tokenizer's files, manifest.json.
    Tokens of another text in it are never replaced."""
    vocab_size: int = DataArgs.vocab_size
    """Vocabulary size, in tokens, when a tokenizer is trained."""
    train_size: float = DataArgs.train_size
    """Share of the text to train on. 1: hold out nothing. The rest is held out for evaluation:
    the end of a plain text, by bytes; of records, and of several texts with a separator, documents chosen by a hash."""
    eval_filepath: str = ""
    """Held-out text of its own, in any of the forms of filepath, which is then trained on as a whole.
    Empty: hold out a part of the text (train_size)."""
    workers: int = os.cpu_count() or 1
    """Number of encoding processes. There are never more than cores. The tokens are the same for any number."""
    part: str = ""
    """Do one part of the work: 3/64 is the third of 64. Each may run on another machine with the same --output on a
    shared disk. After all parts, data merge --output DIR joins them. Empty: do all of it."""
    ray: str = ""
    """Encode on the nodes of a Ray cluster (the extra ray): HOST:PORT, or auto for the one that runs on this machine.
    The text and --output must be on a disk that all nodes share, under the same paths, or the text at an address.
    The CPUs of the cluster decide how much is done at a time, and not --workers. Empty: encode on this machine."""

    @property
    def data(self) -> DataArgs:
        """The settings of the text. Raises UserError if they are impossible."""
        if find_prepared(self.filepath) is not None:
            raise UserError(f"--filepath: expected a text, found tokens that are prepared already in {self.filepath}")
        if not self.as_text and not is_address(self.filepath) and (files := find_token_files(self.filepath)):
            raise UserError(
                f"--filepath: expected a text, found token files of {files[0].program} in {self.filepath}; give them to training as they "
                "are, with their tokenizer"
            )
        return self.data_args(
            train_size=self.train_size, tokenizer_model_path=self.tokenizer_model_path, vocab_size=self.vocab_size,
            eval_filepath=self.eval_filepath,
        )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Encode a text once, into a folder that training takes for a text."""
    program = f"{typed('data')} prepare"
    description = f"Prepare tokens ahead of training: {program} --filepath TEXT --tokenizer-model-path M --output DIR"
    args = parse_flags(PrepareArgs, argv, PrepareArgs(), program, description)
    for name in ("filepath", "output"):
        if not getattr(args, name):
            raise UserError(f"--{name}: expected a path, found none")
    notes = []
    if args.tokenizer_model_path and "vocab_size" in given_flags(argv):
        notes.append(
            f"--vocab-size: no effect beside --tokenizer-model-path {args.tokenizer_model_path}, which decides it"
        )
    if args.workers < 1:
        raise UserError(f"--workers: expected 1 or more, found {args.workers}")
    if args.ray:
        _check_ray(args)
    if not args.part:  # whose tokenizer must be given
        refuse_empty(argv, args, ("eval_filepath", "tokenizer_model_path"))
    if args.part:
        prepare_part(args.data, folder_on_disk(args.output, "--output"), PartOf.parse(args.part), args.workers)
        print(*notes, sep="\n", end="\n" * len(notes))
    else:
        prepare(args, notes)


def _check_ray(args: PrepareArgs) -> None:
    """Raise UserError on what does not go with --ray."""
    if args.part:
        raise UserError(
            f"--ray: expected none beside --part, found {args.ray}; the cluster divides the work by itself, leave one of the two out"
        )
    if args.filepath == STANDARD_INPUT:
        raise UserError(
            "--filepath: expected a text that all nodes see beside --ray, found - for standard input; write it to a file on a "
            "disk that they share"
        )


def prepare(args: PrepareArgs, notes: Sequence[str] = ()) -> None:
    """Make the tokens unless they exist, and print ``notes`` where that begins.

    Raises UserError, and changes nothing, if the folder holds other tokens.
    """
    data_args = args.data
    output = folder_on_disk(args.output, "--output")
    if args.filepath != STANDARD_INPUT:
        text = find_text(data_args, output)
    given = Tokenizer(args.tokenizer_model_path) if args.tokenizer_model_path else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_made(output))
        stack.enter_context(owning(output, "--output", "wait for it, or choose another --output"))
        remove_leftovers(output)
        if args.filepath == STANDARD_INPUT:
            text = stack.enter_context(_standard_input(data_args, output))
        if _holds(output, text, args, given):
            data = Data(open_tokens(output), kept_tokenizer(output / TOKENIZER), text.source, notes=text.notes)
            print(f"{output}: holds these tokens already, whole")
            (output / UNFINISHED).unlink(missing_ok=True)  # of one that was killed when all but this was done
        else:
            _check_free(output, given)
            for note in notes:
                print(note, flush=True)
            run = stack.enter_context(_run_of(args))
            with _unfinished(output):
                data = encode_text(
                    data_args,
                    text,
                    output,
                    output / TOKENIZER,
                    args.workers,
                    others=RefuseOthers("--output"),
                    run=run,
                )
    report(data, output)


def report(data: Data, output: Path) -> None:
    """Print what was prepared, and what is odd about it."""
    manifest = data.tokens.manifest
    for line in remarks(data):
        print(line, file=sys.stderr)
    print(f"documents: {documents_text(manifest)}")
    print(f"held out: {held_out_text(manifest)}")
    print(
        f"{output}: {manifest.tokens['train']:,} tokens to train on, {manifest.tokens['eval']:,} held out, "
        f"vocabulary {data.tokenizer.vocab_size:,}"
    )


@contextlib.contextmanager
def _run_of(args: PrepareArgs) -> Iterator[Run]:
    """Yield what encodes the tasks: processes of this machine, or the cluster of --ray."""
    if not args.ray:
        yield run_tasks
        return
    from llama_jax.data.on_ray import connected  # imported here, as few need it

    if args.workers != PrepareArgs.workers:
        print("ray: --workers is not used: the CPUs of the cluster decide how much is done at a time", flush=True)
    with connected(args.ray) as run:
        yield run


@contextlib.contextmanager
def _standard_input(args: DataArgs, output: Path) -> Iterator[Text]:
    """Yield the text of standard input, which is kept in a file in ``output`` meanwhile: it is read more than once."""
    path = output / "standard-input.000000000000.tmp"
    try:
        with working("reading standard input"), open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BLOCK_BYTES)
        text = find_text(replace(args, filepath=str(path)), output)
        yield replace(text, source="standard input")
    except UserError as error:
        raise UserError(str(error).replace(str(path), "standard input")) from error
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create ``folder``. Remove it again if the block fails and leaves it empty."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _holds(output: Path, text: Text, args: PrepareArgs, given: Tokenizer | None) -> bool:
    """Return whether the folder holds the requested tokens, intact. Raises UserError if it holds others."""
    manifest = read_manifest(output)
    if manifest is None:
        return False
    if manifest.held_out == "end":  # by an earlier version, perhaps
        text = cut_at_end(text)
    asked = replace(
        origin_of(text),
        tokenizer_sha256=given.digest if given is not None else "",
        trained_vocab_size=0 if given is not None else args.vocab_size,
    )
    if found := difference(manifest.origin, asked):
        raise UserError(
            f"--output: expected a new folder, or one with the requested tokens, found {manifest.origin} in {output}, and "
            f"{found}; choose another --output, or delete {output}"
        )
    try:
        open_tokens(output).check()
        return is_kept(output / TOKENIZER)
    except UserError as error:
        print(f"warning: {error}: made again", file=sys.stderr)
        (output / UNFINISHED).touch()
        (output / MANIFEST).unlink()
        return False


def _check_free(output: Path, given: Tokenizer | None) -> None:
    """Raise UserError if files to be written exist, unless a stopped ``prepare`` left them."""
    if (output / UNFINISHED).exists() or (output / MANIFEST).exists():
        return
    for path in [*token_files(output), *(output / name for name in NAMES)]:
        name = path.name
        same = given is not None and name in given.files and path.is_file() and path.read_bytes() == given.files[name]
        if path.exists() and not same:
            raise UserError(
                f"--output: expected a new folder, found {path}, which is not this command's; choose another --output"
            )


@contextlib.contextmanager
def _unfinished(output: Path) -> Iterator[None]:
    """Mark the folder as unfinished during the block. The mark stays if the block fails and leaves files."""
    mark = output / UNFINISHED
    mark.touch()
    try:
        yield
    except BaseException:
        if not any((output / name).exists() for name in (*NAMES, MANIFEST)) and not unfinished_in(output):
            mark.unlink(missing_ok=True)
        raise
    mark.unlink()
