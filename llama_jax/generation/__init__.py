"""Generation: a loaded model, its logits, and completions of prompts."""

import functools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import make_model
from llama_jax.checkpoint import Checkpoint
from llama_jax.config import Cache, DType, MeshArgs, ModelArgs, SampleArgs, Weights
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.compiling import use_compilation_cache
from llama_jax.devices.sharding import make_mesh
from llama_jax.errors import UserError, quoted
from llama_jax.generation.chat import Message, encode_dialog
from llama_jax.generation.decode import Row, logits_of_tokens
from llama_jax.generation.loading import fitting_mesh, load_parameters
from llama_jax.generation.passes import Engine, OnProgress
from llama_jax.generation.prompts import pasted
from llama_jax.generation.rows import Completion as Completion
from llama_jax.generation.rows import not_finite
from llama_jax.generation.sampling import check_bias
from llama_jax.generation.serving import serve
from llama_jax.generation.speculative import Draft
from llama_jax.model import Llama
from llama_jax.ops.cache import CACHE_DTYPES
from llama_jax.tokenizer import Tokenizer

# The draft that needs no second model, and the most tokens that are guessed at a time.
LOOKUP, MOST_GUESSES = "lookup", 64


@dataclass(frozen=True)
class Model:
    """A LLaMA with its parameters and its tokenizer."""

    args: ModelArgs
    params: Any
    """As in a checkpoint; of a model that was loaded quantized, or on an accelerator, as generation runs on them (serving.py)."""
    tokenizer: Tokenizer
    module: Llama
    cache_dtype: Any = None
    """Of keys and values: jnp.int8, or None for the type that is computed in."""
    draft: Draft | None = None
    """Who guesses tokens ahead (speculative.py)."""
    source: str = "the model"
    """The checkpoint that it was loaded from, for errors."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        compute_dtype: DType = "auto",
        weights: Weights = "auto",
        cache: Cache = "auto",
        mesh: MeshArgs | None = None,
        draft: str = "",
        draft_tokens: int = 4,
        exact: bool = False,
        stacked: bool = False,
    ) -> "Model":
        """See ``llama_jax.load``. Matrices are kept in the type that is computed in, or quantized.

        stacked: parameters are stacked as training has them, with the values that quantized ones have, for what is not generation.
        """
        use_compilation_cache()
        if note := skip_absent_tpu("computing"):
            print(note, file=sys.stderr, flush=True)
        for name, value, known in (("weights", weights, Weights), ("cache", cache, Cache)):
            if value not in get_args(known):
                raise UserError(f"{name}: expected one of {', '.join(get_args(known))}, found {value!r}")
        checkpoint = Checkpoint.find(path)
        weights = checkpoint.chosen(weights)
        laid = None if mesh is None else make_mesh(mesh)
        module = make_model(checkpoint.args, compute_dtype, mesh=laid, exact=exact)
        if laid is None:
            laid = fitting_mesh(checkpoint, module, weights)
        params = load_parameters(checkpoint, module, laid, weights, stacked)
        guesser = load_draft(draft, draft_tokens, compute_dtype, checkpoint, laid) if draft else None
        source = str(checkpoint.folder)
        return cls(checkpoint.args, params, checkpoint.tokenizer, module, CACHE_DTYPES[cache], guesser, source)

    def logits(self, token_ids: Any) -> jax.Array:
        """Logits of the token after each position: int [B, T] -> float32 [B, T, V].

        They are those that generation samples from: with a cache of int8, keys and values are read as it holds them. Raises
        UserError where T is longer than the context, an id is outside the vocabulary, or a logit is not finite.
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
        if not token_ids.size:
            return jnp.zeros((*token_ids.shape, self.args.vocab_size), jnp.float32)
        cache_dtype = self.cache_dtype or self.module.dtype
        logits = logits_of_tokens(self.module, self.serving, token_ids.astype(np.int32), cache_dtype)
        if not jnp.isfinite(logits).all():
            raise not_finite(self.source, "in the logits of these tokens")
        return logits

    def generate(
        self,
        prompts: Iterable[str],
        args: SampleArgs | Sequence[SampleArgs] = SampleArgs(),
        on_progress: OnProgress | None = None,
    ) -> list[Completion]:
        """Completions of prompts, in order: ``args.n`` a prompt, the first prompt's first.

        args: for all prompts, or a sequence with those of each. on_progress: told when a pass begins, and of every chunk.
        Raises UserError on a prompt that fills the context, or impossible ``args``.
        """
        if isinstance(prompts, str):
            raise UserError("prompts: expected a list of strings, found one string; put it in a list")
        return self.generate_ids([self.encode(prompt) for prompt in prompts], args, on_progress)

    def chat(
        self, messages: Sequence[Message], args: SampleArgs = SampleArgs(), on_progress: OnProgress | None = None
    ) -> Completion:
        """The answer to a conversation, in the format of Meta's chat models. Raises UserError, as ``encode_dialog`` does."""
        check_one(args, "an answer")
        (completion,) = self.generate_ids([encode_dialog(self.tokenizer, messages)], args, on_progress)
        return stripped(completion)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        args: SampleArgs | Sequence[SampleArgs] = SampleArgs(),
        on_progress: OnProgress | None = None,
    ) -> list[Completion]:
        """``generate`` for prompts that are token ids."""
        return list(self.completions(self.rows(prompts, args), on_progress))

    def rows(self, prompts: Sequence[Sequence[int]], args: SampleArgs | Sequence[SampleArgs]) -> list[Row]:
        """A row (prompt, settings, number among the prompt's n) for each completion. Raises UserError as ``generate`` does."""
        settings = [args] * len(prompts) if isinstance(args, SampleArgs) else list(args)
        if len(settings) != len(prompts):
            raise UserError(f"args: expected one SampleArgs, or {len(prompts)}, one a prompt; found {len(settings)}")
        alone = isinstance(args, SampleArgs)
        checked: set[int] = set()  # settings, which many prompts may share
        for number, (ids, given) in enumerate(zip(prompts, settings, strict=True), 1):
            if id(given) not in checked:
                prefix = "" if alone else f"prompt {number}: "
                given.check(prefix)
                check_bias(given, self.args.vocab_size, prefix)
                checked.add(id(given))
            self._check_prompt(ids, number)
        return [(ids, given, i) for ids, given in zip(prompts, settings, strict=True) for i in range(given.n)]

    def completions(self, rows: Sequence[Row], on_progress: OnProgress | None = None) -> Iterator[Completion]:
        """A completion for each of ``rows``, in order, as soon as it is there; in as many passes as memory asks for."""
        return self._engine.completions(rows, on_progress)

    def stream(
        self, prompt: str, args: SampleArgs = SampleArgs(), on_progress: OnProgress | None = None
    ) -> Iterator[str]:
        """The text of ``generate([prompt])``, piece by piece as it comes: a token at a time."""
        return self.stream_ids(self.encode(prompt), args, on_progress)

    def stream_ids(
        self, prompt_ids: Sequence[int], args: SampleArgs = SampleArgs(), on_progress: OnProgress | None = None
    ) -> Iterator[str]:
        """``stream`` for a prompt of token ids."""
        check_one(args, "a stream")
        (row,) = self.rows([prompt_ids], args)
        return self._engine.stream(row, on_progress)

    def encode(self, prompt: str) -> list[int]:
        """A prompt's token ids. Warns of controls and tags in it, which are text like all else."""
        if not isinstance(prompt, str):
            raise UserError(f"prompts: expected strings, found {quoted(prompt)}")
        if found := pasted(self.tokenizer, [prompt]):
            warnings.warn(found, stacklevel=3)
        return self.tokenizer.encode(prompt)

    def _check_prompt(self, ids: Sequence[int], number: int) -> None:
        """Raise UserError where the ``number``-th prompt is not made of token ids, or fills the context."""
        if not len(ids):
            raise UserError(
                f"prompt {number}: expected one or more token ids, found none; an empty text is [{self.tokenizer.bos_id}], BOS"
            )
        if not all(isinstance(token, int | np.integer) and 0 <= token < self.args.vocab_size for token in ids):
            raise UserError(
                f"prompt {number}: expected token ids from 0 to {self.args.vocab_size - 1}, found {quoted(list(ids))}"
            )
        if len(ids) >= self.args.max_seq_len:
            start = self.tokenizer.decode(ids[:12])
            raise UserError(
                f"prompt {number} ({quoted(start + '...')}): expected fewer than {self.args.max_seq_len} tokens, the model's "
                f"context, found {len(ids)}; shorten it"
            )

    @functools.cached_property
    def serving(self) -> Any:
        """The parameters in the form that generation runs on."""
        return serve(self.params)

    @property
    def _engine(self) -> Engine:
        return Engine(self.module, self.serving, self.tokenizer, self.cache_dtype, self.draft, self.source)


