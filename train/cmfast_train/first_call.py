# SPDX-License-Identifier: MIT
"""A first call of a custom network: what is wrong with it is one line, before a run begins."""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from cmfast.conditions import Condition
from cmfast.errors import CmfastError, one_line
from cmfast.spec import ModelSpec
from cmfast_train.config.train_config import ARRAYS, TrainConfig
from cmfast_train.data.images import in_data_units
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.custom import OwnConfig
from cmfast_train.training.initial_model import Own
from cmfast_train.training.parallel import jvp

_OTHERS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))  # whose frames are not of the user's code


def try_own(config: TrainConfig, own: Own, first: Mapping[str, Tensor], accelerator: Accelerator) -> None:
    """Check that custom denoisers fit the data of a run, and that they can be called and trained.

    Args:
        config: of the run.
        own: the denoisers; copies of them are called.
        first: the first training samples, "x", and their conditions.
        accelerator: processes and device.

    Raises:
        CmfastError: the data are others, or a network cannot be called with them, or not be trained.
    """
    device = accelerator.device
    few = {name: values[:2].to(device) for name, values in first.items()}
    few["x"] = in_data_units(few["x"])
    one = config.batch == accelerator.num_processes * config.accumulation  # sample in each micro-batch
    batch = {name: values[:1] if one else torch.cat([values, values])[:2] for name, values in few.items()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for denoiser in filter(None, (own.teacher, own.denoiser)):
            _check_parts(denoiser.network)
            _check_data(config, denoiser.spec, first)
            copied = _copied(denoiser, device).eval()
            with accelerator.autocast():  # some networks take half precision only
                output = _output(copied, few)
                for each in denoiser.spec.conditions:
                    for value in _extremes(each):  # a table of classes may be too small for them
                        changed = {**few, each.name: torch.full_like(few[each.name], value)}
                        _output(copied, changed, f" full of {value:g}", of=each.name)
        with accelerator.autocast():  # a BatchNorm computes otherwise in training, and needs more than one sample
            _output(_copied(own.denoiser, device).train(), batch, f", in training mode, B={len(batch['x'])}")
        _check_gradients(copied, output, accelerator.num_processes)
        for phase in config.phases:
            if phase.row.differentiates and not phase.needs.finite:
                with accelerator.autocast():
                    _check_derivative(copied, few, phase.method)


def _check_parts(network: nn.Module) -> None:
    """Raise CmfastError unless a network consists of what can be copied, saved and trained."""
    name = type(network).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise CmfastError(f"{name}: a module of TorchScript cannot be trained; pass the module that it was made from")
    if hasattr(network, "_orig_mod"):
        raise CmfastError("the network is compiled by torch.compile: pass the module itself, and set compile=true")
    for key, value in (*network.named_parameters(), *network.named_buffers()):
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)) or value.is_meta:
            raise CmfastError(
                f"{name}: {key} has no values yet; call the network once, or load its weights, before wrap"
            )
    for key, value in network.state_dict().items():
        if not isinstance(value, Tensor) or value.is_complex() or value.is_quantized or value.layout != torch.strided:
            what = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise CmfastError(f"{name}: its state dict holds {key}, {what}; checkpoints hold plain tensors of numbers")


def _check_data(config: TrainConfig, spec: ModelSpec, first: Mapping[str, Tensor]) -> None:
    """Raise CmfastError unless the samples and the conditions that a denoiser takes are there."""
    have = list(first["x"].shape[1:])
    if have != list(spec.shape) or (config.data != ARRAYS and spec.data != "image"):
        raise CmfastError(
            f"the data of {config.data} are {have}, and the denoiser is a model of "
            f"{'images' if spec.data == 'image' else 'arrays'} {list(spec.shape)}"
        )
    if missing := [each.name for each in spec.conditions if each.name not in first]:
        raise CmfastError(f"the denoiser takes {missing[0]}, which the data of {config.data} do not hold")


