"""Compilation: XLA's options for a platform, and the cache of compiled programs."""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax

from llama_jax.compat.jax_internals import is_described
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address, user_cache

# A layer's keys of up to this many bytes are prefetched into a TPU's vector memory, or parts of them.
PREFETCHED = 1 << 26


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between runs, in the folder that the process has for them or ~/.cache/llama_jax.

    The process has one by JAX_COMPILATION_CACHE_DIR, or where a program has set it by jax.config. It may be an address.
    """
    given = jax.config.jax_compilation_cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR")  # type: ignore[attr-defined]
    folder = given or os.fspath(user_cache() / "compiled")
    if not is_address(folder):
        with contextlib.suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
    # If the folder cannot be written, the run continues without a cache.
    usable = is_address(folder) or os.access(folder, os.W_OK)
    jax.config.update("jax_compilation_cache_dir", folder if usable else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_raise_persistent_cache_errors", False)


def check_jax_settings() -> None:
    """Raise UserError on settings of JAX with which a training step cannot be compiled."""
    wrong = {
        "jax_enable_x64": "as parameters are trained in float32",
        "jax_disable_jit": "as steps are compiled",
    }
    for name, reason in wrong.items():
        if getattr(jax.config, name):
            raise UserError(f"{name.upper()}: expected to be off in training, {reason}, found it on; unset it")


def check_devices() -> None:
    """Start JAX's backend. Raises UserError if there is no device of the platforms that somebody asked for."""
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform whose plugin is missing has a device
        if not asked:
            raise
        reason = " ".join(str(error).split())[:200] or "JAX knows no such devices here"
        raise UserError(
            f"JAX_PLATFORMS: expected devices of {asked}, found none ({reason}); JAX_PLATFORMS=cpu takes the CPU, and without the "
            "variable JAX takes the best that there is"
        ) from None


def compiler_options(device: jax.Device) -> dict[str, Any]:
    """Return XLA's options for a training step on ``device``."""
    options: dict[str, Any] = {}
    if device.platform == "tpu":
        # Vector memory for a fusion, in KiB. With the default of 16 MiB, matrix products have such small tiles that
        # they wait for memory: the 7B model's take a fifth longer.
        options["xla_tpu_scoped_vmem_limit_kib"] = 48 * 1024
        # Keep lookups where their operands are. The sparse core would need whole logits in memory for the loss.
        options["xla_tpu_offload_gather_to_sparsecore"] = False
    if device.device_kind in ("TPU v5 lite", "TPU v5e"):
        # Sum gradients over devices during the matrix products that follow, as gathers of parameters do by default.
        # That works only for sums of one array, so they are not combined. XLA refuses these options on other chips.
        options |= {
            "xla_enable_async_all_reduce": True,
            "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
            "xla_jf_crs_combiner_threshold_in_bytes": 0,
        }
    if platform_of(device) == "cuda":
        # Start collectives as soon as their operands are ready, and wait for them only when their results are needed.
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    return options | untried_options(device)


def generation_options(device: jax.Device, cache_bytes: int | None = None) -> dict[str, Any]:
    """Return XLA's options for a program of generation on ``device``.

    cache_bytes: of a decoding step, the bytes of a layer's keys on a device. None: the program reads a prompt.
    """
    if device.platform != "tpu":
        return untried_options(device)
    # Vector memory for tiles of operands, in MiB, which products of a prompt and attention over a large cache need. The
    # rest is for what is prefetched: the matrices, and a layer's keys and values if they fit. By the compiler's schedule
    # of 7B on v5e, 8 sequences on 8 chips take a sixth less with 36 MiB than with 68, 32 on 4 chips a fifteenth more.
    tiles = 36 if cache_bytes is not None and cache_bytes <= PREFETCHED else 68
    return {"xla_tpu_scoped_vmem_limit_kib": tiles * 1024}


def untried_options(device: jax.Device) -> dict[str, Any]:
    """Return the options without which XLA would run kernels on a GPU, to choose among them, that is only described."""
    if platform_of(device) != "cuda" or not is_described(device):
        return {}
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class GenerationProgram:
    """``jax.jit`` with ``generation_options`` for JAX's devices.

    The options are looked up at the first call for each ``cache_bytes``, because listing devices starts the backend.
    cache_bytes: of a decoding step, a function of its arguments that returns the ``cache_bytes`` of its options.
    """

    def __init__(
        self, function: Callable[..., Any], cache_bytes: Callable[..., int] | None = None, **jit_arguments: Any
    ):
        self._function, self._cache_bytes, self._jit_arguments = function, cache_bytes, jit_arguments
        self._jitted: dict[int | None, Any] = {}
        self._asked_for: set[Any] = set()
        functools.update_wrapper(self, function)

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the jitted function for these arguments."""
        cache_bytes = self._cache_bytes(*args, **kwargs) if self._cache_bytes is not None else None
        if cache_bytes not in self._jitted:
            options = generation_options(jax.devices()[0], cache_bytes)
            self._jitted[cache_bytes] = jax.jit(self._function, compiler_options=options, **self._jit_arguments)
        return self._jitted[cache_bytes]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program(args, kwargs)(*args, **kwargs)

    @contextlib.contextmanager
    def compiled_meanwhile(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Compile the program for these arguments in a thread while the block runs, unless that was done before.

        Arrays may be described as ShapeDtypeStructs with a sharding. A call with equal shapes finds the program
        compiled.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        key = structure, tuple((x.shape, x.dtype, x.sharding) if hasattr(x, "shape") else x for x in leaves)
        if key in self._asked_for:
            yield
            return
        self._asked_for.add(key)
        mesh = jax.sharding.get_mesh()

        def compile() -> None:
            # An error comes again where the program is called.
            with contextlib.suppress(Exception), jax.set_mesh(mesh):
                self.lower(*args, **kwargs).compile()

        thread = threading.Thread(target=compile, name="compiling", daemon=True)
        thread.start()
        yield  # If the block is interrupted, nobody waits for the compiler.
        thread.join()

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Lower the program, to compile it for other devices or to inspect it."""
        return cast(jax.stages.Lowered, self._program(args, kwargs).lower(*args, **kwargs))


def platform_of(device: jax.Device) -> str:
    """Return "cpu", "tpu", "cuda" or "rocm". ``device`` may be only described."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"
