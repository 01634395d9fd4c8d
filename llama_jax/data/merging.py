"""Joins the parts of ``prepare --part``: ``python -m llama_jax.data merge --output DIR``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax.cli.flags import parse_flags
from llama_jax.cli.progress import working
from llama_jax.config import DataArgs, from_dict
from llama_jax.data import Data, find_text
from llama_jax.data.joining import join
from llama_jax.data.manifest import TOKENIZER, UNFINISHED, read_manifest
from llama_jax.data.partial import files_of, job_of_parts, missing_parts
from llama_jax.data.preparing import report
from llama_jax.data.shards import ABOUT, finish, unfinished_in
from llama_jax.data.tokens import open_tokens
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.storage.files import remove_leftovers
from llama_jax.storage.locations import folder_on_disk
from llama_jax.storage.owner import owning
from llama_jax.tokenizer import kept_tokenizer


@dataclass(frozen=True)
class MergeArgs:
    """Join the parts that prepare --part made. Training then takes the output folder as --data.filepath."""

    output: str = ""
    """The folder of the parts."""


def main(argv: Sequence[str]) -> None:
    """Join the parts that ``prepare --part`` made of a text."""
    program = f"{typed('data')} merge"
    description = f"Join the parts of prepare --part: {program} --output DIR"
    args = parse_flags(MergeArgs, argv, MergeArgs(), program, description)
    if not args.output:
        raise UserError("--output: expected the folder of the parts, found none")
    merge(folder_on_disk(args.output, "--output"))


def merge(output: Path) -> None:
    """Join the parts in a folder. Raises UserError if some are missing, or if the text has changed since."""
    if not output.is_dir():
        raise UserError(f"--output: expected a folder with parts, found none at {output}; prepare them first")
    with owning(output, "--output", "wait for it"):
        remove_leftovers(output)
        manifest = read_manifest(output)
        parts = [folder for folder in unfinished_in(output) if (folder / ABOUT).exists()]
        if manifest is not None and not parts:
            print(f"{output}: holds these tokens already, whole")
            (output / UNFINISHED).unlink(missing_ok=True)  # of one that was killed when all but this was done
            tokens = open_tokens(output)
            report(Data(tokens, kept_tokenizer(output / TOKENIZER), manifest.source), output)
            return
        if len(parts) != 1:
            raise UserError(
                f"--output: expected a folder with the parts of one text, found {len(parts) or 'no parts'} in {output}; name the "
                "--output of prepare --part"
            )
        report(_merged(parts[0], output), output)


def _merged(folder: Path, output: Path) -> Data:
    about = json.loads((folder / ABOUT).read_bytes())
    if "data" not in about:
        raise UserError(
            f"--output: expected the parts of prepare --part, found an unfinished prepare of {about['source']} in {output}; repeat its "
            "command to go on"
        )
    args = from_dict(DataArgs, about["data"], str(folder / ABOUT))
    text = find_text(args, output)
    tokenizer = kept_tokenizer(output / TOKENIZER)
    job = job_of_parts(args, text, tokenizer, output)
    if missing := missing_parts(job):
        raise UserError(
            f"--output: expected all parts, found that these are missing or unfinished: {', '.join(missing[:20])}"
            f"{', ...' if len(missing) > 20 else ''}; run them, then merge again"
        )
    with working("joining the parts"):
        text.corpus.know(files_of(job))
        manifest = join(job, tokenizer, output, source=about["source"], eval_source=text.eval_source)
    tokens = finish(job, output, manifest)
    (output / UNFINISHED).unlink(missing_ok=True)
    return Data(tokens, tokenizer, about["source"], notes=text.notes)
