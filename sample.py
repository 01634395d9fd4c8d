"""Generate text: ``python sample.py --ckpt runs/tiny "Once upon a time"``."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from llama_jax.config import Cache, DType, MeshArgs, SampleArgs, Weights
from llama_jax.errors import UserError, run_command
from llama_jax.flags import parse_flags
from llama_jax.tokenizer import clean

if TYPE_CHECKING:
    from llama_jax.generation.jobs import Job


# The mesh that nobody asked for: the model lies on as few devices as hold it.
ONE_DEVICE = MeshArgs(data=1)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Complete prompts with a trained model, or talk to a chat model."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to go on from. None: read from standard input, one a line."""
    ckpt: str = ""
    """A run folder (its best step), a step folder, or a converted checkpoint."""
    chat: bool = False
    """Answer in the format of Meta's chat models: each prompt by itself, or, without prompts, a conversation of the lines of standard input."""
    system: str = ""
    """With --chat: what the model is told before the conversation."""
    messages: str = ""
    """With --chat: a JSON file of a conversation to answer, a list of {"role": "system", "user" or "assistant", "content": "..."}."""
    prompts_file: str = ""
    """A file of prompts, one a line; or, where it ends in .jsonl, an object a line with "prompt" and flags of its own, such as "top_p"."""
    output: str = ""
    """Save results to this file, one JSON object a line, as they come. The same command again goes on where a stopped one was."""
    json: bool = False
    """Print one JSON object a completion."""
    quiet: bool = False
    """Print neither progress nor, at the end, how fast it went."""
    compute_dtype: DType = "auto"
    """Type of activations and matmuls; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    weights: Weights = "auto"
    """Matrices: auto, as the checkpoint has them; int8, with a scale an output; int4, a scale for 32 inputs of an output; int4-64, for 64."""
    cache: Cache = "auto"
    """Keys and values: auto, in the type that is computed in; int8."""
    draft: str = ""
    """Guess tokens ahead, which one pass checks; the text stays the same. lookup: from what came before; else a checkpoint of a smaller model with the same tokenizer."""
    draft_tokens: int = 4
    """Tokens guessed at a time."""
    mesh: MeshArgs = ONE_DEVICE
    sample: Annotated[SampleArgs, tyro.conf.arg(name="")] = SampleArgs()


def main() -> None:
    """Parse, load, generate, print."""
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python sample.py", __doc__ or "")
    _check(args)

    import llama_jax
    from llama_jax.generation import chat
    from llama_jax.generation.jobs import Results

    conversing = args.chat and not (args.prompts or args.prompts_file or args.messages)
    jobs = [] if conversing or args.messages else _jobs(args)
    start = [chat.Message("system", args.system)] if args.system else []
    conversations = [chat.read_messages(Path(args.messages))] if args.messages else []
    if args.chat:
        conversations += [[*start, chat.Message("user", job.prompt)] for job in jobs]
    results = None
    if args.output:
        made_with = {
            name: getattr(args, name) for name in ("ckpt", "compute_dtype", "weights", "cache", "chat", "system")
        }
        results = Results(Path(args.output), jobs, made_with)
        if results.done == sum(job.args.n for job in jobs):
            print(f"{args.output} holds all {results.done} results already", file=sys.stderr)
            return
    mesh = None if args.mesh == ONE_DEVICE else args.mesh
    model = llama_jax.load(args.ckpt, args.compute_dtype, args.weights, args.cache, mesh, args.draft, args.draft_tokens)

    from llama_jax.generation.console import Console

    console = Console(model, args.json, args.quiet)
    if conversing:
        console.converse(args.system, args.sample)
    elif results is not None:
        prompts = [chat.encode_dialog(model.tokenizer, messages) for messages in conversations]
        prompts = prompts or [model.encode(job.prompt) for job in jobs]
        with results:
            console.save(jobs, prompts, results, strip=args.chat)
    elif args.chat:
        console.answer(conversations, [job.args for job in jobs] or [args.sample])
    else:
        console.complete(jobs)
    console.close()


def _check(args: Arguments) -> None:
    args.sample.check()
    args.mesh.check()
    if not args.ckpt:
        raise UserError("--ckpt: expected a checkpoint folder, found none; python train.py makes one in runs/tiny")
    if not args.chat and (args.system or args.messages):
        raise UserError("--system and --messages: expected --chat beside them, found none")
    if args.messages and (args.prompts or args.prompts_file or args.system):
        raise UserError("--messages: expected the whole conversation in the file, found prompts or --system as well")
    if args.prompts and args.prompts_file:
        raise UserError("--prompts-file: expected all prompts in the file, found others as arguments; leave one out")
    if args.output and (args.messages or (args.chat and not args.prompts and not args.prompts_file)):
        raise UserError("--output: expected prompts, found a conversation; leave it out")


def _jobs(args: Arguments) -> list["Job"]:
    """The prompts of the command line, of the file, or of standard input."""
    from llama_jax.generation.jobs import Job, read_prompts

    if args.prompts_file:
        return read_prompts(Path(args.prompts_file), args.sample)
    prompts = args.prompts or tuple(line.rstrip("\r\n") for line in sys.stdin or () if line.strip())
    if not prompts:
        raise UserError("prompts: expected one or more, found none; give them as arguments or on standard input")
    return [Job(clean(prompt), args.sample) for prompt in prompts]


if __name__ == "__main__":
    run_command(main)
