"""The model as a platform runs it best."""

from typing import get_args

import jax
import jax.numpy as jnp

from llama_jax.config import AttentionKernel, DType, ModelArgs, Remat
from llama_jax.devices.compiling import platform_of
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.ops.attention import choose_kernel
from llama_jax.ops.exact import CPU_ROWS, ROWS

# Layers are compiled one by one up to this many on a CPU, where XLA pays 15% for a loop; elsewhere a scan compiles faster
# and runs as fast.
CPU_UNROLLED_LAYERS = 16
# Tokens whose logits are held at once. Every chunk reads and writes the output matrix's gradient; a CPU's cache likes small ones.
LOSS_CHUNK, CPU_LOSS_CHUNK = 2048, 512


def make_model(
    args: ModelArgs,
    compute_dtype: DType = "auto",
    remat: Remat = "none",
    attention: AttentionKernel = "auto",
    mesh: jax.sharding.Mesh | None = None,
    exact: bool = False,
) -> Llama:
    """The Flax module as the platform of ``mesh`` (None: of JAX's default device) runs it best; exact: see exact.py.

    Raises UserError on an unknown type, or an attention that is not available there.
    """
    if compute_dtype not in get_args(DType):
        raise UserError(f"compute_dtype: expected one of {', '.join(get_args(DType))}, found {compute_dtype!r}")
    platform = platform_of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    cpu = platform == "cpu"
    if compute_dtype == "auto":
        compute_dtype = "float32" if cpu else "bfloat16"
    dtype = jnp.dtype(compute_dtype)
    kernel = choose_kernel(attention, platform, args, dtype, 1 if mesh is None else mesh.shape["sequence"])
    # Unrolled, XLA would find what remat computes again to be the same as before, and keep it after all.
    unroll = args.n_layers if cpu and remat == "none" and args.n_layers <= CPU_UNROLLED_LAYERS else 1
    exact_rows = (CPU_ROWS if cpu else ROWS) if exact else 0
    return Llama(args, dtype, remat, kernel, CPU_LOSS_CHUNK if cpu else LOSS_CHUNK, unroll, exact_rows)
