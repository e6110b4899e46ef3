# SPDX-License-Identifier: MIT
"""Foreign checkpoints through the commands, as their owners would type them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cmfast
from cmfast.artifact import read_manifest
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError, CmfastError
from cmfast_export import cli as export
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import Told
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise

CONFIG = AdmConfig(
    image_size=8, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,), head_channels=32
)
SAY = ("--source", "openai", "--set", "image_size=8", "--set", "head_channels=32", "--set", "scaling=boundary")

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a state dict with OpenAI's names, as a training run leaves it."""
    network = AdmUnet(CONFIG)
    randomise(network)
    path = tmp_path_factory.mktemp("foreign") / "ema_0.9999_000100.pt"
    torch.save(network.state_dict(), path)
    return path


def lines(text: str) -> dict[str, str]:
    return {line[:13].strip(): line[13:].strip() for line in text.splitlines()}


def test_info_says_what_is_known_what_says_so_and_what_has_to_be_told(foreign: Path, call: Make) -> None:
    told = lines(call(info.main, foreign).stdout)
    assert told["format"].startswith("openai: an ADM U-Net")
    assert told["network"].endswith("channels 32, 64   (the tensors)")
    assert told["classes"] == "3   (the tensors)"
    assert told["to be told"].startswith("--source openai:imagenet64-cd")
    assert "--set qkv=3hd" in told["to be told"]
    assert "scaling" not in told
    done = lines(call(info.main, foreign, *SAY, "--set", "grid=40").stdout)
    assert done["scaling"] == "boundary   (--set)"
    assert done["qkv"] == "3hd   (openai/consistency_models)"
    assert "to be told" not in done


def test_info_as_json_is_the_manifest_or_says_what_is_missing(foreign: Path, call: Make, refused: Make) -> None:
    manifest = json.loads(call(info.main, foreign, *SAY, "--json").stdout)
    assert manifest["source"] == {"format": "openai", "qkv": "3hd", "sha256": manifest["source"]["sha256"]}
    assert (manifest["scaling"], manifest["image"], manifest["classes"]) == ("boundary", [3, 8, 8], 3)
    refused(call(info.main, foreign, "--json"), "does not say its image_size", "--set scaling=boundary")


def test_a_foreign_file_becomes_onnx_a_checkpoint_and_a_folder_that_draw_the_same_images(
    foreign: Path, tmp_path: Path, call: Make
) -> None:
    checkpoint, model, folder = tmp_path / "model.pt", tmp_path / "model.onnx", tmp_path / "folder"
    told = call(export.main, foreign, *SAY, "--set", "grid=40", "--format", "cmfast", "-o", checkpoint)
    assert f"next: cmfast-export {checkpoint}" in told.stdout
    assert load_checkpoint(checkpoint).source == {"format": "openai", "qkv": "3hd"}
    assert call(export.main, foreign, *SAY, "--set", "grid=40", "-o", model).returncode == 0
    said = call(export.main, checkpoint, "--format", "diffusers", "-o", folder).stdout
    assert "pipeline(timesteps=[0])    # 1 step(s), at 80" in said

    manifest = read_manifest(model)
    assert manifest.source["qkv"] == "3hd"
    assert manifest.source["sha256"] == load_checkpoint(checkpoint).sha256() == load_model(folder).sha256()
    assert manifest.spec.grid == 40
    images = [cmfast.load(path).sample_float(4, sigmas=(80, 1.5), seed=3) for path in (checkpoint, model, folder)]
    np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(images[2], images[0])
    assert images[0].std() > 0.1

    indexed = call(sample.main, model, "--indices", "22,0", "-n", 4, "--seed", 3, "-o", tmp_path / "samples.npz")
    assert "80, 1.38237" in indexed.stdout
    want = cmfast.load(model).sample(4, sigmas=(80, 1.3823684), seed=3)
    np.testing.assert_allclose(np.load(tmp_path / "samples.npz")["arr_0"].astype(int), want, atol=1)


