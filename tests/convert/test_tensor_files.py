"""Doors for weights of Hugging Face's and Mistral's: .bin files, several types in one model, consolidated.safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.convert import ConvertArgs, convert
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests.convert import hostile
from tests.convert.crafted import save as save_crafted

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=small_tokenizer.vocab_size)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
    return model


def folder_of(model: Any, folder: Path, tokenizer: Tokenizer) -> Path:
    """A folder of transformers' without weights."""
    model.config.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


def mixed(model: Any) -> dict[str, Any]:
    """The model's tensors: norms in float32, the output in float16, all others in bfloat16."""
    kinds = {"norm": torch.float32, "lm_head": torch.float16}
    return {
        name: tensor.to(next((kind for key, kind in kinds.items() if key in name), torch.bfloat16)).clone()
        for name, tensor in model.state_dict().items()
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def converted(source: Path, output: Path, **fields: Any) -> Path:
    convert(ConvertArgs(input=str(source), output=str(output), **fields))
    return output


def in_shards(folder: Path, tensors: dict[str, Any]) -> None:
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
    for file, some in files.items():
        torch.save({name: tensors[name] for name in some}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in files.items() for name in some}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [False, True])
def test_a_bin_is_what_transformers_loads_of_it(
    shards: bool, model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    if shards:
        in_shards(folder, model.state_dict())
    else:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    ids = np.random.default_rng(0).integers(3, small_tokenizer.vocab_size, (2, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    ours = llama_jax.load(str(converted(folder, tmp_path / "ours")))
    np.testing.assert_allclose(ours.logits(ids), expected, atol=1e-4)


def test_older_bins_with_tied_weights_parameters_and_tables_of_angles_are_read(
    model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model.config.tie_word_embeddings = True
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    model.config.tie_word_embeddings = False
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(tensors, folder / "pytorch_model.bin")
    ours = llama_jax.load(str(converted(folder, tmp_path / "ours")))
    np.testing.assert_array_equal(ours.params["tok_embeddings"], model.model.embed_tokens.weight.detach().numpy())


def test_safetensors_are_read_before_a_bin_and_it_is_told(
    model: Any, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    model.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not a model")
    convert(ConvertArgs(input=str(folder), dry_run=True))
    assert "model.safetensors, which transformers would load; not read: pytorch_model.bin" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["calls os.system", "many lists", "a tar file", "a pickle without a zip"])
def test_a_hostile_bin_is_refused_in_one_line(
    name: str, model: Any, small_tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, words = hostile.HOSTILE[name]
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    save_crafted(folder / "pytorch_model.bin", make())
    with pytest.raises(UserError, match=words) as caught:
        convert(ConvertArgs(input=str(folder), output=str(tmp_path / "x")))
    assert "pytorch_model.bin" in str(caught.value) and "\n" not in str(caught.value)
    assert "hacked" not in capfd.readouterr().err and not (tmp_path / "x").exists()


def test_a_bin_in_the_form_of_old_torch_is_refused_with_what_to_do(
    model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    path = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        UserError, match=r"torch before 1\.6 saved.* torch\.save\(torch\.load\(F, weights_only=True\), F\)"
    ):
        converted(folder, tmp_path / "x")
    torch.save(torch.load(path, weights_only=True), path)
    converted(folder, tmp_path / "x")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("form", ["bitsandbytes", "gptq", "int8"])
def test_quantized_matrices_are_refused_with_the_way_out_without_a_configuration_that_says_so(
    form: str, kind: str, model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder, tensors = folder_of(model, tmp_path / "hf", small_tokenizer), dict(model.state_dict())
    name = "model.layers.0.self_attn.q_proj"
    floats = tensors.pop(f"{name}.weight")
    if form == "bitsandbytes":
        tensors[f"{name}.weight"] = torch.zeros(512, 1, dtype=torch.uint8)
        tensors[f"{name}.weight.absmax"] = torch.ones(16)
        tensors[f"{name}.weight.quant_map"] = torch.ones(16)
    elif form == "gptq":
        tensors[f"{name}.qweight"] = torch.zeros(4, 32, dtype=torch.int32)
        tensors[f"{name}.scales"] = torch.ones(1, 32, dtype=torch.float16)
    else:
        tensors[f"{name}.weight"] = floats.to(torch.int8)
        tensors[f"{name}.weight_scale"] = torch.ones(32)
    save = save_file if kind == "safetensors" else torch.save
    save(tensors, folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin"))
    with pytest.raises(UserError, match=r"quantized.*take the model that it was quantized from.*--weights int8"):
        converted(folder, tmp_path / "x")


def test_shards_without_their_index_are_told(model: Any, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    in_shards(folder, model.state_dict())
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(UserError, match=r"shards of it without pytorch_model\.bin\.index\.json"):
        converted(folder, tmp_path / "x")
    in_shards(folder, model.state_dict())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match=r"expected 'pytorch_model-00002-of-00002\.bin' beside it"):
        converted(folder, tmp_path / "x")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_several_types_are_kept_and_go_back_to_the_bit(
    kind: str, model: Any, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = folder_of(model, tmp_path / "hf", small_tokenizer), mixed(model)
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours = converted(folder, tmp_path / "ours")
    said = capsys.readouterr().out
    assert (
        "types  float32 in attention_norm, ffn_norm, norm; float16 in output; bfloat16 in all others: each is kept"
        in said
    )
    from safetensors.torch import load_file

    assert same(load_file(converted(ours, tmp_path / "back", to="huggingface") / "model.safetensors"), tensors)
    meta = converted(ours, tmp_path / "meta", to="meta", shards=2)
    again = converted(converted(meta, tmp_path / "ours2"), tmp_path / "back2", to="huggingface")
    assert same(load_file(again / "model.safetensors"), tensors)
    shard = torch.load(meta / "consolidated.01.pth", weights_only=True)
    assert [shard[name].dtype for name in ("norm.weight", "output.weight", "tok_embeddings.weight")] == [
        torch.float32, torch.float16, torch.bfloat16,
    ]  # fmt: skip
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    found = llama_jax.load(str(ours), compute_dtype="float32")
    np.testing.assert_array_equal(found.params["norm"], wide["model.norm.weight"].numpy())
    np.testing.assert_array_equal(found.params["output"], wide["lm_head.weight"].numpy().T)


def test_quantizing_at_load_reads_each_matrix_in_its_own_type(
    model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import jax

    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    torch.save(
        {name: tensor if "q_proj" in name else tensor.bfloat16() for name, tensor in model.state_dict().items()},
        folder / "pytorch_model.bin",
    )
    ours, stored = converted(folder, tmp_path / "ours"), converted(folder, tmp_path / "int8", weights="int8")
    at_load = llama_jax.load(str(ours), "bfloat16", weights="int8").params["layers"]
    for a, b in zip(at_load, llama_jax.load(str(stored), "bfloat16").params["layers"], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a["attention"], b["attention"])


def test_a_tensor_whose_layers_differ_in_type_is_widened_and_told(
    model: Any, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(model, tmp_path / "hf", small_tokenizer)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    odd = "model.layers.1.mlp.up_proj.weight"
    tensors[odd] = model.state_dict()[odd].half()
    torch.save(tensors, folder / "pytorch_model.bin")
    ours = converted(folder, tmp_path / "ours")
    assert "layers/feed_forward/w3 is of bfloat16 and float16 in different layers: all of it is stored as float32" in (
        capsys.readouterr().out
    )
    found = llama_jax.load(str(ours), compute_dtype="float32").params["layers"]["feed_forward"]["w3"]
    np.testing.assert_array_equal(found[1], tensors[odd].float().numpy().T)
    np.testing.assert_array_equal(found[0], tensors["model.layers.0.mlp.up_proj.weight"].float().numpy().T)


# Mistral's layout. The permutation is that of transformers' conversion script (permute_for_rope), written out.

NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def as_mistral(model: Any) -> dict[str, Any]:
    """The model's tensors as Mistral's code has them: its names, and neighbours that rotate together."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        for theirs, mistrals in NAMES.items():
            name = name.replace(theirs, mistrals)
        tensors[name] = tensor.contiguous().clone()
    return tensors


def mistral_folder(
    model: Any, folder: Path, tokenizer: Tokenizer, name: str = "tokenizer.model", **params: Any
) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    table = {
        "dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 88, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
        "vocab_size": tokenizer.vocab_size, "rope_theta": 10000.0,
    } | params  # fmt: skip
    (folder / "params.json").write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    (folder / name).write_bytes(tokenizer.model_bytes)
    save_file(as_mistral(model), folder / "consolidated.safetensors")
    return folder


def mistral_logits(
    tensors: dict[str, Any], ids: np.ndarray, heads: int, kv_heads: int, theta: float, window: int
) -> np.ndarray:
    """What mistral-inference computes: neighbours as complex numbers, turned by position x theta^(-2i/H)."""
    x = tensors["tok_embeddings.weight"][torch.tensor(ids)]
    T, H = x.shape[0], x.shape[1] // heads
    angles = torch.outer(torch.arange(T), 1.0 / theta ** (torch.arange(0, H, 2) / H))
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def normed(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors[f"{name}.weight"]

    def rotated(x: Any) -> Any:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turns).flatten(-2)

    mask = torch.full((T, T), -torch.inf).triu(1) + torch.full((T, T), -torch.inf).tril(-window)
    for i in range(2):
        name = f"layers.{i}"
        h = normed(x, f"{name}.attention_norm")
        q, k, v = (h @ tensors[f"{name}.attention.w{c}.weight"].T for c in "qkv")
        q, k, v = (part.view(T, -1, H) for part in (q, k, v))
        k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (rotated(k), v))
        scores = torch.einsum("tnh,snh->nts", rotated(q), k) / H**0.5 + mask
        h = torch.einsum("nts,snh->tnh", scores.softmax(-1), v).flatten(1)
        x = x + h @ tensors[f"{name}.attention.wo.weight"].T
        h = normed(x, f"{name}.ffn_norm")
        gate, up = (h @ tensors[f"{name}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ tensors[f"{name}.feed_forward.w2.weight"].T
    return (normed(x, "norm") @ tensors["output.weight"].T).numpy()


@pytest.mark.parametrize(("theta", "window"), [(10000.0, None), (1000000.0, None), (10000.0, 5)])
def test_mistrals_layout_is_read_as_its_own_code_computes(
    theta: float,
    window: int | None,
    model: Any,
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = mistral_folder(model, tmp_path / "mistral", small_tokenizer, rope_theta=theta, sliding_window=window)
    ours = llama_jax.load(str(converted(folder, tmp_path / "ours")))
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("    family  Mistral: ") and (f"window {window}" in said) == (window is not None)
    ids = np.random.default_rng(0).integers(3, small_tokenizer.vocab_size, (1, 40))
    expected = mistral_logits(as_mistral(model), ids[0], 4, 2, theta, window or 40)
    np.testing.assert_allclose(ours.logits(ids)[0], expected, atol=1e-4)
    if theta == 10000 and window is None:
        np.testing.assert_allclose(ours.logits(ids), model(torch.tensor(ids)).logits.detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("index", [False, True])
def test_mistrals_layout_in_several_files_is_read(
    index: bool, model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = mistral_folder(model, tmp_path / "mistral", small_tokenizer, name="tokenizer.model.v3")
    (folder / "consolidated.safetensors").unlink()
    tensors = as_mistral(model)
    files = [f"consolidated-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file(dict(list(tensors.items())[i::2]), folder / file)
    if index:
        places = {name: files[i % 2] for i, name in enumerate(tensors)}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    back = converted(converted(folder, tmp_path / "ours"), tmp_path / "back", to="huggingface")
    assert same(load_file(back / "model.safetensors"), model.state_dict())
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=r"consolidated-00002-of-00002\.safetensors'? beside"):
        converted(folder, tmp_path / "x")


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_mistrals_layout_is_tied_if_its_matrices_are(
    stored: str, model: Any, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = mistral_folder(model, tmp_path / "mistral", small_tokenizer)
    tensors = load_file(folder / "consolidated.safetensors")
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    if stored == "once":
        del tensors["output.weight"]
    save_file(tensors, folder / "consolidated.safetensors")
    back = converted(converted(folder, tmp_path / "ours"), tmp_path / "back", to="huggingface")
    assert "the embeddings are the output matrix too" in capsys.readouterr().out
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert same(load_file(back / "model.safetensors"), expected)


def test_what_a_mistral_folder_leaves_open_is_refused(model: Any, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = mistral_folder(model, tmp_path / "theta", small_tokenizer, rope_theta=None)
    with pytest.raises(UserError, match=r"params\.json: rope_theta: expected it, found none; .*1000000.*10000"):
        converted(folder, tmp_path / "x")
    folder = mistral_folder(model, tmp_path / "v0.1", small_tokenizer, rope_theta=None, sliding_window=4096)
    converted(folder, tmp_path / "ours")
    folder = mistral_folder(model, tmp_path / "experts", small_tokenizer, moe={"num_experts": 8})
    with pytest.raises(UserError, match=r"moe: .*mixtures of experts"):
        converted(folder, tmp_path / "x")
    folder = mistral_folder(model, tmp_path / "ties", small_tokenizer, tied_embeddings=True)
    with pytest.raises(UserError, match=r"tied_embeddings: expected false beside an output\.weight that differs"):
        converted(folder, tmp_path / "x")


@pytest.mark.parametrize("kept", [0, 5, 40, 0.5, 0.999])
def test_a_safetensors_file_that_is_cut_short_is_told_so(
    kept: float, model: Any, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    folder_of(model, tmp_path, small_tokenizer)
    whole = (path := tmp_path / "model.safetensors").read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(
        UserError, match=r"model\.safetensors: expected .* (download it again|one that is cut short)"
    ) as told:
        convert(ConvertArgs(input=str(tmp_path), output=str(tmp_path / "out")))
    if isinstance(kept, float):
        assert f"expected {len(whole):,} bytes, as its header says" in str(told.value)
