# SPDX-License-Identifier: MIT
"""What this CPU reaches in float32, bfloat16 and int8, measured: the denominators of the suite's shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cmfast.backends.openvino.products import product_call
from cmfast.bench import timing
from cmfast.bench.failures import Say
from cmfast.bench.roofline import CALLS, SECONDS, Ceilings, measure_machine
from cmfast.errors import BackendError, MissingDependency, one_line

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}  # by a way's type
SIDES = (1024, 2048)  # rows and columns of the matrices


def measure_rates(types: Iterable[str], threads: int, say: Say) -> dict[str, Ceilings]:
    """Return the highest rate of matrix products by a way's type; the fastest call of the fastest way counts.

    OpenVINO multiplies in all types. ONNX Runtime and numpy also do in float32, as `cmfast.bench.roofline` measures it.

    Args:
        types: fp32, bf16, int8.
        threads: CPU threads.
        say: gets a line.
    """
    found: dict[str, Ceilings] = {}
    for name in types:
        if name in DTYPES:
            say(f"measuring what this CPU reaches in {DTYPES[name]} with {threads} thread(s)")
            each = _products(DTYPES[name], threads)
            other = measure_machine("cpu", "float32", threads) if name == "fp32" else each
            found |= faster({name: each}, {name: other})
    return found


def faster(one: Mapping[str, Ceilings], other: Mapping[str, Ceilings]) -> dict[str, Ceilings]:
    """Return the higher rate of each type."""
    return {name: max(each, other[name], key=lambda ceilings: ceilings.flops_per_s or 0) for name, each in one.items()}


def _products(dtype: str, threads: int) -> Ceilings:
    try:
        calls = {f"product of {side} x {side} {dtype} matrices by OpenVINO": (
            product_call(side, dtype, threads), 2 * side**3) for side in SIDES}  # fmt: skip
    except (BackendError, MissingDependency) as err:
        return Ceilings(
            device="cpu", dtype=dtype, flops_per_s=None, bytes_per_s=None, how=f"not measured: {one_line(err)}"
        )
    times = timing.interleave({name: call for name, (call, _) in calls.items()}, seconds=SECONDS, calls=CALLS)
    rates = {name: 1000 * flops / min(times[name]) for name, (_, flops) in calls.items()}
    best = max(rates, key=lambda name: rates[name])
    counted = sum(map(len, times.values()))
    return Ceilings(
        device="cpu",
        dtype=dtype,
        flops_per_s=rates[best],
        bytes_per_s=None,
        how=f"the fastest of {counted} calls of {len(calls)} way(s) in turns: {best}",
    )
