"""Conversion between the three layouts: exact to the bit, whatever the shards, heads and types; and what is refused."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import llama_jax
from llama_jax.config import ModelArgs
from llama_jax.convert import ConvertArgs, convert
from llama_jax.convert.layout import TABLE, all_tensors, blocks, from_ours, tile, to_ours
from llama_jax.convert.safetensors import SafetensorsFile
from llama_jax.convert.torch_file import TorchFile, TorchFileWriter
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests import inside, numpy_llama

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=2, multiple_of=16, max_seq_len=128)
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def args(small_tokenizer: Tokenizer) -> ModelArgs:
    # A vocabulary that eight shards divide.
    assert small_tokenizer.vocab_size % 8 == 0
    return dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)


def random_weights(args: ModelArgs, dtype: np.dtype, seed: int = 0) -> Weights:
    """A model in Meta's names and shapes."""
    rng = np.random.default_rng(seed)
    weights = {}
    for tensor, layer in all_tensors(args):
        shape = tensor.matrix(args)
        drawn = rng.normal(0, shape[-1] ** -0.5, shape) if len(shape) == 2 else 1 + 0.2 * rng.normal(size=shape)
        weights[tensor.meta.format(layer)] = drawn.astype(np.float32).astype(dtype)
    return weights


def meta_axis(name: str) -> int | None:
    """The axis that Meta's model parallel splits, from its own rules (fairscale's layers in llama/model.py)."""
    if "norm" in name:
        return None
    return 1 if any(key in name for key in ("tok_embeddings", ".wo.", ".w2.")) else 0


def write_meta_folder(
    folder: Path, args: ModelArgs, weights: Weights, shards: int, tokenizer: Tokenizer, **params: Any
) -> Path:
    folder.mkdir()
    for i in range(shards):
        parts = {
            name: w if meta_axis(name) is None else np.split(w, shards, axis=meta_axis(name))[i]  # type: ignore[arg-type]
            for name, w in weights.items()
        }
        dtype = next(iter(weights.values())).dtype
        shapes = {name: part.shape for name, part in parts.items()}
        with TorchFileWriter(folder / f"consolidated.{i:02}.pth", dtype, shapes) as writer:
            for name, part in parts.items():
                writer.write(name, part)
    table = {
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads,
        "multiple_of": args.multiple_of, "norm_eps": args.norm_eps, "vocab_size": -1, "rope_theta": args.rope_theta,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps({k: v for k, v in {**table, **params}.items() if v is not None}))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


def read_meta_folder(folder: Path) -> Weights:
    paths = sorted(folder.glob("consolidated.*.pth"))
    found: dict[str, list[np.ndarray]] = {}
    for path in paths:
        with TorchFile.open(path) as file:
            for name in file.tensors:
                found.setdefault(name, []).append(np.array(file.read(name)))
    return {n: p[0] if meta_axis(n) is None else np.concatenate(p, axis=meta_axis(n)) for n, p in found.items()}  # type: ignore[arg-type]


def read_safetensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with SafetensorsFile.open(path) as file:
            found |= {name: np.array(file.read(name)).tobytes() for name in file.tensors}
    return found


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def run(**fields: Any) -> None:
    convert(ConvertArgs(**{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}))


