# SPDX-License-Identifier: MIT
"""Robot policies in: the U-Nets of Diffusion Policy and Consistency Policy, random weights, against their formulas."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError, CmfastError
from cmfast.sampling import heun
from cmfast.schedule import karras_sigmas
from cmfast_export import cli as export
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import Draft, Given
from cmfast_train.importers.policies.workspace import workspace as beside
from cmfast_train.networks.build import check_weights
from cmfast_train.networks.unet1d import Unet1d, Unet1dConfig
from helpers.foreign.policies import CASES, SMALL, Weights, hydra, omegaconf_modules, unet, weights_of, workspace

pytestmark = pytest.mark.filterwarnings("ignore:.*a diffusion teacher:cmfast.errors.CmfastWarning")

Call = Callable[..., Any]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoiser_of(checkpoint: Checkpoint, cond: Tensor | None) -> Callable[[Any, float], Any]:
    model, conditions = checkpoint.denoiser(), {} if cond is None else {"global_cond": cond}
    return lambda x, sigma: model(x, torch.full((len(x),), sigma), **conditions)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes what a policy's workspace saves, with random weights."""

    def saved(case: str = "film", name: str = "policy.ckpt", **changes: Any) -> Path:
        torch.save(workspace(model=weights_of(case, **changes)), tmp_path / name)
        return tmp_path / name

    return saved


def diffusion_policy(file: Path, case: str = "film", **given: Any) -> Checkpoint:
    groups = CASES[case].get("groups")
    return load_model(file, "diffusion_policy", Given(weights="ema_model.model", horizon=8, groups=groups, **given))


@pytest.mark.parametrize("case", CASES)
def test_the_denoiser_is_the_x0_that_ddpms_formula_makes_of_the_network(saved: Callable[..., Path], case: str) -> None:
    checkpoint, weights = diffusion_policy(saved(case), case), weights_of(case)
    assert checkpoint.spec.shape == (8, 3)
    cond = noise(2, CASES[case]["global_cond"], seed=2) if "global_cond" in CASES[case] else None
    denoise, x = denoiser_of(checkpoint, cond), noise(2, 8, 3)
    betas = [min(0.999, 1 - _alpha((i + 1) / 100) / _alpha(i / 100)) for i in range(100)]
    for t in (0, 40, 99):
        a = math.prod(1 - beta for beta in betas[: t + 1])
        output = unet(weights, x, [torch.full((2,), float(t))], cond, CASES[case].get("groups", 8))
        want = (x - math.sqrt(1 - a) * output) / math.sqrt(a)
        got = denoise(x / math.sqrt(a), math.sqrt((1 - a) / a))
        # The bar of importers is 1e-5; what predicts the noise is magnified by the noise level.
        scale = max(1.0, float(want.abs().max()))
        np.testing.assert_allclose(got / scale, want / scale, rtol=0, atol=1e-5)


def _alpha(part: float) -> float:
    return math.cos((part + 0.008) / 1.008 * math.pi / 2) ** 2


def test_ten_steps_are_those_of_ddim(saved: Callable[..., Path]) -> None:
    # The usual table ends at a noise level of 2,000, which magnifies rounding as much; this one ends at 2.5.
    checkpoint, weights = diffusion_policy(saved(), times="linear:40:0.001:0.1"), weights_of()
    spec, cond, z = checkpoint.spec, noise(2, 5, seed=2), noise(10, 2, 8, 3)
    sigmas = spec.sigmas_for(10)
    got = cmfast.sample(denoiser_of(checkpoint, cond), z, sigmas, spec)
    alphas = [math.prod(1 - beta for beta in np.linspace(0.001, 0.1, 40)[: t + 1]) for t in range(40)]
    x = z[0] * sigmas[0] * math.sqrt(alphas[39])  # cmfast draws from sigma, without the data's part
    for i, t in enumerate(range(39, -1, -4)):
        a, before = alphas[t], alphas[t - 4] if i < 9 else 1.0
        output = unet(weights, x, [torch.full((2,), float(t))], cond)
        x0 = ((x - math.sqrt(1 - a) * output) / math.sqrt(a)).clamp(-1, 1)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before) * (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    assert float((x.abs() < 1).float().mean()) > 0.1, "clipped everywhere"
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-5)


