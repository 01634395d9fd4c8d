"""The origin of tokens (text, settings, tokenizer), and a description of how two origins differ."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_jax.data.documents import sha256_of
from llama_jax.data.parts import TextFile
from llama_jax.errors import UserError, quoted


@dataclass(frozen=True)
class Origin:
    """The text, settings and tokenizer that tokens were made from, and their number. Empty and 0 mean unknown.

    It is small enough to be part of a run's record. ``to_dict`` and ``from_dict`` convert it for JSON.
    """

    source: str = ""
    """The text, as the user named it."""
    files: tuple[TextFile, ...] = ()
    text_sha256: str = ""
    """Digest of the files' contents and sizes, the separator and the cut."""
    train_size: float = 0.0
    separator: str = ""
    tokenizer_sha256: str = ""
    trained_vocab_size: int = 0
    """The requested vocabulary size, if the tokenizer was trained on this text."""
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of tokens of train and eval."""
    tokens_sha256: str = ""
    """Digest of the checksums of the tokens."""
    text_field: str = ""
    """The field of the records that holds the text. Empty: plain text."""
    held_out: str = "end"
    """How the held-out part is chosen: the end of the text, documents by a hash, or a text of its own."""
    eval_source: str = ""
    """The held-out text, as the user named it. Empty: a part of the text."""
    eval_files: tuple[TextFile, ...] = ()
    chats: dict[str, str] = dataclasses.field(default_factory=dict)
    """The settings that decide the tokens of conversations (manifest.ChatCounts). Empty: a text."""

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which ``from_dict`` reads."""
        table = dataclasses.asdict(self)
        if not self.chats:
            del table["chats"]
        return table

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "Origin":
        """Build an origin from the result of ``to_dict``. Raises TypeError or KeyError on anything else."""
        files = {"files": table["files"], "eval_files": table.get("eval_files", ())}
        return cls(**table | {key: tuple(TextFile(**file) for file in found) for key, found in files.items()})

    @property
    def bytes(self) -> int:
        """The size of all files in bytes."""
        return sum(file.bytes for file in self.files)

    def __str__(self) -> str:
        """Describe it: "tokens of my.txt (1 file, 1,115,394 bytes, separator '', train_size 0.9)"."""
        text = f"{len(self.files):,} file{'s' * (len(self.files) != 1)}, {self.bytes:,} bytes, " if self.files else ""
        how = f"field {self.text_field}" if self.text_field else f"separator {quoted(self.separator)}"
        held_out = f"held-out text {self.eval_source}" if self.eval_source else f"train_size {self.train_size}"
        return f"{sum(self.tokens.values()):,} tokens of {self.source or 'a text'} ({text}{how}, {held_out})"


def difference(before: Origin, now: Origin) -> str:
    """Describe how ``now`` differs from ``before``, in words that follow "found that". Empty if they are equal.

    Files of ``now`` are read if needed to tell whether a text has grown.
    """
    found = []
    if before.text_sha256 != now.text_sha256:
        if before.separator != now.separator:
            found.append(f"the separator was {quoted(before.separator)} and is {quoted(now.separator)} now")
        found += _held_out_difference(before, now)
        if before.text_field != now.text_field:
            then, here = (f"the field {o.text_field}" if o.text_field else "plain text" for o in (before, now))
            found.append(f"the text was {then} and is {here} now")
        if before.files and [_content(file) for file in before.files] != [_content(file) for file in now.files]:
            found.append(_text_difference(before, now))
        if not found:
            found.append("the text is another one")
    if before.chats and now.chats:
        for name, was in before.chats.items():
            if (is_now := now.chats.get(name)) != was:
                both = "another one" if name == "chat_template" else f"{was} and is {is_now} now"
                found.append(f"data.{name} was {both}" if name != "max_seq_len" else f"model.max_seq_len was {both}")
    if _differ(before.tokenizer_sha256, now.tokenizer_sha256):
        found.append("the tokenizer is another one")
    elif before.trained_vocab_size != now.trained_vocab_size and not (before.tokenizer_sha256 and now.tokenizer_sha256):
        then, here = (
            f"trained with vocab_size {o.trained_vocab_size}" if o.trained_vocab_size else "given"
            for o in (before, now)
        )
        found.append(f"the tokenizer was {then} and is {here} now")
    if not found and (_differ(before.tokens, now.tokens) or _differ(before.tokens_sha256, now.tokens_sha256)):
        found.append("the same text and tokenizer give other tokens now: they were made by another version")
    return ", and ".join(found)


def _held_out_difference(before: Origin, now: Origin) -> list[str]:
    """Describe how the held-out parts differ."""
    if "own" in (before.held_out, now.held_out):
        if before.held_out == now.held_out and [*map(_content, before.eval_files)] == [*map(_content, now.eval_files)]:
            return []
        then, here = (o.eval_source or "a part of the text" for o in (before, now))
        return [f"the held-out text was {then} and is {here} now" if then != here else f"{here} has changed"]
    if before.train_size != now.train_size:
        return [f"train_size was {before.train_size} and is {now.train_size} now"]
    return []


def _differ(before: Any, now: Any) -> bool:
    """Return whether two values are both known and differ."""
    return bool(before and now and before != now)


def _content(file: TextFile) -> tuple[int, str]:
    return file.bytes, file.sha256


def _text_difference(before: Origin, now: Origin) -> str:
    """Describe how the files differ."""
    if sorted(map(_content, before.files)) == sorted(map(_content, now.files)):
        return f"the files of {now.source} are the same in another order"
    if now.bytes > before.bytes and _has_grown(before, now):
        return f"{now.source} has grown by {now.bytes - before.bytes:,} bytes since"
    left = [file for file in now.files if _content(file) not in set(map(_content, before.files))]
    example = f", as {left[0].path} is" if left and len(now.files) > 1 else ""
    then, here = (f"{len(o.files):,} file{'s' * (len(o.files) != 1)} of {o.bytes:,} bytes" for o in (before, now))
    return f"{now.source} is another text{example} (it was {then} and is {here} now)"


def _has_grown(before: Origin, now: Origin) -> bool:
    """Return whether each old file is the beginning of a new file with the same name or in the same place."""
    by_path = {file.path: file for file in now.files}
    contents = set(map(_content, now.files))
    for i, old in enumerate(before.files):
        if _content(old) in contents:
            continue
        new = by_path.get(old.path) or (now.files[i] if i < len(now.files) else None)
        try:
            if new is None or new.bytes < old.bytes or sha256_of(Path(new.path), old.bytes) != old.sha256:
                return False
        except UserError:
            return False
    return True
