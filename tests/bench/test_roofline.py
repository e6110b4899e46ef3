# SPDX-License-Identifier: MIT
"""The roofline: a floor computed by hand, and a machine that is measured and not looked up."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from cmfast.bench import roofline, timing
from cmfast.bench.roofline import Ceilings, Floor, floor_ms, measure_machine
from cmfast.errors import CmfastError
from cmfast.formats import protobuf as pb
from cmfast.formats.small_onnx import cast_model, chain_model
from cmfast_train.backends import ceilings as in_torch

COST = {"flops": 3e9, "weight_bytes": 40e6, "activation_bytes": 10e6}  # of one image
HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()


def ceilings(flops: float | None = 1e12, moved: float | None = 1e11) -> Ceilings:
    return Ceilings(device="cpu", dtype="float32", flops_per_s=flops, bytes_per_s=moved, how="by hand")


# The floor.


@pytest.mark.parametrize(
    ("batch", "steps", "floor"),
    [
        (1, 1, Floor(ms=3, bound="compute", flops=3e9, bytes=50e6)),
        (1, 2, Floor(ms=6, bound="compute", flops=6e9, bytes=100e6)),  # the weights are read again
        (8, 1, Floor(ms=24, bound="compute", flops=24e9, bytes=120e6)),  # the weights are read once
    ],
)
def test_the_floor_of_known_work_on_a_known_machine(batch: int, steps: int, floor: Floor) -> None:
    assert floor_ms(COST, ceilings(), batch, steps) == floor


def test_a_fast_device_waits_for_its_memory_and_larger_batches_share_the_weights() -> None:
    assert floor_ms(COST, ceilings(1e14), 1) == Floor(ms=0.5, bound="memory", flops=3e9, bytes=50e6)
    found = floor_ms(COST, ceilings(1e13), 1000)
    assert found is not None
    assert (found.bound, found.ms) == ("compute", 300)


@pytest.mark.parametrize("known", [ceilings(flops=None), ceilings(moved=None)])
def test_there_is_no_floor_without_a_ceiling_or_a_cost(known: Ceilings) -> None:
    assert floor_ms(COST, known, 1) is None
    assert floor_ms({}, ceilings(), 1) is None
    assert floor_ms({"flops": 1}, ceilings(), 1) is None


# The machine.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure with little, which takes no time and gives no useful numbers."""
    for name, value in {"SIDES": (32, 64), "NUMBERS": 2**12}.items():
        monkeypatch.setattr(roofline, name, {"cpu": value, "cuda": value})
    monkeypatch.setattr(roofline, "CALLS", 3)
    monkeypatch.setattr(roofline, "SECONDS", 0)


def interleaved(monkeypatch: pytest.MonkeyPatch, milliseconds: Mapping[str, float]) -> list[str]:
    """Make `interleave` call each once and claim these times, by the beginning of the name; return the names."""
    names: list[str] = []

    def interleave(contenders: Mapping[str, Any], **_: object) -> dict[str, list[float]]:
        names.extend(contenders)
        for call in contenders.values():
            call()
        found = {name: next(ms for start, ms in milliseconds.items() if name.startswith(start)) for name in contenders}
        return {name: [2 * ms, ms, 5 * ms] for name, ms in found.items()}

    monkeypatch.setattr(timing, "interleave", interleave)
    return names


@pytest.mark.usefixtures("small")
def test_the_ceilings_are_the_fastest_calls_of_all_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    names = interleaved(
        monkeypatch,
        {"product of 64 x 64 float32 matrices by ONNX": 2.0, "product": 4.0, "sum": 3.0, "copy": 1.0},
    )
    found = measure_machine("cpu", "float32")
    assert len(names) == 6
    assert found.flops_per_s == pytest.approx(2 * 64**3 / 2e-3)  # ONNX Runtime's, which took half as long
    assert found.bytes_per_s == pytest.approx(2 * 4 * 2**12 / 1e-3)  # numpy's: a copy reads and writes
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.how.startswith("the fastest of 18 calls of 6 way(s) in turns: ")
    assert "product of 64 x 64 float32 matrices by ONNX Runtime cpu; copy of 0.015625 MiB by numpy" in found.how


