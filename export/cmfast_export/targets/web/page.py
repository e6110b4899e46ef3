# SPDX-License-Identifier: MIT
"""The target web: a folder with a page that draws with the model in the browser, and everything that it needs.

    OUT/index.html  page.js  worker.js  cmfast/*.js     what is beside this file, in assets
    OUT/model.onnx, or model.onnx.0, .1, ..             the verified file, in parts that every host takes
    OUT/onnxruntime-web/                                the runtime, from npm, with its licence
    OUT/site.json                                       what the page reads first

The page asks no other server. It reads the manifest from the model itself.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.conditions import Condition
from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import atomic_folder, check_target_folder
from cmfast.formats.manifest import Manifest, check_plain, check_unchanged, file_sha256, read_onnx, read_onnx_file
from cmfast.formats.table import ONNX, format_of
from cmfast_export._target import files_of
from cmfast_export.targets.web.runtime import PACKAGE, WebOptions, check_runtime, runtime

if TYPE_CHECKING:
    from cmfast_export.request import Request

ASSETS = Path(__file__).resolve().parent / "assets"
LIMIT = 25_000_000  # bytes of a file; hosts of static pages take no larger ones
PART = 24_000_000  # bytes of a part of the model
CHANNELS = (1, 3, 4)  # of an image on a canvas: grey, RGB, RGBA
MOST_NUMBERS = 4096  # of a tensor condition, which are typed
DTYPES = ("float32", "float16")  # that onnxruntime-web computes in


@dataclass(frozen=True, kw_only=True)
class Written:
    """A page that was written."""

    path: Path
    manifest: Manifest
    version: str  # of onnxruntime-web
    files: int
    size: int  # bytes of all files
    largest: int  # bytes of the largest file
    webgpu: bool


def check(request: Request) -> None:
    """Raise CmfastError where the page of a request cannot be written: before the work, not after it."""
    assert isinstance(request.options, WebOptions)
    read = [file for path in request.inputs for file in files_of(path)]
    check_target_folder(request.out, read)
    check_runtime(request.options)
    if request.graph is None:
        _check_file(request.model)
    elif request.graph.precision not in ("fp32", "fp16"):
        raise CmfastError(f"browsers compute in fp32 and fp16, got --precision {request.graph.precision}")
    elif request.graph.batch not in (None, 1):
        raise CmfastError(f"a page draws one sample at a time, got --batch {request.graph.batch}; leave it out")


def write(model: Path, request: Request) -> Written:
    """Write the page of a verified ONNX file to `request.out`."""
    options = request.options
    assert isinstance(options, WebOptions)
    manifest = _check_file(model)
    with runtime(options) as (version, files), atomic_folder(request.out) as folder:
        shutil.copytree(ASSETS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / PACKAGE).mkdir()
        for file in files:
            shutil.copyfile(file, folder / PACKAGE / file.name)
        about = {
            "title": options.title or request.name,
            "model": [part.name for part in _parts(model, folder)],
            "bytes": model.stat().st_size,
            "sha256": file_sha256(model),
            "webgpu": options.webgpu,
            "onnxruntime_web": version,
        }
        (folder / "site.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        largest = max(sizes, key=lambda path: sizes[path])
        if sizes[largest] >= LIMIT:
            raise CmfastError(
                f"{largest.name} of {PACKAGE} {version} has {sizes[largest] / 1e6:.1f} MB, and hosts of static pages "
                f"take less than {LIMIT / 1e6:.0f} MB a file; use another version"
            )
    return Written(
        path=request.out, manifest=manifest, version=version, files=len(sizes), size=sum(sizes.values()),
        largest=sizes[largest], webgpu=options.webgpu,
    )  # fmt: skip


def _parts(model: Path, folder: Path) -> list[Path]:
    """Copy the model into the folder, whole or in parts of PART bytes, and return its files in order."""
    size = model.stat().st_size
    if size <= PART:
        return [Path(shutil.copyfile(model, folder / "model.onnx"))]
    parts = [folder / f"model.onnx.{i}" for i in range(-(-size // PART))]
    with model.open("rb") as opened:
        for part in parts:
            part.write_bytes(opened.read(PART))
    return parts


def _check_file(file: Path) -> Manifest:
    """Return the manifest of an ONNX file that a page can draw with, else raise CmfastError."""
    if format_of(file) is not ONNX:
        raise ArtifactError(f"{file}: a page is made from an .onnx file or a checkpoint; export the checkpoint")
    manifest, _ = read_onnx(file)
    check_unchanged(file, manifest)
    check_plain(file, manifest, "browsers")
    spec = manifest.spec
    if manifest.kind not in ("denoiser", "sampler"):
        raise ArtifactError(f"{file} is of kind {manifest.kind}; a page draws with a denoiser or a sampler")
    if manifest.dtype not in DTYPES:
        raise ArtifactError(f"{file} computes in {manifest.dtype}, and browsers in {' and '.join(DTYPES)}")
    if spec.data == "image" and spec.shape[0] not in CHANNELS:
        raise ArtifactError(f"{file}: a page shows images of 1, 3 or 4 channels, and these have {spec.shape[0]}")
    if spec.data != "image" and len(spec.shape) > 2:
        raise ArtifactError(f"{file}: a page plots arrays [T] and [T, A], and this model draws {list(spec.shape)}")
    if large := [each.name for each in spec.conditions if _numbers(each) > MOST_NUMBERS]:
        raise ArtifactError(f"{file}: the condition {large[0]} has more than {MOST_NUMBERS:,} numbers to be typed")
    if external := read_onnx_file(file).external:
        raise ArtifactError(f"{file}: its weights are in {external[0]!r}, beside it; a browser opens single files only")
    if _batch(file) not in (None, 1):
        raise ArtifactError(f"{file}: its batch is fixed, and a page draws one sample at a time; export it without")
    return manifest


def _numbers(condition: Condition) -> int:
    return math.prod(side for side in condition.shape if not isinstance(side, str))


def _batch(file: Path) -> int | None:
    from cmfast.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(file).batch
