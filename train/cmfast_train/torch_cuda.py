# SPDX-License-Identifier: MIT
"""What PyTorch needs to be as fast on CUDA as it can be: one way in and out, whole loops on the device, CUDA graphs.

`OnCuda` runs any computation on tensors and hides where they are. What it computes is `cmfast_train.engine`'s affair.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmfast.engines import DeviceTimes, Inputs
from cmfast.engines._clock import Clock
from cmfast.errors import EngineError

Floats = npt.NDArray[np.float32]
Compute = Callable[[dict[str, Tensor]], Tensor]

KEPT = 8  # shapes whose buffers, and captured graphs, are kept
WARM_UPS = 3  # before a capture: cuDNN tries its algorithms, libraries allocate their workspaces


class OnCuda:
    """Computations on the GPU from numpy arrays to a numpy array, with the tensors in between at fixed addresses.

    captures  record each computation as one CUDA graph when it is first asked for, and replay that
    tf32      multiply float32 as TensorFloat-32

    The copies go through page-locked memory and, like everything else, over PyTorch's current stream; the host waits
    once, for the result. cuDNN chooses its convolutions by trying them (`torch.backends.cudnn.benchmark`).
    """

    def __init__(self, *, captures: bool, tf32: bool, device: str = "cuda") -> None:
        self._captures, self._tf32 = captures, tf32
        self._device = torch.device(device)
        self._programs: dict[Hashable, _Program] = {}
        self._clock = Clock()
        self.timed = self._clock.timed

    def __call__(self, what: Hashable, compute: Compute, inputs: Inputs) -> Floats:
        """Return compute(inputs as tensors on the device).

        what  names the computation; one of the same name, on arrays of the same shapes, is taken to be the same
        """
        begun = time.perf_counter()
        key = (what, *((name, value.shape) for name, value in inputs.items()))
        with torch.inference_mode():
            program = self._programs.pop(key, None) or self._prepare(compute, inputs)
            program.fill(inputs)
            handing = time.perf_counter()
            events = program.hand_over(timed=self._clock.times is not None)
            enqueued = time.perf_counter()
            self._wait()
            result = program.result()
        self._programs[key] = program  # the last used last
        if self._clock.times is not None:
            host_ms, enqueue_ms = 1000 * (time.perf_counter() - begun), 1000 * (enqueued - handing)
            copy_in, compute_ms, copy_out = (start.elapsed_time(end) for start, end in pairwise(events))
            self._clock.times.append(
                DeviceTimes(
                    host_ms=host_ms, enqueue_ms=enqueue_ms, copy_in_ms=copy_in, compute_ms=compute_ms,
                    copy_out_ms=copy_out,
                )
            )  # fmt: skip
        return result

    def _prepare(self, compute: Compute, inputs: Inputs) -> _Program:
        """Return a computation that has run once, so that what happens only then is over: trying, compiling."""
        while len(self._programs) >= KEPT:
            del self._programs[next(iter(self._programs))]

        tf32 = self._tf32  # not self: a cycle would keep the GPU's memory until it is found

        def in_context(tensors: dict[str, Tensor]) -> Tensor:  # entered per run; a replay has it recorded
            with arithmetic(tf32=tf32):
                return compute(tensors)

        program = _Program(in_context, inputs, self._device)
        with warnings.catch_warnings():
            # of torch.compile: it is off because a float32 model is run in float32
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
            if self._captures:
                program.capture()
            program.hand_over(timed=False)
            self._wait()
        return program

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()


class _Program:
    """One computation at one shape, and its arrays at fixed addresses on the device and in page-locked memory."""

    def __init__(self, compute: Compute, inputs: Inputs, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._host: dict[str, Tensor] = {}
        self._device: dict[str, Tensor] = {}
        for name, value in inputs.items():
            dtype = torch.from_numpy(np.empty(0, value.dtype)).dtype
            self._host[name] = torch.empty(value.shape, dtype=dtype, pin_memory=self._pinned)
            self._device[name] = torch.empty(value.shape, dtype=dtype, device=device)
        self._launch: Callable[[], Tensor] = partial(compute, self._device)
        self._output: Tensor | None = None
        self.fill(inputs)  # not what the memory held before: a label must be a class

    def fill(self, inputs: Inputs) -> None:
        """Copy the arrays into page-locked memory."""
        for name, host in self._host.items():
            np.copyto(host.numpy(), inputs[name], casting="no")

    def capture(self) -> None:
        """Record the computation as a CUDA graph, and from now on replay that."""
        self._copy_in()
        self._launch = capture(self._launch)

    def hand_over(self, *, timed: bool) -> list[torch.cuda.Event]:
        """Hand over copies and computation; return, when timed, the four events around the three."""
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            if timed:
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()

        mark()
        self._copy_in()
        mark()
        output = self._launch().contiguous()
        mark()
        if self._output is None:
            self._output = torch.empty(output.shape, dtype=output.dtype, pin_memory=self._pinned)
        self._output.copy_(output, non_blocking=True)
        mark()
        return events

    def result(self) -> Floats:
        """Return the result, once it has been waited for."""
        assert self._output is not None
        return self._output.numpy().copy()

    def _copy_in(self) -> None:
        for name, host in self._host.items():
            self._device[name].copy_(host, non_blocking=True)


def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a computation as one CUDA graph; return what replays it, and gives the tensor that it writes each time.

    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs, "Whole-network capture". The graph has a memory
    pool of its own, so that any order of replays is right.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            output = compute()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as err:
        cause = err.__context__ or err  # the end of a capture that was broken off fails too
        reason = (str(cause).strip().splitlines() or ["?"])[0][:300]
        raise EngineError(
            f"PyTorch could not capture this model as a CUDA graph; use another variant: {reason}"
        ) from None

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def compiled(denoiser: torch.nn.Module) -> Callable[..., Tensor]:
    """Return the denoiser compiled the most thorough way, which has CUDA graphs in it, one program a batch size."""
    call = torch.compile(denoiser, mode="max-autotune", dynamic=False)

    def run(**tensors: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the call before returned has been used
        return call(**tensors)

    return run


@contextmanager
def arithmetic(*, tf32: bool, benchmark: bool | None = True) -> Iterator[None]:
    """Let CUDA multiply float32 as TensorFloat-32, or not, and cuDNN try its algorithms, in this context only.

    benchmark  whether cuDNN tries them (`torch.backends.cudnn.benchmark`); None leaves it as it is

    PyTorch has an old and a new interface to the former, and reading the old one after the new one was used is an
    error (https://docs.pytorch.org/docs/stable/notes/cuda.html, "TensorFloat-32"). So this writes the old one, which
    sets both, torch.compile reads both, and restores by the new one, which can always be read.
    """
    backends = torch.backends
    fine = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
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
