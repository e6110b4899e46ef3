# SPDX-License-Identifier: MIT
"""A custom model: any `torch.nn.Module` as a `Denoiser`, which trains, exports and samples like ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmfast.conditions import Condition
from cmfast.errors import CmfastError, shown
from cmfast.schedule import DiscreteTimes
from cmfast.spec import ModelSpec
from cmfast_train.denoiser import Denoiser

Declared = int | Sequence[int | str | None] | Condition  # a condition as `wrap` takes it


def wrap(
    net: nn.Module,
    *,
    shape: Sequence[int],
    scaling: str,
    c_noise: str,
    conditions: Mapping[str, Declared] | None = None,
    null: Mapping[str, float] | None = None,
    encoders: Mapping[str, nn.Module] | None = None,
    times: DiscreteTimes | Mapping[str, Any] | None = None,
    data: str = "auto",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    renoise: str = "sqrt",
    clip: bool | None = None,
    sigmas: Mapping[int, Sequence[float]] | None = None,
    second_time: bool = False,
) -> Denoiser:
    """Return the denoiser f(x, sigma, **conditions) = c_skip x + c_out net(c_in x, c_noise, **conditions).

    The weights are shared with `net`, which is neither copied nor changed. Formulas: `cmfast.preconditioning`.

    Args:
        net: called as net(x, c_noise, **conditions): x [B, *shape] float32, c_noise [B] float32, a class int64 [B], a
            tensor float32 [B, *sizes]; returns [B, *shape]. With `second_time` it also gets c_noise_next [B].
        shape: of a sample, one to four axes: [C, H, W] images, [C, T] signals, [T, A] actions, [C, D, H, W] volumes.
        scaling: c_skip, c_out and c_in, one of `cmfast.spec.SCALINGS`. Weights do not tell, so there is no default.
        c_noise: how the network is given the noise level, one of `cmfast.spec.C_NOISES`.
        conditions: name: number of classes, or sizes of a tensor without the batch; None, or a name that several
            share, is a size that differs from call to call.
        null: name of a condition: what stands for no condition, as in guidance: a class, which may be one
            more than there are, or the number that fills a tensor.
        encoders: name of a condition: module that encodes it; `net` is given its output. A sampler graph evaluates it
            once, not once a step.
        times: of c_noise "discrete" and the scalings of LCM: the table of times, as in
            {"schedule": "linear", "steps": 1000, "beta_start": 1e-4, "beta_end": 0.02}.
        data: image or array; auto: images where the shape is (1 or 3, H, W).
        sigma_min: noise level where the model is the identity, data units.
        sigma_max: noise level where sampling starts, data units.
        sigma_data: standard deviation of the data, data units.
        renoise: how a step goes on, one of `cmfast.spec.RENOISES`; ddim for flow maps and distilled DDIM.
        clip: whether x0 is clipped to [-1, 1] after every call; None: of images it is.
        sigmas: default noise levels by number of steps, data units, decreasing; None: one step, at sigma_max.
        second_time: whether the network takes a second noise level: CTM, MeanFlow, shortcut models.

    Returns:
        The denoiser, a module that shares the weights.

    Raises:
        CmfastError: a convention is unknown, a condition cannot be one, or the weights are not float32.
    """
    if not isinstance(net, nn.Module):
        raise CmfastError(f"net must be a torch.nn.Module, got {shown(net)}")
    if any(isinstance(module, Denoiser) for each in (net, *_modules(encoders)) for module in each.modules()):
        raise CmfastError("net must be a plain network, and a Denoiser is one with its scalings; pass denoiser.network")
    if not isinstance(shape, (list, tuple)):
        raise CmfastError(f"shape must be a list of sizes such as (16, 7), got {shown(shape)}")
    for name, mapping in (("conditions", conditions), ("null", null), ("encoders", encoders)):
        if not isinstance(mapping or {}, Mapping):
            raise CmfastError(f"{name} must be passed by name, such as {{'state': ..}}, got {shown(mapping)}")
    defaults: Any = {1: (_plain(sigma_max),)} if sigmas is None else sigmas  # checked by ModelSpec
    if isinstance(defaults, Mapping):
        defaults = {_plain(steps): _plain(s) for steps, s in defaults.items()}
    named = {name: _condition(name, _plain(what)) for name, what in (conditions or {}).items()}
    for name, value in (null or {}).items():
        if name not in named:
            raise CmfastError(f"null has {shown(name)}, and the conditions are {', '.join(named) or 'none'}")
        named[name] = replace(named[name], null=_plain(value))
    declared = tuple(named.values())
    if isinstance(times, Mapping):
        times = discrete_times(times)
    spec = ModelSpec(
        shape=_plain(shape), data=data, conditions=declared, second_time=second_time, sigma_min=_plain(sigma_min),
        sigma_max=_plain(sigma_max), sigma_data=_plain(sigma_data), scaling=scaling, c_noise=c_noise, times=times,
        renoise=renoise, clip=True if clip is None else clip, sigmas=defaults,
    )  # fmt: skip
    if clip is None:
        spec = replace(spec, clip=spec.data == "image")
    for name, encoder in (encoders or {}).items():
        if name not in {each.name for each in declared} or not isinstance(encoder, nn.Module):
            raise CmfastError(f"encoders are {{condition: torch.nn.Module}}, got {shown({name: encoder})}")
    network = Encoded(net, encoders) if encoders else net
    check_float32(network)
    return Denoiser(network, spec)


def _modules(encoders: Any) -> list[nn.Module]:
    values = encoders.values() if isinstance(encoders, Mapping) else ()
    return [each for each in values if isinstance(each, nn.Module)]


def discrete_times(values: Mapping[str, Any]) -> DiscreteTimes:
    """Return the table of times that a mapping describes."""
    names = [each.name for each in fields(DiscreteTimes)]
    if unknown := [name for name in values if name not in names]:
        raise CmfastError(f"times has no {shown(unknown[0])}; there are {', '.join(names)}")
    return DiscreteTimes(**values)


class Encoded(nn.Module):
    """A network some of whose conditions are encoded first."""

    def __init__(self, net: nn.Module, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.net = net
        # Not by their own names: a ModuleDict has methods, and refuses modules called like them.
        self.encoders = nn.ModuleDict({f"{name}_encoder": module for name, module in encoders.items()})
        self.names = tuple(encoders)

    def forward(self, x: Tensor, c_noise: Tensor, **inputs: Tensor) -> Tensor:
        encoded = {name: self.encoders[f"{name}_encoder"](inputs[name]) for name in self.names}
        output: Tensor = self.net(x, c_noise, **{**inputs, **encoded})
        return output


def _plain(value: Any) -> Any:
    """Return scalars of numpy and PyTorch as Python's numbers, and lists and arrays of them as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in value)
    return _plain(value.tolist()) if isinstance(value, (np.generic, np.ndarray, Tensor)) else value


def check_float32(network: nn.Module) -> None:
    """Raise CmfastError where a floating-point weight is not float32."""
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise CmfastError(
                f"the weight {name} is {weight.dtype}; pass net.float(): half precision is made by the export"
            )


def _condition(name: str, what: Declared) -> Condition:
    if isinstance(what, Condition):
        if what.name != name:
            raise CmfastError(f"the condition {shown(name)} is called {shown(what.name)} in its Condition")
        return what
    if isinstance(what, bool) or not isinstance(what, (int, tuple, list)):
        raise CmfastError(
            f"condition {shown(name)}: need a number of classes, or the sizes of a tensor such as (14,) or (None, 64), "
            f"got {shown(what)}"
        )
    if isinstance(what, int):
        return Condition(name=name, kind="class", classes=what)
    return Condition(name=name, kind="tensor", shape=tuple(what))