@pytest.mark.usefixtures("small")
def test_a_sum_reads_two_arrays_and_writes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    interleaved(monkeypatch, {"product": 1.0, "sum": 1.0, "copy": 2.0})
    assert measure_machine("cpu", "float32").bytes_per_s == pytest.approx(3 * 4 * 2**12 / 1e-3)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("threads", [None, 1])
def test_this_machine_is_measured(dtype: str, threads: int | None) -> None:
    found = measure_machine("cpu", dtype, threads)
    assert (found.flops_per_s or 0) > 1e6
    assert (found.bytes_per_s or 0) > 1e6
    assert "not measured" not in found.how


@pytest.mark.usefixtures("small")
def test_with_a_number_of_threads_numpy_does_not_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    names = interleaved(monkeypatch, {"": 1.0})
    measure_machine("cpu", "float32", threads=1)
    assert [name for name in names if name.startswith("product")] == [
        f"product of {side} x {side} float32 matrices by ONNX Runtime cpu" for side in (32, 64)
    ]
    assert names[-1].endswith("by numpy, 1 thread(s)")


@pytest.mark.usefixtures("small")
def test_without_onnx_runtime_numpy_measures_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = measure_machine("cpu", "float32", threads=1)
    assert (found.flops_per_s or 0) > 1e6
    assert "by numpy, all its threads" in found.how
    assert "the rest was not measured: running a .onnx file needs onnxruntime, which is not installed" in found.how
    assert measure_machine("cpu", "float16").flops_per_s is None


@pytest.mark.usefixtures("small")
def test_what_a_cpu_cannot_multiply_has_no_rate() -> None:
    found = measure_machine("cpu", "bfloat16")
    assert found.flops_per_s is None
    assert (found.bytes_per_s or 0) > 1e6
    assert "not measured" in found.how
    assert "MatMul" in found.how


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_where_onnx_runtime_has_no_cuda_pytorch_measures(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_torch, "cuda_ways", lambda dtype: in_torch.ways("cpu", dtype))  # on what is here
    names = interleaved(monkeypatch, {"product of 32": 2.0, "product of 64": 4.0, "copy": 1.0})
    found = measure_machine("cuda", dtype)
    assert names == [
        f"product of 32 x 32 {dtype} matrices by PyTorch cpu",
        f"product of 64 x 64 {dtype} matrices by PyTorch cpu",
        "copy of 0.015625 MiB by PyTorch cpu",
    ]
    assert found.flops_per_s == pytest.approx(2 * 64**3 / 4e-3)
    assert found.bytes_per_s == pytest.approx(2 * 4 * 2**12 / 1e-3)
    assert f"the rest was not measured: the installed onnxruntime {ort.__version__} is a build" in found.how


@pytest.mark.usefixtures("small")
def test_pytorch_measures_only_what_onnx_runtime_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_torch, "cuda_ways", lambda dtype: in_torch.ways("cpu", dtype))
    usual = roofline._graph_call

    def sums_only(op: str, count: int, b: Any, device: str, *rest: Any) -> Any:
        if op == "MatMul":
            raise RuntimeError("CUBLAS failure 3")
        return usual(op, count, b, "cpu", *rest)

    monkeypatch.setattr(roofline, "_need_provider", lambda device: None)
    monkeypatch.setattr(roofline, "_graph_call", sums_only)
    names = interleaved(monkeypatch, {"": 1.0})
    measure_machine("cuda", "float32")
    assert [name.partition(" of")[0] for name in names] == ["sum", "product", "product"]
    assert [name.rpartition("by ")[2] for name in names] == ["ONNX Runtime cuda", "PyTorch cpu", "PyTorch cpu"]


def test_what_pytorch_multiplies_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[tuple[torch.dtype, tuple[int, ...]]] = []
    real = torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        multiplied.append((a.dtype, tuple(a.shape)))
        return real(a, b, **options)

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(roofline, "SIDES", {"cpu": (32,)})
    monkeypatch.setattr(roofline, "PRODUCTS", {"cpu": 3})
    monkeypatch.setattr(roofline, "NUMBERS", {"cpu": 8})
    for dtype, expected in in_torch.DTYPES.items():
        multiplied.clear()
        (_, product), (_, copy) = in_torch.ways("cpu", dtype)
        way = product()
        way.call()
        assert multiplied == [(expected, (32, 32))] * 3
        assert way.amount == 3 * 2 * 32**3
        copy().call()


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_without_cuda_nothing_is_measured_and_the_reason_is_given() -> None:
    found = measure_machine("cuda", "float16")
    assert (found.flops_per_s, found.bytes_per_s) == (None, None)
    assert found.how == (
        f"not measured: the installed onnxruntime {ort.__version__} is a build without CUDA; "
        f"PyTorch {torch.__version__} has no CUDA device"
    )


