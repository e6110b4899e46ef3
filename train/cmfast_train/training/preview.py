# SPDX-License-Identifier: MIT
"""Sample grids of a torch denoiser: the same images that `cmfast-sample` draws from the exported file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cmfast.conditions import some_values
from cmfast.files import atomic_file
from cmfast.images import grid_image
from cmfast.noise import slices
from cmfast.sampling import sample, to_uint8
from cmfast.spec import ModelSpec


def draw(
    denoiser: nn.Module, spec: ModelSpec, n: int, sigmas: tuple[float, ...], seed: int, device: torch.device
) -> npt.NDArray[np.float32]:
    """Return n samples of a denoiser, float32 [n, *shape] in data units.

    Args:
        denoiser: called as denoiser(x, sigma [B], **conditions), of a flow map with sigma_next [B] as well.
        spec: its conventions.
        n: number of samples.
        sigmas: noise levels of the steps, descending, data units.
        seed: of noise and conditions, as of `cmfast-sample`.
        device: where the denoiser is.
    """
    indices = range(n)
    noise = torch.from_numpy(slices(seed, indices, len(sigmas), spec.shape)).to(device)
    values = some_values(spec.conditions, n, seed=seed)
    conditions = {name: torch.from_numpy(value).to(device) for name, value in values.items()}

    def denoise(x: Tensor, *one_or_two: float) -> Tensor:
        x0: Tensor = denoiser(x, *(x.new_full([len(x)], sigma) for sigma in one_or_two), **conditions)
        return x0

    with torch.inference_mode():
        x0 = sample(denoise, noise, sigmas, spec)
    samples: npt.NDArray[np.float32] = x0.float().cpu().numpy()
    return samples


def save_grid(denoiser: nn.Module, spec: ModelSpec, path: Path, n: int, device: torch.device) -> None:
    """Write a PNG grid of n images of seed 0, drawn in two steps, or the fewest that the model has defaults for."""
    sigmas = spec.sigmas.get(2) or spec.sigmas_for()
    with atomic_file(path) as temporary:
        grid_image(to_uint8(draw(denoiser, spec, n, tuple(sigmas), 0, device))).save(temporary, format="PNG")
