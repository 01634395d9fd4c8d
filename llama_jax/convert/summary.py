"""The texts that a conversion prints: before it starts, the table of a dry run, and at the end."""

import math
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path

import jax

from llama_jax.build import count_parameters
from llama_jax.cli.progress import bytes_text, duration
from llama_jax.config import Weights
from llama_jax.convert.checkpoint_source import parts
from llama_jax.convert.layout import BLOCK_BYTES, EMBEDDINGS, all_tensors, blocks, tensors_of
from llama_jax.convert.llama2c import MODEL, TOKENIZER, written_bytes
from llama_jax.convert.source import Source, main_type, unread_text
from llama_jax.devices.memory import bytes_of
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.family import constants_of
from llama_jax.programs import typed
from llama_jax.storage.files import raw_bytes

# Memory of the process without weights, and in blocks what it holds of them: measured, see docs/convert.md.
BASE_BYTES = 350_000_000
BLOCKS_HELD = 8


def announce(source: Source, to: str, output: Path, weights: Weights) -> None:
    """Print what was found and what will happen."""
    args, size = source.args, weight_bytes(source)
    rows = {
        "family": source.family,
        "decided by": source.decided,
        "input": source.description,
        "model": f"{count_parameters(args):,} parameters of {main_type(source).name}, {bytes_text(size)}: dim {args.dim}, "
        f"{args.n_layers} layers, {args.n_heads} heads, {args.kv_heads} kv heads, hidden {args.hidden_width}",
        "constants": ", ".join(
            [
                f"norm_eps {args.norm_eps:g}, rope_theta {args.rope_theta:g}",
                *constants_of(args),
                f"context {args.max_seq_len:,}",
            ]
        ),
        "tokenizer": f"{source.tokenizer.model_path}, {source.tokenizer.vocab_size:,} tokens",
        "output": f"{output if output != Path() else '(none given)'}, as {to}{f' with {weights} matrices' if weights != 'auto' else ''}",
        "memory": f"{bytes_text(peak_bytes(source))} at most",
    }
    if len(set(source.dtypes.values())) > 1:
        rows["types"] = f"{types_text(source)}: each is kept"
    rows |= {"chat": _chat_text(source)} if source.chat.template or source.chat.end_ids else {}
    for name, text in rows.items():
        print(f"{name:>10}  {text}")
    if unread := unread_text(source):
        print(f"{'unknown':>10}  {unread}")
    for warning in source.warnings:
        print(f"{'warning':>10}  {warning}")


def _chat_text(source: Source) -> str:
    """Return what is kept about conversations."""
    template = source.chat.template
    texts = [f"a chat template of {len(template):,} characters"] if template else []
    ends = [f"{quoted(source.tokenizer.piece(i), 40)} ({i})" for i in source.chat.end_ids]
    return "; ".join(texts + ([f"a text ends with {' or '.join(ends)}"] if ends else []))


def weight_bytes(source: Source) -> int:
    """Return the bytes of all parameters."""
    args = source.args
    return sum(math.prod(t.matrix(args)) * source.dtypes[t.name].itemsize for t, _ in all_tensors(args))


def types_text(source: Source) -> str:
    """Return the types of all tensors: "float32 in norm, layers/ffn_norm; bfloat16 in all others"."""
    main = main_type(source)
    names: dict[str, list[str]] = {}
    for name, dtype in source.dtypes.items():
        names.setdefault(dtype.name, []).append(name.rpartition("/")[2])
    rarer = [f"{kind} in {', '.join(some)}" for kind, some in names.items() if kind != main.name]
    return "; ".join([*rarer, f"{main.name} in all others"])


def stored_bytes(source: Source, to: str, weights: Weights) -> int:
    """Return the bytes of all parameters in the form that will be written."""
    if to == "llama2c":
        return written_bytes(source)
    size = bytes_of([jax.ShapeDtypeStruct(part.shape, part.dtype) for part in parts(source, weights)])
    if to == "meta" and source.args.tie_embeddings:  # whose files have the output matrix too
        size += math.prod(EMBEDDINGS.matrix(source.args)) * source.dtypes[EMBEDDINGS.name].itemsize
    return size


