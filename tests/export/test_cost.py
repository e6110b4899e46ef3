# SPDX-License-Identifier: MIT
"""What a graph costs: numbers computed by hand, PyTorch's own count, and what a sampler saves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch.utils.flop_counter import FlopCounterMode

from cmfast.errors import CmfastError
from cmfast_export.graphs.cost import graph_cost
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.graphs.sampler import sampler_graph
from cmfast_train.checkpoint import Checkpoint, load_checkpoint
from cmfast_train.config.presets import PRESETS
from cmfast_train.denoiser import Denoiser
from cmfast_train.networks.adm import AdmUnet
from cmfast_train.networks.edm import DhariwalConfig, DhariwalUnet, SongConfig, SongUnet
from cmfast_train.training.initial_model import network_config
from helpers.specs import image_spec, named

node = helper.make_node
Shape = list[int | str]
SIGMAS = (80.0, 24.0, 5.0, 0.8)
F32 = 4  # bytes


def graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, Shape], weights: dict[str, list[int]], output: Shape,
    dtype: int = onnx.TensorProto.FLOAT, **integers: list[int],
) -> ir.Model:  # fmt: skip
    """Return a graph whose weights are zeros and whose output is called "out"."""
    size = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}[dtype]
    made = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("out", dtype, output)],
        [
            helper.make_tensor(name, dtype, shape, bytes(size * torch.Size(shape).numel()), raw=True)
            for name, shape in weights.items()
        ]
        + [helper.make_tensor(name, onnx.TensorProto.INT64, [len(v)], v) for name, v in integers.items()],
    )
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10))


def cost(flops: int, weights: int, activations: int) -> dict[str, int]:
    return {"flops": flops, "weight_bytes": weights, "activation_bytes": activations}


# By hand.


@pytest.mark.parametrize("batch", ["B", 1, 3], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"), [(onnx.TensorProto.FLOAT, 4), (onnx.TensorProto.FLOAT16, 2), (onnx.TensorProto.BFLOAT16, 2)]
)
def test_a_convolution_between_elementwise_nodes(batch: int | str, dtype: int, size: int) -> None:
    nodes = [
        node("Mul", ["x", "scale"], ["scaled"]),
        node("Conv", ["scaled", "kernel", "bias"], ["conv"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Sigmoid", ["conv"], ["gate"]),
        node("Mul", ["conv", "gate"], ["out"]),
    ]
    weights = {"scale": [3, 1, 1], "kernel": [5, 3, 3, 3], "bias": [5]}
    model = graph(nodes, {"x": [batch, 3, 8, 6]}, weights, [batch, 5, 4, 3], dtype)
    # 5 x 4 x 3 outputs of 3 x 3 x 3 terms each; it reads 3 x 8 x 6 numbers and writes 5 x 4 x 3
    assert graph_cost(model) == cost(2 * 60 * 27, size * (3 + 135 + 5), size * (144 + 60))


@pytest.mark.parametrize(
    ("operator", "weights", "output", "flops"),
    [
        (node("Conv", ["x", "w"], ["out"], group=2), {"w": [6, 2, 1, 1]}, ["B", 6, 8, 8], 2 * 6 * 64 * 2),
        (node("Conv", ["x", "w"], ["out"], dilations=[2, 2]), {"w": [1, 4, 3, 3]}, ["B", 1, 4, 4], 2 * 16 * 36),
        (node("ConvTranspose", ["x", "w"], ["out"], strides=[2, 2]), {"w": [4, 3, 2, 2]}, ["B", 3, 16, 16],
         2 * 4 * 64 * 12),
        (node("Einsum", ["x", "w"], ["out"], equation="bchw,wd->bchd"), {"w": [8, 5]}, ["B", 4, 8, 5],
         2 * 4 * 8 * 8 * 5),
        (node("MatMul", ["x", "w"], ["out"]), {"w": [8, 5]}, ["B", 4, 8, 5], 2 * 4 * 8 * 8 * 5),
    ],
    ids=["groups", "dilation", "transposed convolution", "einsum", "product"],
)  # fmt: skip
def test_one_operator(
    operator: onnx.NodeProto, weights: dict[str, list[int]], output: list[int | str], flops: int
) -> None:
    model = graph([operator], {"x": ["B", 4, 8, 8]}, weights, output)
    (shape,) = weights.values()
    written = torch.Size([int(size) for size in output[1:]]).numel()
    assert graph_cost(model) == cost(flops, F32 * torch.Size(shape).numel(), F32 * (256 + written))


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_linear_layer_and_the_row_of_a_table(transposed: int) -> None:
    nodes = [
        node("Gather", ["table", "index"], ["row"]),
        node("Add", ["x", "row"], ["sum"]),
        node("Gemm", ["sum", "w", "b"], ["out"], transB=transposed),
    ]
    weights = {"table": [1000, 8], "w": [5, 8] if transposed else [8, 5], "b": [5]}
    model = graph(nodes, {"x": ["B", 8]}, weights, ["B", 5])
    model.graph.inputs.append(
        ir.Value(name="label", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([ir.SymbolicDim("B")]))
    )
    model.graph.node(0).replace_input_with(1, model.graph.inputs[1])
    assert graph_cost(model) == cost(2 * 8 * 5, F32 * (8 + 40 + 5), F32 * (8 + 5))


def test_what_two_convolutions_read_is_read_once_and_their_shared_weight_twice() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["one"]),
        node("Conv", ["x", "w"], ["two"]),
        node("Add", ["one", "two"], ["out"]),
    ]
    model = graph(nodes, {"x": ["B", 2, 4, 4]}, {"w": [2, 2, 1, 1]}, ["B", 2, 4, 4])
    assert graph_cost(model) == cost(2 * 2 * 32 * 2, 2 * F32 * 4, F32 * (32 + 2 * 32))


def test_what_is_computed_from_constants_costs_its_result_only() -> None:
    nodes = [
        node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        node("MatMul", ["turned", "w"], ["square"]),
        node("MatMul", ["x", "square"], ["out"]),
    ]
    model = graph(nodes, {"x": ["B", 90]}, {"w": [200, 90]}, ["B", 90])
    assert graph_cost(model) == cost(2 * 90 * 90, F32 * 8100, F32 * 180)


@pytest.mark.parametrize("half", [False, True])
def test_the_scores_of_an_attention_do_not_leave_the_chip(half: bool) -> None:
    dtype = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    scores = [node("MatMul", ["q", "k"], ["scores"]), node("Mul", ["scores", "scale"], ["scaled"])]
    if half:
        cast = [node("Cast", ["scaled"], ["wide"], to=onnx.TensorProto.FLOAT), node("Softmax", ["wide"], ["p"])]
        cast.append(node("Cast", ["p"], ["probability"], to=dtype))
    else:
        cast = [node("Softmax", ["scaled"], ["probability"])]
    nodes = [*scores, *cast, node("MatMul", ["probability", "v"], ["out"])]
    inputs: dict[str, Shape] = {"q": ["B", 2, 64, 8], "k": ["B", 2, 8, 64], "v": ["B", 2, 64, 8]}
    model = graph(nodes, inputs, {"scale": []}, ["B", 2, 64, 8], dtype)
    size = 2 if half else 4
    assert graph_cost(model) == cost(2 * 2 * (2 * 64 * 64 * 8), size, size * 4 * (2 * 64 * 8))


def test_products_without_a_softmax_between_them_write_what_they_compute() -> None:
    nodes = [node("MatMul", ["q", "k"], ["scores"]), node("MatMul", ["scores", "v"], ["out"])]
    model = graph(nodes, {"q": ["B", 64, 8], "k": ["B", 8, 64], "v": ["B", 64, 8]}, {}, ["B", 64, 8])
    assert graph_cost(model)["activation_bytes"] == F32 * (3 * 512 + 2 * 64 * 64 + 512)


def test_weights_are_not_read() -> None:
    model = graph([node("MatMul", ["x", "w"], ["out"])], {"x": ["B", 2]}, {"w": [2, 3]}, ["B", 3])
    rows = 2**28  # 3 GiB, in a file that does not exist
    weight = model.graph.initializers["w"]
    weight.shape = ir.Shape([rows, 3])
    float32 = ir.DataType.FLOAT
    weight.const_value = ir.ExternalTensor("nowhere.data", 0, 12 * rows, float32, name="w", shape=weight.shape)
    model.graph.inputs[0].shape = ir.Shape([ir.SymbolicDim("B"), rows])
    assert graph_cost(model) == cost(6 * rows, 12 * rows, 4 * (rows + 3))


def test_work_that_is_not_counted_is_an_error_and_so_is_a_shape_that_nobody_knows() -> None:
    model = graph([node("Einsum", ["x", "x"], ["out"], equation="...i,...i->...i")], {"x": ["B", 2]}, {}, ["B", 2])
    with pytest.raises(CmfastError, match=r"the cost of a graph with Einsum '\.\.\.i,\.\.\.i->\.\.\.i' in it"):
        graph_cost(model)
    nodes = [node("NonZero", ["x"], ["where"]), node("Cast", ["where"], ["found"], to=onnx.TensorProto.FLOAT)]
    nodes.append(node("MatMul", ["found", "w"], ["out"]))
    model = graph(nodes, {"x": ["B", 2]}, {"w": [2, 2]}, ["N", 2])
    with pytest.raises(CmfastError, match=r"the shape of \w+ is unknown"):
        graph_cost(model)


# Whole networks.


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path]) -> Callable[..., tuple[Denoiser, ir.Model]]:
    """Return a factory of denoisers and their graphs: tiny(classes, batch, precision)."""

    @functools.cache
    def make(classes: int, batch: int | None = None, precision: str = "fp32") -> tuple[Denoiser, ir.Model]:
        denoiser = load_checkpoint(tiny_checkpoint(classes)).denoiser().to_precision(precision)
        return denoiser, denoiser_graph(denoiser, batch)

    return make


def counted(denoiser: Denoiser) -> int:
    """Return PyTorch's count of the operations of one image."""
    spec = denoiser.spec
    label = torch.zeros(1, dtype=torch.int64) if spec.classes else None
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        denoiser(torch.zeros(1, *spec.image), torch.ones(1), **named(label))
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("classes", "batch"), [(0, None), (10, None), (10, 3)])
def test_a_denoiser_costs_what_pytorch_counts_and_its_weights(
    classes: int, batch: int | None, tiny: Callable[..., tuple[Denoiser, ir.Model]]
) -> None:
    denoiser, graph = tiny(classes, batch)
    found = graph_cost(graph)
    assert found["flops"] == counted(denoiser)
    parameters = sum(p.numel() for name, p in denoiser.named_parameters() if "label_emb" not in name)
    row = 128 if classes else 0
    assert 0 <= found["weight_bytes"] - F32 * (parameters + row) < 0.003 * F32 * parameters  # ones and zeros of norms
    assert all(isinstance(value, int) for value in found.values())


