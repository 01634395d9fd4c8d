"""The model of the lm-eval harness: ``lm_eval --model llama-jax --model_args ckpt=runs/x --tasks ...``.

The harness asks for log-likelihoods and completions of texts; scoring.py and generation/ answer. Neither they nor the
harness import torch. compat/lm_eval_start.py makes the harness know the name. Where that is not installed,
``python -m llama_jax.evaluate.harness`` takes the place of ``lm_eval``.
"""

import functools
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import lm_eval.models  # noqa: F401  # registers the harness's own models, which it does not once there are others
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from llama_jax.chat.formats import ChatFormat, choose, read_template
from llama_jax.chat.messages import Message
from llama_jax.compat.lm_eval_start import NAMES
from llama_jax.config import Cache, MeshArgs, SampleArgs, Weights
from llama_jax.errors import WRONG, UserError, quoted
from llama_jax.evaluate.scoring import Request, context_of, encode_pairs, fit, score
from llama_jax.generation import Model
from llama_jax.tokenizer import Tokenizer
from llama_jax.train_args import DType

T = TypeVar("T")
# How the harness is started as a command: the ends of its first argument.
COMMANDS = ("/lm_eval", "/lm-eval", "lm_eval/__main__.py", "evaluate/harness.py")
# As the harness's own model has it, for tasks that do not say how much to generate.
MAX_GEN_TOKS = 256
# Names that tasks have for it, the first one first.
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Keys of a task's generation_kwargs that have a field of SampleArgs.
SAMPLING: dict[str, Any] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


