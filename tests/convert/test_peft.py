"""Adapters in and out: merged, and in PEFT's layout, with PEFT itself as the reference."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")
peft = pytest.importorskip("peft", reason="adapters of PEFT need peft, which the test extra brings for Python 3.11")

import jax  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import llama_jax  # noqa: E402
from llama_jax.adapters import adapter_shapes  # noqa: E402
from llama_jax.chat.named import NAMED  # noqa: E402
from llama_jax.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from llama_jax.config import ModelArgs, TrainArgs  # noqa: E402
from llama_jax.convert.peft import KEYS, factors_of, peft_name, save_adapter  # noqa: E402
from llama_jax.data.batches import Batch  # noqa: E402
from llama_jax.devices.sharding import make_mesh, parameter_shapes  # noqa: E402
from llama_jax.errors import UserError  # noqa: E402
from llama_jax.generation.loading import load_frozen  # noqa: E402
from llama_jax.lora_args import LoraArgs  # noqa: E402
from llama_jax.model import Llama  # noqa: E402
from llama_jax.tokenizer import Tokenizer  # noqa: E402
from llama_jax.training.adapting import Adapting  # noqa: E402
from llama_jax.training.rates import learning_rate  # noqa: E402
from llama_jax.training.step import compile_train_step, init_state, make_optimizer  # noqa: E402
from tests import numpy_llama  # noqa: E402
from tests.convert.test_convert import run  # noqa: E402

IDS = np.array([[1, 5, 9, 40, 33, 7, 8, 200, 12]])
LORA = LoraArgs(rank=4, alpha=6.0, targets=("wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"))
SOME = LoraArgs(rank=3, alpha=5.5, targets=("wk", "w2"), rslora=True, base_weights="int4")


@pytest.fixture(scope="module")
def root(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it with random values, and the base for transformers."""
    root = tmp_path_factory.mktemp("peft")
    args = ModelArgs(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        multiple_of=16,
        max_seq_len=64,
        vocab_size=small_tokenizer.vocab_size,
    )
    params = numpy_llama.random_params(parameter_shapes(Llama(args)))
    save_checkpoint(root / "base", jax.tree.map(jax.numpy.asarray, params), args, small_tokenizer)
    for name, lora in (("tuned", LORA), ("some", SOME)):
        (root / name).mkdir()
        save_adapter(root / name, Checkpoint.find(root / "base"), lora, random_factors(args, lora))
    run(input=str(root / "base"), output=str(root / "hf"), to="huggingface")
    return root


def random_factors(args: ModelArgs, lora: LoraArgs) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jax.numpy.asarray(rng.normal(0, 0.1, s.shape), np.float32), adapter_shapes(args, lora)
    )


def ours(path: Path, **how: Any) -> np.ndarray:
    return np.asarray(llama_jax.load(str(path), **how).logits(IDS))


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def base_in_torch(root: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(root / "hf", dtype=torch.float32)


@pytest.mark.parametrize("name", ["tuned", "some"])
def test_the_merged_model_has_the_logits_of_the_adapted_one(name: str, root: Path, tmp_path: Path) -> None:
    run(input=str(root / name), output=str(tmp_path / "merged"))
    merged = Checkpoint.find(tmp_path / "merged")
    assert merged.adapter is None and merged.weights == "auto"
    np.testing.assert_allclose(ours(tmp_path / "merged"), ours(root / name), atol=1e-5)
    assert np.abs(ours(root / name) - ours(root / "base")).max() > 1e-2
    run(input=str(root / name), output=str(tmp_path / "hf"), to="huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    np.testing.assert_allclose(theirs(model), ours(root / name), atol=1e-4)


def test_an_adapter_of_a_quantized_checkpoint_is_merged_into_its_values(root: Path, tmp_path: Path) -> None:
    run(input=str(root / "base"), output=str(tmp_path / "int8"), weights="int8")
    base, adapter = Checkpoint.find(tmp_path / "int8"), tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, base, LORA, random_factors(base.args, LORA))
    run(input=str(adapter), output=str(tmp_path / "merged"))
    np.testing.assert_allclose(ours(tmp_path / "merged"), ours(adapter), atol=1e-5)


def test_peft_loads_what_is_written_and_has_the_same_logits(root: Path, tmp_path: Path) -> None:
    for name, weights in (("tuned", {}), ("some", {"weights": "auto"})):
        run(input=str(root / name), output=str(tmp_path / name), to="peft")
        model = peft.PeftModel.from_pretrained(base_in_torch(root), str(tmp_path / name))
        if name == "tuned":
            np.testing.assert_allclose(theirs(model), ours(root / name, **weights), atol=1e-4)
        loaded = {key for key in model.state_dict() if "lora_" in key}
        lora = LORA if name == "tuned" else SOME
        assert len(loaded) == sum(1 if target == "output" else 2 for target in lora.targets) * 2
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha, config.use_rslora) == (lora.rank, lora.alpha, lora.rslora)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_writes_is_read_with_the_same_logits_and_back_to_the_bit(
    rslora: bool, root: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    modules = ["q_proj", "k_proj", "down_proj", "lm_head"]
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=modules, use_rslora=rslora, lora_dropout=0.1, init_lora_weights="gaussian"
    )
    model = peft.get_peft_model(base_in_torch(root), config)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = theirs(model)
    run(input=str(tmp_path / "adapter"), base=str(root / "base"), output=str(tmp_path / "tuned"))
    np.testing.assert_allclose(ours(tmp_path / "tuned"), wanted, atol=1e-4)
    assert Checkpoint.find(tmp_path / "tuned").adapter.lora.targets == ("wq", "wk", "w2", "output")  # type: ignore[union-attr]
    run(input=str(tmp_path / "tuned"), output=str(tmp_path / "back"), to="peft")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "back")]
    from safetensors.numpy import load_file

    one, other = map(load_file, files)
    assert {key for key in one if "lora_" in key} == other.keys(), "PEFT adds the base's output, which is passed over"
    assert all((one[key] == other[key]).all() for key in other)


