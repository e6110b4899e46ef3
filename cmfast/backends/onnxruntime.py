# SPDX-License-Identifier: MIT
"""ONNX Runtime, on the CPU or on CUDA (`onnxruntime_cuda`)."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.onnxruntime_cuda import CudaSession
from cmfast.backends.onnxruntime_library import (
    CPU,
    CUDA,
    TENSORRT,
    cause,
    has_provider,
    import_for,
    missing_library,
    quiet,
)
from cmfast.backends.origin import Origin, pickled
from cmfast.backends.ports import Port, check_ports, fits
from cmfast.backends.protocol import DeviceTimes, Drawn, Inputs
from cmfast.errors import ArtifactError, BackendError, CmfastError, backend_error
from cmfast.formats.manifest import ENCODER, Manifest, check_plain, may_use_tf32
from cmfast.formats.onnx_file import OnnxFile
from cmfast.formats.ort_format import OrtFile
from cmfast.formats.table import ORT, format_of

PROVIDERS = {  # on CUDA, by variant, the first preferred
    "": [CUDA],
    "nhwc": [CUDA],
    "cuda_graph": [CUDA],
    "nhwc cuda_graph": [CUDA],
    "tensorrt": [TENSORRT, CUDA],
}
_OPENED: weakref.WeakSet[OnnxRuntimeBackend] = weakref.WeakSet()


class OnnxRuntimeBackend:
    """A graph run by ONNX Runtime: a `cmfast.Backend`, on CUDA also a `TimedBackend` and a `ReleasingBackend`.

    On CUDA it is a `DrawBackend`, too, where the driver takes cmfast's kernels: noise, few-step loop and pixels stay on
    the GPU, handed over call by call.

    The precision is the file's. A float32 file is multiplied as float32; the float32 parts of any other may be as
    TensorFloat-32 (`artifact.may_use_tf32`). `onnxruntime_float32` measures whether it is so on a GPU. TensorRT takes
    TensorFloat-32 for both unless NVIDIA_TF32_OVERRIDE=0 is in the environment: it has no option.

    One thread at a time. On CUDA the times are between events on the stream, but for two: host_ms and enqueue_ms are
    the host's clock, and with cuda_graph ONNX Runtime before 1.28 waits for the graph itself, so that enqueue_ms is
    nearly all.

    Variants, on CUDA only; "" runs node by node:

    * "nhwc": with `prefer_nhwc`, convolutions of [B, H, W, C], which a file of the flavour ort-cuda is made for.
    * "cuda_graph": captured at the first call with a batch size (ONNX Runtime warms up before, within the same call)
      and replayed as one launch from then on. For a sampler that is the whole few-step loop. A denoiser in a Python
      loop is a launch a step and cannot be less: ONNX Runtime captures within one call of its own, and does not allow
      a capture around several of them (CUDA error 900; its pull request 32081 would). One launch for all steps needs
      a sampler graph.
    * "nhwc cuda_graph": both.
    * "tensorrt": by ONNX Runtime's TensorRT provider, which builds its engine at the first call, again where a batch
      size is outside of what it has seen, and keeps none on disk: cmfast's engine files do that. CUDA takes what
      TensorRT does not.
    """

    timed: Callable[[], AbstractContextManager[list[DeviceTimes]]]  # on CUDA only
    release: Callable[[], None]  # on CUDA only
    draw: Callable[..., Iterator[Drawn]]  # on CUDA only, where the driver takes cmfast's kernels
    origin: Origin | None = None

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        threads: int | None = None,
        variant: str = "",
        sha256: str | None = None,
    ) -> None:
        file = OrtFile(path, sha256) if format_of(path) is ORT else OnnxFile(path, sha256)
        try:
            self._start(file, device, threads, variant)
        finally:
            file.close()
        _OPENED.add(self)

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def _start(self, file: OnnxFile | OrtFile, device: str, threads: int | None, variant: str) -> None:
        path, self.manifest = file.path, file.manifest
        if self.manifest.kind == ENCODER and device != "cpu":
            raise BackendError(f"{path}: an encoder in a file of its own runs on the CPU; leave device {device} out")
        _check_variant(path, device, variant, self.manifest)
        ort = import_for(device, variant)
        self.name = f"ONNX Runtime {device} {variant}".rstrip()
        options = ort.SessionOptions()
        options.log_severity_level = 4  # it also raises what it logs as errors, and then our line says it
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session: Any = None  # before the device, so that it goes before the stream that it runs on
        self._device: CudaSession | None = None
        if device == "cpu":
            self._session = _open(ort, file, options, self.manifest.dtype, [(CPU, {})])
            self.batch = self._check_graph(path)
        else:
            stream = _check_gpu(ort, path, variant, self.manifest.dtype)
            wanted = _providers(variant, self.manifest.dtype, int(stream.handle))
            with quiet(ort):
                self._session = _open(ort, file, options, self.manifest.dtype, wanted)
            self.batch = self._check_graph(path)
            captures = "cuda_graph" in variant
            self._device = CudaSession(
                ort, self._session, self.manifest, stream, self.name, batch=self.batch, captures=captures
            )
            self.timed, self.release = self._device.timed, self._device.release
            if self._device.draws:
                self.draw = self._device.draw

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the graph's output, float32 [B, *shape]."""
        try:
            if self._device is not None:
                return self._device.run(inputs)
            (output,) = self._session.run(None, dict(inputs))
        except CmfastError:
            raise
        except Exception as err:  # the exceptions of ONNX Runtime share no public base class
            raise backend_error(f"{self.name} failed; if memory is short, try a smaller batch: {cause(err)}") from None
        first, shape = inputs[self.manifest.inputs[0].name], self.manifest.returns
        want = (first.shape[self.manifest.batch_axis], *shape)
        if output.dtype != np.float32 or not fits(output.shape, want):
            raise ArtifactError(
                f"{self.name}: the graph returned {output.dtype} {list(output.shape)}, its manifest promises float32 "
                f"{list(want)}; export the model again with cmfast-export"
            )
        result: npt.NDArray[np.float32] = output
        return result

    def _check_graph(self, path: Path) -> int | None:
        """Raise unless the graph takes and gives what its manifest says; return its fixed batch size, if it has one."""
        sides = (self._session.get_inputs(), self._session.get_outputs())
        inputs, outputs = ([Port(node.name, node.type, tuple(node.shape)) for node in nodes] for nodes in sides)
        return check_ports(path, self.manifest, inputs, outputs, ("tensor(float)", "tensor(int64)"))


