"""Hugging Face's layout: config.json, and safetensors or what torch saved, in one file or several. Read, written."""

import contextlib
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.chat.formats import TEMPLATE, tokens_of
from llama_jax.config import ModelArgs
from llama_jax.convert.layout import EMBEDDINGS, OUTPUT, Tensor, all_tensors
from llama_jax.convert.safetensors import SafetensorsWriter
from llama_jax.convert.source import ReadBlocks, Source, is_tied, main_type, raise_together, tie, types_of
from llama_jax.convert.tensor_files import TensorFiles
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.chat_files import defaults_taken, read_chat
from llama_jax.foreign.config_json import read_config, stated, stored_type
from llama_jax.foreign.family import family_of
from llama_jax.foreign.keys import read_json
from llama_jax.foreign.layouts import CONFIG, INDEX, SINGLE, index_of, weight_files
from llama_jax.foreign.rope import write_rope
from llama_jax.foreign.tokenizer_json import tiktoken_json, tokenizer_json
from llama_jax.foreign.vocabulary import find_tokenizer, fit_vocabulary
from llama_jax.storage.files import write_atomically

SHARD_BYTES = 5_000_000_000
# Older files contain this function of the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class HuggingFaceSource:
    """A folder in transformers' layout. Raises one UserError with all errors in it."""

    def __init__(self, folder: Path, decided: str, tokenizer: str, max_seq_len: int, stack: ExitStack):
        table = read_json(folder / CONFIG)
        config = read_config(table, folder / CONFIG, max_seq_len)
        names = weight_files(folder, table)
        self._files = TensorFiles(folder, names, stack)
        # Transformers ties two tensors that are both stored only if they are equal.
        self._tied = config.args.tie_embeddings
        both = {EMBEDDINGS.huggingface, OUTPUT.huggingface} <= self._files.places.keys()
        self.args = replace(config.args, tie_embeddings=self._tied and not both)
        expected = {self._name(tensor, layer): tensor.matrix(self.args) for tensor, layer in all_tensors(self.args)}
        raise_together(folder, CONFIG, stated(table), list(self._files.errors(expected, IGNORED.fullmatch)))
        found, said = find_tokenizer(tokenizer, folder)
        self.tokenizer, fitted = fit_vocabulary(self.args, found, folder)
        self.chat, of_chat = read_chat(folder, self.tokenizer, self.args.vocab_size, tokenizer)
        of_chat += defaults_taken(folder, self.tokenizer)
        self.dtypes, widened = types_of(self._files.types(self.args, self._name))
        if self._tied and both and is_tied(self, functools.partial(self._rows, verify=False)):
            tie(self)
        self.family = family_of(self.args, CONFIG, config.kind)
        self.decided = decided
        self.description = f"{folder}: {len(names)} file{'s'[: len(names) > 1]}"
        self.unknown = list(config.unknown)
        of_files = self._remarks(folder, stored_type(table))
        self.warnings = [*config.warnings, *widened, *of_files, *said, *fitted, *of_chat]
        self.checklists: list[Path] = []

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Read rows; see Source."""
        return self._rows(tensor, layer, start, stop)

    def _rows(self, tensor: Tensor, layer: int, start: int, stop: int, verify: bool = True) -> np.ndarray:
        """Read rows. ``verify`` is that of TensorFiles.read."""
        return self._files.read(self._name(tensor, layer), start, stop, verify)

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's name and file; see Source."""
        return self._files.origin(self._name(tensor, layer))

    def release(self) -> None:
        """Free memory; see Source."""
        self._files.release()

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify nothing here; see Source."""
        return contextlib.nullcontext()

    def _name(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's name in the files.

        Of two tied tensors, it is the one that is stored, as in transformers.
        """
        name = tensor.huggingface.format(layer)
        if self._tied and tensor in (EMBEDDINGS, OUTPUT) and name not in self._files.places:
            return OUTPUT.huggingface if tensor == EMBEDDINGS else EMBEDDINGS.huggingface
        return name

    def _remarks(self, folder: Path, stored_type: str) -> Iterator[str]:
        """Yield remarks about files that differ from what config.json or the index say."""
        places, kinds = self._files.places, sorted({dtype.name for dtype in self.dtypes.values()})
        if stored_type and kinds != [stored_type]:
            yield f"config.json says {stored_type}, to which transformers converts the weights; they are kept as {' and '.join(kinds)}"
        if self._tied and not self.args.tie_embeddings:
            yield (
                f"config.json says tie_word_embeddings, and the files have {EMBEDDINGS.huggingface} and another "
                f"{OUTPUT.huggingface}: both are read and the embeddings are not tied, as by transformers"
            )
        elsewhere = [
            name for name, file in index_of(folder, list(self._files.files)).items() if places.get(name) != file
        ]
        if elsewhere:
            more = f" and {len(elsewhere) - 1} more are" if len(elsewhere) > 1 else " is"
            yield f"{INDEX} belongs to other files: {quoted(elsewhere[0])}{more} not where it says; the index is ignored"


