# SPDX-License-Identifier: MIT
"""The flavour ort-cuda: what is rewritten, that it computes the same, and who refuses it. No CUDA kernel runs here."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

import cmfast
from cmfast.backends import onnxruntime as backend
from cmfast.errors import ArtifactError, BackendError, CheckFailed, CmfastError
from cmfast.formats.manifest import ROUNDING
from cmfast.formats.table import read_manifest
from cmfast_export import cli
from cmfast_export import pipeline as exporting
from cmfast_export.graphs import writer
from cmfast_export.graphs.cost import graph_cost
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.pipeline import export_onnx
from cmfast_export.precision_search import export_fastest
from cmfast_export.request import GraphRequest
from cmfast_export.targets.ort_cuda import CONVERTED, FIRST, LAST, Rewritten, ort_cuda_graph
from cmfast_export.targets.ort_cuda_patterns import kernel_accepts
from cmfast_export.targets.ort_cuda_stand_in import written_out
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions
from cmfast_export.targets.triton_repository import write_repository
from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from helpers.specs import image_spec

SMALL: dict[str, Any] = {
    "image_size": 8, "channels": 1, "model_channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "attention": (4,),
}  # fmt: skip
NETWORKS: dict[str, NetworkConfig] = {
    "adm": AdmConfig(classes=10, head_channels=32, **{**SMALL, "model_channels": 64}),
    "adm sum": AdmConfig(head_channels=32, scale_shift=False, resblock_updown=False, **SMALL),
    "cloneofsimo": CloneofsimoConfig(image_size=8, channels=1, width=64),
    "song": SongConfig(classes=10, **SMALL),
    "ncsn": SongConfig(embedding="fourier", noise_mult=2, encoder="residual", resample=(1, 3, 3, 1), **SMALL),
    "dhariwal": DhariwalConfig(**SMALL),
}


def checkpoint(name: str) -> Checkpoint:
    config = NETWORKS[name]
    torch.manual_seed(0)
    network = build_network(config)
    randomise(network)
    # The first implementation's network sees numbers of the size of sigma, so half precision rounds those.
    scaling = {"scaling": "cloneofsimo", "c_noise": "raw"} if name == "cloneofsimo" else {}
    scaling = scaling if name.startswith(("adm", "cloneofsimo")) else {"scaling": "edm", "c_noise": "ln/4"}
    spec = image_spec(image=(1, 8, 8), classes=getattr(config, "classes", 0), **scaling)  # type: ignore[arg-type]
    return Checkpoint(spec=spec, network=config, weights=network.state_dict())


def nodes(model: onnx.ModelProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type]


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(each) for each in node.attribute if each.name == name)


@pytest.mark.parametrize(
    ("name", "norms", "left", "attentions"),
    [("adm", 25, 0, 4), ("adm sum", 13, 8, 4), ("cloneofsimo", 14, 0, 0), ("song", 24, 0, 3), ("ncsn", 24, 0, 3),
     ("dhariwal", 25, 0, 4)],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_flavour_of_every_network_computes_what_pytorch_computes(
    name: str, norms: int, left: int, attentions: int, precision: str, tmp_path: Path
) -> None:
    made = export_onnx(checkpoint(name), tmp_path / "model.onnx", precision=precision, flavour="ort-cuda", tolerance=9)
    room = 80 if (name, precision) == ("cloneofsimo", "fp16") else 1
    limit = ROUNDING["float32" if precision == "fp32" else "float16"]
    assert made.denoiser.parity.worst.max_abs < room * limit
    assert made.rewritten
    found = (made.rewritten.group_norms, made.rewritten.group_norms_left, made.rewritten.attentions)
    assert found == (norms, left, attentions)
    model = onnx.load(made.path)
    onnx.checker.check_model(model)
    assert len(nodes(model, "GroupNorm")) == norms
    assert len(nodes(model, "InstanceNormalization")) == left
    assert len(nodes(model, "MultiHeadAttention")) == attentions
    assert not nodes(model, "Softmax")
    assert not nodes(model, "Shape")  # ONNX Runtime would put it and what depends on it on the CPU


def test_a_norm_takes_its_silu_unless_scale_and_shift_come_between() -> None:
    model = ir.to_proto(ort_cuda_graph(denoiser_graph(checkpoint("adm").denoiser())).model)
    activations = [attribute(node, "activation") for node in nodes(model, "GroupNorm")]
    # Ten blocks with one norm of each kind, four attentions whose norm has none, and the last norm.
    assert (activations.count(1), activations.count(0)) == (11, 14)
    assert len(nodes(model, "Sigmoid")) == 10 + 2  # after scale and shift; of the embedding
    for node in nodes(model, "GroupNorm"):
        assert (node.domain, attribute(node, "channels_last"), attribute(node, "groups")) == ("com.microsoft", 1, 32)


def test_norms_in_half_precision_read_and_write_it_and_keep_gamma_in_float32() -> None:
    graph = ort_cuda_graph(denoiser_graph(checkpoint("song").denoiser().to_precision("fp16"))).model.graph
    norms = [node for node in graph if node.op_type == "GroupNorm"]
    for node in norms:
        x, gamma, beta = node.inputs
        assert (x.dtype, node.outputs[0].dtype) == (ir.DataType.FLOAT16, ir.DataType.FLOAT16)
        assert gamma.dtype == beta.dtype == ir.DataType.FLOAT  # the kernel takes no other
        assert len(gamma.shape) == len(beta.shape) == 1


@pytest.mark.parametrize(("name", "most"), [("adm", 3), ("song", 3), ("dhariwal", 3), ("ncsn", 3)])
def test_between_convolutions_nothing_is_transposed(name: str, most: int) -> None:
    """The provider puts inverse Transpose around each convolution: what is left of ours is what it would run."""
    graph = ort_cuda_graph(denoiser_graph(checkpoint(name).denoiser())).model.graph
    kept = []
    for node in graph:
        if node.op_type != "Transpose":
            continue
        perm = tuple(node.attributes["perm"].as_ints())
        assert perm in (FIRST, LAST)
        maker = node.inputs[0].producer()
        before = perm == LAST and maker is not None and maker.op_type in CONVERTED
        after = perm == FIRST and all(user.op_type in CONVERTED for user, _ in node.outputs[0].uses())
        if not before and not after:
            kept.append(node.name)
    assert len(kept) <= most, kept  # where the image comes in and goes out


@pytest.mark.parametrize("kind", ["sampler", "server"])
def test_a_sampler_of_the_flavour_draws_what_the_python_loop_draws(kind: str, tmp_path: Path) -> None:
    made = export_onnx(checkpoint("dhariwal"), tmp_path / "model.onnx", kind=kind, steps=2, flavour="ort-cuda")
    assert made.sampler
    assert made.sampler.parity.worst.max_abs < ROUNDING["float32"]
    model = onnx.load(made.path)
    assert len(nodes(model, "GroupNorm")) == 2 * 25
    weights = {value.name: value for value in model.graph.initializer}
    assert len({node.input[1] for node in nodes(model, "GroupNorm")} & weights.keys()) == 25  # shared by the steps
    plain = denoiser_graph(checkpoint("dhariwal").denoiser())
    assert made.manifest.cost["flops"] == pytest.approx(2 * graph_cost(plain)["flops"], rel=0.01)


def test_the_manifest_says_what_the_file_is_for_and_that_no_cuda_kernel_was_run(tmp_path: Path) -> None:
    export_onnx(checkpoint("song"), tmp_path / "model.onnx", precision="fp16", flavour="ort-cuda")
    made_by = read_manifest(tmp_path / "model.onnx").made_by
    assert made_by["flavour"] == "ort-cuda"
    assert made_by["verified"] == "onnxruntime cpu, float16 emulated, GroupNorm written out: no CUDA kernel run"
    export_onnx(checkpoint("song"), tmp_path / "plain.onnx")
    assert "flavour" not in read_manifest(tmp_path / "plain.onnx").made_by


def test_weights_that_one_file_cannot_hold_stand_beside_a_sampler_of_the_flavour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_BYTES", 100_000)
    made = export_onnx(checkpoint("song"), tmp_path / "model.onnx", kind="sampler", steps=2, flavour="ort-cuda")
    assert made.data is not None
    assert sorted(os.listdir(tmp_path)) == sorted(["model.onnx", made.data.name])
    assert made.path.stat().st_size < 400_000


def test_what_overflows_in_fp16_attention_is_not_exported_for_the_provider_either(tmp_path: Path) -> None:
    made = checkpoint("adm sum")
    weights = dict(made.weights)
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        qkv = weights[name].clone()
        qkv[: 2 * len(qkv) // 3] = 110.0  # q . k / sqrt(32) = 32 * 110^2 / sqrt(32) > 65504, as in test_precision
        weights[name] = qkv
    with pytest.raises(CheckFailed, match="the denoiser graph differs from PyTorch by nan"):
        export_onnx(replace(made, weights=weights), tmp_path / "model.onnx", precision="fp16", flavour="ort-cuda")


def spoilt(change: Callable[[ir.Node], bool]) -> Callable[[ir.Model], Rewritten]:
    """Return a rewriter that changes the first node that `change` takes."""

    def rewrite(model: ir.Model) -> Rewritten:
        made = ort_cuda_graph(model)
        assert any(change(node) for node in made.model.graph)
        return made

    return rewrite


def without_activation(node: ir.Node) -> bool:
    if node.op_type != "GroupNorm" or not node.attributes["activation"].as_int():
        return False
    node.attributes["activation"] = ir.AttrInt64("activation", 0)
    return True


def one_group_more(node: ir.Node) -> bool:
    if node.op_type != "GroupNorm":
        return False
    node.attributes["groups"] = ir.AttrInt64("groups", 2 * node.attributes["groups"].as_int())
    return True


def swapped(node: ir.Node) -> bool:
    if node.op_type != "MultiHeadAttention":
        return False
    q, _, v = node.inputs
    node.replace_input_with(0, v)
    node.replace_input_with(2, q)
    return True


@pytest.mark.parametrize("change", [without_activation, one_group_more, swapped])
@pytest.mark.parametrize("name", ["adm", "song"])
def test_a_wrong_rewrite_is_found_and_leaves_no_file(
    name: str, change: Callable[[ir.Node], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "ort_cuda_graph", spoilt(change))
    with pytest.raises(CheckFailed, match="the denoiser graph differs from PyTorch"):
        export_onnx(checkpoint(name), tmp_path / "model.onnx", flavour="ort-cuda")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("half", [False, True])
def test_the_formula_that_stands_in_for_group_norm_is_pytorchs(last: int, activation: int, half: bool) -> None:
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    shape = [2, 4, 6, 12] if last else [2, 12, 4, 6]
    rng = np.random.default_rng(0)
    x = (3 + 2 * rng.standard_normal((2, 12, 4, 6))).astype(np.float16 if half else np.float32)
    gamma, beta = rng.standard_normal((2, 12)).astype(np.float32)
    node = helper.make_node(
        "GroupNorm", ["x", "gamma", "beta"], ["y"], "norm", domain="com.microsoft",
        groups=3, epsilon=1e-3, activation=activation, channels_last=last,
    )  # fmt: skip
    weights = [helper.make_tensor(n, TensorProto.FLOAT, [12], v) for n, v in (("gamma", gamma), ("beta", beta))]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = written_out(ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8)), attention=True)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": x.transpose(LAST) if last else x})[0]
    want = F.group_norm(torch.from_numpy(x).float(), 3, *map(torch.from_numpy, (gamma, beta)), eps=1e-3)
    want = (F.silu(want) if activation else want).numpy()
    room = 2e-3 if half else 1e-5  # one rounding of numbers up to four
    np.testing.assert_allclose(got.transpose(FIRST) if last else got, want, rtol=0, atol=room)


@pytest.mark.parametrize(
    ("channels", "groups", "accepted"),
    [
        (64, 32, True),
        (192, 32, True),
        (32, 32, False),
        (96, 32, False),
        (32, 8, True),
        (1024, 1, False),
        (512, 1, True),
    ],
)
def test_what_the_cuda_kernel_accepts(channels: int, groups: int, accepted: bool) -> None:
    assert kernel_accepts(channels, groups) is accepted


# Who refuses it.


@pytest.fixture(scope="module")
def flavoured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a server of the flavour, which every target could be asked to take."""
    path = tmp_path_factory.mktemp("flavoured") / "model.onnx"
    return export_onnx(checkpoint("song"), path, kind="server", steps=1, flavour="ort-cuda").path


