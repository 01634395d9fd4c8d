"""A rough estimate of a training step's bytes and seconds, and the layouts that a slice allows.

Thousands of combinations cannot be compiled, since each takes minutes. The estimate selects those worth compiling. For
shapes of LLaMA 2 its bytes are within a tenth of the compiler's; its seconds only compare one layout with another.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llama_jax.adapters import count_adapter
from llama_jax.build import count_parameters
from llama_jax.config import Config, MeshArgs, ModelArgs, Weights
from llama_jax.ops.remat import kept_values
from llama_jax.plan.topology import Topology
from llama_jax.train_args import Remat, layer_policies
from llama_jax.training.account import positions_of, rows_of, state_bytes, working_bytes
from llama_jax.training.flops import keys_per_query, train_flops_per_token, update_flops
from llama_jax.training.muon import matrix_sizes

POLICIES: tuple[Remat, ...] = ("none", "dots", "attention", "full")
# The share of a chip's memory that layers are chosen to fill, since the estimate's bytes are a tenth off at most.
FILLED = 0.95
TENSOR = (1, 2, 4, 8)
SEQUENCE = (1, 2, 4, 8)
# A device gets a part of a sequence of at least this many positions.
FEWEST_POSITIONS = 4096
# Bytes of a weight of a quantized matrix, with its share of a scale.
BYTES_OF_QUANTIZED = {"int8": 1.0, "int4": 0.5 + 4 / 32, "int4-64": 0.5 + 4 / 64}


@dataclass(frozen=True)
class Candidate:
    """A way to run the step, with a mesh without -1, and estimates of its bytes per chip and seconds per step."""

    config: Config
    topology: Topology
    bytes: float
    seconds: float

    @property
    def rows(self) -> int:
        """Number of sequences that a device on the batch axes processes at once."""
        return rows_of(self.config)

    def changes(self, asked: Config) -> str:
        """Return the flags that change the settings of ``asked``, whose mesh may have a -1, into these."""
        train, flags = self.config.train, []
        sizes, before = dataclasses.asdict(self.config.mesh), dataclasses.asdict(asked.mesh)
        if any(before[axis] not in (size, -1) for axis, size in sizes.items()):
            flags += [f"--mesh.{axis} {size}" for axis, size in sizes.items() if size != before[axis]]
        if asked.train.remat != train.remat:
            flags.append(f"--train.remat {train.remat}")
        if asked.train.gradient_accumulation_steps != train.gradient_accumulation_steps:
            flags.append(f"--train.gradient-accumulation-steps {train.gradient_accumulation_steps}")
        return " ".join(flags)

    def flags(self, asked: Config) -> str:
        """Return all settings as flags, on top of those of ``asked``."""
        sizes, before = dataclasses.asdict(self.config.mesh), dataclasses.asdict(asked.mesh)
        mesh = [f"--mesh.{axis} {size}" for axis, size in sizes.items() if size != 1 or before[axis] != 1]
        train = self.config.train
        rest = f"--train.remat {train.remat} --train.gradient-accumulation-steps {train.gradient_accumulation_steps}"
        return " ".join([*mesh, rest])


def candidate(config: Config, topology: Topology) -> Candidate:
    """Return a configuration, whose mesh has no -1, with its estimates."""
    return Candidate(config, topology, training_bytes(config), training_seconds(config, topology))


def candidates(config: Config, topology: Topology, most_rows: int | None = None) -> Iterator[Candidate]:
    """Yield every divisible combination of mesh, sequences at once (up to ``most_rows``) and remat policy."""
    train = config.train
    for mesh in meshes(config, topology.device_count):
        parts, left = divmod(train.batch_size, mesh.data * mesh.fsdp)
        for rows in () if left else divisors(parts):
            if most_rows is not None and rows > most_rows:
                break
            split = dataclasses.replace(train, gradient_accumulation_steps=parts // rows)
            if not split.ramp_keeps_microbatches or train.batch_start % (mesh.data * mesh.fsdp):
                continue
            changed = dataclasses.replace(config, mesh=mesh, train=split)
            found = {policy: with_remat(changed, topology, policy) for policy in (*POLICIES, train.remat)}
            yield from found.values()
            if (layers := layers_that_fit(found["dots"], found["attention"])) > 0:
                yield with_remat(changed, topology, f"dots:{layers}")


def with_remat(config: Config, topology: Topology, remat: str) -> Candidate:
    """Return a configuration, whose mesh has no -1, with another policy of remat."""
    return candidate(dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat)), topology)


def layers_that_fit(more: Candidate, less: Candidate) -> int:
    """Return how many layers may have the policy of ``more`` beside others with that of ``less``.

    0: none, or all. It is an even number, so that layers can be compiled in groups.
    """
    layers, room = more.config.model.n_layers, FILLED * more.topology.chip.hbm_bytes - less.bytes
    if more.bytes <= less.bytes or room <= 0:
        return 0
    fitting = int(room / (more.bytes - less.bytes) * layers / 2) * 2
    return fitting if fitting < layers else 0


def meshes(config: Config, devices: int) -> Iterator[MeshArgs]:
    """Yield every mesh of ``devices`` devices that divides the model's sizes.

    Its tensor and sequence axes may be as large as the current ones.
    """
    m, now = config.model, config.mesh
    widths = (devices, m.n_heads, m.kv_heads, m.hidden_width, m.vocab_size)
    for tensor in sorted({*TENSOR, max(1, now.tensor)}):
        if any(size % tensor for size in widths):
            continue
        for sequence in sorted({*SEQUENCE, max(1, now.sequence)}):
            positions, uneven = divmod(m.max_seq_len, sequence)
            few = positions < FEWEST_POSITIONS and sequence not in (1, now.sequence)
            if few or uneven or (devices // tensor) % sequence:
                continue
            for fsdp in divisors(devices // tensor // sequence):
                if m.dim % fsdp == 0:
                    yield MeshArgs(devices // tensor // sequence // fsdp, fsdp, tensor, sequence)


def training_bytes(config: Config) -> float:
    """Estimate the bytes per chip: state, gradients, kept activations, working memory of a layer and of the logits."""
    m, train, mesh = config.model, config.train, config.mesh
    if config.lora.rank:
        size = 4 if train.compute_dtype == "float32" else 2
        copies = 16 + 4 * (train.gradient_accumulation_steps > 1)  # adapters, gradients, two moments; gradients so far
        state = copies * count_adapter(m, config.lora) + _frozen_bytes(m, config.lora.base_weights, size)
    else:
        state = sum(state_bytes(m, train).values())
    return state / (mesh.fsdp * mesh.tensor) + working_bytes(config)


def _frozen_bytes(m: ModelArgs, weights: Weights, size: int) -> float:
    """Return the bytes of a frozen base, whose embeddings are not quantized. ``size`` is that of a plain parameter."""
    matrices = count_parameters(m) - m.vocab_size * m.dim
    return size * m.vocab_size * m.dim + matrices * BYTES_OF_QUANTIZED.get(weights, size)


def training_seconds(config: Config, topology: Topology) -> float:
    """Estimate the seconds of a step: FLOPs with recomputation (or gathers, if longer), sums over other axes, Muon."""
    m, mesh, train, chip = config.model, config.mesh, config.train, topology.chip
    rows, parameters = rows_of(config), count_parameters(m)
    positions = positions_of(config)
    tokens = rows * positions / mesh.sequence
    forward = train_flops_per_token(m) / 3
    all_ = train_flops_per_token(m, config.lora)
    policies, layer = layer_policies(train.remat, m.n_layers), forward / m.n_layers
    again = sum((end - first) * recomputed_flops(m, name, layer) for name, first, end in policies)
    compute = tokens * (all_ + again) / mesh.tensor / chip.peak_flops
    compute -= tokens * _saved_by_eight_bits(config, topology, again) / mesh.tensor
    links = chip.link_bytes * chip.torus_axes
    gathers = 4 * 2 * parameters / mesh.tensor / links if mesh.fsdp > 1 else 0.0
    sums = 4 * m.n_layers * 2 * 2 * tokens * m.dim / chip.link_bytes if mesh.tensor > 1 else 0.0
    if mesh.sequence > 1:
        keys_and_values = 2 * rows * positions * 2 * m.kv_heads * m.head_width / mesh.tensor
        sums += 4 * m.n_layers * keys_and_values / chip.link_bytes
    copies = mesh.data * mesh.sequence > 1
    trained = count_adapter(m, config.lora) if config.lora.rank else parameters
    across = 2 * 4 * trained / (mesh.fsdp * mesh.tensor) / links if copies else 0.0
    if topology.slices > 1:
        exchanged = trained * (topology.slices - 1) / topology.device_count / (chip.slice_bytes or 1.0)
        if mesh.data % topology.slices:  # parameters are sharded across slices
            gathers += 4 * 2 * exchanged
        else:
            across += 2 * 4 * exchanged
    update = update_flops(m, train) / topology.device_count / chip.peak_flops
    return train.gradient_accumulation_steps * (max(compute, gathers) + sums) + across + update


def _saved_by_eight_bits(config: Config, topology: Topology, again: float) -> float:
    """Return the seconds per token that products in eight bits save, of which ``again`` FLOPs are computed again."""
    m, train, chip = config.model, config.train, topology.chip
    peak = {"int8": chip.int8_flops, "fp8": chip.fp8_flops}.get(train.products)
    if peak is None:
        return 0.0
    names, one = train.products_of.split(","), 2.0 * sum(a * b for a, b in matrix_sizes(m)) * m.n_layers
    flops = one * len(names) + min(again, one) * ("forward" in names)
    return flops / chip.peak_flops - flops / peak


def recomputed_flops(m: ModelArgs, policy: str, forward: float) -> float:
    """Return the FLOPs per token that a layer computes again by a policy of remat. ``forward`` are those of a layer."""
    if policy in ("none", "full"):
        return forward if policy == "full" else 0.0
    Q, KV, F, kept = m.n_heads * m.head_width, m.kv_heads * m.head_width, m.hidden_width, kept_values(policy)
    products: dict[tuple[str, ...], int] = {
        ("wq", "query"): Q,
        ("wk", "key"): KV,
        ("wv", "value"): KV,
        ("wo", "after_attention"): Q,
    }
    products |= {("w1",): F, ("w3",): F}
    again = 2.0 * m.dim * sum(width for names, width in products.items() if not set(names) & set(kept))
    return again + (0.0 if "attention" in kept else 4.0 * Q * keys_per_query(m))


def divisors(n: int) -> Iterable[int]:
    """Return the divisors of ``n``, smallest first."""
    return [d for d in range(1, math.isqrt(n) + 1) if n % d == 0] + [
        n // d for d in range(math.isqrt(n), 0, -1) if n % d == 0 and d * d != n
    ]
