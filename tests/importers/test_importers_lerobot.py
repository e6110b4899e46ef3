# SPDX-License-Identifier: MIT
"""Folders of lerobot's diffusion policy in: the U-Net, its configuration, its statistics; a teacher to distil from."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cmfast
from cmfast.cli import info
from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.checkpoint import save_checkpoint
from cmfast_train.from_factory import own_model
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import Draft, Given
from cmfast_train.networks.adm import randomise
from cmfast_train.networks.build import check_weights, network_from_dict, network_to_dict
from cmfast_train.torchvision_cpu import torchvision_datasets
from helpers import ROOT
from helpers.foreign.policies import LEROBOT_COND, Weights, save_lerobot, unet, weights_of

pytestmark = pytest.mark.filterwarnings("ignore:.*a diffusion teacher:cmfast.errors.CmfastWarning")

Call = Callable[..., Any]
WEIGHTS = weights_of("film", global_cond=LEROBOT_COND)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with random weights; read-only."""
    path = tmp_path_factory.mktemp("lerobot") / "policy"
    save_lerobot(path, WEIGHTS)
    return path


def facts_of(folder: Path) -> dict[str, Any]:
    draft = identify(folder)
    assert isinstance(draft, Draft)
    return {fact.name: fact.value for fact in draft.facts.known}


@pytest.mark.parametrize(("prediction", "schedule"), [("epsilon", "squaredcos_cap_v2"), ("sample", "linear")])
def test_the_denoiser_is_the_x0_that_ddpms_formula_makes_of_the_network(
    tmp_path: Path, prediction: str, schedule: str
) -> None:
    save_lerobot(tmp_path, WEIGHTS, prediction_type=prediction, beta_schedule=schedule, beta_end=0.1)
    checkpoint = load_model(tmp_path)
    times, model = checkpoint.spec.times, checkpoint.denoiser()
    assert times is not None
    generator = torch.Generator().manual_seed(1)
    x, cond = torch.randn(2, 8, 3, generator=generator), torch.randn(2, LEROBOT_COND, generator=generator)
    for t in (0, 50, 99):
        a = 1 / (1 + times.sigmas[t] ** 2)
        output = unet(WEIGHTS, x, [torch.full((2,), float(t))], cond)
        want = output if prediction == "sample" else (x - math.sqrt(1 - a) * output) / math.sqrt(a)
        got = model(x / math.sqrt(a), torch.full((2,), times.sigmas[t]), global_cond=cond)
        # The bar of importers is 1e-5; what predicts the noise is magnified by the noise level.
        scale = max(1.0, float(want.abs().max()))
        np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=1e-5)


def test_what_is_known_is_said(folder: Path, call: Call) -> None:
    said = call(info.main, folder)
    assert said.returncode == 0, said.stderr
    for words in (
        "the U-Net of a diffusion policy of lerobot",
        "2 steps, each observation.state 2, observation.image 8",
        "diffusion.rgb_encoder: its output is part of global_cond; --set encoder=true",
        "actions 1 to 4 of 8",
        "normalised, MIN_MAX",
        "100, squaredcos_cap_v2",
        "a diffusion teacher",
    ):
        assert words in said.stdout
    assert "missing" not in said.stdout


@pytest.mark.parametrize("old", [False, True])
def test_the_statistics_of_actions_and_states_are_found_in_both_places(tmp_path: Path, old: bool) -> None:
    save_lerobot(tmp_path, WEIGHTS, old=old)
    facts, normalised = facts_of(tmp_path), load_model(tmp_path).source["normalised"]
    assert (facts["action min"], facts["action max"]) == ((-1.0, 0.0, 0.1), (1.0, 5.0, 0.3))
    assert facts["observation.state max"] == (512.0, 511.0)
    assert list(normalised) == ["action", "observation.state"]
    assert normalised["action"] == {"mode": "MIN_MAX", "min": [-1.0, 0.0, 0.1], "max": [1.0, 5.0, 0.3]}


def test_without_statistics_nothing_is_guessed(tmp_path: Path) -> None:
    save_lerobot(tmp_path, WEIGHTS)
    for file in tmp_path.glob("policy_*"):
        file.unlink()
    assert "its statistics are not in the folder" in facts_of(tmp_path)["units"]
    assert load_model(tmp_path).source == {"format": "lerobot"}


