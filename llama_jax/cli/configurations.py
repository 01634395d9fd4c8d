"""The configurations that come with the package, which ``--config`` takes by name: ``--config shakespeare``."""

from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.programs import PACKAGE, ROOT

# In an installed package they lie within it, in a clone beside it.
FOLDER = next((folder for folder in (PACKAGE / "configs", ROOT / "configs") if folder.is_dir()), PACKAGE / "configs")


def names() -> list[str]:
    """The names of the configurations that come with the package, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def shipped(name: str) -> Path:
    """The file of the configuration ``name`` that comes with the package."""
    return FOLDER / f"{name}.toml"


def find_config(given: str) -> tuple[Path, list[str]]:
    """The file that ``--config`` names, by its path or as one that comes with the package, and what was decided on the way.

    A file that exists is taken before a shipped configuration of the same name. Raises UserError where there is neither.
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
