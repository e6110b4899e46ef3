# SPDX-License-Identifier: MIT
"""Checkpoints out to diffusers: its own pipeline loads them whole and draws the same images."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmfast.backends import open_backend
from cmfast.errors import ArtifactError, BackendError, CheckFailed, CmfastError
from cmfast.schedule import karras_sigmas, sigmas_of_indices
from cmfast_export.targets.diffusers_folder import Timesteps, export_diffusers, nearest_timesteps, unet_config
from cmfast_train.checkpoint import Checkpoint, load_checkpoint
from cmfast_train.importers import diffusers as importer
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers.adm import IMAGENET64, LSUN256
from helpers.foreign.diffusers_folders import FULL, assert_same_images, imported, labels, with_denoiser, with_pipeline
from helpers.specs import image_spec

VARIANTS: dict[str, dict[str, Any]] = {
    "conditional": {"classes": 5},
    "unconditional": {"scale_shift": False},
    "convolutions": {"resblock_updown": False, "classes": 5},
    "convolutions, unconditional": {"resblock_updown": False, "scale_shift": False},
    "three levels": {"channel_mult": (1, 1, 2), "attention": (16, 4), "res_blocks": 2, "dropout": 0.1},
    "attention in the middle only": {"attention": ()},
    "one level": {"channel_mult": (1,), "resblock_updown": False},
}


def checkpoint_of(spec: dict[str, Any] | None = None, **values: Any) -> Checkpoint:
    small = {"image_size": 16, "model_channels": 32, "res_blocks": 1, "channel_mult": (1, 2), "attention": (8,)}
    config = AdmConfig(**{**small, "head_channels": 32, **values})
    network = AdmUnet(config)
    randomise(network)
    image = (config.channels, config.image_size, config.image_size)
    return Checkpoint(
        spec=image_spec(image=image, classes=config.classes, **{"grid": 40, **(spec or {})}),
        network=config,
        weights=network.state_dict(),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# There.


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_loads_every_tensor_and_draws_the_same_images(
    diffusers: ModuleType, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(**VARIANTS[name])
    export_diffusers(checkpoint, tmp_path / "out")
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "out")
    _, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched
    assert capfd.readouterr().err == ""  # it warns there
    label = labels(checkpoint, 2)
    for given, sigmas in (
        ({"num_inference_steps": 1}, (80.0,)),
        ({"num_inference_steps": None, "timesteps": [22, 0]}, sigmas_of_indices([0, 22], 40)),
    ):
        theirs = with_pipeline(pipeline, 2, label, **given)
        assert_same_images(with_denoiser(checkpoint, 2, label, sigmas), theirs, atol=1e-5)


def test_other_conventions_reach_diffusers(diffusers: ModuleType, tmp_path: Path) -> None:
    spec = {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 0.3, "grid": 18, "clip": False, "sigmas": {1: (20.0,)}}
    checkpoint = checkpoint_of(spec)
    export_diffusers(checkpoint, tmp_path / "out")
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "out")
    theirs = with_pipeline(pipeline, 2, None, num_inference_steps=1)
    assert_same_images(with_denoiser(checkpoint, 2, None, (20.0,)).clip(-1, 1), theirs, atol=1e-5)
    assert (pipeline.scheduler.config.clip_denoised, pipeline.scheduler.config.num_train_timesteps) == (False, 18)


def test_grey_images_are_drawn_too(diffusers: ModuleType, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(channels=1)
    export_diffusers(checkpoint, tmp_path / "out")
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    # Not with_pipeline: diffusers takes a first noise of three channels only, but draws its own of any.
    theirs = 2 * pipeline(2, generator=torch.Generator().manual_seed(1), output_type="pt").images - 1
    assert_same_images(with_denoiser(checkpoint, 2, None, (80.0,)), theirs, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), [("imagenet64", IMAGENET64), ("lsun256", LSUN256)])
def test_the_released_networks_have_the_configuration_of_the_hub(name: str, config: AdmConfig) -> None:
    written = unet_config(config)
    assert {field: written[field] for field in FULL[name]} == FULL[name]
    assert written["attn_norm_num_groups"] == FULL[name].get("attn_norm_num_groups")
    assert written["num_class_embeds"] == FULL[name].get("num_class_embeds")


def test_every_field_is_one_that_diffusers_has(diffusers: ModuleType) -> None:
    known = inspect.signature(diffusers.UNet2DModel).parameters.keys() - {"args", "kwargs"}
    written = {name for name in unet_config(IMAGENET64) if not name.startswith("_")}
    assert known - written == {"mid_block_type", "time_embedding_dim", "num_train_timesteps"}  # newer than VERSION
    assert written <= known


def test_what_the_pipeline_cannot_do_with_other_channels_is_said_and_true(
    diffusers: ModuleType, tmp_path: Path
) -> None:
    for channels in (1, 4, 6):
        out = tmp_path / str(channels)
        limits = export_diffusers(checkpoint_of(channels=channels), out).limits
        assert f"latents= of 3 channels only, a fault of diffusers, and these images have {channels}" in limits
        assert ('output_type="np"' in limits) == (channels > 4)
        pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(out)
        pipeline.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match="shape of latents"):  # diffusers has mended it: remove COLOURS
            pipeline(1, latents=torch.zeros(1, channels, 16, 16))
        if channels > 4:
            with pytest.raises(TypeError):
                pipeline(1)
            assert pipeline(1, output_type="np").images.shape == (1, 16, 16, channels)
        with pytest.raises(BackendError, match=f"a fault of diffusers, and this model's images have {channels}"):
            open_backend(out, variant="diffusers")
    assert export_diffusers(checkpoint_of(), tmp_path / "3").limits == ""


# And back.


@pytest.mark.parametrize("name", VARIANTS)
def test_openais_tensors_come_back_from_the_folder_equal_to_the_bit(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(**VARIANTS[name])
    export_diffusers(checkpoint, tmp_path / "out")
    back = imported(tmp_path / "out")
    assert list(back.weights) == list(checkpoint.weights)
    assert all(same_bits(back.weights[n], checkpoint.weights[n]) for n in back.weights)
    assert back.sha256() == checkpoint.sha256()
    assert dataclasses.replace(back.spec, sigmas=checkpoint.spec.sigmas) == checkpoint.spec
    assert isinstance(back.network, AdmConfig)
    assert unet_config(back.network) == unet_config(checkpoint.network)  # type: ignore[arg-type]


def test_a_trained_checkpoint_goes_out(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint())
    written = export_diffusers(checkpoint, tmp_path / "out")
    assert written.path == tmp_path / "out"
    assert imported(tmp_path / "out").sha256() == checkpoint.sha256()


def test_views_of_one_buffer_transposed_and_with_gradients_are_written(tmp_path: Path) -> None:
    checkpoint = checkpoint_of()
    weights: dict[str, Tensor] = dict(checkpoint.weights)
    flat = torch.cat([weights["out.0.weight"], weights["out.0.bias"]])  # as an optimizer keeps its parameters
    weights["out.0.weight"], weights["out.0.bias"] = flat[:32], flat[32:]
    weights["out.2.bias"] = torch.nn.Parameter(weights["out.2.bias"])
    weights["out.2.weight"] = weights["out.2.weight"].transpose(2, 3)
    export_diffusers(dataclasses.replace(checkpoint, weights=weights), tmp_path / "out")
    back = imported(tmp_path / "out").weights
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_neither_way_imports_diffusers(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    code = f"""
import sys
from cmfast_export.targets.diffusers_folder import export_diffusers
from cmfast_train.checkpoint import load_checkpoint
export_diffusers(load_checkpoint({str(tiny_checkpoint())!r}), {str(tmp_path / "out")!r})
assert "cmfast_train.importers.diffusers" in sys.modules
assert not {{"diffusers", "transformers", "accelerate"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Noise levels as indices.


def test_without_a_grid_the_folder_has_40_levels_and_the_nearest_are_said(tmp_path: Path) -> None:
    checkpoint = checkpoint_of({"grid": 0, "sigmas": {1: (80.0,), 2: (80.0, 0.8)}})
    written = export_diffusers(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out" / importer.SCHEDULER).read_text())["num_train_timesteps"] == 40
    assert written.grid == 40
    second = min(karras_sigmas(40), key=lambda sigma: abs(np.log(sigma / 0.8)))
    assert written.timesteps == {
        1: Timesteps(indices=(0,), sigmas=(80.0,)),
        2: Timesteps(indices=(karras_sigmas(40).index(second), 0), sigmas=(80.0, second)),
    }


def test_levels_of_the_models_own_grid_are_found_exactly(tmp_path: Path) -> None:
    sigmas = {1: (80.0,), 2: sigmas_of_indices([0, 106], 201)}
    written = export_diffusers(checkpoint_of({"grid": 201, "sigmas": sigmas}), tmp_path / "out")
    assert written.grid == 201
    assert written.timesteps[2] == Timesteps(indices=(106, 0), sigmas=sigmas[2])


def test_levels_that_the_grid_cannot_tell_apart_or_start_with_have_no_timesteps() -> None:
    spec = image_spec(image=(3, 8, 8))
    assert nearest_timesteps((80.0, 79.9), spec, 40) is None
    assert nearest_timesteps((40.0, 1.0), spec, 40) is None  # the pipeline starts at sigma_max, always
    found = nearest_timesteps((80.0, 0.00201), spec, 40)
    assert found is not None
    assert found.indices == (38, 0)  # not 39, where the model is the identity


# What cannot go out.


@pytest.mark.parametrize(
    ("spec", "values", "words"),
    [
        ({"scaling": "edm"}, {}, ("scaling is 'edm'", "'boundary'")),
        ({"scaling": "cloneofsimo"}, {}, ("scaling is 'cloneofsimo'",)),
        ({"c_noise": "ln/4"}, {}, ("c_noise is 'ln/4'", "'250ln'")),
        ({"renoise": "plain"}, {}, ("renoise is 'plain'", "'sqrt'")),
        ({"renoise": "ddim"}, {}, ("renoise is 'ddim'", "'sqrt'")),
        ({"scaling": "flow"}, {}, ("scaling is 'flow'", "'boundary'")),
        ({"c_noise": "flow"}, {}, ("c_noise is 'flow'", "'250ln'")),
        ({}, {"channel_mult": (2, 2)}, ("channel_mult is (2, 2)", "begin with 1")),
        ({}, {"patch": 2}, ("patch is 2", "pixels as they are")),
        ({}, {"two_times": True}, ("two_times is True", "one noise level")),
    ],
    ids=str,
)
def test_what_diffusers_cannot_compute_is_refused_by_its_field(
    tmp_path: Path, spec: dict[str, Any], values: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(CmfastError) as caught:
        export_diffusers(checkpoint_of(spec, **values), tmp_path / "out")
    assert all(word in str(caught.value) for word in (*words, "ONNX"))
    assert not any(tmp_path.iterdir())


def test_another_network_is_refused(tmp_path: Path) -> None:
    from cmfast_train.networks.cloneofsimo import CloneofsimoConfig

    checkpoint = checkpoint_of()
    other = dataclasses.replace(checkpoint, network=CloneofsimoConfig(image_size=16, channels=3))
    with pytest.raises(CmfastError, match="type is 'cloneofsimo'"):
        export_diffusers(other, tmp_path / "out")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of()
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if name != "out.2.bias"}
    with pytest.raises(ArtifactError, match=r"out\.2\.bias"):
        export_diffusers(dataclasses.replace(checkpoint, weights=weights), tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["weight", "network", "sigma_max"])
def test_a_folder_that_does_not_read_back_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from cmfast_export.targets import diffusers_folder

    def changed(real: Callable[..., dict[str, Any]], change: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
        def call(*arguments: Any) -> dict[str, Any]:
            values = real(*arguments)
            change(values)
            return values

        return call

    def last_bit(tensors: dict[str, Tensor]) -> None:
        tensors["conv_out.bias"] = (tensors["conv_out.bias"].view(torch.int32) ^ 1).view(torch.float32)

    if what == "weight":
        monkeypatch.setattr(diffusers_folder, "to_diffusers", changed(diffusers_folder.to_diffusers, last_bit))
    elif what == "network":
        real = diffusers_folder._write_json

        def write(file: Path, values: dict[str, Any]) -> None:
            real(file, {**values, "dropout": 0.5} if file.name == "config.json" else values)

        monkeypatch.setattr(diffusers_folder, "_write_json", write)
    else:
        monkeypatch.setattr(
            diffusers_folder,
            "_scheduler",
            changed(diffusers_folder._scheduler, lambda values: values.update(sigma_max=79.0)),
        )
    with pytest.raises(CheckFailed, match={"weight": r"out\.2\.bias"}.get(what, what)):
        export_diffusers(checkpoint_of(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(CmfastError, match="not an empty folder"):
        export_diffusers(checkpoint_of(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_folder_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    export_diffusers(checkpoint_of(), tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
