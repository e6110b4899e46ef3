# SPDX-License-Identifier: MIT
"""A model, loaded: samples from seeds, or the raw denoiser."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast.backends import Backend, open_backend
from cmfast.checks import (
    array_of_numbers,
    check_range,
    need_memory,
    shown,
    whole_number,
)
from cmfast.conditions import LABEL, class_numbers, condition_values, no_label
from cmfast.drawing import Arrays, Drawing, Floats, Labels, check_noise, draw_batches
from cmfast.errors import CmfastError
from cmfast.progress import progress_bar
from cmfast.running import from_noise, run
from cmfast.sampling import Churn, heun, heun_calls, noise_slices
from cmfast.schedule import as_sigmas, karras_sigmas
from cmfast.spec import ModelSpec

Label = int | str | Sequence[int | str]  # a class or one a sample, by number, or by name where the model has names
Conditions = Mapping[str, Any]  # values by name: of a tensor an array, of a class what a label may be
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

    device     cpu or cuda; an unavailable one is an error, never a silent substitute. None: cuda for a TensorRT
               engine, which runs nowhere else, and cpu for everything else
    threads    CPU threads; None leaves the choice to the backend
    variant    a way to run it, words of cmfast.backends.VARIANTS: "tensorrt", "channels_last cuda_graph", ...
    precision  fp32, tf32, fp16 or bf16, for a checkpoint that PyTorch runs; an exported file has its own
    sha256     what the file must hash to; a TensorRT engine is native code, so load only what you trust
    """
    return Model(open_backend(path, device, threads, variant=variant, precision=precision, sha256=sha256))


