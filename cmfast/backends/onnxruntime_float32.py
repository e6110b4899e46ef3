# SPDX-License-Identifier: MIT
"""Whether ONNX Runtime multiplies float32 as float32 on a device, by a number (`cmfast.backends.float32`).

`use_tf32=0` reaches cuBLAS and cuDNN (onnxruntime 1.18; pull requests 19357 and 19426), and is dropped in silence
where cuDNN has no convolution without tensor cores (conv.cc, "Try fallback"). NVIDIA_TF32_OVERRIDE=0 cannot be.
"""

from __future__ import annotations

import functools

from cmfast.backends import float32
from cmfast.backends.float32 import Floats
from cmfast.backends.onnxruntime_library import CPU, CUDA, import_for, quiet
from cmfast.formats.manifest import may_use_tf32
from cmfast.formats.small_onnx import chain_model


@functools.cache
def check_float32(device: str) -> None:
    """Raise BackendError where a float32 file would not be computed in float32; asked once a process."""
    float32.check(errors(device), f"ONNX Runtime on {device}")


def errors(device: str, dtype: str = "float32") -> dict[str, float]:
    """Return the relative error of a float32 product and of a convolution, with the options of a file of this dtype."""
    ort = import_for(device, "")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    provider = (CUDA, {"use_tf32": str(int(may_use_tf32(dtype)))}) if device == "cuda" else (CPU, {})

    def run(op: str, a: Floats, b: Floats) -> Floats:
        with quiet(ort):
            session = ort.InferenceSession(chain_model(op, 1, 1), options, providers=[provider], enable_fallback=0)
        result: Floats = session.run(None, {"a": a, "b": b})[0]
        return result

    return float32.measured(functools.partial(run, "MatMul"), functools.partial(run, "Conv"))
