# SPDX-License-Identifier: MIT
"""Engines: what runs a model file. Chosen by suffix, or said by name; one file each.

An engine that lives outside the runtime (PyTorch's, in cmfast_train) announces its suffix, or "folder", as an entry
point of the group "cmfast.engines", so the runtime never imports it by name. It is called with (path, device, threads,
variant).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cmfast.artifact import Manifest, check_model
from cmfast.errors import CmfastError, EngineError, MissingDependency

Inputs = Mapping[str, npt.NDArray[Any]]
VARIANTS = (
    "",
    "channels_last",
    "compiled",
    "diffusers",
)  # ways to run the same weights; which exist is the engine's affair


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
        """Return what `cmfast.sampler.sample` returns: images [B, C, H, W] from unit noise [K, B, C, H, W]."""
        ...


def open_engine(
    path: str | os.PathLike[str], device: str = "cpu", threads: int | None = None, *, variant: str = ""
) -> Engine:
    """Open a model file with the engine that its suffix stands for.

    device   cpu or cuda; one that cannot be had is an error
    threads  CPU threads; None leaves the choice to the engine
    variant  one of VARIANTS: "" is the engine's plain way; PyTorch's also has the memory format channels_last,
             compiled (torch.compile) and, for a diffusers folder, diffusers' own pipeline
    """
    file = check_model(path)
    if device not in ("cpu", "cuda"):
        raise CmfastError(f"device must be cpu or cuda, got {device!r}")
    if threads is not None and threads < 1:
        raise CmfastError(f"threads must be at least 1, got {threads}")
    if variant not in VARIANTS:
        raise CmfastError(f"variant must be one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    if file.suffix == ".onnx":
        if variant:
            raise EngineError(f"{file}: ONNX Runtime runs a graph one way only, not {variant}; a .pt file has variants")
        from cmfast.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(file, device, threads)
    from importlib.metadata import entry_points  # slow to import, and .onnx does without

    name = "folder" if file.is_dir() else file.suffix.removeprefix(".")
    for entry in entry_points(group="cmfast.engines", name=name):
        try:
            engine_type = entry.load()
        except ModuleNotFoundError as err:
            what = "running a model folder" if file.is_dir() else f"running a {file.suffix} file"
            raise MissingDependency(what, (err.name or "?").split(".")[0], "train") from None
        engine: Engine = engine_type(file, device, threads, variant)
        return engine
    names = sorted("." + entry.name for entry in entry_points(group="cmfast.engines") if entry.name != "folder")
    have = ", ".join([".onnx", *names])
    raise EngineError(f"{file}: no engine runs files ending in {file.suffix or 'nothing'}; there are some for {have}")
