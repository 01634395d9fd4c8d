"""The closing line: what it counts."""

import jax
import jax.numpy as jnp
import pytest

from llama_jax.config import SampleArgs
from llama_jax.generation import Model
from llama_jax.generation.passes import Step, slot_bytes
from llama_jax.generation.stats import Meter, step_bytes
from llama_jax.ops.quantize import quantize
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build, speaking


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return speaking(build(small_tokenizer))


def metered(model: Model, times: list[float]) -> Meter:
    return Meter(model, iter(times).__next__)


def test_a_step_reads_all_parameters_but_the_embedding_table_and_the_filled_cache(model: Model) -> None:
    args = model.args
    held = sum(leaf.size for leaf in jax.tree.leaves(model.params)) - args.vocab_size * args.dim
    assert step_bytes(model.params, 1000) == 4 * held + 1000
    assert slot_bytes(model.module) == 2 * args.n_layers * args.kv_heads * args.head_width * 4
    output = quantize(jnp.ones((64, 32)), 1, "int4")
    assert (
        step_bytes({"tok_embeddings": jnp.ones((9, 9)), "output": output}, 0) == 64 * 32 // 2 + 4 * output.scales.size
    )


def test_the_line_says_tokens_times_rates_and_bytes(model: Model) -> None:
    meter = metered(model, [10.0, 12.0, 14.0])
    meter.begin()
    for step in (Step(1, 1, 2, 0, 0, 9, 0), Step(1, 1, 2, 16, 32, 40, 0), Step(1, 1, 2, 16, 20, 72, 2)):
        meter(step)
    read = 16 * (step_bytes(model.params, 0) + 72 * slot_bytes(model.module)) / 2
    assert meter.line() == (
        f"52 tokens in 4.0 s: first after 2.00 s, then 10.0 tokens/s, {read / 1e6:.2f} MB/s of memory read"
    )


def test_the_share_of_the_bandwidth_is_said_where_it_is_known(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = jax.devices()[0].device_kind
    read = 16 * (step_bytes(model.params, 0) + 0 * slot_bytes(model.module))
    monkeypatch.setattr("llama_jax.generation.stats.BANDWIDTH", {device: 2.0 * read})
    meter = metered(model, [0.0, 1.0, 2.0])
    meter.begin()
    meter(Step(1, 1, 1, 16, 16, 0, 0))
    meter(Step(1, 1, 1, 16, 16, 0, 1))
    assert meter.line().endswith(" of memory read (50% of the device's bandwidth)")


def test_the_time_between_generations_is_not_counted(model: Model) -> None:
    meter = metered(model, [0.0, 1.0, 100.0, 101.0])
    for _ in range(2):
        meter.begin()
        meter(Step(1, 1, 1, 1, 1, 1, 1))
    assert meter.line() == "2 tokens in 2.0 s: first after 1.00 s"
    assert metered(model, []).line() == "0 tokens in 0.0 s"


def test_the_meter_counts_what_is_generated(model: Model) -> None:
    meter = Meter(model)
    meter.begin()
    done = model.generate(["a", "b"], SampleArgs(max_new_tokens=20), meter)
    assert meter.tokens == sum(len(c.token_ids) for c in done) == 40
    meter.begin()
    list(model.stream("a", SampleArgs(max_new_tokens=3), meter))
    assert meter.tokens == 43
