"""JSON schemas: what is made fulfils them, whatever the model says; rows with and without one stand in a batch."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Model, grammar
from llama_jax.generation.grammar import Constraints
from llama_jax.generation.rows import Completion
from llama_jax.generation.speculative import Draft
from llama_jax.generation.token_text import token_bytes, token_text
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build
from tests.generation.test_exact import exactly

pytest.importorskip("llguidance", reason="needs llguidance, which the test extra brings")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, which the test extra brings")

OPEN = SampleArgs(temperature=1.0, top_p=1.0, max_new_tokens=60)
SCHEMAS: dict[str, Any] = {
    "any JSON": {},
    "true": True,
    "record": {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"type": "string", "maxLength": 3}},
        "required": ["age", "name"],
        "additionalProperties": False,
    },
    "words": {"enum": ["a fox", "\u2581 \u4e2d\u00e9", "\n\"", 12, None]},
    "array": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "minItems": 2, "maxItems": 3},
    "pattern": {"type": "string", "pattern": "^(ab|[0-9]){2,3}$"},
    "references": {"$ref": "#/$defs/pair", "$defs": {"pair": {"type": "array", "prefixItems": [{"const": 1}, {"const": "x"}], "items": False, "minItems": 2}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return build(small_tokenizer)


def with_schema(schema: Any, **more: Any) -> SampleArgs:
    return dataclasses.replace(OPEN, json_schema=json.dumps(schema), **more)


def assert_fulfilled(done: Completion, schema: Any) -> None:
    """It is JSON that fulfils the schema, or it was cut."""
    if done.finish_reason == "length":
        return
    assert done.finish_reason == "stop"
    jsonschema.validate(json.loads(done.text), schema)


@settings(max_examples=3)
@given(seed=st.integers(0, 1000), hot=st.sampled_from([1.0, 5.0]))
def test_whatever_the_model_says_is_json_of_the_schema_in_a_mixed_batch(model: Model, seed: int, hot: float) -> None:
    given = [with_schema(schema, seed=seed, temperature=hot, n=2) for schema in SCHEMAS.values()]
    prompts = ["The fox", ""] * 4
    done = model.generate(prompts[: len(given) + 1], [*given, OPEN])
    for i, schema in enumerate(SCHEMAS.values()):
        for one in done[2 * i : 2 * i + 2]:
            assert_fulfilled(one, schema)
    assert sum(one.finish_reason == "stop" for one in done[:-1]) >= len(SCHEMAS)
    # The row without a schema says what it says alone.
    (alone,) = model.generate([prompts[len(given)]], OPEN)
    assert done[-1].token_ids == alone.token_ids
    np.testing.assert_allclose(done[-1].logprobs, alone.logprobs, atol=1e-4)


def test_a_row_with_a_schema_is_what_it_is_alone_and_so_is_its_stream(model: Model) -> None:
    args = [with_schema(SCHEMAS[name], seed=3) for name in ("record", "words")]
    together = model.generate(["a", "b"], args)
    for prompt, one, wanted in zip("ab", args, together, strict=True):
        (alone,) = model.generate([prompt], one)
        assert (alone.token_ids, alone.text, alone.finish_reason) == (
            wanted.token_ids,
            wanted.text,
            wanted.finish_reason,
        )
        assert "".join(model.stream(prompt, one)) == wanted.text


@pytest.mark.slow
def test_exact_rows_are_the_same_to_the_bit_beside_others_with_a_schema_and_alone(model: Model) -> None:
    one = exactly(model, jnp.float32)
    args = [dataclasses.replace(OPEN, max_new_tokens=9), with_schema(SCHEMAS["words"], max_new_tokens=9, logprobs=2)]
    together = one.generate(["The owl", "The fox"], args)
    assert one.generate(["The owl"], args[:1]) == together[:1]
    assert one.generate(["The fox"], args[1:]) == together[1:]


def test_the_likeliest_allowed_token_is_taken_and_logprobs_are_the_models(model: Model) -> None:
    args = with_schema({"enum": ["x"]}, temperature=0.0, logprobs=2)
    (done,) = model.generate(["The fox"], args)
    assert done.text.strip() == '"x"'
    ids = model.encode("The fox") + done.token_ids
    full = np.asarray(model.logits([ids]))[0].astype(np.float64)
    full -= np.log(np.exp(full).sum(axis=-1, keepdims=True))
    rows = np.arange(len(ids) - len(done.token_ids) - 1, len(ids) - 1)
    np.testing.assert_allclose(done.logprobs, full[rows, done.token_ids], atol=1e-4)
    assert [a.id for a in done.top_logprobs[0]] == np.argsort(-full[rows[0]])[:2].tolist(), (
        "alternatives are the model's"
    )


def test_masks_allow_what_can_become_one_of_the_texts(model: Model) -> None:
    """Against all texts of a finite schema: a token is allowed only if a text goes on with it; EOS only behind a whole one."""
    tokenizer, rng = model.tokenizer, np.random.default_rng(0)
    values = ["fox", "f\u4e2d", 12, None]
    whole = [space + json.dumps(v, ensure_ascii=False).replace(" ", "") for v in values for space in ("", " ")]
    wanted = [text.encode() for text in whole]
    args = with_schema({"enum": values})
    for _ in range(20):
        made, done = b"", False
        states = Constraints(tokenizer, [([1], args, 0), ([1], OPEN, 0)], [{2}, {2}], model.args.vocab_size)
        while not done:
            masks = states.masks(3)
            bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : model.args.vocab_size]
            assert bits[1:].all(), "rows without a schema, and those that fill the batch, may say everything"
            allowed = np.flatnonzero(bits[0])
            assert len(allowed)
            for token in allowed.tolist():
                if token == 2:
                    assert made in wanted
                else:
                    assert any(text.startswith(made + token_bytes(tokenizer, token)) for text in wanted)
            token = int(rng.choice(allowed))
            made, done = made + (b"" if token == 2 else token_bytes(tokenizer, token)), token == 2
            states.push(np.array([token, 5, 5]))
        assert made in wanted


@pytest.mark.parametrize("name", ["small_tokenizer", "llama2_tokenizer"])
def test_a_tokens_bytes_are_what_it_adds_to_a_text(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for i in range(0, tokenizer.vocab_size, 1 if tokenizer.vocab_size < 1000 else 37):
        piece = tokenizer.piece(i)
        if i < 3:
            assert token_bytes(tokenizer, i) == b"" and token_text(tokenizer, i) == piece
        elif i < 259:
            assert token_bytes(tokenizer, i) == bytes([i - 3])
            assert token_text(tokenizer, i) == (chr(i - 3) if i < 131 else piece)
        else:
            assert token_text(tokenizer, i) == piece.replace("\u2581", " ")
            assert token_bytes(tokenizer, i) == token_text(tokenizer, i).encode()
    ids = tokenizer.encode(text := 'The "fox"\n\u4e2d\u00e9 \U0001f98a  x')
    assert b"".join(token_bytes(tokenizer, i) for i in ids).decode() == " " + text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ("{", "json_schema: expected JSON, found"),
        ("[]", "json_schema: expected a JSON Schema, an object, found"),
        ("12", "json_schema: expected a JSON Schema, an object, found"),
        ('{"type": "strin"}', "Invalid type: strin"),
        ('{"not": {}}', "Unimplemented keys"),
        ("false", "Unsatisfiable schema"),
        ('{"type": "string", "pattern": "(?=x)"}', "look-ahead"),
        ('{"$ref": "http://example.com/a.json"}', "json_schema: expected a schema that can be followed token by token"),
        ('{"items": ' * 3000 + "{}" + "}" * 3000, "json_schema: expected"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_schema_is_told_in_one_line(model: Model, schema: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        model.generate(["a"], dataclasses.replace(OPEN, json_schema=schema))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_schema_may_be_a_dict_and_does_not_set_llguidances_own_options(model: Model) -> None:
    schema = {"not": {"type": "object"}, "x-guidance": {"lenient": True}}
    assert SampleArgs(json_schema=schema).json_schema == json.dumps(schema, separators=(",", ":"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Unimplemented keys"):
        model.generate(["a"], SampleArgs(json_schema=schema))  # type: ignore[arg-type]


def test_what_would_break_the_text_is_refused_beside_a_schema(model: Model) -> None:
    for more, words in (
        ({"stop": (".",)}, r"stop: expected \(\) beside json_schema"),
        ({"ignore_eos": True}, "ignore_eos: expected False beside json_schema"),
        ({"min_new_tokens": 3}, "min_new_tokens: expected 0 beside json_schema"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate(["a"], with_schema({}, **more))
    with pytest.raises(UserError, match="json_schema: expected no --draft beside it"):
        dataclasses.replace(model, draft=Draft(2)).generate(["a"], with_schema({}))
    forbidden = {i: -np.inf for i in range(model.args.vocab_size) if b'"' in token_bytes(model.tokenizer, i)}
    with pytest.raises(UserError, match="logit_bias: expected a token that json_schema allows behind"):
        model.generate(["a"], with_schema({"const": "x"}, logit_bias=forbidden))


def test_a_stop_token_without_text_ends_the_text_where_it_is_whole_and_others_are_refused(model: Model) -> None:
    unknown = model.tokenizer.unk_id
    args = with_schema(SCHEMAS["record"], stop_token_ids=(unknown,), logit_bias={unknown: 1000.0})
    done = model.generate(["a"] * 4, [dataclasses.replace(args, seed=seed, max_new_tokens=200) for seed in range(4)])
    for one in done:
        assert one.finish_reason == "stop" and unknown not in one.token_ids
        assert_fulfilled(one, SCHEMAS["record"])
    with pytest.raises(UserError, match=r"stop_token_ids: expected tokens without text beside json_schema, found 300"):
        model.generate(["a"], with_schema({}, stop_token_ids=(300,)))


def test_a_model_that_says_nothing_finite_is_told_as_ever(model: Model) -> None:
    broken = dataclasses.replace(model, params=model.params | {"output": model.params["output"].at[0, 5].set(jnp.nan)})
    with pytest.raises(UserError, match="expected finite logits, found NaN or infinity"):
        broken.generate(["a"], with_schema({}))


def test_a_missing_library_is_told_with_its_extra(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"json_schema: expected the package llguidance, found none; pip install .*\[grammar\]"
    ):
        model.generate(["a"], with_schema({}))
