# SPDX-License-Identifier: MIT
"""Folders of DDPMPipeline and DDIMPipeline in: the same images as diffusers draws, and refusals by the field's name."""

from __future__ import annotations

import json
import math
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

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError, BackendError, CmfastError, MissingDependency
from cmfast_export import export_onnx
from cmfast_train.backends.diffusers_pipeline import DiffusersBackend
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.importers import load_model
from cmfast_train.networks import unet2d
from cmfast_train.networks.adm import randomise
from cmfast_train.networks.build import build_network, check_weights, network_from_dict, network_to_dict
from cmfast_train.networks.unet2d import Unet2dConfig
from helpers.foreign.diffusers_folders import draft, with_denoiser
from helpers.runs import assert_equal_weights, losses_of, run_here
from helpers.specs import named

pytestmark = pytest.mark.filterwarnings("ignore:.*a diffusion teacher:cmfast.errors.CmfastWarning")

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SMALL: dict[str, dict[str, Any]] = {
    "cifar10": {  # google/ddpm-cifar10-32, narrower
        "sample_size": 8,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    "classes": {
        "sample_size": [8, 16],
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [32, 32],
        "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
    },
    "digits": {  # of the preset's images
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [32, 32],
        "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "num_class_embeds": 10,
    },
    "plain": {  # of odd groups and no attention, other activations
        "sample_size": 4,
        "block_out_channels": [12, 24],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "norm_num_groups": 6,
        "add_attention": False,
        "act_fn": "gelu",
        "center_input_sample": True,
        "mid_block_scale_factor": 1.4,
        "time_embedding_dim": 20,
    },
}
# Tables whose last level is near the data's, so that what a random network predicts is not all clipped.
TABLES: dict[str, dict[str, Any]] = {
    "linear": {"beta_end": 0.004},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.005},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 60},
}
PREDICTIONS = {"epsilon": "vp_eps", "v_prediction": "vp_v", "sample": "vp_x0"}


