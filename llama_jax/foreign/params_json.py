"""Meta's params.json, read key by key as Meta's model code does (ModelArgs in llama/model.py), and written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llama_jax.config import ModelArgs
from llama_jax.errors import UserError, quoted
from llama_jax.foreign.config_json import NO_EXPERTS, NO_WINDOW, QUANTIZED, SOFT_CAPS, feed_forward_rule
from llama_jax.foreign.family import LLAMA3_ROWS
from llama_jax.foreign.keys import Keys, Neutral, check_arguments, names, take
from llama_jax.rope_scaling import ORIGINAL, RopeScaling

READ = names(
    """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta max_seq_len head_dim
    hidden_dim intermediate_size sliding_window use_scaled_rope rope_scaling_factor max_position_embeddings tied_embeddings"""
)
NO_BIAS = "Meta's code has no biases: take Hugging Face's files of this model"
NO_ROPE = "Meta's code has no such embedding: take Hugging Face's files of this model"
# LLaMA 3.1's scaling (llama-models, apply_scaling). Meta's code has its constants; params.json says only that it is on.
SCALED: RopeScaling = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    ORIGINAL: 8192,
}
# dim and n_layers of LLaMA 3.2's 1B and 3B. Their factor is 32, by the config.json that Meta publishes with them, and
# their params.json does not tell it.
FACTOR_32 = {(2048, 16), (3072, 28)}
# The contexts of LLaMA 3 and of LLaMA 3.1 and later. params.json has none.
CONTEXT, SCALED_CONTEXT = 8192, 131_072
NEUTRAL = {
    **dict.fromkeys(("rope_scaling", "yarn", "high_freq_factor", "low_freq_factor"), Neutral((), NO_ROPE)),
    "causal": Neutral((True,), NO_WINDOW),
    **dict.fromkeys(("attention_chunk_size", "nope_layer_interval"), Neutral((), NO_WINDOW)),
    "_sliding_window": Neutral((), NO_WINDOW),
    "llama_4_scaling": Neutral((), "this project does not scale attention by the position"),
    "model_type": Neutral(("transformer", "llama", "mistral")),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), Neutral(())),
    "moe": Neutral((), NO_EXPERTS),
    **dict.fromkeys(("num_experts", "moe_args"), Neutral((), NO_EXPERTS)),
    **dict.fromkeys(("quantization_args", "quantization"), Neutral((), QUANTIZED)),
    **dict.fromkeys(("lora_args", "lora"), Neutral((), "merge the adapter into the weights first")),
    **dict.fromkeys(("bias", "qkv_bias", "attention_bias", "use_biases"), Neutral((False,), NO_BIAS)),
    **dict.fromkeys(("use_qk_norm", "qk_norm"), Neutral((False,))),
    **dict.fromkeys(("act_fn", "activation", "hidden_act"), Neutral(("silu", "swish", "swiglu"), "this project has SwiGLU alone")),
    "vision_chunk_size": Neutral((-1,), "this project has no images"),
    "vision_num_cross_attention_layers": Neutral((-1,), "this project has no images"),
    **dict.fromkeys(("vision_args", "vision_encoder"), Neutral((), "this project has no images")),
    **dict.fromkeys((*SOFT_CAPS, "attn_temperature_tuning"), Neutral((False,))),
}  # fmt: skip
IGNORED = names("max_batch_size model_parallel_size dropout dtype vision_max_num_chunks name use_cache")
KEYS = Keys(READ, NEUTRAL, IGNORED)


@dataclasses.dataclass(frozen=True)
class Params:
    """The content of params.json."""

    args: ModelArgs
    warnings: tuple[str, ...]
    unknown: tuple[str, ...]
    """Keys that were not read and may have a meaning."""


def check_params(table: dict[str, Any], path: Path) -> None:
    """Raise a UserError that names the key if params.json does not describe a LLaMA."""
    KEYS.check(_inner(table), path)


def read_params(table: dict[str, Any], path: Path, vocab_size: int, max_seq_len: int) -> Params:
    """Read the model arguments from ``table``, the params.json at ``path``.

    ``vocab_size`` is that of the embeddings. ``max_seq_len`` replaces the file's context length unless it is 0. Raises
    a UserError that names the key if the model is not a LLaMA.
    """
    check_params(table, path)
    outer, table = table, _inner(table)
    default = ModelArgs()
    scaling, told = _rope_scaling(table, path)
    # The code of LLaMA 3, which alone has this key, has another default.
    theta = 500_000.0 if "use_scaled_rope" in table else default.rope_theta
    usual = usual_context(vocab_size, scaling)
    context = take(table, "max_seq_len", int, path, take(table, "max_position_embeddings", int, path, usual))
    args = ModelArgs(
        dim=take(table, "dim", int, path),
        n_layers=take(table, "n_layers", int, path),
        n_heads=take(table, "n_heads", int, path),
        n_kv_heads=take(table, "n_kv_heads", int, path, None),
        vocab_size=vocab_size,
        multiple_of=take(table, "multiple_of", int, path, default.multiple_of),
        ffn_dim_multiplier=take(table, "ffn_dim_multiplier", float, path, None),
        norm_eps=take(table, "norm_eps", float, path, default.norm_eps),
        rope_theta=take(table, "rope_theta", float, path, theta),
        max_seq_len=max_seq_len or context,
        rope_scaling=scaling,
        sliding_window=take(table, "sliding_window", int, path, None),
    )
    head_dim = take(table, "head_dim", int, path, None)
    if head_dim is not None and head_dim * args.n_heads != args.dim:
        args = dataclasses.replace(args, head_dim=head_dim)
    args = check_arguments(_with_width(table, check_arguments(args, path, {}), path), path, {})
    unknown = KEYS.unknown(table) + (sorted(outer.keys() - {"model"}) if table is not outer else [])
    return Params(args, (*told, *_warnings(table, args, path)), tuple(unknown))


def usual_context(vocab_size: int, scaling: RopeScaling | None) -> int:
    """Return the context of the family: Meta's params.json has none. ``scaling`` is that of rotary embeddings."""
    if scaling is not None:
        return SCALED_CONTEXT
    return CONTEXT if vocab_size >= LLAMA3_ROWS else ModelArgs().max_seq_len


