# SPDX-License-Identifier: MIT
"""A model, loaded: images from seeds, or the raw denoiser."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast import sampling
from cmfast.backends import Backend, LoopBackend, open_backend
from cmfast.checks import (
    array_of_numbers,
    check_range,
    class_numbers,
    need_memory,
    not_finite,
    returned_array,
    shown,
    whole_number,
)
from cmfast.drawing import Drawing, Floats, Labels, check_noise, draw_batches
from cmfast.errors import CmfastError
from cmfast.heun import Churn, heun, heun_calls, noise_slices
from cmfast.progress import progress_bar
from cmfast.schedule import as_levels, karras_sigmas
from cmfast.spec import ModelSpec

Label = int | str | Sequence[int | str]  # a class or one an image, by number, or by name where the model has names
# The highest noise level that `denoise` takes, over sigma_max: Heun's churn (arXiv:2206.00364) goes up to it.
CHURNED = math.sqrt(2)


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
    variant    a way to run it, words of cmfast.backends.VARIANTS: "tensorrt", "channels_last cuda_graph", ...
    precision  fp32, tf32, fp16 or bf16, for a checkpoint that PyTorch runs; an exported file has its own
    sha256     what the file must hash to; a TensorRT engine is native code, so load only what you trust
    """
    return Model(open_backend(path, device, threads, variant=variant, precision=precision, sha256=sha256))


