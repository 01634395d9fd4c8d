"""The model: equal to an independent numpy LLaMA, causal, of the published sizes, initialised as documented."""

import dataclasses
import functools
import math
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import model as model_module
from llama_jax.build import count_parameters, make_model
from llama_jax.config import ModelArgs
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.generation.serving import for_generation
from llama_jax.model import Llama
from llama_jax.ops.cache import KVCache
from llama_jax.ops.loss import cross_entropy
from llama_jax.ops.parameters import one_by_one
from llama_jax.train_args import Remat
from tests import numpy_llama

REMAT = (*get_args(Remat), "dots:2", "w1,attention")
ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, multiple_of=8, max_seq_len=1000)


@functools.cache
def random_params(args: ModelArgs) -> Any:
    """Parameters of the size of initial ones, with the norms' weights away from one."""
    return numpy_llama.random_params(parameter_shapes(Llama(args)))


@functools.cache
def initial_params(args: ModelArgs) -> Any:
    return nn.unbox(jax.jit(Llama(args).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def random_ids(B: int, T: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(vocab, size=(B, T)).astype(np.int32)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Llama, params: Any, ids: np.ndarray) -> jax.Array:
    return model.apply({"params": params}, ids)


def logits_of(params: Any, ids: np.ndarray, args: ModelArgs, **module: Any) -> np.ndarray:
    return np.asarray(_logits(Llama(args, **module), params, ids))


def loss_of(model: Llama, ids: np.ndarray) -> Any:
    """The mean loss as a function of the parameters."""

    def loss(params: Any) -> jax.Array:
        hidden = model.apply({"params": params}, ids[:, :-1], method="hidden")
        return cross_entropy(hidden, params["output"], ids[:, 1:], jnp.ones(ids[:, 1:].shape)) / ids[:, 1:].size

    return loss


@pytest.mark.parametrize("kv_heads", [1, 2, 4, None])
def test_model_equals_numpy_llama_over_kv_heads(kv_heads: int | None) -> None:
    args = dataclasses.replace(ARGS, n_kv_heads=kv_heads)
    params, ids = random_params(args), random_ids(3, 70, args.vocab_size)
    np.testing.assert_allclose(logits_of(params, ids, args), numpy_llama.llama(params, ids, args), atol=1e-4)


def test_model_equals_numpy_llama_at_a_thousand_positions() -> None:
    params, ids = random_params(ARGS), random_ids(1, 1000, ARGS.vocab_size)
    np.testing.assert_allclose(logits_of(params, ids, ARGS), numpy_llama.llama(params, ids, ARGS), atol=2e-4)


def test_model_equals_numpy_llama_with_other_constants() -> None:
    args = dataclasses.replace(ARGS, rope_theta=300.0, norm_eps=0.1, ffn_dim_multiplier=1.7, n_layers=3)
    params, ids = random_params(args), random_ids(2, 40, args.vocab_size)
    np.testing.assert_allclose(logits_of(params, ids, args), numpy_llama.llama(params, ids, args), atol=1e-4)


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 3.0},
    "dynamic": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    "dynamic, of a short text": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 50},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with all": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.9,
        "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn with a factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_model_equals_numpy_llama_with_scaled_rotary_embeddings(name: str) -> None:
    args = dataclasses.replace(ARGS, head_dim=16, rope_scaling=SCALINGS[name])
    args.check()
    params, ids = random_params(args), random_ids(2, 40, args.vocab_size)
    np.testing.assert_allclose(logits_of(params, ids, args), numpy_llama.llama(params, ids, args), atol=1e-4)


def test_model_equals_numpy_llama_with_heads_and_widths_of_their_own_and_biases() -> None:
    args = dataclasses.replace(ARGS, head_dim=6, hidden_dim=37, attention_bias=True, mlp_bias=True)
    params, ids = random_params(args), random_ids(2, 40, args.vocab_size)
    assert sum("bias" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)) == 7
    np.testing.assert_allclose(logits_of(params, ids, args), numpy_llama.llama(params, ids, args), atol=1e-4)


