# SPDX-License-Identifier: MIT
"""What PyTorch needs to be as fast on CUDA as it can be: one way in and out, whole loops on the device, CUDA graphs.

`OnCuda` runs any computation on tensors and hides where they are. What it computes is `cmfast_train.backends.pytorch`'s
affair.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmfast.backends import DeviceTimes, Inputs
from cmfast.backends.clock import Clock
from cmfast.errors import BackendError, one_line

Floats = npt.NDArray[np.float32]
Compute = Callable[[dict[str, Tensor]], Tensor]
ComputeAll = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
Result = TypeVar("Result")  # of a computation: one tensor, or several

KEPT = 8  # shapes whose buffers, and captured graphs, are kept
WARM_UPS = 3  # runs before a recording: cuDNN tries its algorithms, libraries allocate their workspaces


class OnCuda:
    """Computations on the GPU from numpy arrays to numpy arrays, with the tensors in between at fixed addresses.

    The copies go through page-locked memory and, like everything else, over PyTorch's current stream; the host waits
    once, for the result. cuDNN chooses its convolutions by trying them (`torch.backends.cudnn.benchmark`).

    Args:
        captures: record each computation as one CUDA graph when it is first needed, and replay that
        tf32: multiply float32 as TensorFloat-32
    """

    def __init__(self, *, captures: bool, tf32: bool, device: str = "cuda") -> None:
        self._captures, self._tf32 = captures, tf32
        self._device = torch.device(device)
        self._programs: dict[Hashable, _Program] = {}
        self._clock = Clock()
        self.timed = self._clock.timed

    def __call__(self, what: Hashable, compute: Compute, inputs: Inputs) -> Floats:
        """Return compute(inputs as tensors on the device).

        Args:
            what: names the computation; one of the same name, on arrays of the same shapes, is taken to be the same
        """
        (result,) = self._wait(self._hand_over(what, lambda tensors: (compute(tensors),), inputs))
        return result

    def each(self, what: Hashable, compute: ComputeAll, batches: Iterable[Inputs]) -> Iterator[list[npt.NDArray[Any]]]:
        """Yield compute(inputs) of one batch after the other; the device has the next one while the host waits."""
        before = None
        for inputs in batches:
            following = self._hand_over(what, compute, inputs)
            if before is not None:
                yield self._wait(before)
            before = following
        if before is not None:
            yield self._wait(before)

    def release(self) -> None:
        """Free what is kept for shapes; the contract is `cmfast.backends.ReleasingBackend`.

        What torch.compile recorded itself stays: only compiling again would make it anew.
        """
        self._programs.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # other libraries take theirs from the driver

    def _hand_over(self, what: Hashable, compute: ComputeAll, inputs: Inputs) -> _Call:
        begun = time.perf_counter()
        key = (what, *((name, value.shape) for name, value in inputs.items()))
        with torch.inference_mode():
            program = self._programs.pop(key, None) or self._prepare(compute, inputs)
            call = program.hand_over(inputs, begun, timed=self._clock.times is not None)
        self._programs[key] = program  # the last used last
        return call

    def _wait(self, call: _Call) -> list[npt.NDArray[Any]]:
        results = call.results()
        if self._clock.times is not None and call.events:
            self._clock.times.append(call.times())
        return results

    def _prepare(self, compute: ComputeAll, inputs: Inputs) -> _Program:
        """Return a computation that has run once, so that what happens only then is over: trying, compiling."""
        while len(self._programs) >= KEPT:
            del self._programs[next(iter(self._programs))]

        tf32 = self._tf32  # not self: a cycle would keep the GPU's memory until it is found

        def in_context(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:  # entered per run; a replay has it recorded
            with arithmetic(tf32=tf32):
                return compute(tensors)

        program = _Program(in_context, inputs, self._device)
        with warnings.catch_warnings():
            # of torch.compile: it is off because a float32 model is run in float32
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            if self._captures:
                program.capture(inputs)
            program.hand_over(inputs).results()
        return program


class _Program:
    """One computation at one shape, with its arguments at fixed addresses on the device."""

    def __init__(self, compute: ComputeAll, inputs: Inputs, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._arguments = {
            name: torch.empty(value.shape, dtype=torch.from_numpy(np.empty(0, value.dtype)).dtype, device=device)
            for name, value in inputs.items()
        }
        self._launch: Callable[[], tuple[Tensor, ...]] = partial(compute, self._arguments)
        self._free: list[_Buffers] = []  # as many as there were ever calls on the way at the same time
        self._last: torch.cuda.Event | None = None  # of the call before

    def capture(self, inputs: Inputs) -> None:
        """Record the computation as a CUDA graph, and from now on replay that."""
        buffers = self._buffers(inputs)
        self._copy_in(buffers)  # not what the memory held before: a label must be a class
        self._launch = capture(self._launch)
        self._free.append(buffers)  # the capture has waited for the copy

    def hand_over(self, inputs: Inputs, begun: float = 0.0, *, timed: bool = False) -> _Call:
        """Hand over copies and computation; return the call, whose results can be waited for."""
        buffers = self._buffers(inputs)
        handing = time.perf_counter()
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            if timed:
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()

        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)  # it may have been on another stream
        mark()
        self._copy_in(buffers)
        mark()
        outputs = [output.contiguous() for output in self._launch()]
        mark()
        if not buffers.outputs:
            buffers.outputs = [torch.empty(o.shape, dtype=o.dtype, pin_memory=self._on_gpu) for o in outputs]
        for host, output in zip(buffers.outputs, outputs, strict=True):
            host.copy_(output, non_blocking=True)
        mark()
        done = torch.cuda.Event() if self._on_gpu else None
        if done is not None:
            done.record()
        self._last = done
        return _Call(buffers, self._free, done, events, begun, time.perf_counter() - handing)

    def _buffers(self, inputs: Inputs) -> _Buffers:
        """Return buffers that no other call uses, with the inputs in them."""
        if self._free:
            buffers = self._free.pop()
        else:
            pinned = self._on_gpu
            arguments = self._arguments.items()
            buffers = _Buffers({k: torch.empty(v.shape, dtype=v.dtype, pin_memory=pinned) for k, v in arguments})
        for name, host in buffers.inputs.items():
            np.copyto(host.numpy(), inputs[name], casting="no")
        return buffers

    def _copy_in(self, buffers: _Buffers) -> None:
        for name, host in buffers.inputs.items():
            self._arguments[name].copy_(host, non_blocking=True)


@dataclass
class _Buffers:
    """Page-locked memory of one call on the way."""

    inputs: dict[str, Tensor]
    outputs: list[Tensor] = field(default_factory=list)  # none before the first call


@dataclass
class _Call:
    """A computation that was handed over. One that is not waited for keeps its buffers from others."""

    buffers: _Buffers
    free: list[_Buffers]  # where they go afterwards
    done: torch.cuda.Event | None  # None on the CPU, where nothing needs to be waited for
    events: list[torch.cuda.Event]  # when timed, the four around copy, computation, copy
    begun: float
    enqueue_s: float
    ended: float = 0.0

    def results(self) -> list[npt.NDArray[Any]]:
        """Wait, and return the results, which are the caller's."""
        if self.done is not None:
            self.done.synchronize()
        arrays = [output.numpy().copy() for output in self.buffers.outputs]
        self.free.append(self.buffers)
        self.ended = time.perf_counter()
        return arrays

    def times(self) -> DeviceTimes:
        copy_in, compute_ms, copy_out = (start.elapsed_time(end) for start, end in pairwise(self.events))
        return DeviceTimes(
            host_ms=1000 * (self.ended - self.begun), enqueue_ms=1000 * self.enqueue_s, copy_in_ms=copy_in,
            compute_ms=compute_ms, copy_out_ms=copy_out,
        )  # fmt: skip


