# SPDX-License-Identifier: MIT
"""Samples of a torch denoiser at a checkpoint: the same that `cmfast-sample` draws from the exported file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    denoiser: nn.Module,
    spec: ModelSpec,
    n: int,
    sigmas: tuple[float, ...],
    seed: int,
    device: torch.device,
    conditions: Mapping[str, Tensor] | None = None,
) -> npt.NDArray[np.float32]:
    """Return n samples of a denoiser, float32 [n, *shape] in data units.

    Args:
        denoiser: called as denoiser(x, sigma [B], **conditions), of a flow map with sigma_next [B] as well.
        spec: its conventions.
        n: number of samples.
        sigmas: noise levels of the steps, descending, data units.
        seed: of the noise, and of the conditions where they are not given, as of `cmfast-sample`.
        device: where the denoiser is.
        conditions: of the n samples, by name.
    """
    indices = range(n)
    noise = torch.from_numpy(slices(seed, indices, len(sigmas), spec.shape)).to(device)
    if not conditions:
        conditions = {k: torch.from_numpy(v) for k, v in some_values(spec.conditions, n, seed=seed).items()}
    given = {name: value[:n].to(device) for name, value in conditions.items()}

    def denoise(x: Tensor, *one_or_two: float) -> Tensor:
        x0: Tensor = denoiser(x, *(x.new_full([len(x)], sigma) for sigma in one_or_two), **given)
        return x0

    with torch.inference_mode():
        x0 = sample(denoise, noise, sigmas, spec)
    samples: npt.NDArray[np.float32] = x0.float().cpu().numpy()
    return samples


def save_samples(
    denoiser: nn.Module, spec: ModelSpec, place: Path, n: int, device: torch.device, shown: Mapping[str, Tensor]
) -> None:
    """Write n samples of seed 0, drawn in two steps, or the fewest that the model has defaults for.

    Args:
        denoiser: as in `draw`.
        spec: its conventions.
        place: the file without its suffix: .png, a grid of images; .npz, "samples" and their conditions.
        n: number of samples.
        device: where the denoiser is.
        shown: conditions of at most n samples, by name, such as those of the first training samples; {}: by the seed.
    """
    sigmas = tuple(spec.sigmas.get(2) or spec.sigmas_for())
    if spec.data == "image":
        with atomic_file(place.with_name(f"{place.name}.png")) as temporary:
            grid_image(to_uint8(draw(denoiser, spec, n, sigmas, 0, device, shown))).save(temporary, format="PNG")
        return
    n = min([n, *map(len, shown.values())])
    samples = draw(denoiser, spec, n, sigmas, 0, device, shown)
    with atomic_file(place.with_name(f"{place.name}.npz")) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = {name: value[:n].cpu().numpy() for name, value in shown.items()}
        np.savez(file, samples=samples, **arrays)