def load_draft(draft: str, tokens: int, compute_dtype: DType, target: Checkpoint, mesh: jax.sharding.Mesh) -> Draft:
    """``lookup``, or a checkpoint whose tokenizer is the target's, on the target's mesh. Raises UserError where it is neither."""
    if not 1 <= tokens <= MOST_GUESSES:
        raise UserError(f"draft_tokens: expected 1 to {MOST_GUESSES}, found {tokens}")
    if draft == LOOKUP:
        return Draft(tokens)
    checkpoint = Checkpoint.find(draft)
    pieces, wanted = (
        [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        for tokenizer in (checkpoint.tokenizer, target.tokenizer)
    )
    if pieces != wanted:
        raise UserError(
            f"draft: expected a model with the tokenizer of {target.folder}, found one with another in {checkpoint.folder}; "
            f"take a model of the same tokenizer, or {LOOKUP}"
        )
    if checkpoint.args.max_seq_len < target.args.max_seq_len:
        raise UserError(
            f"draft: expected a context of {target.args.max_seq_len} tokens or more, found {checkpoint.args.max_seq_len}"
        )
    module = make_model(checkpoint.args, compute_dtype, mesh=mesh)
    params = load_parameters(checkpoint, module, mesh, checkpoint.weights)
    return Draft(tokens, module, serve(params))


def stripped(answer: Completion) -> Completion:
    """An answer without the white space around it."""
    return replace(answer, text=answer.text.strip())


def check_one(args: SampleArgs, what: str) -> None:
    """Raise UserError where more than one completion is asked for of ``what``, which has one."""
    if args.n != 1:
        raise UserError(f"n: expected 1 for {what}, found {args.n}")
