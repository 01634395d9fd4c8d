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
from pathlib import Path
from typing import Any, Literal, TypeVar

from llama_jax.cli.flags import ESCAPED, SEVERAL
from llama_jax.cli.json_argument import json_line, load_json
from llama_jax.errors import UserError, quoted
from llama_jax.fields import (
    BELOW_1,
    COUNT,
    HUGE,
    LARGEST,
    LARGEST_FLOAT32,
    POSITIVE,
    SURROGATE,
    TINY,
    check_fields,
    expect,
    hints_of,
    typed,
)
from llama_jax.lora_args import LoraArgs
from llama_jax.model_args import ModelArgs
from llama_jax.rope_scaling import depends_on_length
from llama_jax.storage.files import is_address

T = TypeVar("T")

DType = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "dots", "attention", "offload", "full"]
AttentionKernel = Literal["auto", "xla", "splash", "cudnn", "plain"]
Weights = Literal["auto", "int8", "int4", "int4-64"]
Cache = Literal["auto", "int8"]
BadSteps = Literal["stop", "skip", "count"]
ParamDType = Literal["float32", "bfloat16"]
Rounding = Literal["stochastic", "compensated"]
Optimizer = Literal["adamw", "muon", "adafactor"]
ScheduleName = Literal["cosine", "wsd", "linear"]
Moments = Literal["float32", "bfloat16", "int8"]
ObjectiveName = Literal["next-token", "dpo"]


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
    """Field of the records that holds the text. Empty: "text", or else the only field with texts."""
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

    def check(self) -> None:
        """Raise UserError on impossible values."""
        # The vocabulary must hold 256 bytes, 3 control tokens and some characters. SentencePiece's ids have 31 bits.
        ranges: dict[str, tuple[float, float]] = {"train_size": (TINY, 1.0), "vocab_size": (262, 1 << 24)}
        check_fields(self, "data.", ranges | {"stories": COUNT, "chats": (0, LARGEST), "cache_gb": (0.0, 1e9)})
        for name, weight in self.mixture.items():
            key = f"data.mixture, {quoted(name)}"
            expect(bool(name), "data.mixture", "a path and its weight", "an empty path")
            expect(not SURROGATE.search(name), "data.mixture", "text in UTF-8", ascii(name))
            expect(
                isinstance(weight, int | float) and math.isfinite(weight) and weight > 0,
                key,
                "a weight above 0",
                weight,
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
class TrainArgs:
    """Optimization, evaluation and the run folder.

    The defaults are those of the LLaMA 2 paper (section 2.1), except batch size and length.
    """

    objective: ObjectiveName = "next-token"
    """Objective of training.
    next-token: the cross entropy of each next token.
    dpo: the loss of direct preference optimization, over pairs of a chosen and a rejected answer."""
    dpo_beta: float = 0.1
    """DPO's beta, the factor of log-likelihood ratios.
    The larger it is, the closer the model stays to its reference."""
    dpo_label_smoothing: float = 0.0
    """Share of the pairs that DPO takes to be labelled the wrong way round. 0: none, as in the paper."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warmup, down to min_lr_ratio x lr at the last step.
    cosine: half a cosine.
    wsd: lr (the stable phase), then a line in the last decay_fraction of the steps.
    linear: a line."""
    min_lr_ratio: float = 0.1
    """Final learning rate of the schedule, as a share of lr. It may be 0."""
    decay_fraction: float = 0.2
    """Share of the run's steps in which wsd decays the learning rate, at the end."""
    warmup_steps: int = 100
    """Steps of linear warmup from 0 to lr."""
    n_epochs: int = 1
    """Number of passes over the training text. Ignored if max_steps is set."""
    max_steps: int | None = None
    """Number of optimizer steps. None: as many as n_epochs needs."""
    batch_size: int = 16
    """Sequences of max_seq_len tokens per optimizer step, over all devices and processes."""
    gradient_accumulation_steps: int = 1
    """Split each batch into this many microbatches, to save memory."""
    weight_decay: float = 0.1
    """Decoupled weight decay. It applies to matrices, not to norms."""
    beta1: float = 0.9
    """AdamW's beta1, the decay rate of the gradient's running mean."""
    beta2: float = 0.95
    """AdamW's beta2, the decay rate of the gradient's running mean square."""
    eps: float = 1e-5
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Clip the gradient to this global norm. 0: no clipping."""
    remat: Remat = "none"
    """Activations to keep for the backward pass, which recomputes the others. From most memory to least:
    none: keep all, recompute nothing.
    dots: keep the results of projections and of attention.
    attention: keep those of the attention half of each block.
    offload: as attention, but in host memory.
    full: keep only the input of each block."""
    attention: AttentionKernel = "auto"
    """Attention implementation: xla (everywhere), splash (TPU), cudnn (NVIDIA GPUs), plain (the formula in model.py),
    or auto, the fastest available."""
    compute_dtype: DType = "auto"
    """Data type of activations and matmuls. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    param_dtype: ParamDType = "float32"
    """Data type of the parameters that are trained, and of their gradients. Norms and biases are always float32.
    bfloat16 halves their memory; rounding says how an update is added."""
    rounding: Rounding = "stochastic"
    """How updated parameters are rounded to bfloat16.
    stochastic: up or down at random, right on average.
    compensated: to the nearest, keeping the error for the next step (Kahan), for 2 more bytes a parameter."""
    optimizer: Optimizer = "adamw"
    """adamw: a first and a second moment of each gradient.
    muon: a first moment, orthogonalised, for the matrices of the layers, and AdamW for all else. One rate serves both.
    adafactor: no first moment, and of the second only its means over rows and columns, with hardly any memory.
    It uses neither beta1 nor beta2 nor eps."""
    muon_momentum: float = 0.95
    """Muon's momentum, the decay rate of the gradient's running mean."""
    moments: Moments = "float32"
    """Data type in which AdamW keeps its moments. int8: a scale for each block of 128."""
    eval_interval: int = 100
    """Evaluate every this many steps."""
    eval_minutes: float = 0.0
    """Also evaluate if this many minutes have passed since the last evaluation. 0: never."""
    eval_iters: int = 100
    """Maximum number of batches per evaluation. 0: the whole held-out text.
    An evaluation batch has 16 sequences, whatever batch_size is.
    The batches are spread over the held-out text and are the same in every evaluation."""
    log_interval: int = 10
    """Write a line to metrics.jsonl every this many steps."""
    save_interval: int = 100
    """Save a checkpoint every this many steps. A new best evaluation is also saved."""
    save_minutes: float = 30.0
    """Also save a checkpoint if this many minutes have passed since the last one. 0: never."""
    keep: int = 3
    """Number of newest checkpoints to keep. The best one is kept as well."""
    keep_every: int = 0
    """Keep checkpoints at multiples of this step forever. 0: none."""
    resume_step: int = 0
    """Step to resume from. Later checkpoints and records are set aside. 0: the newest checkpoint."""
    decay_from: int = 0
    """Step of the stable phase of wsd from whose checkpoint to go on, decaying the learning rate from there on.
    The decay ends at max_steps. None: where it makes up decay_fraction of all steps. 0: decay as planned."""
    decay_run: str = ""
    """Run folder with the checkpoint of decay_from, to be continued in save_dir. It stays as it is.
    Empty: the run in save_dir goes back to decay_from itself, and its later checkpoints are set aside."""
    hold_lr: bool = False
    """Keep the learning rate of the last finished step on resume, and ignore the schedule."""
    save_dir: str = ""
    """Run folder. Empty: runs/<name of the config>."""
    checkpoint_dir: str = ""
    """Folder for checkpoints, on disk or in object storage (gs://bucket/folder).
    Empty: checkpoints/ in the run folder."""
    init_from: str = ""
    """Checkpoint to fine-tune: load its parameters, model arguments and tokenizer. Empty: random parameters.
    A folder of Meta's, Hugging Face's or Mistral's, or a file of llama2.c's, is converted once into a cache."""
    seed: int = 0
    """Seed of the initial parameters and the order of batches."""
    bad_steps: BadSteps = "stop"
    """Action on a bad step, whose loss or gradient is not finite or whose loss is a spike (see spike_factor).
    stop: end the run.
    skip: drop the update.
    count: count and log it; apply the update of a spike, drop one that is not finite."""
    spike_factor: float = 0.0
    """A loss is a spike if it exceeds this many times the mean of the last 100 or so losses. 0: no loss is a spike."""
    watchdog_seconds: float = 1800.0
    """End the run with exit status 76 if nothing progresses for this many seconds. 0: never."""
    profile_steps: str = ""
    """Steps to profile, for example 10-15. The trace goes to profile/ in the run folder. Empty: none."""
    eval_tasks: tuple[str, ...] = dataclasses.field(default=(), metadata=SEVERAL)
    """Tasks to score at every evaluation: files in JSON lines, or folders of them, as the evaluate command takes them.
    The scores are in metrics.jsonl, as task/<name>/accuracy."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events, to tensorboard/ in the run folder."""

    @property
    def profile_range(self) -> range:
        """The steps to profile, possibly none. Raises UserError if profile_steps is neither a step nor a range."""
        if not self.profile_steps:
            return range(0)
        match = re.fullmatch(r"([1-9][0-9]{0,9})(?:-([1-9][0-9]{0,9}))?", self.profile_steps)
        steps = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        expect(len(steps) > 0, "train.profile_steps", "a step or first-last, as 10-15", repr(self.profile_steps))
        return steps

    def check(self) -> None:
        """Raise UserError on impossible values."""
        counts = ("n_epochs", "max_steps", "batch_size", "gradient_accumulation_steps")
        intervals = ("eval_interval", "log_interval", "save_interval", "keep")
        natural = dict.fromkeys(("warmup_steps", "eval_iters", "keep_every", "resume_step", "decay_from"), (0, LARGEST))
        shares = dict.fromkeys(("beta1", "beta2", "muon_momentum"), (0.0, BELOW_1)) | {
            "min_lr_ratio": (0.0, 1.0),
            "decay_fraction": (TINY, 1.0),
            "seed": (0, 2**32 - 1),
        }
        positive = {"lr": POSITIVE, "eps": POSITIVE, "weight_decay": (0.0, HUGE), "grad_clip": (0.0, HUGE)}
        positive |= dict.fromkeys(("watchdog_seconds", "save_minutes", "eval_minutes"), (0.0, 1e9))
        positive |= {"spike_factor": (0.0, HUGE), "dpo_beta": POSITIVE, "dpo_label_smoothing": (0.0, 0.5)}
        check_fields(self, "train.", dict.fromkeys(counts + intervals, COUNT) | natural | shares | positive)
        for name in ("dpo_beta", "dpo_label_smoothing") if self.objective != "dpo" else ():
            given, default = getattr(self, name), getattr(TrainArgs, name)
            expect(
                given == default, f"train.{name}", "train.objective dpo beside it", f"train.objective {self.objective}"
            )
        self._check_schedule()
        no_spikes = self.spike_factor == 0 or self.spike_factor > 1
        expect(no_spikes, "train.spike_factor", "0 or more than 1", self.spike_factor)
        _ = self.profile_range
        on_disk = "a folder on disk (--train.checkpoint-dir may be in object storage)"
        expect(not is_address(self.save_dir), "train.save_dir", on_disk, self.save_dir)
        expect(
            self.batch_size % self.gradient_accumulation_steps == 0,
            "train.gradient_accumulation_steps",
            f"a divisor of train.batch_size = {self.batch_size}",
            self.gradient_accumulation_steps,
        )
        rounds = self.param_dtype == "bfloat16" or self.rounding == "stochastic"
        expect(
            rounds,
            "train.rounding",
            "train.param_dtype bfloat16, which alone is rounded",
            f"{self.rounding} beside float32",
        )
        has_moments = self.optimizer != "adafactor" or self.moments == "float32"
        expect(
            has_moments,
            "train.moments",
            "none beside train.optimizer adafactor, which keeps no such moments",
            self.moments,
        )
        for name in ("moments", "param_dtype") if self.optimizer == "muon" else ():
            found = getattr(self, name)
            expect(found == "float32", f"train.{name}", "float32 beside train.optimizer muon", f"{found}; leave it out")
        expect(
            self.optimizer == "muon" or self.muon_momentum == TrainArgs.muon_momentum,
            "train.muon_momentum",
            "train.optimizer muon beside it",
            f"train.optimizer {self.optimizer}",
        )

    def _check_schedule(self) -> None:
        """Raise UserError on settings of a decay that do not fit the schedule."""
        for name in ("decay_fraction", "decay_from") if self.schedule != "wsd" else ():
            given, default = getattr(self, name), getattr(TrainArgs, name)
            expect(given == default, f"train.{name}", "train.schedule wsd beside it", f"train.schedule {self.schedule}")
        if not self.decay_from:
            expect(
                not self.decay_run, "train.decay_run", "train.decay_from beside it, the step to continue from", "none"
            )
            return
        step = f"train.decay_from {self.decay_from:,}"
        expect(
            self.decay_from >= self.warmup_steps, "train.decay_from",
            f"a step of the stable phase, which begins after the {self.warmup_steps:,} of train.warmup_steps",
            f"{self.decay_from:,}",
        )  # fmt: skip
        expect(not self.hold_lr, "train.hold_lr", f"none beside {step}, which decays the rate", "both; leave one out")
        last = self.max_steps
        expect(
            last is not None or self.decay_from <= (1 - self.decay_fraction) * LARGEST, "train.max_steps",
            f"the step at which the decay ends, beside {step} and train.decay_fraction {self.decay_fraction:g}", "none",
        )  # fmt: skip
        expect(
            last is None or last > self.decay_from, "train.max_steps",
            f"the step at which the decay ends, after {step}", f"{last}; give --train.max-steps",
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
class SampleArgs:
    """How text is generated. The defaults are Meta's.

    Logits are changed in this order: penalties, logit_bias, temperature, top_k, top_p, min_p.
    top_p applies to the tokens that top_k keeps.
    """

    temperature: float = 0.6
    """Sampling temperature, which divides the logits. 0: greedy decoding."""
    top_p: float = 0.9
    """Sample from the smallest set of likeliest tokens with this much probability (nucleus sampling). 1: from all."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens. 0: from all."""
    min_p: float = 0.0
    """Sample from tokens whose probability is at least this share of the likeliest token's. 0: from all."""
    repetition_penalty: float = 1.0
    """Divide positive logits, and multiply negative ones, by this if their token is in the prompt or the completion.
    1: no penalty."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the completion already contains."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time that the completion contains it."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    """Numbers to add to the logits of tokens, by token id. -inf forbids a token. As a flag: id bias id bias ..."""
    stop: tuple[str, ...] = dataclasses.field(default=(), metadata=ESCAPED)
    r"""End a completion before the first of these strings. A string may begin or end inside a token.
    A flag takes one string: --stop . --stop '\n'.
    The escapes \n, \r, \t and \\ mean line feed, carriage return, tab and backslash."""
    stop_token_ids: tuple[int, ...] = ()
    """Also end a completion at these tokens, by id. Like EOS, they are left out of it. A flag takes several."""
    ignore_eos: bool = False
    """Do not end a completion at EOS, which stays among its tokens. It has no text."""
    min_new_tokens: int = 0
    """Do not sample EOS and stop_token_ids before the completion has this many tokens. Stop strings still end it."""
    max_new_tokens: int = 128
    """Maximum number of tokens to generate per prompt. The end of the context may stop a completion earlier."""
    logprobs: int = 0
    """Number of likeliest tokens to report for each token, with their log-probabilities under the model.
    As those of the tokens themselves, they are taken before penalties, temperature and other changes. 0: none."""
    echo: bool = False
    """Begin the text of a result with its prompt, and report the log-probabilities of the prompt's tokens.
    They take one more pass over the prompt."""
    infill_format: Literal["psm", "spm"] = "psm"
    """Order in which an infilling prompt has its texts. psm: prefix, suffix. spm: suffix, prefix."""
    json_schema: str = ""
    """Sample only tokens that continue a JSON text which fulfils this JSON Schema. {}: any JSON.
    A flag may be the name of a file with a schema. Only max_new_tokens and the context may cut the text.
    It needs the extra "grammar"."""
    n: int = 1
    """Number of completions per prompt, each with its own random numbers."""
    seed: int = 0
    """Random seed. A completion depends on its prompt, the seed and its number among the n, not on other prompts."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.json_schema, dict | bool):
            object.__setattr__(self, "json_schema", json_line(self.json_schema))

    def check(self, prefix: str = "") -> None:
        """Raise UserError on impossible values. ``prefix`` precedes the field's name in the message."""
        ranges: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 1e6),
            "top_p": (TINY, 1.0),
            "top_k": (0, LARGEST),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (TINY, 1e6),
            "presence_penalty": (-1e6, 1e6),
            "frequency_penalty": (-1e6, 1e6),
            "min_new_tokens": (0, LARGEST),
            "max_new_tokens": COUNT,
            "logprobs": (0, LARGEST),
            "n": COUNT,
            "seed": (0, 2**32 - 1),
        }
        check_fields(self, prefix, ranges)
        for text in self.stop:
            expect(bool(typed(text, str, prefix + "stop")), prefix + "stop", "texts of one or more characters", "none")
            expect(not SURROGATE.search(text), prefix + "stop", "texts in UTF-8", ascii(text))
        for token in self.stop_token_ids:
            typed(token, int, prefix + "stop_token_ids")
        expect(
            self.min_new_tokens <= self.max_new_tokens,
            prefix + "min_new_tokens",
            f"at most the {self.max_new_tokens} of max_new_tokens",
            self.min_new_tokens,
        )
        if self.json_schema:
            _check_json_schema(self, prefix)
        for token, bias in self.logit_bias.items():
            typed(token, int, prefix + "logit_bias")
            typed(bias, float, prefix + "logit_bias")
            expect(bias <= LARGEST_FLOAT32, prefix + "logit_bias", f"numbers up to {LARGEST_FLOAT32}", bias)


