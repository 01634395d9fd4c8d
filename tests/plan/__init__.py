"""Tests of plan; those that compile for a TPU want its compiler."""

import importlib.util
import os

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu, which is made for Linux alone"
)

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs XLA's compiler for NVIDIA GPUs, jax_cuda12_plugin: the extra cuda, some 6 GB",
)

# The TPU's compiler ends the process on a flag that it does not know: none of those that tests/conftest.py chooses.
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}