def capture(compute: Callable[[], Result]) -> Callable[[], Result]:
    """Warm a model's computation up and record it; return what replays it. See `record`."""

    def warm_up() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(side)

    return record(
        compute, "PyTorch could not capture this model as a CUDA graph; use another variant: {reason}", warm_up
    )


def record(
    compute: Callable[[], Result],
    error: str,
    warm_up: Callable[[], None] = lambda: None,
    *,
    stream: torch.cuda.Stream | None = None,
    errors_of: str = "global",
) -> Callable[[], Result]:
    """Record a computation as one CUDA graph; return what replays it, and gives the tensors that it writes each time.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, "Whole-network capture". The graph has a memory
    pool of its own, so that any order of replays is right.

    Args:
        compute: What is recorded; it is not run.
        error: What to say if it cannot be, with `{reason}`.
        warm_up: Runs the computation before, unless it has been: WARM_UPS times.
        stream: The stream to record on; None: one of PyTorch's.
        errors_of: Whose forbidden calls break the recording off: "global", or "thread_local" where others go on.

    Raises:
        BackendError: PyTorch cannot record it.
        torch.OutOfMemoryError: the GPU has too little memory for it.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        warm_up()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=errors_of):
            output = compute()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as err:
        cause = err.__context__ or err  # the end of a recording that was broken off fails too
        raise BackendError(error.format(reason=one_line(cause, 300) or "?")) from None

    def replay() -> Result:
        graph.replay()
        return output

    return replay


def compiled(denoiser: torch.nn.Module, mode: str = "max-autotune") -> Callable[..., Tensor]:
    """Return the denoiser compiled, one program a batch size, by a mode that has CUDA graphs in it.

    Args:
        mode: "max-autotune", the most thorough; or "reduce-overhead"
    """
    call = torch.compile(denoiser, mode=mode, dynamic=False)

    def run(**tensors: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the call before returned has been used
        result: Tensor = call(**tensors)
        return result

    return run


@contextmanager
def arithmetic(*, tf32: bool, benchmark: bool | None = True) -> Iterator[None]:
    """Let CUDA multiply float32 as TensorFloat-32, or not, and cuDNN try its algorithms, in this context only.

    PyTorch has an old and a new interface to the former, and reading the old one after the new one was used is an
    error (https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32"). So this writes the old one, which
    sets both, torch.compile reads both, and restores by the new one, which can always be read.

    Args:
        benchmark: whether cuDNN tries them (`torch.backends.cudnn.benchmark`); None leaves it as it is
    """
    backends = torch.backends
    cudnn: Any = backends.cudnn  # a module of a class whose attributes its types lack
    fine = (cudnn.conv, cudnn.rnn, backends.cuda.matmul)
    before, tried = [each.fp32_precision for each in fine], backends.cudnn.benchmark
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = tf32
    backends.cudnn.benchmark = tried if benchmark is None else benchmark
    try:
        yield
    finally:
        backends.cudnn.benchmark = tried
        backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before[0] == "tf32", before[2] == "tf32"
        for each, precision in zip(fine, before, strict=True):
            each.fp32_precision = precision
