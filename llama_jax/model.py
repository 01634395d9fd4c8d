"""LLaMA 2 (Touvron et al., 2023): RMSNorm, rotary embedding, grouped-query attention, SwiGLU, as Flax modules.

Letters in every einsum and shape: B batch, T query positions, S key positions, D dim, N query heads, K KV heads, H head_dim,
F hidden, V vocab, L layers. Parameters have Meta's names, are float32, and stand in one tree with the layers stacked on a
leading axis. Activations have the model's ``dtype``; norms, rotary angles, softmax and logits are float32.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import AttentionKernel, ModelArgs, Remat
from llama_jax.devices.sharding import constrain, parameter_shapes
from llama_jax.ops import exact
from llama_jax.ops.attention import attention, cached_attention
from llama_jax.ops.cache import Stored
from llama_jax.ops.embedding import embed
from llama_jax.ops.linear import linear
from llama_jax.ops.remat import AFTER_ATTENTION, POLICIES

# Cosines and sines: two arrays float32 [B or 1, T, 1, H].
Angles = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]


class Cached(flax.struct.PyTreeNode):
    """What a layer knows of the tokens before: their keys and values, in the slots that are read of the cache."""

    k: Stored  # [B, K, S, H]
    v: Stored
    slot: jax.Array  # int32 []: the slot of the first new token; in exact generation [B], of each row's
    first: jax.Array  # int32 [B]: each row's first slot that holds a token


# The keys and values of a layer's new tokens, [B, T, K, H], as the cache will hold them; in exact generation, the layer's cache
# with them in it.
KeysValues = tuple[Stored, Stored]


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, exact_rows: int = 0) -> jax.Array:
    """RMSNorm (Zhang and Sennrich, 2019), x / rms(x) * weight in float32: [..., D], [D] -> [..., D] of x's dtype."""
    x32 = x.astype(jnp.float32)
    squares = x32 * x32
    mean = exact.means(squares, exact_rows) if exact_rows else jnp.mean(squares, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + eps) * weight).astype(x.dtype)


