# SPDX-License-Identifier: MIT
"""What a file is that should have been a model: a download that stored a page, a pointer or an archive instead."""

from __future__ import annotations

from cmfast.errors import shown

HEAD = 4096  # bytes of a file that are enough

_LFS = b"version https://git-lfs.github.com/spec/"
_MAGIC = (  # first bytes, what the file is
    (
        b"PK\x03\x04",
        "a zip archive; unpack it if a model is in it",
    ),
    (b"\x1f\x8b", "compressed by gzip; unpack it: gunzip or tar -xzf"),
    (b"BZh", "compressed by bzip2; unpack it: bunzip2 or tar -xjf"),
    (b"\xfd7zXZ\x00", "compressed by xz; unpack it: unxz or tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it: unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"GGUF", "a GGUF file, as llama.cpp reads"),
    (b"ftrt", "a TensorRT engine; name it .engine"),
    (b"vtrt", "a TensorRT-RTX engine; name it .engine"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF-", "a PDF document"),
    (b"\x7fELF", "a program (ELF)"),
    (b"SQLite format 3\x00", "an SQLite database"),
)


def what_it_is_instead(head: bytes) -> str:
    """Return what a file is that is no model, in words that follow "it is", or "" where that is not known.

    A zip archive is named too: whoever expects one, as PyTorch's checkpoints are, asks only about other files.

    Args:
        head: the first bytes of the file, at best HEAD of them
    """
    head = head[:HEAD]
    if not head:
        return "empty"
    if head.startswith(_LFS):
        return "a git-lfs pointer, not the file itself; get the file: git lfs pull"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if head[4:8] == b"ORTM":
        return "in ONNX Runtime's own format; name it .ort"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it: tar -xf"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle; name it .pkl or .pt"
    size = int.from_bytes(head[:8], "little")
    if len(head) > 9 and 2 <= size < 2**32 and head[8:9] == b"{":
        return "a safetensors file; name it .safetensors"
    if not any(head):
        return "nothing but zeros where it begins, as a download that stopped leaves it; download it again"
    return _text(head)


def _text(head: bytes) -> str:
    """Return what a text is; "" where the bytes are none."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        if err.reason != "unexpected end of data":  # the head may end in the middle of a letter
            return ""
        text = head[: err.start].decode("utf-8-sig")
    text = text.strip()
    if not text or not all(letter.isprintable() or letter in "\t\r\n\f" for letter in text):
        return ""
    low = text[:200].lower()
    if low.startswith(("<!doctype html", "<html", "<head", "<body", "<script")) or "<html" in low:
        return "an HTML page, not a model: the download got a web page, perhaps one to log in; download it again"
    begin = shown(" ".join(text.split())[:60])
    if low.startswith("<"):
        return f"an XML text that begins with {begin}, as servers send errors; download it again"
    if low[0] in "{[":
        return f"a JSON text that begins with {begin}"
    return f"a text that begins with {begin}; download the file again"
