# SPDX-License-Identifier: MIT
"""What folders, .zip, .npy and .npz hold as training data: labels, names, hidden and damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import data as torch_data

from cmfast.errors import CmfastError, CmfastWarning
from cmfast_train.config.presets import PRESETS
from cmfast_train.data import image_arrays
from cmfast_train.data.batches import batches
from cmfast_train.data.images import ArrayImages, FolderImages, load_data
from cmfast_train.evaluation.evaluate import data_images


def config(name: str = "folder", **values: Any) -> Any:
    return dataclasses.replace(PRESETS[name], **{"image_size": 8, "workers": 0, "channels": 1, **values})


def write(root: Path, *names: str) -> Path:
    """Write grey images; the shade of each is the number of its place in the list."""
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(root / name, format="PNG")
    return root


def zipped(root: Path, within: str = "") -> Path:
    file = root.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, within + path.relative_to(root).as_posix())
    return file


def content(data: Any) -> dict[int, int]:
    """Return {shade: label}."""
    images, labels = data.__getitems__(list(range(len(data))))
    assert images.dtype == torch.uint8
    return dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))


# Classes.


def test_class_folders_that_are_numbers_sort_as_numbers(tmp_path: Path) -> None:
    data = load_data(config(), write(tmp_path, *(f"{i}/x.png" for i in range(12))))
    assert content(data) == {i: i for i in range(12)}
    assert data.class_names == tuple(map(str, range(12)))


def test_other_class_folders_sort_as_text_as_before(tmp_path: Path) -> None:
    data = load_data(config(), write(tmp_path, "10/x.png", "9/x.png", "b/x.png", "a/x.png", "Z/x.png"))
    assert data.class_names == ("10", "9", "Z", "a", "b")


def test_every_data_set_has_names(tmp_path: Path) -> None:
    assert load_data(PRESETS["digits"], None).class_names == tuple("0123456789")
    for folder, name in (("FashionMNIST", "fashion-mnist"), ("MNIST", "mnist")):
        idx(tmp_path / folder / "raw")
        names = load_data(PRESETS[name], tmp_path).class_names
        assert len(set(names)) == 10
        assert names[9] == ("9" if name == "mnist" else "Ankle boot")


def test_a_folder_name_that_a_checkpoint_cannot_carry_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path, "a/x.png", "b\nc/x.png")
    with pytest.warns(CmfastWarning, match="printable characters, so the model gets no class names"):
        data = load_data(config(), tmp_path)
    assert (data.classes, data.class_names) == (2, ())


def test_hidden_files_and_folders_are_no_classes_and_no_images(tmp_path: Path) -> None:
    write(
        tmp_path, "a/1.png", "b/1.png", ".ipynb_checkpoints/a.png", "__MACOSX/a/1.png", "a/._1.png", "@eaDir/1.png",
        "a/.ipynb_checkpoints/1.png", "a/@eaDir/1.png",
    )  # fmt: skip
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    for root in (tmp_path, zipped(tmp_path)):
        data = load_data(config(), root)
        assert content(data) == {0: 0, 1: 1}
        assert data.class_names == ("a", "b")


@pytest.mark.parametrize("pack", [lambda root: root, zipped, lambda root: zipped(root, "top/")])
def test_a_class_without_images_is_named(pack: Callable[[Path], Path], tmp_path: Path) -> None:
    root = write(tmp_path / "set", "a/1.png", "b/1.png")
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(CmfastError, match=r"no image in the folder\(s\) empty; remove them"):
        load_data(config(), pack(root))


def test_links_that_lead_back_are_not_followed_and_others_are(tmp_path: Path) -> None:
    write(tmp_path / "other", "1.png")
    write(tmp_path / "root", "a/0.png", "b/1.png")
    (tmp_path / "root" / "a" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "b" / "self").symlink_to(".")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "other")
    data = load_data(config(), tmp_path / "root")
    assert [(Path(name).relative_to(tmp_path / "root").as_posix(), label) for name, label in data.samples] == [
        ("a/0.png", 0), ("b/1.png", 1), ("c/1.png", 2),
    ]  # fmt: skip


def test_images_directly_in_the_folder_have_no_classes(tmp_path: Path) -> None:
    write(tmp_path, "b.png", "a.png")
    (tmp_path / "notes").mkdir()
    for root in (tmp_path, zipped(tmp_path)):
        data = load_data(config(), root)
        assert (len(data), data.classes, data.class_names) == (2, 0, ())
        assert [Path(name).name for name, _ in data.samples] == ["a.png", "b.png"]


def test_images_beside_class_folders_are_a_warning(tmp_path: Path) -> None:
    with pytest.warns(CmfastWarning, match=r"1 images lie beside the class folders and are not read; x.png is one"):
        assert len(load_data(config(), write(tmp_path, "a/1.png", "x.png"))) == 1


def test_names_that_are_no_files_are_not_images(tmp_path: Path) -> None:
    os.mkfifo(write(tmp_path, "a/1.png", "b/1.png") / "a" / "pipe.png")
    assert len(load_data(config(), tmp_path)) == 2


# dataset_tool's layout.


def tool(root: Path, labels: Any) -> Path:
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(6)]
    write(root, *names)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def pairs(*labels: Any) -> list[list[Any]]:
    return [[f"{i // 2:05d}/img{i:08d}.png", label] for i, label in enumerate(labels)]


@pytest.mark.parametrize("pack", [lambda root: root, zipped, lambda root: zipped(root, "top/")])
def test_labels_are_those_of_dataset_json(pack: Callable[[Path], Path], tmp_path: Path) -> None:
    data = load_data(config(), pack(tool(tmp_path / "set", pairs(2, 0, 1, 2, 0, 2)[::-1])))
    assert content(data) == {0: 2, 1: 0, 2: 1, 3: 2, 4: 0, 5: 2}
    assert (data.classes, data.class_names) == (3, ())


@pytest.mark.parametrize("pack", [lambda root: root, zipped])
def test_without_labels_dataset_json_means_no_classes(pack: Callable[[Path], Path], tmp_path: Path) -> None:
    data = load_data(config(), pack(tool(tmp_path / "set", None)))
    assert (len(data), data.classes) == (6, 0)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (pairs(0, 0, 1, 1, 1), "1 of 6 images have no label, 00002/img00000005.png is one"),
        ([*pairs(0, 0, 1, 1, 1, 1), ["x.png", 0]], "1 of its images are not there, x.png is one"),
        (pairs(0, 0, 1, 1, 1, 1.5), "is not [name, label] with a whole number"),
        (pairs(0, 0, 1, 1, 1, True), "is not [name, label] with a whole number"),
        (pairs(0, 0, 1, 1, 1, [0, 1]), "is not [name, label] with a whole number"),
        (pairs(0, 0, 1, 1, 1, -1), "the label -1 is negative"),
        (pairs(0, 0, 1, 1, 1, 10**9), "the label 1000000000 is too large for 6 images"),
        ([*pairs(0, 0, 1, 1, 1, 1), ["00000/img00000000.png", 1]], "has two labels, 0 and 1"),
        ({"a": 1}, "its labels are a dict, not a list of [name, label]"),
        ("raw:[1]", "not what dataset_tool writes"),
        ("raw:{", "not JSON"),
        ("raw:" + "[" * 100_000, "not JSON"),
        ("raw:\xff", "not JSON"),
    ],
)
def test_a_dataset_json_that_does_not_fit_is_one_line(labels: Any, words: str, tmp_path: Path) -> None:
    tool(tmp_path / "set", labels)
    if isinstance(labels, str):
        (tmp_path / "set" / "dataset.json").write_bytes(labels.removeprefix("raw:").encode("latin-1"))
    for root in (tmp_path / "set", zipped(tmp_path / "set")):
        with pytest.raises(CmfastError, match=r"dataset\.json: ") as raised:
            load_data(config(), root)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_dataset_json_that_is_no_file_does_not_make_its_folders_classes(kind: str, tmp_path: Path) -> None:
    root = tool(tmp_path / "set", pairs(2, 0, 1, 2, 0, 2))
    (root / "dataset.json").unlink()
    if kind == "link":  # a hub's cache or an annex without the content
        (root / "dataset.json").symlink_to("../blobs/x")
    elif kind == "fifo":
        os.mkfifo(root / "dataset.json")
    else:
        (root / "dataset.json").mkdir()
    words = "a link to a file that is not there" if kind == "link" else "not a regular file"
    with pytest.raises(CmfastError, match=rf"set/dataset\.json: {words}"):
        load_data(config(), root)
    assert load_data(config(conditional=False), root).classes == 0


@pytest.mark.parametrize("name", ["a/2.png", "2.png"])
def test_an_image_that_is_a_link_to_nothing_is_refused_not_left_out(name: str, tmp_path: Path) -> None:
    """An annex or a hub's cache without the content: the run would have fewer images, and say nothing."""
    root = write(tmp_path / "set", *(["a/1.png", "b/1.png"] if "/" in name else ["1.png"]))
    (root / name).symlink_to("../../blobs/x")
    with pytest.raises(CmfastError, match=rf"set/{name}: a link to a file that is not there; get the file"):
        load_data(config(), root)
    (root / name).unlink()
    (root / name).symlink_to(root / name.replace("2", "1"))
    assert len(load_data(config(), root)) == (3 if "/" in name else 2)  # a link to a file is read


