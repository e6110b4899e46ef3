# SPDX-License-Identifier: MIT
"""The roofline: how fast this machine computes and moves data, measured, and the least time that a model needs on it.

    ceilings = measure_machine("cuda", "float16")
    floor = floor_ms(manifest.cost, ceilings, batch=8, steps=1)      # floor.ms, set by floor.bound

Nothing is taken from a data sheet: ceilings are what well-known libraries reach on this machine, now. Operations and
bytes are counted at export (`cmfast_export.graphs.cost`). The model: Williams, Waterman, Patterson, "Roofline", 2009.

A ceiling is what can be reached, so the fastest call counts, not the median: other work on the machine slows calls down
and never speeds them up. Matrix products of several sizes are measured, but no convolution: Winograd does fewer
operations than are counted, so its rate would be too high.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.bench import timing
from cmfast.checks import check_threads, usable_cores
from cmfast.errors import CmfastError, one_line
from cmfast.formats.manifest import may_use_tf32
from cmfast.formats.small_onnx import cast_model, chain_model

COST = ("flops", "weight_bytes", "activation_bytes")  # the keys of a manifest's cost
# By a manifest's dtype: bytes per number, and its type in ONNX. tf32 is float32 in memory.
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
_ELEMENT = {"float32": 1, "tf32": 1, "float16": 10, "bfloat16": 16}

CALLS, SECONDS = 6, 0.3  # counted for each way to measure, at least; six are two turns
# By device: large enough that launching is negligible and no cache holds the data. On a GPU a call is several in a row,
# because launching one takes as long as a tenth of it.
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # rows and columns of the matrices
NUMBERS = {"cpu": 2**25, "cuda": 2**27}  # float32, of each array that is moved
PRODUCTS = {"cpu": 1, "cuda": 4}
SUMS = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most that a device reaches in a type: the fastest calls on this machine. None: could not be measured."""

    device: str
    dtype: str  # a manifest's
    flops_per_s: float | None  # matrix product; a multiplication and an addition count as two
    bytes_per_s: float | None  # of memory, read and written
    how: str  # in words


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least time of some work, and what sets it."""

    ms: float
    bound: str  # compute or memory
    flops: float
    bytes: float


def measure_machine(device: str = "cpu", dtype: str = "float32", threads: int | None = None) -> Ceilings:
    """Measure matrix product and memory bandwidth of a device: seconds of work, several ways interleaved.

    The fastest call of the fastest way counts. On a GPU, ONNX Runtime measures; if it cannot, the entry points
    "cmfast.ceilings" do, which is PyTorch. If neither can, the ceilings are None and `how` says why.

    Args:
        device: cpu or cuda.
        dtype: a manifest's: float32, tf32, float16, bfloat16.
        threads: CPU threads; None: each library's choice.

    Returns:
        The highest rates that were reached, FLOP/s and bytes/s.

    Raises:
        CmfastError: the device, the dtype or the number of threads is not one of these.
    """
    if device not in SIDES or dtype not in BYTES:
        raise CmfastError(
            f"need a device of {', '.join(SIDES)} and a dtype of {', '.join(BYTES)}, got {device!r} and {dtype!r}"
        )
    ways, missing = _ways(device, dtype, check_threads(threads))
    if not ways:
        return Ceilings(device=device, dtype=dtype, flops_per_s=None, bytes_per_s=None, how=f"not measured: {missing}")
    times = timing.interleave({way.name: way.call for way in ways}, seconds=SECONDS, calls=CALLS)
    rates = {way: 1000 * way.amount / min(times[way.name]) for way in ways}
    product, copy = (
        max((way for way in ways if way.unit == unit), key=rates.__getitem__, default=None)
        for unit in ("flops", "bytes")
    )
    calls = sum(len(each) for each in times.values())
    how = [way.name for way in (product, copy) if way] + ([f"the rest was not measured: {missing}"] if missing else [])
    return Ceilings(
        device=device,
        dtype=dtype,
        flops_per_s=rates[product] if product else None,
        bytes_per_s=rates[copy] if copy else None,
        how=f"the fastest of {calls} calls of {len(ways)} way(s) in turns: {'; '.join(how)}",
    )


def floor_ms(cost: Mapping[str, float], ceilings: Ceilings, batch: int, steps: int = 1) -> Floor | None:
    """Return the least time that a call can take: the larger of operations over rate and bytes over bandwidth.

    The bandwidth is that of memory. Data that fit a cache can be faster than this floor, and so can a convolution with
    fewer multiplications than its definition (Winograd's).

    Args:
        cost: of one image and one run of the graph, as in a manifest.
        ceilings: of the device.
        batch: images per call.
        steps: runs of the graph: the steps of a denoiser; 1 for a sampler, which has them inside.

    Returns:
        The floor, ms, and which of the two it is; None: the cost or a ceiling is unknown.
    """
    if not cost.keys() >= set(COST):
        return None
    if ceilings.flops_per_s is None or ceilings.bytes_per_s is None:
        return None
    flops = steps * batch * cost["flops"]
    moved = steps * (cost["weight_bytes"] + batch * cost["activation_bytes"])
    compute_ms, memory_ms = 1000 * flops / ceilings.flops_per_s, 1000 * moved / ceilings.bytes_per_s
    bound = "compute" if compute_ms >= memory_ms else "memory"
    return Floor(ms=max(compute_ms, memory_ms), bound=bound, flops=flops, bytes=moved)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to measure: what one call computes or moves."""

    name: str
    unit: str  # flops or bytes
    amount: float  # of one call
    call: Callable[[], object]  # returns when the device is done


def _ways(device: str, dtype: str, threads: int | None) -> tuple[list[Way], str]:
    """Return the ways to measure, each tried once, and why others are missing."""
    ways: list[Way] = []
    reasons: list[str] = []
    makers: list[Callable[[], Way]] = [partial(_product, side, device, dtype, threads) for side in SIDES[device]]
    makers.append(partial(_sum, device, threads))
    for make in makers:
        try:
            _need_provider(device)
            way = make()
            way.call()  # runs out of memory only now, if at all
        except Exception as err:  # the exceptions of ONNX Runtime share no public base class
            reasons.append(one_line(err))
        else:
            ways.append(way)
    if device != "cpu":
        ways += _others(device, dtype, {"flops", "bytes"} - {way.unit for way in ways}, reasons)
    if device == "cpu":
        # numpy has no setting for the number of threads, so it is the last resort if one is requested.
        if dtype in ("float32", "tf32") and (threads is None or reasons):
            ways += [_numpy_product(side) for side in SIDES["cpu"]]
        ways.append(_numpy_copy(threads))
    return ways, "; ".join(dict.fromkeys(reasons))


def _others(device: str, dtype: str, units: set[str], reasons: list[str]) -> list[Way]:
    """Return the ways that other packages bring, in units that ONNX Runtime could not measure.

    An entry point of the group "cmfast.ceilings" has the name of a device. Called with (dtype), it returns makers of
    ways by unit; what it or a maker raises becomes a reason.
    """
    from importlib.metadata import entry_points

    ways: list[Way] = []
    for entry in entry_points(group="cmfast.ceilings", name=device) if units else ():
        try:
            makers: list[tuple[str, Callable[[], Way]]] = entry.load()(dtype)
        except Exception as err:  # the library is missing, or has no such device
            reasons.append(one_line(err))
            continue
        for make in (make for unit, make in makers if unit in units):
            try:
                way = make()
                way.call()
            except Exception as err:  # out of memory, commonly
                reasons.append(one_line(err))
            else:
                ways.append(way)
    return ways


def _product(side: int, device: str, dtype: str, threads: int | None) -> Way:
    count = PRODUCTS[device]
    call = _graph_call("MatMul", count, _matrix(side), device, dtype, threads)
    name = f"product of {side} x {side} {dtype} matrices by ONNX Runtime {device}"
    return Way(name=name, unit="flops", amount=2 * count * side**3, call=call)


def _sum(device: str, threads: int | None) -> Way:
    array = np.ones(NUMBERS[device], np.float32)
    call = _graph_call("Add", SUMS[device], array, device, "float32", threads)
    name = f"sum of arrays of {array.nbytes / 2**20:g} MiB by ONNX Runtime {device}"
    return Way(name=name, unit="bytes", amount=3 * SUMS[device] * array.nbytes, call=call)  # two read, one written


def _numpy_product(side: int) -> Way:
    matrix = _matrix(side)
    product = np.empty_like(matrix)
    name = f"product of {side} x {side} float32 matrices by numpy, all its threads"
    return Way(name=name, unit="flops", amount=2 * side**3, call=lambda: np.matmul(matrix, matrix, out=product))


def _numpy_copy(threads: int | None) -> Way:
    workers = threads or usable_cores()
    pool = ThreadPoolExecutor(workers)  # one core alone does not use up the memory of many
    source = np.ones(NUMBERS["cpu"], np.float32)
    parts = [np.array_split(array, workers) for array in (np.empty_like(source), source)]
    name = f"copy of {source.nbytes / 2**20:g} MiB by numpy, {workers} thread(s)"
    return Way(name=name, unit="bytes", amount=2 * source.nbytes, call=lambda: list(pool.map(np.copyto, *parts)))


def _matrix(side: int) -> npt.NDArray[np.float32]:
    """Return random numbers, whose products stay of their size; a GPU multiplies zeros faster."""
    return np.random.default_rng(0).standard_normal((side, side), dtype=np.float32) / np.float32(side**0.5)


def _graph_call(op: str, count: int, b: Any, device: str, dtype: str, threads: int | None) -> Callable[[], object]:
    """Return a call that runs y = op(... op(b, b) ..., b) in ONNX Runtime, everything on the device, and waits."""
    from cmfast.backends.onnxruntime_library import CPU, CUDA, import_for, missing_library, quiet

    ort, element, provider = import_for(device, ""), _ELEMENT[dtype], {"cpu": CPU, "cuda": CUDA}[device]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # What a graph of one operator on one array could be simplified to is not what is to be measured.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    settings = {"use_tf32": str(int(may_use_tf32(dtype)))} if device == "cuda" else {}

    def bind(model: bytes, inputs: dict[str, Any]) -> tuple[Callable[[], object], Any]:
        with quiet(ort):
            session = ort.InferenceSession(model, options, providers=[(provider, settings)], enable_fallback=0)
        if session.get_providers()[0] != provider:
            why = missing_library(ort, "CUDA") or "it does not say why"
            raise CmfastError(f"onnxruntime {ort.__version__} could not start {device}: {why}")
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        y = ort.OrtValue.ortvalue_from_shape_and_type(next(iter(inputs.values())).shape(), element, device, 0)
        binding.bind_ortvalue_output("y", y)

        def call() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return call, y

    value = ort.OrtValue.ortvalue_from_numpy(b, device, 0)
    if element != _ELEMENT["float32"]:  # numpy has no bfloat16, so the device converts
        convert, converted = bind(cast_model(element), {"a": value})
        convert()
        value = converted
    call, _ = bind(chain_model(op, count, element), {"a": value, "b": value})
    return call


def _need_provider(device: str) -> None:
    """Raise, before arrays are made, where ONNX Runtime is missing or has no kernels for the device."""
    from cmfast.backends.onnxruntime_library import CUDA, has_provider, import_for

    ort = import_for(device, "")
    if device == "cuda" and not has_provider(ort, CUDA):
        raise CmfastError(f"the installed onnxruntime {ort.__version__} is a build without CUDA")
