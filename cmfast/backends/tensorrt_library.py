# SPDX-License-Identifier: MIT
"""TensorRT and TensorRT-RTX as Python modules: one API, two libraries. Imported when an engine is built or run."""

from __future__ import annotations

import platform
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cmfast.errors import BackendError, CmfastError, MissingDependency, one_line

LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
EXTRAS = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}  # [rtx] brings it on x86-64 only: there are no other wheels


def import_library(name: str, what: str) -> Any:
    """Return the module `name`, one of LIBRARIES; `what` needs it, for the error."""
    if name not in LIBRARIES:
        raise CmfastError(f"the library must be one of {', '.join(LIBRARIES)}, got {name!r}")
    try:
        if name == "tensorrt":
            import tensorrt as trt
        else:
            import tensorrt_rtx as trt
    except ModuleNotFoundError as err:
        if (err.name or "").split(".")[0] != name:  # the package is there, what it loads is not
            raise BackendError(f"{what} needs {LIBRARIES[name]}, which cannot be loaded: {one_line(err)}") from None
        raise MissingDependency(what, name.replace("_", "-"), EXTRAS[name]) from None
    except (ImportError, OSError, RuntimeError) as err:
        raise BackendError(f"{what} needs {LIBRARIES[name]}, which cannot be loaded: {one_line(err)}") from None
    return trt


def make_logger(trt: Any) -> Any:
    """Return a logger of this library that says nothing and keeps the errors, as lines, in `.errors`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Log()


@contextmanager
def ctrl_c_ends_build(trt: Any, config: Any) -> Iterator[None]:
    """Build in this block: Ctrl-C ends it at the builder's next step, as KeyboardInterrupt when the block ends.

    Without this it would be lost: Python raises it in a callback, such as the logger, and the library swallows that.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield  # signals are not ours here, or Ctrl-C is off
        return
    came = threading.Event()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, *_: Any) -> None:
            pass

        def phase_finish(self, *_: Any) -> None:
            pass

        def step_complete(self, *_: Any) -> bool:
            return not came.is_set()

    config.progress_monitor = monitor = Monitor()
    signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        del monitor  # until here it must live
    if came.is_set():
        raise KeyboardInterrupt


def reason(log: Any) -> str:
    """Return what the library said went wrong since the last time, one line."""
    said = "; ".join(dict.fromkeys(log.errors))[:400]
    log.errors.clear()
    return said or "it does not say why"


def cuda_major(name: str) -> str:
    """Return the major version of CUDA that an installed library is built for: its plans need the same; "" unknown."""
    from importlib.metadata import distributions

    pattern = re.compile(rf"{name}[_-]cu(\d\d)([_-].*)?", re.IGNORECASE)
    found = (pattern.fullmatch(each.metadata["Name"] or "") for each in distributions())
    return next((match[1] for match in found if match), "")


def this_platform() -> str:
    """Return the operating system and processor as plans are tied to them: linux_x86_64."""
    return f"{platform.system()}_{platform.machine()}".lower()
