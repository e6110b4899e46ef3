# SPDX-License-Identifier: MIT
"""What half precision costs: a model exported in every precision, its images against float32's, and its engines' sizes.

    python benchmarks/precision.py runs/mnist/model.pt --json benchmarks/results/precision_mnist.json

Images are drawn from the same noise by the ONNX files on the CPU: as ONNX Runtime runs them there, and with the
roundings that a GPU makes (`cmfast_export.graphs.emulate`). Where TensorRT or TensorRT-RTX is installed, engines are
built.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.tensorrt_library import LIBRARIES
from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast.formats.values import PRECISIONS
from cmfast.model import Model
from cmfast.noise import slices
from cmfast_export.graphs.emulate import emulate_file
from cmfast_export.pipeline import export_onnx
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import load_model
from networks import NAMES, parameters, random_model

Floats = npt.NDArray[np.float32]
ENDS = (0.002, 80.0)  # noise levels where half precision would overflow or lose the noise level first


@click.command("precision")
@click.argument("model", default="mnist")
@click.option("--steps", type=int, default=2, show_default=True, help="Network calls an image.")
@click.option("-n", "--number", type=int, default=64, show_default=True, help="Images compared.")
@click.option("--engines/--no-engines", default=True, show_default=True, help="Build engines, where a library is.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the record here.")
def command(model: str, steps: int, number: int, engines: bool, out: Path | None) -> None:
    """Measure MODEL: a checkpoint, or digits, mnist, cifar10, imagenet64 with random weights."""
    check_outputs({"--json": out}, [] if model in NAMES else [model])
    if steps < 1 or number < 1:
        raise CmfastError("--steps and --number must be at least 1")
    checkpoint = random_model(model) if model in NAMES else load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(_measure(checkpoint, steps, number, engines, Path(folder)))
    record = {
        "what": "precision",
        **provenance(),
        "model": {
            "name": model if model in NAMES else Path(model).name,
            "weights": "random" if model in NAMES else "trained",
            "sha256": checkpoint.sha256(),
            "image": list(checkpoint.spec.image),
            "parameters": parameters(checkpoint),
        },
        "steps": steps,
        "images": number,
        "rows": rows,
    }
    click.echo(json.dumps(record, indent=1))
    if out:
        write_text(out, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {out}")


def _measure(checkpoint: Checkpoint, steps: int, number: int, engines: bool, folder: Path) -> Iterator[dict[str, Any]]:
    exact: dict[str, Floats] = {}
    for precision in PRECISIONS:
        click.echo(f"exporting in {precision}", err=True)
        files = {kind: folder / f"{precision}_{kind}.onnx" for kind in ("denoiser", "sampler")}
        made = export_onnx(checkpoint, files["denoiser"], precision=precision)
        export_onnx(checkpoint, files["sampler"], kind="sampler", steps=steps, precision=precision)
        ways = {} if precision == "bf16" else {"as this CPU runs it": files}
        if precision != "fp32":
            emulated = {kind: emulate_file(file, folder / f"emulated_{kind}.onnx") for kind, file in files.items()}
            ways["roundings of a GPU"] = emulated
        found = {}
        for way, each in ways.items():
            images = _images({kind: Model(OnnxRuntimeBackend(file)) for kind, file in each.items()}, steps, number)
            exact = exact or images
            found[way] = {name: _difference(images[name], exact[name]) for name in images}
        yield {
            "precision": precision,
            "parity": dict(made.manifest.parity),
            "against_float32": found,
            "onnx_bytes": {kind: file.stat().st_size for kind, file in files.items()},
            "engines": _engines(files) if engines else None,
        }


def _images(models: dict[str, Model], steps: int, number: int) -> dict[str, Floats]:
    """Return what a model draws, and what it denoises at both ends of the noise levels; all must be numbers."""
    spec = models["denoiser"].spec
    noise = slices(0, range(number), steps, spec.image)
    label = models["denoiser"].labels(number)
    sigmas = models["sampler"].sigmas_for()
    images = {f"{steps} step(s)": models["sampler"].from_noise(noise, sigmas, label)}
    for sigma in ENDS:
        images[f"denoised at sigma {sigma:g}"] = models["denoiser"].denoise(np.float32(sigma) * noise[0], sigma, label)
    for name, values in images.items():
        if not np.isfinite(values).all():
            raise CheckFailed(f"{name}: not all are numbers")
    return images


def _difference(ours: Floats, exact: Floats) -> dict[str, float | None]:
    """Return the largest difference, and the PSNR for images in [-1, 1], dB; None where they are equal to the bit."""
    mse = float(np.square(ours.astype(np.float64) - exact).mean())
    return {
        "max_abs": float(np.abs(ours - exact).max()),
        "psnr_db": round(10 * math.log10(4 / mse), 2) if mse else None,
    }


def _engines(files: dict[str, Path]) -> dict[str, Any]:
    """Return the size and the build time of both kinds by each library that can build here, or why it cannot."""
    found: dict[str, Any] = {}
    for library in LIBRARIES:
        try:
            built = {
                kind: build_engine(file, file.with_suffix(".engine"), BuildOptions(library=library))
                for kind, file in files.items()
            }
        except CmfastError as err:
            found[library] = str(err)
            continue
        sizes = {kind: each.path.stat().st_size for kind, each in built.items()}
        found[library] = {
            "version": built["sampler"].manifest.engine["version"],
            "bytes": sizes,
            "sampler_over_denoiser": round(sizes["sampler"] / sizes["denoiser"], 4),
            "build_s": {kind: round(each.seconds, 1) for kind, each in built.items()},
        }
    return found


if __name__ == "__main__":
    run_command(command)