def _copied(denoiser: Denoiser, device: torch.device) -> Denoiser:
    return Denoiser(OwnConfig(module=denoiser.network).build(), denoiser.spec).to(device)


def _extremes(condition: Condition) -> list[float]:
    """Return values of a condition that training or guidance will use, but the first samples may not have."""
    last = [condition.classes - 1] if condition.kind == "class" else []
    return [*last, *([] if condition.null is None else [condition.null])]


def _output(denoiser: Denoiser, few: Mapping[str, Tensor], how: str = "", *, of: str = "") -> Tensor:
    """Return the output of the network for some samples and their conditions.

    Args:
        denoiser: it is called.
        few: the samples, "x", and their conditions.
        how: what errors say about the call, at its end or behind the condition `of`.
        of: the name of a condition.
    """
    x, name = few["x"], type(denoiser.network).__name__
    given = {each.name: few[each.name] for each in denoiser.spec.conditions}
    passed = {key: value.clone() for key, value in given.items()}
    try:
        output = denoiser.output(x, torch.ones(len(x), device=x.device), passed)
        if x.is_cuda:
            torch.cuda.synchronize()  # for errors of its kernels
    except CmfastError as err:
        raise CmfastError(f"{name}: {err}") from None
    except Exception as err:  # of the user's code
        frames = [f for f in traceback.extract_tb(err.__traceback__) if not f.filename.startswith(_OTHERS)]
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        second = ", c_noise_next [B]" if denoiser.spec.second_time else ""
        words = "".join(f", {key}={_in_words(value)}{how if key == of else ''}" for key, value in given.items())
        words += "" if of else how
        raise CmfastError(
            f"{name}, called with x {_in_words(x)}, c_noise [B]{second}{words}, raised {type(err).__name__}: "
            f"{one_line(err, 200)}{place}"
        ) from err
    if len(output) != len(x):  # which would be broadcast without a word
        raise CmfastError(
            f"{name} returned {list(output.shape)} for {_in_words(x)} of B={len(x)}; it must return B samples"
        )
    if changed := [key for key, value in given.items() if not torch.equal(value, passed[key])]:
        raise CmfastError(f"{name} changes its condition {changed[0]} in place; let it compute on a copy")
    return output


def _check_gradients(denoiser: Denoiser, output: Tensor, processes: int) -> None:
    """Raise CmfastError unless training can change weights; of several processes all that are to be trained."""
    name = type(denoiser.network).__name__
    if not output.requires_grad:
        raise CmfastError(
            f"{name}: its output depends on no weight that requires a gradient: denoiser.requires_grad_(True)"
        )
    if processes == 1:
        return
    output.float().sum().backward()
    unused = [
        key for key, weight in denoiser.network.named_parameters() if weight.requires_grad and weight.grad is None
    ]
    if unused:  # for which the exchange of gradients would wait
        raise CmfastError(
            f"{name}: the weight {unused[0]} does not take part, which several processes need: remove it, or "
            "requires_grad_(False)"
        )


def _check_derivative(denoiser: Denoiser, few: Mapping[str, Tensor], method: str) -> None:
    """Raise CmfastError unless the network has forward-mode derivatives."""

    def output(x: Tensor, sigma: Tensor) -> Tensor:
        given = {each.name: few[each.name] for each in denoiser.spec.conditions}
        return denoiser.output(x, sigma, given)

    x, sigma = few["x"], torch.ones(len(few["x"]), device=few["x"].device)
    try:
        jvp(output, (x, sigma), (x, sigma))
    except Exception as err:  # an operator without one, or the user's
        raise CmfastError(
            f"{method} differentiates {type(denoiser.network).__name__} in forward mode, which fails: "
            f"{one_line(err, 200)}; central differences need no derivative: {method}.derivative=finite"
        ) from err


def _in_words(values: Tensor) -> str:
    return f"[{', '.join(map(str, ('B', *values.shape[1:])))}]"
