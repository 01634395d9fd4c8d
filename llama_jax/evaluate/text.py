"""Loss, perplexity and bits per byte of a text, window by window: ``evaluate --text``."""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llama_jax.cli.progress import Progress, working
from llama_jax.data.corpus import corpus_of
from llama_jax.data.lost import Losses, examples, loss_warning
from llama_jax.data.odd_bytes import replacement_warning
from llama_jax.data.records import fields_of_texts
from llama_jax.data.sources import find_files
from llama_jax.data.summary import skipped_warning
from llama_jax.devices.compiling import GenerationProgram
from llama_jax.devices.sharding import mesh_of, on_mesh
from llama_jax.errors import UserError, quoted
from llama_jax.evaluate.scoring import context_of, whole
from llama_jax.fields import given_path, typed
from llama_jax.generation import Model
from llama_jax.generation.decode import empty_cache, next_logits, slots_read
from llama_jax.generation.rows import not_finite
from llama_jax.model import Llama
from llama_jax.ops.cache import KVCache
from llama_jax.ops.loss import loss_sum, negative_log_likelihood
from llama_jax.tokenizer import Tokenizer


def evaluate(
    model: Model,
    text: str | Path,
    window: int = 0,
    stride: int = 0,
    batch_size: int = 8,
    as_text: bool = False,
    text_field: str = "",
    skip: bool = False,
) -> dict[str, Any]:
    """Score every token of a text once. BOS, which begins each file or record, is not scored; EOS is not added.

    A model with a quantized cache is scored token by token, as it generates. Other models are scored window by window.

    Arguments:
        model: the model to evaluate.
        text: a file, a folder, a glob or an address.
        window: positions in a forward pass. 0: the model's context.
        stride: positions between the starts of two windows. 0: the window.
        batch_size: windows in a forward pass.
        as_text: also read files that do not look like text.
        text_field: the field of records with the text. Empty: "text", or else the only field with texts.
        skip: leave out records that cannot be read. They are counted in a warning.

    Returns the object that the command prints (see ``Arguments`` in __main__.py). Raises UserError if the text is
    missing, empty or not text, if the window does not fit the model, if an argument is of another type, or if a loss is
    not finite.
    """
    text = given_path(text, "--text")
    if not isinstance(model, Model):
        raise UserError(f"model: expected a model that is loaded, found {quoted(model)}; llama_jax.load makes one")
    for name, value, kind in (("as_text", as_text, bool), ("skip", skip, bool), ("text_field", text_field, str)):
        typed(value, kind, name)
    context = context_of(model)
    window, stride, batch_size = (
        whole("--window", window, 0),
        whole("--stride", stride, 0),
        whole("--batch-size", batch_size, 1),
    )
    window, stride = window or context, stride or window or context
    if not 0 < window <= context:
        raise UserError(f"--window: expected 1 to {context}, the model's context, found {window}")
    if not 0 < stride <= window:
        raise UserError(f"--stride: expected 1 to the window of {window}, found {stride}")
    with working(f"reading {text}", sys.stderr):
        stream, scored, losses = _read(str(text), model.tokenizer, as_text, text_field, skip)
    tokens = int(scored[1:].sum())
    if not tokens:
        raise UserError(f"--text: expected text, found none in {text}")
    total = _nats(model, stream, scored, list(_windows(len(stream) - 1, window, stride)), window, batch_size)
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": None if losses.lost or losses.unknown else total / math.log(2) / losses.read,
        "tokens": tokens,
        "bytes": losses.read,
        "lost_share": losses.lost / losses.compared,
        "window": window,
        "stride": stride,
        "bos": "at the start of a file only",
    }