class Model:
    """A consistency model on an engine. `load` makes one."""

    def __init__(self, engine: Backend) -> None:
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
        label: Label | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """Draw n images; return uint8 [n, H, W, C].

        steps     network calls an image (NFE), with the model's default noise levels; without both, the fewest
        sigmas    noise levels, data units, decreasing from sigma_max; instead of steps
        seed      image i of a seed is the same image whatever n, `batch`, the engine and the machine are
        label     a class for all images, or n of them, by number or by name; None: drawn from the seed
        batch     images at a time; changes memory and speed, not the images
        first     index of the first image, to go on where another call stopped; first + n is at most 2**64
        progress  show a bar on stderr
        """
        drawing = self._few_steps(self.levels(steps, sigmas))
        return self._images_of(n, drawing, seed, label, batch, first, progress, pixels=True)

    def sample_float(
        self,
        n: int,
        *,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        label: Label | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> Floats:
        """Draw n images as `sample` does; return float32 [n, C, H, W] in [-1, 1]."""
        drawing = self._few_steps(self.levels(steps, sigmas))
        return self._images_of(n, drawing, seed, label, batch, first, progress, pixels=False)

    def sample_heun(
        self,
        n: int,
        *,
        steps: int = 18,
        churn: float | Churn = 0.0,
        seed: int = 0,
        label: Label | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> npt.NDArray[np.uint8]:
        """Draw n images with a diffusion model, a teacher, in many steps (`cmfast.heun`); return uint8 [n, H, W, C].

        steps  Heun steps, 2 steps - 1 network calls an image, from sigma_max down the Karras grid to sigma_min and 0
        churn  the paper's S_churn, or all four of its numbers; 0: deterministic
        The rest is as in `sample`. The start of image i of a seed is the one that `sample` takes too.
        """
        drawing = self._heun_steps(steps, churn)
        return self._images_of(n, drawing, seed, label, batch, first, progress, pixels=True)

    def sample_heun_float(
        self,
        n: int,
        *,
        steps: int = 18,
        churn: float | Churn = 0.0,
        seed: int = 0,
        label: Label | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> Floats:
        """Draw n images as `sample_heun` does; return float32 [n, C, H, W], data units, not clipped."""
        drawing = self._heun_steps(steps, churn)
        return self._images_of(n, drawing, seed, label, batch, first, progress, pixels=False)

    def from_noise(self, noise: Floats, sigmas: Sequence[float], label: Label | Labels | None = None) -> Floats:
        """Return images [B, C, H, W] in data units from unit noise [K, B, C, H, W] at K noise levels.

        Raises:
            CmfastError: the levels do not strictly decrease above sigma_min, or the shapes do not fit.
            CheckFailed: the model returned NaN or infinity.
        """
        noise = array_of_numbers("noise", noise)
        sigmas = self.levels(sigmas=sigmas if sigmas is not None else ())
        if noise.ndim != 5 or (len(noise), *noise.shape[2:]) != (len(sigmas), *self.spec.image):
            need = ", ".join(map(str, self.spec.image))
            raise CmfastError(
                f"noise must be [{len(sigmas)}, B, {need}] for {len(sigmas)} levels, got {list(noise.shape)}"
            )
        if noise.dtype != np.float32:
            raise CmfastError(f"noise must be float32, got {noise.dtype}")
        if isinstance(self.engine, LoopBackend):
            classes = self._label(label, noise.shape[1]).get("label")
            if not noise.shape[1]:
                return np.empty(noise.shape[1:], np.float32)
            x0 = self.engine.loop(noise, sigmas, classes)
            x0 = returned_array(self.engine.name, x0, noise.shape[1:], np.float32)
            self._check_finite(x0, {"noise": noise}, sigmas)
            return x0
        if self.manifest.kind == "denoiser":
            return np.asarray(sampling.sample(lambda x, s: self.denoise(x, s, label), noise, sigmas, self.spec))
        inputs: dict[str, npt.NDArray[Any]] = {"noise": noise, **self._label(label, noise.shape[1])}
        if self.manifest.kind == "server":  # the batch is the first axis of everything
            inputs = {name: _batch_first(value) for name, value in inputs.items()}
        return self._run(inputs, noise.shape[1], sigmas)

    def denoise(self, x: Floats, sigma: float | Floats, label: Label | npt.ArrayLike | None = None) -> Floats:
        """Return f(x, sigma), float32 [B, C, H, W], not clipped: the raw contract, for algorithms of your own.

        x      [B, C, H, W] float32, data units plus noise
        sigma  noise level, data units: a number, or one an image [B]; above 0 and at most sqrt(2) sigma_max, where
               Heun's churn goes
        label  a class, or one an image [B], by number or by name; needed exactly when the model has classes

        Raises:
            CmfastError: a shape, a type, a noise level or a label is not one of these.
            CheckFailed: the model returned NaN or infinity.
        """
        self._check_denoiser()
        x = array_of_numbers("x", x)
        if x.ndim != 4 or x.shape[1:] != tuple(self.spec.image) or x.dtype != np.float32:
            raise CmfastError(
                f"x must be float32 [B, {', '.join(map(str, self.spec.image))}], got {x.dtype} {list(x.shape)}"
            )
        levels = self._noise_levels(sigma, len(x))
        inputs: dict[str, npt.NDArray[Any]] = {
            "x": np.ascontiguousarray(x),
            "sigma": levels,
            **self._label(label, len(x)),
        }
        return self._run(inputs, len(x), levels)

    def levels(self, steps: int | None = None, sigmas: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return the noise levels that `sample` uses for these arguments."""
        if self.manifest.kind != "denoiser":
            (built,) = self.spec.sigmas.values()
            asked = as_levels(sigmas) if sigmas is not None else built
            if steps is not None:
                steps = whole_number("number of steps", steps, 1)
            if asked != tuple(built) or steps not in (None, len(built)):
                raise CmfastError(
                    f"this file is a sampler of {len(built)} step(s), at {', '.join(f'{s:g}' for s in built)}, "
                    "and runs no others; a denoiser runs any: cmfast-export model.pt --kind denoiser"
                )
            return tuple(built)
        return self.spec.levels(steps, sigmas)

    def labels(self, n: int, *, seed: int = 0, label: Label | Labels | None = None, first: int = 0) -> Labels | None:
        """Return the class of each of n images, int64 [n], that `sample` uses; None for an unconditional model.

        label  as `sample` takes it. A text is looked up among the names of the classes and read as a number; "+7" is
               always the number
        """
        n = whole_number("number of images", n, 0)
        first, seed = check_range(first, n), portable.check_seed(seed)
        classes = self.spec.classes
        if not classes:
            if label is not None:
                raise CmfastError("a label was given, but the model is unconditional: it has no classes")
            return None
        if label is None:
            return portable.labels(seed, range(first, first + n), classes)
        need_memory(16 * n, f"the labels of {shown(n)} images", "draw fewer at a time")
        return class_numbers(label, n, classes, self.spec.class_names)

    def _few_steps(self, levels: tuple[float, ...]) -> Drawing:
        return Drawing(len(levels), lambda noise, label: self.from_noise(noise, levels, label), levels)

    def _heun_steps(self, steps: int, churn: float | Churn) -> Drawing:
        self._check_denoiser()
        heun_calls(steps)
        levels = karras_sigmas(steps, self.spec.sigma_min, self.spec.sigma_max)
        full = churn if isinstance(churn, Churn) else Churn(s_churn=churn)
        steps = len(levels)

        def draw(noise: Floats, label: Labels | None) -> Floats:
            return np.asarray(heun(lambda x, sigma: self.denoise(x, sigma, label), noise, levels, churn=full))

        return Drawing(noise_slices(steps, full), draw)

    def _images_of(
        self,
        n: int,
        drawing: Drawing,
        seed: int,
        label: Label | None,
        batch: int,
        first: int,
        progress: bool,
        *,
        pixels: bool,
    ) -> npt.NDArray[Any]:
        """Check the request and draw it; return uint8 [n, H, W, C] when `pixels`, else float32 [n, C, H, W]."""
        n, batch = self._images(n, 1 if pixels else 4), whole_number("batch", batch, 1)
        first, seed = check_range(first, n), portable.check_seed(seed)
        batch = min(self.engine.batch or batch, n)
        check_noise(self.engine, drawing, batch)
        every = self.labels(n, seed=seed, label=label, first=first)
        parts = [slice(start, min(start + batch, n)) for start in range(0, n, batch)]
        batches = [(range(first + p.start, first + p.stop), None if every is None else every[p]) for p in parts]
        channels, *sides = self.spec.image
        images: npt.NDArray[Any] = (
            np.empty((n, *sides, channels), np.uint8) if pixels else np.empty((n, channels, *sides), np.float32)
        )
        drawn = draw_batches(self.engine, drawing, batches, seed, pixels=pixels)
        with progress_bar("sampling", n, "images", show=progress) as advance:
            for part, some in zip(parts, drawn, strict=True):
                images[part] = some  # batch by batch: floats take four times the memory of pixels
                advance(part.stop - part.start, "")
        return images

    def _check_denoiser(self) -> None:
        if self.manifest.kind != "denoiser":
            raise CmfastError(
                "a sampler graph has no denoiser to call; export one: cmfast-export model.pt --kind denoiser"
            )

    def _noise_levels(self, sigma: Any, n: int) -> Floats:
        """Return the noise levels of n images, float32 [n]."""
        if isinstance(sigma, (str, bytes, bool)):
            raise CmfastError(f"sigma must be a noise level or {n} of them, got {shown(sigma)}")
        given = array_of_numbers("sigma", sigma)
        if given.shape not in ((), (n,)):
            raise CmfastError(f"sigma must be one noise level or {n} of them, got shape {list(given.shape)}")
        most = CHURNED * self.spec.sigma_max
        # A little more than it, for what rounding to float32 adds. What float32 rounds to 0 is refused as 0 is.
        inside = (given >= np.finfo(np.float32).tiny) & (given <= most * (1 + 1e-6))
        if not inside.all():
            wrong = float(given[~inside].flat[0])
            raise CmfastError(
                f"noise level {wrong:g} cannot be denoised: this model was trained for {self.spec.sigma_min:g} to "
                f"{self.spec.sigma_max:g}, and denoise takes 0 < sigma <= {most:.6g} (sqrt(2) times that, for churn)"
            )
        return np.array(np.broadcast_to(given.astype(np.float32), (n,)))

    def _images(self, n: int, size: int) -> int:
        """Return n, if that many images of numbers of `size` bytes fit into memory."""
        n = whole_number("number of images", n, 1)
        shape = ", ".join(map(str, self.spec.image))
        need = n * (size * math.prod(self.spec.image) + 8)  # and a label
        need_memory(need, f"{shown(n)} images [{shape}]", "draw fewer at a time: the next ones with `first`")
        return n

    def _label(self, label: Any, n: int) -> dict[str, npt.NDArray[np.int64]]:
        if self.spec.classes and label is None:
            raise CmfastError(f"this model is class-conditional; give a label from 0 to {self.spec.classes - 1}")
        if label is None:
            return {}
        checked = self.labels(n, label=label)
        return {} if checked is None else {"label": checked}

    def _run(self, inputs: dict[str, npt.NDArray[Any]], n: int, sigmas: Floats | Sequence[float]) -> Floats:
        """Run the engine on n images; where it takes one batch size only, repeat the last image to fill it up."""
        if n == 0:
            return np.empty((0, *self.spec.image), np.float32)
        short = (self.engine.batch or n) - n
        if short < 0:
            raise CmfastError(f"this file takes batches of {self.engine.batch}, got {n}")
        if short:
            whole = sum(value.nbytes for value in inputs.values()) // n * (n + short)
            only = f"batches of {self.engine.batch} images, the only size that this file takes,"
            need_memory(2 * whole, only, "export it with a smaller --batch")
            axis = self.manifest.batch_axis
            inputs = {name: _lengthen(value, axis if name == "noise" else 0, short) for name, value in inputs.items()}
        x0 = self.engine.run(inputs)
        x0 = returned_array(self.engine.name, x0, (n + short, *self.spec.image), np.float32)[:n]
        self._check_finite(x0, inputs, sigmas)
        return x0

    def _check_finite(self, x0: Floats, inputs: dict[str, npt.NDArray[Any]], sigmas: Floats | Sequence[float]) -> None:
        """Raise NotFinite, with the noise level, where an engine returned NaN or infinity."""
        if np.isfinite(x0).all():
            return
        for name, value in inputs.items():
            if not np.isfinite(value).all():
                raise CmfastError(f"{name} has values that are not finite (NaN or infinity)")
        if isinstance(sigmas, np.ndarray):  # one an image
            sigmas = sorted(set(sigmas[~np.isfinite(x0).all(axis=(1, 2, 3))].tolist()), reverse=True)
        raise not_finite(self.engine.name, sigmas)


def _lengthen(values: npt.NDArray[Any], axis: int, by: int) -> npt.NDArray[Any]:
    return np.pad(values, [(0, by if i == axis else 0) for i in range(values.ndim)], mode="edge")


def _batch_first(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return noise [K, B, ...] as [B, K, ...] and label [B] as [B, 1]."""
    return np.ascontiguousarray(values.swapaxes(0, 1) if values.ndim > 1 else values[:, None])
