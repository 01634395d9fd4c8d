"""The lines that a run prints while it trains, and at its end."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.cli.progress import bytes_text, duration
from llama_jax.data import AnyData
from llama_jax.data.batches import windows_of
from llama_jax.data.mixture import Schedule
from llama_jax.data.opened import MixedData
from llama_jax.programs import typed
from llama_jax.training.clock import Activity, Clock
from llama_jax.training.run_folder import RunFolder

# Tokens for the sample command that is printed at the end: a whole story.
NEXT_TOKENS = 256


def epochs_text(data: AnyData, schedule: Schedule | None, length: int, step: int) -> list[str]:
    """Return a line for each source of a mixture that has run out at ``step`` and begins its next epoch."""
    if schedule is None or not isinstance(data, MixedData):
        return []
    before, after = schedule.rows_before(step - 1), schedule.rows_before(step)
    lines = []
    for name, text in data.sources.items():
        windows = windows_of(text.tokens.train, length)
        epoch = after.get(name, 0) // windows
        if epoch > before.get(name, 0) // windows:
            lines.append(
                f"step {step:,}: {name} has been read {epoch:,} time{'s' * (epoch > 1)}, and begins again in another order"
            )
    return lines


def printable(text: str) -> str:
    """Return ``text`` with control characters, which a terminal would obey, escaped. Line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def quoted_lines(text: str) -> str:
    """Return a sample for the terminal, with a mark before each line."""
    return "  | " + printable(text).replace("\n", "\n  | ")


def progress_text(record: dict[str, Any], devices: int) -> str:
    """Return loss, speed and memory of a record, and delays of a second or more.

    The most important comes first: a narrow terminal shows only what fits.
    """
    loss = "loss not finite" if record["train_loss"] is None else f"loss {record['train_loss']:.3f}"
    parts = [loss]
    if "reward_margin" in record:
        parts.append(f"margin {record['reward_margin'] or 0.0:.3f}, {record['reward_accuracy'] or 0.0:.0%} right")
    parts += [f"{record['tokens_per_second_per_device']:,.0f} tokens/s" + (" a device" if devices > 1 else "")]
    if record["bad_steps"]:
        parts.append(f"{record['bad_steps']:,} bad")
    parts += [
        f"{what} {record[f'{what}_seconds']:.0f} s" for what in ("data", "saving") if record[f"{what}_seconds"] >= 1
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    if "memory_bytes" in record:
        parts.append(bytes_text(record["memory_bytes"]))
    return ", ".join(parts)


def expected_time_text(seconds: float) -> str:
    """Return a line with the time that the remaining steps will take, without evaluations."""
    return f"{'time':>10}  about {duration(seconds)} to go, evaluations aside"


def evaluation_text(record: dict[str, Any], floor: float | None, best: bool) -> str:
    """Return a line about an evaluation."""
    bits = record["eval_bits_per_byte"]
    text = f"step {record['step']:,}: eval loss {loss_text(record)}"
    if floor is not None and bits is not None:
        text += f" ({bits - floor:+.3f} from the floor)"
    if of_each := [
        f"{key.partition('/')[2]} {loss:.4f}" for key, loss in record.items() if key.startswith("eval_loss/")
    ]:
        text += f" ({', '.join(of_each)})"
    if of_tasks := [
        f"{key.removeprefix('task/')} {value:.3f}" for key, value in record.items() if key.startswith("task/")
    ]:
        text += "; " + ", ".join(of_tasks)
    if "eval_reward_margin" in record:
        text += f", margin {record['eval_reward_margin']:.4f}, {record['eval_reward_accuracy']:.1%} right"
    return text + (", the best so far" if best else "")


def loss_text(record: dict[str, Any]) -> str:
    """Return a record's held-out loss, also in bits per byte if the tokenizer loses no text."""
    bits = record.get("eval_bits_per_byte")
    return f"{record['eval_loss']:.4f} nats a {'pair' if 'eval_reward_margin' in record else 'token'}" + (
        "" if bits is None else f", {bits:.3f} bits per byte"
    )


def trace_text(first: int, last: int, folder: Path) -> str:
    """Return a line that says where a trace is."""
    return f"trace of steps {first:,} to {last:,}: {folder} (for xprof; the perfetto_trace.json.gz in it for Perfetto)"


def time_text(clock: Clock, total: float, spent: float, spent_in_steps: float) -> str:
    """Return where the ``total`` seconds went.

    ``spent`` are the seconds of earlier starts, and ``spent_in_steps`` those of their steps that still count. If there
    are any, the text has the share of steps in all starts.
    """
    names: dict[str, Activity] = {
        "start": "start", "waiting for data": "data", "evaluation": "evaluation", "saving": "saving", "samples": "sample"
    }  # fmt: skip
    rest = ", ".join(f"{name} {clock.seconds[activity]:.1f} s" for name, activity in names.items())
    text = f"goodput: {clock.seconds['step'] / total:.1%} of {total:,.0f} s were spent in steps; {rest}"
    if spent:
        share = (spent_in_steps + clock.seconds["step"]) / (spent + total)
        text += f"\nover all starts: {share:.1%} of {spent + total:,.0f} s, not counting repeated steps"
    return text


def speed_text(clock: Clock, records: list[dict[str, Any]]) -> str:
    """Return the mean of the speeds in this start's records."""
    tokens, seconds = clock.recorded
    if not seconds or not records:
        return ""
    return f", {tokens / seconds:,.0f} tokens/s in steps on average"


def bad_steps_text(record: dict[str, Any]) -> str:
    """Return the number of bad steps up to the record."""
    return (
        f"bad steps: {record['bad_steps']:,} of {record['step']:,}, of which {record['skipped_steps']:,} were skipped"
    )


def closing_text(
    folder: RunFolder,
    step: int,
    clock: Clock,
    prompt: str,
    context: int,
    changed: Sequence[str] = (),
    talks: bool = False,
) -> str:
    """Return the last lines of a run: how it went, where the files are, and what to type next.

    context: the model's context in tokens, which bounds what it can answer.
    """
    total = clock.total
    lines = [f"at step {step:,} after {total:,.0f} s" + speed_text(clock, folder.records)]
    if (best := folder.best()) is not None:
        lines[0] += f"; best: step {best['step']:,}, {loss_text(best)}"
    if clock.seconds["step"] and folder.records:
        lines.append(time_text(clock, total, folder.spent, folder.spent_in_steps))
    if folder.records and folder.records[-1].get("bad_steps"):
        lines.append(bad_steps_text(folder.records[-1]))
    lines += [f"changed at this start: {change}" for change in changed]
    path = folder.path
    lines.append(
        f"checkpoints: {folder.checkpoints}   losses: {path / 'losses.png'}   numbers: {path / 'metrics.jsonl'}"
    )
    if talks and folder.samples_path.exists():
        lines[-1] += f"   answers: {folder.samples_path}"
    lines.append("now try:")
    asked = "--chat" if talks else shlex.quote(prompt)
    lines.append(
        f"  {typed('sample')} --ckpt {shlex.quote(str(path))} {asked} --max-new-tokens {min(NEXT_TOKENS, context)}"
    )
    return "\n".join(lines)
