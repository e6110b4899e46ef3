# SPDX-License-Identifier: MIT
"""CUDA: backends compute there what they compute on the CPU, training runs there; without CUDA, an error says so.

pytest -m gpu        on a machine with an NVIDIA GPU and cmfast[gpu]
"""

from __future__ import annotations

import functools
import json
import math
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import cmfast
from cmfast.backends import DrawBackend, Inputs, TimedBackend, open_backend
from cmfast.backends.onnxruntime import OnnxRuntimeBackend
from cmfast.backends.onnxruntime_cuda import KEPT
from cmfast.errors import BackendError, CmfastError
from cmfast.noise import _normal_quantile
from cmfast.sampling import to_uint8
from cmfast_train.backends import torch_noise
from cmfast_train.backends.pytorch import TorchBackend
from cmfast_train.backends.torch_cuda import OnCuda, arithmetic, capture
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.data.batches import batches
from cmfast_train.denoiser import Denoiser
from cmfast_train.kernels.fuse import fuse
from cmfast_train.networks.adm import AdmConfig, randomise
from cmfast_train.networks.build import build_network
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.networks.fused import fuse_norms
from cmfast_train.training import step_graph
from cmfast_train.training.float32 import exact_float32
from cmfast_train.training.state import Run
from cmfast_train.training.step import optimise
from cmfast_train.training.step_graph import RecordedSteps, Steps, step_of, trying_algorithms, why_not
from helpers.specs import image_spec, named
from helpers.steps import CASES, begin_last_phase, data, new_run, take_steps

Factory = Callable[..., Path]
TOLERANCE = 1e-3  # two float32 libraries sum in other orders; cuDNN's transforms cost some digits more
# Some twenty roundings in a row, each of up to 2^-11 (tf32, fp16) or 2^-9 (bf16) of features of about one.
TOLERANCES = {"fp32": TOLERANCE, "tf32": 20 * 2.0**-11, "fp16": 20 * 2.0**-11, "bf16": 20 * 2.0**-9}
TINY = ["batch=8", "checkpoint_images=32", "log_images=8", "grid=4", "tensorboard=false", "device=cuda"]


@pytest.fixture
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available: no GPU, no driver, or a build of PyTorch for the CPU")


@pytest.fixture
def onnx_cuda(cuda: None) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is a build without CUDA: pip install 'cmfast[gpu]'")


def outputs(model: cmfast.Model) -> list[npt.NDArray[np.float32]]:
    """Return denoised images at several noise levels, and what is sampled, each [5, 1, 8, 8]."""
    noise = cmfast.gaussian(3, range(5), 0, model.spec.image)
    label = np.arange(5)
    denoised = [model.denoise(np.float32(sigma) * noise, sigma, label) for sigma in (0.002, 0.1, 1.0, 10.0, 80.0)]
    return [*denoised, model.sample_float(5, steps=2, seed=3)]