@pytest.mark.parametrize("classes", [0, 10])
def test_a_sampler_costs_its_steps_without_the_embedding_of_the_noise_level(
    classes: int, tiny: Callable[..., tuple[Denoiser, ir.Model]]
) -> None:
    denoiser, graph = tiny(classes, None)
    before = ir.to_proto(graph).SerializeToString()
    once = graph_cost(graph)
    saved = [denoiser.network.time_embed[0], denoiser.network.time_embed[2]]
    if not classes:  # without a label, each layer behind the embedding is a constant too
        saved += [m for name, m in denoiser.network.named_modules() if name.endswith("emb_layers.1")]
    folded = sum(2 * layer.weight.numel() for layer in saved)
    parameters = sum(p.numel() for layer in saved for p in layer.parameters())
    for sigmas in (SIGMAS[:1], SIGMAS):
        steps = len(sigmas)
        found = graph_cost(sampler_graph(graph, sigmas, denoiser.spec))
        assert found["flops"] == steps * (once["flops"] - folded)
        assert found["weight_bytes"] == pytest.approx(steps * (once["weight_bytes"] - F32 * parameters), rel=0.01)
        assert steps * once["activation_bytes"] * 0.95 < found["activation_bytes"] < steps * once["activation_bytes"]
    assert ir.to_proto(graph).SerializeToString() == before


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_does_the_same_work_on_fewer_bytes(
    precision: str, tiny: Callable[..., tuple[Denoiser, ir.Model]]
) -> None:
    denoiser, graph = tiny(10, None)
    single, half = graph_cost(graph), graph_cost(tiny(10, None, precision)[1])
    assert half["flops"] == single["flops"]
    convolutions = [m for m in denoiser.network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv1d))]
    halved = sum(p.numel() for m in convolutions for p in m.parameters())
    assert half["weight_bytes"] == pytest.approx(single["weight_bytes"] - 2 * halved, rel=0.001)
    assert 0.5 <= half["activation_bytes"] / single["activation_bytes"] < 0.52  # the embedding stays float32


