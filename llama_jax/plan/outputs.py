"""The files that plan writes. They are checked before anything is compiled, and never replace a file of anyone else."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.picture import draw, is_picture
from llama_jax.storage.files import is_address, write_atomically

# Number of bytes at the beginning of a file that show what it is.
BEGINNING = 4096


@dataclass(frozen=True)
class Outputs:
    """The files for the program's text and the picture. None: none. ``note`` says why there is no picture."""

    hlo: Path | None = None
    picture: Path | None = None
    note: str = ""

    @classmethod
    def check(cls, hlo: str, picture: str, asked: bool) -> "Outputs":
        """Check the files before compilation. ``asked``: the name of the picture was given and is not the default.

        Raises UserError if a file cannot be written, or exists and was not written by plan.
        """
        if hlo and hlo == picture:
            raise UserError(f"--output: expected another file than --hlo, found {picture} twice")
        text = _writable("--hlo", hlo, lambda content: content.startswith(b"HloModule"))
        if picture and not picture.lower().endswith(".png"):
            raise UserError(f"--output: expected a name that ends in .png, found {picture}")
        try:
            return cls(text, _writable("--output", picture, is_picture))
        except UserError as error:
            if asked:
                raise
            return cls(text, None, f"none is drawn ({error}), or --output ''")

    def write(self, plan: Plan) -> list[tuple[str, str]]:
        """Write the files. Return lines to print about them."""
        said: list[tuple[str, str]] = []
        if self.hlo is not None and plan.schedule is None:
            said.append(("text", f"{self.hlo} is not written: there is no program, as the step does not fit"))
        elif self.hlo is not None:
            write_atomically(self.hlo, plan.text)
            said.append(("text", f"{self.hlo}, of the compiled program"))
        return said + self.draw(lambda path: draw(plan, path))

    def draw(self, draw: Callable[[Path], None]) -> list[tuple[str, str]]:
        """Write the picture with ``draw``, if there is to be one. Return lines to print about it."""
        if self.picture is None:
            return [("picture", self.note)] if self.note else []
        draw(self.picture)
        return [("picture", str(self.picture))]


def _writable(flag: str, name: str, is_ours: Callable[[bytes], bool]) -> Path | None:
    """Return ``name`` as a path, or None if it is empty.

    Raises UserError if it cannot be written, or holds something that plan did not write.
    """
    if not name:
        return None
    path = Path(name).expanduser()
    if is_address(name):
        raise UserError(f"{flag}: expected a file on disk, found {name}; copy it there afterwards")
    if path.exists() and not path.is_file():
        raise UserError(f"{flag}: expected a file, found that {name} is something else; give another name")
    if path.exists():
        with path.open("rb") as file:
            ours = is_ours(file.read(BEGINNING))
        if not ours:
            raise UserError(
                f"{flag}: expected a new file or one that plan wrote, found another in {name}; give another name or move it away"
            )
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag}: expected a folder that can be written, found {folder}; give another name")
    return path