def assert_close(one: cmfast.Model, two: cmfast.Model, tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(outputs(one), outputs(two), strict=True):
        assert theirs.std() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def drawn(model: cmfast.Model, batch: int, seed: int, steps: int = 2) -> npt.NDArray[np.float32]:
    """Return images of a seed, [B, 1, 8, 8]."""
    return model.sample_float(batch, steps=steps, seed=seed, batch=batch)


def export_onnx(*arguments: Any, **options: Any) -> None:
    """Call `cmfast_export.pipeline.export_onnx`, where the packages are that it needs: many GPU machines have none."""
    for package in ("onnx_ir", "onnxscript"):
        pytest.importorskip(package)
    from cmfast_export.pipeline import export_onnx

    export_onnx(*arguments, **options)


def need(precision: str) -> None:
    if precision in ("tf32", "bf16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"this card has no {precision}")


# Backends.

ORDER = [
    (1, 0),
    (3, 1),
    (1, 2),
    (5, 3),
    (3, 4),
    (1, 5),
    (3, 1),
]  # batch size and seed: sizes in turns, noise that differs


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
def test_onnx_runtime_on_cuda_computes_what_it_computes_on_the_cpu(
    variant: str, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx")
    there = cmfast.load(tmp_path / "model.onnx", device="cuda", variant=variant)
    assert_close(there, cmfast.load(tmp_path / "model.onnx"))


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
def test_onnx_runtime_gets_the_device_that_was_requested_without_tensorfloat(handmade_onnx: Factory) -> None:
    backend = open_backend(handmade_onnx(8), "cuda")
    assert isinstance(backend, OnnxRuntimeBackend)
    assert backend.name == "ONNX Runtime cuda"
    session = backend._session
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    assert session.get_provider_options()["CUDAExecutionProvider"]["use_tf32"] == "0"


@pytest.fixture(scope="module")
def sampler_file(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a factory of two-step sampler graphs of a precision, all of the same weights."""
    folder = tmp_path_factory.mktemp("samplers")

    @functools.cache
    def make(precision: str) -> Path:
        target = folder / f"{precision}.onnx"
        export_onnx(tiny_checkpoint(10), target, kind="sampler", steps=2, precision=precision)
        return target

    return make


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_onnx_runtime_draws_the_right_images_whatever_the_order_of_batch_sizes(
    precision: str, variant: str, sampler_file: Callable[[str], Path]
) -> None:
    need(precision)
    here = cmfast.load(sampler_file("fp32"))
    there = cmfast.load(sampler_file(precision), device="cuda", variant=variant)
    kept = []
    for batch, seed in ORDER:
        got, want = drawn(there, batch, seed), drawn(here, batch, seed)
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCES[precision])
        kept.append(got)
    np.testing.assert_array_equal(kept[1], kept[-1])  # the same noise again, after other sizes in between
    assert np.abs(kept[0] - kept[2]).max() > 0.1, "a replay read the noise of another call"


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
def test_a_tensorfloat_file_is_run_so(sampler_file: Callable[[str], Path]) -> None:
    need("tf32")
    backend = open_backend(sampler_file("tf32"), "cuda")
    assert isinstance(backend, OnnxRuntimeBackend)
    assert backend._session.get_provider_options()["CUDAExecutionProvider"]["use_tf32"] == "1"


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
def test_a_batch_size_that_was_dropped_is_captured_anew(sampler_file: Callable[[str], Path]) -> None:
    here = cmfast.load(sampler_file("fp32"))
    there = cmfast.load(sampler_file("fp32"), device="cuda", variant="cuda_graph")
    for batch in (*range(1, KEPT + 3), 1, 2):
        np.testing.assert_allclose(drawn(there, batch, batch), drawn(here, batch, batch), rtol=0, atol=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)  # TensorRT builds an engine at the first call
@pytest.mark.usefixtures("onnx_cuda")
def test_onnx_runtime_with_tensorrt_draws_the_right_images(sampler_file: Callable[[str], Path]) -> None:
    try:
        there = cmfast.load(sampler_file("fp16"), device="cuda", variant="tensorrt")
    except BackendError as err:
        if "cannot load its TensorRT provider" not in str(err):
            raise
        pytest.skip(str(err))
    assert there.backend.name == "ONNX Runtime cuda tensorrt"
    got, want = drawn(there, 3, 1), drawn(cmfast.load(sampler_file("fp32")), 3, 1)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCES["fp16"])


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("variant", ["", "channels_last", "cuda_graph", "channels_last cuda_graph"])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_pytorch_on_cuda_computes_what_it_computes_on_the_cpu(
    precision: str, variant: str, tiny_checkpoint: Factory
) -> None:
    need(precision)
    backend = open_backend(tiny_checkpoint(10), "cuda", variant=variant, precision=precision)
    assert backend.name == f"PyTorch cuda {precision} {variant}".rstrip()
    before = torch.cuda.memory_allocated()
    assert before > 0, "the weights are elsewhere"
    assert_close(cmfast.Model(backend), cmfast.load(tiny_checkpoint(10)), TOLERANCES[precision])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)  # max-autotune tries every kernel
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("variant", "precision"), [("compiled", "fp32"), ("compiled", "fp16"), ("channels_last reduce-overhead", "bf16")]
)
def test_pytorch_compiled_on_cuda_computes_what_it_computes_on_the_cpu(
    variant: str, precision: str, tiny_checkpoint: Factory
) -> None:
    need(precision)
    backend = open_backend(tiny_checkpoint(10), "cuda", variant=variant, precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # what the compiler says is its affair
        assert_close(cmfast.Model(backend), cmfast.load(tiny_checkpoint(10)), TOLERANCES[precision])


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_recorded_sampler_draws_what_the_loop_draws_whatever_the_order_of_batch_sizes(
    precision: str, tiny_checkpoint: Factory
) -> None:
    loop = cmfast.load(tiny_checkpoint(10), device="cuda", precision=precision)
    graph = cmfast.load(tiny_checkpoint(10), device="cuda", variant="cuda_graph", precision=precision)
    kept = []
    for batch, seed in ORDER:
        for steps in (2, 1):
            got, want = drawn(graph, batch, seed, steps), drawn(loop, batch, seed, steps)
            # The same kernels on the same numbers, unless cuDNN's trials chose another convolution.
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCES[precision])
        kept.append(got)
    np.testing.assert_array_equal(kept[1], kept[-1])  # the same noise again, after other sizes in between
    assert np.abs(kept[0] - kept[2]).max() > 0.1, "a replay read the noise of another call"


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_backends_with_and_without_tensorfloat_do_not_disturb_each_other(tiny_checkpoint: Factory) -> None:
    need("tf32")
    exact, fast = (cmfast.load(tiny_checkpoint(10), device="cuda", precision=each) for each in ("fp32", "tf32"))
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, convolution.fp32_precision
    first = drawn(exact, 3, 1)
    np.testing.assert_allclose(drawn(fast, 3, 1), first, rtol=0, atol=TOLERANCES["tf32"])
    np.testing.assert_array_equal(drawn(exact, 3, 1), first)
    assert (matmul.fp32_precision, convolution.fp32_precision) == before


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("captures", [False, True])
def test_tensorfloat_is_used_where_was_requested_and_nowhere_else(captures: bool) -> None:
    need("tf32")
    x = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ x
    errors = {}
    for tf32 in (True, False):
        device = OnCuda(captures=captures, tf32=tf32)
        product = device("product", lambda tensors: tensors["x"] @ tensors["x"], {"x": x})
        errors[tf32] = np.abs(product - exact).max()
    # The sum of 512 products of about one: float32 rounds each by 2^-24 at most, TensorFloat-32 by 2^-11.
    assert errors[False] < 512 * 2.0**-20
    assert errors[True] > 10 * errors[False]


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_class_that_does_not_exist_is_an_error_and_the_gpu_is_of_use_afterwards(tiny_checkpoint: Factory) -> None:
    model = cmfast.load(tiny_checkpoint(10), device="cuda", variant="cuda_graph")
    noise = np.stack([cmfast.gaussian(1, range(2), 0, model.spec.image)])
    with pytest.raises(CmfastError, match="label 10 is out of range"):
        model.from_noise(noise, (80.0,), np.array([0, 10]))
    assert np.isfinite(model.from_noise(noise, (80.0,), np.array([0, 9]))).all()


def assert_timed(model: cmfast.Model, calls: int) -> None:
    """Assert that sampling three images is `calls` timed calls, each of which took some time of everything."""
    drawn(model, 3, 0)
    assert isinstance(model.backend, TimedBackend)
    with model.backend.timed() as times:
        drawn(model, 3, 1)
    drawn(model, 3, 2)
    assert len(times) == calls
    for each in times:
        parts = (each.copy_in_ms, each.compute_ms, each.copy_out_ms)
        assert min(parts) > 0
        assert 0 < each.enqueue_ms <= each.host_ms
        assert sum(parts) <= 1.1 * each.host_ms + 0.1  # two clocks


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
def test_pytorch_says_what_a_loop_cost(variant: str, tiny_checkpoint: Factory) -> None:
    assert_timed(cmfast.load(tiny_checkpoint(10), device="cuda", variant=variant), calls=1)


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
def test_onnx_runtime_says_what_a_call_cost(
    variant: str, tiny_checkpoint: Factory, sampler_file: Callable[[str], Path], tmp_path: Path
) -> None:
    assert_timed(cmfast.load(sampler_file("fp32"), device="cuda", variant=variant), calls=1)
    export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx")
    model = cmfast.load(tmp_path / "model.onnx", device="cuda", variant=variant)
    assert_timed(model, calls=1 if isinstance(model.backend, DrawBackend) else 2)


@pytest.mark.gpu
@pytest.mark.usefixtures("onnx_cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_what_onnx_runtime_draws_on_the_card_is_what_it_makes_of_noise_from_numpy(
    kind: str, variant: str, tiny_checkpoint: Factory, tmp_path: Path
) -> None:
    export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx", kind=kind, steps=2 if kind == "sampler" else None)
    model = cmfast.load(tmp_path / "model.onnx", device="cuda", variant=variant)
    assert isinstance(model.backend, DrawBackend)
    n, seed, sigmas = 8, 2**63 + 5, model.sigmas_for(2)
    label = model.labels(n, seed=seed)
    assert label is not None
    noise = [np.stack([cmfast.gaussian(seed, range(i, i + 4), k, (1, 8, 8)) for k in range(2)]) for i in (0, 4)]
    x0 = np.concatenate([model.from_noise(z, sigmas, label[4 * i : 4 * i + 4]) for i, z in enumerate(noise)])
    got = model.sample_float(n, steps=2, seed=seed, batch=4)
    np.testing.assert_allclose(got, x0, rtol=0, atol=TOLERANCE)
    assert x0.std() > 0.1
    far = np.abs(model.sample(n, steps=2, seed=seed, batch=4).astype(int) - to_uint8(got).astype(int))
    assert far.max() <= 1


# Noise and whole draws on the card.

INDICES = np.array([0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("way", ["operations", "triton"])
def test_a_million_values_of_noise_on_the_card_have_the_bits_of_numpy(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(torch_noise, "has_triton", lambda: way == "triton")
    samples = torch.from_numpy(INDICES.view(np.int64)).cuda()
    for seed, first, shape in [
        (2**63 + 5, 0, (3, 160, 150)),
        (2**64 - 1, 2**32 - 3, (1, 5, 5)),
        (0, 2**31 - 1, (1024,)),
    ]:
        got = torch_noise.gaussian(torch_noise.key_of(seed).cuda(), samples, 2, shape, first=first)
        assert got.is_cuda
        for k in range(2):
            want = cmfast.gaussian(seed, INDICES, first + k, shape)
            np.testing.assert_array_equal(got[k].cpu().numpy().view(np.uint32), want.view(np.uint32))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_the_quantile_on_the_card_has_the_bits_of_numpy_in_float64() -> None:
    ends = np.arange(5000, dtype=np.uint32)
    border = np.uint32(0.075 * 2**32) - np.uint32(2500) + ends
    words = np.concatenate([ends, ~ends, border, ~border, np.linspace(0, 2**32 - 1, 200_001).astype(np.uint32)])
    got = torch_noise.quantile(torch.from_numpy(words.astype(np.int64)).cuda()).cpu().numpy()
    np.testing.assert_array_equal(got.view(np.uint64), _normal_quantile(words).view(np.uint64))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph", "channels_last cuda_graph"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_drawn_on_the_card_is_what_the_loop_makes_of_noise_from_numpy(
    precision: str, variant: str, tiny_checkpoint: Factory
) -> None:
    need(precision)
    model = cmfast.load(tiny_checkpoint(10), device="cuda", variant=variant, precision=precision)
    assert isinstance(model.backend, DrawBackend)
    n, batch, first = 7, 3, 2**63 - 4
    for seed, steps in [(1, 2), (2**64 - 1, 1), (1, 2)]:
        levels = model.sigmas_for(steps)
        label = model.labels(n, seed=seed, first=first)
        assert label is not None
        want = []
        for start in range(0, n, batch):
            at = np.minimum(np.arange(start, start + batch), n - 1)  # the last batch is filled up
            samples = [first + int(index) for index in at]
            noise = np.stack([cmfast.gaussian(seed, samples, k, model.spec.image) for k in range(steps)])
            want.append(model.from_noise(noise, levels, label[at]))
        x0 = np.concatenate(want)[:n]
        got = model.sample_float(n, steps=steps, seed=seed, batch=batch, first=first)
        # The same kernels on the same noise, unless cuDNN's trials chose another convolution for the other program.
        np.testing.assert_allclose(got, x0, rtol=0, atol=TOLERANCES[precision])
        pixels = model.sample(n, steps=steps, seed=seed, batch=batch, first=first)
        assert pixels.dtype == np.uint8
        far = np.abs(pixels.astype(int) - to_uint8(got).astype(int))
        assert far.max() <= 127.5 * TOLERANCES[precision] + 1
        assert np.ptp(pixels) > 10


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
def test_draws_that_take_turns_on_the_card_or_are_left_do_not_mix_their_images(
    variant: str, tiny_checkpoint: Factory
) -> None:
    backend = open_backend(tiny_checkpoint(0), "cuda", variant=variant)
    assert isinstance(backend, DrawBackend)
    model = cmfast.Model(backend)
    batches: list[tuple[range, Inputs]] = [(range(start, start + 2), {}) for start in range(0, 8, 2)]
    want = {seed: model.sample_float(8, batch=2, seed=seed, sigmas=(80.0, 0.8)) for seed in (1, 2)}
    left = backend.draw(3, batches, (80.0, 0.8), pixels=False)
    next(left)
    one, two = (backend.draw(seed, batches, (80.0, 0.8), pixels=False) for seed in (1, 2))
    for part, _ in batches:
        for seed, drawing in ((1, one), (2, two)):
            with torch.cuda.stream(torch.cuda.Stream() if part.start % 4 else torch.cuda.current_stream()):
                drawn = next(drawing)
            np.testing.assert_allclose(drawn.images, want[seed][part.start : part.stop], rtol=0, atol=TOLERANCE)
    del left
    assert np.abs(want[1] - want[2]).max() > 0.1


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("variant", ["", "cuda_graph"])
def test_a_draw_on_the_card_that_is_not_finite_is_an_error(variant: str, tiny_checkpoint: Factory) -> None:
    model = cmfast.load(tiny_checkpoint(0), device="cuda", variant=variant)
    assert isinstance(model.backend, TorchBackend)
    with torch.no_grad():
        next(model.backend.denoiser.parameters()).fill_(float("inf"))
    with pytest.raises(CmfastError, match="returned values that are not finite"):
        model.sample(3, steps=2, batch=2)


# Training. In processes of their own, because accelerate sets the precision once for a process.


def settings(*assignments: str) -> list[str]:
    last = {text.partition("=")[0]: text for text in (*TINY, *assignments)}  # the command takes each name once
    return [word for assignment in last.values() for word in ("--set", assignment)]


def losses(out: Path) -> dict[int, float]:
    """Return {images: loss} of the log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["images"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", ["edm", "ect", "ct"])
def test_two_steps_of_training_have_finite_losses_in_every_precision(
    precision: str, method: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    options = settings(f"precision={precision}", f"phases={method}:16")
    result = run("cmfast_train.cli.train", "digits", "--out", tmp_path, *options, timeout=240)
    assert result.returncode == 0, result.stderr
    found = losses(tmp_path)
    assert list(found) == [8, 16]
    assert all(math.isfinite(loss) for loss in found.values())
    weights = load_checkpoint(tmp_path / "model.pt").weights
    assert all(torch.isfinite(weight).all() and weight.dtype == torch.float32 for weight in weights.values())


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_killed_run_goes_on_where_it_was(precision: str, run: Callable[..., Any], tmp_path: Path) -> None:
    options = settings(f"precision={precision}", "phases=edm:320,ect:320")
    arguments = ["digits", "--out", str(tmp_path), *options]
    victim = subprocess.Popen([sys.executable, "-m", "cmfast_train.cli.train", *arguments], stderr=subprocess.DEVNULL)
    log, end = tmp_path / "log.jsonl", time.monotonic() + 240
    while victim.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 20):
        assert time.monotonic() < end
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "it had ended before"
    state = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    assert 0 < state["step"] < 40
    assert ("scaler" in state and bool(state["scaler"])) == (precision == "fp16")
    before = losses(tmp_path)
    result = run("cmfast_train.cli.train", *arguments, timeout=240)
    assert result.returncode == 0, result.stderr
    found = losses(tmp_path)
    assert list(found) == list(range(8, 641, 8))
    assert all(math.isfinite(loss) for loss in found.values())
    saved = 8 * state["step"] if state["phase"] == 0 else 320 + 8 * state["step"]
    kept = [images for images in before if images <= saved]
    assert kept
    assert [found[images] for images in kept] == [before[images] for images in kept], "it began again"


# Training by graphs.


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda", "quickly", "any_precision")
@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_compute_what_plain_steps_compute(case: str, tmp_path: Path) -> None:
    bf16 = "precision=bf16" in CASES[case]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for recorded in (False, True):
        run = new_run(tmp_path, *CASES[case], "device=cuda", *([] if bf16 else ["precision=fp32"]))
        device = run.context.accelerator.device
        with exact_float32(device), trying_algorithms(device):  # as `train` takes the steps of a float32 run
            begin_last_phase(run)
            assert why_not(run.context, run.phase) == ""
            take = step_of(run) if recorded else functools.partial(optimise, run)
            results.append(take_steps(run, take, run.state.total))
    assert isinstance(take, RecordedSteps)
    assert take.recordings > 0
    want, got = ([(loss.cpu(), sigma.cpu()) for loss, sigma in each] for each in results)
    assert not np.allclose(want[-1][0], want[-2][0], rtol=0.1)  # a replay of old numbers would be seen
    for step, ((our_loss, our_sigma), (loss, sigma)) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(our_sigma, sigma, err_msg=f"step {step}")
        # The same kernels, but sums whose order differs from run to run, and RAdam makes full steps of small gradients.
        # Another mask of dropout, or a step left out, changes a loss by tens of percent.
        tiny = case.startswith(("cd", "sid"))  # of single images: differences of two networks that are nearly equal
        ours, theirs = (our_loss.mean(), loss.mean()) if bf16 or tiny else (our_loss, loss)
        np.testing.assert_allclose(ours, theirs, rtol=0.1 if bf16 else 0.03, atol=1e-6, err_msg=f"step {step}")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda", "quickly", "any_precision")
def test_a_checkpoint_gets_the_memory_of_the_recorded_step_if_it_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []

    def save(run: Run) -> None:
        reserved.append(torch.cuda.memory_reserved())
        if len(reserved) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step_graph, "save", save)
    run = new_run(tmp_path, "phases=edm:160", "device=cuda")
    take = Steps(run)
    take_steps(run, take, 8)
    take.save()
    before, after = reserved
    assert after < before
    take_steps(run, take, 8)
    assert isinstance(take._take, RecordedSteps)
    assert take._take.recordings == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_run_says_which_phases_are_recorded(run: Callable[..., Any], tmp_path: Path) -> None:
    found = {}
    for graph in ("auto", "false"):
        options = settings("phases=edm:320,sct:80", f"graph={graph}")
        result = run("cmfast_train.cli.train", "digits", "--out", tmp_path / graph, *options, timeout=240)
        assert result.returncode == 0, result.stderr
        found[graph] = losses(tmp_path / graph)
        said = json.loads((tmp_path / graph / "log.jsonl").read_text().splitlines()[0])["graph"]
        assert said["edm"] == {"auto": "recorded", "false": "graph=false"}[graph]
        assert said["sct"] == {"auto": "sct differentiates in forward mode", "false": "graph=false"}[graph]
    for images, loss in found["auto"].items():
        assert math.isclose(loss, found["false"][images], rel_tol=0.2), images  # bf16, and sums in another order
    options = settings("phases=edm:320,sct:80", "graph=true")
    result = run("cmfast_train.cli.train", "digits", "--out", tmp_path / "none", *options, timeout=240)
    assert result.returncode == 2
    assert "graph=true: the steps of sct cannot be a CUDA graph, sct differentiates in forward mode" in result.stderr


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_gpu_makes_the_batches_that_the_thread_makes() -> None:
    where = torch.device("cuda")
    plain = batches(data(), 64, 5, 3, 60, slice(None), 0, True)
    kept = batches(data(), 64, 5, 3, 60, slice(None), 0, True, where)
    for one, two in zip(plain, kept, strict=True):
        for ours, theirs in zip(two, one, strict=True):
            assert ours.device.type == "cuda"
            assert torch.equal(ours.cpu(), theirs)


# Where there is none.


def test_onnx_runtime_without_cuda_is_an_error_with_the_line_that_installs_it(handmade_onnx: Factory) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendError) as caught:
        cmfast.load(handmade_onnx(8), device="cuda")
    assert str(caught.value) == (
        f"device cuda was requested, but the installed onnxruntime {onnxruntime.__version__} is a build without CUDA; "
        "replace it: pip uninstall onnxruntime && pip install 'cmfast[gpu]'"
    )


def test_pytorch_without_cuda_is_an_error_that_names_the_cause(tiny_checkpoint: Factory) -> None:
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has CUDA")
    cause = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    with pytest.raises(BackendError) as caught:
        cmfast.load(tiny_checkpoint(0), device="cuda")
    assert f"device cuda was requested, but PyTorch {torch.__version__} {cause}" in str(caught.value)


# Kernels.

NORMS = [((1, 256, 32, 32), 32), ((256, 256, 8, 8), 32), ((64, 384, 32, 32), 32), ((2, 192, 64, 64), 32),
         ((3, 32, 7, 5), 8), ((1, 96, 1, 1), 24), ((40, 576, 16, 16), 32)]  # fmt: skip
NETWORKS: dict[str, AdmConfig | SongConfig | DhariwalConfig] = {
    "adm": AdmConfig(image_size=16, model_channels=64, channel_mult=(1, 2), attention=(8,), classes=3),
    "adm sum": AdmConfig(image_size=16, model_channels=64, res_blocks=1, scale_shift=False, resblock_updown=False),
    "song": SongConfig(image_size=16, model_channels=64, channel_mult=(1, 2), res_blocks=1, resample=(1, 3, 3, 1)),
    "dhariwal": DhariwalConfig(image_size=16, model_channels=64, channel_mult=(1, 2), res_blocks=1, attention=(8,)),
}


def denoiser_of(name: str, precision: str) -> Denoiser:
    network = build_network(NETWORKS[name]).eval().requires_grad_(False)
    randomise(network)
    denoiser = Denoiser(network, image_spec(image=(3, 16, 16), classes=NETWORKS[name].classes, c_noise="ln/4"))
    return denoiser.to_precision(precision).to("cuda")


def denoiser_inputs(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0, 80.0], device="cuda")
    label = torch.arange(5, device="cuda") % 3 if denoiser.spec.classes else None
    return {"x": torch.randn(5, 3, 16, 16, device="cuda"), "sigma": sigma, **named(label)}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), NORMS, ids=str)
