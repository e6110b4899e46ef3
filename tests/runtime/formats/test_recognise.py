# SPDX-License-Identifier: MIT
"""Files that are something else under a model's name: named as what they are, in one line."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmfast.cli import info
from cmfast.errors import ArtifactError
from cmfast.formats.manifest import what_it_is_instead
from cmfast.formats.table import read_manifest

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title></head></html>"
BUCKET = b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.onnx", b"x")
    return buffer.getvalue()


INSTEAD = [
    (POINTER, "a git-lfs pointer, not the file itself; get the file: git lfs pull"),
    (PAGE, "an HTML page, not a model"),
    (b"<!-- moved --><html>", "an HTML page"),
    (BUCKET, "an XML text that begins with '<?xml version"),
    (b'{"error": "Not Found"}', 'a JSON text that begins with \'{"error"'),
    (b"Entry not found", "a text that begins with 'Entry not found'"),
    ("läßt grüßen ".encode() * 500, "a text that begins with 'läßt grüßen"),
    (zipped(), "a zip archive"),
    (b"\x1f\x8b\x08" + bytes(50), "compressed by gzip"),
    (b"\x18\0\0\0ORTM" + bytes(50), "in ONNX Runtime's own format; name it .ort"),
    (bytes(257) + b"ustar\x0000", "a tar archive"),
    (b"\x89PNG\r\n\x1a\n" + bytes(9), "a PNG image"),
    (b"\x80\x04\x95", "a Python pickle"),
    (b"\x10\0\0\0\0\0\0\0{}              ", "a safetensors file"),
    (bytes(9000), "nothing but zeros"),
]


@pytest.mark.parametrize(("content", "words"), INSTEAD, ids=[words for _, words in INSTEAD])
@pytest.mark.parametrize("suffix", ["onnx", "engine"])
def test_what_is_no_model_is_named_as_what_it_is(suffix: str, content: bytes, words: str, tmp_path: Path) -> None:
    assert words in what_it_is_instead(content)
    file = tmp_path / f"model.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(file)
    assert f": it is {words}" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"\x08\x08\x3a\x02ab", bytes(range(256)), b"\xc3", b"  \n\t "])
def test_what_is_not_known_is_not_guessed(content: bytes) -> None:
    assert what_it_is_instead(content) == ("" if content else "empty")


def test_models_are_not_taken_for_something_else(handmade_onnx: Callable[..., Path], tmp_path: Path) -> None:
    assert what_it_is_instead(handmade_onnx(8).read_bytes()) == ""
    torch.save({"weights": torch.zeros(2)}, tmp_path / "model.pt")
    assert what_it_is_instead((tmp_path / "model.pt").read_bytes()).startswith("a zip archive")


def test_an_engine_named_onnx_is_one_line_of_the_command(
    call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"ftrt" + bytes(500))
    refused(call(info.main, tmp_path / "model.onnx"), "not a whole ONNX file: it is a TensorRT engine; name it .engine")


def test_a_text_that_would_write_on_the_terminal_is_quoted_harmlessly(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes("<html \u202e>".encode())
    assert what_it_is_instead(b"ok \x1b[31m") == ""  # no text
    with pytest.raises(ArtifactError) as caught:
        read_manifest(tmp_path / "model.onnx")
    assert str(caught.value).isprintable()
