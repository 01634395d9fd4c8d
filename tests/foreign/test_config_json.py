"""config.json, against transformers: the same logits, or a refusal that names the key; never another model."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
transformers = pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")

from llama_jax.convert.checkpoint_source import to_ours  # noqa: E402
from llama_jax.convert.huggingface import HuggingFaceSource  # noqa: E402
from llama_jax.convert.layout import tensors_of  # noqa: E402
from llama_jax.errors import UserError  # noqa: E402
from llama_jax.foreign.config_json import KEYS, read_config  # noqa: E402
from llama_jax.foreign.keys import read_json  # noqa: E402
from llama_jax.tokenizer import Tokenizer  # noqa: E402
from tests import numpy_llama  # noqa: E402

IDS = np.random.default_rng(0).integers(0, 400, (1, 24))
BASE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", None, "x"]),
        "type": st.sampled_from(["default", "linear", "dynamic", None]),
        "rope_theta": st.sampled_from([1e4, 1e6, 500000, 5.0, None, "1e4"]),
        "factor": st.sampled_from([1.0, 2, 4.0, None]),
        "attention_factor": st.sampled_from([0.7, None]),
        "mscale": st.sampled_from([0.7, 0]),
        "mscale_all_dim": st.just(0.9),
        "beta_fast": st.sampled_from([8.0, 0]),
        "truncate": st.booleans(),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
        "original_max_position_embeddings": st.sampled_from([8, 64]),
        "low_freq_factor": st.just(1.0),
        "high_freq_factor": st.sampled_from([4.0, 1.0]),
        "full_attention": st.just({"rope_theta": 5.0}),
    },
)
# Of each key, values that are usual, odd and wrong; ... takes the key out.
VALUES: dict[str, list[Any]] = {
    "hidden_size": [32, 64, 0, "32", 32.0, True, None],
    "intermediate_size": [48, 47, 0, None],
    "num_hidden_layers": [1, 2, 3, 0, 2.0],
    "num_attention_heads": [1, 2, 4, 8, 3, 0, -4, None],
    "num_key_value_heads": [1, 2, 4, None, ..., 0, 3],
    "vocab_size": [400, 399, 401, -1],
    "max_position_embeddings": [64, 24, 16, ..., 0],
    "rms_norm_eps": [1e-5, 0.5, 0.0, ..., "1e-5", 1, -1.0, float("nan")],
    "rope_theta": [1e4, 1e6, 500000, 5.0, ..., None, "10000", True, 0, -3.0, float("inf")],
    "hidden_act": ["silu", "swish", "gelu", "relu", ..., None],
    "attention_bias": [False, True, ..., 0],
    "mlp_bias": [False, True, ...],
    "head_dim": [8, 16, None, ..., 0, 8.5],
    "tie_word_embeddings": [False, True, ..., None, 1],
    "partial_rotary_factor": [1.0, 0.5, ...],
    "original_max_position_embeddings": [8, 64, None],
    "sliding_window": [None, 4, 64, 4096],
    "use_sliding_window": [False, True],
    "max_window_layers": [0, 1, 28, None],
    "layer_types": [
        ["full_attention"] * 2, ["sliding_attention", "full_attention"], ["attention"] * 2, ["sliding_attention"] * 2, [], None
    ],
    "attention_chunk_size": [None, 4],
    "is_causal": [True, False, None],
    "pretraining_tp": [1, 2],
    "per_layer_config": [{}, {"0": {"rms_norm_eps": 0.5}}, {"1": {"intermediate_size": 8}}],
    "quantization_config": [None, {}, {"quant_method": "gptq", "bits": 4}],
    "logit_scale": [1.0, 3.0],
    "attn_logit_softcapping": [None, 5.0],
    "attn_softcap": [None, 5.0],
    "query_pre_attn_scalar": [8, 4],
    "num_experts": [0, 4],
    "model_type": ["llama", "mistral", "gpt2", ["llama"], {}, ...],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], None],
    "torch_dtype": ["float32", "float16", None],
    "use_cache": [True, False],
    "kv_sharing_modes": [["reuse", "reuse"]],
    "initializer_range": [0.02],
    "attention_dropout": [0.0, 0.1],
    "rope_interleaved": [False, True],
    "is_encoder_decoder": [False, True],
    "something_new": [1, "x"],
}  # fmt: skip
CHANGES = st.dictionaries(st.sampled_from(sorted(VALUES)), st.none(), max_size=4).flatmap(
    lambda keys: st.fixed_dictionaries(
        {key: st.sampled_from(VALUES[key]) for key in keys},
        optional={"rope_parameters": ROPE | st.none() | st.just("x"), "rope_scaling": ROPE | st.none() | st.just([])},
    )
)


@pytest.fixture(scope="module")
def folder(small_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, with weights that make every constant of its configuration tell."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    assert small_tokenizer.vocab_size == BASE["vocab_size"]
    return folder


def write(folder: Path, changes: Mapping[str, Any]) -> None:
    table = {key: value for key, value in (BASE | dict(changes)).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(table))


def theirs(folder: Path) -> np.ndarray | None:
    """transformers' logits; None where it cannot load the model or run it."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.from_numpy(IDS)).logits.numpy()
    except Exception:
        return None


