"""The command line of evaluation: ``python -m llama_jax.evaluate --ckpt runs/x``, with ``--text`` or ``--tasks``."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli.flags import ESCAPED, given_twice, parse_flags, refuse_empty
from llama_jax.config import BadRecords, Cache, MeshArgs, Weights
from llama_jax.errors import UserError, run_command
from llama_jax.programs import typed
from llama_jax.storage.files import is_address
from llama_jax.train_args import DType

if TYPE_CHECKING:
    from llama_jax.checkpoint.adapted import WholeModel
    from llama_jax.evaluate.tasks import Task
    from llama_jax.generation import Model

# The default mesh. It is passed on as None, which places the model on the fewest devices that hold it.
ONE_DEVICE = MeshArgs(data=1)
WINDOWS = 8


@dataclass(frozen=True)
class Arguments:
    """Score a text, or score tasks, and print JSON lines.

    With --text, the line holds loss (nats per token), perplexity, bits_per_byte, tokens, bytes, lost_share, window,
    stride and bos. lost_share is the share of the text's bytes that the tokenizer does not restore. bits_per_byte is
    null unless it is 0.
    With --tasks, there is a line per checkpoint and task, which holds task, ckpt, n, accuracy, accuracy_norm, stderr
    and others. A table goes to standard error.
    """

    ckpt: tuple[str, ...] = ()
    """One or more checkpoints: run folders (their best steps), step folders, or converted checkpoints.
    A folder of Meta's, Hugging Face's or Mistral's, or a file of llama2.c's, is converted once into a cache.
    A low-rank adapter is loaded with its base."""
    adapter: str = ""
    """Low-rank adapter of the model in --ckpt to use: a run folder or a checkpoint. Empty: none, or that of --ckpt."""
    text: str = ""
    """A text: a file, a folder, a glob or an address; plain text or records, as --data.filepath of training.
    Files, or the texts of records, are joined, with a BOS before each."""
    tasks: tuple[str, ...] = ()
    """Tasks: files in JSON lines, or folders of them. A record is {"question" or "context", "choices": [...],
    "answer": number of the right choice, from 0}, {"question" or "context", "answer": text},
    {"messages": a conversation, "answer": text}, or {"text"}."""
    shots: int = 0
    """With --tasks: number of examples before each item. They are other records of the same file."""
    seed: int = 0
    """With --tasks: seed that decides which examples an item has."""
    question_format: str = field(default="Question: {question}\nAnswer:", metadata=ESCAPED)
    r"""With --tasks: how a "question" becomes a prompt. A "context" is a prompt as it is.
    The escapes \n, \r, \t and \\ mean line feed, carriage return, tab and backslash."""
    chat_template: str = ""
    """With --tasks: how a record's "messages" are encoded: a file with a template in Jinja, or llama2, llama3, chatml,
    zephyr, vicuna, plain or instruction. Empty: the model's own."""
    output: str = ""
    """With --tasks: file for the JSON lines with per_item, which holds what the model says of each item."""
    make_suite: str = ""
    """Write the small suite of tasks about the built-in stories to this folder, and exit."""
    text_field: str = ""
    """Field of the records of --text that holds the text. Empty: "text", or else the only field with texts."""
    as_text: bool = False
    """Read the files of --text as plain text even if they look like something else, such as JSON lines or HTML.
    Bytes that are not UTF-8 become U+FFFD."""
    bad_records: BadRecords = "error"
    """Records of --text that cannot be read: error (stop at the first) or skip (leave them out and count them)."""
    window: int = 0
    """With --text: number of positions in a forward pass. 0: the model's context."""
    stride: int = 0
    """With --text: number of positions between the starts of two windows. A stride below the window gives each token
    more context. 0: the window."""
    batch_size: int = 0
    """Number of windows of a text, or items of a task, in a forward pass. 0: 8 windows, or as many items as fill it."""
    compute_dtype: DType = "auto"
    """Data type of activations and matmuls. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    weights: Weights = "auto"
    """Quantization of the matrices: int8, int4 or int4-64. auto: as stored."""
    cache: Cache = "auto"
    """With --text: quantization of keys and values. int8: score token by token, each against an int8 cache, which is
    slower. auto: none."""
    mesh: MeshArgs = ONE_DEVICE


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv``. None: that of this process."""
    program = typed("evaluate")
    description = (
        f"Score a text or tasks: {program} --ckpt runs/x --text held_out.txt, or "
        f"{program} --ckpt runs/x runs/y --tasks questions.jsonl"
    )
    args = parse_flags(Arguments, argv, Arguments(), program, description)
    refuse_empty(argv, args, ("adapter", "chat_template", "text_field", "output", "make_suite"))
    _tell(given_twice(Arguments, argv))
    if args.make_suite:
        if args != Arguments(make_suite=args.make_suite):
            raise UserError(
                "--make-suite: expected no flags beside it, found others; leave them out, and score the suite then"
            )
        from llama_jax.evaluate.suite import make_suite

        make_suite(args.make_suite)
        return
    _check(args)
    try:
        (_score_tasks if args.tasks else _score_text)(args)
    except UserError as error:  # of what training shares, which names its own flags
        raise UserError(str(error).replace("--data.", "--")) from error


