"""Files of prompts, and files of results that grow batch by batch and are gone on with after a stop."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llama_jax.config import SampleArgs, from_dict
from llama_jax.errors import UserError, quoted
from llama_jax.generation.rows import Completion


class Job(NamedTuple):
    """A prompt and how it is to be gone on from: ``args.n`` results."""

    prompt: str
    args: SampleArgs


def read_prompts(path: Path, args: SampleArgs) -> list[Job]:
    """A prompt a line; blank lines are passed over. In a .jsonl file {"prompt": ...} and fields that replace those of ``args``.

    Raises UserError where a line is something else.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"--prompts-file: expected a file of prompts, found no file {path}; give one a line") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, found another byte at {error.start}; convert it") from None
    # Not splitlines: within JSON, and within a prompt, a line may hold other separators than these.
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: expected one or more prompts, found none; give one a line")
    if path.suffix != ".jsonl":
        return [Job(line, args) for _, line in lines]
    return [_job(line, args, f"{path}: line {i}") for i, line in lines]


def _job(line: str, args: SampleArgs, where: str) -> Job:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, found {quoted(str(error))}") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'{where}: expected an object with a text as "prompt", found {quoted(found)}')
    given = {name.replace("-", "_"): value for name, value in found.items() if name != "prompt"}
    if isinstance(stop := given.get("stop"), str | list):
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(bias := given.get("logit_bias"), dict):
        try:
            given["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise UserError(f"{where}: logit_bias: expected token ids, found {quoted(list(bias))}") from None
    changed = from_dict(SampleArgs, given, where)
    args = dataclasses.replace(args, **{name: getattr(changed, name) for name in given})
    args.check(f"{where}: ")
    return Job(found["prompt"], args)


def result(prompt: str, prompt_tokens: int, completion: Completion) -> dict[str, Any]:
    """A completion as --json prints it."""
    return {
        "prompt": prompt,
        "completion": completion.text,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "logprobs": completion.logprobs,
    }


class Results:
    """A file of results, a JSON line each, in order. Each says what it was made with, so that a stopped job can go on.

    Raises UserError where the file holds results of other prompts or settings, or its folder is missing.
    """

    def __init__(self, path: Path, jobs: Sequence[Job], settings: dict[str, Any]):
        self._path, self._settings = path, settings
        self._jobs = [job for job in jobs for _ in range(job.args.n)]
        if not path.parent.is_dir():
            raise UserError(f"--output: expected a file in a folder, found no folder {path.parent}; make it first")
        if path.is_dir():
            raise UserError(f"--output: expected a file, found the folder {path}; name a file in it")
        self.done, self._whole = self._read()
        self._file: TextIO | None = None

    def __enter__(self) -> "Results":
        if self._path.exists() and self._path.stat().st_size > self._whole:
            os.truncate(self._path, self._whole)  # a line that a stop has torn
        self._file = self._path.open("a", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, prompt_tokens: int, completion: Completion) -> None:
        """Write the next result; it is in the file when this returns."""
        assert self._file is not None
        job = self._jobs[self.done]
        record = result(job.prompt, prompt_tokens, completion) | {"made_with": self._made_with(job)}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self.done += 1

    def _made_with(self, job: Job) -> dict[str, Any]:
        sample = dataclasses.asdict(job.args)
        # As JSON gives it back; an infinite bias, which JSON lacks, as text.
        bias = {str(token): value if abs(value) < 1e300 else str(value) for token, value in job.args.logit_bias.items()}
        return self._settings | sample | {"logit_bias": bias, "stop": list(job.args.stop)}

    def _read(self) -> tuple[int, int]:
        """The number of results in the file, and the bytes that they take."""
        content = self._path.read_bytes() if self._path.exists() else b""
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[:-1]
        torn, begin = content[end:], b'{"prompt": "'
        if not torn.startswith(begin) and not begin.startswith(torn):
            shown = quoted(torn.decode(errors="replace"))
            raise UserError(f"{self._path}: expected results of this command, found {shown}; {_ANOTHER}")
        if len(lines) > len(self._jobs):
            raise UserError(
                f"{self._path}: expected up to {len(self._jobs)} results, one a completion, found {len(lines)}; {_ANOTHER}"
            )
        for i, (line, job) in enumerate(zip(lines, self._jobs, strict=False), 1):
            self._check(line, job, f"{self._path}: line {i}")
        return len(lines), end

    def _check(self, line: bytes, job: Job, where: str) -> None:
        try:
            record: Any = json.loads(line)
            prompt, made_with = record["prompt"], record["made_with"]
        except (ValueError, TypeError, KeyError, RecursionError):
            shown = quoted(line.decode(errors="replace"))
            raise UserError(f"{where}: expected a result of this command, found {shown}; {_ANOTHER}") from None
        if prompt != job.prompt:
            raise UserError(
                f"{where}: expected a result of the prompt {quoted(job.prompt)}, found {quoted(prompt)}; {_ANOTHER}"
            )
        expected = self._made_with(job)
        if not isinstance(made_with, dict):
            raise UserError(f"{where}: expected settings in made_with, found {quoted(made_with)}; {_ANOTHER}")
        for name in expected:
            if made_with.get(name) != expected[name]:
                raise UserError(
                    f"{where}: expected a result made with {name} {quoted(expected[name])}, "
                    f"found {quoted(made_with.get(name))}; {_ANOTHER}"
                )


_ANOTHER = "go on with the same flags, or give another --output"
