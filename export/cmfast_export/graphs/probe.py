# SPDX-License-Identifier: MIT
"""A user's network, run by itself before it is traced: is it a function of one sample at a time?

A graph that computes what PyTorch computed is no use where that depends on the other samples of the batch, on random
numbers or on the calls before. None of that can be seen in the graph's agreement with PyTorch: both do the same.
`trace` follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmfast.conditions import some_values
from cmfast.errors import CheckFailed, CmfastError
from cmfast.spec import ModelSpec
from cmfast_export.graphs.places import failed, in_words, module_that_fails
from cmfast_train.denoiser import Denoiser
from cmfast_train.wrapping import check_float32

# Of the largest output: what another batch size may change, because sums are made in another order. Seen: 1e-6.
SAME = 1e-4
LEAST = 1e-2  # of the network's output, which is of the order of 1: below it is what rounding leaves of a zero
LARGE = 4 * 128 * 128  # numbers of a sample, from which on two samples have to do

Inputs = Mapping[str, Tensor]


def check_module(denoiser: Denoiser) -> None:
    """Raise CmfastError where a denoiser's modules cannot be copied or hold no values, before anything is run."""
    for name, module in denoiser.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CmfastError(
                f"{name} is TorchScript, which cannot be exported; pass the torch.nn.Module it comes from"
            )
        # Its weight is computed by a hook, and no leaf: no such module can be copied.
        if any(type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values()):
            raise CmfastError(
                f"{in_words(name, module)} has torch.nn.utils.weight_norm, which cannot be copied; use "
                "torch.nn.utils.parametrizations.weight_norm, or torch.nn.utils.remove_weight_norm(module)"
            )
    for name, weight in (*denoiser.named_parameters(), *denoiser.named_buffers()):
        if weight.is_meta:
            raise CmfastError(
                f"the weight {name} is on the meta device, so it has no values; load the weights first: "
                "net.load_state_dict(weights, assign=True)"
            )
    check_float32(denoiser)


def check_network(
    denoiser: Denoiser, batch: int | None = None, null: Mapping[str, float] | None = None
) -> CmfastError | None:
    """Run a network on a batch, on the same batch with other samples in it, and on one sample alone.

    Args:
        denoiser: a copy to evaluate.
        batch: the only batch size that it will be given; None: any.
        null: what stands for no condition, by name, where guidance evaluates the network so.

    Returns:
        The error for a network that takes a batch of 2 and no other: its trace, of a batch of 2, can say what fixed it.

    Raises:
        CmfastError: it fails, it mixes the samples of a batch, it is no function of its inputs, or it does not return
            float32; the line says how far off and names the module.
        CheckFailed: it returns NaN or infinity.
    """
    b = batch or (3 if math.prod(denoiser.spec.shape) <= LARGE else 2)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        one = _inputs(denoiser.spec, b, 0)
        where, err = _failure(denoiser, one)
        if err is not None:
            if batch is None and _failure(denoiser, _inputs(denoiser.spec, 2, 0))[1] is None:
                return failed(where, err, f" at a batch of {b}")
            raise failed(where, err) from None
        _check(denoiser, b, alone=batch is None)
        if null:
            where, err = _failure(denoiser, one | {name: torch.full_like(one[name], null[name]) for name in null})
            if err is not None:
                without = ", ".join(f"{name}={value:g}" for name, value in null.items())
                raise failed(where, err, f" without conditions, {without}, which guidance needs,") from None
    return None


def _check(denoiser: Denoiser, b: int, *, alone: bool) -> None:
    spec = denoiser.spec
    one, other = _inputs(spec, b, 0), _inputs(spec, b, 1)
    buffers = {name: buffer.clone() for name, buffer in denoiser.named_buffers()}
    whole = _run(denoiser, one)
    if whole.dtype != torch.float32:
        raise CmfastError(
            f"the network returned {str(whole.dtype).removeprefix('torch.')}, and must return float32: end its forward "
            "with .float(); half precision is made by the export"
        )
    if not whole.isfinite().all():
        rows = (~whole.isfinite()).flatten(1).any(1)
        levels = ", ".join(f"{sigma:g}" for sigma in one["sigma"][rows].tolist())
        raise CheckFailed(
            f"the network returned NaN or infinity in PyTorch, at noise level {levels}; no file was written"
        )
    scale = max(float(whole.abs().max()), LEAST)

    def differs(got: Tensor, row: int) -> float:
        return float((got - whole[row]).abs().max())

    for kept in (0, b - 1):  # the first and the last sample stay, all others are replaced
        mixed = {
            name: torch.cat([other[name][:kept], v[kept : kept + 1], other[name][kept + 1 :]])
            for name, v in one.items()
        }
        far = differs(_run(denoiser, mixed)[kept], kept)
        if not far <= SAME * scale:
            again = float((_run(denoiser, one) - whole).abs().max())
            if not again <= SAME * scale:
                raise _no_function(denoiser, buffers, again, scale)
            where = _first_difference(denoiser, one, mixed, kept)
            raise _mixes(
                f"sample {kept} of {b} changes by {far:.1e}, of values up to {scale:.1e}, when the others do", where
            )
    if not alone:
        return
    last = {name: value[b - 1 :] for name, value in one.items()}
    where, err = _failure(denoiser, last)
    if err is not None:
        raise failed(where, err, " at a batch of 1") from None
    far = differs(_run(denoiser, last)[0], b - 1)
    if not far <= SAME * scale:
        raise _mixes(f"sample {b - 1} of {b} is off by {far:.1e}, of values up to {scale:.1e}, when it is alone", "")


