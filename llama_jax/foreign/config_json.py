"""Hugging Face's config.json of a LLaMA, read key by key.

The mathematics is what transformers computes (LlamaConfig, LlamaForCausalLM, PreTrainedConfig,
RotaryEmbeddingConfigMixin). A key that transformers reads and this project does not support is refused by name unless
its value is neutral. So are keys by which other models of transformers change the mathematics, although its LLaMA
ignores them, because such a file contradicts itself.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.keys import Keys, Neutral, check_arguments, names, take
from llama_jax.foreign.rope import NO_ROPE, read_rope

NO_BIAS = "this project has biases by attention_bias and mlp_bias alone"
NO_WINDOW = "this project attends to the whole context, or to one sliding window in all layers"
NO_EXPERTS = "this project has no mixtures of experts"
QUANTIZED = (
    "take the model that it was quantized from, and quantize it here with --weights int8 or int4 of the converter"
)
NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
    "ffn_dim_multiplier": "intermediate_size",
    "multiple_of": "intermediate_size",
    "hidden_dim": "intermediate_size",
}
"""Our names of the model's arguments, and the keys that they are read from."""
READ = names(
    """hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size rms_norm_eps
    max_position_embeddings rope_theta rope_parameters rope_scaling partial_rotary_factor original_max_position_embeddings
    attention_bias mlp_bias head_dim model_type sliding_window use_sliding_window max_window_layers
    layer_types query_pre_attn_scalar tie_word_embeddings torch_dtype dtype bos_token_id eos_token_id transformers_weights
    auto_map"""
)
SOFT_CAPS = (
    "attn_softcap", "attn_soft_cap", "attn_logit_softcap", "attn_logit_softcapping", "final_softcap", "final_logit_softcap",
    "final_logit_softcapping", "logit_softcap", "logit_softcapping", "logits_soft_cap", "softcap",
)  # fmt: skip
NEUTRAL = {
    "hidden_act": Neutral(("silu", "swish"), "this project has SwiGLU alone"),
    "is_causal": Neutral((True,), NO_WINDOW, null=False),
    "is_encoder_decoder": Neutral((False,)),
    "add_cross_attention": Neutral((False,)),
    "per_layer_config": Neutral(({},), "this project's layers are all alike"),
    "pruned_heads": Neutral(({},), "this project's layers are all alike"),
    "configuration_files": Neutral(([], {}), "transformers reads another file instead: copy it over config.json"),
    "fusion_config": Neutral(({},)),
    "kv_sharing_modes": Neutral(()),
    **dict.fromkeys(("quantization_config", "quantization", "compression_config"), Neutral((), QUANTIZED)),
    **dict.fromkeys(("qkv_bias", "attn_bias", "use_bias", "use_qkv_bias", "add_qkv_bias", "add_bias_linear", "attention_out_bias", "bias"),
                    Neutral((False,), NO_BIAS)),
    "attention_chunk_size": Neutral((), NO_WINDOW),
    **dict.fromkeys(("rope_local_base_freq", "local_rope_theta", "global_rope_theta", "rotary_dim", "no_rope_layers",
                     "no_rope_layer_interval"), Neutral((), NO_ROPE)),
    "rotary_pct": Neutral((1,), NO_ROPE),
    "rope_interleaved": Neutral((False,), NO_ROPE),
    **dict.fromkeys(SOFT_CAPS, Neutral(())),
    **dict.fromkeys(("clip_qkv", "attention_multiplier", "attention_scale", "swiglu_limit"), Neutral(())),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "scale_emb", "scale_depth"), Neutral((1,))),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe", "moe_intermediate_size"), Neutral((0,), NO_EXPERTS)),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm", "alibi", "parallel_residual", "use_parallel_residual", "parallel_attn"), Neutral((False,))),
}  # fmt: skip
DROPOUTS = ("attention_dropout", "hidden_dropout")
IGNORED = frozenset(DROPOUTS) | names(
    """architectures transformers_version _name_or_path name_or_path _commit_hash initializer_range use_cache pad_token_id
    pretraining_tp output_hidden_states output_attentions return_dict chunk_size_feed_forward
    id2label label2id num_labels problem_type attn_implementation _attn_implementation _attn_implementation_autoset
    experts_implementation max_sequence_length tie_last_hidden_states torchscript
    use_bfloat16 tf_legacy_loss finetuning_task task_specific_params prefix sep_token_id tokenizer_class decoder_start_token_id
    is_decoder cross_attention_hidden_size tie_encoder_decoder is_llama_config transformers.js_config unsloth_version
    unsloth_fixed _flash_attn_2_enabled gradient_checkpointing num_logits_to_keep
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings do_sample num_beams
    num_beam_groups penalty_alpha cache_implementation cache_config temperature top_k top_p min_p typical_p epsilon_cutoff
    eta_cutoff diversity_penalty repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids
    force_words_ids renormalize_logits constraints forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias guidance_scale low_memory
    num_return_sequences output_scores output_logits return_dict_in_generate encoder_no_repeat_ngram_size
    assistant_confidence_threshold assistant_lookbehind num_assistant_tokens num_assistant_tokens_schedule target_lookbehind"""
)
FAMILIES = {"llama": "LLaMA", "mistral": "Mistral"}
"""The models of transformers that this project runs, by model_type."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 1 << 17},
}
"""Values of keys that are not there, where they are not those of transformers' LLaMA."""
KEYS = Keys(READ, NEUTRAL, IGNORED)
# Values to try for Meta's rule of the feed-forward width: Meta's own first, then powers of two.
MULTIPLIERS = (None, 1.3)
MULTIPLES = (256, 4096, *(1 << i for i in reversed(range(13))))


