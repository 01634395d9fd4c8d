"""How JAX is set up here: the compilation cache, memory on a CPU, the type to compute in, the program's shape by platform."""

import contextlib
import ctypes
import functools
import math
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp

from llama_jax.attention import choose_kernel
from llama_jax.config import AttentionKernel, DType, ModelArgs, Remat
from llama_jax.errors import UserError
from llama_jax.exact import CPU_ROWS, ROWS
from llama_jax.model import Llama

# Layers are compiled one by one up to this many on a CPU, where XLA pays 15% for a loop; elsewhere a scan compiles faster
# and runs as fast.
CPU_UNROLLED_LAYERS = 16
# Tokens whose logits are held at once. Every chunk reads and writes the output matrix's gradient; a CPU's cache likes small ones.
LOSS_CHUNK, CPU_LOSS_CHUNK = 2048, 512


# Parameters of mallopt, from glibc's malloc.h, and what they are set to.
KEEP_FREED_MEMORY = {
    -8: 1,  # M_ARENA_MAX: one heap, from which all threads allocate
    -4: 0,  # M_MMAP_MAX: large blocks too lie on the heap
    -2: 64 << 20,  # M_TOP_PAD, bytes: the heap grows in large strides
    -1: -1,  # M_TRIM_THRESHOLD: and never shrinks
}


def keep_freed_memory() -> None:
    """Have glibc reuse the memory that a step frees; call it before JAX starts its backend, and with that its threads.

    XLA on a CPU allocates a program's temporaries at every call. By default glibc gives such blocks back to the kernel,
    which clears their pages anew each time: a quarter of a small model's step. Does nothing where there is no glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter, value in KEEP_FREED_MEMORY.items():
            libc.mallopt(parameter, value)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between runs: in JAX_COMPILATION_CACHE_DIR, or ~/.cache/llama_jax."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else home / "llama_jax" / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written costs the cache, not the run.
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder) if os.access(folder, os.W_OK) else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_raise_persistent_cache_errors", False)


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


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """XLA's options for a training step on such a device."""
    options: dict[str, Any] = {}
    if device.platform == "tpu":
        # Vector memory that a fusion may use, in KiB. With the default of 16 MiB matrix products are tiled so small that they
        # wait for memory: the 7B model's take a fifth longer.
        options["xla_tpu_scoped_vmem_limit_kib"] = 48 * 1024
        # Lookups stay where their operands are. On the sparse core, the loss's would want whole logits in memory.
        options["xla_tpu_offload_gather_to_sparsecore"] = False
    if device.device_kind in ("TPU v5 lite", "TPU v5e"):
        # Sums of gradients over devices run beside the matrix products that follow, as gathers of parameters do by default.
        # Only a sum of one array can: they are not combined. XLA refuses this, and such gathers, on other chips.
        options |= {
            "xla_enable_async_all_reduce": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
            "xla_jf_crs_combiner_threshold_in_bytes": 0,
        }
    if platform_of(device) == "cuda":
        # Collectives begin as early as their operands are there and end as late as their results are needed.
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    return options


def generation_options(device: jax.Device) -> dict[str, Any]:
    """XLA's options for programs of generation on such a device."""
    if device.platform != "tpu":
        return {}
    # Between what products tile their operands in, of which attention over a large cache wants much, and what is left for
    # matrices that are fetched ahead of their products: 4 MiB less, and 32 sequences of the 7B model on v5e take an eighth longer.
    return {"xla_tpu_scoped_vmem_limit_kib": 68 * 1024}


class GenerationProgram:
    """``jax.jit`` with ``generation_options`` for JAX's devices, which are asked for at the first call: asking starts the backend."""

    def __init__(self, function: Callable[..., Any], **jit_arguments: Any):
        self._function, self._jit_arguments = function, jit_arguments
        functools.update_wrapper(self, function)

    @functools.cached_property
    def _jitted(self) -> Any:
        options = generation_options(jax.devices()[0])
        return jax.jit(self._function, compiler_options=options, **self._jit_arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """To be compiled for other devices, or looked at."""
        return cast(jax.stages.Lowered, self._jitted.lower(*args, **kwargs))


def platform_of(device: jax.Device) -> str:
    """ "cpu", "tpu", "cuda" or "rocm", of a device or of one that is only described."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def check_memory(need: float, devices: Sequence[jax.Device], what: str, hint: str) -> None:
    """Raise UserError where ``what`` takes more bytes a device than one of ``devices`` has."""
    limit = memory_of(devices)
    if need > limit:
        raise UserError(
            f"memory: expected up to {limit / 1e9:,.1f} GB a device, found that {what} {need / 1e9:,.1f} GB; {hint}"
        )


def memory_of(devices: Sequence[jax.Device]) -> float:
    """Bytes of memory that one of the devices has; infinite where that is not known. CPU devices share the machine's."""
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(devices)
    return (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)


def memory_in_use(devices: Sequence[jax.Device]) -> int | None:
    """The most bytes that were in use on one of the devices; on CPUs, in the whole process. None where it is not known."""
    if devices[0].platform == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return max(((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices), default=0) or None
