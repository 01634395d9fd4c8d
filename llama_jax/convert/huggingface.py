"""Hugging Face's layout: config.json and safetensors, in one file or several with an index; read, checked and written."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ModelArgs
from llama_jax.convert.hf_tokenizer import tokenizer_json
from llama_jax.convert.layout import Tensor, all_tensors
from llama_jax.convert.safetensors import SafetensorsFile, SafetensorsWriter
from llama_jax.convert.source import (
    ReadBlocks,
    Source,
    check_arguments,
    check_vocabulary,
    find_tokenizer,
    raise_together,
    read_json,
    take,
)
from llama_jax.errors import UserError, quoted
from llama_jax.files import write_atomically

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# Functions of the configuration, which older files hold.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# Meta's own values, and then any power of two: which of them give a feed-forward layer of the width that is asked for.
MULTIPLIERS = (None, 1.3)
MULTIPLES = (256, 4096, *(1 << i for i in reversed(range(13))))


class HuggingFaceSource:
    """A folder as transformers writes it. Raises UserError with all that is wrong with it at once."""

    def __init__(self, folder: Path, tokenizer: str, max_seq_len: int, stack: ExitStack):
        config = read_json(folder / "config.json")
        self._files = {name: stack.enter_context(SafetensorsFile.open(folder / name)) for name in _file_names(folder)}
        self._places = {name: file for file, opened in self._files.items() for name in opened.tensors}
        self._tied = take(config, "tie_word_embeddings", bool, folder / "config.json", False)
        self.tokenizer = find_tokenizer(tokenizer, folder)
        self.args = read_config(config, folder / "config.json", max_seq_len)
        raise_together(folder, "config.json", list(self._errors()))
        check_vocabulary(self.args, self.tokenizer, folder)
        self.dtype = self._stored(next(name for name in self._places if not IGNORED.fullmatch(name))).dtype
        count = len(self._files)
        self.description = f"Hugging Face's weights in {folder}: {count} file{'s'[: count > 1]}"
        self.warnings: list[str] = []
        self.checklists: list[Path] = []

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """See Source."""
        name = self._name(tensor, layer)
        return self._files[self._places[name]].read(name, start, stop)

    def origin(self, tensor: Tensor, layer: int) -> str:
        """See Source."""
        name = self._name(tensor, layer)
        return f"{name} in {self._places[name]}" if len(self._files) > 1 else name

    def release(self) -> None:
        """See Source."""
        for file in self._files.values():
            file.release()

    def _name(self, tensor: Tensor, layer: int) -> str:
        name = tensor.huggingface.format(layer)
        return "model.embed_tokens.weight" if self._tied and name not in self._places else name

    def _stored(self, name: str) -> Any:
        return self._files[self._places[name]].tensors[name]

    def _errors(self) -> Iterator[str]:
        """All that is wrong with the tensors of all files."""
        expected = {self._name(tensor, layer): tensor.matrix(self.args) for tensor, layer in all_tensors(self.args)}
        dtypes = set()
        for name in expected.keys() - self._places.keys():
            yield f"{name} is missing"
        for name in self._places.keys() - expected.keys():
            if not IGNORED.fullmatch(name):
                yield f"{quoted(name)} is no tensor of this model"
        for name in expected.keys() & self._places.keys():
            stored = self._stored(name)
            dtypes.add(str(stored.dtype))
            if stored.shape != expected[name]:
                yield f"{name} has shape {list(stored.shape)}, expected {list(expected[name])}"
        if len(dtypes) > 1:
            yield f"tensors are of several types, {' and '.join(sorted(dtypes))}"
        names = [name for file in self._files.values() for name in file.tensors]
        yield from (f"{quoted(name)} is in two files" for name in sorted({n for n in names if names.count(n) > 1}))


def _file_names(folder: Path) -> list[str]:
    """The safetensors files of a folder. Raises UserError where they are not all there."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, limit=10_000_000)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{folder / INDEX}: expected a weight_map from tensors to files, found none")
        names = sorted(set(places.values()))
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII) or not (folder / name).is_file():
                raise UserError(f"{folder / INDEX}: expected {quoted(name)} beside it, found no such safetensors file")
        return names
    if (folder / SINGLE).is_file():
        return [SINGLE]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    hint = f"; {pickled[0]} is not read: load it with transformers and save_pretrained again" if pickled else ""
    raise UserError(f"{folder}: expected {SINGLE} or {INDEX}, found neither{hint}")


