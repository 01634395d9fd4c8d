"""Generation at a terminal: completions, and conversations."""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType

from tqdm import tqdm

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Completion, Model, check_one, stripped
from llama_jax.generation.chat import Message, encode_dialog, fit_dialog, without_tags
from llama_jax.generation.jobs import Job, Results, result
from llama_jax.generation.passes import OnProgress, Step
from llama_jax.generation.stats import Meter
from llama_jax.progress import Progress

HELP = (
    "a line is a message; /reset forgets the conversation, /help prints this, /quit ends the program; "
    "Ctrl-C ends an answer, Ctrl-D the program"
)
# Of the context, what is kept free for an answer, where max_new_tokens asks for more.
ANSWER_SHARE = 4


class Console:
    """Prints what a model says. Texts and results go to standard output, all else to standard error."""

    def __init__(self, model: Model, as_json: bool = False, quiet: bool = False):
        self._model, self._as_json, self._quiet = model, as_json, quiet
        self._meter = Meter(model)

    def close(self) -> None:
        """Say how fast it went."""
        if sys.stdout is not None:
            sys.stdout.flush()  # where its reader has gone, that comes first
        self._say(self._meter.line())

    def complete(self, jobs: Sequence[Job]) -> None:
        """Print the completions of prompts; a single one as it comes."""
        if len(jobs) == 1 and jobs[0].args.n == 1 and not self._as_json:
            self._meter.begin()
            pieces = self._model.stream(*jobs[0], self._meter)
            _print_stream(pieces, start=jobs[0].prompt)
            return
        self._run(jobs, [self._model.encode(job.prompt) for job in jobs], self._printer(show_prompt=True))

    def answer(self, conversations: Sequence[Sequence[Message]], args: Sequence[SampleArgs]) -> None:
        """Print the answers to conversations, each with its own ``args``; a single one as it comes."""
        prompts = [encode_dialog(self._model.tokenizer, messages) for messages in conversations]
        if len(prompts) == 1 and args[0].n == 1 and not self._as_json:
            _print_stream(self._answer_pieces(prompts[0], args[0]))
            return
        jobs = [Job(messages[-1].content, given) for messages, given in zip(conversations, args, strict=True)]
        self._run(jobs, prompts, self._printer(show_prompt=False))

    def save(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int]], results: Results, strip: bool) -> None:
        """Add the completions that ``results`` lacks to them, each as soon as it is there. strip: of outer white space."""

        def take(_: str, ids: Sequence[int], completion: Completion) -> None:
            results.add(len(ids), stripped(completion) if strip else completion)

        self._run(jobs, prompts, take, results.done, with_bar=True)

    def converse(self, system: str, args: SampleArgs) -> None:
        """Answer the lines of standard input, one after the other, in one conversation; see HELP."""
        check_one(args, "a conversation")
        start = [Message("system", system)] if system else []
        messages = list(start)
        interactive = sys.stdin is not None and sys.stdin.isatty()
        if interactive:
            _tell(HELP)
        for line in _lines(interactive):
            if line == "/quit":
                return
            if line == "/reset":
                messages = list(start)
            elif line == "/help":
                _tell(HELP)
            else:
                with _noting_interrupts() as interrupted:
                    messages = self._answered([*messages, Message("user", line)], args, interrupted)

    def _answered(self, asked: list[Message], args: SampleArgs, interrupted: Callable[[], bool]) -> list[Message]:
        """The conversation with the answer; without the last message where that cannot be answered."""
        try:
            context = self._model.args.max_seq_len
            room = min(args.max_new_tokens, context // ANSWER_SHARE)
            fitting, dropped = fit_dialog(self._model.tokenizer, asked, context - room)
            if dropped:
                turns = "turn is" if dropped == 1 else f"{dropped} turns are"
                _tell(f"the conversation has outgrown the context of {context} tokens: the oldest {turns} forgotten")
            pieces = self._answer_pieces(encode_dialog(self._model.tokenizer, fitting), args)
            text = _print_stream(pieces, until=interrupted)
        except UserError as error:  # of this message: the conversation goes on without it
            _tell(f"error: {error}")
            return asked[:-1]
        return [*fitting, Message("assistant", without_tags(text))]

    def _answer_pieces(self, prompt: Sequence[int], args: SampleArgs) -> Iterator[str]:
        """The answer as it comes, without the space that it begins with. Raises UserError at once."""
        self._meter.begin()
        return _stripped(self._model.stream_ids(prompt, args, self._meter))

    def _run(
        self,
        jobs: Sequence[Job],
        prompts: Sequence[Sequence[int]],
        take: Callable[[str, Sequence[int], Completion], None],
        done: int = 0,
        with_bar: bool = False,
    ) -> None:
        """Give every completion of ``jobs`` behind the first ``done`` to ``take``, in order, as soon as it is there."""
        rows = self._model.rows(prompts, [job.args for job in jobs])
        texts = [job.prompt for job in jobs for _ in range(job.args.n)]
        progress = Progress("generating", len(rows), "completion", done) if with_bar and not self._quiet else None
        self._meter.begin()
        with progress or contextlib.nullcontext():
            made = self._model.completions(rows[done:], self._watching(progress))
            for text, (ids, _, _), completion in zip(texts[done:], rows[done:], made, strict=True):
                take(text, ids, completion)

    def _watching(self, progress: Progress | None) -> OnProgress:
        def watch(step: Step) -> None:
            self._meter(step)
            if step.passes > 1 and step.number == 1 and not step.steps:
                self._say(f"{step.passes} passes, the first of {step.rows} completions: more do not go into one")
            if progress is not None and step.finished:
                progress.update(step.finished)

        return watch

    def _printer(self, show_prompt: bool) -> Callable[[str, Sequence[int], Completion], None]:
        printed = 0

        def show(prompt: str, ids: Sequence[int], completion: Completion) -> None:
            nonlocal printed
            completion = completion if show_prompt else stripped(completion)
            if self._as_json:
                print(json.dumps(result(prompt, len(ids), completion), ensure_ascii=False), flush=True)
            else:
                text = prompt + completion.text if show_prompt else completion.text
                print(("\n---\n" if printed else "") + text, flush=True)
            printed += 1

        return show

    def _say(self, text: str) -> None:
        if not self._quiet:
            _tell(text)


def _tell(text: str) -> None:
    if sys.stderr is not None:  # closed: print would take standard output instead
        tqdm.write(text, file=sys.stderr)  # above the bar, if there is one


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input that are not blank, up to its end, or to Ctrl-C where somebody types them."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its arrow keys
    while True:
        try:
            line = input("> ") + "\n" if interactive else sys.stdin.readline() if sys.stdin is not None else ""
        except (EOFError, KeyboardInterrupt):
            if not interactive:
                raise
            print()
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    begun = False
    for piece in pieces:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        yield piece


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Here a first Ctrl-C is noted, and raises nothing in the middle of a library's work; yields whether there was one.

    A second one raises KeyboardInterrupt: who presses it again does not want to wait for the token that is being made.
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


def _print_stream(pieces: Iterable[str], start: str = "", until: Callable[[], bool] | None = None) -> str:
    """Print ``start`` and pieces as they come, and a line end. Returns what the pieces were.

    until: says, behind each piece, whether it was the last; then KeyboardInterrupt ends the text as well.
    """
    text = ""
    try:
        print(start, end="", flush=True)
        for piece in pieces:
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
