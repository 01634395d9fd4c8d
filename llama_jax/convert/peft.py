"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, read and written.

PEFT names the factors of a matrix "base_model.model." + Hugging Face's name + ".lora_A.weight" [rank, in] and
".lora_B.weight" [out, rank] (huggingface/peft, docs/source/developer_guides/checkpoint.md). Queries and keys are in
Hugging Face's order of heads, which is ours.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.adapters import PLACES, check_targets, sides
from llama_jax.chat.formats import TEMPLATE, ChatSetup
from llama_jax.checkpoint import Checkpoint, save_within
from llama_jax.checkpoint.adapted import digest_of
from llama_jax.checkpoint.adapter_record import AdapterRecord
from llama_jax.checkpoint.identity import are_parameters
from llama_jax.config import ModelArgs
from llama_jax.convert.layout import TABLE, tensors_of
from llama_jax.convert.reader import count_not_finite
from llama_jax.convert.safetensors import SafetensorsWriter, metadata_of
from llama_jax.convert.tensor_files import TensorFiles
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.keys import Keys, Neutral, names, read_json, take
from llama_jax.lora_args import MATRICES, LoraArgs, Target
from llama_jax.storage.files import write_atomically
from llama_jax.storage.locations import absolute
from llama_jax.tokenizers.patterns import why_refused

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The key of the base's digest in the metadata of the tensors' file.
DIGEST = "llama_jax_base"
_MATRIX = "this project's adapters are a product a b of one rank beside whole matrices"
_BASE = "it changes the base; convert the adapter with PEFT first (path_initial_model_for_weight_conversion)"
KEYS = Keys(
    read=names("peft_type r lora_alpha lora_dropout use_rslora base_model_name_or_path target_modules exclude_modules"),
    neutral={
        "bias": Neutral(("none",), "biases are not part of this project's adapters; train without them"),
        "modules_to_save": Neutral(([],), "whole matrices are not part of this project's adapters; merge it with PEFT"),
        "rank_pattern": Neutral(({},), "all targets have one rank here; merge it with PEFT"),
        "alpha_pattern": Neutral(({},), "all targets have one scale here; merge it with PEFT"),
        "layers_to_transform": Neutral((), "all layers have adapters here; merge it with PEFT"),
        "layer_replication": Neutral((), "merge it with PEFT"),
        "init_lora_weights": Neutral((True, False, "gaussian", "eva", "orthogonal"), _BASE),
        "corda_config": Neutral((), _BASE),
        "lora_ga_config": Neutral((), _BASE),
        "loftq_config": Neutral(({},), _BASE),
        "trainable_token_indices": Neutral(([], {}), "embeddings are not part of this project's adapters"),
        "target_parameters": Neutral(([],), _MATRIX),
        **{
            key: Neutral((False,), _MATRIX)
            for key in ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
        },
        **{
            key: Neutral(({},), _MATRIX)
            for key in ("velora_config", "monteclora_config", "arrow_config", "kasa_config", "megatron_config")
        },
        "alora_invocation_tokens": Neutral(([],), _MATRIX),
    },
    ignored=names(
        "task_type auto_mapping peft_version revision inference_mode layers_pattern "
        "megatron_core eva_config qalora_group_size runtime_config"
    ),
)


