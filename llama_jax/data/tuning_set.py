"""Makes a token folder out of conversations: encoded in the model's format, with a mask of what counts."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.chat.formats import ChatFormat, ChatSetup, choose, tokens_of
from llama_jax.chat.messages import Message
from llama_jax.chat.named import INSTRUCTION, NAMED, PLAIN
from llama_jax.cli.progress import Progress
from llama_jax.config import DataArgs
from llama_jax.data.chat_records import INPUT, INPUT_HEADING, PREFERENCES, Conversation, Preference
from llama_jax.data.chat_workers import Asked, Ids, Task, encode_tasks
from llama_jax.data.chats import Chats, Found, Wrong
from llama_jax.data.conversations import PAIRED, ChatTokens, counted_name, open_chats, runs_of
from llama_jax.data.corpus import WithHeldOut
from llama_jax.data.finding import Text
from llama_jax.data.manifest import (
    DOCUMENTS,
    DTYPES,
    MANIFEST,
    SUMS,
    VERSION,
    ChatCounts,
    Manifest,
    digests_of_files,
    read_manifest,
    write_manifest,
)
from llama_jax.data.parts import SPLITS, Skipped
from llama_jax.data.stream import BLOCK_BYTES, checksums
from llama_jax.data.tokens import token_files
from llama_jax.errors import UserError
from llama_jax.storage.files import replacing
from llama_jax.tokenizer import Tokenizer

# The layout of a kind of records for models without a chat template.
LAYOUTS = {"prompt and completion": "plain", "instruction and output": "instruction"}


@dataclass(frozen=True)
class Talking:
    """A model's part in conversations: its chat template, its name, and its context in tokens."""

    setup: ChatSetup
    source: str
    length: int
    preferences: bool = False
    """Whether it is tuned on pairs of answers, by DPO."""


def format_of(args: DataArgs, tokenizer: Tokenizer, talking: Talking, kind: str) -> ChatFormat:
    """Return the format in which conversations are encoded, with notes about how it was chosen.

    It is the one that is asked for, else that of the model, else a layout for records of this ``kind``. Raises
    UserError if there is none.
    """
    setup, given = talking.setup, args.chat_template
    try:
        return replace(found := choose(tokenizer, setup, given, talking.source), name=_named(found, given))
    except UserError as error:
        if given or setup.template:
            raise UserError(str(error).replace("--chat-template", "--data.chat-template")) from None
    if kind not in LAYOUTS:
        raise UserError(
            f"data.chat_template: expected a model with a chat template, to tune it on {kind}, found none in {talking.source}; choose one: "
            f"--data.chat-template {', '.join(list(NAMED)[:-1])} or {list(NAMED)[-1]}, or a file"
        )
    layout = LAYOUTS[kind]
    note = (
        f"{talking.source} has no chat template: its records of {kind} are written in the layout {layout}; "
        "--data.chat-template chooses another"
    )
    tokens = dict(tokens_of(tokenizer)) | ({} if tokenizer.adds_bos else {"bos_token": ""})
    return ChatFormat(tokenizer, NAMED[layout].template, layout, tokens, (note,))


def _named(found: ChatFormat, given: str) -> str:
    return given or found.name


def kept_setup(setup: ChatSetup, chat_format: ChatFormat) -> ChatSetup:
    """Return what checkpoints keep of a model that was tuned in a format, so that sample.py talks in the same one."""
    usual = dict(tokens_of(chat_format.tokenizer))
    tokens = dict(chat_format.tokens)
    return replace(setup, template=chat_format.template, has_none=False, tokens={} if tokens == usual else tokens)


