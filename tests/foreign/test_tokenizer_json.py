"""tokenizer.json as it is exported: it encodes as SentencePiece does on every text, or it is not written, and that is said."""

import io
import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.convert import ConvertArgs, convert
from llama_jax.foreign import tokenizer_json
from llama_jax.foreign.tokenizer_json import HARD_TEXTS, Reader
from llama_jax.foreign.tokenizer_json import tokenizer_json as table_of
from llama_jax.foreign.vocabulary import difference
from llama_jax.sentencepiece_settings import Settings, piece_types
from llama_jax.tokenizer import PART_CHARS, Tokenizer
from tests.conftest import TEXT
from tests.convert.test_convert import BFLOAT16, random_weights, write_meta_folder
from tests.foreign.test_layouts import ARGS

LLAMA2 = {
    "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "split_digits": True, "add_dummy_prefix": True,
    "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "allow_whitespace_only_pieces": True,
    "hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2,
}  # fmt: skip
MORE = (
    TEXT
    + "aaa ab aab abab\n  indented    text\n日本語の文章です。これは\nلغة عربية\n🦊🦊 é e\u0301\ntab\tand\ttab\n<s> [INST]\n"
)
WRITTEN: dict[str, dict[str, Any]] = {
    "as LLaMA 2": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "collapsed spaces": {"remove_extra_whitespaces": True},
    "collapsed spaces, no prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False, "vocab_size": 150, "character_coverage": 0.98},
    "control symbols": {"control_symbols": ["<mask>", "[INST]"]},
    "words and numbers": {"split_by_unicode_script": False, "split_by_number": False, "split_digits": False},
    "another unknown": {"unk_surface": "?", "unk_piece": "[UNK]", "pad_id": 3},
    "every character": {"character_coverage": 1.0, "max_sentencepiece_length": 4},
}  # fmt: skip
NOT_WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model_type": "unigram"}, "no BPE model"),
    "characters": ({"model_type": "char"}, "no BPE model"),
    "words": ({"model_type": "word", "byte_fallback": False, "vocab_size": 40}, "no BPE model"),
    "nmt_nfkc": ({"normalization_rule_name": "nmt_nfkc"}, "normalizes characters"),
    "nfkc_cf": ({"normalization_rule_name": "nfkc_cf"}, "normalizes characters"),
    "spaces behind": ({"treat_whitespace_as_suffix": True}, "behind words"),
    "user-defined symbols": ({"user_defined_symbols": ["<fox>", "river"]}, "user-defined"),
    "pieces across spaces": ({"split_by_whitespace": False}, "across spaces"),
    "a control of one character": ({"control_symbols": ["~"]}, "single character"),
}  # fmt: skip


@cache
def model(options: str) -> bytes:
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(MORE.splitlines() * 3), model_writer=file, **LLAMA2 | json.loads(options)
    )
    return file.getvalue()


def trained(options: dict[str, Any], folder: Path) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model(json.dumps(options)))
    return Tokenizer(folder / "tokenizer.model")


def texts(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    pieces = st.sampled_from([tokenizer.piece(i) for i in range(tokenizer.vocab_size)])
    joined = st.lists(pieces, max_size=12).map("".join)
    return st.one_of(
        st.sampled_from(HARD_TEXTS),
        joined,
        joined.map(lambda text: text.replace("\u2581", " ")),
        st.text("ab ", max_size=40),
        st.text("a \t\n\r\0\u2581\u00a0é🦊0", max_size=20),
        st.text(max_size=20),
    )


@pytest.mark.parametrize("name", WRITTEN)
def test_the_library_encodes_as_sentencepiece_on_every_text(name: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = trained(WRITTEN[name], tmp_path)
    table, reason = table_of(tokenizer)
    assert table is not None and not reason
    library, reader = tokenizers.Tokenizer.from_str(json.dumps(table)), Reader(table)

    @settings(max_examples=150, suppress_health_check=list(HealthCheck), database=None)
    @given(texts(tokenizer))
    def check(text: str) -> None:
        expected = tokenizer.encode(text, bos=False)
        assert library.encode(text, add_special_tokens=False).ids == expected
        assert reader.encode(text) == expected
        assert library.encode(text).ids == [tokenizer.bos_id, *expected]
        if tokenizer.unk_id not in expected:
            assert library.decode(expected) == tokenizer.decode(expected)

    check()


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "model_type": st.sampled_from(["bpe", "bpe", "bpe", "unigram", "char"]),
        "vocab_size": st.sampled_from([290, 330, 500]),
        "byte_fallback": st.booleans(),
        "add_dummy_prefix": st.booleans(),
        "remove_extra_whitespaces": st.booleans(),
        "normalization_rule_name": st.sampled_from(["identity", "identity", "nfkc", "nmt_nfkc_cf"]),
        "allow_whitespace_only_pieces": st.booleans(),
        "split_digits": st.booleans(),
        "split_by_whitespace": st.booleans(),
        "split_by_unicode_script": st.booleans(),
        "treat_whitespace_as_suffix": st.booleans(),
        "character_coverage": st.sampled_from([1.0, 0.98]),
        "max_sentencepiece_length": st.sampled_from([2, 16]),
        "control_symbols": st.sampled_from([[], ["<mask>"]]),
        "user_defined_symbols": st.sampled_from([[], [], ["fox"]]),
    },
)


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(OPTIONS, st.randoms(use_true_random=False))
def test_whatever_the_options_what_is_written_is_sentencepiece_s(options: dict[str, Any], rng: random.Random) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    try:
        raw = model(json.dumps(options))
    except RuntimeError:  # a vocabulary that is too small or too large for these
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(raw)
        tokenizer = Tokenizer(Path(folder) / "tokenizer.model")
    table, reason = table_of(tokenizer)
    assert (table is None) == bool(reason)
    if table is None:
        return
    library = tokenizers.Tokenizer.from_str(json.dumps(table))
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    parts = [
        *pieces,
        *(piece.replace("\u2581", " ") for piece in pieces),
        " ",
        "  ",
        "\n",
        "\t",
        "\0",
        "é",
        "ﬁ",
        "🦊",
        "\u3000",
    ]
    for text in (*HARD_TEXTS, *("".join(rng.choices(parts, k=rng.randrange(1, 15))) for _ in range(200))):
        assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, bos=False), text