def rotary_table(positions: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of position x frequency (RoFormer, section 3.2.2), for both halves: two float32 [positions, 1, H].

    A constant of the program: computed on the device, XLA would compute it again wherever it is used.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.tile(np.arange(positions)[:, None, None] * frequencies, 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotary(x: jax.Array, angles: Angles, exact_rows: int = 0) -> jax.Array:
    """Rotate feature i of each head with feature i + H/2, by the position's angles: [B, T, N, H] -> the same.

    x cos + (x quarter-turned) sin, where a quarter turn takes halves (a, b) to (-b, a).
    Meta rotates neighbours (2i, 2i + 1) instead; its weights are permuted to these halves when they are imported.
    """
    cos, sin = angles
    turned = jax.lax.platform_dependent(x, tpu=_turned_by_product, default=_turned)
    a, b = x.astype(jnp.float32) * cos, turned.astype(jnp.float32) * sin
    a, b = (exact.rounded(a), exact.rounded(b)) if exact_rows else (a, b)
    return (a + b).astype(x.dtype)


def _turned(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


def _turned_by_product(x: jax.Array) -> jax.Array:
    """With a matrix of 0, 1 and -1, which is exact and costs a TPU next to nothing; halves would lie across its vector registers."""
    H = x.shape[-1]
    quarter_turn = np.eye(H, k=H // 2) - np.eye(H, k=-H // 2)
    return jnp.einsum("BTNH,HI->BTNI", x, quarter_turn.astype(x.dtype), precision="highest")


def _matrix(module: nn.Module, name: str, std: float, **axes: int) -> jax.Array:
    """A float32 parameter with its sizes by logical axis (sharding.py lays the axes over the mesh).

    Initial embeddings are N(0, 1), other matrices N(0, 1 / fan-in) (PaLM paper, section 5). The feed-forward layers' output
    is divided by the square root of the number of terms in the residual stream, 2 L, so that its variance does not grow
    with depth (GPT-2 paper, section 2.3); attention's is not, for a mean over positions is small already.
    """
    init = nn.with_logical_partitioning(nn.initializers.normal(std), tuple(axes))
    return cast(jax.Array, module.param(name, init, tuple(axes.values())))


def _norm_weight(module: nn.Module, name: str, dim: int) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return cast(jax.Array, module.param(name, init, (dim,)))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (LLaMA 2 paper, section 2.2): [B, T, D] -> [B, T, D]."""

    args: ModelArgs
    kernel: AttentionKernel
    exact_rows: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, cached: Cached | None, angles: Angles) -> tuple[jax.Array, KeysValues | None]:
        a = self.args
        product = functools.partial(linear, exact_rows=self.exact_rows)
        std = a.dim**-0.5
        wq = _matrix(self, "wq", std, embed=a.dim, heads=a.n_heads, head_dim=a.head_dim)
        wk = _matrix(self, "wk", std, embed=a.dim, kv_heads=a.kv_heads, head_dim=a.head_dim)
        wv = _matrix(self, "wv", std, embed=a.dim, kv_heads=a.kv_heads, head_dim=a.head_dim)
        wo = _matrix(self, "wo", std, heads=a.n_heads, head_dim=a.head_dim, embed=a.dim)

        q = rotary(product("BTD,DNH->BTNH", x, wq), angles, self.exact_rows)
        k = rotary(product("BTD,DKH->BTKH", x, wk), angles, self.exact_rows)
        v = product("BTD,DKH->BTKH", x, wv)
        if cached is None:
            return product("BTNH,NHD->BTD", attention(q, k, v, self.kernel), wo), None
        made = cached.k.of(k), cached.v.of(v)
        if self.exact_rows:
            made = cached.k.write(made[0], cached.slot), cached.v.write(made[1], cached.slot)
            y = exact.attention(q, *made, cached.slot)
        else:
            y = cached_attention(q, *made, cached.k, cached.v, cached.slot, cached.first, self.kernel)
        return product("BTNH,NHD->BTD", y, wo), made


class SwiGLU(nn.Module):
    """Gated feed-forward layer, w2(silu(w1 x) * w3 x) (Shazeer, 2020): [B, T, D] -> [B, T, D]."""

    args: ModelArgs
    exact_rows: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.args
        product = functools.partial(linear, exact_rows=self.exact_rows)
        w1 = _matrix(self, "w1", a.dim**-0.5, embed=a.dim, mlp=a.hidden_dim)
        w3 = _matrix(self, "w3", a.dim**-0.5, embed=a.dim, mlp=a.hidden_dim)
        w2 = _matrix(self, "w2", (2 * a.n_layers * a.hidden_dim) ** -0.5, mlp=a.hidden_dim, embed=a.dim)
        gate = jax.nn.silu(product("BTD,DF->BTF", x, w1))
        return product("BTF,FD->BTD", gate * product("BTD,DF->BTF", x, w3), w2)


class Block(nn.Module):
    """Attention and feed-forward, each on the norm of the residual stream and added to it: [B, T, D] -> [B, T, D]."""

    args: ModelArgs
    kernel: AttentionKernel
    exact_rows: int = 0  # exact.py

    @nn.compact
    def __call__(self, x: jax.Array, cached: Cached | None, angles: Angles) -> tuple[jax.Array, KeysValues | None]:
        a = self.args
        h = rms_norm(x, _norm_weight(self, "attention_norm", a.dim), a.norm_eps, self.exact_rows)
        h, keys_values = Attention(a, self.kernel, self.exact_rows, name="attention")(h, cached, angles)
        x = checkpoint_name(x + h, AFTER_ATTENTION)
        h = rms_norm(x, _norm_weight(self, "ffn_norm", a.dim), a.norm_eps, self.exact_rows)
        x = x + SwiGLU(a, self.exact_rows, name="feed_forward")(h)
        return constrain(x, "batch", "length", None), keys_values


class Llama(nn.Module):
    """The whole model.

    remat: what the backward pass finds kept (remat.py). kernel: attention's implementation (attention.py). loss_chunk: tokens
    whose logits training holds at once (loss.py). ``unroll`` layers are compiled one after the other before the scan repeats.
    exact_rows: rows of each product in exact generation (exact.py); 0: generation is not exact.
    """

    args: ModelArgs
    dtype: Any = jnp.float32
    remat: Remat = "none"
    kernel: AttentionKernel = "xla"
    loss_chunk: int = 512
    unroll: int = 1
    exact_rows: int = 0

    def setup(self) -> None:
        a = self.args
        block = Block if self.remat == "none" else nn.remat(Block, policy=POLICIES[self.remat], prevent_cse=False)
        self.tok_embeddings = _matrix(self, "tok_embeddings", 1.0, vocab=a.vocab_size, embed=a.dim)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=a.n_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(a, self.kernel)
        self.norm = _norm_weight(self, "norm", a.dim)
        self.output = _matrix(self, "output", a.dim**-0.5, embed=a.dim, vocab=a.vocab_size)

    def hidden(self, token_ids: jax.Array) -> jax.Array:
        """Normed hidden states that the output matrix turns into logits: int [B, T] -> [B, T, D] of ``dtype``."""
        args = self.args
        T = token_ids.shape[1]
        cos, sin = rotary_table(args.max_seq_len, args.head_dim, args.rope_theta)
        x = embed(self.tok_embeddings, token_ids, self.dtype)
        x = constrain(x, "batch", "length", None)
        x, _ = self.layers(x, None, (cos[None, :T], sin[None, :T]))
        return rms_norm(x, self.norm, args.norm_eps)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return jnp.einsum("...D,DV->...V", hidden, self.output.astype(self.dtype), preferred_element_type=jnp.float32)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Logits of the token after each position: int [B, T] -> float32 [B, T, V]."""
        return self.logits(self.hidden(token_ids))


def is_norm(path: Sequence[Any]) -> bool:
    """Whether a parameter, by its path in the tree, is an RMSNorm's weight; all others are matrices."""
    return "norm" in path[-1].key


def count_parameters(args: ModelArgs) -> int:
    """Exact number of parameters, without making any."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(Llama(args))))
