# SPDX-License-Identifier: MIT
"""What a backend is: the protocols that one implements, and the names of its variants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cmfast.checks import shown
from cmfast.errors import CmfastError
from cmfast.formats.manifest import Manifest

Inputs = Mapping[str, npt.NDArray[Any]]
# Ways to run the same weights; which exist, and which of them combine, is the affair of the backend.
VARIANTS = {
    "": "the plain way",
    "channels_last": "PyTorch with the memory format channels_last",
    "fused": "CUDA: PyTorch in channels_last, with kernels of cmfast in place of several operations",
    "nhwc": "CUDA: ONNX Runtime with convolutions of [B, H, W, C], its option prefer_nhwc",
    "compiled": "PyTorch with torch.compile, on CUDA with mode max-autotune",
    "reduce-overhead": "CUDA: PyTorch with torch.compile in that mode, which compiles faster and tries fewer kernels",
    "cuda_graph": "CUDA: PyTorch's whole sampler, or ONNX Runtime's graph, captured once and replayed",
    "tensorrt": "ONNX Runtime with its TensorRT provider",
    "openvino": "CPU: an .onnx file by OpenVINO, which also takes a precision",
    "throughput": "OpenVINO with its hint THROUGHPUT: a batch in parts, each on a stream of its own",
    "diffusers": "diffusers' own pipeline of its folder",
}


class Backend(Protocol):
    """A model file, opened. Opening is slow, calling is not; a backend never changes after it was opened."""

    manifest: Manifest
    name: str  # backend and device in words, for tables: "ONNX Runtime cpu"
    batch: int | None  # the only batch size that it takes; None: any

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Evaluate the graph.

        Args:
            inputs: of a denoiser x, sigma, of a flow map sigma_next, and the conditions by name; of a sampler noise and
                the conditions.

        Returns:
            The graph's one output, float32 [B, *shape].
        """
        ...


@runtime_checkable
class LoopBackend(Protocol):
    """A backend of a denoiser that brings the few-step loop with it, because it runs it faster or its own way."""

    def loop(
        self, noise: npt.NDArray[np.float32], sigmas: Sequence[float], conditions: Inputs
    ) -> npt.NDArray[np.float32]:
        """Return what `cmfast.sampling.sample` returns: samples [B, *shape] from unit noise [K, B, *shape]."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A batch that a backend drew."""

    images: npt.NDArray[Any]  # uint8 [B, H, W, C], as `cmfast.sampling.to_uint8` rounds; or float32 [B, *shape]
    finite: bool  # whether all of it was, before it was rounded


@runtime_checkable
class DrawBackend(Protocol):
    """A backend of a denoiser or a sampler that draws whole batches where it runs, the noise too."""

    def draw(
        self,
        seed: int,
        batches: Sequence[tuple[range, Inputs]],
        sigmas: Sequence[float],
        *,
        pixels: bool,
    ) -> Iterator[Drawn]:
        """Yield each batch, while the next one is drawn: what `loop` returns for the noise of `cmfast.noise`.

        Args:
            batches: indices of the samples, and their conditions
            pixels: uint8 is wanted, of images, else float32
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DeviceTimes:
    """One call on a GPU, ms. Device times are between CUDA events on the stream of the backend."""

    host_ms: float  # wall clock of the whole call: arrays in host memory to arrays in host memory
    enqueue_ms: float  # of it, host time of handing over all work: after the inputs are in page-locked memory
    copy_in_ms: float  # device time: host to device
    compute_ms: float  # device time from the first kernel to the last, gaps included
    copy_out_ms: float  # device time: device to host


@runtime_checkable
class TimedBackend(Protocol):
    """A backend on a GPU that can say what a call costs there."""

    def timed(self) -> AbstractContextManager[list[DeviceTimes]]:
        """Return a context in which every `run`, `loop` and batch of `draw`, or part of one, appends its times."""
        ...


@runtime_checkable
class ReleasingBackend(Protocol):
    """A backend on a GPU that keeps memory for the batch sizes it was called with."""

    def release(self) -> None:
        """Free buffers and captured graphs, but not the weights; the next call makes its own again."""
        ...


def variant_words(variant: object) -> tuple[str, ...]:
    """Return the words of a variant, separated by spaces or commas, in the order of VARIANTS; () for ""."""
    words = variant.replace(",", " ").split() if isinstance(variant, str) else [""]
    if not set(words) < VARIANTS.keys() or "" in words:
        have = ", ".join(filter(None, VARIANTS))
        raise CmfastError(
            f"variant must be one of {have}, or several as in 'channels_last cuda_graph', got {shown(variant)}"
        )
    return tuple(word for word in VARIANTS if word in words)
