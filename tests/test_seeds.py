"""A seed gives the same numbers whatever the settings of JAX are, and by default those of jax.random.key."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.adapters import init_adapter, row_keys
from llama_jax.config import MeshArgs, ModelArgs, SampleArgs, TrainArgs
from llama_jax.devices.sharding import make_mesh
from llama_jax.errors import UserError
from llama_jax.generation.sampling import make_sampler, sample
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.seeds import random_key
from llama_jax.training.step import init_state, make_optimizer
from tests.commands import ROOT

MODEL = ModelArgs(dim=8, n_layers=2, n_heads=2, multiple_of=8, vocab_size=16, max_seq_len=16)
# Settings of a user who has other random numbers in the same process, or in the environment.
SETTINGS = [
    ("jax_default_prng_impl", "rbg"),
    ("jax_default_prng_impl", "unsafe_rbg"),
    ("jax_threefry_partitionable", False),
    ("jax_random_seed_offset", 7),
    ("jax_enable_x64", True),
]


@contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def drawn(key: jax.Array) -> list[np.ndarray]:
    """Numbers of every kind that the package draws."""
    keys = jax.random.split(key, 3)
    found = [jax.random.bits(key, (2, 3), jnp.uint32), jax.random.uniform(key, (5,), jnp.float32), keys]
    found += [jax.random.fold_in(key, 4), jax.vmap(lambda k: jax.random.normal(k, (3,), jnp.float32))(keys)]
    found += [jax.random.bernoulli(key, np.float32(0.4), (9,))]
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in found]


def of_the_package() -> Any:
    """First parameters, those of an adapter, the keys of dropout, and sampled tokens."""
    optimizer = make_optimizer(TrainArgs(), 10)
    mesh = make_mesh(MeshArgs(data=1), jax.devices()[:1])
    rows = [([1], SampleArgs(temperature=1.0, top_p=1.0, seed=seed), 0) for seed in range(8)]
    ids, _, _ = jax.jit(sample)(make_sampler(rows, 50), jnp.zeros((8, 50), jnp.float32), jnp.zeros(8, jnp.int32))
    keys = jax.random.key_data(row_keys(3, jnp.int32(5), jnp.arange(2, dtype=jnp.int32)))
    return (
        init_state(Llama(MODEL), optimizer, mesh, 3).params,
        init_adapter(MODEL, LoraArgs(rank=2), 3),
        keys,
        ids,
    )


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_a_key_is_that_of_jax_by_default(seed: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, drawn(random_key(seed)), drawn(jax.random.key(seed)))


@pytest.mark.parametrize("name, value", SETTINGS, ids=str)
@pytest.mark.parametrize("run", [jax.jit, lambda f: f], ids=["compiled", "plain"])
def test_numbers_of_a_key_do_not_depend_on_settings(name: str, value: Any, run: Any) -> None:
    def numbers(seed: jax.Array) -> jax.Array:
        return jax.random.uniform(random_key(seed), (3, 5), jnp.float32)

    wanted, seed = drawn(random_key(3)), np.uint32(3)
    of_jit = run(numbers)(seed)
    with setting(name, value):
        jax.tree.map(np.testing.assert_array_equal, drawn(random_key(3)), wanted)
        np.testing.assert_array_equal(run(numbers)(seed), of_jit)


@pytest.fixture(scope="module")
def usual() -> Any:
    return jax.tree.map(np.asarray, of_the_package())


@pytest.mark.parametrize("name, value", SETTINGS, ids=str)
def test_a_seed_is_the_same_model_adapter_and_text_whatever_the_settings(name: str, value: Any, usual: Any) -> None:
    with setting(name, value):
        found = jax.tree.map(np.asarray, of_the_package())
    jax.tree.map(np.testing.assert_array_equal, found, usual)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(usual)]


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "0", None, True, np.int64(-1), np.float32(3), jnp.int32(3)], ids=repr)
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(UserError, match=r"^seed: expected .*, found "):
        random_key(seed)


def test_every_key_of_the_package_is_made_by_random_key() -> None:
    makers = {"key", "PRNGKey", "wrap_key_data", "random_seed"}
    found = set()
    for path in sorted((ROOT / "llama_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in makers and ast.unparse(node.value).endswith("random"):
                found.add((path.name, node.attr))
    assert found == {("seeds.py", "wrap_key_data")}
