# SPDX-License-Identifier: MIT
"""The options of an int8 export, `--calibration NAME=VALUE` and `--tolerance-db`, and the file of calibration data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cmfast.checks import whole_number
from cmfast.errors import CmfastError
from cmfast_export import INT8
from cmfast_export._options import check_range
from cmfast_train.border import reading

if TYPE_CHECKING:  # numpy is imported where a file is read
    import numpy.typing as npt

TOLERANCE_DB = 40.0  # least PSNR of an int8 file, dB: 2.6 grey levels in images, whatever the scaling multiplies
MOST_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What an int8 export draws to see the ranges of its tensors.

    Attributes:
        samples: Samples that are drawn for each schedule of noise levels.
        seed: Of their noise, and of conditions that are not given.
        data: A .npz file with conditions by their names, one for each sample; "": labels are drawn, and tensors are
            unit Gaussian, with a warning.
    """

    samples: int = 32
    seed: int = 0
    data: str = ""

    def __post_init__(self) -> None:
        whole_number("number of calibration samples", self.samples)
        whole_number("calibration seed", self.seed)
        check_range("the number of calibration samples", self.samples, 1, MOST_SAMPLES)
        check_range("the calibration seed", self.seed, 0, 2**63 - 1)


def read_data(file: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a .npz file by their names.

    Raises:
        CmfastError: the file is something else, or damaged.
    """
    import numpy as np

    # numpy leaves a broken archive open that it opened itself
    with reading(file, "not a .npz file that can be read"), open(file, "rb") as stream:
        opened = np.load(stream, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise CmfastError(
                f"{file}: a .npy file, and calibration data are a .npz file with an array for each condition: "
                "numpy.savez(FILE, NAME=values)"
            )
        with opened:
            return {name: opened[name] for name in opened.files}


def check_int8(
    *,
    precision: str,
    tolerance: float | None,
    tolerance_db: float | None,
    calibration: Calibration | None,
    weights: str,
    device: str,
    flavour: str,
    encoders: bool,
) -> None:
    """Raise CmfastError where a request has options that do not go with int8, or only with it: see `GraphRequest`."""
    number = isinstance(tolerance_db, (int, float)) and not isinstance(tolerance_db, bool)
    if tolerance_db is not None and not (number and 0 < tolerance_db < math.inf):  # which no NaN is
        raise CmfastError(f"the tolerance must be a finite number of decibels greater than 0, got {tolerance_db}")
    if precision != INT8:
        if tolerance_db is not None or calibration is not None:
            raise CmfastError("calibration and a tolerance in dB are for precision int8; pass it, or leave them out")
        return
    for wrong, why in (
        (tolerance is not None, "int8 has a tolerance in decibels: pass --tolerance-db instead of --tolerance"),
        (weights, "int8 weights take a byte each already; leave fp16 weights out"),
        (device != "cpu", "int8 is for CPUs and verified there; leave the device out"),
        (flavour, f"int8 is for CPUs, and the flavour {flavour} is not; export without it"),
        (encoders, "int8 with an encoder in a file of its own is not supported; export one graph"),
    ):
        if wrong:
            raise CmfastError(why)