@pytest.mark.parametrize("name", ["as LLaMA 2", "no dummy prefix", "collapsed spaces", "no bytes"])
def test_long_texts_which_are_encoded_in_parts_are_the_librarys_too(name: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = trained(WRITTEN[name], tmp_path)
    library = tokenizers.Tokenizer.from_str(json.dumps(table_of(tokenizer)[0]))
    rng = random.Random(0)
    pieces = [tokenizer.piece(i).replace("\u2581", " ") for i in range(tokenizer.vocab_size) if tokenizer.is_text(i)]
    text = "".join(rng.choice([*pieces, " ", "\n", "\n\n  ", "é", "🦊"]) for _ in range(40_000))
    assert len(text) > 2 * PART_CHARS
    assert library.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, bos=False)


@pytest.mark.parametrize("name", NOT_WRITTEN)
def test_settings_that_are_not_proven_are_not_written(name: str, tmp_path: Path) -> None:
    options, words = NOT_WRITTEN[name]
    table, reason = table_of(trained(options, tmp_path))
    assert table is None and words in reason


def test_a_table_that_reads_a_hard_text_otherwise_is_not_written(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = tokenizer_json.merges
    monkeypatch.setattr(tokenizer_json, "merges", lambda tokenizer: merges(tokenizer)[::-1])
    table, reason = table_of(small_tokenizer)
    assert table is None and "differently" in reason


def export(tokenizer: Tokenizer, folder: Path) -> Path:
    import dataclasses

    args = dataclasses.replace(ARGS, vocab_size=tokenizer.vocab_size)
    source = write_meta_folder(folder / "meta", args, random_weights(args, BFLOAT16), 1, tokenizer)
    convert(ConvertArgs(input=str(source), output=str(folder / "hf"), to="huggingface"))
    return folder / "hf"


@pytest.mark.parametrize("name", ["as LLaMA 2", "no dummy prefix", "collapsed spaces"])
def test_transformers_encodes_what_is_exported_as_ours_special_pieces_too(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(WRITTEN[name], tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(export(tokenizer, tmp_path))
    for text in (*HARD_TEXTS, *MORE.splitlines()):
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
    ids = [*tokenizer.encode("Once upon a time"), tokenizer.eos_id]
    assert theirs.decode(ids, skip_special_tokens=True) == "Once upon a time"
    assert theirs("<s>", split_special_tokens=False)["input_ids"][1:] == [tokenizer.bos_id]


def test_what_is_not_written_is_said_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(trained({"model_type": "unigram"}, tmp_path), tmp_path)
    assert not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "warning" in last and "tokenizer.json is not written" in last and "no BPE model" in last


def test_settings_are_those_of_the_models_own_protocol_buffer(tmp_path: Path) -> None:
    protocol = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf")
    for options in (*WRITTEN.values(), *(options for options, _ in NOT_WRITTEN.values())):
        raw = model(json.dumps(options))
        found, expected = Settings.of(raw), protocol.ModelProto.FromString(raw)
        assert (found.model_type, found.byte_fallback) == (
            expected.trainer_spec.model_type,
            expected.trainer_spec.byte_fallback,
        )
        assert found.suffix == expected.trainer_spec.treat_whitespace_as_suffix
        spec = expected.normalizer_spec
        assert (found.dummy_prefix, found.collapse, found.escape) == (
            spec.add_dummy_prefix, spec.remove_extra_whitespaces, spec.escape_whitespaces,
        )  # fmt: skip
        assert found.charsmap == bool(spec.precompiled_charsmap)
        assert piece_types(raw) == {piece.type for piece in expected.pieces}


def test_llama_2s_own_is_written_and_is_what_transformers_makes_of_it(
    llama2_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    table, _ = table_of(llama2_tokenizer)
    assert table is not None and difference(table, llama2_tokenizer) == ("", "")
    (tmp_path / "tokenizer.model").write_bytes(llama2_tokenizer.model_bytes)
    transformers.LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    made = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert difference(made, llama2_tokenizer) == ("", "")