@dataclasses.dataclass(frozen=True)
class Config:
    """The content of config.json."""

    args: ModelArgs
    kind: str
    """Its model_type."""
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]
    """Keys that were not read and may have a meaning."""


def read_config(table: dict[str, Any], path: Path, max_seq_len: int) -> Config:
    """Read the model from ``table``, the config.json at ``path``.

    ``max_seq_len`` replaces the file's context length unless it is 0. Raises a UserError that names the key if model.py
    cannot express the model.
    """
    kind, doubt = _kind(table)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path}: model_type: expected 'llama' or 'mistral', found {quoted(kind)}; this project runs only LLaMA models "
            "and Mistral's of the same shape"
        )
    table = DEFAULTS[kind] | table
    KEYS.check(table, path)
    _check_soft_caps(table, path)
    dim, heads = take(table, "hidden_size", int, path), take(table, "num_attention_heads", int, path)
    hidden = take(table, "intermediate_size", int, path)
    multiple_of, multiplier = _published_rule(dim, hidden, path) or (ModelArgs().multiple_of, None)
    head_dim = take(table, "head_dim", int, path, None)
    head_width = dim // max(heads, 1) if head_dim is None else head_dim
    trained = take(table, "max_position_embeddings", int, path, 2048)
    rope = read_rope(table, path, head_width, trained)
    args = ModelArgs(
        dim=dim,
        n_layers=take(table, "num_hidden_layers", int, path),
        n_heads=heads,
        n_kv_heads=take(table, "num_key_value_heads", int, path, None),
        vocab_size=take(table, "vocab_size", int, path),
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=take(table, "rms_norm_eps", float, path, 1e-6),
        rope_theta=rope.theta,
        max_seq_len=max_seq_len or rope.context,
        rope_scaling=rope.scaling,
        head_dim=None if head_width * heads == dim else head_dim,
        attention_bias=take(table, "attention_bias", bool, path, False),
        mlp_bias=take(table, "mlp_bias", bool, path, False),
        tie_embeddings=take(table, "tie_word_embeddings", bool, path, False),
        sliding_window=take(table, "sliding_window", int, path, None) if kind == "mistral" else None,
    )
    if args.hidden_width != hidden:
        args = dataclasses.replace(args, hidden_dim=hidden)
    check_arguments(args, path, NAMES)
    _check_windows(table, args, path, kind)
    _check_heads(table, args, path, kind)
    warnings = [*doubt, *rope.warnings]
    if max_seq_len > rope.context:
        warnings.append(
            f"the context is {max_seq_len:,} tokens, and config.json says max_position_embeddings {trained:,}"
            + (f", and is for {rope.context:,} by its rope_scaling" if rope.context != trained else "")
        )
    warnings += [
        f"config.json has {key} {quoted(table[key], 20)}: it is for training, where this project has no such dropout"
        for key in DROPOUTS
        if table.get(key)
    ]
    if table.get("auto_map"):
        warnings.append(
            "config.json names the model's own code (auto_map): it is not run, and transformers' LLaMA is assumed"
        )
    return Config(args, kind, tuple(warnings), tuple(KEYS.unknown(table) + list(rope.unknown)))


