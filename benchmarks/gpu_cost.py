# SPDX-License-Identifier: MIT
"""What one network call costs for one image, counted while PyTorch runs it: no export, which takes half a minute.

The definitions are those of `cmfast_export.graphs.cost`, which counts the ONNX graph; a test compares the two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def count(denoiser: nn.Module, image: tuple[int, int, int], classes: int, device: str) -> dict[str, float]:
    """Return {flops, weight_bytes, activation_bytes} of one image, by running the denoiser once on one."""
    inputs = {"x": torch.zeros(1, *image, device=device), "sigma": torch.ones(1, device=device)}
    if classes:
        inputs["label"] = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.inference_mode(), _Counter() as counter:
        denoiser(**inputs)
    weights = sum(weight.nbytes for weight in denoiser.parameters())
    tables = [module.weight for module in denoiser.modules() if isinstance(module, nn.Embedding)]
    weights -= sum(table.nbytes - table[0].nbytes for table in tables)  # one row of each is read
    return {
        "flops": counter.flops,
        "weight_bytes": weights,
        "activation_bytes": sum(tensor.nbytes for tensor in counter.moved.values()),
    }


class _Counter(TorchFunctionMode):
    """Counts convolutions, products and attention. What they read counts once, and so does what they write."""

    def __init__(self) -> None:
        self.flops = 0
        self.moved: dict[int, Tensor] = {}  # by identity, which holds while the tensors are kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "linear"):
            read, weight = args[:2]
            self._add(2 * out.numel() * math.prod(weight.shape[1:]), read, out)
        elif name in ("matmul", "bmm", "mm"):
            self._add(2 * out.numel() * args[0].shape[-1], args[0], args[1], out)
        elif name == "scaled_dot_product_attention":  # the scores stay on the chip
            q, k, v = args[:3]
            self._add(2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]), q, k, v, out)
        return out

    def _add(self, flops: int, *tensors: Tensor) -> None:
        self.flops += flops
        self.moved.update({id(tensor): tensor for tensor in tensors})
