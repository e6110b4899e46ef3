# SPDX-License-Identifier: MIT
"""Run the kernels of `group_norm` by Triton's interpreter; print the errors of each case as JSON.

For a process that begins with TRITON_INTERPRET=1: triton reads it when it is imported.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from cmfast_train.kernels.group_norm import group_norm_silu, normed
from cmfast_train.kernels.plan import make_plan

# Error over max(1, |y|). Of half precision: the rounding of the result, which the interpreter cuts off for bfloat16.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2.0**-11 + 2e-6, torch.bfloat16: 2.0**-7 + 2e-6}
FULL, HALF, BRAIN = TOLERANCES
CASES: list[tuple[tuple[int, int, int, int], int, float, torch.dtype]] = [  # shape, groups, mean, type
    ((1, 32, 8, 8), 8, 0, FULL), ((1, 32, 8, 8), 8, 100, FULL), ((1, 32, 8, 8), 32, 100, HALF),
    ((3, 32, 7, 5), 8, 0, FULL), ((3, 32, 7, 5), 8, 100, FULL),
    ((3, 32, 7, 5), 8, 0, HALF), ((3, 32, 7, 5), 8, 10, BRAIN), ((1, 192, 8, 8), 32, 0, FULL),
    ((1, 192, 7, 5), 32, 100, FULL), ((1, 768, 3, 2), 32, 0, FULL),
    ((1, 96, 1, 1), 24, 0, FULL), ((1, 192, 9, 10), 1, 0, FULL), ((1, 192, 9, 10), 1, 100, FULL),
    ((3, 128, 17, 16), 2, 0, FULL), ((3, 128, 17, 16), 2, 100, FULL), ((1, 128, 17, 16), 2, 0, HALF),
    ((1, 128, 17, 16), 2, 10, BRAIN), ((1, 160, 23, 24), 5, 100, FULL), ((1, 32, 64, 64), 1, 100, FULL),
    ((1, 2, 65, 64), 1, 100, FULL), ((1, 32, 17, 16), 1, 0, FULL), ((1, 32, 17, 16), 1, 100, FULL),
    ((64, 64, 3, 4), 16, 100, FULL),
]  # fmt: skip


def mend() -> None:
    """Let kernels loop up to a number that is an argument.

    Until Triton (3.6) does without int(array of one element), which numpy 2.4 no longer has.
    """
    before: Callable[[Any, Any], None] = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def wide(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) else v for name, v in values.items()}


def compared(
    run: Callable[[], Tensor], want: Tensor, dtype: torch.dtype, chunks: int = 1, again: bool = True
) -> dict[str, float]:
    """Return what the tests look at; `again`: the values that another run does not repeat."""
    got = run()
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    error = (got.double() - want).abs() / want.abs().clamp(min=1)
    return {
        "error": float(error.max()), "tolerance": TOLERANCES[dtype], "size": float(want.abs().max()), "chunks": chunks,
        "again": int((got != run()).sum()) if again else 0,
    }  # fmt: skip


def main() -> None:
    mend()
    torch.manual_seed(0)
    found = {}
    flags = [(scaled, added, silu) for scaled in (False, True) for added in (False, True) for silu in (True, False)]
    for (shape, groups, offset, dtype), (scaled, added, silu) in zip(CASES, itertools.cycle(flags), strict=False):
        batch, channels, height, width = shape
        x = offset + (0.5 if offset else 1.0) * torch.randn(shape)
        x[:, :, 0, 0] += 3  # the pixel that the others are measured from is far from their mean
        x[:, :, height // 2 :] += 100 if height == 65 else 0  # and so are the first tiles
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        scale, shift, add = (0.3 * torch.randn(batch, 3 * channels)).split(channels, dim=1)  # parts of wider rows
        values = {
            "weight": 1 + 0.1 * torch.randn(channels), "bias": 0.1 * torch.randn(channels), "eps": 1e-5,
            "scale": scale if scaled else None, "shift": shift if scaled else None, "silu": silu,
            "add": add if added else None,
        }  # fmt: skip
        plan = make_plan(batch, height * width, channels, groups, x.element_size())
        want = normed(x.double(), groups, **wide(values))
        found[f"{shape} {groups} {offset} {dtype} {scaled=} {added=} {silu=}"] = compared(
            lambda x=x, groups=groups, values=values: group_norm_silu(x, groups, **values),
            want,
            dtype,
            0 if plan.held else plan.chunks,
            again=offset == 100 and batch == 3,
        )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
