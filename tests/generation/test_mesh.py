"""Generation over a mesh says what one device says: heads over "tensor", rows over "data"."""

import dataclasses
import itertools
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import MeshArgs, SampleArgs
from llama_jax.devices.sharding import make_mesh, on_mesh, parameter_shardings, spec
from llama_jax.generation import Model
from llama_jax.generation.serving import for_generation
from llama_jax.ops.linear import linear
from llama_jax.ops.quantize import flat, quantize
from llama_jax.tokenizer import train_tokenizer
from tests.eight_devices import run_on_eight_devices
from tests.generation.models import decode, never_ending, prompts_of_lengths

MESHES = {
    "data 2 x tensor 4": MeshArgs(data=2, tensor=4),
    "tensor 8": MeshArgs(data=1, tensor=8),
    "data 8": MeshArgs(data=8),
    "fsdp 2 x tensor 4": MeshArgs(data=1, fsdp=2, tensor=4),
}
LENGTHS = [1, 7, 70, 30, 16]  # five rows, which no mesh here divides
GREEDY, SAMPLED = SampleArgs(temperature=0.0), SampleArgs(temperature=1.0, seed=3)


OPTIONS = [
    SampleArgs(
        temperature=1.0, seed=3, max_new_tokens=12, logprobs=2, min_new_tokens=5, stop_token_ids=(9,), echo=True
    ),
    SampleArgs(temperature=1.0, seed=4, max_new_tokens=30, json_schema='{"enum": ["fox", 12, [null]]}'),
    SampleArgs(temperature=1.0, seed=5, max_new_tokens=12),
]
# The mesh with rows over some devices and the vocabulary over others, where the options are tried; and the rest.
ASKED = {"few": ["data 2 x tensor 4"], "rest": ["tensor 8", "data 8", "fsdp 2 x tensor 4"]}
SHARDS = {"data 2 x tensor 4": [64, 16], "tensor 8": [64, 8], "fsdp 2 x tensor 4": [32, 16]}


def with_options(model: Model) -> list[Any]:
    """What completions with options say."""
    done = model.generate_ids(prompts_of_lengths(model, [5, 17, 3]), OPTIONS)
    return [[c.token_ids, c.text, [[a.id for a in top] for top in c.top_logprobs], c.prompt_logprobs[1:]] for c in done]


def collectives(kind: str) -> list[str]:
    """Of one row's product with a matrix whose inputs lie over eight devices."""
    mesh = make_mesh(MeshArgs(data=1, tensor=8))
    matrix = flat(jnp.ones((256, 64)), 1) if kind == "auto" else quantize(jnp.ones((256, 64)), 1, "int8")
    values = jax.device_put(matrix.values, jax.NamedSharding(mesh, spec("mlp", "embed")))
    x = jax.device_put(jnp.ones((1, 1, 256)), jax.NamedSharding(mesh, spec(None, None, "mlp")))
    with on_mesh(mesh):
        product = jax.jit(lambda x, w: linear("BTF,FD->BTD", x, w))
        text = product.lower(x, matrix.replace(values=values)).compile().as_text()
    return sorted(set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)))


def main(asked: str) -> None:
    """Print, by mesh ("one device" first), what greedy, sampled and quantized generation say; and the collectives of a product."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["The owl saw the fox by the river."] * 9, 280, Path(folder) / "t.model")
        model = never_ending(tokenizer, dim=64, n_heads=8, n_kv_heads=8, multiple_of=64, max_seq_len=256)
        prompts = prompts_of_lengths(model, LENGTHS)
        found: dict[str, Any] = {}
        for name in ["one device", *ASKED[asked]]:
            mesh = make_mesh(
                MESHES.get(name, MeshArgs(data=1)), jax.devices()[:1] if name == "one device" else jax.devices()
            )
            params = jax.device_put(model.params, parameter_shardings(model.module, mesh))
            found[name] = {}
            for weights in ("auto", "int8"):
                served = for_generation(params, weights)
                for kind, sample in {"greedy": GREEDY, "sampled": SAMPLED}.items():
                    ids, logprobs = decode(model, prompts, sample, 24, params=served)
                    found[name][f"{kind} {weights}"] = ids.tolist(), logprobs.tolist()
            if asked == "few":
                found[name]["options"] = with_options(dataclasses.replace(model, params=for_generation(params)))
            wq = served["layers"][0]["attention"]["wq"]
            found[name]["shard"] = wq.values.addressable_shards[0].data.shape
        found["collectives"] = {kind: collectives(kind) for kind in ("auto", "int8")}
    print(json.dumps(found))


@pytest.fixture(scope="module", params=["few", pytest.param("rest", marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest) -> Any:
    return run_on_eight_devices("tests.generation.test_mesh", request.param)


def meshes_of(found: Any) -> list[str]:
    return [name for name in MESHES if name in found]


@pytest.mark.parametrize("kind", ["greedy auto", "sampled auto", "greedy int8", "sampled int8"])
def test_every_mesh_makes_the_tokens_of_one_device(found: Any, kind: str) -> None:
    wanted, wanted_logprobs = found["one device"][kind]
    assert meshes_of(found) in ASKED.values() and {*itertools.chain(*ASKED.values())} == MESHES.keys()
    for mesh in meshes_of(found):
        ids, logprobs = found[mesh][kind]
        assert ids == wanted, mesh
        np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4, err_msg=mesh)


@pytest.mark.parametrize("found", ["few"], indirect=True)
def test_a_mesh_knows_every_option(found: Any) -> None:
    (mesh,) = meshes_of(found)
    for one, wanted in zip(found[mesh]["options"], found["one device"]["options"], strict=True):
        assert one[:3] == wanted[:3]
        np.testing.assert_allclose(one[3], wanted[3], atol=1e-4)
    assert json.loads(found[mesh]["options"][1][1]) in ("fox", 12, [None])


def test_each_device_holds_its_part_of_a_matrix(found: Any) -> None:
    held = {mesh: found[mesh]["shard"] for mesh in meshes_of(found) if mesh in SHARDS}
    assert held and held == {mesh: SHARDS[mesh] for mesh in held}


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_a_matrix_whose_inputs_are_spread_is_multiplied_where_it_lies(found: Any, kind: str) -> None:
    assert found["collectives"][kind] == ["all-reduce"]


if __name__ == "__main__":
    main(sys.argv[1])