def ours(folder: Path) -> np.ndarray:
    """The logits of the model that the converter would write, by the definition. Raises UserError."""
    with contextlib.ExitStack() as stack:
        source = HuggingFaceSource(folder, "", "", 0, stack)
        args = source.args
        params: dict[str, Any] = {}
        for tensor in tensors_of(args):
            layers = []
            for layer in range(args.n_layers if tensor.layered else 1):
                rows = np.array(source.rows(tensor, layer, 0, tensor.matrix(args)[0]), np.float32)
                layers.append(to_ours(tensor, args, rows, 0)[1])
            *path, last = tensor.name.split("/")
            place = params
            for key in path:
                place = place.setdefault(key, {})
            place[last] = np.stack(layers) if tensor.layered else layers[0]
    return numpy_llama.llama(params, IDS, args)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(CHANGES)
@example({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
@example({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 500000}})
@example({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}})
@example({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "rope_scaling": {"rope_type": "default"}})
@example({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}})
@example({"rope_scaling": {"type": "linear", "factor": 4.0}})
@example({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16})
@example(
    {
        "rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
        "max_position_embeddings": 16,
    }
)
@example({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}})
@example({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 8}, "rope_theta": 1e6})
@example(
    {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        "original_max_position_embeddings": 64,
    }
)
@example({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}})
@example(
    {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8,
    }
)
@example({"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_theta": 1e6})
@example({"is_causal": False})
@example({"num_attention_heads": 8, "num_key_value_heads": 4})
@example({"tie_word_embeddings": True})
@example({"num_hidden_layers": 1})
@example({"model_type": "mistral", "sliding_window": 4})
@example({"model_type": "mistral", "is_causal": None})
@example({"model_type": ["llama"]})
@example({"model_type": "mistral", "sliding_window": 4, "layer_types": ["sliding_attention"] * 2})
@example({"model_type": "mistral", "sliding_window": 1, "max_window_layers": 0, "use_sliding_window": True})
@example({"model_type": "mistral", "sliding_window": 4, "use_sliding_window": False})
@example({"model_type": "mistral", "sliding_window": None, "tie_word_embeddings": True})
@example({"model_type": "mistral", "sliding_window": 4, "max_position_embeddings": 4})
def test_logits_are_transformers_or_the_refusal_names_the_key(folder: Path, changes: dict[str, Any]) -> None:
    write(folder, changes)
    try:
        found = ours(folder)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and "expected" in message and "found" in message
        assert any(key in message for key in changes), message
        return
    expected = theirs(folder)
    if expected is not None:
        np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)


