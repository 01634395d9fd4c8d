"""The commands that errors tell the user to type."""

import os
import re
import shlex
from pathlib import Path

from llama_jax.programs import typed
from llama_jax.storage.locations import is_remote


def convert_command(path: Path, name: str = "", tokenizer: Path | None = None) -> str:
    """Return the command that converts the model in ``path`` into a new folder named ``name`` or like ``path``."""
    if is_remote(path):
        return f"copy it to a disk (gcloud storage cp -r {path} .), and convert it there with {typed('convert')}"
    place = path.absolute()
    # In Hugging Face's cache a folder is named by a commit. The model's name is further up.
    own = place.parent.parent.name.rpartition("--")[2] if place.parent.name == "snapshots" else place.name
    output = Path("checkpoints") / (name or own or "model")
    while os.path.lexists(output):
        output = output.with_name(output.name + "-converted")
    given = f" --tokenizer {shlex.quote(str(tokenizer))}" if tokenizer else ""
    return f"{typed('convert')} --input {shlex.quote(str(path))} --output {shlex.quote(str(output))}{given}"


def adapter_command(path: Path) -> str:
    """Return the command that converts the adapter in ``path``, whose base is converted already."""
    return f"{convert_command(path)} --base BASE, with BASE for the converted base"


def merge_commands(path: Path) -> str:
    """Return the commands that merge the adapter in ``path`` into its base with peft and then convert the result."""
    merged = path.with_name(path.name + "-merged")
    program = (
        f"from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({str(path)!r}).merge_and_unload()"
        f".save_pretrained({str(merged)!r})"
    )
    return f"{_python(program)} && {convert_command(merged, path.name, Path('BASE'))}, with BASE for the base's folder"


def _python(program: str) -> str:
    return f"python -c {shlex.quote(program)}" if re.search(r"[\"$`\\!]", program) else f'python -c "{program}"'
