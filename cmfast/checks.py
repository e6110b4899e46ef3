# SPDX-License-Identifier: MIT
"""Checks of what callers pass and backends return, made once where it enters: numbers, arrays, labels, memory.

And how far arrays are apart, dB.

All raise CmfastError. `cmfast.model` calls them before and after the work; noise levels are checked in
`cmfast.schedule`, files in `cmfast.files`.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmfast.errors import BackendError, CheckFailed, CmfastError, printable

if TYPE_CHECKING:  # numpy is imported where arrays are: a manifest is read without it
    import numpy.typing as npt

MAX_THREADS = 1024  # more than any processor that this was tried on; a system that cannot start them ends the process
MAX_BATCH = 65_536  # images that one call of a graph or a backend computes
EQUAL_DB = 200.0  # PSNR of what is equal to the bit
SMALL = 2**28  # bytes; less is not compared with the memory that is available
_SHOWN = 80  # characters of a value in an error


class NotFinite(CheckFailed):
    """A model returned NaN or infinity."""


def whole_number(name: str, value: object, least: int = 0, most: int | None = None) -> int:
    """Return a whole number of any integer type as an int; a bool, a text and 3.0 are none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor that holds no value
        number = None
    if number is None or number < least:
        raise CmfastError(f"the {name} must be a whole number, at least {least}, got {shown(value)}")
    if most is not None and number > most:
        raise CmfastError(f"the {name} must be a whole number from {least} to {_limit(most)}, got {shown(value)}")
    return number


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether a value is an int from `least` to `most`, as JSON has them; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def real_number(name: str, value: Any) -> float:
    """Return a finite real number as a float; a bool and a text are none."""
    try:
        if not isinstance(value, (str, bytes, bytearray, bool)) and getattr(value, "shape", ()) == ():
            dtype = getattr(value, "dtype", None)
            number = float(value)
            if math.isfinite(number) and getattr(dtype, "kind", "f") in "iuf":
                return number
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise CmfastError(f"the {name} must be a finite number, got {shown(value)}")


def array_of_numbers(name: str, value: Any) -> npt.NDArray[Any]:
    """Return whole or floating-point numbers as an array, which shares their memory where it can."""
    import numpy as np

    try:
        array = np.asarray(value)
    except Exception as err:  # ragged lists, tensors on a GPU: their libraries have exceptions of their own
        raise CmfastError(f"{name} must be an array of numbers, got {shown(value)}: {shown(str(err))}") from None
    if array.dtype.kind not in "iuf":
        raise CmfastError(f"{name} must be an array of numbers, got {shown(value)}")
    return array


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: object) -> int | None:
    """Return the number of CPU threads; None: the backend's choice."""
    if threads is None:
        return None
    try:
        number = whole_number("number of threads", threads, -(2**64))
    except CmfastError:
        raise CmfastError(f"threads must be a whole number, got {shown(threads)}") from None
    if number < 1:
        raise CmfastError(f"threads must be at least 1, got {shown(number)}")
    if number > MAX_THREADS:
        raise CmfastError(
            f"threads must be at most {MAX_THREADS}, got {shown(number)}; this machine has {os.cpu_count()} processors"
        )
    return number


def check_range(first: object, n: int) -> int:
    """Return the index of the first of n images; all indices are below 2**64."""
    start = whole_number("first image (first)", first, 0, 2**64 - 1)
    if start + n > 2**64:
        raise CmfastError(f"the images from {start} on are too many: first + n must be at most 2**64, n is {n}")
    return start


def need_memory(size: int, what: str, fix: str) -> None:
    """Raise unless so many bytes are available; where the system does not tell, the limit is 2**40 bytes."""
    if size < SMALL:
        return
    found = available_memory()
    limit = 2**40 if found is None else found
    if size > limit:
        raise CmfastError(f"{what} need {_bytes(size)} of memory, and {_bytes(limit)} are available; {fix}")


