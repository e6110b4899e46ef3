# SPDX-License-Identifier: MIT
"""diffusers' folders in: the same images as its own pipeline, and a refusal by name of what we cannot compute."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast.model import Model
from cmfast.schedule import karras_sigmas, sigmas_of_indices
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.importers import diffusers as importer
from cmfast_train.importers import diffusers_tensors as names
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers import DATA
from helpers.adm import IMAGENET64, LSUN256
from helpers.foreign.diffusers_folders import (
    FULL,
    assert_same_images,
    draft,
    imported,
    labels,
    with_denoiser,
    with_pipeline,
)

SMALL: dict[str, dict[str, Any]] = {
    "imagenet64": {
        **FULL["imagenet64"],
        "sample_size": 16,
        "layers_per_block": 2,
        "block_out_channels": [32, 64, 96],
        "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 2],
        "up_block_types": [*["AttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"],
        "num_class_embeds": 7,
        "attention_head_dim": 32,
    },
    "lsun256": {
        **FULL["lsun256"],
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": [32, 32, 64],
        "down_block_types": [*["ResnetDownsampleBlock2D"] * 2, "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", *["ResnetUpsampleBlock2D"] * 2],
        "attention_head_dim": 16,
    },
    "convolutions": {  # as UNet2DModel is by default
        "sample_size": 16,
        "block_out_channels": [32, 64],
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D"],
        "layers_per_block": 1,
    },
}
SETTINGS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {  # the arguments of diffusers, and ours
    "1 step": ({"num_inference_steps": 1}, (80.0,)),
    "timesteps=[22, 0]": (
        {"num_inference_steps": None, "timesteps": [22, 0]},
        sigmas_of_indices([0, 22, 39], 40),
    ),
    "4 timesteps": (
        {"num_inference_steps": None, "timesteps": [35, 26, 9, 0]},
        sigmas_of_indices([0, 9, 26, 35], 40),
    ),
}


@pytest.fixture(scope="session")
def saved(diffusers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that diffusers' own pipeline has saved, with random weights in every tensor; read-only."""
    folder = tmp_path_factory.mktemp("diffusers")
    for name, config in SMALL.items():
        pipeline_of(diffusers, config).save_pretrained(folder / name)
    return {name: folder / name for name in SMALL}


