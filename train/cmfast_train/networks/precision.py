# SPDX-License-Identifier: MIT
"""What the networks share about number formats: the noise level stays float32, whatever the backbone runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmfast.errors import CmfastError

BACKBONES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextlib.contextmanager
def float32_weights() -> Iterator[None]:
    """New weights are float32 in this context, whatever torch.set_default_dtype says outside: so are checkpoints."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast on the device of x; without autocast, one that leaves no mark in a trace."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in this dtype; casts to the same type slow down every trace."""
    return x if x.dtype == dtype else x.to(dtype)


def converts_itself(network: nn.Module) -> bool:
    """Whether `convert_backbone` is all that a network needs for half precision, as those beside this module are.

    Of any other network half precision is made on the exported graph (`cmfast_export.graphs.half`).
    """
    return type(network).__module__.startswith("cmfast_train.networks.") and not hasattr(network, "half_on_graph")


def convert_backbone(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert the convolutions of a network, in place. Its linear layers, all of the noise embedding, stay float32.

    A cast stands at every border between the two (`cast` in the networks), so the types follow from the weights.

    Raises:
        CmfastError: it has no such borders, so its half precision is made on the exported graph.
    """
    if dtype != torch.float32 and getattr(network, "half_on_graph", False):
        raise CmfastError(
            f"{str(dtype).removeprefix('torch.')} of this network is made on the exported graph only; in "
            "PyTorch use fp32"
        )
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            module.to(dtype)


def accumulate_in_float32(network: nn.Module) -> None:
    """Let half-precision convolutions multiply in float32 and round the result, which is what a GPU does.

    For CPUs: without half-precision arithmetic in the processor, PyTorch's own fp16 convolution takes fifty times as
    long as its float32 one.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.dtype != torch.float32:
            module._conv_forward = MethodType(_convolve_in_float32, module)  # type: ignore[method-assign]


def _convolve_in_float32(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(
        x.float(),
        weight.float(),
        None if bias is None else bias.float(),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    return y.to(x.dtype)