def test_the_fused_norm_computes_what_torch_does_in_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    from cmfast_train.kernels.group_norm import group_norm_silu, normed

    batch, channels = shape[:2]
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for offset, scaled, added, silu in ((0, False, False, True), (100, True, True, False), (100, True, False, True)):
        x = (offset + torch.randn(shape, device="cuda")).to(dtype).contiguous(memory_format=torch.channels_last)
        scale, shift, add = (0.3 * torch.randn(batch, 3 * channels, device="cuda")).split(channels, dim=1)
        weight, bias = 1 + 0.1 * torch.randn(channels, device="cuda"), torch.randn(channels, device="cuda")
        e = (scale if scaled else None, shift if scaled else None, silu, add if added else None)
        got = group_norm_silu(x, groups, weight, bias, 1e-5, *e)
        want = normed(x.double(), groups, weight, bias, 1e-5, *e)
        assert got.dtype == dtype
        assert ((got - want).abs() <= (2e-6 + rounding) * want.abs().clamp(min=1)).all()
        assert torch.equal(got, group_norm_silu(x, groups, weight, bias, 1e-5, *e))


def off(each: torch.Tensor, other: torch.Tensor) -> float:
    return float((each - other).square().mean().sqrt())


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_on_cuda_computes_what_it_was_made_from(name: str, precision: str) -> None:
    need(precision)
    denoiser, exact = denoiser_of(name, precision), denoiser_of(name, "fp32")
    inputs = denoiser_inputs(denoiser)
    with torch.inference_mode(), arithmetic(tf32=False):
        want = exact(**inputs)
    with torch.inference_mode(), arithmetic(tf32=precision == "tf32"):
        error = max(off(denoiser(**inputs), want), 1e-4)  # of float32: cuDNN may transform
        fuse(denoiser)
        fused = denoiser(**inputs)
        assert want.std() > 0.1
        assert off(fused, want) <= 1.5 * error  # as many roundings, others
        replay = capture(lambda: denoiser(**inputs))
        assert off(replay(), fused) <= error  # cuDNN may choose again
        inputs["x"].neg_()
        assert off(replay(), fused) > 0.1


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_a_fused_network_on_cuda_can_be_compiled() -> None:
    need("bf16")
    denoiser = denoiser_of("dhariwal", "bf16")
    inputs = denoiser_inputs(denoiser)
    with torch.inference_mode(), arithmetic(tf32=False):
        want = denoiser_of("dhariwal", "fp32")(**inputs)
        error = off(denoiser(**inputs), want)
        fuse(denoiser)
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # of torch.compile: TensorFloat-32 is off
            got = torch.compile(denoiser, dynamic=False, fullgraph=True)(**inputs)
        assert off(got, want) <= 1.5 * error


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_runs_where_only_flash_kernels_may(name: str, form: torch.memory_format) -> None:
    need("bf16")
    denoiser = denoiser_of(name, "bf16").to(memory_format=form)  # type: ignore[call-overload]
    inputs = denoiser_inputs(denoiser)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert denoiser(**inputs).isfinite().all()
        fuse(denoiser)
        assert denoiser(**inputs).isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_attention_in_float32_runs_where_only_memory_efficient_kernels_may() -> None:
    denoiser = denoiser_of("adm", "fp32")
    with torch.inference_mode(), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        assert denoiser(**denoiser_inputs(denoiser)).isfinite().all()


