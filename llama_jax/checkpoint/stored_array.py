"""Arrays of a checkpoint that are read and written by region, so that large ones need little memory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llama_jax.compat.orbax_internals import storage_format
from llama_jax.storage.locations import kvstore


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayOnDisk:
    """An array in ``folder``. Saving it in a checkpoint moves the folder there."""

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype


def create_array(folder: Path, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> ts.TensorStore:
    """Create a zarr array in ``folder``, to be written by region.

    Each chunk of shape ``chunks`` is a file. Regions should consist of whole chunks, since a chunk that is written in
    part is read first.

    Example: create_array(...)[0, :8].write(rows).result()
    """
    name = dtype.name if dtype.kind == "V" else dtype.newbyteorder("<").str
    # Zarr stores a 4-bit number in a byte. Compressed, it takes less than half a byte.
    compressor = {"id": "zstd", "level": 1} if dtype.name == "int4" else None
    metadata = {"shape": shape, "chunks": chunks, "dtype": name, "compressor": compressor}
    # Chunks of zeros are stored, too, so that a missing chunk is an error for readers.
    spec = {"driver": "zarr", "kvstore": kvstore(folder), "metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=True, open=True).result()


def open_array(folder: Path, name: str) -> ts.TensorStore:
    """Open array ``name`` ("layers/attention/wq") of the tree that orbax saved in ``folder``, to be read by region.

    Raises ValueError or OSError if it is missing.
    """
    is_ocdbt, is_zarr3 = storage_format(folder)
    key = name.replace("/", ".")
    if is_ocdbt:
        store = {"driver": "ocdbt", "base": kvstore(folder), "path": key + "/"}
    else:
        store = kvstore(folder / key)
    driver = "zarr3" if is_zarr3 else "zarr"
    spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True).result()


class StoredArrayHandler(ocp.type_handlers.TypeHandler):
    """Lets orbax save ArrayOnDisk leaves. They are restored like all other arrays."""

    def typestr(self) -> str:
        """Return the type under which the arrays are saved."""
        return "jax.Array"

    async def serialize(self, values: Sequence[ArrayOnDisk], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Move the arrays' folders into the checkpoint."""
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._move(values, infos), name="stored arrays")]

    async def _move(self, values: Sequence[ArrayOnDisk], infos: Sequence[Any]) -> None:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            value.folder.rename(info.path)

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Not used; the arrays are restored as plain ones."""
        raise NotImplementedError

    async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Not used; the arrays are restored as plain ones."""
        raise NotImplementedError


def saver_of_stored_arrays() -> ocp.PyTreeCheckpointHandler:
    """Return orbax's handler for trees with ArrayOnDisk leaves."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (ArrayOnDisk, StoredArrayHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
