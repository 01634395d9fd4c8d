"""Generate text: ``python sample.py --ckpt runs/tiny "Once upon a time"``."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from llama_jax.config import DType, SampleArgs
from llama_jax.errors import UserError, run_command
from llama_jax.flags import parse_flags
from llama_jax.tokenizer import clean


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
    json: bool = False
    """Print one JSON object a prompt."""
    compute_dtype: DType = "auto"
    """Type of activations and matmuls; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    sample: Annotated[SampleArgs, tyro.conf.arg(name="")] = SampleArgs()


def main() -> None:
    """Parse, load, generate, print."""
    args = parse_flags(Arguments, sys.argv[1:], Arguments(), "python sample.py", __doc__ or "")
    args.sample.check()
    if not args.ckpt:
        raise UserError("--ckpt: expected a checkpoint folder, found none; python train.py makes one in runs/tiny")
    if not args.chat and (args.system or args.messages):
        raise UserError("--system and --messages: expected --chat beside them, found none")
    if args.messages and (args.prompts or args.system):
        raise UserError("--messages: expected the whole conversation in the file, found prompts or --system as well")
    prompts = [clean(prompt) for prompt in args.prompts]
    if not prompts and not args.chat:
        prompts = [clean(line.rstrip("\r\n")) for line in sys.stdin or () if line.strip()]
        if not prompts:
            raise UserError("prompts: expected one or more, found none; give them as arguments or on standard input")

    import llama_jax
    from llama_jax.generation import chat, console

    conversations = [chat.read_messages(Path(args.messages))] if args.messages else []
    if args.chat and prompts:
        start = [chat.Message("system", args.system)] if args.system else []
        conversations = [[*start, chat.Message("user", prompt)] for prompt in prompts]
    model = llama_jax.load(args.ckpt, args.compute_dtype)
    for messages in conversations:
        console.answer(model, messages, args.sample, args.json)
    if args.chat and not conversations:
        console.converse(model, args.system, args.sample)
    if not args.chat:
        console.complete(model, prompts, args.sample, args.json)


if __name__ == "__main__":
    run_command(main)