class Copies(TorchDispatchMode):
    """Counts the copies of images [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and args[0].ndim == 4:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", ["adm", "adm sum", "dhariwal"])
def test_no_layer_of_a_fused_network_on_cuda_changes_the_memory_format(name: str, precision: str) -> None:
    need(precision)
    denoiser = denoiser_of(name, precision)
    fuse(denoiser)
    inputs = denoiser_inputs(denoiser)
    with torch.inference_mode(), arithmetic(tf32=precision == "tf32"), Copies() as copies:
        denoiser(**inputs)
    assert [shape for shape in copies.shapes if shape[1] > 8] == []  # the image itself comes in another format


RESAMPLED = [(256, 128, 16, 16), (3, 36, 4, 6), (2, 3, 8, 8), (1, 192, 2, 2), (5, 18, 10, 14), (64, 384, 32, 32)]


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", RESAMPLED, ids=str)
def test_resampling_short_cuts_and_joins_compute_what_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from cmfast_train.kernels.resample import add_shortcut, joined, moved, resampled, shortcut_added

    def image(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)

    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    x, bias = image(*shape), torch.randn(shape[1], device="cuda")
    double = resampled(x, "up")
    assert torch.equal(double, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    assert double.is_contiguous(memory_format=torch.channels_last)
    half, exact = resampled(x, "down"), moved(x.double(), "down")
    assert half.dtype == dtype
    assert ((half - exact).abs() <= (1e-6 + rounding) * exact.abs().clamp(min=1)).all()
    for direction in ("up", "down", ""):
        h = image(*moved(x, direction).shape)
        total = add_shortcut(x, h, bias, 0.7, direction)
        exact = shortcut_added(x.double(), h.double(), bias.double(), 0.7, direction)
        skip = image(h.shape[0], 24, *h.shape[2:])
        assert torch.equal(add_shortcut(x, h, bias, 0.7, direction, skip), torch.cat([total, skip], dim=1))
        assert total.dtype == dtype
        assert ((total - exact).abs() <= (2e-6 + rounding) * exact.abs().clamp(min=1)).all()
    for channels in (shape[1], 20, 8, 1):
        other = image(shape[0], channels, *shape[2:])
        assert torch.equal(joined(x, other), torch.cat([x, other], dim=1))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_one_kernel_resamples_images_of_any_width() -> None:
    from cmfast_train.kernels.resample import _place_kernel, _resample_kernel, add_shortcut, joined

    def run(batch: int, channels: int, side: int) -> None:
        x = torch.randn(batch, channels, side, side, device="cuda").half().contiguous(memory_format=torch.channels_last)
        add_shortcut(x, x, torch.randn(channels, device="cuda"), 1.0)
        joined(x, x)

    run(2, 64, 8)
    caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in (_resample_kernel, _place_kernel)]
    before = [len(cache) for cache in caches]
    for batch, channels, side in (
        (1, 8, 1),
        (3, 40, 5),
        (16, 192, 16),
        (2, 1024, 8),
    ):  # 1 and multiples of 16 among them
        run(batch, channels, side)
    assert [len(cache) for cache in caches] == before
    assert min(before) > 0


class Functions(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.cat.default or args[0][0].ndim == 4:
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("name", ["adm", "dhariwal"])
def test_a_fused_network_on_cuda_leaves_no_resampling_or_join_to_torch(name: str) -> None:
    need("bf16")
    denoiser = denoiser_of(name, "bf16")
    inputs = denoiser_inputs(denoiser)
    slow = {"aten::upsample_nearest2d", "aten::avg_pool2d", "aten::cat"}
    with torch.inference_mode(), Functions() as before:
        denoiser(**inputs)
    assert slow <= {name.partition(".")[0] for name in before.names}
    fuse(denoiser)
    with torch.inference_mode(), Functions() as after:
        denoiser(**inputs)
    assert not slow & {name.partition(".")[0] for name in after.names}


# Fused norms in training.


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "groups"), [*NORMS, ((128, 128, 32, 32), 32), ((128, 384, 32, 32), 32)], ids=str)
def test_the_fused_norm_has_the_gradients_of_torch_in_float64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
) -> None:
    from cmfast_train.kernels.group_norm import normed
    from cmfast_train.kernels.group_norm_training import norm_act

    batch, channels = shape[:2]
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    for offset, scaled, silu in ((0, False, True), (10, True, True), (10, False, False)):
        x, dy = ((add + torch.randn(shape, device="cuda")).to(dtype) for add in (offset, 0))
        tensors = [x, 1 + 0.1 * torch.randn(channels, device="cuda"), torch.randn(channels, device="cuda")]
        if scaled:
            tensors += (0.3 * torch.randn(batch, 2 * channels, device="cuda")).chunk(2, dim=1)

        def gradients(
            function: Any, wide: bool, tensors: Any = tensors, dy: Any = dy, silu: bool = silu
        ) -> list[torch.Tensor]:
            leaves = [each.detach().double() if wide else each.detach() for each in tensors]
            leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
            leaves = [each.requires_grad_() for each in leaves]
            x, weight, bias, *rows = leaves
            scale, shift = rows or (None, None)
            y = function(x, groups, weight, bias, 1e-5, scale, shift, silu)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

        got, again, want = gradients(norm_act, False), gradients(norm_act, False), gradients(normed, True)
        assert got[0].dtype == got[1].dtype == dtype
        assert all(map(torch.equal, got, again))
        for ours, exact in zip(got, want, strict=True):  # sums of as many as 131,072 values, in float32
            assert (ours - exact).abs().max() <= (1e-5 + rounding) * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_fused_norms_on_cuda_has_the_same_gradients(name: str, precision: str) -> None:
    need(precision)
    network = build_network(NETWORKS[name]).to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    randomise(network)
    inputs = denoiser_inputs(denoiser_of(name, "fp32"))
    x, c_noise = inputs["x"], inputs["sigma"].log() / 4
    label = named(inputs.get("label"))

    def gradients(autocast: bool) -> list[torch.Tensor]:
        network.zero_grad()
        kind = torch.float16 if precision == "fp16" else torch.bfloat16
        with arithmetic(tf32=False), torch.autocast("cuda", kind, enabled=autocast):
            loss = (network(x, c_noise, **label) - x).square().mean()
        with arithmetic(tf32=False):
            (loss * 1024).backward()  # as fp16's scaler does
        return [weight.grad.clone() / 1024 for weight in network.parameters() if weight.grad is not None]

    exact, plain = gradients(False), gradients(precision != "fp32")
    fuse_norms(network)
    fused = gradients(precision != "fp32")
    sizes = [float(each.norm()) for each in exact]
    assert max(sizes) > 0.05
    for ours, theirs, want, size in zip(fused, plain, exact, sizes, strict=True):
        off = float((ours - want).norm())
        if precision == "fp32":
            assert off <= 1e-4 * size + 1e-6 * max(sizes)
        else:  # other roundings, and fewer; where they nearly cancel, a few percent of what the network has
            assert off <= 2 * float((theirs - want).norm()) + 0.01 * size + 1e-3 * max(sizes)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda", "quickly", "any_precision")
@pytest.mark.parametrize("method", ["edm", "ect"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_steps_with_fused_norms_follow_those_without(precision: str, method: str, tmp_path: Path) -> None:
    results = []
    for fused in ("false", "true"):
        stages = ["ect.stages=0,1"] if method == "ect" else []  # a recording serves one
        given = [f"phases={method}:240", f"precision={precision}", f"fused={fused}", *stages]
        run = new_run(tmp_path, *given, "device=cuda")
        assert run.context.why_not_fused(run.phase) == ("" if fused == "true" else "fused=false")
        take = step_of(run)
        with trying_algorithms(run.context.accelerator.device):
            losses = [float(loss.mean()) for loss, _ in take_steps(run, take, 30)]
        assert isinstance(take, RecordedSteps)
        assert take.recordings > 0
        results.append(losses)
    assert all(math.isfinite(loss) for loss in results[1])
    # RAdam makes full steps of small gradients, so what rounding changes grows; other gradients change it by more.
    np.testing.assert_allclose(results[1], results[0], rtol=0.03 if precision == "fp32" else 0.1)
    assert results[0] != results[1], "the kernels were not used"
