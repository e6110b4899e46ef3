# SPDX-License-Identifier: MIT
"""Run the kernels of `resample` by Triton's interpreter; print the errors of each case as JSON.

For a process that begins with TRITON_INTERPRET=1: triton reads it when it is imported.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from cmfast_train.kernels.resample import _vector, add_shortcut, joined, moved, resampled, shortcut_added

# Of the mean of four and of sums, over max(1, |y|): at most five roundings of float32 to numbers below 8; then the
# rounding of the result, which the interpreter cuts off for bfloat16.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2.0**-11 + 2e-6, torch.bfloat16: 2.0**-7 + 2e-6}
SHAPES = [(2, 36, 4, 6), (1, 8, 2, 2), (3, 64, 10, 14), (2, 3, 6, 4), (1, 264, 2, 4), (5, 18, 2, 2)]  # even sides
PAIRS = [(36, 20), (32, 64), (3, 5), (264, 8), (8, 1)]  # channels

MORE = 12  # channels of a skip: fewer make a vector than of the sum alone


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def in_the_same_order(x: Tensor, h: Tensor | None, bias: Tensor, gain: float, direction: str) -> Tensor:
    """Return what the kernels do, in float32, rounding where they do."""
    y = x.float()
    if direction == "down":
        y = ((y[..., ::2, ::2] + y[..., ::2, 1::2]) + (y[..., 1::2, ::2] + y[..., 1::2, 1::2])) * 0.25
    elif direction == "up":
        y = y.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    if h is not None:
        y = ((y + h.float()) + bias[:, None, None]) * gain
    return y.to(x.dtype)


def case(got: Tensor, want: Tensor, near: Tensor, moves: bool) -> dict[str, float]:
    """Return what the tests look at: how far the values are from `near`, how many are not those of `want`."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape == near.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    error = (got.double() - near).abs() / near.abs().clamp(min=1)
    exact = moves or got.dtype != torch.bfloat16
    return {
        "error": float(error.max()), "tolerance": 0.0 if moves else TOLERANCES[got.dtype],
        "other": int((got != want).sum()) if exact else 0, "size": float(want.abs().max()),
    }  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for shape in SHAPES:
        batch, channels = shape[:2]
        for dtype in TOLERANCES:
            for direction in ("up", "down", ""):
                x, bias = nhwc(torch.randn(shape).to(dtype)), torch.randn(channels)
                if direction:
                    got = resampled(x, direction)
                    near = moved(x.double(), direction)
                    want = in_the_same_order(x, None, bias, 1.0, direction)
                    found[f"{direction} {shape} {dtype}"] = case(got, want, near, direction == "up")
                h = nhwc(torch.randn(moved(x, direction).shape).to(dtype))
                gain = 0.7 if channels % 16 else 1.0
                got = add_shortcut(x, h, bias, gain, direction)
                near = shortcut_added(x.double(), h.double(), bias.double(), gain, direction)
                want = in_the_same_order(x, h, bias, gain, direction)
                if channels % 32:  # joined to a skip, whose bits nothing changes
                    skip = nhwc(torch.randn(batch, MORE, *h.shape[2:]).to(dtype))
                    both = add_shortcut(x, h, bias, gain, direction, skip)
                    assert torch.equal(both[:, :channels], got)
                    assert torch.equal(both[:, channels:], skip)
                    got, near, want = both, torch.cat([near, skip.double()], dim=1), torch.cat([want, skip], dim=1)
                found[f"sum {direction} {shape} {dtype}"] = case(got, want, near, moves=False)
    for channels in PAIRS:
        for dtype in TOLERANCES:
            a, b = (nhwc(torch.randn(3, n, 5, 7).to(dtype)) for n in channels)
            want = torch.cat([a, b], dim=1)
            found[f"join {channels} {dtype}"] = case(joined(a, b), want, want.double(), moves=True)
    assert {_vector(*channels) for channels in PAIRS} == {1, 4, 8}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
