# SPDX-License-Identifier: MIT
"""OpenVINO as a Python module: the only place that imports it, with its telemetry off; what the CPU can compute in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmfast.errors import BackendError, MissingDependency, one_line
from cmfast.formats.values import PRECISIONS

TELEMETRY = "openvino_telemetry"
# Values of a manifest's dtype: OpenVINO's type, and its word among a device's OPTIMIZATION_CAPABILITIES.
TYPES = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}


def import_openvino(what: str) -> Any:
    """Return the module openvino; `what` needs it, for the error.

    `import openvino` sends an event to its makers and writes ~/intel (openvino 2026.4, openvino/tools/ovc/__init__.py).
    It takes a stub where the package openvino_telemetry cannot be imported. One that the caller has imported stays.
    """
    try:
        with _without_telemetry():
            import openvino
    except ModuleNotFoundError as err:
        if (err.name or "").partition(".")[0] != "openvino":
            raise
        raise MissingDependency(what, "openvino", "openvino") from None
    return openvino


@contextmanager
def _without_telemetry() -> Iterator[None]:
    if TELEMETRY in sys.modules:
        yield
        return
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        yield
    finally:
        sys.modules.pop(TELEMETRY, None)


def capabilities(core: Any) -> frozenset[str]:
    """Return what the CPU is said to have: words such as FP32, BF16, FP16, INT8."""
    return frozenset(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def check_precision(path: Path, dtype: str, core: Any) -> None:
    """Raise BackendError unless the CPU computes in a manifest's dtype, as OpenVINO says what it is capable of."""
    if dtype not in TYPES:
        raise BackendError(f"{path}: a file in {dtype}, which no CPU computes in; pass --precision fp32 to run it")
    found = capabilities(core)
    if TYPES[dtype][1] not in found:
        there = " or ".join(name for name, value in PRECISIONS.items() if TYPES.get(value, ("", ""))[1] in found)
        raise BackendError(
            f"{path}: {dtype}, which OpenVINO lacks on this CPU ({cpu_name(core)}); pass --precision {there}"
        )


def cpu_name(core: Any) -> str:
    """Return the name of the CPU, for errors and keys."""
    return str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()


def cause(err: BaseException) -> str:
    """Return what OpenVINO raised as one line, without where in its source."""
    lines = [line.strip() for line in str(err).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from src", "Check '"))]
    return one_line(" ".join(said or lines))
