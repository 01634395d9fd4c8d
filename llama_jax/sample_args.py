"""The settings of generation."""

import dataclasses
from typing import Literal

from llama_jax.cli.flags import ESCAPED
from llama_jax.cli.json_argument import json_line, load_json
from llama_jax.errors import quoted
from llama_jax.fields import COUNT, LARGEST, LARGEST_FLOAT32, SURROGATE, TINY, check_fields, expect, own_table, typed


@dataclasses.dataclass(frozen=True)
class SampleArgs:
    """How text is generated. The defaults are Meta's.

    Logits are changed in this order: penalties, logit_bias, temperature, top_k, top_p, min_p.
    top_p applies to the tokens that top_k keeps.
    """

    temperature: float = 0.6
    """Sampling temperature, which divides the logits. 0: greedy decoding."""
    top_p: float = 0.9
    """Sample from the smallest set of likeliest tokens with this much probability (nucleus sampling). 1: from all."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens. 0: from all."""
    min_p: float = 0.0
    """Sample from tokens whose probability is at least this share of the likeliest token's. 0: from all."""
    repetition_penalty: float = 1.0
    """Divide positive logits, and multiply negative ones, by this if their token is in the prompt or the completion.
    1: no penalty."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the completion already contains."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time that the completion contains it."""
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Numbers to add to the logits of tokens, by token id. -inf forbids a token. As a flag: id bias id bias ..."""
    stop: tuple[str, ...] = dataclasses.field(default=(), metadata=ESCAPED)
    r"""End a completion before the first of these strings. A string may begin or end inside a token.
    That of a special token, such as </s>, also ends it at the token. A flag takes one string: --stop . --stop '\n'.
    The escapes \n, \r, \t and \\ mean line feed, carriage return, tab and backslash."""
    stop_token_ids: tuple[int, ...] = ()
    """Also end a completion at these tokens, by id. Like EOS, they are left out of it. A flag takes several."""
    ignore_eos: bool = False
    """Do not end a completion at EOS, which stays among its tokens. It has no text."""
    min_new_tokens: int = 0
    """Do not sample EOS and stop_token_ids before the completion has this many tokens. Stop strings still end it."""
    max_new_tokens: int = 128
    """Maximum number of tokens to generate per prompt. The end of the context may stop a completion earlier."""
    logprobs: int = 0
    """Number of likeliest tokens to report for each token, with their log-probabilities under the model.
    As those of the tokens themselves, they are taken before penalties, temperature and other changes. 0: none."""
    echo: bool = False
    """Begin the text of a result with its prompt, and report the log-probabilities of the prompt's tokens.
    They take one more pass over the prompt."""
    infill_format: Literal["psm", "spm"] = "psm"
    """Order in which an infilling prompt has its texts. psm: prefix, suffix. spm: suffix, prefix."""
    json_schema: str = ""
    """Sample only tokens that continue a JSON text which fulfils this JSON Schema. {}: any JSON.
    A flag may be the name of a file with a schema. Only max_new_tokens and the context may cut the text.
    It needs the extra "grammar"."""
    n: int = 1
    """Number of completions per prompt, each with its own random numbers."""
    seed: int = 0
    """Random seed. A completion depends on its prompt, the seed and its number among the n, not on other prompts."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        own_table(self, "logit_bias")
        if isinstance(self.json_schema, dict | bool):
            object.__setattr__(self, "json_schema", json_line(self.json_schema))

    def check(self, prefix: str = "") -> None:
        """Raise UserError on impossible values. ``prefix`` precedes the field's name in the message."""
        ranges: dict[str, tuple[float, float]] = {
            "temperature": (0.0, 1e6),
            "top_p": (TINY, 1.0),
            "top_k": (0, LARGEST),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (TINY, 1e6),
            "presence_penalty": (-1e6, 1e6),
            "frequency_penalty": (-1e6, 1e6),
            "min_new_tokens": (0, LARGEST),
            "max_new_tokens": COUNT,
            "logprobs": (0, LARGEST),
            "n": COUNT,
            "seed": (0, 2**32 - 1),
        }
        check_fields(self, prefix, ranges)
        for text in self.stop:
            expect(bool(typed(text, str, prefix + "stop")), prefix + "stop", "texts of one or more characters", "none")
            expect(not SURROGATE.search(text), prefix + "stop", "texts in UTF-8", ascii(text))
        for token in self.stop_token_ids:
            typed(token, int, prefix + "stop_token_ids")
        expect(
            self.min_new_tokens <= self.max_new_tokens,
            prefix + "min_new_tokens",
            f"at most the {self.max_new_tokens} of max_new_tokens",
            self.min_new_tokens,
        )
        if self.json_schema:
            _check_json_schema(self, prefix)
        for token, bias in self.logit_bias.items():
            typed(token, int, prefix + "logit_bias")
            typed(bias, float, prefix + "logit_bias")
            expect(bias <= LARGEST_FLOAT32, prefix + "logit_bias", f"numbers up to {LARGEST_FLOAT32}", bias)


def _check_json_schema(args: SampleArgs, prefix: str) -> None:
    """Raise UserError, after ``prefix``, if json_schema is not one, or stands beside settings that would break it."""
    found = load_json(args.json_schema, f"{prefix}json_schema")
    expect(isinstance(found, dict | bool), f"{prefix}json_schema", "a JSON Schema, an object", quoted(args.json_schema))
    for name in ("stop", "ignore_eos", "min_new_tokens"):
        given, default = getattr(args, name), getattr(SampleArgs(), name)
        expected = f"{default} beside json_schema, which decides where the text ends"
        expect(given == default, prefix + name, expected, f"{given!r}; leave one of them out")
