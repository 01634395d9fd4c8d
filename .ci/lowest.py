"""Prints the lowest version of each package that pyproject.toml allows, as constraints for pip: ``python .ci/lowest.py``."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
for line in [*project["dependencies"], *project["optional-dependencies"]["tensorboard"]]:
    found = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)", line)
    assert found, f"{line}: expected a lower bound"
    print(f"{found[1]}=={found[2]}")
