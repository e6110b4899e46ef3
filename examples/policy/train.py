# SPDX-License-Identifier: MIT
"""Train a teacher, tune it to one step, and export both: `python train.py --out runs/policy`.

Leaves in the folder, beside the runs of `cmfast_train.train`, teacher and student:

    teacher.onnx                    the diffusion model, for evaluate.py
    policy.onnx                     one step, camera included: for C++ and anything else that runs one file
    planner.onnx, camera.onnx       the same in two files: the image is encoded when there is a new one
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from network import Camera, Unet1d
from world import HORIZON, PIXELS, Floats, demonstrations

import cmfast_export
import cmfast_train
from cmfast_train import Denoiser, TrainConfig, phase


def new_policy() -> Denoiser:
    """Return the network, its encoder and the conventions it is trained with."""
    return cmfast_train.wrap(
        Unet1d(),
        shape=(HORIZON, 2),
        conditions={"state": (4,), "image": (2, PIXELS, PIXELS)},
        encoders={"image": Camera()},
        scaling="edm",
        c_noise="ln/4",
        sigma_max=10.0,  # noise that leaves nothing of a chunk, whose standard deviation is 0.5
    )


def teach(data: dict[str, Floats], samples: int, seed: int, out: Path) -> Denoiser:
    """Train the diffusion model."""
    phases = (phase("edm", samples, lr=2e-3, lr_warmup=0.01, lr_decay=0.7),)
    torch.manual_seed(seed)  # of the first weights
    return cmfast_train.train(
        TrainConfig(phases=phases, batch=128, seed=seed), denoiser=new_policy(), data=data, out=out
    ).denoiser


def tune(teacher: Denoiser, data: dict[str, Floats], samples: int, seed: int, out: Path) -> Denoiser:
    """Train the one-step model, which starts from the diffusion model."""
    phases = (phase("ect", samples, stages=(1, 4), p_std=1.6, lr=5e-4, lr_decay=0.7, ema=0.99, clip_norm=1.0),)
    config = TrainConfig(phases=phases, batch=128, seed=seed)
    return cmfast_train.train(config, denoiser=teacher, data=data, out=out).denoiser


def export(teacher: Denoiser, student: Denoiser, out: Path) -> None:
    """Write the files; each is compared with PyTorch before it gets its name."""
    cmfast_export.export_onnx(teacher, out / "teacher.onnx")
    cmfast_export.export_onnx(student, out / "policy.onnx", kind="sampler", steps=1)
    cmfast_export.export_onnx(student, out / "planner.onnx", kind="sampler", steps=1, encoder=out / "camera.onnx")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Train a teacher, tune it to one step, and export both.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same command resumes it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demonstrations", type=int, default=40_000)
    parser.add_argument("--teacher", type=int, default=220_000, help="samples of the first run")
    parser.add_argument("--student", type=int, default=200_000, help="samples of the second run")
    given = parser.parse_args()
    data = demonstrations(given.demonstrations, np.random.default_rng(given.seed))
    teacher = teach(data, given.teacher, given.seed, given.out / "teacher")
    student = tune(teacher, data, given.student, given.seed, given.out / "student")
    export(teacher, student, given.out)
    print(f"next: python evaluate.py {given.out}")


if __name__ == "__main__":
    main()
