"""Policies of rematerialisation: what a run says of them."""

import pytest

from llama_jax.ops.remat import told_of


@pytest.mark.parametrize("remat", ["offload", "offload:2"])
def test_offloading_on_a_cpu_is_told_to_save_nothing(remat: str) -> None:
    assert told_of(remat, "cpu").startswith(f"train.remat {remat} saves nothing on a CPU")
    assert not told_of(remat, "tpu") and not told_of(remat, "cuda")


@pytest.mark.parametrize("remat", ["none", "attention", "dots:2", "w1,w3"])
def test_other_policies_are_not_remarked_on(remat: str) -> None:
    assert not told_of(remat, "cpu")
