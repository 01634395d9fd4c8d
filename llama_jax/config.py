"""The configuration: one frozen dataclass per section, read from TOML and flags, with clear errors.

Every field is a flag (``--train.lr 5e-4``) and a TOML key (``[train] lr = 5e-4``). Flags override the file; the file
overrides the defaults. The docstring under each field is its help text.
"""

import dataclasses
import json
import math
import re
import tomllib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from llama_jax.errors import UserError, quoted
from llama_jax.expected_args import ExpectedArgs
from llama_jax.fields import (
    COUNT,
    LARGEST,
    SURROGATE,
    TINY,
    check_fields,
    expect,
    given_path,
    hints_of,
    own_table,
    typed,
)
from llama_jax.lora_args import LoraArgs
from llama_jax.model_args import ModelArgs
from llama_jax.rope_scaling import depends_on_length
from llama_jax.sample_args import SampleArgs as SampleArgs  # for those who import it from here
from llama_jax.train_args import (
    TrainArgs,
)

T = TypeVar("T")

Weights = Literal["auto", "int8", "int4", "int4-64"]
Cache = Literal["auto", "int8"]
BadRecords = Literal["error", "skip"]
LossOn = Literal["answers", "all"]
TooLong = Literal["cut", "drop"]


@dataclasses.dataclass(frozen=True)
class DataArgs:
    """The text, its tokenizer and the train/held-out split."""

    filepath: str = ""
    """Text to train on: a file, a folder, a glob, an address (gs://, s3://, https://), or a folder of prepared tokens.
    It is plain text, JSON lines, parquet or arrow, also compressed, as its bytes tell.
    Of a folder all *.txt and all files of records are read, recursively.
    Empty: the built-in stories."""
    train_size: float = 0.9
    """Share of the text to train on. 1: hold out nothing. The rest is held out for evaluation:
    the end of a plain text, by bytes; of records, and of several texts with a separator, documents chosen by a hash."""
    tokenizer_model_path: str = ""
    """Path of a tokenizer: tokenizer.model, tokenizer.json, or a folder with them.
    Empty: train a BPE vocabulary on the training part and save it in the run folder."""
    vocab_size: int = 1024
    """Vocabulary size, in tokens, when a tokenizer is trained."""
    separator: str = ""
    r"""Text between two documents in a file, for example '<|endoftext|>', '\n\n', or '\n' for one document per line.
    The escape \n matches any line end (LF, CRLF, CR), \t a tab, \\ a backslash.
    Blank lines at the start and end of a document are dropped.
    Empty: each file is one document. Of records each is a document, and there is no separator."""
    stories: int = 12000
    """Number of built-in stories to generate when filepath is empty (12,000 are about 7 MB)."""
    chats: int = 0
    """Number of built-in conversations to generate when filepath is empty, in place of stories. 0: none."""
    eval_filepath: str = ""
    """Held-out text of its own, in any of the forms of filepath, which is then trained on as a whole.
    Empty: hold out a part of the text (train_size)."""
    text_field: str = ""
    """Field of the records that holds the text; meta.text is one within another.
    Empty: "text", or else the only field with texts.
    Of records with both, messages or "instruction,output" chooses the conversation."""
    bad_records: BadRecords = "error"
    """Records that cannot be read: error (stop at the first) or skip (leave them out and count them)."""
    as_text: bool = False
    """Read files as plain text even if they look like something else, such as JSON lines or HTML.
    Bytes that are not UTF-8 become U+FFFD."""
    mixture: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    """Several texts and their weights, in place of filepath, such as: web/ 0.7 books.parquet 0.3. Each is a text
    or prepared tokens, as filepath. Any stretch of steps has the shares exactly, to a sequence or two.
    A text that runs out begins its next epoch. Weights may change when a run goes on."""
    document_mask: bool = False
    """Keep attention, rotary positions and the loss inside each document, in training and in its evaluations.
    A document that the start of a sequence cuts begins again there, at position 0.
    The first token of the next document is not predicted."""

    chat_template: str = ""
    """The format of conversations: a file with a template in Jinja, or llama2, llama3, chatml, zephyr, vicuna, plain
    or instruction. Checkpoints keep it, and sample.py talks in it. Empty: the model's own."""
    loss_on: LossOn = "answers"
    """The tokens of conversations that count in the loss: answers, with the token that ends each of them, or all."""
    too_long: TooLong = "cut"
    """Conversations of more tokens than max_seq_len and one: cut (keep the beginning) or drop."""
    cache_gb: float = 100.0
    """Gigabytes of the local disk for prepared tokens that are behind an address, over all runs of this machine.
    They are kept in ~/.cache/llama_jax/tokens (or $XDG_CACHE_HOME/llama_jax/tokens).
    0: keep none, read them each time."""

    def __post_init__(self) -> None:
        own_table(self, "mixture")

    def check(self) -> None:
        """Raise UserError on impossible values."""
        # The vocabulary must hold 256 bytes, 3 control tokens and some characters. SentencePiece's ids have 31 bits.
        ranges: dict[str, tuple[float, float]] = {"train_size": (TINY, 1.0), "vocab_size": (262, 1 << 24)}
        check_fields(self, "data.", ranges | {"stories": COUNT, "chats": (0, LARGEST), "cache_gb": (0.0, 1e9)})
        for name, weight in self.mixture.items():
            key = f"data.mixture, {quoted(name)}"
            typed(name, str, "data.mixture")
            expect(bool(name), "data.mixture", "a path and its weight", "an empty path")
            expect(not SURROGATE.search(name), "data.mixture", "text in UTF-8", ascii(name))
            expect(
                type(weight) in (int, float) and math.isfinite(weight) and weight > 0,
                key,
                "a weight above 0",
                repr(weight),
            )
        for name in ("filepath", "eval_filepath") if self.mixture else ():
            expect(
                not getattr(self, name), f"data.{name}", "none beside data.mixture, whose texts each hold out a part",
                f"{getattr(self, name)}; leave one of the two out",
            )  # fmt: skip
        for name in ("filepath", "mixture") if self.chats else ():
            expect(
                not getattr(self, name), f"data.{name}", "none beside data.chats, the built-in conversations",
                f"{getattr(self, name)}; leave one of the two out",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MeshArgs:
    """The layout of the devices. One axis at most may be -1: all devices that the other axes leave."""

    data: int = -1
    """Devices for data parallelism: each holds all parameters and takes a part of the batch."""
    fsdp: int = 1
    """Devices for fully sharded data parallelism: each holds a part of the parameters and takes a part of the batch."""
    tensor: int = 1
    """Devices for tensor parallelism: each takes a part of the heads and feed-forward units."""
    sequence: int = 1
    """Devices for sequence parallelism: each takes a part of every sequence's positions."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        sizes = dataclasses.asdict(self)
        check_fields(self, "mesh.", dict.fromkeys(sizes, (-1, LARGEST)))
        for name, size in sizes.items():
            expect(size != 0, f"mesh.{name}", "-1 or a positive number", size)
        left = [name for name, size in sizes.items() if size == -1]
        expect(len(left) <= 1, "mesh", "-1 (what is left) in one place; give the others, --mesh.data too, a size", left)


@dataclasses.dataclass(frozen=True)
class DistributedArgs:
    """How the processes of a job find each other.

    They are detected under Slurm, Open MPI and GKE, and on Cloud TPU. A single process needs none.
    """

    coordinator_address: str = ""
    """Host and port of process 0, for example "10.0.0.1:1234". The port must be free. Empty: detect it."""
    num_processes: int | None = None
    """Number of processes in the job. None: detect it."""
    process_id: int | None = None
    """Number of this process, from 0. Process 0 prints and writes. None: detect it."""
    timeout_seconds: int = 300
    """Seconds to wait at startup for all processes to connect."""

    def check(self) -> None:
        """Raise UserError on impossible values."""
        counts: dict[str, tuple[float, float]] = dict.fromkeys(("num_processes", "timeout_seconds"), COUNT)
        check_fields(self, "distributed.", counts | {"process_id": (0, LARGEST)})
        address = self.coordinator_address
        expect(
            not address or bool(re.fullmatch(r"\S+:\d{1,5}", address)),
            "distributed.coordinator_address",
            'a host and a port, such as "10.0.0.1:1234"',
            repr(address),
        )
        if None not in (self.process_id, self.num_processes):
            last = typing.cast(int, self.num_processes) - 1
            expect(self.process_id in range(last + 1), "distributed.process_id", f"0 to {last}", self.process_id)


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of a training run."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    train: TrainArgs = TrainArgs()
    mesh: MeshArgs = MeshArgs()
    distributed: DistributedArgs = DistributedArgs()
    lora: LoraArgs = LoraArgs()
    expected: ExpectedArgs = ExpectedArgs()

    def check(self) -> None:
        """Raise UserError on impossible values, in a section or between sections."""
        for name, kind in hints_of(Config).items():
            section = getattr(self, name)
            if not isinstance(section, kind):
                raise UserError(
                    f"{name}: expected {kind.__name__}, found {quoted(section)}; make it with {kind.__name__}()"
                )
            section.check()
        if self.train.objective == "dpo" and self.data.loss_on != "answers":
            raise UserError(
                f"data.loss_on: expected answers beside train.objective dpo, which compares answers alone, found {self.data.loss_on}; "
                "leave it out"
            )
        first, layers = self.train.remat.partition(":")[2], self.model.n_layers
        expect(int(first or 0) <= layers, "train.remat", f"up to model.n_layers = {layers} after the colon", first)
        plain = TrainArgs()
        for name in ("param_dtype", "optimizer", "moments", "products") if self.lora.rank else ():
            key, default, found = f"train.{name}", getattr(plain, name), getattr(self.train, name)
            expect(
                found == default, key, f"{default} beside lora.rank, as adapters are small", f"{found}; leave it out"
            )
        expect(
            self.train.rate_width is None or not self.lora.rank, "train.rate_width",
            "none beside lora.rank, as no rule is known for the rate of adapters",
            f"{self.train.rate_width}; leave it out, and give the train.lr of this model",
        )  # fmt: skip
        if self.data.document_mask and depends_on_length(self.model.rope_scaling):
            raise UserError(
                "data.document_mask: expected a rotary embedding that does not depend on the length of the text, found "
                "model.rope_scaling dynamic, by which each document would have its own; leave one of the two out"
            )


def load_toml(path: str | Path) -> Config:
    """Read a configuration from a TOML file. Keys that the file omits keep their defaults.

    Numbers out of their ranges, and settings that contradict each other, are found by ``Config.check``. Raises
    UserError on a missing file, invalid TOML, an unknown key or a value of the wrong type.
    """
    path = Path(given_path(path, "configuration"))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: expected a TOML configuration, found no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, found: {error}") from None
    return from_dict(Config, table, source=str(path))


def from_dict(kind: type[T], table: dict[str, Any], source: str, prefix: str = "") -> T:
    """Build a dataclass from nested dicts.

    Error messages name ``source`` and then the key, with ``prefix`` before it. Raises UserError on an unknown key or a
    value of the wrong type.
    """
    hints = hints_of(kind)  # type: ignore[arg-type]
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
            values[field] = typed(value, hints[field], f"{source}: {name}")
    return kind(**values)


def to_toml(config: Any, only: Callable[[str], bool] = lambda _: True) -> str:
    """Return a dataclass of dataclasses as TOML text with all values. None, which TOML lacks, becomes a comment.

    ``only`` tells of a field, such as "train.lr", whether to write it.
    """
    lines = []
    for section in dataclasses.fields(config):
        values = dataclasses.asdict(getattr(config, section.name))
        shown = {name: value for name, value in values.items() if only(f"{section.name}.{name}")}
        lines += [f"[{section.name}]"] * bool(shown)
        for name, value in shown.items():
            lines.append(f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}")
        lines += [""] * bool(shown)
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(each)}" for key, each in value.items()) + "}"
    # JSON and TOML spell all field values alike, except infinities and DEL.
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
