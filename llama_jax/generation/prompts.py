"""Prompts from arguments, standard input and files: reading, warnings, and treatment of those that are too long."""

import codecs
import dataclasses
import io
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama_jax.chat.formats import ChatFormat
from llama_jax.chat.messages import Message, as_messages
from llama_jax.cli.json_argument import json_argument, json_line, load_json
from llama_jax.config import SampleArgs, from_dict
from llama_jax.data.kinds import by_first_bytes, wide_encoding
from llama_jax.errors import UserError, quoted
from llama_jax.generation.grammar import check_schema
from llama_jax.generation.infill import encode_infill, with_infill_end
from llama_jax.generation.rows import ends_of
from llama_jax.generation.sampling import check_tokens
from llama_jax.tokenizer import Tokenizer, clean

TooLong = Literal["refuse", "skip", "cut"]

STANDARD_INPUT = "standard input"
# A prompt that is cut leaves at most 1 / FREE_SHARE of the context for its completion.
FREE_SHARE = 4
# The ends of files with JSON objects a line, and of files that have neither these nor a prompt a line.
RECORDS, OTHERS = (".jsonl", ".ndjson"), (".json", ".csv", ".tsv")
# Keys by which JSON is known for prompts or a conversation.
RECORD_KEYS = ("prompt", "messages", "prefix", "role")


class Job(NamedTuple):
    """A prompt with its settings, for ``args.n`` results."""

    prompt: str
    args: SampleArgs
    where: str = ""
    """Its name in errors: "prompt 2", "prompts.txt: line 7"."""
    messages: tuple[Message, ...] = ()
    """A conversation to answer, whose last message is ``prompt``. Empty: the prompt alone."""
    suffix: str | None = None
    """The text behind the gap that is to be filled. The prompt is the text before it. None: there is no gap."""


class Asked(NamedTuple):
    """A job in the form that the model gets."""

    job: Job
    ids: Sequence[int]
    """Token ids of the prompt. If it is skipped, all of them."""
    cut: int = 0
    """Number of tokens left out at the beginning of the prompt so that it fits the context."""
    skipped: bool = False
    """Whether it is too long and is skipped."""


def given_prompts(prompts: Iterable[str], args: SampleArgs) -> list[Job]:
    """Return the jobs of prompts from the command line."""
    return [Job(clean(prompt), args, f"prompt {i}") for i, prompt in enumerate(prompts, 1)]


