# SPDX-License-Identifier: MIT
"""Make a model that comes with cmfast from a finished run: the file, its record, its picture.

    cmfast-train digits --out runs/digits
    python benchmarks/shipped.py digits runs/digits

writes cmfast/models/digits.onnx (float16 weights), benchmarks/results/shipped_digits.json and docs/shipped_digits.png.
The record holds the Fréchet distance at each number of steps; how often a classifier finds the class that was requested
(the one whose features are compared, or where pixels are compared, the nearest training images); how near samples are
to training images, because a model may copy; size, parity and time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch

import cmfast
from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.files import write_text
from cmfast.formats.shipped import FOLDER
from cmfast_export.pipeline import export_onnx
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import Images, load_data
from cmfast_train.evaluation.config import EvalConfig
from cmfast_train.evaluation.evaluate import training_of
from cmfast_train.evaluation.features import Classifier, default_features, extract, load_features
from cmfast_train.evaluation.run import evaluate

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 3_000_000  # of a file: the wheel stays small
NAMES = ("digits", "fashion-mnist", "mnist")
NEIGHBOURS = 3  # training images that vote on the class of a sample
REFERENCE = 20_000  # training images that vote
SAMPLES = 2_000  # that are classified
PICTURE = 64  # samples in the picture

Bytes = npt.NDArray[np.uint8]


@click.command("shipped.py")
@click.argument("name", type=click.Choice(NAMES))
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", help="Folder of the data.")
def command(name: str, run: Path, data: Path | None) -> None:
    """Export RUN/model.pt as the shipped model NAME, and record what it is worth."""
    training = training_of(run, name)
    images = load_data(PRESETS[name], data)
    if not isinstance(images, Images):
        raise CmfastError(f"{name}: its images are not in memory")
    file = FOLDER / f"{name}.onnx"
    file.parent.mkdir(exist_ok=True)
    run_on = provenance()  # before the file is there: the working tree is still clean
    exported = export_onnx(run / "model.pt", file, weights="fp16")
    if (size := file.stat().st_size) > MOST_BYTES:
        raise CmfastError(
            f"{file}: {size:,} bytes, and a shipped model has at most {MOST_BYTES:,}; train a smaller one"
        )
    steps = tuple(sorted(exported.manifest.spec.sigmas))
    found = evaluate(EvalConfig(model=file, data_set=name, data=data, steps=steps))
    model = cmfast.load(file, threads=1)
    classify, of_data = _classifier(name, images)
    record = {
        "what": "shipped model",
        **run_on,
        "name": name,
        "bytes": size,
        "parity": dict(exported.manifest.parity),
        "features": found["features"],
        "rows": [row | _agreement(model, classify, row["steps"]) for row in found["rows"]],
        "halves": found["halves"],
        "label_agreement_of_data": of_data,
        "nearest": _nearest(model, images),
        "ms_per_image_and_step": _time(model),
        "training": training,
    }
    out = ROOT / "benchmarks" / "results" / f"shipped_{name}.json"
    write_text(out, json.dumps(record, indent=1) + "\n")
    labels = [i % model.spec.classes for i in range(PICTURE)]
    cmfast.save_images(ROOT / "docs" / f"shipped_{name}.png", model.sample(PICTURE, steps=2, label=labels))
    click.echo(f"{file}: {size:,} bytes; the record is in {out}")


def _flat(images: Bytes) -> npt.NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32)


def _reference(images: Images) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return training images [N, pixels] and their classes."""
    return _flat(images.images[:REFERENCE].numpy()), images.labels[:REFERENCE].numpy()


def _classifier(name: str, images: Images) -> tuple[Callable[[Bytes], npt.NDArray[np.int64]], float]:
    """Return what finds the classes of images [N, C, H, W], and how often it finds those of data that it has not seen.

    A classifier says that of the test images; of nearest images, each training image is found by the others.
    """
    channels, height, width = images.images.shape[1:]
    features = load_features(default_features(name), (channels, height, width))
    if isinstance(features, Classifier):

        def by_features(samples: Bytes) -> npt.NDArray[np.int64]:
            found = torch.cat(list(extract(features, [torch.from_numpy(samples)])))
            classes: npt.NDArray[np.int64] = features.head(found).argmax(dim=1).numpy()
            return classes

        return by_features, features.config.test_accuracy
    from sklearn.neighbors import KNeighborsClassifier

    pixels, labels = _reference(images)
    some, nearest = slice(0, SAMPLES), KNeighborsClassifier(NEIGHBOURS).fit(pixels, labels)
    near = nearest.kneighbors(pixels[some], NEIGHBOURS + 1)[1][:, 1:]
    voted = [np.bincount(labels[row], minlength=labels.max() + 1).argmax() for row in near]
    return lambda samples: nearest.predict(_flat(samples)), float((np.array(voted) == labels[some]).mean())


def _agreement(model: cmfast.Model, classify: Callable[[Bytes], npt.NDArray[np.int64]], steps: int) -> dict[str, float]:
    """Return how often a sample is found to have the class that it was drawn for."""
    labels = np.arange(SAMPLES) % model.spec.classes
    samples = np.ascontiguousarray(
        model.sample(SAMPLES, steps=steps, seed=1, label=labels.tolist()).transpose(0, 3, 1, 2)
    )
    return {"label_agreement": float((classify(samples) == labels).mean())}


def _nearest(model: cmfast.Model, images: Images) -> dict[str, float]:
    """Return median distances, grey levels a pixel: of ten samples, and of training images, to their nearest."""
    from sklearn.neighbors import NearestNeighbors

    pixels = _flat(images.images.numpy())
    index = NearestNeighbors(n_neighbors=2).fit(pixels)
    samples = model.sample(10, steps=2, seed=2).transpose(0, 3, 1, 2)
    unit = np.sqrt(pixels.shape[1])
    of_samples = index.kneighbors(_flat(samples), 1)[0][:, 0] / unit
    of_data = index.kneighbors(pixels[:SAMPLES], 2)[0][:, 1] / unit
    return {
        "samples_median": float(np.median(of_samples)),
        "samples_least": float(of_samples.min()),
        "data_median": float(np.median(of_data)),
    }


def _time(model: cmfast.Model) -> float:
    """Return the median time of one image in one step, by one thread, ms."""
    times = []
    for seed in range(60):
        begun = time.perf_counter()
        model.sample(1, steps=1, seed=seed)
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[10:])


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
