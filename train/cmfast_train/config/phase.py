# SPDX-License-Identifier: MIT
"""One phase of a training run: its method, its length, its hyperparameters, and their usual values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cmfast.errors import CmfastError
from cmfast_train.config.checks import check_types, shown

METHODS = ("edm", "ct", "cd", "ict", "ect", "pd", "sct", "scd", "mf")  # cmfast_train.methods.objectives
DISTILL = ("cd", "pd", "scd")  # of them, those with a teacher
CONTINUOUS = ("sct", "scd")  # of them, those that differentiate along the path

MOST_LEVELS = 65536  # noise levels of ct, cd, ict, and steps of pd: each optimiser step makes them all


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training with one method. The network of a phase starts from the previous phase's EMA."""

    method: str  # one of METHODS
    images: int  # length, counted in images
    lr: float = 1e-3  # learning rate of RAdam
    lr_warmup: float = 0.0  # opening fraction of the phase over which lr rises linearly from 0
    lr_decay: float = 0.0  # closing fraction of the phase over which lr falls linearly to 0
    ema: float = 0.999  # decay of the EMA weights, per optimiser step
    clip_norm: float = 0.0  # the gradient is scaled down to this norm; 0: never
    # noise levels
    p_mean: float = -1.2  # edm, ict, ect, sct, scd, mf: mean of ln(sigma)
    p_std: float = 1.2  # edm, ict, ect, sct, scd, mf: standard deviation of ln(sigma)
    s0: int = 2  # ct, cd, ict: noise levels at the start
    s1: int = 150  # ct, cd, ict: noise levels at the end; of ct and cd, s0 = s1 keeps their number
    q: float = 2.0  # ect: each stage divides the gap t - r by this
    k: float = 8.0  # ect: how much wider the gap is at small t
    b: float = 1.0  # ect: how fast that fades with t
    stages: tuple[int, int] = (0, 7)  # ect: first and last stage, passed through evenly
    steps: int = 1  # pd: steps of the student; its teacher takes two for each
    ratio: float = 0.25  # mf: fraction of images whose two times differ
    # losses and targets
    loss: str = "huber"  # ct, cd, ict, ect: l1, l2 (squared), huber or lpips
    huber: float = 0.00054  # Pseudo-Huber constant over sqrt(values of an image), data units; 0 is the l2 norm
    mu: str = "adaptive"  # ct, cd: the target's decay is mu(k) of the paper, or fixed
    mu0: float = 0.9  # ct, cd: decay of the target at the start, or throughout; 0: the target is the model itself
    solver: str = "heun"  # cd: the teacher's step, heun or euler
    warmup: float = 0.25  # sct, scd: opening fraction of the phase over which the unstable term of the tangent grows
    tangent_c: float = 0.1  # sct, scd: tangents are divided by their root mean square + this
    adaptive: bool = True  # sct, scd: learn a weight for each noise level
    derivative: str = "jvp"  # sct, scd, mf: forward-mode, or finite (central differences)
    power: float = 1.0  # mf: the loss is divided by its own value to this power

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CmfastError(f"method must be one of {', '.join(METHODS)}, got {shown(self.method)}")
        check_types(self, f"{self.method}.")
        for name in ("s0", "s1", "steps"):
            if getattr(self, name) > MOST_LEVELS:
                raise CmfastError(f"{self.method}.{name} must be at most {MOST_LEVELS:,}, got {getattr(self, name):,}")
        check_positive(self, "images", "lr", "p_std", "s0", "s1", "tangent_c")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise CmfastError(f"{self.method}.{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("huber", "clip_norm", "power"):
            if not getattr(self, name) >= 0:
                raise CmfastError(f"{self.method}.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("ema", "mu0"):
            if not 0 <= getattr(self, name) < 1:
                raise CmfastError(f"{self.method}.{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("lr_warmup", "lr_decay", "warmup", "ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise CmfastError(f"{self.method}.{name} is a fraction from 0 to 1, got {getattr(self, name)}")
        if len(self.stages) != 2 or not 0 <= self.stages[0] <= self.stages[1]:
            raise CmfastError(f"{self.method}.stages must be first,last with 0 <= first <= last, got {self.stages}")
        if not (self.q > 1 and (self.stages[1] + 1) * math.log(self.q) <= math.log(2.0**17)):
            raise CmfastError(
                f"{self.method}.q must be above 1, and q^(last stage + 1), which divides the gap, at most 2^17; got "
                f"q={self.q:g} and last stage {self.stages[1]}"
            )
        if not 2 <= self.s0 <= self.s1:
            raise CmfastError(f"need 2 <= s0 <= s1, got s0={self.s0}, s1={self.s1}")
        if self.mu0 == 0 and self.mu == "adaptive":
            raise CmfastError(f"{self.method}.mu0=0 has no adaptive schedule; add --set {self.method}.mu=fixed")
        if self.steps < 1:
            raise CmfastError(f"{self.method}.steps must be at least 1, got {self.steps}")

    @property
    def name(self) -> str:
        """The phase as --set phases writes it, without its length: ect, pd/4."""
        return f"pd/{self.steps}" if self.method == "pd" else self.method


_CHOICES = {
    "loss": ("l1", "l2", "huber", "lpips"),
    "mu": ("adaptive", "fixed"),
    "solver": ("heun", "euler"),
    "derivative": ("jvp", "finite"),
}

PHASE_DEFAULTS: dict[str, dict[str, Any]] = {  # what `--set phases=METHOD:IMAGES` starts from
    "edm": {"p_mean": -1.2, "p_std": 1.2},  # EDM, Table 1
    "ct": {"lr": 4e-4, "ema": 0.9999, "loss": "l2"},  # arXiv:2303.01469, CIFAR-10
    "cd": {"lr": 4e-4, "ema": 0.9999, "loss": "l2", "s0": 18, "s1": 18, "mu": "fixed", "mu0": 0.0},  # the same
    "ict": {"p_mean": -1.1, "p_std": 2.0, "lr": 1e-4, "ema": 0.9999, "s0": 10, "s1": 1280},  # arXiv:2310.14189
    "ect": {"p_mean": -1.1, "p_std": 2.0, "lr": 1e-4},  # ECT, CIFAR-10
    "pd": {"lr": 2e-4, "lr_decay": 1.0},  # arXiv:2202.00512
    "sct": {"p_mean": -1.0, "p_std": 1.4, "lr": 1e-4},  # arXiv:2410.11081, CIFAR-10
    "scd": {"p_mean": -1.0, "p_std": 1.4, "lr": 1e-4},
    "mf": {"p_mean": -0.4, "p_std": 1.0, "lr": 6e-4, "ema": 0.9999, "power": 0.75},  # arXiv:2505.13447, CIFAR-10
}
PD_STEPS = (8, 4, 2, 1)  # the phases that `phases=pd:IMAGES` stands for, of equal length


def check_positive(owner: Any, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise CmfastError(f"{name} must be greater than 0, got {getattr(owner, name)}")
