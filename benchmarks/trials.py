# SPDX-License-Identifier: MIT
"""Networks for the mnist preset, each trained as a diffusion model for some minutes: the error of the denoiser.

    python benchmarks/trials.py --data DIR --out runs/trials --json benchmarks/results/trials_mnist.json

Lengths were chosen for 190 to 220 seconds on two idle cores; the record has what each took. The error is the mean
square over the pixels of 2,000 test images, with noise that is the same for all, at eight noise levels. High levels
decide what is drawn, low ones how sharp it is. Runs that are finished are not made again.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.files import check_outputs, write_text
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import to_unit_range
from cmfast_train.evaluation.evaluate import training_of
from cmfast_train.training.trainer import train

SIGMAS = (80.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.05)
IMAGES = 2_000
PIXELS = ("patch=1", "model_channels=32", "channel_mult=1,2,2")
TRIALS: dict[str, tuple[str, ...]] = {
    "2x2 pixels in 64 channels, batch 64": ("batch=64", "phases=edm:90000"),
    "2x2 pixels in 64 channels, batch 128": ("batch=128", "phases=edm:110000"),
    "pixels in 32 channels, batch 64": (*PIXELS, "batch=64", "phases=edm:40000"),
}
USUAL = ("edm.lr=1e-3", "edm.ema=0.998", "edm.lr_decay=0.5", "checkpoint_images=10000000", "log_images=6400")


@click.command("trials.py")
@click.option("--data", type=click.Path(path_type=Path), required=True, envvar="CMFAST_DATA", help="Has MNIST/raw.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(data: Path, out: Path, json_file: Path | None) -> None:
    """Train each network, and measure the errors of its denoiser."""
    check_outputs({"--json": json_file})
    images, labels = test_images(data)
    rows = []
    for name, settings in TRIALS.items():
        run = out / name.replace(",", "").replace(" ", "_")
        config = override(PRESETS["mnist"], [*settings, *USUAL])
        train(config, run, data)  # finished runs stay, and runs of other settings are refused
        seen = training_of(run, "mnist")
        rows.append({"name": name, "settings": list(settings), "training": seen, "errors": errors(run, images, labels)})
        shown = "  ".join(f"{error:.4f}" for error in rows[-1]["errors"])
        click.echo(f"{name:<40} {seen['images']:>9,} images {seen['seconds']:6.0f} s  {shown}")
    if json_file is not None:
        record: dict[str, Any] = {"what": "trials", **provenance(), "sigmas": SIGMAS, "images": IMAGES, "rows": rows}
        write_text(json_file, json.dumps(record, indent=1) + "\n")


def test_images(data: Path) -> tuple[Tensor, Tensor]:
    """Return some of MNIST's test images, float32 [N, 1, 28, 28] in [-1, 1], and their classes."""
    read = []
    for name, head in (("images-idx3", 16), ("labels-idx1", 8)):
        file = data / "MNIST" / "raw" / f"t10k-{name}-ubyte"
        content = file.read_bytes() if file.exists() else gzip.decompress(file.with_suffix(".gz").read_bytes())
        read.append(torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).copy()))
    return to_unit_range(read[0].reshape(-1, 1, 28, 28)[:IMAGES]), read[1][:IMAGES].long()


def errors(run: Path, images: Tensor, labels: Tensor) -> list[float]:
    """Return the mean square error of a run's denoiser at each noise level."""
    denoiser, found = load_checkpoint(run / "model.pt").denoiser(), []
    with torch.inference_mode():
        for sigma in SIGMAS:
            generator = torch.Generator().manual_seed(1)
            squares = []
            for x0, label in zip(images.split(500), labels.split(500), strict=True):
                x = x0 + sigma * torch.randn(x0.shape, generator=generator)
                squares.append((denoiser(x, torch.full((len(x),), sigma), label=label) - x0).square().mean())
            found.append(float(torch.stack(squares).mean()))
    return found


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