@pytest.mark.parametrize("dtype", [np.dtype("<f4"), np.dtype("<f2"), BFLOAT16], ids=str)
@pytest.mark.parametrize(("shards", "kv_heads"), [(1, None), (2, 1), (4, 4), (8, 2)])
def test_meta_to_ours_to_meta_is_exact(
    dtype: np.dtype, shards: int, kv_heads: int | None, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    args = dataclasses.replace(args, n_kv_heads=kv_heads)
    weights = random_weights(args, dtype)
    source = write_meta_folder(tmp_path / "meta", args, weights, shards, small_tokenizer)
    run(input=source, output=tmp_path / "ours")
    run(input=tmp_path / "ours", output=tmp_path / "back", to="meta", shards=shards)
    assert same_bits(read_meta_folder(tmp_path / "back"), weights)
    names = {f"consolidated.{i:02}.pth" for i in range(shards)} | {"params.json", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    table = json.loads((tmp_path / "back" / "params.json").read_text())
    assert (table["dim"], table["n_heads"], table.get("n_kv_heads")) == (64, 8, kv_heads)


@pytest.mark.parametrize("dtype", [np.dtype("<f4"), BFLOAT16], ids=str)
def test_hugging_face_to_ours_to_hugging_face_is_exact(
    dtype: np.dtype, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, dtype), 2, small_tokenizer)
    run(input=source, output=tmp_path / "hf", to="huggingface")
    run(input=tmp_path / "hf", output=tmp_path / "ours")
    run(input=tmp_path / "ours", output=tmp_path / "back", to="huggingface")
    assert read_safetensors(tmp_path / "back") == read_safetensors(tmp_path / "hf")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def numpy_params(weights: Weights, args: ModelArgs) -> Any:
    """Our tree, made from Meta's tensors by the definitions in DESIGN's table, element by element."""
    N, K, H = args.n_heads, args.kv_heads, args.head_width

    def halves(w: np.ndarray, heads: int) -> np.ndarray:
        out = np.empty_like(w)
        for head in range(heads):
            for i in range(H // 2):
                out[head * H + i] = w[head * H + 2 * i]
                out[head * H + H // 2 + i] = w[head * H + 2 * i + 1]
        return out

    def stack(name: str, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return np.stack([change(weights[f"layers.{i}.{name}.weight"]) for i in range(args.n_layers)])

    return {
        "tok_embeddings": weights["tok_embeddings.weight"],
        "norm": weights["norm.weight"],
        "output": weights["output.weight"].T,
        "layers": {
            "attention_norm": stack("attention_norm", lambda w: w),
            "ffn_norm": stack("ffn_norm", lambda w: w),
            "attention": {
                "wq": stack("attention.wq", lambda w: halves(w, N).T.reshape(-1, N, H)),
                "wk": stack("attention.wk", lambda w: halves(w, K).T.reshape(-1, K, H)),
                "wv": stack("attention.wv", lambda w: w.T.reshape(-1, K, H)),
                "wo": stack("attention.wo", lambda w: w.T.reshape(N, H, -1)),
            },
            "feed_forward": {name: stack(f"feed_forward.{name}", lambda w: w.T) for name in ("w1", "w2", "w3")},
        },
    }


def test_parameters_and_logits_are_those_of_the_definition(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    weights = random_weights(args, np.dtype("<f4"))
    source = write_meta_folder(tmp_path / "meta", args, weights, 4, small_tokenizer)
    run(input=source, output=tmp_path / "ours", max_seq_len=128)
    model = llama_jax.load(str(tmp_path / "ours"))
    params = numpy_params(weights, args)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, model.params), params)
    ids = np.random.default_rng(1).integers(0, args.vocab_size, (2, 100))
    expected = numpy_llama.llama(params, ids, args)
    np.testing.assert_allclose(np.asarray(model.logits(ids)), expected, atol=1e-4)
    assert model.args == args


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.mark.parametrize("shards", [1, 2])
def test_a_real_models_logits_and_text_are_the_golden_ones(shards: int, golden: Path, tmp_path: Path) -> None:
    source = golden
    if shards > 1:
        with TorchFile.open(golden / "consolidated.00.pth") as file:
            weights = {name: np.array(file.read(name)) for name in file.tensors if name != "rope.freqs"}
        table = json.loads((golden / "params.json").read_text())
        args = ModelArgs(**{k: v for k, v in table.items() if k != "vocab_size"})
        tokenizer = Tokenizer(golden / "tokenizer.model")
        source = write_meta_folder(tmp_path / "meta", args, weights, shards, tokenizer)
    run(input=source, output=tmp_path / "ours", max_seq_len=512)
    model = llama_jax.load(str(tmp_path / "ours"))
    with np.load(golden / "golden" / "logits.npz") as expected:
        logits = np.asarray(model.logits(expected["token_ids"][None].astype(np.int32)))[0]
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    (completion,) = model.generate([""], llama_jax.SampleArgs(temperature=0.0, max_new_tokens=200))
    text = (golden / "golden" / "greedy_200_tokens.txt").read_text()
    assert completion.text == text.rstrip("\n") or completion.text == text


def test_the_digest_names_the_weights_in_whatever_layout(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def digest() -> str:
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sha256"))

    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 2, small_tokenizer)
    run(input=source, output=tmp_path / "ours")
    first = digest()
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="huggingface")
    assert digest() == first
    run(input=tmp_path / "hf", output=tmp_path / "meta2", to="meta")
    assert digest() == first
    other = write_meta_folder(tmp_path / "other", args, random_weights(args, BFLOAT16, seed=1), 1, small_tokenizer)
    run(input=other, output=tmp_path / "ours2")
    assert digest() != first


def test_hugging_face_is_written_in_several_files_with_an_index(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_jax.convert.huggingface.SHARD_BYTES", 60_000)
    weights = random_weights(args, np.dtype("<f4"))
    source = write_meta_folder(tmp_path / "meta", args, weights, 1, small_tokenizer)
    run(input=source, output=tmp_path / "hf", to="huggingface")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    run(input=tmp_path / "hf", output=tmp_path / "back", to="meta")
    assert same_bits(read_meta_folder(tmp_path / "back"), weights)


@pytest.mark.parametrize(("context", "told"), [(512, True), (4096, False)])
def test_a_context_that_metas_layout_cannot_say_is_told(
    context: int,
    told: bool,
    args: ModelArgs,
    small_tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = random_weights(args, np.dtype("<f4"))
    source = write_meta_folder(tmp_path / "meta", args, weights, 1, small_tokenizer)
    run(input=source, output=tmp_path / "ours", max_seq_len=context)
    run(input=tmp_path / "ours", output=tmp_path / "back", to="meta")
    assert (f"with --max-seq-len {context}" in capsys.readouterr().out) == told


def edit(path: Path, **changes: Any) -> None:
    table = json.loads(path.read_text())
    for key, value in changes.items():
        table.pop(key, None) if value is ... else table.__setitem__(key, value)
    path.write_text(json.dumps(table))


@pytest.fixture
def hf(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, np.dtype("<f4")), 1, small_tokenizer)
    run(input=source, output=tmp_path / "hf", to="huggingface")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": 1e6, "rope_parameters": ...}, 1e6),
        ({"rope_theta": 1000000, "rope_parameters": ..., "rope_scaling": None}, 1e6),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6),
        ({"rope_theta": ..., "rope_parameters": ...}, 1e4),
    ],
)
def test_rope_theta_is_found_wherever_transformers_puts_it(
    changes: dict[str, Any], theta: float, hf: Path, tmp_path: Path
) -> None:
    edit(hf / "config.json", **changes)
    run(input=hf, output=tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "model" / "model.json").read_text())["rope_theta"] == theta


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters: expected factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": ...}, "rope_type"),
        ({"head_dim": 16}, "shape"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_attention_heads": 0, "head_dim": ...}, "n_heads"),
        ({"num_attention_heads": 7, "head_dim": ...}, "n_heads"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"num_hidden_layers": 1_000_000}, "n_layers"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "not a tensor of this model"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"intermediate_size": 100}, "shape"),
        ({"vocab_size": 401}, "shape"),
        ({"rms_norm_eps": -1.0}, "norm_eps"),
        ({"rope_theta": "high"}, "rope_theta"),
    ],
)
def test_another_architecture_is_refused_by_the_key(
    changes: dict[str, Any], words: str, hf: Path, tmp_path: Path
) -> None:
    edit(hf / "config.json", **changes)
    with pytest.raises(UserError, match=words):
        run(input=hf, output=tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"meta", "hf"}


