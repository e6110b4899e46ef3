# SPDX-License-Identifier: MIT
"""TensorRT and TensorRT-RTX: engine files, on an NVIDIA GPU. (Under construction.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cmfast.engines import Inputs
from cmfast.plan import read_plan


class TensorRtEngine:
    """A plan run by the library that built it. The contract is `cmfast.engines.Engine`."""

    def __init__(self, path: Path, device: str = "cuda", threads: int | None = None, variant: str = "") -> None:
        self.manifest = read_plan(path)
        self.name = "TensorRT cuda"
        self.batch: int | None = None

    def run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Return the graph's output, float32 [B, C, H, W]."""
        raise NotImplementedError
