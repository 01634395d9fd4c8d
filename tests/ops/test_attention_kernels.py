"""The kernels of other platforms: splash, interpreted here, equals xla; cudnn is what a GPU's program calls."""

import functools
import json
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.data.batches import Batch, PackedBatch
from llama_jax.devices.compiling import compiler_options
from llama_jax.devices.sharding import batch_sharding, make_mesh, on_mesh
from llama_jax.errors import UserError
from llama_jax.generation.decode import prefill
from llama_jax.generation.serving import generation_shapes
from llama_jax.model import Llama
from llama_jax.ops.attention import attention, choose_kernel
from llama_jax.ops.cache import KVCache
from llama_jax.train_args import AttentionKernel
from llama_jax.training.step import make_optimizer, trace_train_step
from tests.eight_devices import run_on_eight_devices
from tests.jax_internals import cudnn

ARGS = ModelArgs(dim=4096, n_heads=32, max_seq_len=4096)
MESHES = {
    "data 2 x tensor 2 x sequence 2": {"data": 2, "tensor": 2, "sequence": 2},
    "data 2 x sequence 4": {"data": 2, "sequence": 4},
}


@pytest.mark.parametrize(
    ("platform", "dtype", "changes", "shards", "kernel"),
    [
        ("cpu", jnp.float32, {}, 1, "xla"),
        ("tpu", jnp.bfloat16, {}, 1, "splash"),
        ("tpu", jnp.float32, {"n_heads": 64}, 2, "splash"),
        ("tpu", jnp.bfloat16, {"max_seq_len": 4000}, 1, "xla"),
        ("tpu", jnp.bfloat16, {"max_seq_len": 512}, 8, "xla"),
        ("cuda", jnp.bfloat16, {}, 1, "cudnn"),
        ("cuda", jnp.float32, {}, 1, "xla"),
        ("cuda", jnp.bfloat16, {}, 2, "xla"),
        ("cuda", jnp.bfloat16, {"n_heads": 16}, 1, "xla"),
        ("rocm", jnp.bfloat16, {}, 1, "xla"),
    ],
)
def test_auto_is_the_fastest_that_platform_and_shape_allow(
    platform: str, dtype: Any, changes: dict[str, int], shards: int, kernel: str
) -> None:
    args = ModelArgs(**({"dim": 4096, "n_heads": 32, "max_seq_len": 4096} | changes))
    assert choose_kernel("auto", platform, args, dtype, shards) == kernel
    assert choose_kernel("xla", platform, args, dtype, shards) == "xla"
    for other in {"splash", "cudnn"} - {kernel}:
        with pytest.raises(UserError, match=rf"^train.attention: expected .* for {other}, found {platform}") as caught:
            choose_kernel(other, platform, args, dtype, shards)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_document_mask_is_taken_by_every_kernel_and_by_cudnn_at_even_lengths() -> None:
    odd = ModelArgs(dim=4096, n_heads=32, max_seq_len=4097)
    for platform, dtype, args in (("tpu", jnp.bfloat16, ARGS), ("cuda", jnp.bfloat16, ARGS), ("cpu", jnp.float32, odd)):
        without = choose_kernel("auto", platform, args, dtype)
        assert choose_kernel("auto", platform, args, dtype, document_mask=True) == without
    assert choose_kernel("auto", "cuda", odd, jnp.bfloat16) == "cudnn"
    assert choose_kernel("auto", "cuda", odd, jnp.bfloat16, document_mask=True) == "xla"
    with pytest.raises(UserError, match=r"even number of positions .* data\.document_mask for cudnn, .* 4097"):
        choose_kernel("cudnn", "cuda", odd, jnp.bfloat16, document_mask=True)


def value_and_gradients(kernel: AttentionKernel) -> list[np.ndarray]:
    """Of a sum of squares of attention, with grouped queries and heads narrower than a TPU's lanes."""
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(4, 512, heads, 16)).astype(np.float32) for heads in (4, 2, 2)]

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(attention(*qkv, kernel=kernel) ** 2)

    return [np.asarray(x) for x in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv))]


