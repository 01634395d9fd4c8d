"""What a run says that it needs, before it begins; and what it proposes where a device has less."""

import dataclasses
import shlex
from typing import Any

import jax
import pytest

from llama_jax.config import Config, MeshArgs, ModelArgs, TrainArgs
from llama_jax.devices.memory import bytes_of
from llama_jax.devices.sharding import make_mesh
from llama_jax.errors import UserError
from llama_jax.model import Llama
from llama_jax.training import needs
from llama_jax.training.account import state_bytes
from llama_jax.training.command import read_command
from llama_jax.training.eight_bits import copies
from llama_jax.training.needs import announce_needs, need_of
from llama_jax.training.step import init_state, make_optimizer

SEVEN = ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256, max_seq_len=4096)
TINY = ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=64, multiple_of=16, max_seq_len=16)
TRAIN = TrainArgs(batch_size=64, compute_dtype="bfloat16")
LEAN = {"param_dtype": "bfloat16", "moments": "int8", "remat": "full", "gradient_accumulation_steps": 64}
MESH = make_mesh(MeshArgs(data=1), jax.devices()[:1])
KINDS: list[dict[str, Any]] = [
    {}, {"moments": "int8"}, {"optimizer": "adafactor"}, {"optimizer": "muon"}, {"param_dtype": "bfloat16", "moments": "bfloat16"},
    {"param_dtype": "bfloat16", "rounding": "compensated"},
]  # fmt: skip


def said(config: Config, limit: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed, or the line of the refusal, where a device has ``limit`` bytes."""
    monkeypatch.setattr(needs, "memory_of", lambda _: limit)
    try:
        announce_needs(config, MESH)
    except UserError as error:
        return f"refused: {error}"
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_the_account_is_the_bytes_of_the_arrays(kind: dict[str, Any]) -> None:
    train = dataclasses.replace(TRAIN, **kind)
    state = init_state(Llama(TINY), make_optimizer(train, 10), MESH, seed=0)
    parts = state_bytes(TINY, dataclasses.replace(train, gradient_accumulation_steps=4))
    assert parts["gradients"] == parts["gradients so far"] == parts["parameters"] == bytes_of(state.params)
    assert parts["moments"] + parts.get("rounding", 0) == bytes_of(state.opt_state)
    assert ("rounding" in parts) == ("rounding" in kind)


@pytest.mark.parametrize(("names", "count"), [("forward,input,weight", 2), ("input,weight", 1), ("weight", 0)])
def test_the_copies_in_eight_bits_are_counted(names: str, count: int) -> None:
    train = dataclasses.replace(TRAIN, products="int8", products_of=names)
    made = copies(train, init_state(Llama(TINY), make_optimizer(train, 10), MESH, seed=0).params)
    arrays = [one for pair in made.values() for one in pair if one is not None]
    assert state_bytes(TINY, train).get("copies in eight bits", 0) == sum(one.values.nbytes for one in arrays)
    assert len(arrays) == 7 * count


def test_seven_billion_fit_eighty_gigabytes_in_bfloat16_and_eight_bits() -> None:
    """Compiled for a TPU chip, this step needs 60.5 GB, with compensated rounding 74.4, and with adafactor 46.6."""
    config = Config(SEVEN, train=dataclasses.replace(TRAIN, **LEAN), mesh=MeshArgs(data=1))
    for changes, compiled in (
        ({}, 60.5),
        ({"rounding": "compensated"}, 74.4),
        ({"moments": "float32", "optimizer": "adafactor"}, 46.6),
    ):
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
        assert need_of(changed).all / 1e9 == pytest.approx(compiled, rel=0.1)


def test_what_is_needed_is_said_beside_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(Config(SEVEN, train=dataclasses.replace(TRAIN, **LEAN)), 85e9, monkeypatch, capsys)
    assert text.split() == ["needs", "about", "57.7", "of", "85.0", "GB", "a", "device:", "parameters", "13.5", "(bfloat16),", "gradients", "13.5,", "moments", "13.9", "(int8),", "gradients", "so", "far", "13.5,", "activations", "about", "3.4"]  # fmt: skip


def test_only_what_certainly_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(SEVEN, train=TRAIN)
    text = said(config, 107e9, monkeypatch, capsys)
    assert text.startswith("refused: memory: expected up to 107.0 GB a device, found that parameters 27.0 (float32), ")
    assert "\n" not in text
    text = said(config, 109e9, monkeypatch, capsys)
    assert "by this estimate it may not fit; what would fit: " in text and "refused" not in text


@pytest.mark.parametrize("limit", [16e9, 24e9, 40e9, 80e9, 100e9, 141e9])
def test_what_is_proposed_fits_by_the_account(
    limit: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(Config(SEVEN, train=TRAIN), limit, monkeypatch, capsys)
    proposals = text.strip().partition("what would fit: ")[2].split("; or ")
    assert len(proposals) >= 1
    for proposal in proposals:
        flags = proposal.partition(" such devices with ")[2] or proposal.partition(" (about")[0]
        config, _ = read_command([*shlex.split(flags), "--train.batch-size=64", "--train.save-dir=x"])
        changed = {
            f.name: getattr(config.train, f.name)
            for f in dataclasses.fields(TrainArgs)
            if f"--train.{f.name.replace('_', '-')} " in f"{flags} "
        }
        train = dataclasses.replace(TRAIN, **changed)
        mesh = MeshArgs(data=1, fsdp=config.mesh.fsdp)
        assert changed and need_of(Config(SEVEN, train=train, mesh=mesh)).all <= 0.9 * limit


def test_where_muon_does_not_fit_other_optimizers_are_proposed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = dataclasses.replace(TRAIN, optimizer="muon", muon_momentum=0.9)
    text = said(Config(SEVEN, train=train), 80e9, monkeypatch, capsys)
    assert text.startswith("refused: memory: ") and "moments 28.0 (muon)" in text
    first = text.partition("what would fit: ")[2].partition(" (about")[0]
    assert "--train.optimizer adamw" in first and "--train.muon-momentum 0.95" in first
    read_command([*shlex.split(first), "--train.batch-size=64", "--train.save-dir=x"])[0].check()


def test_adapters_are_proposed_where_a_checkpoint_is_tuned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = dataclasses.replace(TRAIN, init_from="base", **LEAN)
    text = said(Config(SEVEN, train=train), 16e9, monkeypatch, capsys)
    assert "--lora.rank 16 --lora.base-weights int4 --train.param-dtype float32 --train.moments float32 (about" in text
    assert "--lora" not in said(
        Config(SEVEN, train=dataclasses.replace(train, init_from="")), 16e9, monkeypatch, capsys
    )
