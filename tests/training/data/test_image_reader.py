# SPDX-License-Identifier: MIT
"""The image reader: every mode that Pillow knows, as pixels or as a refusal; and files made to be trouble."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cmfast.errors import CmfastError
from cmfast_train.data import image_reader
from cmfast_train.data.image_reader import Fit, read_image, read_sample, to_rgb
from cmfast_train.torchvision_cpu import torchvision_datasets

RED, GREEN = (255, 0, 0), (0, 128, 0)
WHITE = (255, 255, 255)


def palette(mode: str, colours: list[tuple[int, int, int]], indices: list[int]) -> Image.Image:
    image = Image.new("P", (len(indices), 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(indices)
    return image if mode == "P" else image.convert("RGBA").convert("PA")


def row(mode: str, values: list[Any]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def deep(values: list[int], mode: str = "I;16") -> Image.Image:
    order = ">" if mode == "I;16B" else "<"
    return Image.frombytes(mode, (len(values), 1), struct.pack(f"{order}{len(values)}H", *values))


def indexed(transparency: int | bytes) -> Image.Image:
    image = palette("P", [RED, GREEN], [0, 1])
    image.info["transparency"] = transparency
    return image


# Name, image, file format, pixels as RGB or words of the refusal. Hidden colour lies under every alpha of 0.
MODES: list[tuple[str, Callable[[], Image.Image], str, Any]] = [
    ("1", lambda: row("1", [0, 255]), "PNG", [(0, 0, 0), WHITE]),
    ("L", lambda: row("L", [0, 7, 255]), "PNG", [(0, 0, 0), (7, 7, 7), WHITE]),
    ("LA", lambda: row("LA", [(9, 0), (9, 255), (0, 128)]), "PNG", [WHITE, (9, 9, 9), (127, 127, 127)]),
    ("P", lambda: palette("P", [RED, GREEN], [1, 0, 1]), "PNG", [GREEN, RED, GREEN]),
    ("P, transparent index", lambda: indexed(1), "PNG", [RED, WHITE]),
    ("P, transparent bytes", lambda: indexed(bytes([0, 255])), "PNG", [WHITE, GREEN]),
    ("P of a GIF", lambda: indexed(0), "GIF", [WHITE, GREEN]),
    ("PA", lambda: palette("PA", [RED, GREEN], [1, 0]), "", [GREEN, RED]),
    ("RGB", lambda: row("RGB", [RED, GREEN]), "PNG", [RED, GREEN]),
    ("RGBA", lambda: row("RGBA", [(*RED, 0), (*GREEN, 255)]), "PNG", [WHITE, GREEN]),
    ("RGBA of a TIFF", lambda: row("RGBA", [(*RED, 0), (*GREEN, 255)]), "TIFF", [WHITE, GREEN]),
    ("CMYK", lambda: row("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)]), "TIFF", [RED, (0, 0, 0)]),
    ("I;16", lambda: deep([0, 257, 32768, 65535]), "PNG", [(0,) * 3, (1,) * 3, (128,) * 3, WHITE]),
    ("I;16 of a TIFF", lambda: deep([0, 257, 32768, 65535]), "TIFF", [(0,) * 3, (1,) * 3, (128,) * 3, WHITE]),
    ("I;16B", lambda: deep([0, 257, 65535], "I;16B"), "TIFF", [(0,) * 3, (1,) * 3, WHITE]),
    ("I", lambda: row("I", [0, 70000]), "TIFF", "its pixels are 32-bit integers (mode I), whose range is not stated"),
    ("F", lambda: row("F", [0.0, 1.0]), "TIFF", "its pixels are floating-point numbers (mode F), whose range is not"),
    ("LAB", lambda: Image.new("LAB", (2, 1)), "TIFF", "its mode LAB is not read; save it as RGB or grey"),
    ("YCbCr", lambda: row("YCbCr", [(255, 128, 128), (0, 128, 128)]), "", [WHITE, (0, 0, 0)]),
    ("HSV", lambda: row("HSV", [(0, 255, 255), (0, 0, 0)]), "", [RED, (0, 0, 0)]),
]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "make", "form", "expected"), MODES, ids=[mode[0] for mode in MODES])
def test_every_mode_gives_its_pixels_or_a_refusal(
    name: str, make: Callable[[], Image.Image], form: str, expected: Any, channels: int, tmp_path: Path
) -> None:
    image = make()
    path = tmp_path / "image.png"  # the content decides, not the name

    def read() -> Image.Image:
        if not form:  # no file format has this mode
            return to_rgb(image)
        image.save(path, format=form)
        return read_image(path)

    if isinstance(expected, str):
        with pytest.raises(CmfastError) as raised:
            read()
        assert expected in str(raised.value)
        assert str(path) in str(raised.value)
        return
    pixels = Fit(1, len(expected), channels)(read())
    colours = np.array(expected, np.uint8)[None]
    grey = np.atleast_3d(np.asarray(Image.fromarray(colours).convert("L")))
    np.testing.assert_array_equal(pixels, colours if channels == 3 else grey)


def test_a_transparent_value_of_16_bit_grey_is_white() -> None:
    image = deep([0, 500, 65535])
    image.info["transparency"] = 500
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(16, 16), (40, 23), (9, 31), (5, 6)])
def test_ordinary_images_are_resized_and_cropped_to_the_bit_as_before(mode: str, size: tuple[int, int]) -> None:
    torchvision_datasets()
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(pixels).convert(mode), io.BytesIO()
    image.save(buffer, "PNG")
    usual = transforms.Compose([transforms.Resize(16, antialias=True), transforms.CenterCrop(16)])(image.convert("RGB"))
    read = read_image(buffer.getvalue(), "it")
    np.testing.assert_array_equal(Fit(16, 16, 3)(read), np.asarray(usual))
    np.testing.assert_array_equal(Fit(16, 16, 1)(read)[..., 0], np.asarray(transforms.Grayscale()(usual)))


def test_an_image_covers_a_target_that_is_not_square() -> None:
    image = Image.new("RGB", (100, 40), RED)
    for height, width in ((32, 64), (64, 32), (1, 50)):
        pixels = Fit(height, width, 3)(image)
        assert pixels.shape == (height, width, 3)
        assert (pixels == RED).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_the_orientation_of_a_photograph_is_applied(form: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 16), RED)
    image.paste((0, 0, 255), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "photo.png", format=form, exif=exif)
    read = np.asarray(read_image(tmp_path / "photo.png"))
    assert read.shape == (32, 16, 3)
    assert read[4, 8, 2] > 200  # blue is above
    assert read[28, 8, 0] > 200


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def frames(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), RED).save(buffer, form, save_all=True, append_images=[Image.new("RGB", (4, 4), GREEN)])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"", "the file is empty"),
        (lambda: b"not an image", "cannot identify image file"),
        (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
        (lambda: png(64, 64)[:60], ""),
        (lambda: png(20_000, 20_000), ""),
        (lambda: png(9_500, 9_500), ""),
        (lambda: frames("GIF"), "it has 2 frames; save the one to use as a file of its own"),
        (lambda: frames("TIFF"), "it has 2 frames"),
        (lambda: frames("PNG"), "it has 2 frames"),
    ],
)
def test_trouble_is_one_line_with_the_file(content: Callable[[], bytes], words: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content())
    with pytest.raises(CmfastError, match=r"^cannot read the image .*image\.png: .") as raised:
        read_image(path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert " at 0x" not in str(raised.value)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, words in (("pipe.png", "not a regular file"), ("none.png", "no such file"), (".", "not a regular file")):
        with pytest.raises(CmfastError, match=words):
            read_image(tmp_path / name)


def test_whatever_a_decoder_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RecursionError("deep"), KeyError("tag"), ZeroDivisionError("division")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(image_reader.Image, "open", fail)
        with pytest.raises(CmfastError, match=r"^cannot read the image it: "):
            read_image(b"x", "it")


def test_a_line_of_pixels_is_not_blown_up() -> None:
    with pytest.raises(CmfastError, match="is too long and narrow"):
        Fit(64, 64, 3)(Image.new("RGB", (60_000_000, 1)))


@pytest.mark.parametrize(("mode", "channels", "shape"), [("L", 3, 1), ("P", 1, 1), ("P", 3, 3), ("RGB", 1, 3)])
def test_a_palette_of_greys_is_grey_where_greys_are_compared(
    mode: str, channels: int, shape: int, tmp_path: Path
) -> None:
    Image.new("L", (4, 4), 77).convert(mode).save(tmp_path / "a.png")
    pixels, lossy = read_sample(tmp_path / "a.png", channels)
    assert pixels.shape == (4, 4, shape)
    assert (pixels == 77).all()
    assert not lossy


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_what_pillow_makes_of_it(orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "photo.png")), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own warning
@pytest.mark.parametrize("exif", [b"Exif\x00\x00nonsense", b"", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff"])
def test_damaged_exif_data_do_not_matter_to_the_pixels(exif: bytes, tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), RED).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (8, 4)


def test_a_tiff_with_a_small_copy_of_itself_is_one_picture(tmp_path: Path) -> None:
    copy = Image.new("RGB", (2, 2), RED)
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    Image.new("RGB", (8, 4), RED).save(tmp_path / "a.tif", save_all=True, append_images=[copy])
    with Image.open(tmp_path / "a.tif") as opened:
        assert opened.n_frames == 2
    assert read_image(tmp_path / "a.tif").size == (8, 4)