def write_huggingface(source: Source, folder: Path, read_blocks: ReadBlocks) -> str:
    """Write a model in the layout that transformers reads. Return a remark about its tokenizer, or ""."""
    args = source.args
    shapes = {t.huggingface.format(layer): t.matrix(args) for t, layer in all_tensors(args)}
    dtypes = {t.huggingface.format(layer): source.dtypes[t.name] for t, layer in all_tensors(args)}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    files = _divide(sizes, SHARD_BYTES)
    places = {name: file for file, names in files.items() for name in names}
    groups = itertools.groupby(read_blocks(), lambda block: places[block.tensor.huggingface.format(block.layer)])
    for file, group in groups:
        with SafetensorsWriter(folder / file, dtypes, {name: shapes[name] for name in files[file]}) as writer:
            for block in group:
                writer.write(block.rows)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_atomically(folder / INDEX, json.dumps(index, indent=2))
    tokenizer = source.tokenizer
    write_atomically(folder / "config.json", json.dumps(_config(source), indent=2))
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _end_ids(source),
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    write_atomically(folder / "generation_config.json", json.dumps(generation, indent=2))
    for name, content in tokenizer.files.items():
        if name != "config.json":
            write_atomically(folder / name, content)
    if source.chat.template:
        write_atomically(folder / TEMPLATE, source.chat.template)
    if len(tokenizer.files) > 1 or "tokenizer.model" not in tokenizer.files:
        return ""  # all of them are as they came
    table, reason = (tokenizer_json if tokenizer.is_sentencepiece else tiktoken_json)(tokenizer)
    if table is not None:
        write_atomically(folder / "tokenizer.json", json.dumps(table, ensure_ascii=False, indent=1))
    write_atomically(
        folder / "tokenizer_config.json", json.dumps(_tokenizer_config(source, table is not None), indent=2)
    )
    if table is None:
        return (
            f"tokenizer.json is not written, since none would encode like tokenizer.model ({reason}): encode with sentencepiece; "
            "transformers' AutoTokenizer would build one that splits texts differently"
        )
    return ""


def check_config(args: ModelArgs) -> None:
    """Raise UserError if transformers cannot load the model."""
    if args.dim % args.n_heads:
        raise UserError(
            f"--to huggingface: n_heads: expected a divisor of dim = {args.dim}, as transformers does, found {args.n_heads}"
        )
    for name in ("attention_bias", "mlp_bias") if args.sliding_window is not None else ():
        if getattr(args, name):
            raise UserError(
                f"--to huggingface: {name}: expected none beside sliding_window {args.sliding_window:,}, since transformers' "
                "Mistral has no biases and its LLaMA no window, found it; keep this project's format"
            )


def _divide(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Return file names with the tensors of each: as many as fit into ``limit`` bytes. ``sizes`` are in bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, need in sizes.items():
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
    # Transformers' LLaMA has no sliding window. Its Mistral is the same model with one.
    windowed = args.sliding_window is not None
    return {
        "architectures": ["MistralForCausalLM" if windowed else "LlamaForCausalLM"],
        "model_type": "mistral" if windowed else "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_width,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_width,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        **write_rope(args),
        "hidden_act": "silu",
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
        "tie_word_embeddings": args.tie_embeddings,
        **({"sliding_window": args.sliding_window} if windowed else {}),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": _end_ids(source),
        "torch_dtype": main_type(source).name,
        "dtype": main_type(source).name,
    }


def _end_ids(source: Source) -> int | list[int]:
    """Return eos_token_id: a number, or a list of several."""
    ends = source.chat.end_ids or (source.tokenizer.eos_id,)
    return ends[0] if len(ends) == 1 else list(ends)


def _tokenizer_config(source: Source, whole: bool) -> dict[str, Any]:
    """Return tokenizer_config.json. ``whole``: tokenizer.json exists, so transformers need not build it."""
    tokenizer, tokens = source.tokenizer, tokens_of(source.tokenizer) | dict(source.chat.tokens)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if whole else "LlamaTokenizer",
        **tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        # "<s>" in a text is text, as in tokenizer.model. A chat template's must be a token, and transformers has one rule.
        "split_special_tokens": tokenizer.is_sentencepiece and not source.chat.template,
        "legacy": True,
        "model_max_length": source.args.max_seq_len,
        "sp_model_kwargs": {},
    }
