# SPDX-License-Identifier: MIT
"""What a run leaves beside its model, and what decides a step beside its method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmfast.errors import CmfastError
from cmfast_train.checkpoint import load_checkpoint
from cmfast_train.cli import ema
from cmfast_train.cli.train import main
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.methods.schedules import pd_sigmas
from cmfast_train.training.step import Inputs, drop_conditions
from cmfast_train.training.trainer import train
from helpers.runs import TINY, arguments, assert_equal_weights, losses_of, run_here, save_images

Write = Callable[..., Path]

# What the phases leave.


def test_each_phase_leaves_a_model_that_says_how_it_is_sampled(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "phases=edm:16,pd:32,ect:8")
    files = sorted((tmp_path / "run" / "phases").iterdir())
    assert [file.name for file in files] == ["1_edm.pt", "2_pd8.pt", "3_pd4.pt", "4_pd2.pt", "5_pd1.pt"]
    specs = [load_checkpoint(file).spec for file in files]
    for n, spec in zip((8, 4, 2, 1), specs[1:], strict=True):
        assert spec.renoise == "ddim"
        assert spec.sigmas == {n: pd_sigmas(n, 0.002, 80.0)}
    plain = override(PRESETS["digits"], TINY).spec(10).with_class_names(tuple("0123456789"))
    assert specs[0] == plain
    assert load_checkpoint(tmp_path / "run" / "model.pt").spec == plain
    run_here(tmp_path / "one", "phases=edm:16")
    one = load_checkpoint(tmp_path / "one" / "model.pt")
    assert load_checkpoint(files[0]).sha256() == one.sha256()  # of the same steps


def test_labels_are_dropped_as_often_as_requested_and_the_model_knows_the_number_of_none(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "phases=edm:16,ect:8", "label_dropout=0.25")
    model = load_checkpoint(tmp_path / "run" / "model.pt")
    assert model.spec.label is not None
    assert (model.spec.classes, model.spec.label.null, model.network.classes) == (10, 10, 11)
    denoiser, x = model.denoiser(), torch.randn(1, 1, 8, 8)
    for name, weight in denoiser.network.named_parameters():
        weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    some, none = (denoiser(x, torch.ones(1), label=torch.tensor([label])) for label in (3, 10))
    assert not torch.equal(some, none)

    class Fake:
        config = override(PRESETS["digits"], [*TINY, "label_dropout=0.25"])

        class context:
            spec = model.spec

    uniform = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(images=x, conditions={"label": torch.full((40_000,), 3)}, noises=x[None], uniform=uniform)
    dropped = drop_conditions(Fake, inputs)["label"] == 10  # type: ignore[arg-type]
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.01)  # four standard deviations
    flipped = uniform[:, 3] < 0.5
    assert float(dropped[flipped].float().mean()) == pytest.approx(0.25, abs=0.015), "independent of flips"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["label_dropout=1"], "label_dropout must be from 0 and below 1"),
        (["label_dropout=0.1", "conditional=false"], "needs conditional=true"),
        (["init=model.pt", "label_dropout=0.1"], "a model trained without label_dropout, and the run has"),
    ],
)
def test_label_dropout_that_does_not_fit_is_one_line(
    settings: list[str], words: str, write: Write, tmp_path: Path
) -> None:
    settings = [text.replace("model.pt", str(write())) for text in settings]
    with pytest.raises(CmfastError, match=words):
        train(override(PRESETS["digits"], ["phases=ect:16", "batch=8", *settings]), tmp_path / "run", None)


LEARNS = ("edm.lr=1e-2", "ect.lr=1e-2")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with more averages than one; treat it as read-only."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    run_here(out, "phases=edm:64,ect:320", "ect.ema=0.9", "emas=0.5,0.8", "ema_stds=0.05,0.1", *LEARNS)
    return out


def test_more_averages_are_models_beside_the_model(averaged: Path, tmp_path: Path) -> None:
    snapshots = [f"std{std}-{images:012d}.pt" for std in ("0.050", "0.100") for images in range(64, 385, 64)]
    assert sorted(file.name for file in (averaged / "ema").iterdir()) == ["0.5.pt", "0.8.pt", *snapshots]
    assert load_checkpoint(averaged / "ema" / "0.8.pt").spec == load_checkpoint(averaged / "model.pt").spec
    run_here(tmp_path / "run", "phases=edm:64,ect:320", "edm.ema=0.999", "ect.ema=0.8", *LEARNS)
    alone = load_checkpoint(tmp_path / "run" / "model.pt")
    assert alone.sha256() == load_checkpoint(averaged / "ema" / "0.8.pt").sha256()
    assert alone.sha256() != load_checkpoint(averaged / "ema" / "0.5.pt").sha256()
    source = load_checkpoint(averaged / "ema" / snapshots[-1]).source
    assert source == {"format": "cmfast", "ema_std": 0.1, "ema_step": 40, "ema_phase": 1}  # steps of the phase


def test_snapshots_of_a_run_combine_into_the_average_of_another_width(
    averaged: Path, tmp_path: Path, call: Callable[..., Any]
) -> None:
    out = tmp_path / "combined.pt"
    result = call(ema.main, averaged, "--std", 0.08, "-o", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert "at step 40, of 10 snapshots" in result.stdout  # those of the last phase
    run_here(tmp_path / "run", "phases=edm:64,ect:320", "ect.ema=0.9", "ema_stds=0.08", *LEARNS)
    want = load_checkpoint(tmp_path / "run" / "ema" / "std0.080-000000000384.pt").weights
    got, nearest = (load_checkpoint(f).weights for f in (out, averaged / "ema" / "std0.100-000000000384.pt"))

    def distance(one: Any) -> float:
        return sum(float((one[name] - want[name]).square().sum()) for name in want) ** 0.5

    assert distance(got) < 0.2 * distance(nearest)
    exact = tmp_path / "exact.pt"
    assert call(ema.main, averaged, "--std", 0.1, "-o", exact).returncode == 0
    assert_equal_weights(dict(load_checkpoint(exact).weights), dict(nearest))


# What decides a step beside the method.


def test_half_of_the_images_are_mirrored_which_images_of_two_equal_halves_do_not_show(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    save_images(tmp_path / "odd", images)
    save_images(tmp_path / "even", np.maximum(images, images[:, :, ::-1]))
    settings = [*TINY, "image_size=8", "conditional=false", "phases=edm:32", "model_channels=32", "attention="]
    for name in ("even", "odd"):
        for flip in ("true", "false"):
            config = override(PRESETS["folder"], [*settings, f"flip={flip}"])
            train(config, tmp_path / f"{name} {flip}", tmp_path / name)
    assert losses_of(tmp_path / "even true") == losses_of(tmp_path / "even false")
    assert losses_of(tmp_path / "odd true") != losses_of(tmp_path / "odd false")


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    run_here(tmp_path / "run", "phases=edm:64,ect:16", "edm.lr=0.001", "edm.lr_warmup=0.5", "edm.lr_decay=0.5")
    rates = [line["lr"] for line in losses_of(tmp_path / "run")]
    assert rates[:8] == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.00075, 0.0005, 0.00025])
    assert rates[8:] == [1e-4, 1e-4]


def test_a_long_gradient_is_shortened(write: Write, tmp_path: Path) -> None:
    file = write(scaling="edm", c_noise="ln/4")
    before, lengths = load_checkpoint(file).weights, []
    for clip in ("0", "1e-3"):  # RAdam's first step is the gradient
        run_here(tmp_path / clip, f"init={file}", "phases=edm:8", "edm.lr=1", f"edm.clip_norm={clip}")
        after = torch.load(tmp_path / clip / "state.pt", weights_only=True)["weights"]
        lengths.append(sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5)
    assert lengths[0] > 0.1
    assert lengths[1] == pytest.approx(1e-3, rel=1e-2)  # of weights around 1, rounded to 1e-7


def test_each_phase_has_its_own_beta2(tmp_path: Path) -> None:
    for beta2 in ("0.999", "0.9"):
        run_here(tmp_path / beta2, "phases=edm:56,ect:8", f"edm.beta2={beta2}", "ect.beta2=0.99")
    usual, quick = (losses_of(tmp_path / beta2) for beta2 in ("0.999", "0.9"))
    assert usual[5] == quick[5]  # RAdam divides by the gradients' size from its sixth step on
    assert usual[6] != quick[6]
    state = torch.load(tmp_path / "0.9" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


# LPIPS.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "loss=lpips needs weights: --set lpips=vgg:FILE (or alex, squeeze), got ''"),
        (["lpips=vgg"], "loss=lpips needs weights: --set lpips=vgg:FILE (or alex, squeeze), got 'vgg'"),
        (["lpips=resnet:missing.pth"], "(or alex, squeeze), got 'resnet:missing.pth'"),
        (["lpips=vgg:missing.pth"], "missing.pth: no such file"),
    ],
    ids=str,
)
def test_lpips_without_its_weights_is_refused_before_the_first_phase(
    settings: list[str], words: str, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    settings = [*TINY, "phases=edm:80,ect:80", "ect.loss=lpips", *settings]
    refused(call(main, *arguments(tmp_path / "run", settings)), words)
    assert not (tmp_path / "run").exists()


def test_lpips_with_the_weights_of_a_network_trains(
    write: Write, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = [f"init={write()}", "batch=2", "log_images=2", "phases=ect:4", f"lpips=alex:{weights('alex')}"]
    run_here(tmp_path / "huber", *settings)
    run_here(tmp_path / "lpips", *settings, "ect.loss=lpips")
    losses = [[line["loss"] for line in losses_of(tmp_path / name)] for name in ("huber", "lpips")]
    assert all(np.isfinite(losses[1]))
    assert min(losses[1]) > 0
    assert losses[0] != losses[1]
