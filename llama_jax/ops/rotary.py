"""Rotary embeddings: the angles of positions, also scaled to longer contexts, and the quarter turn.

Scaled frequencies are those of transformers (modeling_rope_utils.py), which computes them and the angles in float32.
So do the functions here, operation by operation: at position 100,000 the last digit of a float32 angle is 0.008.
Meta's code computes LLaMA 3.1's the same way (llama-models, ``apply_scaling``).

B batch, T positions, N heads, H head_dim.
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelArgs
from llama_jax.ops.cache import KVCache
from llama_jax.rope_scaling import ORIGINAL

# The cosines and sines of rotation angles: two float32 arrays [B or 1, T, 1, H].
Angles = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]


def rotary_angles(args: ModelArgs, T: int, positions: jax.Array | None = None, cache: KVCache | None = None) -> Angles:
    """Return the angles of rows of T tokens.

    positions: int [B, T], the position of each token. None: 0 to T - 1. cache: the cache that the tokens follow.
    """
    rows = min(args.max_seq_len, T if cache is None else cache.slots)
    if cache is not None and positions is not None and cache.prompts is not None and rows > original_length(args):
        return _angles_by_length(args, positions, cache.prompts, rows)
    cos, sin = rotary_table(args, rows)
    if positions is None:
        return cos[None, :T], sin[None, :T]
    return jnp.asarray(cos)[positions], jnp.asarray(sin)[positions]


def rotary_table(args: ModelArgs, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of position * frequency (RoFormer, section 3.2.2): two float32 arrays [positions, 1, H].

    The H/2 frequencies are repeated for the second half of a head. The arrays are NumPy's, so that the program holds
    them as constants. XLA would recompute arrays of the device wherever they are used.
    """
    H = args.head_width
    if args.rope_scaling is None:
        frequencies = args.rope_theta ** (-np.arange(0, H, 2) / H)
        angles, scale = np.tile(np.arange(positions)[:, None, None] * frequencies, 2), 1.0
    else:
        scaled, scale = scaled_frequencies(args, positions)
        angles = np.tile(np.arange(positions, dtype=np.float32)[:, None, None] * scaled, 2).astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return cos * np.float32(scale), sin * np.float32(scale)


def original_length(args: ModelArgs) -> int:
    """Return the context that a scaled model was first trained for: what its settings say, else its own."""
    return int((args.rope_scaling or {}).get(ORIGINAL, args.max_seq_len))


def scaled_frequencies(args: ModelArgs, length: int) -> tuple[np.ndarray, float]:
    """Return the frequencies by ``args.rope_scaling``, float32 [H/2], and the factor of cosines and sines.

    length: the number of tokens of the text, on which the frequencies of rope_type dynamic depend.
    """
    scaling = cast(dict[str, Any], args.rope_scaling)
    kind, factor = scaling["rope_type"], scaling["factor"]
    if kind == "dynamic":
        return _plain(_dynamic_theta(args, factor, length), args.head_width), 1.0
    if kind == "yarn":
        return _yarn(args, scaling)
    plain = _plain(args.rope_theta, args.head_width)
    if kind == "linear":
        return plain / np.float32(factor), 1.0
    return _llama3(plain, scaling, original_length(args)), 1.0


def _wavelengths(theta: float, H: int) -> np.ndarray:
    """Return the wavelengths of the plain embedding over 2 pi, float32 [H/2]."""
    exponents = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    return (theta ** exponents.astype(np.float64)).astype(np.float32)


def _plain(theta: float, H: int) -> np.ndarray:
    return np.float32(1) / _wavelengths(theta, H)


def _dynamic_theta(args: ModelArgs, factor: float, length: int) -> float:
    """Return the base for a text of ``length`` tokens, by which the longest wavelength grows with the text."""
    H, original = args.head_width, original_length(args)
    if length <= original:
        return args.rope_theta
    growth = np.float32(factor * length) / np.float32(original) - np.float32(factor - 1)
    return float(np.float32(args.rope_theta) * np.float32(float(growth) ** (H / (H - 2))))


def _llama3(plain: np.ndarray, scaling: dict[str, Any], original: int) -> np.ndarray:
    """Divide low frequencies by the factor, keep high ones, and interpolate between (LLaMA 3.1)."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = np.float32(2 * math.pi) * (np.float32(1) / plain)
    divided = np.where(wavelengths > np.float32(original / low), plain / np.float32(factor), plain)
    turns = np.float32(1) / wavelengths * np.float32(original)  # of the original context
    share = (turns - np.float32(low)) / np.float32(high - low)
    between = (1 - share) * divided / np.float32(factor) + share * divided
    is_between = (wavelengths >= np.float32(original / high)) & (wavelengths <= np.float32(original / low))
    return np.where(is_between, between, divided)


def _yarn(args: ModelArgs, scaling: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Return frequencies of which low ones are interpolated, and the factor that sharpens attention.

    This is YaRN (Peng et al., 2023, sections 3.2-3.4).
    """
    H, theta, factor, original = args.head_width, args.rope_theta, scaling["factor"], original_length(args)

    def feature(turns: float) -> float:
        """Return the pair of features that turns this often in the original context."""
        return H * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharpened(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    low, high = feature(scaling.get("beta_fast", 32.0)), feature(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(H // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    wavelengths, kept = _wavelengths(theta, H), 1 - ramp
    interpolated = np.float32(1) / (np.float32(factor) * wavelengths)
    frequencies = interpolated * (1 - kept) + np.float32(1) / wavelengths * kept
    scale = scaling.get("attention_factor")
    if scale is None and "mscale" in scaling and "mscale_all_dim" in scaling:
        scale = sharpened(scaling["mscale"]) / sharpened(scaling["mscale_all_dim"])
    return frequencies, sharpened(1.0) if scale is None else scale


def _angles_by_length(args: ModelArgs, positions: jax.Array, prompts: jax.Array, most: int) -> Angles:
    """Return the angles of tokens at ``positions`` [B, T] whose frequencies depend on the length of their text.

    A token of the prompt has the frequencies of the prompt's length, prompts [B]. A later token has those of the text
    that it ends. This is what transformers computes with a cache. most: the number of positions.
    """
    original = original_length(args)
    by_length = np.stack([scaled_frequencies(args, length)[0] for length in range(original, most + 1)])
    length = jnp.clip(jnp.maximum(prompts[:, None], positions + 1), original, most)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(by_length)[length - original]
    angles = jnp.tile(angles, 2)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def quarter_turn(x: jax.Array) -> jax.Array:
    """Map the halves (a, b) of the last axis to (-b, a): [B, T, N, H] -> the same shape and dtype."""
    return jax.lax.platform_dependent(x, tpu=_by_product, default=_by_halves)


def _by_halves(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


def _by_product(x: jax.Array) -> jax.Array:
    """Multiply by a matrix of 0, 1 and -1, which gives exact results.

    This is a trick for TPUs. The product costs them almost nothing, while halves would not align with their registers.
    """
    H = x.shape[-1]
    turn = np.eye(H, k=H // 2) - np.eye(H, k=-H // 2)
    return jnp.einsum("BTNH,HI->BTNI", x, turn.astype(x.dtype), precision="highest")
