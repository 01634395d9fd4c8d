"""What a caller gives a model from Python: another type is one clear error, and arrays are taken as lists are."""

import copy
import dataclasses
import io
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import save_checkpoint
from llama_jax.config import MeshArgs, SampleArgs
from llama_jax.errors import UserError
from llama_jax.evaluate import evaluate
from llama_jax.generation import Model
from llama_jax.generation.arguments import ids_of, settings_of, texts_of
from llama_jax.tokenizer import Tokenizer
from tests.generation.models import build

GREEDY = SampleArgs(temperature=0.0, max_new_tokens=3)


CONTEXT = 32


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Model:
    return build(small_tokenizer, max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arguments") / "model"
    save_checkpoint(folder, model.params, model.args, model.tokenizer)
    return folder


@pytest.mark.parametrize(
    "prompts",
    ["one", b"one", bytearray(b"one"), None, 5, {"one": 1}, {"one"}, io.StringIO("one\ntwo\n"), np.array("one")],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_list_of_prompts_is_refused(prompts: Any) -> None:
    for read in (texts_of, ids_of):
        with pytest.raises(UserError, match=r"prompts: expected a list of .*, found .*; put "):
            read(prompts)


@pytest.mark.parametrize(
    "prompts", [["a", "b"], ("a", "b"), np.array(["a", "b"]), iter(["a", "b"])], ids=lambda x: type(x).__name__
)
def test_any_order_of_prompts_is_a_list(prompts: Any) -> None:
    assert texts_of(prompts) == ["a", "b"]


@pytest.mark.parametrize(
    "ids",
    [[[1, 5, 9]], [(1, 5, 9)], np.array([[1, 5, 9]]), jnp.array([[1, 5, 9]]), [range(1, 10, 4)]],
    ids=lambda x: type(x).__name__,
)
def test_ids_of_any_array_are_ints(ids: Any) -> None:
    (row,) = ids_of(ids)
    assert row == [1, 5, 9] and all(type(token) is int for token in row)


@pytest.mark.parametrize(
    "prompt",
    [
        5,
        "abc",
        [1.0],
        [True],
        ["a"],
        np.array([5], "m8[s]"),
        b"ab",
        bytearray(b"ab"),
        [1, True],
        np.ma.array([1, 5], mask=[0, 1]),
        [[1]],
        [[1], [1, 2]],
        None,
        [2**70],
        {1: 2},
    ],
)
def test_a_prompt_that_is_no_list_of_ids_is_refused_by_number(prompt: Any, model: Model) -> None:
    with pytest.raises(UserError, match="prompt 2: expected token ids, a list of whole numbers, found"):
        model.generate_ids([[1], prompt], GREEDY)
    with pytest.raises(UserError, match="prompt 1: expected token ids, a list of whole numbers, found"):
        model.stream_ids(prompt, GREEDY)


@pytest.mark.parametrize("args", [None, {"temperature": 0.0}, 5, [GREEDY, {"n": 1}], {GREEDY.n: GREEDY}, "greedy"])
def test_settings_that_are_none_are_refused(args: Any, model: Model) -> None:
    with pytest.raises(UserError, match=r"args: expected SampleArgs, found .*; give one for all prompts, or a list"):
        settings_of(args, 2)
    with pytest.raises(UserError, match="args: expected SampleArgs"):
        model.generate(["a", "b"], args)
    with pytest.raises(UserError, match="args: expected SampleArgs"):
        model.stream("a", args)


@pytest.mark.parametrize("path", [None, 5, "", b"runs/tiny", ["runs/tiny"]])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UserError, match="path: expected the folder of a checkpoint, a string or a Path, found"):
        llama_jax.load(path)


def test_what_a_model_is_loaded_with_is_checked(folder: Path) -> None:
    with pytest.raises(UserError, match="mesh: expected MeshArgs or None, found"):
        llama_jax.load(folder, mesh={"data": 1})  # type: ignore[arg-type]
    for tokens in ("4", 0, 2.0, True):
        with pytest.raises(UserError, match="draft_tokens: expected 1 to 64, found"):
            llama_jax.load(folder, draft="lookup", draft_tokens=tokens)  # type: ignore[arg-type]


def test_a_path_loads_what_its_string_loads(folder: Path) -> None:
    one, other = llama_jax.load(folder), llama_jax.load(str(folder), mesh=MeshArgs(data=1))
    assert one.generate(["The fox"], GREEDY) == other.generate(["The fox"], GREEDY)


def test_completions_are_pickled_and_copied(model: Model) -> None:
    made = model.generate(["The fox"], SampleArgs(max_new_tokens=3, logprobs=2, echo=True))
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


def test_the_context_bounds_a_completion_of_any_length(model: Model) -> None:
    (made,) = model.generate_ids([np.ones(CONTEXT - 2, np.uint16)], SampleArgs(max_new_tokens=10**6, ignore_eos=True))
    assert len(made.token_ids) == 2 and made.finish_reason == "length"


@pytest.mark.parametrize("text", [None, 5, b"a", ["a"]])
def test_a_tokenizer_encodes_a_string_alone(text: Any, small_tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"text: expected a string, found .*; encode one text at a time"):
        small_tokenizer.encode(text)


def test_a_model_is_loaded_without_a_word_of_libraries(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("absl").setLevel(
        logging.WARNING
    )  # orbax logs through it; a command of another test may have set it
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.simplefilter("error")
        for weights in ("auto", "int8"):
            llama_jax.load(folder, weights=weights)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_seed_names_the_text_also_where_jax_computes_in_64_bits(model: Model) -> None:
    args = SampleArgs(temperature=1.0, max_new_tokens=8, seed=3)
    (wanted,) = model.generate(["The fox"], args)
    with jax.enable_x64(True):
        (found,) = dataclasses.replace(model).generate(["The fox"], args)
    assert found.token_ids == wanted.token_ids


def test_a_mesh_around_the_call_changes_nothing(model: Model, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("The fox.")

    def found(model: Model) -> Any:
        return model.generate(["The fox"], GREEDY), model.logits([[1, 5]]).tolist(), evaluate(model, text)["loss"]

    wanted = found(model)
    with jax.set_mesh(jax.make_mesh((1,), ("mine",))):
        assert found(dataclasses.replace(model)) == wanted


def test_an_answer_has_no_echo(model: Model) -> None:
    tuned = dataclasses.replace(model, chat_template="plain")
    with pytest.raises(UserError, match="echo: expected prompts to complete, found a conversation"):
        tuned.chat([{"role": "user", "content": "a"}], dataclasses.replace(GREEDY, echo=True))


def test_arguments_of_loading_that_would_not_be_used_are_told(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--chat-template: expected a file or one of .*, found no file 'lama2'"):
        llama_jax.load(folder, chat_template="lama2")
    with pytest.warns(UserWarning, match="draft_tokens: no effect without draft"):
        llama_jax.load(folder, draft_tokens=3)


@pytest.mark.parametrize("name", ["adapter", "draft", "chat_template"])
def test_what_is_no_path_of_something_else_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"^{name}: expected a string or a Path, found 5; give one"):
        llama_jax.load(folder, **{name: 5})  # type: ignore[arg-type]


@pytest.mark.parametrize("exact", [None, 1, "no"])
def test_exact_is_true_or_false(exact: Any, folder: Path) -> None:
    with pytest.raises(UserError, match=r"^exact: expected True or False, found "):
        llama_jax.load(folder, exact=exact)


def test_a_masked_array_is_no_row_of_tokens(model: Model) -> None:
    with pytest.raises(UserError, match=r"token_ids: expected integers \[B, T\], found a masked array"):
        model.logits(np.ma.array([[1, 5]], mask=[[0, 1]]))


def test_a_span_of_time_is_no_token(model: Model) -> None:
    with pytest.raises(UserError, match=r"token_ids: expected integers \[B, T\], found timedelta64"):
        model.logits(np.array([[5]], "m8[s]"))


@pytest.mark.parametrize("gaps", [None, 5, "ab", {"a": "b"}, {("a", "b")}, [("a", "b", "c")], ["ab"]], ids=repr)
def test_what_is_no_list_of_gaps_is_refused(gaps: Any, model: Model) -> None:
    with pytest.raises(UserError, match=r"^gaps: expected .*pairs of texts"):
        model.infill(gaps)


@pytest.mark.parametrize("ids", [5, "a", ["a"], [2.0], [True], [-1], [10**6], [[1]], None], ids=repr)
def test_tokens_that_end_a_stream_are_in_the_vocabulary(ids: Any, model: Model) -> None:
    with pytest.raises(UserError, match=r"^end_ids: expected token ids from 0 to "):
        model.stream_ids([1], GREEDY, end_ids=ids)


def test_a_stream_ends_at_ids_of_any_array(model: Model) -> None:
    (made,) = model.generate_ids([[1]], GREEDY)
    first = made.token_ids[0]
    for ids in ([first], (first,), {first}, np.array([first], np.uint16), iter([first])):
        assert not "".join(model.stream_ids([1], GREEDY, end_ids=ids))  # type: ignore[arg-type]


def test_models_are_compared_and_hashed_and_shown_without_their_arrays(model: Model) -> None:
    other = dataclasses.replace(model)
    assert model != other and len({model, other, model}) == 2
    assert "params" not in repr(model) and len(repr(model)) < 5000