def _kind(table: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the model_type, or the class of the model where there is none, and a warning if the two differ."""
    names = table.get("architectures")
    written = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    found = next((kind for kind in FAMILIES for name in written if name.lower().startswith(kind)), None)
    if "model_type" not in table:
        return found or (written[0] if written else "llama"), []
    kind = table["model_type"]
    if not written or found == kind:
        return kind, []
    return kind, [
        f"config.json has model_type {kind}, and architectures {quoted(names)}: the first is read, as by transformers"
    ]


def _check_soft_caps(table: dict[str, Any], path: Path) -> None:
    """Raise UserError on a cap of logits in a spelling that ``NEUTRAL`` does not have."""
    for key in KEYS.unknown(table):
        if re.search("soft_?cap", key) and table[key] not in (None, False, 0):
            raise UserError(f"{path}: {key}: expected null, found {quoted(table[key])}; this project has no such model")


def stated(table: dict[str, Any]) -> str:
    """Return the keys that determine shapes, with their values, for an error about shapes."""
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    shown = [f"{key} {quoted(table[key], 20)}" if key in table else f"no {key}" for key in keys]
    optional = ("head_dim", "attention_bias", "mlp_bias")
    return ", ".join(shown + [f"{key} {quoted(table[key], 20)}" for key in optional if table.get(key)])


def stored_type(table: dict[str, Any]) -> str:
    """Return the type in which transformers loads the weights by config.json, or "" if it names none."""
    found = table.get("dtype") or table.get("torch_dtype")
    return found.removeprefix("torch.") if isinstance(found, str) else ""


def feed_forward_rule(dim: int, hidden: int, path: Path) -> tuple[int, float | None]:
    """Return multiple_of and ffn_dim_multiplier for which Meta's rule gives a feed-forward width of ``hidden``."""
    # Half a unit more, because the rule rounds down.
    return _published_rule(dim, hidden, path) or (1, (hidden + 0.5) / int(2 * (4 * dim) / 3))


def _published_rule(dim: int, hidden: int, path: Path) -> tuple[int, float | None] | None:
    """Return multiple_of and ffn_dim_multiplier as Meta has them. None if these do not give ``hidden``."""
    if not 0 < dim < 1 << 24 or not 0 < hidden < 1 << 24:
        raise UserError(f"{path}: expected sizes of a model, found hidden_size {dim} and intermediate_size {hidden}")
    for multiplier, multiple in itertools.product(MULTIPLIERS, MULTIPLES):
        if ModelArgs(dim=dim, n_heads=1, multiple_of=multiple, ffn_dim_multiplier=multiplier).hidden_width == hidden:
            return multiple, multiplier
    return None


def _check_heads(table: dict[str, Any], args: ModelArgs, path: Path, kind: str) -> None:
    """Raise UserError if a key about heads or biases is not neutral for this model."""
    scalar = take(table, "query_pre_attn_scalar", float, path, args.head_width)
    if scalar != args.head_width:
        raise UserError(
            f"{path}: query_pre_attn_scalar: expected {args.head_width}, the features of a head, found {scalar:g}; "
            "this project scales scores by these"
        )
    for name in ("attention_bias", "mlp_bias") if kind == "mistral" else ():
        if getattr(args, name):
            raise UserError(
                f"{path}: {name}: expected false, found true; transformers' Mistral ignores this key and has no biases: "
                "delete it, or write the model_type that is meant"
            )


def _check_windows(table: dict[str, Any], args: ModelArgs, path: Path, kind: str) -> None:
    """Raise UserError if the keys about attention windows contradict each other, or give layers different windows."""
    window = take(table, "sliding_window", int, path, None)
    if kind == "llama" and window is not None and window < args.max_seq_len:
        advice = f"with --max-seq-len {window}, the window is the context" if window > 0 else "write null"
        raise UserError(
            f"{path}: sliding_window: expected null, or the context of {args.max_seq_len:,} or more, found {window:,}; "
            f"transformers' LLaMA has no window and its Mistral has one (model_type): {advice}"
        )
    windowed = args.sliding_window is not None
    uses = take(table, "use_sliding_window", bool, path, windowed)
    if uses != windowed:
        expected = "true, as sliding_window says" if windowed else "false, as there is no sliding_window"
        raise UserError(
            f"{path}: use_sliding_window: expected {expected}, found {str(uses).lower()}; transformers' {FAMILIES[kind]} "
            "ignores this key: delete it, or write sliding_window as it is meant"
        )
    full_layers = take(table, "max_window_layers", int, path, 0)
    if windowed and full_layers:
        raise UserError(f"{path}: max_window_layers: expected 0 or null, found {full_layers}; {NO_WINDOW}")
    layers = table.get("layer_types") or []
    expected_types = ("sliding_attention",) if windowed else ("full_attention", "attention")
    if not isinstance(layers, list) or any(found not in expected_types for found in layers):
        raise UserError(
            f"{path}: layer_types: expected {expected_types[0]} in each layer, found {quoted(layers)}; {NO_WINDOW}"
        )
