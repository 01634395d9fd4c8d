"""Plans a run for a TPU slice or for GPUs on a machine without them: whether it fits, and how fast it can be.

The step of training or generation is compiled for the slice by the TPU's own compiler (libtpu), for GPUs by XLA's. Its
memory use is exact. A TPU's time is read from its schedule (cost.py). Of a GPU's there is a lower bound (roofline.py).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llama_jax.adapters import check_targets
from llama_jax.build import make_model
from llama_jax.compat.jax_internals import needed_bytes, says_memory_is_too_small
from llama_jax.config import Cache, Config, SampleArgs, Weights
from llama_jax.devices.compiling import generation_options
from llama_jax.devices.memory import bytes_of
from llama_jax.devices.sharding import check_divisible, describe, make_mesh, on_mesh, with_shardings
from llama_jax.errors import UserError
from llama_jax.generation.decode import DecodeState, decode_chunk, empty_state, state_shardings
from llama_jax.generation.sampling import make_sampler
from llama_jax.generation.serving import generation_formats, generation_shapes
from llama_jax.model import Llama
from llama_jax.ops.cache import CACHE_DTYPES
from llama_jax.plan.apart import CompilerError
from llama_jax.plan.cost import Schedule, schedule_of
from llama_jax.plan.hlo import HBM, Program
from llama_jax.plan.roofline import Roofline, roofline_of
from llama_jax.plan.settings import vocabulary, with_vocabulary
from llama_jax.plan.topology import Topology
from llama_jax.training import eight_bits
from llama_jax.training.adapting import Adapting
from llama_jax.training.flops import keys_per_query
from llama_jax.training.objective import Dpo, NextToken, Objective, make_objective
from llama_jax.training.step import (
    batch_shapes,
    compile_reference_step,
    compile_train_step,
    make_optimizer,
    state_shapes,
)


@dataclass(frozen=True)
class Decoding:
    """A decoding step for ``batch`` sequences, each with a cache of ``slots`` tokens."""

    batch: int
    slots: int
    weights: Weights = "auto"
    cache: Cache = "auto"


@dataclass(frozen=True)
class Reference:
    """The pass over preferences before the first step: log-likelihoods of the model that training begins with."""

    objective: Dpo


# What is compiled: a decoding step, a training step by its objective, or the pass before it.
Kind = Decoding | Objective | Reference


@dataclass(frozen=True)
class Plan:
    """A step compiled for a slice. Bytes are per device, which is a chip but for v7x.

    A TPU's compiler refuses what does not fit. Then ``schedule`` is None and ``text`` is empty.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    dtype: str  # of activations and matmuls
    kernel: str  # of attention
    bytes: int  # peak memory; 0 if it does not fit and the compiler does not say
    bytes_by_part: dict[str, int]
    schedule: Schedule | Roofline | None
    text: str  # of the compiled program
    compile_seconds: float
    decoding: Decoding | None = None  # None: a training step
    objective: Objective = NextToken()
    note: str = ""  # about products in eight bits on these devices

    @property
    def devices(self) -> int:
        """The number of JAX devices in the mesh."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds the step."""
        return self.schedule is not None and self.bytes <= self.topology.chip.hbm_bytes

    @property
    def seconds(self) -> float:
        """Seconds per step by the schedule, or at least by the roofline, infinite without either."""
        return self.schedule.seconds if self.schedule else float("inf")

    @property
    def tokens(self) -> int:
        """Tokens per step over the whole job."""
        if self.decoding is not None:
            return self.decoding.batch
        return self.config.train.batch_size * self.objective.length(self.config.model)


def resolve(config: Config) -> Config:
    """Return the configuration with a vocabulary size: its tokenizer's, else LLaMA 2's.

    Raises UserError if the configuration is impossible.
    """
    config = with_vocabulary(config, int(vocabulary(config).value or 0))
    config.check()
    return config


def probe(topology: Topology) -> None:
    """Compile a small sum over all chips.

    If the compiler does not know the slice, raise CompilerError or end the process.
    """
    devices = topology.devices()
    sharding = jax.NamedSharding(jax.sharding.Mesh(np.array(devices), ("all",)), PartitionSpec("all"))
    numbers = jax.ShapeDtypeStruct((8 * len(devices), 128), jnp.float32, sharding=sharding)
    try:
        jax.jit(jnp.sum).lower(numbers).compile()
    except jax.errors.JaxRuntimeError as error:
        raise CompilerError(" ".join(str(error).split())) from None


