# SPDX-License-Identifier: MIT
"""TensorRT and TensorRT-RTX: engine files, on an NVIDIA GPU, without torch.

    model = cmfast.load("model.engine")       # a sampler: the whole few-step loop is one CUDA graph a batch size

An engine file is native code for the GPU and the host: load only what you trust, and say its SHA-256 where it has to
travel (`cmfast.load(path, sha256=...)`). Before anything is deserialized the file is checked
(`cmfast.formats.tensorrt_plan`) and what it was built for is compared with what is here. Building is
`cmfast_export.targets.tensorrt_engine`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.backends.cache import check_cache
from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.origin import Origin, pickled
from cmfast.backends.protocol import Drawn, Inputs
from cmfast.backends.tensorrt_library import (
    LIBRARIES,
    cuda_major,
    import_library,
    make_logger,
    reason,
    this_platform,
)
from cmfast.backends.tensorrt_session import REBUILD, TensorRtSession
from cmfast.errors import BackendError, CmfastError, CmfastWarning
from cmfast.formats.manifest import Manifest, check_file, compare_sha256
from cmfast.formats.tensorrt_plan import parse_plan


class TensorRtBackend:
    """A plan, run by the library that built it. The contracts are those of `cmfast.backends`.

    It is a `Backend`, a `TimedBackend` and a `ReleasingBackend`, and a `DrawBackend` where the driver takes cmfast's
    kernels: noise, few-step loop and pixels stay on the GPU, with TensorRT as one CUDA graph for each batch size, noise
    levels and kind of result.

    A batch size that is used for the first time costs a warm-up and, with TensorRT, the capture of a CUDA graph; with
    TensorRT-RTX also the compilation of kernels for this card, which are kept in the folder $CMFAST_CACHE, if it is
    set, for the next process. Larger batches than the engine was built for are run in parts. One thread at a time.

    Args:
        sha256: what the file must hash to; the bytes that were hashed are those that are loaded
    """

    origin: Origin | None = None
    draw: Callable[..., Iterator[Drawn]]  # where the kernels run

    def __init__(
        self,
        path: Path,
        device: str = "cuda",
        threads: int | None = None,
        variant: str = "",
        sha256: str | None = None,
    ) -> None:
        if device != "cuda":
            raise BackendError(f"{path}: a TensorRT engine runs on NVIDIA GPUs only, not on {device}: --device cuda")
        if variant:
            raise BackendError(f"{path}: a TensorRT engine runs one way only, not {variant}")
        plan = check_file(path).read_bytes()
        if sha256 is not None:
            compare_sha256(path, hashlib.sha256(plan).hexdigest(), sha256)
        self.manifest = parse_plan(plan, path)
        built = self.manifest.engine
        check_host(path, self.manifest)
        library = str(built["library"])
        self._trt = import_library(library, f"running {path.name}")
        check_version(path, self.manifest, str(self._trt.__version__), cuda_major(library))
        gpu = cuda.open_gpu()
        check_gpu(path, self.manifest, gpu)
        self.name = f"{LIBRARIES[library]} cuda"
        self._least, _, self._most = built["batch"]
        self.batch = self._most if self._least == self._most else None
        log = make_logger(self._trt)
        self._runtime = self._trt.Runtime(log)
        if built.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True  # the runtime of the older version travels in the plan
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{path}: {LIBRARIES[library]} cannot load it: {reason(log)}; {REBUILD}")
        kernels = _kernel_file(self.manifest, gpu)
        self._session = TensorRtSession(self._trt, log, engine, self.manifest, self.name, kernels)
        self.timed, self.release = self._session.timed, self._session.release
        if self._session.draws:
            self.draw = self._session.draw

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the graph's output, float32 [B, *shape]."""
        axes = {name: self.manifest.batch_axis if name == "noise" else 0 for name in inputs}
        name = next(iter(inputs))
        n = inputs[name].shape[axes[name]]
        parts = []
        for start in range(0, n, self._most):
            size = min(self._most, n - start)
            wanted = max(size, self._least)
            part = {k: _part(v, axes[k], start, size, wanted) for k, v in inputs.items()}
            parts.append(self._session.run(part)[:size])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def check_host(path: Path, manifest: Manifest) -> None:
    """Raise BackendError unless the plan was built for this operating system and processor."""
    built = manifest.engine["platform"]
    portable = manifest.engine["library"] == "tensorrt_rtx"  # its plans run on Linux and Windows alike
    if not portable and built != this_platform():
        raise BackendError(f"{path}: built for {built}, this is {this_platform()}; {REBUILD}")


def check_version(path: Path, manifest: Manifest, here: str, cuda_here: str) -> None:
    """Raise BackendError unless this version of the library, for this major version of CUDA, can load the plan."""
    built, library = str(manifest.engine["version"]), LIBRARIES[str(manifest.engine["library"])]
    cuda_built = manifest.engine.get("cuda")
    if cuda_built and cuda_here and cuda_built != cuda_here:
        raise BackendError(
            f"{path}: built for CUDA {cuda_built}, the {library} here is for CUDA {cuda_here}; {REBUILD}"
        )
    if built == here or (manifest.engine.get("version_compatible") and _number(built) <= _number(here)):
        return
    raise BackendError(f"{path}: built by {library} {built}, this is {library} {here}; install that one, or {REBUILD}")


def check_gpu(path: Path, manifest: Manifest, gpu: cuda.Gpu) -> None:
    """Raise BackendError unless the plan was built for a card like this one; warn if it was tuned on another model."""
    if why := other_card(manifest.engine, gpu):
        raise BackendError(f"{path}: {why}; {REBUILD}")
    tuned_on = manifest.engine.get("gpu")
    if tuned_on and tuned_on != gpu.name:
        warnings.warn(f"{path} was tuned on the {tuned_on}; this is the {gpu.name}", CmfastWarning, stacklevel=2)


def other_card(built: Any, gpu: cuda.Gpu) -> str:
    """Return why a plan with this "engine" in its manifest is not for the card, or an empty string."""
    if gpu.compute_capability in built["compute_capability"]:
        return ""
    if built.get("hardware_compatible") == "ampere+" and _number(gpu.compute_capability) >= (8, 0):
        return ""
    cards = ", ".join(built["compute_capability"])
    return f"built for compute capability {cards}, the {gpu.name} here has {gpu.compute_capability}"


def _kernel_file(manifest: Manifest, gpu: cuda.Gpu) -> Path | None:
    """Return where TensorRT-RTX's compiled kernels are kept between processes: in $CMFAST_CACHE, if it is set."""
    folder = os.environ.get("CMFAST_CACHE")
    if not folder or manifest.engine["library"] != "tensorrt_rtx":
        return None
    # Not the plan's digest: it changes when the plan is sealed again with what was measured.
    of_file = {k: v for k, v in manifest.engine.items() if k not in ("plan_sha256", "max_abs")}
    key = json.dumps([of_file, gpu.name, gpu.compute_capability], sort_keys=True)
    try:
        return check_cache(folder, make=True) / f"{hashlib.sha256(key.encode()).hexdigest()}.kernels"
    except CmfastError as err:  # the engine runs without; it compiles again
        warnings.warn(f"kernels are not kept: {err}", CmfastWarning, stacklevel=2)
        return None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _part(values: npt.NDArray[Any], axis: int, start: int, size: int, wanted: int) -> npt.NDArray[Any]:
    """Return `size` of the batch from `start` on, the last repeated until there are `wanted`."""
    index = np.minimum(np.arange(start, start + wanted), start + size - 1)
    return values if wanted == values.shape[axis] else np.take(values, index, axis=axis)
