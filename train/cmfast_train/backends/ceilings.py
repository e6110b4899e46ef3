# SPDX-License-Identifier: MIT
"""The ceilings of a GPU by PyTorch, for `cmfast.bench.roofline`, where ONNX Runtime has no CUDA.

The runtime finds it through the entry point group "cmfast.ceilings".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from cmfast.bench import roofline
from cmfast.bench.roofline import Way
from cmfast.errors import BackendError
from cmfast_train.backends.torch_cuda import arithmetic

DTYPES = {
    "float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


def cuda_ways(dtype: str) -> list[tuple[str, Callable[[], Way]]]:
    """Return makers of ways to measure the GPU in a manifest's dtype, with the unit of each.

    Raises:
        BackendError: PyTorch sees no GPU, or the GPU lacks the type.
    """
    if not torch.cuda.is_available():
        raise BackendError(f"PyTorch {torch.__version__} has no CUDA device")
    if dtype in ("tf32", "bfloat16") and torch.cuda.get_device_capability() < (8, 0):
        raise BackendError(f"the {torch.cuda.get_device_name()} has no {dtype}")
    return ways("cuda", dtype)


def ways(device: str, dtype: str) -> list[tuple[str, Callable[[], Way]]]:
    """Return the makers for a device of PyTorch's; on a CPU they are for tests."""
    products = [("flops", partial(_product, side, device, dtype)) for side in roofline.SIDES[device]]
    return [*products, ("bytes", partial(_copy, device))]


def _product(side: int, device: str, dtype: str) -> Way:
    count, exact = roofline.PRODUCTS[device], dtype != "tf32"
    generator = torch.Generator(device).manual_seed(0)  # random, because a GPU multiplies zeros faster
    a = (torch.randn(side, side, generator=generator, device=device) / side**0.5).to(DTYPES[dtype])
    product = torch.empty_like(a)

    def call() -> None:
        with torch.inference_mode(), arithmetic(tf32=not exact, benchmark=None):
            for _ in range(count):
                torch.matmul(a, a, out=product)
            _wait(device)

    name = f"product of {side} x {side} {dtype} matrices by PyTorch {device}"
    return Way(name=name, unit="flops", amount=2 * count * side**3, call=call)


def _copy(device: str) -> Way:
    count, numbers = roofline.SUMS[device], roofline.NUMBERS[device]
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        for _ in range(count):
            target.copy_(source)
        _wait(device)

    name = f"copy of {source.nbytes / 2**20:g} MiB by PyTorch {device}"
    return Way(name=name, unit="bytes", amount=2 * count * source.nbytes, call=call)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
