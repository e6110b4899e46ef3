# SPDX-License-Identifier: MIT
"""Images to train on: uint8 [N, C, H, W] with labels, in an order that depends on the step alone.

The order is a function of (seed, step), so a resumed run sees what an uninterrupted one would have seen,
and any number of processes share one batch. Batches are made ahead of the step that needs them, in a thread or in
other processes. Nothing is downloaded unless it is asked for.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmfast.errors import CmfastError, MissingDependency
from cmfast_train.config import TrainConfig

Batch = tuple[Tensor, Tensor]  # images uint8 [B, C, H, W], labels int64 [B]

AHEAD = 2  # batches that wait, at most, for the step that needs them

SYNSETS = 1000  # classes of ImageNet-1k, a folder each

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

    def __init__(self, images: Tensor, labels: Tensor, classes: int) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        # numpy gathers without a second pool of OpenMP threads, which would fight with that of the training step.
        return torch.from_numpy(self.images.numpy().take(indices, axis=0)), self.labels[indices]


class FolderImages(Dataset[Batch | str]):
    """Images read from disk, ROOT/folder/name.png: short side resized, centre cropped.

    classes  the class of each folder that is read; by default every folder is one, in the order of their names
    """

    def __init__(self, root: Path, size: int, channels: int, classes: Mapping[str, int] | None = None) -> None:
        from cmfast_train.torchvision_cpu import torchvision_datasets

        folder = torchvision_datasets().folder
        from torchvision import transforms

        grey = [transforms.Grayscale()] if channels == 1 else []
        self.transform = transforms.Compose(
            [transforms.Resize(size, antialias=True), transforms.CenterCrop(size), *grey]
        )
        self.load = folder.default_loader
        try:
            of_folder = dict(classes or folder.find_classes(str(root))[1])
            self.samples = folder.make_dataset(str(root), of_folder, extensions=folder.IMG_EXTENSIONS)
        except OSError as err:
            raise CmfastError(f"{root} is no folder of images by class (ROOT/class/name.png): {err}") from None
        self.classes = len(set(of_folder.values()))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Batch | str:
        try:
            images = np.stack([self._pixels(i) for i in indices])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
            return self._first_unreadable(indices) or str(err)
        channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return torch.from_numpy(channels_first), torch.tensor([self.samples[i][1] for i in indices])

    def _pixels(self, i: int) -> Any:
        """Return the pixels of an image, uint8 [H, W, C]."""
        return np.atleast_3d(np.asarray(self.transform(self.load(self.samples[i][0]))))

    def _first_unreadable(self, indices: list[int]) -> str | None:
        """Return what is wrong with which file. A string, for an exception leaves a worker as a printed traceback."""
        for i in indices:
            try:
                self._pixels(i)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
                return f"cannot read the image {self.samples[i][0]}: {err}"
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
    elif config.data in ("imagenet9", "imagenet64"):
        data = _imagenet(config, root)
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
) -> Generator[Batch, None, None]:
    """Yield this process's share of the batches of steps start .. stop - 1.

    batch    images per step, summed over processes
    share    which of them this process takes
    workers  processes that make the batches; 0: a thread, which ends when the generator does
    pin      put them in pinned memory, from which a GPU copies while it computes
    """
    order = _StepIndices(len(data), batch, seed, start, stop, share)
    if workers:
        loader = DataLoader(
            data,
            batch_sampler=order,  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin,
            persistent_workers=True,
        )
        yield from map(_batch, loader)
        return

    def make(step: int) -> Batch | str:
        made = data.__getitems__(order.at(step))
        return made if isinstance(made, str) or not pin else (_pinned(made[0]), _pinned(made[1]))

    with contextlib.closing(_ahead(make, range(start, stop), pin)) as stream:
        yield from map(_batch, stream)


def to_unit_range(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class _StepIndices:
    """The indices of each step: one shuffle of the data an epoch, epochs end to end."""

    def __init__(self, n: int, batch: int, seed: int, start: int, stop: int, share: slice) -> None:
        self.n, self.batch, self.seed, self.start, self.stop, self.share = n, batch, seed, start, stop, share
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.at, range(self.start, self.stop))

    def at(self, step: int) -> list[int]:
        """Return the indices of any step, whatever came before."""
        position, stop = step * self.batch, (step + 1) * self.batch
        parts = []
        while position < stop:  # once, or once for each epoch that the batch touches
            epoch, first = divmod(position, self.n)
            parts.append(self._shuffled(epoch)[first : first + stop - position])
            position += len(parts[-1])
        indices: list[int] = torch.cat(parts)[self.share].tolist()
        return indices

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order


def _ahead(make: Callable[[int], Batch | str], steps: range, pin: bool) -> Generator[Batch | str, None, None]:
    """Yield make(step) for each step, made in order by one thread while the caller works.

    What the thread raises is raised here, in its turn. However the caller leaves, nothing more is begun and the thread
    has ended.
    """
    # A thread begins on the first GPU, whichever its process uses, and pinning memory would take a piece of that one.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin else (None, ())
    thread = ThreadPoolExecutor(1, "cmfast-batches", *device)
    waiting: deque[Future[Batch | str]] = deque()
    try:
        for step in steps:
            waiting.append(thread.submit(make, step))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _pinned(values: Tensor) -> Tensor:
    pinned = torch.empty_like(values, pin_memory=True)
    pinned.numpy()[...] = values.numpy()  # by numpy: see Images
    return pinned


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
    kind, place = {
        "mnist": (datasets.MNIST, "MNIST/raw"),
        "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw"),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
    }[config.data]
    try:
        raw = kind(str(root), train=True, download=config.download)
    except (RuntimeError, OSError, EOFError, AssertionError) as err:
        raise CmfastError(
            f"{config.data} was not found in {root / place} ({err}); put the unpacked files there, "
            "or let torchvision fetch them with --set download=true"
        ) from None
    if config.data == "cifar10":
        images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
    else:
        images = torch.nn.functional.pad(raw.data, (2, 2, 2, 2))[:, None]
    return Images(images, torch.as_tensor(raw.targets).long(), 10)


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
    return FolderImages(folder, config.image_size, config.channels, classes)


def _synsets(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("n*") if re.fullmatch(r"n\d{8}", path.name) and path.is_dir())


def _batch(batch: Batch | str) -> Batch:
    if isinstance(batch, str):
        raise CmfastError(batch)
    return batch


def _as_it_is(batch: Batch | str) -> Batch | str:
    return batch