def test_labels_with_gaps_are_read_with_a_warning(tmp_path: Path) -> None:
    root = tool(tmp_path / "set", pairs(0, 4, 0, 4, 0, 4))
    with pytest.warns(CmfastWarning, match=r"dataset\.json: 3 of the 5 classes have no image \(1, 2, 3\)"):
        data = load_data(config(), root)
    assert data.classes == 5


@pytest.mark.parametrize("pack", [lambda root: root, zipped, lambda root: zipped(root, "top/")])
@pytest.mark.parametrize(
    "labels", [pairs(0, 0, 1), [*pairs(0, 0, 1, 1, 1, -1), ["x.png", 0]], pairs(*["cat"] * 6), {"a": 1}]
)
def test_a_run_without_classes_asks_nothing_of_dataset_json(
    labels: Any, pack: Callable[[Path], Path], tmp_path: Path
) -> None:
    data = load_data(config(conditional=False), pack(tool(tmp_path / "set", labels)))
    assert content(data) == dict.fromkeys(range(6), 0)
    assert (data.classes, data.class_names) == (0, ())


@pytest.mark.parametrize("pack", [lambda root: root, zipped])
def test_a_run_without_classes_reads_folders_of_any_name_and_number_of_images(
    pack: Callable[[Path], Path], tmp_path: Path
) -> None:
    root = write(tmp_path / "set", "10/1.png", "9/1.png", f"{'x' * 200}/1.png")
    (root / "empty").mkdir()
    data = load_data(config(conditional=False), pack(root))  # a warning about the name would be an error here
    assert content(data) == dict.fromkeys(range(3), 0)


