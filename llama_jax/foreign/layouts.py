"""Finds the model among a folder's files: the one that transformers would load, else Meta's shards, else Mistral's.

Transformers loads the first of these that exists (modeling_utils.py, ``_get_resolved_checkpoint_files``): the file that
config.json names, model.safetensors, the shards of model.safetensors.index.json, pytorch_model.bin and its shards.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_jax.errors import UserError, quoted
from llama_jax.foreign.commands import convert_command, merge_commands
from llama_jax.foreign.keys import read_json, take
from llama_jax.foreign.llama2c import model_files, read_header
from llama_jax.storage.locations import children, is_remote

Layout = Literal["auto", "huggingface", "meta", "mistral", "llama2c", "llama-jax"]
CONFIG, PARAMS, ADAPTER = "config.json", "params.json", "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The order in which transformers looks for weights.
HUGGING_FACE = (SINGLE, INDEX, *PICKLED)
CONSOLIDATED, CONSOLIDATED_INDEX = "consolidated.safetensors", "consolidated.safetensors.index.json"
NUMBERED = re.compile(r"consolidated-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
SHARD = re.compile(r"consolidated\.\d+\.pth", re.ASCII)
ORIGINAL = "take the model that it was made from, as safetensors"
# Names of weights in any project.
WEIGHTS = re.compile(
    r"((model|pytorch_model|consolidated|adapter_model|tf_model|flax_model|lit_model)\b.*"
    r"\.(safetensors|bin|pth|pt|h5|msgpack|index\.json)|.*\.gguf|params\.json|config\.json|adapter_config\.json)"
)
# Names of files that are being downloaded.
UNFINISHED = re.compile(r"\.(incomplete|part|crdownload|aria2|tmp|download)$")
# Models of up to 70B have about 60 kB.
MAX_INDEX = 10_000_000
# No release of Meta's has more shards.
MAX_SHARDS = 64
MAX_FILES = 1000


@dataclass(frozen=True)
class Found:
    """The layout of a model, and where it is."""

    layout: Literal["huggingface", "meta", "mistral", "llama2c"]
    decided: str
    """The files that decide the layout, and files of other models next to them."""
    path: Path
    """The folder, or the file of llama2.c's."""


def is_adapter(folder: Path) -> bool:
    """Return whether ``folder`` holds an adapter (LoRA) in PEFT's layout, and no model that could be meant instead."""
    names = {path.name for path in children(folder)}
    return ADAPTER in names and not _read_by_transformers(folder) and not any(map(SHARD.fullmatch, names))


def find_layout(folder: Path, wanted: Layout = "auto") -> Found | None:
    """Return the layout of ``folder``, complete or not. None if it is of no layout, or not the ``wanted`` one.

    ``folder`` may also be a file of llama2.c's. Raises UserError if the folder holds two models and nothing decides
    between them.
    """
    if not is_remote(folder) and folder.is_file():
        header = read_header(folder) if wanted in ("auto", "llama2c") else None
        return None if header is None else Found("llama2c", f"the header of {folder.name}", folder)
    names = sorted(path.name for path in children(folder))
    shards = [name for name in names if SHARD.fullmatch(name)]
    config = (folder / CONFIG).is_file()
    read = _read_by_transformers(folder)

    def is_it(layout: Layout, whole: object, half: object) -> bool:
        """Return whether it is this layout: by files that are whole, or half of them where the person names it."""
        return bool(whole if wanted == "auto" else wanted == layout and (whole or half))

    if is_it("huggingface", config and read, config or read):
        if wanted == "auto" and ADAPTER in names:
            raise UserError(
                f"{folder}: expected one model, found an adapter ({ADAPTER}) beside {read[0]}, which peft would add to it; "
                "convert the model without it with --layout huggingface, or merge it first (peft's merge_and_unload)"
            )
        decided = f"{CONFIG} and {_some(read or [SINGLE])}, which transformers would load"
        return Found("huggingface", decided + _not_read(names, [CONFIG, *read, *_index_of_read(names, read)]), folder)
    mistral = [name for name in names if name in (CONSOLIDATED, CONSOLIDATED_INDEX) or NUMBERED.fullmatch(name)]
    has_params = (folder / PARAMS).is_file()
    if is_it("meta", shards, has_params and not mistral):
        return Found(
            "meta",
            f"{PARAMS} and {_some(shards or ['consolidated.00.pth'])}{_not_read(names, [PARAMS, *shards])}",
            folder,
        )
    if is_it("mistral", mistral and has_params, mistral or (has_params and not shards)):
        return Found(
            "mistral", f"{PARAMS} and {_some(mistral or [CONSOLIDATED])}{_not_read(names, [PARAMS, *mistral])}", folder
        )
    if wanted == "auto" and (config or has_params):
        return Found("huggingface", CONFIG, folder) if config else Found("meta", PARAMS, folder)
    return _llama2c(folder) if wanted in ("auto", "llama2c") else None


def _llama2c(folder: Path) -> Found | None:
    """Return llama2.c's model in ``folder``, or None. Raises UserError if there are several."""
    files = model_files(folder)
    if len(files) > 1:
        raise UserError(
            f"{folder}: expected one model, found several of llama2.c's: {_some([path.name for path in files])}; give the file"
        )
    return Found("llama2c", f"the header of {files[0].name}", files[0]) if files else None


