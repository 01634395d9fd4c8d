"""LLaMA 2 (Touvron et al., 2023): RMSNorm, rotary embedding, grouped-query attention and SwiGLU as Flax modules.

This is the whole model, for training and for generation. Training runs it on whole sequences. Generation runs it on the
next tokens and a cache of the keys and values of the tokens before them.

Every einsum and shape uses these letters: B batch, T query positions, S key positions, D dim, N query heads,
K KV heads, G = N/K, H head_dim, F hidden, V vocab, L layers.

Parameters have Meta's names and are float32 in training. They form one tree, whose layers are stacked on a leading axis
or stand in a tuple. Activations have the model's ``dtype``. Norms, rotary angles, softmax and logits are float32.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelArgs
from llama_jax.devices.sharding import constrain
from llama_jax.ops import exact
from llama_jax.ops.attention import Documents, attention, attention_over_cache, same_segment
from llama_jax.ops.cache import KVCache, KVPair, LayerCache
from llama_jax.ops.eight_bit import EightBit
from llama_jax.ops.embedding import embed, embed_few
from llama_jax.ops.gate import gated
from llama_jax.ops.linear import features_last, linear
from llama_jax.ops.parameters import bias, norm_weight, one_by_one, output_weight, weight
from llama_jax.ops.remat import AFTER_ATTENTION, over_layers
from llama_jax.ops.rotary import Angles, quarter_turn, rotary_angles
from llama_jax.train_args import AttentionKernel


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, exact_rows: int = 0) -> jax.Array:
    """Compute x / rms(x) * weight in float32 (Zhang and Sennrich, 2019): [..., D], [D] -> [..., D] of x's dtype."""
    x32 = x.astype(jnp.float32)
    squares = x32 * x32
    mean = exact.means(squares, exact_rows) if exact_rows else jnp.mean(squares, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean + eps) * weight).astype(x.dtype)


def rotary(x: jax.Array, angles: Angles, exact_rows: int = 0) -> jax.Array:
    """Rotate features i and i + H/2 of each head by the angles of its position: [B, T, N, H] -> the same.

    The result is x cos + quarter_turn(x) sin, where a quarter turn maps the halves (a, b) to (-b, a).
    Meta rotates neighbours (2i, 2i + 1) instead. The converter permutes Meta's weights to this order.
    """
    cos, sin = angles
    a, b = x.astype(jnp.float32) * cos, quarter_turn(x).astype(jnp.float32) * sin
    a, b = (exact.rounded(a), exact.rounded(b)) if exact_rows else (a, b)
    return (a + b).astype(x.dtype)


def plain_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None, window: int | None = None
) -> jax.Array:
    """Compute softmax(q k / sqrt(H)) v, where position t sees positions 0 to t (Vaswani et al., 2017, section 3.2.1).

    q: [B, T, N, H]; k, v: [B, S, K, H], S = T. Each KV head serves G = N/K query heads. Given segments, int [B, T],
    positions see only those of their own segment, and given a window, only the last ``window`` (Mistral 7B, section 2).
    Returns [B, T, N, H] of v's dtype. The kernels in ops/attention.py compute the same in less memory.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    visible: Any = np.tri(T, dtype=bool) & ~np.tri(T, k=-(window or T), dtype=bool)
    if segments is not None:
        visible = visible & same_segment(segments, segments)[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (LLaMA 2 paper, section 2.2): [B, T, D] -> [B, T, D].

    With a cache, tokens also attend to the cached ones, and the module also returns their own keys and values. Given
    segments, int [B, T], tokens attend only within their own.
    """

    args: ModelArgs
    kernel: AttentionKernel
    exact_rows: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, KVPair | None]:
        a = self.args
        product = functools.partial(linear, exact_rows=self.exact_rows)
        std = a.dim**-0.5
        wq = weight(self, "wq", std, embed=a.dim, heads=a.n_heads, head_dim=a.head_width)
        wk = weight(self, "wk", std, embed=a.dim, kv_heads=a.kv_heads, head_dim=a.head_width)
        wv = weight(self, "wv", std, embed=a.dim, kv_heads=a.kv_heads, head_dim=a.head_width)
        wo = weight(self, "wo", std, heads=a.n_heads, head_dim=a.head_width, embed=a.dim)
        bq = bias(self, "wq_bias", a.attention_bias, heads=a.n_heads, head_dim=a.head_width)
        bk = bias(self, "wk_bias", a.attention_bias, kv_heads=a.kv_heads, head_dim=a.head_width)
        bv = bias(self, "wv_bias", a.attention_bias, kv_heads=a.kv_heads, head_dim=a.head_width)
        bo = bias(self, "wo_bias", a.attention_bias, norm=a.dim)

        q = rotary(product("BTD,DNH->BTNH", x, wq, bias=bq, name="wq"), angles, self.exact_rows)
        k = rotary(product("BTD,DKH->BTKH", x, wk, bias=bk, name="wk"), angles, self.exact_rows)
        v = product("BTD,DKH->BTKH", x, wv, bias=bv, name="wv")
        if cache is not None:
            y, new = attention_over_cache(q, k, v, cache, self.kernel, self.exact_rows, a.window)
        else:
            attend = plain_attention if self.kernel == "plain" else functools.partial(attention, kernel=self.kernel)
            y, new = attend(q, k, v, segments=segments, window=a.window), None
        return product("BTNH,NHD->BTD", y, wo, bias=bo, name="wo"), new


