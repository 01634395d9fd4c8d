"""Which mesh, how many sequences at once and what to keep for the backward pass: the likeliest are compiled and ranked.

Thousands of combinations cannot be compiled, at a minute each. A rough count of bytes and FLOPs says which are promising; the
compiler has the last word.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.chips import GiB
from llama_jax.config import Config, MeshArgs, Remat
from llama_jax.errors import UserError
from llama_jax.model import count_parameters
from llama_jax.plan import Plan, plan_training, resolve
from llama_jax.plan.report import summary
from llama_jax.plan.topology import Topology
from llama_jax.sharding import describe
from llama_jax.training.flops import train_flops_per_token

ROWS = (1, 2, 4, 8, 16)
POLICIES: tuple[Remat, ...] = ("none", "dots", "attention", "full")
TENSOR = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A way to run the step, and a rough idea of what it needs: bytes a chip, seconds a step."""

    config: Config
    rows: int  # sequences that a device of the batch axes works on at once
    bytes: float
    seconds: float

    @property
    def name(self) -> str:
        """Its settings, as flags."""
        mesh, train = self.config.mesh, self.config.train
        sizes = " ".join(
            f"--mesh.{axis} {size}" for axis, size in dataclasses.asdict(mesh).items() if size != 1 or axis == "data"
        )
        return f"{sizes} --train.remat {train.remat} --train.gradient-accumulation-steps {train.gradient_accumulation_steps}"


def search(config: Config, topology: Topology, compiles: int, tokens: float, as_json: bool) -> None:
    """Print the candidates that were compiled, the fastest first. Raises UserError where none is possible."""
    config = resolve(config)
    found = sorted(candidates(config, topology), key=lambda c: c.seconds)
    fitting = [c for c in found if c.bytes <= topology.chip.hbm_bytes]
    if not fitting:
        least = min((c.bytes for c in found), default=math.inf)
        raise UserError(
            f"--search: expected a mesh, batch and policy that fit {topology.chip.hbm_bytes / GiB:.1f} GiB a chip of "
            f"{topology.name}, found none below {least / GiB:.1f}; take more chips, or another train.batch_size"
        )
    if not as_json:
        print(
            f"{len(found)} candidates, {len(fitting)} may fit; the best {min(compiles, len(fitting))} are compiled, a minute or more each"
        )
    plans: list[tuple[Candidate, Plan]] = []
    for candidate in fitting[:compiles]:
        plan = plan_training(candidate.config, topology)
        plans.append((candidate, plan))
        if not as_json:
            print(_row(candidate, plan), flush=True)
    plans.sort(key=lambda pair: (not pair[1].fits, pair[1].seconds))
    if as_json:
        print(json.dumps([summary(plan, tokens) | {"flags": candidate.name} for candidate, plan in plans]))
        return
    print("\nranked:")
    for candidate, plan in plans:
        print(_row(candidate, plan))


def candidates(config: Config, topology: Topology) -> Iterator[Candidate]:
    """Every mesh of data, fsdp and tensor, number of sequences and policy that divide evenly."""
    model, train, chips = config.model, config.train, topology.chips
    for tensor in TENSOR:
        if any(size % tensor for size in (chips, model.n_heads, model.kv_heads, model.hidden_dim, model.vocab_size)):
            continue
        for fsdp in _divisors(chips // tensor):
            mesh = MeshArgs(data=chips // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            for rows in ROWS:
                parts, left = divmod(train.batch_size, rows * mesh.data * fsdp)
                if model.dim % fsdp or left:
                    continue
                for policy in POLICIES:
                    changed = dataclasses.replace(train, remat=policy, gradient_accumulation_steps=parts)
                    whole = dataclasses.replace(config, mesh=mesh, train=changed)
                    yield Candidate(whole, rows, _rough_bytes(whole, rows), _rough_seconds(whole, rows, topology))


def _rough_bytes(config: Config, rows: int) -> float:
    """State, gradients, what is kept, and a layer's working set. Within a tenth or two of the compiler's figure."""
    m, mesh = config.model, config.mesh
    tokens, t = rows * m.max_seq_len, mesh.tensor
    shards = mesh.fsdp * t
    kept = 2 * m.dim + 2 * KEPT[config.train.remat](m.dim, 2 * m.kv_heads * m.head_dim, m.hidden_dim, t)
    layer = (count_parameters(m) - 2 * m.vocab_size * m.dim) / m.n_layers
    working = 2 * 2 * layer / t + 2 * tokens * (3 * m.hidden_dim / t + 6 * m.dim)
    vocabulary = 3 * 4 * m.vocab_size * m.dim / t
    return 16 * count_parameters(m) / shards + m.n_layers * tokens * kept + max(working, vocabulary)


# Features a token and layer that a policy keeps besides the residual stream: of D, keys and values, F, over t tensor shards.
KEPT = {
    "none": lambda D, KV, F, t: 4 * D + (3 * D + 2 * KV + 4 * F) / t,
    "dots": lambda D, KV, F, t: 2 * D + (2 * D + KV + 2 * F) / t,
    "attention": lambda D, KV, F, t: D + (2 * D + KV) / t,
    "full": lambda D, KV, F, t: 0,
}


def _rough_seconds(config: Config, rows: int, topology: Topology) -> float:
    """FLOPs, computed again where the policy says so; gathers where they are longer than that; sums over the tensor axis."""
    m, mesh, train, chip = config.model, config.mesh, config.train, topology.chip
    tokens = rows * m.max_seq_len
    forward = train_flops_per_token(m) / 3
    again = {"full": forward, "attention": 4.0 * m.n_layers * m.dim * m.hidden_dim}.get(train.remat, 0.0)
    compute = tokens * (3 * forward + again) / mesh.tensor / chip.peak_flops
    links = chip.link_bytes * chip.torus_axes
    gathers = 4 * 2 * count_parameters(m) / mesh.tensor / links if mesh.fsdp > 1 else 0.0
    sums = 4 * m.n_layers * 2 * 2 * tokens * m.dim / chip.link_bytes if mesh.tensor > 1 else 0.0
    across = 2 * 4 * count_parameters(m) / (mesh.fsdp * mesh.tensor) / links if mesh.data > 1 else 0.0
    return train.gradient_accumulation_steps * (max(compute, gathers) + sums) + across


def _row(candidate: Candidate, plan: Plan) -> str:
    where = describe(dict(plan.mesh))
    if not plan.fits:
        return f"  does not fit               {where}, {candidate.rows} x {plan.config.model.max_seq_len} a chip  {candidate.name}"
    rate = plan.tokens / plan.seconds
    return f"  {rate:12,.0f} tokens/s  {plan.bytes / GiB:6.2f} GiB  {where}, {candidate.rows} sequences at once  {candidate.name}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
