# SPDX-License-Identifier: MIT
"""Float32 is multiplied as float32: a number tells, and training, differences and scores set the switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cmfast
from cmfast.backends import float32
from cmfast.backends import onnxruntime_float32 as in_onnxruntime
from cmfast.backends.float32 import Floats
from cmfast.bench.contenders import check_float32
from cmfast.errors import BackendError
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.denoiser import Denoiser
from cmfast_train.evaluation.features import Pixels, extract
from cmfast_train.networks.adm import AdmConfig, AdmUnet
from cmfast_train.training import float32 as in_torch
from cmfast_train.training import step_graph, trainer
from cmfast_train.training.step_networks import StepNetworks, Student
from helpers.specs import image_spec

CPU = torch.device("cpu")


# The number.


def truncated(x: Floats) -> Floats:
    """Return x with the ten bits of mantissa that TensorFloat-32 reads."""
    return (x.view(np.int32) & ~np.int32(2**13 - 1)).view(np.float32)


def rounded(x: Floats) -> Floats:
    """Return x rounded to ten bits of mantissa."""
    return ((x.view(np.int32) + 2**12) & ~np.int32(2**13 - 1)).view(np.float32)


def convolve(x: Floats, w: Floats) -> Floats:
    result: Floats = F.conv2d(torch.from_numpy(x), torch.from_numpy(w)).numpy()
    return result


def test_float32_on_a_cpu_is_float32() -> None:
    errors = in_torch.errors(CPU)
    assert max(errors.values()) < float32.LIMIT / 10
    float32.check(errors, "PyTorch")
    by_numpy = float32.measured(np.matmul, convolve)
    assert max(by_numpy.values()) < float32.LIMIT / 10


@pytest.mark.parametrize("kept", ["first", "second", "neither"])
@pytest.mark.parametrize("rounding", [truncated, rounded])
@pytest.mark.parametrize("what", ["product", "convolution"])
def test_an_operand_of_ten_bits_is_seen(what: str, rounding: Any, kept: str) -> None:
    def of_ten_bits(function: Any) -> Any:
        return lambda a, b: function(a if kept == "first" else rounding(a), b if kept == "second" else rounding(b))

    multiply, conv = (
        of_ten_bits(f) if name == what else f for name, f in (("product", np.matmul), ("convolution", convolve))
    )
    errors = float32.measured(multiply, conv)
    assert {name for name, error in errors.items() if error > 1.2 * float32.LIMIT} == {what}
    with pytest.raises(BackendError, match=rf"ONNX Runtime cuda was to .* is off \({what} by .*NVIDIA_TF32_OVERRIDE=0"):
        float32.check(errors, "ONNX Runtime cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_seen(dtype: torch.dtype) -> None:
    def multiply(a: Floats, b: Floats) -> Floats:
        product: Floats = (
            (torch.from_numpy(a).to(dtype).double() @ torch.from_numpy(b).to(dtype).double()).float().numpy()
        )
        return product

    assert float32.measured(multiply, convolve)["product"] > 2 * float32.LIMIT


def test_a_result_that_is_no_number_is_off() -> None:
    errors = float32.measured(lambda a, b: np.full((512, 512), np.nan, np.float32), convolve)
    with pytest.raises(BackendError, match="product by nan"):
        float32.check(errors, "it")


def test_onnx_runtime_on_a_cpu_is_float32() -> None:
    errors = in_onnxruntime.errors("cpu")
    assert errors.keys() == {"product", "convolution"}
    assert max(errors.values()) < float32.LIMIT / 10
    in_onnxruntime.check_float32("cpu")


def test_float32_by_onnx_runtimes_tensorrt_is_timed_only_where_tensorfloat_is_off(
    handmade_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = cmfast.load(handmade_onnx()).backend  # on a CPU: nothing is run
    assert backend.manifest.dtype == "float32"
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(BackendError, match=r"multiplies float32 as TensorFloat-32 .*NVIDIA_TF32_OVERRIDE=0") as caught:
        check_float32(backend, "cuda", "tensorrt")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(backend, "manifest", replace(backend.manifest, dtype="float16"))
    check_float32(backend, "cuda", "tensorrt")
    monkeypatch.undo()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    check_float32(backend, "cuda", "tensorrt")


@pytest.mark.gpu
def test_the_option_of_onnx_runtime_turns_tensorfloat_off() -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is a build without CUDA")
    assert max(in_onnxruntime.errors("cuda").values()) < float32.LIMIT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
def test_the_switches_of_pytorch_turn_tensorfloat_off_and_on() -> None:
    from cmfast_train.backends.torch_cuda import arithmetic

    device = torch.device("cuda")
    with in_torch.exact_float32(device):
        assert max(in_torch.errors(device).values()) < float32.LIMIT
    if torch.cuda.get_device_capability() >= (8, 0):
        with arithmetic(tf32=True):
            errors = in_torch.errors(device)
        assert min(errors.values()) > float32.LIMIT, "the check sees nothing on this card"


# The switches.


def switches() -> dict[str, Any]:
    backends = torch.backends
    return {
        "conv": backends.cudnn.conv.fp32_precision,
        "rnn": backends.cudnn.rnn.fp32_precision,
        "matmul": backends.cuda.matmul.fp32_precision,
        "enabled": backends.cudnn.enabled,
        "benchmark": backends.cudnn.benchmark,
        "deterministic": backends.cudnn.deterministic,
    }


@pytest.fixture(params=[False, True], ids=["plain", "benchmark"])
def before(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Begin and end with PyTorch's defaults, but for what a user may have set."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.allow_tf32, matmul.allow_tf32 = True, True
    cudnn.benchmark = cudnn.deterministic = request.param
    found = switches()
    assert found["conv"] == found["matmul"] == "tf32"
    yield found
    cudnn.allow_tf32, matmul.allow_tf32 = True, False
    cudnn.benchmark = cudnn.deterministic = False


def assert_exact(seen: dict[str, Any], before: dict[str, Any]) -> None:
    assert "tf32" not in seen.values()
    assert {key: seen[key] for key in ("enabled", "benchmark", "deterministic")} == {
        key: before[key] for key in ("enabled", "benchmark", "deterministic")
    }


def test_central_differences_run_with_cudnn_and_without_tensorfloat(before: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []

    class Network(AdmUnet):
        def forward(self, x: Tensor, c_noise: Tensor, *rest: Any) -> Tensor:
            seen.append(switches())
            return super().forward(x, c_noise, *rest)

    network = Network(
        AdmConfig(
            image_size=8, channels=1, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(), head_channels=32
        )
    )
    student = Student(Denoiser(network, image_spec(image=(1, 8, 8), c_noise="ln/4")), log_variance=False)
    x, sigma = torch.ones(2, 1, 8, 8), torch.tensor([0.5, 5.0])
    StepNetworks(student, student, None, None, True, []).output_along(x, sigma, {}, None, x, sigma)
    inside, outside = seen[1:], seen[:1]  # the output is the run's, the two ends of the difference are exact
    assert len(inside) == 2
    for each in inside:
        assert_exact(each, before)
    assert outside == [before]
    assert before["enabled"]
    assert switches() == before


TINY = [
    "channel_mult=1", "head_channels=32", "batch=8", "checkpoint_images=16", "log_images=8", "grid=4",
    "tensorboard=false", "device=cpu", "phases=edm:16",
]  # fmt: skip


@pytest.mark.parametrize(("precision", "exact"), [("fp32", True), ("auto", True), ("bf16", False)])
def test_training_in_float32_is_in_float32(
    precision: str, exact: bool, before: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    seen: list[dict[str, Any]] = []
    optimise = step_graph.optimise

    def watched(*arguments: Any) -> Any:
        seen.append(switches())
        return optimise(*arguments)

    monkeypatch.setattr(step_graph, "optimise", watched)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first run of a process
    try:
        trainer.train(override(PRESETS["digits"], [*TINY, f"precision={precision}"]), tmp_path / "run", None)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(seen) == 2
    for each in seen:
        if exact:
            assert_exact(each, before)
        else:
            assert each == before
    assert switches() == before, "the switches of the process stay changed"


def test_a_run_in_float32_that_the_gpu_rounds_is_refused(
    before: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_torch.torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary")
    monkeypatch.setattr(in_torch, "errors", lambda device: {"product": 1e-7, "convolution": 3.3e-4})
    with (
        pytest.raises(BackendError, match=r"PyTorch on the NVIDIA Imaginary .*\(convolution by 3.3e-04;"),
        in_torch.exact_float32(torch.device("cuda")),
    ):
        pytest.fail("it went on")
    assert switches() == before


def test_features_are_computed_without_tensorfloat(before: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []

    class Watched(Pixels):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(switches())
            return super().forward(images)

    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    for _ in extract(Watched((1, 8, 8)), [images, images]):
        assert switches() == before, "between two parts the process is the caller's"
    assert len(seen) == 2
    for each in seen:
        assert_exact(each, before)
