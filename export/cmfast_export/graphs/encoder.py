# SPDX-License-Identifier: MIT
"""An encoder of a condition as a graph of its own, and the denoiser that is given what it makes.

NAME [B, *shape]  ->  NAME_encoded [B, *sizes]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor, nn

from cmfast.conditions import Condition, is_name
from cmfast.encoding import encoded_name
from cmfast.errors import CmfastError
from cmfast_export.graphs.denoiser import example_of, finish, written
from cmfast_export.graphs.garbage import uncollected
from cmfast_export.graphs.half import INSIDE
from cmfast_export.graphs.trace import BATCH, trace
from cmfast_train.denoiser import Denoiser
from cmfast_train.wrapping import Encoded


@dataclass(frozen=True, kw_only=True)
class EncoderGraph:
    """An encoder, traced."""

    condition: Condition  # what it takes
    encoded: Condition  # what it makes
    module: nn.Module
    model: ir.Model


@uncollected()
def encoder_graph(module: nn.Module, condition: Condition, batch: int | None, opset: int) -> EncoderGraph:
    """Return the graph of an encoder, a copy to evaluate, without manifest.

    Args:
        module: called with the condition alone.
        condition: what it takes.
        batch: a fixed batch size, or None for a dynamic one.
        opset: of ONNX.

    Raises:
        CmfastError: it cannot be traced or written, or does not return float32 [B, ..].
    """
    name = encoded_name(condition.name)
    example, free = example_of(condition, batch or 2)
    inputs = {condition.name: example}
    axes = {condition.name: {**({0: BATCH} if batch is None else {}), **free}}
    traced = trace(_ByName(module, condition.name), inputs, axes)
    model = written(traced, inputs, axes, name, opset)
    for node in model.graph:
        node.meta[INSIDE] = True
    finish(model, "encoder", opset)
    output = model.graph.outputs[0]
    sizes = list(output.shape) if output.shape is not None else []
    first = sizes[0] if sizes else None
    if output.dtype != ir.DataType.FLOAT or first is None or (isinstance(first, int) and first != batch):
        got = f"{output.dtype} [{', '.join(map(str, sizes))}]"
        raise CmfastError(f"the encoder of {condition.name} must return float32 [B, ..], got {got}")
    shape = tuple(_size(size, f"{name}_{axis}") for axis, size in enumerate(sizes[1:], 1))
    return EncoderGraph(condition=condition, encoded=Condition(name=name, shape=shape), module=module, model=model)


def without_encoders(denoiser: Denoiser, encoded: Mapping[str, Condition]) -> Denoiser:
    """Return the denoiser that takes encoded conditions instead; weights are shared.

    Args:
        denoiser: its network is `Encoded`.
        encoded: what its encoders make, by the names of what they take.
    """
    network = denoiser.network
    assert isinstance(network, Encoded)
    conditions = tuple(encoded.get(each.name, each) for each in denoiser.spec.conditions)
    names = {condition.name: name for name, condition in encoded.items()}
    return Denoiser(_Renaming(network.net, names), replace(denoiser.spec, conditions=conditions)).eval()


class _ByName(nn.Module):
    """An encoder called by the name of its condition, as a denoiser is."""

    def __init__(self, encoder: nn.Module, name: str) -> None:
        super().__init__()
        self.encoder, self.name = encoder, name

    def forward(self, **inputs: Tensor) -> Tensor:
        output: Tensor = self.encoder(inputs[self.name])
        return output


class _Renaming(nn.Module):
    """A network that is given its conditions by other names."""

    def __init__(self, net: nn.Module, names: Mapping[str, str]) -> None:
        super().__init__()
        self.net, self.names = net, dict(names)

    def forward(self, x: Tensor, c_noise: Tensor, **inputs: Tensor) -> Tensor:
        output: Tensor = self.net(x, c_noise, **{self.names.get(name, name): value for name, value in inputs.items()})
        return output


def encoders_of(denoiser: Denoiser) -> dict[str, nn.Module]:
    """Return the encoders of a denoiser by the names of their conditions; none for most networks."""
    network = denoiser.network
    if not isinstance(network, Encoded):
        return {}
    return {name: network.encoders[f"{name}_encoder"] for name in network.names}


def encode(graphs: Mapping[str, EncoderGraph], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return conditions with those of encoders encoded by PyTorch, by their new names."""
    with torch.inference_mode():
        return {
            graphs[name].encoded.name if name in graphs else name: graphs[name].module(value)
            if name in graphs
            else value
            for name, value in values.items()
        }


def _size(size: object, name: str) -> int | str:
    """Return a size of an output: a number, the name of the same size of an input, or a name of its own."""
    if isinstance(size, int):
        return size
    value = getattr(size, "value", size)
    return value if isinstance(value, str) and is_name(value) and value != BATCH else name
