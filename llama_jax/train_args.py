"""The arguments of training: ``TrainArgs``."""

import dataclasses
import re
from typing import Literal, get_args

from llama_jax.cli.flags import SEVERAL
from llama_jax.fields import BELOW_1, COUNT, HUGE, LARGEST, POSITIVE, TINY, check_fields, expect
from llama_jax.storage.files import is_address

DType = Literal["auto", "float32", "bfloat16"]
# What of a layer is kept for the backward pass, and the names of values that may be kept one by one.
Remat = Literal["none", "dots", "attention", "offload", "full"]
KEEPABLE = ("query", "key", "value", "attention", "after_attention", "wq", "wk", "wv", "wo", "w1", "w3", "w2")
Products = Literal["float", "int8", "fp8"]
# The products of training with a matrix: its outputs, the gradient of its inputs, and its own gradient.
PRODUCTS_OF = ("forward", "input", "weight")
AttentionKernel = Literal["auto", "xla", "splash", "cudnn", "plain"]
BadSteps = Literal["stop", "skip", "count"]
ParamDType = Literal["float32", "bfloat16"]
Rounding = Literal["stochastic", "compensated"]
Optimizer = Literal["adamw", "muon", "adafactor"]
ScheduleName = Literal["cosine", "wsd", "linear"]
Moments = Literal["float32", "bfloat16", "int8"]
ObjectiveName = Literal["next-token", "dpo"]

