"""Causal grouped-query attention, over a sequence or over a KV cache.

Over a sequence there are three implementations with the same result: ``xla``, written here, for every platform;
``splash``, JAX's TPU kernel; ``cudnn``, for NVIDIA GPUs. The two kernels never store the scores [T, S].
``choose_kernel`` picks one. Each of them keeps attention inside documents, given the segment of every position.

B batch, T query positions, S key positions, N query heads, K KV heads, G = N/K, H head_dim.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import ModelArgs
from llama_jax.devices.chips import LANES
from llama_jax.devices.sharding import gather_shards, shard_axes, shard_by_shard, shards_here
from llama_jax.errors import UserError
from llama_jax.ops import exact
from llama_jax.ops.blocks import ATTENTION, Span, softmax_attention
from llama_jax.ops.cache import KVArray, KVPair, LayerCache
from llama_jax.ops.linear import MATRIX_ROWS
from llama_jax.train_args import AttentionKernel

# Queries per block. A block sees only the keys before its end, which halves the work compared to the whole square and
# keeps the scores small enough for a core's cache.
BLOCK = 64
# Longer sequences have larger blocks instead of more, so that the program's length stays bounded.
MAX_BLOCKS = 16
# Splash uses the largest of these that divides the length, and whole lanes of the vector unit.
SPLASH_BLOCKS = (1024, 512, 256, 128)
# A document mask: the segments of the queries, int [B, T], and those of the keys, int [B, S].
Segments = tuple[jax.Array, jax.Array]
# Names of the operands for rematerialisation policies (remat.py).
OPERANDS = ("query", "key", "value")
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # the name of JAX's primitive

QUERIES, KEYS = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
POSITIONS = ("batch", "length")


class Documents(NamedTuple):
    """The documents that lie side by side in rows [B, T]."""

    segments: jax.Array  # int [B, T], the document of each token, beyond which it does not attend; below 0: shared
    positions: jax.Array  # int [B, T], the position of each token, for the rotary embedding


def choose_kernel(
    asked: AttentionKernel,
    platform: str,
    args: ModelArgs,
    dtype: jnp.dtype,
    sequence_shards: int = 1,
    document_mask: bool = False,
) -> AttentionKernel:
    """Return ``asked``, or for ``auto`` the fastest kernel that is available.

    platform: "cpu", "tpu" or "cuda". document_mask: attention stays inside documents. Raises UserError if the platform,
    the type or the shape does not allow ``asked``.
    """
    length = args.max_seq_len // sequence_shards
    needs: dict[AttentionKernel, dict[str, bool]] = {
        "splash": {
            "a TPU": platform == "tpu",
            f"a multiple of {LANES} positions a device": length % LANES == 0,
        },
        "cudnn": {
            "an NVIDIA GPU": platform == "cuda",
            "bfloat16": dtype == jnp.bfloat16,
            "mesh.sequence = 1": sequence_shards == 1,
            "heads of up to 128 features, a multiple of 8": args.head_width <= 128 and args.head_width % 8 == 0,
            "an even number of positions beside data.document_mask": not (document_mask and length % 2),
        },
        "xla": {},
        "plain": {},
    }
    if asked == "auto":
        return next(kernel for kernel, met in needs.items() if all(met.values()))
    for need, met in needs[asked].items():
        if not met:
            raise UserError(
                f"train.attention: expected {need} for {asked}, found {platform}, {jnp.dtype(dtype).name}, "
                f"{length} positions a device, heads of {args.head_width} features; take another, or auto"
            )
    return asked


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kernel: AttentionKernel = "xla",
    segments: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Compute softmax attention over a sequence, in which query t sees keys 0 to t of its own segment.

    q: [B, T, N, H]; k, v: [B, T, K, H]. Keys and values are not repeated: query head n reads KV head n // G.
    segments: int [B, T], the document of each position. None: all positions of a row are of one document.
    window: the number of keys, up to t, that query t sees at most. None: all of them.
    Returns [B, T, N, H] of q's dtype. Scores and softmax are float32.
    """
    # Scale the query instead of the scores, before it is kept for the backward pass.
    q, k, v = (checkpoint_name(x, name) for x, name in zip((q * q.shape[-1] ** -0.5, k, v), OPERANDS, strict=True))

    def local(q: jax.Array, k: jax.Array, v: jax.Array, own: jax.Array | None = None) -> jax.Array:
        """Attend from a device's queries. If the sequence is sharded, each device gathers all keys and values."""
        T = q.shape[1]
        k, v = gather_shards(k, "length", axis=1), gather_shards(v, "length", axis=1)
        mask = None if own is None else (own, gather_shards(own, "length", axis=1))
        start = jax.lax.axis_index(shard_axes("length")) * T if k.shape[1] > T else None
        if kernel == "splash" and T % LANES == 0:
            return _splash(q, k, v, start, mask, window)
        if kernel == "cudnn":
            return _cudnn(q, k, v, mask, window)
        return _attend_in_blocks(q, k, v, start, mask, window)

    documents = () if segments is None else (segments,)
    axes = (QUERIES, KEYS, KEYS, *(POSITIONS for _ in documents))
    return shard_by_shard(local, ("batch", "length", "heads"), axes, QUERIES)(q, k, v, *documents)