def test_the_cpu_refuses_a_file_of_the_flavour_in_one_line(flavoured: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        cmfast.load(flavoured)
    assert str(caught.value) == (
        f"{flavoured}: a graph of the flavour ort-cuda, for ONNX Runtime's CUDA provider, not for the CPU; run it with "
        "--device cuda --variant nhwc, or export the checkpoint again with --format onnx"
    )


def test_tensorrt_and_triton_refuse_a_file_of_the_flavour(flavoured: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not for TensorRT"):
        build_engine(flavoured, tmp_path / "model.engine", BuildOptions())
    with pytest.raises(ArtifactError, match="not for TensorRT"):
        cmfast.load(flavoured, device="cuda", variant="tensorrt")
    with pytest.raises(ArtifactError, match="not for Triton"):
        write_repository(tmp_path / "repository", [flavoured])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "bf16"}, "no bfloat16 kernel of GroupNorm or of NHWC convolutions; use --precision fp16"),
        ({"opset": 22}, "NHWC convolutions up to opset 21, got 22; leave the opset out"),
        ({"flavour": "fast"}, "flavour must be one of ort-cuda, got 'fast'"),
    ],
)
def test_what_the_provider_lacks_is_refused_before_the_work(
    options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "denoiser_graph", None)
    with pytest.raises(CmfastError, match=said):
        export_onnx(checkpoint("song"), tmp_path / "model.onnx", **{"flavour": "ort-cuda", **options})


