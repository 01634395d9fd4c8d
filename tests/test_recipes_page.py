"""The page of recipes: every default has its reason."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from llama_jax.config import Config
from llama_jax.lora_args import LoraArgs

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text()


def rows() -> list[tuple[list[str], str]]:
    """Return the fields of each row of defaults, and what the row says that these are."""
    found = []
    for line in PAGE.splitlines():
        if re.match(r"\| `(model|data|train|mesh|distributed|lora|expected)\.", line):
            _, names, defaults, *_ = line.split("|")
            fields = re.findall(r"`([^`]+)`", names)
            section = fields[0].split(".")[0]
            found.append(([f"{section}.{field.removeprefix(section + '.')}" for field in fields], defaults.strip()))
    return found


def is_said(said: str, default: Any) -> bool:
    """Return whether a default is told: by its number or word, or as none, all or the person's own."""
    if said in ("none", "no", "yours", "found"):
        return default in (None, 0, "", "none", False, {}, ())
    if said == "all":
        return default in ("forward,input,weight", LoraArgs().targets)
    number = re.match(r"-?[\d.,e-]*\d", said)
    return said == str(default) if number is None else float(number[0].replace(",", "")) == default


def test_every_default_is_told_as_it_is() -> None:
    for fields, told in rows():
        said, config = told.split(", "), Config()
        said = said * len(fields) if len(said) == 1 else said
        assert len(said) == len(fields), told
        for field, each in zip(fields, said, strict=True):
            section, name = field.split(".")
            default = getattr(getattr(config, section), name)
            assert is_said(each, default), (field, each, default)


def test_every_default_has_a_line_with_what_chose_it() -> None:
    named, config = {field for fields, _ in rows() for field in fields}, Config()
    wanted = {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    assert named == wanted
