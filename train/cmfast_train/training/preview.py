# SPDX-License-Identifier: MIT
"""Sample grids of a torch denoiser: the same images that `cmfast-sample` draws from the exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cmfast.conditions import some_values
from cmfast.files import atomic_file
from cmfast.images import grid_image
from cmfast.noise import slices
from cmfast.sampling import sample, to_uint8
from cmfast.spec import ModelSpec


def draw(
    denoise: Any, spec: ModelSpec, n: int, sigmas: tuple[float, ...], seed: int, device: torch.device
) -> np.ndarray:
    """Return n images, float32 [n, C, H, W] in data units, from denoise(x, sigma [B], **conditions)."""
    indices = range(n)
    noise = torch.from_numpy(slices(seed, indices, len(sigmas), spec.shape)).to(device)
    values = some_values(spec.conditions, n, seed=seed)
    conditions = {name: torch.from_numpy(value).to(device) for name, value in values.items()}
    with torch.inference_mode():
        x0 = sample(lambda x, sigma: denoise(x, x.new_full([len(x)], sigma), **conditions), noise, sigmas, spec)
    images: npt.NDArray[np.float32] = x0.float().cpu().numpy()
    return images


def save_grid(denoise: Any, spec: ModelSpec, path: Path, n: int, device: torch.device) -> None:
    """Write a grid of n images of seed 0, drawn in the model's default two steps, or fewest."""
    sigmas = spec.sigmas.get(2) or spec.levels()
    with atomic_file(path) as temporary:
        grid_image(to_uint8(draw(denoise, spec, n, tuple(sigmas), 0, device))).save(temporary, format="PNG")