def test_auto_does_not_choose_for_the_flavour(
    tiny_checkpoint: Callable[..., Path], call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    with pytest.raises(CmfastError, match="auto does not time the flavour ort-cuda; pass --precision fp16"):
        export_fastest(tiny_checkpoint(0), out, GraphRequest(flavour="ort-cuda"), timed=False)
    result = call(cli.main, tiny_checkpoint(0), "--format", "ort-cuda", "--precision", "auto", "-o", out)
    refused(result, "--precision auto is not supported with --format ort-cuda", "--precision fp16")


def test_the_command_names_the_file_after_the_flavour_and_says_what_was_not_run(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    model = tmp_path / "model.pt"
    save_checkpoint(checkpoint("song"), model)
    result = call(cli.main, model, "--format", "ort-cuda", "--precision", "fp16")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == ["model.pt", "model_fp16_ort_cuda.onnx"]
    for words in (
        "for ONNX Runtime's CUDA provider alone: ", "its CUDA kernels have not been run here; --device cuda verifies",
        "--device cuda --variant nhwc", '--variants "nhwc,nhwc cuda_graph"',
    ):  # fmt: skip
        assert words in result.stdout


# The backend's variant.


def test_nhwc_is_an_option_of_the_cuda_provider_and_combines_with_cuda_graphs() -> None:
    ((name, plain),) = backend._providers("", "float16", 42)
    ((_, nhwc),) = backend._providers("nhwc", "float16", 42)
    ((_, both),) = backend._providers("nhwc cuda_graph", "float16", 42)
    assert name == backend.CUDA
    assert nhwc == {**plain, "prefer_nhwc": "1"}
    assert both == {**plain, "prefer_nhwc": "1", "enable_cuda_graph": "1"}


def test_nhwc_needs_a_gpu_and_a_type_that_has_kernels(
    handmade_onnx: Callable[..., Path], flavoured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendError, match="on cpu has the variants '', not 'nhwc'; 'nhwc', 'cuda_graph' and"):
        cmfast.load(handmade_onnx(), variant="nhwc")
    manifest = replace(read_manifest(handmade_onnx()), dtype="bfloat16")
    with pytest.raises(BackendError, match="bfloat16, of which ONNX Runtime has no NHWC convolutions; leave nhwc out"):
        backend._check_variant(Path("model.onnx"), "cuda", "nhwc cuda_graph", manifest)
