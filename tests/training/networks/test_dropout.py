# SPDX-License-Identifier: MIT
"""All passes of a step draw the same dropout masks, whatever memory format and precision each of them runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.dropout import dropped
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.training.step_networks import StepNetworks, Student
from helpers.specs import image_spec

SHAPE: dict[str, Any] = {
    "image_size": 8, "channel_mult": (1, 2), "attention": (4,), "res_blocks": 1, "model_channels": 32, "dropout": 0.5,
}  # fmt: skip
NETWORKS: dict[str, NetworkConfig] = {
    "adm": AdmConfig(**SHAPE, head_channels=32),
    "song": SongConfig(**SHAPE),
    "dhariwal": DhariwalConfig(**SHAPE | {"model_channels": 64}),
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


class CudaNorms(TorchFunctionMode):
    """A group norm that returns NCHW whatever it is given, as it does on CUDA.

    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/group_norm.cpp, native_group_norm
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output.contiguous() if func is torch.nn.functional.group_norm else output


class DropoutByType(TorchFunctionMode):
    """A dropout whose draws are another sequence in each dtype, as they are on CUDA, in groups of 16 bytes.

    https://github.com/pytorch/pytorch/blob/v2.11.0/aten/src/ATen/native/cuda/Dropout.cu, get_vector_size
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.dropout:
            torch.rand(args[0].dtype.itemsize)
        return func(*args, **(kwargs or {}))


@contextmanager
def like_cuda() -> Iterator[None]:
    with CudaNorms(), DropoutByType():
        yield


def student_of(name: str, layout: torch.memory_format) -> Student:
    network = build_network(NETWORKS[name])
    randomise(network)
    denoiser = Denoiser(network, image_spec(image=(3, 8, 8), c_noise="ln/4")).train()
    return Student(denoiser.to(memory_format=layout), log_variance=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "channels_last"])
@pytest.mark.parametrize("derivative", ["jvp", "finite"])
@pytest.mark.parametrize("name", NETWORKS)
def test_derivative_and_gradient_pass_see_one_network(name: str, derivative: str, layout: torch.memory_format) -> None:
    student = student_of(name, layout)
    networks = StepNetworks(student, student, None, None, derivative == "finite", [])
    x, dx = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0])
    torch.manual_seed(0)
    with like_cuda():
        f, _ = networks.output_along(x, sigma, {}, None, dx, sigma)
        output, _ = networks.output(x, sigma, {})
    # The same weights, inputs and masks: only sums in another order. With other masks: about the output's own size.
    assert (f - output).abs().max() < 1e-4 * output.std()
    assert output.requires_grad


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "channels_last"])
def test_central_differences_in_float32_see_the_network_of_a_bfloat16_run(layout: torch.memory_format) -> None:
    student = student_of("adm", layout)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 2.0, 20.0])
    exactly = StepNetworks(student, student, None, None, True, [])._output_in_float32({}, None)
    torch.manual_seed(0)
    with like_cuda(), torch.autocast("cpu", torch.bfloat16):
        exact = exactly(x, sigma)
        rounded, _ = student(x, sigma, None)
    assert 1e-4 * exact.std() < (rounded - exact).norm() / exact.norm() < 0.05  # bfloat16 has eight bits


def masks(shape: tuple[int, ...], conv: nn.Conv2d, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    torch.manual_seed(1)
    with like_cuda():
        x = torch.ones(shape, dtype=dtype).contiguous(memory_format=layout)
        return dropped(nn.Dropout(0.25), x, conv).float()


@pytest.mark.parametrize("weights", LAYOUTS, ids=["plain", "channels_last"])
def test_a_mask_depends_on_neither_dtype_nor_memory_format(weights: torch.memory_format) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=weights)
    found = [masks((5, 8, 6, 7), conv, d, m) for d in (torch.float32, torch.bfloat16, torch.float16) for m in LAYOUTS]
    first = found[0]
    for mask in found[1:]:
        assert torch.equal(mask > 0, first > 0)
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (first > 0).float().mean() == pytest.approx(0.75, abs=0.04)  # 1680 draws: a standard deviation of 0.011


def test_dropout_hands_over_what_the_convolution_takes_without_a_copy() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.ones(2, 8, 4, 4)
    assert dropped(nn.Dropout(0.5), x, conv).is_contiguous(memory_format=torch.channels_last)
    for off in (nn.Identity(), nn.Dropout(0.5).eval()):
        assert dropped(off, x, conv) is x


def test_the_gradient_of_dropout_is_its_mask() -> None:
    conv, x = nn.Conv2d(8, 8, 3, padding=1), torch.ones(2, 8, 4, 4, requires_grad=True)
    y = dropped(nn.Dropout(0.5), x, conv)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
