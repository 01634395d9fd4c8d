"""The settings of low-rank adapters (LoRA: Hu et al., 2021)."""

import dataclasses
import math
from typing import Literal, get_args

from llama_jax.errors import UserError, quoted
from llama_jax.fields import hints_of, typed

# The matrices that may have an adapter, by their names in the tree of parameters.
Target = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"]
MATRICES = get_args(Target)
BaseWeights = Literal["auto", "int8", "int4", "int4-64"]


@dataclasses.dataclass(frozen=True)
class LoraArgs:
    """Low-rank adapters (LoRA), which fine-tuning trains in place of the model's own matrices.

    They need train.init_from. A matrix W becomes W + scale a b, where a and b have few columns and rows.
    """

    rank: int = 0
    """Rank of the adapters: the number of columns of a and of rows of b. 0: train the whole model, without adapters."""
    alpha: float | None = None
    """Strength of the adapters: scale is alpha / rank. None: 2 x rank, so that scale is 2."""
    dropout: float = 0.0
    """Share of the adapters' inputs that training sets to zero."""
    targets: tuple[Target, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    """Matrices that get an adapter, of wq, wk, wv, wo, w1, w2, w3 and output."""
    base_weights: BaseWeights = "auto"
    """Quantization of the frozen matrices: int8, int4 or int4-64 (QLoRA).
    auto: as the checkpoint stores them; those that are not quantized get the compute dtype."""
    rslora: bool = False
    """Use the scale alpha / sqrt(rank) (rank-stabilized LoRA: Kalajdzievski, 2023)."""

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def strength(self) -> float:
        """The value of alpha, with None resolved to 2 x rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor of a b."""
        return self.strength / (math.sqrt(self.rank) if self.rslora else self.rank)

    def text(self, parameters: int) -> str:
        """Return a line about the adapters, which have so many parameters."""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return (
            f"{parameters:,} parameters: rank {self.rank}, scale {self.scale:g}{dropout}, on {', '.join(self.targets)}"
        )

    @property
    def flags(self) -> str:
        """The flags that give another run adapters of this form. It may choose another dropout and base_weights."""
        words = [f"--lora.rank {self.rank}"]
        if self.strength != 2.0 * self.rank:
            words.append(f"--lora.alpha {self.strength}")
        if self.rslora:
            words.append("--lora.rslora")
        if {*self.targets} != {*LoraArgs.targets}:
            words.append(f"--lora.targets {' '.join(self.targets)}")
        return " ".join(words)

    def check(self) -> None:
        """Raise UserError on impossible values."""
        if not (type(self.rank) is int and 0 <= self.rank < 1 << 31):
            raise UserError(f"lora.rank: expected 0 (no adapters) or more, found {self.rank!r}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if not (type(value) in (int, float) or (name == "alpha" and value is None)):
                raise UserError(f"lora.{name}: expected a number, found {value!r}")
        if self.alpha is not None and not 0 < self.alpha <= 1e6:
            raise UserError(f"lora.alpha: expected a number above 0, up to 1e6, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: expected 0.0 or more, below 1, found {self.dropout}")
        for name in ("base_weights", "rslora"):
            typed(getattr(self, name), hints_of(LoraArgs)[name], f"lora.{name}")
        known = ", ".join(MATRICES)
        if not isinstance(self.targets, tuple):
            raise UserError(f"lora.targets: expected a list of names out of {known}, found {quoted(self.targets)}")
        for i, name in enumerate(self.targets):
            if name not in MATRICES:
                raise UserError(f"lora.targets: expected names out of {known}, found {quoted(name)}")
            if name in self.targets[:i]:
                raise UserError(f"lora.targets: expected each name once, found {name} twice")
        if not self.targets:
            raise UserError(f"lora.targets: expected one or more names out of {known}, found none")
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if not self.rank and changed:
            raise UserError(
                f"lora.{changed[0]}: expected lora.rank of 1 or more beside it, found lora.rank 0, which trains without "
                "adapters; choose a rank, such as --lora.rank 16, or leave it out"
            )