def test_libraries_that_are_missing_are_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcudart.so.12"), raising=False)
    measure_machine("cuda", "float32")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("small")
def test_a_way_whose_first_call_fails_is_left_out_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = roofline._graph_call

    def graph_call(op: str, count: int, b: Any, *rest: Any) -> Any:
        def short_of_memory() -> None:
            raise RuntimeError("CUDA failure 2:\nout of memory")

        return short_of_memory if len(b) == 64 else usual(op, count, b, *rest)

    monkeypatch.setattr(roofline, "_graph_call", graph_call)
    found = measure_machine("cpu", "float16")
    assert "product of 32 x 32 float16 matrices" in found.how
    assert "the rest was not measured: CUDA failure 2: out of memory" in found.how


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="this onnxruntime is a build without CUDA")
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_a_gpu_is_measured(dtype: str) -> None:
    found = measure_machine("cuda", dtype)
    assert (found.flops_per_s or 0) > 1e12
    assert (found.bytes_per_s or 0) > 1e11
    assert found.how.count("ONNX Runtime cuda") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_a_gpu_is_measured_by_pytorch(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_need_provider", lambda device: 1 / 0)
    found = measure_machine("cuda", dtype)
    assert (found.flops_per_s or 0) > 1e12
    assert (found.bytes_per_s or 0) > 1e11
    assert found.how.count("PyTorch cuda") == 2


@pytest.mark.parametrize(("device", "dtype"), [("tpu", "float32"), ("cpu", "int8")])
def test_another_device_or_type_is_an_error(device: str, dtype: str) -> None:
    with pytest.raises(CmfastError, match=f"got '{device}' and '{dtype}'"):
        measure_machine(device, dtype)


# The graphs.


def run(model: bytes, **inputs: Any) -> Any:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_chain_of_products_and_of_sums_computes_what_it_says(dtype: type) -> None:
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 5, 5)).astype(dtype)
    element = {np.float32: 1, np.float16: 10}[dtype]
    tolerance = 1e-6 if dtype is np.float32 else 1e-2  # three sums of five terms
    np.testing.assert_allclose(run(chain_model("MatMul", 3, element), a=a, b=b), a @ b @ b @ b, atol=tolerance)
    np.testing.assert_allclose(run(chain_model("Add", 2, element), a=a, b=b), a + b + b, atol=tolerance)
    np.testing.assert_allclose(run(chain_model("Add", 1, element), a=a, b=b), a + b, atol=tolerance)


def test_a_conversion_rounds_to_the_type_that_it_names() -> None:
    a = np.linspace(-1, 1, 7, dtype=np.float32)
    np.testing.assert_array_equal(run(cast_model(10), a=a), a.astype(np.float16))
    assert onnx.load_from_string(cast_model(16)).graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    session = ort.InferenceSession(cast_model(16), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("a", a)
    y = ort.OrtValue.ortvalue_from_shape_and_type([7], 16, "cpu", 0)
    binding.bind_ortvalue_output("y", y)
    session.run_with_iobinding(binding)
    assert y.element_type() == onnx.TensorProto.BFLOAT16
    bits = np.frombuffer(ctypes.string_at(y.data_ptr(), 14), np.int16)  # numpy has no bfloat16
    np.testing.assert_array_equal(bits, torch.from_numpy(a).to(torch.bfloat16).view(torch.int16).numpy())


def test_the_hand_encoded_model_is_read_by_onnx_and_by_our_own_reader(tmp_path: Path) -> None:
    model = onnx.load_from_string(chain_model("MatMul", 130, 16))  # lengths of more than one byte
    assert [node.op_type for node in model.graph.node] == ["MatMul"] * 130
    assert [list(node.input) for node in model.graph.node][:2] == [["a", "b"], ["t1", "b"]]
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {16}
    (tmp_path / "chain.onnx").write_bytes(chain_model("MatMul", 130, 16))
    read = pb.read_onnx_model(tmp_path / "chain.onnx")
    assert (read.ir, read.opset, read.graph) == (8, 18, True)
