"""The vocabulary and the length of a run that plan takes, and what counts of a command line."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_jax.config import Config, DataArgs, MeshArgs, ModelArgs, TrainArgs, load_toml
from llama_jax.data.tokens import open_tokens
from llama_jax.errors import UserError
from llama_jax.plan.arguments import Request, read_request
from llama_jax.plan.command import _ignored
from llama_jax.plan.settings import run_tokens, vocabulary
from llama_jax.plan.tuning_data import with_masks
from llama_jax.tokenizer import Tokenizer
from llama_jax.training import loop, samples
from tests import forked

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer) -> Path:
    """A folder of tokens as ``prepare`` makes it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("The fox went to the river.\n" * 200)
    (folder / "tokenizer.model").write_bytes(small_tokenizer.model_bytes)
    command = ["-m", "llama_jax.data", "prepare", "--filepath", "text.txt", "--tokenizer-model-path", "tokenizer.model"]
    done = forked.run([*command, "--output", "tokens", "--workers", "1"], folder)
    assert done.returncode == 0, done.stderr
    return folder / "tokens"


def request(*flags: str) -> Request:
    return read_request(["--topology", "v5e:2x2", *flags])


def found_vocabulary(*flags: str) -> tuple[float | None, str]:
    read = request(*flags)
    return vocabulary(read.config, "data.vocab_size" in read.stated)


def test_the_vocabulary_is_the_one_that_train_py_would_have(prepared: Path, small_tokenizer: Tokenizer) -> None:
    assert found_vocabulary("--config", str(CONFIGS / "tiny.toml"))[0] == 2048
    assert found_vocabulary("--config", str(CONFIGS / "shakespeare.toml"))[0] == 2048
    assert found_vocabulary("--data.filepath", "my.txt")[0] == DataArgs().vocab_size
    assert found_vocabulary("--data.vocab-size", "4096")[0] == 4096
    assert found_vocabulary("--model.vocab-size", "77")[0] == 77
    assert found_vocabulary("--data.filepath", str(prepared)) == (
        small_tokenizer.vocab_size,
        str(prepared / "tokenizer.model"),
    )
    path = str(prepared / "tokenizer.model")
    assert found_vocabulary("--data.tokenizer-model-path", path) == (small_tokenizer.vocab_size, path)


def test_a_vocabulary_that_is_assumed_is_said_to_be() -> None:
    size, source = found_vocabulary("--config", str(CONFIGS / "llama2-7b.toml"))
    assert size == 32000 and "names no tokenizer" in source


def test_a_tokenizer_that_is_missing_is_no_reason_to_assume_one() -> None:
    with pytest.raises(UserError, match=r"nowhere\.model: expected a tokenizer"):
        found_vocabulary("--data.tokenizer-model-path", "nowhere.model")


def test_a_run_is_as_long_as_its_configuration_says(prepared: Path) -> None:
    for name in ("llama2-7b", "llama2-13b", "llama2-70b"):
        assert run_tokens(load_toml(CONFIGS / f"{name}.toml")).value == pytest.approx(2e12, rel=1e-6)
    half = request("--config", str(CONFIGS / "llama2-7b.toml"), "--train.batch-size", "512").config
    assert run_tokens(half) == (476837 * 512 * 4096, "train.max_steps, 476,837")
    assert run_tokens(half, 5e9) == (5e9, "--tokens")
    decayed = Config(ModelArgs(max_seq_len=16), train=TrainArgs(batch_size=2, schedule="wsd", decay_from=800))
    assert run_tokens(decayed) == (1000 * 2 * 16, "train.decay_from, 800, whose decay ends at step 1,000")


