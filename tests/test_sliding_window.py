"""Sliding windows: a query sees the last positions alone, exactly as transformers' Mistral, wherever attention runs."""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.config import MeshArgs, ModelArgs, SampleArgs
from llama_jax.convert import ConvertArgs, convert
from llama_jax.convert.huggingface import check_config
from llama_jax.devices.sharding import make_mesh, on_mesh, parameter_shapes
from llama_jax.errors import UserError
from llama_jax.evaluate import evaluate
from llama_jax.foreign.config_json import read_config
from llama_jax.generation import Model
from llama_jax.generation.speculative import Draft
from llama_jax.model import Llama, plain_attention
from llama_jax.ops.attention import attention
from llama_jax.tokenizer import Tokenizer
from llama_jax.train_args import AttentionKernel
from llama_jax.training.flops import train_flops_per_token
from tests import numpy_llama
from tests.eight_devices import run_on_eight_devices
from tests.generation.models import build
from tests.jax_internals import cudnn
from tests.ops.test_attention_kernels import interpreted

WINDOW = 100
MESHES = {
    "data 2 x sequence 4": {"data": 2, "sequence": 4},
    "data 2 x tensor 2 x sequence 2": {"data": 2, "tensor": 2, "sequence": 2},
}
KERNELS: tuple[AttentionKernel, ...] = ("splash", "xla")
ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, multiple_of=8, max_seq_len=200, sliding_window=7
)


def value_and_gradients(kernel: AttentionKernel, window: int | None, documents: bool) -> list[np.ndarray]:
    """Of a sum of squares of attention over 512 positions, which documents may cut."""
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(4, 512, heads, 16)).astype(np.float32) for heads in (4, 2, 2)]
    segments = np.cumsum(rng.random((4, 512)) < 0.02, axis=1).astype(np.int32) if documents else None

    def loss(*qkv: jax.Array) -> jax.Array:
        attend = plain_attention if kernel == "plain" else functools.partial(attention, kernel=kernel)
        return jnp.sum(attend(*qkv, segments=segments, window=window) ** 2)

    return [np.asarray(x) for x in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*qkv))]


# Where no mesh is given, several tests want the same.
on_one_device = functools.cache(value_and_gradients)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [1, 64, WINDOW, 300, 511])
def test_xla_equals_the_plain_formula_which_differs_from_full_attention(window: int, documents: bool) -> None:
    plain = on_one_device("plain", window, documents)
    for found, wanted in zip(on_one_device("xla", window, documents), plain, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    if not documents:
        full = on_one_device("plain", None, documents)
        assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(plain, full, strict=True))