def pipeline_of(diffusers: ModuleType, name: str, kind: str = "DDIM", **scheduler: Any) -> Any:
    unet = diffusers.UNet2DModel(**SMALL[name]).eval().requires_grad_(False)
    randomise(unet)
    made = getattr(diffusers, f"{kind}Pipeline")(unet, getattr(diffusers, f"{kind}Scheduler")(**scheduler))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def saved(diffusers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that diffusers' own pipelines have saved, with random weights in every tensor; read-only."""
    folder = tmp_path_factory.mktemp("ddpm")
    for name in SMALL:
        pipeline_of(diffusers, name, "DDPM").save_pretrained(folder / name)
    return {name: folder / name for name in SMALL}


@pytest.fixture
def edited(saved: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a saved folder and changes fields in one of its JSON files."""

    def edited(file: str, name: str = "cifar10", **fields: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(saved[name], folder)
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **fields}))
        return folder

    return edited


def some_labels(checkpoint: Checkpoint, n: int) -> Tensor | None:
    return torch.arange(n) % checkpoint.spec.classes if checkpoint.spec.classes else None


# The same numbers.


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_the_denoiser_is_the_x0_that_the_scheduler_makes_of_diffusers_network(
    diffusers: ModuleType, tmp_path: Path, name: str, prediction: str, table: str
) -> None:
    pipeline = pipeline_of(diffusers, name, "DDPM", prediction_type=prediction, clip_sample=False, **TABLES[table])
    pipeline.save_pretrained(tmp_path)
    checkpoint = load_model(tmp_path)
    spec, times = checkpoint.spec, checkpoint.spec.times
    assert times is not None
    assert spec.scaling == PREDICTIONS[prediction]
    x = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(1))
    label = some_labels(checkpoint, 2)
    a_of_all = torch.cumprod(1 - pipeline.scheduler.betas.double(), 0)  # its own product is float32: off by 1e-4
    for t in (0, times.steps // 3, times.steps // 2):
        a = float(a_of_all[t])
        sigma = math.sqrt((1 - a) / a)
        with torch.inference_mode():
            output = pipeline.unet(x, t, **({} if label is None else {"class_labels": label})).sample
            ours = checkpoint.denoiser()(x / math.sqrt(a), torch.full((2,), sigma), **named(label))
        theirs = {
            "epsilon": (x - math.sqrt(1 - a) * output) / math.sqrt(a),
            "v_prediction": math.sqrt(a) * x - math.sqrt(1 - a) * output,
            "sample": output,
        }[prediction]
        # The bar of importers is 1e-5; time t is found from sigma by a float32 logarithm, to 1e-4 of a time.
        scale = max(1.0, float(theirs.abs().max()))
        np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_our_steps_are_those_of_diffusers_ddim_at_the_same_times(
    diffusers: ModuleType, tmp_path: Path, name: str, prediction: str, clip: bool
) -> None:
    table = TABLES["linear" if prediction == "epsilon" else "squaredcos_cap_v2"]
    pipeline = pipeline_of(
        diffusers, name, prediction_type=prediction, clip_sample=clip, timestep_spacing="trailing", **table
    )
    pipeline.save_pretrained(tmp_path)
    checkpoint, scheduler = load_model(tmp_path), pipeline.scheduler
    assert (checkpoint.spec.clip, checkpoint.spec.renoise) == (clip, "ddim")
    label = some_labels(checkpoint, 3)
    ours = with_denoiser(checkpoint, 3, label, checkpoint.spec.sigmas_for(10))

    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    noise = torch.randn(3, *checkpoint.spec.shape, generator=torch.Generator().manual_seed(1))
    x = noise * torch.sqrt(1 - scheduler.alphas_cumprod[-1]).float()  # diffusers leaves this factor out
    with torch.inference_mode():
        for t in scheduler.timesteps:
            output = pipeline.unet(x, t, **({} if label is None else {"class_labels": label})).sample
            x = scheduler.step(output, t, x, eta=0.0, use_clipped_model_output=True).prev_sample.float()
    if clip:
        assert (x.abs() < 0.99).float().mean() > 0.2, "where both are clipped, any two models agree"
    scale = max(1.0, float(x.abs().max()))
    np.testing.assert_allclose(ours / scale, x / scale, rtol=0, atol=1e-4)


def test_the_images_are_those_of_diffusers_own_pipeline(diffusers: ModuleType, tmp_path: Path) -> None:
    pipeline = pipeline_of(diffusers, "cifar10", prediction_type="v_prediction", timestep_spacing="trailing")
    pipeline.save_pretrained(tmp_path)
    checkpoint = load_model(tmp_path)
    ours = with_denoiser(checkpoint, 3, None, checkpoint.spec.sigmas_for(20))
    generator = torch.Generator().manual_seed(1)
    drawn = pipeline(3, generator, num_inference_steps=20, use_clipped_model_output=True, output_type="pt")
    np.testing.assert_allclose(ours, 2 * drawn.images - 1, rtol=0, atol=1e-4)


# What is read.


def test_the_facts_of_a_folder_are_shown(saved: dict[str, Path], call: Callable[..., Any]) -> None:
    told = call(info.main, saved["classes"]).stdout
    for text in (
        "diffusers: a DDPMPipeline of diffusers",
        "diffusers' UNet2DModel, 1 blocks a level, channels 32, 32   (unet/config.json)",
        "1000, linear, beta 0.0001 to 0.02   (scheduler/scheduler_config.json)",
        "vp_eps   (scheduler/scheduler_config.json)",
        "of 10, 20, 50 steps",
        "a diffusion teacher",
    ):
        assert text in told
    manifest = json.loads(call(info.main, saved["classes"], "--json").stdout)
    assert (manifest["shape"], manifest["conditions"][0]["classes"], manifest["data"]) == ([1, 8, 16], 5, "image")
    assert manifest["times"] == {"schedule": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    assert manifest["source"]["pipeline"] == "DDPMPipeline"


def test_the_default_levels_are_the_trailing_times_of_diffusers(diffusers: ModuleType, saved: dict[str, Path]) -> None:
    spec = load_model(saved["cifar10"]).spec
    assert spec.times is not None
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    assert list(spec.sigmas) == [10, 20, 50]
    for steps, levels in spec.sigmas.items():
        scheduler.set_timesteps(steps)
        assert levels == tuple(spec.times.sigma(int(t)) for t in scheduler.timesteps)
    assert spec.sigma_max == spec.sigmas_for()[0] == pytest.approx(157.4, rel=1e-3)


def test_a_folder_of_the_first_versions_is_read_from_its_top(saved: dict[str, Path], tmp_path: Path) -> None:
    """google/ddpm-cifar10-32: all files side by side, a pickle of weights, old names in the attention."""
    folder, new = tmp_path / "old", saved["cifar10"]
    folder.mkdir()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(new / WEIGHTS)
    names = dict(zip(weights, weights, strict=True))
    for now, then in old.items():
        names = {name: text.replace(f".{now}.", f".{then}.") for name, text in names.items()}
    torch.save({names[name]: tensor for name, tensor in weights.items()}, folder / "diffusion_pytorch_model.bin")
    shutil.copy(new / UNET, folder)
    shutil.copy(new / INDEX, folder)
    values = {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
        "variance_type": "fixed_large", "predict_epsilon": True, "tensor_format": "pt",
    }  # fmt: skip
    (folder / "scheduler_config.json").write_text(json.dumps(values))
    ours, theirs = load_model(folder), load_model(new)
    assert ours.spec == theirs.spec
    assert ours.sha256() == theirs.sha256()


def test_half_precision_in_a_folder_is_read_as_float32(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(saved["plain"], folder)
    save_file({name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert ("dtype", "float16, read as float32") in {(fact.name, fact.value) for fact in draft(folder).facts.known}
    weights = load_model(folder).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_model_of_latents_is_of_arrays(diffusers: ModuleType, tmp_path: Path) -> None:
    SMALL["latent"] = {**SMALL["plain"], "in_channels": 4, "out_channels": 4}
    try:
        pipeline_of(diffusers, "latent", clip_sample=False).save_pretrained(tmp_path)
    finally:
        del SMALL["latent"]
    assert load_model(tmp_path).spec.data == "array"


# As a model of ours.


def test_a_folder_becomes_a_checkpoint_that_computes_the_same(saved: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = load_model(saved["classes"])
    label = some_labels(checkpoint, 2)
    for name in ("model.pt", "model.safetensors"):
        save_checkpoint(checkpoint, tmp_path / name)
        again = load_checkpoint(tmp_path / name)
        assert (again.spec, again.network, again.source) == (checkpoint.spec, checkpoint.network, checkpoint.source)
        x, sigma = torch.randn(2, *checkpoint.spec.shape), torch.tensor([0.3, 40.0])
        with torch.inference_mode():
            one, other = (each.denoiser()(x, sigma, **named(label)) for each in (checkpoint, again))
        assert torch.equal(one, other)


def test_a_folder_is_sampled_with_ddim_and_with_heun(
    saved: dict[str, Path], tmp_path: Path, call: Callable[..., Any]
) -> None:
    for arguments in (("--steps", 10), ("--heun", 4)):
        out = tmp_path / "samples.npz"
        done = call(sample.main, saved["classes"], "-n", 2, "--label", 3, *arguments, "-o", out)
        assert done.returncode == 0, done.stderr
        assert np.load(out)["arr_0"].shape[:3] == (2, 8, 16)
    model = cmfast.load(saved["cifar10"])
    assert model.sample(2, steps=10, seed=1).shape == (2, 8, 8, 3)


def test_a_folder_is_exported_and_verified(saved: dict[str, Path], tmp_path: Path) -> None:
    found = export_onnx(saved["classes"], tmp_path / "sampler.onnx", kind="sampler", sigmas=(157.0, 9.0))
    (note,) = found.notes
    assert "batches above 63" in note  # diffusers' ResnetBlock2D copies them where it doubles pixels
    assert found.manifest.source["pipeline"] == "DDPMPipeline"
    # Float32 sums of another order, times max(1, sigma): the network predicts noise.
    assert found.denoiser.parity.worst.max_abs < 1e-5
    model, folder = cmfast.load(tmp_path / "sampler.onnx"), cmfast.load(saved["classes"])
    one, other = (each.sample(2, label=[1, 4], seed=3, sigmas=(157.0, 9.0)).astype(int) for each in (model, folder))
    assert np.abs(one - other).max() <= 1


def test_half_precision_is_made_on_the_graph(saved: dict[str, Path], tmp_path: Path) -> None:
    found = export_onnx(saved["plain"], tmp_path / "half.onnx", precision="fp16")
    assert found.notes == ()  # our UNet2DModel has no branch by the size of the batch
    assert found.manifest.dtype == "float16"
    with pytest.raises(BackendError, match="cmfast-export --precision fp16"):
        TorchBackend(saved["plain"], precision="fp16")


def test_a_consistency_model_is_distilled_from_a_folder(saved: dict[str, Path], tmp_path: Path) -> None:
    """A student of our network learns from it; it knows noise levels from those of its first time on."""
    settings = ["phases=cd:24", f"teacher={saved['digits']}"]
    with pytest.raises(CmfastError, match=r"it knows noise levels from 0\.01000\d+ to 157\.4\d+, the run has 0\.002"):
        run_here(tmp_path / "refused", *settings)
    run_here(tmp_path / "run", *settings, "sigma_min=0.0101")
    assert all(math.isfinite(line["loss"]) for line in losses_of(tmp_path / "run"))
    assert load_checkpoint(tmp_path / "run" / "model.pt").spec.scaling == "boundary"


def test_a_network_of_diffusers_is_trained_on_as_a_latent_consistency_model(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    spec = load_model(saved["digits"]).spec
    # A random network that predicts noise is off by 157 at the last level: no step of usual size.
    settings = ["phases=cd:16", f"init={saved['digits']}", "cd.lr=1e-8"]
    with pytest.raises(CmfastError, match=f"add --set sigma_max={spec.sigma_max!r} --set sigmas={spec.sigma_max!r}:"):
        run_here(tmp_path / "refused", *settings)
    settings += [f"sigma_max={spec.sigma_max!r}", f"sigmas={spec.sigma_max!r}"]
    run_here(tmp_path / "run", *settings)
    student = load_checkpoint(tmp_path / "run" / "model.pt")
    assert (student.spec.scaling, student.spec.c_noise, student.spec.renoise) == ("lcm_eps", "discrete", "sqrt")
    assert (student.spec.times, student.network) == (spec.times, load_model(saved["digits"]).network)
    run_here(tmp_path / "recomputed", *settings, "recompute=true")
    assert_equal_weights(load_checkpoint(tmp_path / "recomputed" / "model.pt").weights, student.weights)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
@pytest.mark.parametrize("variant", ["", "channels_last", "cuda_graph"])
def test_a_gpu_computes_what_the_cpu_computes(saved: dict[str, Path], variant: str) -> None:
    there, here = cmfast.load(saved["digits"], device="cuda", variant=variant), cmfast.load(saved["digits"])
    x = cmfast.gaussian(1, range(4), 0, here.spec.shape)
    for sigma in (0.02, 0.5, 3.0, 0.5):  # a graph is recorded at one of the first calls, and replayed
        want = here.denoise(sigma * x, sigma, label=[1, 2, 3, 4])
        # Two float32 libraries, cuDNN's transforms among their sums; the error of the noise is magnified by sigma.
        atol = 1e-3 * max(1, sigma)
        np.testing.assert_allclose(there.denoise(sigma * x, sigma, label=[1, 2, 3, 4]), want, rtol=0, atol=atol)
    for seed in (0, 1, 2):
        assert there.sample(4, seed=seed, steps=10).shape == (4, 8, 8, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
def test_a_consistency_model_is_distilled_from_a_folder_on_a_gpu(saved: dict[str, Path], tmp_path: Path) -> None:
    """The optimiser steps are recorded as a CUDA graph where the run can: the teacher's table of times is in it."""
    settings = ["phases=cd:400", f"teacher={saved['digits']}", "sigma_min=0.0101", "device=cuda", "precision=fp32"]
    run_here(tmp_path / "run", *settings)
    assert all(math.isfinite(line["loss"]) for line in losses_of(tmp_path / "run"))


# What is refused.

BAD: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (INDEX, {"_class_name": "PNDMPipeline"}, ("PNDMPipeline", "DDPMPipeline and DDIMPipeline are read")),
    (SCHEDULER, {"_class_name": "PNDMScheduler"}, ("PNDMScheduler", "DDPMScheduler and DDIMScheduler are read")),
    (SCHEDULER, {"trained_betas": [0.1, 0.2]}, ("trained_betas", "null")),
    (SCHEDULER, {"rescale_betas_zero_snr": True}, ("rescale_betas_zero_snr", "false")),
    (SCHEDULER, {"thresholding": True}, ("thresholding", "false")),
    (SCHEDULER, {"beta_schedule": "sigmoid"}, ("beta_schedule", "sigmoid", "scaled_linear")),
    (SCHEDULER, {"prediction_type": "flow"}, ("prediction_type", "v_prediction")),
    (SCHEDULER, {"variance_type": "learned_range"}, ("variance_type", "fixed_small")),
    (SCHEDULER, {"clip_sample_range": 2.0}, ("clip_sample_range", "1.0")),
    (SCHEDULER, {"num_train_timesteps": 20_000}, ("number of times", "10")),
    (SCHEDULER, {"beta_end": 1.5}, ("beta_end",)),
    (SCHEDULER, {"new_option": 3}, ("new_option", "does not know")),
    (UNET, {"_class_name": "UNet2DConditionModel"}, ("UNet2DConditionModel", "only UNet2DModel is read")),
    (UNET, {"out_channels": 6}, ("out_channels", "in_channels")),
    (UNET, {"sample_size": None}, ("sample_size",)),
    (UNET, {"sample_size": 9}, ("sample_size=9", "halved")),
    (UNET, {"time_embedding_type": "fourier"}, ("time_embedding_type", "positional")),
    (UNET, {"class_embed_type": "timestep"}, ("class_embed_type", "null")),
    (UNET, {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, ("CrossAttnDownBlock2D", "AttnDownBlock2D")),
    (UNET, {"block_out_channels": [32]}, ("down_block_types has 2", "block_out_channels has 1")),
    (UNET, {"block_out_channels": [32, 10**9]}, ("block_out_channels", "65536")),
    (UNET, {"block_out_channels": [32, 96]}, ("the weight", "config.json needs")),
    (UNET, {"layers_per_block": 400}, ("layers_per_block=400", "1,604 blocks")),
    (UNET, {"layers_per_block": 200}, ("too few", "layers_per_block=200")),
    (UNET, {"layers_per_block": 2}, ("missing", "resnets.1")),
    (UNET, {"norm_num_groups": 24}, ("32", "24 norm groups")),
    (UNET, {"attention_head_dim": 24}, ("attention_head_dim=24", "64 channels")),
    (UNET, {"act_fn": "snake"}, ("act_fn", "silu")),
    (UNET, {"norm_eps": -1.0}, ("norm_eps",)),
    (UNET, {"dropout": "no"}, ("dropout", "finite number")),
    (UNET, {"new_layer": "big"}, ("new_layer", "does not know")),
]


@pytest.mark.parametrize(("file", "fields", "words"), BAD, ids=lambda each: str(each)[:40])
def test_what_is_not_supported_is_one_line_with_the_file_and_the_field(
    edited: Callable[..., Path], file: str, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    folder = edited(file, **fields)
    with pytest.raises(CmfastError) as caught:
        load_model(folder)
    text = str(caught.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    for word in words:
        assert word in text


def test_weights_that_do_not_fit_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(saved["plain"], folder)
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "extra": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match="not known extra"):
        load_model(folder)
    weights.pop("conv_in.bias")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"missing conv_in\.bias"):
        load_model(folder)


def test_what_the_folder_determines_cannot_be_set_otherwise(saved: dict[str, Path]) -> None:
    for given in ({"scaling": "edm"}, {"sigma_max": 80.0}, {"grid": 40}, {"head_channels": 8}, {"c_noise": "250ln"}):
        with pytest.raises(CmfastError, match=next(iter(given))):
            draft(saved["cifar10"], **given)
    assert draft(saved["cifar10"], renoise="plain", sigma_data=0.3).spec.renoise == "plain"  # type: ignore[union-attr]


def test_half_precision_in_pytorch_is_refused_in_one_line(saved: dict[str, Path]) -> None:
    with pytest.raises(CmfastError, match="float16 of this network is made on the exported graph"):
        load_model(saved["plain"]).denoiser().to_precision("fp16")


def test_diffusers_own_pipeline_is_run_of_consistency_models_only(saved: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match="DDPMPipeline"):
        DiffusersBackend(saved["plain"])


def test_without_diffusers_the_line_says_what_to_install(
    saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d", None)
    unet2d._kind.cache_clear()
    unet2d.unet2d_tensors.cache_clear()
    try:
        with pytest.raises(MissingDependency, match=r"cmfast\[diffusers\]"):
            load_model(saved["plain"])
    finally:
        unet2d._kind.cache_clear()


# The network.


def test_a_configuration_survives_its_dictionary_and_says_how_many_values_it_has() -> None:
    for fields in SMALL.values():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "out_channels"}
        config = Unet2dConfig(**values)
        again = network_from_dict(json.loads(json.dumps(network_to_dict(config))))
        assert again == config
        weights = build_network(config).state_dict()
        check_weights(config, weights)
        weights.popitem()
        with pytest.raises(CmfastError, match="do not fit"):
            check_weights(config, weights)


def test_a_batch_of_64_is_computed_as_a_batch_of_one(saved: dict[str, Path]) -> None:
    """diffusers' Upsample2D has a branch there, which ours leaves out."""
    denoiser = load_model(saved["cifar10"]).denoiser()
    x, sigma = torch.randn(64, 3, 8, 8), torch.full((64,), 2.0)
    with torch.inference_mode():
        np.testing.assert_allclose(denoiser(x, sigma)[:1], denoiser(x[:1], sigma[:1]), atol=1e-5)
