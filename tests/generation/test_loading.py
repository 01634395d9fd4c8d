"""Loading: a model that is too large for one device lies on several, and says what it says on one."""

import json
import os
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import MeshArgs, SampleArgs
from llama_jax.convert import ConvertArgs, convert
from llama_jax.devices import memory
from llama_jax.devices.memory import bytes_of
from llama_jax.generation import Model, loading
from llama_jax.tokenizer import Tokenizer
from tests.eight_devices import run_on_eight_devices
from tests.generation.models import build

PROMPTS = ["Once upon", "The owl saw the fox by the river."]


def load_with(folder: str, share: float) -> dict[str, Any]:
    """What a model generates, and how its parameters lie, where a device holds ``share`` of them."""
    whole = bytes_of(Model.load(folder).params)
    with (
        mock.patch.object(loading, "memory_of", lambda _: share * whole),
        mock.patch.object(memory, "memory_of", lambda _: share * whole),
    ):
        model = Model.load(folder)
    layers = model.params["layers"]
    attention = (layers[0] if isinstance(layers, tuple) else layers)["attention"]
    wq, output = (jax.tree.leaves(w)[0] for w in (attention["wq"], model.params["output"]))
    completions = model.generate(PROMPTS, SampleArgs(temperature=0.0, max_new_tokens=20))
    return {
        "shards": len(wq.addressable_shards),
        "of wq": wq.addressable_shards[0].data.size / wq.size,
        "of output": output.addressable_shards[0].data.size / output.size,
        "texts": [c.text for c in completions],
        "logprobs": [c.logprobs for c in completions],
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> dict[str, Any]:
    """What load_with says, by what a device holds, in a process with eight devices."""
    folder = tmp_path_factory.mktemp("loading") / "model"
    model = build(small_tokenizer, n_heads=8, n_kv_heads=4, dim=64, multiple_of=16)
    assert small_tokenizer.vocab_size % 4 == 0
    save_checkpoint(folder, model.params, model.args, small_tokenizer)
    quantized = folder.with_name("int8")
    convert(ConvertArgs(input=os.fspath(folder), output=os.fspath(quantized), weights="int8"))
    return run_on_eight_devices("tests.generation.test_loading", os.fspath(folder), os.fspath(quantized))


def test_a_model_that_fits_lies_on_one_device(loaded: dict[str, Any]) -> None:
    assert (loaded["2.0"]["shards"], loaded["2.0"]["of wq"]) == (1, 1.0)


@pytest.mark.parametrize(("share", "devices"), [("0.6", 2), ("0.3", 4)])
def test_a_model_that_does_not_fit_lies_on_the_fewest_devices_that_hold_it(
    loaded: dict[str, Any], share: str, devices: int
) -> None:
    assert loaded[share]["shards"] == devices
    assert loaded[share]["of wq"] == loaded[share]["of output"] == 1 / devices


@pytest.mark.parametrize("share", ["0.6", "0.3"])
def test_on_several_devices_it_says_what_it_says_on_one(loaded: dict[str, Any], share: str) -> None:
    assert loaded[share]["texts"] == loaded["2.0"]["texts"]
    for several, one in zip(loaded[share]["logprobs"], loaded["2.0"]["logprobs"], strict=True):
        assert several == pytest.approx(one, abs=1e-4)


def test_a_model_that_no_number_of_devices_holds_is_refused(loaded: dict[str, Any]) -> None:
    assert "need, computed in float32 on 4 devices" in loaded["refused"]


@pytest.mark.parametrize(("share", "devices"), [("2.0", 1), ("0.6", 2), ("0.3", 4)])
def test_a_quantized_checkpoint_lies_on_the_fewest_devices_that_hold_its_integers(
    loaded: dict[str, Any], share: str, devices: int
) -> None:
    found = loaded[f"int8 {share}"]
    assert found["shards"] == devices
    assert found["of wq"] == found["of output"] == 1 / devices
    assert found["texts"] == loaded["int8 2.0"]["texts"]
    for several, one in zip(found["logprobs"], loaded["int8 2.0"]["logprobs"], strict=True):
        assert several == pytest.approx(one, abs=1e-4)


def test_over_a_mesh_a_quantized_checkpoint_lies_as_loading_would_lay_it(loaded: dict[str, Any]) -> None:
    assert loaded["arrays that are the same"] == [True] * loaded["arrays"]


def lies_alike(a: jax.Array, b: jax.Array) -> bool:
    return a.dtype == b.dtype and a.sharding == b.sharding and np.array_equal(np.asarray(a), np.asarray(b))


if __name__ == "__main__":
    plain, int8 = sys.argv[1:]
    results: dict[str, Any] = {str(share): load_with(plain, share) for share in (2.0, 0.6, 0.3)}
    results |= {f"int8 {share}": load_with(int8, share) for share in (2.0, 0.6, 0.3)}
    mesh = MeshArgs(data=1, fsdp=2, tensor=4)
    stored, made = (Model.load(folder, weights="int8", mesh=mesh).params for folder in (int8, plain))
    results["arrays"] = len(jax.tree.leaves(made))
    results["arrays that are the same"] = jax.tree.leaves(jax.tree.map(lies_alike, stored, made))
    try:
        load_with(plain, 0.1)
    except Exception as error:
        results["refused"] = str(error)
    print(json.dumps(results))
