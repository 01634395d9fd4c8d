"""Cross entropy and log-likelihoods of tokens from hidden states, in chunks, so that [B, T, V] logits never exist.

B batch, T positions, D dim, V vocab, C positions per chunk, R rank of an adapter.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from llama_jax.devices.sharding import gather_shards, shard_axes, shard_by_shard, sum_shards
from llama_jax.ops.attention import Documents
from llama_jax.ops.linear import linear, low_rank_inputs
from llama_jax.ops.quantize import Adapted, Matrix

TOKENS, HIDDEN = ("batch", "length"), ("batch", "length", None)
# The logical axes of the output matrix by the letters of its axes. "VD": it is the table of tied embeddings.
AXES = {"DV": ("embed", "vocab"), "VD": ("vocab", "embed")}
# Those of a quantized output matrix's scales, and of an adapter's second factor.
SCALES, FACTOR = (None, "vocab"), ("rank", "vocab")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
@jax.named_scope("loss")
def cross_entropy(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk_tokens: int = 512,
    axes: str = "DV",
) -> jax.Array:
    """Return the sum over all positions of weights x -log softmax(hidden @ output)[targets], in nats, float32 [].

    hidden: [B, T, D]; output: [D, V], or [V, D] if ``axes`` are "VD"; targets: int [B, T]; weights: float32 [B, T], not
    differentiated. The gradient is computed along with the loss in chunks of ``chunk_tokens``, while the chunk's logits
    exist. Each device gathers the output matrix once and processes its own positions; the matrix's gradient is summed
    over devices once, at the end.
    """

    def local(hidden: jax.Array, output: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        output = _gathered(output, hidden.dtype, axes)

        def chunk(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            x, y, w = xs
            return total + jnp.sum(w * negative_log_likelihood(_logits(x, output, axes), y)), None

        total, _ = jax.lax.scan(chunk, jnp.zeros((), jnp.float32), _chunks(chunk_tokens, hidden, targets, weights))
        return jax.lax.psum(total, shard_axes(*TOKENS))

    return shard_by_shard(local, TOKENS, (HIDDEN, AXES[axes], TOKENS, TOKENS), ())(hidden, output, targets, weights)


def loss_sum(
    model: Any,
    params: Any,
    inputs: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike,
    segments: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> jax.Array:
    """Return ``cross_entropy`` of a Llama on a batch: int [B, T], int [B, T], float32 [B, T] -> float32 [].

    segments, positions: int [B, T], the document and the position of each token; see ``Documents``.
    """
    hidden = _hidden(model, params, inputs, segments, positions)
    return _of_output(cross_entropy, frozen_cross_entropy, model, params, hidden, targets, weights)


def log_likelihoods(
    model: Any,
    params: Any,
    inputs: ArrayLike,
    targets: ArrayLike,
    segments: ArrayLike | None = None,
    positions: ArrayLike | None = None,
) -> jax.Array:
    """Return ``token_log_likelihoods`` of a Llama on a batch: int [B, T], int [B, T] -> float32 [B, T].

    segments, positions: as in ``loss_sum``.
    """
    hidden = _hidden(model, params, inputs, segments, positions)
    return _of_output(token_log_likelihoods, frozen_token_log_likelihoods, model, params, hidden, targets)


def _hidden(
    model: Any, params: Any, inputs: ArrayLike, segments: ArrayLike | None, positions: ArrayLike | None
) -> jax.Array:
    documents = None if segments is None else Documents(jnp.asarray(segments), jnp.asarray(positions))
    return cast(jax.Array, model.apply({"params": params}, inputs, documents, method="hidden"))


def _of_output(plain: Any, frozen: Any, model: Any, params: Any, hidden: jax.Array, *given: ArrayLike) -> jax.Array:
    """Return the value of ``frozen`` if the output matrix is, else of ``plain``, for hidden states and ``given``."""
    chunk = model.loss_chunk
    if "output" not in params:
        return cast(jax.Array, plain(hidden, params["tok_embeddings"], *given, chunk, "VD"))
    output = params["output"]
    if isinstance(output, Matrix):
        nothing, none = jnp.zeros((*hidden.shape[:2], 0), hidden.dtype), jnp.zeros((0, *output.shape[1:]))
        return cast(jax.Array, frozen(hidden, output, nothing, none, *given, chunk))
    if isinstance(output, Adapted):
        low = low_rank_inputs(hidden, output)
        return cast(jax.Array, frozen(hidden, output.base, low, output.b, *given, chunk))
    return cast(jax.Array, plain(hidden, output, *given, chunk))


def log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return log softmax(logits)[tokens] in nats: float32 [..., V] and int [...] -> float32 [...]."""
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[targets] in nats: float32 [..., V] and int [...] -> float32 [...]."""
    return -log_likelihood(logits, targets)


def _with_gradient(logits: jax.Array, y: jax.Array, w: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of a chunk's losses, and its gradient for the logits, of ``dtype``."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - top)
    norm = jnp.sum(exps, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, y[..., None], axis=-1)
    loss = jnp.sum(w * (jnp.log(norm) + top - picked)[..., 0])
    is_target = jnp.arange(logits.shape[-1]) == y[..., None]
    return loss, ((exps / norm - is_target) * w[..., None]).astype(dtype)


def _gathered(output: jax.Array, dtype: jnp.dtype, axes: str) -> jax.Array:
    return gather_shards(output.astype(dtype), "embed", axis=axes.index("D"))


def _logits(x: jax.Array, output: jax.Array, axes: str) -> jax.Array:
    return jnp.einsum(f"BCD,{axes}->BCV", x, output, preferred_element_type=jnp.float32)


def _chunks(tokens: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Reshape each [B, T, ...] to [T/C, B, C, ...], padded with zeros (of weight 0) if C does not divide T."""
    B, T = arrays[0].shape[:2]
    C = min(T, max(1, tokens // B))
    count = -(-T // C)
    padded = (jnp.pad(a, [(0, 0), (0, count * C - T)] + [(0, 0)] * (a.ndim - 2)) for a in arrays)
    return tuple(a.reshape(B, count, C, *a.shape[2:]).swapaxes(0, 1) for a in padded)


def _joined(chunks: jax.Array, T: int) -> jax.Array:
    """Reshape [T/C, B, C, ...] to [B, T, ...], without padding."""
    count, B, C = chunks.shape[:3]
    return chunks.swapaxes(0, 1).reshape(B, count * C, *chunks.shape[3:])[:, :T]


@jax.named_scope("loss")
def _forward(
    hidden: jax.Array, output: jax.Array, targets: jax.Array, weights: jax.Array, chunk_tokens: int, axes: str
):
    def local(hidden: jax.Array, output: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        T = hidden.shape[1]
        output = _gathered(output, hidden.dtype, axes)

        def chunk(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]):
            total, d_output = carry
            x, y, w = xs
            loss, d_logits = _with_gradient(_logits(x, output, axes), y, w, x.dtype)
            total += loss
            dx = linear(f"BCV,{axes}->BCD", d_logits, output)
            d_output += jnp.einsum("BCD,BCV->DV", x, d_logits, preferred_element_type=jnp.float32)
            return (total, d_output), dx

        # The gradient is [D, V] in the loop, for which a CPU need not transpose each chunk's logits.
        shape = tuple(output.shape[axes.index(axis)] for axis in "DV")
        start = jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32)
        (total, d_output), dx = jax.lax.scan(chunk, start, _chunks(chunk_tokens, hidden, targets, weights))
        # Summed over devices in the type in which the gradients of the layers' matrices are.
        d_output = (d_output if axes == "DV" else d_output.T).astype(hidden.dtype)
        return (
            jax.lax.psum(total, shard_axes(*TOKENS)),
            _joined(dx, T),
            sum_shards(d_output, "embed", axes.index("D"), *TOKENS),
        )

    results = shard_by_shard(local, TOKENS, (HIDDEN, AXES[axes], TOKENS, TOKENS), ((), HIDDEN, AXES[axes]))
    total, d_hidden, d_output = results(hidden, output, targets, weights)
    return total, (d_hidden, d_output.astype(output.dtype))


def _backward(chunk_tokens: int, axes: str, saved: tuple[jax.Array, jax.Array], d_total: jax.Array):
    d_hidden, d_output = saved
    return (d_hidden * d_total).astype(d_hidden.dtype), (d_output * d_total).astype(d_output.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
@jax.named_scope("loss")
def frozen_cross_entropy(
    hidden: jax.Array,
    output: Matrix,
    low: jax.Array,
    b: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk_tokens: int = 512,
) -> jax.Array:
    """Return ``cross_entropy`` of the logits hidden @ output + low @ b, where ``output`` is frozen.

    low: [B, T, R], the inputs of an adapter's second factor b [R, V]. R is 0 if there is no adapter. The gradients of
    hidden, low and b are computed along with the loss. A quantized matrix is dequantized once, by each device.
    """

    def local(hidden: jax.Array, low: jax.Array, b: jax.Array, targets: jax.Array, weights: jax.Array, *parts: Any):
        whole = _dequantized(output, parts, hidden.dtype)

        def chunk(total: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            x, low, y, w = xs
            return total + jnp.sum(w * negative_log_likelihood(_adapted_logits(x, whole, low, b), y)), None

        xs = _chunks(chunk_tokens, hidden, low, targets, weights)
        total, _ = jax.lax.scan(chunk, jnp.zeros((), jnp.float32), xs)
        return jax.lax.psum(total, shard_axes(*TOKENS))

    return _over_shards(local, output, ())(hidden, low, b, targets, weights, *jax.tree.leaves(output))


def _over_shards(local: Any, output: Matrix, out_axes: Any, rows: int = 2) -> Any:
    """Return ``local`` run per shard; see shard_by_shard.

    Its arguments are those of ``frozen_cross_entropy``, with ``rows`` arrays [B, T], and the arrays of ``output`` last.
    """
    parts = (AXES["DV"], SCALES)[: len(jax.tree.leaves(output))]
    return shard_by_shard(local, TOKENS, (HIDDEN, HIDDEN, FACTOR, *[TOKENS] * rows, *parts), out_axes)


def _dequantized(output: Matrix, parts: Any, dtype: jnp.dtype) -> jax.Array:
    """Return the output matrix [D, V] of ``dtype`` from this shard's arrays. They are gathered before they grow."""
    values, scales = gather_shards(parts[0], "embed", axis=0), parts[1] if len(parts) > 1 else None
    return Matrix(values, scales, values.shape).dequantized().astype(dtype)


def _adapted_logits(x: jax.Array, output: jax.Array, low: jax.Array, b: jax.Array) -> jax.Array:
    return _logits(x, output, "DV") + jnp.einsum(
        "BCR,RV->BCV", low, b.astype(low.dtype), preferred_element_type=jnp.float32
    )


@jax.named_scope("loss")
def _frozen_forward(
    hidden: jax.Array,
    output: Matrix,
    low: jax.Array,
    b: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk_tokens: int,
):
    def local(hidden: jax.Array, low: jax.Array, b: jax.Array, targets: jax.Array, weights: jax.Array, *parts: Any):
        whole = _dequantized(output, parts, hidden.dtype)

        def chunk(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]):
            total, d_b = carry
            x, low, y, w = xs
            loss, d_logits = _with_gradient(_adapted_logits(x, whole, low, b), y, w, x.dtype)
            dx = linear("BCV,DV->BCD", d_logits, whole)
            d_low = linear("BCV,RV->BCR", d_logits, b)
            d_b += jnp.einsum("BCR,BCV->RV", low, d_logits, preferred_element_type=jnp.float32)
            return (total + loss, d_b), (dx, d_low)

        start = jnp.zeros((), jnp.float32), jnp.zeros(b.shape, jnp.float32)
        xs = _chunks(chunk_tokens, hidden, low, targets, weights)
        (total, d_b), gradients = jax.lax.scan(chunk, start, xs)
        dx, d_low = (_joined(each, hidden.shape[1]) for each in gradients)
        total, d_b = jax.lax.psum((total, d_b), shard_axes(*TOKENS))
        return total, dx, d_low, d_b

    run = _over_shards(local, output, ((), HIDDEN, HIDDEN, FACTOR))
    total, *gradients = run(hidden, low, b, targets, weights, *jax.tree.leaves(output))
    return total, gradients


def _frozen_backward(chunk_tokens: int, saved: Any, d_total: jax.Array):
    d_hidden, d_low, d_b = ((each * d_total).astype(each.dtype) for each in saved)
    return d_hidden, None, d_low, d_b, None, None


frozen_cross_entropy.defvjp(_frozen_forward, _frozen_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("loss")
def token_log_likelihoods(
    hidden: jax.Array, output: jax.Array, targets: jax.Array, chunk_tokens: int = 512, axes: str = "DV"
) -> jax.Array:
    """Return log softmax(hidden @ output)[targets] of each position in nats, float32 [B, T].

    The arguments are those of ``cross_entropy``. The gradient computes each chunk's logits again: it is that of a cross
    entropy whose weights are known only once all log-likelihoods are.
    """

    def local(hidden: jax.Array, output: jax.Array, targets: jax.Array) -> jax.Array:
        output = _gathered(output, hidden.dtype, axes)

        def chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
            x, y = xs
            return None, log_likelihood(_logits(x, output, axes), y)

        _, found = jax.lax.scan(chunk, None, _chunks(chunk_tokens, hidden, targets))
        return _joined(found, hidden.shape[1])

    return cast(jax.Array, shard_by_shard(local, TOKENS, (HIDDEN, AXES[axes], TOKENS), TOKENS)(hidden, output, targets))


def _likelihoods_forward(hidden: jax.Array, output: jax.Array, targets: jax.Array, chunk_tokens: int, axes: str):
    return token_log_likelihoods(hidden, output, targets, chunk_tokens, axes), (hidden, output, targets)


def _likelihoods_backward(chunk_tokens: int, axes: str, saved: tuple[jax.Array, ...], d_found: jax.Array):
    hidden, output, targets = saved
    _, (d_hidden, d_output) = _forward(hidden, output, targets, -d_found, chunk_tokens, axes)
    return d_hidden, d_output, None


token_log_likelihoods.defvjp(_likelihoods_forward, _likelihoods_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
@jax.named_scope("loss")
def frozen_token_log_likelihoods(
    hidden: jax.Array, output: Matrix, low: jax.Array, b: jax.Array, targets: jax.Array, chunk_tokens: int = 512
) -> jax.Array:
    """Return ``token_log_likelihoods`` of the logits of ``frozen_cross_entropy``, float32 [B, T]."""

    def local(hidden: jax.Array, low: jax.Array, b: jax.Array, targets: jax.Array, *parts: Any):
        whole = _dequantized(output, parts, hidden.dtype)

        def chunk(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
            x, low, y = xs
            return None, log_likelihood(_adapted_logits(x, whole, low, b), y)

        _, found = jax.lax.scan(chunk, None, _chunks(chunk_tokens, hidden, low, targets))
        return _joined(found, hidden.shape[1])

    run = _over_shards(local, output, TOKENS, rows=1)
    return cast(jax.Array, run(hidden, low, b, targets, *jax.tree.leaves(output)))


def _frozen_likelihoods_forward(
    hidden: jax.Array, output: Matrix, low: jax.Array, b: jax.Array, targets: jax.Array, chunk_tokens: int
):
    found = frozen_token_log_likelihoods(hidden, output, low, b, targets, chunk_tokens)
    return found, (hidden, output, low, b, targets)


def _frozen_likelihoods_backward(chunk_tokens: int, saved: Any, d_found: jax.Array):
    hidden, output, low, b, targets = saved
    _, (d_hidden, d_low, d_b) = _frozen_forward(hidden, output, low, b, targets, -d_found, chunk_tokens)
    return d_hidden, None, d_low, d_b, None


frozen_token_log_likelihoods.defvjp(_frozen_likelihoods_forward, _frozen_likelihoods_backward)