def same_segment(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """Return whether a query and a key are of one segment: int [B, T], int [B, S] -> bool [B, T, S].

    Keys of a segment below 0 are of every segment: what begins a row can be read by several that follow it.
    """
    return (of_queries[:, :, None] == of_keys[:, None, :]) | (of_keys < 0)[:, None, :]


def in_window(of_queries: jax.Array, of_keys: jax.Array, window: int) -> jax.Array:
    """Return whether a key is among the ``window`` keys up to a query: positions int [..., T], [S] -> [..., T, S]."""
    return of_keys > of_queries[..., None] - window


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, window: int | None) -> jax.Array:
    """Run cuDNN's kernel on scaled queries. Tokens see only their own segment and the window, if given."""
    mask, local = None, None if window is None else (window - 1, 0)
    if segments is not None:
        mask, local = same_segment(*segments), None
        if window is not None:  # The mask says both, because not every version of cuDNN takes both.
            at = jnp.arange(q.shape[1])
            mask &= in_window(at, at, window)
        mask = mask[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=1.0, is_causal=True, local_window_size=local, implementation="cudnn"
    )


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array | None,
    segments: Segments | None = None,
    window: int | None = None,
) -> jax.Array:
    """Run the TPU kernel on scaled queries from position ``start``.

    Tokens see only their own segment and the window, if given. The kernel skips blocks outside the window.
    """
    # Imported here, because Pallas takes as long to import as everything else.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    (T, N), S = q.shape[1:3], k.shape[1]
    block = next(b for b in SPLASH_BLOCKS if T % b == 0)
    # Block sizes of queries and keys for the forward pass, the gradients of k and v, and that of q.
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    visible = masks.CausalMask((S, S)) if window is None else masks.LocalMask((S, S), (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([visible] * N), block_sizes=sizes, head_shards=1, q_seq_shards=S // T,
        residual_checkpoint_name=ATTENTION,
    )  # fmt: skip
    if start is not None:
        kernel = jax.tree.map(lambda of_blocks: _rows_of(of_blocks, start, T, S), kernel)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    if segments is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    out = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, splash.SegmentIds(*ids)))(q, k, v, *segments)
    return out.swapaxes(1, 2)


