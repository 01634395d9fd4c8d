"""Infilling: the ids of Meta's code and of transformers, the text between two others, and models without the tokens."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import SampleArgs
from llama_jax.errors import UserError
from llama_jax.foreign.tokenizer_json import merges
from llama_jax.generation import Model
from llama_jax.generation.infill import PIECES, encode_infill, infill_marks
from llama_jax.generation.prompts import Job, ask, read_prompts
from llama_jax.tokenizer import Tokenizer
from tests.conftest import TEXT
from tests.generation.models import never_ending
from tests.inside import run

CODE = """def add(a, b):
    return a + b

def fox(x):
    for i in range(10):
        x += i  # \u263a
    return x
"""
GREEDY = SampleArgs(temperature=0.0, max_new_tokens=12)
GAPS = [("def add(a, b):\n", "\n    return c"), ("x = ", ""), ("", "  return x"), ("  def", "\n\n")]


def code_tokenizer(folder: Path, kind: str = "control_symbols") -> Tokenizer:
    """A vocabulary with the tokens of Code Llama's."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXT + CODE).split("\n")), model_writer=model, model_type="bpe", vocab_size=420,
        hard_vocab_limit=False, byte_fallback=True, split_digits=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, required_chars="\u263a", num_threads=1,
        minloglevel=2, **{kind: list(PIECES)},
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module", params=["control_symbols", "user_defined_symbols"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return code_tokenizer(tmp_path_factory.mktemp("code"), request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return never_ending(code_tokenizer(tmp_path_factory.mktemp("code")), max_seq_len=128)


def meta_ids(tokenizer: Tokenizer, prefix: str, suffix: str, suffix_first: bool) -> list[int]:
    """codellama/llama/generation.py, infilling_prompt_tokens, written down again over SentencePiece."""
    sp = spm.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    pre, suf, mid, _ = (sp.piece_to_id(piece) for piece in PIECES)
    after = sp.encode("\u263a" + suffix)[2:]
    if suffix_first:
        return [sp.bos_id(), pre, suf, *after, mid, *sp.encode(prefix)]
    return [sp.bos_id(), pre, *sp.encode(prefix), suf, *after, mid]


texts = st.text(st.sampled_from("ab x\n\té(:1\u4e2d"), max_size=12)


@settings(max_examples=60)
@given(prefix=texts, suffix=texts)
def test_ids_are_those_of_metas_code_in_both_orders(tokenizer: Tokenizer, prefix: str, suffix: str) -> None:
    assert encode_infill(tokenizer, prefix, suffix, "psm") == meta_ids(tokenizer, prefix, suffix, False)
    assert encode_infill(tokenizer, prefix, suffix, "spm") == meta_ids(tokenizer, prefix, suffix, True)


def test_the_text_is_what_the_model_says_behind_the_prompt_until_eot(model: Model) -> None:
    tokenizer = model.tokenizer
    for order in ("psm", "spm"):
        args = dataclasses.replace(GREEDY, infill_format=order)
        prompts = [encode_infill(tokenizer, *gap, args.infill_format) for gap in GAPS]
        free = model.generate_ids(prompts, args)
        made = model.infill(GAPS, args)
        assert [c.token_ids for c in made] == [c.token_ids for c in free] and {c.finish_reason for c in made} == {
            "length"
        }
        for gap, one, whole in zip(GAPS, made, model.infill(GAPS, dataclasses.replace(args, echo=True)), strict=True):
            assert whole.text == gap[0] + one.text + gap[1] and whole.token_ids == one.token_ids
            assert whole.prompt_token_ids == encode_infill(tokenizer, *gap, args.infill_format)
    one, other = (model.infill(GAPS[:1], dataclasses.replace(GREEDY, infill_format=f)) for f in ("psm", "spm"))
    assert one != other


def test_eot_ends_the_text_and_is_left_out(model: Model) -> None:
    end = infill_marks(model.tokenizer).end
    # Every token's embedding has a huge first feature, so the normed hidden state has one too; EOT alone reads it.
    embeddings = model.params["tok_embeddings"].at[:, 0].set(100.0)
    output = model.params["output"].at[0, :].set(0.0).at[0, end].set(100.0)
    ending = dataclasses.replace(model, params=model.params | {"tok_embeddings": embeddings, "output": output})
    for args in (GREEDY, dataclasses.replace(GREEDY, ignore_eos=True)):
        (done,) = ending.infill(GAPS[:1], args)
        assert (done.text, done.token_ids, done.finish_reason) == ("", [], "stop")
    (plain,) = ending.generate(["x"], GREEDY)
    assert plain.token_ids == [end] * 12, "a prompt without a gap does not end there"
    (later,) = ending.infill(GAPS[:1], dataclasses.replace(GREEDY, min_new_tokens=3))
    assert len(later.token_ids) == 3 and end not in later.token_ids and jnp.isfinite(jnp.array(later.logprobs)).all()


