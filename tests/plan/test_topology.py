"""Slices by their names, as people type them, and those that Google offers."""

import math

import pytest

from llama_jax.devices.chips import EIGHT_BIT_FLOPS, PEAK_FLOPS, TPUS, GiB
from llama_jax.errors import UserError
from llama_jax.plan.topology import MOST_CHIPS, SLICES, Topology


@pytest.mark.parametrize(
    ("typed", "name", "chips"),
    [
        ("v5e:16x16", "v5e:16x16", 256),
        (" V5E: 2x4 ", "v5e:2x4", 8),
        ("v5e:02x2", "v5e:2x2", 4),
        ("v5e:4\N{MULTIPLICATION SIGN}4", "v5e:4x4", 16),
        ("v5litepod:4x4", "v5e:4x4", 16),
        ("v5p:4x4x12", "v5p:4x4x12", 192),
        ("1xv5e:2x2", "v5e:2x2", 4),
        ("2xv5e:16x16", "2xv5e:16x16", 512),
        ("tpu7x:2x2x1", "v7x:2x2x1", 4),
        ("v7x:4x4x4", "v7x:4x4x4", 64),
        ("2xTPU7x:2x2x2", "2xv7x:2x2x2", 16),
    ],
)
def test_a_slice_is_read_however_its_name_is_typed(typed: str, name: str, chips: int) -> None:
    topology = Topology.parse(typed)
    assert (topology.name, topology.chips, topology.is_offered) == (name, chips, True)


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("v5e-16", ["v5e:4x4", "16 chips", "'v5e-16'"]),
        ("v5litepod-16", ["v5e:4x4", "16 chips"]),
        ("tpu-v6e-8", ["v6e:2x4", "8 chips"]),
        ("v5p-8", ["v5p:2x2x1", "4 chips, 8 cores"]),
        ("v4-128", ["v4:4x4x4", "64 chips, 128 cores"]),
        ("v5e:16", ["v5e:4x4", "16 chips"]),
        ("v5p:4", ["v5p:2x2x1", "4 chips"]),
        ("v5e-12", ["v5e:2x4 of 8 chips or v5e:4x4 of 16 chips"]),
        ("v5e:2x2x2", ["2 sizes", "v5e:2x4"]),
        ("v5p:4x4", ["3 sizes", "v5p:2x2x4"]),
        ("v5e:0x4", ["2 sizes", "'v5e:0x4'"]),
        ("v5e:-2x2", ["'v5e:-2x2'"]),
        ("v5e", ["v5e:16x16"]),
        ("tpu7x-8", ["v7x:2x2x1", "4 chips, 8 cores"]),
        ("v9:2x2", ["v4, v5e, v5p, v6e, v7x"]),
        ("a100:8", ["v5e:16x16", "h100:8", "v7x, h100"]),
        ("h100:16", ["1 to 8 GPUs", "'h100:16'", "h100:8"]),
        ("h100:0", ["1 to 8 GPUs"]),
        ("2xh100:8", ["h100:8"]),
        ("v5e:2x2;rm", ["v5e:16x16"]),
        ("v5e:" + "9" * 5000 + "x2", ["v5e:16x16"]),
        ("v5e:32x32", ["256 chips", "v5e:16x16, or 4xv5e:16x16"]),
        ("v5e:1000000x1000000", ["256 chips", "take v5e:16x16"]),
        ("v4:32x32x32", ["4,096 chips", "v4:16x16x16"]),
        ("1000xv5e:16x16", [f"{MOST_CHIPS:,} chips"]),
        ("0xv5e:2x2", ["'0xv5e:2x2'"]),
        ("2xv4:2x2x1", ["one slice of v4"]),
    ],
)
def test_what_names_no_slice_is_told_with_one_that_it_may_mean(typed: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as told:
        Topology.parse(typed)
    message = str(told.value)
    assert message.startswith("--topology: expected") and "\n" not in message and len(message) < 400
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("name", ["v5e:1x8", "v5e:2x8", "v5p:4x4x5", "v6e:12x12", "v4:2x2x3"])
def test_a_slice_that_nobody_offers_is_told_from_those_that_are(name: str) -> None:
    topology = Topology.parse(name)
    assert not topology.is_offered
    for nearest in topology.nearest.split(" or "):
        assert Topology.parse(nearest.split(" ")[0]).is_offered


@pytest.mark.parametrize("version", SLICES)
def test_a_chip_is_one_device_but_for_v7x_whose_halves_have_half_of_its_figures(version: str) -> None:
    topology = Topology.of(version, SLICES[version][2])
    each = 2 if version == "v7x" else 1
    assert topology.device_count == each * topology.chips == each * math.prod(topology.grid)
    assert topology.unit == ("device" if each == 2 else "chip") and topology.rented == "chip"


def test_figures_of_v7x_are_those_that_google_prints_of_a_chip() -> None:
    """The compiler's cycles are of four units of 256 x 256 a device, at two operations a multiplication."""
    chip = TPUS["v7x"]
    assert (2 * chip.peak_flops, 2 * (chip.fp8_flops or 0)) == (2307e12, 4614e12) and chip.int8_flops is None
    assert 2 * chip.hbm_bandwidth == 7380e9 and 0.97 * 192 < 2 * chip.hbm_bytes / GiB < 192
    assert 4 * 256 * 256 * 2 * chip.clock == pytest.approx(chip.peak_flops, rel=1e-3)
    assert PEAK_FLOPS["TPU7x"] == chip.peak_flops and EIGHT_BIT_FLOPS["fp8"]["TPU7x"] == chip.fp8_flops


def test_a_compiler_that_does_not_know_a_version_is_told_from_a_slice_that_it_does_not_know() -> None:
    assert "newer libtpu" in str(Topology.parse("v7x:2x2x1").refused("Invalid TPU external name"))
    assert "newer libtpu" not in str(Topology.parse("v5e:3x5").refused("no such slice"))


@pytest.mark.parametrize("version", SLICES)
def test_larger_slices_come_smallest_first_and_parts_make_up_the_whole(version: str) -> None:
    topology = Topology.of(version, SLICES[version][4])
    same = [t for t in topology.larger() if t.version == version]
    assert [t.chips for t in same] == sorted(t.chips for t in same) and same[0].chips > topology.chips
    others = [t for t in topology.larger() if t.version != version]
    room = topology.chip.hbm_bytes * topology.chip.devices
    assert all(t.chip.hbm_bytes * t.chip.devices > room for t in others)
    *parts, whole = topology.parts()
    assert whole == topology and parts[0].chips == 1
    assert all(topology.chips % part.chips == 0 and math.prod(part.grid) == part.chips for part in parts)
