"""Each row of docs/families.md: a tiny model with the keys of its published config.json, against transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")

import llama_jax  # noqa: E402
from llama_jax.config import MeshArgs, SampleArgs  # noqa: E402
from llama_jax.convert.layout import from_ours, tensors_of  # noqa: E402
from llama_jax.data import open_tokens  # noqa: E402
from llama_jax.data.batches import train_batches  # noqa: E402
from llama_jax.errors import UserError  # noqa: E402
from llama_jax.foreign.config_json import read_config  # noqa: E402
from llama_jax.foreign.family import family_of  # noqa: E402
from llama_jax.ops.quantize import Matrix  # noqa: E402
from llama_jax.tokenizer import Tokenizer  # noqa: E402
from llama_jax.training.command import read_command  # noqa: E402
from llama_jax.training.loop import train  # noqa: E402
from tests.conftest import TEXT  # noqa: E402
from tests.convert.test_convert import read_safetensors, run  # noqa: E402
from tests.eight_devices import run_on_eight_devices  # noqa: E402
from tests.families import (  # noqa: E402
    FAMILIES,
    POSITIONS,
    random_ids,
    transformers_logits,
    transformers_model,
    write_model,
)

# What takes long is tried on these: each kind of scaling, and each constant, once.
SOME = (
    "LLaMA 3.2 1B", "YaRN with all keys", "dynamic scaling", "heads of their own size", "biases everywhere", "Mistral 7B v0.1",
)  # fmt: skip
QUICK = ("LLaMA 3.1", "biases everywhere")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def converted(name: str, tokenizer: Tokenizer, place: Path) -> tuple[Any, Any]:
    """Ours and theirs."""
    folder = write_model(place / "hf", name, tokenizer)
    run(input=folder, output=place / "ours")
    return llama_jax.load(str(place / "ours")), transformers_model(folder)


NAMES = {
    "LLaMA 2": "LLaMA 2", "LLaMA 2 70B": "LLaMA 2", "Code Llama": "Code Llama", "TinyLlama": "LLaMA 2", "LLaMA 3": "LLaMA 3",
    "LLaMA 3.1": "LLaMA 3.1", "LLaMA 3.1 by transformers 5": "LLaMA 3.1", "LLaMA 3.2 1B": "LLaMA 3.2", "LLaMA 3.2 3B": "LLaMA 3.2",
    "LLaMA 3.3": "LLaMA 3.1 or 3.3", "Mistral 7B v0.1": "Mistral", "Mistral 7B v0.3": "Mistral",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_published_configuration_is_named_also_by_its_arguments_alone(name: str) -> None:
    config = read_config(FAMILIES[name], Path("config.json"), 0)
    for found in (family_of(config.args, "config.json", config.kind), family_of(config.args, "model.json")):
        assert found.startswith(f"{NAMES[name]}: "), found
        assert ("tied embeddings" in found) == ("3.2" in name) and ("window 4,096" in found) == ("v0.1" in name)


@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours, theirs = converted(name, small_tokenizer, tmp_path)
    ids = random_ids(1, min(POSITIONS, ours.args.max_seq_len), small_tokenizer.vocab_size)
    found, expected = np.asarray(ours.logits(ids)), transformers_logits(theirs, ids)
    assert np.std(expected) > 0.5
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("name", ALL)
def test_a_family_is_written_back_to_the_bit(
    name: str, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "hf", name, small_tokenizer, "bfloat16")
    run(input=folder, output=tmp_path / "ours")
    first, second = capsys.readouterr().out.splitlines()[:2]
    known = next((known for known in ("Mistral", "Code Llama") if name.startswith(known)), "LLaMA")
    assert first.startswith(f"    family  {known}") and ("tied embeddings" in first) == ("3.2" in name)
    assert ("window 256" in first) == (name == "Mistral 7B v0.1")
    assert "(config.json)" in first and second.startswith("decided by  config.json")
    run(input=tmp_path / "ours", output=tmp_path / "back", to="huggingface")
    assert read_safetensors(tmp_path / "back") == read_safetensors(folder)
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / place) for place in ("hf", "back"))
    for key in (
        "rope_parameters",
        "head_dim",
        "intermediate_size",
        "attention_bias",
        "mlp_bias",
        "rms_norm_eps",
        "tie_word_embeddings",
        "sliding_window",
    ):
        # transformers' Mistral has no biases, and its LLaMA no window.
        default = None if key == "sliding_window" else False
        here, there = getattr(before, key, default), getattr(after, key, default)
        if key == "rope_parameters":
            here, there = ({k: v for k, v in x.items() if k not in ("type", "finetuned")} for x in (here, there))
        assert here == there, key
    run(input=tmp_path / "back", output=tmp_path / "again")
    models = [(tmp_path / place / "model" / "model.json").read_text() for place in ("ours", "again")]
    assert models[0] == models[1]
    output = capsys.readouterr().out
    assert "another rope_scaling" not in output


def test_metas_layout_takes_what_its_code_has_and_refuses_the_rest(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, name in enumerate(("LLaMA 3", "heads of their own size", "biases in attention", "YaRN of LLaMA 2")):
        place = tmp_path / str(number)
        place.mkdir()
        folder = write_model(place / "hf", name, small_tokenizer)
        run(input=folder, output=place / "ours")
        if name == "LLaMA 3":
            run(input=place / "ours", output=place / "meta", to="meta")
            run(input=place / "meta", output=place / "again", max_seq_len=8192)
            assert json.loads((place / "again" / "model" / "model.json").read_text()) == json.loads(
                (place / "ours" / "model" / "model.json").read_text()
            )
            run(input=place / "again", output=place / "back", to="huggingface")
            assert read_safetensors(place / "back") == read_safetensors(folder)
        else:
            with pytest.raises(UserError, match=r"--to meta: .*--to huggingface"):
                run(input=place / "ours", output=place / "meta", to="meta")
            assert not (place / "meta").exists()


GREEDY = SampleArgs(temperature=0.0, max_new_tokens=60)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [20, 200], ids=["a short prompt", "a prompt beyond the original context"])
def test_dynamic_scaling_generates_what_transformers_generates(
    prompt: int, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "hf", "dynamic scaling", small_tokenizer)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(table | {"max_position_embeddings": 50, "rope_scaling": {"type": "dynamic", "factor": 8.0}})
    )
    run(input=folder, output=tmp_path / "ours")
    ours = llama_jax.load(str(tmp_path / "ours"))
    texts = [
        small_tokenizer.decode(random_ids(1, n, small_tokenizer.vocab_size, n)[0].tolist())
        for n in (prompt, prompt // 2)
    ]
    for exact in (False, True):
        model = llama_jax.load(str(tmp_path / "ours"), exact=True) if exact else ours
        completions = model.generate(texts, GREEDY)
        for text, completion in zip(texts, completions, strict=True):
            ids = small_tokenizer.encode(text)
            expected = transformers_model(folder).generate(  # a fresh one, since it remembers longer texts
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), max_new_tokens=60, do_sample=False, pad_token_id=0
            )  # fmt: skip
            found = [*ids, *completion.token_ids]
            assert found == expected[0].tolist()[: len(found)]
    guessed = llama_jax.load(str(tmp_path / "ours"), draft="lookup", draft_tokens=3).generate(texts, GREEDY)
    assert [c.token_ids for c in guessed] == [c.token_ids for c in ours.generate(texts, GREEDY)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_int4_matrices_and_plain_biases_give_the_logits_of_these_weights(
    name: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Transformers computes with the weights that our integers and scales stand for."""
    _, theirs = converted(name, small_tokenizer, tmp_path)
    run(input=tmp_path / "hf", output=tmp_path / "int4", weights="int4")
    ours = llama_jax.load(str(tmp_path / "int4"))
    if ours.args.tie_embeddings:  # of which the output matrix alone is quantized
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())
    state = theirs.state_dict()
    for tensor in tensors_of(dataclasses.replace(ours.args, tie_embeddings=False)):
        for layer in range(ours.args.n_layers if tensor.layered else 1):
            leaf = ours.serving
            for key in tensor.name.split("/"):
                leaf = leaf[key][layer] if key == "layers" else leaf[key]
            assert isinstance(leaf, Matrix) == tensor.multiplied
            values = np.asarray(leaf.dequantized() if isinstance(leaf, Matrix) else leaf, np.float32)
            rows = from_ours(tensor, values.reshape(tensor.sizes(ours.args)))
            state[tensor.huggingface.format(layer)].copy_(torch.from_numpy(np.array(rows)))
    ids = random_ids(1, POSITIONS, small_tokenizer.vocab_size)
    assert np.abs(np.asarray(ours.logits(ids)) - transformers_logits(theirs, ids)).max() < 1e-4