def test_a_vocabulary_without_the_tokens_is_refused_by_their_names(small_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as refused:
        encode_infill(small_tokenizer, "a", "b", "psm")
    words = str(refused.value)
    assert "\n" not in words and all(piece in words for piece in PIECES)
    with pytest.raises(UserError, match=r"gaps: expected pairs of texts \(prefix, suffix\), found \['ab'\]"):
        never_ending(small_tokenizer).infill(["ab"])  # type: ignore[list-item]


def test_lines_of_json_have_gaps_beside_prompts(tmp_path: Path, model: Model) -> None:
    lines: list[dict[str, Any]] = [{"prefix": "x = ", "suffix": "\n", "infill_format": "spm"}, {"prompt": "x", "suffix": "y"}, {"prompt": "x"}]  # fmt: skip
    (path := tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = read_prompts(str(path), GREEDY)
    assert [(job.prompt, job.suffix) for job in jobs] == [("x = ", "\n"), ("x", "y"), ("x", None)]
    tokenizer = model.tokenizer
    asked = ask(jobs, tokenizer, 128, "refuse")
    assert [one.ids for one in asked] == [
        encode_infill(tokenizer, "x = ", "\n", "spm"), encode_infill(tokenizer, "x", "y", "psm"), tokenizer.encode("x")
    ]  # fmt: skip
    assert [one.job.args.stop_token_ids for one in asked] == [(infill_marks(tokenizer).end,)] * 2 + [()]
    for line, words in (
        ('{"prefix": "a", "suffix": 3}', "suffix: expected a text, found 3"),
        ('{"prefix": "a"}', 'expected an object with a text as "prompt"'),
        ('{"suffix": "a"}', 'expected an object with a text as "prompt"'),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=words):
            read_prompts(str(path), GREEDY)


def test_of_a_gap_that_fills_the_context_the_prefix_is_cut(model: Model) -> None:
    job = Job("1" * 300, GREEDY, "line 1", suffix="22")
    with pytest.raises(UserError, match=r"line 1 .* expected fewer than 128 tokens"):
        ask([job], model.tokenizer, 128, "refuse")
    (cut,) = ask([job], model.tokenizer, 128, "cut")
    whole = encode_infill(model.tokenizer, "1" * 300, "22", "psm")
    assert len(cut.ids) == 128 - 12 and cut.cut == len(whole) - len(cut.ids)
    assert cut.ids[:2] == whole[:2] and cut.ids[2:] == whole[len(whole) - len(cut.ids) + 2 :]
    with pytest.raises(UserError, match="expected a suffix that leaves room in the context"):
        ask([job._replace(prompt="1", suffix="2" * 300)], model.tokenizer, 128, "cut")


def test_the_command_prints_the_middle_or_the_whole(tmp_path: Path, model: Model) -> None:
    save_checkpoint(tmp_path / "model", model.params, model.args, model.tokenizer)
    flags = ["--ckpt", "model", "--temperature", "0", "--max-new-tokens", "6", "--quiet"]
    gap = ("def add(a, b):", "return c")
    (middle,) = model.infill([gap], dataclasses.replace(GREEDY, max_new_tokens=6))
    found = run(["sample.py", *flags, "--infill", *gap], tmp_path)
    assert (found.returncode, found.stdout) == (0, middle.text + "\n"), found.stderr
    found = run(["sample.py", *flags, "--infill", *gap, "--echo"], tmp_path)
    assert found.stdout == gap[0] + middle.text + gap[1] + "\n"
    found = run(["sample.py", *flags, "--infill", *gap, "--json"], tmp_path)
    record = json.loads(found.stdout)
    assert (record["prompt"], record["completion"], record["suffix"]) == (gap[0], middle.text, gap[1])
    for more, words in (
        (["a prompt"], "--infill: expected no prompts and no --chat beside it"),
        (["--chat"], "--infill: expected no prompts and no --chat beside it"),
        (["--infill", "a", "b"], "--infill: expected it once, found it 2 times"),
        (["--echo", "--infill", "a", "--json"], "--infill: expected a text and a text, found 'a' '--json'"),
    ):
        found = run(["sample.py", *flags, "--infill", *gap, *more], tmp_path)
        assert found.returncode == 2 and words in found.stderr


def test_ids_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    vocab = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    theirs = transformers.CodeLlamaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges(tokenizer)])
    # Where a suffix begins with another character, transformers 5 puts a space before it, which Meta's code leaves out.
    for prefix, suffix in (("def f(x):\n    ", "  return x"), ("  x = ", " y"), ("\u00e9", " z")):
        assert encode_infill(tokenizer, prefix, suffix, "psm") == theirs(f"{prefix}<FILL_ME>{suffix}")["input_ids"]
        assert encode_infill(tokenizer, prefix, suffix, "spm") == theirs(prefix, suffix=suffix, suffix_first=True)["input_ids"]  # fmt: skip
