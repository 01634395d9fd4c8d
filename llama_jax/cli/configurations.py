"""The configurations that come with the package. ``--config`` takes them by name: ``--config shakespeare``."""

import tomllib
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.programs import PACKAGE, ROOT

# An installed package contains them. In a clone they are next to the package.
FOLDER = next((folder for folder in (PACKAGE / "configs", ROOT / "configs") if folder.is_dir()), PACKAGE / "configs")


def names() -> list[str]:
    """Return the names of the configurations that come with the package, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def shipped(name: str) -> Path:
    """Return the file of the configuration ``name`` that comes with the package."""
    return FOLDER / f"{name}.toml"


def find_config(given: str) -> tuple[Path, list[str]]:
    """Find the file that ``--config`` names by its path, or by the name of a configuration of the package.

    If both exist, the file at the path is used. Returns the file and the lines to print about that choice. Raises
    UserError if neither exists.
    """
    path, name, known = Path(given), given.removesuffix(".toml"), names()
    if path.exists() and not path.is_dir():
        return path, [f"--config {given}: read from the file {path.absolute()}"] if name in known else []
    if name in known:
        return shipped(name), []
    hint = f"--config {path.stem} takes that one" if path.stem in known else "name one of these, or correct the path"
    raise UserError(
        f"--config: expected a TOML file or one of the configurations that come with the package ({', '.join(known)}), found no "
        f"file {given}; {hint}"
    )


def check_no_config(text: str) -> None:
    """Raise UserError if the path of a text has the name of a configuration, which --config takes."""
    if Path(text).suffix.lower() == ".toml":
        raise UserError(
            f"data.filepath: expected a text, found {text}, which has the name of a configuration; write --config {text}, or add "
            "--data.as-text to read it as a text"
        )


def stated_keys(path: Path | None) -> set[str]:
    """Return the names of the keys in a TOML file: {"data.vocab_size"}."""
    if path is None:
        return set()
    table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    return {f"{section}.{key}".replace("-", "_") for section, keys in table.items() for key in keys}
