"""Runs a test module's main part where JAX has eight devices."""

import json
import os
from pathlib import Path
from typing import Any

from tests import forked


def run_on_eight_devices(module: str, *arguments: str) -> Any:
    """What ``python -m module`` prints, as JSON, in its last line."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # XLA has as many threads as devices, or so many. A device may wait in two collectives at once, each in a thread: of eight
    # threads, none may be left for the device that the others wait for.
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "24"}
    done = forked.run(["-m", module, *arguments], Path(__file__).parents[1], environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