def weight_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """Return the files, safetensors or what torch saved, that transformers would load from ``folder``.

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
    first = named or next((name for name in HUGGING_FACE if (folder / name).is_file()), None)
    if first is None:
        raise UserError(f"{folder}: expected {SINGLE}, {INDEX} or {PICKLED[0]}, found {_instead(folder)}")
    if not first.endswith(".json"):
        return [_there(folder, first, folder / CONFIG)]
    return _files_of_index(folder, first)


def shard_files(folder: Path) -> list[Path]:
    """Return Meta's consolidated.00.pth, .01.pth and so on. Raises UserError if there is none or one is missing."""
    paths = sorted(path for path in children(folder) if re.fullmatch(r"consolidated\..*\.pth", path.name))
    if not paths:
        raise UserError(
            f"{folder}: expected consolidated.00.pth, found no such file; download Meta's files, or Hugging Face's"
        )
    if len(paths) > MAX_SHARDS:
        raise UserError(f"{folder}: expected up to {MAX_SHARDS} shards, found {len(paths)}")
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02}.pth":
            raise UserError(f"{folder}: expected consolidated.{i:02}.pth, found {path.name} next; a shard is missing")
    return paths


def consolidated_files(folder: Path) -> list[str]:
    """Return Mistral's files: consolidated.safetensors, or those that the index lists, or those that are numbered.

    Raises UserError if there is none or one is missing.
    """
    names = [path.name for path in children(folder)]
    if CONSOLIDATED in names:
        return [CONSOLIDATED]
    if CONSOLIDATED_INDEX in names:
        return _files_of_index(folder, CONSOLIDATED_INDEX)
    numbered = sorted(name for name in names if NUMBERED.fullmatch(name))
    if not numbered:
        raise UserError(f"{folder}: expected {CONSOLIDATED}, found no such file; download Mistral's files")
    count = int(numbered[0][-17:-12])
    for i in range(1, min(count, MAX_FILES) + 1):
        if (name := f"consolidated-{i:05}-of-{count:05}.safetensors") not in numbered:
            raise UserError(f"{folder}: expected {name} beside {numbered[0]}, found none; a file is missing")
    if len(numbered) != count:
        raise UserError(
            f"{folder}: expected {count} files as {numbered[0]} says, found {len(numbered)}; one download a folder"
        )
    return numbered


def _files_of_index(folder: Path, index: str) -> list[str]:
    """Return the files that ``index`` lists. Raises UserError if one is missing."""
    places = read_json(folder / index, MAX_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / index}: expected a weight_map from tensors to files, found none")
    return [_there(folder, name, folder / index) for name in sorted(set(places.values()))]


def index_of(folder: Path, files: list[str]) -> dict[str, str]:
    """Return the file of each tensor by the index that lists ``files``, or {} if there is no such index."""
    if not (folder / INDEX).is_file() or files == [SINGLE]:
        return {}
    return read_json(folder / INDEX, MAX_INDEX).get("weight_map") or {}


def _there(folder: Path, name: str, by: Path) -> str:
    """Return ``name``, which the file ``by`` names, if it is a file of weights in ``folder``.

    Raises UserError if not.
    """
    kind = "bin" if by.name == PICKLED[1] or name in PICKLED else "safetensors"
    if not re.fullmatch(rf"[\w.-]+\.{kind}", name, re.ASCII) or not (folder / name).is_file():
        link = (
            ", but a link to nothing: its download was not finished" if (folder / Path(name).name).is_symlink() else ""
        )
        raise UserError(
            f"{by}: expected {quoted(name)} beside it, found no such file of weights{link}; download it, too"
        )
    return name


def _read_by_transformers(folder: Path) -> list[str]:
    """Return the files that transformers would load, or [] if some are missing."""
    try:
        return weight_files(folder, read_json(folder / CONFIG))
    except UserError:
        return []


def _instead(folder: Path) -> str:
    """Describe what the folder holds instead of weights that transformers would load."""
    names = [path.name for path in children(folder)]
    if ADAPTER in names:
        return f"an adapter (LoRA); merge it into its base: {merge_commands(folder)}"
    if any(re.fullmatch(r"pytorch_model-\d{5}-of-\d{5}\.bin", name) for name in names):
        return f"shards of it without {PICKLED[1]}, which lists them; download that too"
    if any(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name) for name in names):
        return f"shards of it without {INDEX}, which lists them; download that too"
    if gguf := next((name for name in sorted(names) if name.endswith(".gguf")), None):
        return f"a model in GGUF ({quoted(gguf, 60)}), which is not read; {ORIGINAL}"
    if CONSOLIDATED in names:
        return f"{CONSOLIDATED}, in Mistral's layout, whose configuration is {PARAMS}; download that too"
    if any(SHARD.fullmatch(path.name) for path in children(folder / "original")):
        return f"neither, but Meta's in original; type: {convert_command(folder / 'original', folder.name)}"
    if lost := [name for name in sorted(names) if WEIGHTS.fullmatch(name) and not (folder / name).exists()]:
        return f"{lost[0]}, a link to nothing: its download was not finished, or its target is gone; download it again"
    if half := [name for name in sorted(names) if UNFINISHED.search(name)]:
        return f"neither, but {quoted(half[0], 60)}, of a download that was not finished; start it again"
    others = [name for name in names if name.endswith((".safetensors", ".gguf", ".bin", ".pth", ".h5", ".msgpack"))]
    return f"neither, but {_some(sorted(others))}" if others else "neither; download the weights too"


def _index_of_read(names: list[str], read: list[str]) -> list[str]:
    """Return the index that lists the files ``read``, which is read with them, or []."""
    if not read or SINGLE in read or PICKLED[0] in read:
        return []
    return [name for name in (INDEX, PICKLED[1]) if name in names][:1]


def _not_read(names: list[str], read: list[str]) -> str:
    others = [name for name in names if WEIGHTS.fullmatch(name) and name not in read]
    if INDEX in others:
        others = [name for name in others if not re.search(r"-\d{5}-of-\d{5}", name)]
    return f"; not read: {_some(others)}" if others else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
