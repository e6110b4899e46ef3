# SPDX-License-Identifier: MIT
"""Run the kernels of `group_norm_training` by Triton's interpreter; print the errors of each case as JSON.

For a process that begins with TRITON_INTERPRET=1: triton reads it when it is imported.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from interpreted import mend
from torch import Tensor

from cmfast_train.kernels.group_norm import group_norm_silu, normed
from cmfast_train.kernels.group_norm_training import norm_act
from cmfast_train.kernels.plan import make_plan
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.networks.fused import fuse_norms

# Error over the largest gradient of its kind. In half precision dx is rounded, and y, which the loss looks at.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FULL, HALF, BRAIN = TOLERANCES
CASES: list[tuple[tuple[int, int, int, int], int, float, torch.dtype]] = [  # shape, groups, mean, type
    ((2, 64, 7, 5), 16, 100, FULL), ((2, 64, 7, 5), 8, 0, FULL), ((1, 96, 4, 3), 16, 0, HALF),
    ((2, 96, 4, 3), 8, 10, BRAIN), ((2, 96, 1, 1), 12, 0, FULL), ((1, 128, 17, 16), 2, 100, FULL),
    ((2, 192, 12, 9), 1, 0, FULL), ((2, 192, 12, 9), 1, 100, FULL), ((1, 160, 12, 24), 2, 10, BRAIN),
]  # fmt: skip
FLAGS = ((True, True), (False, True), (True, False), (False, False))  # scaled, silu


def gradients(function: Any, x: Tensor, dy: Tensor, groups: int, tensors: list[Tensor], silu: bool) -> list[Tensor]:
    """Return y and the gradients of x and the tensors (weight, bias and perhaps rows of scale and shift, [B, 3 C])."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, *tensors)]
    x, weight, bias, *rows = leaves
    scale, shift, _ = rows[0].chunk(3, dim=1) if rows else (None, None, None)  # parts of wider rows
    y = function(x, groups, weight, bias, 1e-5, scale, shift, silu)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def kernels() -> dict[str, dict[str, float]]:
    found = {}
    for (shape, groups, offset, dtype), (scaled, silu) in zip(CASES, itertools.cycle(FLAGS), strict=False):
        batch, channels, height, width = shape
        x = offset + (0.5 if offset else 1.0) * torch.randn(shape)
        x[:, :, 0, 0] += 3  # the pixel that the others are measured from is far from their mean
        x, dy = (each.to(dtype).contiguous(memory_format=torch.channels_last) for each in (x, torch.randn(shape)))
        tensors = [1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels)]
        if scaled:
            tensors.append(0.3 * torch.randn(batch, 3 * channels))
        got = gradients(norm_act, x, dy, groups, tensors, silu)
        # A second time, with dy in the other memory format: some cases of one kernel and of two.
        again = gradients(norm_act, x, dy.contiguous(), groups, tensors, silu) if offset == 100 else got
        want = gradients(normed, x.double(), dy, groups, [tensor.double() for tensor in tensors], silu)
        assert got[0].dtype == got[1].dtype == dtype
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in got[:2])
        assert all(each.dtype == torch.float32 for each in got[2:])
        rows = tensors[2].chunk(3, dim=1)[:2] if scaled else (None, None)
        plain = group_norm_silu(x, groups, *tensors[:2], 1e-5, *rows, silu)
        found[f"{shape} {groups} {offset} {dtype} {scaled=} {silu=}"] = {
            "error": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)),
            "tolerance": TOLERANCES[dtype],
            "size": min(float(each.abs().max()) for each in want),
            "chunks": make_plan(batch, height * width, channels, groups, x.element_size(), tensors=2).chunks,
            "again": int(sum((a != b).sum() for a, b in zip(got, again, strict=True))),
            "inference": int((got[0] != plain).sum()),
        }
    return found


def network() -> dict[str, float]:
    """Compare the gradients of a small U-Net's loss; its other blocks are like those in the middle."""
    config = AdmConfig(
        image_size=4, model_channels=32, channel_mult=(1,), res_blocks=1, attention=(), head_channels=32, classes=3
    )
    unet = AdmUnet(config).to(memory_format=torch.channels_last)
    randomise(unet)
    x, c_noise, label = torch.randn(1, 3, 4, 4), torch.tensor([0.3]), torch.tensor([2])
    found = []
    for fused in (False, True):
        if fused:
            fuse_norms(unet.middle_block)
            fuse_norms(unet.out)
        unet.zero_grad()
        (unet(x, c_noise, label) - x).square().mean().backward()
        found.append([weight.grad for weight in unet.parameters() if weight.grad is not None])
    pairs = list(zip(*found, strict=True))
    return {
        "error": max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in pairs),
        "tolerance": 1e-4,  # float32 in another order, through all layers
        "size": max(float(a.abs().max()) for a, _ in pairs),
        "different": int(any((a != b).any() for a, b in pairs)),
    }


def main() -> None:
    mend()
    torch.manual_seed(0)
    print(json.dumps({"kernels": kernels(), "network": network()}, indent=1))


if __name__ == "__main__":
    main()
