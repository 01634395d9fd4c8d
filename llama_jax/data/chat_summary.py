"""The report about conversations before training: how many there are, what counts of them, and one of them, marked."""

from llama_jax.config import Config
from llama_jax.data.conversations import PAIRED, Conversations, Pairs, runs_of
from llama_jax.data.manifest import ChatCounts, Manifest
from llama_jax.data.opened import Data, percent
from llama_jax.data.parts import SPLITS
from llama_jax.data.summary import held_out_text
from llama_jax.tokenizer import Tokenizer

# Characters of the printed example, of which the beginning and the end are shown if it has more.
EXAMPLE_CHARS = 1200
# What is printed around the tokens that count.
MARKS = "[[", "]]"


def chat_rows(data: Data, config: Config, length: int) -> list[tuple[str, str]]:
    """Return what a run prints about its conversations, as pairs of a name and a text."""
    manifest, chats = data.tokens.manifest, data.tokens.manifest.chats
    assert chats is not None and isinstance(data.tokens.train, Conversations) and data.chat is not None
    if isinstance(data.tokens.train, Pairs):
        return _pair_rows(data, data.tokens.train, config, length)
    count = {split: manifest.documents[split] for split in SPLITS}
    tokens, targets = manifest.tokens["train"], chats.targets["train"]
    packing = data.tokens.train.packing(length)
    per_epoch = -(-packing.windows // config.train.batch_size)
    what = "every token" if chats.settings["loss_on"] == "all" else "answers, with the token that ends each"
    rows = [
        (
            "chats",
            f"{count['train']:,} conversations to train on, {count['eval']:,} held out ({held_out_of(manifest)}); records of "
            + ", ".join(f"{kind} ({number:,})" for kind, number in chats.kinds.items()),
        ),
        ("format", data.chat.name),
        (
            "loss",
            f"on {what} (data.loss_on): {targets:,} of {tokens:,} tokens, {percent(targets / tokens)}",
        ),
        (
            "packing",
            f"{packing.windows:,} sequences of {length:,}, {percent(packing.padding)} padding; an epoch has {per_epoch:,} steps{_of_size(config, packing.windows)}",
        ),
        ("too long", _too_long(manifest, length)),
        *_remarks(chats, count["eval"]),
    ]
    example = marked(data.tokens.train, 0, data.tokenizer)
    return [*rows, ("example", f"what counts is in {MARKS[0]} {MARKS[1]}\n" + _indented(example))]


def _pair_rows(data: Data, pairs: Pairs, config: Config, length: int) -> list[tuple[str, str]]:
    """Return what a run prints about its preferences."""
    manifest, chats = data.tokens.manifest, data.tokens.manifest.chats
    assert chats is not None and data.chat is not None
    count = {split: manifest.documents[split] // 2 for split in SPLITS}
    packing = pairs.packing(length)
    per_epoch = -(-packing.windows // config.train.batch_size)
    alike = sum(chats.alike.values())
    rows = [
        ("pairs", f"{count['train']:,} to train on, {count['eval']:,} held out ({held_out_of(manifest)})"),
        ("format", data.chat.name),
        (
            "loss",
            f"on the tokens of both answers, with the one that ends each: {chats.targets['train']:,} of {manifest.tokens['train']:,}",
        ),
        (
            "packing",
            f"{packing.windows:,} sequences of {pairs.positions(length):,}, room for two answers of {length:,}; "
            f"{percent(packing.padding)} padding; an epoch has {per_epoch:,} steps of {count['train'] / per_epoch:,.0f} pairs{_of_size(config, packing.windows)}",
        ),
        ("too long", _too_long(manifest, length)),
        *([("alike", f"{alike:,} pairs were left out, as both answers are the same")] if alike else []),
        *_remarks(chats, count["eval"]),
    ]
    for number, name in enumerate(("chosen", "rejected")):
        example = _indented(marked(pairs, number, data.tokenizer))
        rows.append((name, f"what counts is in {MARKS[0]} {MARKS[1]}\n{example}"))
    return rows


def _remarks(chats: ChatCounts, held_out: int) -> list[tuple[str, str]]:
    """Return what is odd about the records: what of them is not read, or may be unintended."""
    empty = sum(chats.empty.values())
    lines = {
        "not read": f"the fields {', '.join(chats.unread)} of records" if chats.unread else "",
        "system": f"the field system of {chats.systems:,} records is their system message" if chats.systems else "",
        "prompts": f"{chats.repeated:,} pairs have texts that both begin with their prompt, which is taken off them"
        if chats.repeated
        else "",
        "empty": f"warning: {empty:,} answers are empty, and teach the model to say nothing" if empty else "",
        "copies": f"warning: {chats.copies:,} of {held_out:,} held-out records are among those to train on, so that the held-out loss "
        "is too low"
        if chats.copies
        else "",
    }
    return [(name, line) for name, line in lines.items() if line]


def _of_size(config: Config, sequences: int) -> str:
    """Return how large the steps are that are counted, if they are not all alike, or larger than all sequences."""
    size = config.train.batch_size
    if sequences < size:
        return f"; warning: a batch of {size:,} reads all of them {size / sequences:.3g} times (--train.batch-size {sequences})"
    return f" with {size:,} sequences" if config.train.batch_start else ""


def held_out_of(manifest: Manifest) -> str:
    """Describe how the held-out conversations were chosen."""
    return (
        held_out_text(manifest)
        .replace("the documents", "the conversations")
        .replace("text of its own", "file of its own")
    )


def _too_long(manifest: Manifest, length: int) -> str:
    chats = manifest.chats
    assert chats is not None
    cut, dropped, without = (sum(of.values()) for of in (chats.cut, chats.dropped, chats.without_target))
    what = "pairs" if PAIRED in chats.settings else "conversations"
    lost = [f"{cut:,} {what} were cut to {length + 1:,} tokens"] * bool(cut)
    lost += [f"{dropped:,} were dropped"] * bool(dropped)
    lost += [f"{without:,} were left out, as nothing that counts was left of them"] * bool(without)
    return f"{', '.join(lost) or 'none'} (the longest has {chats.longest:,} tokens; data.too_long {chats.settings['too_long']})"


def marked(conversations: Conversations, number: int, tokenizer: Tokenizer) -> str:
    """Return the text of a conversation, with special tokens shown and with marks around what counts."""
    ids, counted = conversations.conversation(number)
    if conversations.all_count:
        counted = counted | True
        counted[0] = False
    parts, before = [], ""
    for counts, run in runs_of(counted):
        text = tokenizer.decode(ids[: run.stop].tolist(), specials=True)
        part = (
            text.removeprefix(before) if text.startswith(before) else tokenizer.decode(ids[run].tolist(), specials=True)
        )
        parts.append(f"{MARKS[0]}{part}{MARKS[1]}" if counts else part)
        before = text
    return "".join(parts)


def _indented(text: str) -> str:
    if len(text) > EXAMPLE_CHARS:
        half = EXAMPLE_CHARS // 2
        text = f"{text[:half]}\n... {len(text) - EXAMPLE_CHARS:,} characters ...\n{text[-half:]}"
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "\n".join(f"{'':>10}  | {line}" for line in shown.split("\n"))
