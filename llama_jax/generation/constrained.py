"""Decoding in which the host says, token by token, which tokens each row may sample.

Sampling and the forward pass are two programs: while the device reads the sampled tokens, the host computes the masks
of the next ones. So a step takes as long as the slower of the two, and one more start of a program.

B rows, W 32-bit words of a mask.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.devices.compiling import GenerationProgram
from llama_jax.devices.sharding import mesh_of, on_mesh
from llama_jax.generation.decode import (
    DecodeState,
    Row,
    Sampled,
    alternatives_of,
    bytes_read,
    ensure_slots,
    next_logits,
    pad_rows,
    prompt_slots,
    read_prompts,
    sample_once,
    slots_read,
)
from llama_jax.generation.grammar import Constraints
from llama_jax.model import Llama


def generate_constrained(
    model: Llama,
    params: Any,
    rows: Sequence[Row],
    max_new_tokens: int,
    constraints: Constraints,
    cache_dtype: Any = None,
    absent: np.ndarray | None = None,
) -> Iterator[Sampled]:
    """Yield what ``generate_chunks`` yields in chunks of one token, which ``constraints`` allow."""
    mesh, count, alternatives = mesh_of(params), len(rows), alternatives_of(rows)
    rows = pad_rows(rows, mesh)
    longest = prompt_slots(max(len(prompt) for prompt, _, _ in rows))
    slots = slots_read(longest + max_new_tokens + 1)
    with on_mesh(mesh):
        state = read_prompts(model, params, rows, longest, slots, cache_dtype or model.dtype, absent=absent)
    for made in range(max_new_tokens):
        masks = constraints.masks(len(rows))
        end = slots_read(longest + made + 1)
        with on_mesh(mesh):
            state, found = sample_once(model, state, alternatives, masks)
            state = state.replace(cache=ensure_slots(state.cache, end))
            state = _read(model, params, state, found.ids, end)
        chunk = found.fetched(count)
        constraints.push(chunk.ids[:, 0])
        yield chunk


@functools.partial(
    GenerationProgram, cache_bytes=bytes_read, static_argnames=("model", "end"), donate_argnames=("state",)
)
def _read(model: Llama, params: Any, state: DecodeState, ids: jax.Array, end: int) -> DecodeState:
    """Return the state behind the tokens ``ids`` [B, 1]."""
    logits, cache = next_logits(model, params, ids, state.cache, end)
    return state.replace(cache=cache, logits=logits[:, 0])
