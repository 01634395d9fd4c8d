"""The checkpoint form: round trips, what find() opens, and one line of help where it cannot."""

import dataclasses
import gc
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import Checkpoint, save_checkpoint, steps_of
from llama_jax.config import MeshArgs, ModelArgs, TrainArgs
from llama_jax.devices.sharding import make_mesh, parameter_shapes
from llama_jax.errors import UserError
from llama_jax.generation import Model
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer, train_tokenizer
from llama_jax.training.saving import CheckpointWriter
from llama_jax.training.step import init_state, make_optimizer, state_shapes
from tests import numpy_llama

# Orbax leaves the reads that it did not wait for to the garbage collector, which complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Have it complain here, not in a later file."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    lines = ["The cat sat on the mat.", "A dog ran to the cat.", "They sat and ran."]
    return train_tokenizer(lines, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def args(tokenizer: Tokenizer) -> ModelArgs:
    return ModelArgs(
        dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=tokenizer.vocab_size, multiple_of=8, max_seq_len=32
    )


@pytest.fixture(scope="module")
def params(args: ModelArgs) -> Any:
    return jax.tree.map(jnp.asarray, numpy_llama.random_params(parameter_shapes(Llama(args))))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, params: Any, args: ModelArgs, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(folder, params, args, tokenizer)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(saved, tmp_path / "copy")


def told(folder: Path, call: Any) -> str:
    """The message of the UserError that ``call`` raises: one line that names the folder."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_is_saved_is_loaded_bit_for_bit(saved: Path, params: Any, args: ModelArgs, tokenizer: Tokenizer) -> None:
    model = Model.load(saved)
    assert model.args == args
    assert model.tokenizer.model_bytes == tokenizer.model_bytes
    assert_same(model.params, params)


def test_numbers_at_the_borders_of_float32_survive(
    params: Any, args: ModelArgs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    odd = np.array([-0.0, 1e-42, 3e38, np.inf, -np.inf, np.nan], np.float32)
    strange = params | {"norm": jnp.asarray(np.resize(odd, args.dim))}
    save_checkpoint(tmp_path / "strange", strange, args, tokenizer)
    assert_same(Model.load(tmp_path / "strange").params, strange)


def test_a_checkpoint_is_never_written_over_another(
    saved: Path, params: Any, args: ModelArgs, tokenizer: Tokenizer
) -> None:
    told(saved, lambda: save_checkpoint(saved, params, args, tokenizer))


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A run folder of steps 5, 10 and 20, and an unfinished 30."""
    for step in (5, 10, 20):
        shutil.copytree(saved, tmp_path / "run" / "checkpoints" / str(step))
    (tmp_path / "run" / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    return tmp_path / "run"


def test_a_run_folder_opens_its_best_step(run: Path) -> None:
    (run / "best.json").write_text(json.dumps({"step": 5}))
    assert Checkpoint.find(run).folder == run / "checkpoints" / "5"


@pytest.mark.parametrize("best", [None, "", "{", "[]", "{}", '{"step": 7}', '{"step": 30}', '{"step": null}'])
def test_a_run_folder_without_a_best_step_opens_its_last(
    run: Path, best: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if best is not None:
        (run / "best.json").write_text(best)
    assert steps_of(run) == [5, 10, 20]
    assert Checkpoint.find(run).folder == run / "checkpoints" / "20"
    named = json.loads(best)["step"] if best in ('{"step": 7}', '{"step": 30}') else None
    said = f"the best step is {named} by best.json, and its checkpoint is gone; step 20 is read instead"
    assert (said in capsys.readouterr().err) == (named is not None)


def test_a_step_folder_opens_itself(run: Path) -> None:
    assert Checkpoint.find(str(run / "checkpoints" / "10")).folder == run / "checkpoints" / "10"


def test_nothing_a_file_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert "nothing" in told(tmp_path / "none", lambda: Checkpoint.find(tmp_path / "none"))
    assert "a file" in told(tmp_path / "file", lambda: Checkpoint.find(tmp_path / "file"))
    for name in ("empty", "begun"):
        assert "no checkpoint" in told(tmp_path / name, lambda name=name: Checkpoint.find(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "model arguments"),
        ("{", "model arguments"),
        ("[1]", "model arguments"),
        ("\x00", "model arguments"),
        ('{"dim": "16"}', "dim"),
        ('{"dimension": 16}', "dimension"),
        ('{"dim": 16, "n_heads": 3}', "n_heads"),
        ('{"dim": 16, "n_heads": 2}', "vocab_size"),
    ],
)
def test_a_corrupt_model_json_is_told(copy: Path, text: str, named: str) -> None:
    (copy / "model" / "model.json").write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        Checkpoint.find(copy)
    assert "\n" not in str(caught.value)


def test_a_model_json_that_is_not_text_is_told(copy: Path) -> None:
    (copy / "model" / "model.json").write_bytes(b"\xff\xfe\x00")
    told(copy, lambda: Checkpoint.find(copy))


@pytest.mark.parametrize("name", ["model.json", "tokenizer.model"])
def test_a_missing_small_file_is_told(copy: Path, name: str) -> None:
    (copy / "model" / name).unlink()
    assert name in told(copy, lambda: Checkpoint.find(copy))


def test_a_tokenizer_that_is_not_one_is_told(copy: Path) -> None:
    (copy / "model" / "tokenizer.model").write_bytes(b"not a model")
    assert "SentencePiece" in told(copy, lambda: Checkpoint.find(copy))


def test_missing_params_are_told(copy: Path) -> None:
    shutil.rmtree(copy / "params")
    assert "params" in told(copy, lambda: Model.load(copy))


def test_emptied_params_are_told(copy: Path) -> None:
    shutil.rmtree(copy / "params")
    (copy / "params").mkdir()
    told(copy, lambda: Model.load(copy))


def chunks(folder: Path) -> list[Path]:
    """The files that hold the parameters' values."""
    found = [path for path in (folder / "params").rglob("*") if path.is_file() and re.fullmatch(r"[\d.]+", path.name)]
    assert found
    return found


def test_a_missing_parameter_file_is_told(copy: Path) -> None:
    chunks(copy)[0].unlink()
    told(copy, lambda: Model.load(copy))


def test_cut_parameter_files_are_told(copy: Path) -> None:
    files = chunks(copy)
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told(copy, lambda: Model.load(copy))


@pytest.mark.parametrize(
    "other",
    [{"dim": 32}, {"dim": 8}, {"n_layers": 3}, {"n_layers": 1}, {"n_kv_heads": 2}, {"multiple_of": 64}],
    ids=str,
)
def test_params_of_another_shape_are_told(copy: Path, args: ModelArgs, other: dict[str, int]) -> None:
    text = json.dumps(dataclasses.asdict(dataclasses.replace(args, **other)))
    (copy / "model" / "model.json").write_text(text)
    told(copy, lambda: Model.load(copy))


def test_params_with_a_leaf_too_few_or_too_many_are_told(
    params: Any, args: ModelArgs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    few = {name: leaf for name, leaf in params.items() if name != "output"}
    many = params | {"bias": jnp.zeros(3)}
    for name, tree in (("few", few), ("many", many)):
        save_checkpoint(tmp_path / name, tree, args, tokenizer)
        told(tmp_path / name, lambda name=name: Model.load(tmp_path / name))


def test_a_folder_that_cannot_be_written_is_told(
    params: Any, args: ModelArgs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    told(tmp_path / "file", lambda: save_checkpoint(tmp_path / "file" / "new", params, args, tokenizer))


def test_a_training_state_comes_back_bit_for_bit_and_the_best_and_latest_steps_are_kept(
    args: ModelArgs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, mesh = Llama(args), make_mesh(MeshArgs(data=1), jax.devices()[:1])
    optimizer = make_optimizer(TrainArgs(), 10)
    state = init_state(model, optimizer, mesh, seed=3)
    with CheckpointWriter(tmp_path / "checkpoints", keep=1) as writer:
        for step, eval_loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None)]:
            params = jax.tree.map(lambda x, s=step: x + s, state.params)
            writer.save(step, params, state.opt_state, args, tokenizer, eval_loss)
    assert steps_of(tmp_path) == [2, 4]
    found = Checkpoint.find(tmp_path / "checkpoints" / "2")
    shapes = state_shapes(model, optimizer, mesh)
    assert_same(found.restore("params", shapes.params), jax.tree.map(lambda x: x + 2, state.params))
    assert_same(found.restore("state", shapes.opt_state), state.opt_state)
    assert not list(tmp_path.rglob("*tmp*"))


def test_the_best_step_is_kept_by_a_run_that_goes_on_and_found_without_its_run_folder(
    params: Any, args: ModelArgs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for saves in ([(1, 3.0), (2, 1.0), (3, 2.0)], [(4, 2.5), (5, None)]):
        with CheckpointWriter(tmp_path / "checkpoints", keep=1) as writer:
            for step, eval_loss in saves:
                writer.save(step, params, {"count": jnp.zeros(1)}, args, tokenizer, eval_loss)
    assert steps_of(tmp_path) == [2, 5]
    assert Checkpoint.find(tmp_path / "checkpoints").folder.name == "2"