@pytest.mark.parametrize("hidden", [11008, 13824, 28672, 172, 768, 100, 101, 5461, 7000, 64, 1])
def test_any_feed_forward_width_has_a_rule_that_makes_it(hidden: int) -> None:
    from llama_jax.foreign.config_json import feed_forward_rule

    for dim in (64, 288, 4096, 5120, 8192):
        multiple, multiplier = feed_forward_rule(dim, hidden, Path("config.json"))
        made = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple, ffn_dim_multiplier=multiplier).hidden_width
        assert made == hidden, (dim, multiple, multiplier)
    assert feed_forward_rule(4096, 11008, Path()) == (256, None)
    assert feed_forward_rule(8192, 28672, Path()) == (4096, 1.3)


def write_text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


BAD_META: dict[str, tuple[Callable[[Path], object], str]] = {
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.pth")], "consolidated.00.pth"),
    "the first shard is missing": (lambda f: (f / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    "a shard too many": (lambda f: (f / "consolidated.01.pth").rename(f / "consolidated.03.pth"), "consolidated.01.pth"),
    "the second shard is missing": (lambda f: (f / "consolidated.01.pth").unlink(), "shape"),
    "a shard is cut": (lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:-9]), "directory"),
    "no params.json": (lambda f: (f / "params.json").unlink(), "params.json"),
    "params.json is a page": (write_text("params.json", "<html>Forbidden</html>"), "HTML page"),
    "params.json is no JSON": (write_text("params.json", "{dim: 64}"), "JSON"),
    "params.json is a list": (write_text("params.json", "[64]"), "object"),
    "params.json is deep": (write_text("params.json", "[" * 100_000), "JSON"),
    "params.json is huge": (lambda f: (f / "params.json").write_bytes(b" " * 2_000_000 + b"{}"), "up to"),
    "params.json is empty": (write_text("params.json", ""), "JSON"),
    "no dim": (lambda f: edit(f / "params.json", dim=...), "dim"),
    "a dim of text": (lambda f: edit(f / "params.json", dim="64"), "dim"),
    "a dim of 1e30": (lambda f: edit(f / "params.json", dim=10**30), "dim"),
    "a negative dim": (lambda f: edit(f / "params.json", dim=-64), "dim"),
    "another dim": (lambda f: edit(f / "params.json", dim=128), "shape"),
    "a layer too many": (lambda f: edit(f / "params.json", n_layers=3), "layers.2.attention.wq.weight is missing"),
    "a layer too few": (lambda f: edit(f / "params.json", n_layers=1), "not a tensor of this model"),
    "a billion layers": (lambda f: edit(f / "params.json", n_layers=10**9), "n_layers"),
    "heads that do not divide": (lambda f: edit(f / "params.json", n_heads=7), "n_heads"),
    "other kv heads": (lambda f: edit(f / "params.json", n_kv_heads=4), "shape"),
    "an eps that is not a number": (lambda f: edit(f / "params.json", norm_eps=float("nan")), "norm_eps"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "--tokenizer"),
    "a tokenizer that is none": (write_text("tokenizer.model", "hello"), "SentencePiece"),
    "a checklist that is a page": (write_text("checklist.chk", "<!DOCTYPE html>"), "HTML page"),
    "a checklist of something else": (write_text("checklist.chk", "all good\n"), "md5"),
    "a checklist with a path": (write_text("checklist.chk", "0" * 32 + "  ../x\n"), "md5"),
    "a checklist of another file": (write_text("checklist.chk", "0" * 32 + "  consolidated.02.pth\n"), "missing"),
    "a checklist that differs": (write_text("checklist.chk", "0" * 32 + "  consolidated.00.pth\n"), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_META)
def test_a_bad_folder_is_refused_with_file_expected_and_found_and_leaves_nothing(
    name: str, args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    change, words = BAD_META[name]
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 2, small_tokenizer)
    change(source)
    with pytest.raises(UserError) as refused:
        run(input=source, output=tmp_path / "ours")
    message = str(refused.value)
    assert words in message and "\n" not in message and "expected" in message and "found" in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_all_errors_in_tensors_are_reported_together(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    weights = random_weights(args, BFLOAT16)
    del weights["layers.1.attention.wq.weight"]
    weights["layers.0.feed_forward.w2.weight"] = weights["layers.0.feed_forward.w2.weight"][:, :-16]
    weights["surprise"] = weights["norm.weight"]
    source = write_meta_folder(tmp_path / "meta", args, weights, 1, small_tokenizer)
    with pytest.raises(UserError) as refused:
        run(input=source, output=tmp_path / "ours")
    for words in ("layers.1.attention.wq.weight is missing", "w2.weight has shape", "'surprise' is not a tensor"):
        assert words in str(refused.value)


def test_norms_that_differ_between_shards_are_refused(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first, second = random_weights(args, BFLOAT16), random_weights(args, BFLOAT16)
    second["layers.1.ffn_norm.weight"] = second["layers.1.ffn_norm.weight"] * 2
    source = write_meta_folder(tmp_path / "meta", args, first, 2, small_tokenizer)
    other = write_meta_folder(tmp_path / "other", args, second, 2, small_tokenizer)
    (other / "consolidated.01.pth").rename(source / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"layers\.1\.ffn_norm\.weight: differs from shard to shard"):
        run(input=source, output=tmp_path / "ours")


def test_a_shard_that_was_downloaded_under_two_names_is_told(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = ModelArgs(
        dim=32, n_layers=1, n_heads=4, multiple_of=16, max_seq_len=64, vocab_size=small_tokenizer.vocab_size
    )
    weights = random_weights(args, np.dtype("<f4"))
    folder = write_meta_folder(tmp_path / "model", args, weights, 2, small_tokenizer)
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    with pytest.raises(
        UserError, match=r"consolidated\.01\.pth: holds the same part of .*wq.* as consolidated\.00\.pth"
    ):
        run(input=str(folder), output=str(tmp_path / "never"))
    assert not (tmp_path / "never").exists()
    # A matrix of one value has equal parts by itself.
    even = {name: np.ones_like(values) for name, values in weights.items()}
    run(input=str(write_meta_folder(tmp_path / "even", args, even, 2, small_tokenizer)), output=str(tmp_path / "read"))


def test_rope_freqs_are_passed_over(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    weights = random_weights(args, BFLOAT16)
    stored = {**weights, "rope.freqs": np.zeros(4, BFLOAT16)}
    folder = tmp_path / "meta"
    source = write_meta_folder(folder, args, stored, 1, small_tokenizer)
    run(input=source, output=tmp_path / "back", to="meta")
    assert same_bits(read_meta_folder(tmp_path / "back"), weights)


def test_zeros_are_stored_too(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    weights = {name: np.zeros_like(w) for name, w in random_weights(args, BFLOAT16).items()}
    run(input=write_meta_folder(tmp_path / "meta", args, weights, 1, small_tokenizer), output=tmp_path / "ours")
    run(input=tmp_path / "ours", output=tmp_path / "back", to="meta")
    assert same_bits(read_meta_folder(tmp_path / "back"), weights)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(llama_jax.load(str(tmp_path / "ours")).params))


def test_params_may_be_wrapped_and_the_tokenizer_may_lie_above(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 1, small_tokenizer)
    table = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({"model": table | {"rope_theta": 1e6}}))
    (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    run(input=source, output=tmp_path / "ours")
    model = json.loads((tmp_path / "ours" / "model" / "model.json").read_text())
    assert model["rope_theta"] == 1e6 and model["max_seq_len"] == 4096
    assert (tmp_path / "ours" / "model" / "tokenizer.model").read_bytes() == small_tokenizer.model_bytes


def test_a_tokenizer_of_another_model_is_refused(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, golden: Path
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 1, small_tokenizer)
    with pytest.raises(UserError, match=r"expected up to 400 tokens, .* found 512"):
        run(input=source, output=tmp_path / "ours", tokenizer=golden / "tokenizer.model")


def test_a_checklist_that_holds_is_verified_and_told(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 2, small_tokenizer)
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    lines = [f"{hashlib.md5((source / n).read_bytes()).hexdigest()}  {n}" for n in names]
    (source / "checklist.chk").write_text("\n".join(lines) + "\n")
    run(input=source, output=tmp_path / "ours")
    assert "3 files match" in capsys.readouterr().out


def test_a_dry_run_lists_every_tensor_and_writes_nothing(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 2, small_tokenizer)
    run(input=source, output=tmp_path / "ours", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if "bfloat16  " in line and "[" in line]
    assert len(listed) == len(list(all_tensors(args)))
    assert any("layers.1.attention.wk.weight (rows of 2 shards)" in line for line in lines)
    assert any("MB at most" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_an_output_that_exists_is_never_touched(args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 1, small_tokenizer)
    (tmp_path / "ours").mkdir()
    with pytest.raises(UserError, match="--output: expected a folder that does not exist"):
        run(input=source, output=tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())


def test_a_damaged_storage_ends_the_conversion_without_a_trace(
    args: ModelArgs, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write_meta_folder(tmp_path / "meta", args, random_weights(args, BFLOAT16), 2, small_tokenizer)
    path = source / "consolidated.01.pth"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"consolidated.01.pth: .*checksum"):
        run(input=source, output=tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--input"),
        (["--input", "nothing", "--output", "x"], "nothing at nothing"),
        (["--input", ".", "--output", "x"], "checkpoint"),
        (["--input", "."], "--output"),
        (["--input", ".", "--output", "x", "--to", "gguf"], "--to"),
        (["--input", ".", "--output", "x", "--shards", "2"], "--shards"),
        (["--input", ".", "--output", "x", "--weights", "int2"], "--weights"),
        (["--input", ".", "--output", "x", "--weights", "int8", "--to", "meta"], "--weights"),
        (["--input", ".", "--output", "x", "--max-seq-len", "-1"], "--max-seq-len"),
    ],
)
def test_bad_arguments_end_in_one_line_and_status_2(argv: Sequence[str], words: str, tmp_path: Path) -> None:
    result = inside.run(["convert_torch_weights.py", *argv], tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("sizes", [(4096, 32, None, 1.0, 256), (8192, 64, 8, 1.3, 4096), (5120, 40, None, None, 256)])
def test_blocks_are_whole_tiles_of_bounded_size(sizes: tuple[Any, ...], itemsize: int) -> None:
    dim, heads, kv, multiplier, multiple = sizes
    args = ModelArgs(dim, 80, heads, kv, 32000, multiple, multiplier)
    for tensor in TABLE:
        rows, *columns = tensor.matrix(args)
        ranges = blocks(tensor, args, itemsize)
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])] and ranges[-1][1] == rows
        assert all((stop - start) % tensor.unit(args) == 0 for start, stop in ranges)
        assert max(stop - start for start, stop in ranges) * int(np.prod(columns)) * itemsize <= 65 << 20
        assert all(t <= s for t, s in zip(tile(tensor, args, itemsize), tensor.sizes(args), strict=True))


@pytest.mark.parametrize("name", [tensor.name for tensor in TABLE])
def test_a_block_goes_to_its_place_and_back(name: str) -> None:
    tensor = next(t for t in TABLE if t.name == name)
    args = dataclasses.replace(ARGS, vocab_size=24, head_dim=6)
    matrix = np.arange(np.prod(tensor.matrix(args))).reshape(tensor.matrix(args))
    whole = np.zeros(tensor.sizes(args), int)
    for start, stop in blocks(tensor, args, 4):
        place, block = to_ours(tensor, args, matrix[start:stop], start)
        whole[place] = block
    np.testing.assert_array_equal(from_ours(tensor, whole), matrix)