# The lowest and the highest number of each field, both allowed.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("n_epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "rate_width"), COUNT),
    **dict.fromkeys(("eval_interval", "log_interval", "save_interval", "keep"), COUNT),
    **dict.fromkeys(("warmup_steps", "eval_iters", "keep_every", "resume_step", "decay_from"), (0, LARGEST)),
    **dict.fromkeys(("batch_start", "batch_ramp_steps"), (0, LARGEST)),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum"), (0.0, BELOW_1)),
    **dict.fromkeys(("lr", "eps", "dpo_beta"), POSITIVE),
    **dict.fromkeys(("weight_decay", "grad_clip", "spike_factor"), (0.0, HUGE)),
    **dict.fromkeys(("watchdog_seconds", "save_minutes", "eval_minutes"), (0.0, 1e9)),
    "minutes": (TINY, 1e9),
    "min_lr_ratio": (0.0, 1.0),
    "decay_fraction": (TINY, 1.0),
    "dpo_label_smoothing": (0.0, 0.5),
    "seed": (0, 2**32 - 1),
}


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
    rate_width: int | None = None
    """Width (model.dim) for which lr was chosen. At another width the rates of the layers' matrices and of the output
    are lr x (rate_width / width)^1.125, and Muon's by the root. Embeddings, norms and weight decay keep lr.
    None: lr is for this model, and everything takes it."""
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
    minutes: float | None = None
    """Minutes that the command may take on this machine. The speed is measured, and the model, the vocabulary, the rate
    and the steps are chosen for the text by fitted laws, but for what you give. None: as the other settings say."""
    batch_size: int = 16
    """Sequences of max_seq_len tokens per optimizer step, over all devices and processes."""
    batch_start: int = 0
    """Sequences of the first step. They double in the first batch_ramp_steps until they are batch_size.
    0: batch_size from the first step on."""
    batch_ramp_steps: int = 0
    """Steps with fewer sequences than batch_size, about as many of each size. See batch_start."""
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
    remat: str = "none"
    """Activations to keep for the backward pass, which recomputes the others. From most memory to least:
    none: keep all, recompute nothing.
    dots: keep the results of projections and of attention.
    attention: keep those of the attention half of each block.
    offload: as attention, but in host memory.
    full: keep only the input of each block.
    dots:20: dots for the first 20 layers, and attention for the others; any of the five may stand before the colon.
    w1,w3,attention: keep the values of these names, that is, the products by wq, wk, wv, wo, w1, w3 and w2, and query,
    key, value, attention and after_attention."""
    attention: AttentionKernel = "auto"
    """Attention implementation: xla (everywhere), splash (TPU), cudnn (NVIDIA GPUs), plain (the formula in model.py),
    or auto, the fastest available."""
    compute_dtype: DType = "auto"
    """Data type of activations and matmuls. auto: bfloat16 on TPU and GPU, float32 on CPU."""
    products: Products = "float"
    """Arithmetic of the products with the layers' matrices in training.
    float: in compute_dtype.
    int8: in 8-bit integers, which TPUs from v5e on multiply at twice the rate.
    fp8: in 8-bit floats, which GPUs from the H100 on multiply at twice the rate.
    All else stays as it is: parameters, norms, attention, the output matrix and the loss, the optimizer, evaluation."""
    products_of: str = ",".join(PRODUCTS_OF)
    """Names of the products to compute in eight bits, joined by commas.
    forward: the outputs.
    input: the gradient of the inputs.
    weight: the gradient of the matrix."""
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
    nesterov: bool = False
    """Whether AdamW looks ahead: its first moment counts the gradient of this step once more (Dozat, 2016)."""
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
        check_fields(self, "train.", RANGES)
        self._check_read_beside("objective", "dpo", "dpo_beta", "dpo_label_smoothing")
        self._check_schedule()
        check_remat(self.remat)
        self._check_products()
        no_spikes = self.spike_factor == 0 or self.spike_factor > 1
        expect(no_spikes, "train.spike_factor", "0 or more than 1", self.spike_factor)
        _ = self.profile_range
        on_disk = "a folder on disk (--train.checkpoint-dir may be in object storage)"
        expect(not is_address(self.save_dir), "train.save_dir", on_disk, self.save_dir)
        self._check_batch_sizes()
        self._check_optimizer()

    def _check_read_beside(self, setting: str, value: str, *names: str) -> None:
        """Raise UserError if a field was changed that is read only if ``setting`` has ``value``."""
        found = getattr(self, setting)
        for name in names if found != value else ():
            unchanged = getattr(self, name) == getattr(TrainArgs, name)
            expect(unchanged, f"train.{name}", f"train.{setting} {value} beside it", f"train.{setting} {found}")

    def _check_optimizer(self) -> None:
        """Raise UserError on settings that the optimizer does not have."""
        self._check_read_beside("optimizer", "muon", "muon_momentum")
        rounds = self.param_dtype == "bfloat16" or self.rounding == "stochastic"
        expected = "train.param_dtype bfloat16, which alone is rounded"
        expect(rounds, "train.rounding", expected, f"{self.rounding} beside float32")
        if self.optimizer == "adafactor":
            expected = "none beside train.optimizer adafactor, which keeps no such moments"
            expect(self.moments == "float32", "train.moments", expected, self.moments)
            expected = "none beside train.optimizer adafactor, which has no first moment"
            expect(not self.nesterov, "train.nesterov", expected, self.nesterov)
        for name in ("moments", "param_dtype") if self.optimizer == "muon" else ():
            found = getattr(self, name)
            expect(found == "float32", f"train.{name}", "float32 beside train.optimizer muon", f"{found}; leave it out")

    @property
    def ramp_keeps_microbatches(self) -> bool:
        """Whether the smaller batches are made of whole microbatches, or are shares of one."""
        microbatch = self.batch_size // self.gradient_accumulation_steps
        return not self.batch_start or microbatch % self.batch_start == 0 or self.batch_start % microbatch == 0

    def _check_batch_sizes(self) -> None:
        """Raise UserError if the batch has no equal parts, or cannot grow from batch_start to batch_size.

        It grows by doublings.
        """
        expect(
            self.batch_size % self.gradient_accumulation_steps == 0, "train.gradient_accumulation_steps",
            f"a divisor of train.batch_size = {self.batch_size}", self.gradient_accumulation_steps,
        )  # fmt: skip
        if not self.batch_start:
            expect(
                not self.batch_ramp_steps, "train.batch_ramp_steps",
                "train.batch_start beside it, the sequences of the first step", f"{self.batch_ramp_steps} and none",
            )  # fmt: skip
            return
        times, left = divmod(self.batch_size, self.batch_start)
        doublings = times.bit_length() - 1
        expect(
            not left and doublings > 0 and times == 1 << doublings, "train.batch_start",
            f"train.batch_size = {self.batch_size} divided by 2, 4, 8 or another power of 2", self.batch_start,
        )  # fmt: skip
        expect(
            self.batch_ramp_steps >= doublings, "train.batch_ramp_steps",
            f"at least {doublings}, a step for each size before {self.batch_size}", self.batch_ramp_steps,
        )  # fmt: skip
        expect(
            self.ramp_keeps_microbatches, "train.batch_start",
            f"a multiple or a share of the {self.batch_size // self.gradient_accumulation_steps} sequences of a microbatch",
            self.batch_start,
        )  # fmt: skip

    def _check_products(self) -> None:
        """Raise UserError on products in eight bits of unknown names, or beside settings that have none."""
        names, default = self.products_of.split(","), TrainArgs.products_of
        expect(
            set(names) <= set(PRODUCTS_OF) and len(set(names)) == len(names), "train.products_of",
            f"some of {default}, each once", repr(self.products_of),
        )  # fmt: skip
        if self.products == "float":
            found = "train.products float"
            expect(self.products_of == default, "train.products_of", "train.products int8 or fp8 beside it", found)
        elif self.objective == "dpo":
            expected = "float beside train.objective dpo, which compares small differences"
            expect(False, "train.products", expected, f"{self.products}; leave it out")

    def _check_schedule(self) -> None:
        """Raise UserError on settings of a decay that do not fit the schedule."""
        self._check_read_beside("schedule", "wsd", "decay_fraction", "decay_from")
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


def check_remat(remat: str) -> None:
    """Raise UserError unless ``remat`` is a policy, one for the first layers as dots:20, or names of values."""
    policies = get_args(Remat)
    name, colon, first = remat.partition(":")
    counted = name in policies and re.fullmatch(r"[1-9][0-9]{0,5}", first)
    names = set(remat.split(","))
    if (not colon and (name in policies or names <= set(KEEPABLE))) or counted:
        return
    expected = f"one of {', '.join(map(repr, policies))}, or one of them for the first layers, as dots:20, or some of"
    expect(False, "train.remat", f"{expected} {','.join(KEEPABLE)}", repr(remat))


def layer_policies(remat: str, layers: int) -> list[tuple[str, int, int]]:
    """Return the policies of a model's layers, in order, each with its first layer and the one after its last."""
    name, _, first = remat.partition(":")
    end = min(int(first), layers) if first else layers
    return [(name, 0, end), ("attention", end, layers)][: 1 + (end < layers)]