def _keep_inherited() -> None:
    """In a child of fork, never free a session: it would wait for threads that only the parent has, and crash.

    It still runs there, on the thread that calls it.
    """
    for backend in _OPENED:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend._session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


def check_cuda() -> None:
    """Raise BackendError unless this ONNX Runtime, card and driver can run files on CUDA."""
    _check_gpu(import_for("cuda", ""), Path(), "", "float32")


def _open(
    ort: Any, file: OnnxFile | OrtFile, options: Any, dtype: str, wanted: list[tuple[str, dict[str, str]]]
) -> Any:
    """Return a session on these providers, or raise with the reason why there is none."""
    path = file.path
    names = [name for name, _ in wanted]
    try:
        # Without enable_fallback=0 it prints what is wrong and goes on with other providers.
        session = file.session(ort, options, providers=wanted, enable_fallback=0)
    except CmfastError:
        raise
    except Exception as err:
        raise _refusal(ort, path, dtype, names, cause(err)) from None
    if list(session.get_providers())[: len(names)] != names:  # it falls back without a word, which would be a lie
        raise _refusal(ort, path, dtype, names, "")
    return session


def _refusal(ort: Any, path: Path, dtype: str, names: list[str], why: str) -> CmfastError:
    """Return the error for a session that could not be made; `why` is what ONNX Runtime said, if anything."""
    this = f"ONNX Runtime {ort.__version__}"
    if names != [CPU]:
        for name, extra, fix in (
            (TENSORRT, "TensorRT", "install that version of TensorRT, or build an engine file: --format engine"),
            (CUDA, "CUDA", "install what it needs: pip install 'onnxruntime-gpu[cuda,cudnn]'"),
        ):
            if name in names and (missing := missing_library(ort, extra)):
                return BackendError(f"{this} cannot load its {extra} provider: {missing}; {fix}")
        if not why or any(f"{library} failure" in why for library in ("CUDA", "CUBLAS", "CUDNN")):
            said = f": {why}" if why else " and fell back to another provider"
            return BackendError(f"device cuda was requested, but {this} could not start it{said}; see nvidia-smi")
        if "graph capture" in why:
            fix = "use it without that variant, or export it with a fixed --batch"
            return BackendError(f"{path}: {this} cannot run it as a CUDA graph; {fix}: {why}")
    if dtype == "bfloat16" and "NOT_IMPLEMENTED" in why:
        use = "use a GPU (--device cuda), or " if names == [CPU] else ""
        return BackendError(
            f"{path}: {this} lacks bfloat16 operations of this file on this device; "
            f"{use}export it with --precision fp16 or fp32: {why}"
        )
    return ArtifactError(f"{path}: {this} cannot open it: {why}")