STUDENT, TEACHER = "consistency_policy", "consistency_policy_teacher"
STOP = 0.02  # time_min of its training


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights, Weights]:
    """Return what Consistency Policy's workspace saves, and the weights of the student and of the teacher in it."""
    file, student, teacher = tmp_path_factory.mktemp("ctm") / "latest.ckpt", weights_of(two_times=True), weights_of()
    average = weights_of(two_times=True, seed=3)
    torch.save(workspace("model", model=student, model_ema=average, teacher=teacher), file)
    return file, student, teacher


def jump(weights: Weights, x: Tensor, t: float, s: float, cond: Tensor) -> Tensor:
    """Return G(x, t, s) of Consistency Policy: CTM_Scheduler.CTM_calc_out, scaling boundary."""
    return s / t * x + (1 - s / t) * boundary(weights, x, t, cond, s)


def boundary(weights: Weights, x: Tensor, t: float, cond: Tensor, *others: float) -> Tensor:
    """Return Karras_Scheduler.calc_out, and g(x, t, s) of CTM_calc_out where s is passed."""
    times = [250 * torch.full((len(x),), time).log() for time in (t, *others)]  # float32, as there
    output = unet(weights, x / math.sqrt(t**2 + 0.25), times, cond)
    c_skip, c_out = 0.25 / ((t - STOP) ** 2 + 0.25), (t - STOP) * 0.5 / math.sqrt(t**2 + 0.25)
    return c_skip * x + c_out * output


def test_a_consistency_policy_jumps_to_its_last_time(distilled: tuple[Path, Weights, Weights]) -> None:
    file, weights, _ = distilled
    checkpoint = load_model(file, STUDENT, Given(weights="model.model", horizon=8))
    cond, spec = noise(2, 5, seed=2), checkpoint.spec
    denoise = denoiser_of(checkpoint, cond)
    assert (spec.sigmas, spec.second_time) == ({1: (80.0,)}, False)
    for t in (STOP, 0.5, 10.0, 80.0):
        x = t * noise(2, 8, 3)
        # The bar of importers; 250 ln(t) is in the thousands, which float32 has to 6e-5.
        np.testing.assert_allclose(denoise(x, t), jump(weights, x, t, STOP, cond), rtol=0, atol=1e-5)
    # Its own code draws the first noise with a standard deviation of 1, and chains at bins of its grid.
    z, sigmas = noise(3, 2, 8, 3), spec.sigmas_at([0, 27, 54])
    want = jump(weights, z[0], 80.0, STOP, cond).clamp(-1, 1)
    for t, fresh in zip(sigmas[1:], z[1:], strict=True):
        want = jump(weights, want + t * fresh, t, STOP, cond).clamp(-1, 1)
    got = cmfast.sample(denoise, torch.cat([z[:1] / 80, z[1:]]), sigmas, spec)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_consistency_policy_as_a_flow_map_goes_to_any_time(distilled: tuple[Path, Weights, Weights]) -> None:
    file, weights, _ = distilled
    checkpoint = load_model(file, STUDENT, Given(weights="model.model", horizon=8, scaling="boundary", clip=False))
    model, spec, cond, x = checkpoint.denoiser(), checkpoint.spec, noise(2, 5, seed=2), 10 * noise(2, 8, 3)
    assert (spec.second_time, spec.renoise) == (True, "ddim")
    x0 = model(x, torch.full((2,), 10.0), torch.full((2,), 0.5), global_cond=cond)
    np.testing.assert_allclose(x0 + 0.5 / 10 * (x - x0), jump(weights, x, 10.0, 0.5, cond), rtol=0, atol=1e-5)

    def denoise(x: Any, sigma: float, sigma_next: float) -> Any:
        return model(x, torch.full((2,), sigma), torch.full((2,), sigma_next), global_cond=cond)

    got = cmfast.sample(denoise, torch.stack([x / 10, x]), [10.0, 0.5], spec)
    want = boundary(weights, jump(weights, x, 10.0, 0.5, cond), 0.5, cond, STOP)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_the_teacher_of_a_consistency_policy_is_a_diffusion_model(distilled: tuple[Path, Weights, Weights]) -> None:
    file, _, weights = distilled
    checkpoint = load_model(file, TEACHER, Given(weights="teacher", horizon=8))
    cond, spec, z = noise(2, 5, seed=2), checkpoint.spec, noise(1, 2, 8, 3)
    grid = karras_sigmas(8, STOP, 80.0)
    got = heun(denoiser_of(checkpoint, cond), z, grid)
    x = 80 * z[0]
    for t, after in pairwise(grid):  # heun_solver with clamp=False; at time_min the model is the identity, so it ends
        slope = (x - boundary(weights, x, t, cond)) / t
        ahead = x + (after - t) * slope
        x = x + (after - t) * (slope + (ahead - boundary(weights, ahead, after, cond)) / after) / 2
    assert spec.sigma_min == STOP
    np.testing.assert_allclose(got, x, rtol=0, atol=3e-5)  # x begins at 80, where float32 has 8e-6


