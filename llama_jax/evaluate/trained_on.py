"""Recognizes a text that a model was trained on, whose loss says little about other texts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from llama_jax.checkpoint import ORIGIN
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.data.beside import names_of
from llama_jax.data.opened import origins
from llama_jax.data.origin import Origin
from llama_jax.data.sources import find_files


def trained_on(
    models: Mapping[str, WholeModel], text: str, as_text: bool = False, text_field: str = ""
) -> Iterator[str]:
    """Yield a line for each of ``models``, by path, that was trained on files with the content of files of ``text``.

    The files of a text that was held out as a whole do not count. Raises UserError as ``find_files`` does.
    """
    known = [
        (path, origin)
        for path, model in models.items()
        for part in (model.base, model.adapter)
        if part
        for origin in _origins(part.folder)
    ]
    sizes = {file.bytes for _, origin in known for file in origin.files}
    if not sizes:
        return
    places = [file.place for file in find_files(text, "--text", as_text, text_field).files]
    # A large text is read for this only if it may be one of them.
    found = {place.name: place.sha256() for place in places if max(0, place.size) in sizes}
    for path, origin in known:
        theirs = {file.sha256 for file in origin.files if file.bytes}
        if names := [name.rpartition("/")[2] for name, sha256 in found.items() if sha256 in theirs]:
            part = {"own": "", "given": ""}.get(origin.held_out, f", but for the {1 - origin.train_size:.0%} held out")
            yield (
                f"{path}: note: the model was trained on {names_of(names)} of {text}{part}: this is not the loss of held-out text, "
                "which training prints"
            )


def _origins(checkpoint: Path) -> list[Origin]:
    """Return the texts that a checkpoint says it was trained on. A converted one says nothing, and has none."""
    try:
        return [*origins(json.loads((checkpoint / "model" / ORIGIN).read_text())["text"]).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
