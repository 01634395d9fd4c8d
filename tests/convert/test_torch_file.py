"""The reader of torch's files: what good tools write loads, all else is refused, nothing in a file is ever run."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llama_jax.convert.torch_file import TorchFile, TorchFileWriter
from llama_jax.errors import UserError
from tests.commands import PEAK, ROOT
from tests.convert.crafted import FLOATS, Zip, members, pickle_of, save, storage, tensor
from tests.convert.hostile import HOSTILE

EXPECTED = np.arange(6, dtype=np.float32).reshape(2, 3)


def read_all(path: Path) -> dict[str, np.ndarray]:
    with TorchFile.open(path) as file:
        return {name: np.array(file.read(name)) for name in file.tensors}


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    found = read_all(save(tmp_path / "x.pth", Zip(members())))
    assert list(found) == ["w"]
    np.testing.assert_array_equal(found["w"], EXPECTED)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_that_says_why(name: str, tmp_path: Path, capfd) -> None:
    build, words = HOSTILE[name]
    path = save(tmp_path / "x.pth", build())
    with pytest.raises(UserError) as refused:
        read_all(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and words in message, message
    assert message.isprintable() and len(message) < 500 and "; " in message, "what to do is said"
    assert capfd.readouterr() == ("", ""), "nothing was run"
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_over_a_hundred_tricks_are_known() -> None:
    assert len(HOSTILE) > 150


READ_ALL = f"""{PEAK}
import sys
from pathlib import Path
from llama_jax.convert.torch_file import TorchFile
from llama_jax.errors import UserError

before, refused = peak(), 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        with TorchFile.open(path) as file:
            for name in file.tensors:
                file.read(name)
    except UserError:
        refused += 1
print(refused, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_hostile_files_take_little_memory(tmp_path: Path) -> None:
    for index, name in enumerate(HOSTILE):
        save(tmp_path / f"{index}.pth", HOSTILE[name][0]())
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    refused, megabytes = map(int, done.stdout.split())
    assert refused == len(HOSTILE) and megabytes < 300, done.stdout


def test_views_of_one_storage_are_read_by_offset_and_stride(tmp_path: Path) -> None:
    """As Meta's sharded files have them; columns of one matrix interleave."""
    of = storage(numel=24)
    table = {
        "a": tensor((2, 3), of=of),
        "b": tensor((3,), offset=6, of=of),
        "left": tensor((3, 2), (5, 1), 9, of),
        "right": tensor((3, 3), (5, 1), 11, of),
    }
    path = save(tmp_path / "x.pth", Zip(members(pickle_of(table), {"0": np.arange(24, dtype="<f4").tobytes()})))
    found, whole = read_all(path), np.arange(9, 24).reshape(3, 5)
    np.testing.assert_array_equal(found["a"], EXPECTED)
    np.testing.assert_array_equal(found["b"], [6, 7, 8])
    np.testing.assert_array_equal(found["left"], whole[:, :2])
    np.testing.assert_array_equal(found["right"], whole[:, 2:])


def test_a_transposed_tensor_is_read_as_it_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", Zip(members(pickle_of({"w": tensor((3, 2), (1, 3))}))))
    np.testing.assert_array_equal(read_all(path)["w"], EXPECTED.T)


def test_tied_weights_may_be_one_storage(tmp_path: Path) -> None:
    found = read_all(save(tmp_path / "x.pth", Zip(members(pickle_of({"w": tensor(), "tied": tensor()})))))
    np.testing.assert_array_equal(found["w"], found["tied"])


def test_a_scalar_and_an_empty_tensor_are_read(tmp_path: Path) -> None:
    table = {"scalar": tensor((), (), offset=4), "empty": tensor((0, 3))}
    found = read_all(save(tmp_path / "x.pth", Zip(members(pickle_of(table)))))
    assert found["scalar"] == 4 and found["empty"].shape == (0, 3)


def test_rows_are_read_without_the_rest(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", Zip(members()))
    with TorchFile.open(path) as file:
        np.testing.assert_array_equal(file.read("w", 1, 2), EXPECTED[1:])
        file.release()
        np.testing.assert_array_equal(file.read("w"), EXPECTED)


def test_a_checksum_can_be_left_for_later(tmp_path: Path) -> None:
    archive = Zip(members())
    archive.members[1].crc = 7
    with TorchFile.open(save(tmp_path / "x.pth", archive)) as file:
        np.testing.assert_array_equal(file.read("w", verify=False), EXPECTED)
        with pytest.raises(UserError, match="data/0: expected the checksum"):
            file.read("w")


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 0, 2, 3), (2, 3, 0, 1)])
def test_entries_may_stand_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    entries = members()
    path = save(tmp_path / "x.pth", Zip([entries[i] for i in order]))
    np.testing.assert_array_equal(read_all(path)["w"], EXPECTED)