LLAMA2 = {
    "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
PUBLISHED = {
    "LLaMA 2": {},
    "LLaMA 1": {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1, "rms_norm_eps": 1e-06},
    "Code Llama": {"rope_theta": 1000000, "attention_bias": False, "max_position_embeddings": 16384},
    "Vicuna": {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "pad_token_id": 0, "do_sample": True},
    "TinyLlama": {"attention_bias": False, "rope_theta": 10000.0, "num_key_value_heads": 4, "mlp_bias": False},
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "head_dim": None, "rope_theta": 1e5},
    "transformers 5": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "bfloat16", "head_dim": 128},
    "unsloth": {"unsloth_version": "2024.9", "unsloth_fixed": True, "attention_dropout": 0.0, "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_whole(name: str) -> None:
    config = read_config(LLAMA2 | PUBLISHED[name], Path("config.json"), 0)
    assert config.args.hidden_width == 11008 and not config.unknown and not config.warnings


def test_every_key_of_transformers_configuration_is_known() -> None:
    import dataclasses

    fields = {field.name for field in dataclasses.fields(transformers.LlamaConfig) if not field.name.startswith("_")}
    generation = transformers.GenerationConfig._get_default_generation_params()
    assert KEYS.unknown(dict.fromkeys({*fields, *generation})) == []


def test_keys_that_are_not_known_are_listed_and_choices_are_told() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5, "factor": 8.0}
    config = read_config(LLAMA2 | {"new": 1, "rope_theta": 1e4, "rope_parameters": rope}, Path("config.json"), 8192)
    assert config.args.rope_theta == 5e5 and config.unknown == ("new", "rope_parameters.factor")
    for words in (
        "rope_theta 10000, and 500000 in rope_parameters: the second",
        "context is 8,192 tokens, and config.json says",
    ):
        assert sum(words in warning for warning in config.warnings) == 1
    (told,) = read_config(BASE | {"attention_dropout": 0.1}, Path("config.json"), 0).warnings
    assert "attention_dropout 0.1" in told and "no such dropout" in told
    assert not read_config(BASE | {"attention_dropout": 0.0}, Path("config.json"), 0).warnings
    both = {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 5e5}}
    config = read_config(LLAMA2 | both, Path("config.json"), 0)
    assert config.args.rope_theta == 5e5 and "rope_parameters and another rope_scaling" in config.warnings[0]


def test_a_key_twice_is_refused_unless_it_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"rope_theta": 1e4, "rope_theta": 1e4, "a": {"b": 1, "b": 2}}')
    with pytest.raises(UserError, match=r"config\.json: 'b': expected the key once, found it twice"):
        read_json(path)
    path.write_text('{"rope_theta": 1e4, "rope_theta": 10000}')
    assert read_json(path) == {"rope_theta": 1e4}


def test_a_file_without_a_model_type_is_of_the_class_that_it_names(tmp_path: Path) -> None:
    untyped = {key: value for key, value in BASE.items() if key != "model_type"}
    path = tmp_path / "config.json"
    assert (
        read_config(untyped | {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}, path, 0).kind
        == "mistral"
    )
    assert (
        read_config(untyped, path, 0).kind
        == read_config(untyped | {"architectures": ["LlamaModel"]}, path, 0).kind
        == "llama"
    )
    with pytest.raises(UserError, match="model_type: expected 'llama' or 'mistral', found 'Phi3ForCausalLM'"):
        read_config(untyped | {"architectures": ["Phi3ForCausalLM"]}, path, 0)
    (told,) = read_config(BASE | {"architectures": ["Qwen2ForCausalLM"]}, path, 0).warnings
    assert "model_type llama, and architectures ['Qwen2ForCausalLM']" in told


@pytest.mark.parametrize("key", ["attn_logits_soft_cap", "attention_logit_softcapping", "output_softcap"])
def test_a_soft_cap_is_refused_however_it_is_spelled(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: expected null, found 50.0"):
        read_config(BASE | {key: 50.0}, tmp_path / "config.json", 0)
    read_config(BASE | {key: None}, tmp_path / "config.json", 0)
