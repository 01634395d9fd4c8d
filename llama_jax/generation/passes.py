"""Many completions in passes that fit into memory, and what happens on the way."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelArgs
from llama_jax.devices.memory import bytes_of, memory_of
from llama_jax.generation.decode import (
    CHUNK,
    Row,
    Sampled,
    caches_grow,
    generate_chunks,
    prompt_slots,
    slots_read,
    tokens_a_pass,
)
from llama_jax.generation.rows import Completion, PartialCompletion
from llama_jax.generation.speculative import Draft, generate_speculatively
from llama_jax.model import Llama
from llama_jax.ops.cache import KVCache
from llama_jax.tokenizer import Tokenizer

# Most rows of a pass; on a CPU, where more of them are computed no faster.
MOST_ROWS, CPU_MOST_ROWS = 128, 64
# Rows are sorted by length within this many, so that few are padded and results need not wait for the last prompt.
WINDOW = 256
# Of the memory beside the parameters, what rows may take; the rest is the compiler's.
USABLE = 0.8
# Arrays of the vocabulary's size that sampling holds for a row: logits, probabilities, their bits and sums, bias, penalties.
VOCAB_ARRAYS = 8


class Step(NamedTuple):
    """How far generation has come: a pass begins (``steps`` 0), or a chunk of it is done."""

    number: int  # of the pass, from 1
    passes: int
    rows: int  # of the pass
    steps: int  # of the chunk: passes over the parameters, each with a token a row
    tokens: int  # made by the chunk and kept
    filled: int  # slots of the cache that hold a token, in the middle of the chunk, all rows together
    finished: int  # completions that the chunk has ended


OnProgress = Callable[[Step], None]


@dataclass(frozen=True)
class Engine:
    """What makes completions of rows."""

    model: Llama
    params: Any  # in the form for generation (serving.py)
    tokenizer: Tokenizer
    cache_dtype: Any = None  # None: the type that is computed in
    draft: Draft | None = None
    source: str = "the model"  # what errors call it

    def completions(self, rows: Sequence[Row], on_progress: OnProgress | None = None) -> Iterator[Completion]:
        """A completion a row, in order; each as soon as it and all before it are finished."""
        windows = [range(start, min(start + WINDOW, len(rows))) for start in range(0, len(rows), WINDOW)]
        free = free_memory(self.params)
        planned = [split(self.model, rows, window, free, self.cache_dtype) for window in windows]
        passes, number = sum(map(len, planned)), 0
        for window, parts in zip(windows, planned, strict=True):
            made: dict[int, Completion] = {}
            waiting = iter(window)
            at = next(waiting, None)
            for part in parts:
                number += 1
                together = [rows[i] for i in part]
                done = self._run(together, _reporter(on_progress, number, passes, together))
                made |= dict(zip(part, done, strict=True))
                while at in made:
                    yield made.pop(at)
                    at = next(waiting, None)

    def stream(self, row: Row, on_progress: OnProgress | None = None) -> Iterator[str]:
        """The text of one completion as it comes, a token at a time."""
        growing = self._growing(row)
        report = _reporter(on_progress, 1, 1, [row])
        report(0, 0, 0)
        for chunk in self._chunks([row], steps=1):
            before = len(growing.ids)
            growing.push(chunk.ids[0], chunk.logprobs[0])
            report(1, max(0, len(growing.ids) - before), int(bool(growing.finish_reason)))
            yield growing.take()
            if growing.finish_reason:
                return

    def _run(self, rows: Sequence[Row], report: Callable[[int, int, int], None]) -> list[Completion]:
        """The completions of one pass."""
        growing = [self._growing(row) for row in rows]
        report(0, 0, 0)
        for chunk in self._chunks(rows, CHUNK):
            open_rows = [row for row in growing if not row.finish_reason]
            before = sum(len(row.ids) for row in growing)
            for row, ids, logprobs in zip(growing, chunk.ids, chunk.logprobs, strict=True):
                row.push(ids, logprobs)
            finished = sum(bool(row.finish_reason) for row in open_rows)
            # A stop string may take back tokens of the chunk before.
            tokens = max(0, sum(len(row.ids) for row in growing) - before)
            report(chunk.ids.shape[1], tokens, finished)
            if finished == len(open_rows):
                break
        return [row.completion() for row in growing]

    def _growing(self, row: Row) -> PartialCompletion:
        prompt, args, _ = row
        return PartialCompletion(self.tokenizer, prompt, args, self.model.args.max_seq_len, self.source)

    def _chunks(self, rows: Sequence[Row], steps: int) -> Iterator[Sampled]:
        longest = new_tokens(self.model.args, rows)
        if self.draft is None:
            return generate_chunks(self.model, self.params, rows, longest, steps, self.cache_dtype)
        eos = self.tokenizer.eos_id
        return generate_speculatively(self.model, self.params, rows, longest, self.draft, eos, self.cache_dtype)


def split(
    model: Llama, rows: Sequence[Row], window: Sequence[int], free: float, cache_dtype: Any = None
) -> list[list[int]]:
    """The rows of a window in passes, longest prompts first, as many in each as ``free`` bytes hold."""
    most = CPU_MOST_ROWS if jax.default_backend() == "cpu" else MOST_ROWS
    passes: list[list[int]] = []
    longest = new = 0  # tokens of the last pass's longest prompt, and that its longest row makes
    for i in sorted(window, key=lambda i: -len(rows[i][0])):
        more = new_tokens(model.args, [rows[i]])
        count = len(passes[-1]) + 1 if passes else most + 1
        if count <= most and count * row_bytes(model, longest, max(new, more), cache_dtype) <= free:
            passes[-1].append(i)
            new = max(new, more)
        else:
            passes.append([i])
            longest, new = len(rows[i][0]), more
    return passes


def pass_bytes(model: Llama, rows: Sequence[Row], cache_dtype: Any = None) -> int:
    """Bytes that a pass takes beside the parameters."""
    longest = max(len(prompt) for prompt, _, _ in rows)
    return len(rows) * row_bytes(model, longest, new_tokens(model.args, rows), cache_dtype)


def row_bytes(model: Llama, prompt: int, new: int, cache_dtype: Any = None) -> int:
    """Bytes that a row of a pass takes, the longest prompt of which has ``prompt`` tokens, and which makes ``new`` tokens.

    They are its cache, the attention scores of a prompt's part, and the sampler's arrays.
    """
    args = model.args
    longest = prompt_slots(prompt)
    part = min(longest, tokens_a_pass())
    slots = slots_read(longest + new + CHUNK)
    if caches_grow():
        slots += slots // 2  # it is there in both sizes for a moment
    scores = 4 * args.n_heads * part * slots
    hidden = 3 * part * args.hidden_dim * jnp.dtype(model.dtype).itemsize
    sampler = 4 * VOCAB_ARRAYS * args.vocab_size
    return slots * slot_bytes(model, cache_dtype) + scores + hidden + sampler


@functools.lru_cache
def slot_bytes(model: Llama, cache_dtype: Any = None) -> int:
    """Bytes of the cache that one token takes: its keys and values in all layers."""
    cache = jax.eval_shape(lambda: KVCache.empty(model.args, jnp.zeros(1, jnp.int32), 1, cache_dtype or model.dtype))
    return bytes_of((cache.k, cache.v))


def free_memory(params: Any) -> float:
    """Bytes of a device that rows may take beside the parameters."""
    leaves = jax.tree.leaves(params)
    devices = [shard.device for shard in leaves[0].addressable_shards]
    return USABLE * (memory_of(devices) - sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves))


def new_tokens(args: ModelArgs, rows: Sequence[Row]) -> int:
    """Tokens that the row which goes on longest makes."""
    return max(min(sample.max_new_tokens, args.max_seq_len - len(prompt)) for prompt, sample, _ in rows)


def _reporter(
    on_progress: OnProgress | None, number: int, passes: int, rows: Sequence[Row]
) -> Callable[[int, int, int], None]:
    """Says (steps, tokens, finished) of a chunk of a pass to ``on_progress``."""
    filled = sum(len(prompt) for prompt, _, _ in rows)

    def report(steps: int, tokens: int, finished: int) -> None:
        nonlocal filled
        middle = filled + len(rows) * steps // 2
        filled += len(rows) * steps
        if on_progress is not None:
            on_progress(Step(number, passes, len(rows), steps, tokens, middle, finished))

    return report