def available_memory() -> int | None:
    """Return the bytes that this process can still take, by the system and by its control group; None: unknown."""
    found = []
    if system := re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE):
        found.append(1024 * int(system[1]))
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isascii() and limit.isdecimal() and used.isdecimal():  # without a limit: "max"
        stat = _read("/sys/fs/cgroup/memory.stat")
        kept = re.findall(r"^(?:inactive_file|active_file|slab_reclaimable) (\d+)$", stat, re.MULTILINE)
        found.append(max(0, int(limit) - int(used) + sum(map(int, kept))))  # what files keep is given back
    return min(found, default=None)


def psnr_db(got: Sequence[npt.NDArray[Any]], want: Sequence[npt.NDArray[Any]], *, image: bool) -> float:
    """Return the lowest peak signal-to-noise ratio of pairs of arrays, dB, as `decibels` does.

    Args:
        got: What is judged.
        want: What it is compared with, of the same shapes.
        image: Whether they are images, see `peak_of`.
    """
    import numpy as np

    peak = peak_of(want, image=image)
    errors = [float(np.square(a.astype(np.float64) - b).mean()) for a, b in zip(got, want, strict=True)]
    return min((decibels(error, peak) for error in errors), default=EQUAL_DB)


def peak_of(want: Sequence[npt.NDArray[Any]], *, image: bool) -> float:
    """Return the peak of a PSNR: 2 of images, which are in [-1, 1]; of other data the range of all of `want`."""
    if image or not want:
        return 2.0
    return max(float(max(each.max() for each in want)) - float(min(each.min() for each in want)), 1e-30)


def decibels(mse: float, peak: float) -> float:
    """Return the PSNR of a mean square error, dB: at most EQUAL_DB, minus infinity where the error is not finite."""
    if not math.isfinite(mse):
        return -math.inf
    return EQUAL_DB if mse == 0 else min(EQUAL_DB, 20 * math.log10(peak) - 10 * math.log10(mse))


def returned_array(backend: str, images: object, shape: tuple[int, ...], dtype: type) -> npt.NDArray[Any]:
    """Return what a backend of this name returned, if it is an array of this shape and type."""
    import numpy as np

    if not isinstance(images, np.ndarray) or images.shape != tuple(shape) or images.dtype != dtype:
        raise BackendError(
            f"{backend} returned {shown(images)}, and its manifest promises {dtype.__name__} {list(shape)}; "
            "export the model again with cmfast-export"
        )
    return images


def not_finite(backend: str, sigmas: Sequence[float]) -> NotFinite:
    """Return the error for a backend of this name that returned NaN or infinity at these noise levels."""
    some = ", ".join(f"{sigma:g}" for sigma in sigmas[:8]) + (", .." if len(sigmas) > 8 else "")
    return NotFinite(
        f"{backend} returned values that are not finite (NaN or infinity) at noise level {some}; "
        "the weights are damaged, or the precision is too low: try it in fp32"
    )


def shown(value: object) -> str:
    """Return a value as it appears in an error: one line, not long, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print very long ones
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    shape = getattr(value, "shape", None)
    if isinstance(value, str):
        text = repr(value[: 2 * _SHOWN])
    elif isinstance(shape, tuple) and shape:
        return f"{type(value).__name__} of {getattr(value, 'dtype', '?')} {list(shape)}"
    elif isinstance(value, (list, tuple)) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value)} values"
    else:
        try:
            text = repr(value)
        except Exception:  # of a foreign type, or a list of long numbers
            text = type(value).__name__
    text = printable(" ".join(text.split()))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}.."


def _limit(most: int) -> str:
    return "2**64 - 1" if most == 2**64 - 1 else "2**32 - 1" if most == 2**32 - 1 else f"{most}"


def _bytes(size: int) -> str:
    for unit, one in (("EiB", 2**60), ("TiB", 2**40), ("GiB", 2**30)):
        if size >= one:
            return f"{min(size // one, 10**9)} {unit}" if size >= 100 * one else f"{size / one:.1f} {unit}"
    return f"{size / 2**20:.0f} MiB"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError):
        return ""
