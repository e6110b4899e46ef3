# SPDX-License-Identifier: MIT
"""Drawing on a GPU without torch: the kernels of `sampling.ptx` and the loops around a network, against numpy.

Kernels run on a GPU made of host memory, instruction by instruction, and with `pytest -m gpu` on an NVIDIA GPU.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import cmfast
from cmfast import noise, sampling
from cmfast.backends import DrawBackend
from cmfast.backends.cuda import drawing
from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.cuda.kernels import PTX, SIGNATURES, Kernels
from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.onnxruntime_cuda import CudaSession
from cmfast.conditions import Condition, class_label
from cmfast.errors import BackendError, CheckFailed, CmfastError, CmfastWarning, OutOfMemory
from cmfast.formats.manifest import Manifest
from cmfast.spec import ModelSpec
from helpers import GOLDEN_NOISE, ROOT
from helpers.cpp import need_compiler
from helpers.host_cuda import HostCuda, HostSession
from helpers.kernels.ptx import Module

SOURCE = ROOT / "cmfast" / "backends" / "cuda"
CANARY = np.float32(12345.0)


@pytest.fixture
def device(runtime: Any) -> tuple[cuda.Stream, Kernels]:
    """Return a stream and the kernels on it."""
    if isinstance(runtime, HostCuda):
        need_compiler()
    stream = cuda.Stream()
    return stream, Kernels(stream)


def there(stream: cuda.Stream, values: npt.NDArray[Any]) -> cuda.Buffer:
    """Return a buffer with these values on the device."""
    buffer = cuda.Buffer(values.shape, values.dtype)
    buffer.host[...] = values
    stream.to_device(buffer)
    stream.wait()
    return buffer


def back(stream: cuda.Stream, buffer: cuda.Buffer) -> npt.NDArray[Any]:
    stream.to_host(buffer)
    stream.wait()
    return buffer.host.copy()


def assert_same_bits(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def some(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return numbers on both sides of -1 and 1, a zero of each sign among them."""
    values = 2 * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    values.flat[:2] = 0.0, -0.0
    return values


