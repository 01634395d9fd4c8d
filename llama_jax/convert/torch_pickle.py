"""A small interpreter of the pickles in torch checkpoints. It extracts the tensors' places and runs nothing.

Pickle is a stack machine whose programs call the functions they name. This one implements the 28 instructions that a
dict of weights needs (CPython's pickletools.py documents all) and calls nothing: a name is an inert constant, and the
few "calls" that weights need are rules here. Anything else is refused. Values are bounded: strings and integers by the
size of the file. Keys are strings, and nothing that may be nested is ever hashed, compared or printed.
"""

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from llama_jax.convert.torch_zip import refused
from llama_jax.errors import quoted
from llama_jax.foreign.config_json import QUANTIZED

# LLaMA 2 70B's pickles have about 200 kB.
MAX_BYTES = 2_000_000
MAX_RANK = 8


@dataclass(frozen=True, eq=False)
class Global:
    """A name in a pickle. It stays a name."""

    name: str


ORDERED_DICT = Global("collections.OrderedDict")
REBUILD_TENSOR = Global("torch._utils._rebuild_tensor_v2")
REBUILD_PARAMETER = Global("torch._utils._rebuild_parameter")
STORAGES = {
    Global("torch.BFloat16Storage"): np.dtype(ml_dtypes.bfloat16),
    Global("torch.HalfStorage"): np.dtype("<f2"),
    Global("torch.FloatStorage"): np.dtype("<f4"),
}
GLOBALS = {g.name: g for g in (ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER, *STORAGES)}


@dataclass(frozen=True, eq=False)
class Storage:
    """An entry data/<key> of the archive, with ``numel`` elements of ``dtype``."""

    key: str
    dtype: np.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class TensorView:
    """A tensor, which is a view of a storage. Offset and strides count elements and are not checked here."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The type of the elements."""
        return self.storage.dtype


class _Mark:
    """The start of a collection on the stack."""


_MARK = _Mark()
_INT32, _UINT16, _UINT32 = struct.Struct("<i"), struct.Struct("<H"), struct.Struct("<I")


def read_pickle(data: bytes, path: Path) -> Any:
    """Return the object of a pickle of protocol 2: dicts, tuples, strings, numbers, None and TensorViews.

    ``path`` is for messages. Raises UserError on anything that a dict of weights does not need.
    """
    if len(data) > MAX_BYTES:
        raise refused(path, f"expected a data.pkl of up to {MAX_BYTES:,} bytes, found {len(data):,}")
    return _Machine(data, path).run()


