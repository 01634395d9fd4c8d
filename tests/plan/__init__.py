"""Tests of plan; those that compile for a TPU want its compiler."""

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler, libtpu, which is made for Linux alone"
)
