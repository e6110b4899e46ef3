# SPDX-License-Identifier: MIT
"""Exact float32 in PyTorch: a context without TensorFloat-32, checked on a GPU (`cmfast.backends.float32`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from cmfast.backends import float32
from cmfast.backends.float32 import Floats
from cmfast_train.backends.torch_cuda import arithmetic


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Multiply in full float32 on CUDA in this context, also in cuDNN's convolutions, whose default is TensorFloat-32.

    Raises:
        BackendError: the GPU's libraries round nevertheless.
    """
    with arithmetic(tf32=False, benchmark=None):
        if device.type == "cuda":
            float32.check(errors(device), f"PyTorch on the {torch.cuda.get_device_name(device)}")
        yield


def errors(device: torch.device) -> dict[str, float]:
    """Return the relative errors of a matrix product and a convolution on a device, with the present switches."""

    def multiply(a: Floats, b: Floats) -> Floats:
        return _result(torch.from_numpy(a).to(device) @ torch.from_numpy(b).to(device))

    def convolve(x: Floats, w: Floats) -> Floats:
        return _result(F.conv2d(torch.from_numpy(x).to(device), torch.from_numpy(w).to(device)))

    with torch.no_grad():
        return float32.measured(multiply, convolve)


def _result(tensor: torch.Tensor) -> Floats:
    result: Floats = tensor.cpu().numpy()
    return result