@pytest.mark.parametrize(
    "config",
    [
        SongConfig(image_size=8, model_channels=32, channel_mult=(1, 2), res_blocks=1, attention=(8,), classes=3,
                   noise_mult=2, embedding="fourier", encoder="residual", decoder="skip", resample=(1, 3, 3, 1)),
        DhariwalConfig(image_size=8, model_channels=64, channel_mult=(1, 2), res_blocks=1, attention=(8,), classes=3),
    ],
    ids=["song", "dhariwal"],
)  # fmt: skip
def test_other_networks_cost_what_pytorch_counts(config: SongConfig | DhariwalConfig) -> None:
    network = SongUnet(config) if isinstance(config, SongConfig) else DhariwalUnet(config)
    spec = image_spec(image=(3, 8, 8), classes=3, scaling="edm", c_noise="ln/4", renoise="plain", clip=False)
    denoiser = Denoiser(network, spec).eval()
    assert graph_cost(denoiser_graph(denoiser))["flops"] == counted(denoiser)


@pytest.mark.parametrize(
    ("preset", "flops"),
    [
        ("digits", 35_766_272),
        pytest.param("mnist-large", 3_303_702_528, marks=pytest.mark.slow),
        pytest.param("cifar10", 14_207_025_152, marks=pytest.mark.slow),
    ],
)
def test_the_networks_of_the_presets_cost_what_pytorch_counts(preset: str, flops: int) -> None:
    config = PRESETS[preset]
    network = AdmUnet(network_config(config, 0))
    checkpoint = Checkpoint(spec=config.spec(0), network=network.config, weights=network.state_dict())
    found = graph_cost(denoiser_graph(checkpoint.denoiser()))
    assert found["flops"] == flops == counted(checkpoint.denoiser())
    assert found["weight_bytes"] == pytest.approx(
        F32 * sum(p.numel() for p in network.parameters()), rel=0.001, abs=6000
    )  # and some kilobytes of constants, whatever the size