class _Machine:
    """The stack, the memo, and one method per instruction."""

    def __init__(self, data: bytes, path: Path):
        self._data, self._path = data, path
        self._at = 0
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """Execute all instructions. STOP must be the last byte."""
        if self._data[:2] != b"\x80\x02":
            self._refuse("expected a pickle of protocol 2, found another")
        self._at = 2
        while True:
            code = self._take(1)[0]
            if code == ord("."):
                break
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                self._refuse(f"expected instructions for weights only, found {quoted(chr(code))} ({code:#04x})")
            instruction(self)
        if self._at != len(self._data):
            self._refuse(f"expected the end of the pickle, found {len(self._data) - self._at} bytes behind it")
        value = self._pop()
        if self._stack:
            self._refuse("expected one object, found more on the stack")
        return value

    # Reading, the stack and the memo.

    def _take(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        if len(piece) != count:
            self._refuse(f"expected {count} bytes more, found the end of the pickle")
        self._at += count
        return piece

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            self._refuse("expected a value on the stack, found none")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        at = len(self._stack)
        while at and self._stack[at - 1] is not _MARK:
            at -= 1
        if not at:
            self._refuse("expected a mark on the stack, found none")
        values = self._stack[at:]
        del self._stack[at - 1 :]
        return values

    def _memoize(self, index: int) -> None:
        # Picklers number memo entries from 0, so the memo is a list and never larger than the file.
        if index != len(self._memo):
            self._refuse(f"expected memo entry {len(self._memo)} next, found {index}")
        if not self._stack or self._stack[-1] is _MARK:
            self._refuse("expected a value to remember, found none")
        self._memo.append(self._stack[-1])

    def _recall(self, index: int) -> None:
        if index >= len(self._memo):
            self._refuse(f"expected a memo entry below {len(self._memo)}, found {index}")
        self._stack.append(self._memo[index])

    # Instructions, under pickletools' names.

    def _mark(self) -> None:
        self._stack.append(_MARK)

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _empty_list(self) -> None:
        self._stack.append([])

    def _binint(self) -> None:
        self._stack.append(_INT32.unpack(self._take(4))[0])

    def _binint1(self) -> None:
        self._stack.append(self._take(1)[0])

    def _binint2(self) -> None:
        self._stack.append(_UINT16.unpack(self._take(2))[0])

    def _long1(self) -> None:
        length = self._take(1)[0]
        if length > 8:
            self._refuse(f"expected integers of up to 8 bytes, found one of {length}")
        self._stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def _binunicode(self) -> None:
        raw = self._take(_UINT32.unpack(self._take(4))[0])
        try:
            self._stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._refuse("expected text in UTF-8, found other bytes")

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _tuple1(self) -> None:
        self._stack.append((self._pop(),))

    def _tuple2(self) -> None:
        b, a = self._pop(), self._pop()
        self._stack.append((a, b))

    def _tuple3(self) -> None:
        c, b, a = self._pop(), self._pop(), self._pop()
        self._stack.append((a, b, c))

    def _binput(self) -> None:
        self._memoize(self._take(1)[0])

    def _long_binput(self) -> None:
        self._memoize(_UINT32.unpack(self._take(4))[0])

    def _binget(self) -> None:
        self._recall(self._take(1)[0])

    def _long_binget(self) -> None:
        self._recall(_UINT32.unpack(self._take(4))[0])

    def _setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _setitems(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1] if self._stack else None
        if type(target) is not dict or len(items) % 2:
            self._refuse("expected keys and values for a dict, found them for something else")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                self._refuse("expected names as keys, found another kind of key")
            if key in target:
                self._refuse(f"expected every name once, found {quoted(key)} twice")
            target[key] = value

    def _global(self) -> None:
        end = self._data.find(b"\n", self._data.find(b"\n", self._at) + 1, self._at + 200)
        lines = self._data[self._at : end].split(b"\n")
        if end < 0 or len(lines) != 2:
            self._refuse("expected a module and a name, found neither")
        name = b".".join(lines).decode("latin-1")
        if name not in GLOBALS:
            if re.fullmatch(r"torch\.(Byte|Char|Short|Int|Long|Q\w+)Storage", name):
                self._refuse(
                    f"expected floats, found a reference to {quoted(name)}, as of quantized matrices; {QUANTIZED}"
                )
            self._refuse(
                f"expected weights only, found a reference to {quoted(name)}, which is not run; if the source is one that "
                "you trust, load the file with torch and save its state_dict alone"
            )
        self._at = end + 1
        self._stack.append(GLOBALS[name])

    def _binpersid(self) -> None:
        pid = self._pop()
        if not (type(pid) is tuple and len(pid) == 5 and type(pid[0]) is str and pid[0] == "storage"):
            self._refuse("expected the five fields of a storage, found something else")
        _, kind, key, location, numel = pid
        if not (type(kind) is Global and kind in STORAGES):
            self._refuse("expected a storage of bfloat16, float16 or float32, found another type")
        if not (type(key) is str and key.isascii() and key.isalnum() and type(location) is str):
            self._refuse("expected a storage's key and location, found something else")
        storage = Storage(key, STORAGES[kind], self._size(numel))
        known = self._storages.setdefault(key, storage)
        if (known.dtype, known.numel) != (storage.dtype, storage.numel):
            self._refuse(f"storage {quoted(key)}: expected one type and size, found two")
        self._stack.append(known)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not Global or type(arguments) is not tuple:
            self._refuse("expected a call that weights need, found another")
        rule = _CALLS.get(function)
        if rule is None:
            self._refuse(f"expected a call that weights need, found one of {function.name}")
        self._stack.append(rule(self, *self._counted(arguments, function)))

    def _counted(self, arguments: tuple[Any, ...], function: Global) -> tuple[Any, ...]:
        expected = {ORDERED_DICT: 0, REBUILD_TENSOR: 6, REBUILD_PARAMETER: 3}[function]
        if len(arguments) != expected:
            self._refuse(f"{function.name}: expected {expected} arguments, found {len(arguments)}")
        return arguments

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1] if self._stack else None
        # A state_dict has versions of its modules, which weights do not need.
        if type(target) is not dict or type(state) is not dict or list(state) != ["_metadata"]:
            self._refuse("expected no state to be set but the _metadata of a state_dict, found another")

    # Functions that may be called.

    def _ordered_dict(self) -> dict[str, Any]:
        return {}

    def _rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
    ) -> TensorView:
        if type(storage) is not Storage or type(requires_grad) is not bool or type(hooks) is not dict or hooks:
            self._refuse("expected a plain tensor of a storage, found something else")
        if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_RANK:
            self._refuse(f"expected a shape and strides of up to {MAX_RANK} axes, found something else")
        sizes, steps = tuple(map(self._size, shape)), tuple(map(self._size, strides))
        return TensorView(storage, self._size(offset), sizes, steps)

    def _rebuild_parameter(self, tensor: Any, requires_grad: Any, hooks: Any) -> TensorView:
        if type(tensor) is not TensorView or type(requires_grad) is not bool or type(hooks) is not dict or hooks:
            self._refuse("expected a parameter around a tensor, found something else")
        return tensor

    def _size(self, value: Any) -> int:
        if type(value) is not int or value < 0:
            self._refuse("expected sizes, strides and offsets of 0 or more, found something else")
        return value

    def _refuse(self, message: str) -> NoReturn:
        raise refused(self._path, f"data.pkl, byte {self._at}: {message}")


