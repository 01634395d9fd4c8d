"""Log-likelihoods of continuations: against whole logits, transformers, and themselves in other batches and orders."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import MeshArgs
from llama_jax.devices.sharding import make_mesh, parameter_shardings
from llama_jax.errors import UserError
from llama_jax.evaluate.scoring import GRAIN, Request, chosen_lengths, context_of, encode_pairs, fit, score
from llama_jax.generation import Model
from llama_jax.generation.serving import for_generation
from llama_jax.ops.attention import attention
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from tests.eight_devices import run_on_eight_devices
from tests.generation.models import build, full_log_probs
from tests.tokenizers.made import CONFIG, bytewise, put

CONTEXT = 96


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return build(small_tokenizer, max_seq_len=CONTEXT)


def items(model: Model, count: int, choices: int = 4, seed: int = 0) -> list[Request]:
    """Contexts of many lengths, some of which fill the model's, each with choices of many lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        context = [1, *rng.integers(3, model.args.vocab_size, rng.integers(0, CONTEXT - 12)).tolist()]
        for _ in range(choices):
            ids = rng.integers(3, model.args.vocab_size, rng.integers(1, 14)).tolist()
            found.append(fit(Request(context, ids), CONTEXT)[0])
    return found


def literal(model: Model, request: Request) -> tuple[float, bool]:
    """The log-likelihood, and whether it is greedy, from whole logits of one sequence."""
    log_probs = full_log_probs(model, [*request.context, *request.continuation][:-1])
    rows = log_probs[len(request.context) - 1 :].astype(np.float64)
    return sum(rows[i, token] for i, token in enumerate(request.continuation)), all(
        rows[i].argmax() == token for i, token in enumerate(request.continuation)
    )


def test_scores_equal_those_of_whole_logits_shared_or_not_in_every_batch_and_order(model: Model) -> None:
    requests = items(model, 7)
    wanted = [literal(model, request) for request in requests]
    order = random.Random(0).sample(range(len(requests)), len(requests))
    for rows, share in ((0, True), (3, True), (1, False)):
        found = score(model, requests, rows, share)
        assert [one.loglikelihood for one in found] == pytest.approx([total for total, _ in wanted], abs=1e-4)
        assert [one.tokens for one in found] == [len(request.continuation) for request in requests]
        shuffled = score(model, [requests[i] for i in order], rows, share)
        for i, other in zip(order, shuffled, strict=True):
            assert other.loglikelihood == pytest.approx(found[i].loglikelihood, abs=1e-4)


