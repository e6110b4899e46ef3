# SPDX-License-Identifier: MIT
"""A file just written, run and compared with PyTorch: `pipeline` gives it its name only then."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cmfast.backends import Backend, open_backend
from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.errors import CheckFailed
from cmfast.formats.manifest import INT8, read_onnx
from cmfast_export.graphs.emulate import emulate_file
from cmfast_export.graphs.sampler import Guidance
from cmfast_export.targets.ort_cuda_stand_in import stand_in_file
from cmfast_export.verify import Given, Parity, rounded, verify


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a file just written is compared with PyTorch."""

    references: Sequence[Backend]  # PyTorch in float32, then in the file's precision where that is a half
    device: str
    tolerance: float
    least_db: float = 0.0  # PSNR that is needed
    flavour: str = ""
    guidance: Guidance | None = None
    more: tuple[int, ...] = ()  # sizes of batches beside the usual ones
    given: Given | None = None  # values of the conditions; None: random ones

    def __call__(self, file: Path, what: str) -> Agreement:
        """Return how far the file is from PyTorch; beyond the tolerance raise CheckFailed."""
        manifest = read_onnx(file)[0]
        dtype = manifest.dtype
        # Of this file: the manifest of one that emulates it says float32.
        compare = partial(
            verify, guidance=self.guidance, given=self.given, rounds=rounded(manifest), drawn=INT8 in manifest.made_by
        )
        with tempfile.TemporaryDirectory() as folder:
            backend = self._open(file, Path(folder))
            parity, *same = compare(backend, self.references, more=self.more)
            del backend
            as_is = None
            # ONNX Runtime has no bfloat16 convolution on a CPU, and no GroupNorm.
            if self.emulates(dtype) and dtype != "bfloat16" and not self.flavour:
                (as_is,) = compare(OnnxRuntimeBackend(file), self.references[:1])
        for each in (parity, *same, *([as_is] if as_is else [])):
            if failure := each.failure(self.tolerance, least_db=self.least_db):
                raise CheckFailed(f"{what} {failure}; no file was written")
        return Agreement(parity=parity, same=same[0] if same else None, as_is=as_is)

    def _open(self, file: Path, folder: Path) -> Backend:
        """Open what stands for the file: itself, or the same graph in what a CPU has, written to `folder`."""
        emulates = self.emulates(read_onnx(file)[0].dtype)
        if self.flavour and self.device == "cuda":
            return open_backend(file, "cuda", variant="nhwc")
        if self.flavour:
            file = stand_in_file(file, folder / "stand_in.onnx")
        if emulates:
            return OnnxRuntimeBackend(emulate_file(file, folder / "emulated.onnx"))
        return open_backend(file, self.device)

    def emulates(self, dtype: str) -> bool:
        return self.device == "cpu" and dtype != "float32"

    def how(self, dtype: str) -> str:
        how = f"onnxruntime {self.device}" + (f", {dtype} emulated" if self.emulates(dtype) else "")
        if not self.flavour:
            return how
        return f"{how}, nhwc" if self.device == "cuda" else f"{how}, GroupNorm written out: no CUDA kernel run"


def summary(agreement: Agreement) -> dict[str, float]:
    """Return what the manifest records."""
    values = agreement.parity.to_dict()
    if agreement.same:
        values["same_precision"] = agreement.same.to_dict()["max_abs"]
    return values


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a graph is from PyTorch."""

    parity: Parity  # from PyTorch in float32
    same: Parity | None  # from PyTorch in the same half precision; None where that is made on the graph
    as_is: Parity | None  # where `parity` is of emulated arithmetic: of the file itself, as this machine runs it