def _check_json_schema(args: SampleArgs, prefix: str) -> None:
    """Raise UserError, after ``prefix``, if json_schema is not one, or stands beside settings that would break it."""
    found = load_json(args.json_schema, f"{prefix}json_schema")
    expect(isinstance(found, dict | bool), f"{prefix}json_schema", "a JSON Schema, an object", quoted(args.json_schema))
    for name in ("stop", "ignore_eos", "min_new_tokens"):
        given, default = getattr(args, name), getattr(SampleArgs(), name)
        expected = f"{default} beside json_schema, which decides where the text ends"
        expect(given == default, prefix + name, expected, f"{given!r}; leave one of them out")


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration of a training run."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    train: TrainArgs = TrainArgs()
    mesh: MeshArgs = MeshArgs()
    distributed: DistributedArgs = DistributedArgs()
    lora: LoraArgs = LoraArgs()

    def check(self) -> None:
        """Raise UserError on impossible values, in a section or between sections."""
        for section in (self.model, self.data, self.train, self.mesh, self.distributed, self.lora):
            section.check()
        if self.train.objective == "dpo" and self.data.loss_on != "answers":
            raise UserError(
                f"data.loss_on: expected answers beside train.objective dpo, which compares answers alone, found {self.data.loss_on}; "
                "leave it out"
            )
        plain = TrainArgs()
        for name in ("param_dtype", "optimizer", "moments") if self.lora.rank else ():
            key, default, found = f"train.{name}", getattr(plain, name), getattr(self.train, name)
            expect(
                found == default, key, f"{default} beside lora.rank, as adapters are small", f"{found}; leave it out"
            )
        if self.data.document_mask and depends_on_length(self.model.rope_scaling):
            raise UserError(
                "data.document_mask: expected a rotary embedding that does not depend on the length of the text, found "
                "model.rope_scaling dynamic, by which each document would have its own; leave one of the two out"
            )


def load_toml(path: str | Path) -> Config:
    """Read a configuration from a TOML file. Keys that the file omits keep their defaults.

    Raises UserError on a missing file, invalid TOML, an unknown key or a value of the wrong type.
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


def to_toml(config: Any) -> str:
    """Return a dataclass of dataclasses as TOML text with all values. None, which TOML lacks, becomes a comment."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        for name, value in dataclasses.asdict(getattr(config, section.name)).items():
            lines.append(f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(each)}" for key, each in value.items()) + "}"
    # JSON and TOML spell all field values alike, except infinities and DEL.
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
