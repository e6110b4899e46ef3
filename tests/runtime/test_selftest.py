# SPDX-License-Identifier: MIT
"""The self-test of a model file: written by the exporter, passed where the file computes the same, failed where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.cli import info
from cmfast.errors import CmfastError
from cmfast.formats.manifest import Manifest
from cmfast.formats.selftest import record_selftest, run_selftest
from helpers.graphs import write_denoiser

STATE = {"name": "state", "kind": "tensor", "shape": [3, None]}
LABEL = {"name": "label", "kind": "class", "classes": 10}


@pytest.fixture
def model(tmp_path: Path) -> cmfast.Model:
    return cmfast.load(write_denoiser(tmp_path / "model.onnx", {"conditions": [STATE, LABEL], "clip": False}))


def test_a_recorded_self_test_passes_on_the_same_model_and_fails_on_another(
    model: cmfast.Model, tmp_path: Path
) -> None:
    recorded = record_selftest(model, 1e-4)
    assert len(recorded["at"]) == len(recorded["values"]) == 8
    assert run_selftest(model, recorded).passed
    assert run_selftest(model, recorded).max_abs < 1e-5
    changed = recorded | {"values": [*recorded["values"][:-1], recorded["values"][-1] + 2e-4]}
    result = run_selftest(model, changed)
    assert not result.passed
    np.testing.assert_allclose(result.max_abs, 2e-4, atol=1e-5)


def test_a_manifest_keeps_it(model: cmfast.Model) -> None:
    manifest = replace(model.manifest, selftest=record_selftest(model, 1e-4))
    assert Manifest.from_json(manifest.to_json(), "here").selftest == manifest.selftest


@pytest.mark.parametrize(
    "change", [{"at": []}, {"at": [1.5] * 8}, {"values": [1.0]}, {"seed": -1}, {"atol": -1.0}, {"conditions": None}]
)
def test_a_wrong_one_is_refused(change: dict[str, Any], model: cmfast.Model) -> None:
    manifest = replace(model.manifest, selftest=record_selftest(model, 1e-4) | change)
    with pytest.raises(CmfastError, match="selftest"):
        Manifest.from_json(manifest.to_json(), "here")


def test_the_command_says_how_far_it_is_off(
    call: Callable[..., Any], model: cmfast.Model, refused: Callable[..., None], tmp_path: Path
) -> None:
    changes = {"conditions": [STATE, LABEL], "clip": False, "selftest": record_selftest(model, 1e-4)}
    file = write_denoiser(tmp_path / "tested.onnx", changes)
    said = call(info.main, file, "--selftest")
    assert said.returncode == 0
    assert said.stdout.startswith("self-test passed: ONNX Runtime cpu differs by ")
    changes["selftest"] = changes["selftest"] | {"atol": 0.0, "values": [9.0] * 8}
    refused(call(info.main, write_denoiser(file, changes), "--selftest"), "self-test failed", code=1)
    refused(call(info.main, write_denoiser(file), "--selftest"), "this file has no self-test; export")
