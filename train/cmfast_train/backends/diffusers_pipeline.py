# SPDX-License-Identifier: MIT
"""diffusers' own ConsistencyModelPipeline as a backend, for comparison: cmfast-bench --diffusers.

Nothing else here needs diffusers: `importers.diffusers` reads its folders, and our U-Net runs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cmfast.backends.cuda.runtime import check_process
from cmfast.backends.origin import Origin, pickled
from cmfast.backends.protocol import Inputs, variant_words
from cmfast.errors import BackendError, CmfastError, MissingDependency, OutOfMemory, one_line
from cmfast.formats.manifest import Manifest
from cmfast.schedule import karras_sigmas
from cmfast_train.backends.pytorch import TorchBackend, out_of_memory, set_threads
from cmfast_train.backends.torch_cuda import arithmetic
from cmfast_train.importers import identify
from cmfast_train.importers.facts import Draft
from cmfast_train.networks.adm import AdmConfig
from cmfast_train.torchvision_cpu import torchvision_datasets

Floats = npt.NDArray[np.float32]


def open_folder(
    folder: Path, device: str, threads: int | None, variant: str, precision: str
) -> TorchBackend | DiffusersBackend:
    """Open a diffusers folder: our U-Net with its weights, or as the variant says diffusers' own pipeline."""
    if "diffusers" not in variant_words(variant):
        return TorchBackend(folder, device, threads, variant, precision)
    if variant_words(variant) != ("diffusers",):
        raise BackendError(f"the variant diffusers combines with no other, got {variant!r}")
    if precision not in ("", "fp32"):
        raise BackendError(
            f"{folder}: diffusers' pipeline is run in fp32 only, not in {precision}; without the variant diffusers "
            "our U-Net runs the folder in any"
        )
    return DiffusersBackend(folder, device, threads)


class DiffusersBackend:
    """A diffusers folder run by diffusers; the contract is `cmfast.backends.LoopBackend`."""

    batch: int | None = None
    origin: Origin | None = None

    def __init__(self, folder: os.PathLike[str] | str, device: str = "cpu", threads: int | None = None) -> None:
        torchvision_datasets()  # diffusers imports torchvision, which beside a CPU torch fails without this
        try:
            from diffusers import ConsistencyModelPipeline
        except ModuleNotFoundError as err:
            raise MissingDependency(
                "running diffusers' pipeline", (err.name or "?").split(".")[0], "diffusers"
            ) from None
        draft = identify(folder)
        if not isinstance(draft, Draft) or draft.format != "diffusers" or draft.spec is None:
            raise BackendError(f"{folder}: diffusers runs folders that it wrote")
        if not isinstance(draft.network, AdmConfig):
            raise BackendError(f"{folder}: {draft.what}; the variant diffusers runs a ConsistencyModelPipeline")
        if not draft.spec.clip:
            raise BackendError(f"{folder}: diffusers' pipeline clips its images, and this model's are not (clip false)")
        if (channels := draft.spec.image[0]) != 3:
            # ConsistencyModelPipeline.check_inputs compares latents with (B, 3, S, S), whatever the network: diffusers
            # 0.21 to 0.42. Remove this when it takes the network's own number.
            raise BackendError(
                f"{folder}: diffusers' pipeline takes a first noise of 3 channels only, a fault of diffusers, and this "
                f"model's images have {channels}; leave diffusers out, cmfast runs the folder itself"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("device cuda was requested, but PyTorch finds no CUDA device; use --device cpu")
        set_threads(threads)
        self._process = os.getpid()
        self.manifest = Manifest(kind="denoiser", spec=draft.spec, source=draft.source)
        self.name = f"diffusers {device}"
        self._pipeline = ConsistencyModelPipeline.from_pretrained(folder, local_files_only=True).to(device)
        self._pipeline.set_progress_bar_config(disable=True)

    def __reduce__(self) -> tuple[object, tuple[Origin]]:
        return pickled(self)

    def run(self, inputs: Inputs) -> Floats:
        """Refuse: the pipeline has no single call of the denoiser."""
        raise BackendError("diffusers' pipeline runs the whole loop only, not one call of the denoiser")

    def loop(self, noise: Floats, sigmas: Sequence[float], conditions: Inputs) -> Floats:
        """Return images [B, C, H, W] in [-1, 1] from unit noise [K, B, C, H, W], by one call of the pipeline."""
        if self._pipeline.device.type == "cuda":
            check_process(self._process, self.name)
        timesteps, label = self._timesteps(sigmas), conditions.get("label")
        steps = [torch.from_numpy(np.require(z, requirements=["C", "W"])).to(self._pipeline.device) for z in noise]
        try:
            with _noise(steps[1:]), arithmetic(tf32=False):
                (images,) = self._pipeline(
                    batch_size=len(steps[0]),
                    class_labels=None if label is None else label.tolist(),
                    num_inference_steps=None,
                    timesteps=timesteps,
                    latents=steps[0],
                    output_type="np",
                    return_dict=False,
                )
        except (RuntimeError, MemoryError) as err:
            if not out_of_memory(err):
                raise
            raise OutOfMemory(f"{self.name} is short of memory; try a smaller batch: {one_line(err)}") from None
        return np.ascontiguousarray(np.moveaxis(images * 2 - 1, -1, 1), np.float32)

    def _timesteps(self, sigmas: Sequence[float]) -> list[int]:
        """Return what diffusers calls timesteps: indices into the grid, 0 = sigma_max, the last step's first."""
        spec = self.manifest.spec
        if sigmas[0] != spec.sigma_max:
            raise CmfastError(f"diffusers' pipeline starts at sigma_max, {spec.sigma_max:g}, not at {sigmas[0]:g}")
        grid = np.array(karras_sigmas(spec.grid, spec.sigma_min, spec.sigma_max))
        indices = [int(np.abs(np.log(grid / sigma)).argmin()) for sigma in sigmas]
        for sigma, index in zip(sigmas, indices, strict=True):
            if abs(grid[index] / sigma - 1) > 1e-6:
                raise CmfastError(
                    f"diffusers samples at the {spec.grid} levels of its grid only; {sigma:g} is none of them"
                )
        return indices[::-1]


@contextmanager
def _noise(steps: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let the scheduler take its noise from `steps`: the pipeline itself takes the first only."""
    from diffusers.schedulers import scheduling_consistency_models

    module: Any = scheduling_consistency_models  # it imports the function that is replaced here
    rest = iter(steps)
    original = module.randn_tensor

    def next_noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, **_: object) -> torch.Tensor:
        z = next(rest, None)  # after its last step it draws noise too, and multiplies it by zero
        return torch.zeros(shape, dtype=dtype, device=device) if z is None else z.to(device, dtype)

    module.randn_tensor = next_noise
    try:
        yield
    finally:
        module.randn_tensor = original
