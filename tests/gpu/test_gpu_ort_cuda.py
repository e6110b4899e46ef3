# SPDX-License-Identifier: MIT
"""CUDA: what the flavour ort-cuda and the variant nhwc rest on, run by ONNX Runtime's CUDA provider.

pytest -m gpu tests/gpu/test_gpu_ort_cuda.py        on a machine with an NVIDIA GPU, cmfast[gpu] and cmfast[export]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

import cmfast
from cmfast.formats.table import read_manifest
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import NetworkConfig, build_network
from cmfast_train.networks.edm import SongConfig
from helpers.specs import image_spec

pytestmark = pytest.mark.gpu
CUDA = "CUDAExecutionProvider"
SMALL: dict[str, Any] = {"image_size": 8, "channels": 1, "channel_mult": (1, 2), "res_blocks": 1, "attention": (4,)}
NETWORKS: dict[str, NetworkConfig] = {
    "adm": AdmConfig(model_channels=64, head_channels=32, **SMALL),
    "song": SongConfig(model_channels=32, **SMALL),
}
VARIANTS = ("", "nhwc", "cuda_graph", "nhwc cuda_graph")


@pytest.fixture(autouse=True)
def onnx_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available: no GPU, no driver, or a build of PyTorch for the CPU")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is a build without CUDA: pip install 'cmfast[gpu]'")


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that exports a network with random weights; where the packages are that it needs."""
    for package in ("onnx_ir", "onnxscript"):
        pytest.importorskip(package)
    from cmfast_export.pipeline import export_onnx

    def make(name: str, **options: Any) -> Path:
        torch.manual_seed(0)
        network = build_network(NETWORKS[name])
        randomise(network)
        scaling = {} if name == "adm" else {"scaling": "edm", "c_noise": "ln/4"}
        spec = image_spec(image=(1, 8, 8), classes=0, **scaling)
        checkpoint = Checkpoint(spec=spec, network=NETWORKS[name], weights=network.state_dict())
        return export_onnx(checkpoint, tmp_path / "model.onnx", kind="sampler", steps=2, **options).path

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_the_flavour_is_verified_by_its_own_kernels_and_every_variant_draws_the_same(
    name: str, precision: str, export: Callable[..., Path]
) -> None:
    path = export(name, precision=precision, flavour="ort-cuda", device="cuda")
    assert read_manifest(path).made_by["verified"] == "onnxruntime cuda, nhwc"
    drawn = [cmfast.load(path, device="cuda", variant=variant).sample_float(5, steps=2, seed=3) for variant in VARIANTS]
    for images in drawn[1:]:  # other layouts are other algorithms of cuDNN
        np.testing.assert_allclose(images, drawn[0], rtol=0, atol=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nhwc_runs_a_plain_file_too(precision: str, export: Callable[..., Path]) -> None:
    path = export("song", precision=precision)
    plain, nhwc = (cmfast.load(path, device="cuda", variant=v).sample_float(5, steps=2, seed=3) for v in ("", "nhwc"))
    np.testing.assert_allclose(nhwc, plain, rtol=0, atol=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_provider_drops_the_transposes_around_convolutions(
    name: str, export: Callable[..., Path], tmp_path: Path
) -> None:
    path = export(name, flavour="ort-cuda", precision="fp16")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=[(CUDA, {"prefer_nhwc": "1"})])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    assert {node.domain for node in convolutions} == {"com.ms.internal.nhwc"}
    transposes = sum(node.op_type == "Transpose" for node in nodes)
    assert transposes <= len(convolutions) // 4, f"{transposes} Transpose, {len(convolutions)} Conv"


def group_norm(
    x: npt.NDArray[Any], gamma: npt.NDArray[np.float32], beta: npt.NDArray[np.float32], groups: int, activation: int
) -> npt.NDArray[Any]:
    """Return com.microsoft.GroupNorm of x [B, H, W, C] by the CUDA provider."""
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    node = helper.make_node(
        "GroupNorm", ["x", "gamma", "beta"], ["y"], "norm", domain="com.microsoft",
        groups=groups, epsilon=1e-5, activation=activation, channels_last=1,
    )  # fmt: skip
    weights = [
        helper.make_tensor(n, TensorProto.FLOAT, [x.shape[-1]], v) for n, v in (("gamma", gamma), ("beta", beta))
    ]
    ends = [helper.make_tensor_value_info(name, kind, list(x.shape)) for name in ("x", "y")]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[CUDA])
    result: npt.NDArray[Any] = session.run(None, {"x": x})[0]
    return result


SHAPES = [(64, 32), (64, 16), (96, 24), (128, 32), (192, 32), (384, 32), (960, 32), (1536, 32), (512, 1), (32, 8)]


@pytest.mark.parametrize(("channels", "groups"), SHAPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("activation", [0, 1])
def test_the_kernel_of_group_norm_computes_pytorchs(channels: int, groups: int, half: bool, activation: int) -> None:
    rng = np.random.default_rng(channels)
    for batch, height, width in ((1, 2, 2), (2, 8, 6), (40, 4, 4)):
        x = rng.standard_normal((batch, height, width, channels)).astype(np.float16 if half else np.float32)
        gamma, beta = rng.standard_normal((2, channels)).astype(np.float32)
        got = group_norm(x, gamma, beta, groups, activation)
        first = torch.from_numpy(x).float().permute(0, 3, 1, 2)
        want = F.group_norm(first, groups, torch.from_numpy(gamma), torch.from_numpy(beta), eps=1e-5)
        want = (F.silu(want) if activation else want).permute(0, 2, 3, 1)
        room = 1e-2 if half else 5e-4  # one rounding of numbers up to ten; the variance is a difference of sums
        np.testing.assert_allclose(got.astype(np.float32), want.numpy(), rtol=0, atol=room)


@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (96, 32), (1024, 1)])
def test_the_kernel_refuses_what_the_rewrite_leaves_alone(channels: int, groups: int) -> None:
    pytest.importorskip("onnx_ir")
    from cmfast_export.targets.ort_cuda_patterns import kernel_accepts

    assert not kernel_accepts(channels, groups)
    x = np.zeros((1, 4, 4, channels), np.float32)
    with pytest.raises(Exception, match="GroupNorm in CUDA does not support the input"):
        group_norm(x, np.ones(channels, np.float32), np.zeros(channels, np.float32), groups, 0)
    assert all(kernel_accepts(*shape) for shape in SHAPES)
