# SPDX-License-Identifier: MIT
"""Images to train on: uint8 [N, C, H, W] with labels, from the data sets that are known by name, or your own files.

Nothing is downloaded unless requested. What is in a folder or .zip is found by `image_folders`, in a .npy or .npz
by `image_arrays`; `image_reader` reads the files. In what order they are trained on: `data.batches`.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cmfast.errors import CmfastError, MissingDependency, one_line
from cmfast_train.border import naming, reading
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.data.image_arrays import read_arrays
from cmfast_train.data.image_folders import find_images, find_zipped
from cmfast_train.data.image_reader import MAX_FILE, Fit, check_shape, read_image, to_rgb

Batch = tuple[Tensor, ...]  # images uint8 [B, C, H, W] and labels int64 [B]; of other samples, see `arrays`
LABELLED = ("label",)  # what a batch of images holds beside them

MNIST_KINDS = ("mnist", "fashion-mnist")
MNIST_SIDES = ((28, 28), (32, 32))  # their size, and with the two pixels of black around them that image_size=32 adds

SYNSETS = 1000  # classes of ImageNet-1k, a folder each

NAMES = {  # of the classes
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip

# The nine classes of jqwenchen/explore-consistency-models, from ReBias: indices into the sorted synset folders. Not the
# "ImageNet-9" of the Backgrounds Challenge. That project scaled them by the mean and deviation of CIFAR-10, where
# sigma_data = 0.5 needs [-1, 1], as everything has here.
IMAGENET9: dict[str, tuple[int, ...]] = {
    "dog": (151, 207, 234, 235, 254),
    "cat": (281, 282, 283, 284, 285),
    "frog": (30, 31, 32),
    "turtle": (33, 34, 35, 36, 37),
    "bird": (89, 90, 94, 96, 97),
    "monkey": (372, 373, 374, 375, 378),
    "fish": (393, 394, 395, 396, 397),
    "crab": (118, 119, 120, 121),
    "insect": (306, 307, 308, 309, 310),
}


class Images(Dataset[Batch]):
    """Images in memory: `images` uint8 [N, C, H, W], `labels` int64 [N], `classes` (0: the data have none)."""

    names, in_memory = LABELLED, True

    def __init__(self, images: Tensor, labels: Tensor, classes: int, class_names: Sequence[str] = ()) -> None:
        self.images, self.labels, self.classes, self.class_names = images, labels, classes, tuple(class_names)

    def tensors(self) -> Batch:
        """Return all images and labels."""
        return self.images, self.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        # numpy gathers without a second pool of OpenMP threads, which would fight with that of the training step.
        return torch.from_numpy(self.images.numpy().take(indices, axis=0)), self.labels[indices]


class FolderImages(Dataset[Batch | str]):
    """Images read from a folder or .zip, see `image_folders`: resized to cover the size, centre cropped.

    samples  (path, or name in the .zip; class) of each image

    Args:
        size: the side of the images, or (height, width)
        classes: the class of each folder that is read; default: every folder is one
        labelled: whether classes are needed; without, nothing is required of dataset.json and of empty folders
    """

    names, in_memory = LABELLED, False

    def __init__(
        self, root: Path, size: int | tuple[int, int], channels: int, classes: Mapping[str, int] | None = None,
        *, labelled: bool = True,
    ) -> None:  # fmt: skip
        height, width = (size, size) if isinstance(size, int) else size
        self.fit = Fit(height, width, channels)
        self.zip = _Zip(root) if _is(root, ".zip") else None
        found = find_images(root, classes, labelled=labelled) if self.zip is None else self.zip.find(labelled)
        inside = self.zip is not None
        self.samples = [(name if inside else str(root / name), label) for name, label in found.files]
        self.classes, self.class_names = found.classes, found.class_names

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Batch | str:
        """Return images and labels, or what is wrong with which file: an exception leaves a worker as a traceback."""
        try:
            images = np.stack([self._pixels(i) for i in indices])
        except CmfastError as err:
            return str(err)
        channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return torch.from_numpy(channels_first), torch.tensor([self.samples[i][1] for i in indices])

    def _pixels(self, i: int) -> npt.NDArray[np.uint8]:
        """Return the pixels of an image, uint8 [H, W, C]."""
        name = self.samples[i][0]
        if self.zip is None:
            return self.fit(read_image(Path(name)))
        return self.fit(read_image(self.zip.read(name), f"{name} of {self.zip.file}"))


class ArrayImages(Dataset[Batch | str]):
    """Images of a .npy or .npz file, see `image_arrays`; of another size they are resized and cropped as files are."""

    names, in_memory = LABELLED, False

    def __init__(self, file: Path, size: tuple[int, int], channels: int, *, labelled: bool = True) -> None:
        self.file, self.fit = file, Fit(*size, channels)
        self._pixels, labels, self.classes = read_arrays(file, labelled=labelled)
        self.class_names: tuple[str, ...] = ()
        self.labels = torch.zeros(len(self._pixels), dtype=torch.int64) if labels is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch | str:
        try:
            with naming(self.file):
                images = np.stack([self._image(i) for i in indices])
        except CmfastError as err:
            return str(err)
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), self.labels[indices]

    def __getstate__(self) -> dict[str, Any]:  # a mapped array would travel to a worker as a copy
        return {**self.__dict__, "_pixels": None if isinstance(self._pixels, np.memmap) else self._pixels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._pixels is None:
            self._pixels = read_arrays(self.file, labelled=False)[0]

    def _image(self, i: int) -> npt.NDArray[np.uint8]:
        pixels = np.asarray(self._pixels[i])
        if pixels.shape == (self.fit.height, self.fit.width, self.fit.channels):
            return pixels
        return self.fit(to_rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)))


Data = Images | FolderImages | ArrayImages


def load_data(config: TrainConfig, root: Path | None) -> Data:
    """Return the training images of a run. root: where the files are, not needed for digits."""
    if config.data == "digits":
        data: Data = _digits()
    elif root is None:
        raise CmfastError(f"the data set {config.data} is read from a folder: --data DIR, or CMFAST_DATA=DIR")
    elif config.data == "folder":
        data = image_data(root, config.image_sides, config.channels, labelled=config.conditional)
    elif not root.is_dir() and not config.download:
        raise CmfastError(
            f"the data folder {root} does not exist" if not root.exists() else f"--data {root}: not a folder"
        )
    elif config.data in ("imagenet9", "imagenet64"):
        data = _imagenet(config, root)
    else:
        data = _torchvision(config, root)
    check_shape(tuple(check_batch(data.__getitems__([0]))[0].shape[1:]), (config.channels, *config.image_sides))
    return data


def image_data(
    root: Path, size: tuple[int, int], channels: int, *, labelled: bool = True
) -> FolderImages | ArrayImages:
    """Return a user's own images, of this (height, width): a folder, a .zip of one, or a .npy or .npz file."""
    if not root.exists():
        raise CmfastError(f"the data folder {root} does not exist")
    if root.is_dir() or _is(root, ".zip"):
        return FolderImages(root, size, channels, labelled=labelled)
    if not _is(root, ".npy", ".npz"):
        raise CmfastError(f"--data {root}: images are read from a folder, or a file .zip, .npy or .npz")
    return ArrayImages(root, size, channels, labelled=labelled)


