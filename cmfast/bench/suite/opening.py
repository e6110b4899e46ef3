# SPDX-License-Identifier: MIT
"""A way of the CPU suite, opened: one network call, and whole images from noise, numpy to numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cmfast import sampling
from cmfast.bench.suite.plain import Plain
from cmfast.bench.suite.ways import DIFFUSERS, Way
from cmfast.drawing import Arrays
from cmfast.formats.manifest import Manifest
from cmfast.formats.values import PRECISIONS
from cmfast.model import load

WORDS = {dtype: word for word, dtype in PRECISIONS.items()}
Floats = npt.NDArray[np.float32]
Denoise = Callable[[Floats, float, Arrays], Floats]  # (x, sigma, conditions) -> x0
Draw = Callable[[Floats, tuple[float, ...], Arrays], Floats]  # (noise, sigmas, conditions) -> x0


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A contender that runs.

    Attributes:
        way: how it was opened; of a plain library, with the precision that it chose.
        manifest: of the file.
        denoise: one network call; None: it only runs the whole loop.
        draw: the few-step loop.
        about: what runs it, in words, and its precision; both may change with the first call ("auto").
    """

    way: Way
    manifest: Manifest
    denoise: Denoise | None
    draw: Draw
    about: Callable[[], tuple[str, str]]

    @property
    def name(self) -> str:
        """What runs it, in words."""
        return self.about()[0]

    @property
    def as_run(self) -> Way:
        """The way with the precision in which it runs."""
        return replace(self.way, precision=self.about()[1])


def open_way(way: Way, files: Mapping[str, Path], threads: int) -> Opened:
    """Open a contender on the CPU.

    Raises:
        BackendError: it is not available on this machine.
        MissingDependency: its library is not installed.
    """
    file = files[way.file]
    if way.plain:
        return _plain(way, Plain(file, way.variant, threads))
    precision = "" if way.precision == "fp32" else way.precision
    model = load(file, "cpu", threads, variant=way.variant, precision=precision, tolerance_db=way.tolerance_db)

    def denoise(x: Floats, sigma: float, conditions: Arrays) -> Floats:
        return model.denoise(x, sigma, conditions=conditions)

    def draw(noise: Floats, sigmas: tuple[float, ...], conditions: Arrays) -> Floats:
        return model.from_noise(noise, sigmas, conditions=conditions)

    def about() -> tuple[str, str]:
        return model.backend.name, WORDS[model.backend.manifest.dtype]

    return Opened(
        way=way,
        manifest=model.manifest,
        denoise=None if way is DIFFUSERS else denoise,
        draw=draw,
        about=about,
    )


def _plain(way: Way, library: Plain) -> Opened:
    spec = library.manifest.spec

    def draw(noise: Floats, sigmas: tuple[float, ...], conditions: Arrays) -> Floats:
        def bound(x: Floats, sigma: float, sigma_next: float = 0.0) -> Floats:
            return library.denoise(x, sigma, conditions, sigma_next)

        return np.asarray(sampling.sample(bound, noise, sigmas, spec))

    return Opened(
        way=replace(way, precision=library.precision),
        manifest=library.manifest,
        denoise=library.denoise,
        draw=draw,
        about=lambda: (library.name, library.precision),
    )