def _rows_of(of_blocks: jax.Array, start: jax.Array, T: int, S: int) -> jax.Array:
    """Slice the kernel's data about the mask for T queries from ``start``.

    of_blocks: [heads, query blocks, key blocks] or [S].
    """
    axis = 0 if of_blocks.ndim == 1 else 1
    rows = of_blocks.shape[axis] * T // S
    return jax.lax.dynamic_slice_in_dim(of_blocks, start // T * rows, rows, axis)


def _attend_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array | None,
    segments: Segments | None = None,
    window: int | None = None,
) -> jax.Array:
    """Compute ``attention`` of scaled queries from position ``start`` (None: 0)."""
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads before positions, so that a CPU multiplies each head's matrices without copies.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    block = max(BLOCK, -(-T // MAX_BLOCKS))
    spans, biases = [], []
    for at in range(0, T, block):
        end = min(at + block, T)
        begin, seen = 0, end if start is None else k.shape[2]
        if window is not None and start is None:
            begin = max(0, at - window + 1)
        keys, queries = jnp.arange(begin, seen), jnp.arange(at, end) + (0 if start is None else start)
        visible = keys <= queries[:, None]
        if window is not None:
            visible &= in_window(queries, keys, window)
        if segments is not None:
            of_queries, of_keys = segments
            visible = (visible & same_segment(of_queries[:, at:end], of_keys[:, begin:seen]))[:, None, None]
        spans.append(Span(at, end, begin, seen))
        biases.append(jnp.where(visible, 0.0, -jnp.inf))
    out = softmax_attention(tuple(spans), q, k, v, biases)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attention_over_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache,
    kernel: AttentionKernel,
    exact_rows: int = 0,
    window: int | None = None,
) -> tuple[jax.Array, KVPair]:
    """Attend from new tokens to those in a layer's cache and to themselves.

    q [B, T, N, H]; k, v [B, T, K, H]. exact_rows: not 0 in exact generation (exact.py). window: the number of tokens,
    up to its own, that a token sees at most. The cache keeps all. Returns [B, T, N, H] of q's
    dtype, and the new keys and values in the type that the cache stores. In exact generation, it returns the layer's
    slots instead, which include the new keys and values.
    """
    new = cache.k.stored(k), cache.v.stored(v)
    if exact_rows:
        new = cache.k.write(new[0], cache.slot), cache.v.write(new[1], cache.slot)
        return exact.attention(q, *new, cache.slot, window), new
    return cached_attention(q, *new, cache.k, cache.v, cache.slot, cache.first, kernel, window), new


