"""The settings of adapters, and the flags that an error names them by."""

import shlex

import pytest

from llama_jax.cli.flags import parse_flags
from llama_jax.config import Config
from llama_jax.lora_args import LoraArgs


@pytest.mark.parametrize(
    "lora",
    [
        LoraArgs(rank=16),
        LoraArgs(rank=4, alpha=4.0, targets=("wv", "wq")),
        LoraArgs(rank=3, alpha=0.1234567, rslora=True, targets=("output",)),
    ],
)
def test_the_flags_of_adapters_give_them_to_another_run(lora: LoraArgs) -> None:
    assert parse_flags(Config, shlex.split(lora.flags), Config(), "train", "").lora == lora


def test_the_flags_leave_out_what_is_the_default() -> None:
    assert LoraArgs(rank=8, alpha=16.0, targets=("w3", "wq", "wk", "wv", "wo", "w1", "w2")).flags == "--lora.rank 8"