def plan_step(config: Config, topology: Topology, kind: Kind, begun: Callable[[], None] = lambda: None) -> Plan:
    """Compile a step. Arguments and errors are those of ``plan_training``."""
    if isinstance(kind, Decoding):
        return plan_decoding(config, topology, kind, begun)
    if isinstance(kind, Reference):
        return plan_training(config, topology, begun, kind.objective, only_reference=True)
    return plan_training(config, topology, begun, kind)


def plan_training(
    config: Config,
    topology: Topology,
    begun: Callable[[], None] = lambda: None,
    objective: Objective | None = None,
    only_reference: bool = False,
) -> Plan:
    """Compile the training step.

    Arguments:
        config: the run.
        topology: the slice or the GPUs.
        begun: is called when all checks have passed and compilation begins.
        objective: that of ``make_objective``. None: with one pair a sequence, if preferences are learned from.
        only_reference: compile the pass over preferences instead that comes before the first step. It has no optimizer.

    Raises UserError if the slice cannot hold such a mesh, CompilerError if the compiler fails.
    """
    config = resolve(config)
    mesh = _mesh(config, topology)
    check_divisible(mesh, config.model, config.train)
    note = eight_bits.check_units(config.train.products, mesh.devices.flat[0])
    train, objective = config.train, objective or make_objective(config)
    mask = config.data.document_mask or isinstance(objective, Dpo)
    module = make_model(config.model, train.compute_dtype, train.remat, train.attention, mesh, document_mask=mask)
    adapting = Adapting.of(config) if config.lora.rank else None
    if adapting is not None:
        check_targets(config.model, config.lora)
        module = adapting.suited(module)
    optimizer = make_optimizer(train, train.max_steps or 1)
    shapes = state_shapes(module, optimizer, mesh, adapting)
    parts = {"parameters": _bytes(shapes.params), "optimizer": _bytes(shapes.opt_state)}
    if adapting is not None:
        parts = {"frozen base": _bytes(adapting.base_shapes(module, mesh)), "adapters": parts["parameters"]} | parts
        del parts["parameters"]
    batch = batch_shapes(train, config.model, mesh, mask, objective)
    begun()

    def compile_step() -> jax.stages.Compiled:
        if only_reference:
            return compile_reference_step(module, mesh, train, config.model, adapting, objective)
        accumulation = train.gradient_accumulation_steps
        return compile_train_step(
            module, optimizer, mesh, accumulation, batch, adapting, objective, eight_bits.asked(train)
        )

    return replace(_plan(config, topology, mesh, module, parts, compile_step, objective=objective), note=note)


def plan_decoding(
    config: Config, topology: Topology, decoding: Decoding, begun: Callable[[], None] = lambda: None
) -> Plan:
    """Compile a decoding step. Arguments and errors are those of ``plan_training``."""
    config = resolve(config)
    mesh = _mesh(config, topology)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if decoding.batch % rows:
        raise UserError(
            f"--batch: expected a multiple of mesh.data x mesh.fsdp = {rows}, found {decoding.batch}; change one of them"
        )
    check_divisible(mesh, config.model)
    module = make_model(config.model, config.train.compute_dtype, mesh=mesh)
    shapes = generation_shapes(module, decoding.weights)
    params = with_shardings(shapes, generation_formats(shapes, mesh))
    state = _decode_state(module, mesh, decoding)
    parts = {"parameters": _bytes(params), "cache": _bytes((state.cache.k, state.cache.v))}
    begun()

    def compile_step() -> jax.stages.Compiled:
        with on_mesh(mesh):
            lowered = decode_chunk.lower(module, params, state, steps=1, end=decoding.slots)
            return lowered.compile(compiler_options=generation_options(mesh.devices.flat[0], state.cache.layer_bytes))

    return _plan(config, topology, mesh, module, parts, compile_step, decoding)


