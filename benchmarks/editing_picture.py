# SPDX-License-Identifier: MIT
"""Draw the picture of docs/editing.md: what each edit makes of digits.

make demo                                    # the model
python benchmarks/editing_picture.py demo    # docs/editing.png
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

import cmfast
from cmfast import editing
from cmfast.bench.chart import save_chart
from cmfast.cli.running import run_command
from cmfast.sampling import to_uint8

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 10  # results of a row
SIGMA = 0.7  # noise level of the row that is denoised, data units
Pixels = npt.NDArray[np.uint8]


@click.command("editing_picture.py")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "editing.png", help="The picture."
)
def command(run: Path, out: Path) -> None:
    """Draw edits with RUN/model.onnx, where RUN is the folder that `make demo` leaves."""
    from matplotlib.figure import Figure

    strips = rows(cmfast.load(run / "model.onnx"))
    figure = Figure(figsize=(8, 0.75 * len(strips)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(strips), 1), strips, strict=True):
        cells = [np.pad(image[..., 0], 1, constant_values=255) for image in images]
        gap = np.full((cells[0].shape[0], 3), 255, np.uint8)  # between the input and what is made of it
        strip = np.concatenate([cells[0], gap, *cells[1:]], axis=1)
        axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    save_chart(figure, out)


def rows(model: cmfast.Model) -> list[tuple[str, list[Pixels]]]:
    """Return the rows of the picture: a name, the input and SHOWN results, or several inputs and their results."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = (digits.images * 255 / 16).round().astype(np.uint8)[..., None]
    first = {int(label): data[list(digits.target).index(label)] for label in range(10)}
    each = list(range(SHOWN))

    eight, mask = first[8], np.zeros((8, 8), bool)
    mask[:4] = True
    holes = np.where(mask[..., None], eight, np.uint8(127))
    low = data[:SHOWN].reshape(-1, 4, 2, 4, 2, 1).mean(axis=(2, 4)).round().astype(np.uint8)
    strokes = np.zeros((8, 8, 1), np.uint8)
    strokes[1:7, 3:5] = 160  # a thick bar
    strokes[1:3, 2:6] = 160
    noisy = data[:SHOWN].transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    noisy = (noisy + SIGMA * cmfast.gaussian(1, range(SHOWN), 0, (1, 8, 8))).astype(np.float32)
    labels = digits.target[:SHOWN].tolist()
    blank = np.full_like(eight, 255)
    return [
        ("inpaint, label 0 to 9", [holes, *editing.inpaint(model, eight, mask, n=SHOWN, label=each)]),
        ("blocks of 2 x 2", [blank, *low.repeat(2, axis=1).repeat(2, axis=2)]),
        ("upscale", [blank, *editing.upscale(model, low, label=labels)]),
        ("sdedit, label 0 to 9", [strokes, *editing.sdedit(model, strokes, 2, n=SHOWN, label=each)]),
        ("noise", [blank, *to_uint8(noisy)]),
        ("denoise", [blank, *editing.denoise(model, noisy, SIGMA, label=labels)]),
        ("interpolate", [blank, *editing.interpolate(model, ((0, 1), (0, 6)), n=SHOWN, steps=2, label=1)]),
    ]


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
