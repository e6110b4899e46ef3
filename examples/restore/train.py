# SPDX-License-Identifier: MIT
"""Train the network, export it, and write the held-out images that it has not seen.

    python train.py --out runs/digits                     # the digits of scikit-learn, 4x4 to 8x8
    python train.py --data FOLDER --out runs/photographs  # PNG files of one size

leaves in --out: teacher.onnx, restore.onnx, and the folders low and original with the held-out images.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from images import Pixels, bicubic, load_images, lower, to_floats, turned, write_images
from network import RestoreNet

import cmfast
import cmfast_export
import cmfast_train
from cmfast_train import TrainConfig, phase


def train(images: Pixels, factor: int, *, teacher: int, student: int, stages: int, precision: str, out: Path) -> None:
    """Train a teacher and a few-step student on images [N, H, W, C], for so many samples each, and export both."""
    height, width, channels = images.shape[1:]
    low = lower(images, factor)
    detail = to_floats(images) - to_floats(bicubic(low, factor))  # what is learned: what bicubic interpolation misses
    spread = round(float(detail.std()), 2)
    unit = spread / 0.5  # the methods' defaults are made for data with a standard deviation of 0.5
    top = 20 * unit  # noise that leaves nothing of the detail
    denoiser = cmfast_train.wrap(
        RestoreNet(channels, factor),
        shape=(channels, height, width),
        conditions={"low": (channels, height // factor, width // factor)},
        data="array",
        scaling="edm",
        c_noise="ln/4",
        sigma_data=spread,
        sigma_min=0.004 * unit,
        sigma_max=top,
        sigmas={1: (top,), 2: (top, 2 * unit)},
    )
    levels = {"p_mean": math.log(unit), "p_std": 1.8, "lr_decay": 0.5}
    phases = (
        phase("edm", teacher, lr=2e-3, ema=0.995, **levels),
        phase("ect", student, lr=5e-4, ema=0.998, stages=(0, stages), b=1 / unit, huber=0.00054 * unit, **levels),
    )
    config = TrainConfig(phases=phases, batch=32, precision=precision, tensorboard=False)
    data = {"x": detail, "low": to_floats(low)}
    trained = cmfast_train.train(config, denoiser=denoiser, data=data, out=out)
    cmfast_export.export_onnx(trained.denoiser, out / "restore.onnx")
    taught = cmfast_train.load_model(out / "phases" / "1_edm.pt").denoiser(denoiser.network)
    cmfast_export.export_onnx(taught, out / "teacher.onnx")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train the network, export it, write the held-out images.")
    parser.add_argument("--data", type=Path, help="folder of PNG files of one size, or of MNIST; default: digits")
    parser.add_argument("--factor", type=int, default=2, help="pixels on a side of a block that becomes one")
    parser.add_argument("--turn", action="store_true", help="also train on turned and mirrored images")
    parser.add_argument("--teacher", type=int, default=50_000, help="samples that the teacher is trained on")
    parser.add_argument("--student", type=int, default=16_000, help="samples that the few-step student is trained on")
    parser.add_argument("--stages", type=int, default=1, help="of the student: more are sharper, and farther off")
    parser.add_argument("--precision", default="auto", help="fp32, bf16; auto: bf16 on a GPU, else fp32")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    arguments = parser.parse_args()
    images, held_out = load_images(arguments.data)
    if arguments.turn:
        images = turned(images)
    train(
        images, arguments.factor, teacher=arguments.teacher, student=arguments.student, stages=arguments.stages,
        precision=arguments.precision, out=arguments.out,
    )  # fmt: skip
    names = [f"{i:06d}.png" for i in range(len(held_out))]
    write_images(arguments.out / "original", held_out, names)
    write_images(arguments.out / "low", lower(held_out, arguments.factor), names)
    print(f"next: python restore.py {arguments.out}/restore.onnx {arguments.out}/low -o {arguments.out}/restored")


if __name__ == "__main__":
    try:
        main()
    except cmfast.CmfastError as err:  # one line instead of a traceback
        sys.exit(str(err))