def _check(args: Arguments) -> None:
    """Raise UserError if flags are missing, do not go together, or have impossible values."""
    if not args.ckpt or "" in args.ckpt:
        raise UserError("--ckpt: expected a path, found none")
    if bool(args.text) == bool(args.tasks):
        found = "both; leave one out" if args.text else "none"
        raise UserError(f"--text: expected a path, or --tasks with files of records, found {found}")
    if "" in args.tasks:
        raise UserError("--tasks: expected a path, found none")
    places = [os.path.normpath(path) if not is_address(path) else path for path in args.ckpt]
    for path, place in zip(args.ckpt, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"--ckpt: expected each checkpoint once, found {path} twice; leave one out")
    if args.adapter and len(args.ckpt) > 1:
        raise UserError(
            f"--adapter: expected one checkpoint beside it, found {len(args.ckpt)}; name runs of adapters in --ckpt instead"
        )
    lowest = {"shots": 0, "seed": 0, "batch_size": 0}
    for name, least in lowest.items():
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}: expected {least} or more, found {getattr(args, name)}")
    args.mesh.check()
    of_tasks = ("shots", "seed", "question_format", "chat_template", "output")
    of_text = ("text_field", "as_text", "bad_records", "window", "stride", "cache")
    default = Arguments()
    for name in of_tasks if args.text else of_text:
        if getattr(args, name) != getattr(default, name):
            flag, other = name.replace("_", "-"), "tasks" if args.text else "text"
            raise UserError(f"--{flag}: expected --{other} beside it, found --{'text' if args.text else 'tasks'}")


def _score_text(args: Arguments) -> None:
    """Print a line per checkpoint about a text. With several, each line names its own."""
    from llama_jax.convert.once import open_model
    from llama_jax.evaluate.text import evaluate
    from llama_jax.evaluate.trained_on import trained_on

    opened = {path: open_model(path, args.adapter) for path in args.ckpt}
    for path, checkpoint in opened.items():
        model = _load(args, path, checkpoint)
        found = evaluate(
            model, args.text, args.window, args.stride, args.batch_size or WINDOWS, args.as_text, args.text_field,
            args.bad_records == "skip",
        )  # fmt: skip
        named = {"ckpt": path} if len(args.ckpt) > 1 else {}
        print(json.dumps(named | found, allow_nan=False), flush=True)
    _tell(trained_on(opened, args.text, args.as_text, args.text_field))


def _score_tasks(args: Arguments) -> None:
    """Print a line per checkpoint and task, then the table, and write --output. All files are checked first."""
    from llama_jax.convert.once import open_model
    from llama_jax.evaluate import report
    from llama_jax.evaluate.scoring import context_of
    from llama_jax.evaluate.tasks import check_shots, read_tasks, unread

    tasks = read_tasks(args.tasks, args.question_format)
    _tell(unread(args.tasks))
    for task in tasks:
        check_shots(task, args.shots)
    if args.output:
        _tell(report.check_output(Path(args.output), {(path, task.name) for path in args.ckpt for task in tasks}))
    # A model of another project is converted here, which tells its own progress.
    opened = [(path, open_model(path, args.adapter)) for path in args.ckpt]
    _tell(_idle(args, tasks))
    summaries, lines = [], list[str]()
    for path, checkpoint in opened:
        model = _load(args, path, checkpoint)
        if any(task.kind == "chats" for task in tasks):
            _tell(model.chat_format.notes)
        for task in tasks:
            result = _score_task(args, model, task)
            summary = {"task": task.name, "ckpt": path} | result.summary
            print(json.dumps(summary, allow_nan=False), flush=True)
            summaries.append(summary)
            lines.append(json.dumps(summary | {"per_item": result.per_item}, allow_nan=False))
            _tell(report.remarks(task, summary, context_of(model)))
            if args.output:
                report.write_output(Path(args.output), lines)
    _tell([report.table(summaries)])


def _idle(args: Arguments, tasks: "Sequence[Task]") -> list[str]:
    """Return lines about flags without effect on the tasks. Raises UserError if a chat template cannot be read."""
    from llama_jax.chat.formats import read_template
    from llama_jax.evaluate.tasks import DESCRIPTIONS, WITHOUT_SHOTS

    lines, default = [], Arguments()
    for task in tasks:
        if args.shots and task.kind in WITHOUT_SHOTS:
            lines.append(f"--shots: no effect on {task.path}, whose records are {DESCRIPTIONS[task.kind]}")
    if args.chat_template:
        read_template(args.chat_template)
        if all(task.kind != "chats" for task in tasks):
            lines.append("--chat-template: no effect, since no record has messages")
    asks = any(item.asks for task in tasks for item in task.items)
    if args.question_format != default.question_format and not asks:
        lines.append("--question-format: no effect, since no record has a question")
    if args.seed != default.seed and not args.shots:
        lines.append("--seed: no effect without --shots")
    return lines


def _score_task(args: Arguments, model: "Model", task: "Task") -> Any:
    """Score one task, under a progress bar on standard error."""
    from llama_jax.cli.progress import Progress
    from llama_jax.evaluate.report import counting
    from llama_jax.evaluate.scores import evaluate_task

    with Progress(f"evaluating {task.name}", len(task.items), "item", stream=sys.stderr) as progress:
        return evaluate_task(model, task, args.shots, args.seed, args.batch_size, counting(progress))


def _load(args: Arguments, path: str, checkpoint: "WholeModel") -> "Model":
    from llama_jax.cli.progress import working
    from llama_jax.generation import Model

    if note := checkpoint.note(args.weights):
        _tell([f"{path}: {note}"])
    with working(f"loading {path}", sys.stderr):
        mesh = None if args.mesh == ONE_DEVICE else args.mesh
        return Model.load(
            checkpoint, args.compute_dtype, args.weights, args.cache, mesh, chat_template=args.chat_template
        )


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