def test_a_chat_template_goes_out_with_the_adapter_and_comes_back(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuning may have chosen a format that the base does not know."""
    base = Checkpoint.find(root / "base")
    (tmp_path / "chat").mkdir()
    chat = dataclasses.replace(base.chat, template="{{ messages }} </s>", has_none=False)
    save_adapter(tmp_path / "chat", base, LORA, random_factors(base.args, LORA), chat)
    assert not base.chat.template and Checkpoint.find(tmp_path / "chat").chat.template == chat.template
    run(input=str(tmp_path / "chat"), output=str(tmp_path / "peft"), to="peft")
    assert (tmp_path / "peft" / "chat_template.jinja").read_text() == chat.template
    capsys.readouterr()
    run(input=str(tmp_path / "peft"), base=str(root / "base"), output=str(tmp_path / "back"))
    said = capsys.readouterr().out
    assert f"a chat template of 19 characters, of {tmp_path / 'peft'}" in said and said.rstrip().endswith("back --chat")
    assert Checkpoint.find(tmp_path / "back").chat.template == chat.template
    run(input=str(tmp_path / "peft"), base=str(root / "base"), output=str(tmp_path / "other"), chat_template="llama2")
    assert Checkpoint.find(tmp_path / "other").chat.template == NAMED["llama2"].template
    run(input=str(root / "tuned"), output=str(tmp_path / "none"), to="peft")
    assert not (tmp_path / "none" / "chat_template.jinja").exists()


def test_an_exported_adapter_knows_its_base_and_says_which_one_it_is_made_for(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(input=str(root / "some"), output=str(tmp_path / "adapter"), to="peft")
    base = Checkpoint.find(root / "base")
    params = jax.tree.map(jax.numpy.asarray, numpy_llama.random_params(parameter_shapes(Llama(base.args)), seed=1))
    save_checkpoint(tmp_path / "twin", params, base.args, base.tokenizer)  # another model of the same shapes
    with pytest.raises(UserError, match=r"adapter: expected the base of this adapter, whose .*--base$") as caught:
        run(input=str(tmp_path / "adapter"), base=str(tmp_path / "twin"), output=str(tmp_path / "never"))
    assert "\n" not in str(caught.value) and not (tmp_path / "never").exists()
    # PEFT keeps no digest: what it saves fits each model of its shapes, and the one that it names is printed.
    peft.PeftModel.from_pretrained(base_in_torch(root), str(tmp_path / "adapter")).save_pretrained(tmp_path / "peft")
    run(input=str(tmp_path / "peft"), base=str(tmp_path / "twin"), output=str(tmp_path / "fits"), dry_run=True)
    assert re.search(r"base  \S*twin \(made for '.*', says adapter_config.json\)", capsys.readouterr().out)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type: expected LORA"),
    "no kind": ({"peft_type": None}, "peft_type"),
    "whole matrices": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "lora_only"}, "bias"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "scales": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "a new key": ({"use_magic": True}, "use_magic"),
    "another rank": ({"r": 5}, "expected the shape"),
    "rank 0": ({"r": 0}, "r: expected 1"),
    "no rank": ({"r": "4"}, "r: expected int"),
    "a scale that is null": ({"lora_alpha": None}, "lora_alpha: expected a number, found null"),
    "no scale": ({"lora_alpha": -1}, "alpha"),
    "dropout": ({"lora_dropout": 2.0}, "dropout"),
    "a matrix that it does not adapt": ({"target_modules": ["q_proj"]}, "target_modules: .*does not name .*k_proj"),
    "a matrix of one layer": (
        {"target_modules": r".*layers\.1\..*|lm_head"},
        "target_modules: .*does not name .*layers.0",
    ),
    "a matrix that it leaves out": ({"exclude_modules": ["v_proj"]}, "exclude_modules: .*names .*v_proj"),
    "not the output": ({"target_modules": "all-linear"}, "target_modules: .*does not name lm_head"),
    "no names": ({"target_modules": 7}, "target_modules: expected names"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_an_adapter_of_another_kind_is_refused_by_the_key(case: str, root: Path, tmp_path: Path) -> None:
    changes, words = CHANGED[case]
    run(input=str(root / "tuned"), output=str(tmp_path / "adapter"), to="peft")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words) as caught:
        run(input=str(tmp_path / "adapter"), base=str(root / "base"), output=str(tmp_path / "never"))
    assert "\n" not in str(caught.value) and str(tmp_path / "adapter") in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_the_keys_that_name_what_is_adapted_may_say_so_in_any_way(root: Path, tmp_path: Path, capsys: Any) -> None:
    run(input=str(root / "tuned"), output=str(tmp_path / "adapter"), to="peft")
    path = tmp_path / "adapter" / "adapter_config.json"
    table = json.loads(path.read_text())
    ends = [*table["target_modules"]]
    slow = "(" + "|".join(f"(.*)*{end}" for end in ends) + ")"
    for i, changes in enumerate(
        [{"target_modules": rf".*({'|'.join(ends)})"}, {"exclude_modules": ["x_proj"]}, {"target_modules": slow}]
    ):
        path.write_text(json.dumps(table | changes))
        run(input=str(tmp_path / "adapter"), base=str(root / "base"), output=str(tmp_path / f"read{i}"))
    assert capsys.readouterr().out.count("is not compared with the factors, all of which are used") == 1


def test_an_adapter_of_the_output_of_tied_embeddings_is_refused_in_words(root: Path, tmp_path: Path) -> None:
    base = Checkpoint.find(root / "base")
    args = dataclasses.replace(base.args, tie_embeddings=True)
    params = jax.tree.map(jax.numpy.asarray, numpy_llama.random_params(parameter_shapes(Llama(args))))
    save_checkpoint(tmp_path / "tied", params, args, base.tokenizer)
    run(input=str(root / "tuned"), output=str(tmp_path / "adapter"), to="peft")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(path)
    save_file(factors | {"base_model.model.lm_head.base_layer.weight": np.array(params["tok_embeddings"])}, path)
    with pytest.raises(UserError, match="the output matrix of this model is its embeddings, found output"):
        run(input=str(tmp_path / "adapter"), base=str(tmp_path / "tied"), output=str(tmp_path / "never"))


def test_tokens_beside_an_adapter_that_the_base_has_not_are_told(root: Path, tmp_path: Path, capsys: Any) -> None:
    run(input=str(root / "tuned"), output=str(tmp_path / "adapter"), to="peft")
    base = Checkpoint.find(root / "base").tokenizer
    (tmp_path / "adapter" / "tokenizer.model").write_bytes(base.model_bytes)
    run(input=str(tmp_path / "adapter"), base=str(root / "base"), output=str(tmp_path / "same"))
    assert "the tokenizer in" not in capsys.readouterr().out
    (tmp_path / "adapter" / "added_tokens.json").write_text(json.dumps({"<turn>": base.vocab_size}))
    run(input=str(tmp_path / "adapter"), base=str(root / "base"), output=str(tmp_path / "read"))
    told = capsys.readouterr().out
    assert f"has '<turn>' ({base.vocab_size}), which that of the base has not" in told and "--tokenizer" in told


def test_every_key_of_peft_is_known() -> None:
    """A later version's keys fail here, and are refused unless they are empty."""
    known = KEYS.read | KEYS.neutral.keys() | KEYS.ignored
    assert not set(peft.LoraConfig(r=4).to_dict()) - known


def test_an_adapter_without_its_base_or_of_another_one_is_refused(root: Path, tmp_path: Path) -> None:
    run(input=str(root / "tuned"), output=str(tmp_path / "adapter"), to="peft")
    adapter, never = str(tmp_path / "adapter"), str(tmp_path / "never")
    args = dataclasses.replace(Checkpoint.find(root / "base").args, n_layers=3)
    params = jax.tree.map(jax.numpy.asarray, numpy_llama.random_params(parameter_shapes(Llama(args))))
    save_checkpoint(tmp_path / "other", params, args, Checkpoint.find(root / "base").tokenizer)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"input": adapter}, r"--base: expected the checkpoint.*base"),
        ({"input": adapter, "base": str(root / "tuned")}, "--base: expected a whole model"),
        ({"input": adapter, "base": str(tmp_path / "other")}, "in each of 3 layers"),
        ({"input": adapter, "base": str(root / "base"), "to": "meta"}, "--to: expected llama-jax"),
        ({"input": adapter, "base": str(root / "base"), "weights": "int8"}, "--weights: expected none"),
        ({"input": str(root / "base"), "to": "peft"}, "--to peft: expected an adapter"),
        ({"input": str(root / "base"), "base": str(root / "base")}, "--base: expected an adapter"),
        ({"input": str(root / "tuned"), "base": str(tmp_path / "other")}, "expected the base of this adapter"),
    ]
    for fields, words in refused:
        with pytest.raises(UserError, match=words) as caught:
            run(**fields, output=never)
        assert "\n" not in str(caught.value) and not Path(never).exists()
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="expected adapter_model"):
        run(input=adapter, base=str(root / "base"), output=never)
    shutil.copytree(root / "base", tmp_path / "moved")
    run(input=str(root / "tuned"), base=str(tmp_path / "moved"), output=str(tmp_path / "merged"))


