# SPDX-License-Identifier: MIT
"""What a file is that should hold weights and does not: a pointer, a web page, an archive, another program's model."""

from __future__ import annotations

import zipfile
from typing import BinaryIO

HEAD = 4096  # bytes that are looked at

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the weights; fetch them in its repository: git lfs pull",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them; only PyTorch's weights are read"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first: gunzip FILE, or tar -xzf FILE"),
    (b"BZh", "compressed by bzip2; unpack it first: bunzip2 FILE, or tar -xjf FILE"),
    (b"\xfd7zXZ\0", "compressed by xz; unpack it first: unxz FILE, or tar -xJf FILE"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it first: unzstd FILE"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!\x1a\x07", "a rar archive; unpack it first"),
    (
        b"\x00\x05\x16\x07",
        "macOS's metadata of another file (AppleDouble); the weights have the name without the leading ._",
    ),
    (b"GGUF", "a GGUF file of llama.cpp; only PyTorch's weights are read"),
    (b"\x93NUMPY", "a NumPy array (.npy), not named weights"),
    (b"ftrt", "a TensorRT engine; rename it to end in .engine"),
    (b"ptrt", "a TensorRT engine; rename it to end in .engine"),
    (b"\x89PNG\r\n", "a PNG image, not weights"),
    (b"\xff\xd8\xff", "a JPEG image, not weights"),
    (b"%PDF", "a PDF document, not weights"),
)
_AGAIN = "download it again, with the link to the file itself (on the hub /resolve/, not /blob/)"


def recognised(opened: BinaryIO, suffix: str) -> str:
    """Return what a file is if that is no file of weights, or of another kind than its suffix says, else ""."""
    opened.seek(0)
    head = opened.read(HEAD)
    for start, what in _MAGIC:
        if head.startswith(start):
            return what
    begins = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:200].lower()
    if begins.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return f"a web page (HTML), not the weights; {_AGAIN}"
    if begins.startswith(b"<?xml") or (begins.startswith(b"<") and b"error" in begins):
        return f"an XML text, commonly a server's error, not the weights; {_AGAIN}"
    if begins.startswith((b"{", b"[")):
        if b'"weight_map"' in head or b'"total_size"' in head:
            return "the index of weights that are divided into several files, not weights; name their folder"
        return f"a JSON text, not weights; name the file beside it that holds the tensors, or {_AGAIN}"
    if head[257:262] == b"ustar":
        return "a tar archive (PyTorch before 0.2 saved those too); unpack it: tar -xf FILE"
    if head.startswith(b"PK\3\4"):
        return _zip(opened, suffix)
    is_safetensors = head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000
    if is_safetensors and suffix != ".safetensors":
        return "a safetensors file; rename it to end in .safetensors"
    if suffix == ".safetensors" and head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a PyTorch file or another pickle, not safetensors; rename it to end in .pt"
    if head[:1] == b"\x08" and 1 <= head[1] <= 20 and head[2:3] in (b"\x12", b"\x1a", b":"):
        return "an ONNX file; rename it to end in .onnx"
    if len(head) >= 512 and not any(head):
        return f"zeros at its beginning, as an interrupted download leaves them; {_AGAIN}"
    if len(head) > 8 and all(9 <= byte <= 13 or 32 <= byte < 127 for byte in head[:200]) and _is_prose(head):
        return f"a text that begins {head[:40].split(bytes([10]))[0].decode('ascii')!r}, not weights; {_AGAIN}"
    return ""


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
