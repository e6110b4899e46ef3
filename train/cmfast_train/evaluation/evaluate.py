# SPDX-License-Identifier: MIT
"""The quality of samples: theirs and the data's features compared, and the time that an image takes.

    reference = Reference(features, images, ("fd", "pr"))       the data's side, computed once
    row = few_steps(cmfast.load("model.onnx"), (80.0, 0.8), n=10_000, ...)
    row |= reference.measure(row.pop("images"))

The metrics are in `metrics`, what they look at in `features`; `cli.evaluate` is the command. Samples are 8-bit images,
as they are written to files, so that a file of samples has the numbers of the model that drew it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError, CmfastWarning
from cmfast.formats.manifest import check_file
from cmfast.model import Model
from cmfast.progress import progress_bar
from cmfast.sampling import heun_calls
from cmfast.shards.drawing import Drawer, ShardRequest, draw_together
from cmfast.shards.files import read_shards, shards_in
from cmfast_train.border import naming, reading
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.image_arrays import read_npz_array
from cmfast_train.data.image_folders import walk
from cmfast_train.data.image_reader import read_sample
from cmfast_train.data.images import MNIST_KINDS, MNIST_SIDES, Data, image_data, load_data
from cmfast_train.evaluation.features import Classifier, Inception, Pixels, extract
from cmfast_train.evaluation.metrics import (
    add_fake,
    all_are_data,
    check_numbers,
    frechet_metric,
    inception_score,
    kernel_distance,
    precision_recall,
)

Bytes = npt.NDArray[np.uint8]
READ = 500  # images of the data at a time
KEPT = 25_000  # features of each half of the data that kid and pr look at; fd looks at all


class Reference:
    """The data: what samples are compared with.

    halves  the metrics of one random half of the data against the other, for scale; of `is`, which needs no data, the
            data's own. Half as many images as in a comparison with samples
    """

    def __init__(
        self,
        features: Pixels | Classifier | Inception,
        images: Data,
        metrics: Sequence[str],
        *,
        seed: int = 0,
        device: str = "cpu",
        progress: bool = False,
    ) -> None:
        """Compute the features of all images. The seed draws the halves and all subsets."""
        self.metrics, self.seed, self._features, self._device = tuple(metrics), seed, features, device
        if "is" in self.metrics and features.head is None:
            raise CmfastError("--metrics is: these features are not a classifier's, so there is no score; leave it out")
        check_numbers(self.metrics, len(images) // 2, len(images) // 2)
        self._frechet = frechet_metric(features.num_features)
        halves = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).chunk(2)
        kept = []
        with progress_bar("data", len(images), "images", show=progress) as advance:
            for half, real in zip(halves, (True, False), strict=True):
                parts, number = [], 0
                for part in extract(features, _image_batches(images, half), device):
                    self._frechet.update(part.double(), real=real)
                    if number < KEPT:
                        parts.append(part)
                    number += len(part)
                    advance(len(part), "")
                kept.append(torch.cat(parts))
        distance = float(self._frechet.compute())
        self.halves = self._measure(kept[0], kept[1], lambda: distance)
        all_are_data(self._frechet)
        self._real = torch.cat(kept)

    def measure(self, images: Bytes) -> dict[str, float]:
        """Return the metrics of samples, uint8 [N, H, W, C], by name."""
        check_numbers(self.metrics, len(self._real), len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed)).numpy()
        parts = (torch.from_numpy(images[order[i : i + READ]]) for i in range(0, len(images), READ))
        fake = torch.cat(list(extract(self._features, (part.permute(0, 3, 1, 2) for part in parts), self._device)))
        return self._measure(self._real, fake, lambda: add_fake(self._frechet, fake))

    def _measure(self, real: Tensor, fake: Tensor, frechet: Callable[[], float]) -> dict[str, float]:
        found: dict[str, float] = {}
        if "fd" in self.metrics:
            found["fd"] = frechet()
        if "kid" in self.metrics:
            found["kid_mean"], found["kid_std"] = kernel_distance(real, fake, self.seed)
        if "pr" in self.metrics:
            found["precision"], found["recall"] = precision_recall(real, fake)
        if "is" in self.metrics and self._features.head is not None:
            with torch.inference_mode():
                logits = self._features.head(fake.to(self._device)).cpu()
            found["is_mean"], found["is_std"] = inception_score(logits, self.seed)
        return found


def few_steps(
    model: Model, sigmas: Sequence[float], n: int, *, seed: int = 0, batch: int = 64, progress: bool = False
) -> dict[str, Any]:
    """Return a row {steps, calls, sigmas, n, ms_per_image, images} of n samples at these noise levels."""
    images, ms = _timed(
        lambda count, first: model.sample(
            count, sigmas=sigmas, seed=seed, batch=batch, first=first, progress=progress and count > batch
        ),
        n,
        model.backend.batch or batch,
    )
    calls = len(sigmas)
    return {"steps": calls, "calls": calls, "sigmas": list(sigmas), "n": n, "ms_per_image": ms, "images": images}


def heun_steps(
    model: Model, steps: int, n: int, *, seed: int = 0, batch: int = 64, progress: bool = False
) -> dict[str, Any]:
    """Return a row {heun, calls, n, ms_per_image, images} of n samples of a teacher, by Heun's method."""
    images, ms = _timed(
        lambda count, first: model.sample_heun(
            count, steps=steps, seed=seed, batch=batch, first=first, progress=progress and count > batch
        ),
        n,
        model.backend.batch or batch,
    )
    return {"heun": steps, "calls": heun_calls(steps), "n": n, "ms_per_image": ms, "images": images}


