"""A token file slices as an array, is checked before it is used, and never ends the process, whatever happens to the file."""

import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data import stream as stream_module
from llama_jax.data.batches import eval_batches, train_batches
from llama_jax.data.stream import BLOCK_BYTES, Shard, TokenStream, check_in_background, checksums
from llama_jax.data.tokens import spread
from llama_jax.errors import UserError

VOCABULARY = 1000


def write(folder: Path, tokens: np.ndarray, checked: bool = True) -> TokenStream:
    path = folder / "train.bin"
    path.write_bytes(tokens.tobytes())
    sums = np.array(checksums(tokens.tobytes()), "<u4") if checked else None
    return TokenStream([Shard(path, len(tokens))], tokens.dtype, VOCABULARY, sums)


def tokens_of(count: int, dtype: str = "<u2") -> np.ndarray:
    return np.random.default_rng(count).integers(0, VOCABULARY, count).astype(dtype)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module", params=["<u2", "<u4"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStream, np.ndarray]:
    """A stream of several blocks, and the array that it stands for."""
    array = tokens_of(3 * BLOCK_BYTES + 77, request.param)
    return write(tmp_path_factory.mktemp("stream"), array), array


@settings(max_examples=200)
@given(data=st.data())
def test_it_slices_as_an_array(both: tuple[TokenStream, np.ndarray], data: st.DataObject) -> None:
    stream, array = both
    index = data.draw(st.slices(len(array)) | st.integers(-len(array), len(array) - 1))
    found, wanted = stream[index], array[index]
    assert np.array_equal(found, wanted) and found.dtype == wanted.dtype and np.shape(found) == np.shape(wanted)


def test_all_else_that_arrays_do_it_does_too(both: tuple[TokenStream, np.ndarray]) -> None:
    stream, array = both
    assert (len(stream), stream.size, stream.shape, stream.ndim, stream.dtype) == (
        len(array), array.size, array.shape, 1, array.dtype,
    )  # fmt: skip
    assert np.array_equal(stream, array) and np.array_equal(stream == 5, array == 5)
    assert np.array_equal(stream[[3, 1, -1]], array[[3, 1, -1]]) and np.array_equal(
        stream[array > 900], array[array > 900]
    )
    assert np.array_equal(np.take(stream, [[1], [2]]), np.take(array, [[1], [2]]))
    assert [part.tolist() for part in np.split(stream, [10, 20])[:2]] == [array[:10].tolist(), array[10:20].tolist()]
    assert stream.max() == array.max() and stream.tolist() == array.tolist() and stream.mean() == array.mean()
    assert list(itertools.islice(stream, 5)) == array[:5].tolist()
    assert np.array_equal(stream + 1, array + 1) and stream.astype(np.int32).dtype == np.int32
    with pytest.raises(IndexError):
        stream[len(array)]
    with pytest.raises(AttributeError):
        stream.nothing_of_the_kind  # noqa: B018
    for part in (stream[:5], np.asarray(stream)):
        with pytest.raises(ValueError, match="read-only"):
            part[0] = 1


def test_an_empty_file_is_an_empty_array(tmp_path: Path) -> None:
    stream = write(tmp_path, tokens_of(0))
    assert len(stream) == 0 and stream[:5].tolist() == [] and np.asarray(stream).dtype == np.dtype("<u2")


