# SPDX-License-Identifier: MIT
"""The ceilings of a card as PyTorch reaches them: matrix products of two sizes in a type, and a copy of its memory.

`cmfast.roofline` asks ONNX Runtime for them, whose CUDA build not every machine has. The fastest call counts, as there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from cmfast.roofline import Ceilings
from cmfast_train.torch_cuda import arithmetic

DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32
}  # fmt: skip
# Large enough that starting does not count and that no cache holds it; on a CPU as large as a rehearsal allows.
SIDES = {"cuda": (4096, 8192), "cpu": (512,)}
COPIED = {"cuda": 2**30, "cpu": 2**24}  # bytes
CALLS, SECONDS = 5, 0.25  # of each way, at least


def product_line(device: str, dtype: str) -> dict[str, Any]:
    """Return the line of a type's matrix products: operations a second."""
    found = {}
    with torch.inference_mode(), arithmetic(tf32=dtype == "tf32"):
        for side in SIDES[device]:
            # Random numbers, whose products stay of their size: a GPU multiplies zeros faster.
            a, b = (torch.randn(side, side, device=device).mul_(side**-0.5).to(DTYPES[dtype]) for _ in range(2))
            out = torch.empty_like(a)
            seconds = fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
            found[f"{side} x {side}"] = 2 * side**3 / seconds
    return {"kind": "ceiling", "dtype": dtype, "flops_per_s": max(found.values()), "of": found}


def copy_line(device: str) -> dict[str, Any]:
    """Return the line of a copy from memory to memory: bytes a second, read and written."""
    source = torch.randint(0, 255, (COPIED[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device)
    return {"kind": "ceiling", "dtype": None, "bytes_per_s": 2 * source.nbytes / seconds, "copied": source.nbytes}


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


def fastest(call: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest call, on a GPU by events around it."""
    call()
    call()
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while len(times) < CALLS or time.monotonic() < end:
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1000)
        else:
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return min(times)
