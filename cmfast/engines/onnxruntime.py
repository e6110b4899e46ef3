# SPDX-License-Identifier: MIT
"""ONNX Runtime, on the CPU or on CUDA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.artifact import read_onnx
from cmfast.engines import Inputs
from cmfast.errors import ArtifactError, EngineError, MissingDependency


class OnnxRuntimeEngine:
    """A graph run by ONNX Runtime. The contract is `cmfast.engines.Engine`."""

    def __init__(self, path: Path, device: str = "cpu", threads: int | None = None, variant: str = "") -> None:
        self.manifest, _ = read_onnx(path)
        ort = _import(device)
        self.name = f"ONNX Runtime {device}"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings are not for the user of a command; errors are raised
        if threads is not None:
            options.intra_op_num_threads = threads
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in ort.get_available_providers():
            raise EngineError(
                f"device cuda was asked for, but the installed onnxruntime {ort.__version__} is a build without CUDA; "
                "replace it: pip uninstall onnxruntime && pip install 'cmfast[gpu]'"
            )
        # A float32 file is run in float32: TensorFloat-32 keeps ten bits of the mantissa.
        settings = {"use_tf32": "0"} if device == "cuda" else {}
        try:
            self._session = ort.InferenceSession(os.fspath(path), options, providers=[(provider, settings)])
        except Exception as err:  # the exceptions of ONNX Runtime share no public base class
            reason = " ".join(str(err).split())[:300]
            raise ArtifactError(f"{path}: ONNX Runtime {ort.__version__} cannot open it: {reason}") from None
        if self._session.get_providers()[0] != provider:  # it falls back without a word, which would be a lie
            raise EngineError(
                f"device {device} was asked for, but ONNX Runtime could not start it and fell back to the CPU; "
                "check the driver (nvidia-smi) and that CUDA and cuDNN of the right version can be found"
            )
        self._session.disable_fallback()  # else a failing call is repeated on the CPU
        self.batch = self._check_inputs(path)

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the graph's output, float32 [B, C, H, W]."""
        try:
            (output,) = self._session.run(None, dict(inputs))
        except Exception as err:
            reason = " ".join(str(err).split())[:300]
            raise EngineError(f"{self.name} failed; if memory is short, try a smaller batch: {reason}") from None
        result: npt.NDArray[np.float32] = output
        return result

    def _check_inputs(self, path: Path) -> int | None:
        """Raise unless the graph takes what its manifest says; return its fixed batch size, if it has one."""
        spec = self.manifest.spec
        have = {node.name: list(node.shape) for node in self._session.get_inputs()}
        names = ["x", "sigma"] if self.manifest.kind == "denoiser" else ["noise"]
        names += ["label"] if spec.classes else []
        if list(have) != names:
            raise ArtifactError(
                f"{path}: the graph's inputs are {', '.join(have)}; its manifest needs {', '.join(names)}"
            )
        batch, *image = have[names[0]] if self.manifest.kind == "denoiser" else have["noise"][1:]
        if image != list(spec.image):
            raise ArtifactError(f"{path}: the graph's images are {image}, its manifest says {list(spec.image)}")
        return batch if isinstance(batch, int) else None


def _import(device: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingDependency("running a .onnx file", "onnxruntime", "gpu" if device == "cuda" else "cpu") from None
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that pip installed
    return onnxruntime
