"""Finds the model among a folder's files: the one that transformers would load, else Meta's shards.

Transformers loads the first of these that exists (modeling_utils.py, ``_get_resolved_checkpoint_files``): the file that
config.json names, model.safetensors, the shards of model.safetensors.index.json, pytorch_model.bin and its shards.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_jax.errors import UserError, quoted
from llama_jax.foreign.commands import convert_command, merge_commands, resave_commands
from llama_jax.foreign.keys import read_json, take
from llama_jax.storage.locations import children

Layout = Literal["auto", "huggingface", "meta", "llama-jax"]
CONFIG, PARAMS, ADAPTER = "config.json", "params.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD = re.compile(r"consolidated\.\d+\.pth", re.ASCII)
# Names of weights in any project.
WEIGHTS = re.compile(
    r"((model|pytorch_model|consolidated|adapter_model|tf_model|flax_model|lit_model)\b.*"
    r"\.(safetensors|bin|pth|pt|h5|msgpack|index\.json)|.*\.gguf|params\.json|config\.json|adapter_config\.json)"
)
# Models of up to 70B have about 60 kB.
MAX_INDEX = 10_000_000
# No release of Meta's has more shards.
MAX_SHARDS = 64


@dataclass(frozen=True)
class Found:
    """The layout of a folder, the files that decide it, and files of other models next to them."""

    layout: Literal["huggingface", "meta"]
    decided: str


def find_layout(folder: Path, wanted: Layout = "auto") -> Found | None:
    """Return the layout of ``folder``, complete or not. None if it is neither layout, or not the ``wanted`` one.

    Raises UserError if the folder holds two models and nothing decides between them.
    """
    names = sorted(path.name for path in children(folder))
    shards = [name for name in names if SHARD.fullmatch(name)]
    config = (folder / CONFIG).is_file()
    read = _read_by_transformers(folder)
    if wanted == "huggingface" or (wanted == "auto" and config and read):
        if wanted == "auto" and ADAPTER in names:
            raise UserError(
                f"{folder}: expected one model, found an adapter ({ADAPTER}) beside {read[0]}, which peft would add to it; "
                "convert the model without it with --layout huggingface, or merge it first (peft's merge_and_unload)"
            )
        decided = f"{CONFIG} and {_some(read or [SINGLE])}, which transformers would load"
        return Found("huggingface", decided + _not_read(names, [CONFIG, *read]))
    if wanted == "meta" or (wanted == "auto" and shards):
        pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
        if wanted == "auto" and config and pickled and not (folder / INDEX).is_file():
            raise UserError(
                f"{folder}: expected one model, found Meta's {shards[0]} and Hugging Face's {pickled}, which transformers would "
                f"load and this project does not read; convert Meta's with --layout meta"
            )
        return Found(
            "meta", f"{PARAMS} and {_some(shards or ['consolidated.00.pth'])}{_not_read(names, [PARAMS, *shards])}"
        )
    if wanted == "auto" and (config or (folder / PARAMS).is_file()):
        return Found("huggingface", CONFIG) if config else Found("meta", PARAMS)
    return None


def weight_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return the safetensors files that transformers would load from ``folder``.

    Raises UserError if some are missing.
    """
    distributed = [path.name for path in children(folder) if re.match(r"shard-\d{5}-model-", path.name)]
    if distributed:
        raise UserError(
            f"{folder}: expected {SINGLE} or {INDEX}, found {distributed[0]}, of a distributed save, which transformers would "
            "load; load it with transformers and save_pretrained it to another folder"
        )
    named = take(config, "transformers_weights", str, folder / CONFIG, None)
    if named is not None and not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", named, re.ASCII):
        raise UserError(
            f"{folder / CONFIG}: transformers_weights: expected the name of a safetensors file, found {quoted(named)}"
        )
    first = named or next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder}: expected {SINGLE} or {INDEX}, found {_instead(folder)}")
    if not first.endswith(".json"):
        return [_there(folder, first, folder / CONFIG)]
    places = read_json(folder / first, MAX_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / first}: expected a weight_map from tensors to files, found none")
    return [_there(folder, name, folder / first) for name in sorted(set(places.values()))]


def shard_files(folder: Path) -> list[Path]:
    """Return Meta's consolidated.00.pth, .01.pth and so on. Raises UserError if there is none or one is missing."""
    paths = sorted(path for path in children(folder) if re.fullmatch(r"consolidated\..*\.pth", path.name))
    if not paths:
        mistral = (folder / "consolidated.safetensors").is_file()
        found = "consolidated.safetensors, in Mistral's layout, which is not read" if mistral else "no such file"
        raise UserError(
            f"{folder}: expected consolidated.00.pth, found {found}; download Meta's files, or Hugging Face's"
        )
    if len(paths) > MAX_SHARDS:
        raise UserError(f"{folder}: expected up to {MAX_SHARDS} shards, found {len(paths)}")
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02}.pth":
            raise UserError(f"{folder}: expected consolidated.{i:02}.pth, found {path.name} next; a shard is missing")
    return paths


def index_of(folder: Path, files: list[str]) -> dict[str, str]:
    """Return the file of each tensor by the index that lists ``files``, or {} if there is no such index."""
    if not (folder / INDEX).is_file() or files == [SINGLE]:
        return {}
    return read_json(folder / INDEX, MAX_INDEX).get("weight_map") or {}


def _there(folder: Path, name: str, by: Path) -> str:
    """Return ``name``, which the file ``by`` names, if it is a safetensors file in ``folder``.

    Raises UserError if not.
    """
    if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII) or not (folder / name).is_file():
        link = (
            ", but a link to nothing: its download was not finished" if (folder / Path(name).name).is_symlink() else ""
        )
        raise UserError(f"{by}: expected {quoted(name)} beside it, found no such safetensors file{link}")
    return name


def _read_by_transformers(folder: Path) -> list[str]:
    """Return the safetensors files that transformers would load, or [] if some are missing."""
    try:
        return weight_files(folder, read_json(folder / CONFIG))
    except UserError:
        return []


def _instead(folder: Path) -> str:
    """Describe what the folder holds instead of safetensors files that transformers would load."""
    names = [path.name for path in children(folder)]
    if ADAPTER in names:
        return f"an adapter (LoRA); merge it into its base: {merge_commands(folder)}"
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return f"pytorch_model.bin, a pickle, which is not read; type: {resave_commands(folder)}"
    if "consolidated.safetensors" in names:
        return "consolidated.safetensors, in Mistral's layout, which is not read; download the files named model*.safetensors too"
    if any(SHARD.fullmatch(path.name) for path in children(folder / "original")):
        return f"neither, but Meta's in original; type: {convert_command(folder / 'original', folder.name)}"
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".bin", ".pth", ".h5", ".msgpack"))]
    return f"neither, but {_some(sorted(others))}" if others else "neither; download the weights too"


def _not_read(names: list[str], read: list[str]) -> str:
    others = [name for name in names if WEIGHTS.fullmatch(name) and name not in read]
    if INDEX in others:
        others = [name for name in others if not re.search(r"-\d{5}-of-\d{5}", name)]
    return f"; not read: {_some(others)}" if others else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