def read_prompts(path: str, args: SampleArgs) -> list[Job]:
    """Read one prompt per line, skipping blank lines.

    A .jsonl file has {"prompt": ...} or {"messages": [...]} with fields that override ``args``.

    ``path`` is a file, or "-" or "" for standard input. Raises UserError if a line is something else.
    """
    if path in ("-", ""):
        return _jobs_of_lines(standard_input(), args, STANDARD_INPUT)
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"--prompts-file: expected a file of prompts, found no file {path}; give one a line") from None
    lines = text_of(content, path).split("\n")
    if (suffix := Path(path).suffix) in OTHERS:
        raise UserError(
            f"{path}: expected a prompt a line, or JSON objects a line in a file that ends in .jsonl, found a file that ends in "
            f"{suffix}; write one of these"
        )
    if suffix not in RECORDS:
        return _jobs_of_lines(lines, args, path)
    jobs = [_job(line, args, f"{path}: line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not jobs:
        raise UserError(f"{path}: expected one or more prompts, found none; give one a line")
    return jobs


def dialog_of(job: Job, system: str) -> list[Message]:
    """Return the conversation of a job to answer, behind the system message ``system`` unless it is empty.

    Raises UserError if the conversation has a system message of its own.
    """
    messages = list(job.messages) or [Message("user", job.prompt)]
    if not system:
        return messages
    if messages[0].role == "system":
        raise UserError(f"{job.where}: expected messages without a system message beside --system, found one")
    return [Message("system", system), *messages]


def check_kinds(jobs: Sequence[Job]) -> bool:
    """Return whether the jobs are conversations to answer. Raises UserError if only some of them are."""
    answered = [job for job in jobs if job.messages]
    others = [job for job in jobs if not job.messages]
    if answered and others:
        raise UserError(
            f"{others[0].where}: expected messages, as {answered[0].where} has, found a prompt; give --chat to answer "
            "prompts, too"
        )
    return bool(answered)


def standard_input() -> Iterator[str]:
    """Yield the lines of standard input, in the terminal's encoding, or UTF-8 from a file or pipe.

    Raises UserError if they are something else.
    """
    if sys.stdin is None:  # closed
        return
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None or sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not text become U+FFFD
        yield from map(clean, sys.stdin)
        return
    for number, line in enumerate(buffer, 1):
        yield text_of(line, STANDARD_INPUT, number)


def text_of(content: bytes, name: str, line: int = 1) -> str:
    """Decode UTF-8 without a byte order mark. Raises UserError if it is not UTF-8.

    ``line``: number of the first line.
    """
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            raise UserError(
                f"{name}: expected text in UTF-8, found {encoding}; convert it: iconv -f {encoding} -t UTF-8"
            )
    try:
        text = content.decode("utf-8-sig" if line == 1 else "utf-8")
        at, found = text.find("\0"), "a NUL byte"
        wide = wide_encoding(content) if at >= 0 else ""
        advice = f"convert it: iconv -f {wide} -t UTF-8" if wide else "delete it"
    except UnicodeDecodeError as error:
        at, found = error.start, f"the byte 0x{content[error.start]:02x}"
        advice = "convert it, perhaps with iconv -f WINDOWS-1252 -t UTF-8"
    if at < 0:
        return text
    if line == 1 and (kind := by_first_bytes(content, len(content))):
        raise UserError(f"{name}: expected text in UTF-8, found {kind.name}; {kind.advice}")
    line += (content if found.startswith("the") else text.encode())[:at].count(b"\n")
    raise UserError(f"{name}: line {line}: expected text in UTF-8, found {found}; {advice}")


_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def _jobs_of_lines(lines: Iterable[str], args: SampleArgs, name: str) -> list[Job]:
    # Not splitlines: a prompt may hold other separators than line feeds.
    numbered = [(i, line.rstrip("\r\n")) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered and name == STANDARD_INPUT:
        raise UserError("prompts: expected one or more, found none; give them as arguments or on standard input")
    if not numbered:
        raise UserError(f"{name}: expected one or more prompts, found none; give one a line")
    texts = [line for _, line in numbered]
    keys = [_first_key(text) for text in texts]
    if key := keys[0] if all(keys) else key_of_records("\n".join(texts)):
        raise UserError(
            f'{name}: expected a prompt a line, found JSON objects with "{key}"; give them to --prompts-file, an object a line, '
            "in a file that ends in .jsonl"
        )
    return [Job(line, args, f"{name}: line {i}") for i, line in numbered]


def json_of(text: str) -> Any:
    """Return the object, list or text that ``text`` is in JSON, or None."""
    try:
        return json.loads(text) if text.lstrip()[:1] in ("{", "[", '"') else None
    except (ValueError, RecursionError):
        return None


def _first_key(text: str) -> str:
    """Return the key of a prompt in a JSON object, or else its first one. "": ``text`` is something else."""
    found = json_of(text)
    return key_of_records(text) or (str(next(iter(found), "")) if isinstance(found, dict) else "")


def key_of_records(text: str) -> str:
    """Return the key of a prompt in a JSON object, or in a list of objects. "": ``text`` is something else."""
    found = json_of(text)
    first = found[0] if isinstance(found, list) and found else found
    return next((key for key in RECORD_KEYS if isinstance(first, dict) and key in first), "")


def _job(line: str, args: SampleArgs, where: str) -> Job:
    found = load_json(line, where, "a JSON object")
    pairs = [(name.replace("-", "_"), value) for name, value in found.items()] if isinstance(found, dict) else []
    given = dict(pairs)
    names = [name for name, _ in pairs]
    suffix = given.pop("suffix", None)
    if not isinstance(suffix, str | None):
        raise UserError(f"{where}: suffix: expected a text, found {quoted(suffix)}")
    if "messages" in given and "prompt" not in given and suffix is None:
        messages = tuple(as_messages(given.pop("messages"), f"{where}: messages"))
        prompt = messages[-1].content
    else:
        prompt = given.pop("prefix" if suffix is not None and "prefix" in given else "prompt", None)
        messages = ()
    if not isinstance(prompt, str):
        raise UserError(
            f'{where}: expected an object with a text as "prompt", or with "messages", found {quoted(found)}'
        )
    if "messages" in given:
        raise UserError(f"{where}: expected a prompt or messages, found both; leave one out")
    if "max_tokens" in given:
        if "max_new_tokens" in given:
            raise UserError(f"{where}: expected max_tokens or max_new_tokens, found both; leave one out")
        given["max_new_tokens"] = given.pop("max_tokens")
    if len(pairs) > len({*names}):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: {twice}: expected a key once, found it twice")
    if isinstance(stop := given.get("stop"), str) or type(stop) is list:
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if type(ids := given.get("stop_token_ids")) is list:
        given["stop_token_ids"] = tuple(ids)
    if "json_schema" in given:
        given["json_schema"] = _schema(given["json_schema"], f"{where}: json_schema")
    if isinstance(bias := given.get("logit_bias"), dict):
        try:
            given["logit_bias"] = {int(token): value for token, value in bias.items()}
        except ValueError:
            raise UserError(f"{where}: logit_bias: expected token ids, found {quoted(list(bias))}") from None
    if given:
        changed = from_dict(SampleArgs, given, where)
        args = dataclasses.replace(args, **{name: getattr(changed, name) for name in given})
        args.check(f"{where}: ")
    return Job(clean(prompt), args, where, messages, suffix=None if suffix is None else clean(suffix))


def _schema(found: Any, where: str) -> str:
    """Return a schema of a line of JSON as text. It is a value, or a text as on the command line. "": none."""
    if isinstance(found, str):
        return json_argument(found, where) if found else ""
    return json_line(found)


def ask(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    context: int,
    too_long: TooLong,
    dialogs: Sequence[Sequence[Message]] = (),
    chat: ChatFormat | None = None,
    drafts: bool = False,
    end_ids: Collection[int] = (),
) -> list[Asked]:
    """Encode the jobs for a model with a context of ``context`` tokens.

    ``dialogs`` are the conversations to answer, in the format ``chat``; if there are none, prompts are completed.
    ``too_long`` says what to do with a prompt that fills the context, ``drafts`` whether tokens will be drafted,
    ``end_ids`` which tokens end a completion (none: EOS). Raises a UserError that names the prompt if it is refused or
    its settings are impossible.
    """
    jobs = _with_infill_ends(jobs, tokenizer)
    rows = [] if dialogs else tokenizer.encode_all([job.prompt for job in jobs])
    for i, job in enumerate(jobs):
        if dialogs and (job.suffix is not None or job.args.echo):
            found = "a prefix and a suffix" if job.suffix is not None else "echo"
            raise UserError(
                f"{job.where}: expected a message to answer, found {found}; leave it out, or leave out --chat"
            )
        if job.suffix is not None:
            rows[i] = encode_infill(tokenizer, job.prompt, job.suffix, job.args.infill_format)
    for job, messages in zip(jobs, dialogs, strict=False):
        assert chat is not None
        try:
            rows.append(chat.encode(messages))
        except UserError as error:
            raise UserError(f"{job.where}: {error}") from None
    asked = [Asked(job, ids) for job, ids in zip(jobs, rows, strict=True)]
    absent = tokenizer.absent(tokenizer.vocab_size)
    for settings, where in {id(job.args): (job.args, job.where) for job in reversed(jobs)}.values():
        prefix = f"{where}: " if len(jobs) > 1 else ""
        check_tokens(settings, absent, prefix, ends_of(settings, end_ids or (tokenizer.eos_id,)))
        check_schema(settings, tokenizer, drafts, prefix)
    long = [i for i, one in enumerate(asked) if len(one.ids) >= context]
    if long and too_long == "refuse":
        others = len(long) - 1
        more = f" (and {others} other{'s are' if others > 1 else ' is'} too long)" if others else ""
        raise UserError(
            f"{_named(asked[long[0]], long[0])}: expected fewer than {context} tokens, the model's context, found "
            f"{len(asked[long[0]].ids)}{more}; shorten it, or give --too-long skip or cut"
        )
    for i in long:
        if too_long == "skip":
            asked[i] = asked[i]._replace(skipped=True)
            continue
        most = context - min(jobs[i].args.max_new_tokens, max(1, context // FREE_SHARE))
        ids = _cut_dialog(chat, dialogs[i], most) if dialogs and chat is not None else _cut(tokenizer, asked[i], most)
        if len(ids) >= context:
            raise UserError(
                f"{_named(asked[i], i)}: expected a system prompt and format of fewer than {context} tokens, the model's "
                "context, found more; shorten it"
            )
        asked[i] = Asked(jobs[i], ids, cut=len(asked[i].ids) - len(ids))
    return asked


def _named(asked: Asked, index: int) -> str:
    """Return the name of a prompt in an error: its place, its number, and how it begins."""
    where, number = asked.job.where, f"prompt {index + 1}"
    start = quoted(asked.job.prompt[:40] + "...")
    return f"{number} ({start})" if where in ("", number) else f"{where} ({number}, {start})"


def _with_infill_ends(jobs: Sequence[Job], tokenizer: Tokenizer) -> list[Job]:
    """Return the jobs, of which those with a gap also end at <EOT>. Raises UserError if the vocabulary has none."""
    ended: dict[int, SampleArgs] = {}  # by the id of settings, which many jobs may share
    for job in jobs:
        if job.suffix is not None and id(job.args) not in ended:
            ended[id(job.args)] = with_infill_end(job.args, tokenizer)
    return [job if job.suffix is None else job._replace(args=ended[id(job.args)]) for job in jobs]


def _cut(tokenizer: Tokenizer, asked: Asked, most: int) -> list[int]:
    """Return the end of a prompt, behind BOS if it begins so: ``most`` tokens in all. Of a gap, the prefix is cut."""
    ids, job = asked.ids, asked.job
    if job.suffix is not None:
        return encode_infill(tokenizer, job.prompt, job.suffix, job.args.infill_format, len(ids) - most)
    begun = ids[:1] if ids[0] == tokenizer.bos_id else []
    return [*begun, *ids[len(ids) - most + len(begun) :]]


def _cut_dialog(chat: ChatFormat, messages: Sequence[Message], most: int) -> list[int]:
    """Encode a conversation without its oldest turns and, if needed, without the beginning of its last message."""
    messages, _ = chat.fit(messages, most)
    *before, last = messages

    def ids(length: int) -> list[int]:
        kept = last.content[len(last.content) - length :]
        return chat.encode([*before, last._replace(content=kept)])

    fits, over = 0, len(last.content)
    if len(ids(over)) <= most:
        return ids(over)
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if len(ids(middle)) <= most else (fits, middle)
    return ids(fits)