@pytest.mark.parametrize(
    "constants",
    [{"sliding_window": 7}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}],
    ids=["a sliding window", "dynamic scaling"],
)
def test_choices_are_not_read_together_where_places_or_lengths_count(
    small_tokenizer: Tokenizer, constants: dict[str, Any]
) -> None:
    if "rope_scaling" in constants:
        constants["rope_scaling"]["original_max_position_embeddings"] = CONTEXT // 2
    model = build(small_tokenizer, max_seq_len=CONTEXT, **constants)
    most = context_of(model)
    assert most == (CONTEXT if "sliding_window" in constants else CONTEXT // 2)
    requests = [fit(request, most)[0] for request in items(model, 4)]
    for request, one in zip(requests, score(model, requests), strict=True):
        ids = [*request.context, *request.continuation][:-1]
        log_probs = np.asarray(jax.nn.log_softmax(model.logits([ids])))[0, len(request.context) - 1 :]
        assert one.loglikelihood == pytest.approx(
            log_probs[range(len(log_probs)), request.continuation].sum(), abs=1e-4
        )


def test_what_greedy_decoding_gives_is_told(model: Model) -> None:
    context = [1, 40, 50, 60]
    ids: list[int] = []
    for _ in range(5):
        ids.append(int(full_log_probs(model, context + ids)[-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % model.args.vocab_size]
    requests = [Request(context, ids), Request(context, other), Request(context, ids[:2])]
    assert [one.greedy for one in score(model, requests)] == [True, False, True]
    assert [literal(model, request)[1] for request in requests] == [True, False, True]


def test_a_row_may_exceed_the_context_when_each_of_its_continuations_fits(model: Model) -> None:
    rng = np.random.default_rng(1)
    context = [1, *rng.integers(3, 300, CONTEXT - 11).tolist()]
    requests = [Request(context, rng.integers(3, 300, 11).tolist()) for _ in range(20)]
    for request, one in zip(requests, score(model, requests), strict=True):
        ids = [*request.context, *request.continuation][:-1]
        log_probs = np.asarray(jax.nn.log_softmax(model.logits([ids])))[0, len(request.context) - 1 :]
        assert one.loglikelihood == pytest.approx(
            log_probs[range(len(log_probs)), request.continuation].sum(), abs=1e-4
        )


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_scored_as_they_generate(model: Model, weights: Any) -> None:
    quantized = dataclasses.replace(model, params=for_generation(model.params, weights))
    requests = items(model, 3)
    found = [one.loglikelihood for one in score(quantized, requests)]
    assert found == pytest.approx([literal(quantized, request)[0] for request in requests], abs=1e-4)
    assert found != pytest.approx([one.loglikelihood for one in score(model, requests)], abs=1e-4)


def test_an_infinite_score_is_an_error(model: Model) -> None:
    broken = dataclasses.replace(model, params=model.params | {"output": model.params["output"].at[0, 0].set(jnp.nan)})
    with pytest.raises(UserError, match="expected finite logits, found NaN or infinity in the score of a continuation"):
        score(broken, items(model, 1))


def test_no_request_has_no_score(model: Model) -> None:
    assert score(model, []) == []


def test_every_batch_reports_the_requests_that_it_scored(model: Model) -> None:
    requests, seen = items(model, 5), list[int]()
    score(model, requests, rows=2, on_batch=seen.extend)
    assert sorted(seen) == list(range(len(requests)))


@pytest.mark.parametrize("kernel", ["plain", "xla"])
def test_keys_of_a_segment_below_0_are_seen_by_all_that_follow(kernel: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 9, 2, 8)).astype(np.float32) for _ in range(3))
    segments = jnp.asarray([[-1, -1, -1, 1, 1, 2, 2, 2, 3]])
    from llama_jax.model import plain_attention

    def attend(keep: list[int]) -> np.ndarray:
        parts = (jnp.asarray(x[:, keep]) for x in (q, k, v))
        return np.asarray(plain_attention(*parts))[0]

    found = (
        plain_attention(*map(jnp.asarray, (q, k, v)), segments)
        if kernel == "plain"
        else attention(*map(jnp.asarray, (q, k, v)), kernel, segments)
    )
    for own in ([3, 4], [5, 6, 7], [8]):
        np.testing.assert_allclose(found[0, own], attend([0, 1, 2, *own])[3:], atol=1e-5)
    np.testing.assert_allclose(found[0, :3], attend([0, 1, 2]), atol=1e-5)


def test_contexts_and_continuations_are_split_as_the_harness_does(small_tokenizer: Tokenizer) -> None:
    encode = small_tokenizer.encode
    pairs = [("The owl", " saw"), ("The owl  ", "saw"), ("", "The fox"), (" \n", "The fox"), ("The o", "wl saw")]
    found = encode_pairs(small_tokenizer, pairs)
    assert [*found[0].context, *found[0].continuation] == encode("The owl saw")
    assert list(found[0].context) == encode("The owl")
    assert (
        list(found[1].context) == encode("The owl")
        and found[1].continuation == encode("The owl  saw")[len(encode("The owl")) :]
    )
    assert found[2] == (encode(""), encode("The fox")[1:]) and list(found[2].context) == [small_tokenizer.bos_id]
    assert found[3] == (encode(""), encode(" \nThe fox")[1:])
    assert found[4].continuation == encode("The owl saw")[len(encode("The o")) :]


def test_contexts_begin_with_bos_as_the_tokenizer_does_or_as_is_asked(tmp_path: Path) -> None:
    """Of a tokenizer that begins no text with BOS, an empty context took the first token of what follows."""
    pairs = [("The owl", " saw"), ("", "The fox"), ("", "T")]
    tokenizers = [
        Tokenizer(put(tmp_path / str(adds), bytewise(), CONFIG | {"add_bos_token": adds})) for adds in (True, False)
    ]
    for tokenizer in tokenizers:
        bos, plain = [tokenizer.bos_id], lambda text, of=tokenizer: of.encode(text, bos=False)
        for asked, begun in ((None, tokenizer.adds_bos), (True, True), (False, False)):
            assert encode_pairs(tokenizer, pairs, asked) == [
                Request(bos * begun + plain("The owl"), plain(" saw")),
                Request(bos, plain("The fox")),
                Request(bos, plain("T")),
            ]
    assert [tokenizer.adds_bos for tokenizer in tokenizers] == [True, False]


def test_requests_too_long_lose_their_beginning() -> None:
    request = Request(list(range(10)), [20, 21, 22])
    assert fit(request, 12) == (request, 0)
    assert fit(request, 8) == (Request([4, 5, 6, 7, 8, 9], [20, 21, 22]), 4)
    with pytest.raises(UserError, match="expected a continuation of up to 2 tokens, the model's context, found 3"):
        fit(request, 2)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60), st.floats(0, 5000), st.integers(0, 9), st.integers(300, 512)
)
def test_few_lengths_hold_all_and_no_choice_of_one_or_two_is_cheaper(
    tokens: list[int], penalty: float, rows: int, context: int
) -> None:
    def cost(lengths: list[int]) -> float:
        total, shorter = 0.0, 0
        for length in lengths:
            count = sum(shorter < number <= length for number in tokens)
            batch = min(rows or max(1, min(64, 2048 // length)), len(tokens))
            total += math.ceil(count / batch) * batch * length + penalty
            shorter = length
        return total

    found = chosen_lengths(tokens, context, penalty, rows)
    assert found == sorted({*found}) and max(tokens) <= found[-1] <= max(context, max(tokens))
    possible = sorted({min(math.ceil(number / GRAIN) * GRAIN, context) for number in tokens})
    assert {*found} <= {*possible}
    for other in ([possible[-1]], *([shorter, possible[-1]] for shorter in possible[:-1])):
        assert cost(found) <= cost(other) + 1e-6


MESHES = {
    "data 2 x tensor 4": MeshArgs(data=2, tensor=4),
    "fsdp 4 x tensor 2": MeshArgs(data=1, fsdp=4, tensor=2),
    "data 2 x sequence 4": MeshArgs(data=2, sequence=4),
}


def main() -> None:
    """Print the scores of the same requests by mesh, with plain and with quantized weights."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["The owl saw the fox by the river."] * 9, 280, Path(folder) / "t.model")
        small = build(tokenizer, dim=64, n_heads=8, n_kv_heads=8, multiple_of=64, max_seq_len=CONTEXT)
        requests = items(small, 5)
        found = {}
        for name, args in {"one device": MeshArgs(data=1), **MESHES}.items():
            mesh = make_mesh(args, jax.devices()[:1] if name == "one device" else jax.devices())
            params = jax.device_put(small.params, parameter_shardings(small.module, mesh))
            for kind in ("auto", "int8"):
                served = params if kind == "auto" else for_generation(params, "int8")
                scores = score(dataclasses.replace(small, params=served), requests)
                found[f"{name}, {kind}"] = [one.loglikelihood for one in scores]
    print(json.dumps(found))


def test_every_mesh_gives_the_scores_of_one_device() -> None:
    found: Any = run_on_eight_devices("tests.evaluate.test_scoring")
    for name in MESHES:
        for kind in ("auto", "int8"):
            assert found[f"{name}, {kind}"] == pytest.approx(found[f"one device, {kind}"], abs=1e-4), name


if __name__ == "__main__":
    main()
