# SPDX-License-Identifier: MIT
"""Backends: what runs a model file. Chosen by suffix; one module each, by the protocols of `cmfast.backends.protocol`.

A backend that lives outside the runtime (PyTorch's, in cmfast_train) announces its suffix, or "folder", as an entry
point of the group "cmfast.backends", so the runtime never imports it by name. It is called with (path, device, threads,
variant, precision).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmfast.backends.origin import Origin, states_of
from cmfast.backends.protocol import VARIANTS as VARIANTS
from cmfast.backends.protocol import Backend as Backend
from cmfast.backends.protocol import DeviceTimes as DeviceTimes
from cmfast.backends.protocol import DrawBackend as DrawBackend
from cmfast.backends.protocol import Drawn as Drawn
from cmfast.backends.protocol import Inputs as Inputs
from cmfast.backends.protocol import LoopBackend as LoopBackend
from cmfast.backends.protocol import ReleasingBackend as ReleasingBackend
from cmfast.backends.protocol import TimedBackend as TimedBackend
from cmfast.backends.protocol import variant_words as variant_words
from cmfast.checks import MAX_THREADS as MAX_THREADS
from cmfast.checks import check_threads
from cmfast.errors import BackendError, CmfastError, MissingDependency
from cmfast.formats.manifest import check_model
from cmfast.formats.table import ENGINE, NCNN, ONNX, OPENVINO, ORT, Format, all_suffixes, format_of
from cmfast.formats.values import PRECISIONS


def _onnxruntime(*arguments: Any) -> Backend:
    from cmfast.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(*arguments)


def _tensorrt(*arguments: Any) -> Backend:
    from cmfast.backends.tensorrt import TensorRtBackend

    return TensorRtBackend(*arguments)


def _openvino(*arguments: Any) -> Backend:
    from cmfast.backends.openvino.backend import OpenVinoBackend

    return OpenVinoBackend(*arguments)


def _ncnn(*arguments: Any) -> Backend:
    from cmfast.backends.ncnn.backend import NcnnBackend

    return NcnnBackend(*arguments)


# What opens a file of each format of `cmfast.formats.table`; called with (path, device, threads, variant, sha256),
# OpenVINO's also with a precision.
BACKENDS: dict[str, Callable[..., Backend]] = {
    ONNX.name: _onnxruntime, ORT.name: _onnxruntime, ENGINE.name: _tensorrt, OPENVINO.name: _openvino,
    NCNN.name: _ncnn,
}  # fmt: skip


def open_backend(
    path: str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    *,
    variant: str = "",
    precision: str = "",
    sha256: str | None = None,
) -> Backend:
    """Open a model file with the backend of its suffix.

    Args:
        path: the file or folder.
        device: cpu or cuda; an unavailable one is an error. None: cuda for a TensorRT engine, which runs nowhere
            else, and cpu for everything else.
        threads: CPU threads, at most MAX_THREADS; None leaves the choice to the backend.
        variant: words of VARIANTS, as in "channels_last cuda_graph"; which exist and combine depends on the backend.
        precision: one of cmfast.formats.values.PRECISIONS, for a checkpoint that PyTorch runs and for a file that
            OpenVINO runs; any other exported file has its own.
        sha256: what the file must hash to, hex digits; anything else is refused, and nothing else than the bytes that
            were hashed is loaded.

    Returns:
        The opened backend.

    Raises:
        BackendError: no backend runs the file, or it does not have the device, variant or precision.
        ArtifactError: the file is missing, damaged, or not the hashed one.
        MissingDependency: the backend's library is not installed.
    """
    file = model_path(path)
    if device is None:
        device = known.device if (known := format_of(file)) else "cpu"
    _check(device, threads, variant, precision, sha256)
    variant = " ".join(variant_words(variant))
    known = _format(file, variant)
    if known and known is not OPENVINO and precision:
        raise BackendError(
            f"{file}: an exported file runs in the precision that it was exported with; "
            f"make another: cmfast-export model.pt --precision {precision}"
        )
    origin = Origin(
        path=file.absolute(), device=device, threads=threads, variant=variant, precision=precision, sha256=sha256,
        files=states_of(file), opener=open_backend,
    )  # fmt: skip
    backend = _open(file, device, threads, variant, precision, sha256)
    with contextlib.suppress(AttributeError):  # not in the protocol: others may have no room for it
        backend.origin = origin  # type: ignore[attr-defined]
    return backend


def _format(file: Path, variant: str) -> Format | None:
    """Return the format whose backend runs a file: OpenVINO's also for an .onnx file, with the variant "openvino"."""
    known = format_of(file)
    return OPENVINO if known is ONNX and "openvino" in variant.split() else known


def _open(file: Path, device: str, threads: int | None, variant: str, precision: str, sha256: str | None) -> Backend:
    if known := _format(file, variant):
        more = (precision,) if known is OPENVINO else ()
        return BACKENDS[known.name](file, device, threads, variant, sha256, *more)
    from importlib.metadata import entry_points  # slow to import, and .onnx does without

    name = "folder" if file.is_dir() else file.suffix.removeprefix(".")
    for entry in entry_points(group="cmfast.backends", name=name):
        try:
            backend_type = entry.load()
        except ModuleNotFoundError as err:
            what = "running a model folder" if file.is_dir() else f"running a {file.suffix} file"
            raise MissingDependency(what, (err.name or "?").split(".")[0], "train") from None
        backend: Backend
        if sha256 is None:
            backend = backend_type(file, device, threads, variant, precision)
            return backend
        from cmfast.backends.pinned import pinned

        with pinned(file, sha256) as same:
            backend = backend_type(same, device, threads, variant, precision)
        return backend
    names = sorted("." + entry.name for entry in entry_points(group="cmfast.backends") if entry.name != "folder")
    have = ", ".join([*all_suffixes(), *names])
    raise BackendError(f"{file}: no backend runs files ending in {file.suffix or 'nothing'}; there are some for {have}")


def model_path(path: object) -> Path:
    """Return the file or folder of a model, or raise CmfastError where `path` is no path, or there is none."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise CmfastError(f"a model is opened by its path, got {type(path).__name__}; pass a str or a Path")
    if not os.fspath(path):
        raise CmfastError("a model is opened by its path, got an empty text; pass the name of a file")
    try:
        return check_model(path)
    except ValueError as err:  # a null character
        raise CmfastError(f"{os.fspath(path)!r} is not a path: {err}") from None


def _check(device: object, threads: object, variant: object, precision: object, sha256: object) -> None:
    """Raise CmfastError for what no backend knows, whatever its type."""
    if not isinstance(device, str) or device not in ("cpu", "cuda"):
        raise CmfastError(f"device must be cpu or cuda, got {device!r}")
    check_threads(threads)
    variant_words(variant)
    if not isinstance(precision, str) or precision not in ("", *PRECISIONS):
        raise CmfastError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if sha256 is not None and not isinstance(sha256, str):
        raise CmfastError(f"a SHA-256 is passed as 64 hex digits, got {type(sha256).__name__}")
