# SPDX-License-Identifier: MIT
"""Images in one array: NAME.npy, mapped from disk, or NAME.npz, in memory. Nothing is unpickled.

    uint8 [N, H, W, C] or [N, H, W]; C is 1 (grey), 3 (RGB) or 4 (RGBA, composited as files are)

An .npz has images and, where it has labels, whole numbers [N] or [N, 1], under the names of one line of NAMES.
Sizes are compared with the file's before memory is taken.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import available_memory
from cmfast.errors import ArtifactError
from cmfast.formats.manifest import check_file
from cmfast_train.border import naming, reading
from cmfast_train.data.image_folders import check_labels

NAMES = (  # of the images, of the labels
    ("arr_0", "arr_1"),  # cmfast-sample, OpenAI's evaluator
    ("images", "labels"),
    ("x_train", "y_train"),  # Keras
    ("train_images", "train_labels"),  # MedMNIST
)
HEADER = 10_000  # bytes of the description of an array, at most
MEMORY = 16 << 30  # bytes, where the system does not tell how much it has

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int  # bytes before the numbers

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_arrays(path: Path, *, labelled: bool = True) -> tuple[Array, list[int] | None, int]:
    """Return images, uint8 [N, H, W, C], labels or None, and the number of classes, of a .npy or .npz file.

    Args:
        labelled: whether labels are read
    """
    if path.suffix.lower() == ".npy":
        images, labels = map_npy(path), None
    else:
        with _opened(path) as (archive, names):
            pairs = [pair for pair in NAMES if pair[0] in names]
            if len(pairs) != 1:
                known = ", or ".join(f"{one} and {other}" for one, other in NAMES)
                raise ArtifactError(
                    f"{path}: it has {', '.join(map(repr, names[:8])) or 'nothing'}; images and labels are read from "
                    f"{known}"
                )
            image_name, label_name = pairs[0]
            images = _member(path, archive, image_name)
            labels = _member(path, archive, label_name) if labelled and label_name in names else None
    images = _images(path, images)
    if labels is None:
        return images, None, 0
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.dtype.kind not in "iu" or flat.shape != (len(images),):
        raise ArtifactError(
            f"{path}: its labels are {labels.dtype} {list(labels.shape)}, needed are whole numbers [{len(images)}]"
        )
    numbers = [int(label) for label in flat]
    return images, numbers, check_labels(numbers, path)


def read_npz_array(path: Path, name: str, otherwise: str) -> Array:
    """Return one array of an .npz, or ArtifactError with `otherwise` where there is none of that name."""
    with _opened(path) as (archive, names):
        if name not in names:
            raise ArtifactError(f"{path}: {otherwise}")
        return _member(path, archive, name)


def read_npz(path: Path, check: Callable[[list[str]], object]) -> dict[str, Array]:
    """Return all arrays of an .npz by name. check: is called with the names before anything is read."""
    with _opened(path) as (archive, names):
        check(names)
        return {name: _member(path, archive, name) for name in names}


def map_npy(path: Path) -> Array:
    """Return the array in a .npy file, read from disk where it is looked at."""
    file = check_file(path)
    with naming(file):
        with file.open("rb") as opened, reading(file, "not a whole .npy file"):
            head = _header(opened)
        size = file.stat().st_size
        if size != head.offset + head.nbytes:
            raise ArtifactError(
                f"{file}: not a whole .npy file: {list(head.shape)} of {head.dtype} are {head.nbytes:,} bytes, it has "
                f"{size - head.offset:,}"
            )
        if not head.nbytes:
            return np.empty(head.shape, head.dtype)
        order: Any = "F" if head.fortran else "C"
        with reading(file, "not a whole .npy file"):  # numpy has more rules for dtypes than their headers
            return np.memmap(file, head.dtype, "r", head.offset, head.shape, order)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, list[str]]]:
    """Open an .npz for the block: the archive and the names of its arrays."""
    file = check_file(path)
    with naming(file):
        with reading(file, "not a whole .npz file"):
            archive = zipfile.ZipFile(file)
        with archive:
            yield archive, [name.removesuffix(".npy") for name in archive.namelist()]


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    names = archive.namelist()
    entry = archive.getinfo(f"{name}.npy" if f"{name}.npy" in names else name)
    if entry.flag_bits & 1:
        raise ArtifactError(f"{path}: {name} in it is encrypted; save it without a password")
    with reading(path, "not a whole .npz file"), archive.open(entry) as opened:
        head = _header(opened)
        if entry.file_size != head.offset + head.nbytes:
            raise ArtifactError(
                f"{path}: not a whole .npz file: {name} is {list(head.shape)} of {head.dtype}, {head.nbytes:,} bytes, "
                f"and has {entry.file_size - head.offset:,}"
            )
        if head.nbytes > (available := available_memory() or MEMORY):
            raise ArtifactError(
                f"{path}: {name} would take {head.nbytes:,} bytes of memory, and {available:,} are available; use "
                "fewer images, or as --data of a run save them as .npy, which is read from disk"
            )
        values = np.empty(head.nbytes, np.uint8)
        view, done = memoryview(values.data), 0
        while done < len(values):
            count = opened.readinto(view[done : done + (1 << 20)])  # type: ignore[attr-defined]  # a ZipExtFile
            if not count:
                raise ArtifactError(f"{path}: not a whole .npz file: {name} ends early")
            done += count
        opened.read(1)  # the end, where the check sum is compared
        shaped: Array = values.view(head.dtype).reshape(head.shape, order="F" if head.fortran else "C")
    return shaped


def _header(opened: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(opened)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"the format of its array is version {version[0]}.{version[1]}; 1.0 and 2.0 are read")
    shape, fortran, dtype = readers[version](opened, max_header_size=HEADER)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not unpickled")
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise ValueError(f"the shape {shape}")
    return _Header(shape, fortran, dtype, opened.tell())


def _images(path: Path, images: Array) -> Array:
    """Return images [N, H, W, C] where the array is one of images."""
    if images.dtype != np.uint8:
        how = {
            "b": "x.astype(numpy.uint8) * 255",
            "f": "(255 * x).round().clip(0, 255).astype(numpy.uint8), for values in 0 .. 1",
        }.get(images.dtype.kind, "x.astype(numpy.uint8) once the values are in 0 .. 255")
        raise ArtifactError(f"{path}: its images are {images.dtype}, whose range is not stated; save uint8: {how}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4) or not all(images.shape):
        first = images.ndim == 4 and images.shape[1] in (1, 3, 4)
        raise ArtifactError(
            f"{path}: its images are {list(images.shape)}, needed are [N, H, W] or [N, H, W, 1, 3 or 4]"
            + ("; save x.transpose(0, 2, 3, 1)" if first else "")
        )
    return images
