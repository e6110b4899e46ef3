# SPDX-License-Identifier: MIT
"""A model, loaded: images from seeds, or the raw denoiser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast import sampler
from cmfast.engines import Engine, LoopEngine, open_engine
from cmfast.errors import CmfastError
from cmfast.heun import Churn, heun, heun_calls, noise_slices
from cmfast.progress import progress_bar
from cmfast.schedule import karras_sigmas
from cmfast.spec import ModelSpec

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def load(
    path: str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    *,
    variant: str = "",
    precision: str = "",
    sha256: str | None = None,
) -> Model:
    """Open a model file (.onnx; .engine on an NVIDIA GPU; .pt where PyTorch is installed).

    device     cpu or cuda; one that cannot be had is an error, never a silent substitute. None: cuda for a TensorRT
               engine, which runs nowhere else, and cpu for everything else
    threads    CPU threads; None leaves the choice to the engine
    variant    a way to run it, one of cmfast.engines.VARIANTS: "cuda_graph", "tensorrt", "compiled", ...
    precision  fp32, tf32, fp16 or bf16, for a checkpoint that PyTorch runs; an exported file has its own
    sha256     what the file must hash to; a TensorRT engine is native code, so load only what you trust
    """
    return Model(open_engine(path, device, threads, variant=variant, precision=precision, sha256=sha256))


class Model:
    """A consistency model on an engine. `load` makes one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.manifest = engine.manifest
        self.spec: ModelSpec = engine.manifest.spec

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        label: int | Sequence[int] | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """Draw n images; return uint8 [n, H, W, C].

        steps     network calls an image (NFE), with the model's default noise levels; without both, the fewest
        sigmas    noise levels, data units, decreasing from sigma_max; instead of steps
        seed      image i of a seed is the same image whatever n, `batch`, the engine and the machine are
        label     a class for all images, or n of them; None: drawn from the seed
        batch     images at a time; changes memory and speed, not the images
        first     index of the first image, to go on where another call stopped
        progress  show a bar on stderr
        """
        drawing = self._few_steps(self.levels(steps, sigmas))
        return self._pixels(n, self._batches(n, drawing, seed, label, batch, first, progress))

    def sample_float(
        self,
        n: int,
        *,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        label: int | Sequence[int] | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> Floats:
        """Draw n images as `sample` does; return float32 [n, C, H, W] in [-1, 1]."""
        drawing = self._few_steps(self.levels(steps, sigmas))
        return self._floats(n, self._batches(n, drawing, seed, label, batch, first, progress))

    def sample_heun(
        self,
        n: int,
        *,
        steps: int = 18,
        churn: float | Churn = 0.0,
        seed: int = 0,
        label: int | Sequence[int] | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """Draw n images with a diffusion model, a teacher, in many steps (`cmfast.heun`); return uint8 [n, H, W, C].

        steps  Heun steps, 2 steps - 1 network calls an image, from sigma_max down the Karras grid to sigma_min and 0
        churn  the paper's S_churn, or all four of its numbers; 0: deterministic
        The rest is as in `sample`. The start of image i of a seed is the one that `sample` takes too.
        """
        return self._pixels(n, self._batches(n, self._heun_steps(steps, churn), seed, label, batch, first, progress))

    def sample_heun_float(
        self,
        n: int,
        *,
        steps: int = 18,
        churn: float | Churn = 0.0,
        seed: int = 0,
        label: int | Sequence[int] | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> Floats:
        """Draw n images as `sample_heun` does; return float32 [n, C, H, W], data units, not clipped."""
        return self._floats(n, self._batches(n, self._heun_steps(steps, churn), seed, label, batch, first, progress))

    def from_noise(self, noise: Floats, sigmas: Sequence[float], label: Labels | None = None) -> Floats:
        """Return images [B, C, H, W] in data units from unit noise [K, B, C, H, W] at K noise levels."""
        if noise.ndim != 5 or (len(noise), *noise.shape[2:]) != (len(sigmas), *self.spec.image):
            need = ", ".join(map(str, self.spec.image))
            raise CmfastError(
                f"noise must be [{len(sigmas)}, B, {need}] for {len(sigmas)} levels, got {list(noise.shape)}"
            )
        if noise.dtype != np.float32:
            raise CmfastError(f"noise must be float32, got {noise.dtype}")
        if isinstance(self.engine, LoopEngine):
            return self.engine.loop(noise, sigmas, self._label(label, noise.shape[1]).get("label"))
        if self.manifest.kind == "denoiser":
            return np.asarray(sampler.sample(lambda x, s: self.denoise(x, s, label), noise, sigmas, self.spec))
        if tuple(sigmas) != self.levels():
            raise CmfastError(f"this sampler was built for the noise levels {self.levels()}, got {tuple(sigmas)}")
        inputs: dict[str, npt.NDArray[Any]] = {"noise": noise, **self._label(label, noise.shape[1])}
        if self.manifest.kind == "server":  # the batch is the first axis of everything
            inputs = {name: _batch_first(value) for name, value in inputs.items()}
        return self._run(inputs, noise.shape[1])

    def denoise(self, x: Floats, sigma: float | Floats, label: npt.ArrayLike | None = None) -> Floats:
        """Return f(x, sigma), float32 [B, C, H, W], not clipped: the raw contract, for algorithms of your own.

        x      [B, C, H, W] float32, data units plus noise
        sigma  noise level, data units: a number, or one an image [B]
        label  a class, or one an image [B]; needed exactly when the model has classes
        """
        self._check_denoiser()
        if x.ndim != 4 or x.shape[1:] != tuple(self.spec.image) or x.dtype != np.float32:
            raise CmfastError(
                f"x must be float32 [B, {', '.join(map(str, self.spec.image))}], got {x.dtype} {list(x.shape)}"
            )
        if np.shape(sigma) not in ((), (len(x),)):
            raise CmfastError(f"sigma must be one noise level or {len(x)} of them, got shape {list(np.shape(sigma))}")
        levels = np.array(np.broadcast_to(np.asarray(sigma, np.float32), (len(x),)))
        return self._run({"x": np.ascontiguousarray(x), "sigma": levels, **self._label(label, len(x))}, len(x))

    def levels(self, steps: int | None = None, sigmas: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return the noise levels that `sample` uses for these arguments."""
        if self.manifest.kind != "denoiser":
            (built,) = self.spec.sigmas.values()
            asked = tuple(float(s) for s in sigmas) if sigmas is not None else built
            if asked != tuple(built) or steps not in (None, len(built)):
                raise CmfastError(
                    f"this file is a sampler of {len(built)} step(s), at {', '.join(f'{s:g}' for s in built)}, "
                    "and runs no others; a denoiser runs any: cmfast-export model.pt --kind denoiser"
                )
            return tuple(built)
        return self.spec.levels(steps, sigmas)

    def labels(
        self, n: int, *, seed: int = 0, label: int | Sequence[int] | None = None, first: int = 0
    ) -> Labels | None:
        """Return the class of each of n images, int64 [n], that `sample` uses; None for an unconditional model."""
        classes = self.spec.classes
        if not classes:
            if label is not None:
                raise CmfastError("a label was given, but the model is unconditional: it has no classes")
            return None
        if label is None:
            return portable.labels(seed, range(first, first + n), classes)
        given = np.asarray(label)
        if given.dtype.kind not in "iu" or given.shape not in ((), (n,)):
            raise CmfastError(f"label must be one class or {n} of them, got {label!r}")
        if given.min() < 0 or given.max() >= classes:
            wrong = int(given.max() if given.max() >= classes else given.min())
            raise CmfastError(f"label {wrong} is out of range; this model has the classes 0 to {classes - 1}")
        return np.array(np.broadcast_to(given.astype(np.int64), (n,)))

    def _few_steps(self, levels: tuple[float, ...]) -> _Drawing:
        return _Drawing(len(levels), lambda noise, label: self.from_noise(noise, levels, label))

    def _heun_steps(self, steps: int, churn: float | Churn) -> _Drawing:
        self._check_denoiser()
        heun_calls(steps)
        levels = karras_sigmas(steps, self.spec.sigma_min, self.spec.sigma_max)
        full = churn if isinstance(churn, Churn) else Churn(s_churn=churn)

        def draw(noise: Floats, label: Labels | None) -> Floats:
            return np.asarray(heun(lambda x, sigma: self.denoise(x, sigma, label), noise, levels, churn=full))

        return _Drawing(noise_slices(steps, full), draw)

    def _pixels(self, n: int, batches: Iterator[tuple[slice, Floats]]) -> npt.NDArray[np.uint8]:
        images = np.empty((_whole("n", n, 1), *self.spec.image[1:], self.spec.image[0]), np.uint8)
        for part, x0 in batches:
            images[part] = sampler.to_uint8(x0)  # batch by batch: a quarter of the memory
        return images

    def _floats(self, n: int, batches: Iterator[tuple[slice, Floats]]) -> Floats:
        images = np.empty((_whole("n", n, 1), *self.spec.image), np.float32)
        for part, x0 in batches:
            images[part] = x0
        return images

    def _batches(
        self,
        n: int,
        drawing: _Drawing,
        seed: int,
        label: int | Sequence[int] | None,
        batch: int,
        first: int,
        progress: bool,
    ) -> Iterator[tuple[slice, Floats]]:
        """Yield (which of the n images, x0 [b, C, H, W]) batch by batch."""
        batch, first = _whole("batch", batch, 1), _whole("first", first, 0)
        every = self.labels(n, seed=seed, label=label, first=first)
        batch = self.engine.batch or batch
        parts = [slice(start, min(start + batch, n)) for start in range(0, n, batch)]

        def noise(part: slice) -> Floats:
            indices = np.arange(first + part.start, first + part.stop)
            return np.stack([portable.gaussian(seed, indices, k, self.spec.image) for k in range(drawing.slices)])

        with progress_bar("sampling", n, "images", show=progress) as advance:
            for part, z in _ahead(noise, parts):
                yield part, drawing.draw(z, None if every is None else every[part])
                advance(part.stop - part.start, "")

    def _check_denoiser(self) -> None:
        if self.manifest.kind != "denoiser":
            raise CmfastError(
                "a sampler graph has no denoiser to call; export one: cmfast-export model.pt --kind denoiser"
            )

    def _label(self, label: npt.ArrayLike | None, n: int) -> dict[str, npt.NDArray[np.int64]]:
        if self.spec.classes and label is None:
            raise CmfastError(f"this model is class-conditional; give a label from 0 to {self.spec.classes - 1}")
        if label is None:
            return {}
        checked = self.labels(n, label=label)  # type: ignore[arg-type]
        return {} if checked is None else {"label": checked}

    def _run(self, inputs: dict[str, npt.NDArray[Any]], n: int) -> Floats:
        """Run the engine on n images; where it takes one batch size only, repeat the last image to fill it up."""
        short = (self.engine.batch or n) - n
        if short < 0:
            raise CmfastError(f"this file takes batches of {self.engine.batch}, got {n}")
        if short:
            axis = 1 if self.manifest.kind == "sampler" else 0  # of the batch, in noise
            inputs = {name: _lengthen(value, axis if name == "noise" else 0, short) for name, value in inputs.items()}
        return self.engine.run(inputs)[:n]


@dataclass(frozen=True)
class _Drawing:
    """A way to draw a batch: slices of unit noise [slices, b, C, H, W] and labels [b] in, x0 [b, C, H, W] out."""

    slices: int
    draw: Callable[[Floats, Labels | None], Floats]


def _ahead(make: Callable[[slice], Floats], parts: Sequence[slice]) -> Iterator[tuple[slice, Floats]]:
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


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, (int, np.integer)) or value < least:
        what = "number of images" if name == "n" else name
        raise CmfastError(f"the {what} must be a whole number, at least {least}, got {value!r}")
    return int(value)


def _lengthen(values: npt.NDArray[Any], axis: int, by: int) -> npt.NDArray[Any]:
    return np.pad(values, [(0, by if i == axis else 0) for i in range(values.ndim)], mode="edge")


def _batch_first(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return noise [K, B, ...] as [B, K, ...] and label [B] as [B, 1]."""
    return np.ascontiguousarray(values.swapaxes(0, 1) if values.ndim > 1 else values[:, None])
