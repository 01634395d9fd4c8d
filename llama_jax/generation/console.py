"""Generation in a terminal: completions and conversations."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TextIO

from llama_jax.chat.messages import Message
from llama_jax.cli.progress import Progress, print_above, working
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Completion, Model, stripped
from llama_jax.generation.arguments import check_one
from llama_jax.generation.passes import OnProgress, Step
from llama_jax.generation.prompts import Asked, Job, standard_input
from llama_jax.generation.remarks import pasted
from llama_jax.generation.results import SKIPPED, Results, result
from llama_jax.generation.rows import echoed
from llama_jax.generation.stats import Meter
from llama_jax.tokenizer import clean

# A function that takes each prompt with its completion.
Take = Callable[[Asked, Completion], None]

HELP = (
    "a line is a message; /reset forgets the conversation, /help prints this, /quit ends the program; "
    "Ctrl-C ends an answer, Ctrl-D the program"
)
# A message that looks like a command.
COMMAND = re.compile(r"/[a-z]+", re.IGNORECASE)
# At most 1 / ANSWER_SHARE of the context is kept free for an answer.
ANSWER_SHARE = 4
# What goes on before the first token is there.
FIRST_TOKEN = "reading the prompt; the first time, programs are compiled"


class Console:
    """Prints a model's output. Texts and results go to standard output, everything else to standard error."""

    def __init__(self, model: Model, as_json: bool = False, quiet: bool = False):
        self._model, self._as_json, self._quiet = model, as_json, quiet
        self._meter = Meter(model)
        self._cut = 0  # completions that the context ended

    def close(self) -> None:
        """Print how fast it went."""
        if sys.stdout is not None:
            sys.stdout.flush()  # raises first if the reader is gone
        if self._cut:
            what = "the completion" if self._cut == 1 else f"{self._cut:,} completions"
            context = self._model.args.max_seq_len
            _tell(f"the model's context of {context:,} tokens ended {what} before --max-new-tokens did")
        self._say(self._meter.line())

    def complete(self, asked: Sequence[Asked]) -> None:
        """Print the completions of prompts. A single one is printed as it is generated."""
        if self._is_one_text(asked):
            self._meter.begin()
            (one,) = asked
            pieces = self._model.stream_ids(one.ids, dataclasses.replace(one.job.args, echo=False), self._meter)
            before, after = _shown(one)
            made = self._meter.tokens
            self._print_stream(itertools.chain(pieces, [after]), start=before)
            self._note_cut(one.ids, one.job.args, self._meter.tokens - made)
            return
        self._run(asked, self._printer(show_prompt=True))

    def answer(self, asked: Sequence[Asked]) -> None:
        """Print the answers to conversations. A single one is printed as it is generated."""
        if self._is_one_text(asked):
            self._print_answer(asked[0].ids, asked[0].job.args)
            return
        self._run(asked, self._printer(show_prompt=False), chat=True)

    def save(self, asked: Sequence[Asked], results: Results, chat: bool) -> None:
        """Add the missing completions to ``results``, each as soon as it is done.

        ``chat``: they are answers, which have no outer white space.
        """

        def take(_: Asked, completion: Completion) -> None:
            results.add(stripped(completion) if chat else completion)

        self._run(asked, take, results.done, with_bar=True, chat=chat)

    def _is_one_text(self, asked: Sequence[Asked]) -> bool:
        return len(asked) == 1 and asked[0].job.args.n == 1 and not asked[0].skipped and not self._as_json

    def converse(self, system: str, args: SampleArgs) -> None:
        """Answer the lines of standard input as one conversation; see HELP."""
        check_one(args, "a conversation")
        start = [Message("system", system)] if system else []
        messages = list(start)
        interactive = sys.stdin is not None and sys.stdin.isatty()
        if interactive:
            _tell(HELP)
        noted, line = "", ""
        for line in _lines(interactive):
            if not noted and (noted := pasted(self._model.tokenizer, [line])):
                _tell(noted)
            if line == "/quit":
                return
            if line == "/reset":
                messages = list(start)
            elif line == "/help":
                _tell(HELP)
            else:
                if COMMAND.fullmatch(line):
                    _tell(f"{line} is no command, and is answered as a message; /help lists the commands")
                with _noting_interrupts() as interrupted:
                    messages = self._answered([*messages, Message("user", line)], args, interrupted)
        if not line and not interactive:
            _tell("standard input ended without a message")

    def _answered(self, asked: list[Message], args: SampleArgs, interrupted: Callable[[], bool]) -> list[Message]:
        """Return the conversation with the answer, or without the last message if it cannot be answered."""
        try:
            context = self._model.args.max_seq_len
            room = min(args.max_new_tokens, context // ANSWER_SHARE)
            fitting, dropped = self._model.chat_format.fit(asked, context - room)
            if dropped:
                turns = "turn is" if dropped == 1 else f"{dropped} turns are"
                _tell(f"the conversation has outgrown the context of {context} tokens: the oldest {turns} forgotten")
            text = self._answer(fitting, args, interrupted)
        except UserError as error:  # about this message; the conversation continues without it
            _tell(f"error: {error}")
            return asked[:-1]
        return [*fitting, self._model.chat_format.said(text)]

    def _answer(self, messages: list[Message], args: SampleArgs, interrupted: Callable[[], bool]) -> str:
        """Print the answer to a conversation. Return its text."""
        ids = self._model.chat_format.encode(messages)
        if not self._as_json:
            return self._print_answer(ids, args, interrupted)
        self._meter.begin()
        rows = self._model.rows([ids], args)
        (completion,) = self._model.completions(rows, self._meter, self._model.turn_end_ids)
        if completion.finish_reason == "length":
            self._note_cut(ids, args, len(completion.token_ids))
        self._printer(show_prompt=False)(Asked(Job(messages[-1].content, args), ids), completion)
        return completion.text

    def _print_answer(self, ids: Sequence[int], args: SampleArgs, until: Callable[[], bool] | None = None) -> str:
        """Print an answer as it comes; see ``_print_stream``."""
        made = self._meter.tokens
        text = self._print_stream(self._answer_pieces(ids, args), until=until)
        self._note_cut(ids, args, self._meter.tokens - made)
        return text

    def _note_cut(self, prompt: Sequence[int], args: SampleArgs, made: int) -> None:
        """Count a completion of ``made`` tokens if the context, and not ``max_new_tokens``, ended it."""
        self._cut += made == self._model.args.max_seq_len - len(prompt) < args.max_new_tokens

    def _answer_pieces(self, prompt: Sequence[int], args: SampleArgs) -> Iterator[str]:
        """Yield the answer piece by piece, without leading white space. Raises UserError before the first piece."""
        self._meter.begin()
        return _stripped(self._model.stream_ids(prompt, args, self._meter, self._model.turn_end_ids))

    def _run(
        self, asked: Sequence[Asked], take: Take, done: int = 0, with_bar: bool = False, chat: bool = False
    ) -> None:
        """Pass the completions of ``asked`` after the first ``done`` to ``take``, in order, as they are done.

        ``chat``: they are answers, which end with the end of a turn.
        """
        ends = self._model.turn_end_ids if chat else ()
        wanted = [(one, number) for one in asked for number in range(one.job.args.n)][done:]
        rows = [(one.ids, one.job.args, number) for one, number in wanted if not one.skipped]
        total = done + len(wanted)
        progress = Progress("generating", total, "completion", done) if with_bar and not self._quiet else None
        self._meter.begin()
        with progress or contextlib.nullcontext():
            made = self._model.completions(rows, self._watching(progress), ends)
            for one, _ in wanted:
                if one.skipped and progress is not None:
                    progress.update(1)
                if one.skipped:
                    take(one, SKIPPED)
                    continue
                completion = self._next(made, with_bar)
                if completion.finish_reason == "length":
                    self._note_cut(one.ids, one.job.args, len(completion.token_ids))
                take(one, self._echoed(one, completion))

    def _echoed(self, asked: Asked, completion: Completion) -> Completion:
        """Return a completion with the texts around it, if its settings say so."""
        if not asked.job.args.echo:
            return completion
        before = self._model.tokenizer.decode(asked.ids) if asked.cut and asked.job.suffix is None else asked.job.prompt
        return echoed(completion, before, asked.job.suffix or "")

    def _next(self, made: Iterator[Completion], with_bar: bool) -> Completion:
        """Return the next completion. Without a bar, say that it is being made."""
        with working("generating", sys.stderr, shown=not (with_bar or self._quiet)):
            return next(made)

    def _print_stream(self, pieces: Iterable[str], start: str = "", until: Callable[[], bool] | None = None) -> str:
        """Print ``start`` and pieces as they come, and a line end. Returns what the pieces were.

        until: says, behind each piece, whether it was the last; then KeyboardInterrupt ends the text as well.
        """
        text, pieces = "", iter(pieces)
        try:
            # Before anything is printed: what is said meanwhile has a line of its own.
            with working(FIRST_TOKEN, sys.stderr, shown=not self._quiet):
                first = next(pieces, "")
            print(start, end="", flush=True)
            for piece in itertools.chain([first], pieces):
                print(piece, end="", flush=True)
                text += piece
                if until is not None and until():
                    break
        except KeyboardInterrupt:
            if until is None:
                raise
        finally:
            print(flush=True)
        return text

    def _watching(self, progress: Progress | None) -> OnProgress:
        def watch(step: Step) -> None:
            self._meter(step)
            if step.passes > 1 and step.number == 1 and not step.steps:
                self._say(f"{step.passes} passes, the first of {step.rows} completions: memory holds no more")
            if progress is not None and step.finished:
                progress.update(step.finished)

        return watch

    def _printer(self, show_prompt: bool) -> Take:
        printed = 0

        def show(asked: Asked, completion: Completion) -> None:
            nonlocal printed
            completion = completion if show_prompt else stripped(completion)
            if self._as_json:
                # JSON can escape characters that the terminal lacks.
                ascii_only = not _is_utf8(sys.stdout)
                print(json.dumps(result(asked, completion), ensure_ascii=ascii_only, allow_nan=False), flush=True)
            else:
                before, after = _shown(asked) if show_prompt and not asked.job.args.echo else ("", "")
                text = before + completion.text + after
                print(("\n---\n" if printed else "") + text, flush=True)
            printed += 1

        return show

    def _say(self, text: str) -> None:
        if not self._quiet:
            _tell(text)


def _shown(asked: Asked) -> tuple[str, str]:
    """Return the texts that are printed before and after a completion: its prompt; around a gap, only with ``echo``."""
    if asked.job.suffix is None:
        return asked.job.prompt, ""
    return (asked.job.prompt, asked.job.suffix) if asked.job.args.echo else ("", "")


def _is_utf8(stream: TextIO | None) -> bool:
    return stream is None or (stream.encoding or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"


def _tell(text: str) -> None:
    if sys.stderr is not None:  # if it is closed, print would use standard output instead
        print_above(text, sys.stderr)


def _lines(interactive: bool) -> Iterator[str]:
    """Yield the lines of standard input that are not blank. In a terminal, Ctrl-C ends them."""
    for line in _typed() if interactive else standard_input():
        if line.strip():
            yield line.strip()


def _typed() -> Iterator[str]:
    """Yield lines typed at a prompt. Bytes that are not text become U+FFFD."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its arrow keys
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            yield clean(input("> "))
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    begun = False
    for piece in pieces:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        yield piece


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it inside a library. Yield a function that tells whether there was one.

    A second Ctrl-C raises KeyboardInterrupt, because the user does not want to wait for the current token.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            signal.default_int_handler(number, frame)
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
