# SPDX-License-Identifier: MIT
"""The best second noise level of two: golden-section search on ln(sigma).

Two steps, sigma_max and one level more, and a distance to the data that first falls with that level and then rises:
too little noise changes nothing, too much forgets the first step. All else, the seed too, stays as it is.
The metrics are in `evaluate`, the command is cmfast-eval --search.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import check_target
from cmfast.formats.table import format_of, read_manifest
from cmfast.schedule import karras_sigmas
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import Checkpoint, is_cmfast_checkpoint, load_checkpoint, read_tensors, save_checkpoint

RATIO = (math.sqrt(5) - 1) / 2  # 0.618: what is left of the interval after each evaluation
Tried = list[tuple[float, float]]  # (noise level, distance)


def golden_section(f: Callable[[float], float], low: float, high: float, calls: int) -> Tried:
    """Return (x, f(x)) of every evaluation, in order: `calls` of them, at least 2, none at the ends.

    Where f falls and then rises, its minimum is within (high - low) * RATIO^(calls - 1) of the best x (Kiefer 1953).
    """
    if not low < high or calls < 2:
        raise CmfastError(f"a search needs low < high and at least 2 evaluations, got {low:g}, {high:g} and {calls}")
    x, y = high - RATIO * (high - low), low + RATIO * (high - low)
    tried = [(x, f(x)), (y, f(y))]
    (_, f_x), (_, f_y) = tried
    while len(tried) < calls:
        if f_x <= f_y:
            high, y, f_y = y, x, f_x
            x = high - RATIO * (high - low)
            f_x = f(x)
            tried.append((x, f_x))
        else:
            low, x, f_x = x, y, f_y
            y = low + RATIO * (high - low)
            f_y = f(y)
            tried.append((y, f_y))
    return tried


def search_level(distance: Callable[[float], float], spec: ModelSpec, low: float, high: float, calls: int) -> Tried:
    """Return (second noise level, distance) of every different level tried, in order.

    Levels have four digits, or are those of the grid that the model was trained on.
    """
    sigmas = karras_sigmas(spec.grid, spec.sigma_min, spec.sigma_max)[1:-1] if spec.grid else ()
    found: dict[float, float] = {}

    def evaluate(log_sigma: float) -> float:
        sigma = math.exp(log_sigma)
        level = min(sigmas, key=lambda s: abs(math.log(s / sigma))) if sigmas else float(f"{sigma:.4g}")
        if level not in found:
            found[level] = distance(level)
        return found[level]

    golden_section(evaluate, math.log(low), math.log(high), calls)
    return list(found.items())


def bounds(spec: ModelSpec, wanted: tuple[float, ...] | None) -> tuple[float, float]:
    """Return the two noise levels to search between, checked.

    By default from a tenth to twenty times sigma_data, inside 10 sigma_min and sigma_max / 4: far below sigma_data
    noise hides nothing, far above it everything, and on either side the distance hardly depends on the level.
    """
    if wanted is None:
        wanted = (
            max(spec.sigma_data / 10, 10 * spec.sigma_min),
            min(20 * spec.sigma_data, spec.sigma_max / 4),
        )
    if len(wanted) != 2 or not spec.sigma_min < wanted[0] < wanted[1] < spec.sigma_max:
        raise CmfastError(
            f"--search-bounds are two noise levels, rising, between sigma_min and sigma_max of the model "
            f"({spec.sigma_min:g} and {spec.sigma_max:g}), got {', '.join(f'{s:g}' for s in wanted)}"
        )
    return wanted[0], wanted[1]


def own_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint whose schedule can be written; anything else is an error."""
    if path.suffix.lower() not in (".pt", ".pth", ".safetensors"):
        raise CmfastError(
            f"{path}: --search is for a checkpoint, model.pt or .safetensors, whose levels can be written"
        )
    if not path.is_dir() and path.exists() and not is_cmfast_checkpoint(read_tensors(path)):
        raise CmfastError(f"{path}: not a checkpoint of cmfast; make it one: cmfast-export {path} --format cmfast")
    return load_checkpoint(path)


def check_writable(path: Path) -> None:
    """Raise CmfastError unless levels can be written into the checkpoint: before the search, not after it."""
    check_target(path)


def write_sigmas(path: str | os.PathLike[str], sigmas: tuple[float, float], sha256: str | None = None) -> None:
    """Make these the default noise levels for 2 steps of a checkpoint, atomically; its weights stay as they are.

    Args:
        sha256: of the weights that the levels are of: others, of a run that goes on meanwhile, do not get them
    """
    checkpoint = load_checkpoint(path)
    if sha256 is not None and checkpoint.sha256() != sha256:
        raise ArtifactError(
            f"{path} has other weights now than those that were searched, so nothing was written; search again when no "
            "training writes it"
        )
    spec = replace(checkpoint.spec, sigmas={**checkpoint.spec.sigmas, 2: sigmas})
    save_checkpoint(replace(checkpoint, spec=spec), path)


def exported_with_others(path: Path, sha256: str, sigmas: tuple[float, float]) -> list[Path]:
    """Return the exported files beside a checkpoint, of weights with this SHA-256, with other levels for 2 steps."""
    found = []
    for file in sorted(path.parent.iterdir()):
        if format_of(file) and file.is_file():
            try:
                manifest = read_manifest(file)
            except ArtifactError:
                continue  # not ours
            if manifest.source.get("sha256") == sha256 and manifest.spec.sigmas.get(2) not in (None, sigmas):
                found.append(file)
    return found
