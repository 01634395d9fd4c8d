"""The files that plan writes: checked before anything is compiled, and never in place of a file that plan did not write."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.plan import Plan
from llama_jax.plan.picture import draw, is_picture
from llama_jax.storage.files import is_address, write_atomically

# Bytes at the beginning of a file that tell what it is.
BEGINNING = 4096


@dataclass(frozen=True)
class Outputs:
    """Where the program's text and the picture go; None: nowhere. note: why there is no picture, where nobody said so."""

    hlo: Path | None = None
    picture: Path | None = None
    note: str = ""

    @classmethod
    def check(cls, hlo: str, picture: str, asked: bool) -> "Outputs":
        """asked: the picture's name was given, and is not the default.

        Raises UserError where a file cannot be written, or is there already and is not one of plan's.
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
        """Write what was asked for; returns what there is to say of it."""
        said = []
        if self.hlo is not None and plan.schedule is None:
            said.append(("text", f"{self.hlo} is not written: there is no program, as the step does not fit"))
        elif self.hlo is not None:
            write_atomically(self.hlo, plan.text)
            said.append(("text", f"{self.hlo}, of the compiled program"))
        if self.picture is not None:
            draw(plan, self.picture)
            said.append(("picture", str(self.picture)))
        elif self.note:
            said.append(("picture", self.note))
        return said


def _writable(flag: str, name: str, is_ours: Callable[[bytes], bool]) -> Path | None:
    """The path that ``name`` is, None where it is empty. Raises UserError where it cannot be written, or holds what is not ours."""
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
