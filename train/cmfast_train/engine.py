# SPDX-License-Identifier: MIT
"""PyTorch as an engine of the runtime: what exported files are compared with, by the exporter and by cmfast-bench.

The runtime finds it through the entry point group "cmfast.engines", by suffix: .pt, .pth, .safetensors, .pkl, a folder.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

import cmfast
from cmfast.artifact import Manifest
from cmfast.engines import Inputs
from cmfast.errors import EngineError
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import load_model

if TYPE_CHECKING:
    from cmfast_train.diffusers_engine import DiffusersEngine


class TorchEngine:
    """A model of any format that is known, run by PyTorch: eager, with the memory format channels_last, or compiled.

    The contract is `cmfast.engines.Engine`; variant is one of `cmfast.engines.VARIANTS`.
    """

    batch: int | None = None

    def __init__(
        self,
        model: Checkpoint | os.PathLike[str] | str,
        device: str = "cpu",
        threads: int | None = None,
        variant: str = "",
        precision: str = "",
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
            raise EngineError(
                f"device cuda was asked for, but PyTorch {torch.__version__} {why}; "
                "use --device cpu, or install a CUDA build of torch (pytorch.org says how)"
            )
        if variant == "diffusers":
            raise EngineError(f"{model}: diffusers runs folders that it wrote, not this file")
        torch.backends.cudnn.allow_tf32 = False  # a float32 model is run in float32, as by the other engines
        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = model if isinstance(model, Checkpoint) else load_model(model)
        self.manifest = checkpoint_manifest(checkpoint)
        self.name = f"PyTorch {device}" + (f" {variant}" if variant else "")
        self._device = torch.device(device)
        self.denoiser = checkpoint.denoiser().to(self._device)
        self._compiled = variant == "compiled"
        if variant == "channels_last":
            self.denoiser.to(memory_format=torch.channels_last)
        # dynamic=False: one program for each batch size, which is torch.compile at its fastest.
        self._call = torch.compile(self.denoiser, dynamic=False) if self._compiled else self.denoiser

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return f(x, sigma, label), float32 [B, C, H, W]."""
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(self._device) for name, value in inputs.items()
        }
        try:
            with torch.inference_mode():
                return self._call(**tensors).cpu().numpy()  # type: ignore[no-any-return]
        except RuntimeError as err:
            if not self._compiled:
                raise
            reason = (str(err).strip().splitlines() or ["?"])[0][:300]  # commonly: there is no C++ compiler
            raise EngineError(f"torch.compile could not compile or run the model: {reason}") from None


def open_folder(
    folder: Path, device: str, threads: int | None, variant: str, precision: str
) -> TorchEngine | DiffusersEngine:
    """Open a diffusers folder: our U-Net with its weights, or as the variant says diffusers' own pipeline."""
    if variant != "diffusers":
        return TorchEngine(folder, device, threads, variant, precision)
    from cmfast_train.diffusers_engine import DiffusersEngine  # diffusers takes seconds to import

    return DiffusersEngine(folder, device, threads)


def checkpoint_manifest(checkpoint: Checkpoint) -> Manifest:
    """Return the manifest of a checkpoint: what an export of it says, without the parity."""
    return Manifest(
        kind="denoiser",
        spec=checkpoint.spec,
        source={**checkpoint.source, "sha256": checkpoint.sha256()},
        made_by={"cmfast": cmfast.__version__, "torch": version("torch")},
    )