def test_fifty_steps_have_the_losses_and_the_adapters_of_torch_and_peft(root: Path, tmp_path: Path) -> None:
    """Rank 8 on all matrices, from the same adapter on the same batches."""
    steps = 50
    base = Checkpoint.find(root / "base")
    train = TrainArgs(lr=5e-3, warmup_steps=3, max_steps=steps, batch_size=4, eps=1e-6, weight_decay=0.01)
    lora = dataclasses.replace(LORA, rank=8, targets=LORA.targets[:-1])
    module, mesh, adapting = (
        Llama(base.args),
        make_mesh(llama_jax.config.MeshArgs(data=1), jax.devices()[:1]),
        Adapting(lora),
    )
    optimizer = make_optimizer(train, steps)
    state = init_state(module, optimizer, mesh, 0, None, adapting)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, base.args.vocab_size, size=(steps, 4, 25)).astype(np.int32)
    data = [Batch(t[:, :-1], t[:, 1:], np.ones((4, 24), np.float32)) for t in tokens % 40]

    (tmp_path / "first").mkdir()
    save_adapter(tmp_path / "first", base, lora, state.params)
    run(input=str(tmp_path / "first"), output=str(tmp_path / "peft"), to="peft")
    model = peft.PeftModel.from_pretrained(base_in_torch(root), str(tmp_path / "peft"), is_trainable=True)
    trained = [value for name, value in model.named_parameters() if value.requires_grad]
    torch_optimizer = torch.optim.AdamW(trained, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=0.01)
    rates, expected = learning_rate(train, steps), []
    for step, batch in enumerate(data, 1):
        for group in torch_optimizer.param_groups:
            group["lr"] = float(rates(step))
        torch_optimizer.zero_grad()
        logits = model(torch.tensor(batch.inputs).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(batch.targets).long().flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train.grad_clip)
        torch_optimizer.step()
        expected.append(loss.item())

    frozen = load_frozen(base, module, mesh, "auto")
    step = compile_train_step(module, optimizer, mesh, 1, data[0], adapting)
    losses = []
    for batch in data:
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics.loss))
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    (tmp_path / "last").mkdir()
    save_adapter(tmp_path / "last", base, lora, state.params)
    np.testing.assert_allclose(ours(tmp_path / "last"), theirs(model), atol=1e-3)
    of_name = {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}
    adapter = Checkpoint.find(tmp_path / "last")
    for name in lora.targets:
        for layer in range(base.args.n_layers):
            for factor, found in zip("AB", factors_of(adapter, name, layer), strict=True):
                expected_factor = of_name[peft_name(name, layer, factor)].detach().numpy().T
                np.testing.assert_allclose(found, expected_factor, atol=1e-4)