def encode_chats(
    args: DataArgs,
    text: Text,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    talking: Talking,
    folder: Path,
    workers: int | None = None,
) -> ChatTokens:
    """Return the conversations of ``text`` from ``folder`` if it holds exactly these, else newly encoded there.

    ``workers``: the most processes that encode. None: one per core.
    Raises UserError if a record is wrong and none may be skipped, or if no conversation is left to train on.
    """
    settings, length = settings_of(args, chat_format, talking), talking.length
    if (kept := _kept(folder, text, tokenizer, settings)) is not None:
        return kept
    corpora = [text.corpus.train, text.corpus.eval] if isinstance(text.corpus, WithHeldOut) else [text.corpus]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    dtype = np.dtype(DTYPES[tokenizer.vocab_size > 1 << 16])
    with contextlib.ExitStack() as files:
        paths = {
            name: files.enter_context(replacing(folder / name))
            for name in (DOCUMENTS, SUMS, *(f"{split}.bin" for split in SPLITS), *map(counted_name, SPLITS))
        }
        opened = {
            split: [files.enter_context(open(paths[name], "wb")) for name in (f"{split}.bin", counted_name(split))]
            for split in SPLITS
        }
        writers = {split: _Writer(dtype, *opened[split]) for split in SPLITS}
        seen = set[bytes]() if len(corpora) > 1 else None
        encoder = _Encoder(args, chat_format, length, writers, talking.preferences, seen=seen)
        for number, corpus in enumerate(corpora):
            assert isinstance(corpus, Chats)
            encoder.add_all(corpus, "eval" if number else None, workers or os.cpu_count() or 1, text.of)
        encoder.check(text.source, text.corpus.skipped)
        sums = np.concatenate([writers[split].finish() for split in SPLITS])
        starts = np.concatenate([np.array(writers[split].starts, "<u8") for split in SPLITS])
        paths[SUMS].write_bytes(sums.tobytes())
        paths[DOCUMENTS].write_bytes(starts.tobytes())
        for split in SPLITS:
            for file in opened[split]:
                file.close()
        text.corpus.check_unchanged()
        digests = {name: _digest(path) for name, path in paths.items()}
    manifest = _manifest(text, tokenizer, chat_format, settings, encoder, digests, dtype.str)
    write_manifest(folder, manifest)
    for path in token_files(folder):
        if path.name not in manifest.sha256:
            path.unlink()
    return open_chats(folder)


def settings_of(args: DataArgs, chat_format: ChatFormat, talking: Talking) -> dict[str, str]:
    """Return what decides the tokens of conversations, besides these and the tokenizer."""
    template = f"{chat_format.template} {sorted(chat_format.tokens.items())}"
    return {
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
        "loss_on": args.loss_on,
        "too_long": args.too_long,
        "max_seq_len": str(talking.length),
        **({PAIRED: "dpo"} if talking.preferences else {}),
    }


def _kept(folder: Path, text: Text, tokenizer: Tokenizer, settings: dict[str, str]) -> ChatTokens | None:
    """Return the conversations in ``folder`` if they are these and intact, else None."""
    try:
        manifest = read_manifest(folder)
        if manifest is None or manifest.chats is None or manifest.chats.settings != settings:
            return None
        if (manifest.text_sha256, manifest.tokenizer_sha256) != (text.corpus.digest(), tokenizer.digest):
            return None
        return open_chats(folder)
    except UserError as error:
        print(f"warning: {error}: made again from the conversations", flush=True)
        return None


class _Writer:
    """Writes the conversations of a split: their tokens, their mask, and where they begin."""

    def __init__(self, dtype: np.dtype, ids: BinaryIO, counted: BinaryIO):
        self._dtype, self._ids, self._counted = dtype, ids, counted
        self._bits = np.zeros(0, np.uint8)
        self._rest, self._sums = b"", list[int]()
        self.starts: list[int] = []
        self.tokens = self.largest = 0

    def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
        """Write a conversation."""
        self.starts.append(self.tokens)
        self.tokens += len(ids)
        self.largest = max(self.largest, int(ids.max()))
        raw = ids.astype(self._dtype).tobytes()
        self._ids.write(raw)
        self._rest += raw
        if len(self._rest) >= BLOCK_BYTES:
            whole = len(self._rest) // BLOCK_BYTES * BLOCK_BYTES
            self._sums += checksums(self._rest[:whole])
            self._rest = self._rest[whole:]
        bits = np.concatenate([self._bits, counts])
        whole = len(bits) // 8 * 8
        self._counted.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._bits = bits[whole:]

    def finish(self) -> np.ndarray:
        """Write what is left. Return the checksums of the tokens, uint32 [blocks]."""
        self._counted.write(np.packbits(self._bits, bitorder="little").tobytes())
        return np.array(self._sums + checksums(self._rest), "<u4")


