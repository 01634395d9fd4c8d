"""What a run says: before it starts, at evaluations, and at the end."""

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from llama_jax.config import Config, ModelArgs
from llama_jax.data import Data
from llama_jax.data.text import replacement_warning
from llama_jax.errors import UserError
from llama_jax.model import count_parameters
from llama_jax.sharding import describe
from llama_jax.training.flops import train_flops_per_token

# What the command that is proposed at the end generates: a whole story.
NEXT_TOKENS = 256


def announce(
    config: Config, data: Data, mesh: jax.sharding.Mesh, dtype: str, steps: int, start: int, save_dir: Path
) -> None:
    """Say what will happen."""
    model, train, manifest = config.model, config.train, data.tokens.manifest
    tokens = train.batch_size * model.max_seq_len
    held_out = manifest.tokens["eval"]
    epochs = steps * tokens / manifest.tokens["train"]
    device = jax.devices()[0]
    rows = {
        "model": f"{count_parameters(model):,} parameters: dim {model.dim}, {model.n_layers} layers, {model.n_heads} heads, "
        f"{model.kv_heads} kv heads, context {model.max_seq_len}",
        "text": f"{data.source}: {manifest.tokens['train']:,} tokens to train on, {held_out:,} held out, "
        f"vocabulary {data.tokenizer.vocab_size:,}",
        "training": f"{steps:,} steps of {tokens:,} tokens ({epochs:.1f} epochs), "
        f"{train_flops_per_token(model) * tokens * steps / 1e12:,.1f} TFLOP",
        "devices": f"{len(mesh.devices.flat)} x {device.device_kind}, mesh: {describe(dict(mesh.shape))}, {dtype}, attention: xla",
        "run folder": str(save_dir),
    }
    for name, text in rows.items():
        print(f"{name:>10}  {text}")
    if manifest.replaced_sequences:
        print(replacement_warning(manifest.replaced_sequences))
    if data.floor is not None:
        print(f"{'floor':>10}  {data.floor:.3f} bits per byte, the entropy of the stories' grammar")
    if start:
        print(f"{'resumed':>10}  at step {start:,}")


def check_memory(args: ModelArgs, mesh: jax.sharding.Mesh) -> None:
    """Raise UserError where parameters, gradients and AdamW's two moments alone, float32 all, do not fit."""
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    _check_fits(16 * count_parameters(args) / shards, mesh, "the parameters and the optimizer", "mesh.fsdp larger")


def announce_cost(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh, seconds: float) -> None:
    """Say what the compiled step needs. Raises UserError where the devices have less."""
    analysis = compiled.memory_analysis()
    if analysis is not None:
        need = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        print(f"{'memory':>10}  {need / 1e6:,.0f} MB a device; the step compiled in {seconds:.1f} s")
        _check_fits(need, mesh, "the step", "train.batch_size smaller, or train.gradient_accumulation_steps larger")


def _check_fits(need: float, mesh: jax.sharding.Mesh, what: str, hint: str) -> None:
    limit = memory_of(mesh.local_devices)
    if limit is not None and need > limit:
        raise UserError(
            f"memory: expected up to {limit / 1e9:,.1f} GB a device, found that {what} need {need / 1e9:,.1f} GB; "
            f"make the model smaller, or {hint}"
        )


def memory_of(devices: Sequence[jax.Device]) -> float | None:
    """Bytes of memory that one of the devices has; None where that is not known. CPU devices share the machine's."""
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit")


class Progress:
    """Where a run stands: a bar on a terminal, elsewhere a line every so many seconds."""

    SECONDS = 10

    def __init__(self, steps: int, start: int):
        self._steps, self._step = steps, start
        self._start, self._began = start, time.monotonic()
        self._printed = self._began
        # On standard error, where the bar would be written.
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05, disable=None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self) -> None:
        """A step is done."""
        self._step += 1
        self._bar.update()

    def show(self, record: dict[str, Any]) -> None:
        """Show the loss and the speed of a record."""
        text = f"loss {record['train_loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(text, refresh=False)
        now = time.monotonic()
        if self._bar.disable and now - self._printed >= self.SECONDS:
            self._printed = now
            left = (now - self._began) / (self._step - self._start) * (self._steps - self._step)
            print(f"step {self._step:,} of {self._steps:,}, {text}, {duration(left)} to go", flush=True)


def duration(seconds: float) -> str:
    """90 -> "1 min 30 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h " if hours else "") + (f"{minutes} min " if minutes else "") + f"{seconds} s"


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters, but for line ends and tabs, as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def expected_time_text(steps: int, step_seconds: float) -> str:
    """How long the rest of the steps will take, evaluations aside."""
    return f"{'time':>10}  about {duration(steps * step_seconds)} to go, evaluations aside"


def evaluation_text(record: dict[str, Any], floor: float | None, best: bool) -> str:
    """One line about an evaluation."""
    bits = record["eval_bits_per_byte"]
    text = f"step {record['step']:,}: eval loss {record['eval_loss']:.4f} nats a token, {bits:.3f} bits per byte"
    if floor is not None:
        text += f" ({bits - floor:+.3f} from the floor)"
    return text + (", the best so far" if best else "")


def say(text: str) -> None:
    """Print a line without breaking the progress bar."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def closing_text(save_dir: Path, steps: int, seconds: float, best: dict[str, Any] | None, prompt: str) -> str:
    """Where things are, and what to type next."""
    lines = [f"at step {steps:,} after {seconds:.0f} s"]
    if best is not None:
        lines[0] += (
            f"; best: step {best['step']:,}, {best['eval_loss']:.4f} nats a token, {best['eval_bits_per_byte']:.3f} bits per byte"
        )
    lines.append(
        f"checkpoints: {save_dir / 'checkpoints'}   losses: {save_dir / 'losses.png'}   numbers: {save_dir / 'metrics.jsonl'}"
    )
    lines.append("now try:")
    lines.append(
        f"  python sample.py --ckpt {shlex.quote(str(save_dir))} {shlex.quote(prompt)} --max-new-tokens {NEXT_TOKENS}"
    )
    return "\n".join(lines)
