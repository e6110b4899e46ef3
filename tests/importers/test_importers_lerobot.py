# SPDX-License-Identifier: MIT
"""Folders of lerobot's diffusion policy in: the U-Net, its configuration, its statistics; a teacher to distil from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
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
from helpers import ROOT
from helpers.foreign.policies import LEROBOT_COND, save_lerobot, unet, weights_of

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
        "diffusion.rgb_encoder, resnet18, left out: its output is part of global_cond",
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
    assert normalised["action"] == {"mode": "MIN_MAX", "min": [-1.0, 0.0, 0.1], "max": [1.0, 5.0, 0.3]}


def test_without_statistics_nothing_is_guessed(tmp_path: Path) -> None:
    save_lerobot(tmp_path, WEIGHTS)
    for file in tmp_path.glob("policy_*"):
        file.unlink()
    assert "its statistics are not in the folder" in facts_of(tmp_path)["units"]
    assert load_model(tmp_path).source == {"format": "lerobot"}


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