@dataclass
class _Encoder:
    """Encodes records one by one, and counts what becomes of them."""

    args: DataArgs
    chat_format: ChatFormat
    length: int
    writers: dict[str, _Writer]
    preferences: bool = False
    kinds: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    cut: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    without_target: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    alike: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    text_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    empty: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    longest: int = 0
    systems: int = 0
    repeated: int = 0
    copies: int = 0
    unread: dict[str, None] = field(default_factory=dict)
    seen: set[bytes] | None = None
    """The digests of records to train on, with which held-out ones are compared. None: a hash keeps copies together."""

    def add_all(self, corpus: Chats, split: str | None, workers: int, of: str) -> None:
        """Encode the records of a corpus, and write those that are not left out.

        ``split`` is that of all. None: a hash decides. Progress says ``of`` what.
        """

        def tasks() -> Iterator[Task[Found | Wrong]]:
            for found in corpus.found():
                yield Task(found, UserError(found.fault) if isinstance(found, Wrong) else self._asked(found))

        total = corpus.count()
        with Progress(f"conversations{of}", total, "conversations") as progress:
            began = time.monotonic()
            for done, (found, encoded) in enumerate(encode_tasks(tasks(), self.chat_format, workers), 1):
                if isinstance(encoded, UserError) or isinstance(found, Wrong):
                    corpus.refuse(found.file, found.number, str(encoded))
                else:
                    self._add(found, encoded, split or found.split)
                progress.note(f"{done / max(1e-9, time.monotonic() - began):,.0f}/s")
                progress.update()
        self.unread.update(corpus.unread)

    def _add(self, found: Found, encoded: list[Ids], split: str) -> None:
        """Count a record, and write it unless it is left out."""
        examples = self._of_pair(found, encoded) if isinstance(found.record, Preference) else encoded
        kind = found.record.kind if isinstance(found.record, Conversation) else PREFERENCES
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.text_bytes[found.split] += self._bytes(found.record)
        longest = max(len(ids) for ids, _ in examples)
        self.longest = max(self.longest, longest)
        # All tokens but the last are inputs, of which a sequence has room for max_seq_len.
        too_long = longest > self.length + 1
        if too_long and self.args.too_long == "drop":
            self.dropped[split] += 1
            return
        examples = [Ids(ids[: self.length + 1], counts[: self.length + 1]) for ids, counts in examples]
        targets = [len(ids) - 1 if self.args.loss_on == "all" else int(counts[1:].sum()) for ids, counts in examples]
        if not all(targets):
            self.without_target[split] += 1
            return
        if self.preferences and all(map(np.array_equal, *examples)):
            self.alike[split] += 1
            return
        self._remark(found, split)
        self.cut[split] += too_long
        self.targets[split] += sum(targets)
        for ids, counts in examples:
            self.writers[split].add(ids, counts)

    def _remark(self, found: Found, split: str) -> None:
        """Count what is odd about a record that is written."""
        record = found.record
        answers = record.messages if isinstance(record, Conversation) else (*record.chosen, *record.rejected)
        self.empty[split] += sum(m.role == "assistant" and not m.content.strip() for m in answers)
        self.systems += found.has_system
        self.repeated += found.repeated
        if self.seen is not None:
            self.copies += split == "eval" and found.digest in self.seen
            self.seen |= {found.digest} if split == "train" else set()

    def _asked(self, found: Found) -> Asked:
        """Return the conversations of a record, or what is wrong with it."""
        record, template = found.record, self.chat_format.template
        if isinstance(record, Preference) != self.preferences:
            return UserError(
                f"expected a preference (prompt, chosen, rejected), of which train.objective dpo learns, found a record of {record.kind}"
                if isinstance(record, Conversation)
                else "expected a conversation, found a preference (prompt, chosen, rejected), of which --train.objective dpo learns"
            )
        if found.has_system and template == PLAIN:
            return UserError(
                "system: expected none, as the layout plain has no place for a system message, found one; choose a format that has one "
                "with --data.chat-template"
            )
        if isinstance(record, Preference):
            return [[*record.prompt, *answer] for answer in (record.chosen, record.rejected)]
        if template in (PLAIN, INSTRUCTION) and not self.args.chat_template:
            wanted = LAYOUTS.get(record.kind)
            if wanted is None or NAMED[wanted].template != template:
                return UserError(
                    f"expected records of one kind, as the model has no chat template, found {record.kind}; choose a format for all with "
                    "--data.chat-template"
                )
        return [self._written(record)]

    def _written(self, record: Conversation) -> list[Message]:
        return record.written(INPUT_HEADING if self.chat_format.template == INSTRUCTION else INPUT)

    def _bytes(self, record: Conversation | Preference) -> int:
        """Return the size of a record's messages in UTF-8."""
        parts = [self._written(record)] if isinstance(record, Conversation) else record
        return sum(len(message.content.encode()) for part in parts for message in part)

    def _of_pair(self, found: Found, encoded: list[Ids]) -> list[Ids]:
        """Return the examples of a chosen and of a rejected answer. Answers within the prompt do not count."""
        assert isinstance(found.record, Preference)
        before = sum(message.role == "assistant" for message in found.record.prompt)
        for _, counts in encoded:
            answers = [run for counted, run in runs_of(counts.astype(bool)) if counted]
            for run in answers[:before]:
                counts[run] = 0
        return encoded

    def check(self, source: str, skipped: Skipped) -> None:
        """Raise UserError if nothing is left to train on."""
        if self.writers["train"].starts:
            return
        held_out = len(self.writers["eval"].starts) // (1 + self.preferences)
        left_out = {
            "too long": sum(self.dropped.values()), "without a token that counts": sum(self.without_target.values()),
            "with two answers that are the same": sum(self.alike.values()), "held out": held_out,
        }  # fmt: skip
        words = [f"{count:,} {what}" for what, count in left_out.items() if count]
        words += [f"{skipped.count:,} wrong: {'; '.join(skipped.examples)}"] if skipped.count else []
        why = f" ({', '.join(words)})" if words else ""
        raise UserError(
            f"data.filepath: expected {PREFERENCES if self.preferences else 'conversations'} to train on, found none in {source}{why}; give more, or a "
            "larger data.train_size or model.max_seq_len"
        )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(
    text: Text,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    settings: dict[str, str],
    encoder: _Encoder,
    digests: dict[str, str],
    dtype: str,
) -> Manifest:
    corpus, writers = text.corpus, encoder.writers
    return Manifest(
        version=VERSION,
        text_sha256=corpus.digest(),
        train_size=corpus.train_size,
        separator="",
        tokenizer_sha256=tokenizer.digest,
        tokenizer_files=digests_of_files(tokenizer),
        trained_vocab_size=0,
        dtype=dtype,
        tokens={split: writers[split].tokens for split in SPLITS},
        text_bytes=encoder.text_bytes,
        documents={split: len(writers[split].starts) for split in SPLITS},
        replaced_sequences=corpus.replaced,
        source=text.source,
        text_files=corpus.files,
        vocab_size=tokenizer.vocab_size,
        largest_id={split: writers[split].largest for split in SPLITS},
        block_bytes=BLOCK_BYTES,
        sha256=digests,
        text_field=corpus.text_field,
        held_out=corpus.held_out,
        eval_source=text.eval_source,
        eval_files=corpus.eval_files,
        skipped_records=corpus.skipped.count,
        skipped_examples=corpus.skipped.examples,
        chats=ChatCounts(
            settings, chat_format.name, encoder.kinds, encoder.targets, encoder.cut, encoder.dropped, encoder.without_target,
            encoder.longest, encoder.alike, list(encoder.unread), encoder.systems, encoder.empty, encoder.repeated,
            encoder.copies,
        ),
    )  # fmt: skip
