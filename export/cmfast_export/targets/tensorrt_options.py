# SPDX-License-Identifier: MIT
"""How an engine of TensorRT or TensorRT-RTX is built: the options, their checks, and which library they need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.tensorrt_library import LIBRARIES
from cmfast.checks import MAX_BATCH
from cmfast.errors import CmfastError
from cmfast_export._options import check_range, shorten

MAX_WORKSPACE_MIB = 2**20  # 1 TiB, more than any card has
HARDWARE = {"": "NONE", "ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built; `cmfast-export --build NAME=VALUE` sets a field."""

    library: str = ""  # tensorrt or tensorrt_rtx; empty: tensorrt where it and a card for it are, else tensorrt_rtx
    batch: tuple[int, ...] = ()  # smallest, most frequent and largest batch; one number: only that; empty: 1,8,64
    sizes: tuple[int, ...] = ()  # smallest, most frequent and largest dynamic size of conditions; empty: 1,64,512
    workspace_mib: int = 0  # scratch memory that kernels may use at most, MiB; 0: the library's default
    level: int = -1  # 0 to 5, how long the builder tries; -1: the library's default
    timing_cache: str = ""  # file with measurements of kernels, read and written; TensorRT only
    version_compatible: bool = False  # also for later versions of TensorRT
    hardware_compatible: str = ""  # also for other cards: "ampere+" or "same" (compute capability); TensorRT only
    target: tuple[str, ...] = ()  # compute capabilities such as 8.9; TensorRT-RTX only; empty: all from 8.0 on

    def __post_init__(self) -> None:
        if self.library not in ("", *LIBRARIES):
            raise CmfastError(f"library must be one of {', '.join(LIBRARIES)}, got {self.library!r}")
        if self.batch and (
            len(self.batch) not in (1, 3) or list(self.batch) != sorted(self.batch) or self.batch[0] < 1
        ):
            raise CmfastError(
                f"batch must be the smallest, the most frequent and the largest number of images, or one number, got "
                f"{','.join(map(str, self.batch))}; for example batch=1,8,64"
            )
        if self.sizes and (len(self.sizes) != 3 or list(self.sizes) != sorted(self.sizes) or self.sizes[0] < 1):
            raise CmfastError(
                f"sizes must be the smallest, the most frequent and the largest dynamic size of conditions, got "
                f"{','.join(map(str, self.sizes))}; for example sizes=1,64,512"
            )
        if self.batch:
            check_range("the largest batch", self.batch[-1], 1, MAX_BATCH, "images")
        if self.level not in range(-1, 6):
            raise CmfastError(f"level must be from 0 to 5, got {self.level}")
        check_range("workspace_mib", self.workspace_mib, 0, MAX_WORKSPACE_MIB, "MiB (0: the library's default)")
        if self.hardware_compatible not in HARDWARE:
            raise CmfastError(f"hardware_compatible must be ampere+ or same, got {self.hardware_compatible!r}")
        different = len(set(self.target)) == len(self.target)
        if not different or not all(re.fullmatch(r"[1-9][0-9]*\.[0-9]", each) for each in self.target):
            said = shorten(",".join(self.target))
            raise CmfastError(f"target takes different compute capabilities such as 8.9,12.0, got {said}")

    @property
    def free(self) -> tuple[int, int, int]:
        """Smallest, most frequent and largest size of the conditions' dynamic axes."""
        least, often, most = self.sizes or (1, 64, 512)
        return least, often, most

    @property
    def profile(self) -> tuple[int, int, int]:
        """Smallest, most frequent and largest batch."""
        batch = self.batch or (1, 8, 64)
        return (batch[0], batch[len(batch) // 2], batch[-1])


def library_of(options: BuildOptions) -> str:
    """Return the library of the options, or the one that can build here.

    TensorRT needs a card, TensorRT-RTX does not, and only it has targets.
    """
    if options.library:
        return options.library
    there = [name for name in LIBRARIES if find_spec(name)] or ["tensorrt"]
    if options.target or "tensorrt" not in there:
        return "tensorrt_rtx"
    if len(there) == 1:
        return "tensorrt"
    try:
        cuda.open_gpu()
    except CmfastError:
        return "tensorrt_rtx"
    return "tensorrt"


def check_options(options: BuildOptions, library: str) -> None:
    """Refuse what the library has no use for, instead of ignoring it."""
    rtx = library == "tensorrt_rtx"
    names = ("timing_cache", "hardware_compatible", "version_compatible") if rtx else ("target",)
    for name in names:
        if getattr(options, name):
            raise CmfastError(f"{LIBRARIES[library]} has no {name}; leave it out, or set library")