def clip(x0: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore"):
        return np.asarray(sampling._clip(x0, ModelSpec(shape=(1,))))


def test_the_golden_values_of_gaussian_are_drawn_to_the_bit(device: tuple[cuda.Stream, Kernels]) -> None:
    stream, kernels = device
    golden = json.loads(GOLDEN_NOISE.read_text())
    for entry in (*golden["gaussian"], *golden["sums"]):
        size = entry["index"] + 1 if "index" in entry else entry["count"]
        request = there(stream, np.array([int(entry["seed"]), int(entry["sample"])], np.uint64))
        x = there(stream, np.full(size, CANARY))
        kernels.add_noise(x.device, 0, request.device, 1, size, entry["step"], 1.0)
        bits = back(stream, x).view(np.uint32)
        got = bits[-1] if "index" in entry else bits.sum(dtype=np.uint64) % 2**32
        assert int(got) == int(entry.get("value", entry.get("sum")), 16), entry


@pytest.mark.parametrize("size", [1, 3, 4, 257, 3 * 16 * 16])
def test_noise_of_any_samples_seeds_and_steps_is_numpys(size: int, device: tuple[cuda.Stream, Kernels]) -> None:
    stream, kernels = device
    samples = np.array([0, 7, 2**32, 2**63 + 5, 2**64 - 1], np.uint64)
    for seed, step, std in ((0, 0, 1.0), (2**64 - 1, 1, 80.0), (2**40 + 3, 2**32 - 2, 0.3)):
        request = there(stream, np.array([seed, *samples.tolist()], np.uint64))
        x = there(stream, np.full((6, size), CANARY))
        kernels.add_noise(x.device, 0, request.device, 5, size, step, std)
        got = back(stream, x)
        assert_same_bits(got[:5], std * noise.gaussian(seed, samples, step, (size,)))
        assert (got[5] == CANARY).all(), "nothing is written behind"


def test_a_million_values_of_noise_are_numpys(device: tuple[cuda.Stream, Kernels]) -> None:
    stream, kernels = device
    samples = np.arange(1000, dtype=np.uint64)
    request = there(stream, np.array([1, *samples.tolist()], np.uint64))
    x = cuda.Buffer((1000, 1000), np.float32)
    kernels.add_noise(x.device, 0, request.device, 1000, 1000, 0, 1.0)
    want = noise.gaussian(1, samples, 0, (1000,))
    assert (np.abs(want) > 1.44).mean() > 0.1, "the tails are among them"
    assert_same_bits(back(stream, x), want)


def test_more_elements_than_threads_are_all_computed(
    device: tuple[cuda.Stream, Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmfast.backends.cuda.kernels.MOST_BLOCKS", 2)
    stream, kernels = device
    request = there(stream, np.array([5, 0, 1], np.uint64))
    x = there(stream, np.full((2, 5000), CANARY))
    kernels.add_noise(x.device, 0, request.device, 2, 5000, 0, 1.0)
    assert_same_bits(back(stream, x), noise.gaussian(5, range(2), 0, (5000,)))
    kernels.fill(x.device, 10_000, 0.7)
    assert_same_bits(back(stream, x), np.full((2, 5000), 0.7, np.float32))


@pytest.mark.parametrize("clips", [False, True])
def test_renoising_rounds_as_numpy_does(clips: bool, device: tuple[cuda.Stream, Kernels]) -> None:
    stream, kernels = device
    x0 = some(3, 101)
    request = there(stream, np.array([3, 4, 5, 6], np.uint64))
    x, before = there(stream, np.full((3, 101), CANARY)), there(stream, x0)
    kernels.add_noise(x.device, before.device, request.device, 3, 101, 1, 0.7999, clip=clips)
    z = noise.gaussian(3, (4, 5, 6), 1, (101,))
    assert_same_bits(back(stream, x), (clip(x0) if clips else x0) + 0.7999 * z)

    now = some(3, 101, seed=1)
    x = there(stream, now)
    kernels.less_noise(x.device, before.device, 303, 0.01, clip=clips)
    clean = clip(x0) if clips else x0
    assert_same_bits(back(stream, x), clean + 0.01 * (now - clean))


@pytest.mark.parametrize("clips", [False, True])
def test_values_and_pixels_round_as_numpy_does(clips: bool, device: tuple[cuda.Stream, Kernels]) -> None:
    stream, kernels = device
    halves = ((np.arange(-20, 280, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5) - 1).reshape(2, 3, 5, 10)
    for x0 in (some(2, 3, 5, 10), halves.astype(np.float32)):
        flag, source = there(stream, np.zeros(1, np.uint32)), there(stream, x0)
        values, images = there(stream, np.full(x0.shape, CANARY)), there(stream, np.full((2, 5, 10, 3), 77, np.uint8))
        kernels.values(values.device, flag.device, source.device, x0.size, clip=clips)
        kernels.pixels(images.device, flag.device, source.device, 2, (3, 5, 10), clip=clips)
        want = clip(x0) if clips else x0
        assert_same_bits(back(stream, values), want)
        np.testing.assert_array_equal(back(stream, images), sampling.to_uint8(want))
        assert back(stream, flag)[0] == 0


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen_clipped_or_not(
    bad: float, clips: bool, device: tuple[cuda.Stream, Kernels]
) -> None:
    stream, kernels = device
    x0 = some(1, 1, 3, 7)
    x0[0, 0, 2, 6] = bad
    for which in ("values", "pixels"):
        flag, source, to = there(stream, np.zeros(1, np.uint32)), there(stream, x0), cuda.Buffer((21,), np.float32)
        if which == "values":
            kernels.values(to.device, flag.device, source.device, 21, clip=clips)
        else:
            kernels.pixels(to.device, flag.device, source.device, 1, (1, 3, 7), clip=clips)
        assert back(stream, flag)[0] == 1


def test_a_kernel_that_leaves_its_memory_is_found_by_the_host(tmp_path: Path) -> None:
    need_compiler()
    module = Module((SOURCE / PTX).read_text(), tmp_path)
    x = np.zeros(8, np.float32)
    piece = (x.ctypes.data, x.ctypes.data + 16)
    module.run("fill", 1, 32, (x.ctypes.data, 4, 1.0), [piece])
    assert x.tolist() == [1.0] * 4 + [0.0] * 4
    with pytest.raises(AssertionError, match="fill used 4 bytes at"):
        module.run("fill", 1, 32, (x.ctypes.data, 5, 2.0), [piece])


def test_nothing_in_the_kernels_can_be_fused_and_their_constants_are_numpys() -> None:
    ptx = (SOURCE / PTX).read_text()
    rounding = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|sqrt|rcp)\S*\.f(?:32|64)\b", ptx))
    wanted = {f"{name}.rn.f64" for name in ("mul", "add", "div", "sqrt")}
    assert rounding == wanted | {f"{name}.rn.f32" for name in ("mul", "add", "sub")}
    assert ".ftz" not in ptx
    tables = (*noise.CENTRE, *noise.TAIL, noise.ATANH, (noise.LN2,))
    for coefficient in (c for row in tables for c in row):
        assert f"0d{struct.pack('>d', coefficient).hex().upper()}" in ptx


def test_the_signatures_are_those_of_the_kernels() -> None:
    names = {"u64": 8, "u32": 4, "f32": 4}
    found = {
        name: [names[kind] for kind in re.findall(r"\.param \.(\w+) ", parameters)]
        for name, parameters in re.findall(r"\.entry (\w+)\((.*?)\)", (SOURCE / PTX).read_text(), re.DOTALL)
    }
    assert found == {name: [ctypes.sizeof(each) for each in kinds] for name, kinds in SIGNATURES.items()}


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_the_kernels_are_translated_for_a_card_and_spill_nothing(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from triton import knobs

    assembler = (knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas).path
    command = [assembler, "-v", f"--gpu-name=sm_{capability}", str(SOURCE / PTX), "-o", str(tmp_path / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" 0 bytes spill stores, 0 bytes spill loads") == len(SIGNATURES)


def test_the_ptx_was_made_of_this_source() -> None:
    digest = hashlib.sha256((SOURCE / "sampling.cu").read_bytes()).hexdigest()
    assert f"SHA-256 {digest}" in (SOURCE / PTX).read_text(), "run benchmarks/make_ptx.py"


def test_the_ptx_is_what_its_source_compiles_to(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "make_ptx.py", "-o", tmp_path / PTX], capture_output=True, text=True
    )
    if done.returncode and "is not installed" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / PTX).read_text() == (SOURCE / PTX).read_text(), "run benchmarks/make_ptx.py"


# The loop around a network.


def graph(path: Path, spec: ModelSpec, kind: str = "denoiser", batch: Any = "B", scale: float = 0.2) -> Path:
    """Write a network whose values each depend on one value of x, on the noise levels and on the conditions.

    Only products and sums: ONNX Runtime gives the same bits at any place of any batch.
    """
    axes, rank = list(range(1, 1 + len(spec.shape))), len(spec.shape)
    nodes: list[Any] = []
    constants = [helper.make_tensor("axes", TensorProto.INT64, [rank], axes)]
    if kind == "denoiser":
        inputs: dict[str, tuple[int, list[Any]]] = {
            "x": (TensorProto.FLOAT, [batch, *spec.shape]),
            "sigma": (TensorProto.FLOAT, [batch]),
        }
        if spec.second_time:
            inputs["sigma_next"] = (TensorProto.FLOAT, [batch])
        total, weights = "x", {"x": scale, "sigma": 0.01, "sigma_next": 0.3}
    else:
        inputs = {"noise": (TensorProto.FLOAT, [2, batch, *spec.shape])}
        constants += [helper.make_tensor(n, TensorProto.INT64, [], [i]) for i, n in enumerate(("zero", "one"))]
        nodes += [helper.make_node("Gather", ["noise", n], [f"of_{n}"], axis=0) for n in ("zero", "one")]
        nodes += [helper.make_node("Sub", ["of_zero", "of_one"], ["difference"])]
        total, weights = "difference", {"difference": scale}
    for each in spec.conditions:
        shape = [] if each.kind == "class" else list(each.shape)
        inputs[each.name] = (TensorProto.INT64 if each.kind == "class" else TensorProto.FLOAT, [batch, *shape])
        weights[each.name] = 0.05
    weigh = {name: weight for name, weight in weights.items() if name in inputs or name == "difference"}
    for name, weight in weigh.items():
        constants.append(helper.make_tensor(f"{name}_weight", TensorProto.FLOAT, [], [weight]))
        value = name
        if name in inputs and inputs[name][0] == TensorProto.INT64:
            nodes.append(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT))
            value = f"{name}_float"
        elif name not in ("x", "sigma", "sigma_next", "difference"):  # of a vector its second number
            constants.append(helper.make_tensor("second", TensorProto.INT64, [], [1]))
            nodes.append(helper.make_node("Gather", [name, "second"], [f"{name}_second"], axis=1))
            value = f"{name}_second"
        nodes.append(helper.make_node("Mul", [value, f"{name}_weight"], [f"{name}_part"]))
        if name not in ("x", "difference"):
            nodes.append(helper.make_node("Unsqueeze", [f"{name}_part", "axes"], [f"{name}_wide"]))
            nodes.append(helper.make_node("Add", [total, f"{name}_wide"], [f"with_{name}"]))
            total = f"with_{name}"
        else:
            total = f"{name}_part"
    nodes[-1].output[0] = "out"
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, *spec.shape])],
            initializer=constants,
        ),
        opset_imports=[helper.make_opsetid("", 22)],
        ir_version=10,
    )
    helper.set_model_props(model, {"cmfast": Manifest(kind=kind, spec=spec).to_json()})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


