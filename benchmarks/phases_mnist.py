# SPDX-License-Identifier: MIT
"""The phases of the mnist preset at a tenth to two fifths of their lengths, with RAdam's usual beta2 and with 0.99.

    python benchmarks/phases_mnist.py --data DIR --out runs/phases --json benchmarks/results/phases_mnist.json

What `ect` and then `sid` reach after 2,667 steps of `edm`, 2,667 of `ect` and 667 of `sid`, as long as such phases last
in minutes on a GPU. Runs that are finished are not made again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.files import check_outputs, write_text
from cmfast.model import Model
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.evaluation.evaluate import Reference, data_images, few_steps, training_of
from cmfast_train.evaluation.features import default_features, load_features
from cmfast_train.training.trainer import train

PRESET = "mnist"
IMAGES = {"edm": 256_000, "ect": 256_000, "sid": 64_000}
BETA2 = (0.999, 0.99)
SAMPLES = 2_000


@click.command("phases_mnist.py")
@click.option("--data", type=click.Path(path_type=Path), required=True, envvar="CMFAST_DATA", help="Has MNIST/raw.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(data: Path, out: Path, json_file: Path | None) -> None:
    """Train the phases with each beta2, and measure what ect leaves and what sid makes of it."""
    check_outputs({"--json": json_file})
    image = (PRESETS[PRESET].channels, *PRESETS[PRESET].image_sides)
    features = load_features(default_features(PRESET), image)
    reference = Reference(features, data_images(PRESET, data, image), ("fd",), seed=0, device="cpu")
    rows: list[dict[str, Any]] = []
    for beta2 in BETA2:
        run = out / f"beta2_{beta2}"
        settings = [f"{name}.images={images}" for name, images in IMAGES.items()]
        settings += [f"{name}.beta2={beta2}" for name in IMAGES]
        train(override(PRESETS[PRESET], settings), run, data)  # finished runs stay
        trained = training_of(run, PRESET)
        for after, file in (("ect", run / "phases" / "2_ect.pt"), ("sid", run / "model.pt")):
            model = Model(TorchBackend(load_checkpoint(file)))
            for steps in (1, 2):
                row = few_steps(model, model.sigmas_for(steps), SAMPLES, seed=0, batch=250)
                fd = reference.measure(row.pop("images"))["fd"]
                rows.append({"beta2": beta2, "after": after, "steps": steps, "samples": SAMPLES, "fd": fd})
                click.echo(f"beta2 {beta2}, after {after}, {steps} step(s): Frechet distance {fd:.2f}")
        rows[-1]["training"] = trained
    if json_file is not None:
        record = {"what": "phases", **provenance(), "halves": reference.halves, "rows": rows}
        write_text(json_file, json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
