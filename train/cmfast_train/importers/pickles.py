# SPDX-License-Identifier: MIT
"""Pickled objects, as EDM, ECT and FastGen save them, read without running anything that is in them.

    tree = read_pickle(file)  # pickle.dump: a network snapshot of EDM or ECT
    tree = read_torch(file)  # torch.save, with objects beside the tensors
    weights = module_tensors(tree["ema"], file)  # {name: tensor}

Such a file names classes and functions, or holds their source code, which `pickle.load` executes. Here the opcodes
are interpreted one by one and none of them can call, import or set anything: what a pickle would call becomes a
`Foreign`, a record of its name, arguments and state. Tensors, and containers known by name, are the exceptions; they
are built by this module. What a file can make it make is bounded by the file's size.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import math
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cmfast.errors import ArtifactError

# Of one network; the largest known has a tenth. A few bytes of a pickle can otherwise make names without end.
MAX_MODULES, MAX_TENSORS, MAX_PATH = 10_000, 100_000, 1000
# Bytes that a file may make, over its size and beside it. A network takes four times its file where a pickle of
# protocol 0 goes through text; a few bytes that copy a large container again and again take thousands of times.
SIZES, BESIDE = 8, 1 << 28
OBJECT = 64  # bytes of a small object, or of a place in a container
MAX_SIDE, MAX_DIMS = 1 << 40, 8  # of a tensor
PIECE = 1 << 24  # bytes that are summed up at once; Ctrl-C waits for them

_LEGACY = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles in torch.save's old format
_DTYPES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Global:
    """The name of a class or function, "module.name". It is a text and stays one."""

    name: str


@dataclass(eq=False, repr=False)  # it may contain itself
class Foreign:
    """What would have been an object: who would have made it, from what."""

    name: str  # of its class or of the function that makes it
    args: tuple[Any, ...] = ()
    state: dict[Any, Any] = field(default_factory=dict)  # its attributes


@dataclass(frozen=True)
class _Storage:
    """The memory of a tensor: one dimension, of the tensor's own type."""

    data: Tensor


def read_pickle(file: Path) -> Any:
    """Return what a pickle holds: plain containers, tensors on the CPU, and `Foreign` for every other object."""
    with (
        _refusing(file, "pickle"),
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:2] == b"PK":
            raise ArtifactError(f"{file}: torch.save wrote this, not pickle; rename it to end in .pt")
        return _interpret(data, _Limits(len(data)))


def read_torch(file: Path, opened: BinaryIO | None = None) -> Any:
    """Return what torch.save wrote, with `Foreign` for what is neither plain container nor tensor, as `read_pickle`.

    The tensors share the memory of the mapped file where it is not compressed.

    opened  the content where somebody has opened it already; `file` is its name then
    """
    with contextlib.ExitStack() as stack, _refusing(file, "PyTorch file"):
        stream = stack.enter_context(open(file, "rb")) if opened is None else opened
        stream.seek(0)
        if stream.read(4) != b"PK\3\4":
            raise ArtifactError(
                f"{file}: no zip file, so not what torch.save writes since PyTorch 1.6; older files are read only "
                "if they hold nothing but tensors"
            )
        with zipfile.ZipFile(stream) as archive:
            records = _Records(stream, archive)
            return _interpret(io.BytesIO(records.read("data.pkl")), records.limits, records.storage)


