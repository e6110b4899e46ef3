# SPDX-License-Identifier: MIT
"""Pickled objects, as EDM, ECT and FastGen save them, read without running anything that is in them.

    tree = read_pickle(file)  # pickle.dump: a network snapshot of EDM or ECT
    tree = read_torch(file)  # torch.save, with objects beside the tensors
    weights = module_tensors(tree["ema"], file)  # {name: tensor}

Such a file names classes and functions, or holds their source code, which `pickle.load` executes. `pickle_opcodes`
reads it without: what a pickle would call becomes a `Foreign`, a record. What a file can make it make is bounded by the
file's size.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cmfast.errors import ArtifactError
from cmfast_train.importers.pickle_opcodes import (
    BROKEN,
    MAX_PATH,
    STORAGES,
    Foreign,
    Global,
    Limits,
    Refused,
    Storage,
    first_line,
    from_bytes,
    interpret,
)

MAX_MODULES, MAX_TENSORS = 10_000, 100_000  # of one network; the largest known has a tenth
PIECE = 1 << 24  # bytes that are summed up at once; Ctrl-C waits for them


def read_pickle(file: Path) -> Any:
    """Return what a pickle holds: plain containers, tensors on the CPU, and `Foreign` for every other object."""
    with (
        _refusing(file, "pickle"),
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        if data[:2] == b"PK":
            raise ArtifactError(f"{file}: torch.save wrote this, not pickle; rename it to end in .pt")
        return interpret(data, Limits(len(data)))


def read_torch(file: Path, opened: BinaryIO | None = None) -> Any:
    """Return what torch.save wrote, with `Foreign` for what is neither plain container nor tensor, as `read_pickle`.

    The tensors share the memory of the mapped file where it is not compressed.

    Args:
        opened: the content where it was opened already; `file` is its name then
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
            return interpret(io.BytesIO(records.read("data.pkl")), records.limits, records.storage)


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
                    raise ArtifactError(f"{where} has a weight {name[:80]!r} that is not a tensor")
                tensors[path + name] = value
        rest += [(f"{path}{name}.", value) for name, value in reversed(modules.items()) if value is not None]
    return tensors


class _Damaged(Exception):
    """The data of a file within the zip file, of this name, are not those that its checksum was made of."""


@contextlib.contextmanager
def _refusing(file: Path, kind: str) -> Iterator[None]:
    """Turn whatever a file can provoke into an error in one line."""
    try:
        yield
    except ArtifactError:
        raise
    except Refused as err:
        raise ArtifactError(f"{file}: {err}; refused, nothing in it was run") from None
    except _Damaged as err:
        raise ArtifactError(
            f"{file} is damaged: the data of {err} do not match their checksum; copy or download it again"
        ) from None
    except BROKEN as err:
        raise ArtifactError(f"{file}: not a whole {kind}: {first_line(err)}") from None
    except OSError as err:
        if err.filename is not None:
            raise  # the file itself cannot be opened
        raise ArtifactError(f"{file}: not a whole {kind}: {first_line(err)}") from None  # it points outside itself


class _Records:
    """The files within a zip file of torch.save: data.pkl and the memory of each tensor, data/KEY."""

    def __init__(self, opened: BinaryIO, archive: zipfile.ZipFile) -> None:
        # Private to the process, so that torch may have it as memory that can be written; closed with its last tensor.
        self.mapped = _mapped(opened)
        self.archive, self.limits = archive, Limits(len(self.mapped))
        folders = [match[1] for name in archive.namelist() if (match := re.fullmatch(r"([^/]+/)data\.pkl", name))]
        if len(folders) != 1 or f"{folders[0]}constants.pkl" in archive.namelist():  # the latter is TorchScript's
            raise Refused("a zip file, but not one of torch.save")
        self.folder = folders[0]
        if f"{self.folder}byteorder" in archive.namelist() and self.read("byteorder") != b"little":
            raise Refused("its numbers are in another byte order than little endian")

    def read(self, name: str) -> bytes:
        """Return the content of a file, unpacked and checked."""
        entry = self.archive.getinfo(self.folder + name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Refused("it is compressed in another way than zip's usual")
        if entry.flag_bits & 1:
            raise Refused("it is encrypted")
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

    def storage(self, which: Any) -> Storage | Foreign:
        """Return the memory that a persistent id names."""
        match which:
            case ("storage", Global(kind), str(key), str(), int(count)):
                pass
            case _:
                raise Refused("it names something outside the pickle that is no memory of a tensor")
        dtype = STORAGES.get(kind)
        if dtype is None:
            return Foreign(kind)
        if (key, dtype) not in self.limits.storages:
            entry = self.archive.getinfo(f"{self.folder}data/{key}")
            if count * dtype.itemsize != entry.file_size:
                raise ValueError(f"the memory of a tensor has {entry.file_size} bytes where {count} {dtype} are said")
            self.limits.storages[key, dtype] = Storage(self._numbers(entry, key, dtype, count)), None
        return self.limits.storages[key, dtype][0]

    def _numbers(self, entry: zipfile.ZipInfo, key: str, dtype: torch.dtype, count: int) -> Tensor:
        start = self._start(entry)
        plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not (plain and start % dtype.itemsize == 0 and count):
            return from_bytes(self.read(f"data/{key}"), dtype)
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


def _named(part: Any) -> bool:
    return isinstance(part, dict) and all(isinstance(name, str) and len(name) <= MAX_PATH for name in part)
