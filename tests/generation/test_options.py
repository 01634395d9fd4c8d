"""Ends, alternatives and echoes: against transformers and what the whole model says, in every batch and with every draft."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import save_checkpoint
from llama_jax.cli.flags import parse_flags
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.generation import Completion, Model, scoring
from llama_jax.generation.prompts import Asked, Job, read_prompts
from llama_jax.generation.remarks import idle_reports, idle_stops
from llama_jax.generation.results import Results, result
from llama_jax.generation.sampling import likeliest_tokens, make_sampler, sample
from llama_jax.generation.speculative import Draft
from llama_jax.generation.token_text import token_text
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build, full_log_probs
from tests.generation.test_exact import exactly
from tests.inside import run

OPEN = SampleArgs(temperature=1.0, top_p=1.0, max_new_tokens=24)
GREEDY = SampleArgs(temperature=0.0, max_new_tokens=24)
PROMPTS = ["Once upon a time", "The owl", "", "a fox by the river, " * 4]


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return build(small_tokenizer)


def with_args(base: SampleArgs = OPEN, **changes: Any) -> SampleArgs:
    return dataclasses.replace(base, **changes)


def cut(free: Completion, ends: set[int], least: int = 0) -> list[int]:
    """The tokens of a completion without an end, up to the first of ``ends``."""
    at = [i for i, token in enumerate(free.token_ids) if token in ends and i >= least]
    return free.token_ids[: at[0]] if at else free.token_ids


@pytest.mark.parametrize("draft", [None, Draft(3)], ids=["plain", "drafted"])
def test_stop_tokens_end_as_eos_does_and_eos_can_be_ignored(model: Model, draft: Draft | None) -> None:
    model = dataclasses.replace(model, draft=draft)
    eos = model.tokenizer.eos_id
    endless = with_args(ignore_eos=True, logit_bias={eos: 3.0})
    free = model.generate(PROMPTS, endless)
    assert all(len(one.token_ids) == 24 and one.finish_reason == "length" for one in free)
    assert sum(eos in one.token_ids for one in free) >= 2
    for prompt, one in zip(map(model.encode, PROMPTS), free, strict=True):
        assert one.text == model.tokenizer.decode([*prompt, *one.token_ids])[len(model.tokenizer.decode(prompt)) :]
    stops = (free[0].token_ids[3], free[1].token_ids[5])
    for args, ends in (
        (with_args(endless, ignore_eos=False), {eos}),
        (with_args(endless, stop_token_ids=stops), {*stops}),
        (with_args(endless, stop_token_ids=stops, ignore_eos=False), {*stops, eos}),
    ):
        for one, wanted in zip(model.generate(PROMPTS, args), free, strict=True):
            assert one.token_ids == cut(wanted, ends)
            assert one.finish_reason == ("stop" if len(one.token_ids) < 24 else "length")


@pytest.mark.parametrize("draft", [None, Draft(3)], ids=["plain", "drafted"])
def test_end_tokens_are_not_sampled_too_early_and_other_rows_are_as_they_were(
    model: Model, draft: Draft | None
) -> None:
    model = dataclasses.replace(model, draft=draft)
    eos = model.tokenizer.eos_id
    ending = with_args(logit_bias={eos: 2000.0, 9: 1000.0}, seed=2)
    for base in (ending, with_args(ending, temperature=0.0)):
        short = model.generate(PROMPTS, base)
        assert all(one.token_ids == [] for one in short)
        settings = [with_args(base, min_new_tokens=n, stop_token_ids=s) for n, s in ((4, ()), (0, ()), (7, (9,)), (24, (9,)))]  # fmt: skip
        done = model.generate(PROMPTS, settings)
        assert [len(one.token_ids) for one in done] == [4, 0, 7, 24]
        assert [one.finish_reason for one in done] == ["stop", "stop", "stop", "length"]
        assert not {eos, 9} & {*done[2].token_ids, *done[3].token_ids}
        assert done[0].token_ids[0] == 9, "the likeliest but EOS"
        for prompt, args, one in zip(PROMPTS, settings, done, strict=True):
            assert model.generate([prompt], args)[0].token_ids == one.token_ids
    # A stop string ends before, as in transformers.
    (done,) = model.generate(["a"], with_args(ending, min_new_tokens=20, stop=(token_text(model.tokenizer, 9),)))
    assert done.finish_reason == "stop" and len(done.token_ids) < 20


def test_tokens_before_the_border_are_drawn_as_if_ends_were_forbidden() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2]]))
    many = jax.jit(jax.vmap(sample, (None, None, 0)))
    numbers = jnp.arange(20_000, dtype=jnp.int32)[:, None]
    plain = np.asarray(many(make_sampler([([], OPEN, 0)], 5), logits, numbers)[0])[:, 0]
    row = with_args(min_new_tokens=10_000, max_new_tokens=30_000, stop_token_ids=(1, 3))
    found = np.asarray(many(make_sampler([([], row, 0)], 5), logits, numbers)[0])[:, 0]
    np.testing.assert_array_equal(found[10_000:], plain[10_000:])
    shares = np.bincount(found[:10_000], minlength=5) / 10_000
    np.testing.assert_allclose(shares, np.array([0.1, 0, 0.05, 0, 0.2]) / 0.35, atol=5 * 0.005)
    assert not shares[[1, 3]].any()


@pytest.mark.parametrize("vocab", [32, 70])
def test_a_mask_forbids_what_a_bias_would(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    allowed = rng.random((3, vocab)) < 0.5
    allowed[:, 1] = True
    words = np.zeros((3, -(-vocab // 32) * 32), np.uint8)
    words[:, :vocab] = allowed
    packed = np.packbits(words, axis=1, bitorder="little").view(np.uint32)
    logits = jnp.asarray(rng.normal(size=(3, vocab)), jnp.float32)
    rows = [([], with_args(args, seed=i), 0) for i, args in enumerate((OPEN, GREEDY, with_args(top_k=3)))]
    sampler = make_sampler(rows, vocab).replace(allowed=jnp.asarray(packed))
    biased = make_sampler([([], with_args(a, logit_bias={int(t): -np.inf for t in np.flatnonzero(~ok)}), 0) for (_, a, _), ok in zip(rows, allowed, strict=True)], vocab)  # fmt: skip
    many = jax.jit(jax.vmap(sample, (None, None, 0)))
    numbers = jnp.broadcast_to(jnp.arange(100, dtype=jnp.int32)[:, None], (100, 3))
    found, wanted = (np.asarray(many(s, logits, numbers)[0]) for s in (sampler, biased))
    np.testing.assert_array_equal(found, wanted)
    assert allowed[np.arange(3), found].all() and len(np.unique(found)) > 2


def test_the_likeliest_tokens_are_numpys_the_first_of_equal_ones_first() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 6, size=(7, 40)).astype(np.float32)
    ids, logprobs = likeliest_tokens(jnp.asarray(logits), 9)
    for row, found, values in zip(logits, np.asarray(ids), np.asarray(logprobs), strict=True):
        wanted = sorted(range(40), key=lambda i: (-row[i], i))[:9]
        assert found.tolist() == wanted
        np.testing.assert_allclose(values, row[wanted] - np.log(np.exp(row.astype(float)).sum()), atol=1e-5)
    one_by_one = jax.jit(lambda x: likeliest_tokens(x, 9, True))
    together = one_by_one(jnp.asarray(logits))
    for i in range(7):
        for a, b in zip(one_by_one(jnp.asarray(logits[i : i + 1])), together, strict=True):
            np.testing.assert_array_equal(a[0], b[i])


@pytest.mark.parametrize("draft", [None, Draft(3)], ids=["plain", "drafted"])
def test_alternatives_are_the_models_likeliest_before_temperature(model: Model, draft: Draft | None) -> None:
    plain, model = model, dataclasses.replace(model, draft=draft)
    counts = [3, 0, 5, 1]
    settings = [with_args(temperature=2.0, top_k=50, logprobs=k, stop=("zz",)) for k in counts]
    done = model.generate(PROMPTS, settings)
    for prompt, k, one, bare in zip(PROMPTS, counts, done, plain.generate(PROMPTS, with_args(temperature=2.0, top_k=50)), strict=True):  # fmt: skip
        assert one.token_ids == bare.token_ids, "the option changes no token"
        assert len(one.top_logprobs) == (len(one.token_ids) if k else 0)
        ids = plain.encode(prompt)
        full = full_log_probs(plain, ids + one.token_ids)[len(ids) - 1 : -1]
        for row, top in zip(full, one.top_logprobs, strict=bool(k)):
            assert len(top) == k and [a.logprob for a in top] == sorted((a.logprob for a in top), reverse=True)
            np.testing.assert_allclose([a.logprob for a in top], np.sort(row)[::-1][:k], atol=1e-4)
            np.testing.assert_allclose([row[a.id] for a in top], [a.logprob for a in top], atol=1e-4)
            assert [a.token for a in top] == [token_text(plain.tokenizer, a.id) for a in top]
    (stopped,) = model.generate(PROMPTS[:1], with_args(logprobs=2, stop=(done[0].text[4:6],)))
    assert len(stopped.top_logprobs) == len(stopped.token_ids)


@pytest.mark.slow
def test_exact_alternatives_are_the_same_to_the_bit_in_every_batch(model: Model) -> None:
    one = exactly(model, jnp.float32)
    args = with_args(logprobs=4, min_new_tokens=3)
    together = one.generate(PROMPTS[:3], [args, with_args(logprobs=4), args])
    assert one.generate(PROMPTS[2:3], args) == together[2:]
    assert dataclasses.replace(one, draft=Draft(3)).generate(PROMPTS[:1], args) == together[:1]
    for done in together:
        for logprob, token, top in zip(done.logprobs, done.token_ids, done.top_logprobs, strict=True):
            assert logprob == {a.id: a.logprob for a in top}.get(token, logprob)


def test_an_echo_has_the_prompt_and_what_the_model_says_of_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PROMPTS[2:]
    args = with_args(echo=True, logprobs=2, n=2)
    bare = model.generate(prompts, with_args(n=2))
    whole = model.generate(prompts, args)
    monkeypatch.setattr(scoring, "PASS", 8)  # the last prompt takes four
    assert len(model.encode(prompts[1])) > 25
    parts = model.generate(prompts, args)
    for i, (one, part, plain) in enumerate(zip(whole, parts, bare, strict=True)):
        prompt = prompts[i // 2]
        ids = model.encode(prompt)
        assert one.text == prompt + plain.text and one.token_ids == plain.token_ids and one.prompt_token_ids == ids
        full = full_log_probs(model, ids)
        for found in (one, part):
            assert found.prompt_logprobs[0] is None and found.prompt_top_logprobs[0] is None
            assert len(found.prompt_logprobs) == len(found.prompt_top_logprobs) == len(ids)
            np.testing.assert_allclose(found.prompt_logprobs[1:], full[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
            for row, top in zip(full, found.prompt_top_logprobs[1:], strict=False):
                np.testing.assert_allclose([a.logprob for a in top or ()], np.sort(row)[::-1][:2], atol=1e-4)
    assert "".join(model.stream(prompts[1], with_args(echo=True))) == whole[2].text
    (alone,) = model.generate_ids([[1, 345, 70]], with_args(echo=True))
    assert alone.text.startswith(model.tokenizer.decode([1, 345, 70])) and alone.prompt_top_logprobs == []
    broken = dataclasses.replace(model, params=model.params | {"output": model.params["output"].at[0, 5].set(jnp.inf)})
    with pytest.raises(UserError, match="expected finite logits"):
        broken.generate(PROMPTS[:1], with_args(echo=True))


def test_ends_are_those_of_transformers(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="parity needs torch, which the test extra brings for Python 3.11")
    pytest.importorskip("transformers", reason="parity needs transformers, which the test extra brings")
    from tests.convert.test_convert import ARGS, run
    from tests.convert.test_parity import hugging_face, random_weights, save_meta

    args = dataclasses.replace(ARGS, vocab_size=small_tokenizer.vocab_size)
    weights = random_weights(args, torch.float32, 3)
    theirs = hugging_face(args, weights)
    run(
        input=save_meta(tmp_path / "meta", args, weights, 1, small_tokenizer), output=tmp_path / "ours", max_seq_len=128
    )
    ours = llama_jax.load(str(tmp_path / "ours"))
    prompts = [ours.encode(text) for text in PROMPTS[:2]]
    free = ours.generate_ids(prompts, with_args(GREEDY, ignore_eos=True))
    stops = tuple({one.token_ids[2] for one in free})
    for more in ({}, {"min_new_tokens": 8}):
        done = ours.generate_ids(prompts, with_args(GREEDY, stop_token_ids=stops, **more))
        for prompt, one in zip(prompts, done, strict=True):
            made = theirs.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0,
                eos_token_id=[small_tokenizer.eos_id, *stops], **more,
            )[0, len(prompt) :].tolist()  # fmt: skip
            ended = made[-1] in (small_tokenizer.eos_id, *stops)
            assert one.token_ids == made[: len(made) - ended]
            assert one.finish_reason == ("stop" if ended else "length")
    assert any(len(one.token_ids) < 24 for one in ours.generate_ids(prompts, with_args(GREEDY, stop_token_ids=stops)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": -1}, "logprobs: expected 0 to"),
        ({"logprobs": 10**6}, "logprobs: expected up to"),
        ({"stop_token_ids": (10**6,)}, "stop_token_ids: expected ids from 0 to"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: expected ids from 0 to"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids: expected int, found 'a'"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected 0 to"),
        ({"min_new_tokens": 25}, "min_new_tokens: expected at most the 24 of max_new_tokens, found 25"),
        ({"infill_format": "mps"}, "infill_format: expected one of 'psm', 'spm', found 'mps'"),
        ({"echo": 1}, "echo: expected bool, found 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(model: Model, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.generate(["a"], with_args(**changes))


def test_a_text_that_could_neither_go_on_nor_end_is_refused(model: Model) -> None:
    vocab = model.args.vocab_size
    args = with_args(min_new_tokens=1, stop_token_ids=tuple(range(vocab)))
    with pytest.raises(
        UserError, match=f"min_new_tokens: expected a token that does not end the text, found all {vocab}"
    ):
        model.generate(["a"], args)
    model.generate(["a"], with_args(stop_token_ids=tuple(range(vocab))))


def test_where_ends_alone_may_be_said_a_longer_text_is_refused_not_made_of_forbidden_tokens(model: Model) -> None:
    eos, vocab = model.tokenizer.eos_id, model.args.vocab_size
    ends_alone = {i: -np.inf for i in range(vocab) if i != eos}
    (found,) = model.generate(["a"], with_args(logit_bias=ends_alone))
    assert found.token_ids == [] and found.finish_reason == "stop"
    with pytest.raises(UserError, match=f"min_new_tokens: expected a token that .*, found all {vocab} in logit_bias"):
        model.generate(["a"], with_args(logit_bias=ends_alone, min_new_tokens=2))
    ends_too = dataclasses.replace(model, end_ids=(eos, 5))
    with pytest.raises(UserError, match="or the model's end tokens"):
        ends_too.generate(["a"], with_args(logit_bias=ends_alone | {5: 0.0}, min_new_tokens=2))


def test_rows_without_a_token_are_nothing_that_is_left_to_say(small_tokenizer: Tokenizer) -> None:
    vocab = small_tokenizer.vocab_size
    model = build(small_tokenizer)
    padded = dataclasses.replace(model, args=dataclasses.replace(model.args, vocab_size=vocab + 8))
    with pytest.raises(UserError, match=f"logit_bias: expected a token that may be said, found all {vocab + 8}"):
        padded.rows([[1]], with_args(logit_bias=dict.fromkeys(range(vocab), -np.inf)))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_that_is_a_token_without_text_ends_at_the_token(model: Model, streamed: bool) -> None:
    eos = model.tokenizer.eos_id
    args = with_args(ignore_eos=True, logit_bias={eos: 3.0}, n=1)
    name = model.tokenizer.piece(eos)
    for prompt in PROMPTS:
        by_id = dataclasses.replace(args, stop_token_ids=(eos,))
        by_name = dataclasses.replace(args, stop=(name, "no such text"))
        if streamed:
            assert "".join(model.stream(prompt, by_name)) == "".join(model.stream(prompt, by_id))
            continue
        (wanted,), (found,) = model.generate([prompt], by_id), model.generate([prompt], by_name)
        assert (found.token_ids, found.text, found.finish_reason) == (
            wanted.token_ids,
            wanted.text,
            wanted.finish_reason,
        )
    if not streamed:
        assert any(
            len(model.generate([p], args)[0].token_ids) > len(model.generate([p], by_name)[0].token_ids)
            for p in PROMPTS
        )


def test_a_stop_string_with_a_token_without_text_among_others_is_told(model: Model) -> None:
    name = model.tokenizer.piece(model.tokenizer.eos_id)
    with pytest.warns(UserWarning, match=f"stop .*{name}.* is read as plain text"):
        model.generate(["a"], with_args(stop=(name + "\n",), max_new_tokens=1))
    assert idle_stops(model.tokenizer, [name, "a", "\n"]) == ""


def test_each_option_is_a_flag_and_a_key_of_a_line(tmp_path: Path) -> None:
    flags = "--logprobs 5 --echo --min-new-tokens 3 --ignore-eos --stop-token-ids 13 29871 --infill-format spm"
    wanted = SampleArgs(
        logprobs=5, echo=True, min_new_tokens=3, ignore_eos=True, stop_token_ids=(13, 29871), infill_format="spm"
    )
    assert parse_flags(SampleArgs, flags.split(), SampleArgs(), "sample.py", "") == wanted
    line = {"prompt": "a", "logprobs": 5, "echo": True, "min-new-tokens": 3, "ignore_eos": True, "stop_token_ids": [13, 29871]}  # fmt: skip
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    lines = [line | {"infill_format": "spm"}, {"prompt": "a", "json_schema": {"properties": {"a": [{"b": 1}]}}}]
    lines += [{"prompt": "a", "json_schema": x} for x in ('{"type":  "null"}', str(tmp_path / "schema.json"), "", True)]
    (path := tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = read_prompts(str(path), SampleArgs())
    assert jobs[0].args == wanted
    schemas = ['{"properties":{"a":[{"b":1}]}}', '{"type":"null"}', '{"type":"object"}', "", "true"]
    assert [job.args.json_schema for job in jobs[1:]] == schemas
    path.write_text(json.dumps({"prompt": "a", "json_schema": "missing.json"}))
    with pytest.raises(
        UserError, match=r"line 1: json_schema: expected JSON or a file that holds it, found no file 'missing.json'"
    ):
        read_prompts(str(path), SampleArgs())


@pytest.mark.parametrize(
    "name", ["stop_token_ids", "ignore_eos", "min_new_tokens", "logprobs", "echo", "infill_format", "json_schema"]
)
def test_a_job_with_another_option_does_not_go_on_and_one_of_before_does(tmp_path: Path, name: str) -> None:
    values = {"stop_token_ids": (3,), "ignore_eos": True, "min_new_tokens": 2, "logprobs": 1, "echo": True, "infill_format": "spm", "json_schema": "{}"}  # fmt: skip
    path, done = tmp_path / "out.jsonl", Completion("a", [5], [-1.0], "length")
    jobs = [[Asked(Job("a", args), [1])] for args in (OPEN, with_args(**{name: values[name]}))]
    for first, second in (jobs, jobs[::-1]):
        path.unlink(missing_ok=True)
        with Results(str(path), first, {}) as results:
            results.add(done)
        assert Results(str(path), first, {}).all_done
        with pytest.raises(UserError, match=f"expected a result made with {name} "):
            Results(str(path), second, {})
    record = json.loads(path.read_text())
    path.unlink()
    with Results(str(path), jobs[0], {}) as results:
        results.add(done)
    record = json.loads(path.read_text())
    del record["made_with"][name]
    path.write_text(json.dumps(record) + "\n")
    assert Results(str(path), jobs[0], {}).all_done, "a file of before the option"
    with pytest.raises(UserError, match=f"expected a result made with {name} "):
        Results(str(path), jobs[1], {})
    gap = [jobs[0][0]._replace(job=jobs[0][0].job._replace(suffix="b"))]
    with pytest.raises(UserError, match="expected a result with the suffix 'b', found None"):
        Results(str(path), gap, {})


def test_json_has_what_was_asked_for_and_nothing_else(model: Model, tmp_path: Path) -> None:
    job = Job("The owl", GREEDY)
    asked = Asked(job, model.encode("The owl"))
    bare = result(asked, model.generate(["The owl"], GREEDY)[0])
    assert list(bare) == ["prompt", "completion", "prompt_tokens", "completion_tokens", "finish_reason", "logprobs"]
    save_checkpoint(tmp_path / "model", model.params, model.args, model.tokenizer)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "boolean"}')
    flags = ["--ckpt", "model", "--temperature", "0", "--max-new-tokens", "24", "--quiet", "--json"]
    found = json.loads(run(["sample.py", *flags, "--logprobs", "2", "--echo", "The owl"], tmp_path).stdout)
    assert found["completion"] == "The owl" + bare["completion"] and found["logprobs"] == pytest.approx(
        bare["logprobs"], abs=1e-4
    )
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(found["logprobs"])
    assert {*found["top_logprobs"][0][0]} == {"token", "id", "logprob"}
    assert (
        found["prompt_logprobs"][0] is None
        and len(found["prompt_logprobs"]) == len(asked.ids) == found["prompt_tokens"]
    )
    assert found["prompt_token_ids"] == asked.ids and found["prompt_top_logprobs"][0] is None
    made = run(["sample.py", *flags, "--json-schema", "schema.json", "The owl"], tmp_path)
    assert isinstance(json.loads(json.loads(made.stdout)["completion"]), bool), made.stderr
    refused = run(["sample.py", *flags, "--json-schema", "{", "The owl"], tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: json_schema: expected JSON, found")


def test_options_without_effect_are_told() -> None:
    def line(as_json: bool = False, suffix: str | None = None, **changes: Any) -> str:
        return idle_reports([Job("a", with_args(**changes), suffix=suffix)], as_json)

    assert line() == line(True, logprobs=3) == line(suffix="b", echo=True, infill_format="spm") == ""
    assert line(logprobs=3).startswith("--logprobs: no effect on plain text")
    assert line(echo=True).startswith("--echo: no effect on plain text")
    assert line(infill_format="spm").startswith("--infill-format: no effect")
    assert line(ignore_eos=True, min_new_tokens=2).startswith("--min-new-tokens: no effect")
    assert line(ignore_eos=True, min_new_tokens=2, stop_token_ids=(3,)) == ""


def test_rows_of_the_model_that_no_token_has_are_no_alternatives(model: Model, small_tokenizer: Tokenizer) -> None:
    vocab = small_tokenizer.vocab_size
    wide = build(small_tokenizer)
    args = dataclasses.replace(wide.args, vocab_size=vocab + 8)
    # The likeliest of all are rows behind the tokens', which a bias keeps from being sampled.
    output = jnp.concatenate([wide.params["output"], jnp.full((wide.args.dim, 8), 9.0)], axis=1)
    table = jnp.concatenate([wide.params["tok_embeddings"].at[:, 0].set(90.0), jnp.ones((8, wide.args.dim))])
    params = wide.params | {"output": output.at[0, vocab:].set(100.0), "tok_embeddings": table}
    wide = Model(args, params, small_tokenizer, Llama(args))
    bias = {i: -np.inf for i in range(vocab, vocab + 8)}
    (done,) = wide.generate(["The owl"], with_args(logprobs=3, echo=True, logit_bias=bias, max_new_tokens=5))
    for top in [*done.top_logprobs, *done.prompt_top_logprobs[1:]]:
        assert top is not None and len(top) == 3 and all(a.id < vocab for a in top)