# Where no mesh is given, several tests want the same.
on_one_device = functools.cache(value_and_gradients)


def interpreted(patch: Any) -> None:
    """Run splash's kernel without a TPU."""
    make = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
    patch.setattr(splash_attention_kernel, "make_splash_mha", make)


def test_splash_equals_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch)
    for found, wanted in zip(value_and_gradients("splash"), on_one_device("xla"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-4)


@pytest.fixture(scope="module")
def on_meshes() -> dict[str, Any]:
    return run_on_eight_devices("tests.ops.test_attention_kernels")


@pytest.mark.parametrize("kernel", ["splash", "xla"])
@pytest.mark.parametrize("mesh", MESHES)
def test_heads_and_positions_spread_over_devices_change_nothing(
    on_meshes: dict[str, Any], mesh: str, kernel: str
) -> None:
    for found, wanted in zip(on_meshes[mesh][kernel], on_one_device("xla"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-4)


def test_the_step_of_a_gpu_calls_cudnns_flash_attention_once_forward_and_once_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What JAX asks of a GPU that is there.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    args = ModelArgs(dim=128, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=32, max_seq_len=256)
    for remat in ("attention", "dots"):
        model = Llama(args, jnp.dtype(jnp.bfloat16), remat, "cudnn")  # type: ignore[arg-type]
        mesh = make_mesh(MeshArgs())
        ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=batch_sharding(mesh))
        batch = Batch(ids, ids, jax.ShapeDtypeStruct((4, 256), jnp.float32, sharding=batch_sharding(mesh)))  # type: ignore[arg-type]
        for masked, name in (
            (batch, "fmhaSoftmax"),
            (PackedBatch(*batch, ids, ids), "fmhaScaleBiasSoftmax"),  # type: ignore[arg-type]
        ):
            traced = trace_train_step(model, make_optimizer(TrainArgs(), 10), mesh, 1, masked)  # type: ignore[arg-type]
            calls = re.findall(r"custom_call @(__cudnn\S+?)\(", traced.lower(lowering_platforms=("cuda",)).as_text())
            assert sorted(calls) == [f"__cudnn${name}", f"__cudnn${name}Backward"]


@pytest.mark.parametrize("rows", [1, 4])
def test_on_a_tpu_a_prompt_is_read_by_splash(rows: int) -> None:
    args = ModelArgs(dim=256, n_layers=3, n_heads=2, vocab_size=96, multiple_of=32, max_seq_len=512)
    model, mesh = Llama(args, jnp.dtype(jnp.bfloat16), "none", "splash"), make_mesh(MeshArgs())
    params = generation_shapes(model, "auto")
    tokens = jax.ShapeDtypeStruct((rows, 256), jnp.int32)
    with on_mesh(mesh):
        cache = jax.eval_shape(lambda: KVCache.empty(args, jnp.zeros(rows, jnp.int32), 512, model.dtype))
        traced = jax.jit(prefill.__wrapped__, static_argnums=(0, 4)).trace(model, params, tokens, cache, 0)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call @tpu_custom_call" in text


def test_xla_knows_the_options_of_a_gpu_and_a_cpu_has_none() -> None:
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", client=SimpleNamespace(platform_version="cuda 12"))
    options = compiler_options(gpu)  # type: ignore[arg-type]
    assert options and not compiler_options(jax.devices()[0])
    jax.jit(jnp.sin).lower(1.0).compile(compiler_options=options)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        interpreted(patch)
        results: dict[str, Any] = {}
        for name, sizes in MESHES.items():
            with on_mesh(make_mesh(MeshArgs(**sizes))):
                results[name] = {
                    kernel: [x.tolist() for x in value_and_gradients(kernel)]  # type: ignore[arg-type]
                    for kernel in ("splash", "xla")
                }
        print(json.dumps(results))
