# SPDX-License-Identifier: MIT
"""The first public implementation: its network to the last bit that rounding leaves, and its files, never guessed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cmfast
from cmfast.errors import ArtifactError, CmfastError
from cmfast.sampling import sample
from cmfast_export.pipeline import export_onnx
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import Draft, Given
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.networks.build import build_network, network_from_dict, network_to_dict
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig, CloneofsimoUnet, sine_embedding
from helpers.specs import image_spec

EPS = 0.002  # the original's name for sigma_min
CONVENTIONS = {"scaling": "cloneofsimo", "c_noise": "raw", "clip": False}


@functools.cache
def random_network(width: int = 32, channels: int = 1, side: int = 8) -> CloneofsimoUnet:
    network = (
        CloneofsimoUnet(CloneofsimoConfig(image_size=side, channels=channels, width=width)).eval().requires_grad_(False)
    )
    randomise(network)
    return network


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checkpoint_of(width: int = 32, channels: int = 1, side: int = 8, **conventions: Any) -> Checkpoint:
    network = random_network(width, channels, side)
    spec = image_spec(image=(channels, side, side), **(conventions or CONVENTIONS))
    return Checkpoint(spec=spec, network=network.config, weights=network.state_dict())


# The original, written a second time: its arithmetic in its order, on a state dict.


def block(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    for norm, conv in ((0, 2), (3, 5)):
        x = F.silu(F.group_norm(x, 32, w[f"{name}.{norm}.weight"], w[f"{name}.{norm}.bias"]))
        x = F.conv2d(x, w[f"{name}.{conv}.weight"], w[f"{name}.{conv}.bias"], padding=1)
    return x


def original(w: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """f(x, t), skip and output scaling inside. x [B, C, H, W], t [B] noise levels."""
    d = len(w["down.0.bias"])
    args = t[:, None] * torch.exp(-math.log(10000) * torch.arange(d) / d)
    emb = torch.cat([args.sin(), args.cos()], dim=1)

    def timed(level: int, h: Tensor) -> Tensor:
        return h + F.linear(emb, w[f"time_downs.{level}.weight"], w[f"time_downs.{level}.bias"])[:, :, None, None]

    def convolved(name: str, h: Tensor) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    skips = [F.interpolate(convolved("down.0", x), scale_factor=0.5)]
    h = timed(0, skips[0])
    h = timed(1, block(w, "down.1", h) + h)
    skips.append(F.interpolate(block(w, "down.2", h), scale_factor=0.5))
    h = timed(2, skips[1])
    h = timed(3, block(w, "down.3", h) + h)
    h = block(w, "mid", h)
    h = block(w, "up.0", h) + h
    h = block(w, "up.1", F.interpolate(torch.cat([h, skips[1]], dim=1), scale_factor=2))
    h = block(w, "up.2", h) + h
    h = convolved("up.3", F.interpolate(torch.cat([h, skips[0]], dim=1), scale_factor=2))
    h = convolved("last", torch.cat([h, x], dim=1))

    above = (t - EPS)[:, None, None, None]
    c_skip = 0.25 / (above**2 + 0.25)
    c_out = 0.25 * above / ((above + EPS) ** 2 + 0.25) ** 0.5
    return c_skip * x + c_out * h


def original_sample(w: dict[str, Tensor], noise: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """Its loop; noise [K, B, C, H, W] where it draws anew in every step."""
    x = original(w, noise[0] * sigmas[0], torch.full((noise.shape[1],), sigmas[0]))
    for t, z in zip(sigmas[1:], noise[1:], strict=True):
        x = x + math.sqrt(t**2 - EPS**2) * z
        x = original(w, x, torch.full((len(x),), t))
    return x


LEVELS = [0.002, 0.00201, 0.01, 0.1, 0.5, 1.0, 5.0, 40.0, 80.0]


def assert_equal_to_six_digits(got: Tensor, want: Tensor) -> None:
    # Another order of summation. Nothing scales the input here: at sigma 80 the values are of size 100, so the bar is
    # relative to the largest of each image. Of float64, ours and the original are 5e-7 and 7e-7 away.
    size = want.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    np.testing.assert_allclose(got / size, want / size, rtol=0, atol=4e-6)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_it_computes_what_the_original_computes_at_every_noise_level(channels: int, width: int) -> None:
    checkpoint = checkpoint_of(width, channels, 12)
    sigma = torch.tensor(LEVELS)
    x = some(len(sigma), channels, 12, 12) * (1 + sigma[:, None, None, None])
    got, want = checkpoint.denoiser()(x, sigma), original(dict(checkpoint.weights), x, sigma)
    assert_equal_to_six_digits(got, want)
    assert (got[4:7] - x[4:7]).abs().mean() > 0.1  # there is a network in it
    assert got.dtype == torch.float32


@given(
    batch=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([8, 12, 20]),  # at 4, norms over two values: the original is 1e-4 from float64
    sigma=st.floats(0.002, 80),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_it_computes_what_the_original_computes_whatever_the_batch_and_size(
    batch: int, channels: int, side: int, sigma: float, seed: int
) -> None:
    checkpoint = checkpoint_of(32, channels, side)
    x, levels = some(batch, channels, side, side, seed=seed) * (1 + sigma), torch.full((batch,), sigma)
    assert_equal_to_six_digits(checkpoint.denoiser()(x, levels), original(dict(checkpoint.weights), x, levels))


def test_the_comparison_uses_all_seventy_tensors() -> None:
    # At width 32 each channel is a group of its own, and a bias before a normalisation is without effect.
    whole, x, sigma = random_network(64), some(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    weights, want = whole.state_dict(), whole(x, sigma)
    for name, weight in weights.items():
        network = CloneofsimoUnet(whole.config).requires_grad_(False)
        network.load_state_dict({**weights, name: weight + 0.01 * some(*weight.shape)})
        assert (network(x, sigma) - want).abs().max() > 1e-5, name


def test_an_image_at_sigma_min_comes_back_to_the_bit() -> None:
    x = some(3, 1, 8, 8)
    np.testing.assert_array_equal(checkpoint_of().denoiser()(x, torch.full((3,), EPS)), x)


@pytest.mark.parametrize("sigmas", [(80.0,), (80.0, 2.0), (80.0, 40.0, 20.0, 10.0, 5.0)], ids=len)
@pytest.mark.parametrize("channels", [1, 3])
def test_sampling_is_the_originals_loop_on_the_same_noise(channels: int, sigmas: tuple[float, ...]) -> None:
    checkpoint = checkpoint_of(32, channels)
    denoiser, noise = checkpoint.denoiser(), some(len(sigmas), 4, channels, 8, 8)
    got = sample(lambda x, sigma: denoiser(x, torch.full((len(x),), sigma)), noise, sigmas, checkpoint.spec)
    # Values of size 10, five networks in a row.
    np.testing.assert_allclose(got, original_sample(dict(checkpoint.weights), noise, sigmas), rtol=1e-6, atol=5e-5)
    assert got.abs().max() > 1  # not clipped, as there


def test_the_noise_embedding_has_sines_first_at_the_full_number_of_frequencies() -> None:
    embedding = sine_embedding(torch.tensor([0.0, 80.0]), 32)
    np.testing.assert_array_equal(embedding[0], [0.0] * 32 + [1.0] * 32)
    angles = [80 * 10000 ** (-i / 32) for i in range(32)]
    # The angle 80 in float32 is known to 4e-6.
    np.testing.assert_allclose(embedding[1, :32], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(embedding[1, 32:], np.cos(angles), atol=1e-5)


def test_under_autocast_the_noise_level_and_the_answer_stay_float32() -> None:
    network, x = random_network(), some(1, 1, 8, 8).expand(2, -1, -1, -1)
    sigma = torch.tensor([76.8, 77.2])  # one and the same number in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(x, sigma)
    want = network(x, sigma)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.1  # of values of size 1, after 17 convolutions with eight bits
    assert (got[0] - got[1]).abs().max() > 0.5 * (want[0] - want[1]).abs().max() > 0.01


# Its shape.


def shapes(width: int, channels: int) -> dict[str, list[int]]:
    with torch.device("meta"):
        network = build_network(CloneofsimoConfig(image_size=32, channels=channels, width=width))
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("channels", "width", "parameters"),
    [(1, 128, 6_550_794), (1, 256, 26_176_010), (3, 128, 6_557_780), (3, 256, 26_189_908)],
)
def test_it_has_the_originals_number_of_parameters(channels: int, width: int, parameters: int) -> None:
    assert sum(math.prod(shape) for shape in shapes(width, channels).values()) == parameters


@pytest.mark.parametrize(("n", "d"), [(1, 32), (3, 64), (1, 128), (3, 256), (2, 96)])
def test_keys_and_shapes_are_the_originals_in_its_order(n: int, d: int) -> None:
    def layer(name: str, *weight: int) -> dict[str, list[int]]:
        return {f"{name}.weight": list(weight), f"{name}.bias": [weight[0]]}

    def pair(name: str, c_in: int, c_out: int) -> dict[str, list[int]]:
        first = layer(f"{name}.0", c_in) | layer(f"{name}.2", c_out, c_in, 3, 3)
        return first | layer(f"{name}.3", c_out) | layer(f"{name}.5", c_out, c_out, 3, 3)

    want = layer("down.0", d, n, 3, 3)
    want |= pair("down.1", d, d) | pair("down.2", d, 2 * d) | pair("down.3", 2 * d, 2 * d)
    for level, width in enumerate((d, d, 2 * d, 2 * d)):
        want |= layer(f"time_downs.{level}", width, 2 * d)
    want |= pair("mid", 2 * d, 2 * d)
    want |= pair("up.0", 2 * d, 2 * d) | pair("up.1", 4 * d, d) | pair("up.2", d, d) | layer("up.3", 2 * d, 2 * d, 3, 3)
    want |= layer("last", n, 2 * d + n, 3, 3)
    assert len(want) == 70
    assert list(shapes(d, n).items()) == list(want.items())


def test_a_configuration_survives_its_checkpoint() -> None:
    config = CloneofsimoConfig(image_size=32, channels=1, width=64)
    assert network_to_dict(config) == {
        "type": "cloneofsimo",
        "image_size": 32,
        "channels": 1,
        "classes": 0,
        "width": 64,
    }
    assert network_from_dict(network_to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"image_size": 30}, "image_size=30 cannot be halved twice.* a multiple of 4"),
        ({"image_size": 0}, "image_size must be a whole number from 1 to 65536 .*, got 0"),
        ({"channels": 0}, "channels must be a whole number from 1, got 0"),
        ({"width": 48}, r"width \(in training: model_channels\) must be a multiple of 32, got 48"),
        ({"width": -32}, "width must be a whole number from 1"),
        ({"width": 32.0}, "width must be a whole number, .*, got 32.0"),
        ({"classes": 10}, "takes no label, got classes=10"),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        CloneofsimoConfig(**{"image_size": 32, **values})


# Its files.

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that saves a state dict as the original does, changed by `changes` (None: left out)."""

    def write(name: str = "ct_mnist.pth", channels: int = 1, width: int = 32, **changes: Tensor | None) -> Path:
        weights = {**random_network(width, channels).state_dict(), **changes}
        torch.save({name: weight for name, weight in weights.items() if weight is not None}, tmp_path / name)
        return tmp_path / name

    return write


