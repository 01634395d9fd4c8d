"""``python -m tests.plan.small_chip MEGABYTES ...``: plan, for a v5e with so little memory that small models do not fit."""

import dataclasses
import sys

from llama_jax.devices.chips import TPUS
from llama_jax.errors import run_command
from llama_jax.plan.__main__ import main

if __name__ == "__main__":
    TPUS["v5e"] = dataclasses.replace(TPUS["v5e"], hbm_bytes=1e6 * float(sys.argv.pop(1)))
    run_command(main)
