# SPDX-License-Identifier: MIT
"""The ceilings of a card, in seconds of work: the fastest ways of `cmfast_train.backends.ceilings`.

`cmfast.bench.roofline` measures the same with more calls, in turns with ONNX Runtime's, which takes a minute for four
types.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from cmfast.bench.roofline import BYTES, Ceilings, Way
from cmfast_train.backends.ceilings import ways

DTYPES = tuple(BYTES)
CALLS, SECONDS = 5, 0.25  # per way, at least


def product_line(device: str, dtype: str) -> dict[str, Any]:
    """Return the line of a type's matrix products: operations per second."""
    rates = _rates(device, dtype, "flops")
    return {"kind": "ceiling", "dtype": dtype, "flops_per_s": max(rates.values()), "of": rates}


def copy_line(device: str) -> dict[str, Any]:
    """Return the line of a copy from memory to memory: bytes per second, read and written."""
    rates = _rates(device, "float32", "bytes")
    return {"kind": "ceiling", "dtype": None, "bytes_per_s": max(rates.values()), "of": rates}


def ceilings(lines: Iterable[dict[str, Any]], device: str) -> dict[str, Ceilings]:
    """Return the ceilings of each type from the lines of kind "ceiling"."""
    products: dict[str, float] = {}
    moved = None
    for line in lines:
        if line["dtype"] is None:
            moved = line["bytes_per_s"]
        else:
            products[line["dtype"]] = line["flops_per_s"]
    how = "the fastest of matrix products and copies by PyTorch"
    return {
        dtype: Ceilings(device=device, dtype=dtype, flops_per_s=rate, bytes_per_s=moved, how=how)
        for dtype, rate in products.items()
    }


def fastest(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest call; the call waits for the device."""
    call()
    call()
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while len(times) < CALLS or time.monotonic() < end:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def _rates(device: str, dtype: str, unit: str) -> dict[str, float]:
    rates = {}
    for kind, make in ways(device, dtype):
        if kind == unit:
            way: Way = make()
            rates[way.name] = way.amount / fastest(way.call)
    return rates
