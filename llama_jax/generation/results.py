"""Result files with one JSON object per line, which can be resumed and are written by one process at a time."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from llama_jax.chat.messages import Message
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError, quoted
from llama_jax.generation.prompts import Asked
from llama_jax.generation.rows import Completion
from llama_jax.storage.files import is_stream
from llama_jax.tokenizer import clean

# The result of a prompt that was skipped because it is too long.
SKIPPED = Completion("", [], [], "too_long")
# Other names for standard output.
STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_ANOTHER = "go on with the same flags, or give another --output"


def result(asked: Asked, completion: Completion) -> dict[str, Any]:
    """Return a completion as the object that --json prints."""
    record = {
        "prompt": asked.job.prompt,
        "completion": completion.text,
        "prompt_tokens": len(asked.ids),
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "logprobs": completion.logprobs,
    }
    for name in ("top_logprobs", "prompt_token_ids", "prompt_logprobs", "prompt_top_logprobs"):
        if found := getattr(completion, name):
            record[name] = [_as_json(one) for one in found]
    gap = {} if asked.job.suffix is None else {"suffix": asked.job.suffix}
    return record | gap | ({"cut_tokens": asked.cut} if asked.cut else {})


def _as_json(found: Any) -> Any:
    """Return a number as it is, and the alternatives of a token as objects."""
    return [alternative._asdict() for alternative in found] if isinstance(found, list) else found


class Results:
    """A file of results in order. ``with results:`` opens it for writing. Each result records its settings.

    A path that is not a file on disk (a pipe, a terminal, /dev/null) is written without resuming. Raises UserError if
    the file holds results of other prompts or settings, or if its folder is missing. ``with`` raises UserError if
    another process writes the file.
    """

    def __init__(self, path: str, asked: Sequence[Asked], settings: dict[str, Any]):
        """``settings`` besides those of the prompts. Among them, "model" identifies the weights."""
        self._path, self._settings = Path(path), settings
        self._asked = [one for one in asked for _ in range(one.job.args.n)]
        self._made: dict[int, dict[str, Any]] = {}  # by the id of settings, which many prompts may share
        self._descriptor = 1 if path in STANDARD_OUTPUT else None
        self._is_stream = self._descriptor is not None or is_stream(self._path)
        if self._path.is_dir():
            raise UserError(f"--output: expected a file, found the folder {path}; name a file in it")
        if not self._is_stream and not self._path.parent.is_dir():
            raise UserError(
                f"--output: expected a file in a folder, found no folder {self._path.parent}; make it first"
            )
        self.done, self._whole = self._read()
        self._file: TextIO | None = None

    @property
    def all_done(self) -> bool:
        """Whether the file already holds all results."""
        return not self._is_stream and self.done == len(self._asked)

    def __enter__(self) -> "Results":
        if self._is_stream:
            source = self._path if self._descriptor is None else os.dup(self._descriptor)
            self._file = open(source, "w", encoding="utf-8", newline="\n")
            return self
        self._is_new = not self._path.exists()
        self._file = self._locked()
        self.done, self._whole = self._read()  # again, now that nobody else writes to it
        if os.fstat(self._file.fileno()).st_size > self._whole:
            os.truncate(self._path, self._whole)  # drops a line that was cut by a kill
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        if not self._is_stream and self._is_new and os.fstat(self._file.fileno()).st_size == 0:
            self._path.unlink(missing_ok=True)  # no result was written
        self._file.close()

    def add(self, completion: Completion) -> None:
        """Write the next result. It is in the file when this returns."""
        assert self._file is not None
        asked = self._asked[self.done]
        record = result(asked, completion) | {"made_with": self._made_with(asked)}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        self.done += 1

    def _locked(self) -> TextIO:
        """Return the open and locked file. The lock ends with this process at the latest."""
        while True:
            file = self._path.open("a", encoding="utf-8", newline="\n")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise UserError(
                    f"--output: expected a file that nobody else writes, found {self._path} in use by another command; wait until "
                    "it has ended, or give another --output"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise
                return file  # a disk without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    return file
            file.close()  # the previous owner of the lock removed the file

    def _made_with(self, asked: Asked) -> dict[str, Any]:
        args = asked.job.args
        if id(args) not in self._made:
            sample = dataclasses.asdict(args)
            # As in JSON, except that an infinite bias, which JSON lacks, becomes text.
            bias = {str(token): value if abs(value) < 1e300 else str(value) for token, value in args.logit_bias.items()}
            lists = {"stop": list(args.stop), "stop_token_ids": list(args.stop_token_ids)}
            made = self._settings | sample | {"logit_bias": bias} | lists
            self._made[id(args)] = {name: clean(x) if isinstance(x, str) else x for name, x in made.items()}
        made = self._made[id(args)]
        if asked.job.messages:
            made = made | {"conversation": _digest(asked.job.messages)}
        return made | ({"too_long": "skip" if asked.skipped else "cut"} if asked.skipped or asked.cut else {})

    def _read(self) -> tuple[int, int]:
        """Return the number of results in the file and their size in bytes."""
        content = b"" if self._is_stream or not self._path.exists() else self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[:-1]
        torn, begin = content[end:], b'{"prompt": "'
        if not torn.startswith(begin) and not begin.startswith(torn):
            shown = quoted(torn.decode(errors="replace"))
            raise UserError(f"{self._path}: expected results of this command, found {shown}; {_ANOTHER}")
        if len(lines) > len(self._asked):
            raise UserError(
                f"{self._path}: expected up to {len(self._asked)} results, one a completion, found {len(lines)}; {_ANOTHER}"
            )
        for i, (line, asked) in enumerate(zip(lines, self._asked, strict=False), 1):
            self._check(line, asked, f"{self._path}: line {i}")
        return len(lines), end

    def _check(self, line: bytes, asked: Asked, where: str) -> None:
        try:
            record: Any = json.loads(line)
            prompt, made_with = record["prompt"], record["made_with"]
        except (ValueError, TypeError, KeyError, RecursionError):
            shown = quoted(line.decode(errors="replace"))
            raise UserError(f"{where}: expected a result of this command, found {shown}; {_ANOTHER}") from None
        if prompt != asked.job.prompt:
            raise UserError(
                f"{where}: expected a result of the prompt {quoted(asked.job.prompt)}, found {quoted(prompt)}; {_ANOTHER}"
            )
        if record.get("suffix") != asked.job.suffix:
            raise UserError(
                f"{where}: expected a result with the suffix {quoted(asked.job.suffix)}, found {quoted(record.get('suffix'))}; "
                f"{_ANOTHER}"
            )
        if not isinstance(made_with, dict):
            raise UserError(f"{where}: expected settings in made_with, found {quoted(made_with)}; {_ANOTHER}")
        expected = self._made_with(asked)
        if "model" in expected and "model" in made_with:
            if made_with["model"] != expected["model"]:
                raise UserError(
                    f"{where}: expected a result of the model that is in {quoted(expected['ckpt'])} now, found one of another "
                    f"model in {quoted(made_with.get('ckpt'))}; go on with that one, or give another --output"
                )
            expected = expected | {"ckpt": made_with.get("ckpt")}  # the checkpoint may be a copy
        if "chat_template" not in made_with:  # of an earlier version, which did not say which conversation it was
            expected = {name: value for name, value in expected.items() if name != "conversation"}
        for name in (*expected, *(made_with.keys() & _LATER.keys())):
            wanted, found = expected.get(name, _LATER.get(name)), made_with.get(name, _LATER.get(name))
            if name != "model" and wanted != found:
                raise UserError(
                    f"{where}: expected a result made with {name} {quoted(wanted)}, found {quoted(found)}; {_ANOTHER}"
                )


def _digest(messages: Sequence[Message]) -> str:
    """Return a digest of a conversation, of which a result shows the last message only."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]


# Settings that files of earlier versions lack, with the values they were made with.
_LATER: dict[str, Any] = {
    "exact": False, "too_long": "refuse", "chat_template": "", "conversation": "", "stop_token_ids": [],
} | {
    name: getattr(SampleArgs(), name)
    for name in ("ignore_eos", "min_new_tokens", "logprobs", "echo", "infill_format", "json_schema")
}  # fmt: skip
