"""Corpora of conversations, which train.py reads directly: their records, and which of them are held out."""

import collections
import functools
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from llama_jax.chat.messages import Message
from llama_jax.data.chat_records import SYSTEM, Conversation, Preference, parsed, repeats_prompt, unread
from llama_jax.data.corpus import Records
from llama_jax.data.corpus_file import CorpusFile
from llama_jax.data.held_out import hash_of, is_held_out
from llama_jax.data.parts import EXAMPLES, SPLITS, Part, Unit
from llama_jax.data.records import columns_not_read, records_in, values_of
from llama_jax.errors import UserError
from llama_jax.programs import typed


class Found(NamedTuple):
    """A record of a file, and the split that it belongs to."""

    file: CorpusFile
    number: int
    split: str
    record: Conversation | Preference
    digest: bytes
    """A hash of its messages."""
    has_system: bool = False
    """Whether its system message is a field of its own."""
    repeated: bool = False
    """Whether the prompt of a preference was taken off both answers."""


class Wrong(NamedTuple):
    """A record of a file that cannot be read, and why."""

    file: CorpusFile
    number: int
    fault: str


class Chats(Records):
    """Files of conversations. A conversation is held out or not by a hash of its messages."""

    @property
    def kinds(self) -> str:
        """The kinds of records, as their fields tell."""
        return ", ".join(dict.fromkeys(file.chats for file in self.sources))

    @functools.cached_property
    def unread(self) -> dict[str, None]:
        """The names of fields so far that have a value in a record and are not read."""
        return {}

    def conversations(self) -> Iterator[Found]:
        """Yield the records in order.

        Raises UserError if a file is damaged, or if a record is wrong and none may be skipped.
        """
        for found in self.found():
            if isinstance(found, Wrong):
                self.refuse(*found)
            else:
                yield found

    def found(self) -> Iterator[Found | Wrong]:
        """Yield the records in order, also those that are wrong. Raises UserError if a file is damaged."""
        for file in self.sources:
            only = file.chats if file.chosen else ""
            self.unread.update(dict.fromkeys(columns_not_read(file)))
            for number, value, fault, replaced in values_of(file):
                self.replaced += replaced
                try:
                    if fault:
                        raise UserError(fault)
                    record = parsed(value, only)
                except UserError as error:
                    yield Wrong(file, number, str(error))
                    continue
                self.unread.update(dict.fromkeys(unread(value, only)))
                content = hash_of(_content(record))
                split = SPLITS[is_held_out(content, self.train_size)]
                has_system = bool(f"{value.get(SYSTEM) or ''}".strip())
                repeated = isinstance(record, Preference) and repeats_prompt(value)
                yield Found(file, number, split, record, content.digest(), has_system, repeated)

    def count(self) -> int | None:
        """Return about how many records there are, or None if that is only known once they are read."""
        counts = [records_in(file) for file in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def refuse(self, file: CorpusFile, number: int, fault: str) -> None:
        """Count a record that is wrong. Raises UserError if none may be skipped."""
        where = f"{file.name}: {file.word} {number:,}: {fault}"
        if not self.skip:
            raise UserError(f"{where}; correct it, or leave out such records with --data.bad-records skip")
        self.skipped.count += 1
        if len(self.skipped.examples) < EXAMPLES:
            self.skipped.examples.append(where)

    def units(self, largest: int = 0) -> list[Unit]:
        """Raise UserError, since conversations are no text to encode or to count."""
        self._no_text()

    def read(self, unit: Unit, splits: Sequence[str] = SPLITS) -> Iterator[tuple[str, Part]]:
        """Raise UserError, as ``units`` does."""
        self._no_text()

    def parts(self, split: str) -> Iterator[Part]:
        """Raise UserError, as ``units`` does."""
        self._no_text()

    def _no_text(self) -> NoReturn:
        raise UserError(
            f"{self.sources[0].name}: expected text, found conversations ({self.kinds}); train.py reads them directly: "
            f"{typed('train')} {shlex.quote(self.sources[0].name)} --train.init-from CHECKPOINT"
        )


def count_chats(corpus: Chats) -> dict[str, Any]:
    """Return what a corpus of conversations holds, for JSON. Records that are wrong are counted."""
    kinds: collections.Counter[str] = collections.Counter()
    messages = answers = 0
    for found in corpus.conversations():
        record = found.record
        kinds[record.kind if isinstance(record, Conversation) else "preferences"] += 1
        said = record.messages if isinstance(record, Conversation) else (*record.prompt, *record.chosen)
        messages += len(said)
        answers += sum(message.role == "assistant" for message in said)
    wrong = {"wrong_records": corpus.skipped.count, "examples": corpus.skipped.examples}
    return {
        "conversations": sum(kinds.values()),
        "kinds": dict(kinds),
        "messages": messages,
        "answers": answers,
        "fields_not_read": list(corpus.unread),
        **wrong,
    }


def text_of_chats(found: dict[str, Any], source: str) -> str:
    """Return the result of ``count_chats`` in words."""
    kinds = ", ".join(f"{kind} ({count:,})" for kind, count in found["kinds"].items()) or "none"
    lines = [
        f"{source}: {found['conversations']:,} conversations, by their fields: {kinds}",
        f"{found['messages']:,} messages, of which {found['answers']:,} are answers",
        f"train.py reads them directly: {typed('train')} {shlex.quote(source)} --train.init-from CHECKPOINT",
    ]
    if found["fields_not_read"]:
        lines.append(f"fields that are not read: {', '.join(found['fields_not_read'])}")
    if found["wrong_records"]:
        lines.append(f"warning: {found['wrong_records']:,} records are wrong: {'; '.join(found['examples'])}")
    return "\n".join(lines)


def _content(record: Conversation | Preference) -> bytes:
    """Return what decides on which side of the split a conversation is: its messages alone."""

    def plain(messages: Sequence[Message]) -> list[Any]:
        return [list(message) for message in messages]

    if isinstance(record, Conversation):
        return json.dumps(plain(record.written())).encode()
    return json.dumps([plain(messages) for messages in record]).encode()