def test_a_token_never_influences_an_earlier_position() -> None:
    T = 130  # three blocks of attention
    params, ids = random_params(ARGS), random_ids(1, T, ARGS.vocab_size)
    same = np.repeat(ids, T, axis=0)
    changed = same.copy()
    changed[np.arange(T), np.arange(T)] = (ids[0] + 1) % ARGS.vocab_size
    before, after = logits_of(params, same, ARGS), logits_of(params, changed, ARGS)
    for t in range(T):
        np.testing.assert_array_equal(after[t, :t], before[t, :t])
        assert (after[t, t:] != before[t, t:]).any(axis=-1).all(), "every later position must see the token"


@pytest.mark.parametrize(
    ("args", "count"),
    [
        (ModelArgs(4096, 32, 32, vocab_size=32000), 6_738_415_616),
        (ModelArgs(5120, 40, 40, vocab_size=32000), 13_015_864_320),
        (ModelArgs(8192, 80, 64, 8, vocab_size=32000, multiple_of=4096, ffn_dim_multiplier=1.3), 68_976_648_192),
        (ModelArgs(4096, 32, 32, 8, vocab_size=128256, hidden_dim=14336), 8_030_261_248),
        (ModelArgs(2048, 22, 32, 4, vocab_size=32000, hidden_dim=5632), 1_100_048_384),
    ],
    ids=["7B", "13B", "70B", "LLaMA 3.1 8B", "TinyLlama"],
)
def test_published_sizes_have_their_exact_parameter_counts(args: ModelArgs, count: int) -> None:
    assert count_parameters(args) == count


def test_parameters_have_the_documented_names_shapes_and_axes() -> None:
    a = ARGS
    boxed = jax.eval_shape(Llama(a).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    L, D, N, K, H, F, V = a.n_layers, a.dim, a.n_heads, 2, a.dim // a.n_heads, 88, a.vocab_size
    assert {
        "/".join(key.key for key in path): (box.value.shape, " ".join(box.names), box.value.dtype)
        for path, box in leaves
    } == {
        name: (shape, axes, jnp.float32)
        for name, shape, axes in [
            ("tok_embeddings", (V, D), "vocab embed"),
            ("layers/attention/wq", (L, D, N, H), "layers embed heads head_dim"),
            ("layers/attention/wk", (L, D, K, H), "layers embed kv_heads head_dim"),
            ("layers/attention/wv", (L, D, K, H), "layers embed kv_heads head_dim"),
            ("layers/attention/wo", (L, N, H, D), "layers heads head_dim embed"),
            ("layers/feed_forward/w1", (L, D, F), "layers embed mlp"),
            ("layers/feed_forward/w3", (L, D, F), "layers embed mlp"),
            ("layers/feed_forward/w2", (L, F, D), "layers mlp embed"),
            ("layers/attention_norm", (L, D), "layers norm"),
            ("layers/ffn_norm", (L, D), "layers norm"),
            ("norm", (D,), "norm"),
            ("output", (D, V), "embed vocab"),
        ]
    }


CHANGES_SHAPES = {
    "head_dim": 16,
    "hidden_dim": 40,
    "attention_bias": True,
    "mlp_bias": True,
    "dim": 64,
    "n_layers": 3,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 51,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "tie_embeddings": True,
}
CHANGES_RESULTS = {
    "norm_eps": 1e-2,
    "rope_theta": 1e3,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": 31,
}


def test_every_model_field_is_covered_by_a_claim_below() -> None:
    fields = {field.name for field in dataclasses.fields(ModelArgs)}
    assert fields == {*CHANGES_SHAPES, *CHANGES_RESULTS, "max_seq_len"}


@pytest.mark.parametrize("field", CHANGES_SHAPES)
def test_field_changes_the_shapes(field: str) -> None:
    def shapes(args: ModelArgs) -> Any:
        return jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(Llama(args)))

    assert shapes(dataclasses.replace(ARGS, **{field: CHANGES_SHAPES[field]})) != shapes(ARGS)


@pytest.mark.parametrize("field", CHANGES_RESULTS)
def test_field_changes_the_logits(field: str) -> None:
    params, ids = random_params(ARGS), random_ids(1, 32, ARGS.vocab_size)
    other = dataclasses.replace(ARGS, **{field: CHANGES_RESULTS[field]})
    assert np.abs(logits_of(params, ids, other) - logits_of(params, ids, ARGS)).max() > 1e-3


