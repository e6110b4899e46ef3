# SPDX-License-Identifier: MIT
"""diffusers' own pipeline beside our backends: the same noise, the same images, the same table of times."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.backends import LoopBackend, open_backend
from cmfast.cli import bench
from cmfast.errors import BackendError, CmfastError, MissingDependency
from cmfast.formats.table import model_bytes
from cmfast.model import Model
from cmfast.noise import gaussian
from cmfast_export.targets.diffusers_folder import export_diffusers
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import load_model
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from helpers.specs import image_spec


@pytest.fixture(autouse=True)
def warnings_of_diffusers() -> Iterator[None]:
    """Let diffusers' own deprecation notes pass: they are about its code, not about ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return folders by their number of classes, random weights, a grid of 40 levels."""
    made = {}
    for classes in (0, 5):
        config = AdmConfig(
            image_size=8, classes=classes, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,),
            head_channels=32,
        )  # fmt: skip
        network = AdmUnet(config)
        randomise(network)
        spec = image_spec(image=(3, 8, 8), classes=classes, grid=40)
        spec = dataclasses.replace(
            spec, sigmas={n: spec.sigmas_at(i) for n, i in {1: [0], 2: [22, 0], 4: [36, 30, 22, 0]}.items()}
        )
        made[classes] = tmp_path_factory.mktemp("folders") / f"classes{classes}"
        export_diffusers(Checkpoint(spec=spec, network=config, weights=network.state_dict()), made[classes])
    return made


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("indices", [[0], [22, 0], [36, 30, 22, 0]], ids=str)
def test_the_pipeline_draws_the_images_that_our_loop_draws_from_the_same_noise(
    classes: int, indices: list[int], folders: dict[int, Path]
) -> None:
    theirs = Model(open_backend(folders[classes], variant="diffusers"))
    ours = cmfast.load(folders[classes])
    sigmas = ours.spec.sigmas_at(indices)
    noise = np.stack([gaussian(2, range(3), step, (3, 8, 8)) for step in range(len(sigmas))])
    label = ours.labels(3, seed=2)
    assert isinstance(theirs.backend, LoopBackend)
    got, want = theirs.from_noise(noise, sigmas, label), ours.from_noise(noise, sigmas, label)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # float32
    assert (np.abs(want) < 0.99).mean() > 0.5  # not only what clipping makes equal
    other = theirs.from_noise(np.roll(noise, 1, axis=1), sigmas, label)
    assert np.abs(other - got).max() > 0.1  # the noise is used


def test_the_scheduler_draws_its_own_noise_again_afterwards(folders: dict[int, Path]) -> None:
    from diffusers.schedulers import scheduling_consistency_models as module

    before = module.randn_tensor
    model = Model(open_backend(folders[0], variant="diffusers"))
    model.sample(1, sigmas=model.spec.sigmas_at([22, 0]))
    assert module.randn_tensor is before


def test_what_the_pipeline_cannot_do_is_refused(folders: dict[int, Path], tiny_checkpoint: Callable[..., Path]) -> None:
    model = Model(open_backend(folders[0], variant="diffusers"))
    with pytest.raises(CmfastError, match=r"1\.5 is none of them"):
        model.sample(1, sigmas=(80, 1.5))
    with pytest.raises(CmfastError, match="starts at sigma_max, 80, not at"):
        model.sample(1, sigmas=model.spec.sigmas_at([22]))
    with pytest.raises(BackendError, match="whole loop only"):
        model.denoise(np.zeros((1, 3, 8, 8), np.float32), 1.0)
    with pytest.raises(BackendError, match="diffusers runs folders"):
        open_backend(tiny_checkpoint(), variant="diffusers")


def test_a_model_that_is_not_clipped_is_not_compared_with_a_pipeline_that_clips(
    folders: dict[int, Path], tmp_path: Path
) -> None:
    checkpoint = load_model(folders[0])
    spec = dataclasses.replace(checkpoint.spec, clip=False)
    export_diffusers(dataclasses.replace(checkpoint, spec=spec), tmp_path / "unclipped")
    with pytest.raises(BackendError, match="clips its images"):
        open_backend(tmp_path / "unclipped", variant="diffusers")


def test_without_diffusers_the_pip_line_is_given(folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'cmfast\[diffusers\]'"):
        open_backend(folders[0], variant="diffusers")


@pytest.mark.parametrize("starts", ["--no-starts", pytest.param("--starts", marks=pytest.mark.slow)])
def test_the_pipeline_is_timed_beside_the_others(
    starts: str, folders: dict[int, Path], tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    arguments = ("--baseline", folders[5], "--diffusers", "--batch", "1", "--seconds", "0.2", starts)
    told = call(bench.main, *arguments, "--steps", "2", "--json", tmp_path / "bench.json")
    assert told.returncode == 0, told.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [row["contender"] for row in record["rows"]] == ["PyTorch cpu", "PyTorch cpu channels_last", "diffusers cpu"]
    assert all(row["median_ms"] > 0 and row["max_abs_diff"] < 1e-4 for row in record["rows"])
    weights = sum(file.stat().st_size for file in folders[5].rglob("*") if file.is_file())
    assert model_bytes(folders[5]) == weights
    assert [start["file_mib"] for start in record["starts"]] == [weights / 2**20] * (3 if starts == "--starts" else 0)
    assert record["rows"][0]["sigmas"] == list(cmfast.load(folders[5]).spec.sigmas_for(2))
    refused(call(bench.main, "--diffusers"), "nothing to time")
    refused(call(bench.main, tmp_path / "bench.json", "--diffusers"), "--diffusers needs a diffusers folder")