def test_a_run_without_classes_and_an_evaluation_ask_nothing_of_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=shades(), arr_1=np.full(6, -1.5))
    for data in (
        load_data(config(conditional=False), tmp_path / "a.npz"), data_images("folder", tmp_path / "a.npz", (1, 8, 8)),
    ):  # fmt: skip
        assert content(data) == dict.fromkeys(range(6), 0)
    assert content(data_images("folder", tool(tmp_path / "set", pairs(5)), (1, 8, 8))) == dict.fromkeys(range(6), 0)


# Arrays.


def shades(n: int = 6, side: int = 8) -> Any:
    return np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(side, 1).repeat(side, 2)


@pytest.mark.parametrize("names", image_arrays.NAMES)
def test_images_and_labels_of_an_npz_are_found_by_their_names(names: tuple[str, str], tmp_path: Path) -> None:
    labels = np.array([2, 0, 1, 2, 0, 2])
    np.savez_compressed(tmp_path / "a.npz", **{names[0]: shades(), names[1]: labels[:, None], "x_test": labels})
    data = load_data(config(), tmp_path / "a.npz")
    assert content(data) == dict(enumerate(labels.tolist()))
    assert data.classes == 3
    np.savez(tmp_path / "b.npz", **{names[0]: shades()[..., 0]})
    assert load_data(config(), tmp_path / "b.npz").classes == 0


