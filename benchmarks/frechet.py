# SPDX-License-Identifier: MIT
"""Frechet distance between a model's samples and its training data, for several numbers of steps.

    python benchmarks/frechet.py model.onnx --data-set digits --steps 1,2,4
    python benchmarks/frechet.py model.onnx --data-set mnist --data DIR --features benchmarks/features_mnist.safetensors

Two Gaussians are fitted, one to the features of the data, one to those of the samples: |mu1 - mu2|^2 +
tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64 by torchmetrics. The features are pixels or a small classifier's
(`features.py`), so the numbers compare with each other and not with published FIDs, and only at one number of samples:
fewer samples mean a larger distance. The distance between two random halves of the data gives the scale.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import cmfast
from cmfast.artifact import check_file
from cmfast.cli._run import run_command
from cmfast.cli._types import INTS
from cmfast.errors import ArtifactError, CmfastError
from cmfast.files import check_target, write_text
from cmfast.timing import provenance
from cmfast_train.data import FolderImages, Images, load_data, to_unit_range
from cmfast_train.presets import PRESETS
from cmfast_train.torchvision_cpu import torchvision_datasets
from features import Classifier, Pixels, load_features

CHUNK = 500  # images at a time through the features


@click.command("frechet.py")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data-set", type=click.Choice(sorted(PRESETS)), required=True)
@click.option("--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", help="Folder of images; not for digits.")
@click.option("--features", "feature_name", default="pixels", show_default=True, help="pixels, or a .safetensors file.")
@click.option("--steps", type=INTS, default="1,2,4", show_default=True, help="Network calls an image.")
@click.option("-n", "--number", type=int, help="Samples; default: 10000, or as many as there are digits.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch", type=int, default=64, show_default=True, help="Samples drawn at a time.")
@click.option("--train-log", type=click.Path(path_type=Path), help="The run's folder: its length goes into the record.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(
    model: Path,
    data_set: str,
    data: Path | None,
    feature_name: str,
    steps: tuple[int, ...],
    number: int | None,
    seed: int,
    batch: int,
    train_log: Path | None,
    json_file: Path | None,
) -> None:
    """Print the Frechet distance of MODEL's samples to the data set."""
    if json_file is not None:
        check_target(json_file)
    if number is not None and number < 2:
        raise CmfastError(f"-n: a distance needs at least 2 samples, got {number}")
    training = training_of(train_log, data_set) if train_log is not None else None
    loaded = cmfast.load(model)
    levels = {k: loaded.levels(k) for k in steps}
    features = load_features(feature_name, loaded.spec.image)
    images = data_images(data_set, data, loaded.spec.image)
    number = number or (len(images) if data_set == "digits" else 10_000)
    metric = frechet_metric(features)
    halves = add_data(metric, images, seed)
    rows = []
    for k in steps:
        show = sys.stderr.isatty()
        samples = loaded.sample_float(number, sigmas=levels[k], seed=seed, batch=batch, progress=show).clip(-1, 1)
        metric.reset()  # of the samples only
        for part in torch.from_numpy(samples).split(CHUNK):
            metric.update(part.double(), real=False)
        rows.append({"steps": k, "sigmas": list(levels[k]), "n": number, "distance": float(metric.compute())})
        click.echo(f"{k} step(s)  {rows[-1]['distance']:10.4f}   {number:,} samples against {len(images):,} images")
    click.echo(f"data       {halves:10.4f}   one random half of the data against the other, for scale")
    if json_file is not None:
        record = {
            "what": "frechet",
            **provenance(),
            "torchmetrics": version("torchmetrics"),
            "model": {"file": model.name, "engine": loaded.engine.name, "source": dict(loaded.manifest.source)},
            "data_set": data_set,
            "data_images": len(images),
            "features": features_record(features, feature_name),
            "seed": seed,
            "rows": rows,
            "halves": halves,
            "training": training,
        }
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")


def frechet_metric(features: Pixels | Classifier) -> Any:
    """Return torchmetrics' metric on our features; `reset` forgets the samples and keeps the data."""
    torchvision_datasets()  # torchmetrics.image imports torchvision, which needs this beside a CPU build of torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(
        features, reset_real_features=False, normalize=True, input_img_size=features.image
    )
    return metric.set_dtype(torch.float64)


def add_data(metric: Any, images: Images | FolderImages, seed: int) -> float:
    """Add all images to the metric, as data; return the distance between two random halves of them."""
    one, other = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).chunk(2)
    for indices, real in ((one, True), (other, False)):
        for chunk in chunks(images, indices):
            metric.update(chunk, real=real)
    halves = float(metric.compute())
    metric.reset()  # of the samples, whose place the other half had
    for chunk in chunks(images, other):
        metric.update(chunk, real=True)
    return halves


def chunks(images: Images | FolderImages, indices: Tensor) -> Iterator[Tensor]:
    """Yield the images of these indices, float64 [<= CHUNK, C, H, W] in [-1, 1]."""
    for part in indices.split(CHUNK):
        yield to_unit_range(images.__getitems__(part.tolist())[0]).double()


def data_images(data_set: str, root: Path | None, image: tuple[int, int, int]) -> Images | FolderImages:
    """Return the training images, which must have the shape that the model draws."""
    config = PRESETS[data_set]
    if data_set == "folder":
        config = dataclasses.replace(config, channels=image[0], image_size=image[1])
    images = load_data(config, root)
    have = tuple(images.__getitems__([0])[0].shape[1:])
    if have != image:
        raise CmfastError(f"the model draws images {list(image)}, those of {data_set} are {list(have)}")
    return images


def features_record(features: Pixels | Classifier, name: str) -> dict[str, Any]:
    """Return what the record says about the features."""
    if isinstance(features, Pixels):
        return {"name": "pixels", "dimensions": features.num_features}
    digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
    accuracy = features.config.test_accuracy
    return {"name": Path(name).name, "dimensions": features.num_features, "sha256": digest, "test_accuracy": accuracy}


def training_of(run: Path, data_set: str) -> dict[str, Any]:
    """Return from a run's config.json and log.jsonl what its training was: phases, images seen, seconds."""
    try:
        config = json.loads(check_file(run / "config.json").read_text())
        lines = [json.loads(line) for line in check_file(run / "log.jsonl").read_text().splitlines()]
        timed = [(line["images"], line["images_per_s"]) for line in lines if "images_per_s" in line]
        before = [0, *(images for images, _ in timed)]
        seconds = sum((images - start) / speed for start, (images, speed) in zip(before, timed, strict=False))
        seen = max(line["images"] for line in lines)
        phases, batch, trained_on = config["phases"], config["batch"], config["data"]
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as err:
        raise ArtifactError(f"{run}: its config.json or log.jsonl is damaged: {err}") from None
    if trained_on != data_set:
        raise CmfastError(f"{run} was trained on {trained_on}, not on {data_set}")
    return {"images": seen, "seconds": round(seconds, 1), "batch": batch, "phases": phases}


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