class Model:
    """A few-step model on a backend. `load` makes one."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.manifest = backend.manifest
        self.spec: ModelSpec = backend.manifest.spec

    def sample(
        self,
        n: int,
        *,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        label: Label | None = None,
        conditions: Conditions | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> npt.NDArray[Any]:
        """Draw n samples: images as uint8 [n, H, W, C], other data as float32 [n, *shape].

        Args:
            n: How many.
            steps: Network calls a sample (NFE), with the model's default noise levels; without both, the fewest.
            sigmas: Noise levels, data units, decreasing from sigma_max; instead of steps.
            seed: Sample i of a seed is the same whatever n, `batch`, the backend and the machine are.
            label: A class for all samples, or n of them, by number or by name; None: drawn from the seed.
            conditions: Values of the model's conditions by name, for all samples, [*shape], or one each, [n, *shape].
                A label may be among them.
            batch: Samples at a time; changes memory and speed, not the samples.
            first: Index of the first sample, to go on where another call stopped; first + n is at most 2**64.
            progress: Show a bar on stderr.

        Raises:
            CmfastError: a condition is missing, unknown or does not fit, or another argument is out of its range.
            CheckFailed: the model returned NaN or infinity.
        """
        drawing = self._few_steps(self.sigmas_for(steps, sigmas))
        pixels = self.spec.data == "image"
        return self._draw(n, drawing, seed, self._given(label, conditions), batch, first, progress, pixels=pixels)

    def sample_float(
        self,
        n: int,
        *,
        steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        seed: int = 0,
        label: Label | None = None,
        conditions: Conditions | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> Floats:
        """Draw n samples as `sample` does; return float32 [n, *shape], of images in [-1, 1]."""
        drawing = self._few_steps(self.sigmas_for(steps, sigmas))
        return self._draw(n, drawing, seed, self._given(label, conditions), batch, first, progress, pixels=False)

    def sample_heun(
        self,
        n: int,
        *,
        steps: int = 18,
        churn: float | Churn = 0.0,
        seed: int = 0,
        label: Label | None = None,
        conditions: Conditions | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> npt.NDArray[Any]:
        """Draw n samples with a diffusion model, in many steps (`cmfast.sampling.heun`); return what `sample` does.

        steps  Heun steps, 2 steps - 1 network calls a sample, from sigma_max down the Karras grid to sigma_min and 0
        churn  the paper's S_churn, or all four of its numbers; 0: deterministic
        The rest is as in `sample`. The start of sample i of a seed is the one that `sample` takes too.
        """
        drawing = self._heun_steps(steps, churn)
        pixels = self.spec.data == "image"
        return self._draw(n, drawing, seed, self._given(label, conditions), batch, first, progress, pixels=pixels)

    def sample_heun_float(
        self,
        n: int,
        *,
        steps: int = 18,
        churn: float | Churn = 0.0,
        seed: int = 0,
        label: Label | None = None,
        conditions: Conditions | None = None,
        batch: int = 64,
        first: int = 0,
        progress: bool = False,
    ) -> Floats:
        """Draw n samples as `sample_heun` does; return float32 [n, *shape], data units, not clipped."""
        drawing = self._heun_steps(steps, churn)
        return self._draw(n, drawing, seed, self._given(label, conditions), batch, first, progress, pixels=False)

    def from_noise(
        self,
        noise: Floats,
        sigmas: Sequence[float],
        label: Label | Labels | None = None,
        conditions: Conditions | None = None,
    ) -> Floats:
        """Return samples [B, *shape] in data units from unit noise [K, B, *shape] at K noise levels.

        Raises:
            CmfastError: the levels do not strictly decrease above sigma_min, or a shape or a condition does not fit.
            CheckFailed: the model returned NaN or infinity.
        """
        noise = array_of_numbers("noise", noise)
        sigmas = self.sigmas_for(sigmas=sigmas if sigmas is not None else ())
        shape = self.spec.shape
        if noise.ndim != 2 + len(shape) or (len(noise), *noise.shape[2:]) != (len(sigmas), *shape):
            need = ", ".join(map(str, shape))
            raise CmfastError(
                f"noise must be [{len(sigmas)}, B, {need}] for {len(sigmas)} levels, got {list(noise.shape)}"
            )
        if noise.dtype != np.float32:
            raise CmfastError(f"noise must be float32, got {noise.dtype}")
        values = self.values(noise.shape[1], label, conditions)
        return from_noise(self.backend, self._denoise, noise, sigmas, values)

    def denoise(
        self,
        x: Floats,
        sigma: float | Floats,
        label: Label | npt.ArrayLike | None = None,
        *,
        sigma_next: float | Floats | None = None,
        conditions: Conditions | None = None,
    ) -> Floats:
        """Return f(x, sigma), float32 [B, *shape], not clipped: the raw contract, for algorithms of your own.

        Args:
            x: [B, *shape] float32, data units plus noise.
            sigma: Noise level, data units: a number, or one a sample [B]; above 0 and at most sqrt(2) sigma_max,
                where Heun's churn goes.
            label: A class, or one a sample [B], by number or by name; needed exactly when the model has a label.
            sigma_next: Of a flow map, the noise level to go to, from 0, below sigma; None: 0.
            conditions: Values of the model's conditions by name, [*shape] or [B, *shape].

        Raises:
            CmfastError: a shape, a type, a noise level or a condition is not one of these.
            CheckFailed: the model returned NaN or infinity.
        """
        self._check_denoiser()
        x = array_of_numbers("x", x)
        if x.ndim != 1 + len(self.spec.shape) or x.shape[1:] != self.spec.shape or x.dtype != np.float32:
            raise CmfastError(
                f"x must be float32 [B, {', '.join(map(str, self.spec.shape))}], got {x.dtype} {list(x.shape)}"
            )
        return self._denoise(x, sigma, sigma_next, self.values(len(x), label, conditions))

    def sigmas_for(self, steps: int | None = None, sigmas: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return the noise levels that `sample` uses for these arguments."""
        if self.manifest.kind != "denoiser":
            (built,) = self.spec.sigmas.values()
            asked = as_sigmas(sigmas) if sigmas is not None else built
            if steps is not None:
                steps = whole_number("number of steps", steps, 1)
            if asked != tuple(built) or steps not in (None, len(built)):
                raise CmfastError(
                    f"this file is a sampler of {len(built)} step(s), at {', '.join(f'{s:g}' for s in built)}, "
                    "and runs no others; a denoiser runs any: cmfast-export model.pt --kind denoiser"
                )
            return tuple(built)
        return self.spec.sigmas_for(steps, sigmas)

    def labels(self, n: int, *, seed: int = 0, label: Label | Labels | None = None, first: int = 0) -> Labels | None:
        """Return the class of each of n samples, int64 [n], that `sample` uses; None for a model without a label.

        label  as `sample` takes it. A text is looked up among the names of the classes and read as a number; "+7" is
               always the number
        """
        n = whole_number("number of images", n, 0)
        first, seed = check_range(first, n), portable.check_seed(seed)
        classes = self.spec.classes
        if not classes:
            if label is not None:
                raise no_label(self.spec.conditions)
            return None
        if label is None:
            return portable.labels(seed, range(first, first + n), classes)
        need_memory(16 * n, f"the labels of {shown(n)} images", "draw fewer at a time")
        assert self.spec.label is not None
        return class_numbers(label, n, self.spec.label.entries, self.spec.class_names)

    def values(
        self, n: int, label: Label | npt.ArrayLike | None = None, conditions: Conditions | None = None
    ) -> Arrays:
        """Return the conditions of n samples by name, int64 [n] or float32 [n, *shape], checked; none is drawn."""
        given = self._given(label, conditions)
        if self.spec.classes and given.get(LABEL) is None:
            raise CmfastError(f"this model is class-conditional; give a label from 0 to {self.spec.classes - 1}")
        return self._checked(given, n)

    def _given(self, label: Any, conditions: Conditions | None) -> dict[str, Any]:
        """Return what was passed by name, the label among it."""
        if conditions is not None and not isinstance(conditions, Mapping):
            raise CmfastError(f"conditions are passed by name, such as {{'state': array}}, got {shown(conditions)}")
        given = dict(conditions or {})
        if label is not None and given.get(LABEL) is not None:
            raise CmfastError("the label was passed twice, by `label` and in `conditions`; remove one")
        return given if label is None else given | {LABEL: label}

    def _checked(self, given: Mapping[str, Any], n: int) -> Arrays:
        if not self.spec.classes and given.get(LABEL) is not None:
            raise no_label(self.spec.conditions)
        return condition_values(self.spec.conditions, given, n)

    def _few_steps(self, sigmas: tuple[float, ...]) -> Drawing:
        def draw(noise: Floats, conditions: Arrays) -> Floats:
            return from_noise(self.backend, self._denoise, noise, sigmas, conditions)

        return Drawing(len(sigmas), draw, sigmas)

    def _heun_steps(self, steps: int, churn: float | Churn) -> Drawing:
        self._check_denoiser()
        if self.spec.second_time:
            raise CmfastError("Heun's steps are for diffusion models, and this is a flow map: sample it in few steps")
        heun_calls(steps)
        sigmas = karras_sigmas(steps, self.spec.sigma_min, self.spec.sigma_max)
        full = churn if isinstance(churn, Churn) else Churn(s_churn=churn)
        steps = len(sigmas)

        def draw(noise: Floats, conditions: Arrays) -> Floats:
            return np.asarray(heun(lambda x, s: self._denoise(x, s, None, conditions), noise, sigmas, churn=full))

        return Drawing(noise_slices(steps, full), draw)

    def _draw(
        self,
        n: int,
        drawing: Drawing,
        seed: int,
        given: Mapping[str, Any],
        batch: int,
        first: int,
        progress: bool,
        *,
        pixels: bool,
    ) -> npt.NDArray[Any]:
        """Check the request and draw it; return uint8 [n, H, W, C] when `pixels`, else float32 [n, *shape]."""
        n, batch = self._number(n, 1 if pixels else 4), whole_number("batch", batch, 1)
        first, seed = check_range(first, n), portable.check_seed(seed)
        batch = min(self.backend.batch or batch, n)
        check_noise(self.backend, drawing, batch)
        if (drawn := self.labels(n, seed=seed, label=given.get(LABEL), first=first)) is not None:
            given = {**given, LABEL: drawn}
        every = self._checked(given, n)
        parts = [slice(start, min(start + batch, n)) for start in range(0, n, batch)]
        batches = [
            (range(first + p.start, first + p.stop), {name: value[p] for name, value in every.items()}) for p in parts
        ]
        shape = self.spec.shape
        samples: npt.NDArray[Any] = (
            np.empty((n, *shape[1:], shape[0]), np.uint8) if pixels else np.empty((n, *shape), np.float32)
        )
        results = draw_batches(self.backend, drawing, batches, seed, pixels=pixels)
        with progress_bar("sampling", n, self.noun, show=progress) as advance:
            for part, some in zip(parts, results, strict=True):
                samples[part] = some  # batch by batch: floats take four times the memory of pixels
                advance(part.stop - part.start, "")
        return samples

    @property
    def noun(self) -> str:
        """What the model draws, for messages: images or samples."""
        return "images" if self.spec.data == "image" else "samples"

    def _denoise(self, x: Floats, sigma: Any, sigma_next: Any, conditions: Arrays) -> Floats:
        sigmas = self._sigma_each(sigma, len(x))
        inputs: dict[str, npt.NDArray[Any]] = {"x": np.ascontiguousarray(x), "sigma": sigmas}
        if self.spec.second_time:
            inputs["sigma_next"] = self._next_sigmas(0.0 if sigma_next is None else sigma_next, sigmas)
        elif sigma_next is not None:
            raise CmfastError("sigma_next is for flow maps, and this model takes one noise level")
        inputs |= {name: np.ascontiguousarray(value) for name, value in conditions.items()}
        return run(self.backend, inputs, len(x), sigmas)

    def _check_denoiser(self) -> None:
        if self.manifest.kind != "denoiser":
            raise CmfastError(
                "a sampler graph has no denoiser to call; export one: cmfast-export model.pt --kind denoiser"
            )

    def _sigma_each(self, sigma: Any, n: int) -> Floats:
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

    def _next_sigmas(self, sigma_next: Any, sigmas: Floats) -> Floats:
        """Return the noise levels that a flow map goes to, float32 [n]."""
        given = array_of_numbers("sigma_next", sigma_next)
        if isinstance(sigma_next, bool) or given.shape not in ((), sigmas.shape):
            raise CmfastError(f"sigma_next must be one noise level or {len(sigmas)} of them, got {shown(sigma_next)}")
        after = np.array(np.broadcast_to(given.astype(np.float32), sigmas.shape))
        if not ((after >= 0) & (after < sigmas)).all():
            raise CmfastError(f"sigma_next must be from 0 and below sigma, got {shown(sigma_next)}")
        return after

    def _number(self, n: int, size: int) -> int:
        """Return n, if that many samples of numbers of `size` bytes fit into memory."""
        n = whole_number(f"number of {self.noun}", n, 1)
        shape = ", ".join(map(str, self.spec.shape))
        need = n * (size * math.prod(self.spec.shape) + 8)  # and a label
        need_memory(need, f"{shown(n)} {self.noun} [{shape}]", "draw fewer at a time: the next ones with `first`")
        return n
