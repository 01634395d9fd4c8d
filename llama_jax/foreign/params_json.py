"""Meta's params.json, read key by key as Meta's model code does (ModelArgs in llama/model.py), and written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.config_json import NO_BIAS, NO_EXPERTS, NO_ROPE, NO_WINDOW, QUANTIZED
from llama_jax.foreign.keys import Keys, Neutral, check_arguments, names, take

READ = names(
    """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta max_seq_len head_dim
    hidden_dim intermediate_size sliding_window"""
)
NEUTRAL = {
    "use_scaled_rope": Neutral((False,), NO_ROPE),
    "rope_scaling_factor": Neutral((1,), NO_ROPE),
    **dict.fromkeys(("rope_scaling", "yarn", "high_freq_factor", "low_freq_factor"), Neutral((), NO_ROPE)),
    "causal": Neutral((True,), NO_WINDOW),
    **dict.fromkeys(("attention_chunk_size", "nope_layer_interval"), Neutral((), NO_WINDOW)),
    "moe": Neutral((), NO_EXPERTS),
    **dict.fromkeys(("num_experts", "moe_args"), Neutral((), NO_EXPERTS)),
    **dict.fromkeys(("quantization_args", "quantization"), Neutral((), QUANTIZED)),
    **dict.fromkeys(("lora_args", "lora"), Neutral((), "merge the adapter into the weights first")),
    **dict.fromkeys(("bias", "qkv_bias", "attention_bias"), Neutral((False,), NO_BIAS)),
    **dict.fromkeys(("use_qk_norm", "qk_norm"), Neutral((False,))),
    **dict.fromkeys(("act_fn", "activation", "hidden_act"), Neutral(("silu", "swish", "swiglu"), "this project has SwiGLU alone")),
    "vision_chunk_size": Neutral((-1,), "this project has no images"),
    "vision_num_cross_attention_layers": Neutral((-1,), "this project has no images"),
    **dict.fromkeys(("vision_args", "vision_encoder"), Neutral((), "this project has no images")),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attn_temperature_tuning"), Neutral((False,))),
}  # fmt: skip
IGNORED = names("max_batch_size model_parallel_size dropout dtype vision_max_num_chunks max_position_embeddings name")
KEYS = Keys(READ, NEUTRAL, IGNORED)


@dataclasses.dataclass(frozen=True)
class Params:
    """The content of params.json."""

    args: ModelArgs
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]
    """Keys that were not read and may have a meaning."""


def check_params(table: dict[str, Any], path: Path) -> None:
    """Raise a UserError that names the key if params.json does not describe a LLaMA 2."""
    KEYS.check(_inner(table), path)


def read_params(table: dict[str, Any], path: Path, vocab_size: int, max_seq_len: int) -> Params:
    """Read the model arguments from ``table``, the params.json at ``path``.

    ``vocab_size`` is that of the embeddings. ``max_seq_len`` replaces the file's context length unless it is 0. Raises
    a UserError that names the key if the model is not a LLaMA 2.
    """
    check_params(table, path)
    outer, table = table, _inner(table)
    default = ModelArgs()
    args = ModelArgs(
        dim=take(table, "dim", int, path),
        n_layers=take(table, "n_layers", int, path),
        n_heads=take(table, "n_heads", int, path),
        n_kv_heads=take(table, "n_kv_heads", int, path, None),
        vocab_size=vocab_size,
        multiple_of=take(table, "multiple_of", int, path, default.multiple_of),
        ffn_dim_multiplier=take(table, "ffn_dim_multiplier", float, path, None),
        norm_eps=take(table, "norm_eps", float, path, default.norm_eps),
        rope_theta=take(table, "rope_theta", float, path, default.rope_theta),
        max_seq_len=max_seq_len or take(table, "max_seq_len", int, path, default.max_seq_len),
        sliding_window=take(table, "sliding_window", int, path, None),
    )
    check_arguments(args, path, {})
    _check_sizes(table, args, path)
    unknown = KEYS.unknown(table) + (sorted(outer.keys() - {"model"}) if table is not outer else [])
    return Params(args, tuple(_warnings(table, args, path)), tuple(unknown))


def stated(table: dict[str, Any]) -> str:
    """Return the keys that determine shapes, with their values, for an error about shapes."""
    table = _inner(table)
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier")
    return ", ".join(f"{key} {quoted(table[key], 20)}" if key in table else f"no {key}" for key in keys)


def check_expressible(args: ModelArgs) -> None:
    """Raise UserError if Meta's code has no such model."""
    if args.window is not None:
        raise UserError(
            f"--to meta: expected a model that attends to its whole context, found a sliding window of {args.window:,} of "
            f"{args.max_seq_len:,} positions, which Meta's code does not have; take --to huggingface"
        )


def write_params(args: ModelArgs) -> str:
    """Return params.json of a model. Meta's defaults are left out as in Meta's files."""
    table: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "multiple_of": args.multiple_of,
        "norm_eps": args.norm_eps,
        "vocab_size": args.vocab_size,
    }
    if args.n_kv_heads is not None:
        table["n_kv_heads"] = args.n_kv_heads
    if args.ffn_dim_multiplier is not None:
        table["ffn_dim_multiplier"] = args.ffn_dim_multiplier
    if args.rope_theta != ModelArgs().rope_theta:
        table["rope_theta"] = args.rope_theta
    return json.dumps(table)


def _inner(table: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, which some files wrap in {"model": ...}."""
    inner = table.get("model")
    return inner if isinstance(inner, dict) else table


def _check_sizes(table: dict[str, Any], args: ModelArgs, path: Path) -> None:
    """Raise UserError if a size that other LLaMAs state directly differs from that of LLaMA 2."""
    rules = {
        "head_dim": (args.head_dim, "dim / n_heads"),
        "hidden_dim": (args.hidden_dim, "by multiple_of and ffn_dim_multiplier"),
        "intermediate_size": (args.hidden_dim, "by multiple_of and ffn_dim_multiplier"),
    }
    for key, (size, rule) in rules.items():
        if (found := take(table, key, int, path, size)) != size:
            raise UserError(
                f"{path}: {key}: expected {size}, {rule}, as LLaMA 2 has, found {found}; this project has no others"
            )


def _warnings(table: dict[str, Any], args: ModelArgs, path: Path) -> list[str]:
    warnings = []
    if args.max_seq_len > (known := take(table, "max_seq_len", int, path, args.max_seq_len)):
        warnings.append(f"the context is {args.max_seq_len:,} tokens, and params.json says max_seq_len {known:,}")
    stated_size = take(table, "vocab_size", int, path, -1)
    if stated_size not in (-1, args.vocab_size):
        warnings.append(
            f"params.json says vocab_size {stated_size:,}: the {args.vocab_size:,} rows of the embeddings count"
        )
    if args.norm_eps == 1e-6 and args.vocab_size == 32000:
        warnings.append(
            "norm_eps is 1e-06, as for LLaMA 1; the params.json of llama-2-7b-chat had it by mistake in 2023: for that model, "
            "write 1e-05 there"
        )
    return warnings