def module_tensors(module: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict of a pickled torch module: every parameter and persistent buffer by its dotted name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    entries = 0
    rest: list[tuple[str, Any]] = [("", module)]
    while rest:
        path, one = rest.pop()
        where = f"{file}: the module {path.rstrip('.')[:80]!r}"
        if not isinstance(one, Foreign) or id(one) in seen or len(seen) >= MAX_MODULES or len(path) > MAX_PATH:
            raise ArtifactError(f"{where} is none, or is in there twice, or too many are")
        seen.add(id(one))
        parameters, buffers, modules = parts = [one.state.get(k, {}) for k in ("_parameters", "_buffers", "_modules")]
        transient = one.state.get("_non_persistent_buffers_set", set())
        entries += sum(len(part) for part in parts if isinstance(part, dict))
        if entries > MAX_TENSORS:  # the same dictionary can stand in every module
            raise ArtifactError(f"{where} and those before it have more than {MAX_TENSORS} weights")
        if not isinstance(transient, (set, frozenset)) or not all(map(_named, parts)):
            raise ArtifactError(f"{where} is malformed")
        for name, value in [*parameters.items(), *((n, b) for n, b in buffers.items() if n not in transient)]:
            if value is not None:
                if not isinstance(value, Tensor):
                    raise ArtifactError(f"{where} has a weight {name[:80]!r} that is no tensor")
                tensors[path + name] = value
        rest += [(f"{path}{name}.", value) for name, value in reversed(modules.items()) if value is not None]
    return tensors


class _Refused(Exception):
    """The pickle asks for something that no file of weights needs."""


class _Damaged(Exception):
    """The data of a file within the zip file, of this name, are not those that its checksum was made of."""


# pickletools raises ValueError for what is no pickle, zipfile, zlib and lzma have their own; the others are a file that
# contradicts itself. RuntimeError is torch's for numbers that it cannot work with, and zipfile's for encryption.
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RuntimeError, EOFError,
           NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # fmt: skip


@contextlib.contextmanager
def _refusing(file: Path, kind: str) -> Iterator[None]:
    """Turn whatever a file can provoke into an error in one line."""
    try:
        yield
    except ArtifactError:
        raise
    except _Refused as err:
        raise ArtifactError(f"{file}: {err}; refused, nothing in it was run") from None
    except _Damaged as err:
        raise ArtifactError(
            f"{file} is damaged: the data of {err} do not match their checksum; copy or download it again"
        ) from None
    except _BROKEN as err:
        raise ArtifactError(f"{file}: not a whole {kind}: {_line(err)}") from None
    except OSError as err:
        if err.filename is not None:
            raise  # the file itself cannot be opened
        raise ArtifactError(f"{file}: not a whole {kind}: {_line(err)}") from None  # it points outside itself


def _line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]


class _Limits:
    """What one file may still make, and the memory of its tensors that was made already."""

    def __init__(self, size: int) -> None:
        self.left = SIZES * size + BESIDE  # bytes
        self.storages: dict[Any, tuple[_Storage, Any]] = {}  # the key, and what keeps its id from being used again

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise _Refused("what it asks for is many times larger than the file")


