"""The configuration: one frozen dataclass a section, read from TOML and from flags, checked with clear errors.

Every field is a flag (``--train.lr 5e-4``) and a TOML key (``[train] lr = 5e-4``); flags win over the file, the file over
the defaults. The text under each field is its help.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from llama_jax.errors import UserError

T = TypeVar("T")

DType = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class ModelArgs:
    """Shape of a LLaMA 2 model, by the names of Meta's params.json. The defaults are a 110M-parameter model."""

    dim: int = 768
    """Width of the residual stream, in features."""
    n_layers: int = 12
    """Number of transformer blocks."""
    n_heads: int = 12
    """Number of query heads; divides dim, into heads of an even number of features."""
    n_kv_heads: int | None = None
    """Number of key and value heads (grouped-query attention); divides n_heads. None: as many as n_heads."""
    vocab_size: int = -1
    """Number of tokens in the vocabulary. -1: taken from the tokenizer."""
    multiple_of: int = 256
    """The feed-forward width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Scales the feed-forward width, which is two thirds of 4 x dim without it."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths, in positions."""
    max_seq_len: int = 4096
    """Context: the longest sequence, in tokens, in training windows and in generation."""

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, n_kv_heads resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer, by Meta's rule (llama/model.py, FeedForward): 11008 for the 7B model."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * math.ceil(hidden / self.multiple_of)

    def check(self) -> None:
        """Raise UserError where no model can have this shape."""
        for name in ("dim", "n_layers", "n_heads", "multiple_of", "max_seq_len", "norm_eps", "rope_theta"):
            _check(0 < getattr(self, name) < math.inf, f"model.{name}", "a positive number", getattr(self, name))
        _check(
            self.vocab_size == -1 or self.vocab_size > 0, "model.vocab_size", "-1 or a positive number", self.vocab_size
        )
        _check(self.dim % self.n_heads == 0, "model.n_heads", f"a divisor of model.dim = {self.dim}", self.n_heads)
        _check(
            self.head_dim % 2 == 0,
            "model.n_heads",
            f"heads of an even number of features, for the rotary embedding (model.dim = {self.dim})",
            f"{self.n_heads} heads of {self.head_dim}",
        )
        _check(
            self.kv_heads > 0 and self.n_heads % self.kv_heads == 0,
            "model.n_kv_heads",
            f"a divisor of model.n_heads = {self.n_heads}",
            self.kv_heads,
        )
        multiplier = self.ffn_dim_multiplier
        _check(
            multiplier is None or 0 < multiplier < math.inf, "model.ffn_dim_multiplier", "a positive number", multiplier
        )
        _check(
            self.hidden_dim > 0, "model.ffn_dim_multiplier", "a feed-forward layer of one unit or more", self.hidden_dim
        )


