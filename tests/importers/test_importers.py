# SPDX-License-Identifier: MIT
"""Foreign checkpoints through the commands, as their owners would type them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError, CmfastError
from cmfast.formats.table import read_manifest
from cmfast_export import cli as export
from cmfast_export.targets.diffusers_folder import export_diffusers
from cmfast_train.checkpoint import load_checkpoint, save_checkpoint
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import Given
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers.specs import image_spec

CONFIG = AdmConfig(
    image_size=8, classes=3, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,), head_channels=32
)
TOLD = ("image_size=8", "head_channels=32", "qkv=3hd", "scaling=boundary")
SAY = ("--source", "openai", *(word for text in TOLD for word in ("--set", text)))

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


def test_info_says_what_is_known_what_says_so_and_what_is_missing(foreign: Path, call: Make) -> None:
    told = lines(call(info.main, foreign).stdout)
    assert told["format"].startswith("openai: an ADM U-Net")
    assert told["network"].endswith("channels 32, 64   (the tensors)")
    assert told["classes"] == "3   (the tensors)"
    assert told["missing"].startswith("--source openai:imagenet64-cd")
    assert "--set qkv=3hd" in told["missing"]
    assert "scaling" not in told
    done = lines(call(info.main, foreign, *SAY, "--set", "grid=40").stdout)
    assert done["scaling"] == "boundary   (--set)"
    assert done["c_noise"] == "250ln   (openai/consistency_models)"
    assert "missing" not in done


def test_info_as_json_is_the_manifest_or_says_what_is_missing(foreign: Path, call: Make, refused: Make) -> None:
    manifest = json.loads(call(info.main, foreign, *SAY, "--json").stdout)
    source = manifest["source"]
    assert (source["format"], source["qkv"], len(source["sha256"])) == ("openai", "3hd", 64)
    assert source["told"] == {"image_size": 8, "head_channels": 32, "qkv": "3hd", "scaling": "boundary"}
    assert (manifest["scaling"], manifest["shape"], manifest["conditions"][0]["classes"]) == ("boundary", [3, 8, 8], 3)
    refused(call(info.main, foreign, "--json"), "its image_size", "--set scaling=boundary")


def test_a_foreign_file_becomes_onnx_a_checkpoint_and_a_folder_that_draw_the_same_images(
    foreign: Path, tmp_path: Path, call: Make
) -> None:
    checkpoint, model, folder = tmp_path / "model.pt", tmp_path / "model.onnx", tmp_path / "folder"
    told = call(export.main, foreign, *SAY, "--set", "grid=40", "--format", "cmfast", "-o", checkpoint)
    assert f"next: cmfast-export {checkpoint}" in told.stdout
    assert load_checkpoint(checkpoint).source["told"]["head_channels"] == 32
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
    given = Given.parse(TOLD)
    assert load_model(tmp_path / "model.safetensors", "openai", given).network == CONFIG


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "its image_size, qkv, head_channels, scaling, c_noise"),
        (("--source", "edm"), "--source edm, but its tensors are named as in openai"),
        (("--source", "keras"), "--source keras: unknown; there are cmfast, diffusers, lerobot, openai"),
        (("--set", "scaling"), "--set scaling: expected NAME=VALUE"),
        (("--set", "shade=3"), "no such field"),
        (("--format", "cmfast", "--kind", "sampler"), "are for graphs, not for cmfast"),
        (("--format", "cmfast", "-o", "x.onnx"), "for --format cmfast the name must end in .pt or .safetensors"),
        (("--format", "diffusers", "-o", "x.onnx"), "writes a folder; give it a name without .onnx"),
        (("--format", "diffusers", "--tolerance", "5"), "--tolerance are for graphs, not for diffusers"),
        (("--source", "edm:cifar"), "--source edm:cifar: unknown"),
    ],
)
def test_a_request_that_cannot_be_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], words: str, foreign: Path, call: Make, refused: Make
) -> None:
    before = set(foreign.parent.iterdir())
    refused(call(export.main, foreign, *arguments), words)
    assert set(foreign.parent.iterdir()) == before


def test_the_file_that_is_read_is_never_the_one_that_is_written(foreign: Path, call: Make, refused: Make) -> None:
    before = foreign.read_bytes()
    refused(call(export.main, foreign, *SAY, "--format", "cmfast", "-o", foreign), "is read by this command")
    assert foreign.read_bytes() == before


def test_names_with_dots_and_the_folder_itself_get_a_name(
    foreign: Path, tmp_path: Path, call: Make, refused: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "ema_0.9999_000100.pt"
    here.write_bytes(foreign.read_bytes())
    assert call(export.main, here, *SAY, "--format", "diffusers").returncode == 0
    folder = tmp_path / "ema_0.9999_000100_diffusers"
    assert (folder / "model_index.json").exists()
    monkeypatch.chdir(folder)
    assert call(export.main, ".", "-n").stdout.startswith(f"would write {folder}.onnx")
    refused(call(export.main, "/", "-n"), "/ has no name to call the file after; pass one: -o NAME")


def test_the_next_command_is_one_that_works(foreign: Path, tmp_path: Path, call: Make) -> None:
    said = call(export.main, foreign, *SAY, "-o", tmp_path / "model.onnx").stdout
    commands = [line.split() for line in said.partition("next:")[2].splitlines() if line.strip()]
    assert [words[0] for words in commands] == ["cmfast-sample", "cmfast-export", "cmfast-bench"]
    assert call(export.main, *commands[1][1:]).returncode == 0
    assert load_checkpoint(commands[2][3]).spec == read_manifest(tmp_path / "model.onnx").spec


def test_info_reads_what_export_reads_whatever_it_is_called(foreign: Path, tmp_path: Path, call: Make) -> None:
    for suffix in (".ckpt", ".bin", ".pth"):
        copy = tmp_path / f"model{suffix}"
        copy.write_bytes(foreign.read_bytes())
        assert lines(call(info.main, copy, *SAY).stdout)["scaling"] == "boundary   (--set)"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_share_their_memory_are_written_apart(suffix: str, tmp_path: Path) -> None:
    network = AdmUnet(CONFIG)
    randomise(network)
    weights = dict(network.state_dict())
    weights["out.0.bias"] = weights["out.0.weight"]
    torch.save(weights, tmp_path / "tied.pt")
    checkpoint = load_model(tmp_path / "tied.pt", "openai", Given.parse(TOLD))
    save_checkpoint(checkpoint, tmp_path / f"apart{suffix}")
    assert load_checkpoint(tmp_path / f"apart{suffix}").sha256() == checkpoint.sha256()
    export_diffusers(checkpoint, tmp_path / "folder")


def test_a_cmfast_checkpoint_needs_nothing_said(tiny_checkpoint: Make, call: Make, refused: Make) -> None:
    refused(call(export.main, tiny_checkpoint(), "--set", "scaling=edm"), "already holds these facts")
    refused(call(info.main, tiny_checkpoint(), "--source", "openai"), "already holds these facts")


class Marker:
    """Stands for a trainer's own object; `pickle` would run what it says."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_weights_beside_a_trainers_objects_are_read_and_the_objects_are_not_run(tmp_path: Path) -> None:
    network = AdmUnet(CONFIG)
    randomise(network)
    optimizer = torch.optim.RAdam(network.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5))
    network(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).sum().backward()
    optimizer.step()
    content = {
        "model": {"net": network.state_dict(), "ema": network.state_dict()},
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "callbacks": [Marker(tmp_path / "ran")],
    }
    torch.save(content, tmp_path / "0000100.pth")
    torch.load(tmp_path / "0000100.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # so the check below can fail
    (tmp_path / "ran").rmdir()
    checkpoint = load_model(tmp_path / "0000100.pth", "openai", Given.parse([*TOLD, "weights=ema"]))
    assert not (tmp_path / "ran").exists()
    assert checkpoint.source["weights"] == "model.ema"
    for name, value in network.state_dict().items():
        assert torch.equal(checkpoint.weights[name], value), name


def test_a_whole_module_that_was_saved_is_read_by_its_tensors(tmp_path: Path) -> None:
    network = AdmUnet(CONFIG)
    randomise(network)
    torch.save({"net": network, "optimizer_state": {}}, tmp_path / "training-state-000100.pt")
    checkpoint = load_model(tmp_path / "training-state-000100.pt", "openai", Given.parse(TOLD))
    assert checkpoint.weights.keys() == network.state_dict().keys()


def test_a_checkpoint_of_ours_holds_no_objects(tiny_checkpoint: Make, tmp_path: Path) -> None:
    content = torch.load(tiny_checkpoint(), weights_only=True)
    torch.save({**content, "extra": Marker(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="holds code or objects"):
        load_model(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_unknown_tensors_is_told_so(tmp_path: Path) -> None:
    for tensors, words in [
        ({"encoder.weight": torch.zeros(2, 2)}, "a network that is not known here .encoder.weight"),
        ({"time_embedding.linear_1.weight": torch.zeros(2, 2)}, "name the whole folder"),
        ({"net.emb_noise.weight": torch.zeros(2, 2)}, "EDM2"),
        ({"time_embed_s.0.weight": torch.zeros(2, 2)}, "CTM, which takes two times"),
        ({"\x1b[31m": torch.zeros(2, 2)}, r"\\x1b.31m"),
        ({"step": 3}, "without named weights"),
    ]:
        torch.save(tensors, tmp_path / "model.pt")
        with pytest.raises(ArtifactError, match=words):
            identify(tmp_path / "model.pt")


def test_indices_need_a_grid_and_stand_alone(tiny_checkpoint: Make, tmp_path: Path, call: Make, refused: Make) -> None:
    out = ("-o", tmp_path / "grid.png")
    refused(call(sample.main, tiny_checkpoint(), "--indices", "22,0", *out), "has no grid", "(sigmas)")
    refused(call(sample.main, tiny_checkpoint(), "--indices", "0", "--steps", "1", *out), "pass one of them")
    with pytest.raises(CmfastError, match="index 40 is not in a grid of 40"):
        image_spec(image=(3, 8, 8), grid=40).sigmas_at([40, 0])
    assert image_spec(image=(3, 8, 8), grid=40).sigmas_at([0, 22, 39]) == (80.0, pytest.approx(1.382368))
