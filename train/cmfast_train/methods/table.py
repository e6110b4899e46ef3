# SPDX-License-Identifier: MIT
"""The table of training methods: the hyperparameters of each, and a row with everything else about it.

A new method is a module beside this one and a row here. `method` finds a row by its name, also one of another package.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from cmfast.spec import ModelSpec
from cmfast_train.methods.method import ROWS, Method, Needs, setting
from cmfast_train.methods.schedules import (
    alpha_of,
    ct_ema,
    ct_scales,
    ect_stage,
    ict_law,
    ict_scales,
    pd_sigmas,
    tangent_warmup,
)

MOST_SIGMAS = 65536  # noise levels of a grid: each optimiser step makes them all

P_MEAN, P_STD = "mean of ln(sigma)", "standard deviation of ln(sigma)"
HUBER = "Pseudo-Huber constant over sqrt(values of a sample), data units; 0 is the l2 norm"


def _loss(default: str) -> Any:
    return setting(default, "distance between two outputs; l2 is squared", choices=("l1", "l2", "huber", "lpips"))


def _derivative() -> Any:
    return setting("jvp", "forward mode, or central differences", choices=("jvp", "finite"))


@dataclass(frozen=True, kw_only=True)
class Edm:
    """Hyperparameters of edm: EDM, Table 1."""

    p_mean: float = setting(-1.2, P_MEAN)
    p_std: float = setting(1.2, P_STD, above=0)


@dataclass(frozen=True, kw_only=True)
class Ct:
    """Hyperparameters of ct: arXiv:2303.01469, CIFAR-10."""

    s0: int = setting(2, "noise levels at the start", least=2, most=MOST_SIGMAS)
    s1: int = setting(150, "noise levels at the end; s0 = s1 keeps their number", least=2, most=MOST_SIGMAS)
    mu: str = setting("adaptive", "the target's decay is mu(k) of the paper, or fixed", choices=("adaptive", "fixed"))
    mu0: float = setting(0.9, "decay of the target at the start, or throughout; 0: the student", least=0, below=1)
    loss: str = _loss("l2")
    huber: float = setting(0.00054, HUBER, least=0)


@dataclass(frozen=True, kw_only=True)
class Cd:
    """Hyperparameters of cd: arXiv:2303.01469, CIFAR-10."""

    s0: int = setting(18, "noise levels at the start", least=2, most=MOST_SIGMAS)
    s1: int = setting(18, "noise levels at the end; s0 = s1 keeps their number", least=2, most=MOST_SIGMAS)
    mu: str = setting("fixed", "the target's decay is mu(k) of the paper, or fixed", choices=("adaptive", "fixed"))
    mu0: float = setting(0.0, "decay of the target at the start, or throughout; 0: the student", least=0, below=1)
    solver: str = setting("heun", "the teacher's step", choices=("heun", "euler"))
    loss: str = _loss("l2")
    huber: float = setting(0.00054, HUBER, least=0)


@dataclass(frozen=True, kw_only=True)
class Ict:
    """Hyperparameters of ict: arXiv:2310.14189."""

    p_mean: float = setting(-1.1, P_MEAN)
    p_std: float = setting(2.0, P_STD, above=0)
    s0: int = setting(10, "noise levels at the start, less 1", least=2, most=MOST_SIGMAS)
    s1: int = setting(1280, "noise levels at the end, less 1", least=2, most=MOST_SIGMAS)
    loss: str = _loss("huber")
    huber: float = setting(0.00054, HUBER, least=0)


@dataclass(frozen=True, kw_only=True)
class Ect:
    """Hyperparameters of ect: arXiv:2406.14548, CIFAR-10."""

    p_mean: float = setting(-1.1, P_MEAN)
    p_std: float = setting(2.0, P_STD, above=0)
    q: float = setting(2.0, "each stage divides the gap t - r by this", above=1)
    k: float = setting(8.0, "how much wider the gap is at small t")
    b: float = setting(1.0, "how fast that fades with t")
    stages: tuple[int, int] = setting((0, 7), "first and last stage, passed through evenly")
    loss: str = _loss("huber")
    huber: float = setting(0.00054, HUBER, least=0)


@dataclass(frozen=True, kw_only=True)
class Cmt:
    """Hyperparameters of cmt: arXiv:2509.24526, but Heun's steps on the Karras grid, where it has DPM-Solver++."""

    steps: int = setting(16, "steps of the teacher's trajectory", least=1, most=1024)
    solver: str = setting("heun", "the teacher's step", choices=("heun", "euler"))
    loss: str = _loss("huber")
    huber: float = setting(0.00054, HUBER, least=0)


