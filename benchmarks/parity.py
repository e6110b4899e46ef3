# SPDX-License-Identifier: MIT
"""Exported files against PyTorch, every weight random: worst error, boundary condition, sizes, time to export.

    python benchmarks/parity.py --json benchmarks/results/parity.json

The networks are those of the presets, the weights random at trained scale (a new U-Net would compute c_skip x).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from cmfast.backends import open_backend
from cmfast.bench.timing import provenance
from cmfast.cli.parameters import INTS
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast.model import Model
from cmfast.noise import slices
from cmfast_export.verify import verify_denoiser
from cmfast_train.checkpoint import save_checkpoint
from networks import parameters, random_model


@click.command("parity")
@click.option("--batches", type=INTS, default="1,2,7,64,256", show_default=True, help="Batch sizes to compare at.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the record here.")
def command(batches: tuple[int, ...], out: Path | None) -> None:
    """Export random networks of the presets' sizes and measure how far the files are from PyTorch."""
    check_outputs({"--json": out})
    if min(batches) < 1:
        raise CmfastError(f"--batches must be at least 1, got {min(batches)}")
    rows = [_measure(preset, batches) for preset in ("mnist", "cifar10")]
    for row in rows:
        click.echo(json.dumps(row, indent=1))
    if out:
        record = {"what": "parity", **provenance(), "batches": list(batches), "rows": rows}
        write_text(out, json.dumps(record, indent=1) + "\n")


def _measure(preset: str, batches: tuple[int, ...]) -> dict[str, Any]:
    checkpoint = random_model(preset)
    with tempfile.TemporaryDirectory() as folder:
        model, denoiser, sampler = (Path(folder) / name for name in ("model.pt", "denoiser.onnx", "sampler.onnx"))
        save_checkpoint(checkpoint, model)
        seconds = _export(model, "-o", denoiser)
        _export(model, "--kind", "sampler", "--steps", "2", "-o", sampler)
        reference, ours = open_backend(model), open_backend(denoiser)
        found = [verify_denoiser(ours, reference, (batch,)) for batch in batches]
        return {
            "network": preset,
            "parameters": parameters(checkpoint),
            "max_abs": {str(b): parity.worst.max_abs for b, parity in zip(batches, found, strict=True)},
            "boundary": max(parity.boundary for parity in found if parity.boundary is not None),
            "export_and_verify_s": round(seconds, 1),
            "sampler_against_python_loop": _loop_difference(Model(open_backend(sampler)), Model(ours)),
            "sampler_against_pytorch_loop": _loop_difference(Model(open_backend(sampler)), Model(reference)),
            "denoiser_bytes": denoiser.stat().st_size,
            "sampler_bytes": sampler.stat().st_size,
            "sampler_over_denoiser": round(sampler.stat().st_size / denoiser.stat().st_size, 4),
        }


def _export(*arguments: object) -> float:
    """Run cmfast-export as a user does; return the seconds of the whole process."""
    start = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "cmfast_export.cli", *map(str, arguments)]).returncode
    if status:
        raise CheckFailed(f"cmfast-export {arguments[0]} failed with exit status {status}")
    return time.perf_counter() - start


def _loop_difference(sampler: Model, denoiser: Model) -> float:
    """Return the largest difference of the sampler graph and the Python loop over a denoiser, same noise, batch 8."""
    sigmas = sampler.sigmas_for()
    noise = slices(3, range(8), len(sigmas), sampler.spec.image)
    label = denoiser.labels(8, seed=3)
    return float(np.abs(sampler.from_noise(noise, sigmas, label) - denoiser.from_noise(noise, sigmas, label)).max())


if __name__ == "__main__":
    run_command(command)
