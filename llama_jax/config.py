"""The configuration: one frozen dataclass a section, read from TOML and from flags, checked with clear errors.

Every field is a flag (``--train.lr 5e-4``) and a TOML key (``[train] lr = 5e-4``); flags win over the file, the file over
the defaults. The text under each field is its help.
"""

import dataclasses
import functools
import json
import math
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from llama_jax.cli.flags import ESCAPED
from llama_jax.errors import UserError
from llama_jax.storage.files import is_address

T = TypeVar("T")

DType = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "dots", "attention", "offload", "full"]
AttentionKernel = Literal["auto", "xla", "splash", "cudnn"]
Weights = Literal["auto", "int8", "int4", "int4-64"]
Cache = Literal["auto", "int8"]
BadSteps = Literal["stop", "skip", "count"]


_SURROGATE = re.compile("[\ud800-\udfff]")
_LARGEST, _HUGE = (1 << 31) - 1, 1e300
_TINY, _BELOW_1, _LARGEST_FLOAT32 = 1e-30, math.nextafter(1, 0), 3.4e38
# The ranges of a field's values, both ends included: counts; floats above 0.
_COUNT = (1, _LARGEST)
_POSITIVE = (_TINY, _HUGE)


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
        return self.multiple_of * -(-hidden // self.multiple_of)

    def check(self) -> None:
        """Raise UserError where no model can have this shape."""
        sizes = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "max_seq_len"), _COUNT)
        positive = {"norm_eps": _POSITIVE, "rope_theta": _POSITIVE, "ffn_dim_multiplier": (_TINY, 1e6)}
        _check_fields(self, "model.", sizes | positive | {"vocab_size": (-1, _LARGEST)})
        _check(self.vocab_size != 0, "model.vocab_size", "-1 or a positive number", self.vocab_size)
        _check(self.dim % self.n_heads == 0, "model.n_heads", f"a divisor of model.dim = {self.dim}", self.n_heads)
        _check(
            self.head_dim % 2 == 0,
            "model.n_heads",
            f"heads of an even number of features, for the rotary embedding (model.dim = {self.dim})",
            f"{self.n_heads} heads of {self.head_dim}",
        )
        _check(
            self.n_heads % self.kv_heads == 0,
            "model.n_kv_heads",
            f"a divisor of model.n_heads = {self.n_heads}",
            self.kv_heads,
        )
        width = f"a feed-forward layer of 1 to {_LARGEST:,} units"
        _check(0 < self.hidden_dim <= _LARGEST, "model.ffn_dim_multiplier", width, self.hidden_dim)


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
    r"""What stands between two documents in a file, for example '<|endoftext|>', '\n\n', or '\n' for a document a line. \n is any line end (LF, CRLF, CR), \t a tab, \\ a backslash; blank lines at a document's borders are left out. Empty: a file is a document."""
    stories: int = 12000
    """Number of built-in stories (about 7 MB for 12,000), when there is no filepath."""
    as_text: bool = False
    """Take the files as plain text whatever they hold: JSON lines, HTML, bytes that are not UTF-8 (each is read as U+FFFD)."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        # A vocabulary holds 256 bytes, 3 controls and some characters; SentencePiece numbers tokens in 31 bits.
        _check_fields(self, "data.", {"train_size": (_TINY, 1.0), "vocab_size": (262, 1 << 24), "stories": _COUNT})


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
    """What the backward pass finds kept of a block, most memory first: all (none), the projections' and attention's results (dots), the attention half alone (attention; in host memory: offload), or nothing (full)."""
    attention: AttentionKernel = "auto"
    """Attention's implementation: xla everywhere, splash on TPU, cudnn on NVIDIA GPUs; auto takes the fastest that is available."""
    compute_dtype: DType = "auto"
    """Type of activations and matmuls; auto is bfloat16 on TPU and GPU, float32 on CPU. Parameters are float32 always."""
    eval_interval: int = 100
    """Steps between two evaluations."""
    eval_minutes: float = 0.0
    """Minutes after which an evaluation is made before eval_interval asks for it. 0: never."""
    eval_iters: int = 100
    """Most batches of 16 sequences that an evaluation reads of the held-out text, spread over it; the same ones whatever batch_size is. 0: all of it."""
    log_interval: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_interval: int = 100
    """Steps between two checkpoints (a new best evaluation is saved besides)."""
    save_minutes: float = 30.0
    """Minutes after which a checkpoint is saved before save_interval asks for it. 0: never."""
    keep: int = 3
    """Checkpoints that are kept: so many of the last, and the best."""
    keep_every: int = 0
    """Checkpoints of steps that are a multiple of this are kept for good. 0: none."""
    resume_step: int = 0
    """The step to go on from; later steps and their records are set aside. 0: the newest."""
    hold_lr: bool = False
    """Whether a run goes on at the learning rate that it stopped with, whatever the schedule says."""
    save_dir: str = ""
    """The run folder. Empty: runs/<name of the config>."""
    checkpoint_dir: str = ""
    """Where checkpoints go: a folder, or object storage (gs://bucket/folder). Empty: checkpoints/ in the run folder."""
    init_from: str = ""
    """A checkpoint to start from (fine-tuning): its parameters, model arguments and tokenizer. Empty: random parameters."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the batches."""
    bad_steps: BadSteps = "stop"
    """What a step with a loss or gradient that is not finite, or with a spike of the loss, does: it ends the run (stop), changes nothing (skip), or counts (count: a spike's update is taken, one that is not finite is skipped)."""
    spike_factor: float = 0.0
    """A loss above this many times the mean of the last 100 or so is a spike. 0: spikes are not looked for."""
    watchdog_seconds: float = 1800.0
    """Seconds without a finished step or any other progress after which the run is ended, with exit status 76. 0: never."""
    profile_steps: str = ""
    """Steps to trace into the run folder's profile/, for example 10-15. Empty: none."""
    tensorboard: bool = False
    """Whether metrics.jsonl is written as TensorBoard events as well, into the run folder's tensorboard/."""

    @property
    def profile_range(self) -> range:
        """The steps of profile_steps. Raises UserError where these are none."""
        if not self.profile_steps:
            return range(0)
        match = re.fullmatch(r"([1-9][0-9]{0,9})(?:-([1-9][0-9]{0,9}))?", self.profile_steps)
        steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        _check(len(steps) > 0, "train.profile_steps", "a step or first-last, as 10-15", repr(self.profile_steps))
        return steps

    def check(self) -> None:
        """Raise UserError on impossible values."""
        counts = ("n_epochs", "max_steps", "batch_size", "gradient_accumulation_steps")
        intervals = ("eval_interval", "log_interval", "save_interval", "keep")
        natural = dict.fromkeys(("warmup_steps", "eval_iters", "keep_every", "resume_step"), (0, _LARGEST))
        shares = dict.fromkeys(("beta1", "beta2"), (0.0, _BELOW_1)) | {
            "min_lr_ratio": (0.0, 1.0),
            "seed": (0, 2**32 - 1),
        }
        positive = {"lr": _POSITIVE, "eps": _POSITIVE, "weight_decay": (0.0, _HUGE), "grad_clip": (0.0, _HUGE)}
        positive |= dict.fromkeys(("watchdog_seconds", "save_minutes", "eval_minutes"), (0.0, 1e9))
        positive |= {"spike_factor": (0.0, _HUGE)}
        _check_fields(self, "train.", dict.fromkeys(counts + intervals, _COUNT) | natural | shares | positive)
        no_spikes = self.spike_factor == 0 or self.spike_factor > 1
        _check(no_spikes, "train.spike_factor", "0 or more than 1", self.spike_factor)
        _ = self.profile_range
        on_disk = "a folder on disk (--train.checkpoint-dir may be in object storage)"
        _check(not is_address(self.save_dir), "train.save_dir", on_disk, self.save_dir)
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
        _check_fields(self, "mesh.", dict.fromkeys(sizes, (-1, _LARGEST)))
        for name, size in sizes.items():
            _check(size != 0, f"mesh.{name}", "-1 or a positive number", size)
        left = [name for name, size in sizes.items() if size == -1]
        _check(len(left) <= 1, "mesh", "-1 (what is left) in one place; give the others, --mesh.data too, a size", left)