def write_peft(adapter: Checkpoint, folder: Path, template: str = "") -> None:
    """Write an adapter of this project in the layout that PEFT reads, with its chat ``template`` if it has one."""
    assert adapter.adapter is not None
    lora, args = adapter.adapter.lora, adapter.args
    shapes: dict[str, tuple[int, ...]] = {}
    values: dict[str, np.ndarray] = {}
    for name, layer, factors in _factors_of(adapter):
        for factor, value in zip("AB", factors, strict=True):
            key = peft_name(name, layer, factor)
            values[key] = np.ascontiguousarray(value.T, np.dtype("<f4"))
            shapes[key] = values[key].shape
    metadata = {DIGEST: adapter.adapter.digest}
    with SafetensorsWriter(folder / WEIGHTS, np.dtype("<f4"), shapes, metadata) as writer:
        for value in values.values():
            writer.write(value)
    alpha = lora.strength
    table = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.adapter.base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(_module(name, args) for name in lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_atomically(folder / CONFIG, json.dumps(table, indent=2))
    if template:
        write_atomically(folder / TEMPLATE, template)


def read_peft(folder: Path, base: Checkpoint) -> tuple[LoraArgs, dict[str, Any]]:
    """Return the settings and the factors of an adapter of ``base`` in PEFT's layout, as a tree of ours.

    Raises UserError if the adapter is of another kind, or does not fit the base.
    """
    path = folder / CONFIG
    table = read_json(path)
    kind = take(table, "peft_type", str, path)
    if kind != "LORA":
        raise UserError(f"{path}: peft_type: expected LORA, found {quoted(kind)}; merge it with PEFT instead")
    KEYS.check(table, path)
    for key in ("lora_alpha", "lora_dropout"):
        if key in table and table[key] is None:
            raise UserError(f"{path}: {key}: expected a number, found null, with which PEFT fails; write the number")
    rank = take(table, "r", int, path)
    if rank < 1:
        raise UserError(f"{path}: r: expected 1 or more, found {rank}")
    lora = LoraArgs(
        rank,
        take(table, "lora_alpha", float, path, 8.0),
        take(table, "lora_dropout", float, path, 0.0),
        rslora=take(table, "use_rslora", bool, path, False),
    )
    try:
        lora.check()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with ExitStack() as stack:
        files = TensorFiles(folder, [_weights_in(folder)], stack)
        targets, tree = _read_factors(files, folder, base, rank)
    _check_targeted(table, targets, base.args, path)
    _check_base(folder, base)
    unknown = [key for key in KEYS.unknown(table) if table[key] not in (None, False, [], {})]
    if unknown:
        raise UserError(
            f"{path}: {quoted(unknown[0])}: expected a key that this project knows, found {quoted(table[unknown[0]])}; it may "
            "change what the adapter computes: merge it with PEFT instead"
        )
    return replace(lora, targets=targets), tree


def _check_targeted(table: dict[str, Any], targets: Sequence[Target], args: ModelArgs, path: Path) -> None:
    """Raise UserError if PEFT would leave out factors that are stored, by the keys that say which matrices it adapts.

    See check_target_module_exists in peft/tuners/tuners_utils.py.
    """
    for key, wanted in (("target_modules", True), ("exclude_modules", False)):
        found = table.get(key)
        if found is None or (isinstance(found, list) and not found):
            continue
        if not isinstance(found, str) and not (isinstance(found, list) and all(isinstance(m, str) for m in found)):
            raise UserError(f"{path}: {key}: expected names of matrices, or an expression, found {quoted(found)}")
        if isinstance(found, str) and (reason := why_refused(found)):
            print(
                f"{'note':>10}  {key} of {path.name} is not compared with the factors, all of which are used: {reason}"
            )
            continue
        for name in targets:
            for layer in range(args.n_layers if len(PLACES[name]) > 1 else 1):
                module = _huggingface(name).format(layer)
                if _names(found, module) != wanted:
                    says = "names" if not wanted else "does not name"
                    raise UserError(
                        f"{path}: {key}: expected what the stored factors are of, found that it {says} {module}, whose factors PEFT "
                        "would not use: write the matrices that are meant, or merge it with PEFT"
                    )


def _names(found: str | list[str], module: str) -> bool:
    """Return whether a key of PEFT's names a matrix: by its end in a list, or by an expression for the whole name."""
    if found == "all-linear":
        return module != "lm_head"
    if isinstance(found, str):
        try:
            return re.fullmatch(found, module) is not None
        except re.error:
            return False
    return any(module == end or module.endswith(f".{end}") for end in found)


def _check_base(folder: Path, base: Checkpoint) -> None:
    """Raise UserError if an adapter that this project exported is one of another base than ``base``."""
    known = metadata_of(folder / WEIGHTS).get(DIGEST) if (folder / WEIGHTS).is_file() else None
    if known is not None and not are_parameters(base.folder, known):
        raise UserError(
            f"{folder}: expected the base of this adapter, whose parameters have the digest {quoted(known)}, found {digest_of(base)} in "
            f"{base.folder}, another model, one that has changed, or the same in other files, as a conversion writes it; name its own base "
            "with --base"
        )


def save_adapter(
    folder: Path, base: Checkpoint, lora: LoraArgs, tree: dict[str, Any], chat: ChatSetup | None = None
) -> None:
    """Write an adapter as a checkpoint of this project, which knows its base. ``chat``: None is the base's."""
    record = AdapterRecord(str(absolute(base.folder)), digest_of(base), lora)
    tree = jax.tree.map(jnp.asarray, tree)
    save_within(folder, tree, base.args, base.tokenizer, chat=chat or base.chat, adapter=record)


def factors_of(adapter: Checkpoint, name: Target, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors a [inputs, rank] and b [rank, outputs] of a matrix of an adapter, from its checkpoint."""
    place = "/".join(PLACES[name])
    arrays = (adapter.open_array(f"{place}/{factor}") for factor in "ab")
    a, b = ((array[layer] if len(PLACES[name]) > 1 else array).read().result() for array in arrays)
    return np.asarray(a), np.asarray(b)


def _factors_of(adapter: Checkpoint) -> Iterator[tuple[Target, int, tuple[np.ndarray, np.ndarray]]]:
    assert adapter.adapter is not None
    for name in adapter.adapter.lora.targets:
        for layer in range(adapter.args.n_layers if len(PLACES[name]) > 1 else 1):
            yield name, layer, factors_of(adapter, name, layer)


def _weights_in(folder: Path) -> str:
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return name
    raise UserError(f"{folder}: expected {WEIGHTS} beside {CONFIG}, found none; copy it there")


def _read_factors(files: TensorFiles, folder: Path, base: Checkpoint, rank: int) -> tuple[tuple[Target, ...], Any]:
    """Return the targets of the tensors in ``files``, and a tree of their factors, float32."""
    args = base.args
    left = set(files.places) - _copies(files, base)
    targets: list[Target] = []
    tree: dict[str, Any] = {}
    for name in MATRICES:
        layers = args.n_layers if len(PLACES[name]) > 1 else 1
        keys = [[peft_name(name, layer, factor) for layer in range(layers)] for factor in "AB"]
        wanted = {key for some in keys for key in some}
        if not wanted & left:
            continue
        if missing := sorted(wanted - left):
            raise UserError(
                f"{folder}: expected adapters of {name} in each of {layers} layers, found no {missing[0]}; choose the base that "
                "the adapter was trained on, or merge it with PEFT"
            )
        left -= wanted
        targets.append(name)
        inputs, outputs = sides(args, name)
        factors = {}
        for key, some, shape in (("a", keys[0], (rank, inputs)), ("b", keys[1], (outputs, rank))):
            stack = np.stack([_read(files, each, shape, folder).T for each in some])
            factors[key] = stack if len(PLACES[name]) > 1 else stack[0]
        inner = tree
        for part in PLACES[name][:-1]:
            inner = inner.setdefault(part, {})
        inner[PLACES[name][-1]] = factors
    check_targets(args, LoraArgs(rank, targets=tuple(targets)))
    if left:
        raise UserError(
            f"{folder}: expected factors of the matrices {', '.join(MATRICES)} of {args.n_layers} layers, found "
            f"{quoted(min(left))}; choose the base that the adapter was trained on, or merge it with PEFT"
        )
    if not targets:
        raise UserError(f"{folder}: expected the factors of an adapter, found no tensors")
    return tuple(targets), tree


def _copies(files: TensorFiles, base: Checkpoint) -> set[str]:
    """Return the names of tensors that are equal to the base's. PEFT adds the whole output to an adapter of it."""
    found = set()
    for tensor in TABLE:
        names = [
            f"base_model.model.{tensor.huggingface.replace('.weight', end)}"
            for end in (".weight", ".base_layer.weight")
        ]
        is_there = tensor in tensors_of(base.args) and not tensor.layered and base.weights == "auto"
        for name in files.places.keys() & set(names) if is_there else ():
            own = np.asarray(base.open_array(tensor.name).read().result()).astype(np.float32)
            stored = np.asarray(files.read(name, 0, files.stored(name).shape[0])).astype(np.float32)
            if np.array_equal(stored.T if tensor.multiplied else stored, own):
                found.add(name)
    return found


def _read(files: TensorFiles, name: str, shape: tuple[int, ...], folder: Path) -> np.ndarray:
    found = files.stored(name).shape
    if tuple(found) != shape:
        raise UserError(
            f"{folder}: {quoted(name)}: expected the shape {list(shape)}, found {list(found)}; choose the base that the adapter "
            "was trained on"
        )
    value = np.array(files.read(name, 0, shape[0]))
    if count := count_not_finite(value):
        raise UserError(
            f"{folder}: {quoted(name)}: expected finite numbers, found {count:,} others; the file is damaged"
        )
    return value.astype(np.float32)


def _huggingface(name: Target) -> str:
    """Return Hugging Face's name of a matrix, with ``{}`` for the layer, without ".weight"."""
    place = "/".join(PLACES[name])
    return next(tensor.huggingface for tensor in TABLE if tensor.name == place).removesuffix(".weight")


def peft_name(name: Target, layer: int, factor: str) -> str:
    """Return the name that PEFT gives a factor, A or B, of a matrix of a layer."""
    return f"base_model.model.{_huggingface(name).format(layer)}.lora_{factor}.weight"


def _module(name: Target, args: ModelArgs) -> str:
    return _huggingface(name).rpartition(".")[2]