def _mesh(config: Config, topology: Topology) -> jax.sharding.Mesh:
    """Return the mesh of the described devices. Raises UserError if the slice's grid cannot be divided like that."""
    devices = topology.devices()
    try:
        return make_mesh(config.mesh, devices)
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise UserError(
            f"mesh: expected sizes into which a grid of {topology.name} can be cut, found "
            f"{describe(vars(config.mesh))} ({' '.join(str(error).split())[:160]}); change [mesh]"
        ) from None


def _decode_state(module: Llama, mesh: jax.sharding.Mesh, decoding: Decoding) -> DecodeState:
    """Return the shapes, with shardings, of the state that a decoding step passes to the next."""

    def state() -> DecodeState:
        sampler = make_sampler([([], SampleArgs(), 0)] * decoding.batch, module.args.vocab_size)
        first, dtype = jnp.zeros(decoding.batch, jnp.int32), CACHE_DTYPES[decoding.cache] or module.dtype
        return empty_state(module, sampler, first, decoding.slots, dtype)

    shapes = jax.eval_shape(state)
    return with_shardings(shapes, state_shardings(shapes, mesh))


def _plan(
    config: Config, topology: Topology, mesh: jax.sharding.Mesh, module: Llama, parts: dict[str, int],
    compile_step: Callable[[], jax.stages.Compiled], decoding: Decoding | None = None, objective: Objective = NextToken(),
) -> Plan:  # fmt: skip
    began = time.perf_counter()

    def plan(needed: int, parts: dict[str, int], schedule: Schedule | Roofline | None, text: str) -> Plan:
        place = config, topology, dict(mesh.shape), module.dtype.name, str(module.kernel)
        return Plan(*place, needed, parts, schedule, text, ended - began, decoding, objective)

    ended = began
    try:
        compiled = compile_step()
        ended = time.perf_counter()
    except jax.errors.JaxRuntimeError as error:
        if not says_memory_is_too_small(str(error)):
            raise CompilerError(" ".join(str(error).split())) from None
        ended = time.perf_counter()
        needed = needed_bytes(str(error))
        rest = {"all else": needed - sum(parts.values())} if needed > sum(parts.values()) else {}
        return plan(needed, parts | rest, None, "")
    text, memory = _text(compiled, topology), cast(Any, compiled.memory_analysis())
    program = Program.parse(text)
    peak = _peak_bytes(memory, topology)
    if decoding is None and (kept := _kept_bytes(program, config.model.n_layers)):
        parts |= {"kept for the backward pass": kept}
    parts |= {"temporaries": max(0, peak - sum(parts.values()))}
    positions = objective.length(config.model)
    seen = keys_per_query(replace(config.model, max_seq_len=positions)) / positions
    return plan(peak, parts, (roofline_of if topology.is_gpu else schedule_of)(program, topology.chip, seen), text)


def _text(compiled: jax.stages.Compiled, topology: Topology) -> str:
    """Return a compiled program as text. Raises UserError if this JAX is too old for what the compiler writes."""
    try:
        return cast(str, compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"plan: expected a compiled program that jax {jax.__version__} can read, found that it cannot read what the compiler wrote "
            f"for {topology.name} ({' '.join(str(error).split())[:160]}); install a newer jax, which may need Python 3.12, or plan for "
            "another version of TPU"
        ) from None


def _peak_bytes(memory: Any, topology: Topology) -> int:
    """Return the bytes of a device that a program needs at its peak, by the compiler's account."""
    if not topology.is_gpu:
        return memory.peak_memory_in_bytes
    # All temporaries of a program on a GPU lie in one block, for as long as it runs.
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def _kept_bytes(program: Program, layers: int) -> int:
    """Return the bytes that the first of two loops over the layers, the forward pass, stores for each layer."""
    for instructions in program.computations.values():  # the loops may be inside one over parts of the batch
        loops = [i for i in instructions if i.opcode == "while" and program.trips(i) == layers]
        if len(loops) > 1:
            return sum(a.size for a in program.changed(loops[0]) if a.dims[:1] == (layers,) and a.memory == HBM)
    return 0


def _bytes(shapes: Any) -> int:
    """Return the bytes of a tree of shapes on one device."""
    shards = [jax.ShapeDtypeStruct(s.sharding.shard_shape(s.shape), s.dtype) for s in jax.tree.leaves(shapes)]
    return bytes_of(shards)