class SwiGLU(nn.Module):
    """Gated feed-forward layer, w2(silu(w1 x) * w3 x) (Shazeer, 2020): [B, T, D] -> [B, T, D]."""

    args: ModelArgs
    exact_rows: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = self.args
        product = functools.partial(linear, exact_rows=self.exact_rows)
        w1 = weight(self, "w1", a.dim**-0.5, embed=a.dim, mlp=a.hidden_width)
        w3 = weight(self, "w3", a.dim**-0.5, embed=a.dim, mlp=a.hidden_width)
        w2 = weight(self, "w2", (2 * a.n_layers * a.hidden_width) ** -0.5, mlp=a.hidden_width, embed=a.dim)
        b1 = bias(self, "w1_bias", a.mlp_bias, mlp=a.hidden_width)
        b3 = bias(self, "w3_bias", a.mlp_bias, mlp=a.hidden_width)
        b2 = bias(self, "w2_bias", a.mlp_bias, norm=a.dim)
        gate, up = product("BTD,DF->BTF", x, w1, bias=b1, name="w1"), product("BTD,DF->BTF", x, w3, bias=b3, name="w3")
        return product("BTF,FD->BTD", gated(gate, up, isinstance(w1, EightBit)), w2, bias=b2, name="w2")


class Block(nn.Module):
    """Attention, then feed-forward. Each reads the normed residual stream and adds to it: [B, T, D] -> [B, T, D].

    With a cache, it also returns the new tokens' keys and values in the type that the cache stores.
    """

    args: ModelArgs
    kernel: AttentionKernel = "plain"
    exact_rows: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None = None, segments: jax.Array | None = None
    ) -> tuple[jax.Array, KVPair | None]:
        a = self.args
        h = rms_norm(x, norm_weight(self, "attention_norm", a.dim), a.norm_eps, self.exact_rows)
        h, new = Attention(a, self.kernel, self.exact_rows, name="attention")(h, angles, cache, segments)
        x = checkpoint_name(x + (features_last(h) if cache is None else h), AFTER_ATTENTION)
        h = rms_norm(x, norm_weight(self, "ffn_norm", a.dim), a.norm_eps, self.exact_rows)
        h = SwiGLU(a, self.exact_rows, name="feed_forward")(h)
        x = x + (features_last(h) if cache is None else h)
        return constrain(x, "batch", "length", None), new