def facts_of(path: Path, source: str = "", **given: Any) -> dict[str, tuple[Any, str]]:
    draft = identify(path, source, Given(**given))
    assert isinstance(draft, Draft)
    return {fact.name: (fact.value, fact.where) for fact in draft.facts.known}


@pytest.mark.parametrize(("name", "channels"), [("ct_mnist.pth", 1), ("ct_cifar10.pth", 3)])
@pytest.mark.parametrize("width", [32, 64])
def test_a_file_named_as_the_original_names_it_says_everything(
    width: int, name: str, channels: int, write: Write
) -> None:
    checkpoint = load_model(write(name, channels, width))
    assert checkpoint.network == CloneofsimoConfig(image_size=32, channels=channels, width=width)
    assert checkpoint.spec == image_spec(
        image=(channels, 32, 32),
        scaling="cloneofsimo",
        c_noise="raw",
        clip=False,
        grid=150,
        sigmas={1: (80.0,), 2: (80.0, 2.0), 5: (80.0, 40.0, 20.0, 10.0, 5.0)},
    )
    assert checkpoint.source == {"format": "cloneofsimo"}
    x, sigma = some(2, channels, 32, 32), torch.tensor([0.7, 80.0])
    assert_equal_to_six_digits(
        checkpoint.denoiser()(x, sigma), original(random_network(width, channels).state_dict(), x, sigma)
    )


