"""Recognizes a text that a model was trained on, whose loss says little about other texts."""

import json
from collections.abc import Iterator
from pathlib import Path

from llama_jax.checkpoint import ORIGIN
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.data.beside import names_of
from llama_jax.data.opened import origins
from llama_jax.data.origin import Origin
from llama_jax.data.sources import find_files


def trained_on(checkpoint: WholeModel, text: str, as_text: bool = False, text_field: str = "") -> Iterator[str]:
    """Yield a line if files of ``text`` have the content of files that a checkpoint of this project was trained on.

    The files of a text that was held out as a whole do not count. Raises UserError as ``find_files`` does.
    """
    known = [origin for part in (checkpoint.base, checkpoint.adapter) if part for origin in _origins(part.folder)]
    sizes = {file.bytes for origin in known for file in origin.files}
    places = [file.place for file in find_files(text, "--text", as_text, text_field).files]
    # A large text is read for this only if it may be one of them.
    found = {place.name: place.sha256() for place in places if max(0, place.size) in sizes}
    for origin in known:
        theirs = {file.sha256 for file in origin.files if file.bytes}
        if names := [name.rpartition("/")[2] for name, sha256 in found.items() if sha256 in theirs]:
            part = {"own": "", "given": ""}.get(origin.held_out, f", but for the {1 - origin.train_size:.0%} held out")
            yield (
                f"note: the model was trained on {names_of(names)} of {text}{part}: this is not the loss of held-out text, which "
                "training prints"
            )


def _origins(checkpoint: Path) -> list[Origin]:
    """Return the texts that a checkpoint says it was trained on. A converted one says nothing, and has none."""
    try:
        return [*origins(json.loads((checkpoint / "model" / ORIGIN).read_text())["text"]).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
