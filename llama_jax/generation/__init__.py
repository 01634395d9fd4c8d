"""Generation: a loaded model, its logits, and completions of prompts."""

import functools
import itertools
import os
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.build import make_model
from llama_jax.chat.formats import ChatFormat, ChatSetup, choose, read_template
from llama_jax.chat.messages import Message, as_messages
from llama_jax.checkpoint.adapted import WholeModel
from llama_jax.config import Cache, MeshArgs, ModelArgs, SampleArgs, Weights
from llama_jax.convert.once import open_model
from llama_jax.devices.absent_tpu import skip_absent_tpu
from llama_jax.devices.compiling import check_devices, use_compilation_cache
from llama_jax.devices.sharding import make_mesh, mesh_of, on_mesh
from llama_jax.errors import UserError, quoted
from llama_jax.generation.arguments import (
    WHOLE,
    check_loading,
    check_one,
    ids_of,
    is_series,
    one_prompt,
    settings_of,
    texts_of,
)
from llama_jax.generation.decode import Row, logits_of_tokens
from llama_jax.generation.grammar import check_schema
from llama_jax.generation.infill import encode_infill, with_infill_end
from llama_jax.generation.loading import fitting_mesh, load_parameters
from llama_jax.generation.passes import Engine, OnProgress
from llama_jax.generation.remarks import idle_stops, pasted
from llama_jax.generation.rows import Completion as Completion
from llama_jax.generation.rows import echoed, ends_of, not_finite
from llama_jax.generation.sampling import check_tokens
from llama_jax.generation.serving import for_generation
from llama_jax.generation.speculative import Draft
from llama_jax.model import Llama
from llama_jax.ops.cache import CACHE_DTYPES
from llama_jax.tokenizer import Tokenizer, clean
from llama_jax.train_args import DType

# The draft that needs no second model, and the usual and the maximum number of tokens to draft at a time.
LOOKUP, USUAL_GUESSES, MOST_GUESSES = "lookup", 4, 64


