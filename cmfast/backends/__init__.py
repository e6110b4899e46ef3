# SPDX-License-Identifier: MIT
"""Engines: what runs a model file. Chosen by suffix, or said by name; one file each.

An engine that lives outside the runtime (PyTorch's, in cmfast_train) announces its suffix, or "folder", as an entry
point of the group "cmfast.backends", so the runtime never imports it by name. It is called with (path, device, threads,
variant, precision).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cmfast.backends._origin import Origin, states_of
from cmfast.checks import MAX_THREADS as MAX_THREADS
from cmfast.checks import check_threads, shown
from cmfast.errors import CmfastError, EngineError, MissingDependency
from cmfast.formats.manifest import ENGINE_SUFFIXES, PRECISIONS, Manifest, check_model

Inputs = Mapping[str, npt.NDArray[Any]]
# Ways to run the same weights; which exist, and which of them combine, is the engine's affair.
VARIANTS = {
    "": "the engine's plain way",
    "channels_last": "PyTorch with the memory format channels_last",
    "fused": "CUDA: PyTorch in channels_last, with kernels of cmfast in place of several operations",
    "nhwc": "CUDA: ONNX Runtime with convolutions of [B, H, W, C], its option prefer_nhwc",
    "compiled": "PyTorch with torch.compile, on CUDA with mode max-autotune",
    "reduce-overhead": "CUDA: PyTorch with torch.compile in that mode, which compiles faster and tries fewer kernels",
    "cuda_graph": "CUDA: PyTorch's whole sampler, or ONNX Runtime's graph, captured once and replayed",
    "tensorrt": "ONNX Runtime with its TensorRT provider",
    "diffusers": "diffusers' own pipeline of its folder",
}


class Engine(Protocol):
    """A model file, opened. Opening is slow, calling is not; an engine is never changed after it was opened."""

    manifest: Manifest
    name: str  # engine and device in words, for tables: "ONNX Runtime cpu"
    batch: int | None  # the only batch size that it takes; None: any

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the graph's one output, float32 [B, C, H, W].

        Inputs of a denoiser are x, sigma and, when class-conditional, label; of a sampler noise and label.
        """
        ...


