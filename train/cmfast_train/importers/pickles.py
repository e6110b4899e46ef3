# SPDX-License-Identifier: MIT
"""Whole pickled networks, as EDM and ECT save them, read without running anything that is in them.

    tree = read_pickle(file)
    weights = module_tensors(tree["ema"], file)  # {name: tensor}

Such a file holds the source code of its classes, which `pickle.load` executes. Here the opcodes are interpreted one by
one and none of them can call, import or set anything: what a pickle would call becomes a `Foreign`, a record of its
name, arguments and state. Tensors, and containers known by name, are the exceptions; they are built by this module.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError

# Of one network; the largest known has a tenth. A few bytes of a pickle can otherwise make names without end.
MAX_MODULES, MAX_PATH = 10_000, 1000


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
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:2] == b"PK":
                raise ArtifactError(f"{file}: torch.save wrote this, not pickle; rename it to end in .pt")
            return _interpret(data)
    except ArtifactError:
        raise
    except _Refused as err:
        raise ArtifactError(f"{file}: {err}; refused, nothing in it was run") from None
    # pickletools raises ValueError for what is no pickle; the others are a pickle that contradicts itself.
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as err:
        what = (str(err).splitlines() or [type(err).__name__])[0][:200]
        raise ArtifactError(f"{file}: not a whole pickle: {what}") from None


def module_tensors(module: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict of a pickled torch module: every parameter and persistent buffer by its dotted name."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    rest: list[tuple[str, Any]] = [("", module)]
    while rest:
        path, one = rest.pop()
        where = f"{file}: the module {path.rstrip('.')[:80]!r}"
        if not isinstance(one, Foreign) or id(one) in seen or len(seen) >= MAX_MODULES or len(path) > MAX_PATH:
            raise ArtifactError(f"{where} is none, or is in there twice, or too many are")
        seen.add(id(one))
        parameters, buffers, modules = (one.state.get(key, {}) for key in ("_parameters", "_buffers", "_modules"))
        transient = one.state.get("_non_persistent_buffers_set", set())
        if not isinstance(transient, (set, frozenset)) or not all(map(_named, (parameters, buffers, modules))):
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


def _interpret(data: Any) -> Any:
    """Run the opcodes of a pickle on a stack; `data` is a file. Nothing on the stack is ever called."""
    stack: list[Any] = []
    marks: list[int] = []  # where groups of items begin
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = marks.pop()
        items = stack[place:]
        del stack[place:]
        return items

    for opcode, arg, _ in pickletools.genops(data):
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
                stack.append(Global(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Global(".".join((module, name))))  # a TypeError unless both are text
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(_made(stack.pop(), args))
            case "NEWOBJ_EX":
                named, args = stack.pop(), stack.pop()
                stack.append(_made(stack.pop(), (*args, named)))
            case "OBJ":
                maker, *rest = since_mark()
                stack.append(_made(maker, tuple(rest)))
            case "INST":
                stack.append(_made(Global(arg.replace(" ", ".")), tuple(since_mark())))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
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


def _made(maker: Any, args: Any) -> Any:
    """Return what a call makes: a tensor or a container where the name is one of those, else a `Foreign`."""
    if not isinstance(maker, Global) or not isinstance(args, tuple):
        raise _Refused("it calls something that is no named class or function")
    match maker.name.rpartition(".")[2], args:
        case "_reconstruct_persistent_obj", ({"class_name": str(name), "state": dict(state)},):
            return Foreign(name, state=state)  # "module_src", its program, stays behind
        case "_reconstructor", (Global(name), *_):  # copyreg's, of protocols 0 and 1
            return Foreign(name)
    match maker.name, args:
        case "torch.storage._load_from_bytes", (bytes(content),):
            return _storage(content)
        case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", (
            _Storage(data), int(offset), tuple(size), tuple(stride), *_,
        ):  # fmt: skip
            return _tensor(data, offset, size, stride)
        case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (Tensor() as data, *_):
            return data
        case "_codecs.encode", (str(text), "latin1"):  # how protocol 2 writes bytes
            return text.encode("latin-1")
        case "builtins.bytes" | "__builtin__.bytes", ():
            return b""
        case "collections.OrderedDict" | "dnnlib.util.EasyDict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            return {_key(key): value for key, value in pairs}
        case "builtins.set" | "__builtin__.set", (list(items),):
            return {_key(item) for item in items}
    return Foreign(maker.name, args)


def _storage(content: bytes) -> _Storage:
    """Read the pickle within the pickle in which torch keeps the memory of a tensor, by torch's own safe reader."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # typed storages are deprecated, and what such files hold
            storage = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise _Refused("the memory of a tensor in it is something else")
            return _Storage(torch.empty(0, dtype=storage.dtype).set_(storage))
    except _Refused:
        raise
    except Exception as err:  # whatever torch raises for bytes that it did not write, and for objects within
        what = (str(err).splitlines() or [type(err).__name__])[0][:100]
        raise _Refused(f"the memory of a tensor in it cannot be read ({what})") from None


def _tensor(data: Tensor, offset: int, size: Sequence[Any], stride: Sequence[Any]) -> Tensor:
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise _Refused("a tensor in it has no shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= data.numel():
        raise _Refused("a tensor in it is larger than its memory")
    return torch.as_strided(data, size, stride, offset) if math.prod(size) else data.new_empty(size)


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


def _set_state(target: Any, state: Any) -> None:
    """Keep the attributes of a `Foreign`. Tensors and containers have none that matter."""
    if isinstance(target, Foreign):
        for part in state if isinstance(state, tuple) else (state,):  # (attributes, slots)
            if isinstance(part, dict):
                target.state.update(part)


def _named(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(name, str) for name in part)


def _key(item: Any) -> Any:
    """Return a key of a dictionary. Hashing a nested tuple recurses without a limit, so other keys lose their value."""
    return item if isinstance(item, (str, int, float, bytes, Global, type(None))) else object()