def test_every_fact_says_where_it_is_from(write: Write) -> None:
    facts = facts_of(write(), renoise="plain")
    assert facts["network"] == ("the first public implementation's U-Net, width 32, image channels 1", "the tensors")
    assert facts["image_size"] == (32, "the file's name")
    assert facts["scaling"] == ("cloneofsimo", "the first public implementation, by the name of the file")
    assert facts["renoise"] == ("plain", "--set")
    assert (
        facts_of(write("model.pth"), "cloneofsimo")["scaling"][1]
        == "the first public implementation, by --source cloneofsimo"
    )


def test_the_grid_is_that_of_the_originals_last_epoch() -> None:
    epochs = 100  # of which the last is number 99
    assert math.ceil(math.sqrt((epochs - 1) * (150**2 - 4) / epochs + 4) - 1) + 1 == 150


@pytest.mark.parametrize(
    ("name", "channels", "source", "given", "missing", "say"),
    [
        ("model.pth", 1, "", {}, "image_size, scaling, c_noise", "cloneofsimo --set image_size=32, or --set image_"),
        ("model.pth", 1, "", {"image_size": 8}, "scaling, c_noise", "--source cloneofsimo, or --set scaling="),
        ("model.pth", 1, "", {"scaling": "boundary"}, "image_size, c_noise", "cloneofsimo --set image_size=32, or "),
        ("model.pth", 1, "cloneofsimo", {}, "image_size", "--set image_size=32"),
        ("ct_mnist.pt", 1, "", {"image_size": 8}, "scaling, c_noise", "--source cloneofsimo, or --set scaling="),
        ("ct_imagenet9.pth", 3, "", {}, "image_size, scaling, c_noise", "--source cloneofsimo --set image_size=32"),
        ("ct_mnist.pth", 3, "", {}, "image_size, scaling, c_noise", "cloneofsimo --set "),  # MNIST has one channel
        ("ct_cifar10.pth", 1, "", {}, "image_size, scaling, c_noise", "--source cloneofsimo --set image_size=32"),
    ],
)  # fmt: skip
def test_what_the_file_does_not_say_is_requested(
    name: str, channels: int, source: str, given: dict[str, Any], missing: str, say: str, write: Write
) -> None:
    path = write(name, channels)
    with pytest.raises(CmfastError) as raised:
        load_model(path, source, Given(**given))
    assert f"its {missing} cannot be inferred" in str(raised.value)
    assert f" {say}" in str(raised.value)
    assert ("--source cloneofsimo" in str(raised.value)) == ("c_noise" in missing)


