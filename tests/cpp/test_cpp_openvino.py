# SPDX-License-Identifier: MIT
"""openvino.hpp: the same files through OpenVINO's C interface, against Python on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast import noise
from cmfast.sampling import to_uint8
from helpers.cpp import SOURCES, UNDEFINED, build, call
from helpers.graphs import sampled, write_denoiser

STATE = {"name": "state", "kind": "tensor", "shape": [3]}
LABEL = {"name": "label", "kind": "class", "classes": 10}

pytestmark = pytest.mark.skipif(
    not (find_spec("openvino") or os.environ.get("CMFAST_OPENVINO")), reason="needs openvino, or CMFAST_OPENVINO"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cpp"), SOURCES / "model.cpp", *UNDEFINED, "-DWITH_OPENVINO")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    from cmfast.cli.installed import openvino_library

    return {"CMFAST_OPENVINO": os.environ.get("CMFAST_OPENVINO") or str(openvino_library())}


@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
def test_an_exported_model_draws_the_images_that_python_draws(
    kind: str,
    program: Path,
    environment: dict[str, str],
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from cmfast_export.pipeline import export_onnx

    file = tmp_path / "model.onnx"
    export_onnx(tiny_checkpoint(10, levels=1), file, kind=kind, steps=None if kind == "denoiser" else 2)
    found = np.frombuffer(call(program, "CPU", file, "sample", 2, 5, 7, 3, **environment), np.float32)
    wanted = cmfast.load(file).sample_float(5, steps=2, seed=7, first=3)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-4, rtol=0)  # sums in another order
    assert np.mean(to_uint8(found.reshape(wanted.shape)) == to_uint8(wanted)) > 0.999
    assert call(program, "CPU", file, "selftest", **environment).startswith(b"passed")


@pytest.mark.parametrize("batch", ["B", 3])
def test_any_shape_with_conditions_is_drawn(
    batch: int | str, program: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"shape": [16, 7], "data": "array", "conditions": [STATE, LABEL], "clip": False}
    file = write_denoiser(tmp_path / "model.onnx", changes, batch)
    found = call(program, "CPU", file, "sample", 3, 4, 5, 2, "state=1,2,3", "label=7", **environment)
    z = np.stack([noise.gaussian(5, range(2, 6), step, (16, 7)) for step in range(3)])
    wanted = sampled(z, changes, 3, 2 + 7 / 16)
    np.testing.assert_allclose(np.frombuffer(found, np.float32), wanted.ravel(), atol=2e-5, rtol=1e-5)


def test_an_ir_is_drawn_in_its_precision_and_one_that_was_changed_is_refused(
    program: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    import cmfast_export

    changes: dict[str, Any] = {"shape": [16, 7], "data": "array", "conditions": [STATE, LABEL], "scaling": "edm"}
    file = write_denoiser(tmp_path / "model.onnx", changes)
    made = cmfast_export.export_openvino(file, tmp_path / "model.xml").path
    found = call(program, "CPU", made, "sample", 3, 4, 5, 2, "state=1,2,3", "label=7", **environment)
    state = {"state": np.array([1, 2, 3], np.float32)}
    wanted = cmfast.load(file).sample_float(4, steps=3, seed=5, first=2, label=7, conditions=state)
    np.testing.assert_allclose(np.frombuffer(found, np.float32), wanted.ravel(), atol=2e-5, rtol=1e-5)
    weights = made.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    said = call(program, "CPU", made, "sample", 1, 1, 0, 0, "state=1,2,3", code=2, **environment)
    assert b"model.xml: its graph or the weights in its .bin are not those that were verified; export it again" in said
    weights.unlink()
    said = call(program, "CPU", made, "sample", 1, 1, 0, 0, "state=1,2,3", code=2, **environment)
    assert b"model.bin: no such file" in said
    made.write_bytes(b"<net><rt_info><cmfast value='{}</rt_info></net>")
    weights.write_bytes(b"weights")
    said = call(program, "CPU", made, "sample", 1, 1, 0, 0, "state=1,2,3", code=2, **environment)
    assert b"no OpenVINO IR with a cmfast manifest" in said


def test_what_is_not_there_is_named(program: Path, environment: dict[str, str], tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx")
    nowhere = call(program, "CPU", file, "selftest", code=2, CMFAST_OPENVINO=str(tmp_path))
    assert nowhere.startswith(b"cannot load OpenVINO from ")
    assert b"cannot compile it" in call(program, "TPU", file, "sample", 1, 1, 0, 0, code=2, **environment)
