"""Files that are mapped: cut while they are read, they are named."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from llama_jax.convert.safetensors import SafetensorsWriter
from tests.commands import ROOT

PROGRAM = """
import sys
from pathlib import Path
from llama_jax.convert.safetensors import SafetensorsFile

path = Path(sys.argv[1])
with SafetensorsFile.open(path) as file:
    rows = file.read("w")
    assert rows[0] == 0
    with path.open("r+b") as raw:
        raw.truncate(4096)
    print(rows.sum())
"""


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with SafetensorsWriter(path, np.dtype("<f4"), {"w": (100_000,)}) as writer:
        writer.write(np.zeros(100_000, "<f4"))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: --input: expected files that do not change while they are read, found {path} cut short; make it whole and "
        "start again\n"
    )
