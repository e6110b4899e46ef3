# SPDX-License-Identifier: MIT
"""ONNX Runtime as a backend: what it refuses and how it says so, and its way on a GPU, walked on the CPU.

The fixed buffers, the bindings and the graph ids are real, and so is the session; only the GPU is made of host memory
(`helpers.host_cuda`). What needs a GPU is in test_gpu.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import cmfast
from cmfast.backends import TimedBackend, open_backend
from cmfast.backends import onnxruntime as module
from cmfast.backends.cuda import kernels
from cmfast.backends.cuda import runtime as cuda_runtime
from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.onnxruntime_cuda import KEPT, CudaSession
from cmfast.errors import ArtifactError, BackendError
from cmfast.formats.manifest import Manifest
from helpers.host_cuda import HostCuda, HostSession
from helpers.specs import image_spec

Factory = Callable[..., Path]
VERSION = onnxruntime.__version__


def write(path: Path, nodes: list[Any], shapes: dict[str, list[Any]], manifest: Manifest, **more: Any) -> Path:
    """Write a graph with these inputs and the output "out" [B, C, H, W]; a label is int64, everything else float32."""
    types = {name: TensorProto.INT64 if name == "label" else TensorProto.FLOAT for name in shapes}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, types[name], shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", *manifest.spec.image])],
        **more,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    helper.set_model_props(model, {"cmfast": manifest.to_json()})
    onnx.save(model, path)
    return path


def denoiser(path: Path, dtype: str = "float32") -> Path:
    """Write out = x + sigma."""
    nodes = [
        helper.make_node("Unsqueeze", ["sigma", "axes"], ["level"]),
        helper.make_node("Add", ["x", "level"], ["out"]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 8, 8)), dtype=dtype)
    return write(path, nodes, {"x": ["B", 1, 8, 8], "sigma": ["B"]}, manifest, initializer=[axes])


def sampler(path: Path, kind: str = "sampler", batch: Any = "B") -> Path:
    """Write out = noise of step 0 - noise of step 1 + label."""
    axis = 0 if kind == "sampler" else 1
    nodes = [
        helper.make_node("Gather", ["noise", "zero"], ["first"], axis=axis),
        helper.make_node("Gather", ["noise", "one"], ["second"], axis=axis),
        helper.make_node("Sub", ["first", "second"], ["difference"]),
        helper.make_node("Cast", ["label"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["number", "shape"], ["image"]),
        helper.make_node("Add", ["difference", "image"], ["out"]),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.INT64, [], [0]),
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
        helper.make_tensor("shape", TensorProto.INT64, [4], [-1, 1, 1, 1]),
    ]
    spec = image_spec(image=(1, 8, 8), classes=10, sigmas={2: (80.0, 0.8)})
    sampled = kind == "sampler"
    shapes = {"noise": [2, batch, 1, 8, 8] if sampled else [batch, 2, 1, 8, 8]}
    shapes["label"] = [batch] if sampled else [batch, 1]
    return write(path, nodes, shapes, Manifest(kind=kind, spec=spec), initializer=constants)


def half_convolution(path: Path) -> Path:
    """Write a convolution in bfloat16 at opset 22, the first that has it."""
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Conv", ["narrow", "w"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["y"], ["out"], to=TensorProto.FLOAT),
    ]
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [1, 1, 3, 3], [0.1] * 9)
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 8, 8)), dtype="bfloat16")
    return write(path, nodes, {"x": ["B", 1, 8, 8], "sigma": ["B"]}, manifest, initializer=[weight])


def inputs_of_denoiser(batch: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, 1, 8, 8), dtype=np.float32)
    return {"x": x, "sigma": rng.uniform(1, 2, batch).astype(np.float32)}


def inputs_of_sampler(batch: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, batch, 1, 8, 8), dtype=np.float32)
    return {"noise": noise, "label": rng.integers(0, 10, batch)}


# Kinds of graphs, on the CPU.


def test_a_sampler_and_a_server_graph_draw_the_same_images(tmp_path: Path) -> None:
    inputs = inputs_of_sampler(3)
    images = []
    for kind in ("sampler", "server"):
        model = cmfast.load(sampler(tmp_path / f"{kind}.onnx", kind))
        assert model.backend.batch is None
        images.append(model.from_noise(inputs["noise"], (80.0, 0.8), inputs["label"]))
    want = inputs["noise"][0] - inputs["noise"][1] + inputs["label"].reshape(3, 1, 1, 1).astype(np.float32)
    for got in images:
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["sampler", "server"])
def test_the_fixed_batch_is_found_at_the_axis_of_the_batch(kind: str, tmp_path: Path) -> None:
    backend = open_backend(sampler(tmp_path / "fixed.onnx", kind, batch=4))
    assert backend.batch == 4


def test_a_backend_on_the_cpu_has_no_times_of_a_device(handmade_onnx: Factory) -> None:
    assert not isinstance(open_backend(handmade_onnx()), TimedBackend)


# What is refused, and how that is said.


@pytest.mark.parametrize("variant", ["cuda_graph", "tensorrt", "compiled", "channels_last"])
def test_a_variant_that_the_cpu_has_not_is_refused(variant: str, handmade_onnx: Factory) -> None:
    path = handmade_onnx()
    with pytest.raises(BackendError) as caught:
        cmfast.load(path, variant=variant)
    assert str(caught.value) == (
        f"{path}: ONNX Runtime on cpu has the variants '', not {variant!r}; "
        "'nhwc', 'cuda_graph' and 'tensorrt' need --device cuda"
    )


def test_a_variant_that_cuda_has_not_is_refused(handmade_onnx: Factory) -> None:
    path = handmade_onnx()
    with pytest.raises(BackendError) as caught:
        cmfast.load(path, device="cuda", variant="compiled")
    assert str(caught.value) == (
        f"{path}: ONNX Runtime on cuda has the variants '', 'nhwc', 'cuda_graph', 'nhwc cuda_graph', 'tensorrt', "
        "not 'compiled'"
    )


def test_a_bfloat16_file_on_the_cpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = half_convolution(tmp_path / "half.onnx")
    with pytest.raises(BackendError) as caught:
        cmfast.load(path)
    message = str(caught.value)
    assert message.startswith(
        f"{path}: ONNX Runtime {VERSION} lacks bfloat16 operations of this file on this device; "
        "use a GPU (--device cuda), or export it with --precision fp16 or fp32: "
    )
    assert "Conv(22)" in message
    assert "\n" not in message


def test_a_float32_file_is_not_run_by_a_provider_that_only_knows_tensorfloat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(BackendError, match=r"multiplies float32 as TensorFloat-32.*set NVIDIA_TF32_OVERRIDE=0"):
        cmfast.load(denoiser(tmp_path / "float32.onnx"), device="cuda", variant="tensorrt")
    # Switched off, or with a file that asks for it, it is the next thing that is missing here.
    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has TensorRT")
    said = (
        f"variant tensorrt was requested, but the installed onnxruntime {VERSION} is a build without TensorRT; "
        "replace it: pip uninstall onnxruntime && pip install 'cmfast[gpu]'"
    )
    with pytest.raises(BackendError, match=re.escape(said)):
        cmfast.load(denoiser(tmp_path / "tf32.onnx", "tf32"), device="cuda", variant="tensorrt")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(BackendError, match=re.escape(said)):
        cmfast.load(tmp_path / "float32.onnx", device="cuda", variant="tensorrt")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that pretends a GPU of some compute capability, and a build of ONNX Runtime for it."""

    def pretend(capability: str) -> None:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*module.PROVIDERS["tensorrt"], "CPU"])
        monkeypatch.setattr(
            cuda_runtime, "open_gpu", lambda: cuda_runtime.Gpu(name="Test 1", compute_capability=capability)
        )
        monkeypatch.setattr(cuda_runtime, "Stream", lambda: SimpleNamespace(handle=42))

    return pretend


