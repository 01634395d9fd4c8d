"""Lines that tell a person what was decided about prompts and settings."""

import os
from collections.abc import Iterable, Sequence

from llama_jax.chat.llama2 import TAGS
from llama_jax.config import SampleArgs
from llama_jax.errors import quoted
from llama_jax.generation.prompts import Asked, Job, json_of, key_of_records
from llama_jax.generation.token_text import textless
from llama_jax.tokenizer import Tokenizer

# A message names at most this many prompts.
NAMED = 5


def told_of(asked: Sequence[Asked], context: int) -> list[str]:
    """Return lines that say which prompts were skipped or cut."""
    lines = []
    for what, those in (
        ("skipped", [one for one in asked if one.skipped]),
        ("cut at their beginning", [one for one in asked if one.cut]),
    ):
        if those:
            named = _some([one.job.where for one in those])
            lines.append(
                f"{len(those)} of {len(asked)} prompts fill the context of {context} tokens and are {what}: {named}"
            )
    return lines


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:NAMED]) + ("" if len(places) <= NAMED else ", ...")


def pasted(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
    """Return a line that names control tokens and chat tags that ``texts`` contain as plain text, or ""."""
    controls = [text for text, i in tokenizer.specials.items() if not tokenizer.is_text(i) and i != tokenizer.unk_id]
    marks = [mark for mark in dict.fromkeys((*controls, *TAGS)) if mark.strip()]
    joined = "\0".join(texts)
    found = [mark for mark in marks if mark in joined]
    if not found:
        return ""
    return (
        f"{' and '.join(found[:2])} in a prompt {'is' if len(found) == 1 else 'are'} read as plain text: BOS is added "
        "automatically, and --chat writes the chat format"
    )


def names_of_files(prompts: Sequence[str]) -> str:
    """Return a line about a prompt on the command line that is also the name of a file or folder, or ""."""
    found = next((prompt for prompt in prompts if prompt and os.path.exists(prompt)), "")
    if not found:
        return ""
    kind = "folder" if os.path.isdir(found) else "file"
    return f"the prompt {found!r} is the name of a {kind}, and is completed as text; --prompts-file reads prompts from a file"


def idle_settings(jobs: Sequence[Job]) -> str:
    """Return a line about settings without effect because all jobs have temperature 0, or ""."""
    if not jobs or any(job.args.temperature > 0 for job in jobs):
        return ""
    default, args = SampleArgs(), jobs[0].args
    idle = [name for name in ("top_p", "top_k", "min_p", "seed") if getattr(args, name) != getattr(default, name)]
    names = ", ".join("--" + name.replace("_", "-") for name in idle)
    line = f"{names}: no effect at temperature 0, which always takes the likeliest token" if idle else ""
    if any(job.args.n > 1 for job in jobs):
        line += ("; " if line else "") + "--n: all completions of a prompt are the same at temperature 0"
    return line


def idle_reports(jobs: Sequence[Job], as_json: bool) -> str:
    """Return a line about settings without effect on ``jobs``, or "". ``as_json``: whether results are JSON."""
    lines = []
    if not as_json and any(job.args.logprobs for job in jobs):
        lines.append("--logprobs: no effect on plain text; --json and --output have them")
    if not as_json and any(job.args.echo and job.suffix is None for job in jobs):
        lines.append("--echo: no effect on plain text, which begins with the prompt always")
    if any(job.args.ignore_eos and job.args.min_new_tokens and not job.args.stop_token_ids for job in jobs):
        lines.append("--min-new-tokens: no effect beside --ignore-eos, since no token ends the text")
    if any(job.args.infill_format != "psm" and job.suffix is None for job in jobs):
        lines.append("--infill-format: no effect on a prompt without a suffix; see --infill")
    return "; ".join(lines)


def empty_prompts(jobs: Sequence[Job]) -> str:
    """Return a line about prompts without a text, or "". They may be variables of the shell that are not set."""
    empty = [job.where for job in jobs if not job.prompt and not job.messages and job.suffix is None]
    if not empty:
        return ""
    return f"{len(empty)} of {len(jobs)} prompts {'is' if len(empty) == 1 else 'are'} empty: {_some(empty)}"


def looking_like_records(jobs: Sequence[Job]) -> str:
    """Return a line about prompts, a line of text each, that look like records, or "". They are read as text."""
    texts = [job.prompt for job in jobs]
    records = [job.where for job in jobs if key_of_records(job.prompt)]
    if records:
        return (
            f"{len(records)} of {len(jobs)} prompts {'is a JSON object' if len(records) == 1 else 'are JSON objects'}, and read as "
            f"text: {_some(records)}; a file that ends in .jsonl has an object a line"
        )
    if len(texts) > 1 and all(isinstance(json_of(text), str) for text in texts):
        return "every prompt is in quotation marks, which are read as a part of it"
    return ""


def idle_stops(tokenizer: Tokenizer, stops: Iterable[str]) -> str:
    """Return a line about stop strings that hold a token without text among others, or ""."""
    for stop in dict.fromkeys(stops):
        if stop not in tokenizer.specials and (inside := [text for text in textless(tokenizer) if text in stop]):
            return (
                f"stop {quoted(stop)}: {inside[0]} in it is read as plain text; a stop string that is {inside[0]} alone also ends "
                "a completion at this token"
            )
    return ""
