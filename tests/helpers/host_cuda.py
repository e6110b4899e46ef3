# SPDX-License-Identifier: MIT
"""A GPU made of host memory, so that `cmfast.backends.cuda` and what runs on it can be exercised where there is none.

It stands in for `cuda.bindings.runtime`, for `cuda.bindings.driver` and for TensorRT's runtime, strictly: work waits in
the stream until somebody waits for it, a capture records instead of running and forbids what CUDA forbids, freed memory
is poisoned, a kernel reads and writes the addresses that were bound. Networks are run by ONNX Runtime, from the file
that a plan was built from; PTX is run instruction by instruction (`helpers.kernels.ptx`), and what it touches must be
memory that was given out. This shows that buffers, order, graphs and kernels are right; that CUDA and TensorRT behave
so, only a GPU can show.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from helpers.cpp import compiler
from helpers.kernels.ptx import Module

Work = Callable[[], None]
OK, INVALID, NO_MEMORY, UNSUPPORTED_PTX, CAPTURING = 0, 1, 2, 222, 900
CARD = 2**33  # bytes of memory of the card


@functools.cache
def module_of(ptx: str) -> Module:
    """Return a module of PTX, compiled once a session."""
    with tempfile.TemporaryDirectory() as folder:
        return Module(ptx, Path(folder))


class HostCuda:
    """What `cmfast.backends.cuda` uses of cuda.bindings.runtime (cuda...) and cuda.bindings.driver (cu...)."""

    cudaStreamNonBlocking, cudaHostAllocDefault = 1, 0
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(self, capability: str = "8.9", *, takes_ptx: bool = True) -> None:
        self.capability, self.takes_ptx = capability, takes_ptx
        self.kernels: list[str] = []  # that were handed over
        self.waited = 0  # times that somebody waited
        self.memory: dict[int, Any] = {}
        self.queue: list[Work] = []
        self.recording: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.launches: list[int] = []
        self.clock = itertools.count()
        self.events: dict[int, float] = {}
        self.handles = itertools.count(1)
        self.streams: set[int] = set()

    def hand_over(self, work: Work) -> tuple[int]:
        (self.queue if self.recording is None else self.recording).append(work)
        return (OK,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return OK, 1

    def cudaSetDevice(self, device: int) -> tuple[int]:
        return (OK,)

    def cudaDeviceGetAttribute(self, attr: str, device: int) -> tuple[int, int]:
        return OK, int(self.capability.split(".")[attr == "minor"])

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return OK, SimpleNamespace(name=b"A Card Of Host Memory")

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return OK, {
            INVALID: b"invalid argument",
            NO_MEMORY: b"out of memory",
            UNSUPPORTED_PTX: b"the provided PTX was compiled with an unsupported toolchain.",
            CAPTURING: b"operation not permitted when stream is capturing",
        }[error]

    cuGetErrorString = cudaGetErrorString

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        if self.recording is not None:
            return CAPTURING, None
        if size > self.cudaMemGetInfo()[1]:
            return NO_MEMORY, None
        block = (ctypes.c_byte * size).from_buffer(bytearray(b"\xa5" * size))
        self.memory[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return OK, CARD - sum(map(ctypes.sizeof, self.memory.values())), CARD

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int | None]:
        return self.cudaMalloc(size)

    def cudaFree(self, devPtr: int) -> tuple[int]:
        assert self.recording is None, "it breaks the capture"
        block = self.memory.pop(devPtr)
        ctypes.memset(block, 0xFF, ctypes.sizeof(block))
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> tuple[int]:
        return self.cudaFree(ptr)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        self.streams.add(handle := next(self.handles))
        return OK, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        self.streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        if self.recording is not None:
            return (CAPTURING,)
        self.waited += 1
        while self.queue:
            self.queue.pop(0)()
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: int) -> tuple[int]:
        if any(at not in self.memory or count > ctypes.sizeof(self.memory[at]) for at in (dst, src)):
            return (INVALID,)

        def copy() -> None:
            assert dst in self.memory, "it was freed before the copy"
            assert src in self.memory, "it was freed before the copy"
            ctypes.memmove(dst, src, count)

        return self.hand_over(copy)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[int]:
        if not any(start <= devPtr and devPtr + count <= end for start, end in self.memory_now()):
            return (INVALID,)

        def clear() -> None:
            assert any(start <= devPtr and devPtr + count <= end for start, end in self.memory_now()), "it was freed"
            ctypes.memset(devPtr, value, count)

        return self.hand_over(clear)

    def cuModuleLoadData(self, image: bytes) -> tuple[int, Module | None]:
        if not self.takes_ptx or compiler() is None:
            return UNSUPPORTED_PTX, None
        if self.recording is not None:
            return CAPTURING, None
        assert image.endswith(b"\0"), "the driver reads to a zero byte"
        return OK, module_of(image[:-1].decode())

    def cuModuleUnload(self, hmod: Module) -> tuple[int]:
        return (OK,)

    def cuModuleGetFunction(self, hmod: Module, name: bytes) -> tuple[int, tuple[Module, str]]:
        assert name.decode() in hmod.parameters
        return OK, (hmod, name.decode())

    def cuLaunchKernel(
        self, f: tuple[Module, str], gridDimX: int, gridDimY: int, gridDimZ: int, blockDimX: int, blockDimY: int,
        blockDimZ: int, sharedMemBytes: int, hStream: int, kernelParams: Any, extra: int,
    ) -> tuple[int]:  # fmt: skip
        (module, name), (values, types) = f, kernelParams
        assert (gridDimY, gridDimZ, blockDimY, blockDimZ, sharedMemBytes, extra) == (1, 1, 1, 1, 0, 0)
        assert hStream in self.streams
        sizes = {"u32": 4, "f32": 4, "u64": 8}
        assert [ctypes.sizeof(each) for each in types] == [sizes[kind] for kind in module.parameters[name]]
        self.kernels.append(name)

        def kernel() -> None:
            module.run(name, gridDimX, blockDimX, values, self.memory_now())

        return self.hand_over(kernel)

    def memory_now(self) -> list[tuple[int, int]]:
        """Return start and end of each piece of memory that is given out, in order."""
        return [(start, start + ctypes.sizeof(self.memory[start])) for start in sorted(self.memory)]

    def cudaEventSynchronize(self, event: int) -> tuple[int]:
        if self.recording is not None:
            return (CAPTURING,)
        self.waited += 1
        while self.queue and math.isnan(self.events[event]):
            self.queue.pop(0)()
        return (OK,)

    def cudaEventCreate(self) -> tuple[int, int]:
        self.events[handle := next(self.handles)] = float("nan")
        return OK, handle

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:
        def happen() -> None:
            if event in self.events:
                self.events[event] = float(next(self.clock))

        return self.hand_over(happen)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:
        return OK, self.events[end] - self.events[start]

    def cudaEventDestroy(self, event: int) -> tuple[int]:
        del self.events[event]
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        assert not self.queue, "a capture of a busy stream: legal, but then its first run was not waited for"
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int | None]:
        if self.recording is None:
            return INVALID, None
        handle = next(self.handles)
        self.graphs[handle], self.recording = self.recording, None
        return OK, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        handle = next(self.handles)
        self.graphs[handle] = list(self.graphs[graph])
        return OK, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[int]:
        del self.graphs[graphExec]
        return (OK,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[int]:
        self.launches.append(graphExec)
        for work in self.graphs[graphExec]:
            self.hand_over(work)
        return (OK,)


class HostSession:
    """A session of ONNX Runtime whose runs with fixed addresses wait in the stream; it runs them on the CPU."""

    def __init__(self, session: Any, cuda: HostCuda) -> None:
        self._session, self._cuda = session, cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        """Hand the run over."""
        self._cuda.hand_over(lambda: self._session.run_with_iobinding(binding, options))


class HostTensorRt:
    """What `cmfast.backends.tensorrt` uses of TensorRT's runtime; `onnx` is what the plans were built from."""

    class ILogger:
        ERROR, INTERNAL_ERROR = "error", "internal error"

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, cuda: HostCuda, onnx: Path, version: str) -> None:
        self.cuda, self.onnx, self.__version__ = cuda, onnx, version
        self.contexts: list[HostContext] = []

    @staticmethod
    def nptype(dtype: npt.DTypeLike) -> Any:
        return np.dtype(dtype).type

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> HostEngine | None:
            if b"unloadable" in plan:
                logger.log("error", "Serialization  assertion\nfailed.")
                return None
            return HostEngine(self)

        return SimpleNamespace(deserialize_cuda_engine=deserialize, engine_host_code_allowed=False)


