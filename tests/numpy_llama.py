"""LLaMA 2 in plain numpy and float64, written from the papers; the tests hold the model against it."""

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


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """RoFormer, equation 15, on one head [T, H]: the pair (i, i + H/2) turns by position x theta^(-2i/H)."""
    T, H = x.shape
    out = np.empty_like(x)
    for t in range(T):
        for i in range(H // 2):
            angle = t * theta ** (-2 * i / H)
            a, b = x[t, i], x[t, i + H // 2]
            out[t, i] = a * np.cos(angle) - b * np.sin(angle)
            out[t, i + H // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


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


def attention(x: np.ndarray, p: dict[str, np.ndarray], theta: float, window: int | None = None) -> np.ndarray:
    """Grouped-query attention: consecutive query heads share a key and value head: [T, D] -> [T, D]."""
    heads, kv_heads = p["wq"].shape[1], p["wk"].shape[1]
    out = np.zeros_like(x)
    for n in range(heads):
        shared = n // (heads // kv_heads)
        q = rotate(x @ p["wq"][:, n], theta)
        k = rotate(x @ p["wk"][:, shared], theta)
        out += attend(q, k, x @ p["wv"][:, shared], window) @ p["wo"][n]
    return out


def feed_forward(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """SwiGLU (Shazeer, 2020, equation 6): [T, D] -> [T, D]."""
    gate = x @ p["w1"]
    return (gate / (1 + np.exp(-gate)) * (x @ p["w3"])) @ p["w2"]


def llama(params: Any, token_ids: np.ndarray, args: Any) -> np.ndarray:
    """Logits of the token after each position: int [B, T] -> float64 [B, T, V]."""
    return np.stack([_llama(_float64(params), row, args) for row in np.asarray(token_ids)])


def _llama(params: Any, row: np.ndarray, args: Any) -> np.ndarray:
    x = params["tok_embeddings"][row]
    for i in range(args.n_layers):
        layer = _layer(params["layers"], i)
        normed = rms_norm(x, layer["attention_norm"], args.norm_eps)
        x = x + attention(normed, layer["attention"], args.rope_theta, args.sliding_window)
        x = x + feed_forward(rms_norm(x, layer["ffn_norm"], args.norm_eps), layer["feed_forward"])
    output = params["tok_embeddings"].T if args.tie_embeddings and "output" not in params else params["output"]
    return rms_norm(x, params["norm"], args.norm_eps) @ output


def _layer(tree: Any, i: int) -> Any:
    return {name: _layer(leaf, i) if isinstance(leaf, dict) else leaf[i] for name, leaf in tree.items()}


def _float64(tree: Any) -> Any:
    return {
        name: _float64(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float64) for name, leaf in tree.items()
    }
