"""GPUs of one host, described without hardware: JAX devices to compile for."""

import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from llama_jax.devices.chips import GPUS
from llama_jax.errors import UserError
from llama_jax.programs import install_command

# How many GPUs a host has at most, and the counts that are usual.
HOST_GPUS = 8
COUNTS = (1, 2, 4, 8)
# JAX's plugins that have XLA's compiler for NVIDIA's GPUs.
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

# What XLA asks the driver about a GPU, in the form of its GpuTargetConfigProto. The figures are those of NVIDIA's
# "H100 Tensor Core GPU Architecture" and of the CUDA C++ Programming Guide for compute capability 9.0.
_DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  clock_rate_ghz: {clock}
  device_address_bits: 64
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
}}
"""
_NAMES = {"h100": "NVIDIA H100 80GB HBM3"}


def gpu_devices(version: str, count: int) -> list[Any]:
    """Return JAX devices that stand for ``count`` GPUs of one host.

    Raises UserError if JAX's plugin for CUDA is not installed, or does not take the description.
    """
    if not has_plugin():
        raise UserError(
            f"plan: expected XLA's compiler for NVIDIA GPUs, found no {PLUGINS[0]}; install the extra cuda, some 6 GB, with: "
            f"{install_command('cuda')}"
        )
    # The plugin looks for a driver unless JAX is told that no GPU is wanted.
    jax.config.update("jax_platforms", "cpu")
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=description(version), topology=f"1x1x{count}"
        )
    except Exception as error:  # JAX raises whatever its plugin raises
        raise UserError(
            f"plan: expected a JAX plugin for CUDA that compiles for a described {version}, found that it refuses: "
            f"{' '.join(str(error).split())[:200]}; install the one that belongs to this JAX: {install_command('cuda')}"
        ) from None
    return list(described.devices)


def has_plugin() -> bool:
    """Return whether a plugin with XLA's compiler for NVIDIA's GPUs is installed. It is not loaded."""
    return any(importlib.util.find_spec(name) is not None for name in PLUGINS)


def description(version: str) -> str:
    """Return the description of a GPU for XLA, as text."""
    chip = GPUS[version]
    return _DESCRIPTION.format(
        name=_NAMES[version], memory=int(chip.hbm_bytes), bandwidth=int(chip.hbm_bandwidth), clock=chip.clock / 1e9
    )
