"""Converted weights against Hugging Face transformers and torch, as independent references."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")

import llama_jax  # noqa: E402
from llama_jax.config import ModelArgs  # noqa: E402
from llama_jax.convert.torch_file import TorchFile, TorchFileWriter  # noqa: E402
from llama_jax.errors import UserError  # noqa: E402
from llama_jax.tokenizer import Tokenizer  # noqa: E402
from tests.convert.test_convert import ARGS, meta_axis, run  # noqa: E402

POSITIONS = 700
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Weights = dict[str, "torch.Tensor"]


def random_weights(args: ModelArgs, dtype: Any, seed: int) -> Weights:
    """A model in Meta's names and shapes, of values that ``dtype`` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    D, N, K, H, F, V = args.dim, args.n_heads, args.kv_heads, args.head_width, args.hidden_width, args.vocab_size

    def matrix(*shape: int) -> Any:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    def norm() -> Any:
        return (1 + 0.2 * torch.randn(D, generator=generator)).to(dtype)

    weights = {"tok_embeddings.weight": matrix(V, D) * D**0.5, "norm.weight": norm(), "output.weight": matrix(V, D)}
    for i in range(args.n_layers):
        weights |= {
            f"layers.{i}.attention.wq.weight": matrix(N * H, D) * 2,
            f"layers.{i}.attention.wk.weight": matrix(K * H, D) * 2,
            f"layers.{i}.attention.wv.weight": matrix(K * H, D),
            f"layers.{i}.attention.wo.weight": matrix(D, N * H),
            f"layers.{i}.feed_forward.w1.weight": matrix(F, D),
            f"layers.{i}.feed_forward.w2.weight": matrix(D, F),
            f"layers.{i}.feed_forward.w3.weight": matrix(F, D),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    return weights


def save_meta(folder: Path, args: ModelArgs, weights: Weights, shards: int, tokenizer: Tokenizer) -> Path:
    """As Meta ships it: a layer's tensors are views of one storage, the norms are copied, torch.save writes the shards."""
    folder.mkdir()
    for i in range(shards):
        shard: dict[str, Any] = {}
        groups: dict[str, list[str]] = {}
        for name in weights:
            groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
        for names in groups.values():
            parts = [
                weights[n] if meta_axis(n) is None else weights[n].chunk(shards, dim=meta_axis(n))[i] for n in names
            ]
            storage = torch.cat([part.reshape(-1) for part in parts])
            at = 0
            for name, part in zip(names, parts, strict=True):
                shard[name] = storage[at : at + part.numel()].view(part.shape)
                at += part.numel()
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    table = {
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "multiple_of": args.multiple_of,
        "norm_eps": args.norm_eps, "rope_theta": args.rope_theta, "vocab_size": -1,
    }  # fmt: skip
    if args.n_kv_heads is not None:
        table["n_kv_heads"] = args.n_kv_heads
    (folder / "params.json").write_text(json.dumps(table))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


def hugging_face(args: ModelArgs, weights: Weights) -> Any:
    """The same model in transformers, with q and k permuted by Hugging Face's own rule."""

    def permute(w: Any, heads: int) -> Any:
        return (
            w.view(heads, args.head_width // 2, 2, args.dim).transpose(1, 2).reshape(heads * args.head_width, args.dim)
        )

    config = transformers.LlamaConfig(
        hidden_size=args.dim, intermediate_size=args.hidden_width, num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads, num_key_value_heads=args.kv_heads, vocab_size=args.vocab_size,
        max_position_embeddings=1024, rms_norm_eps=args.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta}, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for i in range(args.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        state |= {
            theirs + "self_attn.q_proj.weight": permute(weights[ours + "attention.wq.weight"], args.n_heads),
            theirs + "self_attn.k_proj.weight": permute(weights[ours + "attention.wk.weight"], args.kv_heads),
            theirs + "self_attn.v_proj.weight": weights[ours + "attention.wv.weight"],
            theirs + "self_attn.o_proj.weight": weights[ours + "attention.wo.weight"],
            theirs + "mlp.gate_proj.weight": weights[ours + "feed_forward.w1.weight"],
            theirs + "mlp.down_proj.weight": weights[ours + "feed_forward.w2.weight"],
            theirs + "mlp.up_proj.weight": weights[ours + "feed_forward.w3.weight"],
            theirs + "input_layernorm.weight": weights[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "ffn_norm.weight"],
        }
    model.load_state_dict(state)
    return model.float()


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def cases() -> Iterator[Any]:
    """Each kv-head count with each number of shards; constants and types take turns."""
    thetas, epsilons, dtypes = (1e4, 1e6), (1e-5, 1e-6, 1e-3), ("float32", "float16", "bfloat16")
    kv_heads, shards = (1, 2, 4, None), (1, 2, 4, 8)
    for i in range(8):
        case = (kv_heads[i % 4], shards[(i + i // 4) % 4], thetas[i // 2 % 2], epsilons[i % 3], dtypes[(i + 1) % 3])
        yield pytest.param(*case, id="kv {}, {} shards, theta {:g}, eps {:g}, {}".format(*case))


@pytest.mark.parametrize(("kv_heads", "shards", "theta", "eps", "dtype"), list(cases()))
def test_logits_equal_transformers_through_metas_files_and_through_safetensors(
    kv_heads: int | None, shards: int, theta: float, eps: float, dtype: str, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    args = dataclasses.replace(
        ARGS,
        n_kv_heads=kv_heads,
        rope_theta=theta,
        norm_eps=eps,
        vocab_size=small_tokenizer.vocab_size,
        max_seq_len=1024,
    )
    weights = random_weights(args, DTYPES[dtype], seed=shards)
    ids = np.random.default_rng(0).integers(0, args.vocab_size, (1, POSITIONS))
    reference = hugging_face(args, weights)
    expected = torch_logits(reference, ids)
    run(
        input=save_meta(tmp_path / "meta", args, weights, shards, small_tokenizer),
        output=tmp_path / "ours",
        max_seq_len=1024,
    )
    ours = llama_jax.load(str(tmp_path / "ours"))
    assert ours.args == args
    logits = np.asarray(ours.logits(ids))
    assert np.abs(logits - expected).max() < 1e-3

    reference.to(DTYPES[dtype]).save_pretrained(tmp_path / "hf", max_shard_size="150KB")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    run(input=tmp_path / "hf", output=tmp_path / "from_hf")
    np.testing.assert_array_equal(np.asarray(llama_jax.load(str(tmp_path / "from_hf")).logits(ids)), logits)

    run(input=tmp_path / "ours", output=tmp_path / "back", to="huggingface")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert str(back.dtype) == f"torch.{dtype}"
    np.testing.assert_array_equal(torch_logits(back.float(), ids), expected)


def test_torch_loads_what_we_write_and_we_load_what_torch_writes(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)
    for dtype in DTYPES.values():
        weights = random_weights(args, dtype, seed=1)
        source = save_meta(tmp_path / f"meta {dtype}", args, weights, 2, small_tokenizer)
        run(input=source, output=tmp_path / f"ours {dtype}")
        run(input=tmp_path / f"ours {dtype}", output=tmp_path / f"back {dtype}", to="meta", shards=2)
        for i in range(2):
            name = f"consolidated.{i:02}.pth"
            found = torch.load(tmp_path / f"back {dtype}" / name, weights_only=True)
            expected = torch.load(source / name, weights_only=True)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], expected[k]) and found[k].dtype == dtype for k in expected)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.tied = self.linear


def save_by_file_object(state: Any, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)


SAVED = {
    "by path": lambda state, path: torch.save(state, path),
    "by file object": save_by_file_object,
    "a state_dict with _metadata": lambda state, path: torch.save(Small().state_dict(), path),
    "parameters": lambda state, path: torch.save({k: torch.nn.Parameter(v) for k, v in state.items()}, path),
    "a transposed view": lambda state, path: torch.save({"w": torch.arange(12.0).reshape(3, 4).T, **state}, path),
    "slices of one storage": lambda state, path: torch.save(dict(zip("abc", torch.arange(12.0).reshape(3, 4), strict=True)), path),
    "columns of one storage": lambda state, path: torch.save(dict(zip("ab", torch.arange(12.0).reshape(3, 4).chunk(2, dim=1), strict=True)), path),
}  # fmt: skip


@pytest.mark.parametrize("how", SAVED)
def test_whatever_torch_saves_of_weights_is_read(how: str, tmp_path: Path) -> None:
    state = {"x": torch.randn(2, 3), "y": torch.randn(5)}
    SAVED[how](state, tmp_path / "x.pth")
    expected = torch.load(tmp_path / "x.pth", weights_only=True)
    with TorchFile.open(tmp_path / "x.pth") as file:
        assert list(file.tensors) == list(expected)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(file.read(name), tensor.detach().numpy())


UNSAFE = {
    "a module": lambda: Small(),
    "an optimizer's state": lambda: {"optimizer": torch.optim.AdamW(Small().parameters()).state_dict()},
    "integers": lambda: {"w": torch.arange(3)},
    "doubles": lambda: {"w": torch.zeros(3, dtype=torch.float64)},
    "a tensor alone": lambda: torch.zeros(3),
    "an expanded tensor": lambda: {"w": torch.zeros(1).expand(1000)},
    "a sparse tensor": lambda: {"w": torch.eye(3).to_sparse()},
}


@pytest.mark.parametrize("what", UNSAFE)
def test_other_things_that_torch_saves_are_refused(what: str, tmp_path: Path) -> None:
    torch.save(UNSAFE[what](), tmp_path / "x.pth")
    with (
        pytest.raises(UserError, match=r"x\.pth: .*expected .*found"),
        TorchFile.open(tmp_path / "x.pth"),
    ):
        pass


def test_the_old_format_of_torch_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before 1\.6"), TorchFile.open(tmp_path / "x.pth"):
        pass


def test_torch_maps_what_we_write(tmp_path: Path) -> None:
    with TorchFileWriter(tmp_path / "x.pth", np.dtype("<f4"), {"w": (2, 3)}) as writer:
        writer.write("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    assert torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


TEXTS = [
    "Once upon a time",
    "  two spaces, and  two more ",
    "line\nends\n\n",
    "Où est le hibou? 🦊",
    "1234 567",
    "",
    "\t tab",
    "a<s>b</s>c",
]


def test_exported_tokenizers_encode_as_ours(llama2_tokenizer: Tokenizer, tmp_path: Path) -> None:
    args = dataclasses.replace(ARGS, vocab_size=32000)
    source = save_meta(tmp_path / "meta", args, random_weights(args, torch.bfloat16, 0), 1, llama2_tokenizer)
    run(input=source, output=tmp_path / "hf", to="huggingface")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS[:-1]:
        assert theirs(text)["input_ids"] == llama2_tokenizer.encode(text), text
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