def test_an_npy_is_mapped_from_disk_and_opened_again_elsewhere(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", shades())
    data = load_data(config(), tmp_path / "a.npy")
    assert isinstance(data, ArrayImages)
    assert isinstance(data._pixels, np.memmap)
    assert content(pickle.loads(pickle.dumps(data))) == content(data) == dict.fromkeys(range(6), 0)
    assert len(pickle.dumps(data)) < 2000


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_other_sizes_are_treated_as_files_are(channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(3, 20, 30, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", np.asfortranarray(pixels))
    (tmp_path / "files").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
    for size in (8, 20):
        same = [load_data(config(channels=channels, image_size=size), tmp_path / n) for n in ("a.npy", "files")]
        one, other = (data.__getitems__([0, 1, 2])[0] for data in same)
        np.testing.assert_array_equal(one, other)


def npy(shape: str, descr: str = "|u1", data: bytes = b"", fortran: bool = False) -> bytes:
    head = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("(1000000, 1000000, 1)"), "not a whole"),
        (npy("(10, 8, 8)", data=bytes(639)), "not a whole"),
        (npy("(10, 8, 8)", data=bytes(641)), "not a whole"),
        (npy("(10, 8, 8)", "|O", bytes(640 * 8)), "Python objects, which are not unpickled"),
        (npy("(10, 8, 8)", "<f4", bytes(2560)), "are float32, whose range is not stated; save uint8"),
        (npy("(10, 8, 8)", "<u2", bytes(1280)), "are uint16, whose range is not stated; save uint8"),
        (npy("(10, 1, 8, 8)", data=bytes(640)), "save x.transpose(0, 2, 3, 1)"),
        (npy("(640,)", data=bytes(640)), "needed are [N, H, W]"),
        (npy("(0, 8, 8)"), "needed are [N, H, W]"),
        (npy("(-1, 8, 8)"), "not a whole"),
        (npy("((("), "not a whole"),
        (npy("(" * 300), "not a whole"),
        (b"\x93NUMPY\x09\x00" + bytes(90), "not a whole"),
        (b"nothing", "not a whole"),
        (b"", "empty"),
    ],
)
def test_an_array_that_is_no_array_of_images_is_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(CmfastError, match=rf"{name}: ") as raised:
            load_data(config(), tmp_path / name)
        assert words in str(raised.value) or (name == "a.npz" and "not a whole" in str(raised.value))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": shades()}, "it has 'pictures'; images and labels are read from arr_0 and arr_1, or images and"),
        ({"arr_0": shades(), "images": shades()}, "it has 'arr_0', 'images'"),
        ({"arr_0": shades(), "arr_1": np.zeros(5, int)}, "its labels are int64 [5], needed are whole numbers [6]"),
        ({"arr_0": shades(), "arr_1": np.zeros(6)}, "its labels are float64 [6]"),
        ({"arr_0": shades(), "arr_1": np.arange(6) + 7}, "the label 12 is too large for 6 images"),
    ],
)
def test_an_npz_whose_meaning_is_not_certain_is_refused(arrays: Any, words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(CmfastError) as raised:
        load_data(config(), tmp_path / "a.npz")
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("array", "black_and_white"),
    [
        (np.arange(64).reshape(1, 8, 8) % 2 == 0, [0, 255]),
        ((np.arange(64).reshape(1, 8, 8) % 2).astype(np.float32), [0, 255]),
        ((np.arange(64).reshape(1, 8, 8) % 2).astype(np.float16), [0, 255]),
        ((np.arange(64).reshape(1, 8, 8) % 2 * 255).astype(np.int64), [0, 255]),
        ((np.arange(64).reshape(1, 8, 8) % 2 * 255).astype(np.uint16), [0, 255]),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_what_an_error_about_an_arrays_type_says_to_type_keeps_black_and_white(
    array: Any, black_and_white: list[int], tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(CmfastError, match="; save uint8: ") as raised:
        load_data(config(), tmp_path / "a.npy")
    advice = str(raised.value).split("save uint8: ")[1].split(", for values")[0].split(" once")[0]
    np.save(tmp_path / "a.npy", eval(advice, {"numpy": np, "x": array}))
    assert np.unique(load_data(config(), tmp_path / "a.npy").__getitems__([0])[0]).tolist() == black_and_white


def test_an_array_larger_than_memory_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", shades(200, 50))
    monkeypatch.setattr(image_arrays, "available_memory", lambda: 250_000)
    with pytest.raises(CmfastError, match=r"would take 500,000 bytes of memory, .* save them as \.npy"):
        load_data(config(), tmp_path / "a.npz")


def encrypted(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        place = raw.find(signature)
        while place >= 0:
            raw[place + offset] |= 1
            place = raw.find(signature, place + 4)
    file.write_bytes(raw)


@pytest.mark.parametrize("kind", ["npz", "zip"])
@pytest.mark.parametrize("damage", ["encrypted", "cut", "empty", "flipped", "text"])
def test_a_damaged_archive_is_one_line_with_the_file(kind: str, damage: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", shades())
    file = tmp_path / "a.npz" if kind == "npz" else zipped(write(tmp_path / "a", "x/1.png"))
    raw = file.read_bytes()
    match damage:
        case "encrypted":
            encrypted(file)
        case "cut":
            file.write_bytes(raw[: len(raw) // 2])
        case "empty":
            file.write_bytes(b"")
        case "flipped":
            middle = 70 if kind == "zip" else len(raw) // 2
            file.write_bytes(raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :])
        case "text":
            file.write_bytes(b"PK\x03\x04 and nothing of the kind")
    with pytest.raises(CmfastError, match=rf"a\.{kind}") as raised:
        load_data(config(), file)
    assert "\n" not in str(raised.value)


def test_an_entry_of_a_zip_without_a_name_is_one_line(tmp_path: Path) -> None:
    file = zipped(write(tmp_path / "a", "x/1.png"))
    raw = bytearray(file.read_bytes())
    entry = raw.rfind(b"PK\x01\x02")  # of x/1.png in the directory; its name gets the length 0 and becomes a comment
    raw[entry + 28 : entry + 30], raw[entry + 32 : entry + 34] = bytes(2), (len("x/1.png")).to_bytes(2, "little")
    file.write_bytes(raw)
    with pytest.raises(CmfastError, match=r"a\.zip: not a whole \.zip file: "):
        load_data(config(), file)


def test_a_path_that_holds_no_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CmfastError, match=r"notes.txt: images are read from a folder, or a file \.zip, \.npy or \.npz"):
        load_data(config(), tmp_path / "notes.txt")
    with pytest.raises(CmfastError, match=r"notes.txt: not a folder"):
        load_data(PRESETS["mnist"], tmp_path / "notes.txt")


# Published sets.


def idx(raw: Path, images: bytes | None = None, labels: bytes | None = None) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        pixels = struct.pack(">4i", 0x803, 2, 28, 28) + bytes(2 * 784) if images is None else images
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        numbers = struct.pack(">2i", 0x801, 2) + bytes([9, 0]) if labels is None else labels
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(numbers)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize(
    "files",
    [
        {"images": b""},
        {"images": struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1)},
        {"images": struct.pack(">4i", 0x803, 2, 28, 28) + bytes(99)},
        {"images": struct.pack(">4i", 0x803, 2, 14, 14) + bytes(392)},
        {"images": b"\x1f\x8b" + bytes(100)},
        {"labels": struct.pack(">2i", 0x801, 2) + bytes([9])},
        {"labels": struct.pack(">2i", 0x801, 3) + bytes([9, 0, 1])},
        {"labels": struct.pack(">2i", 0x801, 2) + bytes([9, 200])},
    ],
)
def test_damaged_idx_files_are_one_line(name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    place = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[name]
    idx(tmp_path / place / "raw", **files)
    with pytest.raises(CmfastError, match=rf"{name} was not found in {tmp_path}/{place}/raw \(.+\); put") as raised:
        load_data(PRESETS[name], tmp_path)
    assert "\n" not in str(raised.value)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_cifar_files_that_are_not_the_published_ones_are_not_unpickled(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CmfastError, match=r"cifar10 was not found in .*corrupted"):
        load_data(PRESETS["cifar10"], tmp_path)
    assert not (tmp_path / "ran").exists()


# Worker processes.


class Killed(FolderImages):
    """Images whose reader is killed at the second batch, as the system does when memory runs out."""

    def __init__(self) -> None:
        self.calls = 0

    def __len__(self) -> int:
        return 8

    def __getitems__(self, indices: list[int]) -> Any:
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), 9)
        return torch.zeros(len(indices), 1, 1, 1, dtype=torch.uint8), torch.zeros(len(indices), dtype=torch.int64)


def test_a_worker_that_is_killed_is_one_line_and_no_wait() -> None:
    stream = batches(Killed(), 2, 0, 0, 100, slice(None), 1, False)
    with pytest.raises(CmfastError, match=r"a worker process that reads images has died .*--set workers=0"):
        list(stream)


class Large(Killed):
    """Batches of 3 MB, more than a pipe holds."""

    def __getitems__(self, indices: list[int]) -> Any:
        return torch.zeros(64, 3, 128, 128, dtype=torch.uint8), torch.full((64,), os.getpid())


def test_a_worker_that_is_killed_with_batches_on_their_way_is_no_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stream = batches(Large(), 2, 0, 0, 1000, slice(None), 2, False)
    _, labels = next(stream)
    time.sleep(0.5)  # both workers have made all that may wait
    os.kill(int(labels[0]), 9)
    with pytest.raises(CmfastError, match="a worker process that reads images has died"):
        list(stream)
    assert os.listdir(tmp_path) == []


def test_a_batch_that_cannot_be_written_is_one_line_that_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    stream = batches(Large(), 2, 0, 0, 10, slice(None), 1, False)
    monkeypatch.setattr(np, "save", full)  # in the worker, which is forked
    with pytest.raises(CmfastError, match=r"cannot write a batch to .*No space left.*TMPDIR.*--set workers=0"):
        list(stream)


def test_batches_of_workers_do_not_go_through_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where /dev/shm is full, torch's tensors cannot be sent: here sending one fails in the worker, which is forked."""

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    data = load_data(config(), write(tmp_path, "a/1.png", "b/2.png"))
    assert len(list(batches(data, 2, 0, 0, 3, slice(None), 1, False))) == 3


@pytest.mark.parametrize("number", [28, 2, 30])
def test_workers_that_cannot_be_started_name_shared_memory_and_the_way_out(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch_data.DataLoader, "__iter__", full)
    data = load_data(config(), write(tmp_path, "a/1.png", "b/2.png"))
    with pytest.raises(CmfastError, match=r"2 worker processes cannot be started: /dev/shm .*--set workers=0 needs no"):
        next(batches(data, 2, 0, 0, 3, slice(None), 2, False))


def test_workers_without_shared_memory_print_our_line_alone(tmp_path: Path) -> None:
    """Half of a DataLoader's iterator prints a traceback when it is thrown away."""
    write(tmp_path / "set", "a/1.png", "b/2.png")
    code = f"""
import dataclasses, sys
from pathlib import Path
from cmfast.errors import CmfastError
from cmfast_train.data.batches import batches
from cmfast_train.data.images import load_data
from cmfast_train.config.presets import PRESETS

class Full:
    unlink = staticmethod(lambda name: None)
    def __init__(self, *_):
        raise OSError(30, "Read-only file system")

import multiprocessing.synchronize
multiprocessing.synchronize._multiprocessing = type("M", (), {{"SemLock": Full, "sem_unlink": None}})
config = dataclasses.replace(PRESETS["folder"], image_size=8, channels=1, workers=2)
data = load_data(config, Path({str(tmp_path / "set")!r}))
try:
    next(batches(data, 2, 0, 0, 3, slice(None), 2, False))
except CmfastError as err:
    print(err, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "2 worker processes cannot be started: /dev/shm is full or missing" in done.stderr
