# SPDX-License-Identifier: MIT
"""Training images: what they hold, the order they come in, and what is said when they are not there.

The real sets are read from CMFAST_DATA, the folder that --data names; what is not there is skipped by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cmfast.errors import CmfastError, MissingDependency
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.data.batches import AHEAD, batches
from cmfast_train.data.images import IMAGENET9, Batch, FolderImages, Images, load_data, to_unit_range
from cmfast_train.evaluation.evaluate import data_images

EVERYTHING = slice(None)


def data_root(*path: str) -> Path:
    root = Path(os.environ.get("CMFAST_DATA", ""))
    if "CMFAST_DATA" not in os.environ or not root.joinpath(*path).exists():
        pytest.skip(f"{'/'.join(path)} is not in CMFAST_DATA")
    return root


def counting(n: int) -> Images:
    """Images that say their own number."""
    numbers = torch.arange(n)
    return Images(numbers.to(torch.uint8).reshape(n, 1, 1, 1), numbers, 0)


def order(
    n: int, batch: int, seed: int, start: int, stop: int, share: slice = EVERYTHING, workers: int = 0
) -> list[list[int]]:
    stream = batches(counting(n), batch, seed, start, stop, share, workers, False)
    return [labels.tolist() for _, labels in stream]


# Data sets.


def test_digits_are_1797_labelled_images_of_seventeen_greys() -> None:
    data = load_data(PRESETS["digits"], None)
    assert isinstance(data, Images)
    assert (data.images.shape, data.images.dtype, data.classes) == ((1797, 1, 8, 8), torch.uint8, 10)
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.images.unique().tolist() == [round(grey / 16 * 255) for grey in range(17)]
    assert data.labels[:3].tolist() == [0, 1, 2]


def test_mnist_is_padded_to_32_pixels() -> None:
    root = data_root("MNIST", "raw", "train-images-idx3-ubyte")
    data, plain = load_data(PRESETS["mnist-large"], root), load_data(PRESETS["mnist"], root)
    assert isinstance(data, Images)
    assert isinstance(plain, Images)
    assert torch.equal(plain.images, data.images[:, :, 2:-2, 2:-2])
    assert (data.images.shape, data.images.dtype, data.classes) == ((60_000, 1, 32, 32), torch.uint8, 10)
    assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert torch.bincount(data.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.images[:, :, 2:-2, 2:-2].float().mean().item() == pytest.approx(33.3184, abs=1e-3)
    assert data.images.sum() == data.images[:, :, 2:-2, 2:-2].sum()  # the border is black


def test_fashion_mnist_is_padded_to_32_pixels() -> None:
    data = load_data(PRESETS["fashion-mnist-large"], data_root("FashionMNIST", "raw", "train-images-idx3-ubyte"))
    assert isinstance(data, Images)
    assert (data.images.shape, data.images.dtype, data.classes) == ((60_000, 1, 32, 32), torch.uint8, 10)
    assert torch.bincount(data.labels).tolist() == [6000] * 10
    assert data.images.sum() == data.images[:, :, 2:-2, 2:-2].sum()  # the border is black


def test_fashion_mnist_is_read_from_its_own_folder(tmp_path: Path) -> None:
    """Files in the IDX format, written here, two images long; beside them those of another set."""
    for folder, grey in (("MNIST", 1), ("FashionMNIST", 200)):
        raw = tmp_path / folder / "raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            pixels, labels = bytes([grey]) * (2 * 28 * 28), bytes([9, 0])
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 2, 28, 28) + pixels)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 2) + labels)
    data = load_data(PRESETS["fashion-mnist-large"], tmp_path)
    assert isinstance(data, Images)
    assert (data.images.shape, data.labels.tolist(), data.classes) == ((2, 1, 32, 32), [9, 0], 10)
    assert data.images[:, :, 2:-2, 2:-2].unique().tolist() == [200]
    assert data.images.double().mean() == 200 * (28 / 32) ** 2
    plain = load_data(PRESETS["fashion-mnist"], tmp_path)
    assert isinstance(plain, Images)
    assert plain.images.shape == (2, 1, 28, 28)
    assert plain.images.unique().tolist() == [200]
    for side in (28, 32):  # evaluation has those of the model's size
        found = data_images("fashion-mnist", tmp_path, (1, side, side))
        assert isinstance(found, Images)
        assert found.images.shape == (2, 1, side, side)
    with pytest.raises(CmfastError, match=r"the samples are images \[1, 30, 30\]"):
        data_images("fashion-mnist", tmp_path, (1, 30, 30))


def test_flowers32_are_300_photographs_of_each_of_five_flowers() -> None:
    data = load_data(PRESETS["flowers32"], data_root("flowers32") / "flowers32")
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes) == (1500, 5)
    images, labels = data.__getitems__([0, 299, 300, 1499])
    assert (images.shape, images.dtype, labels.tolist()) == ((4, 3, 32, 32), torch.uint8, [0, 0, 1, 4])
    with Image.open(data.samples[300][0]) as file:  # 32x32 RGB: neither resized nor cropped
        np.testing.assert_array_equal(images[2].permute(1, 2, 0), np.asarray(file))


def test_cifar10_has_its_published_means() -> None:
    data = load_data(PRESETS["cifar10"], data_root("cifar-10-batches-py"))
    assert isinstance(data, Images)
    assert (data.images.shape, data.images.dtype, data.classes) == ((50_000, 3, 32, 32), torch.uint8, 10)
    assert torch.bincount(data.labels).tolist() == [5000] * 10
    assert data.images.is_contiguous()
    means = data.images.double().mean(dim=(0, 2, 3))
    np.testing.assert_allclose(means, [125.307, 122.950, 113.865], atol=1e-3)


def test_pixels_go_to_the_unit_range() -> None:
    unit = to_unit_range(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert unit.dtype == torch.float32
    assert unit.tolist() == [-1, 1, pytest.approx(-0.6)]


# A folder of images.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; every file another size, mode and format. The middle is white, the margin black."""
    files = [
        ("a/1.jpg", "RGB", (16, 32)), ("a/2.png", "L", (24, 16)), ("a/3.bmp", "1", (9, 9)),
        ("b/1.png", "RGB", (8, 8)), ("b/2.png", "RGBA", (8, 12)), ("b/3.png", "P", (16, 16)),
    ]  # fmt: skip
    for name, mode, size in files:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image, side = Image.new("L", size), min(size)
        image.paste(255, tuple((length + sign * side) // 2 for sign in (-1, 1) for length in size))
        image.convert(mode).save(path)
    return tmp_path / "photos"


def folder_config(**values: Any) -> TrainConfig:
    return dataclasses.replace(PRESETS["folder"], **{"image_size": 8, "workers": 0, **values})


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_gives_the_middle_of_every_image_and_its_class(channels: int, folder: Path) -> None:
    data = load_data(folder_config(channels=channels), folder)
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes) == (6, 2)
    images, labels = data.__getitems__(list(range(6)))
    assert (images.shape, images.dtype) == ((6, channels, 8, 8), torch.uint8)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]  # classes in the order of their names
    assert images[:, :, 2:-2, 2:-2].min() >= 250  # resizing rings a little at the edge, JPEG everywhere


