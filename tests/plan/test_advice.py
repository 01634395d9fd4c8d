"""What is advised where a step does not fit: only what was compiled is said to fit, within the compiles that were allowed."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama_jax.config import Cache, Config, MeshArgs, ModelArgs, TrainArgs, Weights
from llama_jax.devices.chips import GiB
from llama_jax.plan import Decoding, Plan
from llama_jax.plan.advice import Advice, advise_decoding, advise_training
from llama_jax.plan.cost import Cost, Schedule
from llama_jax.plan.decoding import Layout, fewest_chips, lay_out
from llama_jax.plan.estimate import training_bytes
from llama_jax.plan.topology import Topology
from llama_jax.train_args import Remat
from tests.plan.test_estimate import SEVEN, SEVENTY, applied

ROOT = Path(__file__).parents[2]
SMALL = ModelArgs(dim=2048, n_layers=16, n_heads=16, vocab_size=32000, multiple_of=256, max_seq_len=2048)


def made(config: Config, topology: Topology, size: float, decoding: Decoding | None = None) -> Plan:
    """A plan as compiling would give it, of a step that needs ``size`` bytes."""
    sizes = {name: getattr(config.mesh, name) for name in ("data", "fsdp", "tensor", "sequence")}
    schedule = Schedule(Cost(), topology.chip) if size <= topology.chip.hbm_bytes else None
    return Plan(config, topology, sizes, "bfloat16", "splash", int(size), {}, schedule, "", 1.0, decoding)


def compiler(topology: Topology, factor: float, calls: list[str]) -> Callable[[str, Config], Plan]:
    """A compiler that finds ``factor`` times the counted bytes."""

    def compile_(flags: str, config: Config) -> Plan:
        calls.append(flags)
        return made(config, topology, factor * training_bytes(config))

    return compile_


def advised(asked: Config, slice_: str, compiles: int, factor: float = 1.0) -> tuple[list[Advice], list[str], Plan]:
    topology = Topology.parse(slice_)
    config = applied(asked, "", topology.chips)
    plan, calls = made(config, topology, factor * training_bytes(config)), list[str]()
    return list(advise_training(asked, plan, compiles, compiler(topology, factor, calls))), calls, plan


def seven(batch: int, parts: int = 1, remat: Remat = "attention", **mesh: int) -> Config:
    return Config(
        SEVEN, train=TrainArgs(batch_size=batch, gradient_accumulation_steps=parts, remat=remat), mesh=MeshArgs(**mesh)
    )


def test_the_cheapest_change_that_fits_comes_first_and_the_mesh_stays() -> None:
    """More parts cost no time; computing the forward pass again costs a third of it."""
    ((only,), calls, _) = advised(seven(64, remat="full", data=1, fsdp=-1), "v5e:4x4", 3, factor=1.15)
    assert only.flags == "--train.gradient-accumulation-steps 2" and only.verified and calls == [only.flags]
    ((only,), _, _) = advised(seven(64, data=1, fsdp=-1), "v5e:4x4", 3)
    assert only.flags == "--train.remat full" and only.verified


def test_a_mesh_that_only_a_flag_would_give_stays_too() -> None:
    asked = seven(64, remat="full", data=1, fsdp=1, tensor=16)
    ((only,), _, plan) = advised(asked, "v5e:4x4", 3)
    assert not plan.fits and only.verified and "--mesh" not in only.flags


def test_parameters_on_every_chip_are_spread_over_them() -> None:
    ((only,), calls, plan) = advised(seven(16, data=-1), "v5e:4x4", 3)
    assert not plan.fits and only.verified and "--mesh.fsdp" in only.flags and len(calls) <= 3


def test_where_nothing_fits_on_the_slice_the_smallest_that_holds_it_is_named_as_an_estimate() -> None:
    ((only,), calls, _) = advised(seven(16, data=1, fsdp=-1), "v5e:2x2", 3)
    assert not calls  # the state alone fills the four chips
    assert only.flags.startswith("--topology v5e:4x4 ") and not only.verified and only.seconds is None
    assert only.topology == "v5e:4x4" and only.bytes < 15.75 * GiB


def test_versions_with_more_memory_a_chip_come_last_and_what_holds_nowhere_is_not_advised() -> None:
    wide = Config(replace(SEVENTY, max_seq_len=1 << 17), train=TrainArgs(batch_size=1), mesh=MeshArgs(data=1, fsdp=-1))
    found, _, _ = advised(wide, "v5e:1x1", 3)
    assert found == []
    seventy = Config(SEVENTY, train=TrainArgs(batch_size=4), mesh=MeshArgs(data=1, fsdp=-1))
    ((only,), _, _) = advised(seventy, "v5e:2x2", 3)
    assert not only.topology.startswith("v5e")  # four sequences cannot be spread over so many of its chips


def test_without_compiles_advice_is_an_estimate() -> None:
    ((only,), calls, _) = advised(seven(64, remat="full", data=1, fsdp=-1), "v5e:4x4", 0, factor=1.15)
    assert not calls and not only.verified and only.topology == "v5e:4x4"


@settings(max_examples=40)
@given(
    slice_=st.sampled_from(["v5e:1x1", "v5e:2x2", "v5e:4x8", "v6e:2x4", "v5p:2x2x1"]),
    rows=st.sampled_from([1, 2, 3, 8, 24, 64, 96]),
    remat=st.sampled_from(["none", "dots", "attention", "offload", "full"]),
    mesh=st.sampled_from([{"data": -1}, {"data": 1, "fsdp": -1}, {"data": -1, "tensor": 2}]),
    factor=st.floats(0.7, 1.6),
    compiles=st.integers(0, 4),
)
def test_what_is_said_to_fit_was_compiled_and_fits(
    slice_: str, rows: int, remat: Remat, mesh: dict[str, int], factor: float, compiles: int
) -> None:
    chips = Topology.parse(slice_).chips
    assume(chips % mesh.get("tensor", 1) == 0)
    asked = Config(SMALL, train=TrainArgs(batch_size=rows * chips, remat=remat), mesh=MeshArgs(**mesh))
    found, calls, plan = advised(asked, slice_, compiles, factor)
    if plan.fits:
        return
    assert len(calls) <= compiles and len(set(calls)) == len(calls) and len(found) <= 1
    for advice in found:
        words = advice.flags.split()
        if "--topology" in words:
            at = words.index("--topology")
            assert words[at + 1] == advice.topology != plan.topology.name and not advice.verified
            del words[at : at + 2]
        config = applied(asked, " ".join(words), Topology.parse(advice.topology).chips)
        config.check()
        if advice.verified:
            assert advice.flags in calls
            assert advice.bytes == int(factor * training_bytes(config)) <= plan.topology.chip.hbm_bytes


SEVEN_SERVED = Config(SEVEN, mesh=MeshArgs(data=1, fsdp=4))


@pytest.mark.parametrize(
    ("slice_", "batch", "chips", "data", "tensor"),
    [
        ("v5e:1x1", 1, 1, 1, 1),
        ("v5e:2x2", 32, 4, 1, 4),  # two copies of two chips each would fit too, and read half as much again
        ("v5e:2x4", 8, 8, 1, 8),
        ("v5e:16x16", 256, 256, 16, 16),
        ("v5p:2x2x1", 3, 4, 1, 4),
    ],
)
def test_a_model_is_spread_over_the_chips_for_decoding(
    slice_: str, batch: int, chips: int, data: int, tensor: int
) -> None:
    layout = lay_out(SEVEN_SERVED, Topology.parse(slice_), Decoding(batch, 2048))
    assert layout.fits and layout.topology.chips == chips
    assert layout.mesh == MeshArgs(data=data, tensor=tensor)


def test_chips_that_neither_heads_nor_sequences_divide_are_idle() -> None:
    model = ModelArgs(dim=384, n_layers=2, n_heads=6, vocab_size=512, multiple_of=32, max_seq_len=256)
    layout = lay_out(Config(model), Topology.parse("v5e:2x4"), Decoding(1, 256))
    assert layout.topology.chips in (1, 2) and layout.mesh.data == 1


def test_counting_leaves_jax_in_a_state_that_can_be_forked() -> None:
    """The compiler runs in a fork, which no thread of JAX's backends may be missing from."""
    program = """
from tests.jax_internals import backends_are_initialized
from tests.plan.test_advice import *
lay_out(SEVEN_SERVED, Topology.parse("v5e:2x2"), Decoding(8, 256))
training_bytes(Config(SEVEN, mesh=MeshArgs(1, 4)))
print(backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_sample_py_takes_the_fewest_chips_that_hold_the_parameters() -> None:
    assert fewest_chips(SEVEN_SERVED, Topology.parse("v5e:2x2"), "auto") == 1
    assert fewest_chips(Config(SEVENTY), Topology.parse("v5p:4x4x4"), "auto") == 2
    assert fewest_chips(Config(SEVENTY), Topology.parse("v5p:4x4x4"), "int4") == 1


def advised_decoding(
    slice_: str,
    decoding: Decoding,
    compiles: int,
    mesh: MeshArgs | None = None,
    model: ModelArgs = SEVEN,
    factor: float = 1.0,
) -> tuple[list[Advice], list[tuple[str, Layout, Decoding]]]:
    asked, topology = Config(model, mesh=mesh or MeshArgs()), Topology.parse(slice_)
    layout = lay_out(asked, topology, decoding)
    plan = made(replace(asked, mesh=mesh or layout.mesh), topology, 1e15, decoding)
    calls = []

    def compile_(flags: str, config: Config, part: Topology, smaller: Decoding) -> Plan:
        size = factor * lay_out(config, part, smaller, whole=True).bytes
        calls.append((flags, config.mesh, smaller))
        return made(config, part, size, smaller)

    return list(advise_decoding(asked, plan, topology, compiles, mesh is not None, compile_)), calls


def test_advice_for_decoding_is_about_decoding() -> None:
    found, calls = advised_decoding("v5e:1x1", Decoding(8, 2048), 3)
    assert [a.flags for a in found] == ["--weights int8", "--batch 2", "--slots 512", "--topology v5e:2x2"]
    assert [a.verified for a in found] == [True, True, True, False]
    assert [(d.batch, d.slots, d.weights) for _, _, d in calls] == [
        (8, 2048, "int8"),
        (2, 2048, "auto"),
        (8, 512, "auto"),
    ]
    assert not any("train" in a.flags for a in found)


def test_a_mesh_that_was_asked_for_is_changed_first() -> None:
    found, _ = advised_decoding("v5e:2x2", Decoding(32, 2048), 1, MeshArgs(data=1, fsdp=4))
    assert found[0].flags == "--mesh.fsdp 1 --mesh.tensor 4" and found[0].verified
    assert all("--mesh.fsdp 1" in a.flags for a in found if a.topology == "v5e:2x2")


def test_what_does_not_fit_after_all_is_not_advised() -> None:
    found, calls = advised_decoding("v5e:1x1", Decoding(8, 2048), 3, factor=1.2)
    assert len(calls) == 3 and not any(a.verified for a in found)
    assert [a.flags for a in found] == ["--topology v5e:2x2"]


@settings(max_examples=40)
@given(
    slice_=st.sampled_from(["v5e:1x1", "v5e:2x2", "v5e:4x8", "v6e:2x4", "v5p:2x2x1", "v4:2x2x2"]),
    batch=st.integers(1, 400),
    slots=st.sampled_from([256, 1000, 2048, 4096]),
    weights=st.sampled_from(["auto", "int8", "int4", "int4-64"]),
    cache=st.sampled_from(["auto", "int8"]),
    seventy=st.booleans(),
)
def test_every_advice_for_decoding_fits_and_divides(
    slice_: str, batch: int, slots: int, weights: Weights, cache: Cache, seventy: bool
) -> None:
    decoding = Decoding(batch, slots, weights, cache)
    found, calls = advised_decoding(slice_, decoding, 2, model=SEVENTY if seventy else SEVEN)
    assert len(calls) <= 2 and len({a.flags for a in found}) == len(found)
    for _, mesh, smaller in calls:
        assert smaller.batch % mesh.data == 0 and smaller.batch <= batch and smaller.slots <= slots
        assert smaller != decoding
    for advice in found:
        assert advice.flags and advice.bytes <= Topology.parse(advice.topology).chip.hbm_bytes