def width(table: dict[str, Any]) -> Any:
    """Return dim as the file has it, of any type, or None."""
    return _inner(table).get("dim")


def check_ties(table: dict[str, Any], args: ModelArgs, path: Path) -> None:
    """Raise UserError if the file at ``path`` ties the embeddings of a model whose files hold another output matrix."""
    if take(_inner(table), "tied_embeddings", bool, path, False) and not args.tie_embeddings:
        raise UserError(
            f"{path}: tied_embeddings: expected false beside an output.weight that differs from tok_embeddings.weight, found true; "
            "write false to use both, or delete the one that does not belong to the model"
        )


def stated(table: dict[str, Any]) -> str:
    """Return the keys that determine shapes, with their values, for an error about shapes."""
    table = _inner(table)
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier")
    return ", ".join(f"{key} {quoted(table[key], 20)}" if key in table else f"no {key}" for key in keys)


def write_params(args: ModelArgs) -> str:
    """Return params.json of a model. Meta's defaults are left out as in Meta's files.

    Raises a UserError that names the argument if Meta's code has no such model.
    """
    check_writable(args)
    multiple_of, multiplier = args.multiple_of, args.ffn_dim_multiplier
    if args.hidden_dim is not None:
        multiple_of, multiplier = feed_forward_rule(args.dim, args.hidden_dim, Path("params.json"))
    table: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "multiple_of": multiple_of,
        "norm_eps": args.norm_eps,
        "vocab_size": args.vocab_size,
    }
    if args.n_kv_heads is not None:
        table["n_kv_heads"] = args.n_kv_heads
    if multiplier is not None:
        table["ffn_dim_multiplier"] = multiplier
    if args.rope_theta != ModelArgs().rope_theta or args.rope_scaling is not None:
        table["rope_theta"] = args.rope_theta
    if args.rope_scaling is not None:
        table["use_scaled_rope"] = True
        if (factor := args.rope_scaling["factor"]) != _usual_factor(args.dim, args.n_layers):
            table["rope_scaling_factor"] = factor
    return json.dumps(table)


