"""Generation at a terminal: completions, and conversations."""

import itertools
import json
import sys
from collections.abc import Iterable, Sequence

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Completion, Model
from llama_jax.generation.chat import Message, encode_dialog

HELP = "a line is a message; /reset forgets the conversation; Ctrl-C ends an answer, Ctrl-D the program"


def complete(model: Model, prompts: Sequence[str], args: SampleArgs, as_json: bool) -> None:
    """Print a completion a prompt; a single one as it comes."""
    if len(prompts) == 1 and not as_json:
        pieces = model.stream(prompts[0], args)
        _print_stream(itertools.chain([prompts[0] + next(pieces, "")], pieces))
        return
    for i, (prompt, completion) in enumerate(zip(prompts, model.generate(prompts, args), strict=True)):
        if as_json:
            _print_json(model, prompt, model.tokenizer.encode(prompt), completion)
        else:
            print(("\n---\n" if i else "") + prompt + completion.text)


def answer(model: Model, messages: Sequence[Message], args: SampleArgs, as_json: bool) -> None:
    """Print the answer to a conversation."""
    if as_json:
        _print_json(model, messages[-1].content, encode_dialog(model.tokenizer, messages), model.chat(messages, args))
    else:
        _print_stream(_answer_pieces(model, messages, args))


def converse(model: Model, system: str, args: SampleArgs) -> None:
    """Answer the lines of standard input, one after the other, in one conversation; see HELP."""
    start = [Message("system", system)] if system else []
    messages = list(start)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    for line in _lines(interactive):
        if line == "/reset":
            messages = list(start)
            continue
        asked = [*messages, Message("user", line)]
        try:
            text = _print_stream(_answer_pieces(model, asked, args), until_interrupted=True)
        except UserError as error:  # of this message: the conversation goes on without it
            print(f"error: {error}", file=sys.stderr)
            continue
        messages = [*asked, Message("assistant", text)]


def _lines(interactive: bool) -> Iterable[str]:
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = sys.stdin.readline() if sys.stdin is not None else ""
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer_pieces(model: Model, messages: Sequence[Message], args: SampleArgs) -> Iterable[str]:
    """The answer as it comes, without the space that it begins with."""
    begun = False
    for piece in model.stream_ids(encode_dialog(model.tokenizer, messages), args):
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        yield piece


def _print_stream(pieces: Iterable[str], until_interrupted: bool = False) -> str:
    """Print pieces as they come, and a line end. Returns what was printed."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        if not until_interrupted:
            raise
    finally:
        print()
    return text


def _print_json(model: Model, prompt: str, prompt_ids: Sequence[int], completion: Completion) -> None:
    fields = {
        "prompt": prompt,
        "completion": completion.text,
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "logprobs": completion.logprobs,
    }
    print(json.dumps(fields, ensure_ascii=False))