def test_epochs_are_counted_in_prepared_tokens_or_not_at_all(prepared: Path) -> None:
    config = Config(ModelArgs(max_seq_len=16), DataArgs(filepath=str(prepared)), TrainArgs(batch_size=2, n_epochs=3))
    windows = -(-len(open_tokens(prepared).train) // 16)
    assert run_tokens(config).value == -(-3 * windows // 2) * 2 * 16
    value, why = run_tokens(replace(config, data=DataArgs()))
    assert value is None and "--tokens" in why


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [
        [{"role": "user", "content": "Who? " * (i % 5)}, {"role": "assistant", "content": "I. " * (i % 7)}]
        for i in range(90)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def test_conversations_are_planned_with_document_masks_and_that_is_told(chats: Path, prepared: Path) -> None:
    config, notes = with_masks(request("--data.filepath", str(chats)).config)
    assert config.data.document_mask and str(chats) in notes[0] and "document masks" in notes[0]
    assert with_masks(config) == (config, [])
    assert with_masks(request("--data.chats", "40").config)[0].data.document_mask
    for other in (str(prepared), str(prepared / "nowhere.jsonl"), str(chats.with_suffix(".txt"))):
        plain = request("--data.filepath", other).config
        assert with_masks(plain) == (plain, [])


def test_epochs_of_conversations_are_as_many_steps_as_training_takes(
    chats: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "draw_losses", lambda *_: None)
    data = DataArgs(str(chats), tokenizer_model_path=str(prepared / "tokenizer.model"), chat_template="llama2")
    train = TrainArgs(batch_size=2, n_epochs=2, eval_interval=100, save_dir=str(tmp_path / "run"))
    config = Config(ModelArgs(dim=16, n_layers=1, n_heads=2, multiple_of=16, max_seq_len=64), data, train)
    value, source = run_tokens(config)
    with contextlib.redirect_stdout(io.StringIO()):
        run = loop.train(config)
    steps = json.loads(run.metrics_path.read_text().splitlines()[-1])["step"]
    assert value == steps * 2 * 64 and f"{steps} steps" in source
    unknown = replace(config, data=replace(data, tokenizer_model_path=""))
    assert run_tokens(unknown).value is None and "--train.init-from" in run_tokens(unknown).source
    assert run_tokens(unknown, 5e6).value == 5e6


def test_epochs_of_a_flag_beat_steps_of_a_file() -> None:
    tiny = ["--config", str(CONFIGS / "tiny.toml")]
    assert request(*tiny).config.train.max_steps == 700
    assert request(*tiny, "--train.n-epochs", "3").config.train.max_steps is None
    assert request(*tiny, "--train.n-epochs", "3", "--train.max-steps", "5").config.train.max_steps == 5


def test_a_vocabulary_of_a_flag_beats_a_tokenizer_of_a_file(tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "c.toml").write_text(f'[data]\ntokenizer_model_path = "{prepared / "tokenizer.model"}"\n')
    config = ["--config", str(tmp_path / "c.toml")]
    assert found_vocabulary(*config)[0] == 400
    assert found_vocabulary(*config, "--data.vocab-size", "5000")[0] == 5000


def test_for_decoding_the_mesh_and_the_type_of_training_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[train]\ncompute_dtype = "float32"\n[mesh]\ndata = 1\nfsdp = -1\n[lora]\nrank = 4\n'
    )
    config = ["--config", str(tmp_path / "c.toml")]
    training, decoding = request(*config).config, request(*config, "--decode").config
    assert (training.mesh, training.train.compute_dtype) == (MeshArgs(data=1, fsdp=-1), "float32")
    assert (decoding.mesh, decoding.train.compute_dtype) == (MeshArgs(), "auto")
    given = request(*config, "--decode", "--mesh.tensor", "2", "--train.compute-dtype", "float32").config
    assert (given.mesh, given.train.compute_dtype) == (MeshArgs(tensor=2), "float32")
    told = [[line.partition(" ")[0] for _, line in _ignored(request(*config, "--decode", *flags))] for flags in (
        (), ("--mesh.tensor", "2", "--train.compute-dtype", "float32"),
    )]  # fmt: skip
    assert told == [["[mesh]", "train.compute_dtype", "[lora]"], ["[mesh]", "[lora]"]]
    assert not _ignored(request("--decode"))


def test_fine_tuning_is_planned_with_the_checkpoints_model(place: Path) -> None:
    run = str(place / "runs" / "tiny")
    config = request("--train.init-from", run).config
    assert (config.model.dim, config.model.n_layers) == (32, 1) and config.model.vocab_size == 300


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--batch", "4"], ["--batch", "--decode"]),
        (["--cache", "int8"], ["--cache", "--decode"]),
        (["--slots", "0"], ["--slots", "found 0"]),
        (["--slots", "512"], ["--slots", "--decode"]),
        (["--compiles", "3"], ["--compiles", "--search"]),
        (["--search", "--decode"], ["--decode", "--search"]),
        (["--search", "--hlo", "x"], ["--hlo", "--search"]),
        (["--decode", "--train.remat", "full"], ["--train.remat", "decoding"]),
        (["--decode", "--train.batch-size=8"], ["--train.batch-size", "decoding"]),
        (["--decode", "--tokens", "5"], ["--tokens", "decoding"]),
        (["--decode", "--data.document-mask"], ["--data.document-mask", "decoding"]),
        (["--tokens", "-1"], ["--tokens", "positive"]),
        (["--tokens", "nan"], ["--tokens", "positive"]),
        (["--advice=-1"], ["--advice", "0 or more"]),
        (["--train.init-from", "nowhere"], ["nowhere", "checkpoint"]),
    ],
)
def test_a_flag_that_nobody_would_read_is_refused(flags: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as told:
        request(*flags)
    assert all(part in str(told.value) for part in parts) and "\n" not in str(told.value)


def test_what_says_nothing_beside_a_search_is_let_pass() -> None:
    assert request("--search", "--output", "x.png", "--compiles", "2").args.search
