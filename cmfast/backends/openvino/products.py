# SPDX-License-Identifier: MIT
"""Matrix products by OpenVINO in float32, bfloat16 and int8: what a CPU reaches in a type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cmfast.backends.openvino.library import TYPES, capabilities, import_openvino
from cmfast.errors import BackendError, one_line

INT8 = "int8"


def product_call(side: int, dtype: str, threads: int) -> Callable[[], object]:
    """Return a call that multiplies two matrices of side x side numbers, one of them constant.

    Args:
        side: rows and columns.
        dtype: float32, bfloat16, float16, or int8: products of 8-bit integers, their sums rounded to 8 bits again.
        threads: CPU threads.

    Raises:
        MissingDependency: OpenVINO is not installed.
        BackendError: the CPU lacks the type, or OpenVINO fails in it.
    """
    ov = import_openvino("measuring what this CPU reaches")
    core = ov.Core()
    word = "INT8" if dtype == INT8 else TYPES[dtype][1]
    if word not in capabilities(core):
        raise BackendError(f"OpenVINO lacks {dtype} on this CPU")
    properties = {
        "INFERENCE_PRECISION_HINT": TYPES["float32" if dtype == INT8 else dtype][0],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    # Random, because zeros may be multiplied faster.
    matrix = np.random.default_rng(1).standard_normal((side, side), dtype=np.float32)
    try:
        request = core.compile_model(
            _graph(ov, side, quantized=dtype == INT8), "CPU", properties
        ).create_infer_request()
        request.infer({0: matrix})  # which keeps the input
    except RuntimeError as err:
        raise BackendError(f"OpenVINO cannot multiply in {dtype} on this CPU: {one_line(err, 300)}") from None
    call: Callable[[], object] = request.infer
    return call


def _graph(ov: Any, side: int, *, quantized: bool) -> Any:
    from openvino import opset13

    weights = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32) / np.float32(side**0.5)
    x = opset13.parameter([side, side], ov.Type.f32, name="x")
    a, b = x, opset13.constant(weights)
    if quantized:
        a, b = _rounded(opset13, a, 4.0, 256), _rounded(opset13, b, float(np.abs(weights).max()), 255)
    return ov.Model([opset13.matmul(a, b, False, True)], [x], "product")


def _rounded(opset: Any, value: Any, most: float, levels: int) -> Any:
    """Return a value rounded to integers from -128, or with 255 levels from -127, times a scale."""
    low, high = -most, most * (127 / 128 if levels == 256 else 1)
    ends = [opset.constant(np.float32(end)) for end in (low, high)]
    return opset.fake_quantize(value, *ends, *ends, levels)