def test_what_zip_tools_write_is_read(tmp_path: Path) -> None:
    """Folders as entries, and sizes behind an entry's bytes, as a tool that writes to a pipe has them."""
    path = tmp_path / "x.pth"

    class Pipe:
        def __init__(self) -> None:
            self.file = open(path, "wb")  # noqa: SIM115

        def write(self, data: bytes) -> int:
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    with zipfile.ZipFile(Pipe(), "w") as archive:  # type: ignore[call-overload]
        archive.writestr("archive/", b"")
        archive.writestr("archive/data/", b"")
        for member in members():
            archive.writestr(member.name.decode(), member.content)
    np.testing.assert_array_equal(read_all(path)["w"], EXPECTED)


@pytest.mark.parametrize("location", ["cpu", "cuda:0", "cuda:7", "meta"])
def test_any_device_is_read_on_this_one(location: str, tmp_path: Path) -> None:
    of = storage(location=location)
    assert read_all(save(tmp_path / "x.pth", Zip(members(pickle_of({"w": tensor(of=of)})))))["w"].shape == (2, 3)


def test_a_file_of_2023_without_byteorder_is_little_endian(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", Zip(members()[:3]))
    np.testing.assert_array_equal(read_all(path)["w"], EXPECTED)


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "bfloat16"])
def test_what_is_written_is_read_back_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (5, 7), "b": (3,), "scalar": (), "empty": (0, 4)}
    arrays = {k: rng.integers(0, 256, (*s, kind.itemsize), np.uint8).view(kind).reshape(s) for k, s in shapes.items()}
    with TorchFileWriter(tmp_path / "x.pth", kind, shapes) as writer:
        writer.write("a.weight", arrays["a.weight"][:2])
        writer.write("a.weight", arrays["a.weight"][2:])
        for name in ("b", "scalar", "empty"):
            writer.write(name, arrays[name])
    found = read_all(tmp_path / "x.pth")
    assert all(found[name].tobytes() == arrays[name].tobytes() and found[name].dtype == kind for name in shapes)


def test_a_written_file_may_pass_4_gib(tmp_path: Path) -> None:
    """Over a hole, so that it takes no disk: the wide fields of zip64, by our reader and by Python's."""
    rows = 1 << 20
    shapes = {"large": (rows, 1030), "after": (2, 3)}
    path = tmp_path / "x.pth"
    with HoleWriter(path, np.dtype("<f4"), shapes) as writer:
        writer.hole("large", rows * 1030 * 4)
        writer.write("after", EXPECTED)
    with TorchFile.open(path) as file:
        np.testing.assert_array_equal(file.read("after"), EXPECTED)
        assert file.tensors["large"].shape == (rows, 1030)
        assert not file.read("large", rows - 1, verify=False).any()
    with zipfile.ZipFile(path) as archive:
        assert archive.read("x/data/1") == FLOATS
        assert archive.getinfo("x/data/0").file_size == rows * 1030 * 4


class HoleWriter(TorchFileWriter):
    def hole(self, name: str, size: int) -> None:
        self._begin("data/0", size)
        self._file.seek(size, 1)
        self._written = size
        self._end()


def test_a_tensor_left_out_or_out_of_order_is_told_to_the_programmer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected b next"), writer(tmp_path) as w:
        w.write("a", np.zeros(2, np.float32))
        w.write("c", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="expected 3 tensors"), writer(tmp_path) as w:
        w.write("a", np.zeros(2, np.float32))


def writer(folder: Path) -> TorchFileWriter:
    return TorchFileWriter(folder / "x.pth", np.dtype("<f4"), {"a": (2,), "b": (2,), "c": (2,)})