def test_what_was_missing_can_be_given(write: Write) -> None:
    path = write("model.pth")
    as_the_original = load_model(path, "cloneofsimo", Given(image_size=8))
    corrected = load_model(path, "", Given(image_size=8, scaling="boundary", c_noise="250ln", sigmas=((80.0,),)))
    assert as_the_original.spec.scaling == "cloneofsimo"
    assert corrected.spec == image_spec(
        image=(1, 8, 8), scaling="boundary", c_noise="250ln", clip=False, grid=150, sigmas={1: (80.0,)}
    )
    assert as_the_original.network == corrected.network == CloneofsimoConfig(image_size=8, channels=1, width=32)
    assert as_the_original.sha256() == corrected.sha256()


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [
        ("openai", {}, "--source openai, but its tensors are named as in cloneofsimo"),
        ("cloneofsimo:mnist", {}, "--source cloneofsimo:mnist: unknown; there are .*cloneofsimo"),
        ("", {"qkv": "3hd"}, "--set qkv=3hd: .*without attention"),
        ("", {"head_channels": 64}, "--set head_channels=64: .*without attention"),
        ("", {"image_size": 30}, "image_size=30 cannot be halved twice"),
        ("", {"image_size": 0}, "image_size must be a whole number from 1 to 65536"),
        ("", {"scaling": "vp"}, "scaling must be one of"),
        ("", {"weights": "ema"}, "weights=ema"),
    ],
    ids=str,
)
def test_what_contradicts_the_file_is_refused(source: str, given: dict[str, Any], words: str, write: Write) -> None:
    with pytest.raises(CmfastError, match=words):
        load_model(write(), source, Given(**given))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("last.bias", None, r"last.bias is missing, expected \[1\]"),
        ("down.1.0.weight", None, r"down.1.0.weight is missing, expected \[32\]"),
        ("down.0.weight", None, "without a down.0.weight"),
        ("down.0.weight", torch.zeros(48, 1, 3, 3), r"down.0.weight is \[48, 1, 3, 3\]: .*a multiple of 32, got 48"),
        ("down.0.weight", torch.zeros(32), "without a down.0.weight"),
        ("down.0.weight", torch.zeros(32, 1, 5, 5), r"down.0.weight is \[32, 1, 5, 5\], expected \[32, 1, 3, 3\]"),
        ("mid.3.bias", torch.zeros(32), r"mid.3.bias is \[32\], expected \[64\]"),
        ("time_downs.2.weight", torch.zeros(64, 32), r"time_downs.2.weight is \[64, 32\], expected \[64, 64\]"),
        ("up.4.weight", torch.zeros(2), r"up.4.weight is \[2\], expected no such tensor"),
        ("label_emb.weight", torch.zeros(10, 64), r"label_emb.weight is \[10, 64\], expected no such tensor"),
        ("up.3.bias", torch.zeros(64, dtype=torch.int64), "up.3.bias is int64, strided, cpu"),
    ],
    ids=str,
)
def test_another_network_is_refused_by_its_first_tensor_that_does_not_fit(
    name: str, value: Tensor | None, words: str, write: Write
) -> None:
    with pytest.raises(ArtifactError, match=words) as raised:
        load_model(write(**{name: value}))
    assert "\n" not in str(raised.value)


