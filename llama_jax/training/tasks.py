"""Tasks that are scored at every evaluation of a run (train.eval_tasks)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_jax.chat.formats import ChatSetup
from llama_jax.chat.messages import Message
from llama_jax.config import ModelArgs
from llama_jax.data import AnyData
from llama_jax.devices.distributed import on_main, text_from_main
from llama_jax.errors import UserError
from llama_jax.evaluate.report import remarks
from llama_jax.evaluate.scores import Asked, asked, evaluate_task
from llama_jax.evaluate.tasks import Item, Task, read_tasks
from llama_jax.generation import Model
from llama_jax.model import Llama
from llama_jax.training.start import evaluated

if TYPE_CHECKING:
    from llama_jax.training.run import Run

SETTING = "train.eval_tasks"
# The value of each kind of task that a record has, as task/<name>/<value>.
VALUES = {"choices": "accuracy", "answers": "accuracy", "chats": "accuracy", "texts": "loss"}


class EncodedTask(NamedTuple):
    """A task, and its items in the form that the model gets."""

    task: Task
    items: Sequence[Asked]


class _StopAsked(Exception):
    """A signal arrived while a task was scored."""


def read_on_main(paths: Sequence[str]) -> list[Task]:
    """Return the tasks of the files, which process 0 reads for all. Raises UserError if a file or a record is wrong."""
    if not paths:
        return []
    found: list[Task] = []

    def read() -> int:
        found.extend(read_tasks(paths, key=SETTING))
        return 0

    on_main(read)
    tables = json.loads(text_from_main(json.dumps([asdict(task) for task in found])))
    return [Task(t["name"], t["path"], t["kind"], tuple(map(_item, t["items"]))) for t in tables]


def _item(table: dict[str, Any]) -> Item:
    messages = tuple(Message(*message) for message in table["messages"])
    return Item(**table | {"choices": tuple(table["choices"]), "messages": messages})


def encode_tasks(
    tasks: Sequence[Task], model: ModelArgs, data: AnyData, module: Llama, chat: ChatSetup
) -> list[EncodedTask]:
    """Encode the tasks for the model to train, conversations in the format of ``chat``.

    Raises UserError if a record does not fit it, or if nothing is held out, so that nothing is ever evaluated.
    """
    if tasks and not evaluated(data):
        raise UserError(
            f"{SETTING}: expected a held-out text beside the tasks, since they are scored when it is, found none; "
            "set data.train_size below 1, or data.eval_filepath"
        )
    untrained = Model(model, None, data.tokenizer, module, setup=chat)
    return [EncodedTask(task, asked(untrained, task)) for task in tasks]


def digests_of(tasks: Sequence[Task]) -> dict[str, str]:
    """Return a digest of the items of each task, by its name."""
    return {task.name: hashlib.sha256(repr((task.kind, task.items)).encode()).hexdigest()[:16] for task in tasks}


def changed_tasks(tasks: Sequence[Task], now: Mapping[str, str], before: Mapping[str, str]) -> list[str]:
    """Return lines about tasks with other items than when they were scored last, by the digests of ``now`` and then."""
    return [
        f"warning: {SETTING}: {task.path} has other items than when it was scored last: its scores of before and of now "
        "cannot be compared"
        for task in tasks
        if before.get(task.name, now[task.name]) != now[task.name]
    ]


def remarks_on(tasks: Sequence[EncodedTask], context: int) -> list[str]:
    """Return lines about items that lose their beginning to a context of ``context`` tokens, or have a choice twice."""
    lines = []
    for task, items in tasks:
        counts = {"n": len(items), "cut": sum(item.cut > 0 for item in items), "bits_per_byte": 0.0}
        lines += remarks(task, counts, context)
    return lines


def task_scores(run: "Run", params: Any) -> tuple[dict[str, float], int]:
    """Return the score of each task as a value for a record, or none and the signal that arrived meanwhile."""
    stop = 0

    def heed(_: int) -> None:
        nonlocal stop
        with run.clock.spent_on("evaluation"):  # tells the watchdog of each batch
            stop = run.stop_asked()
        if stop:
            raise _StopAsked

    if not run.tasks:
        return {}, 0
    model = Model(run.config.model, run.whole(params), run.data.tokenizer, run.module)
    values = {}
    try:
        for task, items in run.tasks:
            summary = evaluate_task(model, task, on_batch=heed, items=items).summary
            value = VALUES[task.kind]
            values[f"task/{task.name}/{value}"] = summary[value]
    except _StopAsked:
        return {}, stop
    return values, 0
