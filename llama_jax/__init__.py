"""LLaMA 2 in JAX and Flax: pretrain on any text, load a checkpoint, generate.

import llama_jax
model = llama_jax.load("runs/tiny")
model.generate(["Once upon a time"], llama_jax.SampleArgs(temperature=0.0, max_new_tokens=64))
"""

import importlib as _importlib
import os as _os
import typing as _typing

from llama_jax import config as _config
from llama_jax import train_args as _train_args
from llama_jax.config import DataArgs, ModelArgs, SampleArgs, TrainArgs

if _typing.TYPE_CHECKING:
    from llama_jax import data as data
    from llama_jax import evaluate as evaluate
    from llama_jax import generation as generation
    from llama_jax import tokenizer as tokenizer
    from llama_jax.generation import Model as _Model

# The one place of the version; pyproject.toml reads it here.
__version__ = "0.1.0"
__all__ = ["DataArgs", "ModelArgs", "SampleArgs", "TrainArgs", "__version__", "load"]


def __getattr__(name: str) -> _typing.Any:
    """Import the parts that docs/api.md names on first use, because JAX and SentencePiece are slow to import."""
    if name in ("data", "evaluate", "generation", "tokenizer"):
        return _importlib.import_module(f"llama_jax.{name}")
    raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")


def load(
    path: str | _os.PathLike[str],
    compute_dtype: _train_args.DType = "auto",
    weights: _config.Weights = "auto",
    cache: _config.Cache = "auto",
    mesh: _config.MeshArgs | None = None,
    draft: str = "",
    draft_tokens: int = 4,
    exact: bool = False,
    adapter: str | _os.PathLike[str] = "",
    chat_template: str = "",
) -> "_Model":
    """Load a model for generation from a run folder (its best step), a step folder or a converted checkpoint.

    A folder of Meta's, Hugging Face's or Mistral's, or a file of llama2.c's, is converted once into a cache. A run that
    trained a low-rank adapter is loaded with the adapter's base.

    Arguments:
        path: the folder, a string or a Path.
        compute_dtype: data type of activations and matmuls: "float32", "bfloat16" or "auto" (bfloat16 on TPU and GPU,
            float32 on CPU).
        weights: quantization of the matrices: "int8" (one scale per output channel), "int4" (one scale per group of 32
            inputs), "int4-64" (per 64 inputs) or "auto" (as stored). The stored values are quantized, whatever
            compute_dtype is.
        cache: "int8" quantizes keys and values; "auto" stores them in compute_dtype.
        mesh: devices to place the model on: ``tensor`` devices per copy, ``data`` copies. None: the fewest that hold
            it.
        draft: speculative decoding. "lookup" drafts from earlier text; any other text is the checkpoint of a smaller
            model with the same tokenizer. Empty: none.
        draft_tokens: tokens to draft per pass.
        exact: make completions bit-identical whatever else is in the batch, and with or without ``draft``. It is
            slower. Without it they are equal up to rounding, which in bfloat16 occasionally changes a token.
        adapter: a run or checkpoint of a low-rank adapter of the model in ``path``. It is merged into plain matrices,
            and computed beside quantized ones. Empty: none, or the one in ``path``.
        chat_template: the format of conversations: the path of a template, or "llama2", "llama3", "chatml", "zephyr",
            "vicuna", "plain" or "instruction". Empty: the model's own.

    Raises UserError if the folder is not a checkpoint, its matrices are quantized in another way, the mesh does not
    divide the model, or an argument is of another type.
    """
    # Imported here, so that `import llama_jax` loads only the dataclasses.
    from llama_jax.generation import Model

    return Model.load(path, compute_dtype, weights, cache, mesh, draft, draft_tokens, exact, adapter, chat_template)
