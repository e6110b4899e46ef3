# SPDX-License-Identifier: MIT
"""CUDA: the engines compute there what they compute on the CPU, training runs there, and where it is not, that is said.

pytest -m gpu        on a machine with an NVIDIA GPU and cmfast[gpu]
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch

import cmfast
from cmfast.engines import open_engine
from cmfast.engines.onnxruntime import OnnxRuntimeEngine
from cmfast.errors import EngineError
from cmfast_export.export import export_onnx
from cmfast_train.checkpoint import load_checkpoint

Factory = Callable[..., Path]
TOLERANCE = 1e-3  # two float32 libraries sum in other orders; cuDNN's transforms cost some digits more
TINY = ["batch=8", "checkpoint_images=32", "log_images=8", "grid=4", "tensorboard=false", "device=cpu"]


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


def assert_close(one: cmfast.Model, two: cmfast.Model) -> None:
    for ours, theirs in zip(outputs(one), outputs(two), strict=True):
        assert theirs.std() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


# Engines.



@pytest.mark.usefixtures("onnx_cuda")
def test_onnx_runtime_on_cuda_computes_what_it_computes_on_the_cpu(tiny_checkpoint: Factory, tmp_path: Path) -> None:
    export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx")
    assert_close(cmfast.load(tmp_path / "model.onnx", device="cuda"), cmfast.load(tmp_path / "model.onnx"))



@pytest.mark.usefixtures("onnx_cuda")
def test_onnx_runtime_gets_the_device_that_was_asked_for_without_tensorfloat(handmade_onnx: Factory) -> None:
    engine = open_engine(handmade_onnx(8), "cuda")
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine.name == "ONNX Runtime cuda"
    session = engine._session
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    assert session.get_provider_options()["CUDAExecutionProvider"]["use_tf32"] == "0"




@pytest.mark.parametrize("variant", ["", "channels_last"])
def test_pytorch_on_cuda_computes_what_it_computes_on_the_cpu(variant: str, tiny_checkpoint: Factory) -> None:
    engine = open_engine(tiny_checkpoint(10), "cpu", variant=variant)
    assert engine.name.startswith("PyTorch cpu")
    before = torch.cuda.memory_allocated()
    pass
    assert_close(cmfast.Model(engine), cmfast.load(tiny_checkpoint(10)))


# Training. In processes of their own, because accelerate sets the precision once for a process.


def settings(*assignments: str) -> list[str]:
    return [word for assignment in (*TINY, *assignments) for word in ("--set", assignment)]


def losses(out: Path) -> dict[int, float]:
    """Return {images: loss} of the log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["images"]: line["loss"] for line in lines if "loss" in line}




@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("method", ["edm", "ect", "ct"])
def test_two_steps_of_training_have_finite_losses_in_every_precision(
    precision: str, method: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    options = settings(f"precision={precision}", f"phases={method}:16")
    result = run("cmfast_train.cli", "digits", "--out", tmp_path, *options, timeout=240)
    assert result.returncode == 0, result.stderr
    found = losses(tmp_path)
    assert list(found) == [8, 16]
    assert all(math.isfinite(loss) for loss in found.values())
    weights = load_checkpoint(tmp_path / "model.pt").weights
    assert all(torch.isfinite(weight).all() and weight.dtype == torch.float32 for weight in weights.values())




@pytest.mark.parametrize("precision", ["bf16"])
def test_a_killed_run_goes_on_where_it_was(precision: str, run: Callable[..., Any], tmp_path: Path) -> None:
    options = settings(f"precision={precision}", "phases=edm:320,ect:320")
    arguments = ["digits", "--out", str(tmp_path), *options]
    victim = subprocess.Popen([sys.executable, "-m", "cmfast_train.cli", *arguments], stderr=subprocess.DEVNULL)
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
    result = run("cmfast_train.cli", *arguments, timeout=240)
    assert result.returncode == 0, result.stderr
    found = losses(tmp_path)
    assert list(found) == list(range(8, 641, 8))
    assert all(math.isfinite(loss) for loss in found.values())
    saved = 8 * state["step"] if state["phase"] == 0 else 320 + 8 * state["step"]
    kept = [images for images in before if images <= saved]
    assert kept
    assert [found[images] for images in kept] == [before[images] for images in kept], "it began again"


# Where there is none.


def test_onnx_runtime_without_cuda_is_an_error_with_the_line_that_installs_it(handmade_onnx: Factory) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EngineError) as caught:
        cmfast.load(handmade_onnx(8), device="cuda")
    assert str(caught.value) == (
        f"device cuda was asked for, but the installed onnxruntime {onnxruntime.__version__} is a build without CUDA; "
        "replace it: pip uninstall onnxruntime && pip install 'cmfast[gpu]'"
    )


def test_pytorch_without_cuda_is_an_error_that_names_the_cause(tiny_checkpoint: Factory) -> None:
    if torch.cuda.is_available():
        pytest.skip("this PyTorch has CUDA")
    cause = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    with pytest.raises(EngineError) as caught:
        cmfast.load(tiny_checkpoint(0), device="cuda")
    assert f"device cuda was asked for, but PyTorch {torch.__version__} {cause}" in str(caught.value)
