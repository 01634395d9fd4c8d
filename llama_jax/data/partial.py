"""One part of the tasks of ``prepare``, for several machines that share a disk: ``--part 3/64``. ``merge`` joins them.

Parts do not wait for each other. Each encodes its tasks, and takes the digests of its share of the files.
"""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from llama_jax.cli.progress import bytes_text, working
from llama_jax.config import DataArgs
from llama_jax.data import find_text
from llama_jax.data.encode import Job, read_result
from llama_jax.data.finding import Text, origin_of
from llama_jax.data.manifest import TOKENIZER, UNFINISHED, read_manifest
from llama_jax.data.origin import difference
from llama_jax.data.parts import TextFile
from llama_jax.data.reading import check_text
from llama_jax.data.shards import RefuseOthers, encode_tasks, job_of
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.storage.files import is_address, write_atomically
from llama_jax.storage.owner import owning
from llama_jax.tokenizer import Tokenizer, is_kept, keep_tokenizer, kept_tokenizer

FILES = "files.json"


@dataclasses.dataclass(frozen=True)
class PartOf:
    """Part ``number``, from 1, of ``count``."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "PartOf":
        """Return the part that is written as "3/64". Raises UserError on anything else."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        part = cls(*map(int, found.groups())) if found else cls(0, 0)
        if not 1 <= part.number <= part.count:
            raise UserError(
                f"--part: expected a number and how many there are, such as 3/64, found {text!r}; correct it"
            )
        return part

    def has(self, index: int) -> bool:
        """Return whether a task or a file, numbered from 0, belongs to the part."""
        return index % self.count == self.number - 1


def prepare_part(args: DataArgs, output: Path, part: PartOf, workers: int) -> None:
    """Encode one part of a text's tasks into ``output``, unless the tokens of all parts are there.

    Raises UserError if other tokens are there.
    """
    if not args.tokenizer_model_path:
        raise UserError(
            f"--tokenizer-model-path: expected the tokenizer of all parts, found none; name it, or train one first with "
            f"{typed('data')} train-tokenizer"
        )
    text = find_text(args, output)
    check_text(text)
    tokenizer = Tokenizer(args.tokenizer_model_path)
    if (manifest := read_manifest(output)) is not None:
        asked = dataclasses.replace(origin_of(text), tokenizer_sha256=tokenizer.digest, trained_vocab_size=0)
        if found := difference(manifest.origin, asked):
            raise UserError(
                f"--output: expected a new folder, or one with other parts, found {manifest.origin} in {output}, and {found}; choose "
                f"another --output, or delete {output}"
            )
        print(f"{output}: holds the tokens of all parts already")
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / UNFINISHED).touch()
    _put_tokenizer(tokenizer, output / TOKENIZER)
    job = job_of_parts(args, text, tokenizer, output)
    own = [task for task in range(len(job.tasks)) if part.has(task)]
    folder = job.folder / f"part-{part.number}-of-{part.count}"
    folder.mkdir(exist_ok=True)
    for note in text.notes:
        print(note)
    print(f"part {part.number} of {part.count}: {len(own):,} of {len(job.tasks):,} shards of {text.source}", flush=True)
    with owning(folder, "--part", "wait for it, or choose another --part"):
        _note_files(text, part, folder)
        encode_tasks(job, own, tokenizer, workers)
    print(
        f"{output}: part {part.number} of {part.count} is done; after all parts: {typed('data')} merge --output {output}"
    )


def job_of_parts(args: DataArgs, text: Text, tokenizer: Tokenizer, output: Path) -> Job:
    """Return the job that all parts share. What its files look like decides whether results belong to it."""
    place = args.filepath if is_address(args.filepath) else os.path.abspath(os.path.expanduser(args.filepath))
    about = {"source": text.source, "data": dataclasses.asdict(dataclasses.replace(args, filepath=place))}
    made_from = f"{text.corpus.stamp()} {tokenizer.digest}"
    return job_of(text.corpus, tokenizer, output, made_from, RefuseOthers("--output"), about)


def missing_parts(job: Job) -> list[str]:
    """Return what is missing of a job, in words: the parts, as far as their number is known, with their shards."""
    missing = [task for task in range(len(job.tasks)) if read_result(job, task) is None]
    if not missing:
        return []
    counts = {int(path.name.rpartition("-")[2]) for path in job.folder.glob("part-*-of-*")}
    if len(counts) != 1:
        return [f"{len(missing):,} of {len(job.tasks):,} shards"]
    (count,) = counts
    parts = sorted({task % count + 1 for task in missing})
    return [f"{part}/{count}" for part in parts]


def files_of(job: Job) -> tuple[TextFile, ...]:
    """Return the files of a job with their digests, those that no part has taken after reading them."""
    known: dict[int, TextFile] = {}
    for path in sorted(job.folder.glob(f"part-*/{FILES}")):
        table: dict[str, Any] = json.loads(path.read_bytes())
        known |= {int(number): TextFile(**file) for number, file in table.items()}
    corpus = job.corpus
    return tuple(known.get(i) or corpus.file_of(i) for i in range(len(corpus.places)))


def _note_files(text: Text, part: PartOf, folder: Path) -> None:
    """Write the digests of the part's share of the files."""
    own = [i for i in range(len(text.corpus.places)) if part.has(i)]
    size = sum(max(0, text.corpus.places[i].size) for i in own)
    with working(f"reading {len(own):,} files of {text.source}, {bytes_text(size)}"):
        files = {i: dataclasses.asdict(text.corpus.file_of(i)) for i in own}
    write_atomically(folder / FILES, json.dumps(files))


def _put_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a copy of the tokenizer, unless it is there. Raises UserError if another one is."""
    if not is_kept(path):
        keep_tokenizer(tokenizer, path)
    if kept_tokenizer(path).digest != tokenizer.digest:
        raise UserError(
            f"--tokenizer-model-path: expected the tokenizer of the other parts, {path}, found another one in {tokenizer.model_path}; "
            "take that one, or choose another --output"
        )
