# SPDX-License-Identifier: MIT
"""The small models that come with cmfast: found by name, verified, of a size that a wheel can hold, with a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import ArtifactError
from cmfast.formats.selftest import run_selftest
from cmfast.formats.shipped import FOLDER, find
from helpers import ROOT

NAMES = cmfast.models()


def test_the_models_are_named() -> None:
    assert "digits" in NAMES
    assert list(NAMES) == sorted(file.stem for file in FOLDER.iterdir() if file.suffix == ".onnx")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_small_verified_and_computes_what_was_recorded(name: str) -> None:
    model = cmfast.load(name)
    manifest = model.manifest
    assert find(name).stat().st_size <= 3_000_000
    assert (manifest.kind, manifest.made_by["weights"]) == ("denoiser", "float16")
    assert manifest.parity["psnr_db"] >= 50
    assert run_selftest(model, manifest.selftest).passed


@pytest.mark.parametrize("name", NAMES)
def test_its_record_is_of_this_file_and_its_samples_are_of_the_requested_classes(name: str) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / f"shipped_{name}.json").read_text())
    assert record["bytes"] == find(name).stat().st_size
    assert record["parity"] == cmfast.read_manifest(name).parity
    least = 0.85 if name == "fashion-mnist" else 0.95  # a classifier knows 92 % of its test images, and 99 % of digits
    assert min(row["label_agreement"] for row in record["rows"]) > least
    assert record["nearest"]["samples_least"] > record["nearest"]["data_median"] / 4  # no copies of training images
    assert name in (FOLDER / "README.md").read_text()


def test_samples_of_different_classes_differ_and_of_the_same_seed_do_not() -> None:
    model = cmfast.load("digits")
    zeros, ones = (model.sample(64, label=label, seed=3).mean(axis=0) for label in (0, 1))
    assert np.abs(zeros - ones).max() > 100  # grey levels: the middle of a zero is dark, that of a one is not
    np.testing.assert_array_equal(model.sample(2, seed=5), cmfast.load(find("digits")).sample(2, seed=5))


def test_a_file_of_that_name_is_what_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find("digits").parent == FOLDER
    Path("digits").write_bytes(b"")
    assert find("digits") == Path("digits")
    with pytest.raises(ArtifactError, match="digits: the file is empty"):
        cmfast.load("digits")
    Path("digits").unlink()
    Path("digits").mkdir()
    with pytest.raises(ArtifactError, match="it hides the model digits that comes with cmfast"):
        cmfast.load("digits")
    assert find(tmp_path / "digits") == tmp_path / "digits"


def test_an_unknown_name_lists_those_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ArtifactError, match="digit: no such file; models that come with cmfast: digits, fashion-mnist, mnist"
    ):
        cmfast.load("digit")
    with pytest.raises(ArtifactError, match=r"digit\.onnx: no such file$"):
        cmfast.load("digit.onnx")


def test_the_commands_take_the_name(call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = call(sample.main, "digits", "-n", 4, "--label", 7, "--steps", 2, "-o", "grid.png")
    assert (made.returncode, made.stderr) == (0, "")
    assert Path("grid.png").stat().st_size > 100
    told = call(info.main, "digits")
    assert "8 x 8" in told.stdout
    assert "float16" in told.stdout
