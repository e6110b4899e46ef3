# SPDX-License-Identifier: MIT
"""The U-Net: tensor by tensor OpenAI's, block by block what the formulas say."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_train.config.presets import PRESETS
from cmfast_train.networks.adm import (
    AdmConfig,
    AdmUnet,
    Attention,
    GroupNorm32,
    ResBlock,
    randomise,
    timestep_embedding,
)
from cmfast_train.training.initial_model import network_config
from helpers.adm import IMAGENET64, LSUN256


def tiny(**values: Any) -> AdmConfig:
    small = {
        "image_size": 8,
        "channels": 2,
        "model_channels": 32,
        "res_blocks": 1,
        "channel_mult": (1, 2),
        "attention": (4,),
    }
    return AdmConfig(**{**small, "head_channels": 32, **values})


def build(config: AdmConfig, seed: int = 0) -> AdmUnet:
    network = AdmUnet(config).eval().requires_grad_(False)
    randomise(network, seed)
    return network


def shapes(config: AdmConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in AdmUnet(config).state_dict().items()}


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# OpenAI's checkpoints.


@pytest.mark.parametrize(
    ("config", "tensors", "parameters", "digest"),
    [
        (IMAGENET64, 541, 295_899_267, "b8f82eec93af16825a0ddb10ef07e5b9e4422cc98c4a3ea4ae4157d99b20377f"),
        (LSUN256, 566, 526_304_771, "2374822ba197d4767408bbed20d8e0b813d0060f31889de12fb17c46430438cb"),
    ],
    ids=["imagenet64", "lsun256"],
)
def test_keys_and_shapes_are_those_of_openais_checkpoint(
    config: AdmConfig, tensors: int, parameters: int, digest: str
) -> None:
    have = shapes(config)
    assert len(have) == tensors
    assert sum(math.prod(shape) for shape in have.values()) == parameters
    # SHA-256 over the lines "key shape" of the published list, sorted: every key and every shape at once.
    lines = "".join(f"{name} {shape}\n" for name, shape in sorted(have.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_some_of_those_keys_by_name() -> None:
    imagenet, lsun = shapes(IMAGENET64), shapes(LSUN256)
    assert imagenet["time_embed.0.weight"] == [768, 192]
    assert imagenet["label_emb.weight"] == [1000, 768]
    assert imagenet["input_blocks.0.0.weight"] == [192, 3, 3, 3]
    assert imagenet["input_blocks.4.0.in_layers.2.weight"] == [192, 192, 3, 3]  # down, inside a residual block
    assert imagenet["input_blocks.5.0.skip_connection.weight"] == [384, 192, 1, 1]
    assert imagenet["input_blocks.5.0.emb_layers.1.weight"] == [768, 768]  # scale and shift of 384
    assert imagenet["input_blocks.5.1.qkv.weight"] == [1152, 384, 1, 1]
    assert imagenet["middle_block.1.proj_out.bias"] == [768]
    assert imagenet["output_blocks.3.0.skip_connection.weight"] == [768, 1344, 1, 1]
    assert imagenet["output_blocks.3.2.out_layers.3.weight"] == [768, 768, 3, 3]  # up, after the attention
    assert imagenet["out.2.weight"] == [3, 192, 3, 3]
    assert "label_emb.weight" not in lsun
    assert lsun["input_blocks.7.0.emb_layers.1.weight"] == [512, 1024]  # a sum: no scale
    assert lsun["output_blocks.11.1.in_layers.0.weight"] == [512]  # up at index 1, for there is no attention
    assert lsun["middle_block.1.norm.weight"] == [1024]


@pytest.mark.parametrize(("name", "millions"), [("mnist", 1.36), ("mnist-large", 7.66), ("cifar10", 42.86)])
def test_presets_have_the_size_that_is_said_of_them(name: str, millions: float) -> None:
    have = shapes(network_config(PRESETS[name], 0))
    assert round(sum(math.prod(shape) for shape in have.values()) / 1e6, 2) == millions


def test_resampling_by_convolution_has_the_keys_of_guided_diffusion() -> None:
    have = shapes(tiny(resblock_updown=False))
    assert have["input_blocks.2.0.op.weight"] == [32, 32, 3, 3]
    assert have["output_blocks.1.2.conv.weight"] == [64, 64, 3, 3]
    assert "input_blocks.2.0.in_layers.0.weight" not in have


# Its parts, written a second time from the formulas.


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    mean, var = groups.mean(dim=2, keepdim=True), groups.var(dim=2, keepdim=True, correction=0)
    return ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution as nine shifted matrix products."""
    padded, (height, width) = F.pad(x, (1, 1, 1, 1)), x.shape[2:]
    shifted = {(i, j): padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)}
    return (
        sum(torch.einsum("oc,bchw->bohw", weight[..., i, j], part) for (i, j), part in shifted.items())
        + bias[:, None, None]
    )


def resampled(x: Tensor, resample: str) -> Tensor:
    if resample == "down":
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if resample == "up" else x