def _as_command(function: Callable[..., T]) -> Callable[..., T]:
    """Return the function. As a command, it ends on an error that the user can fix, with one line."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            if not Path(sys.argv[0]).as_posix().endswith(COMMANDS):
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(WRONG)

    return run


class LlamaJax(TemplateLM):
    """A checkpoint, as the harness asks for it."""

    @_as_command
    def __init__(
        self,
        ckpt: str = "",
        compute_dtype: DType = "auto",
        weights: Weights = "auto",
        cache: Cache = "auto",
        data: int = 1,
        fsdp: int = 1,
        tensor: int = 1,
        sequence: int = 1,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        chat_template: str = "",
        adapter: str = "",
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        model: Model | None = None,
        **unknown: Any,
    ):
        """Load the checkpoint.

        Arguments:
            ckpt: a run folder, a step folder or a converted checkpoint.
            compute_dtype, weights, cache: see ``llama_jax.load``. The cache is that of generation.
            data, fsdp, tensor, sequence: the mesh; see ``MeshArgs``. All 1: the fewest devices that hold the model.
            max_length: positions to use. None: the model's context.
            max_gen_toks: new tokens for tasks that name no number.
            chat_template: the name or file of a chat template, instead of the model's own; see ``llama_jax.load``.
            adapter: a low-rank adapter of the model in ckpt; see ``llama_jax.load``.
            add_bos_token: whether BOS begins a context. None: as by transformers, or yes where the files do not say.
            batch_size: contexts in a forward pass. None, 1 (the harness's default) and "auto": as many as fill it.
            max_batch_size, device: are not used; the harness passes them to every model.
            model: a model that is already loaded, instead of ckpt.

        Raises UserError if an argument is unknown or impossible.
        """
        super().__init__()
        if unknown:
            known = "ckpt, adapter, compute_dtype, weights, cache, data, fsdp, tensor, sequence, max_length, max_gen_toks, chat_template, add_bos_token"
            raise UserError(f"model_args: expected some of {known}, found {', '.join(unknown)}")
        if model is None and not ckpt:
            raise UserError("model_args: expected ckpt=FOLDER, a checkpoint, found none")
        if compute_dtype not in get_args(DType):
            raise UserError(f"compute_dtype: expected one of {', '.join(get_args(DType))}, found {compute_dtype!r}")
        mesh = MeshArgs(data, fsdp, tensor, sequence)
        mesh.check()
        if model is not None:
            loading = {
                "ckpt": ckpt,
                "adapter": adapter,
                "compute_dtype": compute_dtype,
                "weights": weights,
                "cache": cache,
                "data, fsdp, tensor or sequence": mesh,
            }
            _check_loaded(
                model, [name for name, value in loading.items() if value not in ("", "auto", MeshArgs(data=1))]
            )
        self.model = model or Model.load(
            str(ckpt), compute_dtype, weights, cache, None if mesh == MeshArgs(data=1) else mesh, adapter=adapter
        )
        context = context_of(self.model)
        if max_length is not None and not 2 <= _whole(max_length) <= context:
            raise UserError(f"max_length: expected 2 to {context}, the model's context, found {max_length}")
        if _whole(max_gen_toks) < 1:
            raise UserError(f"max_gen_toks: expected 1 or more, found {max_gen_toks}")
        if chat_template:
            read_template(chat_template)
        self.max_length = int(max_length or context)
        self.max_gen_toks = int(max_gen_toks)
        self.batch_size = batch_size
        self._templated, self._given_template = False, chat_template
        self._bos = self._begins(add_bos_token)
        self._rows = _rows(batch_size)

    def _begins(self, given: bool | None) -> bool:
        """Return whether BOS begins a context. Say so where the harness's own model may do otherwise."""
        if given not in (None, True, False):
            raise UserError(f"add_bos_token: expected True or False, found {given!r}")
        tokenizer = self.model.tokenizer
        found = tokenizer.begins_elsewhere if given is None else given
        if found is None:
            _tell(
                "a context begins with BOS; transformers 5, with a tokenizer.model alone, begins it without, as add_bos_token=False "
                "does here"
            )
        elif found != tokenizer.adds_bos and given is None:
            what, flag = ("with", "False") if found else ("without", "True")
            _tell(
                f"a context begins {what} BOS, as by transformers; with add_bos_token={flag}, it begins as in this project's other "
                "commands"
            )
        return found is not False

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS, which an empty context is."""
        return self.model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the checkpoint, by which the harness tells cached requests apart."""
        return re.sub(r"\W+", "__", self.model.source)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text, with BOS or not as ``add_special_tokens`` says, or else ``add_bos_token``.

        Once chat templates are applied, special tokens that are written out are these tokens, and a text that begins
        with BOS gets no other.
        """
        tokenizer = self.model.tokenizer
        begun = self._templated and string.startswith(tokenizer.piece(tokenizer.bos_id))
        bos = self._bos and not begun if add_special_tokens is None else add_special_tokens
        return [tokenizer.bos_id] * bos + tokenizer.encode(string, bos=False, specials=self._templated)

    def tok_decode(self, tokens: Sequence[int], **_: Any) -> str:
        """Return the text of token ids."""
        return self.model.tokenizer.decode(tokens)

    @_as_command
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text in the model's chat format, with special tokens written out.

        Without ``add_generation_prompt`` the last message is an answer that is to be continued.
        """
        self._templated, chat = True, self._chat
        messages = [Message(message["role"], message["content"]) for message in chat_history]  # type: ignore[arg-type]
        begun = ""
        if not add_generation_prompt and messages and messages[-1].role == "assistant":
            begun = messages.pop().content.strip()
        if chat.is_llama2:
            return _text_of(self.model.tokenizer, chat.encode(messages)) + (f" {begun}" if begun else "")
        return chat.render(messages) + begun

    @functools.cached_property
    def _chat(self) -> ChatFormat:
        model = self.model
        return choose(model.tokenizer, model.setup, self._given_template or model.chat_template, model.source)

    @property
    def _turn_ends(self) -> frozenset[int]:
        """The tokens that end an answer in the format of conversations."""
        return frozenset(self.model.end_ids or (self.eot_token_id,)) | self._chat.end_ids

    def _tell_of_template(self) -> None:
        if self._given_template and not self._templated:
            _tell("chat_template: no effect without --apply_chat_template")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template, which the harness writes into its results."""
        return self._chat.template if chat_template else None

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation behind its context, and whether greedy decoding gives it."""
        tokenizer = self.model.tokenizer
        pairs = [request.args for request in requests]
        bos = tokenizer.piece(tokenizer.bos_id)
        if any(context.startswith(bos) for context, _ in pairs):
            return cast(list[tuple[float, bool]], super().loglikelihood(requests, disable_tqdm))
        encoded = encode_pairs(tokenizer, pairs, self._bos)
        return self._loglikelihood_tokens(
            [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)], disable_tqdm
        )

    @_as_command
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        self._tell_of_template()
        asked, cut = [], 0
        for number, (_texts, context, continuation) in enumerate(requests, 1):
            try:
                if not continuation:
                    raise UserError("expected a continuation with tokens, found none")
                request, more = fit(Request(context, continuation), self.max_length)
            except UserError as error:
                raise UserError(f"request {number} of {len(requests)}: {error}") from None
            asked.append(request)
            cut += more > 0
        if cut:
            _tell(f"{cut} of {len(asked)} requests exceed {self.max_length} tokens and lose their beginning")
        with tqdm(total=len(asked), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:

            def count(numbers: Sequence[int]) -> None:
                bar.update(len(numbers))

            scores = score(self.model, asked, self._rows, on_batch=count)
        found = [(one.loglikelihood, one.greedy) for one in scores]
        for (texts, _before, _after), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    @_as_command
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in the harness's windows."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            of_text = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            counts.append(len(of_text))
            windows += [(None, *window) for window in of_text]
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @_as_command
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a completion of each context, up to EOS, a text of ``until``, or ``max_gen_toks`` tokens."""
        prompts, settings, stops = [], [], []
        cut = 0
        for context, kwargs in (request.args for request in requests):
            sample = self._sample_args(kwargs)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            most = self.max_length - sample.max_new_tokens
            cut += len(ids) > most
            prompts.append(ids[-most:])
            settings.append(sample)
            stops.append(sample.stop)
        if cut:
            _tell(f"{cut} of {len(prompts)} contexts leave too little room for new tokens and lose their beginning")
        texts = []
        self._tell_of_template()
        ends = self._turn_ends if self._templated else ()
        completions = self.model.completions(self.model.rows(prompts, settings), end_ids=ends)
        for request, completion, stop in zip(
            requests,
            tqdm(completions, total=len(prompts), disable=disable_tqdm, desc="Running generate_until requests"),
            stops,
            strict=True,
        ):
            text = self.tok_decode(completion.token_ids)
            for end in stop:
                text = text.split(end)[0]
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sample_args(self, kwargs: dict[str, Any]) -> SampleArgs:
        """Return the settings of a task's generation_kwargs. Raises UserError if one is unknown or impossible."""
        left = {name: value for name, value in kwargs.items() if value is not None}
        until = left.pop("until", None) or []
        asked = [left.pop(name, None) for name in NEW_TOKENS]
        new = next((int(count) for count in asked if count is not None), self.max_gen_toks)
        if new >= self.max_length:
            _tell(
                f"max_gen_toks {new} is cut to {self.max_length // 2}, half of the context of {self.max_length} tokens"
            )
            new = self.max_length // 2
        samples = left.pop("do_sample", None)
        found = {name: kind(left.pop(name)) for name, kind in SAMPLING.items() if name in left}
        temperature = found.pop("temperature", 0.0 if not samples else 1.0)
        if samples is False:
            temperature = 0.0
        if left:
            known = ", ".join(["until", *NEW_TOKENS, "do_sample", *SAMPLING])
            raise UserError(f"generation_kwargs: expected some of {known}, found {quoted(left)}")
        texts = (until,) if isinstance(until, str) else tuple(until)
        sample = SampleArgs(
            temperature=temperature, stop=tuple(filter(None, texts)), max_new_tokens=new, **({"top_p": 1.0} | found)
        )
        sample.check("generation_kwargs: ")
        return sample


def _text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the text of a conversation's ids, with BOS and EOS written out."""
    text, own = "", list[int]()
    for token in ids:
        if token in (tokenizer.bos_id, tokenizer.eos_id):
            text += tokenizer.decode(own) + tokenizer.piece(token)
            own = []
        else:
            own.append(token)
    return text + tokenizer.decode(own)


def _check_loaded(model: Any, others: Sequence[str]) -> None:
    """Raise UserError if ``model`` is no model, or there are ``others``, arguments of loading, beside it."""
    if not isinstance(model, Model):
        raise UserError(f"model: expected a model that is loaded, found {quoted(model)}; give a path as ckpt")
    if others:
        raise UserError(
            f"model_args: expected no {others[0]} beside a model that is loaded, found it; give it to llama_jax.load"
        )


def _rows(batch_size: int | str | None) -> int:
    """Return the contexts of a forward pass, 0 for as many as fill it."""
    if batch_size is None or str(batch_size).startswith("auto"):
        return 0
    rows = _whole(batch_size)
    if rows < 1:
        raise UserError(f"batch_size: expected auto, or 1 or more, found {batch_size!r}")
    return 0 if rows == 1 else rows


def _whole(value: Any) -> int:
    """Return a whole number, which may be written as text, or -1 for what is none."""
    try:
        return int(str(value))  # of a float or a bool, int alone would make one
    except ValueError:
        return -1


_TOLD: set[str] = set()


def _tell(line: str) -> None:
    """Print a line to standard error, once."""
    if line not in _TOLD:
        _TOLD.add(line)
        with tqdm.external_write_mode():
            print(f"llama-jax: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    importlib.import_module("llama_jax.evaluate.harness")  # registers its class, in place of this module's
    importlib.import_module("lm_eval.__main__").cli_evaluate()
else:
    register_model(*NAMES)(LlamaJax)
