"""The rough count of a training step, beside figures of the TPU's compiler, and the ways to lay a step out."""

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs
from llama_jax.devices.chips import GiB
from llama_jax.plan.estimate import candidate, candidates, divisors, training_bytes, training_seconds
from llama_jax.plan.topology import Topology
from llama_jax.train_args import Remat

SEVEN = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256, max_seq_len=4096)
HALF = replace(SEVEN, n_layers=16)
SEVENTY = ModelArgs(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=32000, multiple_of=4096, ffn_dim_multiplier=1.3
)
# Sequences, accumulation, policy, mesh (data, fsdp, tensor, sequence), and GiB a chip by libtpu 0.0.52, whether they fit or not.
COMPILED: list[tuple[ModelArgs, int, int, Remat, tuple[int, int, int, int], float]] = [
    (SEVEN, 64, 1, "attention", (1, 16, 1, 1), 33.09),
    (SEVEN, 64, 2, "attention", (1, 16, 1, 1), 22.50),
    (SEVEN, 64, 4, "attention", (1, 16, 1, 1), 15.97),
    (SEVEN, 64, 4, "full", (1, 16, 1, 1), 11.60),
    (SEVEN, 64, 2, "full", (1, 16, 1, 1), 13.33),
    (SEVEN, 64, 1, "full", (1, 16, 1, 1), 14.23),
    (SEVEN, 64, 4, "none", (1, 16, 1, 1), 41.72),
    (SEVEN, 64, 4, "dots", (1, 16, 1, 1), 21.35),
    (HALF, 16, 1, "none", (1, 4, 1, 1), 78.51),
    (HALF, 16, 1, "dots", (1, 4, 1, 1), 39.34),
    (HALF, 64, 1, "full", (1, 4, 1, 1), 32.55),
    (HALF, 64, 1, "offload", (1, 4, 1, 1), 31.94),
    (replace(HALF, ffn_dim_multiplier=0.5), 16, 1, "none", (1, 4, 1, 1), 58.05),
    (replace(HALF, ffn_dim_multiplier=0.5), 32, 1, "attention", (1, 4, 1, 1), 36.68),
    (replace(HALF, n_kv_heads=8), 16, 1, "none", (1, 4, 1, 1), 73.83),
    (replace(HALF, n_kv_heads=8), 32, 1, "attention", (1, 4, 1, 1), 34.62),
    (HALF, 16, 1, "none", (1, 1, 4, 1), 139.00),
    (HALF, 16, 1, "dots", (1, 1, 4, 1), 51.48),
    (HALF, 16, 1, "attention", (1, 1, 4, 1), 40.47),
    (HALF, 32, 1, "attention", (1, 2, 2, 1), 49.84),
    (HALF, 16, 1, "attention", (4, 1, 1, 1), 71.37),
    (replace(HALF, max_seq_len=16384), 8, 1, "attention", (1, 1, 1, 4), 86.79),
    (replace(HALF, max_seq_len=16384), 8, 1, "full", (1, 2, 1, 2), 37.89),
    (replace(HALF, max_seq_len=32768), 4, 1, "attention", (1, 4, 1, 1), 42.33),
    (SEVENTY, 1024, 2, "attention", (1, 64, 1, 1), 204.42),
    (SEVENTY, 16, 1, "attention", (1, 16, 1, 1), 96.23),
]


@pytest.mark.parametrize(("model", "batch", "parts", "remat", "mesh", "found"), COMPILED)
def test_bytes_come_within_a_tenth_of_the_compilers(
    model: ModelArgs, batch: int, parts: int, remat: Remat, mesh: tuple[int, int, int, int], found: float
) -> None:
    train = TrainArgs(batch_size=batch, gradient_accumulation_steps=parts, remat=remat)
    assert training_bytes(Config(model, train=train, mesh=MeshArgs(*mesh))) == pytest.approx(found * GiB, rel=0.1)


