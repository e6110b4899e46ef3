# SPDX-License-Identifier: MIT
"""Samples batch by batch: the noise of one is made while the backend has the one before.

What a `Drawing` does to a batch, `cmfast.model` says; a backend that draws few-step samples itself (`DrawBackend`) is
given the indices of the samples instead of their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast import sampling
from cmfast.backends import Backend, DrawBackend
from cmfast.checks import check_range, need_memory, not_finite, returned_array, shown, whole_number
from cmfast.conditions import class_numbers, no_label
from cmfast.progress import progress_bar
from cmfast.spec import ModelSpec

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]  # conditions by name: int64 [B] or float32 [B, *shape]
Batch = tuple[range, Arrays]  # indices of its samples, their conditions


@dataclass(frozen=True)
class Drawing:
    """A way to draw a batch: slices of unit noise [slices, b, *shape] and conditions in, x0 [b, *shape] out."""

    slices: int
    draw: Callable[[Floats, Arrays], Floats]
    sigmas: tuple[float, ...] = ()  # of the few-step loop, which some backends have; () for another algorithm


def check_number(n: int, spec: ModelSpec, noun: str, *, pixels: bool) -> int:
    """Return n, if that many samples fit into memory, uint8 when `pixels`, else float32; `noun` is for the error."""
    n = whole_number(f"number of {noun}", n, 1)
    need = n * ((1 if pixels else 4) * math.prod(spec.shape) + 8)  # and a label
    shape = ", ".join(map(str, spec.shape))
    need_memory(need, f"{shown(n)} {noun} [{shape}]", "draw fewer at a time: the next ones with `first`")
    return n


def check_noise(backend: Backend, drawing: Drawing, batch: int) -> None:
    """Raise CmfastError unless the noise of `draw_batches` fits into memory, for batches of so many samples."""
    if _drawn_by_backend(backend, drawing):
        return
    # Two batches of noise at a time, one of them also in parts, and what it takes to draw one slice.
    numbers = batch * math.prod(backend.manifest.spec.shape)
    need_memory(
        (3 * drawing.slices * 4 + portable.PEAK) * numbers,
        f"{drawing.slices} slice(s) of noise for a batch of {batch}",
        "use a smaller batch",
    )


def draw_batches(
    backend: Backend, drawing: Drawing, batches: Sequence[Batch], seed: int, *, pixels: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the samples of each batch: uint8 [b, H, W, C] when `pixels`, else float32 [b, *shape].

    Raises:
        BackendError: the backend returned something else than its manifest says.
        CheckFailed: it returned NaN or infinity.
    """
    return (_on_backend if _drawn_by_backend(backend, drawing) else _here)(backend, drawing, batches, seed, pixels)


def collect(
    backend: Backend,
    drawing: Drawing,
    conditions: Arrays,
    n: int,
    seed: int,
    first: int,
    batch: int,
    *,
    pixels: bool,
    noun: str,
    show: bool,
) -> npt.NDArray[Any]:
    """Draw n samples in batches; return uint8 [n, H, W, C] when `pixels`, else float32 [n, *shape].

    Args:
        backend: what runs the model.
        drawing: what is done to a batch.
        conditions: of all n samples.
        n: how many.
        seed: of the noise.
        first: index of the first sample.
        batch: samples at a time.
        pixels: whether images are rounded to uint8.
        noun: what is drawn, for the bar on stderr.
        show: whether there is a bar.

    Raises:
        BackendError: the backend returned something else than its manifest says.
        CheckFailed: it returned NaN or infinity.
    """
    parts = [slice(start, min(start + batch, n)) for start in range(0, n, batch)]
    batches = [
        (range(first + p.start, first + p.stop), {name: value[p] for name, value in conditions.items()}) for p in parts
    ]
    shape = backend.manifest.spec.shape
    samples: npt.NDArray[Any] = (
        np.empty((n, *shape[1:], shape[0]), np.uint8) if pixels else np.empty((n, *shape), np.float32)
    )
    results = draw_batches(backend, drawing, batches, seed, pixels=pixels)
    with progress_bar("sampling", n, noun, show=show) as advance:
        for part, some in zip(parts, results, strict=True):
            samples[part] = some  # batch by batch: floats take four times the memory of pixels
            advance(part.stop - part.start, "")
    return samples


def _drawn_by_backend(backend: Backend, drawing: Drawing) -> bool:
    return bool(drawing.sigmas) and isinstance(backend, DrawBackend)


def _here(
    backend: Backend, drawing: Drawing, batches: Sequence[Batch], seed: int, pixels: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the samples of each batch, from noise that is drawn here."""
    shape = backend.manifest.spec.shape

    def noise(batch: Batch) -> Floats:
        samples, _ = batch
        return portable.slices(seed, samples, drawing.slices, shape)

    for (_, conditions), z in _ahead(noise, batches):
        x0 = drawing.draw(z, conditions)
        yield sampling.to_uint8(x0) if pixels else x0


def _on_backend(
    backend: Backend, drawing: Drawing, batches: Sequence[Batch], seed: int, pixels: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the samples of each batch, which the backend draws from the noise on."""
    assert isinstance(backend, DrawBackend)
    shape = backend.manifest.spec.shape
    shape, dtype = ((*shape[1:], shape[0]), np.uint8) if pixels else (shape, np.float32)
    results = backend.draw(seed, batches, drawing.sigmas, pixels=pixels)
    for (samples, _), drawn in zip(batches, results, strict=True):
        if not drawn.finite:
            raise not_finite(backend.name, drawing.sigmas)
        yield returned_array(backend.name, drawn.images, (len(samples), *shape), dtype)


def _ahead(make: Callable[[Batch], Floats], parts: Sequence[Batch]) -> Iterator[tuple[Batch, Floats]]:
    """Yield each part with make(part), which a thread makes while the part before is used."""
    if len(parts) == 1:
        yield parts[0], make(parts[0])
        return
    from concurrent.futures import ThreadPoolExecutor  # slow to import, and one batch does without

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, parts[0])
        for part, following in zip(parts, (*parts[1:], None), strict=True):
            ready, coming = coming, thread.submit(make, following) if following else coming
            yield part, ready.result()


def labels_of(spec: ModelSpec, n: int, seed: int, of_class: Any, first: int) -> Labels | None:
    """Return the class of each of n samples, int64 [n], as `cmfast.Model.labels` does; None: there is no label."""
    n = whole_number("number of images", n, 0)
    first, seed = check_range(first, n), portable.check_seed(seed)
    classes = spec.classes
    if not classes:
        if of_class is not None:
            raise no_label(spec.conditions)
        return None
    if of_class is None:
        return portable.labels(seed, range(first, first + n), classes)
    need_memory(16 * n, f"the labels of {shown(n)} images", "draw fewer at a time")
    assert spec.label is not None
    return class_numbers(of_class, n, spec.label.entries, spec.class_names)