@pytest.mark.parametrize("resample", ["", "down", "up"])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("c_out", [32, 64])
def test_a_residual_block_is_its_formula(c_out: int, scale_shift: bool, resample: str) -> None:
    block = ResBlock(32, c_out, 16, tiny(scale_shift=scale_shift), resample).eval().double().requires_grad_(False)
    randomise(block)
    w = block.state_dict()
    x, emb = some(2, 32, 6, 4).double(), some(2, 16, seed=1).double()

    h = resampled(silu(group_norm(x, w["in_layers.0.weight"], w["in_layers.0.bias"])), resample)
    h = convolution(h, w["in_layers.2.weight"], w["in_layers.2.bias"])
    e = (silu(emb) @ w["emb_layers.1.weight"].T + w["emb_layers.1.bias"])[:, :, None, None]
    if scale_shift:
        h = group_norm(h, w["out_layers.0.weight"], w["out_layers.0.bias"]) * (1 + e[:, :c_out]) + e[:, c_out:]
    else:
        h = group_norm(h + e, w["out_layers.0.weight"], w["out_layers.0.bias"])
    h = convolution(silu(h), w["out_layers.3.weight"], w["out_layers.3.bias"])
    skip = resampled(x, resample)
    if c_out != 32:
        skip = torch.einsum("oc,bchw->bohw", w["skip_connection.weight"][..., 0, 0], skip)
        skip = skip + w["skip_connection.bias"][:, None, None]
    # The block's own normalisation is float32; everything around it is double here.
    np.testing.assert_allclose(block(x, emb), skip + h, rtol=0, atol=2e-5)
    assert (h.abs().mean(), e.abs().mean()) > (0.1, 0.1)  # nothing was multiplied by zero


def test_attention_has_all_queries_first_then_keys_then_values_head_by_head() -> None:
    channels, per_head = 96, 32
    attention = Attention(channels, channels // per_head).eval().requires_grad_(False)
    randomise(attention)
    attention.qkv.weight *= 3  # attends to something, instead of averaging everything
    w, x = attention.state_dict(), some(2, channels, 3, 5)

    qkv = torch.einsum(
        "oc,bcp->bop", w["qkv.weight"][..., 0, 0], group_norm(x, w["norm.weight"], w["norm.bias"]).flatten(2)
    )
    qkv = qkv + w["qkv.bias"][:, None]
    out = torch.empty(2, channels, 15)
    for first in range(0, channels, per_head):  # row = three * channels + head * per_head + channel
        q, k, v = (qkv[:, three * channels + first : three * channels + first + per_head] for three in range(3))
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(per_head)).softmax(dim=2)
        out[:, first : first + per_head] = torch.einsum("bqk,bck->bcq", weights, v)
    out = torch.einsum("oc,bcp->bop", w["proj_out.weight"][..., 0, 0], out) + w["proj_out.bias"][:, None]
    # Sums of up to 96 float32 products in another order.
    np.testing.assert_allclose(attention(x), x + out.reshape(x.shape), rtol=0, atol=2e-5)


