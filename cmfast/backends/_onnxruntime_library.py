# SPDX-License-Identifier: MIT
"""ONNX Runtime as a Python module: the only place that imports it, with its telemetry off."""

from __future__ import annotations

import os
import re
from typing import Any

from cmfast.errors import MissingDependency, one_line


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


def cause(err: BaseException) -> str:
    """Return what ONNX Runtime raised as one line, without where in its source: the cause comes last there."""
    place = r"\S+\.(?:h|cc|cpp|cu):\d+ (?:[\w:*&<>~ ]*::[\w:<>~]+\([^()]*\) )?"
    return one_line(re.sub(place, "", " ".join(str(err).split())))
