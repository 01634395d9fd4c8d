"""Files of whole tensors, as Hugging Face and Mistral ship them: safetensors, or a dict that torch saved."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.config import ModelArgs
from llama_jax.convert.layout import Tensor, all_tensors
from llama_jax.convert.safetensors import SafetensorsFile
from llama_jax.convert.torch_file import TorchFile
from llama_jax.errors import quoted
from llama_jax.foreign.config_json import QUANTIZED

# Suffixes of quantized matrices: GPTQ and AWQ, bitsandbytes, 8-bit floats.
PACKED = (
    ".qweight",
    ".qzeros",
    ".absmax",
    ".quant_state",
    ".SCB",
    ".weight_scale",
    ".weight_packed",
    ".weight_scale_inv",
)


class Stored(Protocol):
    """A tensor in a file: its type and shape."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class TensorFiles:
    """Open files of one model, and the file of each tensor by name. Raises UserError if a file is not as expected."""

    def __init__(self, folder: Path, names: Collection[str], stack: ExitStack):
        self.files: dict[str, SafetensorsFile | TorchFile] = {}
        for name in names:
            if name.endswith(".safetensors"):
                self.files[name] = stack.enter_context(SafetensorsFile.open(folder / name))
            else:
                self.files[name] = stack.enter_context(TorchFile.open(folder / name))
        self.places = {name: file for file, opened in self.files.items() for name in opened.tensors}

    def stored(self, name: str) -> Stored:
        """Return the type and shape of a tensor."""
        return self.files[self.places[name]].tensors[name]

    def read(self, name: str, start: int, stop: int, verify: bool = True) -> np.ndarray:
        """Return rows ``start`` to ``stop`` of a tensor as an array on the mapped file.

        ``verify`` is that of TorchFile.read. Safetensors have no checksums.
        """
        file = self.files[self.places[name]]
        return file.read(name, start, stop, verify) if isinstance(file, TorchFile) else file.read(name, start, stop)

    def origin(self, name: str) -> str:
        """Return the name of a tensor, and its file if there are several."""
        return f"{name} in {self.places[name]}" if len(self.files) > 1 else name

    def release(self) -> None:
        """Free the memory of what has been read."""
        for file in self.files.values():
            file.release()

    def types(self, args: ModelArgs, name: Callable[[Tensor, int], str]) -> Iterator[tuple[Tensor, int, np.dtype]]:
        """Yield every tensor of the model with its layer and its type. ``name`` says how the files call it."""
        for tensor, layer in all_tensors(args):
            yield tensor, layer, self.stored(name(tensor, layer)).dtype

    def errors(self, expected: dict[str, tuple[int, ...]], ignored: Callable[[str], object]) -> Iterator[str]:
        """Yield all that is wrong with the tensors, of which ``expected`` has the shapes.

        ``ignored`` says which other names may be there.
        """
        if packed := [name for name in self.places if name.endswith(PACKED)]:
            yield f"{quoted(packed[0])}, of a quantized matrix; {QUANTIZED}"
            return
        for name in expected.keys() - self.places.keys():
            yield f"{name} is missing"
        for name in self.places.keys() - expected.keys():
            if not ignored(name):
                yield f"{quoted(name)} is not a tensor of this model"
        for name in expected.keys() & self.places.keys():
            shape = self.stored(name).shape
            if shape != expected[name]:
                yield f"{name} has shape {list(shape)}, expected {list(expected[name])}"
        names = [name for file in self.files.values() for name in file.tensors]
        yield from (f"{quoted(name)} is in two files" for name in sorted({n for n in names if names.count(n) > 1}))