def _nats(
    model: Model, stream: np.ndarray, scored: np.ndarray, rows: list[tuple[int, int, int]], window: int, batch_size: int
) -> float:
    """Return the sum of the losses of those tokens of a stream that count, in nats, window by window (``_windows``)."""
    # No pass has more positions, or windows, than the text fills.
    positions, batch_size = np.arange(min(window, len(stream) - 1)), min(batch_size, len(rows))
    if model.cache_dtype is None:
        score = functools.partial(_loss_sum, model.module, model.params)
    else:
        score = functools.partial(_loss_sum_over_cache, model.module, model.serving, cache_dtype=model.cache_dtype)
    total = 0.0
    mesh = mesh_of(model.params)  # the caller may have one of its own around
    with Progress("evaluating", -(-len(rows) // batch_size), "batch", stream=sys.stderr) as progress:
        for i in range(0, len(rows), batch_size):
            batch = rows[i : i + batch_size] + [(0, 0, 0)] * (batch_size - len(rows[i : i + batch_size]))
            starts, first, last = (np.array(column)[:, None] for column in zip(*batch, strict=True))
            at = np.minimum(starts + positions, len(stream) - 2)
            counts = (starts + positions >= first) & (starts + positions < last)
            weights = (counts & scored[at + 1]).astype(np.float32)
            with progress.busy("compiling") if i == 0 else contextlib.nullcontext(), on_mesh(mesh):
                nats = float(score(stream[at], stream[at + 1], weights))
            if not math.isfinite(nats):
                raise not_finite(model.source, f"in the window from token {int(starts[0, 0])} of the text on")
            total += nats
            progress.update()
    return total


def _texts_advice(names: list[str]) -> str:
    """Return what to do with records of conversations that have texts in the fields ``names``, perhaps none."""
    if names:
        return f"; for the loss of a field of texts, name it with --text-field: {' or '.join(names)}"
    return "; answers are scored as a task (--tasks), whose records have messages and answer"


def _read(
    filepath: str, tokenizer: Tokenizer, as_text: bool, text_field: str, skip: bool
) -> tuple[np.ndarray, np.ndarray, Losses]:
    """Read all files. Return the token ids, which of them to score (all but BOS), and the tokenizer's losses.

    Notes and warnings go to stderr.
    """
    files, notes = find_files(filepath, "--text", as_text, text_field)
    if chats := [file for file in files if file.chats]:
        raise UserError(
            f"--text: expected text, found conversations ({chats[0].chats}) in {chats[0].name}; training evaluates held-out ones "
            f"(eval_filepath of its data){_texts_advice(fields_of_texts(chats[0]))}"
        )
    ids: list[np.ndarray] = []
    corpus = corpus_of(files, skip=skip, any_bytes=as_text)
    losses = Losses(tokenizer, corpus.text_bytes)
    for part in corpus.parts("train"):
        row, lengths = tokenizer.encode_batch([part.text], [part.starts])
        ids += [np.full(int(part.starts), tokenizer.bos_id, np.int32), row]
        losses.add([part], row, lengths)
    stream = np.concatenate([np.zeros(0, np.int32), *ids])
    warnings = (
        replacement_warning(corpus.replaced),
        skipped_warning(corpus.skipped),
        loss_warning(losses.lost, losses.compared, losses.unknown, examples(losses.chars)),
    )
    for line in filter(None, [*notes, *warnings]):
        print(line.replace("--data.", "--"), file=sys.stderr)
    return stream, stream != tokenizer.bos_id, losses


def _windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start of a window, first position to score, end). Each position of 0 .. count - 1 is scored once."""
    start = done = 0
    while done < count:
        end = min(start + window, count)
        yield start, done, end
        done, start = end, start + stride


_loss_sum = jax.jit(loss_sum, static_argnames=("model",))


@functools.partial(GenerationProgram, static_argnames=("model", "cache_dtype"))
def _loss_sum_over_cache(
    model: Llama, params: Any, inputs: ArrayLike, targets: ArrayLike, weights: ArrayLike, cache_dtype: Any
) -> jax.Array:
    """Return ``loss_sum`` of tokens fed one at a time over a cache. ``params`` are in the form for generation."""
    B, T = jnp.shape(inputs)

    def step(cache: KVCache, now: tuple[jax.Array, ...]) -> tuple[KVCache, jax.Array]:
        x, y, w = now
        logits, cache = next_logits(model, params, x[:, None], cache, end=T)
        return cache, jnp.sum(w * negative_log_likelihood(logits[:, 0], y))

    empty = empty_cache(model, jnp.zeros(B, jnp.int32), slots_read(T) if model.exact_rows else T, cache_dtype)
    by_position = tuple(jnp.swapaxes(x, 0, 1) for x in (inputs, targets, weights))
    return jnp.sum(jax.lax.scan(step, empty, by_position)[1])