def test_max_seq_len_is_the_longest_sequence_taken() -> None:
    params, ids = random_params(ARGS), random_ids(1, 17, ARGS.vocab_size)
    assert logits_of(params, ids, dataclasses.replace(ARGS, max_seq_len=17)).shape == (1, 17, ARGS.vocab_size)
    with pytest.raises(Exception, match="shape"):
        logits_of(params, ids, dataclasses.replace(ARGS, max_seq_len=16))


@pytest.fixture(scope="module")
def by_policy() -> dict[str, Any]:
    """Of each remat policy: the program's text, the bytes of its temporaries, and its loss and gradients."""
    args = dataclasses.replace(ARGS, n_layers=3, dim=64, max_seq_len=64)
    params, ids = random_params(args), random_ids(32, 65, args.vocab_size)
    found = {}
    for policy in REMAT:
        loss = loss_of(Llama(args, remat=policy, kernel="xla"), ids)
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        compiled = lowered.compile()
        found[policy] = (lowered.as_text(), compiled.memory_analysis().temp_size_in_bytes, compiled(params))
    return found


@pytest.mark.parametrize("policy", REMAT[1:])
def test_remat_changes_neither_loss_nor_gradients(by_policy: dict[str, Any], policy: str) -> None:
    (loss, grads), (remat_loss, remat_grads) = by_policy["none"][2], by_policy[policy][2]
    np.testing.assert_allclose(remat_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), remat_grads, grads)


def test_remat_saves_memory_and_the_more_the_more_is_computed_again(by_policy: dict[str, Any]) -> None:
    none, dots, some, attention, full = (by_policy[name][1] for name in ("none", "dots", "dots:2", "attention", "full"))
    # Two loops take a little by themselves, which counts in a model as small as this.
    assert full < attention < dots < none and attention < some < 1.05 * dots
    assert full < by_policy["w1,attention"][1] < dots
    assert full < 0.7 * none


def test_remat_saves_memory_in_the_model_that_this_platform_runs() -> None:
    args = dataclasses.replace(ARGS, n_layers=3, dim=64, max_seq_len=64)
    params, ids = random_params(args), random_ids(8, 65, args.vocab_size)

    def temporaries(policy: Any) -> int:
        gradient = jax.jit(jax.grad(loss_of(make_model(args, "float32", policy), ids)))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.7 * temporaries("none")


def test_unrolling_does_not_change_the_logits() -> None:
    args = dataclasses.replace(ARGS, n_layers=4)
    params, ids = random_params(args), random_ids(2, 33, args.vocab_size)
    scanned = logits_of(params, ids, args)
    for unroll in (3, 4):
        np.testing.assert_allclose(logits_of(params, ids, args, unroll=unroll), scanned, atol=1e-5)


def test_bfloat16_compute_gives_float32_logits_near_the_float32_ones() -> None:
    params, ids = random_params(ARGS), random_ids(2, 100, ARGS.vocab_size)
    exact, rounded = logits_of(params, ids, ARGS), logits_of(params, ids, ARGS, dtype=jnp.bfloat16)
    assert rounded.dtype == np.float32
    error = np.abs(rounded - exact)
    assert 1e-4 < error.max() < 0.2  # computed in bfloat16 indeed, and near
    assert error.mean() < 0.02
    assert len(np.unique(rounded.view(np.uint32) & 0xFFFF)) > 1000  # not rounded to bfloat16 at the end


DEEP = ModelArgs(dim=128, n_layers=12, n_heads=4, n_kv_heads=2, vocab_size=300, multiple_of=32, max_seq_len=64)


def test_initial_matrices_have_their_documented_spread() -> None:
    args, params = DEEP, initial_params(DEEP)
    layers, residual = params["layers"], 2 * args.n_layers
    expected = [
        (params["tok_embeddings"], 1.0),
        (params["output"], args.dim**-0.5),
        (layers["attention"]["wq"], args.dim**-0.5),
        (layers["attention"]["wk"], args.dim**-0.5),
        (layers["attention"]["wv"], args.dim**-0.5),
        (layers["attention"]["wo"], args.dim**-0.5),
        (layers["feed_forward"]["w1"], args.dim**-0.5),
        (layers["feed_forward"]["w3"], args.dim**-0.5),
        (layers["feed_forward"]["w2"], (residual * args.hidden_width) ** -0.5),
    ]
    for matrix, std in expected:
        np.testing.assert_allclose(np.std(matrix), std, rtol=0.02)
        assert abs(np.mean(matrix)) < 0.02 * std
    for norm in (params["norm"], layers["attention_norm"], layers["ffn_norm"]):
        np.testing.assert_array_equal(norm, 1.0)
    assert not np.allclose(layers["attention"]["wq"][0], layers["attention"]["wq"][1]), "layers must differ"


