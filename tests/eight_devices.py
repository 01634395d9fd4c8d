"""Runs a test module's main part where JAX has eight devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_on_eight_devices(module: str, *arguments: str) -> Any:
    """What ``python -m module`` prints, as JSON, in its last line."""
    root = Path(__file__).parents[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
