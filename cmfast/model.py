# SPDX-License-Identifier: MIT
"""A model, loaded: samples from seeds, or the raw denoiser."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cmfast import noise as portable
from cmfast.backends import Backend, open_backend
from cmfast.checks import array_of_numbers, check_range, whole_number
from cmfast.conditions import LABEL, Condition, condition_values, no_label
from cmfast.drawing import Arrays, Drawing, Floats, Labels, check_noise, check_number, collect, labels_of
from cmfast.encoding import Encoders, Paths, check_model_kind
from cmfast.errors import CmfastError
from cmfast.running import denoised, few_step_drawing, from_noise, given_conditions, heun_drawing, own_noise
from cmfast.sampling import Churn
from cmfast.schedule import as_sigmas
from cmfast.spec import ModelSpec

Label = int | str | Sequence[int | str]  # a class or one a sample, by number, or by name where the model has names
Conditions = Mapping[str, Any]  # values by name: of a tensor an array, of a class what a label may be


def load(
    path: str | os.PathLike[str],
    device: str | None = None,
    threads: int | None = None,
    *,
    variant: str = "",
    precision: str = "",
    sha256: str | None = None,
    encoder: Paths | None = None,
    tolerance_db: float | None = None,
) -> Model:
    """Open a model file (.onnx, .ort; .xml by OpenVINO; .engine on an NVIDIA GPU; .pt where PyTorch is installed).

    Args:
        path: the file, a folder that diffusers wrote, or the name of a model that comes with cmfast (`models`).
        device: cpu or cuda; an unavailable one is an error, never a silent substitute. None: cuda for a TensorRT
            engine, which runs nowhere else, and cpu for everything else.
        threads: CPU threads; None leaves the choice to the backend.
        variant: a way to run it, words of cmfast.backends.VARIANTS: "openvino", "channels_last cuda_graph", ...; or
            "auto": the fastest backend that is installed, timed at the first call (`cmfast.bench.fastest`).
        precision: fp32, tf32, fp16 or bf16, for a checkpoint that PyTorch runs and for a file that OpenVINO runs; any
            other exported file has its own.
        sha256: what the file must hash to; a TensorRT engine is native code, so load only what you trust.
        encoder: file or files of its encoders, where it was exported with them apart; they run on the CPU.
        tolerance_db: for "auto": also try lower precisions than the file's, if they keep this PSNR, dB.

    Returns:
        The model on its backend, ready to sample.

    Raises:
        ArtifactError: the file is missing, damaged, or no model.
        BackendError: the device, the variant or the precision is not available for this file.
        MissingDependency: the backend's library is not installed.
    """
    if tolerance_db is not None or (isinstance(variant, str) and variant == "auto"):
        from cmfast.bench.fastest import FastestBackend

        fastest = FastestBackend(path, device, threads, variant, precision, sha256, tolerance_db=tolerance_db)
        return Model(fastest, Encoders(fastest.manifest, encoder, threads))
    backend = open_backend(path, device, threads, variant=variant, precision=precision, sha256=sha256)
    return Model(backend, Encoders(backend.manifest, encoder, threads))


class Model:
    """A few-step model on a backend. `load` makes one.

    Args:
        backend: what runs the model file.
    """

    def __init__(self, backend: Backend, encoders: Encoders | None = None) -> None:
        check_model_kind(backend)
        self.backend, self._encoders = backend, encoders or Encoders(backend.manifest)
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
        """Draw n samples: images as uint8, other data as float32.

        Args:
            n: How many.
            steps: Network calls per sample (NFE), with the model's default noise levels; without both, the fewest.
            sigmas: Noise levels, data units, decreasing from sigma_max; instead of steps.
            seed: Sample i of a seed is the same whatever n, `batch`, the backend and the machine are.
            label: A class for all samples, or n of them, by number or by name; None: drawn from the seed.
            conditions: Values of the model's conditions by name, for all samples, [*shape], or one each, [n, *shape].
                A label may be among them.
            batch: Samples at a time; changes memory and speed, not the samples.
            first: Index of the first sample, to go on where another call stopped; first + n is at most 2**64.
            progress: Show a bar on stderr.

        Returns:
            Images uint8 [n, H, W, C], other data float32 [n, *shape].

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
        """Draw n samples as `sample` does, without rounding images to uint8.

        Args:
            n: How many; this, the other arguments and the errors are those of `sample`.

        Returns:
            Samples float32 [n, *shape], images in [-1, 1].
        """
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
        """Draw n samples with a diffusion model in many steps: Heun's method (`cmfast.sampling.heun`).

        Args:
            n: How many.
            steps: Heun steps, 2 steps - 1 network calls per sample, from sigma_max down the Karras grid to sigma_min
                and 0.
            churn: The paper's S_churn, or all four of its numbers; 0: deterministic.
            seed: This and the other arguments are those of `sample`; sample i of a seed starts from the same noise.

        Returns:
            What `sample` returns: images uint8 [n, H, W, C], other data float32 [n, *shape].

        Raises:
            CmfastError: the file is a sampler, the model a flow map, or an argument is out of its range.
            CheckFailed: the model returned NaN or infinity.
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
        """Draw n samples as `sample_heun` does, without rounding images to uint8.

        Args:
            n: How many; this and the other arguments and the errors are those of `sample_heun`.

        Returns:
            Samples float32 [n, *shape], data units, not clipped.
        """
        drawing = self._heun_steps(steps, churn)
        return self._draw(n, drawing, seed, self._given(label, conditions), batch, first, progress, pixels=False)

    def from_noise(
        self,
        noise: Floats,
        sigmas: Sequence[float],
        label: Label | Labels | None = None,
        conditions: Conditions | None = None,
    ) -> Floats:
        """Run the few-step loop on noise of your own.

        Args:
            noise: Unit Gaussian, float32 [K, B, *shape], one slice per step.
            sigmas: K noise levels, data units, strictly decreasing from sigma_max.
            label: A class, or one per sample [B], by number or by name; needed exactly when the model has a label.
            conditions: Values of the model's conditions by name, [*shape] or [B, *shape].

        Returns:
            Samples float32 [B, *shape], data units.

        Raises:
            CmfastError: the levels do not strictly decrease above sigma_min, or a shape or a condition does not fit.
            CheckFailed: the model returned NaN or infinity.
        """
        sigmas = self.sigmas_for(sigmas=sigmas if sigmas is not None else ())
        noise = own_noise(noise, len(sigmas), self.spec.shape)
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
        """Evaluate f(x, sigma): the raw contract, for algorithms of your own. The result is not clipped.

        Args:
            x: [B, *shape] float32, data units plus noise.
            sigma: Noise level, data units: a number, or one per sample [B]; above 0 and at most sqrt(2) sigma_max,
                where Heun's churn goes.
            label: A class, or one per sample [B], by number or by name; needed exactly when the model has a label.
            sigma_next: Of a flow map, the noise level to go to, from 0, below sigma; None: 0.
            conditions: Values of the model's conditions by name, [*shape] or [B, *shape].

        Returns:
            x0, float32 [B, *shape], data units.

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

    def encode(self, conditions: Conditions) -> dict[str, Any]:
        """Encode the conditions that have an encoder: NAME becomes NAME_encoded, which `sample` takes too.

        Args:
            conditions: Values by name.

        Returns:
            The values; what is for all samples stays so, [*sizes], and [n, *shape] becomes [n, *sizes].
        """
        return self._given(None, conditions)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What may be passed by name: the file's conditions, and those of its encoders."""
        return (*self._encoders.conditions, *self.spec.conditions)

    def sigmas_for(self, steps: int | None = None, sigmas: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return the noise levels that `sample` uses for these arguments.

        Args:
            steps: Network calls per sample; None: as many as `sigmas` has, else the fewest that have a default.
            sigmas: Noise levels, data units, strictly decreasing; None: the defaults for `steps`.

        Returns:
            The noise levels, data units, decreasing.

        Raises:
            CmfastError: the model has no default for so many steps, the file is a sampler built for others, or the
                levels do not strictly decrease inside the model's range.
        """
        if self.manifest.kind != "denoiser":
            (built,) = self.spec.sigmas.values()
            wanted = as_sigmas(sigmas) if sigmas is not None else built
            if steps is not None:
                steps = whole_number("number of steps", steps, 1)
            if wanted != tuple(built) or steps not in (None, len(built)):
                raise CmfastError(
                    f"this file is a sampler of {len(built)} step(s), at {', '.join(f'{s:g}' for s in built)}, "
                    "and runs no others; a denoiser runs any: cmfast-export model.pt --kind denoiser"
                )
            return tuple(built)
        return self.spec.sigmas_for(steps, sigmas)

    def labels(self, n: int, *, seed: int = 0, label: Label | Labels | None = None, first: int = 0) -> Labels | None:
        """Return the class of each of n samples that `sample` uses.

        Args:
            n: How many.
            seed: Of the classes that are drawn.
            label: As `sample` takes it. A text is looked up among the names of the classes and read as a number;
                "+7" is always the number.
            first: Index of the first sample.

        Returns:
            Classes int64 [n]; None for a model without a label.

        Raises:
            CmfastError: the model has no label, or none of this number or name.
        """
        return labels_of(self.spec, n, seed, label, first)

    def values(
        self, n: int, label: Label | npt.ArrayLike | None = None, conditions: Conditions | None = None
    ) -> Arrays:
        """Return the conditions of n samples, checked; nothing is drawn from a seed.

        Args:
            n: How many.
            label: A class, or n of them, by number or by name.
            conditions: Values of the model's conditions by name, [*shape] or [n, *shape].

        Returns:
            Conditions by name, int64 [n] or float32 [n, *shape].

        Raises:
            CmfastError: a condition is missing, unknown or does not fit.
        """
        given = self._given(label, conditions)
        if self.spec.classes and given.get(LABEL) is None:
            raise CmfastError(f"this model is class-conditional; give a label from 0 to {self.spec.classes - 1}")
        return self._checked(given, n)

    def _given(self, label: Any, conditions: Conditions | None) -> dict[str, Any]:
        """Return what was passed by name, the label among it, encoded where a file for that is open."""
        return self._encoders.encode(given_conditions(label, conditions))

    def _checked(self, given: Mapping[str, Any], n: int) -> Arrays:
        if not self.spec.classes and given.get(LABEL) is not None:
            raise no_label(self.spec.conditions)
        return condition_values(self.spec.conditions, given, n)

    def _few_steps(self, sigmas: tuple[float, ...]) -> Drawing:
        return few_step_drawing(self.backend, self._denoise, sigmas)

    def _heun_steps(self, steps: int, churn: float | Churn) -> Drawing:
        self._check_denoiser()
        return heun_drawing(self._denoise, self.spec, steps, churn)

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
        n, batch = check_number(n, self.spec, self.noun, pixels=pixels), whole_number("batch", batch, 1)
        first, seed = check_range(first, n), portable.check_seed(seed)
        batch = min(self.backend.batch or batch, n)
        check_noise(self.backend, drawing, batch)
        if (drawn := self.labels(n, seed=seed, label=given.get(LABEL), first=first)) is not None:
            given = {**given, LABEL: drawn}
        every = self._checked(given, n)
        return collect(
            self.backend, drawing, every, n, seed, first, batch, pixels=pixels, noun=self.noun, show=progress
        )

    @property
    def noun(self) -> str:
        """What the model draws, for messages: images or samples."""
        return "images" if self.spec.data == "image" else "samples"

    def _denoise(self, x: Floats, sigma: Any, sigma_next: Any, conditions: Arrays) -> Floats:
        return denoised(self.backend, x, sigma, sigma_next, conditions)

    def _check_denoiser(self) -> None:
        if self.manifest.kind != "denoiser":
            raise CmfastError(
                "a sampler graph has no denoiser to call; export one: cmfast-export model.pt --kind denoiser"
            )
