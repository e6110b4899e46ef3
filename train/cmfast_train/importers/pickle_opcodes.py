# SPDX-License-Identifier: MIT
"""The opcodes of a pickle, interpreted one by one: none of them can call, import or set anything.

What a pickle would call becomes a `Foreign`, a record of its name, arguments and state. Tensors, and containers known
by name, are the exceptions: `_made` is the list of all of them, and builds them. Files are opened by `pickles`.
"""

from __future__ import annotations

import io
import lzma
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_PATH = 1000  # characters of a name; a few bytes of a pickle can otherwise make one without end
# Bytes that a file may make, over its size and beside it. A network takes four times its file where a pickle of
# protocol 0 goes through text; a few bytes that copy a large container again and again take thousands of times.
SIZES, BESIDE = 8, 1 << 28
OBJECT = 64  # bytes of a small object, or of a place in a container
MAX_SIDE, MAX_DIMS = 1 << 40, 8  # of a tensor

_LEGACY = 0x1950A86A20F9469CFC6C, 1001  # the first two pickles in torch.save's old format
_DTYPES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}


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
class Storage:
    """The memory of a tensor: one dimension, of the tensor's own type."""

    data: Tensor


class Refused(Exception):
    """The pickle asks for something that no file of weights needs."""


# pickletools raises ValueError for what is no pickle, zipfile, zlib and lzma have their own; the others are a file that
# contradicts itself. RuntimeError is torch's for numbers that it cannot work with, and zipfile's for encryption.
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RuntimeError, EOFError,
           NotImplementedError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
           DeprecationWarning)  # fmt: skip  # of a text with unknown escapes, where warnings are errors


class Limits:
    """What one file may still make, and the memory of its tensors that was made already."""

    def __init__(self, size: int) -> None:
        self.left = SIZES * size + BESIDE  # bytes
        self.storages: dict[Any, tuple[Storage, Any]] = {}  # the key, and what keeps its id from being used again

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Refused("what it asks for is many times larger than the file")


def interpret(data: Any, limits: Limits, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Run the opcodes of a pickle on a stack; `data` is a file. Nothing on the stack is ever called.

    Args:
        persistent: returns what stands outside the pickle; None: nothing does
    """
    stack: list[Any] = []
    marks: list[int] = []  # where groups of items begin
    memo: dict[Any, Any] = {}  # by number

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
                raise Refused(f"it uses the pickle opcode {name}, which networks do not")
    raise ValueError("it does not end")


_LITERALS = frozenset(
    ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
     "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
     "BINBYTES8", "BYTEARRAY8"]
)  # fmt: skip


def _global(*parts: Any) -> Global:
    if sum(map(len, parts)) > MAX_PATH:
        raise Refused("a name in it has no end")
    return Global(".".join(parts).replace(" ", "."))  # a TypeError unless all are text


def _made(maker: Any, args: Any, limits: Limits, outermost: bool) -> Any:
    """Return what a call makes: a tensor or a container where the name is one of those, else a `Foreign`.

    Args:
        outermost: whether this pickle may hold the memory of tensors as pickles, which must not hold more of them
    """
    if not isinstance(maker, Global) or not isinstance(args, tuple):
        raise Refused("it calls something that is no named class or function")
    match maker.name.rpartition(".")[2], args:
        case "_reconstruct_persistent_obj", ({"class_name": str(name), "state": dict(state)},):
            return Foreign(name, state=state)  # "module_src", its program, stays behind
        case "_reconstructor", (Global(name), *_):  # copyreg's, of protocols 0 and 1
            return Foreign(name)
    match maker.name, args:
        case "torch.storage._load_from_bytes", (bytes(content),) if outermost:
            return _storage(content, limits)
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            Storage(data), int(offset), tuple(size), tuple(stride), *_,
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


def _storage(content: bytes, limits: Limits) -> Storage:
    """Read the file within the pickle in which torch keeps the memory of a tensor, in torch.save's old format.

    Five pickles (two constants, about the machine, the storage, the keys of all storages), the length, the numbers.
    """
    if id(content) in limits.storages:
        return limits.storages[id(content)][0]
    stream = io.BytesIO(content)
    try:
        what = [interpret(stream, limits, lambda which: Foreign("", (which,))) for _ in range(5)]
        limits.spend(len(content))
        count, numbers = int.from_bytes(stream.read(8), "little"), stream.read()
    except BROKEN as err:
        raise Refused(f"the memory of a tensor in it cannot be read ({first_line(err)[:100]})") from None
    match what:
        case [
            *start, {"little_endian": True}, Foreign(args=(("storage", Global(kind), _, _, int(said), None),)), [_]
        ] if tuple(start) == _LEGACY and kind in STORAGES:  # fmt: skip
            dtype = STORAGES[kind]
        case _:
            raise Refused("the memory of a tensor in it is something else")
    if said != count or count * dtype.itemsize != len(numbers):
        raise Refused("the memory of a tensor in it has another length than it says")
    storage = Storage(from_bytes(numbers, dtype))
    limits.storages[id(content)] = storage, content
    return storage


def from_bytes(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _tensor(data: Tensor, offset: int, size: Sequence[Any], stride: Sequence[Any], limits: Limits) -> Tensor:
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MAX_DIMS or not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused("a tensor in it has no shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if max(numbers) > MAX_SIDE or count > data.numel() or (count and last >= data.numel()):
        raise Refused("a tensor in it is larger than its memory")
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


def _set_state(target: Any, state: Any, limits: Limits) -> None:
    """Keep the attributes of a `Foreign`. Tensors and containers have none that matter."""
    if isinstance(target, Foreign):
        for part in state[:2] if isinstance(state, tuple) else (state,):  # (attributes, slots)
            if isinstance(part, dict):
                limits.spend(OBJECT * len(part))
                target.state.update(part)


def first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]


def _key(item: Any) -> Any:
    """Return a key of a dictionary. Keys that could take for ever to hash or to tell apart lose their value.

    A nested tuple is hashed by recursion without a limit, and whoever likes finds many large numbers of one hash.
    """
    if isinstance(item, int):
        return item if abs(item) < 1 << 60 else object()
    return item if isinstance(item, (str, float, bytes, Global, type(None))) else object()