def check_writable(args: ModelArgs) -> None:
    """Raise UserError if Meta's code cannot express the model."""
    advice = "write Hugging Face's layout instead: --to huggingface"
    scaling = args.rope_scaling
    if scaling is not None:
        expected = SCALED | {"factor": scaling["factor"]}
        if scaling | {ORIGINAL: scaling.get(ORIGINAL, args.max_seq_len)} != expected:
            raise UserError(f"--to meta: rope_scaling: expected LLaMA 3.1's or none, found {scaling}; {advice}")
    if args.head_width * args.n_heads != args.dim:
        raise UserError(f"--to meta: head_dim: expected dim / n_heads, found {args.head_width}; {advice}")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(args, name):
            raise UserError(f"--to meta: {name}: expected none, since Meta's code has no biases, found it; {advice}")
    if args.window is not None:
        raise UserError(
            f"--to meta: sliding_window: expected none, or the context of {args.max_seq_len:,} positions, since Meta's code has "
            f"no windows, found {args.window:,}; {advice}"
        )


def _usual_factor(dim: int, n_layers: int) -> float:
    return 32.0 if (dim, n_layers) in FACTOR_32 else 8.0


def _rope_scaling(table: dict[str, Any], path: Path) -> tuple[RopeScaling | None, list[str]]:
    """Return the scaling of the rotary embedding, and what was decided about it. Raises UserError on a wrong type."""
    factor = take(table, "rope_scaling_factor", float, path, None)
    if not take(table, "use_scaled_rope", bool, path, False):
        if factor not in (None, 1.0):
            raise UserError(
                f"{path}: rope_scaling_factor: expected use_scaled_rope true beside it, found {factor:g} without it"
            )
        return None, []
    told = []
    if factor is None:
        shape = take(table, "dim", int, path), take(table, "n_layers", int, path)
        factor = _usual_factor(*shape)
        whose = "LLaMA 3.2's 1B and 3B, by the shape" if factor == 32 else "LLaMA 3.1 and 3.3, as in Meta's code"
        told.append(
            f"params.json says use_scaled_rope without a factor: {factor:g} is used, that of {whose}; "
            "another one is taken from a key rope_scaling_factor"
        )
    return SCALED | {"factor": factor}, told


def _inner(table: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments, which some files wrap in {"model": ...}."""
    inner = table.get("model")
    return inner if isinstance(inner, dict) else table


def _with_width(table: dict[str, Any], args: ModelArgs, path: Path) -> ModelArgs:
    """Return the arguments with the feed-forward width that files of Meta's layout by others state outright."""
    for key in ("hidden_dim", "intermediate_size"):
        hidden = take(table, key, int, path, None)
        if hidden is not None and (args.hidden_dim is not None or hidden != args.hidden_width):
            if args.hidden_dim not in (None, hidden):
                raise UserError(f"{path}: {key}: expected {args.hidden_dim}, as hidden_dim says, found {hidden}")
            args = dataclasses.replace(args, hidden_dim=hidden)
    return args


def _warnings(table: dict[str, Any], args: ModelArgs, path: Path) -> list[str]:
    warnings = []
    key = "max_seq_len" if table.get("max_seq_len") is not None else "max_position_embeddings"
    if args.max_seq_len > (known := take(table, key, int, path, args.max_seq_len)):
        warnings.append(f"the context is {args.max_seq_len:,} tokens, and params.json says {key} {known:,}")
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
