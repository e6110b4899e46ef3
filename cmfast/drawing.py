# SPDX-License-Identifier: MIT
"""Images batch by batch: the noise of one is made while the engine has the one before.

What a `Drawing` does to a batch, `cmfast.model` says; an engine that draws few-step samples itself (`DrawBackend`) is
given the indices of the images instead of their noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast import sampling
from cmfast.backends import Backend, DrawBackend
from cmfast.checks import need_memory, not_finite, returned_array

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Batch = tuple[range, Labels | None]  # indices of its images, their classes


@dataclass(frozen=True)
class Drawing:
    """A way to draw a batch: slices of unit noise [slices, b, C, H, W] and labels [b] in, x0 [b, C, H, W] out."""

    slices: int
    draw: Callable[[Floats, Labels | None], Floats]
    levels: tuple[float, ...] = ()  # of the few-step loop, which some engines have; () for another algorithm


def check_noise(engine: Backend, drawing: Drawing, batch: int) -> None:
    """Raise CmfastError unless the noise of `draw_batches` fits into memory, for batches of so many images."""
    if _drawn_by_engine(engine, drawing):
        return
    # Two batches of noise at a time, one of them also in parts, and what it takes to draw one slice.
    numbers = batch * math.prod(engine.manifest.spec.image)
    need_memory(
        (3 * drawing.slices * 4 + portable.PEAK) * numbers,
        f"{drawing.slices} slice(s) of noise for a batch of {batch}",
        "use a smaller batch",
    )


def draw_batches(
    engine: Backend, drawing: Drawing, batches: Sequence[Batch], seed: int, *, pixels: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the images of each batch: uint8 [b, H, W, C] when `pixels`, else float32 [b, C, H, W].

    Raises:
        EngineError: the engine returned something else than its manifest says.
        CheckFailed: it returned NaN or infinity.
    """
    return (_on_engine if _drawn_by_engine(engine, drawing) else _here)(engine, drawing, batches, seed, pixels)


def _drawn_by_engine(engine: Backend, drawing: Drawing) -> bool:
    return bool(drawing.levels) and isinstance(engine, DrawBackend)


def _here(
    engine: Backend, drawing: Drawing, batches: Sequence[Batch], seed: int, pixels: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the images of each batch, from noise that is drawn here."""
    image = engine.manifest.spec.image

    def noise(batch: Batch) -> Floats:
        samples, _ = batch
        return np.stack([portable.gaussian(seed, samples, k, image) for k in range(drawing.slices)])

    for (_, label), z in _ahead(noise, batches):
        x0 = drawing.draw(z, label)
        yield sampling.to_uint8(x0) if pixels else x0


def _on_engine(
    engine: Backend, drawing: Drawing, batches: Sequence[Batch], seed: int, pixels: bool
) -> Iterator[npt.NDArray[Any]]:
    """Yield the images of each batch, which the engine draws from the noise on."""
    assert isinstance(engine, DrawBackend)
    channels, *sides = engine.manifest.spec.image
    shape, dtype = ((*sides, channels), np.uint8) if pixels else ((channels, *sides), np.float32)
    results = engine.draw(seed, batches, drawing.levels, pixels=pixels)
    for (samples, _), drawn in zip(batches, results, strict=True):
        if not drawn.finite:
            raise not_finite(engine.name, drawing.levels)
        yield returned_array(engine.name, drawn.images, (len(samples), *shape), dtype)


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