_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("("): _Machine._mark,
    ord("N"): _Machine._none,
    0x88: _Machine._true,
    0x89: _Machine._false,
    ord("}"): _Machine._empty_dict,
    ord(")"): _Machine._empty_tuple,
    ord("]"): _Machine._empty_list,
    ord("J"): _Machine._binint,
    ord("K"): _Machine._binint1,
    ord("M"): _Machine._binint2,
    0x8A: _Machine._long1,
    ord("X"): _Machine._binunicode,
    ord("t"): _Machine._tuple,
    0x85: _Machine._tuple1,
    0x86: _Machine._tuple2,
    0x87: _Machine._tuple3,
    ord("q"): _Machine._binput,
    ord("r"): _Machine._long_binput,
    ord("h"): _Machine._binget,
    ord("j"): _Machine._long_binget,
    ord("s"): _Machine._setitem,
    ord("u"): _Machine._setitems,
    ord("c"): _Machine._global,
    ord("Q"): _Machine._binpersid,
    ord("R"): _Machine._reduce,
    ord("b"): _Machine._build,
}
_CALLS: dict[Global, Callable[..., Any]] = {
    ORDERED_DICT: _Machine._ordered_dict,
    REBUILD_TENSOR: _Machine._rebuild_tensor,
    REBUILD_PARAMETER: _Machine._rebuild_parameter,
}


def write_pickle(dtypes: Mapping[str, np.dtype], shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Return the pickle of a dict of contiguous tensors, with tensor i in storage i, as torch.save writes it."""
    parts = [b"\x80\x02}("]
    for i, (name, shape) in enumerate(shapes.items()):
        kind = next(g.name for g, known in STORAGES.items() if known == dtypes[name])
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = _text("storage") + _named(kind) + _text(str(i)) + _text("cpu") + _number(math.prod(shape))
        arguments = b"(" + b"(" + storage + b"tQ" + _number(0) + _numbers(shape) + _numbers(strides) + b"\x89"
        hooks = _named(ORDERED_DICT.name) + b")R"
        parts.append(_text(name) + _named(REBUILD_TENSOR.name) + arguments + hooks + b"tR")
    return b"".join(parts) + b"u."


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + _UINT32.pack(len(raw)) + raw


def _number(value: int) -> bytes:
    return b"J" + _INT32.pack(value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()