@dataclasses.dataclass(frozen=True)
class DistributedArgs:
    """How the processes of a job find each other. Nothing need be given under Slurm, Open MPI and GKE, on Cloud TPU, or for one process."""

    coordinator_address: str = ""
    """Host and port, "10.0.0.1:1234", at which process 0 answers the others; the port is free on its host. Empty: found by itself."""
    num_processes: int | None = None
    """Processes in the job. None: found by itself."""
    process_id: int | None = None
    """Number of this process, from 0, the one that prints and writes. None: found by itself."""
    timeout_seconds: int = 300
    """Seconds that a process waits at the start for all others to come."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        counts: dict[str, tuple[float, float]] = dict.fromkeys(("num_processes", "timeout_seconds"), _COUNT)
        _check_fields(self, "distributed.", counts | {"process_id": (0, _LARGEST)})
        address = self.coordinator_address
        _check(
            not address or bool(re.fullmatch(r"\S+:\d{1,5}", address)),
            "distributed.coordinator_address",
            'a host and a port, such as "10.0.0.1:1234"',
            repr(address),
        )
        if None not in (self.process_id, self.num_processes):
            last = typing.cast(int, self.num_processes) - 1
            _check(self.process_id in range(last + 1), "distributed.process_id", f"0 to {last}", self.process_id)


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """How text is generated. The defaults are Meta's.

    Logits are changed in this order: penalties, logit_bias, temperature, top_k, top_p of what is left, min_p.
    """

    temperature: float = 0.6
    """Divides the logits; 0 takes the likeliest token always."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that hold this much probability together (the one that crosses it stays)."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this probable, relative to the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the completion; 1: no penalty."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the completion holds already."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for each time that the completion holds it."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of tokens, by id; -inf forbids one. On the command line: id, bias, id, bias ..."""
    stop: tuple[str, ...] = dataclasses.field(default=(), metadata=ESCAPED)
    r"""Strings that end a completion where it first holds one, wherever tokens begin and end; the completion is cut before it. On the command line one a flag, --stop . --stop '\n', where \n, \r, \t and \\ stand for line feed, carriage return, tab and backslash."""
    max_new_tokens: int = 128
    """Most tokens generated for a prompt; the context may end it before."""
    n: int = 1
    """Completions a prompt, each with random numbers of its own."""
    seed: int = 0
    """Seed of the sampling. A completion depends on its prompt, its seed and its number among the n, and on no other prompt."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))

    def check(self, prefix: str = "") -> None:
        """Raise UserError on impossible values, named with ``prefix``."""
        ranges: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 1e6),
            "top_p": (_TINY, 1.0),
            "top_k": (0, _LARGEST),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (_TINY, 1e6),
            "presence_penalty": (-1e6, 1e6),
            "frequency_penalty": (-1e6, 1e6),
            "max_new_tokens": _COUNT,
            "n": _COUNT,
            "seed": (0, 2**32 - 1),
        }
        _check_fields(self, prefix, ranges)
        for text in self.stop:
            _check(bool(_typed(text, str, prefix + "stop")), prefix + "stop", "texts of one or more characters", "none")
            _check(not _SURROGATE.search(text), prefix + "stop", "texts in UTF-8", ascii(text))
        for token, bias in self.logit_bias.items():
            _typed(token, int, prefix + "logit_bias")
            _typed(bias, float, prefix + "logit_bias")
            _check(bias <= _LARGEST_FLOAT32, prefix + "logit_bias", f"numbers up to {_LARGEST_FLOAT32}", bias)


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    train: TrainArgs = TrainArgs()
    mesh: MeshArgs = MeshArgs()
    distributed: DistributedArgs = DistributedArgs()

    def check(self) -> None:
        """Raise UserError where a section, or the sections together, ask for the impossible."""
        for section in (self.model, self.data, self.train, self.mesh, self.distributed):
            section.check()


def load_toml(path: str | Path) -> Config:
    """Read a configuration; keys that the file leaves out keep their defaults.

    Raises UserError on a missing file, broken TOML, an unknown key or a value of the wrong type.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a TOML configuration, found no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, found: {error}") from None
    return from_dict(Config, table, source=str(path))