class Here:
    """A file on a GPU made of host memory, as ONNX Runtime runs it, and beside it on the CPU."""

    def __init__(self, gpu: HostCuda, path: Path, *, captures: bool = False) -> None:
        need_compiler()
        self.gpu, self.plain, backend = gpu, cmfast.load(path), OnnxRuntimeBackend(path)
        self.session = CudaSession(
            onnxruntime, HostSession(backend._session, gpu), backend.manifest, cuda.Stream(), "a GPU",
            batch=backend.batch, captures=captures, place="cpu",
        )  # fmt: skip
        backend.draw = self.session.draw
        assert isinstance(backend, DrawBackend)
        assert not isinstance(self.plain.backend, DrawBackend)
        self.model = cmfast.Model(backend)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Here]:
    gpu = HostCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)
    monkeypatch.setattr("cmfast.backends.cuda.kernels.driver", lambda: gpu)
    return functools.partial(Here, gpu)


IMAGES = ModelSpec(shape=(3, 6, 5), conditions=(class_label(10),), sigmas={1: (80.0,), 3: (80.0, 4.0, 2.0)})
STATE = Condition(name="state", kind="tensor", shape=(4,))
SPECS = {
    "images": IMAGES,
    "not clipped": replace(IMAGES, clip=False),
    "plain noise": replace(IMAGES, renoise="plain"),
    "ddim": replace(IMAGES, renoise="ddim"),
    "a flow map": replace(IMAGES, second_time=True),
    "a flow map by ddim": replace(IMAGES, second_time=True, renoise="ddim", conditions=()),
    "signals with a state": ModelSpec(
        shape=(2, 33), conditions=(STATE,), clip=False, sigmas={1: (80.0,), 3: (80.0, 4.0, 2.0)}
    ),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_samples_drawn_on_the_device_are_numpys_to_the_bit(
    name: str, steps: int, here: Callable[..., Here], tmp_path: Path
) -> None:
    spec = SPECS[name]
    both = here(graph(tmp_path / "model.onnx", spec))
    conditions: dict[str, Any] = {}
    if spec.conditions == (STATE,):
        conditions = {"conditions": {"state": np.random.default_rng(0).standard_normal((11, 4)).astype(np.float32)}}
    wanted = {"steps": steps, "seed": 2**63 + 4, "first": 2**40, "batch": 4, **conditions}  # 4 + 4 + 3
    want = both.plain.sample_float(11, **wanted)
    assert want.std() > 0.2
    assert (np.abs(want) == 1).any() == (np.abs(want).max() <= 1) == spec.clip
    assert_same_bits(both.model.sample_float(11, **wanted), want)
    np.testing.assert_array_equal(both.model.sample(11, **wanted), both.plain.sample(11, **wanted))
    assert {"values", "add_noise"} <= set(both.gpu.kernels)
    assert ("less_noise" in both.gpu.kernels) == (spec.renoise == "ddim" and steps > 1)


def test_a_sampler_file_is_given_noise_of_all_its_steps(here: Callable[..., Here], tmp_path: Path) -> None:
    spec = replace(IMAGES, sigmas={2: (80.0, 0.8)})
    both = here(graph(tmp_path / "model.onnx", spec, "sampler", scale=0.9))
    for n, batch in ((7, 3), (2, 64)):
        want = both.plain.sample(n, seed=9, batch=batch)
        assert want.std() > 20
        np.testing.assert_array_equal(both.model.sample(n, seed=9, batch=batch), want)
        assert_same_bits(
            both.model.sample_float(n, seed=9, batch=batch), both.plain.sample_float(n, seed=9, batch=batch)
        )


def test_a_file_of_one_batch_size_is_filled_up(here: Callable[..., Here], tmp_path: Path) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES, batch=4))
    for n in (1, 4, 6):
        np.testing.assert_array_equal(both.model.sample(n, steps=3), both.plain.sample(n, steps=3))
    ((key, _),) = both.session._ready.items()
    assert key[0] == (4, 3, 6, 5)


