"""What to type to go on: the commands that errors end with."""

import os
import re
import shlex
from pathlib import Path

from llama_jax.cli.programs import typed
from llama_jax.storage.locations import is_remote


def convert_command(path: Path, name: str = "", tokenizer: Path | None = None) -> str:
    """What to type to convert the model in ``path``, into a new folder of the name ``name`` or of its own."""
    if is_remote(path):
        return f"copy it to a disk (gcloud storage cp -r {path} .), and convert it there with {typed('convert')}"
    place = path.absolute()
    # In Hugging Face's cache a folder has the name of a commit; the model's name is further up.
    own = place.parent.parent.name.rpartition("--")[2] if place.parent.name == "snapshots" else place.name
    output = Path("checkpoints") / (name or own or "model")
    while os.path.lexists(output):
        output = output.with_name(output.name + "-converted")
    given = f" --tokenizer {shlex.quote(str(tokenizer))}" if tokenizer else ""
    return f"{typed('convert')} --input {shlex.quote(str(path))} --output {shlex.quote(str(output))}{given}"


def resave_commands(path: Path) -> str:
    """What to type to have transformers write what it reads of ``path`` as safetensors, and then to convert that."""
    again = path.with_name(path.name + "-safetensors")
    program = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(path)!r}).save_pretrained({str(again)!r})"
    return f"{_python(program)} && {convert_command(again, path.name, path / 'tokenizer.model')}"


def merge_commands(path: Path) -> str:
    """What to type to have peft merge the adapter in ``path`` into its base, and then to convert that."""
    merged = path.with_name(path.name + "-merged")
    program = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({str(path)!r}).merge_and_unload()"
        f".save_pretrained({str(merged)!r})"
    )
    return f"{_python(program)} && {convert_command(merged, path.name, Path('BASE/tokenizer.model'))}, with BASE for the base's folder"


def _python(program: str) -> str:
    return f"python -c {shlex.quote(program)}" if re.search(r"[\"$`\\!]", program) else f'python -c "{program}"'
