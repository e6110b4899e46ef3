# SPDX-License-Identifier: MIT
"""The table of file formats that models are exported to. What a suffix means is decided here and nowhere else.

    format_of("model.onnx") is ONNX            # None: not an exported model, a checkpoint perhaps
    read_manifest("model.engine")

A new format is a module beside this one that reads its manifest, a row here, and a backend that runs it
(`cmfast.backends`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import (
    Manifest,
    check_file,
    check_model,
    external_file,
    file_sha256,
    read_onnx,
    read_onnx_file,
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format.

    Attributes:
        name: as `cmfast-export --format` calls it.
        suffixes: of its files, the usual one first.
        device: where a file runs unless another device is requested.
        read: returns the manifest of a file, or raises ArtifactError.
    """

    name: str
    suffixes: tuple[str, ...]
    device: str
    read: Callable[[Path], Manifest]


def _read_onnx(file: Path) -> Manifest:
    return read_onnx(file)[0]


def _read_plan(file: Path) -> Manifest:
    from cmfast.formats.tensorrt_plan import read_plan  # a reader is imported when a file needs it

    return read_plan(file)


def _read_ir(file: Path) -> Manifest:
    from cmfast.formats.openvino_ir import read_ir

    return read_ir(file)


def _read_ort(file: Path) -> Manifest:
    from cmfast.formats.ort_format import read_ort

    return read_ort(file)


def _read_ncnn(file: Path) -> Manifest:
    from cmfast.formats.ncnn_folder import read_ncnn

    return read_ncnn(file)


ONNX = Format(name="onnx", suffixes=(".onnx",), device="cpu", read=_read_onnx)
ENGINE = Format(name="engine", suffixes=(".engine", ".plan"), device="cuda", read=_read_plan)  # also TensorRT-RTX's
OPENVINO = Format(name="openvino", suffixes=(".xml",), device="cpu", read=_read_ir)  # its weights are beside, in .bin
ORT = Format(name="ort", suffixes=(".ort",), device="cpu", read=_read_ort)  # ONNX Runtime's own
NCNN = Format(name="ncnn", suffixes=(".param",), device="cpu", read=_read_ncnn)  # with its .bin and manifest.json
FORMATS = (ONNX, ENGINE, OPENVINO, ORT, NCNN)


def format_of(path: str | os.PathLike[str]) -> Format | None:
    """Return the format that a file's suffix stands for, None for what is not an exported model."""
    suffix = Path(path).suffix
    return next((each for each in FORMATS if suffix in each.suffixes), None)


def all_suffixes() -> tuple[str, ...]:
    """Return the suffixes of all formats."""
    return tuple(suffix for each in FORMATS for suffix in each.suffixes)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of an exported file. It needs neither a backend nor PyTorch.

    Args:
        path: an .onnx file, a TensorRT engine, or another exported format.

    Returns:
        The manifest, checked.

    Raises:
        ArtifactError: the file is missing, damaged, or no exported model; the error says what it is and what to type.
    """
    file = check_file(path)
    if found := format_of(file):
        return found.read(file)
    raise ArtifactError(
        f"{file}: files ending in {file.suffix or 'nothing'} are not exported models; "
        f"need {' or '.join(all_suffixes())}"
    )


def model_bytes(path: str | os.PathLike[str]) -> int:
    """Return the size of a model, bytes: of a folder all files in it, of a file also the weights beside it."""
    file = Path(path)
    if file.is_dir():
        return sum(part.stat().st_size for part in file.rglob("*") if part.is_file())
    return file.stat().st_size + sum(each.stat().st_size for each in files_beside(file))


def files_beside(file: Path) -> list[Path]:
    """Return the files that an exported file needs beside it: those that an .onnx file names, the .bin of an IR, .."""
    found, weights = format_of(file), f"{file.stem}.bin"
    names: set[str] = set(read_onnx_file(file).external) if found is ONNX else set()
    names |= {weights} if found in (OPENVINO, NCNN) else set()
    names |= {"manifest.json"} if found is NCNN else set()
    return [external_file(file, name, hard_links=True) for name in sorted(names)]


def model_files(path: Path) -> dict[str, Path]:
    """Return the files of a model by the names of a copy: NAME, and what is beside it; of a folder NAME/.. each."""
    path = check_model(path)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return {f"{path.name}/{file.relative_to(path).as_posix()}": file for file in inside}
    return {file.name: file for file in [path, *files_beside(path)]}


def model_sha256(path: Path) -> str:
    """Return the SHA-256 of a model: of its file, or where there are several, of their names and their SHA-256s."""
    return sha256_of({name: file_sha256(file) for name, file in model_files(path).items()})


def sha256_of(files: Mapping[str, str]) -> str:
    """Return the SHA-256 of a model from those of its files, by the names that `model_files` gives them.

    What the model itself is called makes no difference.
    """
    if len(files) == 1 and "/" not in (name := next(iter(files))):
        return files[name]
    lines = (f"{each}  {name.partition('/')[2] or Path(name).suffix}\n" for name, each in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