def test_a_folder_is_read_the_same_by_other_processes(folder: Path) -> None:
    data = load_data(folder_config(), folder)
    here = list(batches(data, 4, 0, 0, 3, EVERYTHING, 0, False))
    there = list(batches(data, 4, 0, 0, 3, EVERYTHING, 1, False))
    for (images, labels), (other_images, other_labels) in zip(here, there, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "cut", "bytes"])
def test_a_damaged_image_is_named_in_one_line_whoever_reads_it(damage: str, workers: int, folder: Path) -> None:
    whole = (folder / "a" / "2.png").read_bytes()
    damaged = {"text": b"not an image", "cut": whole[: len(whole) // 2], "bytes": whole[:40] + b"\xff" * 8 + whole[48:]}
    (folder / "a" / "2.png").write_bytes(damaged[damage])
    data = load_data(folder_config(), folder)
    with pytest.raises(CmfastError, match=r"^cannot read the image .*a/2\.png: ") as raised:
        list(batches(data, 6, 0, 0, 1, EVERYTHING, workers, False))
    assert "\n" not in str(raised.value)


def test_a_folder_whose_first_image_is_damaged_is_no_bug(folder: Path) -> None:
    (folder / "a" / "1.jpg").write_bytes(b"not an image")
    with pytest.raises(CmfastError, match=r"cannot read the image .*a/1\.jpg: "):
        load_data(folder_config(), folder)


def test_a_folder_without_classes_or_images_is_no_data(tmp_path: Path) -> None:
    for name in ("empty", "class"):
        (tmp_path / "root" / name).mkdir(parents=True)
    for root in (tmp_path / "root" / "empty", tmp_path / "root"):
        with pytest.raises(CmfastError, match=rf"{root} is not a folder of images by class \(ROOT/class/name.png\)"):
            load_data(folder_config(), root)


# ImageNet: a thousand folders, of which each holds one photograph, its shade the folder's place among the sorted.


SYNSETS = [f"n{1_000_000 + 7919 * i:08d}" for i in range(1000)]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    for i, synset in enumerate(SYNSETS):
        (root / "train" / synset).mkdir(parents=True)
        shade = (i // 32 * 8, i % 32 * 8, 128)
        Image.new("RGB", (12, 8), shade).save(root / "train" / synset / f"{synset}_1.JPEG", quality=100)
    (root / "val").mkdir()
    return root


def imagenet_config(name: str) -> TrainConfig:
    return dataclasses.replace(PRESETS[name], image_size=8, workers=0)


def places(images: torch.Tensor) -> list[int]:
    """Return which folders the photographs are from. JPEG is off by less than half a shade."""
    red, green = (images[:, :2].double().mean(dim=(2, 3)) / 8).round().int().T.tolist()
    return [32 * r + g for r, g in zip(red, green, strict=True)]


@pytest.mark.parametrize("below", ["", "train"])
def test_imagenet9_is_42_synsets_in_nine_classes(below: str, imagenet: Path) -> None:
    data = load_data(imagenet_config("imagenet9"), imagenet / below)
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes) == (42, 9)
    images, labels = data.__getitems__(list(range(42)))
    assert (images.shape, images.dtype) == ((42, 3, 8, 8), torch.uint8)
    found: dict[int, list[int]] = {}
    for place, label in zip(places(images), labels.tolist(), strict=True):
        found.setdefault(label, []).append(place)
    assert found == {
        0: [151, 207, 234, 235, 254], 1: [281, 282, 283, 284, 285], 2: [30, 31, 32], 3: [33, 34, 35, 36, 37],
        4: [89, 90, 94, 96, 97], 5: [372, 373, 374, 375, 378], 6: [393, 394, 395, 396, 397], 7: [118, 119, 120, 121],
        8: [306, 307, 308, 309, 310],
    }  # fmt: skip
    assert list(IMAGENET9) == ["dog", "cat", "frog", "turtle", "bird", "monkey", "fish", "crab", "insect"]
    unit = to_unit_range(images)
    assert unit.min() >= -1
    assert unit.max() <= 1


def test_imagenet64_is_every_synset_in_its_place(imagenet: Path) -> None:
    data = load_data(imagenet_config("imagenet64"), imagenet)
    assert isinstance(data, FolderImages)
    assert (len(data), data.classes) == (1000, 1000)
    images, labels = data.__getitems__(list(range(1000)))
    assert places(images) == labels.tolist() == list(range(1000))


@pytest.mark.parametrize("name", ["imagenet9", "imagenet64"])
def test_imagenet_with_another_number_of_folders_is_refused(name: str, imagenet: Path, tmp_path: Path) -> None:
    """One missing shifts the indices of all after it: a dog would be a cat."""
    for synset in (*SYNSETS[:400], *SYNSETS[401:], "n1", "photos", "n000000001"):
        (tmp_path / synset).mkdir()
    (tmp_path / SYNSETS[400]).write_bytes(b"")  # a file is no folder
    for root, counts in (
        (tmp_path, f"999 in {tmp_path}, 0 in {tmp_path}/train"),
        (imagenet / "val", f"0 in {imagenet}/val, 0 in {imagenet}/val/train"),
    ):
        with pytest.raises(
            CmfastError,
            match=rf"^{name} is read from the 1000 synset folders of .* \(ROOT/nXXXXXXXX/\*\.JPEG\); found {counts}$",
        ):
            load_data(imagenet_config(name), root)


def test_a_synset_without_images_is_named(tmp_path: Path) -> None:
    for synset in SYNSETS:
        (tmp_path / synset).mkdir()
    with pytest.raises(CmfastError, match=rf"not a folder of images by class .*{SYNSETS[30]}"):
        load_data(imagenet_config("imagenet9"), tmp_path)


# What is said when the data are not there.


@pytest.mark.parametrize(
    ("name", "place"),
    [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("cifar10", "cifar-10-batches-py")],
)
def test_a_missing_set_is_named_with_the_place_for_it_and_nothing_is_fetched(
    name: str, place: str, tmp_path: Path
) -> None:
    with pytest.raises(
        CmfastError, match=rf"{name} was not found in {tmp_path}/{place} .*--set download=true"
    ) as raised:
        load_data(PRESETS[name], tmp_path)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "folder", "imagenet9", "imagenet64"])
