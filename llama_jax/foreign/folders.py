"""Explains a folder or file that is not a checkpoint of ours, and names the next command."""

import re
from pathlib import Path

from llama_jax.errors import UserError, quoted
from llama_jax.foreign.commands import adapter_command, convert_command, merge_commands
from llama_jax.foreign.config_json import QUANTIZED, read_config
from llama_jax.foreign.keys import read_json
from llama_jax.foreign.layouts import (
    ADAPTER,
    CONFIG,
    ORIGINAL,
    PARAMS,
    SHARD,
    Found,
    consolidated_files,
    find_layout,
    shard_files,
    weight_files,
)
from llama_jax.foreign.params_json import check_params
from llama_jax.foreign.vocabulary import find_tokenizer
from llama_jax.storage.files import LFS_POINTER
from llama_jax.storage.locations import children, is_remote

OTHER_FRAMEWORK = "load it with transformers, and save_pretrained it as safetensors"
# A name in a folder of another project, what the folder is, and what to do.
MARKS = (
    (r"quantize_config\.json", "a model of quantized matrices (GPTQ)", QUANTIZED),
    (r".*\.gguf", "a model in GGUF", ORIGINAL),
    (r"lit_model\.pth", "a checkpoint of litgpt", "write it in Hugging Face's layout with litgpt convert from_litgpt"),
    (r".*\.distcp", "a distributed checkpoint of torch", "save its gathered weights as safetensors"),
    (r"zero_to_fp32\.py|global_step\d+", "a checkpoint of DeepSpeed", "its zero_to_fp32.py writes the weights"),
    (r"latest_checkpointed_iteration\.txt", "a checkpoint of Megatron", "write it in Hugging Face's layout with its tools"),
    (r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt", "an orbax checkpoint of another project", "have that project write Hugging Face's layout"),
    (r"checkpoint_\d+|.*\.msgpack", "a checkpoint of Flax", OTHER_FRAMEWORK),
    (r".*\.h5|saved_model\.pb|.*\.ckpt\.index", "a model of TensorFlow", OTHER_FRAMEWORK),
    (r".*\.onnx", "a model in ONNX", ORIGINAL),
    (r"manifest\.json", "a folder of prepared tokens", "give it to training, as --data.filepath"),
    (r".*\.(safetensors|bin|pth|pt)", "weights without a config.json or params.json", "fetch those too: they say what model it is"),
    (r"config\.toml", "a run with no checkpoint in it", "start its training again"),
)  # fmt: skip
# The first bytes of a file, what it is, and what to do.
MAGIC = (
    (b"GGUF", "in GGUF", ORIGINAL),
    (LFS_POINTER, "of Git LFS, a pointer", "fetch the file itself with git lfs pull"),
    (b"\x1f\x8b", "of gzip", "unpack it, and give the folder"),
    (b"<", "of HTML, as failed downloads leave behind", "download it again"),
)


def found_in(path: Path) -> str:
    """Return the end of an error about ``path``, which is not a checkpoint: what was found there, and what to do."""
    names = sorted(child.name for child in children(path))
    if whole := _ours_around(path):
        return f"found a part of {whole}; give that folder"
    if "checksums.json" in names and "params" in names:
        return "found a checkpoint of this project without its folder model; use another copy of it, or another step"
    if not names and not path.is_dir():
        return f"found {_file(path) if path.exists() else 'nothing' + hub_hint(path)}"
    if ADAPTER in names and CONFIG not in names:
        return f"found an adapter (LoRA) of {_base(path)}; convert it: {adapter_command(path)}; or merge the two: {merge_commands(path)}"
    try:
        found = find_layout(path)
        if found is not None:
            return _model(path, found)
    except UserError as error:
        return f"found a model that cannot be converted: {error}"
    for pattern, what, advice in MARKS:
        if mark := next((name for name in names if re.fullmatch(pattern, name)), None):
            return f"found {what} ({quoted(mark, 40)}); {advice}"
    inside = [child for place in (path, path / "snapshots") for child in children(place) if _is_model(child)]
    if inside:
        return f"found no checkpoint in it, but below it: {', '.join(sorted(map(str, inside))[:4])}; give one of these"
    return "found no checkpoint in it"


def _ours_around(path: Path) -> str:
    """Return the name of the checkpoint or run of this project that ``path`` is a part of, or ""."""
    if is_remote(path) or not path.exists():
        return ""
    above = path.absolute().parent
    if (above / "model" / "model.json").is_file() or (path.name == "model.json" and above.name == "model"):
        return f"the checkpoint {path.parent if above.name != 'model' else path.parent.parent}"
    if (above / "config.toml").is_file() and (above / "run.json").is_file():
        return f"the run {path.parent}"
    return ""


def hub_hint(path: Path) -> str:
    """Return how to download ``path`` if it does not exist and looks like a name on Hugging Face's hub, else ""."""
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return f"; a model of Hugging Face's hub is fetched with: hf download {path} --local-dir {path.name}"
    return ""


def _model(path: Path, found: Found) -> str:
    """Say what to do about a model in another layout. Raises UserError if it cannot be converted."""
    if not is_remote(path) and found.layout != "llama2c":
        if found.layout == "huggingface":
            config = read_json(path / CONFIG)
            read_config(config, path / CONFIG, 0)
            weight_files(path, config)
        else:
            (consolidated_files if found.layout == "mistral" else shard_files)(path)
            check_params(read_json(path / PARAMS), path / PARAMS)
        find_tokenizer("", path)
    whose = {"huggingface": "Hugging Face's", "meta": "Meta's", "mistral": "Mistral's", "llama2c": "llama2.c's"}[
        found.layout
    ]
    return (
        f"found a model in {whose} layout ({found.decided}); convert it, and give the result: {convert_command(path)}"
    )


def _base(path: Path) -> str:
    """Return the name of the model that the adapter in ``path`` belongs to."""
    try:
        return quoted(read_json(path / ADAPTER).get("base_model_name_or_path"))
    except UserError:
        return "a model that it does not name"


def _is_model(path: Path) -> bool:
    """Return whether a folder looks like a model of any kind. False if it cannot be read."""
    try:
        names = set() if is_remote(path) else {child.name for child in children(path)}
    except UserError:
        return False
    whole = bool(names & {"checkpoints", ADAPTER, CONFIG}) or ("model" in names and "params" in names)
    return whole or any(SHARD.fullmatch(name) for name in names)


def _file(path: Path) -> str:
    """Say what a file is and what to do."""
    if not path.is_file():
        return "a file that holds nothing by itself; give a folder"
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "an empty file; download it again"
    for magic, what, advice in MAGIC:
        if start.lstrip().startswith(magic):
            return f"a file {what}; {advice}"
    # Files of llama2.c's are models by themselves, so those beside this one say nothing about it.
    if any((path.parent / name).is_file() for name in (CONFIG, PARAMS)) or any(
        SHARD.fullmatch(child.name) for child in children(path.parent)
    ):
        try:
            if find_layout(path.parent) is not None:
                return f"a file; give its folder: {convert_command(path.parent)}"
        except UserError as error:
            return f"a file; give its folder, which holds two models: {error}"
    if path.suffix in (".safetensors", ".pth", ".pt", ".bin") or start.startswith(b"PK"):
        return "a file of weights; give a folder that has its config.json or params.json too"
    return "a file; give a folder"
