# SPDX-License-Identifier: MIT
"""Draw what the models that come with cmfast make, and write docs/gallery.md from their records.

    python benchmarks/gallery.py --data DIR     # DIR: the training images, as cmfast-train takes them

A picture of each model: the same noise in 1, 2 and 4 calls, the nearest training images of what two calls drew, the
way between two samples, and two edits. Models are made, and their records, by shipped.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

import cmfast
from cmfast import editing
from cmfast.bench.chart import save_chart
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.files import write_text
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import TrainConfig
from cmfast_train.data.images import Images, load_data

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gallery.md"
CLASSES = 10  # columns of a picture
HEAD = """\
<!-- Written by benchmarks/gallery.py from benchmarks/results/shipped_*.json. -->
# Gallery

The models that come with cmfast. No training and no data are needed, nothing is downloaded:

    pip install '.[cpu]' && cmfast-sample mnist -n 64 --steps 2 -o grid.png

```python
import cmfast

cmfast.models()  # their names
images = cmfast.load("mnist").sample(64, steps=2, label=7)  # uint8 [64, 28, 28, 1]
```

In each picture a column belongs to one class. The first three rows start from the same noise. The row after them has
the training images that are nearest to the samples of two calls: a model that copies would show them again.
[Editing](editing.md) explains the last rows, and [Training](training.md#presets) how to train such a model.
"""
LICENCES = {
    "digits": "*Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak, UCI Machine Learning\n"
    "  Repository, 1998, CC BY 4.0, as scikit-learn ships it",
    "fashion-mnist": "the training images of Fashion-MNIST, H. Xiao, K. Rasul and R. Vollgraf, Zalando SE, MIT",
    "mnist": "the training images of MNIST, Y. LeCun, C. Cortes and C. J. C. Burges, whose authors state no licence",
}
Bytes = npt.NDArray[np.uint8]


@click.command("gallery.py")
@click.option("--data", type=click.Path(path_type=Path), envvar="CMFAST_DATA", help="Folder of the training images.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=PAGE.parent, help="Folder of the pictures.")
def command(data: Path | None, out: Path) -> None:
    """Draw a picture of each model, and write the page."""
    for name in cmfast.models():
        draw(name, data, out / f"gallery_{name}.png")
        click.echo(f"{out / f'gallery_{name}.png'} shows {name}")
    draw_by_calls("mnist", out / "mnist_by_calls.png")
    write_text(out / PAGE.name, page())


def page() -> str:
    """Return the whole page."""
    return HEAD + "".join(section(name) for name in cmfast.models())


def section(name: str) -> str:
    """Return what the page says of one model."""
    record = json.loads((ROOT / "benchmarks" / "results" / f"shipped_{name}.json").read_text(encoding="utf-8"))
    pixels, training = record["features"]["name"] == "pixels", record["training"]
    rows = "".join(
        f"| {row['steps']} | {row['fd']:.2f} | {100 * row['label_agreement']:.1f} % |\n" for row in record["rows"]
    )
    near, seconds = record["nearest"], training["seconds"]
    took = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    features = "pixel space" if pixels else "the features of a small classifier"
    finder = "the nearest training images" if pixels else "that classifier"
    copies = ": no copies" if near["samples_least"] > near["data_median"] / 4 else ": **the model copies**"
    last = "what they find among the data" if pixels else "its accuracy on the test images"
    return f"""
## {name}

![{name} in 1, 2 and 4 calls, nearest training images, interpolation, editing](gallery_{name}.png)

| calls | Fréchet distance | of the requested class |
|---|---|---|
{rows}| data | {record["halves"]["fd"]:.2f} | {100 * record["label_agreement_of_data"]:.1f} % |

* Distances are in {features}, of {record["rows"][0]["n"]:,} samples. The last row has that of two halves of the data.
* The class is found by {finder}; the last row has {last}.
* From a sample to the nearest training image it is {near["samples_median"]:.0f} grey levels a pixel (root mean square,
  median of ten; the least is {near["samples_least"]:.0f}), from a training image to its neighbour
  {near["data_median"]:.0f}{copies}.
* {record["bytes"] / 1e6:.1f} MB, {record["parity"]["psnr_db"]:.0f} dB from PyTorch in float32; an image and call takes
  {record["ms_per_image_and_step"]:.1f} ms by one thread.
* Trained by `{command_of(name)}`: {training["images"]:,} images in {took},
  on a machine with {record["machine"]["cores"]} CPU cores.
* The data: {LICENCES[name]}.
"""


def command_of(name: str) -> str:
    """Return the command that trains a preset."""
    return f"cmfast-train {name}{'' if name == 'digits' else ' --data DIR'} --out runs/{name}"


def draw(name: str, data: Path | None, path: Path) -> None:
    """Write the picture of a model."""
    model, labels = cmfast.load(name), list(range(CLASSES))
    by_calls = {k: model.sample(CLASSES, steps=k, seed=0, label=labels) for k in (1, 2, 4)}
    half = np.zeros(model.spec.image[1:], bool)
    half[:, : half.shape[1] // 2] = True
    coarse = averaged(by_calls[2], 2)
    rows: list[tuple[str, Bytes]] = [(f"{k} call{'s' * (k > 1)}", images) for k, images in by_calls.items()]
    rows += [
        ("nearest\ndata", nearest(training_images(name, model, data), by_calls[2])),
        ("between\ntwo seeds", between(model, labels)),
        ("left half", np.where(half[..., None], by_calls[2], 128).astype(np.uint8)),
        ("inpainted", editing.inpaint(model, by_calls[2], half, seed=1, label=labels)),
        ("averaged", coarse.repeat(2, axis=1).repeat(2, axis=2)),
        ("upscaled", editing.upscale(model, coarse, seed=1, label=labels)),
    ]
    save_rows(rows, path)


def draw_by_calls(name: str, path: Path) -> None:
    """Write one row of samples for each number of calls; a column starts from one noise and has one class."""
    model, labels = cmfast.load(name), [i % CLASSES for i in range(2 * CLASSES)]
    rows = [(f"{k} call{'s' * (k > 1)}", model.sample(len(labels), steps=k, seed=1, label=labels)) for k in (1, 2, 4)]
    save_rows(rows, path)


def save_rows(rows: Sequence[tuple[str, Bytes]], path: Path) -> None:
    """Write a picture with rows of images [N, H, W, 1], each with its title."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.02, w_pad=0.15, hspace=0.0, wspace=0.0)
    figure = Figure(figsize=(8, 7 / len(rows[0][1]) * len(rows)), layout=layout)
    for axes, (title, images) in zip(figure.subplots(len(rows), 1), rows, strict=True):
        strip = np.concatenate([np.pad(image[..., 0], 1, constant_values=255) for image in images], axis=1)
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    save_chart(figure, path)


def between(model: cmfast.Model, labels: list[int]) -> Bytes:
    """Return the way from one sample of class 3 to another."""
    return editing.interpolate(model, [(0, 3), (0, 8)], n=len(labels), steps=2, label=3)


def averaged(images: Bytes, factor: int) -> Bytes:
    """Return the averages of squares of pixels, uint8 [N, H / factor, W / factor, C]."""
    n, height, width, channels = images.shape
    blocks = images.reshape(n, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(2, 4)).round().astype(np.uint8)


def nearest(data: Bytes, samples: Bytes) -> Bytes:
    """Return the image of the data that is nearest to each sample."""
    flat = data.reshape(len(data), -1).astype(np.float32)
    found = [int(((flat - sample.reshape(-1).astype(np.float32)) ** 2).sum(axis=1).argmin()) for sample in samples]
    return data[found]


def training_images(name: str, model: cmfast.Model, data: Path | None) -> Bytes:
    """Return what a model was trained on, uint8 [N, H, W, C]."""
    config: TrainConfig = PRESETS[name]
    images: Any = load_data(config, data)
    if not isinstance(images, Images) or images.images.shape[1:] != model.spec.image:
        raise CmfastError(f"{name}: the images of the preset are not the model's, {list(model.spec.image)}")
    return images.images.permute(0, 2, 3, 1).numpy()


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
