"""The command line of generation: complete prompts, save results, or chat.

All flags are read and checked before any slow import.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from llama_jax.cli.flags import ESCAPED, given_twice, parse_flags, refuse_empty
from llama_jax.cli.json_argument import json_argument
from llama_jax.cli.telling import tell
from llama_jax.config import Cache, MeshArgs, SampleArgs, Weights
from llama_jax.errors import UserError
from llama_jax.programs import typed
from llama_jax.tokenizer import clean
from llama_jax.train_args import DType

if TYPE_CHECKING:
    from llama_jax.checkpoint.adapted import WholeModel
    from llama_jax.generation.prompts import Asked, Job
    from llama_jax.generation.results import Results

# The default of --infill: there is nothing around a gap, so there is none.
NO_GAP = ("", "")
# The default mesh. It is passed on as None, which places the model on the fewest devices that hold it.
ONE_DEVICE = MeshArgs(data=1)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Complete prompts with a trained model, or talk to a chat model."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to complete. They are used literally: a backslash stays a backslash.
    If there are none, prompts are read from standard input, one per line."""
    ckpt: str = ""
    """Checkpoint to load: a run folder (its best step), a step folder or a converted checkpoint.
    A folder of Meta's, Hugging Face's or Mistral's, or a file of llama2.c's, is converted once into a cache.
    A low-rank adapter is loaded with its base."""
    adapter: str = ""
    """Low-rank adapter of the model in --ckpt to use: a run folder or a checkpoint. Empty: none, or that of --ckpt."""
    chat: bool = False
    """Answer prompts, each separately, in the format that the model was tuned on (its chat template).
    Without prompts, hold a conversation in which each line of standard input is a turn."""
    chat_template: str = ""
    """With --chat: the format of conversations, instead of the model's own.
    A file with a template in Jinja, as transformers reads it, or llama2, llama3, chatml, zephyr,
    vicuna, plain or instruction."""
    system: str = dataclasses.field(default="", metadata=ESCAPED)
    r"""With --chat: the system message, which precedes the conversation.
    The escapes \n, \r, \t and \\ mean line feed, carriage return, tab and backslash."""
    messages: str = ""
    """With --chat: a JSON file with a conversation to answer. It is a list of {"role": "...", "content": "..."}.
    The role is "system", "user", "assistant", or another that the format knows, such as "tool"."""
    prompts_file: str = ""
    """File with one prompt per line. -: standard input.
    In a .jsonl file, each line is a JSON object with "prompt" and, optionally, its own settings, such as "top_p".
    "messages" in place of "prompt" is a conversation to answer. "max_tokens" is another name of "max_new_tokens"."""
    infill: tuple[str, str] = NO_GAP
    """A prefix and a suffix: generate the text between them, with a model that has Code Llama's vocabulary.
    In a .jsonl file, a line has "prefix" and "suffix" in place of "prompt". With --echo, print the whole text."""
    too_long: Literal["refuse", "skip", "cut"] = "refuse"
    """How to treat a prompt that fills the context. refuse: exit with an error.
    skip: do not complete it; its result says too_long.
    cut: leave out its beginning (of a conversation, the oldest turns)."""
    output: str = ""
    """Append each result to this file as soon as it is complete, one JSON object per line.
    Rerun the same command to resume after a stop."""
    json: bool = False
    """Print one JSON object per completion."""
    quiet: bool = False
    """Do not print progress, or the speed at the end."""
    exact: bool = False
    """Make each completion bit-identical whatever else is in the batch, and with or without --draft.
    It is slower, and holds for every data type and cache.
    Without it, completions are equal up to rounding, which in bfloat16 occasionally changes a token."""
    compute_dtype: DType = "auto"
    """Data type of activations and matmuls. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    weights: Weights = "auto"
    """Quantization of the weight matrices. auto: as stored in the checkpoint.
    int8: one scale per output channel. int4: one scale per group of 32 inputs of a channel. int4-64: of 64 inputs."""
    cache: Cache = "auto"
    """Data type of cached keys and values. auto: the compute dtype. int8: quantized."""
    draft: str = ""
    """Use speculative decoding: draft several tokens, then check them in one pass.
    The text does not depend on it, up to rounding (see --exact).
    lookup: draft from earlier text. Any other value: the checkpoint of a smaller model with the same tokenizer."""
    draft_tokens: int = 4
    """Number of tokens to draft per pass."""
    mesh: MeshArgs = ONE_DEVICE
    sample: Annotated[SampleArgs, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = SampleArgs()


def main(argv: Sequence[str]) -> None:
    """Run the command with the flags ``argv``: load the model, generate, and print or save the results.

    Raises UserError if a flag, a prompt or the checkpoint is not as expected.
    """
    program = typed("sample")
    description = f'Generate text: {program} --ckpt runs/tiny "Once upon a time"'
    args = parse_flags(Arguments, argv, Arguments(), program, description)
    refuse_empty(argv, args, ("adapter", "chat_template", "messages", "output", "prompts_file", "draft"))
    for line in given_twice(Arguments, argv):
        tell(line)
    refuse_empty(argv, args.sample, ("json_schema",))
    if args.sample.json_schema:
        schema = json_argument(args.sample.json_schema, "json_schema")
        args = dataclasses.replace(args, sample=dataclasses.replace(args.sample, json_schema=schema))
    _check(args)
    conversing = args.chat and not (args.prompts or args.prompts_file or args.messages)
    if (
        not (conversing or args.prompts or args.messages or args.infill != NO_GAP)
        and args.prompts_file in ("", "-")
        and _is_terminal()
    ):
        tell("reading prompts from standard input, one a line; Ctrl-D ends them, Ctrl-C the program")

    from llama_jax.chat.formats import template_digest
    from llama_jax.checkpoint.identity import identity
    from llama_jax.convert.once import open_model
    from llama_jax.generation.results import Results

    jobs = [] if conversing else _jobs(args)
    args = _with_chat(args, jobs)
    checkpoint = open_model(args.ckpt, args.adapter)
    if note := checkpoint.note(args.weights):
        tell(note)
    asked = _ask(args, argv, jobs, checkpoint)
    if not args.output:
        _generate(args, checkpoint, asked)
        return
    names = ("ckpt", "compute_dtype", "weights", "cache", "exact", "chat", "system")
    made_with = {name: getattr(args, name) for name in names} | {"model": identity(checkpoint.folder)}
    made_with["chat_template"] = template_digest(args.chat_template) if args.chat_template else ""
    results = Results(args.output, asked, made_with)
    if results.all_done:
        tell(f"{args.output} holds all {results.done} results already")
        return
    with results:
        _generate(args, checkpoint, asked, results)


def _check(args: Arguments) -> None:
    args.sample.check()
    args.mesh.check()
    if not args.ckpt:
        raise UserError(f"--ckpt: expected a checkpoint folder, found none; {typed('train')} makes one in runs/tiny")
    if not args.chat and (args.messages or (args.system and not args.prompts_file)):
        raise UserError("--system and --messages: expected --chat beside them, found none")
    if args.messages and (args.prompts or args.prompts_file or args.system):
        raise UserError("--messages: expected the whole conversation in the file, found prompts or --system as well")
    if args.prompts and args.prompts_file:
        raise UserError(
            f"--prompts-file: expected all prompts in the file, found others as arguments, {args.prompts[0]!r} first; leave one "
            "out, and give each --stop one text"
        )
    if args.infill != NO_GAP and (args.prompts or args.prompts_file or args.chat):
        raise UserError("--infill: expected no prompts and no --chat beside it, found some; leave one of them out")
    if args.chat and args.sample.echo:
        raise UserError("--echo: expected prompts to complete, found --chat, which answers them; leave it out")
    conversing = args.chat and not (args.prompts or args.prompts_file)
    if args.output and conversing:
        raise UserError("--output: expected prompts, found a conversation; leave it out")
    if conversing and not args.messages and args.sample.n != 1:
        raise UserError(f"n: expected 1 for a conversation, found {args.sample.n}")


def _with_chat(args: Arguments, jobs: "list[Job]") -> Arguments:
    """Return the arguments, with --chat if the jobs are conversations. Raises UserError if only some of them are."""
    from llama_jax.generation.prompts import check_kinds

    if not args.chat and jobs and check_kinds(jobs):
        return dataclasses.replace(args, chat=True)
    if not args.chat and (args.system or args.chat_template):
        name = "--system" if args.system else "--chat-template"
        raise UserError(f"{name}: expected --chat beside it, found none")
    return args


def _jobs(args: Arguments) -> "list[Job]":
    """Return the jobs from the command line, a file or standard input."""
    from llama_jax.chat.messages import read_messages
    from llama_jax.generation.prompts import Job, given_prompts, read_prompts

    if args.messages:
        messages = tuple(read_messages(Path(args.messages)))
        return [Job(messages[-1].content, args.sample, args.messages, messages)]
    if args.infill != NO_GAP:
        prefix, suffix = map(clean, args.infill)
        return [Job(prefix, args.sample, "--infill", suffix=suffix)]
    if args.prompts:
        return given_prompts(args.prompts, args.sample)
    return read_prompts(args.prompts_file, args.sample)


def _ask(args: Arguments, argv: Sequence[str], jobs: "list[Job]", checkpoint: "WholeModel") -> "list[Asked]":
    """Return the jobs in the form that the model gets. Print warnings about them, and about flags without effect."""
    from llama_jax.chat.formats import choose
    from llama_jax.generation import remarks
    from llama_jax.generation.prompts import RECORDS, Job, ask, dialog_of

    context, tokenizer = checkpoint.args.max_seq_len, checkpoint.tokenizer
    dialogs, chat = [], None
    if args.chat:
        chat = choose(tokenizer, checkpoint.chat, args.chat_template, args.ckpt)
        dialogs = [dialog_of(job, clean(args.system)) for job in jobs]
        if not jobs:
            chat.check(clean(args.system))
    ends = checkpoint.chat.end_ids
    asked = ask(jobs, tokenizer, context, args.too_long, dialogs, chat, bool(args.draft), ends)
    lines = [
        *(chat.notes if chat else ()),
        *remarks.told_of(asked, context),
        remarks.empty_prompts(jobs if args.prompts else []),
        "" if Path(args.prompts_file).suffix in RECORDS else remarks.looking_like_records(jobs),
        remarks.pasted(tokenizer, (job.prompt for job in jobs)),
        remarks.idle_settings(jobs or [Job("", args.sample)]),
        remarks.idle_stops(tokenizer, [*args.sample.stop, *(stop for job in jobs for stop in job.args.stop)]),
        remarks.names_of_files(args.prompts),
    ]
    # `--stop a b` once gave two stop strings. Now the second word is a prompt, so a line says so.
    behind = [argv[i + 2] for i, word in enumerate(argv[:-2]) if word == "--stop"]
    lines += [
        f"--stop takes one text: {word!r} is a prompt" for word in behind if word in args.prompts and not args.quiet
    ]
    if args.draft_tokens != Arguments.draft_tokens and not args.draft:
        lines.append("--draft-tokens: no effect without --draft")
    if args.json and args.output:
        lines.append("--json: no effect beside --output, which is JSON always")
    lines.append(remarks.idle_reports(jobs, bool(args.json or args.output)))
    if args.too_long != "refuse" and not jobs:
        lines.append("--too-long: no effect on a conversation, which forgets its oldest turns")
    for line in filter(None, lines):
        tell(line)
    return asked


def _generate(
    args: Arguments, checkpoint: "WholeModel", asked: "list[Asked]", results: "Results | None" = None
) -> None:
    """Load the model, then complete prompts, answer them, or save the results.

    If nothing is asked, hold a conversation.
    """
    from llama_jax.cli.progress import working
    from llama_jax.generation import Model
    from llama_jax.generation.console import Console

    mesh = None if args.mesh == ONE_DEVICE else args.mesh
    with working(f"loading {args.ckpt}", sys.stderr, shown=not args.quiet):
        model = Model.load(
            checkpoint, args.compute_dtype, args.weights, args.cache, mesh, args.draft, args.draft_tokens, args.exact,
            chat_template=args.chat_template,
        )  # fmt: skip
    console = Console(model, args.json, args.quiet)
    if not asked:
        console.converse(clean(args.system), args.sample)
    elif results is not None:
        console.save(asked, results, chat=args.chat)
    elif args.chat:
        console.answer(asked)
    else:
        console.complete(asked)
    console.close()


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
