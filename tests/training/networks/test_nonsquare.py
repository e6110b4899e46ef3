# SPDX-License-Identifier: MIT
"""Images that are not square: every network, and the way from a run to images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cmfast
from cmfast.errors import CmfastError
from cmfast_export.pipeline import export_onnx
from cmfast_export.targets.diffusers_folder import export_diffusers
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import from_dict, to_dict
from cmfast_train.data.images import Images
from cmfast_train.importers import load_model
from cmfast_train.importers.facts import Given
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network, network_from_dict, network_to_dict
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.training import trainer
from cmfast_train.training.initial_model import start_of
from helpers.specs import image_spec

DIGITS = PRESETS["digits"]
WIDE: dict[str, NetworkConfig] = {  # 8 high, 16 wide; attention at half the size
    "adm": AdmConfig(
        image_size=(8, 16), channels=1, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2),
        attention=(4,), head_channels=32,
    ),
    "adm, convolutions": AdmConfig(
        image_size=(8, 16), channels=1, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(8,),
        head_channels=32, resblock_updown=False,
    ),
    "cloneofsimo": CloneofsimoConfig(image_size=(8, 16), channels=3, width=32),
    "song": SongConfig(
        image_size=(8, 16), channels=1, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,)
    ),
    "song, NCSN++": SongConfig(
        image_size=(8, 16), channels=1, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(8,),
        encoder="residual", decoder="skip", embedding="fourier", resample=(1, 3, 3, 1),
    ),
    "dhariwal": DhariwalConfig(
        image_size=(8, 16), channels=1, model_channels=64, res_blocks=1, channel_mult=(1, 2), attention=(4,)
    ),
}  # fmt: skip


def random_network(config: NetworkConfig) -> nn.Module:
    network = build_network(config).eval().requires_grad_(False)
    randomise(network)
    return network


def evaluated(network: nn.Module, x: Tensor, classes: int) -> Tensor:
    label = torch.tensor([0, 2]) if classes else None
    return network(x, torch.tensor([0.3, -0.4]), label)


def of_size(config: NetworkConfig, size: int | tuple[int, int], factor: int = 1) -> NetworkConfig:
    attention = (
        {} if isinstance(config, CloneofsimoConfig) else {"attention": tuple(factor * s for s in config.attention)}
    )
    return dataclasses.replace(config, image_size=size, **attention)


@pytest.mark.parametrize("name", WIDE)
def test_a_network_of_wide_images_with_turned_weights_is_the_network_of_tall_ones(name: str) -> None:
    wide, x = random_network(WIDE[name]), torch.randn(2, *WIDE[name].image_shape)
    tall = build_network(of_size(WIDE[name], (16, 8), factor=2)).eval().requires_grad_(False)
    turned = {key: w.transpose(-1, -2) if w.ndim == 4 else w for key, w in wide.state_dict().items()}
    renamed = {key.replace("8x16_", "16x8_").replace("4x8_", "8x4_"): w for key, w in turned.items()}
    tall.load_state_dict(renamed)
    want = evaluated(wide, x, WIDE[name].classes)
    got = evaluated(tall, x.transpose(2, 3), WIDE[name].classes).transpose(2, 3)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)  # sums in another order
    assert float(want.std()) > 0.01


@pytest.mark.parametrize("name", WIDE)
def test_a_square_network_computes_wide_images_with_the_same_bits(name: str) -> None:
    wide, square = random_network(WIDE[name]), build_network(of_size(WIDE[name], 8)).eval().requires_grad_(False)
    names = {key.replace("8x16_", "8x8_").replace("4x8_", "4x4_"): w for key, w in wide.state_dict().items()}
    square.load_state_dict(names)  # the places of attention, too, are those of the height
    x = torch.randn(2, *WIDE[name].image_shape)
    assert torch.equal(evaluated(square, x, WIDE[name].classes), evaluated(wide, x, WIDE[name].classes))


@pytest.mark.parametrize("name", WIDE)
def test_a_networks_size_survives_its_description_and_a_square_is_one_number(name: str) -> None:
    config = WIDE[name]
    described = json.loads(json.dumps(network_to_dict(config)))
    assert described["image_size"] == [8, 16]
    assert network_from_dict(described) == config
    assert config.image_shape == (config.channels, 8, 16)
    square = dataclasses.replace(config, image_size=(8, 8), **({"attention": ()} if name != "cloneofsimo" else {}))
    assert square.image_size == 8
    assert network_to_dict(square)["image_size"] == 8
    assert square.image_shape == (config.channels, 8, 8)


@pytest.mark.parametrize(
    ("text", "size", "sides"),
    [
        ("image_size=8x16", (8, 16), (8, 16)),
        ("image_size=16X8", (16, 8), (16, 8)),
        ("image_size=16x16", 16, (16, 16)),
        ("image_size=16", 16, (16, 16)),
    ],
)
def test_a_run_of_any_size_survives_json(text: str, size: Any, sides: tuple[int, int]) -> None:
    config = override(DIGITS, [text])
    assert (config.image_size, config.image_sides) == (size, sides)
    assert config.spec(10).image == (1, *sides)
    assert to_dict(config)["image_size"] == (list(size) if isinstance(size, tuple) else size)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("size", ["7x8", "8x7"])
@pytest.mark.parametrize("network", [["network=adm"], ["network=cloneofsimo", "conditional=false"]], ids=str)
def test_either_side_that_cannot_be_halved_is_named(size: str, network: list[str]) -> None:
    with pytest.raises(CmfastError, match=f"image_size={size} cannot be halved .*; it must be a multiple of"):
        override(DIGITS, [*network, f"image_size={size}"])


def trained(out: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Path:
    pixels = torch.randint(0, 256, (20, 1, 8, 16), dtype=torch.uint8)
    monkeypatch.setattr(trainer, "load_data", lambda *_: Images(pixels, torch.arange(20) % 2, 2))
    quick = ["batch=8", "grid=2", "device=cpu", "tensorboard=false"]
    config = override(DIGITS, ["image_size=8x16", *quick, *settings])
    model = trainer.train(config, out, None)
    assert trainer.train(config, out, None) == model  # reads its configuration back
    assert load_checkpoint(model).spec.image == (1, 8, 16)
    return model


def test_a_run_on_wide_images_is_trained_continued_exported_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["network=cloneofsimo", "conditional=false", "phases=edm:8"]
    model = trained(tmp_path / "run", monkeypatch, *settings)
    export_onnx(load_checkpoint(model), tmp_path / "model.onnx")
    exported, eager = cmfast.load(tmp_path / "model.onnx"), cmfast.load(model)
    images = exported.sample(3, steps=2, seed=1)
    assert images.shape == (3, 8, 16, 1)
    assert np.abs(images.astype(int) - eager.sample(3, steps=2, seed=1).astype(int)).max() <= 1  # rounding to 8 bits


def test_a_run_on_wide_images_with_attention_and_classes_is_trained_and_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tmp_path / "run", monkeypatch, "attention=4", "head_channels=32", "phases=ect:8")
    assert cmfast.load(model).sample(2, steps=1).shape == (2, 8, 16, 1)


def wide_model(file: Path, config: NetworkConfig) -> Checkpoint:
    spec = image_spec(image=config.image_shape, classes=config.classes)
    checkpoint = Checkpoint(spec=spec, network=config, weights=random_network(config).state_dict())
    save_checkpoint(checkpoint, file)
    return checkpoint


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", WIDE)
def test_a_checkpoint_of_wide_images_survives_its_file(name: str, suffix: str, tmp_path: Path) -> None:
    before = wide_model(tmp_path / f"model{suffix}", WIDE[name])
    after = load_checkpoint(tmp_path / f"model{suffix}")
    assert (after.network, after.spec, after.sha256()) == (before.network, before.spec, before.sha256())


def test_diffusers_draws_square_images_only_and_that_is_one_line(tmp_path: Path) -> None:
    checkpoint = wide_model(tmp_path / "model.pt", dataclasses.replace(WIDE["adm"], classes=0))
    with pytest.raises(CmfastError, match=r"image_size is 8x16; .*ConsistencyModelPipeline draws square images"):
        export_diffusers(checkpoint, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("name", ["adm", "cloneofsimo"])
def test_foreign_weights_are_read_as_models_of_wide_images_if_that_is_said(name: str, tmp_path: Path) -> None:
    config = WIDE[name]
    torch.save(random_network(config).state_dict(), tmp_path / "weights.pt")
    said = ["scaling=boundary", "c_noise=250ln", "renoise=sqrt", "clip=true", "sigma_min=0.002", "sigma_max=80",
            "sigma_data=0.5", "grid=0", "image_size=8x16"]  # fmt: skip
    said += ["head_channels=32", "qkv=3hd"] if name == "adm" else []
    model = load_model(tmp_path / "weights.pt", given=Given.parse(said))
    assert model.spec.image == config.image_shape
    assert model.network == config


def test_a_file_of_a_known_size_is_not_read_as_another(tmp_path: Path) -> None:
    config = of_size(WIDE["song"], 8)
    torch.save({f"model.{key}": w for key, w in random_network(config).state_dict().items()}, tmp_path / "edm.pt")
    with pytest.raises(CmfastError, match=r"--set image_size=.* contradicts the tensors: image_size is 8"):
        load_model(tmp_path / "edm.pt", "ect", Given.parse(["image_size=8x16"]))


def test_an_init_of_another_shape_names_both(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    config = override(DIGITS, ["image_size=8x16", f"init={tiny_checkpoint(0)}", "conditional=false", "phases=ect:8"])
    with pytest.raises(CmfastError, match=r"images \[1, 8, 8\], the run has \[1, 8, 16\]: --set image_size=8 --set"):
        start_of(config, 0)