@runtime_checkable
class LoopEngine(Protocol):
    """An engine of a denoiser that brings the few-step loop with it, because it runs it faster or its own way."""

    def loop(
        self, noise: npt.NDArray[np.float32], sigmas: Sequence[float], label: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Return what `cmfast.sampling.sample` returns: images [B, C, H, W] from unit noise [K, B, C, H, W]."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A batch that an engine drew."""

    images: npt.NDArray[Any]  # uint8 [B, H, W, C], as `cmfast.sampling.to_uint8` rounds; or float32 [B, C, H, W]
    finite: bool  # whether all of it was, before it was rounded


@runtime_checkable
class DrawEngine(Protocol):
    """An engine of a denoiser that draws whole batches where it runs, the noise too; only images come back."""

    def draw(
        self,
        seed: int,
        batches: Sequence[tuple[range, npt.NDArray[np.int64] | None]],
        sigmas: Sequence[float],
        *,
        pixels: bool,
    ) -> Iterator[Drawn]:
        """Yield each batch, while the next one is drawn: what `loop` returns for the noise of `cmfast.noise`.

        batches  indices of the images, and a label for each of them, int64 [B], where the model has classes
        pixels   uint8 is wanted, else float32
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DeviceTimes:
    """One call on a GPU, ms. Device times are between CUDA events on the engine's stream."""

    host_ms: float  # wall clock of the whole call: arrays in host memory to arrays in host memory
    enqueue_ms: float  # of it, host time of handing over all work: after the inputs are in page-locked memory
    copy_in_ms: float  # device time: host to device
    compute_ms: float  # device time from the first kernel to the last, gaps included
    copy_out_ms: float  # device time: device to host


@runtime_checkable
class TimedEngine(Protocol):
    """An engine on a GPU that can say what a call costs there."""

    def timed(self) -> AbstractContextManager[list[DeviceTimes]]:
        """Return a context in which every `run`, `loop` and batch of `draw` appends its times to its list."""
        ...


@runtime_checkable
class ReleasingEngine(Protocol):
    """An engine on a GPU that keeps memory for the batch sizes it was called with."""

    def release(self) -> None:
        """Free buffers and captured graphs, but not the weights; the next call makes its own again."""
        ...


def open_engine(
    path: str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    *,
    variant: str = "",
    precision: str = "",
    sha256: str | None = None,
) -> Engine:
    """Open a model file with the engine that its suffix stands for.

    device     cpu or cuda; one that cannot be had is an error. None: cuda for a TensorRT engine, which runs nowhere
               else, and cpu for everything else
    threads    CPU threads, at most MAX_THREADS; None leaves the choice to the engine
    variant    words of VARIANTS, as in "channels_last cuda_graph"; which exist and combine depends on the engine
    precision  one of cmfast.formats.manifest.PRECISIONS, for a checkpoint that PyTorch runs; an exported file has its
    own sha256     what the file must hash to, hex digits; anything else is refused, and nothing else than the bytes
    that
               were hashed is loaded
    """
    file = _path(path)
    if device is None:
        device = "cuda" if file.suffix in ENGINE_SUFFIXES else "cpu"
    _check(device, threads, variant, precision, sha256)
    variant = " ".join(variant_words(variant))
    if file.suffix in (".onnx", *ENGINE_SUFFIXES) and precision:
        raise EngineError(
            f"{file}: an exported file runs in the precision that it was exported with; "
            f"make another: cmfast-export model.pt --precision {precision}"
        )
    origin = Origin(
        path=file.absolute(), device=device, threads=threads, variant=variant, precision=precision, sha256=sha256,
        files=states_of(file),
    )  # fmt: skip
    engine = _open(file, device, threads, variant, precision, sha256)
    with contextlib.suppress(AttributeError):  # not in the protocol: engines of others may have no room for it
        engine.origin = origin  # type: ignore[attr-defined]
    return engine


def variant_words(variant: object) -> tuple[str, ...]:
    """Return the words of a variant, separated by spaces or commas, in the order of VARIANTS; () for ""."""
    words = variant.replace(",", " ").split() if isinstance(variant, str) else [""]
    if not set(words) < VARIANTS.keys() or "" in words:
        have = ", ".join(filter(None, VARIANTS))
        raise CmfastError(
            f"variant must be one of {have}, or several as in 'channels_last cuda_graph', got {shown(variant)}"
        )
    return tuple(word for word in VARIANTS if word in words)


def _open(file: Path, device: str, threads: int | None, variant: str, precision: str, sha256: str | None) -> Engine:
    if file.suffix == ".onnx":
        from cmfast.backends.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(file, device, threads, variant, sha256)
    if file.suffix in ENGINE_SUFFIXES:
        from cmfast.backends.tensorrt import TensorRtEngine

        return TensorRtEngine(file, device, threads, variant, sha256)
    from importlib.metadata import entry_points  # slow to import, and .onnx does without

    name = "folder" if file.is_dir() else file.suffix.removeprefix(".")
    for entry in entry_points(group="cmfast.backends", name=name):
        try:
            engine_type = entry.load()
        except ModuleNotFoundError as err:
            what = "running a model folder" if file.is_dir() else f"running a {file.suffix} file"
            raise MissingDependency(what, (err.name or "?").split(".")[0], "train") from None
        engine: Engine
        if sha256 is None:
            engine = engine_type(file, device, threads, variant, precision)
            return engine
        from cmfast.backends._pinned import pinned

        with pinned(file, sha256) as same:
            engine = engine_type(same, device, threads, variant, precision)
        return engine
    names = sorted("." + entry.name for entry in entry_points(group="cmfast.backends") if entry.name != "folder")
    have = ", ".join([".onnx", *ENGINE_SUFFIXES, *names])
    raise EngineError(f"{file}: no engine runs files ending in {file.suffix or 'nothing'}; there are some for {have}")


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise CmfastError(f"a model is opened by its path, got {type(path).__name__}; pass a str or a Path")
    try:
        return check_model(path)
    except ValueError as err:  # a null character
        raise CmfastError(f"{os.fspath(path)!r} is no path: {err}") from None


def _check(device: object, threads: object, variant: object, precision: object, sha256: object) -> None:
    """Raise CmfastError for what no engine knows, whatever its type."""
    if not isinstance(device, str) or device not in ("cpu", "cuda"):
        raise CmfastError(f"device must be cpu or cuda, got {device!r}")
    check_threads(threads)
    variant_words(variant)
    if not isinstance(precision, str) or precision not in ("", *PRECISIONS):
        raise CmfastError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if sha256 is not None and not isinstance(sha256, str):
        raise CmfastError(f"a SHA-256 is passed as 64 hex digits, got {type(sha256).__name__}")
