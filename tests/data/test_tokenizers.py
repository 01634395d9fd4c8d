"""Tokens by tokenizers of every kind: prepared, inspected, trained on, resumed, evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from llama_jax.config import DataArgs
from llama_jax.data import load_data, open_tokens
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer, kept_tokenizer
from tests import inside
from tests.commands import SMALL_MODEL
from tests.tokenizers.made import CONFIG, LLAMA2, bytewise, library, long_text, put, spaced

TEXT = 'The fox went to the river.\nThe owl said: "12 boats!" Où?\n\n' * 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("byte level"), bytewise(), CONFIG)


def data(*argv: str, cwd: Path) -> str:
    done = inside.run(["-m", "llama_jax.data", *argv], cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["byte-level", "prepend", "first"])
def test_prepared_tokens_are_the_librarys(kind: str, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = bytewise() if kind == "byte-level" else spaced(small_tokenizer, kind)
    folder = put(tmp_path / "tokenizer", table, CONFIG if kind == "byte-level" else LLAMA2)
    text = long_text(3, 120_000).replace("\0", "").replace("\r", "")
    (tmp_path / "a.txt").write_text(text)
    args = DataArgs(filepath=str(tmp_path / "a.txt"), tokenizer_model_path=str(folder), train_size=1.0)
    made = load_data(args, tmp_path / "tokens", tmp_path / "tokenizer.model")
    expected = library(table).encode(text, add_special_tokens=False).ids
    assert np.asarray(made.tokens.train[:]).tolist() == [made.tokenizer.bos_id, *expected, made.tokenizer.eos_id]
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert {*manifest["tokenizer_files"]} == {"tokenizer.json", "tokenizer_config.json"}
    assert sum(manifest["counts"]["lost_bytes"].values()) == 0


def test_prepare_inspect_and_what_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    argv = ["--filepath", "a.txt", "--tokenizer-model-path", str(tokenizer), "--output", "tokens"]
    data("prepare", *argv, cwd=tmp_path)
    assert "holds these tokens already" in data("prepare", *argv, cwd=tmp_path)
    assert (tmp_path / "tokens" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert not (tmp_path / "tokens" / "tokenizer.model").exists()
    report = json.loads(
        data("inspect", "--filepath", "a.txt", "--tokenizer-model-path", str(tokenizer), "--json", cwd=tmp_path)
    )
    again = json.loads(data("inspect", "--filepath", "tokens", "--json", cwd=tmp_path))
    assert report["vocab_size"] == again["vocab_size"] == 423 and min(report["byte_share"], again["byte_share"]) > 0
    assert report["tokens"] == len(Tokenizer(tokenizer).encode(TEXT, eos=True))
    (tmp_path / "tokens" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: expected the tokenizer that made these tokens"):
        open_tokens(tmp_path / "tokens")


def test_parts_are_merged(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    argv = ["--filepath", "a.txt", "--tokenizer-model-path", str(tokenizer)]
    data("prepare", *argv, "--output", "whole", cwd=tmp_path)
    data("prepare", *argv, "--output", "parts", "--part", "1/1", cwd=tmp_path)
    data("merge", "--output", "parts", cwd=tmp_path)
    whole, parts = open_tokens(tmp_path / "whole"), open_tokens(tmp_path / "parts")
    np.testing.assert_array_equal(whole.train[:], parts.train[:])
    assert kept_tokenizer(tmp_path / "parts" / "tokenizer.model").digest == Tokenizer(tokenizer).digest


def test_a_run_keeps_the_files_and_goes_on_with_them(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    small = [
        *SMALL_MODEL,
        "--train.eval-iters=1",
        "--train.batch-size=2",
        "--data.filepath=a.txt",
        "--data.document-mask",
    ]
    argv = ["train.py", *small, f"--data.tokenizer-model-path={tokenizer}", "--train.save-dir=run"]
    for steps in (2, 3):
        done = inside.run([*argv, f"--train.max-steps={steps}"], tmp_path)
        assert done.returncode == 0, done.stderr
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3" / "model"):
        assert (folder / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    model = llama_jax.load(str(tmp_path / "run"))
    assert model.tokenizer.digest == Tokenizer(tokenizer).digest and model.args.vocab_size == 423
    done = inside.run(["-m", "llama_jax.evaluate", "--ckpt", "run", "--text", "a.txt"], tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["bits_per_byte"] > 0
    done = inside.run(
        ["train.py", *small, "--train.init-from=run", "--train.save-dir=tuned", "--train.max-steps=1"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert llama_jax.load(str(tmp_path / "tuned")).tokenizer.digest == Tokenizer(tokenizer).digest