def check_batch(batch: Batch | str) -> Batch:
    """Return a batch that a data set made, or raise CmfastError with what it says is wrong."""
    if isinstance(batch, str):
        raise CmfastError(batch)
    return batch


def in_data_units(samples: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1], other samples as they are."""
    return to_unit_range(samples) if samples.dtype == torch.uint8 else samples


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise MissingDependency("the digits data set", "scikit-learn", "train") from None
    digits: Any = load_digits()
    images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)
    return Images(images[:, None], torch.from_numpy(digits.target).long(), 10, NAMES["digits"])


def _torchvision(config: TrainConfig, root: Path) -> Images:
    from cmfast_train.torchvision_cpu import torchvision_datasets

    datasets = torchvision_datasets()
    kind, place = {
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    }[config.data]
    try:
        if config.data != "cifar10" and (root / place).is_dir():
            for name, sides in (("train-images-idx3-ubyte", 3), ("train-labels-idx1-ubyte", 1)):
                _check_idx(root / place / name, sides)
        # CIFAR-10's files are pickles; torchvision compares their MD5 with the published ones before it opens them.
        raw = kind(str(root), train=True, download=config.download)
        labels = torch.as_tensor(raw.targets).long()
        if config.data == "cifar10":
            images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
        else:
            border = 0 if config.image_sides == MNIST_SIDES[0] else 2
            images = torch.nn.functional.pad(raw.data, (border,) * 4)[:, None]
        if len(images) != len(labels) or not len(images) or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"{len(images)} images with {len(labels)} labels that are not all 0 to 9")
    except Exception as err:  # what damaged files make torchvision raise is not documented
        raise CmfastError(
            f"{config.data} was not found in {root / place} ({one_line(err, 200) or type(err).__name__}); put the "
            "unpacked files there, or let torchvision fetch them with --set download=true"
        ) from None
    return Images(images, labels, 10, NAMES[config.data])


def _check_idx(file: Path, sides: int) -> None:
    """Raise CmfastError unless a file in the IDX format, if it is there, is as long as its head says."""
    if not file.exists():
        return
    with file.open("rb") as opened:
        head = opened.read(4 + 4 * sides)
    size = file.stat().st_size
    if len(head) < 4 + 4 * sides or head[:4] != bytes([0, 0, 8, sides]):
        raise CmfastError(f"{file.name} is not an IDX file of {sides} dimension(s), unpacked")
    shape = struct.unpack(f">{sides}I", head[4:])
    need = len(head) + int(np.prod([int(n) for n in shape], dtype=object))
    if size != need or (sides == 3 and shape[1:] != (28, 28)):
        raise CmfastError(f"{file.name} announces {list(shape)}, {need:,} bytes, and has {size:,}")


def _imagenet(config: TrainConfig, root: Path) -> FolderImages:
    """Return the images of ImageNet-1k, or those of IMAGENET9. root: the folder of the synsets, or the one above it."""
    found = {folder: _synsets(folder) for folder in (root, root / "train")}
    whole = [folder for folder in found if len(found[folder]) == SYNSETS]
    if not whole:
        counts = ", ".join(f"{len(synsets)} in {folder}" for folder, synsets in found.items())
        raise CmfastError(
            f"{config.data} is read from the {SYNSETS} synset folders of ImageNet-1k's training images "
            f"(ROOT/nXXXXXXXX/*.JPEG); found {counts}"
        )
    folder, synsets = whole[0], found[whole[0]]
    if config.data == "imagenet9":
        classes = {synsets[i]: label for label, indices in enumerate(IMAGENET9.values()) for i in indices}
    else:
        classes = {synset: label for label, synset in enumerate(synsets)}
    data = FolderImages(folder, config.image_sides, config.channels, classes)
    data.class_names = tuple(IMAGENET9) if config.data == "imagenet9" else tuple(synsets)
    return data


def _synsets(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("n*") if re.fullmatch(r"n\d{8}", path.name) and path.is_dir())


class _Zip:
    """A .zip of images, opened again in every process: two that share an opened file would read each other's places."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._archive: zipfile.ZipFile | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "_archive": None, "_process": 0}

    def find(self, labelled: bool) -> Any:
        with reading(self.file, "not a whole .zip file"):
            archive = self._opened()
        return find_zipped(self.file, archive, labelled=labelled)

    def read(self, name: str) -> bytes:
        """Return the content of a file in the .zip."""
        with reading(f"cannot read the image {name} of {self.file}", "damaged"):
            entry = self._opened().getinfo(name)
            if entry.file_size > MAX_FILE:
                raise CmfastError(f"{name} of {self.file}: {entry.file_size:,} bytes, at most {MAX_FILE:,} are read")
            return self._opened().read(entry)

    def _opened(self) -> zipfile.ZipFile:
        if self._archive is None or self._process != os.getpid():
            self._archive, self._process = zipfile.ZipFile(self.file), os.getpid()
        return self._archive


def _is(path: Path, *suffixes: str) -> bool:
    return path.suffix.lower() in suffixes and not path.is_dir()