def test_only_requests_go_in_and_only_samples_come_out_while_the_next_batch_runs(
    here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    both.model.sample(8, steps=3, batch=4)
    copies: list[tuple[int, int]] = []
    copy = both.gpu.cudaMemcpyAsync

    def counted(dst: int, src: int, count: int, kind: int, stream: int) -> tuple[int]:
        copies.append((kind, count))
        return copy(dst, src, count, kind, stream)

    monkeypatch.setattr(both.gpu, "cudaMemcpyAsync", counted)
    both.gpu.kernels.clear()
    waited = both.gpu.waited
    drawn = both.model.backend.draw(  # type: ignore[attr-defined]
        0, [(range(4 * i, 4 * i + 4), {"label": np.arange(4)}) for i in range(3)], (80.0, 4.0, 2.0), pixels=True
    )
    next(drawn)
    assert both.gpu.kernels.count("pixels") == 2, "the second batch was handed over before the first was waited for"
    assert both.gpu.waited == waited + 1
    assert len(list(drawn)) == 2
    into, out = (1, 8 * 5), (2, drawing.FLAG + 4 * 90)  # seed and indices; pixels
    assert copies == [into, (1, 8 * 4), out] * 3
    assert both.gpu.waited == waited + 3


def test_samples_that_are_not_finite_are_an_error_with_the_noise_levels(
    here: Callable[..., Here], tmp_path: Path
) -> None:
    both = here(graph(tmp_path / "model.onnx", replace(IMAGES, clip=False), scale=3e38))
    with pytest.raises(CheckFailed) as caught:
        both.model.sample(3, steps=3)
    assert "returned values that are not finite" in str(caught.value)
    assert "80, 4, 2" in str(caught.value)
    with pytest.raises(CheckFailed, match="returned values that are not finite"):
        both.plain.sample(3, steps=3)


def test_a_drawing_that_is_not_finished_disturbs_nothing(here: Callable[..., Here], tmp_path: Path) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES), captures=True)
    batches = [(range(4 * i, 4 * i + 4), {"label": np.arange(4)}) for i in range(4)]
    want = [both.plain.sample(4, steps=3, first=4 * i, label=[0, 1, 2, 3]) for i in range(4)]
    draw = both.model.backend.draw  # type: ignore[attr-defined]
    first = draw(0, batches, (80.0, 4.0, 2.0), pixels=True)
    got = [next(first).images]
    for n in range(1, 12):  # other sizes, more than are kept: the network of the first is freed and made again
        np.testing.assert_array_equal(both.model.sample(n, steps=3), both.plain.sample(n, steps=3))
    got += [next(first).images]
    both.session.release()
    got += [drawn.images for drawn in first]
    np.testing.assert_array_equal(np.stack(got), np.stack(want))

    dropped = draw(0, batches, (80.0, 4.0, 2.0), pixels=True)
    next(dropped)
    dropped.close()
    both.session.release()
    assert both.gpu.queue == []
    assert both.gpu.events == {}
    assert both.gpu.memory.keys() == set(), "everything is freed"


