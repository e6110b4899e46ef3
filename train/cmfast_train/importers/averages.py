# SPDX-License-Identifier: MIT
"""Averages of weights that stand in a file without their names, and the counters beside them.

torch-ema, score_sde and diffusers' EMAModel keep a list, `shadow_params`, in the order of `module.parameters()`;
latent diffusion's LitEma keeps names without dots. Both get their names from the raw weights in the same file, or
stay unread: a wrong order could have the right shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]

OPTIMIZER = "optim"  # how the keys of an optimizer's state begin
COUNTERS = frozenset({  # scalars beside weights: of AveragedModel, LitEma, lucidrains' EMA, batch norms
    "n_averaged", "num_updates", "initted", "step", "steps", "global_step", "num_batches_tracked", "decay", "epoch",
    "iteration", "iterations", "optimization_step", "update_after_step", "ema_decay", "_step", "num_steps",
})  # fmt: skip
BUFFERS = ("resample_filter", "map_noise.freqs", "running_mean", "running_var", "num_batches_tracked")
_AVERAGED = (r"(?<![a-z])ema", "shadow", r"(?<![a-z])swa", "averag")  # in the place of an average, the usual first
_BETTER = (*_AVERAGED, r"(?<![a-z])target", r"(?<![a-z])best")  # a consistency model's target is an average too
AVERAGES = frozenset({"swa_buffer", "ema", "ema_params", "ax", "shadow", "shadow_params"})  # of one parameter


def is_average(name: str) -> bool:
    """Whether what stands under this name calls itself an average."""
    return any(re.search(word, name, re.IGNORECASE) for word in _AVERAGED)


def advised(sets: Mapping[str, Weights]) -> str:
    """Return the name of the set that most users want: an average, a target, the best, then the one of most tensors."""

    def rank(name: str) -> tuple[int, int]:
        found = (n for n, word in enumerate(_BETTER) if re.search(word, name, re.IGNORECASE))
        return next(found, len(_BETTER)), -len(sets[name])

    return min(sets, key=rank)


def named(tensors: Sequence[Tensor], sets: Mapping[str, Weights]) -> Weights | None:
    """Return a list in the order of the parameters as a state dict with a set's names and buffers, or None.

    A state dict has parameters in that order too, with buffers in between. A set counts only if the number and every
    shape agree one to one, and if its names are not sorted, for then their order is no module's. Sets that fit must
    agree about the names.
    """
    found: Weights | None = None
    names: list[str] = []
    for weights in sets.values():
        keys = parameters(weights)
        fits = len(keys) == len(tensors) and all(
            weights[key].shape == tensor.shape for key, tensor in zip(keys, tensors, strict=True)
        )
        if not fits:
            continue
        if keys == sorted(keys) and len({tuple(t.shape) for t in tensors}) < len(tensors):
            return None
        if found is None:
            found, names = {**weights, **dict(zip(keys, tensors, strict=True))}, keys
        elif keys != names:
            return None
    return found


def parameters(weights: Weights) -> list[str]:
    """Return the names of the parameters of a state dict, without its buffers, in their order."""
    return [key for key, tensor in weights.items() if not key.endswith(BUFFERS) and tensor.is_floating_point()]


def of_undotted(sets: Mapping[str, Weights]) -> dict[str, Weights]:
    """Return the sets, those of latent diffusion's LitEma (names without dots) with the names of the raw weights."""
    found = dict(sets)
    for name, weights in sets.items():
        if "ema" not in name or any("." in key for key in weights):
            continue
        for raw in sets.values():
            dotted = {key.replace(".", ""): key for key in raw}
            if raw is not weights and len(dotted) == len(raw) and any("." in key for key in raw):
                # LitEma averages below the attribute "model", whose own name its keys begin with.
                keys = {key: next((dotted[k] for k in _tails(key) if k in dotted), "") for key in weights}
                if all(keys.values()) and len(set(keys.values())) == len(weights):
                    found[name] = {**raw, **{keys[key]: tensor for key, tensor in weights.items()}}
                    break
    return found


def _tails(key: str) -> tuple[str, ...]:
    return (key, key.removeprefix("model"), key.removeprefix("diffusion_model"))


def average_in_optimizer(content: Any) -> str:
    """Return where an optimizer's state has an average of each parameter, or ""."""
    for path, one in _optimizers(content):
        states = one.get("state")
        if isinstance(states, Mapping):
            for state in list(states.values())[:1]:
                if isinstance(state, Mapping):
                    for key, value in list(state.items())[:100]:
                        if isinstance(key, str) and key in AVERAGES and isinstance(value, Tensor):
                            return f"{path}.state.{key}"
    return ""


def is_optimizer(content: Any) -> bool:
    """Whether this is what an optimizer's state_dict returns, whatever key it stands under."""
    return (
        isinstance(content, Mapping) and "state" in content and isinstance(content.get("param_groups"), (list, tuple))
    )


def _optimizers(content: Any) -> list[tuple[str, Mapping[Any, Any]]]:
    if not isinstance(content, Mapping):
        return []
    return [
        (key, value)
        for key, value in list(content.items())[:1000]
        if isinstance(key, str) and isinstance(value, Mapping) and (key.startswith(OPTIMIZER) or is_optimizer(value))
    ]
