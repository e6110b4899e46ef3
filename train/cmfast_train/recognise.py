# SPDX-License-Identifier: MIT
"""What a file is that should hold weights and does not: a pointer, a web page, an archive, another program's model."""

from __future__ import annotations

import zipfile
from typing import BinaryIO

from cmfast.formats.manifest import what_it_is_instead

HEAD = 4096  # bytes that are looked at
_MAGIC = (  # what only those meet who look for weights; the rest is the runtime's
    (
        b"\x00\x05\x16\x07",
        "macOS's metadata of another file (AppleDouble); the weights have the name without the leading ._",
    ),
    (b"\x93NUMPY", "a NumPy array (.npy), not named weights"),
)


def recognised(opened: BinaryIO, suffix: str) -> str:
    """Return what a file is if that is no file of weights, or of another kind than its suffix says, else ""."""
    opened.seek(0)
    head = opened.read(HEAD)
    for start, what in _MAGIC:
        if head.startswith(start):
            return what
    if head.startswith(b"PK\3\4"):
        return _zip(opened, suffix)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        is_wrong = suffix == ".safetensors"
        return "a PyTorch file or another pickle, not safetensors; rename it to end in .pt" if is_wrong else ""
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "" if suffix == ".safetensors" else "a safetensors file; rename it to end in .safetensors"
    if len(head) > 2 and head[0] == 8 and 1 <= head[1] <= 20 and head[2:3] in (b"\x12", b"\x1a", b":"):
        if suffix == ".onnx":
            return "an ONNX file, a graph to run; training starts from a checkpoint (.pt, .safetensors)"
        return "an ONNX file; rename it to end in .onnx"
    if head[:1] == b"{" and (b'"weight_map"' in head or b'"total_size"' in head):
        return "the index of weights that are divided into several files, not weights; name their folder"
    if len(head) < 512 and not any(head):
        return ""
    what = what_it_is_instead(head)
    return "" if what.startswith("a text ") and not _is_prose(head) else what


def _is_prose(head: bytes) -> bool:
    """Whether text is no pickle of protocol 0, which is text too: that has many short lines, and ends in a dot."""
    first = head.split(b"\n")[0]
    return b" " in first.strip() and first[1:2].islower() and not first.startswith((b"V", b"c"))


def _zip(opened: BinaryIO, suffix: str) -> str:
    try:
        with zipfile.ZipFile(opened) as archive:
            names = archive.namelist()[:10_000]
    except Exception:  # damaged: the reader says how
        return ""
    last = {name.rpartition("/")[2] for name in names}
    if {"constants.pkl", "data.pkl"} <= last or any("/code/" in name for name in names):
        return (
            "a TorchScript archive (torch.jit.save), which holds a program; save its weights: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if "data.pkl" in last:
        return "a PyTorch file, not safetensors; rename it to end in .pt" if suffix == ".safetensors" else ""
    if any(
        name.endswith(("serialized_exported_program.json", "models/model.json", "archive_format")) for name in names
    ):
        return "an archive of torch.export (.pt2), which holds a program; save the state dict of the module"
    if "model.weights.h5" in last:
        return "a Keras archive; only PyTorch's weights are read"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz), not a file of PyTorch"
    for name in names:
        if name.endswith((".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pkl")):
            return f"a zip archive with {ascii(name)[1:-1][:60]} in it; unpack it first: unzip FILE"
    return "a zip archive, but not one of torch.save, so not a whole PyTorch file"
