"""Performance of accelerators, from their makers' data sheets."""

from dataclasses import dataclass

GiB = 1 << 30
# The lanes of a TPU's vector unit, all of which the last axis of an array takes, however short it is.
LANES = 128


@dataclass(frozen=True)
class Chip:
    """One device of JAX: a chip of a TPU, by Google Cloud's pages on TPU versions, or a GPU, by its data sheet.

    A TPU's memory is what the compiler leaves to a program. Where a chip is several devices, all figures are of one.
    """

    peak_flops: float  # bfloat16
    hbm_bytes: float
    hbm_bandwidth: float  # bytes per second
    clock: float  # Hz, of the compiler's cycle counts
    # Bytes per second of the links along one torus axis, sum of both directions. Of a GPU, whose links meet in a switch,
    # of one direction: what it can receive.
    link_bytes: float
    torus_axes: int
    slice_bytes: float | None  # bytes per second to other slices over the data centre's network; None: not published
    # Operations per second of products of int8, and of float8. None: it has no units for them.
    int8_flops: float | None = None
    fp8_flops: float | None = None
    devices: int = 1  # of a chip


TPUS = {
    "v4": Chip(275e12, 31.0 * GiB, 1.228e12, 1.05e9, 9e10, 3, None, 275e12),
    "v5e": Chip(197e12, 15.75 * GiB, 0.819e12, 1.5e9, 9e10, 2, 3.125e9, 393e12),
    "v5p": Chip(459e12, 95.73 * GiB, 2.765e12, 1.75e9, 1.8e11, 3, 6.25e9, 918e12),
    "v6e": Chip(918e12, 31.24 * GiB, 1.64e12, 1.75e9, 1.8e11, 2, 12.5e9, 1836e12),
    # Ironwood, TPU7x. Its chip is two devices: 2307 TFLOP/s (4614 of fp8), 192 GiB, 7380 GB/s and links like v5p's are
    # halved. The clock is the one at which the four 256 x 256 units that cycles are counted for reach that peak.
    "v7x": Chip(1153.5e12, 94.74 * GiB, 3.69e12, 2.2e9, 9e10, 3, 6.25e9, None, 2307e12, 2),
}
# The GPUs that programs can be compiled for without one. Of the 80 GB that give the H100 its name, its driver reports
# 85; the rest is room for the driver's own arrays and for libraries. NVLink moves 900 GB a second, half of it each way.
GPUS = {"h100": Chip(989e12, 80e9, 3.35e12, 1.98e9, 4.5e11, 1, None, 1979e12, 1979e12)}
# Names of the TPUs above by the device_kind that JAX reports.
TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}
# Per device_kind: dense bfloat16 FLOP/s, and memory bandwidth in bytes per second.
PEAK_FLOPS = {kind: TPUS[name].peak_flops for kind, name in TPU_KINDS.items()} | {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
# The same of eight bits, by the kind of product, where a device has units for it.
EIGHT_BIT_FLOPS = {
    "int8": {kind: flops for kind, name in TPU_KINDS.items() if (flops := TPUS[name].int8_flops)}
    | {
        "NVIDIA A100-SXM4-40GB": 624e12,
        "NVIDIA A100-SXM4-80GB": 624e12,
        "NVIDIA H100 80GB HBM3": 1979e12,
        "NVIDIA H200": 1979e12,
    },
    "fp8": {kind: flops for kind, name in TPU_KINDS.items() if (flops := TPUS[name].fp8_flops)}
    | {"NVIDIA H100 80GB HBM3": 1979e12, "NVIDIA H200": 1979e12},
}
BANDWIDTH = {kind: TPUS[name].hbm_bandwidth for kind, name in TPU_KINDS.items()} | {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
}