SCHEDULER = {
    "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler", "num_train_timesteps": 50, "beta_start": 0.001,
    "beta_end": 0.1, "beta_schedule": "linear", "clip_sample": False, "prediction_type": "sample",
}  # fmt: skip
KARRAS = {
    "_target_": "consistency_policy.diffusion.CTM_Scheduler", "time_min": 0.01, "time_max": 40.0, "rho": 7.0,
    "bins": 40, "scaling": "boundary", "data_std": 0.4,
}  # fmt: skip


def config(target: str, scheduler: Mapping[str, Any], **policy: Any) -> dict[str, Any]:
    """Return a configuration of hydra."""
    values = {"_target_": target, "horizon": "${horizon}", "noise_scheduler": dict(scheduler), **policy}
    return {"horizon": 8, "policy": values, "task": {"shapes": [1, 2], "dim": "${eval:'2 + 3'}"}}


@pytest.fixture
def with_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that saves a workspace with its configuration in OmegaConf's objects."""

    def with_config(values: dict[str, Any], policy: str = "ema_model", **networks: Weights) -> Path:
        with monkeypatch.context() as there:
            for name, module in omegaconf_modules().items():
                there.setitem(sys.modules, name, module)
            torch.save(workspace(policy, hydra(values), **networks), tmp_path / "latest.ckpt")
        return tmp_path / "latest.ckpt"

    return with_config


LOWDIM = "diffusion_policy.policy.diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy"
EDM = "consistency_policy.teacher.edm_policy.KarrasUnetHybridImagePolicy"
CTM = "consistency_policy.student.ctm_policy.CTMPPUnetHybridImagePolicy"


def test_the_configuration_in_the_file_says_everything_and_nothing_of_it_is_run(
    with_config: Callable[..., Path], call: Call
) -> None:
    file = with_config(config(LOWDIM, SCHEDULER, model={"n_groups": 4}), model=weights_of("shift"))
    said = call(info.main, file, "--set", "weights=ema_model.model")
    assert said.returncode == 0, said.stderr
    for words in (LOWDIM, "50, linear, beta 0.001 to 0.1", "action scale", "2, 4, 0.1", "the file's cfg"):
        assert words in said.stdout
    checkpoint = load_model(file, given=Given(weights="ema_model.model"))
    spec = checkpoint.spec
    assert (spec.shape, spec.scaling, spec.clip) == ((8, 3), "vp_x0", False)
    assert spec.times == cmfast.DiscreteTimes(schedule="linear", steps=50, beta_start=0.001, beta_end=0.1)
    assert checkpoint.network.groups == 4  # type: ignore[union-attr]
    assert checkpoint.source["normalised"]["action"] == {
        "mode": "LINEAR", "scale": [2.0, 4.0, 0.1], "offset": [0.0, -1.0, 0.5],
    }  # fmt: skip
    with pytest.raises(CmfastError, match="--set horizon=16 contradicts the file's cfg: horizon is 8"):
        load_model(file, given=Given(weights="ema_model.model", horizon=16))
    with pytest.raises(CmfastError, match=f"but its cfg has the policy {LOWDIM}; leave --source out"):
        load_model(file, STUDENT, Given(weights="ema_model.model"))


def test_a_configuration_of_consistency_policy_says_which_network_takes_two_times(
    with_config: Callable[..., Path],
) -> None:
    networks = {"model": weights_of(two_times=True), "teacher": weights_of()}
    file = with_config(config(CTM, KARRAS, n_groups=8), "model", **networks)
    student = load_model(file, given=Given(weights="model.model"))
    teacher = load_model(file, given=Given(weights="teacher"))
    assert (student.source["format"], teacher.source["format"]) == (STUDENT, TEACHER)
    for spec, scaling in ((student.spec, "ctm"), (teacher.spec, "boundary")):
        levels = (spec.sigma_min, spec.sigma_max, spec.sigma_data, spec.grid)
        assert (spec.scaling, *levels) == (scaling, 0.01, 40.0, 0.4, 40)
    for chosen in ("model.model", "teacher"):  # both start from a standard deviation of 1
        draft = identify(file, given=Given(weights=chosen))
        assert isinstance(draft, Draft)
        assert "Model.from_noise(noise / 40, ..)" in next(f.value for f in draft.facts.known if f.name == "start")
    alone = with_config(config(EDM, KARRAS | {"scaling": "no_boundary"}), model=weights_of())
    assert load_model(alone, given=Given(weights="ema_model.model")).spec.scaling == "edm"
    jumps = with_config(config(CTM, KARRAS | {"scaling": "no_boundary"}), model=networks["model"])
    with pytest.raises(ArtifactError, match=r'noise_scheduler.scaling is "no_boundary"; supported: boundary$'):
        load_model(jumps, given=Given(weights="ema_model.model"))


