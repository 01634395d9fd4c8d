"""params.json: every key that changes the mathematics is read, or refused by its name; unknown ones are listed."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError
from llama_jax.foreign.params_json import read_params, write_params

PATH = Path("params.json")
BASE = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA3 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
          "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "hidden"),
    [
        ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}, 11008),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1}, 28672),
        (LLAMA3, 14336),
        (LLAMA3 | {"use_scaled_rope": False, "head_dim": 128, "hidden_dim": 14336, "sliding_window": None, "moe": None}, 14336),
        ({"dim": 288, "n_layers": 6, "n_heads": 6, "multiple_of": 32, "max_seq_len": 256, "dropout": 0.0}, 768),
    ],
    ids=["7B", "70B", "LLaMA 3 8B", "neutral keys", "llama2.c"],
)  # fmt: skip
def test_published_files_are_read_whole(table: dict[str, Any], hidden: int) -> None:
    params = read_params(table, PATH, 128256, 0)
    assert params.args.hidden_width == hidden and not params.unknown
    assert [w for w in params.warnings if "vocab_size" not in w] == []
    assert (
        json.loads(write_params(params.args)).items()
        >= {k: v for k, v in table.items() if k in ("dim", "n_kv_heads", "rope_theta")}.items()
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_scaled_rope", 1), ("rope_scaling_factor", 8), ("rope_scaling", {"factor": 8}), ("head_dim", 7), ("head_dim", "8"),
        ("hidden_dim", 0), ("hidden_dim", "100"), ("intermediate_size", 0.5), ("sliding_window", 0), ("sliding_window", True), ("moe", {"num_experts": 8}),
        ("quantization_args", {"group_size": 32}), ("lora_args", {"rank": 16}), ("qkv_bias", True), ("use_qk_norm", True),
        ("act_fn", "gelu"), ("causal", False), ("vision_num_cross_attention_layers", 8), ("attention_chunk_size", 8192),
        ("dim", "64"), ("dim", 64.0), ("dim", None), ("n_layers", 0), ("n_heads", 7), ("n_heads", True), ("n_kv_heads", 3), ("n_kv_heads", -1),
        ("multiple_of", 0), ("norm_eps", 0), ("norm_eps", "1e-5"), ("norm_eps", float("nan")), ("rope_theta", -1), ("rope_theta", "1e4"),
        ("rope_theta", float("inf")), ("ffn_dim_multiplier", -1.0), ("max_seq_len", 0.5), ("vocab_size", "32000"),
        ("ffn_dim_multiplier", float("nan")), ("llama_4_scaling", {"beta": 0.1}), ("_sliding_window", [4, None]), ("use_biases", True),
        ("model_type", "mamba"), ("q_lora_rank", 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_not_supported_is_refused_by_its_key(key: str, value: Any, wrapped: bool) -> None:
    table = BASE | {key: value}
    with pytest.raises(UserError, match=rf"params\.json: .*\b{key}\b.* found|expected the key {key}, found"):
        read_params({"model": table} if wrapped else table, PATH, 400, 0)


@pytest.mark.parametrize(("key", "value"), [("multiple_of", 0), ("ffn_dim_multiplier", float("nan")), ("n_layers", 0)])
def test_a_width_that_is_given_outright_hides_no_wrong_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"\b{key}\b.* found"):
        read_params(BASE | {"hidden_dim": 96, key: value}, PATH, 400, 0)


def test_keys_that_are_not_known_are_listed() -> None:
    assert read_params(BASE | {"new": 1, "a": None}, PATH, 400, 0).unknown == ("a", "new")
    assert read_params({"model": BASE | {"new": 1}, "step": 3}, PATH, 400, 0).unknown == ("new", "step")


def test_what_counts_against_the_file_is_told() -> None:
    (warning,) = read_params(BASE | {"vocab_size": 32000}, PATH, 400, 0).warnings
    assert "vocab_size 32,000: the 400 rows" in warning
    (warning,) = read_params(BASE | {"max_seq_len": 256}, PATH, 400, 512).warnings
    assert "the context is 512 tokens, and params.json says max_seq_len 256" in warning
    (warning,) = read_params(BASE | {"norm_eps": 1e-6}, PATH, 32000, 0).warnings
    assert "llama-2-7b-chat" in warning
    assert read_params(BASE, PATH, 400, 0).args.max_seq_len == ModelArgs().max_seq_len


def test_the_context_is_read_from_the_key_that_has_it() -> None:
    for table, context in (
        ({"max_position_embeddings": 777}, 777),
        ({"max_position_embeddings": 777, "max_seq_len": 99}, 99),
        ({"max_position_embeddings": None}, ModelArgs().max_seq_len),
    ):
        assert read_params(BASE | table, PATH, 400, 0).args.max_seq_len == context
    (warning,) = read_params(BASE | {"max_position_embeddings": 256}, PATH, 400, 512).warnings
    assert "the context is 512 tokens, and params.json says max_position_embeddings 256" in warning


def test_a_window_is_read_and_has_no_effect_where_the_context_is_no_longer() -> None:
    for window, context, effect in ((4096, 0, None), (512, 512, None), (512, 513, 512), (None, 0, None)):
        args = read_params(BASE | {"sliding_window": window}, PATH, 400, context).args
        assert (args.sliding_window, args.window) == (window, effect)


SCALED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "3.1 8B": (4096, 32),
    "3.1 70B, 3.3": (8192, 80),
    "3.1 405B": (16384, 126),
    "3.2 1B": (2048, 16),
    "3.2 3B": (3072, 28),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_factor_of_a_scaled_embedding_is_that_of_the_model_and_is_told(name: str) -> None:
    dim, layers = SHAPES[name]
    table = LLAMA3 | {"dim": dim, "n_layers": layers, "use_scaled_rope": True}
    params = read_params(table, PATH, 128256, 0)
    factor = 32.0 if name.startswith("3.2") else 8.0
    assert params.args.rope_scaling == SCALED | {"factor": factor} and params.args.max_seq_len == 131_072
    (told,) = params.warnings
    assert f"{factor:g} is used" in told and "rope_scaling_factor" in told
    again = json.loads(write_params(params.args))
    assert again["use_scaled_rope"] is True and "rope_scaling_factor" not in again
    assert read_params(again, PATH, 128256, 0).args == params.args


def test_a_factor_that_the_file_states_counts_and_is_written_again() -> None:
    params = read_params(LLAMA3 | {"use_scaled_rope": True, "rope_scaling_factor": 16}, PATH, 128256, 4096)
    assert params.args.rope_scaling == SCALED | {"factor": 16.0} and not params.warnings
    again = json.loads(write_params(params.args))
    assert again["rope_scaling_factor"] == 16 and read_params(again, PATH, 128256, 4096).args == params.args


def test_what_is_left_out_of_llama_3_has_the_defaults_of_its_own_code() -> None:
    plain = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    assert read_params(plain | {"use_scaled_rope": False}, PATH, 128256, 0).args.rope_theta == 500_000
    assert read_params(plain, PATH, 400, 0).args.rope_theta == 10_000
    assert read_params(LLAMA3, PATH, 128256, 0).args.max_seq_len == 8192


def test_sizes_that_are_stated_outright_are_taken() -> None:
    args = read_params(BASE | {"head_dim": 16, "hidden_dim": 100, "intermediate_size": 100}, PATH, 400, 0).args
    assert (args.head_dim, args.hidden_dim) == (16, 100)
    with pytest.raises(UserError, match=r"intermediate_size: expected 100, as hidden_dim says, found 90"):
        read_params(BASE | {"hidden_dim": 100, "intermediate_size": 90}, PATH, 400, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 16}, "head_dim: expected dim / n_heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 512}, "sliding_window"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": SCALED | {"factor": 8.0, "low_freq_factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": SCALED | {"factor": 8.0, "original_max_position_embeddings": 4096}}, "rope_scaling"),
    ],
)
def test_what_metas_code_cannot_express_is_not_written(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"--to meta: {words}.*--to huggingface"):
        write_params(ModelArgs(dim=64, n_heads=8, vocab_size=400, **change))


def test_a_width_given_outright_is_written_by_metas_rule() -> None:
    args = ModelArgs(dim=64, n_heads=8, vocab_size=400, hidden_dim=101)
    assert read_params(json.loads(write_params(args)), PATH, 400, 0).args.hidden_width == 101
