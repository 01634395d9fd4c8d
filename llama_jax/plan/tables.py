"""A plan as text."""

from collections.abc import Sequence
from typing import Any

from llama_jax.adapters import count_adapter
from llama_jax.build import count_parameters
from llama_jax.cli.progress import duration
from llama_jax.config import Config, ModelArgs, TrainArgs, Weights
from llama_jax.devices.chips import GiB
from llama_jax.devices.sharding import describe
from llama_jax.foreign.family import constants_of
from llama_jax.ops.quantize import KINDS, group_of
from llama_jax.plan import Plan
from llama_jax.plan.advice import Advice
from llama_jax.plan.cost import KERNEL_EFFICIENCY
from llama_jax.plan.links import BETWEEN_SLICES
from llama_jax.plan.roofline import Roofline
from llama_jax.plan.settings import Found
from llama_jax.plan.summaries import memory_seconds, summary
from llama_jax.plan.topology import Topology
from llama_jax.training.eight_bits import products_text
from llama_jax.training.needs import GPU_MOST, GPU_SHARE
from llama_jax.training.objective import Dpo

Rows = list[tuple[str, str]]


def model_rows(config: Config, vocabulary: Found) -> Rows:
    """Return the lines about the model, which are printed before it is compiled."""
    m = config.model
    return [
        (
            "model",
            f"{count_parameters(m):,} parameters: dim {m.dim}, {m.n_layers} layers, {m.n_heads} heads, "
            + ", ".join([f"{m.kv_heads} kv heads", *constants_of(m), f"context {m.max_seq_len:,}"]),
        ),
        ("vocabulary", f"{m.vocab_size:,}: {vocabulary.source}"),
    ]


def training_text(plan: Plan, length: Found) -> str:
    """Return the text that ``plan`` prints of a training step."""
    train, model = plan.config.train, plan.config.model
    mask = ", with document masks" if plan.config.data.document_mask else ""
    lora = plan.config.lora
    held = plan.dtype if lora.base_weights == "auto" else lora.base_weights
    adapters = (
        [("adapters", f"{lora.text(count_adapter(model, lora))}; the base is frozen, in {held}")] if lora.rank else []
    )
    rows = [
        ("slice", f"{plan.topology.name}, {devices_text(plan.devices, plan.topology)}, mesh: {describe(plan.mesh)}"),
        (
            "program",
            f"{plan.dtype}, attention: {plan.kernel}, remat: {train.remat}{mask}; compiled in {duration(plan.compile_seconds)}",
        ),
        *_objective_rows(plan),
        *([("products", products_text(train, plan.dtype)), ("", plan.note)] if train.products != "float" else []),
        *adapters,
        *_state_rows(plan),
        *_memory(plan),
    ]
    if plan.schedule is not None:
        found = summary(plan, length)
        rows += [
            (
                "step",
                f"{at_least(plan.topology)}{number(plan.seconds * 1e3)} ms for {plan.tokens:,} tokens of "
                f"{plan.objective.length(model):,} a sequence",
            ),
            *_time(plan),
            (
                "at most",
                f"{found['mfu']:.1%} of the peak, {found['tokens_per_second']:,.0f} tokens/s, "
                f"{found['tokens_per_second_per_device']:,.0f} a {plan.topology.unit}",
            ),
            ("for", _length_text(plan, found, length)),
        ]
    return table(rows)


def _objective_rows(plan: Plan) -> Rows:
    """Return the line about preferences, which only DPO has."""
    if not isinstance(plan.objective, Dpo):
        return []
    return [
        ("objective", f"DPO: a sequence has room for two answers of {plan.config.model.max_seq_len:,} positions each")
    ]


def _state_rows(plan: Plan) -> Rows:
    """Return the line about how the model that is trained is held, if that is not the usual way."""
    train, usual = plan.config.train, TrainArgs()
    names = ("param_dtype", "rounding", "optimizer", "moments")
    other = [f"{name} {getattr(train, name)}" for name in names if getattr(train, name) != getattr(usual, name)]
    return [("state", ", ".join(other))] if other else []


def at_least(topology: Topology) -> str:
    """Return "at least " before a time that is a lower bound."""
    return "at least " if topology.is_gpu else ""


