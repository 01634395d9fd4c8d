"""Generate text: ``python sample.py --ckpt runs/tiny "Once upon a time"``."""

import dataclasses
import itertools
import json
import sys
from typing import Annotated

import tyro

from llama_jax.config import DType, SampleArgs, parse_flags
from llama_jax.errors import UserError, run_command
from llama_jax.tokenizer import clean


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Complete prompts with a trained model."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to go on from. None: read from standard input, one a line."""
    ckpt: str = ""
    """A run folder (its best step), a step folder, or a converted checkpoint."""
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
    lines = [] if args.prompts or sys.stdin is None else [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    prompts = [clean(prompt) for prompt in args.prompts or lines]
    if not prompts:
        raise UserError("prompts: expected one or more, found none; give them as arguments or on standard input")

    import llama_jax

    model = llama_jax.load(args.ckpt, args.compute_dtype)
    if len(prompts) == 1 and not args.json:
        pieces = model.stream(prompts[0], args.sample)
        for piece in itertools.chain([prompts[0] + next(pieces, "")], pieces):
            print(piece, end="", flush=True)
        print()
        return
    for i, (prompt, completion) in enumerate(zip(prompts, model.generate(prompts, args.sample), strict=True)):
        if args.json:
            fields = {
                "prompt": prompt,
                "completion": completion.text,
                "prompt_tokens": len(model.tokenizer.encode(prompt)),
                "completion_tokens": len(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "logprobs": completion.logprobs,
            }
            print(json.dumps(fields, ensure_ascii=False))
        else:
            print(("\n---\n" if i else "") + prompt + completion.text)


if __name__ == "__main__":
    run_command(main)