def test_initial_loss_of_a_deep_model_is_that_of_unit_gaussian_logits() -> None:
    ids = random_ids(16, 65, DEEP.vocab_size)
    # Logits are N(0, 1): E[log sum exp] is about log V + 1/2, and the target's logit has mean zero.
    assert float(jax.jit(loss_of(Llama(DEEP), ids))(initial_params(DEEP))) == pytest.approx(
        math.log(300) + 0.5, abs=0.15
    )


def served(params: Any, weights: Any = "auto") -> Any:
    return for_generation(jax.tree.map(jnp.asarray, params), weights)


def test_layers_stacked_and_one_by_one_give_the_same_logits() -> None:
    params, ids = random_params(ARGS), random_ids(2, 33, ARGS.vocab_size)
    stacked = logits_of(params, ids, ARGS)
    np.testing.assert_allclose(logits_of(served(params), ids, ARGS), stacked, atol=1e-5)
    apart = params | {"layers": one_by_one(params["layers"])}
    np.testing.assert_allclose(logits_of(apart, ids, ARGS), stacked, atol=1e-5)


def test_tokens_fed_in_parts_over_a_cache_have_the_hidden_states_of_the_whole() -> None:
    params, ids = random_params(ARGS), random_ids(2, 12, ARGS.vocab_size)
    model = Llama(ARGS)
    whole = np.asarray(model.apply({"params": params}, ids, method="hidden"))
    for form in (params, served(params)):  # stacked layers run over a cache, too
        cache = KVCache.empty(ARGS, jnp.zeros(2, jnp.int32), 16, jnp.float32)
        parts = []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            hidden, cache = model.apply({"params": form}, ids[:, start:stop], cache, 16, method="next_hidden")
            parts.append(hidden)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_the_plain_formula_and_the_kernel_agree() -> None:
    params, ids = random_params(ARGS), random_ids(2, 130, ARGS.vocab_size)
    plain, xla = (logits_of(params, ids, ARGS, kernel=kernel) for kernel in ("plain", "xla"))
    np.testing.assert_allclose(plain, xla, atol=1e-4)


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_weight_of_another_shape_is_refused_in_any_form(weights: Any) -> None:
    params = random_params(ARGS)
    wide = random_params(dataclasses.replace(ARGS, ffn_dim_multiplier=2.0))
    mixed = params | {"layers": params["layers"] | {"feed_forward": wide["layers"]["feed_forward"]}}
    for form in (mixed, served(mixed, weights)):
        with pytest.raises(ValueError, match="w1: expected the shape"):
            logits_of(form, random_ids(1, 3, ARGS.vocab_size), ARGS)


@pytest.mark.parametrize("layers", [3, 30])
def test_a_layer_is_traced_once_however_many_there_are(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = dataclasses.replace(ARGS, n_layers=layers)
    traced, norm = [], model_module.rms_norm
    monkeypatch.setattr(model_module, "rms_norm", lambda *given: traced.append(1) or norm(*given))
    params = served(random_params(args))
    traced.clear()
    cache = KVCache.empty(args, jnp.zeros(1, jnp.int32), 8, jnp.float32)
    model, ids = Llama(args), np.ones((1, 2), np.int32)
    jax.eval_shape(lambda p, c: model.apply({"params": p}, ids, c, 8, method="next_hidden"), params, cache)
    assert len(traced) == 2 + 1, "two norms of the layer, and the last one"


def test_layers_in_pairs_have_the_gradients_of_layers_one_by_one() -> None:
    args = dataclasses.replace(ARGS, n_layers=6)
    params, ids = random_params(args), random_ids(2, 33, args.vocab_size)
    found = []
    for unroll in (1, 2):
        for remat in ("dots", "dots:4", "attention:3"):
            loss = loss_of(Llama(args, remat=remat, kernel="xla", unroll=unroll), ids)
            found.append(jax.jit(jax.value_and_grad(loss))(params))
    for loss, grads in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, found[0][1])