def test_sizes_that_a_file_leaves_open_may_differ_within_a_drawing(here: Callable[..., Here], tmp_path: Path) -> None:
    spec = replace(SPECS["signals with a state"], conditions=(Condition(name="text", kind="tensor", shape=("t",)),))
    both = here(graph(tmp_path / "model.onnx", spec))
    random = np.random.default_rng(0)
    for t in (3, 5, 3):
        text = {"text": random.standard_normal((7, t)).astype(np.float32)}
        got = both.model.sample_float(7, steps=3, batch=3, conditions=text)
        assert_same_bits(got, both.plain.sample_float(7, steps=3, batch=3, conditions=text))
    parts = [(range(0, 3), 2), (range(3, 8), 6), (range(8, 8), 2), (range(8, 9), 2)]
    batches = [(part, {"text": random.standard_normal((len(part), t)).astype(np.float32)}) for part, t in parts]
    drawn = list(both.model.backend.draw(0, batches, (80.0, 4.0, 2.0), pixels=False))  # type: ignore[attr-defined]
    assert [len(each.images) for each in drawn] == [3, 5, 0, 1]
    for (part, text), each in zip(batches, drawn, strict=True):
        if len(part):
            assert_same_bits(
                each.images, both.plain.sample_float(len(part), steps=3, first=part.start, conditions=text)
            )
    assert both.gpu.events == {}


