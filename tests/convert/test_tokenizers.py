"""Models with tokenizers of other kinds and with rows of more tokens: converted, loaded, and written as they came."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax.config import ModelArgs, SampleArgs
from llama_jax.convert.layout import all_tensors
from llama_jax.convert.safetensors import SafetensorsWriter
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer
from tests.convert.test_convert import ARGS, random_weights, run, write_meta_folder
from tests.tokenizers.made import BOS, CONFIG, EOS, LLAMA2, Table, bytewise, put, spaced
from tests.tokenizers.test_files import with_pad
from tests.tokenizers.test_llama3 import rank_file


def write_model(folder: Path, rows: int) -> ModelArgs:
    """A random model in Hugging Face's layout, without a tokenizer."""
    args = dataclasses.replace(ARGS, n_layers=1, vocab_size=rows)
    weights = random_weights(args, np.dtype("<f4"))
    named = {t.huggingface.format(layer): weights[t.meta.format(layer)] for t, layer in all_tensors(args)}
    shapes = {name: w.shape for name, w in named.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(folder / "model.safetensors", np.dtype("<f4"), shapes) as writer:
        for w in named.values():
            writer.write(w)
    config = {
        "model_type": "llama", "hidden_size": args.dim, "intermediate_size": args.hidden_width, "num_hidden_layers": 1,
        "num_attention_heads": args.n_heads, "num_key_value_heads": args.kv_heads, "vocab_size": rows, "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": 128, "hidden_act": "silu", "rope_theta": args.rope_theta,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return args


def files_in(folder: Path) -> dict[str, bytes]:
    names = ("tokenizer", "special_tokens", "added_tokens")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(names)}


def kinds(small: Tokenizer) -> dict[str, tuple[dict[str, Any], bytes | None, int]]:
    """Files in JSON, tokenizer.model, and the number of tokens, by what they are."""
    return {
        "byte-level": ({"tokenizer": bytewise(), "tokenizer_config": CONFIG}, None, 423),
        "with spaces": ({"tokenizer": spaced(small, "first"), "tokenizer_config": LLAMA2}, None, 400),
        "both files": ({"tokenizer": spaced(small), "tokenizer_config": LLAMA2}, small.model_bytes, 400),
        "a fine-tune's": ({"tokenizer": with_pad(spaced(small)), "tokenizer_config": LLAMA2}, small.model_bytes, 401),
        "added_tokens.json": ({"added_tokens": {"[PAD]": 400}, "special_tokens_map": {"pad_token": "[PAD]"}}, small.model_bytes, 401),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["byte-level", "with spaces", "both files", "a fine-tune's", "added_tokens.json"])
@pytest.mark.parametrize("padding", [0, 25])
def test_a_tokenizer_of_any_kind_is_kept_and_written_byte_for_byte(
    kind: str, padding: int, small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables, model, tokens = kinds(small_tokenizer)[kind]
    source = tmp_path / "source"
    write_model(source, tokens + padding)
    put(source, None, **tables)
    if model is not None:
        (source / "tokenizer.model").write_bytes(model)
    run(input=source, output=tmp_path / "ours")
    told = capsys.readouterr().out
    assert (f"{padding} of the model's {tokens + padding} rows have no token" in told) == bool(padding)
    loaded = llama_jax.load(str(tmp_path / "ours"))
    direct = Tokenizer(source)
    assert loaded.tokenizer.digest == direct.digest and loaded.tokenizer.vocab_size == tokens
    for text in ("the fox", "[PAD]<s> Où?"):
        assert loaded.tokenizer.encode(text) == direct.encode(text)
    found = loaded.generate(["the fox"], SampleArgs(temperature=2.0, top_p=1.0, max_new_tokens=30))
    assert max(found[0].token_ids) < tokens
    run(input=tmp_path / "ours", output=tmp_path / "back", to="huggingface")
    assert files_in(tmp_path / "back") == files_in(source)
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > 0
    run(input=tmp_path / "ours", output=tmp_path / "meta", to="meta")
    expected = {"tokenizer.model"} if model is not None else {*files_in(source)}
    assert {*files_in(tmp_path / "meta")} == expected
    assert ("there is no tokenizer.model" in capsys.readouterr().out) == (model is None)
    run(input=tmp_path / "meta", output=tmp_path / "again")


def test_fewer_rows_than_tokens(small_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An added token without a row is text; a model that lacks rows of others has another tokenizer."""
    write_model(tmp_path / "a", 400)
    put(tmp_path / "a", with_pad(spaced(small_tokenizer)), LLAMA2)
    run(input=tmp_path / "a", output=tmp_path / "ours")
    assert "('[PAD]') without a row in the model: it is text" in capsys.readouterr().out
    loaded = llama_jax.load(str(tmp_path / "ours"))
    assert loaded.tokenizer.vocab_size == 400 and "[PAD]" not in loaded.tokenizer.specials
    assert loaded.generate(["a [PAD] b"], SampleArgs(max_new_tokens=2))
    write_model(tmp_path / "b", 390)
    put(tmp_path / "b", spaced(small_tokenizer), LLAMA2)
    with pytest.raises(UserError, match=r"expected up to 390 tokens, one per row of the model's embeddings, found 400"):
        run(input=tmp_path / "b", output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_metas_file_of_llama_3_is_kept_and_written_for_transformers(tmp_path: Path) -> None:
    table: Table = bytewise()
    rows = len(table["model"]["vocab"]) + 256
    args = dataclasses.replace(ARGS, vocab_size=rows)
    weights = random_weights(args, np.dtype("<f4"))
    (tmp_path / "tokenizer.model").write_bytes(rank_file(table))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.vocab_size == rows and [tokenizer.piece(i) for i in (420, 421)] == [BOS, EOS]
    source = write_meta_folder(tmp_path / "source", args, weights, 1, tokenizer)
    run(input=source, output=tmp_path / "ours")
    loaded = llama_jax.load(str(tmp_path / "ours"))
    assert (
        loaded.tokenizer.files == {"tokenizer.model": rank_file(table)} and loaded.tokenizer.digest == tokenizer.digest
    )
    run(input=tmp_path / "ours", output=tmp_path / "back", to="meta")
    assert files_in(tmp_path / "back") == files_in(source)
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="huggingface")
    again = Tokenizer(tmp_path / "hf")
    assert (again.bos_id, again.eos_id, again.adds_bos) == (420, 421, True)
    for text in ("the fox <|eot_id|>", "Où est le hibou?\n\n 12345"):
        for asked in (True, False):
            assert again.encode(text, specials=asked) == tokenizer.encode(text, specials=asked)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("the fox <|eot_id|>")["input_ids"] == tokenizer.encode("the fox <|eot_id|>", specials=True)
    run(input=tmp_path / "hf", output=tmp_path / "ours2")
    assert llama_jax.load(str(tmp_path / "ours2")).tokenizer.encode("a fox") == tokenizer.encode("a fox")


def test_the_flag_takes_any_kind(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_model(tmp_path / "model", 423)
    put(tmp_path / "elsewhere", bytewise(), CONFIG)
    for i, given in enumerate((tmp_path / "elsewhere", tmp_path / "elsewhere" / "tokenizer.json")):
        run(input=tmp_path / "model", output=tmp_path / f"out{i}", tokenizer=given)
        assert llama_jax.load(str(tmp_path / f"out{i}")).tokenizer.vocab_size == 423
