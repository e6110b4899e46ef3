# SPDX-License-Identifier: MIT
"""Trace each structure of a denoiser once a process: torch's exporter takes three seconds, for many tests the same.

Before anything is folded, a traced graph has one initializer for each tensor of the module's state and depends on their
shapes only. So the first trace of a structure is torch's; a later one is a copy of it with the weights put in, and
everything behind the trace runs as always. test_export.py checks that this is what another trace gives.

A trace by torch itself is faster here: the exporter's table of operators, which it makes anew for each export, is made
once for each opset.
"""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from cmfast_export.graphs import denoiser

trace = denoiser.denoiser_graph
_export, _translate = torch.export.export, denoiser.translate
_templates: dict[tuple[str, str], ir.Model] = {}  # by structure and options of the ONNX export; without weights
# Modules of others may depend on what no key has. These have all they depend on in their attributes and modules.
KNOWN = ("torch.", "cmfast_train.", "diffusers.", "helpers.own_networks", "network")


def traced_once(*arguments: Any, **options: Any) -> ir.Model:
    """Return what `denoiser.denoiser_graph` returns."""
    with (
        mock.patch("torch.export.export", _traced),
        mock.patch.object(denoiser, "translate", _written),
        mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry_of)),
    ):
        return trace(*arguments, **options)


def _registry_of(*arguments: Any, **options: Any) -> ONNXRegistry:
    """Return a table of operators of its own, which an export may change."""
    registry = copy.copy(_registry(*arguments, **options))
    registry.functions = {target: list(found) for target, found in registry.functions.items()}
    return registry


_registry = functools.cache(ONNXRegistry.from_torchlib)


class Later:
    """A program that is traced when somebody looks at it, and otherwise not at all."""

    def __init__(self, key: str, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.key, self.module, self._call = key, module, (module, arguments, options)

    @functools.cached_property
    def program(self) -> Any:
        module, arguments, options = self._call
        return _export(module, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)


def _traced(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """Return what torch.export.export returns; for a structure that was written before, one that is traced later."""
    if not all(type(each).__module__.startswith(KNOWN) for each in module.modules()):
        return _export(module, *arguments, **options)
    later = Later(repr((structure(module), _shapes((arguments, options)))), module, arguments, options)
    if not any(key == later.key for key, _ in _templates):
        later.program  # noqa: B018  errors of a trace are raised here
    return later


def _written(program: Any, **options: Any) -> ir.Model:
    """Return what `translations.translate` returns."""
    if not isinstance(program, Later):
        return _translate(program, **options)
    state, key = program.module.state_dict(), (program.key, repr(_shapes(options)))
    if key in _templates:
        return _with_weights(_templates[key].clone(), state)
    model = _translate(program.program, **options)
    if len({tensor.data_ptr() for tensor in state.values()}) == len(state):  # none stands for another in the graph
        _templates[key] = _with_weights(model.clone(), {name: v.to("meta") for name, v in state.items()})
    return model


def _with_weights(model: ir.Model, state: dict[str, torch.Tensor]) -> ir.Model:
    for name in state.keys() & model.graph.initializers.keys():  # the graph lacks what the network does not use
        model.graph.initializers[name].const_value = TorchTensor(state[name].detach(), name=name)
    return model


def structure(module: nn.Module) -> tuple[Any, ...]:
    """Return all that a trace can depend on beside the inputs: code, settings, shapes and types of the state."""
    modules = [(name, type(each), each.extra_repr(), _settings(each)) for name, each in module.named_modules()]
    state = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()]
    return modules, state, repr(vars(module).get("spec")), torch.get_default_dtype()


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    plain = (int, float, str, bool, tuple, type(None), torch.dtype)
    found = [(name, repr(value)) for name, value in vars(module).items() if isinstance(value, plain)]
    methods = [(name, value.__qualname__) for name, value in vars(module).items() if hasattr(value, "__qualname__")]
    return sorted(found + methods)


def _shapes(tree: Any) -> Any:
    """Return nested arguments with each tensor as its shape and type."""
    if isinstance(tree, torch.Tensor):
        return ("tensor", tuple(tree.shape), tree.dtype)
    if isinstance(tree, dict):
        return {key: _shapes(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_shapes(each) for each in tree]
    return tree


denoiser.denoiser_graph = traced_once
