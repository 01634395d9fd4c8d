"""Tasks in JSON lines: multiple choice, answers to give, conversations to answer, documents to predict.

A record is one of

    {"question" or "context": text, "choices": [text, ...], "answer": number of the right choice, from 0}
    {"question" or "context": text, "answer": text}
    {"messages": [{"role": "user", "content": text}, ...], "answer": text}
    {"text": text}

and may have other keys, which are not read. All records of a file are of one kind.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_jax.chat.messages import Message, as_messages
from llama_jax.cli.json_argument import load_json
from llama_jax.errors import UserError, quoted
from llama_jax.generation.prompts import text_of
from llama_jax.tokenizer import clean

Kind = Literal["choices", "answers", "chats", "texts"]
DESCRIPTIONS: dict[Kind, str] = {
    "choices": "multiple choice",
    "answers": "answers to give",
    "chats": "conversations to answer",
    "texts": "documents to predict",
}
# Kinds whose items have no examples before them.
WITHOUT_SHOTS = ("chats", "texts")
# How a "question" becomes a prompt. A "context" is a prompt as it is.
QUESTION = "Question: {question}\nAnswer:"
# Between the examples of a few-shot prompt, and before what is asked.
BETWEEN_SHOTS = "\n\n"
SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Item:
    """A record of a task."""

    line: int
    """Its line in the file, from 1."""
    prompt: str
    """The text before a choice or an answer. Of a document or a conversation: empty."""
    choices: tuple[str, ...]
    """The choices; or the answer alone; or the document alone."""
    answer: int
    """The number of the right choice, from 0."""
    messages: tuple[Message, ...] = ()
    """The conversation to answer."""
    asks: bool = field(default=False, compare=False)
    """Whether the prompt is a question in the format of questions."""

    @property
    def gold(self) -> str:
        """The right choice, or the answer."""
        return self.choices[self.answer]


@dataclass(frozen=True)
class Task:
    """The records of a file, all of one kind."""

    name: str
    path: str
    kind: Kind
    items: tuple[Item, ...]


def read_tasks(paths: Iterable[str | Path], question_format: str = QUESTION, key: str = "--tasks") -> list[Task]:
    """Read the files of tasks, and those of folders. A task is named after its file, or by its path if names collide.

    ``paths`` is a list, of strings or Paths. ``key`` names the setting in errors. Raises UserError if ``paths`` is
    something else, a file is missing or empty, or a record is not as expected.
    """
    check_format(question_format)
    if isinstance(paths, str | bytes) or not isinstance(paths, Iterable):
        raise UserError(f"{key}: expected a list of paths, found {quoted(paths)}; put it in a list")
    paths = list(paths)
    if other := [path for path in paths if not isinstance(path, str | Path)]:
        raise UserError(f"{key}: expected paths, strings or Paths, found {quoted(other[0])}")
    files = [file for path in paths for file in _files(path, key)]
    resolved = [file.resolve() for file in files]
    for i, file in enumerate(resolved):
        if file in resolved[:i]:
            raise UserError(f"{key}: expected each file once, found {files[i]} twice; leave one out")
    stems = [file.stem for file in files]
    names = [stem if stems.count(stem) == 1 else str(file) for stem, file in zip(stems, files, strict=True)]
    return [
        parse_task(name, str(file), _content(file, key), question_format)
        for name, file in zip(names, files, strict=True)
    ]


def unread(paths: Sequence[str]) -> list[str]:
    """Return lines about folders of tasks that hold more than the files of records in them, which alone are read."""
    lines = []
    for folder in (Path(path) for path in paths if Path(path).is_dir()):
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        others = [entry.name for entry in entries if entry.suffix not in SUFFIXES or not entry.is_file()]
        if others:
            shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
            lines.append(
                f"not read, since only files named {' and '.join(SUFFIXES)} in {folder} are: {len(others)} ({shown})"
            )
    return lines


def check_format(question_format: str) -> None:
    """Raise UserError if a format of questions has no place for the question."""
    if question_format.count("{question}") != 1:
        raise UserError(
            f"--question-format: expected a text with {{question}} in it, once, found {quoted(question_format)}"
        )


def parse_task(name: str, path: str, content: bytes, question_format: str = QUESTION) -> Task:
    """Return the task that the content of a file holds. Raises UserError that names the file, the line and the key."""
    items, kinds = [], list[Kind]()
    # Not splitlines: a text may hold other separators than line feeds.
    for number, line in enumerate(text_of(content, path).split("\n"), 1):
        if not line.strip():
            continue
        kind, item = _record(line, number, f"{path}: line {number}", question_format)
        if kinds and kind != kinds[0]:
            raise UserError(
                f"{path}: line {number}: expected a record like the first, {DESCRIPTIONS[kinds[0]]}, found "
                f"{DESCRIPTIONS[kind]}; give each kind a file of its own"
            )
        kinds.append(kind)
        items.append(item)
    if not items:
        raise UserError(f"{path}: expected one or more records, found none; write a JSON object a line")
    return Task(name, path, kinds[0], tuple(items))


def _files(path: str | Path, key: str) -> list[Path]:
    if not path:  # which would be the folder that one is in
        raise UserError(f"{key}: expected a path, found an empty text; give a file or a folder, or leave it out")
    given = Path(path)
    if not given.is_dir():
        return [given]
    found = sorted(file for file in given.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"{key}: expected JSON lines in the folder {path}, found no file {' or '.join(SUFFIXES)} there")
    return found


def _content(file: Path, key: str) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{key}: expected a file of records in JSON lines, found no file {file}") from None


def _record(line: str, number: int, where: str, question_format: str) -> tuple[Kind, Item]:
    found = load_json(line, where, "a JSON object")
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, found {quoted(found)}")
    prompts = [key for key in ("question", "context") if key in found]
    if "messages" in found and (others := [key for key in (*prompts, "choices") if key in found]):
        raise UserError(
            f"{where}: messages: expected no {others[0]} beside a conversation to answer, found it; leave one of them out"
        )
    if "messages" in found:
        return "chats", Item(number, "", (_answer(found, where),), 0, tuple(_messages(found["messages"], where)))
    if "choices" not in found and "answer" not in found and not prompts and "text" in found:
        return "texts", Item(number, "", (_text(found, "text", where, blank=False),), 0)
    if len(prompts) != 1:
        keys = ", ".join(map(quoted, found)) or "none"
        raise UserError(
            f'{where}: expected one of the keys "question" and "context" (or "messages", for a conversation, or "text" alone, for a document), found '
            f"{'both; put all of it into context' if prompts else keys}"
        )
    prompt = _text(found, prompts[0], where, blank=prompts == ["context"])
    asks = prompts == ["question"]
    if asks:
        prompt = question_format.replace("{question}", prompt)
    if "choices" not in found:
        return "answers", Item(number, prompt, (_answer(found, where),), 0, asks=asks)
    choices = found["choices"]
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UserError(f"{where}: choices: expected a list of two or more texts, found {quoted(choices)}")
    answer = found.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: answer: expected the number of the right choice, 0 to {len(choices) - 1}, found "
            f"{quoted(answer) if 'answer' in found else 'none'}"
        )
    return "choices", Item(number, prompt, tuple(map(clean, choices)), answer, asks=asks)


def _answer(record: dict[str, Any], where: str) -> str:
    answer = record.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(
            f"{where}: answer: expected a text, since the record has no choices, found "
            f"{quoted(answer) if 'answer' in record else 'none'}"
        )
    return clean(answer)


def _messages(found: Any, where: str) -> list[Message]:
    """Return a conversation to answer. Raises UserError if it is none, or nothing of the user is at its end."""
    messages = as_messages(found, f"{where}: messages")
    if messages[-1].role in ("system", "assistant"):
        raise UserError(
            f"{where}: messages: expected the last one from the user, found the {messages[-1].role}; put the answer into answer"
        )
    return messages


def _text(record: dict[str, Any], key: str, where: str, blank: bool) -> str:
    value = record[key]
    if not isinstance(value, str) or not (blank or value.strip()):
        raise UserError(f"{where}: {key}: expected a text, found {quoted(value)}")
    return clean(value)


def check_shots(task: Task, shots: int) -> None:
    """Raise UserError if a task has too few records for ``shots`` examples beside each item."""
    if task.kind not in WITHOUT_SHOTS and shots >= len(task.items):
        raise UserError(
            f"--shots: expected up to {len(task.items) - 1}, since {task.path} has {len(task.items)} records, found {shots}"
        )


def joined(prompt: str, answer: str) -> str:
    """Return the text of an answer behind its prompt, after a space unless one of them has white space there."""
    return ("" if not prompt or prompt[-1].isspace() or answer[0].isspace() else " ") + answer


def shots_of(task: Task, index: int, shots: int, seed: int) -> list[Item]:
    """Return the examples for an item, other records of its file, by the seed and the item's number alone.

    A record with the item's prompt is no example for it, as long as there are enough others.
    """
    if not shots:
        return []
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=16).digest()
    rng = random.Random(int.from_bytes(digest, "big"))
    # random() is the only method of random.Random whose results stay the same across Python versions.
    order = sorted((rng.random(), i) for i in range(len(task.items)) if i != index)
    prompt = task.items[index].prompt
    others = [i for _, i in order if task.items[i].prompt != prompt]
    same = [i for _, i in order if task.items[i].prompt == prompt]
    return [task.items[i] for i in (others + same)[:shots]]


def prompt_of(task: Task, index: int, shots: int = 0, seed: int = 0) -> str:
    """Return the text that an item's choices follow: the examples, with their answers, and the item's own prompt."""
    item = task.items[index]
    examples = [one.prompt + joined(one.prompt, one.gold) for one in shots_of(task, index, shots, seed)]
    return BETWEEN_SHOTS.join([*examples, item.prompt])
