"""Sample answers of a run on conversations: to a few held-out questions, the same at every evaluation."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.chat.formats import ChatFormat, ChatSetup
from llama_jax.config import SampleArgs
from llama_jax.data import AnyData
from llama_jax.data.conversations import Conversations, runs_of
from llama_jax.data.opened import chats_in
from llama_jax.generation import Model
from llama_jax.storage.files import write_atomically
from llama_jax.tokenizer import Tokenizer

# Questions that are answered at each evaluation, and the most tokens of an answer.
QUESTIONS, ANSWER_TOKENS = 4, 128
# So many conversations are tried for a question.
TRIES = 64


@dataclass(frozen=True)
class Question:
    """The tokens up to the last answer of a conversation, their text, and the answer that was held out."""

    ids: tuple[int, ...]
    text: str
    expected: str


def questions_of(data: AnyData, seed: int, length: int) -> list[Question]:
    """Return a few questions that leave room for an answer, by chance of ``seed``. Of texts there are none.

    They are held out, or, if nothing is, those of conversations to train on.
    """
    found: list[Question] = []
    for source in chats_in(data).values():
        streams = [stream for stream in (source.tokens.eval, source.tokens.train) if stream.size]
        assert isinstance(streams[0], Conversations)
        chosen = np.random.default_rng(seed).permutation(streams[0].records)[:TRIES]
        asked = (_question(streams[0], streams[0].asked(int(record)), data.tokenizer) for record in chosen)
        found += [question for question in asked if question is not None and len(question.ids) < length][:QUESTIONS]
    return found[:QUESTIONS]


def _question(conversations: Conversations, number: int, tokenizer: Tokenizer) -> Question | None:
    ids, counted = conversations.conversation(number)
    answers = [run for is_answer, run in runs_of(counted) if is_answer]
    if not answers or not answers[-1].start:
        return None
    prompt, answer = ids[: answers[-1].start].tolist(), ids[answers[-1]].tolist()
    return Question(tuple(prompt), tokenizer.decode(prompt, specials=True), tokenizer.decode(answer).strip())


def answer(
    model: Model,
    questions: Sequence[Question],
    setup: ChatSetup,
    chat: ChatFormat,
    on_progress: Callable[[object], None],
) -> list[str]:
    """Return the likeliest answer to each question, token by token."""
    args = SampleArgs(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
    ends = frozenset(setup.end_ids or (model.tokenizer.eos_id,)) | chat.end_ids
    rows = model.rows([question.ids for question in questions], args)
    return [completion.text.strip() for completion in model.completions(rows, on_progress, ends)]


def keep_until(path: Path, step: int) -> None:
    """Remove from a file of answers those of later steps than ``step``, from which a run resumes."""
    if path.exists():
        write_atomically(path, "".join(line for line in path.read_text().splitlines(True) if _step_of(line) <= step))


def append(path: Path, step: int, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Add the answers of a step to a file, in JSON lines. The line of a kill is left out at the next start."""
    records: list[dict[str, Any]] = [
        {"step": step, "prompt": question.text, "answer": given, "expected": question.expected}
        for question, given in zip(questions, answers, strict=True)
    ]
    with open(path, "a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def _step_of(line: str) -> float:
    """Return the step of a line. One that a kill has cut is of no step."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, TypeError, KeyError):
        return float("inf")