@dataclass(frozen=True, kw_only=True)
class Sid:
    """Hyperparameters of sid: arXiv:2404.04057, Algorithm 1.

    Ours are: several steps of the fake scores for each of the student (the paper alternates), the start at sigma_max
    (2.5 there), and the samples that start below it. 24 is the paper's largest level, the 800th of 1000 of a Karras
    grid.
    """

    alpha: float = setting(1.0, "how much of the squared difference of the scores the loss subtracts")
    sigma_high: float = setting(24.0, "largest noise level that the scores are compared at, data units", above=0)
    p_mean: float = setting(-1.2, "of the fake score: mean of ln(sigma)")
    p_std: float = setting(1.2, "of the fake score: standard deviation of ln(sigma)", above=0)
    fakes: int = setting(4, "optimiser steps of the fake score before each of the student", least=1)
    share: float = setting(0.5, "share of samples that the student draws from noise alone", above=0, most=1)
    levels: tuple[float, ...] = setting(
        (0.3, 8.0), "the others are drawn from training samples with noise, log-uniform between these levels"
    )


@dataclass(frozen=True, kw_only=True)
class Pd:
    """Hyperparameters of pd: arXiv:2202.00512."""

    steps: int = setting(1, "steps of the student; its teacher takes two for each", least=1, most=MOST_SIGMAS)


@dataclass(frozen=True, kw_only=True)
class Scm:
    """Hyperparameters of sct and scd: arXiv:2410.11081, CIFAR-10."""

    p_mean: float = setting(-1.0, P_MEAN)
    p_std: float = setting(1.4, P_STD, above=0)
    warmup: float = setting(
        0.25, "opening fraction of the phase over which the tangent's unstable term grows", least=0, most=1
    )
    tangent_c: float = setting(0.1, "tangents are divided by their root mean square + this", above=0)
    adaptive: bool = setting(True, "learn a weight for each noise level")
    derivative: str = _derivative()


@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """Hyperparameters of mf: arXiv:2505.13447, CIFAR-10."""

    p_mean: float = setting(-0.4, P_MEAN)
    p_std: float = setting(1.0, P_STD, above=0)
    ratio: float = setting(0.25, "fraction of samples whose two times differ", least=0, most=1)
    power: float = setting(0.75, "the loss is divided by its own value to this power", least=0)
    velocity: str = setting("data", "of the derivative: the sample's, or the model's (iMF)", choices=("data", "model"))
    curriculum: float = setting(
        0.0,
        "opening fraction of the phase in which AlphaFlow's alpha falls from 1, flow matching, to 0",
        least=0,
        most=1,
    )
    derivative: str = _derivative()


def _distance(hyper: Ct | Cd | Ict | Ect | Cmt) -> Needs:
    return Needs(distance=hyper.loss, huber=hyper.huber)


def _grows(hyper: Ct | Cd | Ict) -> str:
    return "" if hyper.s0 <= hyper.s1 else f"s0 must be at most s1, got s0={hyper.s0}, s1={hyper.s1}"


def _averaged(hyper: Ct | Cd) -> str:
    if hyper.mu0 == 0 and hyper.mu == "adaptive":
        return "mu0=0 has no adaptive schedule; set mu=fixed as well"
    return _grows(hyper)


def _grid(hyper: Ct | Cd, done: int, steps: int) -> tuple[int]:
    """Return how many noise levels the grid has."""
    return (ct_scales(done, steps, hyper.s0, hyper.s1),)


def _scm_needs(hyper: Scm) -> Needs:
    return Needs(finite=hyper.derivative == "finite", log_variance=hyper.adaptive)


