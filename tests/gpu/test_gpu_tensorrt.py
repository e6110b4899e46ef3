# SPDX-License-Identifier: MIT
"""Engines on a GPU: TensorRT's and TensorRT-RTX's, whichever this machine has, against the ONNX files on the CPU.

pytest -m gpu        what can be tested without one is in test_to_tensorrt and test_tensorrt_backend
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.backends import DrawBackend, TimedBackend
from cmfast.backends.cuda import runtime as cuda
from cmfast.backends.tensorrt_library import LIBRARIES, import_library
from cmfast.errors import CmfastError
from cmfast.noise import slices
from cmfast.sampling import to_uint8
from cmfast_export import cli
from cmfast_export.pipeline import export_onnx
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions

Factory = Callable[..., Path]
BATCHES = (1, 3, 8)
# Some twenty roundings in a row, each of up to 2^-11 or 2^-9 of features of about one; TensorRT sums in other orders.
TOLERANCES = {"fp32": 1e-3, "tf32": 20 * 2.0**-11, "fp16": 20 * 2.0**-11, "bf16": 20 * 2.0**-9}

pytestmark = pytest.mark.gpu


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    try:
        import_library(request.param, "this test")
        cuda.open_gpu()
    except CmfastError as err:
        pytest.skip(str(err))
    return str(request.param)


@pytest.fixture(scope="module")
def onnx_file(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Return a factory of ONNX files by precision and kind."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(precision: str, kind: str) -> Path:
        path = folder / f"{precision}_{kind}.onnx"
        export_onnx(tiny_checkpoint(10), path, kind=kind, steps=None if kind == "denoiser" else 2, precision=precision)
        return path

    return make


@pytest.mark.parametrize("kind", ["denoiser", "sampler", "server"])
@pytest.mark.parametrize("precision", TOLERANCES)
def test_an_engine_draws_what_float32_draws_in_any_order_of_batch_sizes(
    precision: str, kind: str, library: str, onnx_file: Factory, tmp_path: Path
) -> None:
    built = build_engine(
        onnx_file(precision, kind), tmp_path / "model.engine", BuildOptions(library=library, batch=BATCHES)
    )
    assert built.parity is not None
    assert float(built.manifest.engine["max_abs"]) == pytest.approx(built.parity.worst.max_abs, rel=0.01)
    here, there = cmfast.load(onnx_file("fp32", kind)), cmfast.load(built.path, sha256=built.sha256)
    for n, seed in ((1, 0), (8, 1), (3, 2), (1, 3), (8, 4), (11, 5)):
        got, want = (model.sample_float(n, steps=2, seed=seed, batch=n) for model in (there, here))
        assert want.std() > 0.1
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCES[precision])


def test_a_replay_gives_the_same_bits_for_the_same_noise_after_others(
    library: str, onnx_file: Factory, tmp_path: Path
) -> None:
    path = tmp_path / "model.engine"
    build_engine(onnx_file("fp16", "sampler"), path, BuildOptions(library=library, batch=BATCHES))
    model = cmfast.load(path)
    first = model.sample_float(3, seed=1)
    assert np.abs(model.sample_float(3, seed=2) - first).max() > 0.1
    model.sample_float(8, seed=3)
    np.testing.assert_array_equal(model.sample_float(3, seed=1), first)


@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_what_an_engine_draws_is_what_it_makes_of_noise_from_numpy(
    kind: str, library: str, onnx_file: Factory, tmp_path: Path
) -> None:
    path = tmp_path / "model.engine"
    build_engine(onnx_file("fp32", kind), path, BuildOptions(library=library, batch=BATCHES))
    model = cmfast.load(path)
    assert isinstance(model.backend, DrawBackend)
    sigmas, n, seed = model.sigmas_for(2), 11, 2**63 + 5
    label = model.labels(n, seed=seed)
    assert label is not None
    for batch in (3, 8, 11):  # the last one in parts
        x0 = np.concatenate(
            [
                model.from_noise(slices(seed, range(i, min(i + batch, n)), 2, (1, 8, 8)), sigmas, label[i : i + batch])
                for i in range(0, n, batch)
            ]
        )
        got = model.sample_float(n, steps=2, seed=seed, batch=batch)
        np.testing.assert_allclose(got, x0, rtol=0, atol=TOLERANCES["fp32"])
        assert x0.std() > 0.1
        far = np.abs(model.sample(n, steps=2, seed=seed, batch=batch).astype(int) - to_uint8(got).astype(int))
        assert far.max() <= 1


def test_an_engine_says_what_a_call_cost(library: str, onnx_file: Factory, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    build_engine(onnx_file("fp16", "sampler"), path, BuildOptions(library=library, batch=BATCHES))
    model = cmfast.load(path)
    model.sample(3)
    assert isinstance(model.backend, TimedBackend)
    with model.backend.timed() as times:
        model.sample(3)
    (cost,) = times
    assert min(cost.copy_in_ms, cost.compute_ms, cost.copy_out_ms) > 0
    assert 0 < cost.enqueue_ms <= cost.host_ms


def test_a_changed_engine_is_refused_before_it_is_loaded(library: str, onnx_file: Factory, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    build_engine(onnx_file("fp16", "sampler"), path, BuildOptions(library=library, batch=BATCHES))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CmfastError, match="altered or damaged"):
        cmfast.load(path)


def test_tensorrt_keeps_its_measurements_and_builds_for_other_cards(onnx_file: Factory, tmp_path: Path) -> None:
    try:
        import_library("tensorrt", "this test")
        cuda.open_gpu()
    except CmfastError as err:
        pytest.skip(str(err))
    cache = tmp_path / "timing.cache"
    options: dict[str, Any] = {"library": "tensorrt", "batch": (1, 2, 4), "timing_cache": str(cache)}
    for extra in ({}, {"hardware_compatible": "ampere+"}, {"version_compatible": True}):
        path = tmp_path / "model.engine"
        built = build_engine(onnx_file("fp16", "sampler"), path, BuildOptions(**options, **extra))
        assert built.parity is not None
        assert cache.stat().st_size > 0


def test_the_command_builds_runs_and_samples(
    library: str, tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    from cmfast.cli import sample

    out = tmp_path / "two.engine"
    arguments = ("--format", "engine", "--kind", "sampler", "--steps", "2", "--precision", "fp16")
    result = call(cli.main, tiny_checkpoint(10), *arguments, "--build", f"library={library}", "-o", out)
    assert result.returncode == 0, result.stderr
    assert "run here, " in result.stdout
    result = call(sample.main, out, "-n", "4", "-o", tmp_path / "samples.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples.png").exists()