def peak_bytes(source: Source) -> int:
    """Return the peak memory of a conversion, in bytes."""
    return BASE_BYTES + BLOCKS_HELD * min(2 * BLOCK_BYTES, weight_bytes(source))


def disk_for(output: Path, need: int) -> tuple[Path, int, bool]:
    """Return the nearest folder of ``output`` that exists, its free bytes, and whether ``need`` bytes fit there."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return place, free, free >= need * 1.01 + 10_000_000


def check_space(source: Source, output: Path, to: str, weights: Weights, dry_run: bool) -> None:
    """Print the disk space needed and free, and the time to expect.

    Raises UserError if there is too little space. A dry run only prints, since the conversion may be on another
    machine.
    """
    need = stored_bytes(source, to, weights)
    place, free, fits = disk_for(output, need)
    print(f"{'disk':>10}  {bytes_text(need)} needed, {bytes_text(free)} free")
    if dry_run:
        return
    if not fits:
        raise UserError(
            f"{output}: expected {bytes_text(need)} of free disk, found {bytes_text(free)}; free some, or choose another disk"
        )
    print(f"{'time':>10}  about {duration(_probe_seconds(source, place))}, estimated from one block")


def _probe_seconds(source: Source, place: Path) -> float:
    """Estimate the seconds of a conversion from reading and writing one block, which is discarded."""
    tensor = max(tensors_of(source.args), key=lambda t: math.prod(t.matrix(source.args)))
    start, stop = blocks(tensor, source.args, source.dtypes[tensor.name].itemsize)[0]
    began = time.perf_counter()
    rows = source.rows(tensor, 0, start, stop)
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(raw_bytes(rows))
        file.flush()
        os.fsync(file.fileno())
    source.release()
    return (time.perf_counter() - began) / max(rows.nbytes, 1) * weight_bytes(source)


def print_table(source: Source) -> None:
    """Print every tensor: our name, shape, type, and its name in the files."""
    for tensor, layer in all_tensors(source.args):
        name = f"{tensor.name}[{layer}]" if tensor.layered else tensor.name
        shape = ", ".join(map(str, tensor.sizes(source.args)))
        print(f"{name:<32} {f'[{shape}]':<20} {source.dtypes[tensor.name].name:<9} {source.origin(tensor, layer)}")


def close_dry_run() -> None:
    """Print what has been checked."""
    print(
        "all tensors are there, with the right shapes; nothing was written and no value was read, except to compare copies: "
        "a conversion also finds damage and numbers that are not finite"
    )


def close(
    source: Source, to: str, output: Path, weights: Weights, digest: str, seconds: float, warnings: list[str]
) -> None:
    """Print where things are, what to type next, and finally what is wrong with the model."""
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(
        f"{output}: {bytes_text(size)} in {duration(seconds)}, {bytes_text(weight_bytes(source) / max(seconds, 1e-9))} a second"
    )
    print(f"sha256 of the weights{', before quantization' if weights != 'auto' else ''}: {digest}")
    words = "--chat" if source.chat.template else '"Once upon a time"'
    commands = {
        "llama-jax": f"{typed('sample')} --ckpt {shlex.quote(str(output))} {words}",
        "huggingface": f"AutoModelForCausalLM.from_pretrained({str(output)!r})",
        "meta": f"torch.load({str(output / 'consolidated.00.pth')!r}, weights_only=True)",
        "llama2c": f"./run {shlex.quote(str(output / MODEL))} -z {shlex.quote(str(output / TOKENIZER))}, in llama2.c's folder",
    }
    print(f"now try:\n  {commands[to]}")
    for warning in warnings:
        print(f"{'warning':>10}  {warning}")
