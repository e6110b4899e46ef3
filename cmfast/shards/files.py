# SPDX-License-Identifier: MIT
"""One shard: its name, what is in it, whether it is whole. Neighbour: `drawing`, which decides what is missing."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast.checks import need_memory, shown
from cmfast.errors import ArtifactError, CmfastError, one_line
from cmfast.files import atomic_file, check_target, check_target_folder
from cmfast.images import OTHER_FILES

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
Settings = Mapping[str, Any]  # what samples depend on, as JSON has it

FORMAT = "cmfast-shard/1"
SAMPLES, LABELS, SETTINGS = "arr_0", "arr_1", "settings"
_NAME = re.compile(r"samples_([0-9]{8,20})_([0-9]{8,20})\.npz")


def shard_path(folder: Path, samples: range) -> Path:
    """Return the file of a range of samples: samples_FROM_TO.npz, the last one not included."""
    return folder / f"samples_{samples.start:08d}_{samples.stop:08d}.npz"


def shards_in(folder: Path) -> list[tuple[range, Path]]:
    """Return the shards of a folder by their names, in order; none where there is no folder."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(name), folder / name) for name in os.listdir(folder))
    found = [(range(int(name[1]), int(name[2])), path) for name, path in named if name and int(name[1]) < int(name[2])]
    return sorted(found, key=lambda each: (each[0].start, each[0].stop))


def check_shard_folder(path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()) -> Path:
    """Return `path` if shards can be written there, a folder that may have some already, or raise CmfastError.

    Args:
        inputs: what the same command reads; none of it is replaced
    """
    target = Path(path)
    if (suffix := target.suffix.lower()) in OTHER_FILES or suffix in (".png", ".npz"):
        raise CmfastError(f"{target}: shards are written to a folder; got {suffix}")
    if not target.exists():
        return check_target_folder(target, inputs)
    if not target.is_dir():
        raise CmfastError(f"{target} is a file, and shards are written to a folder; name another")
    check_target(shard_path(target, range(1)), inputs=inputs)
    return target


def write_shard(folder: Path, samples: range, drawn: Array, labels: Labels | None, settings: Settings) -> None:
    """Write the shard of a range of samples; it has its name only when it is whole. A missing folder is made.

    Args:
        folder: Where to.
        samples: Their indices.
        drawn: uint8 [n, H, W, C] or float32 [n, *shape].
        labels: int64 [n], or None.
        settings: What they were drawn with.
    """
    arrays: dict[str, Any] = {SAMPLES: drawn} if labels is None else {SAMPLES: drawn, LABELS: labels}
    arrays[SETTINGS] = np.array(json.dumps({"format": FORMAT, **settings}))
    folder.mkdir(exist_ok=True)
    with atomic_file(shard_path(folder, samples)) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_settings(path: Path) -> dict[str, Any]:
    """Return what the samples of a shard were drawn with, or raise ArtifactError where the file is none."""
    with _opened(path) as archive:
        return _settings(path, archive)


def check_shard(path: Path, samples: range, shape: Sequence[int], dtype: npt.DTypeLike, settings: Settings) -> None:
    """Raise CmfastError unless a shard is whole and was drawn with these settings; its samples are not read.

    Args:
        path: The file.
        samples: The indices in its name.
        shape: Of one sample in it.
        dtype: Of its numbers.
        settings: What it must have been drawn with.
    """
    with _opened(path) as archive:
        found = _settings(path, archive)
        for key, want in settings.items():
            if (have := found.get(key)) != want:
                raise CmfastError(
                    f"{path} was drawn with {_in_words(key, have)}, and this command draws with "
                    f"{_in_words(key, want)}; name another folder"
                )
        have_shape, have_dtype = _header(path, archive, SAMPLES)
        if (have_shape, have_dtype) != ((len(samples), *shape), np.dtype(dtype)):
            raise ArtifactError(
                f"{path}: it has {have_dtype} {list(have_shape)}, expected are {np.dtype(dtype)} "
                f"{[len(samples), *shape]}; remove it, and the same command draws it again"
            )


