"""Tied embeddings: one array that is looked up and multiplied by, in training, checkpoints, generation and other layouts."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.adapters import adapter_shapes
from llama_jax.build import count_parameters, make_model
from llama_jax.checkpoint import Checkpoint, save_checkpoint
from llama_jax.config import Config, MeshArgs, ModelArgs, SampleArgs
from llama_jax.convert import ConvertArgs, convert
from llama_jax.convert.peft import save_adapter
from llama_jax.devices.sharding import make_mesh, on_mesh, parameter_shapes, parameter_shardings
from llama_jax.evaluate import evaluate
from llama_jax.generation import Model
from llama_jax.generation.serving import for_generation, generation_shapes
from llama_jax.generation.speculative import Draft
from llama_jax.generation.stats import step_bytes
from llama_jax.lora_args import LoraArgs
from llama_jax.model import Llama
from llama_jax.ops.loss import loss_sum
from llama_jax.ops.quantize import Matrix
from llama_jax.plan.decoding import parameter_bytes
from llama_jax.plan.estimate import training_bytes
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from llama_jax.training.flops import train_flops_per_token
from tests import inside, numpy_llama
from tests.commands import SMALL, STORIES
from tests.convert.test_convert import random_weights, read_meta_folder, same_bits, write_meta_folder
from tests.devices import test_sharding
from tests.eight_devices import run_on_eight_devices
from tests.generation.models import build, decode, prompts_of_lengths

ARGS = ModelArgs(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, multiple_of=32, max_seq_len=64, tie_embeddings=True
)
GREEDY = SampleArgs(temperature=0.0, max_new_tokens=24)


def untied(params: Any) -> Any:
    """The same model with an output matrix of its own."""
    return {**params, "output": jnp.asarray(params["tok_embeddings"]).T}


def as_untied(model: Model) -> Model:
    args = dataclasses.replace(model.args, tie_embeddings=False)
    module = Llama(args, model.module.dtype, exact_rows=model.module.exact_rows)
    return dataclasses.replace(model, args=args, module=module, params=untied(model.params))


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    found = build(small_tokenizer, dim=64, multiple_of=32, tie_embeddings=True)
    # Other than those of a random model, whose logits would be largest at the token that was read.
    table = np.random.default_rng(1).normal(0, 64**-0.5, (small_tokenizer.vocab_size, 64))
    return dataclasses.replace(found, params=found.params | {"tok_embeddings": jnp.asarray(table, jnp.float32)})


def test_the_tree_has_one_array_and_the_count_counts_it_once() -> None:
    plain = dataclasses.replace(ARGS, tie_embeddings=False)
    assert "output" not in parameter_shapes(Llama(ARGS)) and "output" in parameter_shapes(Llama(plain))
    assert count_parameters(plain) - count_parameters(ARGS) == ARGS.vocab_size * ARGS.dim
    # The published size of LLaMA 3.2 1B.
    args = ModelArgs(2048, 16, 32, 8, vocab_size=128256, multiple_of=256, ffn_dim_multiplier=1.5, tie_embeddings=True)
    assert count_parameters(args) == 1_235_814_400
    assert train_flops_per_token(ARGS) == train_flops_per_token(plain), "the same products"


def test_plans_count_the_table_once_and_of_quantized_models_its_copy() -> None:
    tied, plain = (
        Config(model=dataclasses.replace(ARGS, tie_embeddings=tie), mesh=MeshArgs(data=1)) for tie in (True, False)
    )
    size = ARGS.vocab_size * ARGS.dim
    assert training_bytes(plain) - training_bytes(tied) == pytest.approx(16 * size), "with gradient and moments"
    assert parameter_bytes(plain, "auto") - parameter_bytes(tied, "auto") == 2 * size
    for kind in ("int8", "int4"):
        assert parameter_bytes(plain, kind) == parameter_bytes(tied, kind)  # type: ignore[arg-type]


def test_a_fresh_model_has_small_logits_and_the_loss_of_chance() -> None:
    """Of a wide and deep model, in which a table of N(0, 1) would give logits of a deviation of 16."""
    args = dataclasses.replace(ARGS, dim=256, n_layers=6, vocab_size=500)
    params = nn.unbox(jax.jit(Llama(args).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    assert np.std(params["tok_embeddings"]) == pytest.approx(256**-0.5, rel=0.02)
    ids = np.random.default_rng(0).integers(500, size=(8, 65)).astype(np.int32)
    loss = loss_sum(Llama(args), params, ids[:, :-1], ids[:, 1:], np.ones((8, 64), np.float32)) / (8 * 64)
    assert float(loss) == pytest.approx(math.log(500) + 0.5, abs=0.2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_those_of_the_untied_model_with_the_same_matrix(dtype: Any) -> None:
    params = numpy_llama.random_params(parameter_shapes(Llama(ARGS)))
    ids = np.random.default_rng(0).integers(96, size=(2, 30)).astype(np.int32)
    plain = Llama(dataclasses.replace(ARGS, tie_embeddings=False), dtype)
    for form in (lambda p: p, for_generation):
        found = Llama(ARGS, dtype).apply({"params": form(jax.tree.map(jnp.asarray, params))}, ids)
        wanted = plain.apply({"params": form(jax.tree.map(jnp.asarray, untied(params)))}, ids)
        np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=1e-5, atol=2e-4)
    if dtype == jnp.float32:
        np.testing.assert_allclose(np.asarray(found), numpy_llama.llama(params, ids, ARGS), rtol=1e-4, atol=1e-3)


def test_the_gradient_is_the_sum_of_both_uses() -> None:
    module, plain = make_model(ARGS, "float32"), make_model(dataclasses.replace(ARGS, tie_embeddings=False), "float32")
    params = numpy_llama.random_params(parameter_shapes(module))
    ids = np.random.default_rng(0).integers(96, size=(3, 41)).astype(np.int32)
    weights = np.random.default_rng(1).random((3, 40)).astype(np.float32)

    def loss(model: Llama, params: Any) -> jax.Array:
        return loss_sum(model.clone(loss_chunk=32), params, ids[:, :-1], ids[:, 1:], weights)

    one, found = jax.value_and_grad(lambda p: loss(module, p))(params)
    other, wanted = jax.value_and_grad(lambda p: loss(plain, p))(untied(params))
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    both = wanted["tok_embeddings"] + wanted["output"].T
    np.testing.assert_allclose(found["tok_embeddings"], both, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["norm"], wanted["norm"], rtol=1e-4, atol=1e-5)


def test_generation_holds_the_table_once_and_a_quantized_model_an_output_matrix_more(model: Model) -> None:
    table = model.params["tok_embeddings"].size
    served = for_generation(model.params)
    assert "output" not in served and served["tok_embeddings"].size == table
    for kind in ("int8", "int4"):
        held = for_generation(model.params, kind)  # type: ignore[arg-type]
        np.testing.assert_array_equal(held["tok_embeddings"], model.params["tok_embeddings"])
        wanted = for_generation(untied(model.params), kind)["output"]  # type: ignore[arg-type]
        for one, other in zip(jax.tree.leaves(held["output"]), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(one, other)
        shapes = generation_shapes(model.module, kind)  # type: ignore[arg-type]
        assert jax.tree.map(jnp.shape, held) == jax.tree.map(jnp.shape, shapes)
    # A step reads all of the table for the logits, as it reads an output matrix.
    assert step_bytes(served, 0) == step_bytes(for_generation(untied(model.params)), 0)


SLOWER = [
    pytest.param(kind, rows, marks=pytest.mark.slow)
    for kind, rows in (("int8", 0), ("auto", 16), ("int8", 16), ("int4", 16))
]


@pytest.mark.parametrize(("kind", "exact_rows"), [("auto", 0), ("int4", 0), *SLOWER])
def test_tokens_are_those_of_the_untied_model(kind: Any, exact_rows: int, model: Model) -> None:
    prompts = prompts_of_lengths(model, [3, 40, 17])
    found = dataclasses.replace(model, module=model.module.clone(exact_rows=exact_rows))
    other = as_untied(found)
    ids, logprobs = decode(found, prompts, GREEDY, 24, params=for_generation(found.params, kind))
    wanted, wanted_logprobs = decode(other, prompts, GREEDY, 24, params=for_generation(other.params, kind))
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4)


def test_exact_generation_has_the_same_bits_alone_and_guessed(model: Model) -> None:
    exactly = dataclasses.replace(model, module=model.module.clone(exact_rows=16))
    prompts = prompts_of_lengths(model, [3, 40, 17])
    together = exactly.generate_ids(prompts, GREEDY)
    guessed = dataclasses.replace(exactly, draft=Draft(3, model.module, model.serving))
    for way in ([exactly.generate_ids([p], GREEDY)[0] for p in prompts], guessed.generate_ids(prompts, GREEDY)):
        assert [(c.token_ids, c.logprobs) for c in way] == [(c.token_ids, c.logprobs) for c in together]


def run(**fields: Any) -> None:
    convert(ConvertArgs(**{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_checkpoint_is_what_loading_makes_of_the_original(kind: Any, model: Model, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain", model.params, model.args, model.tokenizer)
    run(input=tmp_path / "plain", output=tmp_path / "stored", weights=kind)
    for dtype in ("float32", "bfloat16"):
        stored = llama_jax.load(str(tmp_path / "stored"), dtype)
        made = llama_jax.load(str(tmp_path / "plain"), dtype, weights=kind)
        assert isinstance(stored.params["output"], Matrix)
        assert jax.tree.structure(stored.params) == jax.tree.structure(made.params)
        for one, other in zip(jax.tree.leaves(stored.params), jax.tree.leaves(made.params), strict=True):
            assert one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    (tmp_path / "text.txt").write_text("The fox saw the river. An owl saw the fox.\n" * 3)
    models = llama_jax.load(str(tmp_path / "stored")), llama_jax.load(str(tmp_path / "plain"), weights=kind)
    one, other = (evaluate(each, tmp_path / "text.txt", window=40) for each in models)
    plain = evaluate(llama_jax.load(str(tmp_path / "plain")), tmp_path / "text.txt", window=40)
    assert one == other and 0 < abs(one["loss"] - plain["loss"]) < 0.2


def test_models_of_hugging_face_say_what_transformers_says_and_come_back_to_the_bit(
    small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from tests import published
    from tests.convert.test_convert import read_safetensors

    reference = published.tiny(tmp_path / "hf", published.LLAMA_32_1B, small_tokenizer)
    run(input=tmp_path / "hf", output=tmp_path / "ours")
    ours = llama_jax.load(str(tmp_path / "ours"))
    assert ours.args.tie_embeddings and "output" not in ours.params
    ids = np.random.default_rng(0).integers(3, small_tokenizer.vocab_size, (1, 600))
    published.check_says_the_same(ours, reference, ids)

    run(input=tmp_path / "ours", output=tmp_path / "back", to="huggingface")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]
    found = read_safetensors(tmp_path / "back")
    assert found == read_safetensors(tmp_path / "hf") and "lm_head.weight" not in found
    back = published.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    np.testing.assert_array_equal(published.logits(back, ids), published.logits(reference, ids))


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_model_that_stores_both_is_tied_if_they_are_equal_as_in_transformers(
    differs: bool, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from tests import published

    published.tiny(tmp_path / "hf", published.LLAMA_32_1B, small_tokenizer)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += differs
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    run(input=tmp_path / "hf", output=tmp_path / "ours")
    ours = llama_jax.load(str(tmp_path / "ours"))
    assert ours.args.tie_embeddings != differs
    assert ("both are read and the embeddings are not tied" in capsys.readouterr().out) == differs
    reference = published.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(0).integers(3, small_tokenizer.vocab_size, (1, 50))
    assert np.abs(np.asarray(ours.logits(ids)) - published.logits(reference, ids)).max() < 1e-4


@pytest.mark.parametrize(("stored", "shards"), [("twice", 1), ("twice", 2), ("once", 1)])
def test_metas_files_are_tied_if_the_matrices_are_equal_and_come_back_to_the_bit(
    stored: str, shards: int, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size, max_seq_len=4096)
    weights = random_weights(dataclasses.replace(args, tie_embeddings=False), np.dtype("<f4"))
    weights["output.weight"] = weights["tok_embeddings.weight"]
    given = {name: w for name, w in weights.items() if stored == "twice" or name != "output.weight"}
    folder = write_meta_folder(tmp_path / "meta", args, given, shards, small_tokenizer)
    run(input=folder, output=tmp_path / "ours")
    assert "the embeddings are the output matrix too" in capsys.readouterr().out
    ours = llama_jax.load(str(tmp_path / "ours"))
    assert ours.args == args and "output" not in ours.params
    np.testing.assert_array_equal(ours.params["tok_embeddings"], weights["tok_embeddings.weight"])
    run(input=tmp_path / "ours", output=tmp_path / "back", to="meta", shards=shards)
    assert same_bits(read_meta_folder(tmp_path / "back"), weights)


COMMAND = ["train.py", *SMALL, *STORIES, "--model.tie-embeddings", "--model.sliding-window", "9"]


def test_a_run_of_a_tied_model_stores_one_array_and_its_moments(tmp_path: Path) -> None:
    whole = inside.run([*COMMAND, "--train.max-steps=2", "--train.save-dir", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "tied embeddings, window 9" in whole.stdout
    found = Checkpoint.find(tmp_path / "whole")
    assert found.args.tie_embeddings and found.args.sliding_window == 9 and "output" not in found.arrays("params")
    assert len([name for name in found.arrays("state") if name.endswith("tok_embeddings")]) == 2


@pytest.mark.slow
def test_a_run_of_a_tied_model_resumes_and_is_fine_tuned(tmp_path: Path) -> None:
    whole = inside.run([*COMMAND, "--train.save-dir", "whole"], tmp_path)
    assert whole.returncode == 0, whole.stderr
    for more in (["--train.max-steps=3"], []):
        done = inside.run([*COMMAND, "--train.save-dir", "parts", *more], tmp_path)
        assert done.returncode == 0, done.stderr
    one, other = (Checkpoint.find(tmp_path / name / "checkpoints" / "6") for name in ("whole", "parts"))
    arrays = one.arrays("params")
    assert "output" not in arrays and other.arrays("params").keys() == arrays.keys()
    tuned = inside.run(
        ["train.py", *SMALL[5:], *STORIES, "--train.init-from", "whole", "--train.save-dir", "tuned"], tmp_path
    )
    assert tuned.returncode == 0, tuned.stderr
    assert Checkpoint.find(tmp_path / "tuned").args == one.args


MESHES = ["one device", "fsdp 8, 2 parts", "tensor 2 x fsdp 4", "sequence 2 x data 4"]
SERVED = {
    "one device": MeshArgs(data=1),
    "data 2 x tensor 4": MeshArgs(data=2, tensor=4),
    "fsdp 2 x tensor 4": MeshArgs(data=1, fsdp=2, tensor=4),
}
FEW = ("one device", "fsdp 2 x tensor 4")


def loss_and_gradient(mesh: jax.sharding.Mesh, model: Model) -> list[Any]:
    """The loss of a batch, and its gradient by the embeddings, on a mesh."""
    ids = np.random.default_rng(0).integers(3, model.args.vocab_size, (8, 33))
    params = jax.device_put(model.params, parameter_shardings(model.module, mesh))

    def loss(params: Any) -> jax.Array:
        return loss_sum(model.module, params, ids[:, :-1], ids[:, 1:], np.ones((8, 32), np.float32))

    with on_mesh(mesh):
        found, gradients = jax.jit(jax.value_and_grad(loss))(params)
    return [float(found), np.asarray(gradients["tok_embeddings"]).tolist()]


def main(every: bool) -> None:
    """Print what training and generation of a tied model with a sliding window say on meshes of eight devices."""
    test_sharding.MODEL = dataclasses.replace(test_sharding.MODEL, tie_embeddings=True, sliding_window=11)
    test_sharding.STEPS = 5
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if every:
            found["trained"] = test_sharding.train_on(MESHES, False, Path(folder))
        tokenizer = train_tokenizer(["The owl saw the fox by the river."] * 9, 280, Path(folder) / "t.model")
        model = build(
            tokenizer, dim=64, n_heads=8, n_kv_heads=4, multiple_of=64, tie_embeddings=True, sliding_window=11
        )
        prompts = prompts_of_lengths(model, [1, 30, 16])
        for name in SERVED if every else FEW:
            mesh = make_mesh(SERVED[name], jax.devices()[:1] if name == "one device" else jax.devices())
            found[f"{name} gradient"] = loss_and_gradient(mesh, model)
            params = jax.device_put(model.params, parameter_shardings(model.module, mesh))
            for kind in ("auto", "int8") if every else ("auto",):
                served = for_generation(params, kind)  # type: ignore[arg-type]
                ids, logprobs = decode(model, prompts, GREEDY, 16, params=served)
                found[f"{name} {kind}"] = ids.tolist(), logprobs.tolist()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def on_eight() -> Any:
    return run_on_eight_devices("tests.test_tied", "all")


def test_a_merge_says_that_the_output_matrix_is_no_longer_quantized(model: Model, tmp_path: Path, capsys: Any) -> None:
    save_checkpoint(tmp_path / "base", model.params, model.args, model.tokenizer)
    ids, told = np.array([[1, 5, 9, 40, 33, 7]]), []
    for weights in ("auto", "int8"):
        adapter, merged = tmp_path / weights, tmp_path / f"{weights} merged"
        adapter.mkdir()
        lora = LoraArgs(rank=2, base_weights=weights)
        factors = jax.tree.map(lambda s: jnp.full(s.shape, 0.02), adapter_shapes(model.args, lora))
        save_adapter(adapter, Checkpoint.find(tmp_path / "base"), lora, factors)
        run(input=adapter, output=merged)
        told.append("the tied embeddings again" in capsys.readouterr().out)
        one, other = (llama_jax.load(str(path)).logits(ids) for path in (adapter, merged))
        assert bool(np.abs(one - other).max() > 1e-4) == told[-1]
    assert told == [False, True]


def test_two_meshes_of_eight_devices_say_the_same_as_one_device() -> None:
    found = run_on_eight_devices("tests.test_tied", "few")
    loss, gradient = found["one device gradient"]
    ids, logprobs = found["one device auto"]
    for name in FEW:
        assert found[f"{name} gradient"][0] == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(found[f"{name} gradient"][1], gradient, atol=1e-4 * np.abs(gradient).max())
        assert found[f"{name} auto"][0] == ids
        np.testing.assert_allclose(found[f"{name} auto"][1], logprobs, atol=1e-4)


@pytest.mark.slow
def test_training_on_eight_devices_equals_training_on_one(on_eight: Any) -> None:
    trained = on_eight["trained"]
    one = trained["one device"]
    for eight in trained.values():
        assert eight["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert eight["norms"] == pytest.approx(one["norms"], rel=1e-4)
        for name, values in one["params"].items():
            assert eight["params"][name] == pytest.approx(values, abs=2e-5), name
        assert eight["resumed"][0] == pytest.approx(one["resumed"][0], rel=1e-3)
    assert trained["tensor 2 x fsdp 4"]["shards"]["tok_embeddings"] == [48, 16]
    assert trained["tensor 2 x fsdp 4"]["moments"] < 0.13


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_every_mesh_makes_the_tokens_of_one_device(on_eight: Any, kind: str) -> None:
    wanted, wanted_logprobs = on_eight[f"one device {kind}"]
    for name in SERVED:
        ids, logprobs = on_eight[f"{name} {kind}"]
        assert ids == wanted
        np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4)


if __name__ == "__main__":
    import sys

    main(sys.argv[1] == "all")