def test_a_diffusers_folder_is_read_by_every_command(foreign: Path, tmp_path: Path, call: Make) -> None:
    folder = tmp_path / "folder"
    assert call(export.main, foreign, *SAY, "--format", "diffusers", "-o", folder).returncode == 0
    told = lines(call(info.main, folder).stdout)
    assert told["scaling"] == "boundary   (CMStochasticIterativeScheduler)"
    assert told["grid"] == "40   (scheduler/scheduler_config.json)"
    assert call(sample.main, folder, "-n", 2, "-o", tmp_path / "grid.png").returncode == 0
    assert call(export.main, folder).returncode == 0
    assert read_manifest(tmp_path / "folder.onnx").source["format"] == "diffusers"


def test_safetensors_without_a_description_are_foreign_too(tmp_path: Path) -> None:
    network = AdmUnet(CONFIG)
    randomise(network)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    told = Told(image_size=8, head_channels=32, scaling="boundary")
    assert load_model(tmp_path / "model.safetensors", "openai", told).network == CONFIG


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "does not say its image_size, head_channels, qkv, scaling, c_noise"),
        (("--source", "edm"), "--source edm, but its tensors are named as in openai"),
        (("--source", "keras"), "--source keras: unknown; there are cmfast, openai"),
        (("--set", "scaling"), "--set scaling: expected NAME=VALUE"),
        (("--set", "shade=3"), "no such field"),
        (("--format", "cmfast", "--kind", "sampler"), "are for --format onnx, not for cmfast"),
        (("--format", "cmfast", "-o", "x.onnx"), "for --format cmfast the name must end in .pt or .safetensors"),
        (("--format", "diffusers", "-o", "x.onnx"), "the name must end in nothing: it is a folder"),
    ],
)
def test_a_request_that_cannot_be_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], words: str, foreign: Path, call: Make, refused: Make
) -> None:
    before = set(foreign.parent.iterdir())
    refused(call(export.main, foreign, *arguments), words)
    assert set(foreign.parent.iterdir()) == before


def test_a_cmfast_checkpoint_needs_nothing_said(tiny_checkpoint: Make, call: Make, refused: Make) -> None:
    refused(call(export.main, tiny_checkpoint(), "--set", "scaling=edm"), "says everything itself")
    refused(call(info.main, tiny_checkpoint(), "--source", "openai"), "says everything itself")


def test_a_file_of_unknown_tensors_is_told_so(tmp_path: Path) -> None:
    for tensors, words in [
        ({"encoder.weight": torch.zeros(2, 2)}, "a network that is not known here .encoder.weight"),
        ({"time_embedding.linear_1.weight": torch.zeros(2, 2)}, "name the whole folder"),
        ({"net.emb_noise.weight": torch.zeros(2, 2)}, "EDM2"),
        ({"step": 3}, "without named weights"),
    ]:
        torch.save(tensors, tmp_path / "model.pt")
        with pytest.raises(ArtifactError, match=words):
            identify(tmp_path / "model.pt")


def test_indices_need_a_grid_and_stand_alone(tiny_checkpoint: Make, tmp_path: Path, call: Make, refused: Make) -> None:
    out = ("-o", tmp_path / "grid.png")
    refused(call(sample.main, tiny_checkpoint(), "--indices", "22,0", *out), "has no grid", "--sigmas")
    refused(call(sample.main, tiny_checkpoint(), "--indices", "0", "--steps", "1", *out), "give one of them")
    with pytest.raises(CmfastError, match="index 40 is not in a grid of 40"):
        cmfast.ModelSpec(image=(3, 8, 8), grid=40).levels_at([40, 0])
    assert cmfast.ModelSpec(image=(3, 8, 8), grid=40).levels_at([0, 22, 39]) == (80.0, pytest.approx(1.382368))
