"""The name of a model's family, and the constants that decide it, for reports."""

from llama_jax.config import ModelArgs
from llama_jax.rope_scaling import ORIGINAL

# LLaMA 3's vocabulary. Fine-tunes add rows to it.
LLAMA3_ROWS = 128_256


def family_of(args: ModelArgs, source: str, kind: str = "llama") -> str:
    """Return the family's name with the constants in which a model differs from LLaMA 2's plain form.

    source: the file that has the constants. kind: the model_type, llama or mistral, where a file tells it.
    Example: "LLaMA 3.1: rope_scaling llama3 (factor 8), 8 KV heads, ...".
    """
    return f"{'Mistral' if kind == 'mistral' else _name(args)}: {', '.join(_facts(args))} ({source})"


def is_llama3(args: ModelArgs) -> bool:
    """Return whether the model is of LLaMA 3 or one of its successors, by its vocabulary and rotary embedding."""
    return args.vocab_size >= LLAMA3_ROWS or (args.rope_scaling or {}).get("rope_type") == "llama3"


def _name(args: ModelArgs) -> str:
    if args.attention_bias or args.mlp_bias or args.head_dim is not None:
        return "LLaMA of other constants"
    # Mistral 7B. Later than v0.1 it has no window, and differs from LLaMA 3 8B by its vocabulary.
    shape = args.dim, args.hidden_width, args.n_heads, args.kv_heads
    if args.sliding_window is not None or (shape == (4096, 14336, 32, 8) and not is_llama3(args)):
        return "Mistral"
    scaling = args.rope_scaling
    if scaling is not None and scaling["rope_type"] != "llama3":
        return "LLaMA of scaled context"
    if scaling is not None:
        usual = scaling.get(ORIGINAL) == 8192 and scaling["low_freq_factor"] == 1 and scaling["high_freq_factor"] == 4
        names = {8.0: "LLaMA 3.1 or 3.3" if args.n_layers == 80 else "LLaMA 3.1", 32.0: "LLaMA 3.2"}
        return names.get(float(scaling["factor"]), "LLaMA 3") if usual else "LLaMA 3 of other constants"
    if is_llama3(args):
        return "LLaMA 3"
    if args.rope_theta == 1e6:
        return "Code Llama"
    if args.rope_theta != 1e4:
        return "LLaMA of other constants"
    return "LLaMA 2" if args.norm_eps != 1e-6 else "LLaMA 1 or 2"


def _facts(args: ModelArgs) -> list[str]:
    heads = f"{args.kv_heads} KV heads" if args.kv_heads != args.n_heads else f"{args.n_heads} heads"
    return [*constants_of(args), f"rope_theta {args.rope_theta:g}", heads, f"{args.vocab_size:,} rows"]


def constants_of(args: ModelArgs) -> list[str]:
    """Return the constants that a LLaMA 2 does not have, in words."""
    scaling = args.rope_scaling
    found = [] if scaling is None else [f"rope_scaling {scaling['rope_type']} (factor {scaling['factor']:g})"]
    if args.head_dim is not None:
        found.append(f"head_dim {args.head_dim}")
    found += [name for name in ("attention_bias", "mlp_bias") if getattr(args, name)]
    found += ["tied embeddings"] if args.tie_embeddings else []
    return found if args.sliding_window is None else [*found, f"window {args.sliding_window:,}"]
