# SPDX-License-Identifier: MIT
"""A model as an engine of TensorRT or TensorRT-RTX in one call: the verified graph, then its engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmfast.errors import CmfastError
from cmfast.files import check_target, temporary_folder
from cmfast.formats.table import ENGINE, ONNX, format_of
from cmfast.schedule import as_sigmas
from cmfast_export.request import GraphRequest
from cmfast_export.targets.tensorrt_engine import Built, build_engine, check_build
from cmfast_export.targets.tensorrt_options import BuildOptions

if TYPE_CHECKING:
    from cmfast_export.pipeline import Source


def export_engine(
    model: Source,
    out: str | os.PathLike[str],
    *,
    kind: str = "denoiser",
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    batch: Sequence[int] = (1, 8, 64),
    sizes: Sequence[int] = (1, 64, 512),
    precision: str = "fp32",
    guidance: float | None = None,
    null: Mapping[str, float] | None = None,
    tolerance: float | None = None,
    library: str = "",
    target: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
) -> Built:
    """Build the engine of a model; where there is a card that it is for, run it and compare it with its graph.

    Args:
        model: as in `export_onnx`; or a verified .onnx file, whose kind and precision are in it.
        out: the .engine or .plan file; nothing has this name before it has been built and verified.
        kind: as in `export_onnx`, and so are steps, sigmas, precision, guidance and null.
        steps: network calls of a sampler.
        sigmas: noise levels of a sampler, data units, decreasing.
        batch: smallest, most frequent and largest number of samples, or one number: only that.
        sizes: smallest, most frequent and largest size of the conditions' dynamic axes.
        precision: fp32, tf32, fp16 or bf16.
        guidance: weight of classifier-free guidance.
        null: what stands for no condition, by name.
        tolerance: largest allowed difference, data units; None: what rounding to this precision may cost.
        library: tensorrt or tensorrt_rtx; "": tensorrt where it and a card for it are, else tensorrt_rtx.
        target: compute capabilities such as "8.9"; TensorRT-RTX only; (): all that it builds for.
        cache: folder of engines built before, found by content.

    Returns:
        The engine and how far it is from its graph.

    Raises:
        CmfastError: the request cannot be fulfilled.
        CheckFailed: the graph differs from PyTorch, or the engine from the graph; no file was written.
        BackendError: the library cannot build it.
    """
    goal = check_target(out, ENGINE.suffixes)
    options = BuildOptions(batch=tuple(batch), sizes=tuple(sizes), library=library, target=tuple(target))
    folder = None if cache is None else Path(cache)
    check_build(options, goal, folder)
    graph = GraphRequest(
        kind=kind, steps=steps, sigmas=None if sigmas is None else as_sigmas(sigmas), precision=precision,
        guidance=guidance, null=dict(null or {}), tolerance=tolerance,
    )  # fmt: skip
    if isinstance(model, (str, os.PathLike)) and format_of(model) is ONNX:
        if graph != GraphRequest(tolerance=tolerance):
            raise CmfastError(f"{model}: exported already, so its kind and precision are in it; export the checkpoint")
        return build_engine(Path(model), goal, options, cache=folder, tolerance=tolerance)
    from cmfast_export.pipeline import export_onnx_as

    with temporary_folder(goal) as scratch:
        file = scratch / f"{goal.stem}.onnx"
        export_onnx_as(model, file, graph)
        return build_engine(file, goal, options, cache=folder, tolerance=tolerance)