def _mixes(seen: str, where: str) -> CmfastError:
    return CmfastError(
        f"the network mixes the samples of a batch: {seen}{where}; compute over the axes of one sample only, not over "
        "axis 0 (a BatchNorm without running statistics, a mean or attention over the batch, a reshape that joins it)"
    )


def _no_function(denoiser: Denoiser, before: Mapping[str, Tensor], far: float, scale: float) -> CmfastError:
    """Return the error for a network that gives another result for the same inputs, with what is likely the cause."""
    changed = [name for name, buffer in denoiser.named_buffers() if not torch.equal(buffer, before[name])]
    training = [in_words(name, module) for name, module in denoiser.named_modules() if module.training]
    cause = (
        f"it changes its buffer {changed[0]}" if changed
        else f"{training[-1]} stays in training mode after eval()" if training
        else "it draws random numbers, as dropout does, or depends on the calls before"
    )  # fmt: skip
    return CmfastError(
        f"the network gives another result for the same inputs, {far:.1e} off, of values up to {scale:.1e}: {cause}; a "
        "graph is a function of its inputs"
    )


def _inputs(spec: ModelSpec, b: int, seed: int) -> dict[str, Tensor]:
    """Return inputs of b samples, noise levels from sigma_min to sigma_max among them."""
    rng = np.random.default_rng(seed)
    sigma = np.geomspace(spec.sigma_max, spec.sigma_min, b + 1)[seed : seed + b].astype(np.float32)
    clean = rng.uniform(-1, 1, (b, *spec.shape)).astype(np.float32)
    noise = rng.standard_normal(clean.shape, dtype=np.float32)
    arrays = {"x": clean + sigma.reshape(-1, *[1] * len(spec.shape)) * noise, "sigma": sigma}
    if spec.second_time:
        arrays["sigma_next"] = sigma / 2
    arrays |= some_values(spec.conditions, b, seed=seed)
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def _failure(denoiser: Denoiser, inputs: Inputs) -> tuple[str, Exception | None]:
    return module_that_fails(denoiser, lambda: _run(denoiser, inputs))


def _run(denoiser: Denoiser, inputs: Inputs) -> Tensor:
    """Return F(c_in x, c_noise, **conditions), of copies: a network may change what it is given."""
    given = {name: value.clone() for name, value in inputs.items()}
    x, sigma, sigma_next = given.pop("x"), given.pop("sigma"), given.pop("sigma_next", None)
    output = denoiser.output(x, sigma, given, sigma_next)
    if len(output) != len(x):
        raise CmfastError(
            f"the network returned {list(output.shape)} for a batch of {len(x)}, and must return as many samples; "
            "compute over the axes of one sample only, not over axis 0"
        )
    if changed := [name for name, value in given.items() if not torch.equal(value, inputs[name])]:
        raise CmfastError(
            f"the network changes the condition {changed[0]} in place, which the next step needs; change a copy: "
            f"{changed[0]} = {changed[0]}.clone()"
        )
    return output


@dataclass(frozen=True, kw_only=True)
class _Passed:
    """What went into a module, or came out of it, of one sample."""

    module: str
    out: bool
    tensors: list[Tensor]


def _first_difference(denoiser: Denoiser, one: Inputs, mixed: Inputs, row: int) -> str:
    """Return the module where one sample first differs in two batches, in words; "" if no module shows it."""
    a, b = (_passed(denoiser, inputs, row) for inputs in (one, mixed))
    for before, after in zip(a, b, strict=False):
        pairs = list(zip(before.tensors, after.tensors, strict=False))
        if any(_unlike(*pair) for pair in pairs):
            return f", first in {before.module}" if before.out else f", first before {before.module}"
    return ""


def _unlike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return not torch.equal(a, b)
    return bool((a - b).abs().max() > SAME * a.abs().max()) if a.numel() else False


def _passed(denoiser: Denoiser, inputs: Inputs, row: int) -> list[_Passed]:
    """Return what goes into and out of the modules of a network, in order, of one sample of a batch."""
    b, found = len(inputs["x"]), list[_Passed]()

    def note(name: str, module: nn.Module, *, out: bool) -> Callable[..., None]:
        def hook(_: nn.Module, *values: Any) -> None:
            tensors = [t[row].clone() for t in _tensors(values[-1:]) if t.ndim and len(t) == b]
            found.append(_Passed(module=in_words(name, module), out=out, tensors=tensors))

        return hook

    handles = [
        handle
        for name, module in denoiser.named_modules()
        if name
        for handle in (
            module.register_forward_pre_hook(note(name, module, out=False)),
            module.register_forward_hook(note(name, module, out=True)),
        )
    ]
    try:
        _run(denoiser, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a module's arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (tuple, list)) else []