def _scm_warmup(hyper: Scm, done: int, steps: int) -> tuple[float]:
    return (tangent_warmup(done, steps, hyper.warmup),)


def _decay(hyper: Ct | Cd, done: int, steps: int) -> float:
    return hyper.mu0 if hyper.mu == "fixed" else ct_ema(done, steps, hyper.s0, hyper.s1, hyper.mu0)


def _in_stages(hyper: Ect) -> str:
    if len(hyper.stages) != 2 or not 0 <= hyper.stages[0] <= hyper.stages[1]:
        return f"stages must be first,last with 0 <= first <= last, got {hyper.stages}"
    if (hyper.stages[1] + 1) * math.log(hyper.q) > math.log(2.0**17):
        return (
            f"q^(last stage + 1), which divides the gap, must be at most 2^17; got q={hyper.q:g} and "
            f"last stage {hyper.stages[1]}"
        )
    return ""


def _between_levels(hyper: Sid, sigma_min: float, sigma_max: float) -> str:
    if len(hyper.levels) != 2 or not sigma_min <= hyper.levels[0] <= hyper.levels[1] <= sigma_max:
        return f"levels must be low,high from sigma_min={sigma_min:g} to sigma_max={sigma_max:g}, got {hyper.levels}"
    if not sigma_min < hyper.sigma_high <= sigma_max:
        return f"sigma_high must be above sigma_min={sigma_min:g}, at most {sigma_max:g}, got {hyper.sigma_high:g}"
    return ""


def _deterministic(spec: ModelSpec, hyper: Pd) -> ModelSpec:
    """Return the conventions after progressive distillation: the student takes DDIM's steps, at levels of its own."""
    sigmas = pd_sigmas(hyper.steps, spec.sigma_min, spec.sigma_max)
    return dataclasses.replace(spec, renoise="ddim", sigmas={hyper.steps: sigmas})


def _flow_map(spec: ModelSpec, hyper: MeanFlow) -> ModelSpec:
    """Return the conventions after MeanFlow: the model knows how to go to any lower noise level, not to 0 only."""
    return dataclasses.replace(spec, second_time=True)


def _halves(hyper: Pd, before: Pd) -> str:
    if before.steps == 2 * hyper.steps:
        return ""
    return f"halves the steps of pd/{2 * hyper.steps}, not of pd/{before.steps}"


# Consistency models hold the boundary condition; a diffusion model's scaling, which continuous-time methods and
# progressive distillation need, differs from it at noise levels around sigma_min only, so the weights serve both.
# The same for what latent consistency models do with networks of discrete times that predict the noise or v.
TO_BOUNDARY, FROM_BOUNDARY = {"edm": "boundary", "vp_eps": "lcm_eps", "vp_v": "lcm_v"}, {"boundary": "edm"}

