"""The page of recipes: every default has its reason."""

import dataclasses
import re
from pathlib import Path

from llama_jax.config import Config

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text()


def test_every_default_has_a_line_with_what_chose_it() -> None:
    rows = [
        line.split("|")[1]
        for line in PAGE.splitlines()
        if re.match(r"\| `(model|data|train|mesh|distributed|lora|expected)\.", line)
    ]
    named = set()
    for row in rows:
        fields = re.findall(r"`([^`]+)`", row)
        section = fields[0].split(".")[0]
        named |= {f"{section}.{field.removeprefix(section + '.')}" for field in fields}
    config = Config()
    wanted = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    assert named == wanted
