"""Builds the model in the form that is fastest on a platform."""

import math
from typing import get_args

import jax
import jax.numpy as jnp

from llama_jax.config import ModelArgs
from llama_jax.devices.compiling import platform_of
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.ops.attention import choose_kernel
from llama_jax.ops.exact import CPU_ROWS, ROWS
from llama_jax.train_args import AttentionKernel, DType

# On a CPU, XLA's loop over layers is 15% slower than unrolled layers, so models of up to this many layers are unrolled.
# Elsewhere a scan compiles faster and runs as fast.
CPU_UNROLLED_LAYERS, TPU_UNROLLED_LAYERS = 16, 4
# Tokens whose logits exist at once in training. Each chunk reads and writes the whole gradient of the output matrix, so
# chunks are large; on a CPU, small ones are faster because they fit its cache.
LOSS_CHUNK, CPU_LOSS_CHUNK = 2048, 512


def make_model(
    args: ModelArgs,
    compute_dtype: DType = "auto",
    remat: str = "none",
    attention: AttentionKernel = "auto",
    mesh: jax.sharding.Mesh | None = None,
    exact: bool = False,
    document_mask: bool = False,
) -> Llama:
    """Return the Flax module with the settings that are fastest on the platform of ``mesh``.

    ``mesh`` None stands for JAX's default device. ``exact`` prepares the model for exact generation (ops/exact.py).
    ``document_mask``: the model is trained with the segments of documents, which not every kernel takes.
    Raises UserError on an unknown data type, or an attention implementation that is not available on the platform.
    """
    if compute_dtype not in get_args(DType):
        raise UserError(f"compute_dtype: expected one of {', '.join(get_args(DType))}, found {compute_dtype!r}")
    platform = platform_of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    cpu = platform == "cpu"
    dtype = jnp.dtype(fastest_dtype(platform) if compute_dtype == "auto" else compute_dtype)
    shards = 1 if mesh is None else mesh.shape["sequence"]
    kernel = choose_kernel(attention, platform, args, dtype, shards, document_mask)
    # With unrolled layers on a CPU, XLA would notice that remat recomputes known values, and keep them in memory after all.
    unroll = args.n_layers if cpu and remat == "none" and args.n_layers <= CPU_UNROLLED_LAYERS else 1
    # The last sum over devices of a layer's gradients waits for all else there; in groups of layers, once a group. Groups
    # take memory, of which policies that keep less have none to spare: there, the schedule became slower.
    if platform == "tpu" and mesh is not None and mesh.size > 1 and remat.startswith("dots"):
        unroll = TPU_UNROLLED_LAYERS
    exact_rows = (CPU_ROWS if cpu else ROWS) if exact else 0
    return Llama(args, dtype, remat, kernel, CPU_LOSS_CHUNK if cpu else LOSS_CHUNK, unroll, exact_rows)


def fastest_dtype(platform: str) -> DType:
    """Return the type of activations and matmuls that ``auto`` stands for."""
    return "float32" if platform == "cpu" else "bfloat16"


def count_parameters(args: ModelArgs) -> int:
    """Count the parameters exactly, without creating any."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(Llama(args))))
