# SPDX-License-Identifier: MIT
"""EDM's U-Nets: tensor by tensor and figure by figure what the original code has.

tests/data/edm_golden.npz holds what NVlabs/edm and locuslab/ect compute with the weights of `golden_weights`;
tests/data/edm_golden.py is how it was made.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.edm import Block, DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from cmfast_train.networks.edm_layers import Conv, ConvDown, GroupNorm, PositionalWaves, resampled
from helpers.foreign.edm import (
    CASES,
    GOLDEN,
    GOLDEN_ERROR,
    NCSNPP,
    PUBLISHED,
    dhariwal,
    golden_inputs,
    golden_weights,
    new,
    song,
)
from helpers.specs import image_spec


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes(config: SongConfig | DhariwalConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in new(config).state_dict().items()}


# EDM's code.


@pytest.mark.parametrize("name", CASES)
def test_a_network_computes_what_edms_code_computes(name: str) -> None:
    network = new(CASES[name])
    network.load_state_dict(golden_weights(network.state_dict()), strict=True)
    x, sigma, label = golden_inputs(CASES[name])
    want = np.load(GOLDEN)[name]
    assert want.std() > 0.3
    np.testing.assert_allclose(network(x, sigma.log() / 4, label), want, rtol=0, atol=GOLDEN_ERROR * abs(want).max())


@pytest.mark.parametrize(
    ("name", "norm"),
    [("ddpmpp", "aux_norm"), ("ddpmpp", "norm2"), ("ncsnpp", "norm1"), ("adm", "out_norm"), ("adm-cond", "out_norm")],
)
def test_the_comparison_sees_a_wrong_eps_in_any_norm(name: str, norm: str) -> None:
    network = new(CASES[name])
    network.load_state_dict(golden_weights(network.state_dict()))
    norms = [layer for key, layer in network.named_modules() if isinstance(layer, GroupNorm) and norm in key]
    assert norms
    for layer in norms:
        layer.eps = 1e-5 if layer.eps == 1e-6 else 1e-6
    x, sigma, label = golden_inputs(CASES[name])
    want = np.load(GOLDEN)[name]
    assert abs(network(x, sigma.log() / 4, label).numpy() - want).max() > GOLDEN_ERROR * abs(want).max()


@pytest.mark.parametrize(
    ("config", "tensors", "parameters", "digest"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED]
)
def test_keys_and_shapes_are_those_of_edms_published_networks(
    config: SongConfig | DhariwalConfig, tensors: int, parameters: int, digest: str
) -> None:
    have = shapes(config)
    assert len(have) == tensors
    is_buffer = ("resample_filter", "freqs")
    assert sum(math.prod(shape) for key, shape in have.items() if not key.endswith(is_buffer)) == parameters
    lines = "".join(f"{key} {shape}\n" for key, shape in sorted(have.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


def test_some_of_those_keys_by_name() -> None:
    have = {name: shapes(config) for name, config, *_ in PUBLISHED}
    cifar, ncsnpp, imagenet = have["cifar10-cond-ddpmpp"], have["cifar10-ncsnpp"], have["imagenet64-adm"]
    assert cifar["map_label.weight"] == [128, 10]
    assert cifar["enc.32x32_conv.weight"] == [128, 3, 3, 3]
    assert cifar["enc.16x16_block0.qkv.weight"] == [768, 256, 1, 1]
    assert cifar["enc.16x16_down.skip.resample_filter"] == [1, 1, 2, 2]
    assert cifar["dec.8x8_in0.proj.bias"] == [256]  # always attends
    assert cifar["dec.16x16_block4.qkv.bias"] == [768]
    assert "dec.16x16_block3.qkv.bias" not in cifar  # on the way up only the last block does
    assert ncsnpp["enc.16x16_aux_residual.weight"] == [256, 3, 3, 3]
    assert ncsnpp["map_noise.freqs"] == [128]
    assert imagenet["map_label.weight"] == [768, 1000]
    assert imagenet["dec.32x32_block0.qkv.weight"] == [1152, 384, 1, 1]
    assert imagenet["enc.32x32_down.skip.resample_filter"] == [1, 1, 2, 2]
    assert "enc.32x32_down.skip.weight" not in imagenet  # resampling needs no projection here
    assert imagenet["out_conv.weight"] == [3, 192, 3, 3]


# Its parts, written a second time from the formulas.


def test_attention_has_query_key_and_value_of_a_channel_in_neighbouring_rows() -> None:
    channels, heads = 128, 2
    block = Block(
        channels, channels, 32, resample="", taps=(1, 1), heads=heads, scale_shift=True, project=False, gain=1.0,
        eps=1e-5, dropout=0.0,
    ).requires_grad_(False)  # fmt: skip
    randomise(block)
    x, per_head = some(2, channels, 3, 5), channels // heads
    rows = block.qkv(x).flatten(2)
    out = torch.empty(2, channels, 15)
    for head in range(heads):  # row = (head * per_head + channel) * 3 + three
        first, last = 3 * head * per_head, 3 * (head + 1) * per_head
        q, k, v = (rows[:, first + three : last : 3] for three in range(3))
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(per_head)).softmax(dim=2)
        out[:, head * per_head : (head + 1) * per_head] = torch.einsum("bqk,bck->bcq", weights, v)
    np.testing.assert_allclose(block._attention(x), out.reshape(x.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_the_box_filter_is_the_convolution_that_it_stands_for(direction: str) -> None:
    layer, x = Conv(8, 8, 1, direction, (1, 1)), some(2, 8, 6, 4)
    each = layer.resample_filter.expand(8, 1, 2, 2)
    want = (
        F.conv2d(x, each, stride=2, groups=8) if direction == "down" else
        F.conv_transpose2d(x, 4 * each, stride=2, groups=8)
    )  # fmt: skip
    np.testing.assert_allclose(resampled(x, direction, layer.resample_filter), want, rtol=0, atol=1e-6)


def test_the_smooth_filter_keeps_a_constant_and_halves_or_doubles_the_side() -> None:
    kernel = Conv(1, 1, 1, "up", (1, 3, 3, 1)).resample_filter
    assert kernel.sum() == 1
    np.testing.assert_array_equal(kernel[0, 0, 1], torch.tensor([3, 9, 9, 3]) / 64)
    for direction, side in (("down", 4), ("up", 16)):
        y = resampled(torch.ones(1, 3, 8, 8), direction, kernel)
        assert y.shape == (1, 3, side, side)
        np.testing.assert_allclose(y[..., 1:-1, 1:-1], 1)


def test_the_fused_layer_pads_before_it_convolves() -> None:
    layer, x = ConvDown(4, 4, (1, 3, 3, 1)).requires_grad_(False), some(1, 4, 8, 8)
    inner = F.conv2d(x, layer.weight, layer.bias, padding=2)
    want = F.conv2d(inner, layer.resample_filter.expand(4, 1, 4, 4), stride=2, groups=4)
    np.testing.assert_allclose(layer(x), want, rtol=0, atol=1e-6)
    other = resampled(F.conv2d(x, layer.weight, layer.bias, padding=1), "down", layer.resample_filter)
    assert (layer(x) - other).abs().max() > 0.01  # differs at the border, where the bias is not padded


def test_the_last_frequency_is_a_ten_thousandth_only_with_the_endpoint() -> None:
    t = torch.tensor([2.0])
    for endpoint, last in ((True, 1e-4), (False, 1e-4 ** (7 / 8))):
        waves = PositionalWaves(16, endpoint)(t)[0]
        np.testing.assert_allclose(waves[[0, 8]], [math.cos(2), math.sin(2)], rtol=1e-6)
        np.testing.assert_allclose(waves[15], math.sin(2 * last), rtol=1e-5)


# The whole.


@pytest.mark.parametrize("name", CASES)
def test_the_output_depends_on_everything_and_no_image_sees_its_neighbours(name: str) -> None:
    config = CASES[name]
    network, c_noise = new(config), torch.tensor([-1.5, 0.1, 1.0])
    randomise(network)
    x, label = some(3, 3, 8, 8), torch.tensor([0, 1, 4]) if config.classes else None
    out = network(x, c_noise, label)
    assert (out.shape, out.dtype) == (x.shape, torch.float32)
    assert out.std() > 0.1
    assert (network(x + 0.01, c_noise, label) - out).abs().max() > 1e-3
    assert (network(x, c_noise + 0.1, label) - out).abs().max() > 1e-3
    if label is not None:
        assert (network(x, c_noise, label.flip(0)) - out).abs().max() > 1e-3
    alone = network(x[1:2], c_noise[1:2], label[1:2] if label is not None else None)
    np.testing.assert_allclose(alone, out[1:2], rtol=0, atol=1e-5)  # other batch sizes may round differently


@pytest.mark.parametrize("name", ["ncsnpp-cond", "skip", "adm-cond"])
def test_every_parameter_changes_the_output(name: str) -> None:
    network = new(CASES[name]).requires_grad_(True)
    randomise(network)
    label = torch.arange(3) if CASES[name].classes else None
    network(some(3, 3, 8, 8), torch.tensor([-1.0, 0.0, 1.0]), label).square().sum().backward()
    assert [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ["ddpmpp", "adm-cond"])
def test_half_precision_leaves_the_noise_level_alone(name: str) -> None:
    network = new(CASES[name])
    randomise(network)
    x, sigma, label = golden_inputs(CASES[name])
    seen: list[torch.dtype] = []
    network.map_layer1.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
    whole = network(x, sigma.log() / 4, label)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, sigma.log() / 4, label)
    assert seen == [torch.float32, torch.float32]
    assert half.dtype == torch.float32
    assert 1e-4 < (half - whole).abs().max() < 0.1 * whole.abs().max()  # eight bits in the backbone


def test_a_new_network_answers_zero_and_dropout_is_on_only_when_training() -> None:
    for network in (SongUnet(song(dropout=0.5)), DhariwalUnet(dhariwal(dropout=0.5))):
        network.requires_grad_(False)
        x, c_noise = some(2, 3, 8, 8), torch.zeros(2)
        assert (network(x, c_noise) == 0).all()  # why comparisons randomise first
        randomise(network)
        assert not torch.equal(network(x, c_noise), network(x, c_noise))
        network.eval()
        np.testing.assert_array_equal(network(x, c_noise), network(x, c_noise))


@pytest.mark.parametrize(
    "config",
    [song(classes=3, decoder="skip", channel_mult=(1, 1), **NCSNPP), dhariwal(classes=3, channel_mult=(1, 1))],
    ids=["song", "dhariwal"],
)
def test_an_exported_network_computes_the_same_at_every_batch(config: SongConfig | DhariwalConfig) -> None:
    network = new(config)
    randomise(network)
    spec = image_spec(image=(3, 8, 8), classes=3, scaling="edm", c_noise="ln/4", renoise="plain", clip=False)
    denoiser = Denoiser(network, spec).eval()
    graph = ir.to_proto(denoiser_graph(denoiser)).SerializeToString()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        sigma = torch.tensor([0.01, 80.0, 0.5, 5.0, 1.0])[:batch]
        x, label = some(batch, 3, 8, 8) * sigma[:, None, None, None], torch.arange(batch) % 3
        (got,) = session.run(None, {"x": x.numpy(), "sigma": sigma.numpy(), "label": label.numpy()})
        np.testing.assert_allclose(got, denoiser(x, sigma, label=label), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 9}, "image_size=9 cannot be halved 1 times"),
        ({"model_channels": 40}, "model_channels must be a multiple of 32, got 40"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"res_blocks": 0}, "res_blocks must be a whole number from 1, got 0"),
        ({"classes": -1}, "classes must be a whole number from 0, got -1"),
        ({"augment": -1}, "augment"),
        ({"emb_mult": 0}, "emb_mult must be a whole number from 1, got 0"),
        ({"noise_mult": 0}, "noise_mult must be a whole number from 1, got 0"),
        ({"embedding": "sinus"}, "embedding must be one of positional, fourier, got 'sinus'"),
        ({"encoder": "none"}, "encoder must be one of standard, skip, residual"),
        ({"decoder": "residual"}, "decoder must be one of standard, skip"),
        ({"resample": (1, 2, 1)}, r"resample must be 1,1 or 1,3,3,1, got \(1, 2, 1\)"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        song(**values)


def test_the_heads_of_an_adm_have_64_channels() -> None:
    with pytest.raises(CmfastError, match="the middle block has 96 channels, no multiple of head_channels=64"):
        dhariwal(model_channels=96, channel_mult=(2, 1))


SEEDED: dict[str, Any] = {"image_size": 8, "model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1}


@pytest.mark.parametrize(
    ("config", "following"),
    [
        (AdmConfig(**SEEDED, attention=(4,), head_channels=32), 1806390265),
        (AdmConfig(**SEEDED, attention=(), head_channels=32, resblock_updown=False), 1004675792),
        (SongConfig(**SEEDED, attention=(8,), classes=3), 2076498347),
        (DhariwalConfig(**SEEDED | {"model_channels": 64}, attention=(8,), classes=3), 797846950),
    ],
    ids=["adm", "adm strided", "song", "dhariwal"],
)
def test_a_new_network_takes_as_many_random_numbers_as_in_0_1_0(config: NetworkConfig, following: int) -> None:
    torch.manual_seed(0)
    build_network(config)
    assert int(torch.randint(0, 2**31, (1,))) == following, "runs of one seed would begin with other weights"
