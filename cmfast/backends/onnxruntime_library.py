# SPDX-License-Identifier: MIT
"""ONNX Runtime as a Python module: the only place that imports it, with its telemetry off; its execution providers."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmfast.errors import MissingDependency, one_line

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def disable_telemetry() -> None:
    """Keep ONNX Runtime 1.32 from writing ~/.cache/Microsoft and looking up a host; call it before its first import.

    A value that the user has set stays.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def import_onnxruntime(what: str = "running a .onnx file", extra: str = "cpu") -> Any:
    """Return the module onnxruntime; `what` needs it and `extra` brings it, for the error."""
    disable_telemetry()
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingDependency(what, "onnxruntime", extra) from None
    return onnxruntime


def import_for(device: str, variant: str) -> Any:
    """Return the module onnxruntime, with the libraries that a device (cpu or cuda) and a variant need."""
    onnxruntime = import_onnxruntime(extra="gpu" if device == "cuda" else "cpu")
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints of libraries that are missing
            onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    if variant == "tensorrt":
        with contextlib.suppress(ImportError, OSError, RuntimeError):
            import tensorrt  # noqa: F401  loads the libraries that pip installed
    return onnxruntime


def has_provider(ort: Any, provider: str) -> bool:
    """Return whether a provider is compiled in, or registered: newer builds have CUDA as a plugin of that name."""
    devices = ort.get_ep_devices() if hasattr(ort, "get_ep_devices") else []
    return provider in ort.get_available_providers() or any(device.ep_name == provider for device in devices)


def missing_library(ort: Any, provider: str) -> str | None:
    """Return why the library of a provider cannot be loaded, in the words of the loader; None: it can.

    ONNX Runtime says it to its log only. To be asked after it has tried: the libraries take from it what it prepares.
    """
    folder = Path(ort.__file__).parent / "capi"
    name = f"onnxruntime_providers_{provider.lower()}"
    try:
        ctypes.CDLL(str(folder / (f"{name}.dll" if os.name == "nt" else f"lib{name}.so")))
    except OSError as err:
        return one_line(err)
    return None


@contextmanager
def quiet(ort: Any) -> Iterator[None]:
    """Keep off stderr what is raised as one line, and that a registered plugin is not among what is compiled in."""
    ort.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified provider")
            yield
    finally:
        ort.set_default_logger_severity(2)  # the default; what it was cannot be asked


def cause(err: BaseException) -> str:
    """Return what ONNX Runtime raised as one line, without where in its source: the cause comes last there."""
    place = r"\S+\.(?:h|cc|cpp|cu):\d+ (?:[\w:*&<>~ ]*::[\w:<>~]+\([^()]*\) )?"
    return one_line(re.sub(place, "", " ".join(str(err).split())))