@pytest.mark.parametrize(("names", "products"), [("forward,input,weight", 3), ("forward,input", 2)])
def test_products_in_eight_bits_are_counted_at_the_chips_peak_of_eight_bits(names: str, products: int) -> None:
    plain = Config(SEVEN, train=TrainArgs(batch_size=64, remat="none"), mesh=MeshArgs(1, 16))
    eight = replace(plain, train=replace(plain.train, products="int8", products_of=names))
    saved = [
        training_seconds(plain, at) - training_seconds(eight, at) for at in map(Topology.parse, ("v5e:4x4", "v4:2x2x4"))
    ]
    flops = products * 2.0 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert saved[0] == pytest.approx(4 * 4096 * flops * (1 / 197e12 - 1 / 393e12))
    assert saved[1] == 0


def test_computing_in_float32_keeps_twice_as_much() -> None:
    config = Config(HALF, train=TrainArgs(batch_size=64, remat="full"), mesh=MeshArgs(1, 4))
    more = replace(config, train=replace(config.train, compute_dtype="float32"))
    assert training_bytes(more) > 1.4 * training_bytes(config)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 96),
    heads=st.sampled_from([1, 2, 6, 8]),
    length=st.sampled_from([128, 8192, 16384]),
    slice_=st.sampled_from(["v5e:1x1", "v5e:2x4", "v5p:2x2x1", "2xv5e:2x2"]),
    remat=st.sampled_from(["full", "offload"]),
)
def test_every_candidate_divides_the_model_the_batch_and_the_chips(
    batch: int, heads: int, length: int, slice_: str, remat: Remat
) -> None:
    model = ModelArgs(dim=64 * heads, n_layers=2, n_heads=heads, vocab_size=512, multiple_of=32, max_seq_len=length)
    config, topology = Config(model, train=TrainArgs(batch_size=batch, remat=remat)), Topology.parse(slice_)
    found = list(candidates(config, topology))
    assert len({c.config for c in found}) == len(found)
    for c in found:
        mesh, train = c.config.mesh, c.config.train
        c.config.check()
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence == topology.chips
        assert c.rows * mesh.data * mesh.fsdp * train.gradient_accumulation_steps == batch
        assert not any(size % mesh.tensor for size in (heads, model.hidden_width, 512))
        assert model.dim % mesh.fsdp == 0 and length % mesh.sequence == 0
        assert c.bytes > 0 and c.seconds > 0
    if batch % topology.chips == 0 and model.dim % topology.chips == 0:
        assert remat in {c.config.train.remat for c in found}


def test_flags_make_the_candidate_of_what_was_asked() -> None:
    asked = Config(HALF, train=TrainArgs(batch_size=16), mesh=MeshArgs(data=1, fsdp=-1))
    topology = Topology.parse("v5e:2x2")
    for c in candidates(asked, topology):
        assert applied(asked, c.changes(asked), topology.chips) == c.config
        assert applied(asked, c.flags(asked), topology.chips) == c.config
    same = candidate(replace(asked, mesh=MeshArgs(1, 4)), topology)
    assert same.changes(asked) == ""


def applied(asked: Config, flags: str, chips: int) -> Config:
    """The configuration that flags make of another one, with the mesh's -1 resolved."""
    words = flags.split()
    sections = {"mesh": dataclasses.asdict(asked.mesh), "train": dataclasses.asdict(asked.train)}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        section, name = flag.removeprefix("--").replace("-", "_").split(".")
        sections[section][name] = int(value) if value.isdigit() else value
    mesh = sections["mesh"]
    known = 1
    for size in mesh.values():
        known *= size if size != -1 else 1
    mesh = {axis: chips // known if size == -1 else size for axis, size in mesh.items()}
    return replace(asked, mesh=MeshArgs(**mesh), train=TrainArgs(**sections["train"]))


@given(st.integers(1, 5000))
def test_divisors(n: int) -> None:
    assert list(divisors(n)) == [d for d in range(1, n + 1) if n % d == 0]
