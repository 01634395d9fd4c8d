"""LLaMA 2 in JAX and Flax: pretrain on any text, load a checkpoint, generate.

import llama_jax
model = llama_jax.load("runs/tiny")
model.generate(["Once upon a time"], llama_jax.SampleArgs(temperature=0.0, max_new_tokens=64))
"""

import importlib as _importlib
import typing as _typing

from llama_jax import config as _config
from llama_jax.config import DataArgs, ModelArgs, SampleArgs, TrainArgs

if _typing.TYPE_CHECKING:
    from llama_jax import tokenizer as tokenizer
    from llama_jax.generation import Model as _Model

# The one place of the version; pyproject.toml reads it here.
__version__ = "0.1.0"
__all__ = ["DataArgs", "ModelArgs", "SampleArgs", "TrainArgs", "__version__", "load"]


def __getattr__(name: str) -> _typing.Any:
    """Import ``llama_jax.tokenizer`` where it is first asked for: its library takes a while."""
    if name == "tokenizer":
        return _importlib.import_module("llama_jax.tokenizer")
    raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")


def load(
    path: str,
    compute_dtype: _config.DType = "auto",
    weights: _config.Weights = "auto",
    cache: _config.Cache = "auto",
    mesh: _config.MeshArgs | None = None,
    draft: str = "",
    draft_tokens: int = 4,
    exact: bool = False,
) -> "_Model":
    """Load a model: a run folder (its best step), a step folder, or a converted checkpoint.

    compute_dtype: "auto" (bfloat16 on TPU and GPU, float32 on CPU), "float32" or "bfloat16".
    weights: "int8" (a scale an output), "int4" (a scale for 32 inputs of an output) or "int4-64" (64) quantize the matrices,
    from the values that are stored, whatever is computed in; "auto" takes them as they are, quantized where they are stored so.
    cache: "int8" quantizes keys and values.
    mesh: the devices that the model lies on, ``tensor`` of them for one copy, ``data`` copies; None: as few as hold it.
    draft: guesses ``draft_tokens`` tokens at a time, which one pass checks. "lookup" looks them up in what came before; else a
    checkpoint of a smaller model with the same tokenizer.
    exact: a completion is the same to the bit whatever stands beside it in a batch, and with ``draft`` as without; it takes longer.
    Otherwise it is the same up to rounding, which in bfloat16 makes another token of one now and then.
    Raises UserError where the folder is not a checkpoint, its matrices are quantized in another way, or the mesh does not divide
    the model.
    """
    # Imported here, so that `import llama_jax` costs no more than the dataclasses.
    from llama_jax.generation import Model

    return Model.load(path, compute_dtype, weights, cache, mesh, draft, draft_tokens, exact)