def from_dict(kind: type[T], table: dict[str, Any], source: str, prefix: str = "") -> T:
    """Build dataclass ``kind`` from nested dicts; ``source`` and ``prefix`` say in errors where a key stands."""
    hints = _hints(kind)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        field = key.replace("-", "_")
        if field not in hints:
            raise UserError(f"{source}: unknown key {name}; expected one of {', '.join(prefix + h for h in hints)}")
        if field in values:
            raise UserError(
                f"{source}: {name}: expected a key once, found it twice, with a hyphen and with an underscore"
            )
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


def _typed(value: Any, hint: Any, where: str) -> Any:
    """``value`` as ``hint`` asks; an int stands for a float, nothing else is converted. Raises UserError."""
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        expected = "one of " + ", ".join(map(repr, typing.get_args(hint)))
    else:
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(option) or option for option in options)
        if type(value) in kinds:
            return value
        if float in kinds and type(value) is int and abs(value) < 1 << 1000:
            return float(value)
        expected = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
    raise UserError(f"{where}: expected {expected}, found {value!r}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields; thousands of prompts with settings of their own ask for them."""
    return typing.get_type_hints(kind)


def _check_fields(args: Any, prefix: str, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise UserError where a field of a dataclass has the wrong type, or a number outside its range."""
    for name, hint in _hints(type(args)).items():  # type: ignore[arg-type]
        key, value = prefix + name, getattr(args, name)
        _typed(value, hint, key)
        if isinstance(value, str):
            _check(value.isascii() or not _SURROGATE.search(value), key, "text in UTF-8", ascii(value))
        if name in ranges and value is not None:
            low, high = ranges[name]
            expected = (
                f"{low:,} to {high:,}" if isinstance(high, int) and isinstance(low, int) else _float_range(low, high)
            )
            _check(low <= value <= high, key, expected, value)


def _float_range(low: float, high: float) -> str:
    start = "above 0" if low == _TINY else f"{low} or more"
    return start + {_HUGE: "", _BELOW_1: ", below 1"}.get(high, f", up to {high:g}")


def _check(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise UserError(f"{key}: expected {expected}, found {found}")