@settings(max_examples=40)
@given(count=st.integers(2, 400), batch_size=st.integers(1, 4), length=st.integers(1, 50), seed=st.integers(0, 9))
def test_batches_of_a_file_are_those_of_the_array(
    tmp_path_factory: pytest.TempPathFactory, count: int, batch_size: int, length: int, seed: int
) -> None:
    array = tokens_of(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "BLOCK_BYTES", 64)
        stream = write(tmp_path_factory.getbasetemp(), array)
        for batches in (
            lambda tokens: train_batches(tokens, batch_size, length, seed, 0, 3),
            lambda tokens: eval_batches(tokens, batch_size, length, 2),
        ):
            for found, wanted in zip(batches(stream), batches(array), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_flipped_bit_is_found_by_every_way_to_read_it_and_the_rest_is_read(tmp_path: Path) -> None:
    array = tokens_of(4 * BLOCK_BYTES)
    place = 5 * BLOCK_BYTES // 4  # in the third block of eight
    for read in (
        lambda stream: stream[place - 3 : place + 3],
        lambda stream: stream[place],
        lambda stream: stream[:],
        lambda stream: stream[::2],
        lambda stream: np.asarray(stream),
        lambda stream: stream == 3,
        lambda stream: stream.max(),
        lambda stream: list(stream),
    ):
        stream = write(tmp_path, array)
        flip(stream.path, 2 * place)
        assert np.array_equal(stream[: BLOCK_BYTES // 2], array[: BLOCK_BYTES // 2])
        for _ in range(2):
            with pytest.raises(
                UserError, match=r"train\.bin: expected the tokens that were written, found bytes 131,072 to"
            ):
                read(stream)
        with pytest.raises(UserError, match=r"train\.bin"):  # damage once found is never passed over
            stream[:5]


def test_no_batch_holds_a_damaged_block(tmp_path: Path) -> None:
    array = tokens_of(2 * BLOCK_BYTES)
    stream = write(tmp_path, array)
    flip(stream.path, 3 * BLOCK_BYTES + 5)
    read = 0
    with pytest.raises(UserError, match=r"train\.bin: expected the tokens that were written"):
        for batch in train_batches(stream, 4, 64, 0, 0, 10_000):
            read += 1
            assert batch.inputs.max() < VOCABULARY
    assert read < 600  # an epoch


def test_the_background_finds_damage_that_no_batch_has_read(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    train, held_out = write(tmp_path, tokens_of(2 * BLOCK_BYTES)), write(tmp_path / "eval", tokens_of(2 * BLOCK_BYTES))
    flip(held_out.path, 3 * BLOCK_BYTES)
    assert len(train[:9]) == 9
    check_in_background([train, held_out], share=1.0).join(60)
    for stream in (train, held_out):
        with pytest.raises(UserError, match=r"eval/train\.bin: expected the tokens"):
            stream[:9]


def test_the_background_checks_each_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = write(tmp_path, tokens_of(4 * BLOCK_BYTES))
    check_in_background([stream], share=1.0).join(60)
    monkeypatch.setattr(stream_module.zlib, "crc32", None)  # whoever checks now, fails
    assert len(stream[:]) == 4 * BLOCK_BYTES


def test_an_id_beyond_the_vocabulary_is_an_error_though_its_checksum_is_right(tmp_path: Path) -> None:
    array = tokens_of(2 * BLOCK_BYTES)
    array[BLOCK_BYTES] = VOCABULARY
    stream = write(tmp_path, array)
    assert len(stream[:100]) == 100
    with pytest.raises(UserError, match=r"train\.bin: expected ids below the vocabulary's 1,000, found 1,000"):
        stream[BLOCK_BYTES : BLOCK_BYTES + 5]


def test_a_file_without_checksums_is_read_as_it_is(tmp_path: Path) -> None:
    array = tokens_of(1000)
    stream = write(tmp_path, array, checked=False)
    assert stream.blocks == 0 and np.array_equal(stream[:], array)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    for checked in (True, False):
        stream = write(tmp_path, tokens_of(2 * BLOCK_BYTES), checked)
        assert len(stream[:]) == 2 * BLOCK_BYTES
        os.truncate(stream.path, BLOCK_BYTES)
        assert len(stream[:9]) == 9
        for read in (lambda stream: stream[BLOCK_BYTES:], lambda stream: stream[-1]):
            with pytest.raises(UserError, match=r"train\.bin: expected 262,144 bytes, found it cut to 65,536"):
                read(stream)


def test_a_disk_that_fails_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = write(tmp_path, tokens_of(100))

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(stream_module.os, "pread", fail)
    with pytest.raises(UserError, match=r"train\.bin: expected tokens that can be read, found: Input/output error"):
        stream[:9]


def test_a_file_that_is_replaced_while_it_is_read_stays_the_old_one(tmp_path: Path) -> None:
    array = tokens_of(1000)
    stream = write(tmp_path, array)
    (tmp_path / "new").write_bytes(bytes(2000))
    os.replace(tmp_path / "new", stream.path)
    assert np.array_equal(stream[:], array)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 1000, 12_345])
def test_blocks_are_checked_each_once_and_far_from_each_other(count: int) -> None:
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    if count >= 1000:  # of the first hundred, none leaves a gap much larger than a hundredth
        first = np.sort(order[:100])
        assert np.diff([0, *first, count]).max() < 4 * count / 100