@pytest.mark.parametrize(("variant", "provider"), [("", "CUDA"), ("cuda_graph", "CUDA"), ("tensorrt", "TensorRT")])
def test_a_provider_whose_libraries_are_missing_is_an_error_in_the_words_of_the_loader(
    variant: str,
    provider: str,
    pretended_gpu: Callable[[str], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if {"CUDAExecutionProvider", "TensorrtExecutionProvider"} & set(onnxruntime.get_available_providers()):
        pytest.skip("this onnxruntime brings the libraries")
    pretended_gpu("9.0")
    with pytest.raises(BackendError) as caught:
        cmfast.load(denoiser(tmp_path / "tf32.onnx", "tf32"), device="cuda", variant=variant)
    message = str(caught.value)
    assert message.startswith(f"ONNX Runtime {VERSION} cannot load its {provider} provider: ")
    assert f"onnxruntime_providers_{provider.lower()}" in message  # here even the provider's own library is missing
    assert "\n" not in message
    assert capfd.readouterr() == ("", ""), "something was said besides the error"


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_a_precision_that_the_card_lacks_is_refused(
    dtype: str, pretended_gpu: Callable[[str], None], tmp_path: Path
) -> None:
    pretended_gpu("7.5")
    path = denoiser(tmp_path / "new.onnx", dtype)
    with pytest.raises(BackendError) as caught:
        cmfast.load(path, device="cuda")
    assert str(caught.value) == (
        f"{path}: a file in {dtype}, which the Test 1 lacks (compute capability 7.5, needed 8.0); "
        "export it with --precision fp16 or fp32"
    )


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("", BackendError, "could not start it and fell back to another provider; see nvidia-smi"),
        ("CUDA failure 100: no CUDA-capable device is detected ; GPU=0", BackendError, "CUDA failure 100"),
        (
            "This session cannot use the graph capture feature as requested by the user as all nodes ...",
            BackendError,
            "use it without that variant, or export it with a fixed --batch: This session",
        ),
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF", ArtifactError, "cannot open it: [ONNXRuntimeError] : 7"),
    ],
)
def test_what_onnx_runtime_says_of_cuda_becomes_the_error_it_is(
    said: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing_library", lambda ort, provider: None)
    found = module._refusal(onnxruntime, Path("model.onnx"), "float32", [module.CUDA], said)
    assert type(found) is error
    assert words in str(found)


def test_a_provider_that_is_registered_as_a_plugin_is_found() -> None:
    def build(compiled: list[str], *plugins: str) -> Any:
        devices = [SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", *plugins)]
        return SimpleNamespace(get_available_providers=lambda: compiled, get_ep_devices=lambda: devices)

    assert module.has_provider(build([module.CUDA]), module.CUDA)
    assert module.has_provider(build(["CPUExecutionProvider"], module.CUDA), module.CUDA)
    assert not module.has_provider(build(["CPUExecutionProvider"]), module.CUDA)
    assert not module.has_provider(SimpleNamespace(get_available_providers=list), module.CUDA)


@pytest.mark.parametrize(("dtype", "tf32"), [("float32", "0"), ("tf32", "1"), ("float16", "1"), ("bfloat16", "1")])
def test_tensor_cores_are_off_for_float32_alone(dtype: str, tf32: str) -> None:
    ((name, options),) = module._providers("", dtype, 42)
    assert (name, options) == (module.CUDA, {"user_compute_stream": "42", "use_tf32": tf32})
    ((_, captured),) = module._providers("cuda_graph", dtype, 42)
    assert captured == {**options, "enable_cuda_graph": "1"}
    first, second = module._providers("tensorrt", dtype, 42)
    assert first == (module.TENSORRT, {"user_compute_stream": "42"})  # and no folder for engines
    assert second == (module.CUDA, options)


# The way of the arrays on a GPU made of host memory.


class Bench:
    """A file, opened the way of a GPU, and beside it on the CPU."""

    def __init__(self, gpu: HostCuda, path: Path, *, captures: bool) -> None:
        self.gpu, self.plain = gpu, OnnxRuntimeBackend(path)
        self.session = HostSession(self.plain._session, gpu)
        stream = cuda_runtime.Stream()
        self.device = CudaSession(
            onnxruntime, self.session, self.plain.manifest, stream, "a GPU", batch=None, captures=captures, place="cpu"
        )

    def graph_ids(self) -> list[str]:
        return [bound.options.get_run_config_entry("gpu_graph_id") for bound in self.device._ready.values()]

    @property
    def buffers(self) -> int:
        return len(self.gpu.memory) // 2  # each has two sides


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    gpu = HostCuda()
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: gpu)
    monkeypatch.setattr(kernels, "driver", lambda: gpu)
    return functools.partial(Bench, gpu)


KINDS = [(denoiser, inputs_of_denoiser), (sampler, inputs_of_sampler)]


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize(("make", "inputs_of"), KINDS)
def test_bound_buffers_give_what_plain_calls_give_whatever_the_order_of_batch_sizes(
    make: Callable[..., Path],
    inputs_of: Callable[..., dict[str, Any]],
    captures: bool,
    bench: Callable[..., Bench],
    tmp_path: Path,
) -> None:
    both = bench(make(tmp_path / "model.onnx"), captures=captures)
    kept = []
    for seed, batch in enumerate([3, 1, 3, 5, 1, 5, 3]):
        inputs = inputs_of(batch, seed)
        got, want = both.device.run(inputs), both.plain.run(inputs)
        np.testing.assert_array_equal(got, want)
        kept.append((got, want))
    for got, want in kept:  # a result is the caller's: later runs do not write into it
        np.testing.assert_array_equal(got, want)
    assert both.buffers == 3 * 3  # of three batch sizes, two inputs and an output
    assert both.gpu.waited == 7, "the host waits once a call"


def test_a_batch_size_keeps_its_addresses_and_its_graph(bench: Callable[..., Bench], tmp_path: Path) -> None:
    both = bench(denoiser(tmp_path / "model.onnx"), captures=True)
    both.device.run(inputs_of_denoiser(2))
    ((before, bound),) = both.device._ready.items()
    addresses = [buffer.device for buffer in (*bound.inputs.values(), bound.output)]
    both.device.run(inputs_of_denoiser(3))
    both.device.run(inputs_of_denoiser(2, seed=1))
    again = both.device._ready[before]
    assert [buffer.device for buffer in (*again.inputs.values(), again.output)] == addresses
    assert sorted(both.graph_ids()) == ["1", "2"]  # 0 is ONNX Runtime's own
    assert bound.options.get_run_config_entry("disable_synchronize_execution_providers") == "1"


def test_the_oldest_batch_size_is_dropped_and_its_graph_id_is_not_given_again(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    both = bench(denoiser(tmp_path / "model.onnx"), captures=True)
    for batch in range(1, KEPT + 1):
        both.device.run(inputs_of_denoiser(batch))
    both.device.run(inputs_of_denoiser(1))  # the last used is the last to go
    both.device.run(inputs_of_denoiser(20))
    assert len(both.device._ready) == KEPT
    assert both.buffers == 3 * KEPT
    sizes = [key[0][0] for key in both.device._ready]
    assert 2 not in sizes
    assert sizes[-2:] == [1, 20]
    inputs = inputs_of_denoiser(2, seed=4)
    np.testing.assert_array_equal(both.device.run(inputs), both.plain.run(inputs))
    assert both.graph_ids()[-1] == str(KEPT + 2), "replaying graph 2 would write where its buffers were"


def test_released_memory_is_freed_and_made_again(bench: Callable[..., Bench], tmp_path: Path) -> None:
    both = bench(denoiser(tmp_path / "model.onnx"), captures=True)
    for batch in (1, 2):
        both.device.run(inputs_of_denoiser(batch))
    both.device.release()
    assert not both.buffers
    inputs = inputs_of_denoiser(2, seed=4)
    np.testing.assert_array_equal(both.device.run(inputs), both.plain.run(inputs))
    assert both.graph_ids() == ["3"], "a released graph would write where its buffers were"


def test_without_captures_no_graph_is_requested(bench: Callable[..., Bench], tmp_path: Path) -> None:
    both = bench(denoiser(tmp_path / "model.onnx"), captures=False)
    both.device.run(inputs_of_denoiser(2))
    (bound,) = both.device._ready.values()
    with pytest.raises(RuntimeError, match="gpu_graph_id"):
        bound.options.get_run_config_entry("gpu_graph_id")


def test_every_run_inside_timed_is_timed_and_none_outside(bench: Callable[..., Bench], tmp_path: Path) -> None:
    both = bench(sampler(tmp_path / "model.onnx"), captures=False)
    both.device.run(inputs_of_sampler(2))
    with both.device.timed() as times:
        both.device.run(inputs_of_sampler(2))
        both.device.run(inputs_of_sampler(3))
    both.device.run(inputs_of_sampler(2))
    assert len(times) == 2
    for each in times:
        assert (each.copy_in_ms, each.compute_ms, each.copy_out_ms) == (1.0, 1.0, 1.0)  # a tick each
        assert 0 < each.enqueue_ms <= each.host_ms


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": None}, "the graph's inputs are x, sigma, got x"),
        ({"x": np.zeros((2, 1, 8, 8))}, "ONNX Runtime failed on cuda; if memory is short, try a smaller batch: Cannot"),
        ({"x": np.zeros((2, 1, 8, 9), np.float32)}, "ONNX Runtime failed on cuda; if memory is short, try a smaller"),
    ],
)
def test_inputs_that_the_graph_does_not_take_are_an_error_and_leave_nothing_behind(
    change: dict[str, Any], words: str, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    both = bench(denoiser(tmp_path / "model.onnx"), captures=False)
    wrong = {name: value for name, value in {**inputs_of_denoiser(2), **change}.items() if value is not None}
    with pytest.raises(BackendError) as caught:
        both.device.run(wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not both.buffers
    inputs = inputs_of_denoiser(2)
    np.testing.assert_array_equal(both.device.run(inputs), both.plain.run(inputs))


def test_a_capture_that_fails_says_so_and_its_id_is_not_given_again(
    bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = bench(denoiser(tmp_path / "model.onnx"), captures=True)

    def fail(binding: Any, options: Any) -> None:
        raise RuntimeError("CUDA failure 900: operation not permitted\nwhen stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(both.session, "run_with_iobinding", fail)
        with pytest.raises(BackendError) as caught:
            both.device.run(inputs_of_denoiser(2))
    assert str(caught.value) == (
        "ONNX Runtime could not capture this graph as a CUDA graph; use it without the variant cuda_graph: "
        "CUDA failure 900: operation not permitted when stream is capturing"
    )
    assert not both.buffers
    both.device.run(inputs_of_denoiser(2))
    assert both.graph_ids() == ["2"]