def test_loops_are_kept_for_some_noise_levels_and_results(here: Callable[..., Here], tmp_path: Path) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    draws = both.session._draws
    assert draws is not None
    for i in range(drawing.KEPT + 3):
        sigmas = (80.0, 1.0 + i)
        np.testing.assert_array_equal(both.model.sample(3, sigmas=sigmas), both.plain.sample(3, sigmas=sigmas))
        assert len(draws._loops) <= drawing.KEPT
    pieces = len(both.gpu.memory)
    both.model.sample(3, sigmas=(80.0, drawing.KEPT + 3.0))
    assert len(both.gpu.memory) == pieces


def test_times_are_of_each_batch(here: Callable[..., Here], tmp_path: Path) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    with both.session.timed() as times:
        both.model.sample(11, steps=3, batch=4)
    assert [(t.copy_in_ms, t.compute_ms, t.copy_out_ms) for t in times] == [(1.0, 1.0, 1.0)] * 3
    assert all(t.host_ms >= t.enqueue_ms > 0 for t in times)
    assert both.gpu.events == {}


def test_an_error_of_onnx_runtime_is_one_line_and_the_next_drawing_works(
    here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES), captures=True)

    def fail(binding: Any, options: Any) -> None:
        raise RuntimeError("CUDA failure 900: operation not permitted\nwhen stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(both.session._session, "run_with_iobinding", fail)
        with pytest.raises(BackendError, match="could not capture this graph as a CUDA graph") as caught:
            both.model.sample(3, steps=3)
    assert "\n" not in str(caught.value)
    assert both.gpu.events == {}
    np.testing.assert_array_equal(both.model.sample(3, steps=3), both.plain.sample(3, steps=3))


def test_a_drawing_does_not_go_on_in_another_process(
    here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    batches = [(range(4 * i, 4 * i + 4), {"label": np.arange(4)}) for i in range(4)]
    drawn = both.session.draw(0, batches, (80.0, 4.0, 2.0), pixels=True)
    next(drawn)
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        with pytest.raises(BackendError, match=r"^a GPU was opened before this process was forked"):
            next(drawn)
        with pytest.raises(BackendError, match=r"^a GPU was opened before this process was forked"):
            both.session.release()
    np.testing.assert_array_equal(both.model.sample(3, steps=3), both.plain.sample(3, steps=3))


def test_a_wrong_argument_is_no_failure_of_the_device(here: Callable[..., Here], tmp_path: Path) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    batches = [(range(2), {"label": np.arange(2)})]
    with pytest.raises(CmfastError, match=r"^the seed must be a whole number from 0 to 2\*\*64 - 1, got -1$"):
        list(both.session.draw(-1, batches, (80.0,), pixels=True))


def test_an_error_of_cuda_in_the_middle_leaves_nothing_without_garbage_collection(
    here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    both.model.sample(4, steps=3)
    for what in ("cudaEventRecord", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaEventSynchronize"):

        def fails(*arguments: Any) -> Any:
            return (1,)

        fails.__name__ = what
        gc.disable()
        try:
            with monkeypatch.context() as patched:
                patched.setattr(both.gpu, what, fails)
                with pytest.raises(BackendError, match=f"CUDA failed in {what}: invalid argument"):
                    both.model.sample(8, steps=3, batch=4)
            assert both.gpu.events == {}
            both.session.release()
            assert both.gpu.memory == {}
        finally:
            gc.enable()
        np.testing.assert_array_equal(both.model.sample(3, steps=3), both.plain.sample(3, steps=3))


def test_an_error_in_the_middle_names_its_cause_and_leaves_nothing(
    here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES), captures=True)
    run, count = both.session._session.run_with_iobinding, 0

    def sometimes(binding: Any, options: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:  # in the second batch
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
        run(binding, options)

    with monkeypatch.context() as patched:
        patched.setattr(both.session._session, "run_with_iobinding", sometimes)
        with pytest.raises(BackendError, match=r"ONNX Runtime failed on cuda; .*: CUDA failure 700"):
            both.model.sample(12, steps=3, batch=4)
    assert both.gpu.events == {}
    np.testing.assert_array_equal(both.model.sample(3, steps=3), both.plain.sample(3, steps=3))
    both.session.release()
    assert both.gpu.memory == {}


@pytest.mark.parametrize("what", ["cudaMalloc", "cudaHostAlloc"])
def test_memory_that_is_not_to_be_had_says_so_and_less_works(
    what: str, here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    want, allocate = both.plain.sample(8, steps=3, batch=4), getattr(both.gpu, what)
    left = 10**9

    def some(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        return allocate(*arguments) if left >= 0 else (2, None)

    some.__name__ = what
    monkeypatch.setattr(both.gpu, what, some)
    both.model.sample(8, steps=3, batch=4)
    pieces = 10**9 - left
    assert pieces > 5
    for fails in range(pieces):
        both.session.release()
        assert both.gpu.memory == {}
        left = fails
        with pytest.raises(OutOfMemory, match=r"^CUDA failed in cuda\w+: out of memory; try a smaller batch$"):
            both.model.sample(8, steps=3, batch=4)
        assert both.gpu.events == {}
    left = pieces
    np.testing.assert_array_equal(both.model.sample(8, steps=3, batch=4), want)


@pytest.mark.parametrize("draws", [True, False])
def test_a_session_goes_before_the_stream_that_it_runs_on(
    draws: bool, here: Callable[..., Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = here(graph(tmp_path / "model.onnx", IMAGES))
    gone: list[str] = []
    destroy = both.gpu.cudaStreamDestroy

    def destroyed(stream: int) -> tuple[int]:
        gone.append("stream")
        return destroy(stream)

    both.gpu.cudaStreamDestroy = destroyed  # type: ignore[method-assign]
    session = CudaSession(
        onnxruntime, HostSession(both.session._session._session, both.gpu), both.plain.manifest, cuda.Stream(), "a GPU",
        batch=None, captures=False, place="cpu",
    )  # fmt: skip
    weakref.finalize(session._session, gone.append, "session")
    if draws:
        list(session.draw(0, [(range(4), {"label": np.arange(4)})], (80.0, 4.0, 2.0), pixels=True))
    else:
        session.run({"x": some(2, 3, 6, 5), "sigma": np.ones(2, np.float32), "label": np.arange(2)})
    del session
    assert gone == ["session", "stream"]


def test_a_driver_that_does_not_take_the_kernels_is_a_warning_and_numpy_draws(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = HostCuda(takes_ptx=False)
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)
    monkeypatch.setattr("cmfast.backends.cuda.kernels.driver", lambda: gpu)
    path = graph(tmp_path / "model.onnx", IMAGES)
    backend = OnnxRuntimeBackend(path)
    with pytest.warns(
        CmfastWarning, match="a GPU draws noise and pixels on the CPU, .*unsupported toolchain"
    ) as caught:
        session = CudaSession(
            onnxruntime, HostSession(backend._session, gpu), backend.manifest, cuda.Stream(), "a GPU", batch=None,
            captures=False, place="cpu",
        )  # fmt: skip
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert not session.draws
    assert not gpu.kernels


# cuda-bindings itself, over a driver that writes down what it is asked.

DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <dlfcn.h>
static int here(void) { return 0; }
int cuModuleLoadData(void **module, const char *image) {
    printf("load %zu\n", strlen(image));
    *module = (void *)7;
    return 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("get %s of %d\n", name, (int)(intptr_t)module);
    *function = (void *)(intptr_t)(name[0] + 1000);
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "words of the driver"; return 0; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    int which = (int)(intptr_t)function, on = (int)(intptr_t)stream;
    printf("launch %d %u %u %u %u %u %u %u stream %d extra %d:", which, gx, gy, gz, bx, by, bz, shared, on, extra != 0);
    if (which == 1000 + 'a')
        printf(" %llx %llx %llx %llu %llu %u %g %u", *(unsigned long long *)arguments[0],
               *(unsigned long long *)arguments[1], *(unsigned long long *)arguments[2],
               *(unsigned long long *)arguments[3], *(unsigned long long *)arguments[4], *(unsigned *)arguments[5],
               *(float *)arguments[6], *(unsigned *)arguments[7]);
    printf("\n");
    return gx == 1 ? 1 : 0;
}
int cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, int *status) {
    void *self = dlopen("libcuda.so.1", RTLD_LAZY);
    *address = dlsym(self, name);
    if (!*address) *address = (void *)here;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **address, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, 0);
}
"""

ASKS = """
import sys
from types import SimpleNamespace
from cmfast.backends.cuda.kernels import Kernels
from cmfast.errors import BackendError
kernels = Kernels(SimpleNamespace(handle=42))
kernels.add_noise(0xABCDEF0123456789, 0, 0x1122334455667788, 1000, 3 * 64 * 64, 2**32 - 2, 0.75, clip=True)
try:
    kernels.fill(1, 1, 1.0)
except BackendError as err:
    print(err)
sys.stdout.flush()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="builds a library for Linux")
def test_cuda_bindings_hand_the_driver_what_the_kernels_take(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    (tmp_path / "driver.c").write_text(DRIVER)
    command = [
        need_compiler(),
        "-x",
        "c",
        "-w",
        "-shared",
        "-fPIC",
        tmp_path / "driver.c",
        "-o",
        tmp_path / "libcuda.so.1",
    ]
    subprocess.run([*command, "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ASKS], capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"load {(SOURCE / PTX).stat().st_size}" in lines
    assert {f"get {name} of 7" for name in SIGNATURES} <= set(lines)
    arguments = "abcdef0123456789 0 1122334455667788 1000 12288 4294967294 0.75 1"
    assert f"launch {1000 + ord('a')} 12000 1 1 256 1 1 0 stream 42 extra 0: {arguments}" in lines
    assert "CUDA failed in cuLaunchKernel: words of the driver" in lines