def _length_text(plan: Plan, found: dict[str, Any], length: Found) -> str:
    if length.value is None:
        return f"a run whose length is not known: {length.source}"
    time = f"{found['days']:,.1f} days" if found["days"] >= 1 else time_text(found["days"] * 86400)
    hours = f"{number(found['chip_hours'])} {plan.topology.rented}-hours"
    text = f"{length.value:,.0f} tokens ({length.source}): {at_least(plan.topology)}{time}, {hours}"
    train = plan.config.train
    slower = f"; smaller batches, in the first {train.batch_ramp_steps:,} steps, may be slower a token"
    return text + (slower if train.batch_start else "")


def time_text(seconds: float) -> str:
    """Return seconds as text, with digits if they are few."""
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def devices_text(count: int, topology: Topology) -> str:
    """Return "1 chip", "8 GPUs", or, of a version whose chips are two devices, "8 devices, two a chip"."""
    each = {1: "", 2: ", two a chip"}[topology.chip.devices]
    return f"{count:,} {topology.unit}{'s'[: count != 1]}{each}"


def number(value: float) -> str:
    """Return a number, without decimals if it is large, and with two digits if it is small."""
    if value >= 1 or value == 0:
        return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
    return f"{value:.2g}"


def figure(value: float, decimals: int) -> str:
    """Return a number with so many decimals, or with more where these would show hardly anything of it."""
    return f"{value:,.{decimals}f}" if value == 0 or value * 10**decimals >= 10 else f"{value:.2g}"


def decoding_text(plan: Plan, on: Topology) -> str:
    """Return the text that ``plan --decode`` prints. ``on`` is the slice that the user named."""
    decoding = plan.decoding
    assert decoding is not None
    idle = f" of {on.device_count}; {on.device_count - plan.devices} are idle" if on.device_count > plan.devices else ""
    weights, cache = (plan.dtype if kind == "auto" else kind for kind in (decoding.weights, decoding.cache))
    rows = [
        ("slice", f"{on.name}, {devices_text(plan.devices, plan.topology)}{idle}, mesh: {describe(plan.mesh)}"),
        ("program", f"{plan.dtype}, weights: {weights}, cache: {cache}; compiled in {duration(plan.compile_seconds)}"),
        *_group_rows(plan.config.model, decoding.weights),
        *_memory(plan),
    ]
    if plan.schedule is not None:
        rows += [
            (
                "step",
                f"{at_least(plan.topology)}{plan.seconds * 1e3:,.2f} ms for {decoding.batch} sequence{'s'[: decoding.batch != 1]} over a cache of {decoding.slots:,} tokens",
            ),
            *_time(plan),
            ("memory", f"{memory_seconds(plan) * 1e3:,.2f} ms to read parameters and cache once"),
            ("at most", f"{plan.tokens / plan.seconds:,.0f} tokens/s"),
        ]
    return table(rows)


def _group_rows(m: ModelArgs, weights: Weights) -> Rows:
    """Return lines about matrices of which fewer inputs share a scale than the kind of weights asks for."""
    most = KINDS[weights].group if weights in KINDS else None
    if most is None:
        return []
    sizes = {inputs: group_of(inputs, weights) for inputs in (m.dim, m.n_heads * m.head_width, m.hidden_width)}
    return [
        (
            "",
            f"{weights}: {size} inputs share a scale, as {most} does not divide {inputs:,}; the scales take more memory",
        )
        for inputs, size in sizes.items()
        if size != most
    ]


def _memory(plan: Plan) -> Rows:
    room = f"{plan.topology.chip.hbm_bytes / GiB:.2f} GiB a {plan.topology.unit}"
    if plan.schedule is None:
        needed = f"{figure(plan.bytes / GiB, 2)} GiB" if plan.bytes else "more"
        rows = [("memory", f"DOES NOT FIT into {room}: the compiler needs {needed}")]
    else:
        verdict = "fits:" if plan.fits else "DOES NOT FIT:"
        rows = [("memory", f"{verdict} {figure(plan.bytes / GiB, 2)} of {room}")]
    rows += [("", f"{figure(size / GiB, 2):>8} GiB  {part}") for part, size in plan.bytes_by_part.items()]
    if plan.topology.is_gpu and plan.fits and plan.bytes > GPU_SHARE * plan.topology.chip.hbm_bytes:
        rows.append(
            (
                "",
                f"JAX takes {GPU_SHARE:.0%} of a GPU's memory: set the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MOST}",
            )
        )
    return rows


