"""Crafted checkpoints, each wrong in one way: name -> (what to write, words of the refusal)."""

import pickle
import struct
import zlib
from collections.abc import Callable

from tests.convert.crafted import (
    FLOATS,
    Member,
    Zip,
    members,
    named,
    number,
    numbers,
    pickle_of,
    storage,
    tensor,
    text,
)

Case = tuple[Callable[[], bytes | Zip], str]


def bad_pickle(data: bytes) -> Callable[[], Zip]:
    return lambda: Zip(members(data))


def bad_tensor(value: bytes) -> Callable[[], Zip]:
    return lambda: Zip(members(pickle_of({"w": value})))


def bad_tensors(*values: bytes, floats: int = 6) -> Callable[[], Zip]:
    table = {f"w{i}": value for i, value in enumerate(values)}
    return lambda: Zip(members(pickle_of(table), {"0": bytes(4 * floats)}))


def call(name: str, arguments: bytes = b"(" + text("echo hacked >&2") + b"t") -> bytes:
    return named(name) + arguments + b"R"


def global_stack(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return (
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
        + b"\x93"
    )


CALLED = [
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "subprocess.check_output", "builtins.eval",
    "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.getattr", "builtins.open", "__builtin__.eval",
    "importlib.import_module", "pickle.loads", "_pickle.loads", "torch.load", "torch.storage._load_from_bytes",
    "torch.jit.load", "torch.hub.load", "pip._internal.main", "pydoc.locate", "timeit.timeit", "runpy.run_path",
    "runpy._run_code", "ctypes.CDLL", "functools.partial", "operator.attrgetter", "operator.methodcaller",
    "code.InteractiveInterpreter", "webbrowser.open", "shutil.rmtree", "socket.create_connection", "cProfile.run",
    "numpy.load", "numpy.core.multiarray.scalar", "numpy.testing._private.utils.runstring", "collections.defaultdict",
    "collections.Counter", "types.CodeType", "marshal.loads", "asyncio.unix_events._UnixSubprocessTransport",
    "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_wrapper_subclass", "torch._tensor._rebuild_from_type_v2",
    "torch.nn.modules.linear.Linear", "torch.UntypedStorage", "torch.IntStorage",
]  # fmt: skip

PICKLES: dict[str, Case] = {
    **{f"calls {name}": (bad_pickle(pickle_of(call(name))), "found a reference") for name in CALLED},
    "a payload first, a broken stream after it": (bad_pickle(b"\x80\x02" + call("os.system") + b"\xff\xff"), "os.system"),
    "a payload whose result is popped": (bad_pickle(pickle_of({"w": tensor()}, before=call("os.system") + b"0")), "os.system"),
    "a payload behind the tensors": (bad_pickle(pickle_of({"w": tensor()}, after=call("os.system") + b"0")), "os.system"),
    "STACK_GLOBAL": (bad_pickle(pickle_of(global_stack("os.system") + b"(" + text("ls") + b"tR")), "0x8c"),
    "a dotted name": (bad_pickle(pickle_of(b"ctorch\nstorage._load_from_bytes\n(tR")), "found a reference"),
    "a name with a newline missing": (bad_pickle(b"\x80\x02cos"), "a module and a name"),
    "INST": (bad_pickle(pickle_of(b"(" + text("ls") + b"ios\nsystem\n")), "'i'"),
    "OBJ": (bad_pickle(pickle_of(b"(" + named("collections.OrderedDict") + b"o")), "'o'"),
    "NEWOBJ": (bad_pickle(pickle_of(named("collections.OrderedDict") + b")\x81")), "0x81"),
    "NEWOBJ_EX": (bad_pickle(pickle_of(named("collections.OrderedDict") + b")}\x92")), "0x92"),
    "EXT1": (bad_pickle(pickle_of(b"\x82\x01")), "0x82"),
    "EXT2": (bad_pickle(pickle_of(b"\x83\x01\x00")), "0x83"),
    "EXT4": (bad_pickle(pickle_of(b"\x84\x01\x00\x00\x00")), "0x84"),
    "DUP": (bad_pickle(pickle_of(b"]" + b"2" * 40 + b"t")), "'2'"),
    "APPENDS": (bad_pickle(pickle_of(b"](" + number(1) + b"e")), "'e'"),
    "PERSID": (bad_pickle(pickle_of(b"Pstorage\n")), "'P'"),
    "LONG4": (bad_pickle(pickle_of(b"\x8b\xff\xff\xff\x7f")), "0x8b"),
    "a text instruction": (bad_pickle(pickle_of(b"I01\n")), "'I'"),
    "a float": (bad_pickle(pickle_of({"w": b"G" + bytes(8)})), "'G'"),
    "protocol 0": (bad_pickle(pickle.dumps({}, 0)), "protocol 2"),
    "protocol 4": (bad_pickle(pickle.dumps({}, 4)), "protocol 2"),
    "a second PROTO": (bad_pickle(pickle_of(b"\x80\x02}")), "0x80"),
    "an empty pickle": (bad_pickle(b""), "protocol 2"),
    "no STOP": (bad_pickle(pickle_of({"w": tensor()})[:-1]), "end of the pickle"),
    "bytes behind STOP": (bad_pickle(pickle_of({"w": tensor()}) + b"."), "behind it"),
    "a second pickle behind the first": (bad_pickle(pickle_of({"w": tensor()}) + pickle_of(call("os.system"))), "behind it"),
    "more on the stack": (bad_pickle(pickle_of({"w": tensor()}, before=b"N")), "one object"),
    "an empty stack": (bad_pickle(pickle_of(b"")), "on the stack"),
    "a mark for a value": (bad_pickle(pickle_of(b"(")), "on the stack"),
    "a tuple without a mark": (bad_pickle(pickle_of(b"Nt")), "mark"),
    "an unknown memo entry": (bad_pickle(pickle_of(b"h\x07")), "memo"),
    "a huge memo index": (bad_pickle(pickle_of(b"}r" + struct.pack("<I", 200_000_000))), "memo"),
    "a memo entry of nothing": (bad_pickle(pickle_of(b"q\x00}")), "remember"),
    "a huge declared text": (bad_pickle(pickle_of(b"X\xff\xff\xff\xff")), "end of the pickle"),
    "a huge integer": (bad_pickle(pickle_of(b"\x8a\xff" + b"\x7f" * 255)), "up to 8 bytes"),
    "text that is not UTF-8": (bad_pickle(pickle_of(b"X\x01\x00\x00\x00\xff")), "UTF-8"),
    "a lone surrogate": (bad_pickle(pickle_of(b"X\x03\x00\x00\x00\xed\xa0\x80")), "UTF-8"),
    "deep nesting of tuples": (bad_pickle(pickle_of(b")" + b"\x85" * 1_900_000)), "dict of tensors"),
    "deep nesting in the metadata": (
        bad_pickle(pickle_of({"w": tensor()}, after=b"}(" + text("_metadata") + b")" + b"\x85" * 500_000 + b"ub")[:-1] + b"N."),
        "one object",
    ),
    "a key that is a nested tuple": (bad_pickle(pickle_of(b"}(" + b")" + b"\x86\x85" * 30 + b"Nu")), "value on the stack"),
    "a key that is a tuple": (bad_pickle(pickle_of(b"}" + b")Ns")), "names as keys"),
    "a key that is a number": (bad_pickle(pickle_of(b"}" + number(1) + b"Ns")), "names as keys"),
    "a key twice": (bad_pickle(pickle_of(b"}(" + (text("w") + tensor()) * 2 + b"u")), "twice"),
    "an odd number of items": (bad_pickle(pickle_of(b"}(" + text("w") + b"u")), "keys and values"),
    "items for a tensor": (bad_pickle(pickle_of(tensor() + text("grad") + b"Ns")), "keys and values"),
    "items for a tuple": (bad_pickle(pickle_of(b")" + text("a") + b"Ns")), "keys and values"),
    "BUILD of a tensor": (bad_pickle(pickle_of(tensor() + b"}(" + text("__setstate__") + b"Nub")), "_metadata"),
    "BUILD of a name": (bad_pickle(pickle_of(named("collections.OrderedDict") + b"}b")), "_metadata"),
    "BUILD of a dict with other state": (bad_pickle(pickle_of(b"}}(" + text("__class__") + b"Nub")), "_metadata"),
    "REDUCE of a value": (bad_pickle(pickle_of(b"})R")), "a call"),
    "REDUCE with a list": (bad_pickle(pickle_of(named("collections.OrderedDict") + b"]R")), "a call"),
    "REDUCE of a storage type": (bad_pickle(pickle_of(call("torch.FloatStorage", b")"))), "a call"),
    "an OrderedDict of arguments": (bad_pickle(pickle_of(call("collections.OrderedDict"))), "arguments"),
    "a pickle that is too large": (bad_pickle(pickle_of(b")" * 3_000_000)), "bytes"),
    "many marks": (bad_pickle(pickle_of(b"(" * 1_900_000)), "stack"),
    "many lists": (bad_pickle(pickle_of(b"]" * 1_900_000)), "one object"),
    "a dict that holds itself": (bad_pickle(pickle_of(b"}q\x00" + text("w") + b"h\x00s")), "training checkpoint"),
    "a list": (bad_pickle(pickle_of(b"]")), "dict of tensors"),
    "a training checkpoint": (bad_pickle(pickle_of({"model": b"}", "step": number(1)})), "training checkpoint"),
    "a number for a tensor": (bad_pickle(pickle_of({"w": number(3)})), "something else"),
}  # fmt: skip

TENSORS: dict[str, Case] = {
    "a persistent id that is no tuple": (bad_tensor(tensor(of=text("0") + b"Q")), "five fields"),
    "a persistent id of four fields": (bad_tensor(tensor(of=b"(" + text("storage") + text("0") + text("c") + number(6) + b"tQ")), "five fields"),
    "a persistent id of another kind": (bad_tensor(tensor(of=storage().replace(b"storage", b"modules", 1))), "five fields"),
    "a storage type that is text": (bad_tensor(tensor(of=b"(" + text("storage") + text("torch.FloatStorage") + text("0") + text("cpu") + number(6) + b"tQ")), "bfloat16"),
    "a storage type that is a function": (bad_tensor(tensor(of=storage(kind="collections.OrderedDict"))), "bfloat16"),
    "a storage key with a path": (bad_tensor(tensor(of=storage(key="../0"))), "key and location"),
    "a storage key that is a number": (bad_tensor(tensor(of=b"(" + text("storage") + named("torch.FloatStorage") + number(0) + text("cpu") + number(6) + b"tQ")), "key and location"),
    "a storage that is missing": (bad_tensor(tensor(of=storage(key="7"))), "found none"),
    "a storage of two types": (bad_tensors(tensor((1,)), tensor((1,), offset=1, of=storage(kind="torch.HalfStorage", numel=12))), "found two"),
    "a negative number of elements": (bad_tensor(tensor(of=storage(numel=-6))), "0 or more"),
    "a number of elements that wraps around": (bad_tensor(tensor(of=storage(numel=(1 << 62) + 6))), "elements"),
    "a number of elements that is true": (bad_tensor(tensor(of=b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + b"\x88tQ")), "0 or more"),
    "more elements than bytes": (bad_tensor(tensor(of=storage(numel=7))), "24 bytes"),
    "fewer elements than bytes": (bad_tensor(tensor((1, 3), of=storage(numel=5))), "24 bytes"),
    "a shape beyond its storage": (bad_tensor(tensor((3, 3))), "within its 6 elements"),
    "an offset beyond its storage": (bad_tensor(tensor(offset=1)), "within its 6 elements"),
    "an offset that wraps around": (bad_tensor(tensor(offset=(1 << 62))), "within its 6 elements"),
    "a negative offset": (bad_tensor(tensor(offset=-1)), "0 or more"),
    "strides beyond the storage": (bad_tensor(tensor(strides=(100, 1))), "within its 6 elements"),
    "negative strides": (bad_tensor(tensor(strides=(-3, 1), offset=3)), "0 or more"),
    "a negative size": (bad_tensor(tensor((-2, -3), (3, 1))), "0 or more"),
    "zero strides": (bad_tensor(tensor((1 << 40, 3), (0, 1))), "stride of 0"),
    "a terabyte of one byte": (bad_tensor(tensor((1 << 40,), (0,))), "stride of 0"),
    "strides that overlap": (bad_tensor(tensor((2, 3), (1, 1))), "share bytes"),
    "strides that overlap far apart": (bad_tensor(tensor((2, 2), (2, 2))), "share bytes"),
    "more strides than sizes": (bad_tensor(tensor((6,), (1, 1))), "shape and strides"),
    "a list for a shape": (bad_tensor(tensor().replace(numbers((2, 3)), b"]", 1)), "shape and strides"),
    "too many axes": (bad_tensor(tensor((1,) * 9, (1,) * 9)), "axes"),
    "true for a size": (bad_tensor(tensor().replace(numbers((2, 3)), b"(\x88" + number(3) + b"t", 1)), "0 or more"),
    "two tensors over one range": (bad_tensors(tensor((4,)), tensor((4,), offset=2)), "share bytes"),
    "many tensors over one range": (bad_tensors(*[tensor((6 - i,), offset=i) for i in range(6)]), "share bytes"),
    "two tensors that interleave and meet": (bad_tensors(tensor((3, 2), (3, 1), of=storage(numel=9)), tensor((3, 2), (3, 1), 1, of=storage(numel=9)), floats=9), "share bytes"),
    "a storage for a tensor": (bad_tensor(storage()), "something else"),
    "a tensor for a storage": (bad_tensor(tensor(of=tensor())), "plain tensor"),
    "hooks": (bad_tensor(tensor().replace(b")R\x74R", b")R" + text("h") + b"NstR")), "plain tensor"),
    "a gradient flag that is a number": (bad_tensor(tensor().replace(b"\x89", number(0))), "plain tensor"),
    "too few arguments of a tensor": (bad_tensor(named("torch._utils._rebuild_tensor_v2") + b"(" + storage() + b"tR"), "arguments"),
    "a parameter of nothing": (bad_tensor(named("torch._utils._rebuild_parameter") + b"(N\x89" + named("collections.OrderedDict") + b")RtR"), "parameter"),
}  # fmt: skip


def zipped(change: Callable[[Zip], object]) -> Callable[[], Zip]:
    def build() -> Zip:
        archive = Zip(members())
        change(archive)
        return archive

    return build


def member(index: int = 1, **fields: object) -> Callable[[], Zip]:
    """One entry (1: the storage) made wrong."""

    def change(archive: Zip) -> None:
        for name, value in fields.items():
            setattr(archive.members[index], name, value)

    return zipped(change)


def deflated() -> Zip:
    archive = Zip(members())
    content = zlib.compress(bytes(1 << 20))[2:-4]
    archive.members[1] = Member(b"archive/data/0", content, method=8, size=1 << 20, stored=len(content), crc=0)
    return archive


def overlapping() -> Zip:
    """Two names for the same bytes: a bomb without compression."""
    archive = Zip(members())
    twin = Member(b"archive/data/1", FLOATS, offset=0)
    archive.listed = [*archive.members, twin]
    return archive


def flood() -> Zip:
    many = [Member(f"archive/data/{i}".encode(), b"") for i in range(1000, 31_000)]
    return Zip(members() + many)


def nested() -> bytes:
    inner = Zip(members()).build()
    return Zip(members(inner)).build()


def end64(record: bytes = b"", locator: bytes | None = None) -> Callable[[], Zip]:
    def change(archive: Zip) -> None:
        at = archive.build().index(b"PK\5\6")
        archive.end64 = record + (struct.pack("<4sIQI", b"PK\6\7", 0, at, 1) if locator is None else locator)

    return zipped(change)


def record64(count: int = 4, length: int = 44, size: int = 0, start: int = 0) -> bytes:
    return struct.pack("<4sQHHIIQQQQ", b"PK\6\6", length, 45, 45, 0, 0, count, count, size, start)


GOOD = Zip(members()).build()
ZIPS: dict[str, Case] = {
    "an empty file": (lambda: b"", "empty"),
    "a few zero bytes": (lambda: bytes(100), "something else"),
    "an HTML page": (lambda: b"<!DOCTYPE html><title>403</title>" + bytes(600), "HTML"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS"),
    "a torch file of before 1.6": (lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "before 1.6"),
    "a tar file": (lambda: b"archive/data.pkl".ljust(257, b"\0") + b"ustar\x0000" + bytes(1024), "before 1.6"),
    "a 7z file": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(600), "something else"),
    "a pickle without a zip": (lambda: pickle_of(call("os.system")), "before 1.6"),
    "bytes in front": (lambda: b"#!/bin/sh\n" + GOOD, "zip archive"),
    "a zip in front": (lambda: GOOD + GOOD, "directory"),
    "bytes behind": (lambda: GOOD + b"\0", "directory at the end"),
    "another directory behind": (lambda: GOOD + GOOD[GOOD.index(b"PK\1\2") :], "directory"),
    "cut short": (lambda: GOOD[:-30], "directory at the end"),
    "cut in the middle": (lambda: GOOD[: len(GOOD) // 2], "directory at the end"),
    "a comment": (zipped(lambda z: setattr(z, "comment", b"hello")), "directory at the end"),
    "a comment's length": (zipped(lambda z: setattr(z, "comment", b"") or setattr(z, "after", b"\0" * 22)), "directory at the end"),
    "two volumes": (zipped(lambda z: setattr(z, "disks", (1, 0))), "volume"),
    "an entry on another volume": (member(disk=1), "special"),
    "more entries counted than listed": (zipped(lambda z: setattr(z, "count", 5)), "fewer"),
    "fewer entries counted than listed": (zipped(lambda z: setattr(z, "count", 3)), "more"),
    "a directory that starts elsewhere": (zipped(lambda z: setattr(z, "start", 10)), "directory to end"),
    "a directory that is larger": (zipped(lambda z: setattr(z, "size", 10_000)), "directory to end"),
    "a gap in front of the directory": (zipped(lambda z: setattr(z, "between", b"hidden")), "directory at byte"),
    "a gap between entries": (member(after=b"hidden"), "entry at byte"),
    "an entry that is not listed": (zipped(lambda z: setattr(z, "listed", z.members[:1] + z.members[2:])), "entry at byte"),
    "overlapping entries": (overlapping, "entry at byte"),
    "a flood of entries": (flood, "entries"),
    "an archive in an archive": (nested, "protocol 2"),
    "a deflated bomb": (deflated, "compressed"),
    "a stored entry of another size": (member(stored=3), "compressed"),
    "a forged size": (member(size=1 << 30), "before their end"),
    "a forged size in its own header": (member(local_size=3), "own header"),
    "an encrypted entry": (member(flags=1), "plain entry"),
    "a strongly encrypted entry": (member(flags=1 << 6), "plain entry"),
    "a masked header": (member(flags=1 << 13), "plain entry"),
    "a wrong checksum of the pickle": (member(0, crc=7), "checksum"),
    "a wrong checksum of a storage": (member(crc=7), "checksum"),
    "a checksum that its own header has otherwise": (member(local_crc=7), "own header"),
    "a name that its own header has otherwise": (member(local_name=b"archive/data/9"), "same name"),
    "a name twice": (zipped(lambda z: z.members.append(Member(b"archive/data/0", FLOATS))), "twice"),
    "a path upwards": (member(name=b"archive/../../0"), "plain names"),
    "an absolute path": (member(name=b"/etc/passwd"), "plain names"),
    "a Windows path": (member(name=b"C:\\x"), "plain names"),
    "a name with a backslash": (member(name=b"archive\\data\\0"), "plain names"),
    "a name with a line end": (member(name=b"archive/data/0\n"), "plain names"),
    "a name with an escape sequence": (member(name=b"archive/data/\x1b[2J"), "plain names"),
    "a name of no letters": (member(name=b""), "plain names"),
    "a name that is too long": (member(name=b"archive/data/" + b"0" * 300), "plain names"),
    "a symbolic link": (member(made_by=3 << 8 | 20, attributes=0o120777 << 16), "link"),
    "a device": (member(made_by=3 << 8 | 20, attributes=0o020666 << 16), "special"),
    "an entry's comment": (member(comment=b"x"), "special"),
    "two top folders": (member(name=b"other/data/0"), "one top folder"),
    "no top folder": (member(name=b"data"), "top folder"),
    "code": (zipped(lambda z: z.members.append(Member(b"archive/code/m.py", b"import os"))), "nothing else"),
    "a TorchScript archive": (lambda: Zip([Member(b"archive/constants.pkl", b""), Member(b"archive/version", b"3\n")]), "torch.jit.save"),
    "no pickle": (zipped(lambda z: z.members.pop(0)), "data.pkl"),
    "no version": (zipped(lambda z: z.members.pop(2)), "version"),
    "another version": (member(2, content=b"three"), "version"),
    "big endian": (member(3, content=b"big"), "byte order"),
    "a storage that nobody uses": (zipped(lambda z: z.members.append(Member(b"archive/data/1", FLOATS))), "every storage"),
    "a huge version": (member(2, content=bytes(3_000_000)), "up to"),
    "a header that is not there": (member(offset=5), "entry at byte"),
    "a descriptor that is missing": (member(flags=8, local_size=0, local_crc=0), "behind it"),
    "a descriptor that differs": (
        member(flags=8, local_size=0, local_crc=0, after=b"PK\7\x08" + struct.pack("<III", 7, 24, 24)), "behind it"),
    "a zip64 record that disagrees": (end64(record64(count=9)), "agree"),
    "a zip64 record of another length": (end64(record64(length=100)), "agree"),
    "a zip64 locator without its record": (end64(b""), "zip64 end record"),
    "a zip64 locator that points elsewhere": (end64(record64(), struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1)), "zip64 end record"),
    "a zip64 size that is missing": (member(size=0xFFFFFFFF, stored=0xFFFFFFFF), "zip64"),
    "a zip64 size of 2^63": (
        member(size=0xFFFFFFFF, stored=0xFFFFFFFF, extra=struct.pack("<HHQQ", 1, 16, 1 << 63, 1 << 63)), "before their end"),
    "two zip64 fields": (member(extra=struct.pack("<HHQ", 1, 8, 24) * 2), "found two"),
}  # fmt: skip

HOSTILE: dict[str, Case] = {**PICKLES, **TENSORS, **ZIPS}