class HostEngine:
    def __init__(self, trt: HostTensorRt) -> None:
        self.trt = trt
        self.session = onnxruntime.InferenceSession(trt.onnx, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        self.tensors = {
            node.name: (mode, [-1 if isinstance(side, str) else side for side in node.shape], types[node.type])
            for mode, nodes in (("input", self.session.get_inputs()), ("output", self.session.get_outputs()))
            for node in nodes
        }
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return str(self.tensors[name][0])

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.tensors[name][1])

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name][2]

    def create_runtime_config(self) -> Any:
        def set_cache(cache: Any) -> bool:
            config.cache = cache
            return True

        def cache() -> Any:
            held = SimpleNamespace(content=b"")
            held.serialize = lambda: held.content + b"compiled;"
            held.deserialize = lambda content: setattr(held, "content", content)
            return held

        config = SimpleNamespace()
        config.create_runtime_cache, config.set_runtime_cache = cache, set_cache
        return config

    def create_execution_context(self, config: Any = None) -> HostContext:
        self.trt.contexts.append(HostContext(self, config))
        return self.trt.contexts[-1]


class HostContext:
    def __init__(self, engine: HostEngine, config: Any) -> None:
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        built = self.engine.get_tensor_shape(name)
        self.shapes[name] = shape
        return len(built) == len(shape) and all(b in (-1, s) for b, s in zip(built, shape, strict=True))

    def get_tensor_shape(self, name: str) -> list[int]:
        batch = self.shapes["noise"][1] if "noise" in self.shapes else self.shapes["x"][0]
        return [batch if side < 0 else side for side in self.engine.get_tensor_shape(name)]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        assert addresses.keys() == self.engine.tensors.keys()

        def kernel() -> None:
            inputs = {name: self._at(addresses[name], shape, name) for name, shape in shapes.items()}
            (result,) = self.engine.session.run(None, inputs)
            (output,) = addresses.keys() - shapes.keys()
            self._at(addresses[output], result.shape, output)[...] = result

        self.engine.trt.cuda.hand_over(kernel)
        return True

    def _at(self, address: int, shape: tuple[int, ...], name: str) -> npt.NDArray[Any]:
        block = self.engine.trt.cuda.memory[address]  # a KeyError: it was freed
        return np.frombuffer(block, self.engine.get_tensor_dtype(name)).reshape(shape)