def read_config(table: dict[str, Any], path: Path, max_seq_len: int) -> ModelArgs:
    """Model arguments out of config.json. Raises UserError where the model is no LLaMA as model.py has it."""
    dim, heads = take(table, "hidden_size", int, path), take(table, "num_attention_heads", int, path)
    parameters = table.get("rope_parameters") or table.get("rope_scaling") or {}
    kind = (
        parameters.get("rope_type", parameters.get("type", "default")) if isinstance(parameters, dict) else parameters
    )
    unsupported = {
        "model_type": (table.get("model_type", "llama"), "llama"),
        "hidden_act": (table.get("hidden_act", "silu"), "silu"),
        "attention_bias": (table.get("attention_bias") or False, False),
        "mlp_bias": (table.get("mlp_bias") or False, False),
        "the rotary embedding's rope_type": (kind, "default"),
        "head_dim": (table.get("head_dim") or dim // max(heads, 1), dim // max(heads, 1)),
    }
    for name, (found, expected) in unsupported.items():
        if found != expected:
            raise UserError(f"{path}: {name}: expected {expected!r}, as LLaMA 2 has, found {quoted(found)}")
    theta = take(table, "rope_theta", float, path, take(parameters, "rope_theta", float, path, 10000.0))
    hidden = take(table, "intermediate_size", int, path)
    multiple_of, multiplier = feed_forward_rule(dim, hidden, path)
    args = ModelArgs(
        dim=dim,
        n_layers=take(table, "num_hidden_layers", int, path),
        n_heads=heads,
        n_kv_heads=take(table, "num_key_value_heads", int, path, None),
        vocab_size=take(table, "vocab_size", int, path),
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=take(table, "rms_norm_eps", float, path, 1e-6),
        rope_theta=theta,
        max_seq_len=max_seq_len or take(table, "max_position_embeddings", int, path, 2048),
    )
    return check_arguments(args, path)


def feed_forward_rule(dim: int, hidden: int, path: Path) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that make the feed-forward layer ``hidden`` wide, by Meta's rule."""
    if not 0 < dim < 1 << 24 or not 0 < hidden < 1 << 24:
        raise UserError(f"{path}: expected sizes of a model, found hidden_size {dim} and intermediate_size {hidden}")
    for multiplier in MULTIPLIERS:
        for multiple in MULTIPLES:
            if ModelArgs(dim=dim, n_heads=1, multiple_of=multiple, ffn_dim_multiplier=multiplier).hidden_dim == hidden:
                return multiple, multiplier
    # Half a unit above, so that the rule's rounding down meets it.
    return 1, (hidden + 0.5) / int(2 * (4 * dim) / 3)


def write_huggingface(source: Source, folder: Path, read_blocks: ReadBlocks) -> None:
    """Write a model as transformers reads it."""
    args = source.args
    shapes = {t.huggingface.format(layer): t.matrix(args) for t, layer in all_tensors(args)}
    files = _divide(shapes, source.dtype.itemsize, SHARD_BYTES)
    places = {name: file for file, names in files.items() for name in names}
    groups = itertools.groupby(read_blocks(), lambda block: places[block.tensor.huggingface.format(block.layer)])
    for file, group in groups:
        with SafetensorsWriter(folder / file, source.dtype, {name: shapes[name] for name in files[file]}) as writer:
            for block in group:
                writer.write(block.rows)
    if len(files) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * source.dtype.itemsize
        write_atomically(
            folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)
        )
    tokenizer = source.tokenizer
    write_atomically(folder / "config.json", json.dumps(_config(source), indent=2))
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    write_atomically(folder / "generation_config.json", json.dumps(generation, indent=2))
    table = tokenizer_json(tokenizer)
    if table is not None:
        write_atomically(folder / "tokenizer.json", json.dumps(table, ensure_ascii=False, indent=1))
    write_atomically(
        folder / "tokenizer_config.json", json.dumps(_tokenizer_config(source, table is not None), indent=2)
    )
    write_atomically(folder / "tokenizer.model", tokenizer.model_bytes)


def _divide(shapes: dict[str, tuple[int, ...]], itemsize: int, limit: int) -> dict[str, list[str]]:
    """File names, and the tensors of each: as many as fit."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        need = math.prod(shape) * itemsize
        if groups[-1] and size + need > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += need
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _config(source: Source) -> dict[str, Any]:
    args, tokenizer = source.args, source.tokenizer
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": source.dtype.name,
        "dtype": source.dtype.name,
    }


def _tokenizer_config(source: Source, whole: bool) -> dict[str, Any]:
    """``whole``: tokenizer.json says how to encode; transformers need not make that up from tokenizer.model."""
    tokenizer, pieces = source.tokenizer, source.tokenizer.piece
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if whole else "LlamaTokenizer",
        "bos_token": pieces(tokenizer.bos_id),
        "eos_token": pieces(tokenizer.eos_id),
        "unk_token": pieces(tokenizer.unk_id),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": source.args.max_seq_len,
        "sp_model_kwargs": {},
    }
