"""The record in a checkpoint of an adapter: its base and its settings, in model.json under "adapter"."""

from dataclasses import dataclass
from typing import Any

from llama_jax.config import from_dict
from llama_jax.errors import UserError
from llama_jax.lora_args import LoraArgs


@dataclass(frozen=True)
class AdapterRecord:
    """The base of an adapter, and the adapter's settings."""

    base: str = ""
    """The folder of the base's checkpoint when the adapter was trained."""
    digest: str = ""
    """The digest of the base's parameters (identity.py), which a base must have to be adapted."""
    lora: LoraArgs = LoraArgs()
    """The settings. base_weights is the quantization of the base that the adapter was trained with; auto: none."""

    @classmethod
    def read(cls, table: Any, source: str) -> "AdapterRecord":
        """Return the record of a table in JSON. Raises UserError, which names ``source``, if it is damaged."""
        record = from_dict(Tables, {"adapter": table}, source).adapter
        try:
            record.lora.check()
        except UserError as error:
            raise UserError(f"{source}: adapter: {error}") from None
        if not record.lora.rank:
            raise UserError(f"{source}: adapter: lora.rank: expected 1 or more, found {record.lora.rank}")
        return record


@dataclass(frozen=True)
class Tables:
    """The part of model.json that describes an adapter."""

    adapter: AdapterRecord = AdapterRecord()
