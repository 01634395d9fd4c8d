"""evaluate(): every token of a text once, from whole logits and by hand."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece as spm

from llama_jax.config import ModelArgs, SampleArgs
from llama_jax.devices.sharding import parameter_shapes
from llama_jax.errors import UserError
from llama_jax.evaluate import text as of_text
from llama_jax.evaluate.text import _windows, evaluate
from llama_jax.generation import Model
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests import numpy_llama

TEXT = "The fox saw 12 boats.\n\nA fox, an owl and the river — été!\n" * 3
CONTEXT = 48


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    vocab = small_tokenizer.vocab_size
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=vocab, multiple_of=8, max_seq_len=CONTEXT)
    module = Llama(args)
    params = numpy_llama.random_params(parameter_shapes(module))
    return Model(args, params, small_tokenizer, module)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def literal(model: Model, text: str, window: int, stride: int) -> tuple[float, int]:
    """Summed nats of a text, a window at a time, each token in the first window that reaches it; and how many tokens."""
    ids = model.tokenizer.encode(text)
    total, scored = 0.0, 1
    for start in range(0, len(ids), stride):
        inputs = ids[start : start + window]
        # Padding behind the window does not reach back: one shape is compiled instead of many.
        padded = np.array([inputs + [0] * (CONTEXT - len(inputs))])
        logits = np.asarray(model.logits(padded), np.float64)[0]
        while scored <= start + len(inputs) and scored < len(ids):
            row = logits[scored - 1 - start]
            total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[scored]]
            scored += 1
    return total, len(ids) - 1


@pytest.mark.parametrize(
    ("window", "stride", "batch_size"), [(48, 48, 3), (48, 48, 8), (48, 20, 8), (17, 17, 1), (17, 4, 8), (5, 1, 8)]
)
def test_evaluation_equals_a_literal_one_from_whole_logits(
    model: Model, text: Path, window: int, stride: int, batch_size: int
) -> None:
    found = evaluate(model, text, window, stride, batch_size)
    total, tokens = literal(model, TEXT, window, stride)
    assert (found["tokens"], found["window"], found["stride"]) == (tokens, window, stride)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found["bytes"] == len(TEXT.encode())
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_token_by_token_over_a_cache_of_floats_the_loss_is_that_of_whole_windows(model: Model, text: Path) -> None:
    whole, stepwise = (evaluate(replace(model, cache_dtype=dtype), text, 20, 7) for dtype in (None, jnp.float32))
    assert stepwise["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert stepwise["tokens"] == whole["tokens"]


@pytest.mark.parametrize("dtype", [None, jnp.int8], ids=["float", "int8"])
def test_the_loss_is_that_of_generations_logprobs(model: Model, dtype: Any, tmp_path: Path) -> None:
    """Whatever is read in one pass there, a token at a time here: keys and values are rounded alike."""
    model = replace(model, cache_dtype=dtype)
    ids = model.tokenizer.encode(TEXT)[:CONTEXT]
    (tmp_path / "text.txt").write_text(text := model.tokenizer.decode(ids))
    assert model.tokenizer.encode(text) == ids
    logits = np.asarray(jax.nn.log_softmax(model.logits([ids])))[0]
    logprobs = logits[np.arange(len(ids) - 1), ids[1:]]
    half = len(ids) // 2
    greedy = SampleArgs(temperature=0.0, max_new_tokens=1)
    for end in (1, 2, half):
        (made,) = model.generate_ids([ids[:end]], greedy)
        assert made.logprobs[0] == pytest.approx(logits[end - 1].max(), abs=1e-5)
    found = evaluate(model, tmp_path / "text.txt")
    assert found["loss"] == pytest.approx(-logprobs.mean(), rel=1e-5)


def test_a_cache_of_int8_costs_a_little(model: Model, text: Path) -> None:
    exact, rounded = (evaluate(replace(model, cache_dtype=dtype), text) for dtype in (jnp.float32, jnp.int8))
    assert 1e-6 < abs(rounded["loss"] - exact["loss"]) < 1e-2


def test_window_and_stride_are_the_context_unless_given(model: Model, text: Path) -> None:
    found = evaluate(model, text)
    assert (found["window"], found["stride"]) == (CONTEXT, CONTEXT)
    assert evaluate(model, text, window=17)["stride"] == 17


def test_files_are_scored_each_behind_a_bos_of_its_own(model: Model, tmp_path: Path) -> None:
    texts = ["The fox.", "An owl saw it."]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    rows = [model.tokenizer.encode(text) for text in texts]
    stream = np.array([rows[0] + rows[1]])
    assert stream.shape[1] <= CONTEXT
    log_probs = np.asarray(jax.nn.log_softmax(model.logits(stream)))[0]
    scored = [i for i in range(1, stream.shape[1]) if i != len(rows[0])]
    found = evaluate(model, tmp_path)
    assert found["tokens"] == len(rows[0]) + len(rows[1]) - 2
    assert found["loss"] == pytest.approx(-np.mean([log_probs[i - 1, stream[0, i]] for i in scored]), rel=1e-5)


@pytest.mark.parametrize("count", [1, 4, 5, 23])
@pytest.mark.parametrize(("window", "stride"), [(5, 5), (5, 2), (5, 1), (1, 1), (40, 40), (40, 7)])
def test_windows_score_every_position_once_and_reach_what_they_score(count: int, window: int, stride: int) -> None:
    rows = list(_windows(count, window, stride))
    assert [i for _, first, last in rows for i in range(first, last)] == list(range(count))
    assert all(start <= first < last <= start + window for start, first, last in rows)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"window": CONTEXT + 1}, "--window"),
        ({"window": -1}, "--window"),
        ({"window": 8, "stride": 9}, "--stride"),
        ({"stride": -1}, "--stride"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_a_bad_option_is_named(model: Model, text: Path, options: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=f"^{named}: expected"):
        evaluate(model, text, **options)


@pytest.mark.parametrize("name", ["window", "stride", "batch_size"])
@pytest.mark.parametrize("value", ["8", 2.5, True, None])
def test_a_number_of_another_type_is_named(model: Model, text: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: expected a whole number, . or more, found "):
        evaluate(model, text, **{name: value})


@pytest.mark.parametrize("options", [{"as_text": "no"}, {"skip": 1}, {"text_field": 5}], ids=str)
def test_a_switch_of_another_type_is_named(model: Model, text: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))}: expected (bool|str), found "):
        evaluate(model, text, **options)


def test_what_is_no_model_is_refused(text: Path) -> None:
    with pytest.raises(UserError, match=r"^model: expected a model that is loaded, found 'runs/tiny'"):
        evaluate("runs/tiny", text)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [None, 5, ["a.txt", "b.txt"], "", b"a.txt"], ids=repr)
def test_what_is_no_path_is_no_text(model: Model, path: Any) -> None:
    with pytest.raises(UserError, match=r"^--text: expected a path, a string or a Path, found "):
        evaluate(model, path)


def test_a_missing_an_empty_and_a_bare_text_are_told(model: Model, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    for name in ("none.txt", "empty.txt", "bom.txt"):
        with pytest.raises(UserError, match=name):
            evaluate(model, tmp_path / name)


@pytest.fixture(scope="module")
def lossy(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model with a tokenizer that knows few letters, and collapses white space."""
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox saw an owl", "an owl saw boats"] * 50), model_writer=file, model_type="bpe", vocab_size=60,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("lossy") / "tokenizer.model"
    path.write_bytes(file.getvalue())
    return replace(model, tokenizer=Tokenizer(path))


