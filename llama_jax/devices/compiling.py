"""Programs: how they are compiled for a platform, and where they are kept between runs."""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax


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