@dataclasses.dataclass(frozen=True)
class DataArgs:
    """The text, its tokenizer, and the split."""

    filepath: str = ""
    """A text file, a folder (its *.txt files, at any depth), a glob, or a folder of prepared tokens. Empty: the built-in stories."""
    train_size: float = 0.9
    """Share of the text's bytes that trains; the rest, its end, is held out for evaluation. 1: nothing is held out."""
    tokenizer_model_path: str = ""
    """A SentencePiece model. Empty: a BPE vocabulary is trained on the training part and kept in the run folder."""
    vocab_size: int = 1024
    """Size of the vocabulary when a tokenizer is trained here, in tokens."""
    separator: str = ""
    r"""What stands between two documents in a file, for example '\n\n', or '\n' for a document a line. Empty: a file is a document."""
    stories: int = 12000
    """Number of built-in stories (about 7 MB for 12,000), when there is no filepath."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        _check(0 < self.train_size <= 1, "data.train_size", "a share above 0 and up to 1", self.train_size)
        _check(
            self.vocab_size >= 262,
            "data.vocab_size",
            "262 or more (256 bytes, 3 controls and some characters)",
            self.vocab_size,
        )
        _check(self.stories > 0, "data.stories", "a positive number", self.stories)


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Optimization, evaluation and the run folder. The defaults are the LLaMA 2 paper's (section 2.1), batch and length aside."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The cosine ends at this share of lr."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0 to lr."""
    n_epochs: int = 1
    """Passes over the training text; counts when max_steps is not given."""
    max_steps: int | None = None
    """Optimizer steps; wins over n_epochs."""
    batch_size: int = 16
    """Sequences of max_seq_len tokens in an optimizer step, over the whole job."""
    gradient_accumulation_steps: int = 1
    """Parts that the batch is split into, one after the other, to save memory."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's mean square."""
    eps: float = 1e-5
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient. 0: no clipping."""
    remat: Remat = "none"
    """What the backward pass computes again instead of keeping: nothing (none), all but the projections' results (dots), or whole blocks (full)."""
    compute_dtype: DType = "auto"
    """Type of activations and matmuls; auto is bfloat16 on TPU and GPU, float32 on CPU. Parameters are float32 always."""
    eval_interval: int = 100
    """Steps between two evaluations."""
    eval_iters: int = 100
    """Most batches an evaluation reads of the held-out text. 0: all of it."""
    log_interval: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_interval: int = 100
    """Steps between two checkpoints (a new best evaluation is saved besides)."""
    save_dir: str = ""
    """The run folder. Empty: runs/<name of the config>."""
    init_from: str = ""
    """A checkpoint to start from (fine-tuning): its parameters, model arguments and tokenizer. Empty: random parameters."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the batches."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        for name in ("lr", "n_epochs", "batch_size", "gradient_accumulation_steps", "eps"):
            _check(getattr(self, name) > 0, f"train.{name}", "a positive number", getattr(self, name))
        for name in ("eval_interval", "log_interval", "save_interval"):
            _check(getattr(self, name) > 0, f"train.{name}", "one step or more", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "grad_clip", "eval_iters", "seed"):
            _check(getattr(self, name) >= 0, f"train.{name}", "0 or more", getattr(self, name))
        for name in ("beta1", "beta2"):
            _check(0 <= getattr(self, name) < 1, f"train.{name}", "at least 0 and below 1", getattr(self, name))
        for name in ("lr", "eps", "weight_decay", "grad_clip"):
            _check(math.isfinite(getattr(self, name)), f"train.{name}", "a finite number", getattr(self, name))
        _check(self.seed < 2**32, "train.seed", "below 2^32", self.seed)
        _check(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio", "between 0 and 1", self.min_lr_ratio)
        _check(self.max_steps is None or self.max_steps > 0, "train.max_steps", "a positive number", self.max_steps)
        _check(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "train.gradient_accumulation_steps",
            f"a divisor of train.batch_size = {self.batch_size}",
            self.gradient_accumulation_steps,
        )


@dataclasses.dataclass(frozen=True)
class MeshArgs:
    """How the devices are laid out. -1, in one place at most: what is left."""

    data: int = -1
    """Devices that share a batch, each with all parameters."""
    fsdp: int = 1
    """Devices that share a batch and the parameters (fully sharded data parallel)."""
    tensor: int = 1
    """Devices that share heads and feed-forward units."""
    sequence: int = 1
    """Devices that share the positions of a sequence."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _check(size == -1 or size > 0, f"mesh.{name}", "-1 or a positive number", size)
        _check(list(sizes.values()).count(-1) <= 1, "mesh", "at most one -1", sizes)


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """How text is generated. The defaults are Meta's."""

    temperature: float = 0.6
    """Divides the logits; 0 takes the likeliest token always."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that hold this much probability together (the one that crosses it stays)."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt; the context may end it before."""
    seed: int = 0
    """Seed of the sampling."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        finite = math.isfinite(self.temperature)
        _check(finite and self.temperature >= 0, "temperature", "0 or more", self.temperature)
        _check(0 < self.top_p <= 1, "top_p", "above 0 and up to 1", self.top_p)
        _check(self.max_new_tokens > 0, "max_new_tokens", "one token or more", self.max_new_tokens)
        _check(0 <= self.seed < 2**32, "seed", "0 or more, below 2^32", self.seed)


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    train: TrainArgs = TrainArgs()
    mesh: MeshArgs = MeshArgs()

    def check(self) -> None:
        """Raise UserError where a section, or the sections together, ask for the impossible."""
        for section in (self.model, self.data, self.train, self.mesh):
            section.check()


def load_toml(path: str | Path) -> Config:
    """Read a configuration; keys that the file leaves out keep their defaults.

    Raises UserError on a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"{path}: expected a TOML configuration, found no such file; see configs/ for examples"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, found: {error}") from None
    return from_dict(Config, table, source=str(path))


def from_dict(kind: type[T], table: dict[str, Any], source: str, prefix: str = "") -> T:
    """Build dataclass ``kind`` from nested dicts; ``source`` and ``prefix`` say in errors where a key stands."""
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        field = key.replace("-", "_")
        if field not in hints:
            raise UserError(f"{source}: unknown key {name}; expected one of {', '.join(prefix + h for h in hints)}")
        if dataclasses.is_dataclass(hints[field]):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {name}: expected a table [{name}], found {value!r}")
            values[field] = from_dict(typing.cast(type, hints[field]), value, source, f"{name}.")
        else:
            values[field] = _typed(value, hints[field], f"{source}: {name}")
    return kind(**values)


def to_toml(config: Any) -> str:
    """A dataclass of dataclasses as TOML text, every value spelled out (None, which TOML lacks, as a comment)."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        for name, value in dataclasses.asdict(getattr(config, section.name)).items():
            lines.append(f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    # JSON's spelling is TOML's for all that fields hold, but for infinities and DEL.
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parse_flags(kind: type[T], argv: Sequence[str] | None, default: T, prog: str, description: str) -> T:
    """Read command-line flags over ``default``, by tyro; ``--help`` prints the help and exits with status 0.

    Raises UserError, in one line, on an unknown flag or a value of the wrong type.
    """
    import tyro

    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            args = list(sys.argv[1:] if argv is None else argv)
            return tyro.cli(kind, args=args, default=default, prog=prog, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(heard.getvalue()) + f"; `python {prog} --help` lists all flags") from None


def _one_line(panel: str) -> str:
    """The message of tyro's framed error panel, and the flag that it proposes, in one line."""
    frame = "╭╮╰╯│─ "
    lines = [line.strip(frame) for line in panel.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines[1:]:
        parts.append([]) if not line else parts[-1].append(line)
    message = " ".join(parts[0]) or " ".join(filter(None, lines))
    hints = [part for part in parts[1:] if part and part[0].startswith("Perhaps you meant")]
    helps = [part for part in parts[1:] if part and part[0].startswith("Argument helptext")]
    if hints and len(hints[0]) > 1:
        message += f"; perhaps you meant {hints[0][1]}"
    elif helps and len(helps[0]) > 1:
        message += f"; expected {helps[0][1]}"
    return message


def _typed(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint`` asks; an int stands for a float, nothing else is converted. Raises UserError."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        expected = "one of " + ", ".join(map(repr, typing.get_args(hint)))
    else:
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value) in kinds:
            return value
        if float in kinds and type(value) is int:
            return float(value)
        expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    raise UserError(f"{where}: expected {expected}, found {value!r}")


def _check(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise UserError(f"{key}: expected {expected}, found {found}")