def test_group_norm_computes_in_float32_and_returns_what_came() -> None:
    norm = GroupNorm32(64)
    x = (100 + some(2, 64, 4, 4)).half()  # squares of 100 in half precision would leave no digit of the variance
    got = norm(x)
    assert got.dtype == torch.float16
    np.testing.assert_allclose(got.float().detach(), group_norm(x.float(), norm.weight, norm.bias).detach(), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_is_the_same_where_it_is_trained(dtype: torch.dtype, layout: torch.memory_format) -> None:
    norm, rounding = GroupNorm32(64).to(torch.float64 if dtype == torch.float64 else torch.float32), torch.finfo(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 + some(2, 64, 4, 6)).to(dtype).contiguous(memory_format=layout)
    grad = some(2, 64, 4, 6, seed=1).to(dtype).contiguous(memory_format=layout)
    found = []
    for form in (norm, lambda x: group_norm(x, norm.weight.double(), norm.bias.double())):
        entered = (x if form is norm else x.double()).detach().requires_grad_()
        y = form(entered)
        found.append([y, *torch.autograd.grad(y, [entered, norm.weight, norm.bias], grad.to(y.dtype))])
    assert found[0][0].dtype == dtype
    assert found[0][0].is_contiguous(memory_format=layout)
    assert found[0][1].abs().max() > 0.1
    for ours, formula in zip(*found, strict=True):
        # Half a unit in the last place for the result in bfloat16; a few for sums in float32.
        room = (0.6 if dtype == torch.bfloat16 else 8) * rounding.eps * float(formula.detach().abs().max())
        np.testing.assert_allclose(ours.detach().double(), formula.detach().double(), rtol=0, atol=room)


def test_the_noise_embedding_has_its_golden_values() -> None:
    t = torch.tensor([250 * math.log(80)])
    embedding = timestep_embedding(t, 192)[0]
    np.testing.assert_allclose(embedding[[0, 1, 2, 95]], [-0.614395, -0.826566, 0.856212, 0.992739], atol=2e-4)
    np.testing.assert_allclose(embedding[[96, 97, 98, 191]], [0.788999, 0.562840, -0.516624, 0.120290], atol=2e-4)
    # t = 1095.5 in float32 is known to 6e-5, and a cosine turns as fast as its argument.


# The whole.


@pytest.mark.parametrize(
    "values",
    [
        {}, {"scale_shift": False}, {"resblock_updown": False}, {"attention": ()}, {"classes": 5},
        {"res_blocks": 2, "channel_mult": (1, 1, 2)}, {"channels": 3, "head_channels": 64}, {"patch": 2},
    ],
    ids=str,
)  # fmt: skip
def test_every_variant_maps_images_to_images_that_depend_on_everything(values: dict[str, Any]) -> None:
    config = tiny(**values)
    network, x, c_noise = build(config), some(3, config.channels, 8, 8), torch.tensor([-1500.0, 0.0, 1000.0])
    label = torch.tensor([0, 1, 4]) if config.classes else None
    out = network(x, c_noise, label)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    assert out.std() > 0.1
    assert (network(x + 0.01, c_noise, label) - out).abs().max() > 1e-3
    assert (network(x, c_noise + 1, label) - out).abs().max() > 1e-3
    if label is not None:
        assert (network(x, c_noise, label.flip(0)) - out).abs().max() > 1e-3
    # An image does not see its neighbours; other batch sizes may only round differently.
    alone = network(x[1:2], c_noise[1:2], label[1:2] if label is not None else None)
    np.testing.assert_allclose(alone, out[1:2], rtol=0, atol=1e-5)


def test_a_patch_is_channels_row_by_row() -> None:
    """Pixel (2 i + row, 2 j + column) of channel c is channel 4 c + 2 row + column at (i, j), on both sides."""
    network = build(tiny(image_size=(8, 16), patch=2))
    inner = build(tiny(image_size=(4, 8), channels=8, channel_mult=(1, 2)))
    inner.load_state_dict(network.state_dict())
    x, c_noise = some(3, 2, 8, 16), torch.tensor([-1500.0, 0.0, 1000.0])
    parts = torch.empty(3, 8, 4, 8)
    for channel, row, column in ((c, i, j) for c in range(2) for i in range(2) for j in range(2)):
        parts[:, 4 * channel + 2 * row + column] = x[:, channel, row::2, column::2]
    together, apart = network(x, c_noise), inner(parts, c_noise)
    assert together.std() > 0.1
    for channel, row, column in ((c, i, j) for c in range(2) for i in range(2) for j in range(2)):
        got, want = together[:, channel, row::2, column::2], apart[:, 4 * channel + 2 * row + column]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 9, "patch": 3}, "image_size=9 cannot be halved 1 times after squares of patch=3 pixels"),
        ({"patch": 0}, "patch must be a whole number from 1, got 0"),
        ({"patch": 3}, "must be a multiple of 6"),
    ],
)
def test_a_patch_that_does_not_fit_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        tiny(**values)


def test_a_new_network_answers_zero_and_a_random_one_does_not() -> None:
    network = AdmUnet(tiny()).requires_grad_(False)
    x, c_noise = some(2, 2, 8, 8), torch.zeros(2)
    assert (network(x, c_noise) == 0).all()  # why comparisons randomise first
    randomise(network)
    assert network(x, c_noise).std() > 0.1


def test_every_parameter_changes_the_output() -> None:
    network = AdmUnet(tiny(classes=3))
    randomise(network)
    network(some(3, 2, 8, 8), torch.tensor([0.0, 100.0, -700.0]), torch.arange(3)).square().sum().backward()
    silent = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def test_randomise_is_a_function_of_its_seed() -> None:
    one, same, other = build(tiny(), 1), build(tiny(), 1), build(tiny(), 2)
    for name, tensor in one.state_dict().items():
        np.testing.assert_array_equal(tensor, same.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])


def test_dropout_is_off_when_evaluating_and_on_when_training() -> None:
    network, x, c_noise = build(tiny(dropout=0.5)), some(2, 2, 8, 8), torch.zeros(2)
    np.testing.assert_array_equal(network(x, c_noise), network(x, c_noise))
    network.train()
    assert not torch.equal(network(x, c_noise), network(x, c_noise))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 9}, "image_size=9 cannot be halved 1 times.* multiple of 2"),
        ({"image_size": 0}, "image_size"),
        ({"model_channels": 40}, "model_channels must be a multiple of 32, got 40"),
        ({"model_channels": 0}, "model_channels"),
        ({"model_channels": -32}, "model_channels"),
        ({"head_channels": 48}, "attention at 4 px has 64 channels, no multiple of head_channels=48"),
        ({"head_channels": 48, "attention": ()}, "the middle block has 64 channels, no multiple of head_channels=48"),
        ({"head_channels": 0}, "head_channels"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 0)}, "channel_mult"),
        ({"res_blocks": -1}, "res_blocks"),
        ({"classes": -1}, "classes"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1"),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        tiny(**values)