@jax.named_scope("attention")
def cached_attention(
    q: jax.Array,
    k: KVArray,
    v: KVArray,
    cached_k: KVArray,
    cached_v: KVArray,
    slot: jax.Array,
    first: jax.Array,
    kernel: AttentionKernel = "xla",
    window: int | None = None,
) -> jax.Array:
    """Attend from new tokens to those in a cache and to themselves.

    q [B, T, N, H]; k, v [B, T, K, H], as the cache will store them from ``slot`` on; cached [B, K, S, H], of which
    slots from the row's ``first`` [B] to slot - 1 are visible, of which a query sees those among the ``window`` up to
    its own, if given. A query before its row's first slot is padding. It sees only itself, so that its unused softmax
    stays finite. Returns [B, T, N, H] of q's dtype.
    """
    B, T, N, H = q.shape
    K, S = cached_k.values.shape[1:3]
    q = q * H**-0.5
    if S == 0 and kernel == "splash" and T % LANES == 0:
        tokens = (jnp.arange(T) + slot >= first[:, None]).astype(jnp.int32)
        whole_length = (("batch", None, heads, None) for heads in ("heads", "kv_heads", "kv_heads"))
        local = shard_by_shard(
            lambda q, k, v, tokens: _splash(q, k, v, None, (tokens, tokens), window),
            ("batch", "length", "heads"),  # a kernel needs all axes of the mesh to be manual
            (*whole_length, ("batch", None)),
            ("batch", None, "heads", None),
        )
        return local(q, k.dequantized(q.dtype), v.dequantized(q.dtype), tokens)
    G = N // K
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    of_cache, of_new = _biases_over_cache(T, S, N, slot, first, window)

    # Put all heads' rows on one axis, because an axis of few queries per head would use a TPU's vector registers badly.
    own = _float32("BKGTH,BSKH->BKGTS", q, k.values)
    if k.scales is not None:
        own *= _by_head(k.scales)
    own = (own + of_new).reshape(B, N * T, T)
    scores = _scores(q.reshape(B, K, G * T, H), cached_k.values)
    if cached_k.scales is not None:
        scores *= cached_k.scales[:, :, None]
    scores = scores.reshape(B, N * T, S) + of_cache
    highest = jnp.maximum(jnp.max(scores, -1, keepdims=True, initial=-jnp.inf), jnp.max(own, -1, keepdims=True))
    weights, own = jnp.exp(scores - highest), jnp.exp(own - highest)
    norm = jnp.sum(weights, -1, keepdims=True) + jnp.sum(own, -1, keepdims=True)
    weights = weights.reshape(B, K, G * T, S)
    if cached_v.scales is not None:
        weights *= cached_v.scales[:, :, None]
    own = own.reshape(B, K, G, T, T)
    if v.scales is not None:
        own *= _by_head(v.scales)
    y = _sums_of_values(weights.astype(q.dtype), cached_v.values).reshape(B, K, G, T, H)
    y += _float32("BKGTS,BSKH->BKGTH", own.astype(q.dtype), v.values)
    y /= norm.reshape(B, K, G, T, 1)
    return y.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _biases_over_cache(
    T: int, S: int, N: int, slot: jax.Array, first: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Return what is added to scores: 0 where a query sees a key, else minus infinity; see ``cached_attention``.

    Of the cache [B, 1, S], or with a window [B, N T, S], a row for each query of each head. Of new tokens
    [B, 1, 1, T, T].
    """
    new, slots = jnp.arange(T), jnp.arange(S)
    of_cache = jnp.where((slots < slot) & (slots >= first[:, None]), 0.0, -jnp.inf)[:, None]
    of_new = ((new <= new[:, None]) & (new + slot >= first[:, None, None])) | (new == new[:, None])
    if window is not None:
        near = jnp.where(in_window(slot + new, slots, window), 0.0, -jnp.inf)
        of_cache += jnp.tile(near, (N, 1))
        of_new &= in_window(new, new, window)
    return of_cache, jnp.where(of_new, 0.0, -jnp.inf)[:, None, None]


def _by_head(scales: jax.Array) -> jax.Array:
    """Reshape scales of new tokens [B, T, K] to multiply scores [B, K, G, T, S]."""
    return scales.swapaxes(1, 2)[:, :, None, None]


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Compute scores of q [B, K, R, H], where R may be small, and cached keys [B, K, S, H] -> float32 [B, K, R, S]."""
    each = functools.partial(_float32, "BKRH,BKSH->BKRS")
    return jax.lax.platform_dependent(q, k, tpu=_scores_by_group, default=each)


def _scores_by_group(q: jax.Array, k: jax.Array) -> jax.Array:
    """Compute ``_scores`` for as many heads at a time as have MATRIX_ROWS rows.

    The trick is that a row has zeros for the features of the group's other heads, so that one product sums over the
    features of all of them. A head by itself would leave most of a TPU's vector registers empty: a product of 32
    sequences of 7B, which reads as much, takes a sixth longer.
    """
    B, K, R, H = q.shape
    on_a_device = K // math.gcd(K, shards_here("kv_heads"))
    heads = math.gcd(on_a_device, max(1, MATRIX_ROWS // R))
    own = jnp.eye(heads, dtype=q.dtype)
    rows = jnp.einsum("BXARH,AC->BXARCH", q.reshape(B, K // heads, heads, R, H), own)
    rows = rows.reshape(B, K // heads, heads * R, heads, H)
    padded = jnp.pad(rows, [(0, 0), (0, 0), (0, max(0, MATRIX_ROWS - heads * R)), (0, 0), (0, 0)])
    k = k.reshape(B, K // heads, heads, -1, H)
    return _float32("BXRCH,BXCSH->BXRS", padded, k)[:, :, : heads * R].reshape(B, K, R, -1)


def _sums_of_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Compute sums, weighted by [B, K, R, S], of cached values [B, K, S, H] -> float32 [B, K, R, H].

    The trick is to pad R to MATRIX_ROWS on a TPU, so that it uses its matrix unit. Otherwise it is four times slower.
    """
    R, product = weights.shape[2], functools.partial(_float32, "BKRS,BKSH->BKRH")

    def padded(weights: jax.Array, v: jax.Array) -> jax.Array:
        return product(jnp.pad(weights, [(0, 0), (0, 0), (0, max(0, MATRIX_ROWS - R)), (0, 0)]), v)[:, :, :R]

    return jax.lax.platform_dependent(weights, v, tpu=padded, default=product)


def _float32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute einsum in float32, with y converted to x's type."""
    return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)