def _check_variant(path: Path, device: str, variant: str, manifest: Manifest) -> None:
    dtype = manifest.dtype
    if device != "cpu" and format_of(path) is ORT:
        raise BackendError(f"{path}: an .ort file is optimised for the CPU; use --device cpu, or the .onnx file")
    have = list(PROVIDERS) if device == "cuda" else [""]
    if variant not in have:
        there = ", ".join(map(repr, have))
        also = "" if device == "cuda" else "; 'nhwc', 'cuda_graph' and 'tensorrt' need --device cuda"
        raise BackendError(f"{path}: ONNX Runtime on {device} has the variants {there}, not {variant!r}{also}")
    if device == "cpu" or variant == "tensorrt":
        check_plain(path, manifest, "the CPU" if device == "cpu" else "TensorRT", int8=device == "cpu")
    # Its NHWC kernels are float and float16: core/providers/cuda/cuda_nhwc_kernels.cc. To be removed when it has more.
    if "nhwc" in variant and dtype == "bfloat16":
        raise BackendError(
            f"{path}: a file in bfloat16, of which ONNX Runtime has no NHWC convolutions; leave nhwc out, or "
            "export it with --precision fp16"
        )
    if variant == "tensorrt" and dtype == "float32" and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise BackendError(
            f"{path}: a float32 file, and ONNX Runtime's TensorRT provider multiplies float32 as TensorFloat-32 "
            "without a switch for it; set NVIDIA_TF32_OVERRIDE=0 in the environment, or export with --precision tf32"
        )


def _check_gpu(ort: Any, path: Path, variant: str, dtype: str) -> cuda.Stream:
    """Raise unless this build, this card and its driver can run such a file; return a stream to run it on."""
    for name in PROVIDERS[variant]:
        if not has_provider(ort, name):
            what = "TensorRT" if name == TENSORRT else "CUDA"
            wanted = "variant tensorrt" if name == TENSORRT else "device cuda"
            raise BackendError(
                f"{wanted} was requested, but the installed onnxruntime {ort.__version__} is a build without {what}; "
                "replace it: pip uninstall onnxruntime && pip install 'cmfast[gpu]'"
            )
    gpu = cuda.open_gpu()
    if dtype in ("tf32", "bfloat16") and int(gpu.compute_capability.split(".")[0]) < 8:
        raise BackendError(
            f"{path}: a file in {dtype}, which the {gpu.name} lacks (compute capability {gpu.compute_capability}, "
            "needed 8.0); export it with --precision fp16 or fp32"
        )
    return cuda.Stream()


def _providers(variant: str, dtype: str, stream: int) -> list[tuple[str, dict[str, str]]]:
    """Return providers with their options. Float32 stays float32: TensorFloat-32 keeps ten bits of the mantissa."""
    common = {"user_compute_stream": str(stream)}
    for_cuda = {**common, "use_tf32": str(int(may_use_tf32(dtype)))}
    if "nhwc" in variant:
        for_cuda["prefer_nhwc"] = "1"
    if "cuda_graph" in variant:
        for_cuda["enable_cuda_graph"] = "1"
    # TensorRT takes the types of the file, TensorFloat-32 apart, as long as no option asks for another precision.
    return [(name, for_cuda if name == CUDA else common) for name in PROVIDERS[variant]]
