"""LLaMA 2 in plain numpy and float64, written from the papers; the tests hold the model against it.

So are the constants of its family: scaled rotary embeddings, heads of their own size, biases.
"""

import math
from typing import Any

import numpy as np


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Parameters in a tree of shapes, of the size of initial ones but for the norms' weights: these are not all one."""
    rng = np.random.default_rng(seed)
    dim = shapes["norm"].shape[0]

    def make(name: str, leaf: Any) -> np.ndarray:
        if "norm" in name:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0.0, 1.0 if name == "tok_embeddings" else dim**-0.5, leaf.shape).astype(np.float32)

    def walk(tree: Any) -> Any:
        return {name: walk(leaf) if isinstance(leaf, dict) else make(name, leaf) for name, leaf in tree.items()}

    return walk(shapes)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Zhang and Sennrich, 2019, equation 4: [T, D], [D] -> [T, D]."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float, scaling: dict[str, Any] | None = None, trained: int = 0) -> np.ndarray:
    """RoFormer, equation 15, on one head [T, H]: the pair (i, i + H/2) turns by position x theta^(-2i/H).

    A scaled embedding has other frequencies, and a length of its vectors. trained: the context before scaling.
    """
    T, H = x.shape
    out = np.empty_like(x)
    length = 1.0
    for i in range(H // 2):
        frequency = theta ** (-2 * i / H)
        if scaling is not None:
            frequency, length = scaled(
                i, H, theta, scaling, scaling.get("original_max_position_embeddings", trained), T
            )
        for t in range(T):
            angle = t * frequency
            a, b = x[t, i] * length, x[t, i + H // 2] * length
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + H // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


def scaled(i: int, H: int, theta: float, scaling: dict[str, Any], trained: int, T: int) -> tuple[float, float]:
    """The frequency of pair i of a scaled embedding in a text of T tokens, and the factor of rotated vectors."""
    kind, factor, frequency = scaling["rope_type"], scaling["factor"], theta ** (-2 * i / H)
    if kind == "linear":  # positions in smaller steps
        return frequency / factor, 1.0
    if kind == "dynamic":  # the base grows with the text, so that its slowest pair turns no further than it did
        grown = max(1.0, factor * max(T, trained) / trained - (factor - 1))
        return (theta * grown ** (H / (H - 2))) ** (-2 * i / H), 1.0
    turns = trained * frequency / (2 * math.pi)  # in the context before scaling
    if kind == "llama3":  # slow pairs are slowed down, fast ones are not
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        return frequency * (kept + (1 - kept) / factor), 1.0
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)  # YaRN, section 3.2, over pairs, not turns
    first, last = (H * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (fast, slow))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, H - 1)
    kept = 1 - min(1.0, max(0.0, (i - first) / (last - first or 0.001)))
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    length = 0.1 * math.log(factor) + 1  # section 3.4
    if mscale and all_dim:
        length = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return frequency * (kept + (1 - kept) / factor), scaling.get("attention_factor", length)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None = None) -> np.ndarray:
    """One head's causal attention (Vaswani et al., 2017, equation 1): three [T, H] -> [T, H].

    A window is the number of positions that a query sees, its own among them (Mistral 7B, section 2).
    """
    scores = q @ k.T / np.sqrt(q.shape[1])
    for t in range(len(scores)):
        scores[t, t + 1 :] = -np.inf
        scores[t, : max(0, t + 1 - (window or t + 1))] = -np.inf
    return softmax(scores) @ v


def attention(x: np.ndarray, p: dict[str, np.ndarray], args: Any) -> np.ndarray:
    """Grouped-query attention: consecutive query heads share a key and value head: [T, D] -> [T, D]."""
    heads, kv_heads = p["wq"].shape[1], p["wk"].shape[1]
    rope = args.rope_theta, args.rope_scaling, args.max_seq_len
    out = np.zeros_like(x) + p.get("wo_bias", 0.0)
    for n in range(heads):
        shared = n // (heads // kv_heads)
        q = rotate(x @ p["wq"][:, n] + _bias(p, "wq", n), *rope)
        k = rotate(x @ p["wk"][:, shared] + _bias(p, "wk", shared), *rope)
        out += attend(q, k, x @ p["wv"][:, shared] + _bias(p, "wv", shared), args.sliding_window) @ p["wo"][n]
    return out


def _bias(p: dict[str, np.ndarray], name: str, head: int) -> Any:
    return p[f"{name}_bias"][head] if f"{name}_bias" in p else 0.0


def feed_forward(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """SwiGLU (Shazeer, 2020, equation 6): [T, D] -> [T, D]."""
    gate = x @ p["w1"] + p.get("w1_bias", 0.0)
    return (gate / (1 + np.exp(-gate)) * (x @ p["w3"] + p.get("w3_bias", 0.0))) @ p["w2"] + p.get("w2_bias", 0.0)


def llama(params: Any, token_ids: np.ndarray, args: Any) -> np.ndarray:
    """Logits of the token after each position: int [B, T] -> float64 [B, T, V]."""
    return np.stack([_llama(_float64(params), row, args) for row in np.asarray(token_ids)])


def _llama(params: Any, row: np.ndarray, args: Any) -> np.ndarray:
    x = params["tok_embeddings"][row]
    for i in range(args.n_layers):
        layer = _layer(params["layers"], i)
        x = x + attention(rms_norm(x, layer["attention_norm"], args.norm_eps), layer["attention"], args)
        x = x + feed_forward(rms_norm(x, layer["ffn_norm"], args.norm_eps), layer["feed_forward"])
    output = params["tok_embeddings"].T if args.tie_embeddings and "output" not in params else params["output"]
    return rms_norm(x, params["norm"], args.norm_eps) @ output


def _layer(tree: Any, i: int) -> Any:
    return {name: _layer(leaf, i) if isinstance(leaf, dict) else leaf[i] for name, leaf in tree.items()}


def _float64(tree: Any) -> Any:
    return {
        name: _float64(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for name, leaf in tree.items()
    }