def test_weights_in_half_precision_are_read_as_float32(write: Write) -> None:
    half = {name: weight.half() for name, weight in random_network().state_dict().items()}
    checkpoint = load_model(write(**half))
    assert {weight.dtype for weight in checkpoint.weights.values()} == {torch.float32}


def test_other_networks_are_not_taken_for_it() -> None:
    from cmfast_train.importers.cloneofsimo import matches

    adm = AdmUnet(AdmConfig(image_size=8, model_channels=32, channel_mult=(1,), attention=(), head_channels=32))
    assert matches(random_network().state_dict())
    assert not matches(adm.state_dict())
    assert not matches({"down.0.weight": torch.zeros(1), "mid.0.weight": torch.zeros(1)})
    assert not matches({})


# From its file to a file that runs anywhere.


@pytest.mark.parametrize("channels", [1, 3])
def test_an_imported_file_exports_to_what_the_original_computes(channels: int, write: Write, tmp_path: Path) -> None:
    save_checkpoint(load_model(write("model.pth", channels), "cloneofsimo", Given(image_size=8)), tmp_path / "model.pt")
    exported = export_onnx(tmp_path / "model.pt", tmp_path / "model.onnx")
    assert exported.denoiser.parity.boundary == 0
    assert exported.manifest.source["format"] == "cloneofsimo"
    assert exported.manifest.source["sha256"] == load_checkpoint(tmp_path / "model.pt").sha256()
    assert exported.manifest.spec.scaling == "cloneofsimo"

    model, weights = cmfast.load(tmp_path / "model.onnx"), random_network(32, channels).state_dict()
    x = some(len(LEVELS), channels, 8, 8)
    for batch in (1, 3, len(LEVELS)):  # the batch is dynamic
        got = model.denoise(x[:batch].numpy(), np.float32(LEVELS[:batch]))
        # Another backend's convolutions and sines, at values of up to 10.
        np.testing.assert_allclose(got, original(weights, x[:batch], torch.tensor(LEVELS[:batch])), atol=2e-5)
    np.testing.assert_array_equal(model.denoise(x.numpy(), EPS), x)


def test_its_two_and_five_steps_are_one_file_each(write: Write, tmp_path: Path) -> None:
    save_checkpoint(load_model(write("model.pth"), "cloneofsimo", Given(image_size=8)), tmp_path / "model.pt")
    weights = random_network().state_dict()
    for steps in (2, 5):
        path = tmp_path / f"sampler{steps}.onnx"
        export_onnx(tmp_path / "model.pt", path, kind="sampler", steps=steps)
        model, noise = cmfast.load(path), some(steps, 3, 1, 8, 8)
        want = original_sample(weights, noise, model.sigmas_for())
        np.testing.assert_allclose(model.from_noise(noise.numpy(), model.sigmas_for()), want, rtol=1e-5, atol=1e-4)