STEPS, ROWS, LENGTH, RATE = 20, 8, 64, 1e-3


def losses_of_training(checkpoint: Path, place: Path, *flags: str) -> list[float]:
    """The losses of train.py --train.init-from."""
    (place / "text.txt").write_text(TEXT * 20)
    argv = (
        f"--train.init-from {checkpoint} --data.filepath {place / 'text.txt'} --train.save-dir {place / 'run'} "
        f"--train.max-steps {STEPS} --train.batch-size {ROWS} --model.max-seq-len {LENGTH} --train.lr {RATE} --train.warmup-steps 1 "
        f"--train.min-lr-ratio 1 --train.log-interval 1 --train.eval-interval 100 --train.save-interval 100"
    )
    config, notes = read_command([*argv.split(), *flags])
    train(config, notes=notes)
    lines = map(json.loads, (place / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


def losses_of_torch(model: Any, tokens: Path) -> list[float]:
    """The losses of transformers' model, trained by torch.optim.AdamW on the same batches."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-5)
    losses = []
    for batch in train_batches(open_tokens(tokens).train, ROWS, LENGTH, 0, 0, STEPS):
        logits = model(torch.tensor(batch.inputs).long()).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(batch.targets).long().flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_twenty_steps_from_a_checkpoint_give_the_losses_of_torch(
    name: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "hf", name, small_tokenizer)
    run(input=folder, output=tmp_path / "ours")
    found = losses_of_training(tmp_path / "ours", tmp_path)
    expected = losses_of_torch(transformers_model(folder).train(), tmp_path / "run" / "tokens")
    assert len(found) == STEPS and expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_many_devices_give_the_numbers_of_one(name: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours, theirs = converted(name, small_tokenizer, tmp_path)
    (tmp_path / "many").mkdir()
    found = run_on_eight_devices("tests.test_families", str(tmp_path))
    ids = random_ids(2, 300, small_tokenizer.vocab_size)
    assert np.abs(np.asarray(found["logits"]) - transformers_logits(theirs, ids)[:, -1]).max() < 1e-4
    assert np.abs(np.asarray(found["int4"]) - np.asarray(found["int4 of one"])).max() < 1e-4
    assert found["ids"] == [c.token_ids for c in ours.generate(["Once upon", "The owl"], GREEDY)]
    one = losses_of_training(tmp_path / "ours", tmp_path)
    np.testing.assert_allclose(found["losses"], one, rtol=1e-5)


def main(place: Path) -> None:
    """What the last test compares: on eight devices."""
    mesh, checkpoint = MeshArgs(data=1, fsdp=4, tensor=2), str(place / "ours")
    model = llama_jax.load(checkpoint, mesh=mesh)
    ids = random_ids(2, 300, model.args.vocab_size)
    alone = llama_jax.load(checkpoint, weights="int4")
    found = {
        "logits": np.asarray(model.logits(ids))[:, -1].tolist(),
        "int4": np.asarray(llama_jax.load(checkpoint, weights="int4", mesh=mesh).logits(ids))[:, -1].tolist(),
        "int4 of one": np.asarray(alone.logits(ids))[:, -1].tolist(),
        "ids": [completion.token_ids for completion in model.generate(["Once upon", "The owl"], GREEDY)],
        "losses": losses_of_training(
            place / "ours", place / "many", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.sequence", "2"
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