_OURS: tuple[Method[Any], ...] = (
    Method(
        name="edm",
        paper="Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364",
        step="cmfast_train.methods.diffusion:edm",
        hyper=Edm,
        leaves="diffusion",
        one_evaluation=True,
    ),
    Method(
        name="ct",
        paper="Consistency Models, arXiv:2303.01469, Algorithm 3 (consistency training)",
        step="cmfast_train.methods.consistency:ct",
        hyper=Ct,
        defaults={"lr": 4e-4, "ema": 0.9999},
        from_scaling=TO_BOUNDARY,
        needs=_distance,
        constants=_grid,
        target_decay=_decay,
        check=_averaged,
    ),
    Method(
        name="cd",
        paper="Consistency Models, arXiv:2303.01469, Algorithm 2 (consistency distillation)",
        step="cmfast_train.methods.consistency:cd",
        hyper=Cd,
        defaults={"lr": 4e-4, "ema": 0.9999},
        from_scaling=TO_BOUNDARY,
        distils=("diffusion",),
        needs=_distance,
        constants=_grid,
        target_decay=_decay,
        check=_averaged,
    ),
    Method(
        name="cmt",
        paper="CMT: Mid-Training for Consistency, Mean Flow, and Flow Map Models, arXiv:2509.24526",
        step="cmfast_train.methods.midtraining:cmt",
        hyper=Cmt,
        defaults={"lr": 2e-4},
        from_scaling=TO_BOUNDARY,
        distils=("diffusion",),
        joint=True,
        needs=_distance,
    ),
    Method(
        name="ict",
        paper="Improved Techniques for Training Consistency Models, arXiv:2310.14189",
        step="cmfast_train.methods.consistency:ict",
        hyper=Ict,
        defaults={"lr": 1e-4, "ema": 0.9999},
        from_scaling=TO_BOUNDARY,
        needs=_distance,
        constants=lambda hyper, done, steps: (ict_scales(done, steps, hyper.s0, hyper.s1),),  # noise levels
        check=_grows,
        check_sigmas=lambda hyper, sigma_min, sigma_max: ict_law(hyper.p_mean, hyper.p_std, sigma_min, sigma_max),
    ),
    Method(
        name="ect",
        paper="Consistency Models Made Easy, arXiv:2406.14548",
        step="cmfast_train.methods.consistency:ect",
        hyper=Ect,
        defaults={"lr": 1e-4},
        from_scaling=TO_BOUNDARY,
        needs=_distance,
        constants=lambda hyper, done, steps: (ect_stage(done, steps, *hyper.stages),),
        check=_in_stages,
    ),
    Method(
        name="sid",
        paper="Score identity Distillation, arXiv:2404.04057",
        step="cmfast_train.methods.score_identity:sid",
        hyper=Sid,
        defaults={"lr": 1e-5},
        from_scaling=TO_BOUNDARY,
        distils=("diffusion",),
        joint=True,
        needs=lambda hyper: Needs(fake_scores=1 if hyper.share == 1 else 2, noises=2),
        constants=lambda hyper, done, steps: (done % (hyper.fakes + 1) == hyper.fakes,),  # the student's turn
        turns=lambda hyper: hyper.fakes + 1,
        least_steps=lambda hyper: hyper.fakes + 1,
        check_sigmas=_between_levels,
    ),
    Method(
        name="pd",
        paper="Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512",
        step="cmfast_train.methods.progressive:pd",
        hyper=Pd,
        defaults={"lr": 2e-4, "lr_decay": 1.0},
        leaves="deterministic",
        distils=("diffusion", "deterministic"),
        spec_after=_deterministic,
        check_after=_halves,
        numbered="steps",
        series=(8, 4, 2, 1),
    ),
    Method(
        name="sct",
        paper="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv:2410.11081, sCT",
        step="cmfast_train.methods.continuous:sct",
        hyper=Scm,
        defaults={"lr": 1e-4},
        scaling="trigflow",
        c_noise="trig",
        scalings=("trigflow", "edm"),
        from_scaling=FROM_BOUNDARY,
        differentiates=True,
        needs=_scm_needs,
        constants=_scm_warmup,
    ),
    Method(
        name="scd",
        paper="Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models, arXiv:2410.11081, sCD",
        step="cmfast_train.methods.continuous:scd",
        hyper=Scm,
        defaults={"lr": 1e-4},
        scaling="trigflow",
        c_noise="trig",
        scalings=("trigflow", "edm"),
        from_scaling=FROM_BOUNDARY,
        distils=("diffusion",),
        differentiates=True,
        needs=_scm_needs,
        constants=_scm_warmup,
    ),
    Method(
        name="mf",
        paper="Mean Flows for One-step Generative Modeling, arXiv:2505.13447",
        step="cmfast_train.methods.meanflow:mf",
        hyper=MeanFlow,
        defaults={"lr": 6e-4, "ema": 0.9999},
        scaling="flow",
        c_noise="flow",
        scalings=("flow",),
        c_noises=("flow", "trig", "raw"),  # finite at r = 0
        second_time=True,
        spec_after=_flow_map,
        differentiates=True,
        constants=lambda hyper, done, steps: (alpha_of(done, steps, hyper.curriculum),),
        needs=lambda hyper: Needs(finite=hyper.derivative == "finite"),
    ),
)
ROWS.update({row.name: row for row in _OURS})
