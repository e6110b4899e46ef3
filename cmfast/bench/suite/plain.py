# SPDX-License-Identifier: MIT
"""ONNX Runtime and OpenVINO as their documentation calls them, with default settings: what cmfast is compared with.

Only the number of threads is set, so that all contenders have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.drawing import Arrays
from cmfast.errors import CmfastError, backend_error, one_line
from cmfast.formats.table import read_manifest

Floats = npt.NDArray[np.float32]
Run = Callable[[dict[str, Any]], Floats]


class Plain:
    """A denoiser graph, called by its library alone.

    Attributes:
        manifest: what the file says of itself.
        name: the library with its version, and the precision that it chose.
        precision: fp32 or bf16: OpenVINO's default is bfloat16 where the CPU has it.
    """

    def __init__(self, path: Path, library: str, threads: int) -> None:
        self.manifest = read_manifest(path)
        opened = {"onnxruntime": _onnxruntime, "openvino": _openvino}[library]
        with _errors(path):
            self._run, self.name, self.precision = opened(path, threads)
        self._path = path

    def denoise(self, x: Floats, sigma: float, conditions: Arrays, sigma_next: float = 0.0) -> Floats:
        """Return f(x, sigma, **conditions), [B, *shape]; of a flow map at its next noise level."""
        inputs = {"x": x, "sigma": np.full(len(x), sigma, np.float32), **conditions}
        if self.manifest.spec.second_time:
            inputs["sigma_next"] = np.full(len(x), sigma_next, np.float32)
        with _errors(self._path):
            return self._run(inputs)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Raise what a library raises, of whatever type, as BackendError."""
    try:
        yield
    except CmfastError:
        raise
    except Exception as err:
        raise backend_error(f"{path}: {type(err).__name__}: {one_line(err, 300)}") from None


def _onnxruntime(path: Path, threads: int) -> tuple[Run, str, str]:
    from cmfast.backends.onnxruntime_library import CPU, import_onnxruntime

    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=[CPU])

    def run(inputs: dict[str, Any]) -> Floats:
        (output,) = session.run(None, inputs)
        result: Floats = output
        return result

    return run, f"onnxruntime {ort.__version__}", "fp32"


def _openvino(path: Path, threads: int) -> tuple[Run, str, str]:
    from cmfast.backends.openvino.library import import_openvino

    ov = import_openvino("plain OpenVINO")
    compiled = ov.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads})
    names = {name for port in compiled.inputs for name in port.get_names()}
    precision = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    def run(inputs: dict[str, Any]) -> Floats:
        result: Floats = compiled({name: value for name, value in inputs.items() if name in names})[0]
        return result

    word = precision.get(chosen, chosen)
    return run, f"openvino {str(ov.__version__).partition('-')[0]} {word}", word