def _interpret(data: Any, limits: _Limits, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Run the opcodes of a pickle on a stack; `data` is a file. Nothing on the stack is ever called.

    persistent  returns what stands outside the pickle; None: nothing does
    """
    stack: list[Any] = []
    marks: list[int] = []  # where groups of items begin
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = marks.pop()
        items = stack[place:]
        del stack[place:]
        return items

    for opcode, arg, _ in pickletools.genops(data):
        limits.spend(OBJECT + (len(arg) if isinstance(arg, (str, bytes, bytearray)) else 0))
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP":
                (marks if marks and marks[-1] == len(stack) else stack).pop()
            case "POP_MARK":
                since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "LIST":
                stack.append(since_mark())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                stack.append(_with_items({}, since_mark()))
            case "FROZENSET":
                stack.append(frozenset(_key(item) for item in since_mark()))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = since_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                items = [stack.pop(), stack.pop()]
                _with_items(stack[-1], items[::-1])
            case "SETITEMS":
                items = since_mark()
                _with_items(stack[-1], items)
            case "GLOBAL":
                stack.append(_global(arg))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_global(module, name))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(_made(stack.pop(), args, limits, persistent is None))
            case "NEWOBJ_EX":
                named, args = stack.pop(), stack.pop()
                limits.spend(OBJECT * len(args))
                stack.append(_made(stack.pop(), (*args, named), limits, persistent is None))
            case "OBJ":
                maker, *rest = since_mark()
                stack.append(_made(maker, tuple(rest), limits, persistent is None))
            case "INST":
                stack.append(_made(_global(arg), tuple(since_mark()), limits, persistent is None))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state, limits)
            case "BINPERSID" if persistent is not None:
                stack.append(persistent(stack.pop()))
            case name if name in _LITERALS:
                stack.append(arg)
            case name:  # persistent ids, extension codes, buffers outside the file
                raise _Refused(f"it uses the pickle opcode {name}, which networks do not")
    raise ValueError("it does not end")


_LITERALS = frozenset(
    ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
     "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
     "BINBYTES8", "BYTEARRAY8"]
)  # fmt: skip


def _global(*parts: Any) -> Global:
    if sum(map(len, parts)) > MAX_PATH:
        raise _Refused("a name in it has no end")
    return Global(".".join(parts).replace(" ", "."))  # a TypeError unless all are text


def _made(maker: Any, args: Any, limits: _Limits, outermost: bool) -> Any:
    """Return what a call makes: a tensor or a container where the name is one of those, else a `Foreign`.

    outermost  whether this pickle may hold the memory of tensors as pickles, which must not hold more of them
    """
    if not isinstance(maker, Global) or not isinstance(args, tuple):
        raise _Refused("it calls something that is no named class or function")
    match maker.name.rpartition(".")[2], args:
        case "_reconstruct_persistent_obj", ({"class_name": str(name), "state": dict(state)},):
            return Foreign(name, state=state)  # "module_src", its program, stays behind
        case "_reconstructor", (Global(name), *_):  # copyreg's, of protocols 0 and 1
            return Foreign(name)
    match maker.name, args:
        case "torch.storage._load_from_bytes", (bytes(content),) if outermost:
            return _storage(content, limits)
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            _Storage(data), int(offset), tuple(size), tuple(stride), *_,
        ):  # fmt: skip
            return _tensor(data, offset, size, stride, limits)
        case "torch._tensor._rebuild_from_type_v2", (Global(function), Global(), tuple(rest), _) if (
            function != maker.name
        ):  # a tensor or parameter with attributes, which do not matter
            return _made(Global(function), rest, limits, outermost)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (Tensor() as data, *_):
            return data
        case "_codecs.encode", (str(text), "latin1"):  # how protocol 2 writes bytes
            limits.spend(len(text))
            return text.encode("latin-1")
        case "builtins.bytes" | "__builtin__.bytes", ():
            return b""
        case "collections.OrderedDict" | "dnnlib.util.EasyDict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            limits.spend(OBJECT * len(pairs))
            return {_key(key): value for key, value in pairs}
        case "builtins.set" | "__builtin__.set", (list(items),):
            limits.spend(OBJECT * len(items))
            return {_key(item) for item in items}
    return Foreign(maker.name, args)


class _Records:
    """The files within a zip file of torch.save: data.pkl and the memory of each tensor, data/KEY."""

    def __init__(self, opened: BinaryIO, archive: zipfile.ZipFile) -> None:
        # Private to the process, so that torch may have it as memory that can be written; closed with its last tensor.
        self.mapped = _mapped(opened)
        self.archive, self.limits = archive, _Limits(len(self.mapped))
        folders = [match[1] for name in archive.namelist() if (match := re.fullmatch(r"([^/]+/)data\.pkl", name))]
        if len(folders) != 1 or f"{folders[0]}constants.pkl" in archive.namelist():  # the latter is TorchScript's
            raise _Refused("a zip file, but not one of torch.save")
        self.folder = folders[0]
        if f"{self.folder}byteorder" in archive.namelist() and self.read("byteorder") != b"little":
            raise _Refused("its numbers are in another byte order than little endian")

    def read(self, name: str) -> bytes:
        """Return the content of a file, unpacked and checked."""
        entry = self.archive.getinfo(self.folder + name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _Refused("it is compressed in another way than zip's usual")
        if entry.flag_bits & 1:
            raise _Refused("it is encrypted")
        self.limits.spend(entry.file_size)
        # Not by zipfile: it takes the checksum 0 of a file that was written without for one, see `_check`.
        start, size = self._start(entry), entry.file_size
        with memoryview(self.mapped) as mapped, mapped[start : start + entry.compress_size] as packed:
            if entry.compress_type == zipfile.ZIP_STORED:
                content = bytes(packed[:size])
            else:  # no more than `size`, whatever it would unpack to; 0 would be no limit
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size) if size else b""
        if len(content) != size:
            raise ValueError(f"{name[:80]!r} ends early")
        _check(entry, content, name)
        return content

    def storage(self, which: Any) -> _Storage | Foreign:
        """Return the memory that a persistent id names."""
        match which:
            case ("storage", Global(kind), str(key), str(), int(count)):
                pass
            case _:
                raise _Refused("it names something outside the pickle that is no memory of a tensor")
        dtype = _STORAGES.get(kind)
        if dtype is None:
            return Foreign(kind)
        if (key, dtype) not in self.limits.storages:
            entry = self.archive.getinfo(f"{self.folder}data/{key}")
            if count * dtype.itemsize != entry.file_size:
                raise ValueError(f"the memory of a tensor has {entry.file_size} bytes where {count} {dtype} are said")
            self.limits.storages[key, dtype] = _Storage(self._numbers(entry, key, dtype, count)), None
        return self.limits.storages[key, dtype][0]

    def _numbers(self, entry: zipfile.ZipInfo, key: str, dtype: torch.dtype, count: int) -> Tensor:
        start = self._start(entry)
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not (plain and start % dtype.itemsize == 0 and count):
            return _from_bytes(self.read(f"data/{key}"), dtype)
        self.limits.spend(entry.file_size)  # many entries can share their bytes, and each is checked
        numbers = torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=start)
        with memoryview(self.mapped) as mapped, mapped[start : start + entry.file_size] as content:
            _check(entry, content, f"data/{key}")
        return numbers

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Return where the data of a file begin."""
        head = self.mapped[entry.header_offset : entry.header_offset + 30]
        if head[:4] != b"PK\3\4" or len(head) < 30:
            raise ValueError("a file in it does not begin where the list of files says")
        # A file begins with 30 bytes, of which the last four are the lengths of its name and of more, then these two.
        return entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


def _check(entry: zipfile.ZipInfo, content: bytes | memoryview, name: str) -> None:
    """Raise _Damaged if the content is not that which the checksum was made of. torch.load does not look.

    torch.save writes 0 for a checksum that was not made: after torch.serialization.set_crc32_options(False), and for
    tensors saved within torch.serialization.skip_data(), whose values come later. A true checksum of 0 is one in 2**32.
    """
    found, view = 0, memoryview(content)
    for begin in range(0, len(view) if entry.CRC else 0, PIECE):
        found = zlib.crc32(view[begin : begin + PIECE], found)
    if found != entry.CRC:
        raise _Damaged(repr(name[:80]))


def _mapped(opened: BinaryIO) -> Any:
    """Return a file's content as memory that can be written: mapped, or a copy where it is bytes already."""
    try:
        descriptor = opened.fileno()
    except OSError:  # io.BytesIO
        opened.seek(0)
        return bytearray(opened.read())
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def _storage(content: bytes, limits: _Limits) -> _Storage:
    """Read the file within the pickle in which torch keeps the memory of a tensor, in torch.save's old format.

    Five pickles (two constants, about the machine, the storage, the keys of all storages), the length, the numbers.
    """
    if id(content) in limits.storages:
        return limits.storages[id(content)][0]
    stream = io.BytesIO(content)
    try:
        what = [_interpret(stream, limits, lambda which: Foreign("", (which,))) for _ in range(5)]
        limits.spend(len(content))
        count, numbers = int.from_bytes(stream.read(8), "little"), stream.read()
    except _BROKEN as err:
        raise _Refused(f"the memory of a tensor in it cannot be read ({_line(err)[:100]})") from None
    match what:
        case [
            *start, {"little_endian": True}, Foreign(args=(("storage", Global(kind), _, _, int(said), None),)), [_]
        ] if tuple(start) == _LEGACY and kind in _STORAGES:  # fmt: skip
            dtype = _STORAGES[kind]
        case _:
            raise _Refused("the memory of a tensor in it is something else")
    if said != count or count * dtype.itemsize != len(numbers):
        raise _Refused("the memory of a tensor in it has another length than it says")
    storage = _Storage(_from_bytes(numbers, dtype))
    limits.storages[id(content)] = storage, content
    return storage


def _from_bytes(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _tensor(data: Tensor, offset: int, size: Sequence[Any], stride: Sequence[Any], limits: _Limits) -> Tensor:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in numbers):
        raise _Refused("a tensor in it has no shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if max(numbers) > MAX_SIDE or count > data.numel() or (count and last >= data.numel()):
        raise _Refused("a tensor in it is larger than its memory")
    limits.spend(count * data.element_size())  # many can share one memory, and be copied from it
    return torch.as_strided(data, size, stride, offset) if count else data.new_empty(size)


def _with_items(target: Any, items: Sequence[Any]) -> Any:
    """Set key, value, key, value, ... in a dictionary. Objects that are also dictionaries keep none of them."""
    if isinstance(target, dict):
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
    elif not isinstance(target, Foreign):
        raise TypeError("items for what is no dictionary")
    return target


def _extend(target: Any, items: Sequence[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, set):
        target.update(map(_key, items))
    elif not isinstance(target, Foreign):
        raise TypeError("items for what is no list and no set")


def _set_state(target: Any, state: Any, limits: _Limits) -> None:
    """Keep the attributes of a `Foreign`. Tensors and containers have none that matter."""
    if isinstance(target, Foreign):
        for part in state[:2] if isinstance(state, tuple) else (state,):  # (attributes, slots)
            if isinstance(part, dict):
                limits.spend(OBJECT * len(part))
                target.state.update(part)


def _named(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(name, str) and len(name) <= MAX_PATH for name in part)


def _key(item: Any) -> Any:
    """Return a key of a dictionary. Keys that could take for ever to hash or to tell apart lose their value.

    A nested tuple is hashed by recursion without a limit, and whoever likes finds many large numbers of one hash.
    """
    if isinstance(item, int):
        return item if abs(item) < 1 << 60 else object()
    return item if isinstance(item, (str, float, bytes, Global, type(None))) else object()
