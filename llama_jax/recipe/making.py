"""Makes a recipe: counts the text, measures or plans the speed, chooses, and says each of them in a line."""

import dataclasses
import math
import time
from dataclasses import replace

import jax

from llama_jax.build import count_parameters
from llama_jax.config import Config, ModelArgs
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.compiling import check_devices
from llama_jax.devices.distributed import processes_of
from llama_jax.devices.memory import memory_of
from llama_jax.devices.sharding import make_mesh
from llama_jax.errors import UserError
from llama_jax.expected_args import ExpectedArgs
from llama_jax.recipe.choose import Budget, Choice, Task, bytes_within, choose, with_curve
from llama_jax.recipe.speed import Speed, guess, in_parts, measure, planned, seconds_of_steps
from llama_jax.recipe.telling import Rows, lines_of
from llama_jax.recipe.text import Counted, count_text
from llama_jax.training.account import state_bytes
from llama_jax.training.deciding import get

# The share of the memory that parameters, gradients and the optimizer's state may take beside activations.
STATE_SHARE = 0.6
# The speed is measured again if the model has become so many times wider or narrower.
AGAIN = 1.3


def make_recipe(
    base: Config, given: frozenset[str], budget: Budget, topology: str = "", began: float | None = None
) -> tuple[Choice, Rows]:
    """Return the settings for a budget, and the lines that say how they were found.

    Arguments:
        base: the settings of the person, or defaults.
        given: the names of those that the person gave ("train.lr"). They are kept.
        budget: what the run may take. Its unit is "minutes" if the speed decides.
        topology: the slice to plan for. Empty: this machine.
        began: when the command began, by ``time.perf_counter``, if the run is a part of it and its minutes are those of
            the whole command. None: the run is another command.

    Raises UserError if the text cannot be counted, or if the budget is too small.
    """
    _check(base, given)
    note = "" if topology else skip_absent_tpu("measuring")
    if not topology:
        check_devices()
    rows = _rows_of(base, topology)
    timed = budget.unit == "minutes"
    rough = replace(budget, unit="flops", amount=60 * budget.amount * _guess(topology)) if timed else budget
    text = count_text(base.data, "data.vocab_size" in given, bytes_within(rough))
    here = timed and not topology
    task = Task(base, given, text, rows, most_parameters=_most_parameters(base) if here else math.inf)
    found: Speed | None = None
    choice = choose(task, rough)
    if timed or topology:
        found, choice = _timed(task, budget, choice, topology, began)
    choice = with_curve(task, choice)
    choice.config.check()
    return choice, [*([("", note)] if note else []), *lines_of(task, budget, choice, found, _since(began))]


def _guess(topology: str) -> float:
    if not topology:
        return guess()
    from llama_jax.plan.topology import Topology

    where = Topology.parse(topology)
    return 0.4 * where.chip.peak_flops * where.device_count


def _timed(task: Task, budget: Budget, choice: Choice, topology: str, began: float | None) -> tuple[Speed, Choice]:
    """Measure or plan the speed of the chosen shape, and choose again with it, twice if the shape changes much."""
    for again in (False, True):
        config = _sized(choice.config, task.text)
        if topology:
            speed, config = planned(config, topology)
        else:
            if "train.gradient_accumulation_steps" not in task.given:
                config = in_parts(config)
            speed = measure(config)
        parts = config.train.gradient_accumulation_steps
        base = replace(task.base, train=replace(task.base.train, gradient_accumulation_steps=parts))
        task = replace(task, base=base)
        if budget.unit != "minutes":
            return speed, choose(task, budget)
        seconds = seconds_of_steps(budget.amount, speed, _since(began))
        before, choice = choice, choose(task, replace(budget, unit="flops", amount=seconds * speed.flops_per_second))
        wider = choice.config.model.dim / before.config.model.dim
        if again or 1 / AGAIN <= wider <= AGAIN:
            break
    return speed, choice


def _since(began: float | None) -> float:
    return 0.0 if began is None else time.perf_counter() - began


def _most_parameters(base: Config) -> float:
    """Return how many parameters fit into the memory of these devices, with gradients, moments and activations."""
    mesh = make_mesh(base.mesh)
    probe = ModelArgs(dim=64, n_layers=1, n_heads=1, vocab_size=64)
    each = sum(state_bytes(probe, base.train).values()) / count_parameters(probe)
    return STATE_SHARE * memory_of(mesh.local_devices) * mesh.shape["fsdp"] * mesh.shape["tensor"] / each


def _sized(config: Config, text: Counted) -> Config:
    return replace(config, model=replace(config.model, vocab_size=text.vocab_size))


def _check(base: Config, given: frozenset[str]) -> None:
    """Raise UserError on settings that contradict a recipe: it trains a new model on a text, and decides how long."""
    for part in (base.data, base.train, base.mesh, base.distributed, base.lora, base.expected):
        part.check()  # the model's settings are checked with those that are chosen beside them
    for name in ("train.max_steps", "train.n_epochs"):
        if name in given:
            raise UserError(
                f"{name}: expected none beside a recipe, which decides how long to train, found "
                f"{get(base, name)}; leave it out"
            )
    if base.expected != ExpectedArgs():
        raise UserError(
            "expected.tokens: expected none beside a recipe, which writes them, found some; leave [expected] out"
        )
    if base.train.rate_width is not None and "train.lr" not in given:
        raise UserError(
            "train.rate_width: expected train.lr beside it, since a recipe's own rate is for the width that it chooses, found "
            f"{base.train.rate_width} alone; give the train.lr of that width, or leave it out"
        )
    if base.train.batch_start:
        raise UserError(
            f"train.batch_start: expected none beside a recipe, whose laws are of batches of one size, found {base.train.batch_start}; "
            "leave it out"
        )
    for name in ("hold_lr", "resume_step"):
        if found := getattr(base.train, name):
            raise UserError(
                f"train.{name}: expected none beside a recipe, which is for a run that has not begun, found {found}; leave it out, and "
                "give it to train"
            )
    for holds, name, found in (
        (base.train.init_from, "train.init_from", base.train.init_from),
        (base.lora.rank, "lora.rank", base.lora.rank),
        (base.train.objective != "next-token", "train.objective", base.train.objective),
        (base.train.decay_run or base.train.decay_from, "train.decay_from", base.train.decay_from),
        (base.model.vocab_size != -1, "model.vocab_size", base.model.vocab_size),
    ):
        if holds:
            raise UserError(
                f"{name}: expected none beside a recipe, which is for new models, found {found}; leave it out"
            )


def _rows_of(base: Config, topology: str) -> int:
    """Return how many devices share a batch."""
    if topology:
        from llama_jax.plan.topology import Topology

        devices = Topology.parse(topology).device_count
    else:
        if (count := processes_of(base.distributed)) > 1:
            raise UserError(
                f"minutes: expected one process, whose speed is measured, found a job of {count}; make a recipe for the slice with "
                "--topology, or for --flops, and train by it"
            )
        devices = jax.device_count()
    mesh = base.mesh
    known = [size for size in dataclasses.astuple(mesh) if size != -1]
    left = devices
    for size in known:
        left //= size
    shares = [left if size == -1 else size for size in (mesh.data, mesh.fsdp)]
    return max(1, shares[0]) * max(1, shares[1])