class Llama(nn.Module):
    """The whole model.

    remat: the activations that the backward pass keeps (ops/remat.py).
    kernel: the implementation of attention (ops/attention.py). build.py chooses it for a platform.
    loss_chunk: the number of tokens whose logits training holds at once (ops/loss.py).
    unroll: the number of layers in the compiled body of the loop over stacked layers.
    exact_rows: the number of rows of each product in exact generation (ops/exact.py). 0: generation is not exact.
    """

    args: ModelArgs
    dtype: Any = jnp.float32
    remat: str = "none"
    kernel: AttentionKernel = "plain"
    loss_chunk: int = 512
    unroll: int = 1
    exact_rows: int = 0

    def setup(self) -> None:
        a = self.args
        std = a.dim**-0.5 if a.tie_embeddings else 1.0
        self.tok_embeddings = weight(self, "tok_embeddings", std, vocab=a.vocab_size, embed=a.dim)
        given = self.has_variable("params", "layers")
        self.layers = self.get_variable("params", "layers") if given else self.param("layers", self._init_layers)
        self.norm = norm_weight(self, "norm", a.dim)
        self.output = output_weight(self, self.tok_embeddings, a.tie_embeddings)

    def __call__(self, token_ids: jax.Array, documents: Documents | None = None) -> jax.Array:
        """Return the logits of the token after each position: int [B, T] -> float32 [B, T, V]."""
        return self.logits(self.hidden(token_ids, documents))

    def hidden(self, token_ids: jax.Array, documents: Documents | None = None) -> jax.Array:
        """Return the normed hidden states, from which logits are computed: int [B, T] -> [B, T, D] of ``dtype``.

        documents: the document of each token. None: a row is one document.
        """
        return self._forward(token_ids, None, 0, documents)[0]

    def next_hidden(self, token_ids: jax.Array, cache: KVCache, end: int) -> tuple[jax.Array, KVCache]:
        """Return ``hidden`` of tokens [B, T] that follow the cached ones, and the cache with these tokens added.

        end: the number of the cache's slots to read. It is at least the number of slots that are filled.
        """
        x, new = self._forward(token_ids, cache, end)
        return x, cache.with_new(new, x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the logits of hidden states: [B, T, D] -> float32 [B, T, V]."""
        return linear("BTD,DV->BTV", hidden, self.output, jnp.float32, self.exact_rows)

    def _forward(
        self, token_ids: jax.Array, cache: KVCache | None, end: int, documents: Documents | None = None
    ) -> tuple[jax.Array, list[Any]]:
        a, T = self.args, token_ids.shape[1]
        segments, positions = documents or (None, None if cache is None else cache.positions(T))
        angles = rotary_angles(a, T, positions, cache)
        lookup = embed if cache is None else embed_few
        x = constrain(lookup(cast(jax.Array, self.tok_embeddings), token_ids, self.dtype), "batch", "length", None)
        block = Block(a, self.kernel, self.exact_rows, name="layers", parent=None)

        def layer(x: jax.Array, weights: Any, angles: Angles, cache: LayerCache | None) -> tuple[jax.Array, Any]:
            return cast(Any, block.apply({"params": weights}, x, angles, cache, segments))

        def next_layer(x: jax.Array, weights: Any) -> jax.Array:
            return layer(x, weights, angles, None)[0]

        new: list[Any] = []
        if cache is None and not isinstance(self.layers, tuple):
            x = over_layers(next_layer, x, self.layers, self.remat, self.unroll)
        else:
            layer = jax.jit(layer)  # Traces a layer once instead of L times.
            for i, weights in enumerate(one_by_one(self.layers)):
                x, made = layer(x, weights, angles, None if cache is None else cache.layer(i, end))
                new.append(made)
        return rms_norm(x, self.norm, a.norm_eps, self.exact_rows), new

    def _init_layers(self, key: jax.Array) -> Any:
        """Return the initial parameters of the layers, stacked."""
        a = self.args
        x, angle = jnp.zeros((1, 1, a.dim)), jnp.zeros((1, 1, 1, a.head_width))
        init = jax.vmap(lambda key: Block(a, parent=None).init(key, x, (angle, angle))["params"])
        return nn.meta.add_axis(init(jax.random.split(key, a.n_layers)), 0, {nn.PARTITION_NAME: "layers"})