@pytest.fixture
def edited(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a saved folder and changes fields in one of its JSON files."""

    def edited(name: str, file: str = importer.UNET, to: str = "", **fields: Any) -> Path:
        folder = tmp_path / (to or name)
        shutil.copytree(saved[name], folder)
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **fields}))
        return folder

    return edited


def pipeline_of(diffusers: ModuleType, config: dict[str, Any], **scheduler: Any) -> Any:
    unet = diffusers.UNet2DModel(**config).eval().requires_grad_(False)
    randomise(unet)
    return diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler(**scheduler))


# The same images.


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SMALL)
def test_the_images_are_those_of_diffusers_own_pipeline(
    diffusers: ModuleType, saved: dict[str, Path], name: str, setting: str
) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(saved[name])
    checkpoint = imported(saved[name])
    given, sigmas = SETTINGS[setting]
    label = labels(checkpoint, 3)
    theirs = with_pipeline(pipeline, 3, label, **given)
    # The required bar is 1e-4; the two sum the same float32 numbers in another order.
    assert_same_images(with_denoiser(checkpoint, 3, label, sigmas), theirs, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4])
def test_the_default_levels_are_those_that_diffusers_takes_for_so_many_steps(
    diffusers: ModuleType, saved: dict[str, Path], steps: int
) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(saved["lsun256"])
    checkpoint = imported(saved["lsun256"])
    pipeline.scheduler.set_timesteps(steps)
    np.testing.assert_allclose(checkpoint.spec.sigmas_for(steps), pipeline.scheduler.sigmas[:-1], rtol=1e-6)
    theirs = with_pipeline(pipeline, 2, None, num_inference_steps=steps)
    assert_same_images(with_denoiser(checkpoint, 2, None, checkpoint.spec.sigmas_for(steps)), theirs, atol=1e-5)


def test_other_numbers_in_the_scheduler_are_followed(diffusers: ModuleType, tmp_path: Path) -> None:
    numbers = {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 0.3, "num_train_timesteps": 18}
    pipeline = pipeline_of(diffusers, SMALL["lsun256"], **numbers, clip_denoised=False)
    pipeline.save_pretrained(tmp_path)
    checkpoint = imported(tmp_path)
    assert checkpoint.spec.grid == 18
    assert not checkpoint.spec.clip
    theirs = with_pipeline(pipeline, 2, None, num_inference_steps=None, timesteps=[11, 0])
    sigmas = sigmas_of_indices([0, 11], 18, 0.01, 20.0)
    # diffusers clips what it returns, and adds noise of standard deviation 0, computed as a root of a float32
    # difference of two squares of sigma_min = 0.01: sqrt(1e-4 * 6e-8) = 2e-6 at most, for each unit of noise.
    assert_same_images(with_denoiser(checkpoint, 2, None, sigmas).clip(-1, 1), theirs, atol=2e-5)


def test_the_comparison_sees_exchanged_queries_and_keys(diffusers: ModuleType, saved: dict[str, Path]) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(saved["imagenet64"])
    checkpoint = imported(saved["imagenet64"])
    name = "input_blocks.4.1.qkv.weight"
    q, k, v = checkpoint.weights[name].chunk(3)
    weights = {**checkpoint.weights, name: torch.cat([k, q, v])}
    wrong = Checkpoint(spec=checkpoint.spec, network=checkpoint.network, weights=weights)
    label = labels(checkpoint, 2)
    difference = with_denoiser(wrong, 2, label, (80.0,)) - with_pipeline(pipeline, 2, label, num_inference_steps=1)
    assert difference.abs().max() > 1e-3


def test_a_saved_import_gives_the_same_images_through_the_runtime(
    diffusers: ModuleType, saved: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(saved["imagenet64"])
    save_checkpoint(imported(saved["imagenet64"]), tmp_path / "model.pt")
    model = Model(TorchBackend(tmp_path / "model.pt"))
    noise = torch.randn(1, 2, *model.spec.image, generator=torch.Generator().manual_seed(1)).numpy()
    images = model.from_noise(noise, (80.0,), np.array([0, 1]))
    theirs = with_pipeline(pipeline, 2, torch.tensor([0, 1]), num_inference_steps=1)
    assert_same_images(torch.from_numpy(images), theirs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FULL)
def test_the_released_networks_in_full_size_give_diffusers_images(
    diffusers: ModuleType, tmp_path: Path, name: str
) -> None:
    pipeline = pipeline_of(diffusers, FULL[name])
    pipeline.save_pretrained(tmp_path / name)
    label = torch.tensor([145]) if name == "imagenet64" else None
    given = {setting: SETTINGS[setting] for setting in ("1 step", "timesteps=[22, 0]")}
    theirs = {setting: with_pipeline(pipeline, 1, label, **given[setting][0]) for setting in given}
    del pipeline  # 2 GB
    checkpoint = imported(tmp_path / name)
    shutil.rmtree(tmp_path / name)
    assert checkpoint.network == {"imagenet64": IMAGENET64, "lsun256": LSUN256}[name]
    for setting, (_, sigmas) in given.items():
        assert_same_images(with_denoiser(checkpoint, 1, label, sigmas), theirs[setting], atol=1e-4)


# Names and layout.


@pytest.mark.parametrize(("name", "config"), [("imagenet64", IMAGENET64), ("lsun256", LSUN256)])
def test_every_name_and_shape_of_the_released_models_is_mapped_both_ways(name: str, config: AdmConfig) -> None:
    with gzip.open(DATA / f"keymap_{name}.tsv.gz", "rt") as opened:
        _, *rows = csv.reader(opened, delimiter="\t")
    ours = {key: json.loads(shape) for key, shape, _, _ in rows}
    theirs = {key: json.loads(shape) for _, _, keys, shape in rows for key in keys.split(" | ")}
    assert names.key_map(config) == {key: tuple(keys.split(" | ")) for key, _, keys, _ in rows}
    there = names.to_diffusers({key: torch.empty(shape, device="meta") for key, shape in ours.items()}, config)
    assert {key: list(tensor.shape) for key, tensor in there.items()} == theirs
    back = names.from_diffusers(there, config)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == ours
    assert not there  # every tensor was used


@pytest.mark.parametrize(
    "values",
    [{}, {"scale_shift": False}, {"resblock_updown": False}, {"attention": (8, 4)}, {"attention": ()},
     {"channel_mult": (1,)}, {"channel_mult": (1, 1, 2), "res_blocks": 2}, {"classes": 3}],
    ids=str,
)  # fmt: skip
def test_our_tensors_survive_the_way_there_and_back_to_the_bit(values: dict[str, Any]) -> None:
    config = AdmConfig(
        **{"image_size": 8, "model_channels": 32, "res_blocks": 1, "channel_mult": (1, 2), "attention": (4,)}
        | {"head_channels": 32}
        | values
    )
    network = AdmUnet(config)
    randomise(network)
    weights = network.state_dict()
    there = names.to_diffusers(weights, config)
    assert len({tensor.untyped_storage().data_ptr() for tensor in there.values()}) == len(there)  # none is shared
    back = names.from_diffusers(dict(there), config)
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_deprecated_names_and_convolutions_for_matrices_are_read(edited: Callable[..., Path]) -> None:
    folder = edited("imagenet64")
    want = imported(folder).weights
    file = folder / "unet" / f"{names.WEIGHTS}.safetensors"
    tensors, old = load_file(file), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [name for name in tensors if ".attentions." in name]:
        tensor = tensors.pop(name)
        for new, deprecated in old.items():
            name = name.replace(f".{new}.", f".{deprecated}.")
        tensors[name] = tensor[..., None, None].contiguous() if tensor.ndim == 2 else tensor
    assert "mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, file)
    got = imported(folder).weights
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_weights_as_a_pickle_are_the_same(diffusers: ModuleType, saved: dict[str, Path], tmp_path: Path) -> None:
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(saved["lsun256"])
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    assert [file.suffix for file in (tmp_path / "unet").iterdir() if file.stem == names.WEIGHTS] == [".bin"]
    want, got = imported(saved["lsun256"]).weights, imported(tmp_path).weights
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_weights_in_several_files_are_the_same(
    diffusers: ModuleType, saved: dict[str, Path], edited: Callable[..., Path]
) -> None:
    folder, file = edited("lsun256"), f"{names.WEIGHTS}.safetensors"
    (folder / "unet" / file).unlink()
    unet = diffusers.UNet2DModel.from_pretrained(saved["lsun256"] / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    want, got = imported(saved["lsun256"]).weights, imported(folder).weights
    assert all(torch.equal(got[name], want[name]) for name in want)

    index = folder / "unet" / f"{file}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}))
    refused(folder, index.name, "files beside it")


def test_half_precision_is_read_as_float32_and_said(edited: Callable[..., Path]) -> None:
    folder = edited("imagenet64")
    want = imported(folder).weights
    file = folder / "unet" / f"{names.WEIGHTS}.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(halves, file.with_name(f"{names.WEIGHTS}.fp16.safetensors"))
    found = draft(folder)
    weights = found.weights()
    assert all(torch.equal(weights[name], want[name].half().float()) for name in want)
    assert {fact.name: fact.value for fact in found.facts.known}["dtype"] == "float16, read as float32"


def test_a_draft_reads_no_weights(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(file: Path) -> None:
        raise AssertionError(f"{file} was read")

    monkeypatch.setattr(names, "read_tensors", read)
    found = draft(saved["imagenet64"])
    with pytest.raises(AssertionError, match="was read"):
        found.weights()


# What is known of a folder.


def test_what_the_folder_says_is_recorded_with_the_file_that_says_it(saved: dict[str, Path]) -> None:
    found = draft(saved["imagenet64"])
    facts = {fact.name: (fact.value, fact.where) for fact in found.facts.known}
    assert facts["image_size"] == (16, "unet/config.json")
    assert facts["head_channels"] == (32, "unet/config.json")
    assert facts["grid"] == (40, "scheduler/scheduler_config.json")
    assert facts["scaling"] == ("boundary", "CMStochasticIterativeScheduler")
    assert facts["qkv"] == ("separate q, k, v", f"unet/{names.WEIGHTS}.safetensors")
    assert "num_inference_steps" in facts["sigmas"][1]
    assert "dtype" not in facts
    assert found.source == {"format": "diffusers", "qkv": "separate", "diffusers": "0.42.1"}
    assert found.warnings == ()
    assert (found.network.dropout, found.network.classes) == (0.0, 7)  # type: ignore[union-attr]


def test_dropout_is_taken_over_for_training(edited: Callable[..., Path]) -> None:
    network = draft(edited("lsun256", dropout=0.1)).network
    assert isinstance(network, AdmConfig)
    assert network.dropout == 0.1


@pytest.mark.parametrize(
    ("given", "word"),
    [({"qkv": "3hd"}, "qkv"), ({"sigma_max": 20.0}, "sigma_max"), ({"scaling": "edm"}, "scaling"),
     ({"grid": 18}, "grid"), ({"image_size": 32}, "image_size"), ({"weights": "ema"}, "weights"),
     ({"clip": False}, "clip")],
    ids=str,
)  # fmt: skip
def test_a_person_cannot_contradict_the_folder(saved: dict[str, Path], given: dict[str, Any], word: str) -> None:
    with pytest.raises(CmfastError, match=f"--set {word}="):
        draft(saved["lsun256"], **given)


def test_default_levels_can_be_given(saved: dict[str, Path]) -> None:
    spec = draft(saved["lsun256"], sigmas=((80.0,), (80.0, 0.5))).spec
    assert spec is not None
    assert dict(spec.sigmas) == {1: (80.0,), 2: (80.0, 0.5)}


@pytest.mark.parametrize(
    ("release", "grid", "index"),
    [("cd_imagenet64_l2", 40, 22), ("cd_imagenet64_lpips", 40, 22), ("ct_imagenet64", 201, 106)],
)
@pytest.mark.parametrize("way", ["folder", "cache", "_name_or_path"])
def test_a_released_model_has_its_published_levels(
    edited: Callable[..., Path], release: str, grid: int, index: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(importer.NETWORKS, 64, {"res_blocks": SMALL["imagenet64"]["layers_per_block"]})
    to = {"folder": f"diffusers-{release}", "cache": f"models--openai--diffusers-{release}/snapshots/0123abcd"}
    path = {"_name_or_path": f"openai/diffusers-{release}"} if way == "_name_or_path" else {}
    folder = edited("imagenet64", to=to.get(way, "mine"), sample_size=64, **path)
    (folder / importer.SCHEDULER).write_text(
        json.dumps({"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": grid})
    )
    found = draft(folder)
    assert found.spec is not None
    assert dict(found.spec.sigmas) == {1: (80.0,), 2: (80.0, karras_sigmas(grid)[index])}
    assert found.source["name"] == release


def test_a_small_network_under_a_released_name_is_no_released_model(edited: Callable[..., Path]) -> None:
    found = draft(edited("imagenet64", to="diffusers-cd_imagenet64_l2", sample_size=64))
    assert "name" not in found.source
    assert found.spec is not None
    assert found.spec.sigmas_for(2) == (80.0, karras_sigmas(40)[20])


def test_a_released_name_with_another_grid_does_not_bring_its_levels(edited: Callable[..., Path]) -> None:
    found = draft(edited("imagenet64", to="diffusers-ct_imagenet64", sample_size=64))
    assert found.spec is not None
    assert found.spec.sigmas_for(2) == (80.0, karras_sigmas(40)[20])


def test_where_a_step_would_end_at_sigma_min_there_are_no_default_levels(edited: Callable[..., Path]) -> None:
    folder = edited("lsun256", importer.SCHEDULER, num_train_timesteps=4)
    spec = draft(folder).spec
    assert spec is not None
    assert dict(spec.sigmas) == {1: (80.0,), 2: (80.0, karras_sigmas(4)[2])}


# What is let pass, and what is refused.


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CmfastError) as caught:
        draft(folder).weights()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_options_of_another_version_pass_where_they_are_switched_off(edited: Callable[..., Path]) -> None:
    off = {"new_norm": None, "new_skip": False, "new_scale": 0, "new_list": [], "_private": 5}
    assert draft(edited("imagenet64", **off)).network == draft(edited("imagenet64", to="same")).network


def test_missing_fields_are_what_diffusers_takes_them_for(edited: Callable[..., Path]) -> None:
    folder = edited("convolutions")
    want = draft(folder)
    config = json.loads((folder / importer.UNET).read_text())
    few = {name: config[name] for name in ("_class_name", *SMALL["convolutions"])}
    (folder / importer.UNET).write_text(json.dumps(few))
    (folder / importer.SCHEDULER).write_text(json.dumps({"_class_name": "CMStochasticIterativeScheduler"}))
    got = draft(folder)
    assert (got.network, got.spec) == (want.network, want.spec)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("center_input_sample", True), ("time_embedding_type", "fourier"), ("time_embedding_dim", 64),
        ("freq_shift", 1), ("flip_sin_to_cos", False), ("mid_block_type", None), ("mid_block_scale_factor", 1.5),
        ("act_fn", "mish"),
        ("norm_num_groups", 16), ("attn_norm_num_groups", 16), ("norm_eps", 1e-6), ("add_attention", False),
        ("resnet_time_scale_shift", "spatial"), ("class_embed_type", "timestep"), ("num_class_embeds", 0),
        ("out_channels", 6), ("in_channels", None), ("sample_size", None), ("sample_size", [16, 32]),
        ("block_out_channels", [32, 48, 96]), ("block_out_channels", []), ("block_out_channels", 32),
        ("block_out_channels", [32, True, 96]), ("block_out_channels", [2**40] * 3),
        ("down_block_types", ["ResnetDownsampleBlock2D", "AttnSkipDownBlock2D", "AttnDownBlock2D"]),
        ("down_block_types", ["AttnDownBlock2D"]), ("up_block_types", ["AttnUpBlock2D"] * 3), ("upsample_type", "conv"),
        ("downsample_type", "kernel"), ("layers_per_block", "2"), ("layers_per_block", 0), ("layers_per_block", 60000),
        ("attention_head_dim", 24), ("attention_head_dim", None), ("dropout", 1.5), ("dropout", "0"),
        ("something_new", {"deep": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_a_network_that_ours_cannot_be_is_refused_by_its_field(
    edited: Callable[..., Path], field: str, value: Any
) -> None:
    shown = [] if field in ("upsample_type", "layers_per_block", "dropout") else [json.dumps(value)]
    refused(edited("imagenet64", **{field: value}), field, *shown)


def test_padding_matters_where_a_convolution_pads(edited: Callable[..., Path]) -> None:
    refused(edited("convolutions", downsample_padding=0), "downsample_padding is 0")
    assert draft(edited("lsun256", downsample_padding=0)).network == draft(edited("lsun256", to="same")).network


def test_one_head_of_all_channels_is_read_where_all_widths_agree(edited: Callable[..., Path]) -> None:
    network = draft(edited("lsun256", attention_head_dim=None)).network
    assert isinstance(network, AdmConfig)
    assert network.head_channels == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [("s_noise", 1.007), ("rho", 5.0), ("sigma_min", "small"), ("sigma_max", 0.001), ("sigma_data", 0),
     ("num_train_timesteps", 1), ("num_train_timesteps", 2**40), ("clip_denoised", None), ("something_new", 1)],
    ids=str,
)  # fmt: skip
def test_a_scheduler_that_ours_cannot_be_is_refused_by_its_field(
    edited: Callable[..., Path], field: str, value: Any
) -> None:
    name = {"num_train_timesteps": "grid" if value == 1 else field}.get(field, field)
    refused(edited("imagenet64", importer.SCHEDULER, **{field: value}), name, "scheduler_config.json")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (importer.INDEX, "StableDiffusionPipeline"),
        (importer.SCHEDULER, "DDPMScheduler"),
        (importer.UNET, "UNet3DModel"),
    ],
)
def test_other_pipelines_schedulers_and_networks_are_refused(edited: Callable[..., Path], file: str, kind: str) -> None:
    refused(edited("imagenet64", file, _class_name=kind), kind, Path(file).name)


def test_scale_shift_without_a_norm_in_the_middle_is_refused(diffusers: ModuleType, tmp_path: Path) -> None:
    pipeline_of(diffusers, {**SMALL["imagenet64"], "attn_norm_num_groups": None}).save_pretrained(tmp_path)
    refused(tmp_path, "attn_norm_num_groups", "broken conversion")


def test_scale_shift_with_a_norm_that_only_the_weights_know_is_read_with_a_warning(edited: Callable[..., Path]) -> None:
    found = draft(edited("imagenet64", attn_norm_num_groups=None))
    (warning,) = found.warnings
    assert "attn_norm_num_groups" in warning
    want = imported(edited("imagenet64", to="whole")).weights
    got = found.weights()
    assert all(torch.equal(got[name], want[name]) for name in want)


# Files that are not what they should be.


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_runs_nothing(edited: Callable[..., Path], tmp_path: Path, zipped: bool) -> None:
    folder, marker = edited("lsun256"), tmp_path / "marker"
    (folder / "unet" / f"{names.WEIGHTS}.safetensors").unlink()
    file = folder / "unet" / f"{names.WEIGHTS}.bin"
    torch.save({"conv_in.weight": Hostile(marker)}, file, _use_new_zipfile_serialization=zipped)
    refused(folder, file.name, "nothing in it was run")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # it would have


@pytest.mark.parametrize("left", [0, 5, 4000, -8])
def test_truncated_weights_are_refused(edited: Callable[..., Path], left: int) -> None:
    folder = edited("lsun256")
    file = folder / "unet" / f"{names.WEIGHTS}.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    refused(folder, file.name)


@pytest.mark.parametrize("file", [importer.INDEX, importer.SCHEDULER, importer.UNET])
def test_a_missing_or_broken_json_file_is_named(edited: Callable[..., Path], file: str) -> None:
    folder = edited("lsun256")
    for text in ("{", "[1, 2]", '"text"', "[" * 100_000, "\xff"):
        (folder / file).write_text(text, encoding="latin-1")
        refused(folder, file)
    (folder / file).unlink()
    refused(folder, Path(file).name)


def test_missing_weights_are_named(edited: Callable[..., Path]) -> None:
    folder = edited("lsun256")
    (folder / "unet" / f"{names.WEIGHTS}.safetensors").unlink()
    refused(folder, "no weights", f"{names.WEIGHTS}.safetensors")


def test_a_pointer_instead_of_weights_is_known_as_one(edited: Callable[..., Path]) -> None:
    folder = edited("lsun256")
    file = folder / "unet" / f"{names.WEIGHTS}.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "git lfs pull")


def test_a_part_of_a_pipeline_is_not_enough(saved: dict[str, Path]) -> None:
    refused(saved["lsun256"] / "unet", "model_index.json", "whole ConsistencyModelPipeline")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("conv_in.weight"), ("missing conv_in.weight",)),
        (lambda w: [w.pop(f"conv_{i}.{j}") for i in ("in", "out") for j in ("weight", "bias")], ("and 1 more",)),
        (lambda w: w.update(extra=torch.zeros(1)), ("not known extra",)),
        (lambda w: w.update({"a\n\x1b[2Jb": torch.zeros(1)}), ("not known a\\n\\x1b[2Jb",)),
        (lambda w: w.update({"conv_in.bias": torch.zeros(5)}), ("conv_in.bias", "[5]", "[32]")),
        (lambda w: w.update({"conv_in.bias": torch.zeros(32, dtype=torch.int64)}), ("conv_in.bias", "I64")),
        (lambda w: w.update({"mid_block.attentions.0.query.bias": torch.zeros(64)}), ("twice",)),
        (lambda w: [w.pop(name) for name in list(w)[1:]], ("too few",)),
    ],
    ids=["missing", "many missing", "extra", "extra with a line break", "shape", "dtype", "twice", "almost empty"],
)
def test_weights_that_do_not_fit_are_named(
    edited: Callable[..., Path], change: Callable[[dict[str, Tensor]], None], words: tuple[str, ...]
) -> None:
    folder = edited("lsun256")
    file = folder / "unet" / f"{names.WEIGHTS}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    refused(folder, *words)


def test_a_folder_that_changes_between_draft_and_reading_is_refused(edited: Callable[..., Path]) -> None:
    folder = edited("lsun256")
    found = draft(folder)
    save_file({"other": torch.zeros(1)}, folder / "unet" / f"{names.WEIGHTS}.safetensors")
    with pytest.raises(ArtifactError):
        found.weights()