@pytest.mark.parametrize("form", ["old", "new", "configuration alone"])
def test_an_action_that_is_not_normalised_is_not_one_without_statistics(tmp_path: Path, form: str) -> None:
    as_it_is = {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "IDENTITY"}
    save_lerobot(tmp_path, WEIGHTS, old=form == "old", normalization_mapping=as_it_is)
    for file in tmp_path.glob("policy_*.json"):
        file.write_text(file.read_text().replace('"ACTION": "MIN_MAX"', '"ACTION": "IDENTITY"'))
        if form == "configuration alone":
            file.unlink()
    facts = facts_of(tmp_path)
    assert facts["action"] == "not normalised, IDENTITY"
    assert "units" not in facts
    assert load_model(tmp_path).source["normalised"]["action"] == {"mode": "IDENTITY"}


def test_another_way_of_normalising_is_refused_by_its_name(tmp_path: Path) -> None:
    save_lerobot(tmp_path, WEIGHTS, old=True, normalization_mapping={"ACTION": "LOG"})
    with pytest.raises(ArtifactError, match="action is normalised by LOG; supported: MIN_MAX, MEAN_STD"):
        load_model(tmp_path)


def test_a_compiled_network_and_the_file_of_2024_load(tmp_path: Path) -> None:
    save_lerobot(tmp_path, WEIGHTS, old=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("type", "normalization_mapping", "input_features", "output_features"):
        del config[name]
    config |= {
        "input_shapes": {"observation.image": [3, 96, 96], "observation.state": [2]},
        "output_shapes": {"action": [3]},
        "output_normalization_modes": {"action": "min_max"},
        "input_normalization_modes": {"observation.image": "mean_std", "observation.state": "min_max"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    compiled = {name.replace("diffusion.unet.", "diffusion.unet._orig_mod."): value for name, value in tensors.items()}
    save_file(compiled, tmp_path / "model.safetensors")
    facts, weights = facts_of(tmp_path), load_model(tmp_path).weights
    assert facts["action max"] == (1.0, 5.0, 0.3)
    assert facts["global_cond of"] == "2 steps, each observation.state 2, observation.image 8"
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], value) for name, value in WEIGHTS.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "act"}, 'type is "act"; of lerobot\'s policies only diffusion is read'),
        ({"down_dims": [8, 32]}, "down_dims is [8, 32]; the weights have [8, 16]"),
        ({"kernel_size": 3}, "kernel_size is 3; the weights have 5"),
        (
            {"output_features": {"action": {"type": "ACTION", "shape": [7]}}},
            "an action has 7 numbers; the weights have",
        ),
        ({"horizon": 7}, "horizon=7 cannot be halved"),
        ({"n_groups": 3}, "is not a multiple of n_groups=3"),
        ({"beta_schedule": "sigmoid"}, 'beta_schedule is "sigmoid"; supported'),
        ({"prediction_type": "v"}, 'prediction_type is "v"; supported'),
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0; supported: 1.0"),
        ({"noise_scheduler_type": "PNDM"}, 'noise_scheduler_type is "PNDM"; supported: DDPM or DDIM'),
        ({"thresholding": True}, "thresholding is true; supported: false"),
        ({"output_features": [3]}, "output_features is [3]; supported: an object"),
        ({"normalization_mapping": ["MIN_MAX"]}, 'normalization_mapping is ["MIN_MAX"]; supported: an object'),
    ],
)
def test_another_policy_is_refused_by_the_name_of_the_field(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    save_lerobot(tmp_path, WEIGHTS, **changes)
    with pytest.raises(ArtifactError) as refused:
        load_model(tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_damage_and_half_a_policy_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ArtifactError, match="a lerobot policy without its configuration; name the whole folder"):
        load_model(folder / "model.safetensors")
    with pytest.raises(CmfastError, match=r"--set horizon=16 contradicts config.json: horizon is 8"):
        load_model(folder, given=Given(horizon=16))
    save_lerobot(tmp_path, WEIGHTS)
    save_file(
        load_file(tmp_path / "model.safetensors") | {"other.weight": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ArtifactError, match=r"the tensor other.weight is of no part of a diffusion policy"):
        load_model(tmp_path)
    save_lerobot(tmp_path, WEIGHTS)
    values = json.loads((tmp_path / "policy_postprocessor.json").read_text())
    values["steps"][0]["state_file"] = "../elsewhere.safetensors"
    (tmp_path / "policy_postprocessor.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="names no file of statistics beside it"):
        load_model(tmp_path)
    save_lerobot(tmp_path, WEIGHTS)
    save_file({"action.min": torch.zeros(3)}, next(tmp_path.glob("policy_post*.safetensors")))
    with pytest.raises(ArtifactError, match=r"action.max is \[0\]; the statistics of action, MIN_MAX, need a vector"):
        load_model(tmp_path)
    save_lerobot(tmp_path, WEIGHTS, old=True)
    tensors = load_file(tmp_path / "model.safetensors")
    endless = {"unnormalize_outputs.buffer_action.max": torch.full((3,), math.inf)}
    save_file(tensors | endless, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="the statistics of action are not finite: they were never set"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "diffusion"}')
    with pytest.raises(ArtifactError, match=r"it lacks horizon; is it the config.json of a diffusion policy"):
        load_model(tmp_path)


def test_the_example_distils_it_into_a_policy_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/importing.md, with the folder of a small network, two steps of training and no downloads."""
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    save_lerobot(tmp_path / "diffusion_pusht", WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    actions, cond = (torch.randn(64, *shape, generator=generator).numpy() for shape in ((8, 3), (LEROBOT_COND,)))
    np.savez("demonstrations.npz", x=0.5 * actions, global_cond=cond)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "importing.md").read_text("utf-8"), re.DOTALL)
    example = example.replace("1_000_000", "64").replace("batch=128", 'batch=32, device="cpu"')
    values: dict[str, Any] = {}
    exec(example, values)
    trained, top = values["trained"].denoiser, values["top"]
    assert 50 < top < 80
    assert (trained.spec.scaling, trained.spec.sigmas) == ("lcm_eps", {1: (top,)})
    assert all(not torch.equal(weight, WEIGHTS[name]) for name, weight in trained.network.state_dict().items())
    policy = cmfast.load("policy.onnx")
    drawn = policy.sample(2, conditions={"global_cond": cond[:2]}, seed=3)
    z = torch.from_numpy(cmfast.noise.slices(3, range(2), 1, (8, 3)))
    x0 = trained(top * z[0], torch.full((2,), top), global_cond=torch.from_numpy(cond[:2])).clamp(-1, 1)
    np.testing.assert_allclose(drawn, x0.detach(), rtol=0, atol=1e-3)  # 64 times the rounding of float32 weights


ENCODED = {  # fields of a policy whose encoder is read: resnet18 on 24 x 32 of 30 x 40 pixels, two cameras
    "input_features": {
        "observation.images.hand": {"type": "VISUAL", "shape": [3, 30, 40]},
        "observation.images.top": {"type": "VISUAL", "shape": [3, 30, 40]},
        "observation.state": {"type": "STATE", "shape": [2]},
    },
    "use_separate_rgb_encoder_per_camera": False,
    "use_group_norm": False,
    "crop_shape": [24, 31],
    "resize_shape": None,
}
WITH_ENCODER = Given(encoder=True)


def test_no_value_in_a_file_of_json_gives_a_traceback(tmp_path: Path) -> None:
    odd = itertools.cycle([None, "x", -1, [1, "a"], {"type": []}])  # one in every other place: there are 200
    said = []
    for old in (False, True):
        save_lerobot(tmp_path, WEIGHTS, old=old)
        for file in ("config.json", *([] if old else ["policy_postprocessor.json"])):
            text = (tmp_path / file).read_text()
            for changed in itertools.islice(with_each_changed(json.loads(text), odd), 0, None, 2):
                (tmp_path / file).write_text(json.dumps(changed))
                try:
                    identify(tmp_path)
                except CmfastError as err:
                    said.append(str(err))
            (tmp_path / file).write_text(text)
    assert len(said) > 10
    assert not [text for text in said if "\n" in text]


def with_each_changed(values: Any, odd: Iterator[Any]) -> Iterator[Any]:
    """Yield copies of JSON values with one of the nested values replaced."""
    yield next(odd)
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        for changed in with_each_changed(values[key], odd):
            copied = copy.copy(values)
            copied[key] = changed
            yield copied


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module, Weights]:
    """Return the folder of a policy of two cameras, torchvision's ResNet in it, and the layers after that."""
    torchvision_datasets()
    models = pytest.importorskip("torchvision.models")
    backbone = torch.nn.Sequential(*list(models.resnet18(weights=None).children())[:-2]).eval()
    randomise(backbone, 5)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    after = {
        "pool.nets.weight": torch.randn(4, 512, 1, 1, generator=generator) / 4,
        "pool.nets.bias": torch.randn(4, generator=generator),
        "out.weight": torch.randn(8, 8, generator=generator),
        "out.bias": torch.randn(8, generator=generator),
    }
    path = tmp_path_factory.mktemp("seeing") / "policy"
    save_lerobot(path, weights_of("film", global_cond=2 * (2 + 2 * 8)), **ENCODED)
    tensors = {name: value for name, value in load_file(path / "model.safetensors").items() if "rgb" not in name}
    encoder = {f"backbone.{name}": value for name, value in backbone.state_dict().items()} | after
    encoder["pool.pos_grid"] = torch.zeros(1, 2)
    save_file(tensors | {f"diffusion.rgb_encoder.{k}": v for k, v in encoder.items()}, path / "model.safetensors")
    return path, backbone, after


def test_the_encoder_of_images_is_torchvisions_and_a_spatial_softmax(
    seeing: tuple[Path, torch.nn.Module, Weights],
) -> None:
    folder, backbone, after = seeing
    checkpoint = load_model(folder, given=WITH_ENCODER)
    assert [(each.name, each.shape) for each in checkpoint.spec.conditions] == [
        ("image", (2, 2, 3, 30, 40)), ("state", (2, 2)),
    ]  # fmt: skip
    of_images = {"mode": "MEAN_STD", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}
    assert checkpoint.source["normalised"]["observation.image"] == of_images
    model, generator = checkpoint.denoiser(), torch.Generator().manual_seed(1)
    images, state = (torch.randn(2, 2, *shape, generator=generator) for shape in ((2, 3, 30, 40), (2,)))
    with torch.no_grad():
        cut = images[..., 3:27, 4:35].flatten(0, 2)  # from (30 - 24) / 2 and (40 - 31) / 2, halves to even
        maps = torch.nn.functional.conv2d(backbone(cut), after["pool.nets.weight"], after["pool.nets.bias"])
        attention = maps.flatten(2).softmax(-1).unflatten(-1, maps.shape[2:])
        across = (attention.sum(2) * torch.linspace(-1, 1, maps.shape[3])).sum(-1)
        down = (attention.sum(3) * torch.linspace(-1, 1, maps.shape[2])).sum(-1)
        points = torch.stack([across, down], dim=-1).flatten(1)
        features = torch.relu(points @ after["out.weight"].T + after["out.bias"]).view(2, 2, -1)
        cond = torch.cat([state, features], dim=-1).flatten(1)
        x, sigma = torch.randn(2, 8, 3, generator=generator), torch.full((2,), 0.7)
        want = load_model(folder).denoiser()(x, sigma, global_cond=cond)
        got = model(x, sigma, image=images, state=state)
    assert features.std() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # the bar of importers


def test_a_policy_with_its_encoder_is_a_checkpoint(seeing: tuple[Path, torch.nn.Module, Weights]) -> None:
    checkpoint = load_model(seeing[0], given=WITH_ENCODER)
    assert network_from_dict(network_to_dict(checkpoint.network)) == checkpoint.network
    check_weights(checkpoint.network, checkpoint.weights)
    with pytest.raises(CmfastError, match="the weights do not fit the network"):
        check_weights(checkpoint.network, dict(list(checkpoint.weights.items())[1:]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_backbone": "resnet50"}, 'is "resnet50"; supported with encoder=true: resnet18, resnet34'),
        ({"resize_shape": [96, 96]}, "resize_shape is [96, 96]; supported with encoder=true: null"),
        ({"crop_shape": [40, 40]}, "crop=(40, 40) must lie inside the image (30, 40)"),
        ({"use_group_norm": True}, "backbone.1.running_mean is"),
        ({"spatial_softmax_num_keypoints": 3}, "global_cond is 36, and 2 observations have 28 numbers"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [18]}}}, "the policy has no images"),
    ],
)
def test_an_encoder_that_is_not_supported_is_refused(
    seeing: tuple[Path, torch.nn.Module, Weights], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    config = json.loads((seeing[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").symlink_to(seeing[0] / "model.safetensors")
    with pytest.raises(ArtifactError) as refused:
        load_model(tmp_path, given=WITH_ENCODER)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_facts_of_policies_are_refused_with_other_files(tmp_path: Path) -> None:
    torch.save(weights_of(), tmp_path / "unet.pt")
    with pytest.raises(CmfastError, match=r"--set encoder: a U-Net of 3 numbers an action, .* has no such fact"):
        load_model(tmp_path / "unet.pt", "diffusion_policy", Given(horizon=8, encoder=True))


def test_the_command_takes_it_as_the_teacher_of_a_network_of_ones_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(load_model(folder), tmp_path / "teacher.pt")
    (tmp_path / "pupil.py").write_text("import torch\nstudent = torch.nn.Linear(3, 3)\n")
    monkeypatch.chdir(tmp_path)
    teacher = own_model("pupil:student", None, tmp_path / "teacher.pt", teacher=True)
    assert teacher.spec == load_model(folder).spec
    with pytest.raises(CmfastError, match="its network is one of cmfast's, which is in the file: leave --network out"):
        own_model("pupil:student", None, tmp_path / "teacher.pt")
