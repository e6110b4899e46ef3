# SPDX-License-Identifier: MIT
"""Images to train on: uint8 [N, C, H, W] with labels, in an order that depends on the step alone.

The order is a function of (seed, step), so a resumed run sees what an uninterrupted one would have seen,
and any number of processes share one batch. Nothing is downloaded unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmfast.errors import CmfastError, MissingDependency
from cmfast_train.config import TrainConfig

Batch = tuple[Tensor, Tensor]  # images uint8 [B, C, H, W], labels int64 [B]


class Images(Dataset[Batch]):
    """Images in memory: `images` uint8 [N, C, H, W], `labels` int64 [N], `classes` (0: the data have none)."""

    def __init__(self, images: Tensor, labels: Tensor, classes: int) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.images[indices], self.labels[indices]


class FolderImages(Dataset[Batch | str]):
    """An ImageFolder (one sub-folder a class) read from disk: short side resized, centre cropped."""

    def __init__(self, root: Path, size: int, channels: int) -> None:
        from cmfast_train.torchvision_cpu import torchvision_datasets

        datasets = torchvision_datasets()
        from torchvision import transforms

        steps = [
            transforms.Resize(size, antialias=True),
            transforms.CenterCrop(size),
            *([transforms.Grayscale()] if channels == 1 else []),
            transforms.PILToTensor(),
        ]
        try:
            self.folder = datasets.ImageFolder(str(root), transforms.Compose(steps))
        except FileNotFoundError as err:
            raise CmfastError(f"{root} is no folder of images by class (ROOT/class/name.png): {err}") from None
        self.classes = len(self.folder.classes)

    def __len__(self) -> int:
        return len(self.folder)

    def __getitems__(self, indices: list[int]) -> Batch | str:
        try:
            images, labels = zip(*(self.folder[i] for i in indices), strict=True)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
            return self._first_unreadable(indices) or str(err)
        return torch.stack(images), torch.tensor(labels)

    def _first_unreadable(self, indices: list[int]) -> str | None:
        """Return what is wrong with which file. A string, for an exception leaves a worker as a printed traceback."""
        for i in indices:
            try:
                self.folder[i]
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
                return f"cannot read the image {self.folder.samples[i][0]}: {err}"
        return None


def load_data(config: TrainConfig, root: Path | None) -> Images | FolderImages:
    """Return the training images of a run. root: where the files are, not needed for digits."""
    if config.data == "digits":
        data: Images | FolderImages = _digits()
    elif root is None:
        raise CmfastError(f"the data set {config.data} is read from a folder: --data DIR, or CMFAST_DATA=DIR")
    elif not root.is_dir() and not config.download:
        raise CmfastError(f"the data folder {root} does not exist")
    elif config.data == "folder":
        data = FolderImages(root, config.image_size, config.channels)
    else:
        data = _torchvision(config, root)
    side, channels = config.image_size, config.channels
    have = tuple(_batch(data.__getitems__([0]))[0].shape[1:])
    if have != (channels, side, side):
        raise CmfastError(
            f"the images are {list(have)}, the run says {[channels, side, side]}: --set image_size, channels"
        )
    return data


def batches(
    data: Images | FolderImages, batch: int, seed: int, start: int, stop: int, share: slice, workers: int, pin: bool
) -> Iterator[Batch]:
    """Yield this process's share of the batches of steps start .. stop - 1.

    batch  images per step, summed over processes
    share  which of them this process takes
    """
    sampler = _StepIndices(len(data), batch, seed, start, stop, share)
    loader = DataLoader(
        data,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
    )
    yield from map(_batch, loader)


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class _StepIndices:
    """The indices of each step: one shuffle of the data an epoch, epochs end to end."""

    def __init__(self, n: int, batch: int, seed: int, start: int, stop: int, share: slice) -> None:
        self.n, self.batch, self.seed, self.start, self.stop, self.share = n, batch, seed, start, stop, share

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.stop):
            indices = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.n != epoch:
                    epoch = position // self.n
                    order = torch.randperm(
                        self.n, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    )
                indices.append(int(order[position % self.n]))
            yield indices[self.share]


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise MissingDependency("the digits data set", "scikit-learn", "train") from None
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)
    return Images(images[:, None], torch.from_numpy(digits.target).long(), 10)


def _torchvision(config: TrainConfig, root: Path) -> Images:
    from cmfast_train.torchvision_cpu import torchvision_datasets

    datasets = torchvision_datasets()
    folder = {"mnist": root / "MNIST" / "raw", "cifar10": root / "cifar-10-batches-py"}[config.data]
    try:
        if config.data == "mnist":
            raw = datasets.MNIST(str(root), train=True, download=config.download)
            images = torch.nn.functional.pad(raw.data, (2, 2, 2, 2))[:, None]
        else:
            raw = datasets.CIFAR10(str(root), train=True, download=config.download)
            images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
    except (RuntimeError, OSError, EOFError, AssertionError) as err:
        raise CmfastError(
            f"{config.data} was not found in {folder} ({err}); put the unpacked files there, "
            "or let torchvision fetch them with --set download=true"
        ) from None
    return Images(images, torch.as_tensor(raw.targets).long(), 10)


def _batch(batch: Batch | str) -> Batch:
    if isinstance(batch, str):
        raise CmfastError(batch)
    return batch


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch
