# SPDX-License-Identifier: MIT
"""The U-Nets of Diffusion Policy (arXiv:2303.04137) and of Consistency Policy (arXiv:2405.07503), from state dicts.

All have the same tensors, and none shows how many steps a sequence has, whether the network takes one noise level or
two, or what it predicts: the `workspace` in the file says it, else `--source` and `--set`. Observations are encoded by
another network of the policy, whose output is the condition here. `lerobot` reads the same network out of its folders.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError
from cmfast.preconditioning import noise_condition
from cmfast.schedule import DiscreteTimes
from cmfast.spec import ModelSpec
from cmfast_train.checkpoint import check_count
from cmfast_train.importers.diffusers_json import is_whole, refusal
from cmfast_train.importers.diffusion_folders import default_sigmas, scheduled_spec, scheduler_fields
from cmfast_train.importers.facts import Draft, Facts, difference, shown, spec_of
from cmfast_train.importers.policies.statistics import note
from cmfast_train.importers.policies.workspace import DIFFUSION, STUDENT, STUDENTS_TEACHER, Workspace, workspace
from cmfast_train.networks.unet1d import CONDITION, Unet1d, Unet1dConfig

HORIZON, GROUPS = 16, 8  # of all published configurations
TIMES = "squaredcos_cap_v2:100"
CFG = "the file's cfg"
_KARRAS = {"c_noise": "250ln", "sigma_min": 0.02, "sigma_max": 80.0, "sigma_data": 0.5, "renoise": "plain", "grid": 80}
SYSTEMS: Mapping[str, Mapping[str, Any]] = {  # what their training configurations have in common
    DIFFUSION: {
        "scaling": "vp_eps", "c_noise": "discrete", "renoise": "ddim", "sigma_data": 0.5, "clip": True, "grid": 0,
    },
    STUDENT: _KARRAS | {"scaling": "ctm", "clip": True},
    STUDENTS_TEACHER: _KARRAS | {"scaling": "boundary", "clip": True},
}  # fmt: skip
TEACHER = "a diffusion teacher, not a consistency model: it draws actions in ten and more steps"
SCHEDULERS = ("Karras_Scheduler", "CTM_Scheduler")  # of Consistency Policy; PFGMPP_Scheduler adds another noise
UNITS = "actions as the policy normalises them; their statistics are not in the file"


def matches(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors are named as in `ConditionalUnet1D`."""
    return {"diffusion_step_encoder.1.weight", "mid_modules.0.blocks.0.block.0.weight"} <= weights.keys()


def draft(weights: Mapping[str, Tensor], facts: Facts, source: str, file: Path) -> Draft:
    """Read the shape of the network; the rest is in the file's cfg, usual for the source, or required from the user."""
    chosen = next((str(fact.value) for fact in facts.known if fact.name == "weights"), "")
    work = workspace(facts.content, chosen, file)
    source = _source(source, work, facts, file)
    said = _said(work, source, file) if work and work.source else {}
    where = f"usual of {source}" if said else f"--source {source}"
    usual = {**SYSTEMS.get(source, {}), **said.pop("usual", {})}
    scaling = facts.given.scaling or usual.get("scaling")
    config = config_of(weights, file, two_times=source == STUDENT or scaling == "ctm")
    flow_map = config.two_times and scaling != "ctm"  # "ctm" goes to sigma_min only
    if flow_map:
        usual["renoise"] = "ddim"
    describe_network(facts, config, "the tensors")
    normalised = work.normalised if work else {}
    noted = note(facts, normalised, "the normalizer")
    if "action" not in normalised:
        facts.fixed("units", UNITS, "the format")
    network = _network(config, facts, said, source, where, file)
    shape = None if network is None else network.image_shape
    model = {"data": "array", "conditions": config.conditions, "second_time": flow_map}
    if network is not None and "scheduler" in said:
        spec: ModelSpec | None = scheduled_spec(facts, said["scheduler"], file, CFG, shape=shape, **model)
    else:
        fixed, fixed_where = said.get("fixed", {}), CFG
        if (facts.given.c_noise or usual.get("c_noise")) == "discrete":
            text = facts.usual("times", TIMES, where) if source else facts.required("times", TIMES)
            if text is not None:
                times = times_of(text)
                fixed, fixed_where = ends_of(times), "times"
                model |= {"times": times, "sigmas": default_sigmas(times)}
        spec = spec_of(facts, shape, 0, usual, where, fixed=fixed, fixed_where=fixed_where, extra=model)
    if network is not None and spec is not None:
        network = with_stop(network, spec)
        if source in (STUDENT, STUDENTS_TEACHER):  # Karras_Scheduler.sample_inital_position
            top = f"{spec.sigma_max:g}"
            start = f"noise times {top}; its own code starts from noise alone, Model.from_noise(noise / {top}, ..)"
            facts.fixed("start", start, "Consistency Policy's code")
    return Draft(
        format=source or DIFFUSION,
        what=f"a U-Net of {config.actions} numbers an action, of Diffusion Policy's family",
        facts=facts,
        network=network,
        spec=spec,
        source={"format": source or DIFFUSION, **noted},
        weights=lambda: {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in weights.items()},
        hint="" if source else _hint(facts),
        warnings=(TEACHER,) if source in (DIFFUSION, STUDENTS_TEACHER) else (),
    )


def _source(source: str, work: Workspace | None, facts: Facts, file: Path) -> str:
    """Return whose policy it is: what the file's cfg says, or what the user passed."""
    if work is None or not work.source:
        return source
    policy = str(work.value("policy", "_target_"))
    if source not in ("", work.source):
        raise CmfastError(f"{file}: --source {source}, but its cfg has the policy {shown(policy)}; leave --source out")
    facts.fixed("policy", shown(policy), CFG)
    return work.source


def _network(
    config: Unet1dConfig, facts: Facts, said: Mapping[str, Any], source: str, where: str, file: Path
) -> Unet1dConfig | None:
    """Return the network with what no tensor shows; None where that is missing."""
    horizon = said.get("horizon")
    horizon = facts.required("horizon", HORIZON) if horizon is None else facts.fixed("horizon", horizon, CFG)
    groups = said.get("groups")
    if groups is not None:
        facts.fixed("groups", groups, CFG)
    else:
        groups = facts.usual("groups", GROUPS, where) if source else facts.required("groups", GROUPS)
    if horizon is None or groups is None:
        return None
    try:
        return dataclasses.replace(config, horizon=horizon, groups=groups)
    except CmfastError as err:
        raise CmfastError(f"{file}: {err}") from None


def _said(work: Workspace, source: str, file: Path) -> dict[str, Any]:
    """Return what the file's cfg says: horizon and groups, and its noise scheduler by ours or by diffusers' names."""
    found: dict[str, Any] = {
        "horizon": _whole(work.value("policy", "horizon"), work.value("horizon")),
        "groups": _whole(work.value("policy", "n_groups"), work.value("policy", "model", "n_groups")),
    }
    scheduler = work.section("policy", "noise_scheduler")
    if scheduler is None:
        return found
    if not isinstance(scheduler, Mapping):
        raise refusal(file, "noise_scheduler", scheduler, "supported: the fields of a scheduler")
    if source == DIFFUSION:
        found["scheduler"] = scheduler_fields(scheduler, file)
        return found
    supported: dict[str, tuple[Any, ...]] = {"rho": (7,), "scaling": ("boundary", "no_boundary")}
    if source == STUDENT:  # the network jumps to time_min by G = s/t x + (1 - s/t) g, and `ctm` has g's boundary
        supported["scaling"] = ("boundary",)
    if (target := scheduler.get("_target_")) is not None and str(target).rpartition(".")[2] not in SCHEDULERS:
        raise refusal(file, "noise_scheduler._target_", target, f"supported: {' or '.join(SCHEDULERS)}")
    for name, allowed in supported.items():
        if (value := scheduler.get(name, allowed[0])) not in allowed:
            raise refusal(file, f"noise_scheduler.{name}", value, f"supported: {', '.join(map(str, allowed))}")
    if scheduler.get("scaling") == "no_boundary":
        found["usual"] = {"scaling": "edm"}
    found["fixed"] = {}
    for ours, theirs in {"sigma_min": "time_min", "sigma_max": "time_max", "sigma_data": "data_std"}.items():
        if theirs in scheduler:
            if not _is_level(level := scheduler[theirs]):
                raise refusal(file, f"noise_scheduler.{theirs}", level, "supported: a noise level above 0")
            found["fixed"][ours] = float(level)
    if "bins" in scheduler:
        if not is_whole(bins := scheduler["bins"]):
            raise refusal(file, "noise_scheduler.bins", bins, "supported: a whole number of noise levels")
        found["fixed"]["grid"] = bins
    return found


def _is_level(value: Any) -> bool:
    """Whether this is a noise level; of one that is too large or small `ModelSpec` says so."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def _whole(*values: Any) -> int | None:
    """Return the first of these that is a size."""
    return next((value for value in values if is_whole(value)), None)


def config_of(weights: Mapping[str, Tensor], file: Path, *, two_times: bool) -> Unet1dConfig:
    """Return the shape of the network whose state dict this is, for any number of steps and groups.

    Args:
        weights: all tensors, by the names of `networks.unet1d`.
        file: named in errors.
        two_times: whether it takes two noise levels, which no tensor shows.

    Raises:
        ArtifactError: a name or a shape is of no such network.
    """
    if any(name.startswith("local_cond_encoder.") for name in weights):
        raise ArtifactError(
            f"{file}: its observations enter step by step (obs_as_local_cond); supported: obs_as_global_cond"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    levels = {int(m[1]) for name in shapes if (m := re.match(r"down_modules\.(\d{1,3})\.", name))}
    try:
        wide = shapes["diffusion_step_encoder.1.weight"][1]
        first = shapes["down_modules.0.0.blocks.0.block.0.weight"]
        film = shapes["down_modules.0.0.cond_encoder.1.weight"]
        dims = tuple(shapes[f"down_modules.{n}.0.blocks.0.block.0.weight"][0] for n in range(len(levels)))
        times = 2 if two_times else 1
        if film[1] < times * wide:
            raise ArtifactError(
                f"{file}: a network that takes {film[1]} numbers beside x, too few for two noise levels"
            )
        config = Unet1dConfig(
            horizon=2 ** max(len(levels) - 1, 0),
            groups=1,
            actions=shapes["final_conv.1.weight"][0],
            global_cond=film[1] - times * wide,
            down_dims=dims,
            kernel_size=first[2],
            embed_dim=wide,
            film_scale=film[0] == 2 * dims[0],
            two_times=two_times,
        )
    except (KeyError, IndexError) as err:
        raise ArtifactError(f"{file}: named as ConditionalUnet1D, but incomplete: {err}") from None
    except ArtifactError:
        raise
    except CmfastError as err:
        raise ArtifactError(f"{file}: a ConditionalUnet1D of a shape that is not supported: {err}") from None
    check_count(config, len(weights))
    with torch.device("meta"):
        need = {name: tuple(tensor.shape) for name, tensor in Unet1d(config).state_dict().items()}
    if wrong := difference(need, shapes):
        raise ArtifactError(f"{file}: not a ConditionalUnet1D that is supported here: {wrong}")
    return config


def describe_network(facts: Facts, config: Unet1dConfig, where: str) -> None:
    """Record what the tensors say of a network, and refuse what is only known of others."""
    widths = ", ".join(map(str, config.down_dims))
    facts.fixed("network", f"1-D U-Net, channels {widths}, kernel {config.kernel_size}", where)
    with torch.device("meta"):
        facts.fixed("parameters", sum(weight.numel() for weight in Unet1d(config).parameters()), where)
    facts.fixed("actions", config.actions, where)
    facts.fixed("film_scale", config.film_scale, where)
    facts.fixed("two_times", config.two_times or None, "Consistency Policy")
    facts.fixed(CONDITION, config.global_cond or None, where)
    for name in ("image_size", "head_channels", "heads", "qkv"):
        facts.fixed(name, None, "the network")


def ends_of(times: DiscreteTimes) -> dict[str, Any]:
    """Return what a table of times determines: the ends of the noise levels, data units."""
    return {"sigma_min": times.sigmas[0], "sigma_max": times.sigmas[-1]}


def times_of(text: str) -> DiscreteTimes:
    """Return the table of times that `--set times=SCHEDULE:STEPS` or SCHEDULE:STEPS:BETA_START:BETA_END describes."""
    schedule, *numbers = text.split(":")
    try:
        if len(numbers) not in (1, 3):
            raise ValueError
        betas = dict(zip(("beta_start", "beta_end"), map(float, numbers[1:]), strict=False))
        return DiscreteTimes(schedule=schedule, steps=int(numbers[0]), **betas)
    except ValueError:
        raise CmfastError(
            f"--set times={shown(text)}: need SCHEDULE:STEPS, such as {TIMES}, or with two betas, such as "
            "linear:1000:0.0001:0.02"
        ) from None


def with_stop(network: Unet1dConfig, spec: ModelSpec) -> Unet1dConfig:
    """Return the network with the second noise level that it takes where none is passed: sigma_min."""
    if not network.two_times:
        return network
    stop = noise_condition(torch.tensor(spec.sigma_min, dtype=torch.float32), spec, torch)
    return dataclasses.replace(network, stop=float(stop))


def _hint(facts: Facts) -> str:
    """Return how to say whose network it is, and what no source says."""
    horizon = "" if facts.given.horizon else f" --set horizon={HORIZON}"
    return f"--source diffusion_policy{horizon} (or consistency_policy, consistency_policy_teacher)"