@pytest.mark.parametrize("documents", [False, True])
def test_splash_equals_xla(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreted(monkeypatch)
    wanted = on_one_device("xla", WINDOW, documents)
    for found, expected in zip(value_and_gradients("splash", WINDOW, documents), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_cudnn_gets_the_window_and_beside_documents_a_mask_that_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    q, k, v = (jax.ShapeDtypeStruct((2, 128, heads, 16), jnp.bfloat16) for heads in (4, 2, 2))
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def lengths(window: int | None, *segments: Any) -> set[str]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, *segments: jax.Array) -> jax.Array:
            return jnp.sum(attention(q, k, v, "cudnn", *segments, window=window).astype(jnp.float32))

        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v, *segments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return set(re.findall(r"sliding_window_length\W+(?:22)?\W+(\d+)", text))

    assert lengths(None) == {"0"} and lengths(7) == {"7"} and lengths(7, ids) == {"0"}
    segments = jnp.asarray(np.arange(8) // 5)[None]
    given: dict[str, Any] = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **how: given.update(how) or q)
    attention(*(jnp.zeros((1, 8, 2, 8)) for _ in range(3)), "cudnn", segments, 3)
    t, s = np.mgrid[:8, :8]
    causal = s <= t
    np.testing.assert_array_equal(given["mask"][0, 0] & causal, causal & (t - s < 3) & (t // 5 == s // 5))


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def on_meshes(request: pytest.FixtureRequest) -> list[Any]:
    """Of each mesh, kernel and choice of documents what a process with eight devices finds."""
    return run_on_eight_devices("tests.test_sliding_window", request.param)


def test_heads_and_positions_spread_over_devices_change_nothing(on_meshes: list[Any]) -> None:
    assert len(on_meshes) in (2, 8)
    for mesh, kernel, documents, results in on_meshes:
        wanted = on_one_device("xla", WINDOW, documents)
        for found, expected in zip(results, wanted, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4, err_msg=f"{mesh}, {kernel}")


def test_the_model_equals_numpy_with_every_kernel() -> None:
    params = numpy_llama.random_params(parameter_shapes(Llama(ARGS)))
    ids = np.random.default_rng(0).integers(50, size=(2, 90)).astype(np.int32)
    wanted = numpy_llama.llama(params, ids, ARGS)
    for kernel in ("plain", "xla"):
        found = Llama(ARGS, kernel=kernel).apply({"params": params}, ids)  # type: ignore[arg-type]
        np.testing.assert_allclose(np.asarray(found), wanted, atol=1e-4)


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return build(small_tokenizer, sliding_window=20, max_seq_len=512)


def by_definition(model: Model, prompt: list[int], count: int) -> list[int]:
    """The likeliest ids after a prompt, each from all logits of the sequence so far, without a cache."""
    apply = jax.jit(lambda ids: model.module.apply({"params": model.params}, ids))
    ids, size = list(prompt), len(prompt) + count
    for _ in range(count):
        found = np.array(apply(np.array([ids + [0] * (size - len(ids))])))[0, len(ids) - 1]
        found[model.tokenizer.eos_id] = -np.inf
        ids.append(int(found.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("count", [24, pytest.param(40, marks=pytest.mark.slow)])
def test_generation_over_a_cache_is_that_of_the_whole_sequence(count: int, model: Model) -> None:
    """Alone and beside longer rows, guessed, exactly, and of prompts longer and shorter than the window."""
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(3, model.args.vocab_size, size=n).tolist()] for n in (5, 19, 70)]
    args = SampleArgs(temperature=0.0, max_new_tokens=count, logit_bias={model.tokenizer.eos_id: -np.inf})
    wanted = [by_definition(model, prompt, count) for prompt in prompts]
    exactly = dataclasses.replace(model, module=model.module.clone(exact_rows=16))
    ways = {
        "together": model,
        "looked up": dataclasses.replace(model, draft=Draft(4)),
        "by a draft": dataclasses.replace(model, draft=Draft(3, model.module, model.serving)),
        "exact": exactly,
        "exact, looked up": dataclasses.replace(exactly, draft=Draft(4)),
    }
    for name, way in list(ways.items())[: 2 if count < 40 else None]:
        assert [c.token_ids for c in way.generate_ids(prompts, args)] == wanted, name
    assert model.generate_ids(prompts[:1], args)[0].token_ids == wanted[0]
    full = dataclasses.replace(model.args, sliding_window=None)
    other = dataclasses.replace(model, args=full, module=Llama(full))
    assert [c.token_ids for c in other.generate_ids(prompts, args)] != wanted


def test_exact_generation_has_the_same_bits_alone_and_together(model: Model) -> None:
    exactly = dataclasses.replace(model, module=model.module.clone(exact_rows=16))
    prompts = [[1, *range(5, 5 + n)] for n in (3, 60, 25)]
    args = SampleArgs(temperature=0.8, max_new_tokens=24, logit_bias={model.tokenizer.eos_id: -np.inf})
    together = exactly.generate_ids(prompts, args)
    alone = [exactly.generate_ids([prompt], args)[0] for prompt in prompts]
    assert [(c.token_ids, c.logprobs) for c in together] == [(c.token_ids, c.logprobs) for c in alone]


def test_evaluation_by_windows_and_token_by_token_agree(model: Model, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The fox saw the river. An owl saw the fox, and 12 boats.\n" * 4)
    whole = evaluate(model, tmp_path / "text.txt", window=120)["loss"]
    rounded = dataclasses.replace(model, cache_dtype=jnp.float32)
    assert evaluate(rounded, tmp_path / "text.txt", window=120)["loss"] == pytest.approx(whole, abs=1e-4)
    full = dataclasses.replace(model, module=Llama(dataclasses.replace(model.args, sliding_window=None)))
    assert abs(evaluate(full, tmp_path / "text.txt", window=120)["loss"] - whole) > 1e-3


def test_a_window_no_shorter_than_the_context_has_no_effect() -> None:
    for window in (None, 200, 4096):
        assert dataclasses.replace(ARGS, sliding_window=window).window is None
    assert dataclasses.replace(ARGS, sliding_window=199).window == 199


def test_flops_count_the_pairs_that_are_seen() -> None:
    full, windowed = (dataclasses.replace(ARGS, sliding_window=window) for window in (None, 7))
    pairs = sum(min(t + 1, 7) for t in range(200)) / 200
    saved = 12 * ARGS.n_layers * ARGS.dim * (100 - pairs)
    assert train_flops_per_token(full) - train_flops_per_token(windowed) == pytest.approx(saved, rel=0.01)


def run(**fields: Any) -> None:
    convert(ConvertArgs(**{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}))


def test_the_window_is_the_files_and_transformers_default_where_there_is_no_key() -> None:
    from tests.published import MISTRAL_01, MISTRAL_03

    without = {key: value for key, value in MISTRAL_01.items() if key != "sliding_window"}
    for table, window in (
        (MISTRAL_01, 4096),
        (without, 4096),
        (MISTRAL_03, None),
        (without | {"sliding_window": 9}, 9),
    ):
        config = read_config(table, Path("config.json"), 0)
        assert config.args.sliding_window == window and config.kind == "mistral" and not config.unknown
    heads = {key: value for key, value in MISTRAL_01.items() if key != "num_key_value_heads"}
    assert read_config(heads, Path("config.json"), 0).args.kv_heads == 8
    assert read_config(heads | {"num_key_value_heads": None}, Path("config.json"), 0).args.kv_heads == 32


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": "4096"}, "sliding_window"),
        ({"use_sliding_window": False}, "use_sliding_window"),
        ({"sliding_window": None, "use_sliding_window": True}, "use_sliding_window"),
        ({"max_window_layers": 28}, "max_window_layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": None, "layer_types": ["sliding_attention"]}, "layer_types"),
        ({"model_type": "llama"}, "sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
    ids=str,
)
def test_windows_that_layers_do_not_share_or_keys_contradict_are_refused(changes: dict[str, Any], key: str) -> None:
    from tests.published import MISTRAL_01

    with pytest.raises(UserError, match=rf"^config\.json: {key}: expected .* found "):
        read_config(MISTRAL_01 | changes, Path("config.json"), 0)


DEFAULT = pytest.param({"sliding_window": ...}, marks=pytest.mark.slow)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": None}, DEFAULT], ids=str)
def test_mistral_says_what_transformers_says_and_comes_back_to_the_bit(
    changes: dict[str, Any], small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """v0.1 with a tiny window; a file without the key, whose window is 4,096; v0.3, which has none."""
    from tests import published

    key = changes.get("sliding_window", 16)
    table = published.MISTRAL_03 if key is None else {k: v for k, v in published.MISTRAL_01.items()}
    sizes: dict[str, Any] = {"sliding_window": 16} if key == 16 else {}
    if key is ...:
        table = {name: value for name, value in table.items() if name != "sliding_window"}
        sizes = {"max_position_embeddings": 8192}
    reference = published.tiny(tmp_path / "hf", table, small_tokenizer, **sizes)
    run(input=tmp_path / "hf", output=tmp_path / "ours")
    ours = llama_jax.load(str(tmp_path / "ours"))
    assert ours.args.sliding_window == {16: 16, ...: 4096, None: None}[key]
    ids = np.random.default_rng(0).integers(3, small_tokenizer.vocab_size, (1, 4200 if key is ... else 600))
    published.check_says_the_same(ours, reference, ids)

    run(input=tmp_path / "ours", output=tmp_path / "back", to="huggingface")
    back = published.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(back).__name__ == ("LlamaForCausalLM" if key is None else "MistralForCausalLM")
    np.testing.assert_array_equal(published.logits(back, ids[:, :600]), published.logits(reference, ids[:, :600]))
    run(input=tmp_path / "back", output=tmp_path / "again")
    assert llama_jax.load(str(tmp_path / "again")).args == ours.args


def test_metas_layout_which_has_no_window_is_refused(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama_jax.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "ours", model.params, model.args, model.tokenizer)
    for dry_run in (True, False):
        with pytest.raises(
            UserError, match=r"--to meta: sliding_window: expected none, or .* 512 .* found 20; .*--to huggingface"
        ):
            run(input=tmp_path / "ours", output=tmp_path / "meta", to="meta", dry_run=dry_run)
    assert not (tmp_path / "meta").exists()
    short = dataclasses.replace(model.args, max_seq_len=20)  # the context is the window
    save_checkpoint(tmp_path / "short", model.params, short, model.tokenizer)
    run(input=tmp_path / "short", output=tmp_path / "meta", to="meta")
    assert "window 20" in capsys.readouterr().out


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_window_beside_biases_which_no_model_of_transformers_has_is_refused(bias: str) -> None:
    check_config(ARGS)
    with pytest.raises(UserError, match=rf"--to huggingface: {bias}: expected none beside sliding_window 7"):
        check_config(dataclasses.replace(ARGS, **{bias: True}))


def test_twenty_steps_give_the_losses_of_transformers_in_torch(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tests import published

    reference = published.tiny(tmp_path / "hf", published.MISTRAL_01, small_tokenizer, sliding_window=5)
    run(input=tmp_path / "hf", output=tmp_path / "ours", max_seq_len=48)
    losses, wanted = published.train_both(reference, tmp_path / "ours", steps=20)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        interpreted(patch)
        results = []
        every = sys.argv[1] == "all"
        for name, sizes in list(MESHES.items())[: None if every else 1]:
            with on_mesh(make_mesh(MeshArgs(**sizes))):
                for kernel in KERNELS:
                    for documents in (False, True) if every else (True,):
                        found = value_and_gradients(kernel, WINDOW, documents)
                        results.append((name, kernel, documents, [x.tolist() for x in found]))
        print(json.dumps(results))