def advice_rows(on: Topology, advice: Sequence[Advice]) -> Rows:
    """Return lines about what to change if a step does not fit on the slice ``on``."""
    room = on.chip.hbm_bytes / GiB
    rows = []
    if not any(a.topology == on.name for a in advice):
        rows.append(f"no settings were found that fit on {on.name}")
    for a in advice:
        size = f"{a.bytes / GiB:.2f}"
        if a.verified:
            rows.append(
                f"{a.flags}: fits, {size} of {room:.2f} GiB a {on.unit}, {at_least(on)}"
                f"{number((a.seconds or 0) * 1e3)} ms a step (compiled)"
            )
        else:
            rows.append(f"{a.flags}: about {size} GiB a {on.unit} (estimated, not compiled)")
    if not advice:
        rows.append(
            "no slice holds it, by estimate: reduce the model, the context or the batch, or make the batch a multiple of more chips"
        )
    return [("change" if i == 0 else "", row) for i, row in enumerate(rows)]


def _time(plan: Plan) -> Rows:
    schedule = plan.schedule
    assert schedule is not None
    cost = schedule.cost
    if isinstance(schedule, Roofline):
        return _bound(schedule)

    def row(seconds: float, what: str) -> tuple[str, str]:
        return "", f"{figure(seconds * 1e3, 1):>8} ms   {what}"

    kernels = ", ".join(f"{name} x {runs}" for name, runs in cost.kernels.items())
    rows = [
        row(cost.matrix, f"matrix products, {figure(cost.flops / 1e12, 1)} TFLOP a {plan.topology.unit}"),
        row(cost.other, f"all else; {figure(cost.hbm_bytes / 1e9, 0)} GB from and to memory in all"),
        row(schedule.blocking, "collectives that block"),
    ]
    if cost.kernels:
        rows.append(row(schedule.kernels, f"kernels, taken at {KERNEL_EFFICIENCY:.0%} of the peak: {kernels}"))
    if cost.host_bytes:
        rows.append(
            (
                "",
                f"       ? ms   {figure(cost.host_bytes / 1e9, 1)} GB to and from the host's memory (time not counted)",
            )
        )
    if schedule.waiting:
        rows.append(row(schedule.waiting, "more for the network between slices"))
    if schedule.waiting_for_memory:
        rows.append(row(schedule.waiting_for_memory, "more for the memory, which is read ahead"))
    rows += [("by part", "")] + [row(seconds, part) for part, seconds in schedule.by_part]
    rows.append(("links", ""))
    for c in schedule.collectives:
        how = "blocks" if c.blocking else "overlaps"
        rows.append(
            row(
                c.seconds,
                f"{c.kind} over {c.group}{'' if c.kind.endswith(BETWEEN_SLICES) else f' {plan.topology.unit}s'}, {c.bytes / 1e9:,.3f} GB, {how}",
            )
        )
    return rows


def _bound(roofline: Roofline) -> Rows:
    """Return lines about what bounds the time of a step on GPUs."""
    cost, seconds = roofline.cost, roofline.by_resource
    kernels = ", ".join(f"{name} x {runs}" for name, runs in cost.kernels.items())
    flops = f"{figure((cost.flops + cost.kernel_flops) / 1e12, 1)} TFLOP a GPU at the peak"
    words = {
        "matrix": f"matrix products{' and attention' * bool(kernels)}, {flops}",
        "memory": f"memory, {figure(cost.hbm_bytes / 1e9, 0)} GB read and written",
        "links": f"links, {sum(size for _, size in cost.transfers.values()) / 1e9:,.3f} GB of collectives",
    }
    rows = [("", f"{figure(seconds[name] * 1e3, 1):>8} ms   {what}") for name, what in words.items()]
    if kernels:
        rows.append(("kernels", kernels))
    if cost.host_bytes:
        rows.append(
            ("", f"       ? ms   {figure(cost.host_bytes / 1e9, 1)} GB to and from the host's memory (not counted)")
        )
    why = "a roofline, the longest of these three, and not a schedule: kernels do not reach their peak"
    return [*rows, ("", why)]


def table(rows: Rows) -> str:
    """Return rows of names and texts as two columns."""
    return "\n".join(f"{name:>10}  {text}".rstrip() for name, text in rows)
