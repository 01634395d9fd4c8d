"""The table of model families: the keys of each published config.json, and tiny models that have them.

A row of docs/families.md is a line of FAMILIES. To add a family, add its config.json here: the tests in
tests/test_families.py run over all lines.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.tokenizer import Tokenizer

POSITIONS = 3000
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072, "mlp_bias": False, "transformers_version": "4.43.0.dev0",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
LLAMA32 = LLAMA31 | {
    "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0},  # type: ignore[operator]
    "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0",
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
# transformers 5 writes rope_parameters, with the theta in it, and dtype.
OF_TRANSFORMERS_5 = {
    "rope_parameters": LLAMA31["rope_scaling"] | {"rope_theta": 500000.0},  # type: ignore[operator]
    "dtype": "bfloat16", "transformers_version": "5.0.0",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "LLaMA 2": LLAMA2,
    "LLaMA 2 70B": LLAMA2 | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "Code Llama": LLAMA2 | {"max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016},
    "TinyLlama": LLAMA2 | {
        "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "rope_theta": 10000.0,
    },
    "Vicuna 16k": LLAMA2 | {
        "max_sequence_length": 16384, "pad_token_id": 0, "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "linear scaling of LLaMA 2": LLAMA2 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "LLaMA 3": LLAMA3,
    "LLaMA 3.1": LLAMA31,
    "LLaMA 3.1 by transformers 5": {
        key: value for key, value in LLAMA31.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")
    } | OF_TRANSFORMERS_5,
    "LLaMA 3.2 1B": LLAMA32 | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16,
    },
    "LLaMA 3.2 3B": LLAMA32 | {
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_hidden_layers": 28,
    },
    "LLaMA 3.3": LLAMA31 | {
        "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_size": 8192, "intermediate_size": 28672,
        "num_attention_heads": 64, "num_hidden_layers": 80,
    },
    "YaRN of LLaMA 2": LLAMA2 | {
        "max_position_embeddings": 65536,
        "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
    },
    "YaRN with all keys": LLAMA2 | {
        "max_position_embeddings": 65536,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 24.0, "beta_slow": 2.0,
            "mscale": 0.707, "mscale_all_dim": 0.9, "truncate": False,
        },
    },
    "dynamic scaling": LLAMA2 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "heads of their own size": LLAMA2 | {
        "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rope_theta": 1000000.0,
    },
    "biases in attention": LLAMA2 | {"attention_bias": True},
    "biases everywhere": LLAMA2 | {"attention_bias": True, "mlp_bias": True},
    "Mistral 7B v0.1": MISTRAL,
    "Mistral 7B v0.3": MISTRAL | {
        "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.42.0.dev0",
        "vocab_size": 32768,
    },
}  # fmt: skip
# Contexts before scaling, and windows, are divided by this, so that 3,000 positions lie beyond all of them.
SHORTER = 16


def tiny(name: str, rows: int) -> dict[str, Any]:
    """The config.json of a family with tiny sizes: every key that it has, and none besides."""
    table: dict[str, Any] = json.loads(json.dumps(FAMILIES[name]))
    heads, kv_heads = table["num_attention_heads"], table["num_key_value_heads"]
    own = "head_dim" in table and table["head_dim"] * heads != table["hidden_size"]
    table |= {
        "hidden_size": 64, "intermediate_size": 4 * round(table["intermediate_size"] / table["hidden_size"] * 16),
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": max(1, 8 * kv_heads // heads), "vocab_size": rows,
        "bos_token_id": 1, "eos_token_id": [2, 1] if isinstance(table["eos_token_id"], list) else 2,
    }  # fmt: skip
    if "head_dim" in table:
        table["head_dim"] = 12 if own else 8
    if table.get("sliding_window"):
        table["sliding_window"] //= SHORTER
    scaling = table.get("rope_scaling") or table.get("rope_parameters") or {}
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] //= SHORTER
    elif scaling:
        table["max_position_embeddings"] = 4096 // int(scaling["factor"])
    return table


def write_model(folder: Path, name: str, tokenizer: Tokenizer, dtype: str = "float32") -> Path:
    """A tiny model of the family as transformers saves it, with random weights, and the family's own config.json."""
    import torch
    import transformers

    table = tiny(name, tokenizer.vocab_size) | {"dtype" if "dtype" in FAMILIES[name] else "torch_dtype": dtype}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(table))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        scale = {True: 0.2}.get(parameter.ndim == 1, 1.0 if "embed_tokens" in key else parameter.shape[-1] ** -0.5)
        parameter.data = draw * scale + (1.0 if "norm" in key else 0.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(table))
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return folder


def transformers_model(folder: Path) -> Any:
    """The model as transformers reads it from its files, computing in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


def transformers_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def random_ids(rows: int, length: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (rows, length))
