"""Mistral's own layout: params.json and consolidated.safetensors, in one file or several. Read and checked.

Its tensors have Meta's names and are whole. Its code (mistral-inference: rope.py, ``apply_rotary_emb``) rotates
neighbours, as Meta's does, so queries and keys are permuted as Meta's are.
"""

import contextlib
import dataclasses
import functools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert.layout import OUTPUT, TABLE, Tensor, all_tensors, interleaved_to_halves
from llama_jax.convert.source import raise_together, tied_by_contents, types_of
from llama_jax.convert.tensor_files import TensorFiles
from llama_jax.errors import UserError
from llama_jax.foreign.chat_files import read_chat
from llama_jax.foreign.family import family_of
from llama_jax.foreign.keys import read_json
from llama_jax.foreign.layouts import PARAMS, consolidated_files
from llama_jax.foreign.params_json import check_params, check_ties, read_params, stated
from llama_jax.foreign.vocabulary import MODEL, find_tokenizer, fit_vocabulary

# Meta's and Mistral's files may hold this function of the configuration.
IGNORED = {"rope.freqs"}


class MistralSource:
    """A folder in Mistral's layout. Raises one UserError with all errors in it."""

    def __init__(self, folder: Path, decided: str, tokenizer: str, max_seq_len: int, stack: ExitStack):
        names = consolidated_files(folder)
        table = read_json(folder / PARAMS)
        check_params(table, folder / PARAMS)
        _check_theta(table, folder / PARAMS)
        self._files = TensorFiles(folder, names, stack)
        params = read_params(table, folder / PARAMS, self._rows_of_embeddings(folder), max_seq_len)
        self.args = params.args
        if OUTPUT.meta not in self._files.places:
            self.args = dataclasses.replace(self.args, tie_embeddings=True)
        expected = {_name(tensor, layer): tensor.matrix(self.args) for tensor, layer in all_tensors(self.args)}
        raise_together(folder, PARAMS, stated(table), list(self._files.errors(expected, IGNORED.__contains__)))
        given = tokenizer
        tokenizer, noted = _versioned(tokenizer, folder)
        found, said = find_tokenizer(tokenizer, folder)
        self.tokenizer, fitted = fit_vocabulary(self.args, found, folder)
        self.chat, of_chat = read_chat(folder, self.tokenizer, self.args.vocab_size, given)
        self.dtypes, widened = types_of(self._files.types(self.args, _name))
        tied = tied_by_contents(self, functools.partial(self._rows, verify=False))
        check_ties(table, self.args, folder / PARAMS)
        self.family = family_of(self.args, PARAMS, "mistral" if table.get("hidden_dim") else "llama")
        self.decided = decided
        self.description = f"{folder}: {len(names)} file{'s'[: len(names) > 1]}"
        self.unknown = list(params.unknown)
        self.warnings = [*params.warnings, *tied, *widened, *noted, *said, *fitted, *of_chat]
        self.checklists: list[Path] = []

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Read rows; see Source."""
        return self._rows(tensor, layer, start, stop)

    def _rows(self, tensor: Tensor, layer: int, start: int, stop: int, verify: bool = True) -> np.ndarray:
        """Read rows. ``verify`` is that of TensorFiles.read."""
        rows = self._files.read(_name(tensor, layer), start, stop, verify)
        return interleaved_to_halves(rows, self.args.head_width) if tensor.rotary else rows

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's name and file; see Source."""
        return self._files.origin(_name(tensor, layer))

    def release(self) -> None:
        """Free memory; see Source."""
        self._files.release()

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify nothing here; see Source."""
        return contextlib.nullcontext()

    def _rows_of_embeddings(self, folder: Path) -> int:
        name = TABLE[0].meta
        if name not in self._files.places or len(self._files.stored(name).shape) != 2:
            raise UserError(f"{folder}: expected the matrix {name} in its files, found none; is it a LLaMA checkpoint?")
        return self._files.stored(name).shape[0]


def _check_theta(table: dict[str, Any], path: Path) -> None:
    """Raise UserError if nothing says the base of the rotary embedding.

    Files of Mistral's without a sliding window that lack it are read in two ways. Meta's, which do not state the
    feed-forward width, mean 10000 by it.
    """
    if table.get("hidden_dim") and not table.get("rope_theta") and not table.get("sliding_window"):
        raise UserError(
            f"{path}: rope_theta: expected it, found none; Mistral's code takes 1000000 then, and transformers' conversion "
            "10000: write the one that the model was trained with into the file"
        )


def _name(tensor: Tensor, layer: int) -> str:
    return tensor.meta.format(layer)


def _versioned(given: str, folder: Path) -> tuple[str, list[str]]:
    """Return the path of the tokenizer, "" if it has the usual name, and a note if it has a version in its name.

    Mistral's downloads name it tokenizer.model.v3. Raises UserError if there are several versions and nothing else.
    """
    found = sorted(path for path in folder.glob(f"{MODEL}.v*") if path.is_file())
    if given or (folder / MODEL).is_file() or not found:
        return given, []
    if len(found) > 1:
        raise UserError(
            f"{folder}: expected one {MODEL}, found {', '.join(path.name for path in found)}; give the path of the right one "
            "with --tokenizer"
        )
    return str(found[0]), [f"{found[0].name} is used as the tokenizer"]
