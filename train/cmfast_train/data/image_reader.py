# SPDX-License-Identifier: MIT
"""Read one image file as 8-bit RGB, whatever its mode: for training, evaluation and everything else that reads images.

    1, L, P, RGB, CMYK, YCbCr, HSV    Pillow's conversion, a palette by its colours
    LA, PA, RGBA, or a transparent colour    composited on BACKGROUND, which is white
    I;16, and I of a PNG or PGM       16-bit grey: 0 .. 65535 becomes 0 .. 255, rounded
    I, F, LAB and others              refused: the file does not state their range, or Pillow cannot convert them

The orientation in a photograph's EXIF data is applied. Files with several frames or pages are refused, except a
camera's multi-picture JPEG, whose first picture is the photograph. `Fit` resizes and crops what was read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cmfast.errors import CmfastError, one_line

BACKGROUND = (255, 255, 255)  # under transparent pixels
MAX_PIXELS = 178_956_970  # of a file, before and after resizing: where Pillow refuses too; 512 MiB of RGB
MAX_FILE = 1 << 30  # bytes
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # no format that starts another program
LOSSY = ("JPEG", "MPO")

_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")
_WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(file: Path | bytes, name: object = None) -> Image.Image:
    """Return an image as RGB.

    Args:
        file: Where it is, or its content.
        name: What an error calls it; default: the path.

    Raises:
        CmfastError: It cannot be read, or has no certain meaning in 8 bits; one line with the name.
    """
    return _read(file, name)[0]


def read_sample(file: Path, channels: int | None) -> tuple[npt.NDArray[np.uint8], bool]:
    """Return a sample uint8 [H, W, C] and whether its format is lossy; C is 1 for grey files and 3 for others.

    Args:
        channels: what the samples are compared with; a palette of greys is grey where that is 1
    """
    image, mode, form = _read(file, None)
    pixels = np.asarray(image)
    grey = mode in _GREY or (mode in ("P", "PA") and channels == 1 and bool((pixels == pixels[..., :1]).all()))
    return pixels[..., :1] if grey else pixels, form in LOSSY


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a loaded image as 8-bit RGB, see the module; a mode without certain meaning is a CmfastError."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bits(image)
    if mode in ("I", "F"):
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise CmfastError(f"its pixels are {kind} (mode {mode}), whose range is not stated; save it with 8 or 16 bits")
    if mode not in _PLAIN + _WITH_ALPHA:
        raise CmfastError(f"its mode {mode} is not read; save it as RGB or grey")
    if mode in _PLAIN and "transparency" not in image.info:
        return _converted(image, "RGB")
    with_alpha = _converted(image, "RGBA")
    below = Image.new("RGB", image.size, BACKGROUND)
    below.paste(with_alpha.convert("RGB"), mask=with_alpha.getchannel("A"))
    return below


class Fit:
    """Resize an RGB image until it covers height x width, crop the middle; uint8 [height, width, channels]."""

    def __init__(self, height: int, width: int, channels: int) -> None:
        from cmfast_train.torchvision_cpu import torchvision_datasets

        torchvision_datasets()  # transforms import torchvision, which needs this beside a CPU build of torch
        self.height, self.width, self.channels = height, width, channels

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        from torchvision.transforms import functional

        size = self._covering(image.width, image.height)
        image = functional.resize(image, size, antialias=True)
        image = functional.center_crop(image, [self.height, self.width])
        pixels: npt.NDArray[np.uint8] = np.atleast_3d(np.asarray(image.convert("L") if self.channels == 1 else image))
        return pixels

    def _covering(self, width: int, height: int) -> list[int]:
        """Return height and width to resize to: one is the target's, the other as long or longer, rounded down."""
        if height * self.width <= width * self.height:
            size = [self.height, max(self.width, int(self.height * width / height))]
        else:
            size = [max(self.height, int(self.width * height / width)), self.width]
        if size[0] * size[1] > MAX_PIXELS:
            raise CmfastError(
                f"{width} x {height} is too long and narrow: resized to cover {self.width} x {self.height} it would be "
                f"{size[1]} x {size[0]}; crop it"
            )
        return size


def check_shape(have: tuple[int, ...], need: tuple[int, ...]) -> None:
    """Raise CmfastError unless the data's images [C, H, W] are those of the run."""
    if have != need:
        raise CmfastError(f"the images are {list(have)}, the run says {list(need)}: --set image_size, channels")


def _read(file: Path | bytes, name: object) -> tuple[Image.Image, str, str]:
    """Return the image as RGB, the mode that its file has, and its format."""
    name = file if name is None else name
    try:
        return _decode(_content(file))
    except CmfastError as err:
        why = str(err)
    except MemoryError:
        why = "there is too little memory"
    except OSError as err:  # the file itself; what is in it raises below
        why = err.strerror or one_line(err, 150)
    raise CmfastError(f"cannot read the image {name}: {why}")


@contextmanager
def _pillow() -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file into one line; only its calls stand in the block."""
    try:
        yield
    except (CmfastError, MemoryError):
        raise
    except Exception as err:
        why = one_line(err, 150).replace("<_io.BytesIO object at ", "<").split(" <")[0]
        raise CmfastError(why or type(err).__name__) from None


def _content(file: Path | bytes) -> bytes:
    if isinstance(file, bytes):
        content = file
    elif not file.is_file():
        raise CmfastError("no such file" if not file.exists() else "not a regular file")
    elif file.stat().st_size > MAX_FILE:
        raise CmfastError(f"it has {file.stat().st_size:,} bytes, at most {MAX_FILE:,} are read")
    else:
        content = file.read_bytes()
    if not content:
        raise CmfastError("the file is empty")
    return content


def _decode(content: bytes) -> tuple[Image.Image, str, str]:
    with _pillow():
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    with opened as image:
        form = str(image.format)
        if image.width * image.height > MAX_PIXELS:
            raise CmfastError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are read")
        with _pillow():
            frames = 1 if form == "MPO" else _frames(image)
        if frames > 1:
            raise CmfastError(f"it has {frames} frames; save the one to use as a file of its own")
        mode = image.mode
        with _pillow():
            image.load()
        rgb = to_rgb(image)
        turn = _TURNS.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn), mode, form


def _converted(image: Image.Image, mode: str) -> Image.Image:
    with _pillow():  # a palette can be damaged, too
        return image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """Return the orientation in the EXIF data; 1, as it is, where there is none that can be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data are no reason to refuse the pixels
        return 1


def _frames(image: Any) -> int:
    """Return the number of pictures in a file; in a TIFF, smaller copies of the first one do not count."""
    number = int(getattr(image, "n_frames", 1))
    if number == 1 or image.format != "TIFF":
        return number
    copies = 0
    for page in range(1, min(number, 100)):
        image.seek(page)
        copies += image.tag_v2.get(254, 0) & 1  # NewSubfileType: a reduced image
    image.seek(0)
    return number - copies


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise CmfastError("its 16-bit grey is outside 0 .. 65535")
    pixels = ((values + 128) // 257).astype(np.uint8)[..., None].repeat(3, 2)
    if isinstance(image.info.get("transparency"), int):
        pixels[values == image.info["transparency"]] = BACKGROUND
    return Image.fromarray(pixels)