def data_images(data_set: str, root: Path | None, image: tuple[int, int, int], what: str = "the samples") -> Data:
    """Return the training images of a preset, which must have the shape [C, H, W] of what they are compared with."""
    config = PRESETS[data_set]
    if data_set == "folder" and root is not None:
        return image_data(root, image[1:], image[0], labelled=False)
    if config.data in MNIST_KINDS and tuple(image[1:]) in MNIST_SIDES:
        config = replace(config, image_size=image[1])
    images = load_data(config, root)
    have = (config.channels, *config.image_sides)
    if have != tuple(image):
        raise CmfastError(f"{what} are images {list(image)}, those of {data_set} are {list(have)}")
    return images


def cluster_steps(model: Model, request: ShardRequest, drawer: Drawer, *, progress: bool = False) -> dict[str, Any]:
    """Return the row of `few_steps` or `heun_steps` of samples that others draw: without the time of an image."""
    with redirect_stdout(sys.stderr):  # what Ray says about lost workers goes to stdout, and so does the table
        images = draw_together(model, request, drawer, show=progress)
    if request.heun is not None:
        return {"heun": request.heun, "calls": heun_calls(request.heun), "n": request.n, "images": images}
    calls = len(request.sigmas)
    return {"steps": calls, "calls": calls, "sigmas": list(request.sigmas), "n": request.n, "images": images}


def is_samples(path: Path) -> bool:
    """Whether a path is a file or folder of samples, not of a model: .npz, or a folder with images or shards in it."""
    if not path.is_dir():
        return path.suffix.lower() == ".npz"
    model = any((path / name).exists() for name in ("model_index.json", "model.pt"))
    return not model and bool(shards_in(path) or _images_in(path))


def read_samples(path: Path, n: int | None, channels: int | None = None) -> Bytes:
    """Return the first n samples, or all, uint8 [N, H, W, C]: arr_0 of an .npz or of shards, or images by name.

    Args:
        channels: what they are compared with, where that is known: a palette of greys is grey where that is 1

    Raises:
        ArtifactError: the file or folder holds no such samples.
        CmfastError: it holds fewer than n.
    """
    if path.is_dir() and shards_in(path):
        images, _ = read_shards(path, n)
    elif path.is_dir():
        images = _read_folder(path, n, channels)
    else:
        images = read_npz_array(path, "arr_0", "no arr_0 in it, where cmfast-sample -o NAME.npz puts images")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ArtifactError(
            f"{path}: samples are uint8 [N, H, W, 1 or 3] as cmfast-sample writes them, these are {images.dtype} "
            f"{list(images.shape)}"
        )
    if n is not None and len(images) < n:
        raise CmfastError(f"{path}: {n:,} samples were requested, it has {len(images):,}")
    return images[:n]


def training_of(run: Path, data_set: str) -> dict[str, Any]:
    """Return from a run's config.json and log.jsonl what its training was: phases, images seen, seconds."""
    with reading(run, "its config.json or log.jsonl is damaged"):
        config = json.loads(check_file(run / "config.json").read_text())
        lines = [json.loads(line) for line in check_file(run / "log.jsonl").read_text().splitlines()]
        timed = [(line["images"], line["images_per_s"]) for line in lines if "images_per_s" in line]
        if not all(type(line["images"]) is int for line in lines):
            raise ValueError("a line's images are not a whole number")
        before = [0, *(images for images, _ in timed)]
        seconds = sum((images - start) / speed for start, (images, speed) in zip(before, timed, strict=False))
        seen = max(line["images"] for line in lines)
        phases, batch, trained_on = config["phases"], config["batch"], config["data"]
    if trained_on != PRESETS[data_set].data:
        raise CmfastError(f"{run} was trained on {trained_on}, not on {data_set}")
    return {"images": seen, "seconds": round(seconds, 1), "batch": batch, "phases": phases}


def _timed(draw: Callable[[int, int], Bytes], n: int, batch: int) -> tuple[Bytes, float]:
    """Return draw(n images, from image 0) and the time an image took, ms; where there are more, without batch one."""
    opening = [draw(batch, 0)] if n > batch else []  # warms up
    done = sum(map(len, opening))
    start = time.perf_counter()
    rest = draw(n - done, done)
    ms = 1000 * (time.perf_counter() - start) / len(rest)
    return np.concatenate([*opening, rest]), ms


def _image_batches(images: Data, indices: Tensor) -> Iterator[Tensor]:
    """Yield the images of these indices, uint8 [<= READ, C, H, W]."""
    for part in indices.split(READ):
        got = images.__getitems__(part.tolist())
        if isinstance(got, str):
            raise CmfastError(got)
        yield got[0]


def _images_in(folder: Path) -> list[Path]:
    """Return the images of a folder: its own and those of its folders (`--subdirs`)."""
    with naming(folder):
        return walk(folder)


def _read_folder(path: Path, n: int | None, channels: int | None) -> npt.NDArray[Any]:
    files = _images_in(path)[:n]
    images, lossy = [], 0
    for file in files:
        pixels, jpeg = read_sample(file, channels)
        images.append(pixels)
        lossy += jpeg
    shapes = Counter(image.shape for image in images)
    if len(shapes) > 1:
        usual = shapes.most_common(1)[0][0]
        odd = next(i for i, image in enumerate(images) if image.shape != usual)
        raise CmfastError(
            f"{path}: its images differ in size or colours: {', '.join(map(str, sorted(shapes)[:3]))}; "
            f"{files[odd].relative_to(path)} is {images[odd].shape}, most are {usual}"
        )
    if lossy:
        warnings.warn(
            f"{path}: {lossy:,} of {len(files):,} samples are JPEGs, which are lossy: their distance to the data is "
            "not that of the images that were drawn; save PNGs",
            CmfastWarning,
            stacklevel=2,
        )
    return np.stack(images)