def test_a_configuration_without_an_end_is_read_to_a_limit() -> None:
    deep: dict[str, Any] = {"horizon": 8}
    wide: list[Any] = []
    for _ in range(2000):
        deep, wide = {"horizon": 8, "below": deep}, [wide, wide]
    policy = {"horizon": "${a}"}
    content = {"cfg": {"a": "${policy.horizon}", "policy": policy, "deep": deep, "wide": wide}, "state_dicts": {}}
    found = beside(content, "", Path("latest.ckpt"))
    assert found is not None
    assert found.value("deep", "below", "horizon") == 8
    assert found.value("policy", "horizon") is None, "the two refer to each other"
    assert found.source == ""


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        (EDM, {"rho": 5.0}, "noise_scheduler.rho is 5.0; supported: 7"),
        (EDM, {"scaling": "vp"}, 'noise_scheduler.scaling is "vp"; supported: boundary, no_boundary'),
        (EDM, {"scaling": []}, "noise_scheduler.scaling is []; supported"),
        (EDM, {"_target_": "consistency_policy.diffusion.PFGMPP_Scheduler"}, "supported: Karras_Scheduler or CTM_"),
        (EDM, {"bins": math.inf}, "noise_scheduler.bins is Infinity; supported: a whole number"),
        (EDM, {"bins": -1}, "noise_scheduler.bins is -1; supported: a whole number"),
        (EDM, {"time_min": math.nan}, "noise_scheduler.time_min is NaN; supported: a noise level"),
        (EDM, {"time_max": "80"}, 'noise_scheduler.time_max is "80"; supported: a noise level'),
        (EDM, {"data_std": "${eval:'1 / 2'}"}, "noise_scheduler.data_std is \"${eval:'1 / 2'}\"; supported"),
        (LOWDIM, {"trained_betas": [0.1, 0.2]}, "trained_betas is [0.1, 0.2]; supported: null"),
        (LOWDIM, {"thresholding": True}, "thresholding is true; supported: false"),
        (LOWDIM, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true; supported: false"),
        (LOWDIM, {"some_option": 3}, "some_option is 3; an option that this version of cmfast does not know"),
        (LOWDIM, {"num_train_timesteps": "${eval:'2 * 50'}"}, "supported: a whole number"),
        (LOWDIM, {"_target_": "diffusers.PNDMScheduler"}, "supported: DDPMScheduler or DDIMScheduler"),
        (LOWDIM, {"_target_": None}, "noise_scheduler._target_ is null; supported: DDPMScheduler"),
        (LOWDIM, 5, "noise_scheduler is 5; supported: the fields of a scheduler"),
    ],
)
def test_another_noise_scheduler_is_refused_by_the_name_of_the_field(
    with_config: Callable[..., Path], target: str, changes: Any, words: str
) -> None:
    usual = SCHEDULER if target == LOWDIM else KARRAS
    values = config(target, usual | changes if isinstance(changes, dict) else usual)
    values["policy"]["noise_scheduler"] = changes if changes == 5 else values["policy"]["noise_scheduler"]
    with pytest.raises(ArtifactError) as refused:
        load_model(with_config(values, model=weights_of()), given=Given(weights="ema_model.model"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_noise_scheduler_elsewhere_in_the_configuration_is_followed(with_config: Callable[..., Path]) -> None:
    values = config(LOWDIM, {}) | {"steps": 50, "noise": SCHEDULER | {"num_train_timesteps": "${steps}"}}
    values["policy"]["noise_scheduler"] = "${noise}"
    spec = load_model(with_config(values, model=weights_of()), given=Given(weights="ema_model.model")).spec
    assert spec.times == cmfast.DiscreteTimes(schedule="linear", steps=50, beta_start=0.001, beta_end=0.1)


def test_a_normalizer_keeps_every_feature_and_what_is_too_long_for_a_manifest_is_named(tmp_path: Path) -> None:
    content = workspace(model=weights_of())
    tensors = content["state_dicts"]["ema_model"]
    for feature, numbers in (("weights", 200), ("front_camera", 1)):  # one of them has the name of an option
        for kind in ("scale", "offset"):
            tensors[f"normalizer.params_dict.{feature}.{kind}"] = torch.full((numbers,), 0.125)
    torch.save(content, tmp_path / "policy.ckpt")
    draft = identify(tmp_path / "policy.ckpt", "diffusion_policy", Given(weights="ema_model.model", horizon=8))
    assert isinstance(draft, Draft)
    facts = {fact.name: fact.value for fact in draft.facts.known}
    assert list(draft.source["normalised"]) == ["action", "front_camera"]
    assert facts["too long"] == "for a manifest: the statistics of weights; exports do not keep them"
    assert facts["weights offset"] == (0.125,) * 200
    assert "units" not in facts


@pytest.mark.parametrize("value", [None, torch.full((3,), math.inf), torch.ones(3, 3), torch.ones(2000)])
def test_a_damaged_normalizer_is_refused_by_its_name(tmp_path: Path, value: Tensor | None) -> None:
    content = workspace(model=weights_of())
    content["state_dicts"]["ema_model"]["normalizer.params_dict.action.scale"] = value
    torch.save(content, tmp_path / "policy.ckpt")
    with pytest.raises(ArtifactError, match=r"params_dict.action.scale is not a vector of at most 1024 finite numbers"):
        diffusion_policy(tmp_path / "policy.ckpt")


def test_without_a_source_nothing_is_guessed(saved: Callable[..., Path], call: Call) -> None:
    file = saved()
    said = call(info.main, file, "--set", "weights=ema_model.model")
    assert said.returncode == 0, said.stderr
    for words in (
        "1-D U-Net, channels 8, 16, kernel 5",
        "5   (the tensors)",
        "--source diffusion_policy --set horizon=16",
    ):
        assert words in said.stdout
    with pytest.raises(CmfastError, match=r"horizon, groups, scaling, .* cannot be inferred from the file"):
        load_model(file, given=Given(weights="ema_model.model"))
    with pytest.raises(CmfastError, match="horizon cannot be inferred from the file"):
        load_model(file, "diffusion_policy", Given(weights="ema_model.model"))
    with pytest.raises(CmfastError, match="horizon=7 cannot be halved 1 times"):
        load_model(file, "diffusion_policy", Given(weights="ema_model.model", horizon=7))
    with pytest.raises(CmfastError, match="times=linear: need SCHEDULE:STEPS"):
        diffusion_policy(file, times="linear")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"local_cond_encoder.0.weight": torch.ones(2, 2)}, "supported: obs_as_global_cond"),
        ({"down_modules.0.1.blocks.0.block.0.weight": torch.ones(2, 2)}, "down_modules.0.1.blocks.0.block.0.weight is"),
        ({"final_conv.1.weight": None}, "but incomplete: 'final_conv.1.weight'"),
        ({"another.weight": torch.ones(2)}, "another.weight is"),
    ],
)
def test_another_network_is_refused_by_the_name_of_the_tensor(
    changes: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    weights: Weights = {name: value for name, value in (weights_of() | changes).items() if value is not None}
    torch.save(weights, tmp_path / "net.pt")
    with pytest.raises(ArtifactError) as refused:
        load_model(tmp_path / "net.pt", "diffusion_policy", Given(horizon=8))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_says_which_network_it_holds(saved: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = diffusion_policy(saved())
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    again = load_checkpoint(tmp_path / "model.pt")
    assert (again.network, again.spec) == (checkpoint.network, checkpoint.spec)
    with pytest.raises(CmfastError, match="the weights do not fit the network"):
        check_weights(checkpoint.network, dict(list(checkpoint.weights.items())[1:]))
    other = replace(checkpoint.spec, conditions=(cmfast.Condition(name="global_cond", shape=(6,)),))
    save_checkpoint(replace(checkpoint, spec=other), tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="its network and its spec disagree about the conditions"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("two_times", [False, True])
def test_the_number_of_weights_is_known_before_they_are_made(case: str, two_times: bool) -> None:
    config = Unet1dConfig(**CASES[case], two_times=two_times)
    check_weights(config, Unet1d(config).state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizon": 9}, "cannot be halved 1 times"),
        ({"down_dims": (8, 12)}, "12, is not a multiple of groups=8"),
        ({"down_dims": (12, 16), "groups": 4}, "first width of down_dims must be a multiple of 8"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"embed_dim": 2}, "embed_dim must be even and at least 4"),
        ({"down_dims": ()}, "down_dims must be one to 16 widths"),
        ({"global_cond": -1}, "global_cond must be"),
        ({"down_dims": (65536,) * 16, "horizon": 65536}, "more than the 10,000,000,000 that cmfast builds"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        Unet1dConfig(**SMALL | changes)


@pytest.mark.parametrize(("source", "made_as"), [("diffusion_policy", "policy.pt"), (STUDENT, "policy.onnx")])
def test_it_is_exported_as_one_file_and_sampled_with_the_observation(
    source: str, made_as: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.save(workspace(model=weights_of("one level", two_times=source == STUDENT)), "policy.ckpt")
    options = ("--source", source, "--set", "horizon=8", "--set", "weights=model")
    form = ("--format", "cmfast") if made_as.endswith(".pt") else ()  # of one an ONNX file: the network is the same
    made = call(export.main, "policy.ckpt", *options, *form, "-o", made_as)
    assert made.returncode == 0, made.stderr
    if source == STUDENT:  # its scaling, ctm, is the identity at sigma_min, which the export has verified
        assert cmfast.load(made_as).backend.manifest.parity["boundary"] <= 1e-6
    checkpoint = load_model("policy.ckpt", source, Given(weights="model", horizon=8))
    steps, cond = min(checkpoint.spec.sigmas), noise(2, 2, seed=2)
    np.save("obs.npy", cond.numpy())
    drawn = call(sample.main, made_as, "-n", 2, "--condition", "global_cond=obs.npy", "--seed", 3, "-o", "a.npy")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    z = torch.from_numpy(cmfast.noise.slices(3, range(2), steps, (8, 3)))
    want = cmfast.sample(denoiser_of(checkpoint, cond), z, checkpoint.spec.sigmas_for(), checkpoint.spec)
    np.testing.assert_allclose(np.load("a.npy"), want, rtol=0, atol=1e-4)  # as exports are verified
