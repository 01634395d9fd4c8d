"""Orbax still names and writes its files, and words its errors, as llama_jax/compat/orbax_internals.py rests on."""

import errno
import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tensorstore

from llama_jax.compat import orbax_internals

FILE = "llama_jax/compat/orbax_internals.py"
VERSION = f"orbax {importlib.metadata.version('orbax-checkpoint')}"


def test_orbax_says_how_it_stores_arrays(tmp_path: Path) -> None:
    for is_ocdbt in (True, False):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=is_ocdbt)) as checkpointer:
            checkpointer.save(tmp_path / str(is_ocdbt), {"w": jnp.ones(2)})
        assert orbax_internals.storage_format(tmp_path / str(is_ocdbt)) == (is_ocdbt, False), f"{VERSION}; see {FILE}"


def test_a_folder_that_orbax_has_not_finished_has_a_temporary_name(tmp_path: Path) -> None:
    seen: list[str] = []

    class Handler(ocp.CheckpointHandler):
        def save(self, directory: Any, args: Any) -> None:
            seen.append(str(directory))

        def restore(self, directory: Any, args: Any = None) -> None: ...

    @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
    class Nothing(ocp.args.CheckpointArgs): ...

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(nothing=Handler())) as checkpointer:
        checkpointer.save(tmp_path / "1", args=ocp.args.Composite(nothing=Nothing()))
    assert orbax_internals.TEMPORARY in seen[0], f"{VERSION} names it {seen[0]}; see {FILE}"


def test_orbax_marks_a_finished_folder_in_object_storage_as_before() -> None:
    names = importlib.import_module("orbax.checkpoint._src.path.atomicity_types")
    assert getattr(names, "COMMIT_SUCCESS_FILE", None) == orbax_internals.COMMITTED, f"{VERSION}; see {FILE}"


@pytest.mark.parametrize("words", [*orbax_internals.LOST_PROCESS, "See full"])
def test_orbaxs_errors_have_the_words_that_they_are_read_by(words: str) -> None:
    sources = Path(ocp.__file__).parent.rglob("*.py")
    assert any(words in path.read_text() for path in sources), f"{VERSION} no longer says {words!r}; see {FILE}"


def test_of_an_error_of_orbax_the_reason_is_told() -> None:
    assert orbax_internals.reason_of("cannot read\n  index 3. See full TensorStore details: x") == "cannot read index 3"
    assert orbax_internals.is_echo("Event loop is closed") and not orbax_internals.is_echo("disk is full")


def test_tensorstore_still_tells_the_number_of_the_systems_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(tmp_path / "file" / "below")}}
    with pytest.raises(ValueError) as refused:
        tensorstore.open(spec, create=True, dtype=tensorstore.int8, shape=[1]).result()
    assert orbax_internals.system_error(str(refused.value)) == errno.ENOTDIR, f"{refused.value}; see {FILE}"
    assert orbax_internals.system_error("another error") == 0