@pytest.mark.parametrize(
    ("content", "lost_share"),
    [("幸福的家庭都是相似的" * 100, 1.0), ("the fox\n    saw an owl\n" * 20, 4 / 23), ("the fox saw an owl", 0.0)],
    ids=["unknown letters", "white space", "held"],
)
def test_bits_per_byte_are_not_told_of_a_text_that_the_tokens_do_not_hold(
    lossy: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, lost_share: float
) -> None:
    (tmp_path / "text.txt").write_text(content)
    found = evaluate(lossy, tmp_path / "text.txt")
    assert found["lost_share"] == pytest.approx(lost_share, abs=0.03)
    assert (found["bits_per_byte"] is None) == (lost_share > 0)
    assert found["loss"] > 0 and found["bytes"] == len(content.encode())
    warned = capsys.readouterr().err
    assert ("warning: the tokenizer loses text" in warned) == (lost_share > 0)


def test_the_text_goes_through_the_door_of_training(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text('["text", "The fox."]\n' * 9)
    with pytest.raises(
        UserError, match=r"^--text: expected plain text in UTF-8, .*found JSON lines of lists: .*a\.txt; .*as-text"
    ):
        evaluate(model, tmp_path)
    assert evaluate(model, tmp_path, as_text=True)["bytes"] == 21 * 9
    (tmp_path / "a.txt").write_text('{"text": "The fox.", "title": "a"}\n' * 9)
    assert evaluate(model, tmp_path)["bytes"] == 8 * 9
    assert evaluate(model, tmp_path, text_field="title")["bytes"] == 9
    (tmp_path / "a.txt").write_text("The fox.")
    (tmp_path / "._a.txt").write_text("hidden")
    assert evaluate(model, tmp_path)["bytes"] == 8
    assert "not read, as they are hidden: 1 (._a.txt)" in capsys.readouterr().err


def test_records_that_cannot_be_read_end_the_evaluation_or_are_left_out_and_told(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "The fox."}\n{"text": null}\n{"text": "The owl"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: expected a text"):
        evaluate(model, tmp_path / "a.jsonl")
    assert evaluate(model, tmp_path / "a.jsonl", skip=True)["bytes"] == 15
    assert "1 record" in capsys.readouterr().err


def test_conversations_are_no_text_to_score_but_a_field_of_texts_is(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "The fox", "completion": "ran."}\n')
    with pytest.raises(
        UserError, match=r"^--text: expected text, found conversations \(prompt and completion\) in"
    ) as told:
        evaluate(model, tmp_path / "a.jsonl")
    assert str(told.value).endswith("name it with --text-field: prompt or completion")
    assert evaluate(model, tmp_path / "a.jsonl", text_field="completion")["bytes"] == len("ran.")
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "Who ran?"}]}\n')
    with pytest.raises(
        UserError, match=r"found conversations \(messages\) in .*; answers are scored as a task"
    ) as told:
        evaluate(model, tmp_path / "b.jsonl")
    assert "--text-field" not in str(told.value)


def test_of_a_folder_that_is_split_what_is_held_out_is_scored(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text(f"The {name}")
    assert evaluate(model, tmp_path)["bytes"] == len("The test")
    assert "the train split: 1 (train.txt)" in capsys.readouterr().err


@pytest.mark.parametrize("cache", [None, jnp.int8])
def test_a_pass_has_no_more_positions_and_windows_than_the_text_fills(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Any
) -> None:
    shapes = []
    name = "_loss_sum" if cache is None else "_loss_sum_over_cache"
    scored = getattr(of_text, name)

    def noting(model: Any, params: Any, inputs: Any, *args: Any, **others: Any) -> Any:
        shapes.append(inputs.shape)
        return scored(model, params, inputs, *args, **others)

    monkeypatch.setattr(of_text, name, noting)
    (path := tmp_path / "short.txt").write_text("The fox")
    found = evaluate(replace(model, cache_dtype=cache), path)
    assert shapes == [(1, found["tokens"])] and found["window"] == CONTEXT
    if cache is None:
        total, tokens = literal(model, "The fox", CONTEXT, CONTEXT)
        assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