@dataclass(frozen=True, eq=False)
class Model:
    """A LLaMA with its parameters and its tokenizer. ``Model.load`` or ``llama_jax.load`` makes one.

    A model equals itself alone: to compare two, compare ``args`` and the arrays of ``params``.
    """

    args: ModelArgs
    params: Any = field(repr=False)
    """The parameters as in a checkpoint. If quantized or on an accelerator, they are in the form for generation."""
    tokenizer: Tokenizer
    module: Llama
    cache_dtype: Any = None
    """The data type of keys and values: jnp.int8, or None for that of activations."""
    draft: Draft | None = None
    """The source of drafted tokens (speculative.py)."""
    source: str = "the model"
    """The checkpoint that it was loaded from, for error messages."""
    end_ids: tuple[int, ...] = ()
    """The tokens that end a completion. Empty: EOS."""
    setup: ChatSetup = ChatSetup()
    """The part of its checkpoint that is about conversations."""
    chat_template: str = ""
    """The name or file of a chat template to use instead of the model's own. Empty: its own."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | WholeModel,
        compute_dtype: DType = "auto",
        weights: Weights = "auto",
        cache: Cache = "auto",
        mesh: MeshArgs | None = None,
        draft: str = "",
        draft_tokens: int = USUAL_GUESSES,
        exact: bool = False,
        adapter: str | os.PathLike[str] = "",
        chat_template: str = "",
    ) -> "Model":
        """Load a model; see ``llama_jax.load``. Matrices are kept in compute_dtype or quantized.

        A checkpoint that is open already is not opened again, which would read its tokenizer twice.
        """
        use_compilation_cache()
        if note := skip_absent_tpu("computing"):
            print(note, file=sys.stderr, flush=True)
        if not isinstance(path, WholeModel):
            check_loading(path, mesh, adapter=adapter, draft=draft, chat_template=chat_template)
            if draft_tokens != USUAL_GUESSES and not draft:
                warnings.warn("draft_tokens: no effect without draft", stacklevel=3)
        if not isinstance(exact, bool):
            raise UserError(f"exact: expected True or False, found {quoted(exact)}")
        for name, value, known in (("weights", weights, Weights), ("cache", cache, Cache)):
            if value not in get_args(known):
                raise UserError(f"{name}: expected one of {', '.join(get_args(known))}, found {value!r}")
        check_devices()
        found = path if isinstance(path, WholeModel) else open_model(os.fspath(path), os.fspath(adapter or ""))
        if chat_template:
            read_template(chat_template)
        weights = found.chosen(weights)
        laid = None if mesh is None else make_mesh(mesh)
        module = make_model(found.args, compute_dtype, mesh=laid, exact=exact)
        if laid is None:
            laid = fitting_mesh(found.base, module, weights)
        params = load_parameters(found.base, module, laid, weights, found.adapter)
        guesser = load_draft(draft, draft_tokens, compute_dtype, found, laid) if draft else None
        return cls(
            found.args,
            params,
            found.tokenizer,
            module,
            CACHE_DTYPES[cache],
            guesser,
            str(found.folder),
            found.chat.end_ids,
            found.chat,
            chat_template,
        )

    def logits(self, token_ids: Any) -> jax.Array:
        """Return the logits of the token after each position: int [B, T] -> float32 [B, T, V].

        They are the logits that generation samples from; an int8 cache affects them, too. Raises UserError if T exceeds
        the context, an id is outside the vocabulary, or a logit is not finite.
        """
        try:
            given, token_ids = token_ids, np.asarray(token_ids)
        except ValueError:
            raise UserError("token_ids: expected integers [B, T], found rows of different lengths") from None
        if isinstance(given, np.ma.MaskedArray):
            raise UserError("token_ids: expected integers [B, T], found a masked array; give the tokens without a mask")
        if token_ids.ndim != 2 or token_ids.dtype.kind not in WHOLE:
            raise UserError(f"token_ids: expected integers [B, T], found {token_ids.dtype} {list(token_ids.shape)}")
        if token_ids.shape[1] > self.args.max_seq_len:
            raise UserError(f"token_ids: expected up to {self.args.max_seq_len} positions, found {token_ids.shape[1]}")
        if token_ids.size and not (token_ids.min() >= 0 and token_ids.max() < self.args.vocab_size):
            raise UserError(f"token_ids: expected ids from 0 to {self.args.vocab_size - 1}, found others")
        if not token_ids.size:
            return jnp.zeros((*token_ids.shape, self.args.vocab_size), jnp.float32)
        cache_dtype = self.cache_dtype or self.module.dtype
        with on_mesh(mesh_of(self.serving)):  # the caller may have a mesh of its own around
            logits = logits_of_tokens(self.module, self.serving, token_ids.astype(np.int32), cache_dtype)
            finite = bool(jnp.isfinite(logits).all())
        if not finite:
            raise not_finite(self.source, "in the logits of these tokens")
        return logits

    def generate(
        self,
        prompts: Iterable[str],
        args: SampleArgs | Sequence[SampleArgs] = SampleArgs(),
        on_progress: OnProgress | None = None,
    ) -> list[Completion]:
        """Return ``args.n`` completions of each prompt, in the order of the prompts.

        Arguments:
            prompts: texts to complete.
            args: settings for all prompts, or a sequence with those of each prompt.
            on_progress: is called with a Step when a pass begins and after every chunk.

        Raises UserError on a prompt that fills the context, or impossible ``args``.

        Example:
            (completion,) = model.generate(["Once upon a time"], llama_jax.SampleArgs(max_new_tokens=64))
            completion.text
        """
        texts = texts_of(prompts)
        return self._complete(
            [self.encode(text) for text in texts], [(clean(text), "") for text in texts], args, on_progress
        )

    def infill(
        self,
        gaps: Iterable[tuple[str, str]],
        args: SampleArgs | Sequence[SampleArgs] = SampleArgs(),
        on_progress: OnProgress | None = None,
    ) -> list[Completion]:
        """Return what stands between the texts of each gap (prefix, suffix), by a model with Code Llama's vocabulary.

        A completion also ends at <EOT>. With ``echo``, its text is the whole: prefix, completion, suffix. The other
        arguments are those of ``generate``. Raises UserError if the vocabulary has no tokens for infilling.

        Example:
            (middle,) = model.infill([("def add(a, b):\\n", "\\n    return c")])
        """
        if not is_series(gaps):
            raise UserError(f"gaps: expected a list of pairs of texts (prefix, suffix), found {quoted(gaps)}")
        texts = list(gaps)
        if not all(isinstance(gap, tuple | list) and len(gap) == 2 for gap in texts):
            raise UserError(f"gaps: expected pairs of texts (prefix, suffix), found {quoted(texts)}")
        settings = settings_of(args, len(texts))
        ids = [encode_infill(self.tokenizer, *gap, one.infill_format) for gap, one in zip(texts, settings, strict=True)]
        ended = [with_infill_end(one, self.tokenizer) for one in settings]
        return self._complete(ids, texts, ended, on_progress)

    def chat(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        args: SampleArgs = SampleArgs(),
        on_progress: OnProgress | None = None,
    ) -> Completion:
        """Return the answer to a conversation, in the format that the model was tuned on.

        ``messages`` are Messages or {"role": ..., "content": ...}: usually an optional system message, then user and
        assistant in turn, the last one from the user. Raises UserError if the model has no chat template, or the
        template does not take them.
        """
        check_one(args, "an answer")
        if args.echo:
            raise UserError("echo: expected prompts to complete, found a conversation to answer; leave it out")
        rows = self.rows([self.encode_chat(messages)], args)
        self._warn_of_stops([args])
        (completion,) = self.completions(rows, on_progress, self.turn_end_ids)
        return stripped(completion)

    def encode_chat(self, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
        """Return the token ids that a conversation is answered from, as ``chat`` and sample.py --chat do."""
        known = "chat_format" in self.__dict__
        ids = self.chat_format.encode(as_messages(messages))
        if not known:
            for note in self.chat_format.notes:
                warnings.warn(note, stacklevel=2)
        return ids

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """The format of its conversations. Raises UserError if there is none."""
        return choose(self.tokenizer, self.setup, self.chat_template, self.source)

    @property
    def turn_end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: those of a completion, and the one that its chat template writes there."""
        return frozenset(self.end_ids or (self.tokenizer.eos_id,)) | self.chat_format.end_ids

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        args: SampleArgs | Sequence[SampleArgs] = SampleArgs(),
        on_progress: OnProgress | None = None,
    ) -> list[Completion]:
        """Run ``generate`` for prompts that are token ids, int [T] each."""
        return self._complete(ids_of(prompts), [], args, on_progress)

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        around: Sequence[tuple[str, str]],
        args: SampleArgs | Sequence[SampleArgs],
        on_progress: OnProgress | None,
    ) -> list[Completion]:
        """Return completions. With ``echo``, each stands between the texts of ``around``, or behind its prompt's."""
        rows = self.rows(prompts, args)
        self._warn_of_stops(given for _, given, _ in rows)
        texts = {id(ids): text for ids, text in zip(prompts, around, strict=False)}
        completions = zip(rows, self.completions(rows, on_progress), strict=True)
        return [
            echoed(one, *texts.get(id(ids), (self.tokenizer.decode(ids), ""))) if given.echo else one
            for (ids, given, _), one in completions
        ]

    def rows(self, prompts: Sequence[Sequence[int]], args: SampleArgs | Sequence[SampleArgs]) -> list[Row]:
        """Return a row (prompt, settings, number among the prompt's n) per completion.

        Raises UserError as ``generate`` does.
        """
        settings = settings_of(args, len(prompts))
        alone = isinstance(args, SampleArgs)
        absent = self.tokenizer.absent(self.args.vocab_size)
        checked: set[int] = set()  # ids of settings, because many prompts may share one
        for number, (ids, given) in enumerate(zip(prompts, settings, strict=True), 1):
            if id(given) not in checked:
                prefix = "" if alone else f"prompt {number}: "
                given.check(prefix)
                check_tokens(given, absent, prefix, ends_of(given, self.end_ids or (self.tokenizer.eos_id,)))
                check_schema(given, self.tokenizer, self.draft is not None, prefix)
                checked.add(id(given))
            self._check_prompt(ids, number)
        return [(ids, given, i) for ids, given in zip(prompts, settings, strict=True) for i in range(given.n)]

    def completions(
        self, rows: Sequence[Row], on_progress: OnProgress | None = None, end_ids: Collection[int] = ()
    ) -> Iterator[Completion]:
        """Yield a completion of each row, in order, as soon as it is done.

        The rows are split into passes that fit memory. end_ids: the tokens that end a completion. Empty: the model's.
        """
        return self._engine(end_ids).completions(rows, on_progress)

    def stream(
        self, prompt: str, args: SampleArgs = SampleArgs(), on_progress: OnProgress | None = None
    ) -> Iterator[str]:
        """Yield the text of ``generate([prompt])`` piece by piece, one token at a time."""
        check_one(args, "a stream")
        self._warn_of_stops([args])
        pieces = self.stream_ids(self.encode(prompt), replace(args, echo=False), on_progress)
        return itertools.chain([clean(prompt)] if args.echo else [], pieces)

    def stream_ids(
        self,
        prompt_ids: Sequence[int],
        args: SampleArgs = SampleArgs(),
        on_progress: OnProgress | None = None,
        end_ids: Collection[int] = (),
    ) -> Iterator[str]:
        """Run ``stream`` for a prompt of token ids. end_ids: the tokens that end it. Empty: the model's.

        Raises UserError as ``generate_ids`` does, and if one of ``end_ids`` is outside the vocabulary.
        """
        check_one(args, "a stream")
        end_ids = self._known(end_ids)
        (row,) = self.rows([one_prompt(prompt_ids)], args)
        start = [self.tokenizer.decode(row[0])] if args.echo else []
        return itertools.chain(start, self._engine(end_ids).stream(row, on_progress))

    def encode(self, prompt: str) -> list[int]:
        """Return a prompt's token ids. Warns of control tokens and chat tags in it, which are read as plain text."""
        if not isinstance(prompt, str):
            raise UserError(f"prompts: expected strings, found {quoted(prompt)}")
        if found := pasted(self.tokenizer, [prompt]):
            warnings.warn(found, stacklevel=3)
        return self.tokenizer.encode(prompt)

    def _known(self, end_ids: Collection[int]) -> list[int]:
        """Return tokens that end a completion as ints. Raises UserError if one is outside the vocabulary."""
        ids = np.asarray(list(end_ids) if isinstance(end_ids, Iterable) else end_ids)
        if ids.size and (
            ids.ndim != 1 or ids.dtype.kind not in WHOLE or not 0 <= ids.min() <= ids.max() < self.args.vocab_size
        ):
            raise UserError(
                f"end_ids: expected token ids from 0 to {self.args.vocab_size - 1}, found {quoted(end_ids)}"
            )
        return [int(token) for token in ids.reshape(-1).tolist()]

    def _warn_of_stops(self, settings: Iterable[SampleArgs]) -> None:
        """Warn of stop strings that hold a token without text among others."""
        if told := idle_stops(self.tokenizer, (stop for args in settings for stop in args.stop)):
            warnings.warn(told, stacklevel=4)

    def _check_prompt(self, ids: Sequence[int], number: int) -> None:
        """Raise UserError if the ``number``-th prompt is not a list of token ids, or fills the context."""
        if not len(ids):
            raise UserError(
                f"prompt {number}: expected one or more token ids, found none; an empty text is [{self.tokenizer.bos_id}], BOS"
            )
        known = min(self.args.vocab_size, self.tokenizer.vocab_size)  # the rows behind are padding
        if not all(0 <= token < known for token in ids):
            raise UserError(f"prompt {number}: expected token ids from 0 to {known - 1}, found {quoted(list(ids))}")
        if len(ids) >= self.args.max_seq_len:
            start = self.tokenizer.decode(ids[:12])
            raise UserError(
                f"prompt {number} ({quoted(start + '...')}): expected fewer than {self.args.max_seq_len} tokens, the model's "
                f"context, found {len(ids)}; shorten it"
            )

    @functools.cached_property
    def serving(self) -> Any:
        """The parameters in the form that generation uses."""
        return for_generation(self.params)

    def _engine(self, end_ids: Collection[int] = ()) -> Engine:
        draft, source, ends = self.draft, self.source, end_ids or self.end_ids
        return Engine(self.module, self.serving, self.tokenizer, self.cache_dtype, draft, source, ends)


def load_draft(draft: str, tokens: int, compute_dtype: DType, target: WholeModel, mesh: jax.sharding.Mesh) -> Draft:
    """Return ``lookup`` or a model as draft, on the mesh of the target.

    Raises UserError if ``draft`` is neither "lookup" nor a checkpoint with the target's tokenizer.
    """
    if type(tokens) is not int or not 1 <= tokens <= MOST_GUESSES:
        raise UserError(f"draft_tokens: expected 1 to {MOST_GUESSES}, found {quoted(tokens)}; 4 is usual")
    if draft == LOOKUP:
        return Draft(tokens)
    checkpoint = open_model(draft)
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
    params = load_parameters(checkpoint.base, module, mesh, checkpoint.chosen("auto"), checkpoint.adapter)
    return Draft(tokens, module, for_generation(params))


def stripped(answer: Completion) -> Completion:
    """Return an answer without the white space around it."""
    return replace(answer, text=answer.text.strip())
