"""Generation: a loaded model, its logits, and completions of prompts."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint import Checkpoint, with_shardings
from llama_jax.config import DType, MeshArgs, ModelArgs, SampleArgs
from llama_jax.errors import UserError, quoted
from llama_jax.generation.chat import Message, encode_dialog
from llama_jax.generation.decode import Sampled, generate_chunks
from llama_jax.model import Llama, is_norm
from llama_jax.runtime import check_memory, make_model, memory_of, use_compilation_cache
from llama_jax.sharding import make_mesh, parameter_shardings
from llama_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What follows a prompt. ``token_ids`` and ``logprobs`` are as long as each other; EOS is in neither."""

    text: str
    """The text after the prompt."""
    token_ids: list[int]
    logprobs: list[float]
    """Natural logarithm of each token's probability under the model, before temperature and top-p."""
    finish_reason: str
    """"stop": the model ended with EOS; "length": max_new_tokens or the context came first."""


@dataclass(frozen=True)
class Model:
    """A LLaMA with its parameters and its tokenizer."""

    args: ModelArgs
    params: Any
    tokenizer: Tokenizer
    module: Llama

    @classmethod
    def load(cls, path: str | Path, compute_dtype: DType = "auto") -> "Model":
        """See ``llama_jax.load``. Matrices are kept in the type that is computed in.

        A model that is too large for one device lies on as many as it takes, each of which reads its own part alone.
        """
        use_compilation_cache()
        checkpoint = Checkpoint.find(path)
        module = make_model(checkpoint.args, compute_dtype)
        shapes = serving_shapes(module)
        mesh = _fitting_mesh(checkpoint, shapes, module)
        params = checkpoint.restore("params", with_shardings(shapes, parameter_shardings(module, mesh)))
        return cls(checkpoint.args, params, checkpoint.tokenizer, module)

    def logits(self, token_ids: Any) -> jax.Array:
        """Logits of the token after each position: int [B, T] -> float32 [B, T, V].

        Raises UserError where T is longer than the context or an id is outside the vocabulary.
        """
        try:
            token_ids = np.asarray(token_ids)
        except ValueError:
            raise UserError("token_ids: expected integers [B, T], found rows of different lengths") from None
        if token_ids.ndim != 2 or not np.issubdtype(token_ids.dtype, np.integer):
            raise UserError(f"token_ids: expected integers [B, T], found {token_ids.dtype} {list(token_ids.shape)}")
        if token_ids.shape[1] > self.args.max_seq_len:
            raise UserError(f"token_ids: expected up to {self.args.max_seq_len} positions, found {token_ids.shape[1]}")
        if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < self.args.vocab_size):
            raise UserError(f"token_ids: expected ids from 0 to {self.args.vocab_size - 1}, found others")
        return _logits(self.module, self.params, token_ids.astype(np.int32))

    def generate(self, prompts: Iterable[str], args: SampleArgs = SampleArgs()) -> list[Completion]:
        """A completion a prompt, in order. Raises UserError on a prompt that fills the context, or bad ``args``."""
        if isinstance(prompts, str):
            raise UserError("prompts: expected a list of strings, found one string; put it in a list")
        return self.generate_ids([self._encode(prompt) for prompt in prompts], args)

    def chat(self, messages: Sequence[Message], args: SampleArgs = SampleArgs()) -> Completion:
        """The answer to a conversation, in the format of Meta's chat models. Raises UserError, as ``encode_dialog`` does."""
        (completion,) = self.generate_ids([encode_dialog(self.tokenizer, messages)], args)
        return replace(completion, text=completion.text.strip())

    def generate_ids(self, rows: Sequence[Sequence[int]], args: SampleArgs = SampleArgs()) -> list[Completion]:
        """``generate`` for prompts that are token ids."""
        self._check(rows, args)
        done = [_Row(self, prompt_ids, args) for prompt_ids in rows]
        for chunk in self._chunks(rows, args):
            for row, ids, logprobs in zip(done, chunk.ids, chunk.logprobs, strict=True):
                row.push(ids, logprobs)
            if all(row.finish_reason for row in done):
                break
        return [row.completion() for row in done]

    def stream(self, prompt: str, args: SampleArgs = SampleArgs()) -> Iterator[str]:
        """The text of ``generate([prompt])``, piece by piece as it comes."""
        return self.stream_ids(self._encode(prompt), args)

    def stream_ids(self, prompt_ids: Sequence[int], args: SampleArgs = SampleArgs()) -> Iterator[str]:
        """``stream`` for a prompt of token ids."""
        self._check([prompt_ids], args)
        row, text = _Row(self, prompt_ids, args), self.tokenizer.stream(prompt_ids)
        for chunk in self._chunks([prompt_ids], args):
            before = len(row.ids)
            row.push(chunk.ids[0], chunk.logprobs[0])
            yield text.push(row.ids[before:])
            if row.finish_reason:
                break
        yield text.flush()

    def _encode(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(f"prompts: expected strings, found {quoted(prompt)}")
        return self.tokenizer.encode(prompt)

    def _check(self, rows: Sequence[Sequence[int]], args: SampleArgs) -> None:
        args.check()
        for ids in rows:
            if len(ids) >= self.args.max_seq_len:
                start = self.tokenizer.decode(ids[:12])
                raise UserError(
                    f"prompt {quoted(start + '...')}: expected fewer than {self.args.max_seq_len} tokens, the model's context, "
                    f"found {len(ids)}; shorten it"
                )

    def _chunks(self, rows: Sequence[Sequence[int]], args: SampleArgs) -> Iterator[Sampled]:
        if not rows:
            return iter(())
        longest = max(min(args.max_new_tokens, self.args.max_seq_len - len(ids)) for ids in rows)
        return generate_chunks(self.module, self.params, rows, args, longest)


class _Row:
    """The completion of one prompt while it grows."""

    def __init__(self, model: Model, prompt_ids: Sequence[int], args: SampleArgs):
        self._tokenizer, self._prompt_ids = model.tokenizer, prompt_ids
        self._limit = min(args.max_new_tokens, model.args.max_seq_len - len(prompt_ids))
        self.ids: list[int] = []
        self._logprobs: list[float] = []
        self.finish_reason = ""

    def push(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Take the tokens of a chunk, up to EOS or the limit."""
        for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            if self.finish_reason:
                return
            if token == self._tokenizer.eos_id:
                self.finish_reason = "stop"
                return
            self.ids.append(token)
            self._logprobs.append(logprob)
            if len(self.ids) == self._limit:
                self.finish_reason = "length"

    def completion(self) -> Completion:
        stream = self._tokenizer.stream(self._prompt_ids)
        text = stream.push(self.ids) + stream.flush()
        return Completion(text, self.ids, self._logprobs, self.finish_reason)


@functools.partial(jax.jit, static_argnames=("module",))
def _logits(module: Llama, params: Any, token_ids: jax.Array) -> jax.Array:
    return module.apply({"params": params}, token_ids)[0]


def serving_shapes(module: Llama) -> Any:
    """Shapes and types of the parameters in generation: matrices in the type that is computed in, norms' weights float32."""
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, s: s if is_norm(path) else jax.ShapeDtypeStruct(s.shape, module.dtype), shapes
    )


def _fitting_mesh(checkpoint: Checkpoint, shapes: Any, module: Llama) -> jax.sharding.Mesh:
    """The fewest of this process's devices that hold the parameters, heads, hidden units and vocabulary spread over them.

    Raises UserError where all of them are too few. XLA on a CPU computes in float32: what is narrower, it keeps twice.
    """
    args, dtype, devices = checkpoint.args, jnp.dtype(module.dtype), jax.local_devices()
    bytes_of = dtype.itemsize + (4 if jax.default_backend() == "cpu" and dtype.itemsize < 4 else 0)
    need = bytes_of * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    spread = args.kv_heads, args.hidden_dim, args.vocab_size
    counts = [n for n in range(1, len(devices) + 1) if not any(size % n for size in spread)]
    count = next((n for n in counts if need / n <= memory_of(devices[:n])), counts[-1])
    what = f"the parameters of {checkpoint.folder} need, computed in {dtype.name} on {count} device{'s'[: count > 1]},"
    check_memory(need / count, devices[:count], what, "use a machine with more memory, or a smaller model")
    return make_mesh(MeshArgs(data=1, tensor=count), devices[:count])
