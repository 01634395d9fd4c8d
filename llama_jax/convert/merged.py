"""A base with an adapter as the source of a conversion: merged row by row, as it is read."""

import contextlib
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from llama_jax.adapters import PLACES
from llama_jax.checkpoint import Checkpoint
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.config import Weights
from llama_jax.convert.checkpoint_source import OwnSource, quantized_rows
from llama_jax.convert.layout import Tensor, tensors_of
from llama_jax.convert.peft import factors_of
from llama_jax.foreign.family import family_of


class MergedSource(OwnSource):
    """The model that an adapter was trained to be: W + scale a b, where W is as it was in training.

    If W was quantized in training, its quantized values are merged, so that the merged model computes what the adapted
    one does.
    """

    def __init__(self, found: WholeModel):
        assert found.adapter is not None and found.adapter.adapter is not None
        self._checkpoint, self._adapter, self._lora = found.base, found.adapter, found.adapter.adapter.lora
        self._weights: Weights = found.chosen("auto")
        self.args, self.tokenizer, self.chat = found.args, found.tokenizer, found.chat
        self.family = family_of(self.args, "model.json")
        self.decided = f"{found.folder / 'model' / 'model.json'}"
        self.description = f"{found.folder}: an adapter of rank {self._lora.rank}, merged into {found.base.folder}"
        self.unknown: list[str] = []
        self.warnings: list[str] = []
        self.checklists: list[Path] = []
        stored = found.base.weights != "auto"
        names = [
            f"{tensor.name}/{part}" if part else tensor.name
            for tensor in tensors_of(self.args)
            for part in (("values", "scales") if stored and tensor.multiplied else ("",))
        ]
        self._arrays = {name: found.base.open_array(name) for name in names}
        kept = self._arrays["tok_embeddings"].dtype.numpy_dtype
        self.dtypes = {
            tensor.name: self._arrays[tensor.name].dtype.numpy_dtype if tensor.name in self._arrays else kept
            for tensor in tensors_of(self.args)
        }
        self._targets = {"/".join(PLACES[name]): name for name in self._lora.targets}
        self._factors = lru_cache(maxsize=2)(partial(factors_of, self._adapter))
        if self._weights != "auto":
            self.warnings.append(
                f"the adapter was trained beside matrices in {self._weights}: it is merged into those, and the result is stored "
                f"as {kept.name}"
            )
            if self.args.tie_embeddings:  # which are looked up plain, and multiplied by quantized
                self.warnings.append(
                    f"the output matrix was one of {self._weights}, too; merged, it is the tied embeddings again, so that logits differ by "
                    "that rounding"
                )
        elif kept.itemsize < 4:
            self.warnings.append(f"the merged matrices are rounded to {kept.name}, in which the base is stored")

    def rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Read rows; see Source."""
        if self._weights == "auto" or not tensor.multiplied:
            rows = super().rows(tensor, layer, start, stop)
        elif self._checkpoint.weights == "auto":
            rows = quantized_rows(super().rows(tensor, layer, start, stop), self._weights)
        else:
            rows = self._stored_rows(tensor, layer, start, stop)
        if tensor.name in self._targets:
            a, b = self._factors(self._targets[tensor.name], layer)
            rows = rows.astype(np.float32) + self._lora.scale * (b[:, start:stop].T @ a.T)
        return rows.astype(self.dtypes[tensor.name])

    def origin(self, tensor: Tensor, layer: int) -> str:
        """Return the tensor's name; see Source."""
        adapted = " with its adapter" if tensor.name in self._targets else ""
        return super().origin(tensor, layer) + adapted

    @contextlib.contextmanager
    def _both(self) -> Iterator[None]:
        with self._checkpoint.verified(), self._adapter.verified():
            yield

    def verified(self) -> contextlib.AbstractContextManager[None]:
        """Verify the checksums of both; see Source."""
        return self._both()

    def _stored_rows(self, tensor: Tensor, layer: int, start: int, stop: int) -> np.ndarray:
        """Return rows (out, in) of a matrix that the base stores quantized, float32."""
        parts = []
        for part in ("values", "scales"):
            array = self._arrays[f"{tensor.name}/{part}"]
            index = (layer, slice(None), slice(start, stop)) if tensor.layered else (slice(None), slice(start, stop))
            parts.append(array[index].read().result())
        values, scales = np.asarray(parts[0]).astype(np.float32), np.asarray(parts[1])
        groups, outputs = scales.shape
        return (values.reshape(groups, -1, outputs) * scales[:, None]).reshape(-1, outputs).T


def base_at(found: Checkpoint, given: str) -> WholeModel:
    """Return an adapter with its base, which is where it was, or at the path ``given``."""
    if given:
        return WholeModel.find(given, found.folder)
    return WholeModel.find(found.folder, remedy="say where it is: --base PATH")
