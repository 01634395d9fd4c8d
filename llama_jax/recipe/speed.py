"""The speed of training: measured here by steps of about the chosen shape, or estimated for a slice by plan."""

import functools
import statistics
import time
from dataclasses import dataclass, replace

import jax
import numpy as np

from llama_jax.build import fastest_dtype, make_model
from llama_jax.cli.progress import working
from llama_jax.config import Config, MeshArgs, TrainArgs
from llama_jax.data.batches import Batch
from llama_jax.data.workers import cores
from llama_jax.devices.compiling import platform_of, use_compilation_cache
from llama_jax.devices.memory import keep_freed_memory, memory_of
from llama_jax.devices.sharding import batch_sharding, make_mesh
from llama_jax.errors import UserError
from llama_jax.training.flops import peak_flops, step_flops
from llama_jax.training.needs import need_of
from llama_jax.training.step import compile_train_step, init_state, make_optimizer

# Steps are taken for so many seconds, at least so many of them after the first.
SECONDS, STEPS = 4.0, 3
# Before anything is measured: so many FLOP/s a core, and this share of an accelerator's peak.
OF_CORE, OF_PEAK = 3e10, 0.4
# Of the minutes, these seconds and this share of the rest are for the start, evaluations, checkpoints and samples.
START_SECONDS, OTHER_SHARE = 15.0, 0.05
# This share of the minutes is for steps in any case, of a budget that is too short for the start.
LEAST_SHARE = 0.3


@dataclass(frozen=True)
class Speed:
    """The FLOP/s of a whole job, by the count that a run announces."""

    flops_per_second: float
    how: str
    compile_seconds: float = 0.0


def guess() -> float:
    """Return a first guess of this machine's FLOP/s, with which the shape to measure is chosen."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return OF_CORE * cores()
    return OF_PEAK * (peak_flops(device) or 1e14) * jax.device_count()


def seconds_of_steps(minutes: float, speed: Speed, spent: float = 0.0) -> float:
    """Return the seconds of a run of some minutes in which it takes steps. ``spent``: seconds that are over."""
    left = 60 * minutes - spent - START_SECONDS - speed.compile_seconds
    return max(LEAST_SHARE * 60 * minutes, (1 - OTHER_SHARE) * left)


def in_parts(config: Config) -> Config:
    """Return the configuration in as many microbatches as a step needs to fit into memory, by the account of a run."""
    mesh = make_mesh(config.mesh)
    shape, limit = MeshArgs(**dict(mesh.shape)), memory_of(mesh.local_devices)
    rows, asked = shape.data * shape.fsdp, config.train.compute_dtype
    dtype = fastest_dtype(platform_of(mesh.devices.flat[0])) if asked == "auto" else asked

    def fits(train: TrainArgs) -> bool:
        return need_of(replace(config, mesh=shape, train=replace(train, compute_dtype=dtype))).all <= limit

    train = config.train
    while not fits(train) and not train.batch_size % (2 * train.gradient_accumulation_steps * rows):
        train = replace(train, gradient_accumulation_steps=2 * train.gradient_accumulation_steps)
    return replace(config, train=train)


def measure(config: Config) -> Speed:
    """Take some training steps with random tokens, and return their speed. The vocabulary's size must be known.

    Raises UserError if the devices have too little memory for a step.
    """
    use_compilation_cache()
    keep_freed_memory()
    model, train = config.model, config.train
    mesh = make_mesh(config.mesh)
    module = make_model(model, train.compute_dtype, train.remat, train.attention, mesh)
    optimizer = make_optimizer(train, 1000)
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (train.batch_size, model.max_seq_len + 1), np.int32)
    weights = np.ones(ids[:, 1:].shape, np.float32)
    batch = jax.device_put(Batch(ids[:, :-1], ids[:, 1:], weights), batch_sharding(mesh))
    with working("measuring the speed of training"):
        began = time.perf_counter()
        try:
            step = compile_train_step(module, optimizer, mesh, train.gradient_accumulation_steps, batch)
            compiled_in = time.perf_counter() - began
            state = init_state(module, optimizer, mesh, 0)
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times: list[float] = []
            while len(times) < STEPS or sum(times) < SECONDS:
                began = time.perf_counter()
                state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                times.append(time.perf_counter() - began)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"train.batch_size: expected room for {train.batch_size} sequences of {model.max_seq_len} tokens, found too little "
                "memory; give --train.gradient-accumulation-steps, or a smaller --train.batch-size"
            ) from None
    flops = step_flops(config, train.batch_size * model.max_seq_len) / statistics.median(times)
    device = mesh.devices.flat[0]
    where = f"{mesh.devices.size} x {device.device_kind}" + (f", {cores()} cores" if device.platform == "cpu" else "")
    how = (
        f"measured in {len(times)} steps of {train.batch_size} x {model.max_seq_len} tokens at dim {model.dim}, {where}"
    )
    return Speed(flops, how, compiled_in)


def planned(config: Config, topology: str) -> tuple[Speed, Config]:
    """Return the speed that plan estimates for a slice, and the configuration, in smaller microbatches if needed.

    Raises UserError if the step cannot be planned, or does not fit with one sequence a device at a time.
    """
    from llama_jax.plan import plan_step
    from llama_jax.plan.apart import CompilerError, run_apart
    from llama_jax.plan.topology import Topology
    from llama_jax.training.objective import make_objective

    where = Topology.parse(topology)
    while True:
        try:
            with working(f"compiling for {where.name}"):
                step = functools.partial(plan_step, config, where, make_objective(config))
                plan = run_apart(step)
        except CompilerError as error:
            raise UserError(
                f"--topology: expected a slice that the compiler knows, found that it fails: {str(error)[:300]}"
            ) from None
        train = config.train
        if plan.fits:
            break
        parts = train.gradient_accumulation_steps * 2
        if train.batch_size % (parts * plan.devices):
            raise UserError(
                f"--topology: expected a slice with room for the model of {config.model.dim} features, found that it does not fit "
                f"{where.name}; give a larger slice, a smaller budget, or --mesh.fsdp {plan.devices} --mesh.data 1"
            )
        config = replace(config, train=replace(train, gradient_accumulation_steps=parts))
    flops = step_flops(config, plan.tokens) / plan.seconds
    kind = "a lower bound of the time" if where.is_gpu else "an estimate by the compiler's schedule"
    return Speed(flops, f"planned for {where.name}, {kind}, at dim {config.model.dim}"), config
