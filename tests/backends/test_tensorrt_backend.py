# SPDX-License-Identifier: MIT
"""Running engines: what is refused before anything is loaded, and the engine itself on a GPU made of host memory.

What only a real GPU can show is in test_gpu.
"""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.backends import DrawBackend, ReleasingBackend, open_backend, tensorrt, tensorrt_session
from cmfast.backends.cuda import drawing, kernels
from cmfast.backends.cuda import runtime as cuda_runtime
from cmfast.backends.tensorrt import check_gpu, check_host, check_version
from cmfast.backends.tensorrt_session import KEPT
from cmfast.errors import ArtifactError, BackendError, CmfastError, CmfastWarning
from cmfast.formats.manifest import file_sha256
from cmfast.formats.table import read_manifest
from cmfast.noise import gaussian
from cmfast_export.pipeline import export_onnx
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions
from helpers.host_cuda import HostContext, HostCuda, HostTensorRt

pytest.importorskip("tensorrt_rtx")
Factory = Callable[..., Path]


@pytest.fixture(scope="module")
def plans(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A denoiser and a two-step sampler, built by TensorRT-RTX for batches of 2 to 4, each beside its ONNX file."""
    folder = tmp_path_factory.mktemp("plans")
    for kind in ("denoiser", "sampler"):
        steps = None if kind == "denoiser" else 2
        export_onnx(tiny_checkpoint(10, levels=1), folder / f"{kind}.onnx", kind=kind, steps=steps)
        build_engine(folder / f"{kind}.onnx", folder / f"{kind}.engine", BuildOptions(batch=(2, 3, 4)))
    return {kind: folder / f"{kind}.engine" for kind in ("denoiser", "sampler")}


Open = Callable[..., tuple[cmfast.Model, HostCuda, HostTensorRt]]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, plans: dict[str, Path]) -> Open:
    """Return a function that opens an engine on a GPU made of host memory, as TensorRT-RTX's or as TensorRT's."""

    def open_it(kind: str, library: str = "tensorrt") -> tuple[cmfast.Model, HostCuda, HostTensorRt]:
        plan = plans[kind]
        cuda = HostCuda()
        trt = HostTensorRt(cuda, plan.with_suffix(".onnx"), read_manifest(plan).engine["version"])
        monkeypatch.setattr(cuda_runtime, "runtime", lambda: cuda)
        monkeypatch.setattr(kernels, "driver", lambda: cuda)
        monkeypatch.setattr(tensorrt, "import_library", lambda name, what: trt)
        built = read_manifest(plan)
        manifest = replace(built, engine={**built.engine, "library": library})
        monkeypatch.setattr(tensorrt, "parse_plan", lambda data, path: manifest)
        monkeypatch.setattr(tensorrt, "cuda_major", lambda name: manifest.engine["cuda"])
        return cmfast.load(plan), cuda, trt

    return open_it


def assert_same_images(engine: cmfast.Model, onnx: Path, n: int = 11) -> None:
    ours = engine.sample_float(n, steps=2, seed=4, batch=5)
    theirs = cmfast.load(onnx).sample_float(n, steps=2, seed=4, batch=5)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)  # one library, other batches


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_an_engine_draws_what_its_onnx_file_draws_in_batches_above_and_below_its_own(
    kind: str, library: str, on_host: Open, plans: dict[str, Path]
) -> None:
    model, _, _ = on_host(kind, library)
    assert_same_images(model, plans[kind].with_suffix(".onnx"))  # 5 = 4 + 1, 1 filled up to 2


def test_a_sampler_is_one_graph_a_batch_size_replayed_without_another_capture(on_host: Open) -> None:
    model, cuda, _ = on_host("sampler")
    noise = np.stack([gaussian(0, range(4), k, (1, 8, 8)) for k in range(2)])
    first = [model.from_noise(noise[:, :n], (80.0, 0.8), np.arange(n)) for n in (4, 3, 4, 3, 4)]
    assert len(cuda.graphs) == 2
    assert len(cuda.launches) == 5
    assert len(set(cuda.launches)) == 2
    for images in first[1:]:
        np.testing.assert_allclose(images, first[0][: len(images)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_a_batch_is_drawn_by_one_launch_of_one_graph(kind: str, on_host: Open) -> None:
    model, cuda, _ = on_host(kind)
    model.sample(12, batch=4, steps=2)
    assert len(cuda.launches) == 3
    assert len(set(cuda.launches)) == len(cuda.graphs) == 1
    model.sample(8, batch=4, steps=2, seed=5)
    assert len(cuda.launches) == 5
    assert len(set(cuda.launches)) == len(cuda.graphs) == 1


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_drawings_that_take_turns_with_other_sizes_and_a_release_do_not_disturb_each_other(
    kind: str, library: str, on_host: Open, plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_session, "KEPT", 1)
    monkeypatch.setattr(drawing, "KEPT", 1)
    model, cuda, _ = on_host(kind, library)
    onnx, sigmas = cmfast.load(plans[kind].with_suffix(".onnx")), model.sigmas_for(2)
    batches = [(range(4 * i, 4 * i + 4), {"label": np.arange(4)}) for i in range(4)]
    want = [onnx.sample_float(4, steps=2, first=4 * i, label=[0, 1, 2, 3]) for i in range(4)]
    assert isinstance(model.backend, DrawBackend)
    drawn = model.backend.draw(0, batches, sigmas, pixels=False)
    got = [next(drawn).images]
    assert cuda.queue, "the next batch is on the way"
    model.sample(3, steps=2)  # another size, for which the first is freed
    got.append(next(drawn).images)
    model.sample(4, steps=2)  # another kind of result
    got.append(next(drawn).images)
    assert cuda.queue
    model.backend.release()  # type: ignore[attr-defined]
    got += [each.images for each in drawn]
    np.testing.assert_allclose(np.stack(got), np.stack(want), rtol=0, atol=1e-5)
    assert cuda.events == {}


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_an_engine_that_fails_at_any_of_its_runs_leaves_nothing_and_the_next_drawing_works(
    kind: str, library: str, on_host: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cuda, trt = on_host(kind, library)
    want, runs, left = model.sample(8, batch=4, steps=2), 0, 10**9
    execute = HostContext.execute_async_v3

    def sometimes(context: HostContext, stream: int) -> bool:
        nonlocal runs, left
        runs, left = runs + 1, left - 1
        return left >= 0 and execute(context, stream)

    monkeypatch.setattr(HostContext, "execute_async_v3", sometimes)
    assert isinstance(model.backend, ReleasingBackend)
    model.backend.release()
    model.sample(8, batch=4, steps=2)
    for fails in range(runs):
        model.backend.release()
        left = fails
        with pytest.raises(BackendError, match="failed: "):
            model.sample(8, batch=4, steps=2)
        assert cuda.events == {}
        left = 10**9
        np.testing.assert_array_equal(model.sample(8, batch=4, steps=2), want)
    left = 0
    model.backend.release()
    gc.disable()  # no cycle of an error keeps anything
    try:
        with pytest.raises(BackendError, match="failed: "):
            model.sample(8, batch=4, steps=2)
        trt.contexts.clear()
        model.backend = None  # type: ignore[assignment]
        assert [cuda.memory, cuda.graphs, cuda.streams] == [{}, {}, set()]
    finally:
        gc.enable()


def test_an_engine_whose_types_are_not_the_manifests_is_refused(on_host: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, trt = on_host("denoiser")
    monkeypatch.setattr(trt, "nptype", lambda dtype: np.float16 if dtype is np.float32 else dtype)
    with pytest.raises(BackendError, match="the engine has x in float16, its manifest in float32; build it here"):
        model.sample(4, steps=2)


def test_released_memory_and_graphs_are_freed_and_made_again(on_host: Open) -> None:
    model, cuda, _ = on_host("sampler")
    noise = np.stack([gaussian(0, range(4), k, (1, 8, 8)) for k in range(2)])
    before = [model.from_noise(noise[:, :n], (80.0, 0.8), np.arange(n)) for n in (4, 3)]
    assert cuda.graphs
    assert isinstance(model.backend, ReleasingBackend)
    model.backend.release()
    assert not cuda.graphs
    assert not cuda.memory
    np.testing.assert_array_equal(model.from_noise(noise, (80.0, 0.8), np.arange(4)), before[0])
    assert len(cuda.graphs) == 1


def test_replays_see_new_noise_and_new_labels(on_host: Open, plans: dict[str, Path]) -> None:
    model, _, _ = on_host("sampler")
    reference = cmfast.load(plans["sampler"].with_suffix(".onnx"))
    seen = []
    for seed in range(3):
        noise = np.stack([gaussian(seed, range(3), k, (1, 8, 8)) for k in range(2)])
        label = np.array([seed, 9 - seed, 5])
        seen.append(model.from_noise(noise, (80.0, 0.8), label))
        np.testing.assert_allclose(seen[-1], reference.from_noise(noise, (80.0, 0.8), label), rtol=0, atol=1e-5)
    assert np.abs(seen[0] - seen[1]).max() > 0.1
    assert np.abs(seen[1] - seen[2]).max() > 0.1


def test_tensorrt_rtx_captures_by_itself_with_kernels_compiled_for_the_shape(on_host: Open) -> None:
    model, cuda, trt = on_host("sampler", "tensorrt_rtx")
    model.sample(4)
    assert cuda.launches == []
    (context,) = trt.contexts
    assert context.config.cuda_graph_strategy == "whole"
    assert context.config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert not hasattr(context.config, "cache")  # nothing is kept unless a folder is said


def test_kernels_that_tensorrt_rtx_compiled_are_kept_where_it_was_said_for_the_next_process(
    on_host: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMFAST_CACHE", str(tmp_path / "cache"))
    model, _, trt = on_host("denoiser", "tensorrt_rtx")
    model.sample(4)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.read_bytes() == b"compiled;"
    again, _, trt = on_host("denoiser", "tensorrt_rtx")
    again.sample(4)
    again.sample(3)
    assert [context.config.cache.content for context in trt.contexts] == [b"compiled;"] * 2
    on_host("denoiser", "tensorrt")[0].sample(4)
    assert list((tmp_path / "cache").iterdir()) == [file]


def test_only_the_batch_sizes_used_last_keep_their_memory(on_host: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_session, "KEPT", 2)
    model, cuda, _ = on_host("denoiser")
    x = gaussian(0, range(4), 0, (1, 8, 8))
    for n in (2, 3, 4, 2, 3):
        model.denoise(x[:n], 1.0, 0)
        assert len(cuda.graphs) <= 2
        assert len(cuda.memory) <= 2 * 2 * 4  # x, sigma, label, denoised: on both sides, for two sizes
    assert KEPT >= 2


def test_everything_is_freed_with_the_engine(on_host: Open) -> None:
    model, cuda, trt = on_host("denoiser")
    model.sample(4, steps=2)
    assert cuda.memory
    trt.contexts.clear()
    model.backend = None  # type: ignore[assignment]
    assert cuda.memory == {}
    assert cuda.graphs == {}
    assert cuda.streams == set()


def test_a_buffer_whose_second_half_is_not_to_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = HostCuda()
    monkeypatch.setattr(cuda_runtime, "runtime", lambda: gpu)
    monkeypatch.setattr(gpu, "cudaHostAlloc", lambda size, flags: (1, None))
    gpu.cudaHostAlloc.__name__ = "cudaHostAlloc"
    with pytest.raises(BackendError, match="CUDA failed in cudaHostAlloc: invalid argument"):
        cuda_runtime.Buffer((4,), np.float32)
    assert gpu.memory == {}


def test_a_run_that_fails_leaves_no_events(on_host: Open) -> None:
    model, gpu, trt = on_host("denoiser", "tensorrt_rtx")
    model.sample(4)
    trt.contexts[0].execute_async_v3 = lambda stream: False  # type: ignore[method-assign]
    with model.backend.timed(), pytest.raises(BackendError, match="TensorRT-RTX cuda failed"):  # type: ignore[attr-defined]
        model.sample(4)
    gpu.cudaStreamSynchronize(0)
    assert gpu.events == {}


def test_device_times_come_between_events_in_order(on_host: Open) -> None:
    model, cuda, _ = on_host("denoiser")
    noise = np.stack([gaussian(0, range(4), k, (1, 8, 8)) for k in range(2)])
    with model.backend.timed() as times:  # type: ignore[attr-defined]
        model.from_noise(noise, (80.0, 0.8), np.arange(4))
        assert len(times) == 2  # calls of the network
        model.sample(12, batch=4, steps=2)
    assert [(t.copy_in_ms, t.compute_ms, t.copy_out_ms) for t in times] == [(1.0, 1.0, 1.0)] * 5  # a tick each
    assert all(t.host_ms >= t.enqueue_ms > 0 for t in times)
    assert cuda.events == {}
    model.sample(4, steps=2)
    assert len(times) == 5


def test_the_host_memory_gpu_has_the_functions_of_the_real_one_with_their_parameters() -> None:
    pytest.importorskip("cuda.bindings")
    from cuda.bindings import driver, runtime

    names = [
        name
        for name in vars(HostCuda)
        if re.match("cu(da)?[A-Z].*", name) and inspect.isfunction(getattr(HostCuda, name))
    ]
    assert len(names) > 25
    for name in names:
        real = runtime if name.startswith("cuda") else driver
        said = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__.splitlines()[0])
        assert said, name
        parameters = [re.split(r"[:\s]", part.strip())[-1 if ":" not in part else 0] for part in said[1].split(",")]
        ours = list(inspect.signature(getattr(HostCuda, name)).parameters)[1:]
        assert [p.lstrip("*") for p in parameters if p] == ours, name


def test_the_host_memory_tensorrt_has_the_names_of_the_real_one() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for ours, theirs in (
        (HostTensorRt, real), (HostTensorRt.TensorIOMode, real.TensorIOMode),
        (HostTensorRt.CudaGraphStrategy, real.CudaGraphStrategy),
        (HostTensorRt.DynamicShapesKernelSpecializationStrategy, real.DynamicShapesKernelSpecializationStrategy),
    ):  # fmt: skip
        assert [n for n in vars(ours) if n[0] != "_" and not hasattr(theirs, n)] == []
    assert hasattr(real.Runtime, "deserialize_cuda_engine")
    assert hasattr(real.Runtime, "engine_host_code_allowed")
    used = "get_tensor_name get_tensor_mode get_tensor_shape get_tensor_dtype create_runtime_config num_io_tensors"
    assert all(hasattr(real.ICudaEngine, name) for name in used.split())
    used = "set_input_shape get_tensor_shape set_tensor_address execute_async_v3"
    assert all(hasattr(real.IExecutionContext, name) for name in used.split())
    used = "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy create_runtime_cache set_runtime_cache"
    assert all(hasattr(real.IRuntimeConfig, name) for name in used.split())
    assert all(hasattr(real.IRuntimeCache, name) for name in ("serialize", "deserialize"))


# What is refused.


def test_a_plan_that_the_library_cannot_load_is_refused_with_its_words(
    on_host: Open, plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host("denoiser")
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"unloadable")  # parse_plan is patched
    with pytest.raises(
        BackendError, match=r"TensorRT cannot load it: Serialization assertion failed\.; build it here: "
    ):
        cmfast.load(plans["denoiser"])


def test_without_a_gpu_that_is_said_in_one_line(plans: dict[str, Path]) -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    if not int(real.cudaGetDeviceCount()[0]):
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"^no NVIDIA GPU can be used here \(.+\); check the driver: nvidia-smi$"):
        cmfast.load(plans["denoiser"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu"}, "runs on NVIDIA GPUs only, not on cpu: --device cuda"),
        ({"variant": "cuda_graph"}, "runs one way only, not cuda_graph"),
        ({"precision": "fp16"}, "runs in the precision that it was exported with"),
        ({"sha256": "0" * 64}, "not " + "0" * 64 + " as requested; not opened"),
        ({"sha256": "0"}, "a SHA-256 has 64 hex digits"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(options: dict[str, Any], words: str, plans: dict[str, Path]) -> None:
    with pytest.raises(CmfastError, match=words):
        open_backend(plans["denoiser"], **options)


def test_the_right_sha256_lets_it_through(on_host: Open, plans: dict[str, Path]) -> None:
    on_host("denoiser")
    cmfast.load(plans["denoiser"], sha256=file_sha256(plans["denoiser"]).upper())
    with pytest.raises(ArtifactError, match="not opened"):
        cmfast.load(plans["denoiser"], sha256="f" * 64)


def manifest(plans: dict[str, Path], **engine: Any) -> Any:
    built = read_manifest(plans["denoiser"])
    return replace(built, engine={**built.engine, "library": "tensorrt", **engine})


HERE = Path("model.engine")
REBUILD = "build it here: cmfast-export model.onnx --format engine"


def test_an_engine_for_another_system_is_refused(plans: dict[str, Path]) -> None:
    with pytest.raises(BackendError) as caught:
        check_host(HERE, manifest(plans, platform="windows_amd64"))
    assert str(caught.value).startswith("model.engine: built for windows_amd64, this is ")
    assert str(caught.value).endswith(REBUILD)
    check_host(HERE, manifest(plans))
    check_host(HERE, manifest(plans, platform="windows_amd64", library="tensorrt_rtx"))  # portable


def test_an_engine_of_another_version_is_refused(plans: dict[str, Path]) -> None:
    with pytest.raises(BackendError) as caught:
        check_version(HERE, manifest(plans, version="10.13.3.9"), "11.4.0.106", "13")
    assert str(caught.value) == (
        f"model.engine: built by TensorRT 10.13.3.9, this is TensorRT 11.4.0.106; install that one, or {REBUILD}"
    )
    check_version(HERE, manifest(plans, version="11.4.0.106"), "11.4.0.106", "13")
    compatible = manifest(plans, version="10.13.3.9", version_compatible=True)
    check_version(HERE, compatible, "11.4.0.106", "13")
    check_version(HERE, compatible, "10.14.0.1", "13")
    for older in ("9.3.0.1", "10.12.0.36"):  # later versions only
        with pytest.raises(BackendError, match=rf"built by TensorRT 10\.13\.3\.9, this is TensorRT {older}"):
            check_version(HERE, compatible, older, "13")


def test_an_engine_for_another_cuda_is_refused(plans: dict[str, Path]) -> None:
    built = manifest(plans, version="11.4.0.106", cuda="12")
    with pytest.raises(BackendError, match="built for CUDA 12, the TensorRT here is for CUDA 13; build it here"):
        check_version(HERE, built, "11.4.0.106", "13")
    check_version(HERE, built, "11.4.0.106", "12")
    check_version(HERE, built, "11.4.0.106", "")  # not known


def test_an_engine_for_another_card_is_refused(plans: dict[str, Path]) -> None:
    gpu = cuda_runtime.Gpu(name="NVIDIA L4", compute_capability="8.9")
    for_hopper = {"compute_capability": ["9.0"]}
    with pytest.raises(BackendError) as caught:
        check_gpu(HERE, manifest(plans, **for_hopper), gpu)
    assert str(caught.value) == (
        f"model.engine: built for compute capability 9.0, the NVIDIA L4 here has 8.9; {REBUILD}"
    )
    check_gpu(HERE, manifest(plans, **for_hopper, hardware_compatible="ampere+"), gpu)
    check_gpu(HERE, manifest(plans, compute_capability=["8.6", "8.9"]), gpu)
    with pytest.warns(CmfastWarning, match="was tuned on the NVIDIA L40S; this is the NVIDIA L4"):
        check_gpu(HERE, manifest(plans, compute_capability=["8.9"], gpu="NVIDIA L40S"), gpu)
    old = cuda_runtime.Gpu(name="NVIDIA T4", compute_capability="7.5")
    with pytest.raises(BackendError, match=r"the NVIDIA T4 here has 7\.5"):
        check_gpu(HERE, manifest(plans, **for_hopper, hardware_compatible="ampere+"), old)
