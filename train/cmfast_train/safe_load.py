# SPDX-License-Identifier: MIT
"""Files of tensors, read without running anything in them and without making much more than they hold.

    read_tensors(file)  # .pt, .pth, .ckpt, .bin or .safetensors: plain containers and tensors on the CPU
    safe_load(file)  # the same of any content that torch.save wrote

Zip files of torch.save go through the interpreter of `importers.pickles`, which cannot call anything. Files in
torch.save's old format go through torch.load with weights_only=True.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cmfast.errors import ArtifactError
from cmfast_train.border import naming, reading
from cmfast_train.recognise import recognised

MAX_HEAD = 1 << 20  # characters of the JSON in a safetensors file's metadata
MAX_NODES, MAX_NESTING = 100_000, 32  # of plain containers: a spec, a configuration, what a source says
MAX_TEXT, MAX_WHOLE = 1 << 20, 1 << 64
_UNUSUAL = {  # what makes a tensor that is none of plain numbers in the file
    "torch._utils._rebuild_meta_tensor_no_storage": 'a tensor on "meta", which has no values',
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_tensor_v2": "a tensor of a type that is not read (complex or quantised, for example)",
    "torch._utils._rebuild_tensor_v3": "a tensor of a type that is not read (float8, for example)",
}
_NOT_TENSORS = ("unsupported GLOBAL", "Unsupported global", "Unsupported class", "Unsupported op")  # torch's words


class HoldsObjectsError(ArtifactError):
    """A PyTorch file with more in it than tensors and plain containers."""


def read_tensors(file: Path, opened: BinaryIO | None = None) -> dict[str, Any]:
    """Return what a file of weights holds, plain containers and tensors on the CPU. Nothing in it is executed.

    A cmfast checkpoint gives {"format", "spec", "network", "source", "weights"}, any other what its author put there.

    Args:
        opened: the content where it was opened and checked already; `file` is its name then
    """
    if file.suffix == ".safetensors":
        with naming(file):
            return _read_safetensors(file, opened)
    content = safe_load(file, opened)
    if not isinstance(content, dict):
        raise ArtifactError(f"{file}: a PyTorch file, but it holds a {type(content).__name__}, no named weights")
    return content


def safe_load(file: Path, opened: BinaryIO | None = None) -> Any:
    """Return what torch.save wrote, if that is tensors and plain containers, on the CPU; errors in one line."""
    with naming(file), _opened(file, opened) as stream:
        refuse_others(file, stream)
        stream.seek(0)
        if stream.read(4) != b"PK\3\4":
            return _load_old(file, stream)
        from cmfast_train.importers import pickles  # not above: that package is made of this module

        content = pickles.read_torch(file, stream)
        if what := _first_object(content):
            kind = _UNUSUAL.get(what)
            what = kind or f"code or objects ({what[:100]})"
            raise HoldsObjectsError(f"{file}: it holds {what}, not only tensors; refused, nothing in it was run")
        return content


def refuse_others(file: Path, opened: BinaryIO) -> None:
    """Raise ArtifactError if the file is known to be something else than its suffix says."""
    if what := recognised(opened, file.suffix):
        raise ArtifactError(f"{file}: {what}")


def unusual(value: Any) -> str:
    """Return what kind of tensor this is, if one of those that `importers.pickles` does not build, else ""."""
    return _UNUSUAL.get(value.name, "") if type(value).__name__ == "Foreign" else ""


def plain(value: Any, where: str) -> Any:
    """Return a copy of plain containers, or raise ArtifactError: of their size, or of what is in them.

    A container can stand in itself a million times by reference, so what counts is the size of the copy.
    """
    left = [MAX_NODES, MAX_TEXT]

    def copy(one: Any, place: str, depth: int) -> Any:
        left[0] -= 1
        if isinstance(one, str):
            left[1] -= len(one)
        if left[0] < 0 or left[1] < 0 or depth > MAX_NESTING:
            raise ArtifactError(f"{where} is too large or nested too deeply; no model needs that")
        if isinstance(one, dict):
            for key in one:
                if not isinstance(key, str):
                    raise ArtifactError(f"{where}{place} has a key of type {type(key).__name__}, not a text")
                left[1] -= len(key)
            return {key: copy(part, f"{place}.{key[:40]}", depth + 1) for key, part in one.items()}
        if isinstance(one, (list, tuple)):
            parts = [copy(part, f"{place}.{number}", depth + 1) for number, part in enumerate(one)]
            return parts if isinstance(one, list) else tuple(parts)
        whole = isinstance(one, int) and abs(one) < MAX_WHOLE
        if not (whole or one is None or isinstance(one, (str, float))):
            kind = "whole number that is too large" if isinstance(one, int) else type(one).__name__
            raise ArtifactError(f"{where}{place} is a {kind}; only texts, numbers, lists and dictionaries can be there")
        return one

    return copy(value, "", 0)


@contextlib.contextmanager
def _opened(file: Path, opened: BinaryIO | None) -> Iterator[BinaryIO]:
    if opened is not None:
        yield opened
    else:
        with open(file, "rb") as stream:
            yield stream


def _first_object(content: Any) -> str:
    """Return the name of something in `content` that is neither tensor nor plain container; each is visited once."""
    rest, seen = [content], set()
    while rest:
        one = rest.pop()
        if isinstance(one, (dict, list, tuple, set, frozenset)):
            if id(one) not in seen:
                seen.add(id(one))
                rest += one
                if isinstance(one, dict):
                    rest += one.values()
        elif type(one).__name__ in ("Foreign", "Global"):
            return str(one.name) or "unknown objects"
        elif type(one) is object:
            return "keys that are no texts or numbers"
    return ""


def _load_old(file: Path, opened: BinaryIO) -> Any:
    """Read torch.save's format of before PyTorch 1.6."""
    opened.seek(0)
    with reading(file, "not a whole PyTorch file"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
                content = torch.load(opened, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as err:
            text = str(err)
            if any(word in text for word in _NOT_TENSORS):
                what = text.split("GLOBAL ")[-1].split()[0] if "GLOBAL " in text else "unknown objects"
                raise HoldsObjectsError(
                    f"{file}: it holds code or objects ({what}), not only tensors; refused, nothing in it was run"
                ) from None
            raise ArtifactError(f"{file}: not a readable PyTorch file: {text.splitlines()[0][:200]}") from None
    _check_sizes(content, file)
    return content


def _check_sizes(content: Any, file: Path) -> None:
    """Raise ArtifactError if a tensor has more numbers than its memory: copied, it would have them all."""
    rest, seen = [content], set()
    while rest:
        one = rest.pop()
        if isinstance(one, Tensor):
            if one.layout == torch.strided and one.device.type == "cpu" and not one.is_quantized:
                size = one.untyped_storage().nbytes()
                if one.numel() * one.element_size() > size:
                    raise ArtifactError(f"{file}: a tensor in it is larger than its memory; refused")
        elif isinstance(one, (dict, list, tuple, set)) and id(one) not in seen:
            seen.add(id(one))
            rest += one.values() if isinstance(one, dict) else one


def _read_safetensors(file: Path, opened: BinaryIO | None) -> dict[str, Any]:
    from safetensors import safe_open
    from safetensors.torch import load

    with _opened(file, opened) as stream:
        refuse_others(file, stream)
    with reading(file, "not a whole safetensors file"):
        if opened is None:
            with safe_open(file, framework="pt") as mapped:
                metadata = mapped.metadata() or {}
                weights = {name: mapped.get_tensor(name) for name in mapped.keys()}  # noqa: SIM118, not a mapping
        else:
            opened.seek(0)
            content = opened.read()
            weights = load(content)
            head_size = int.from_bytes(content[:8], "little")
            metadata = json.loads(content[8 : 8 + head_size]).get("__metadata__", {})
    text = metadata.get("cmfast", "null")
    if len(text) > MAX_HEAD:
        raise ArtifactError(f"{file}: its description has {len(text)} characters; at most {MAX_HEAD} are read")
    try:
        head = json.loads(text)
    except (ValueError, RecursionError):
        head = None
    return {**head, "weights": weights} if isinstance(head, dict) else weights