def test_a_set_without_a_folder_asks_for_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=f"the data set {name} is read from a folder: --data DIR, or CMFAST_DATA=DIR"):
        load_data(PRESETS[name], None)
    with pytest.raises(CmfastError, match=r"the data folder .*nowhere does not exist"):
        load_data(PRESETS[name], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "package"), [("digits", "sklearn"), ("mnist", "torchvision"), ("folder", "torchvision")]
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    name: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does to say "not importable"
    with pytest.raises(MissingDependency, match=r"not installed: pip install 'cmfast\[train\]'"):
        load_data(PRESETS[name], folder)


def test_images_of_another_size_are_refused() -> None:
    config = override(PRESETS["digits"], ["image_size=16"])
    with pytest.raises(CmfastError, match=r"the images are \[1, 8, 8\], the run says \[1, 16, 16\]: --set image_size"):
        load_data(config, None)


# The order.


@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(0, 99),
    start=st.integers(0, 9),
    length=st.integers(0, 6),
)
def test_the_order_is_a_function_of_the_step(n: int, batch: int, seed: int, start: int, length: int) -> None:
    whole = order(n, batch, seed, 0, start + length)
    assert order(n, batch, seed, start, start + length) == whole[start:]


@given(n=st.integers(1, 40), batch=st.integers(1, 16), seed=st.integers(0, 99), epochs=st.integers(1, 4))
def test_every_epoch_has_every_image_once(n: int, batch: int, seed: int, epochs: int) -> None:
    flat = list(itertools.chain(*order(n, batch, seed, 0, -(-n * epochs // batch))))
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))


def formula(n: int, batch: int, seed: int, step: int) -> list[int]:
    """One image after the other, as the first version computed it: runs begun with it must go on as they were."""
    indices = []
    for position in range(step * batch, (step + 1) * batch):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position // n)
        indices.append(int(torch.randperm(n, generator=generator)[position % n]))
    return indices


@given(n=st.integers(1, 30), batch=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6))
def test_the_order_is_that_of_the_formula(n: int, batch: int, seed: int, step: int) -> None:
    assert order(n, batch, seed, step, step + 2) == [formula(n, batch, seed, step), formula(n, batch, seed, step + 1)]


def test_a_batch_larger_than_the_data_has_whole_epochs() -> None:
    (indices,) = order(3, 10, 0, 5, 6)  # positions 50 to 59: the end of epoch 16, epochs 17 and 18, the start of 19
    assert indices == formula(3, 10, 0, 5)
    assert sorted(indices[1:4]) == sorted(indices[4:7]) == sorted(indices[7:10]) == [0, 1, 2]


def test_the_order_of_a_late_step_is_found_without_walking_there() -> None:
    step = 10**12
    assert order(200, 64, 3, step, step + 1) == [formula(200, 64, 3, step)]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    (first,), (second,) = order(200, 200, 0, 0, 1), order(200, 200, 0, 1, 2)
    assert list(range(200)) != first != second
    assert order(200, 200, 1, 0, 1) != [first]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_a_batch_without_overlap(processes: int) -> None:
    each = 8 // processes
    shares = [order(30, 8, 3, 0, 5, slice(i * each, (i + 1) * each)) for i in range(processes)]
    together = [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    assert together == order(30, 8, 3, 0, 5)


# Batches made ahead.


class Watched(Images):
    """Images of their number, which tell how often they were asked for, and by which thread."""

    def __init__(self, n: int, then: Callable[[int], None] = lambda _: None) -> None:
        super().__init__(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), 0)
        self.threads: list[threading.Thread] = []
        self.then = then

    def __getitems__(self, indices: list[int]) -> Batch:
        self.threads.append(threading.current_thread())
        self.then(len(self.threads))
        return super().__getitems__(indices)


def settled(data: Watched, count: int) -> int:
    """Return how many batches were asked for, once there are `count` and there was time for one more."""
    for _ in range(500):
        if len(data.threads) >= count:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    return len(data.threads)


def test_two_batches_are_made_while_one_is_used() -> None:
    data = Watched(4)
    stream = batches(data, 2, 0, 0, 10, EVERYTHING, 0, False)
    assert data.threads == []  # nothing begins before it is asked for
    for used in range(1, 4):
        next(stream)
        assert settled(data, used + AHEAD) == used + AHEAD
    assert len({thread.ident for thread in data.threads}) == 1
    assert data.threads[0] is not threading.current_thread()
    assert [len(labels) for _, labels in stream] == [2] * 7
    assert len(data.threads) == 10
    assert not data.threads[0].is_alive()


def test_a_consumer_that_stops_early_leaves_no_thread_and_no_work() -> None:
    data = Watched(4)
    stream = batches(data, 2, 0, 0, 10**9, EVERYTHING, 0, False)
    next(stream)
    assert data.threads[0].is_alive()
    stream.close()
    assert not data.threads[0].is_alive()
    made = len(data.threads)
    assert settled(data, made) == made <= 1 + AHEAD


@pytest.mark.parametrize("error", [CmfastError("cannot read it"), ZeroDivisionError("a bug")])
def test_what_goes_wrong_in_the_thread_is_raised_in_its_turn(error: Exception) -> None:
    def third(count: int) -> None:
        if count == 3:
            raise error

    data = Watched(4, third)
    stream = batches(data, 2, 0, 0, 10, EVERYTHING, 0, False)
    next(stream)
    assert settled(data, 3) >= 3  # it has happened
    next(stream)
    with pytest.raises(type(error), match=str(error)):
        next(stream)
    assert not data.threads[0].is_alive()
    assert list(stream) == []


def test_a_damaged_image_is_named_in_its_turn_and_no_thread_stays(folder: Path) -> None:
    data = load_data(folder_config(), folder)
    (first,), (second,) = order(6, 1, 0, 0, 1), order(6, 1, 0, 1, 2)
    assert isinstance(data, FolderImages)
    Path(data.samples[second[0]][0]).write_bytes(b"not an image")
    before = threading.active_count()
    stream = batches(data, 1, 0, 0, 6, EVERYTHING, 0, False)
    assert next(stream)[1].tolist() == [data.samples[first[0]][1]]
    with pytest.raises(CmfastError, match=r"^cannot read the image "):
        next(stream)
    assert threading.active_count() == before


INTERRUPTED = """
import signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
from cmfast_train.data.batches import batches
from cmfast_train.data.images import Images
data = Images(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), torch.arange(8), 0)
stream = batches(data, 4, 0, 0, 10**9, slice(None), 0, False)
next(stream)
print("ready", flush=True)
while True:
    time.sleep(0.01)
    next(stream)
"""


def test_an_interrupted_process_ends() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert err.count("Traceback") == 1


@pytest.mark.gpu
def test_a_gpu_gets_batches_in_pinned_memory_with_the_same_values() -> None:
    data = counting(200)
    plain = batches(data, 64, 0, 0, 8, EVERYTHING, 0, False)
    pinned = batches(data, 64, 0, 0, 8, EVERYTHING, 0, True)
    for (images, labels), (other_images, other_labels) in zip(plain, pinned, strict=True):
        assert other_images.is_pinned()
        assert other_labels.is_pinned()
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels.cuda(non_blocking=True).cpu())