def read_shards(folder: Path, n: int | None = None) -> tuple[Array, Labels | None]:
    """Return the samples of a folder of shards and their labels, in order, as if they had been drawn at once.

    Args:
        folder: Where the shards are.
        n: How many; None: all.

    Returns:
        Images uint8 [n, H, W, C] or samples float32 [n, *shape], and labels int64 [n] or None.

    Raises:
        ArtifactError: there are no shards, one is missing or damaged, or they do not belong together.
        CmfastError: there are fewer than n samples.
    """
    shards = shards_in(folder)
    if not shards:
        raise ArtifactError(f"{folder}: no shards in it; cmfast-sample --shard N -o DIR writes some")
    for (one, path), (other, after) in pairwise(shards):
        if other.start != one.stop:
            wrong = "overlap" if other.start < one.stop else f"are not neighbours: {other.start - one.stop:,} missing"
            raise ArtifactError(f"{folder}: {path.name} and {after.name} {wrong}; draw what is missing first")
    have = shards[-1][0].stop - shards[0][0].start
    if n is not None and have < n:
        raise CmfastError(f"{folder}: {n:,} samples were requested, it has {have:,}")
    wanted = have if n is None else n
    start, path = shards[0][0].start, shards[0][1]
    most = max(len(samples) for samples, _ in shards if samples.start - start < max(wanted, 1))
    with _opened(path) as archive:
        first = _common(_settings(path, archive))
        shape, dtype = _header(path, archive, SAMPLES)
        size = (wanted + most) * math.prod(shape[1:]) * dtype.itemsize  # one shard is read at a time
        need_memory(size, f"the samples of {folder}", "read fewer: -n")
        of_class = f"{LABELS}.npy" in archive.namelist()
    together: Array = np.empty((wanted, *shape[1:]), dtype)
    classes = np.empty(wanted, np.int64) if of_class else None
    for samples, path in shards:
        at = samples.start - start
        if at >= wanted:
            break
        with _opened(path) as archive:
            if _common(_settings(path, archive)) != first:
                raise ArtifactError(f"{path} was drawn with other settings than {shards[0][1].name}")
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            drawn = _array(path, archive, SAMPLES)
            labels = _array(path, archive, LABELS) if LABELS in names else None
        if len(drawn) != len(samples) or (labels is not None and labels.shape != (len(samples),)):
            raise ArtifactError(f"{path}: it has {len(drawn)} samples, by its name {len(samples)}; draw it again")
        if (drawn.shape[1:], drawn.dtype, labels is not None) != (shape[1:], dtype, of_class):
            raise ArtifactError(f"{path} has other samples than {shards[0][1].name}")
        together[at : at + len(samples)] = drawn[: wanted - at]
        if classes is not None and labels is not None:
            classes[at : at + len(samples)] = labels[: wanted - at]
        del drawn, labels  # before the next ones are read
    return together, classes


def _common(settings: Settings) -> dict[str, Any]:
    """Return the settings that all shards of a folder share: the conditions differ from range to range."""
    return {key: value for key, value in settings.items() if key != "conditions"}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a shard; whatever is wrong with the file is one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except CmfastError:
        raise
    except OSError as err:
        raise ArtifactError(f"{path}: cannot be read: {err.strerror or one_line(err)}") from None
    except Exception as err:  # what damaged files make zipfile and numpy raise is not one kind
        raise ArtifactError(
            f"{path}: not a whole shard: {one_line(err) or type(err).__name__}; remove it, and the same command draws "
            "it again"
        ) from None


def _settings(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        found = json.loads(str(_array(path, archive, SETTINGS)))
    except (KeyError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a shard of cmfast-sample; name another folder, or remove it")
    return found


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array; its bytes are counted, not read."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        size = member.tell() + math.prod(shape) * dtype.itemsize
    if (have := archive.getinfo(f"{name}.npy").file_size) != size:
        raise ArtifactError(f"{path}: {name} has {have:,} bytes instead of {size:,}; remove it")
    return shape, dtype


def _in_words(key: str, value: Any) -> str:
    if key in ("conditions", "model_sha256"):
        what = "conditions or labels" if key == "conditions" else "model"
        return f"{what} {str(value)[:12]}"
    return f"{key} {shown(value)}"
