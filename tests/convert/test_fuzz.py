"""Whatever bytes come, the readers end in their own error or in tensors: by properties, and by coverage-guided fuzzing.

``python -m tests.convert.test_fuzz torch -runs=1000000`` fuzzes by coverage (it needs atheris; also: pickle, zip, safetensors).
"""

import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.convert import safetensors, torch_file, torch_pickle, torch_zip
from llama_jax.convert.safetensors import SafetensorsFile, SafetensorsWriter
from llama_jax.convert.torch_file import TorchFile
from llama_jax.convert.torch_pickle import read_pickle
from llama_jax.convert.torch_zip import read_directory
from llama_jax.errors import UserError
from tests.convert.crafted import FLOATS, Zip, members, named, number, numbers, pickle_of, storage, tensor, text

GOOD = Zip(members()).build()
# Words of the pickle language as torch speaks it, and stray bytes.
WORDS = [
    b"(", b"t", b"}", b")", b"]", b"N", b"\x88", b"\x89", b"\x85", b"\x86", b"\x87", b"R", b"Q", b"b", b"s", b"u", b"q\x00",
    b"q\x01", b"h\x00", b"h\x01", b"r\x00\x00\x00\x00", b"j\x00\x00\x00\x00", b"K\x03", b"M\x00\x01", text("w"), text("storage"),
    text("0"), text("_metadata"), number(6), number(-1), number(1 << 40), numbers((2, 3)), numbers((3, 1)), storage(), tensor(),
    named("collections.OrderedDict"), named("torch._utils._rebuild_tensor_v2"), named("torch._utils._rebuild_parameter"),
    named("torch.FloatStorage"), named("os.system"), b"\x80\x02", b".",
]  # fmt: skip
PATH = Path("x")


def ends_well(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1000


def read_torch(data: bytes) -> None:
    """All of a file: every tensor, every byte."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        with TorchFile.open(file.name) as opened:
            for name in opened.tensors:
                np.array(opened.read(name))


def read_safetensors(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        with SafetensorsFile.open(file.name) as opened:
            for name in opened.tensors:
                np.array(opened.read(name))


def safetensors_bytes() -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        shapes = {"a": (2, 3), "b": (3,)}
        with SafetensorsWriter(Path(file.name), np.dtype("<f4"), shapes) as writer:
            for shape in shapes.values():
                writer.write(np.zeros(shape, np.float32))
        return Path(file.name).read_bytes()


SAFE = safetensors_bytes()


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """A good file, changed in a few places: bytes set, cut out, or put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "put", "copy"]))
        if kind == "set" and data:
            data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "put":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            data[at:at] = data[draw(st.integers(0, len(data))) :][: draw(st.integers(1, 64))]
    return bytes(data)


LIMITS = settings(max_examples=400)


@LIMITS
@given(mutated(GOOD))
def test_a_changed_torch_file_is_refused_or_read(data: bytes) -> None:
    ends_well(lambda: read_torch(data))


@LIMITS
@given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=3), max_size=60))
@example([b"}", text("w"), tensor(), b"s", b"."])
def test_any_sentence_of_pickle_is_refused_or_read(words: list[bytes]) -> None:
    ends_well(lambda: read_pickle(b"\x80\x02" + b"".join(words), PATH))
    ends_well(lambda: read_torch(Zip(members(b"\x80\x02" + b"".join(words))).build()))


@LIMITS
@given(st.binary(max_size=200) | mutated(GOOD))
def test_any_bytes_are_a_directory_or_are_refused(data: bytes) -> None:
    def read() -> None:
        for entry in read_directory(memoryview(data), PATH).values():
            assert 0 < entry.offset <= entry.offset + entry.size <= len(data)

    ends_well(read)


@LIMITS
@given(st.binary(max_size=100) | mutated(SAFE))
def test_a_changed_safetensors_file_is_refused_or_read(data: bytes) -> None:
    ends_well(lambda: read_safetensors(data))


@LIMITS
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    st.integers(0, 9),
    st.sampled_from([6, 24]),
)
def test_a_tensor_that_is_read_lies_within_its_storage(axes: list[tuple[int, int]], offset: int, numel: int) -> None:
    """Any shape, strides and offset: numpy, which would read past the end, never gets to see those that do."""
    shape, strides = [size for size, _ in axes], [step for _, step in axes]
    value = tensor(shape, strides, offset, storage(numel=numel))
    data = Zip(members(pickle_of({"w": value}), {"0": (FLOATS * 4)[: 4 * numel]})).build()
    last = offset + sum((size - 1) * step for size, step in axes) if 0 not in shape else offset - 1
    indices = np.zeros(1, int) if 0 not in shape else np.zeros(0, int)
    for size, step in axes:
        indices = (indices[:, None] + np.arange(size) * step).reshape(-1)
    fine = last < numel and offset <= numel and len(set(indices.tolist())) == len(indices)
    refused = False
    try:
        read_torch(data)
    except UserError:
        refused = True
    assert refused == (not fine)


def fuzz() -> None:
    """Fuzz one reader by coverage."""
    import atheris

    for module in (safetensors, torch_file, torch_pickle, torch_zip):
        for value in vars(module).values():
            for member in [value, *(vars(value).values() if inspect.isclass(value) else ())]:
                function = inspect.unwrap(getattr(member, "__func__", member))
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)

    def with_pickle(data: bytes) -> None:
        read_torch(Zip(members(b"\x80\x02" + data)).build())

    readers: dict[str, Callable[[bytes], object]] = {
        "torch": read_torch,
        "pickle": with_pickle,
        "zip": lambda data: read_directory(memoryview(data), PATH),
        "safetensors": read_safetensors,
    }
    seeds = {"torch": [GOOD], "zip": [GOOD], "safetensors": [SAFE], "pickle": [pickle_of({"w": tensor()})[2:], *WORDS]}
    name = sys.argv.pop(1)
    folder = Path(tempfile.mkdtemp())
    for i, seed in enumerate(seeds[name]):
        (folder / str(i)).write_bytes(seed)
    atheris.Setup(
        [*sys.argv, "-max_len=4096", "-timeout=10", "-rss_limit_mb=1000", str(folder)],
        lambda data: ends_well(lambda: readers[name](data)),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz()
