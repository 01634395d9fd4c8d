"""Token files of nanoGPT, llm.c and Megatron are read as they are, once their ids are known to fit the tokenizer."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import DataArgs
from llama_jax.data import Data, find_text, load_data, open_data
from llama_jax.data.batches import eval_batches, train_batches
from llama_jax.data.manifest import write_manifest
from llama_jax.data.origin import Origin
from llama_jax.data.pretokenized import open_pretokenized
from llama_jax.data.summary import held_out_text, remarks
from llama_jax.data.token_files import JoinedStream, TokenFile, cut_at, find_token_files
from llama_jax.errors import UserError
from llama_jax.tokenizer import Tokenizer

IDS = np.random.default_rng(0).integers(3, 390, 20_000)


def nano_gpt(path: Path, ids: np.ndarray) -> None:
    ids.astype(np.uint16).tofile(path)


def llm_c(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())


def megatron(path: Path, documents: list[np.ndarray], code: int = 8, dtype: str = "<u2") -> None:
    """Write ``path``.bin and ``path``.idx, as Megatron's builder does: a sequence for each document."""
    lengths = np.array([len(ids) for ids in documents], np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += lengths.tobytes() + pointers.tobytes() + np.arange(len(documents) + 1, dtype=np.int64).tobytes()
    path.with_name(path.name + ".idx").write_bytes(index)
    path.with_name(path.name + ".bin").write_bytes(b"".join(ids.astype(dtype).tobytes() for ids in documents))


def load(folder: Path, tokenizer: Tokenizer, filepath: Path, begun: bool = False, **options) -> Data:
    args = DataArgs(str(filepath), tokenizer_model_path=str(tokenizer.model_path), **options)
    run = folder / "run"
    return load_data(args, run / "tokens", run / "tokenizer.model", begun=begun)


def test_nano_gpts_folder_is_read_with_its_own_split(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    (tmp_path / "set").mkdir()
    nano_gpt(tmp_path / "set" / "train.bin", IDS[:18_000])
    nano_gpt(tmp_path / "set" / "val.bin", IDS[18_000:])
    (tmp_path / "set" / "meta.pkl").write_bytes(b"\x80\x04}.")
    data = load(tmp_path, small_tokenizer, tmp_path / "set")
    assert np.array_equal(data.tokens.train, IDS[:18_000]) and np.array_equal(data.tokens.eval, IDS[18_000:])
    assert np.array_equal(data.tokens.train[5:9], IDS[5:9]) and data.tokens.train[-1] == IDS[17_999]
    assert data.tokens.bits_per_byte(1.0) is None
    assert held_out_text(data.tokens.manifest) == "val.bin, as the token files have it"
    assert any("token files of nanoGPT" in line for line in remarks(data))
    args = DataArgs(str(tmp_path / "set"), tokenizer_model_path=str(small_tokenizer.model_path))
    other = open_data(args, tmp_path / "run" / "tokens", tmp_path / "run" / "tokenizer.model")
    assert other.tokens.manifest == data.tokens.manifest and np.array_equal(other.tokens.train, IDS[:18_000])
    assert sorted(p.name for p in (tmp_path / "run" / "tokens").iterdir()) == ["manifest.json"]


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")], ids=["GPT-2", "LLaMA 3"]
)
def test_llm_cs_shards_are_joined_in_order(
    tmp_path: Path, small_tokenizer: Tokenizer, magic: int, version: int, dtype: str
) -> None:
    for i in range(3):
        llm_c(tmp_path / f"web_train_{i:06}.bin", IDS[i * 5000 : (i + 1) * 5000], magic, version, dtype)
    llm_c(tmp_path / "web_val_000000.bin", IDS[15_000:], magic, version, dtype)
    for filepath in (tmp_path, tmp_path / "web_*.bin"):
        data = load(tmp_path / "at", small_tokenizer, filepath)
        assert np.array_equal(data.tokens.train, IDS[:15_000]) and np.array_equal(data.tokens.eval, IDS[15_000:])
        shutil.rmtree(tmp_path / "at")
    one = load(tmp_path, small_tokenizer, tmp_path / "web_train_000001.bin", train_size=0.8)
    assert np.array_equal(one.tokens.train, IDS[5000:9000]) and np.array_equal(one.tokens.eval, IDS[9000:10_000])
    own = load(
        tmp_path / "own",
        small_tokenizer,
        tmp_path / "web_train_*.bin",
        eval_filepath=str(tmp_path / "web_val_000000.bin"),
    )
    assert np.array_equal(own.tokens.eval, IDS[15_000:]) and own.tokens.train.size == 15_000


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4")], ids=["uint16", "int32"])
@pytest.mark.parametrize("name", ["my", "my.bin", "my.idx"])
def test_megatrons_documents_are_those_of_its_index_and_the_cut_is_between_them(
    tmp_path: Path, small_tokenizer: Tokenizer, code: int, dtype: str, name: str
) -> None:
    documents = np.split(IDS, [7000, 9000, 17_000, 19_500])
    megatron(tmp_path / "my", documents, code, dtype)
    data = load(tmp_path, small_tokenizer, tmp_path / name)
    assert np.array_equal(data.tokens.train, IDS[:17_000]) and np.array_equal(data.tokens.eval, IDS[17_000:])
    assert data.tokens.manifest.documents == {"train": 3, "eval": 2}
    assert np.array_equal(data.tokens.train.starts, [0, 7000, 9000])  # type: ignore[attr-defined]
    assert np.array_equal(data.tokens.eval.starts, [0, 2500])  # type: ignore[attr-defined]
    batch = next(train_batches(data.tokens.train, 4, 32, 0, 0, 1))
    assert np.array_equal(batch.inputs, next(train_batches(IDS[:17_000].astype(np.uint16), 4, 32, 0, 0, 1)).inputs)
    held_out = np.concatenate([b.targets.ravel() for b in eval_batches(data.tokens.eval, 4, 500)])
    assert np.array_equal(held_out[: 3000 - 1], IDS[17_001:])


def test_ids_outside_the_vocabulary_and_no_tokenizer_are_refused(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    nano_gpt(tmp_path / "a.bin", np.append(IDS, small_tokenizer.vocab_size))
    with pytest.raises(
        UserError, match=r"data\.tokenizer_model_path: expected the tokenizer of .*a\.bin, found ids from 0 to 400"
    ):
        load(tmp_path, small_tokenizer, tmp_path / "a.bin")
    assert not (tmp_path / "run" / "tokens" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"data\.tokenizer_model_path: expected the tokenizer of the token files"):
        load_data(DataArgs(str(tmp_path / "a.bin")), tmp_path / "t", tmp_path / "t.model")
    with pytest.raises(UserError, match=r"data\.separator: expected none"):
        load(tmp_path, small_tokenizer, tmp_path / "a.bin", separator="x")


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_ids_of_four_or_eight_bytes_are_not_taken_for_nano_gpts(
    tmp_path: Path, llama2_tokenizer: Tokenizer, dtype: str
) -> None:
    (tmp_path / "a.bin").write_bytes(IDS.astype(dtype).tobytes())
    with pytest.raises(
        UserError, match="expected ids of two bytes, as nanoGPT writes them, found ids of four or eight"
    ):
        load(tmp_path, llama2_tokenizer, tmp_path / "a.bin")


def test_damaged_headers_and_indexes_are_named(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    llm_c(tmp_path / "a.bin", IDS)
    content = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(content[:-100])
    with pytest.raises(
        UserError, match=r"a\.bin: expected a token file of llm\.c .* found version 1 and 20,000 tokens"
    ):
        load(tmp_path, small_tokenizer, tmp_path / "a.bin")
    megatron(tmp_path / "b", [IDS[:50], IDS[50:]])
    index = (tmp_path / "b.idx").read_bytes()
    for damaged, words in (
        (index[:40], r"b\.idx: expected Megatron's index, found it cut"),
        (index[:9] + b"\2" + index[10:], "of version 1, found version 2"),
        (index[:17] + b"\6" + index[18:], "expected the code of an integer type, found 6"),
    ):
        (tmp_path / "b.idx").write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            load(tmp_path, small_tokenizer, tmp_path / "b")
    (tmp_path / "b.idx").write_bytes(index)
    (tmp_path / "b.bin").write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"b\.bin: expected the 20,000 tokens of its index"):
        load(tmp_path, small_tokenizer, tmp_path / "b")


def test_ids_of_one_byte_are_not_taken_for_nano_gpts(tmp_path: Path, llama2_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.bin").write_bytes(np.random.default_rng(0).integers(0, 65, 5000).astype("u1").tobytes())
    with pytest.raises(UserError, match="expected ids of two bytes, as nanoGPT writes them, found ids of one"):
        load(tmp_path, llama2_tokenizer, tmp_path / "a.bin")
    nano_gpt(tmp_path / "a.bin", np.random.default_rng(0).integers(0, 65, 5000))
    assert load(tmp_path, llama2_tokenizer, tmp_path / "a.bin").tokens.train.size == 4500


def test_a_file_of_nothing_but_zeros_is_no_token_file(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    nano_gpt(tmp_path / "a.bin", np.zeros(5000))
    with pytest.raises(UserError, match="expected token ids, found nothing but 0"):
        load(tmp_path, small_tokenizer, tmp_path / "a.bin")


def test_a_file_that_is_named_for_it_is_held_out_whatever_the_others_are_named(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    (tmp_path / "set").mkdir()
    nano_gpt(tmp_path / "set" / "a.bin", IDS[:18_000])
    nano_gpt(tmp_path / "set" / "val.bin", IDS[18_000:])
    data = load(tmp_path / "new", small_tokenizer, tmp_path / "set")
    assert np.array_equal(data.tokens.train, IDS[:18_000]) and np.array_equal(data.tokens.eval, IDS[18_000:])
    # A run of an earlier version held out the last tenth of both, and goes on so.
    args = DataArgs(str(tmp_path / "set"), tokenizer_model_path=str(small_tokenizer.model_path))
    earlier = Origin(held_out="end", tokens={"train": 18_000, "eval": 2_000})
    before = open_pretokenized(args, find_token_files(str(tmp_path / "set")), begun=earlier)
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    write_manifest(tmp_path / "run" / "tokens", before.manifest)
    again = load(tmp_path, small_tokenizer, tmp_path / "set", begun=True)
    assert again.tokens.manifest == before.manifest and np.array_equal(again.tokens.train, IDS[:18_000])
    assert again.tokens.train.size == 18_000 and again.tokens.manifest.held_out == "end"
    other = open_data(args, tmp_path / "run" / "tokens", tmp_path / "run" / "tokenizer.model")
    assert other.tokens.manifest == before.manifest


def test_files_that_are_named_for_it_are_not_trained_on_beside_a_held_out_file_either(
    tmp_path: Path, small_tokenizer: Tokenizer
) -> None:
    (tmp_path / "set").mkdir()
    for name, ids in {"train": IDS[:16_000], "val": IDS[16_000:18_000], "test": IDS[18_000:]}.items():
        nano_gpt(tmp_path / "set" / f"{name}.bin", ids)
    by_name = load(tmp_path / "by name", small_tokenizer, tmp_path / "set")
    given = load(tmp_path / "new", small_tokenizer, tmp_path / "set", eval_filepath=str(tmp_path / "set" / "val.bin"))
    for data, unread in ((by_name, "1 (test.bin)"), (given, "1 (test.bin)")):
        assert np.array_equal(data.tokens.train, IDS[:16_000]) and np.array_equal(data.tokens.eval, IDS[16_000:18_000])
        assert f"not read, as their names say that they are held out: {unread}" in "\n".join(data.notes)
    # A run of an earlier version trained on all three, and goes on so, which is told.
    args = DataArgs(
        str(tmp_path / "set"),
        tokenizer_model_path=str(small_tokenizer.model_path),
        eval_filepath=str(tmp_path / "set" / "val.bin"),
    )
    earlier = Origin(held_out="own", tokens={"train": 20_000, "eval": 2_000})
    before = open_pretokenized(args, find_token_files(args.filepath), begun=earlier)
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    write_manifest(tmp_path / "run" / "tokens", before.manifest)
    again = load(tmp_path, small_tokenizer, tmp_path / "set", begun=True, eval_filepath=args.eval_filepath)
    assert again.tokens.train.size == 20_000 and "also trained on" in "\n".join(again.notes)


def test_what_describes_token_files_is_not_read_in_their_place(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    nano_gpt(tmp_path / "train.bin", IDS)
    (tmp_path / "README.txt").write_text("Tokens of the fox's tales.")
    assert load(tmp_path / "new", small_tokenizer, tmp_path).tokens.train.size == 18_000
    with pytest.raises(UserError, match=r"found token files without manifest\.json"):
        find_text(DataArgs(str(tmp_path)), tmp_path)


def test_another_file_beside_token_files_is_named(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    nano_gpt(tmp_path / "train.bin", IDS)
    (tmp_path / "weights.bin").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(UserError, match=r"weights\.bin: expected token files alone, as train\.bin of nanoGPT is one"):
        load(tmp_path / "new", small_tokenizer, tmp_path)


def test_a_run_that_has_begun_keeps_its_token_files(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    nano_gpt(tmp_path / "a.bin", IDS)
    first = load(tmp_path, small_tokenizer, tmp_path / "a.bin")
    again = load(tmp_path, small_tokenizer, tmp_path / "a.bin", begun=True)
    assert again.tokens.manifest == first.tokens.manifest
    nano_gpt(tmp_path / "a.bin", IDS[::-1])
    with pytest.raises(UserError, match=r"data\.filepath: expected .* that the run began with"):
        load(tmp_path, small_tokenizer, tmp_path / "a.bin", begun=True)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    share=st.floats(0, 1),
    reads=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 45)), max_size=9),
)
def test_joined_files_read_as_one_array(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], share: float, reads: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = np.arange(sum(sizes), dtype=np.uint16)
    files = []
    for i, ids in enumerate(np.split(whole, np.cumsum(sizes)[:-1])):
        nano_gpt(folder / f"{i}.bin", ids)
        files.append(TokenFile(folder / f"{i}.bin", "nanoGPT", np.dtype("<u2"), 0, len(ids)))
    first, second = cut_at(files, share)
    assert np.array_equal(np.concatenate([first, second]), whole) and len(first) == int(len(whole) * share)
    joined = JoinedStream([(file, 0, file.count) for file in files])
    for start, stop in reads:
        assert np.array_equal(joined[start:stop], whole[start:stop])


def test_the_beginning_is_shown_as_text_so_that_a_wrong_tokenizer_is_seen(
    tmp_path, small_tokenizer, llama2_tokenizer
) -> None:
    text = "Once upon a time the fox went to the river, and the owl said it saw the fox. " * 40
    nano_gpt(tmp_path / "a.bin", np.array(small_tokenizer.encode(text)))
    right = load(tmp_path / "1", small_tokenizer, tmp_path / "a.bin")
    wrong = load(tmp_path / "2", llama2_tokenizer, tmp_path / "a.bin")
    shown = [
        line for data in (right, wrong) for line in remarks(data) if "with this tokenizer, its text begins" in line
    ]
    assert [text[:20] in line for line in shown] == [True, False]


def test_in_a_folder_with_texts_or_records_these_are_read_and_not_token_files(tmp_path, small_tokenizer) -> None:
    nano_gpt(tmp_path / "index.bin", IDS)
    assert find_token_files(str(tmp_path))
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    assert not find_token_files(str(tmp_path))
