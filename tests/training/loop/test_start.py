# SPDX-License-Identifier: MIT
"""What a run starts from: --init and --teacher, of any format and any conventions that fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_export.targets.diffusers_folder import export_diffusers
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.cli.train import main
from cmfast_train.config.overrides import override
from cmfast_train.config.presets import PRESETS
from cmfast_train.networks.adm import AdmConfig
from cmfast_train.training.initial_model import start_of
from cmfast_train.training.state import Run
from cmfast_train.training.trainer import _check_fake_scores, accelerator_of, train
from helpers.foreign.edm import CASES, weights_of
from helpers.runs import QUICK, TINY, arguments, assert_equal_weights, losses_of, run_here, save_images
from helpers.specs import image_spec

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images of 8x8 pixels in colour."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    save_images(folder, generator.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    return folder


def begun(*settings: str) -> Run:
    """Return a run before its first step."""
    return Run(
        override(PRESETS["digits"], [*(QUICK if "init=" in settings[0] else TINY), *settings]),
        Path("unused"),
        Accelerator(cpu=True),
        1797,
        10,
    )


# A model to start from.


@pytest.mark.parametrize("network", ["adm", "song"])
def test_a_run_starts_from_the_weights_of_a_model_to_the_bit(network: str, write: Write) -> None:
    file = write(network, scaling="edm", c_noise="ln/4")
    run = begun(f"init={file}", "phases=ct:80", "dropout=0.1")
    want = dict(load_checkpoint(file).weights)
    assert_equal_weights(run.state.student.denoiser.network.state_dict(), want)
    assert run.state.target is not None
    assert_equal_weights(run.state.target.network.state_dict(), want)
    assert_equal_weights(run.state.ema, {name: want[name] for name in run.state.weights})
    assert run.context.network.dropout == 0.1  # type: ignore[union-attr]  # of the run, not of the file


CONVENTIONS: dict[str, Any] = {
    "sigma_min": 0.01, "sigma_max": 40.0, "sigma_data": 0.7, "c_noise": "raw", "clip": False, "sigmas": {1: (40.0,)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("phases", "scaling", "becomes"),
    [
        ("ect:8", "edm", "boundary"),
        ("ct:8", "edm", "boundary"),
        ("edm:8,cd:8", "edm", "boundary"),
        ("ict:8", "boundary", "boundary"),
        ("ect:8", "trigflow", "trigflow"),
        ("scd:8", "edm", "edm"),
        ("scd:8", "boundary", "edm"),
        ("ect:8,sct:8", "edm", "edm"),
        ("sct:8", "trigflow", "trigflow"),
        ("edm:8", "edm", "edm"),
        ("pd/1:8", "edm", "edm"),
        ("mf:8", "flow", "flow"),
    ],
)
def test_a_run_takes_the_conventions_of_the_model_and_the_scaling_that_its_methods_need(
    phases: str, scaling: str, becomes: str, write: Write
) -> None:
    file = write("adm, two times" if phases == "mf:8" else "adm", scaling=scaling, **CONVENTIONS)
    settings = [f"init={file}", f"phases={phases}", "sigma_max=40", "sigmas=40"]
    start = start_of(override(PRESETS["digits"], [*QUICK, *settings]), 10)
    assert start.spec == image_spec(image=(1, 8, 8), classes=10, scaling=becomes, **CONVENTIONS)
    assert start.network == load_checkpoint(file).network


def test_the_levels_to_sample_at_are_the_runs_and_a_grid_is_forgotten(
    write: Write,
) -> None:
    file = write(renoise="ddim", grid=40, sigmas={1: (80.0,)})
    spec = start_of(override(PRESETS["digits"], [*QUICK, f"init={file}", "sigmas=80:80,5"]), 10).spec
    assert (spec.sigmas, spec.renoise, spec.grid) == ({1: (80.0,), 2: (80.0, 5.0)}, "sqrt", 0)


def test_a_trained_model_goes_on_through_the_command(write: Write, tmp_path: Path, call: Callable[..., Any]) -> None:
    file, out = write(scaling="edm", c_noise="ln/4"), tmp_path / "run"
    result = call(main, *arguments(out, [*QUICK, "phases=ect:80"]), "--init", file)
    assert (result.returncode, result.stderr) == (0, "")
    model, before = load_checkpoint(out / "model.pt"), load_checkpoint(file)
    assert (model.spec.scaling, model.spec.c_noise, model.network) == ("boundary", "ln/4", before.network)
    assert model.weights.keys() == before.weights.keys()
    assert not torch.equal(model.weights["out.2.weight"], before.weights["out.2.weight"])
    assert json.loads((out / "config.json").read_text())["init"] == str(file)


@pytest.mark.parametrize("kind", ["EDM", "diffusers"])
def test_models_of_other_formats_are_started_from_to_the_bit(
    kind: str, write: Write, photos: Path, snapshot: Callable[..., Path], tmp_path: Path
) -> None:
    if kind == "EDM":
        file = snapshot("ddpmpp", "EDMPrecond", img_resolution=8, img_channels=3, label_dim=0)
        want, config = weights_of("ddpmpp"), override(PRESETS["folder"], [*QUICK, "image_size=8", "conditional=false"])
        data: Path | None = photos
    else:
        checkpoint = load_checkpoint(write())
        file = export_diffusers(checkpoint, tmp_path / "folder").path
        want, config, data = dict(checkpoint.weights), override(PRESETS["digits"], QUICK), None
    config = override(config, [f"init={file}", "phases=ect:16"])
    start = start_of(config, config.spec(10).classes)
    assert_equal_weights(start.first_weights(), want)
    assert start.spec.scaling == "boundary"
    model = load_checkpoint(train(config, tmp_path / "run", data))
    names = tuple("0123456789") if kind == "diffusers" else ()  # of the data's classes
    assert (model.spec, model.network) == (start.spec.with_class_names(names), start.network)
    assert model.weights.keys() == want.keys()
    assert kind != "EDM" or model.network == CASES["ddpmpp"]


# A teacher.


@pytest.mark.parametrize(
    ("phases", "teacher"), [("cd:80", "song"), ("pd/2:80", "cloneofsimo"), ("scd:80", "adm, unconditional")]
)
def test_a_teacher_may_be_another_network_with_other_conventions(
    phases: str, teacher: str, write: Write, tmp_path: Path, call: Callable[..., Any]
) -> None:
    file, out = write(teacher, "teacher.pt", scaling="edm", c_noise="ln/4"), tmp_path / "run"
    settings = [*TINY, f"phases={phases}"]
    result = call(main, *arguments(out, settings), "--teacher", file)
    assert (result.returncode, result.stderr) == (0, "")
    model = load_checkpoint(out / "model.pt")
    assert isinstance(model.network, AdmConfig)
    assert model.spec.classes == 10
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["teacher"] == {}  # the file is

    other = write(teacher, "other.pt", scaling="trigflow", c_noise="ln/4")  # the same output means another image
    run_here(tmp_path / "other", *settings[len(TINY) :], f"teacher={other}")
    assert losses_of(tmp_path / "other")[-1]["loss"] != losses_of(out)[-1]["loss"]


def test_a_student_starts_from_one_file_and_learns_from_another(write: Write, tmp_path: Path) -> None:
    init, teacher = write("adm", scaling="edm"), write("song", "teacher.pt", scaling="edm", c_noise="ln/4")
    run = begun(f"init={init}", "phases=cd:80", f"teacher={teacher}")
    assert run.state.teacher is not None
    assert_equal_weights(run.state.teacher.network.state_dict(), dict(load_checkpoint(teacher).weights))
    assert_equal_weights(run.state.student.denoiser.network.state_dict(), dict(load_checkpoint(init).weights))
    assert (run.state.teacher.spec.c_noise, run.context.spec.c_noise) == ("ln/4", "250ln")
    assert not run.state.teacher.training
    assert not any(weight.requires_grad for weight in run.state.teacher.parameters())


def test_a_phase_distils_the_phase_before_it(write: Write, tmp_path: Path) -> None:
    run_here(tmp_path / "run", f"init={write(scaling='edm')}", "phases=edm:40,scd:40")
    before = load_checkpoint(tmp_path / "run" / "phases" / "1_edm.pt").weights
    assert_equal_weights(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["teacher"], dict(before))


SID = ("sid.fakes=1", "phases=edm:16,ect:16,sid:16")


def test_a_phase_distils_the_newest_model_that_it_can(write: Write, tmp_path: Path) -> None:
    run_here(tmp_path / "run", *SID)
    edm, ect = (load_checkpoint(tmp_path / "run" / "phases" / name) for name in ("1_edm.pt", "2_ect.pt"))
    saved = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["teacher"]
    assert_equal_weights(saved, dict(edm.weights))
    assert not torch.equal(saved["out.2.weight"], ect.weights["out.2.weight"])
    shutil.rmtree(tmp_path / "run" / "phases")  # the state holds the teacher
    run_here(tmp_path / "run", *SID)


def test_a_phase_distils_the_model_of_init_where_no_phase_left_one(write: Write) -> None:
    file = write("adm", scaling="edm")
    run = begun(f"init={file}", "phases=ect:16,sid:160")
    want = dict(load_checkpoint(file).weights)
    run.enter(1, 0, {name: weight + 1 if weight.is_floating_point() else weight for name, weight in want.items()})
    state = run.state
    assert state.teacher is not None
    assert (state.teacher.spec.scaling, run.context.spec.scaling) == ("edm", "boundary")
    for denoiser in (state.teacher, *state.student.fakes):
        assert_equal_weights(denoiser.network.state_dict(), want)
    assert len(state.student.fakes) == 2
    assert all(weight.requires_grad for weight in state.student.fakes.parameters())
    assert not any(torch.equal(state.weights[name], want[name]) for name in state.weights)


def test_fake_scores_are_networks_of_the_teachers_shape(write: Write) -> None:
    init, teacher = write("adm", scaling="edm"), write("song", "teacher.pt", scaling="edm", c_noise="ln/4")
    run = begun(f"init={init}", "phases=sid:160", "sid.share=1", f"teacher={teacher}")
    (fake,) = run.state.student.fakes
    assert_equal_weights(fake.network.state_dict(), dict(load_checkpoint(teacher).weights))
    with pytest.raises(CmfastError, match="is not conditioned on label, and sid would unlearn it"):
        begun(f"init={init}", "phases=sid:160", f"teacher={write('adm, unconditional', 'plain.pt', scaling='edm')}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["shard=true"], "shard=true cannot train the networks of sid"),
        (["batch=8", "accumulation=8"], "sid needs 2 samples a micro-batch"),
    ],
)
def test_what_cannot_train_networks_in_turn_says_so(settings: list[str], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        accelerator_of(override(PRESETS["digits"], [*TINY, "phases=edm:80,sid:80", *settings]))
    with pytest.raises(CmfastError, match="sid differentiates without a loss scale; use precision=bf16 or fp32"):
        _check_fake_scores(override(PRESETS["digits"], [*TINY, "phases=edm:80,sid:80"]), "fp16", 8)


# What cannot be started from.


@pytest.mark.parametrize("option", ["init", "teacher"])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("adm, 16 px", "a model of images [1, 16, 16], the run has [1, 8, 8]: --set image_size=16 --set channels=1"),
        ("adm, 3 classes", "a model of 3 classes, the run has 10; their labels have different meanings"),
    ],
)
def test_a_model_of_other_images_or_classes_is_refused(
    option: str, network: str, words: str, write: Write, tmp_path: Path, call: Callable[..., Any],
    refused: Callable[..., None],
) -> None:  # fmt: skip
    file = write(network)
    result = call(main, *arguments(tmp_path / "run", [*QUICK, "phases=cd:8"]), f"--{option}", file)
    refused(result, f"--{option} {file}: {words}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("network", "conventions", "settings", "words"),
    [
        ("adm, unconditional", {}, ["phases=ect:8"], "a model of 0 classes, the data have 10; --set conditional=false"),
        ("adm", {}, ["phases=ect:8", "conditional=false"], "a model of 10 classes, the run has 0"),
        ("cloneofsimo", {}, ["phases=ect:8", "conditional=false", "dropout=0.1"], "no dropout; add --set dropout=0"),
        ("adm", {"scaling": "edm"}, ["phases=mf:8"], "mf needs a network that takes two times; this one takes one"),
        ("adm", {"scaling": "flow"}, ["phases=mf:8"], "mf needs a network that takes two times"),
        (
            "adm, two times",
            {"scaling": "edm"},
            ["phases=mf:8"],
            "mf needs scaling flow and c_noise flow or",
        ),
        (
            "adm, two times",
            {"scaling": "flow"},
            ["phases=sct:8"],
            "trigflow or edm or boundary, got scaling flow",
        ),
        ("adm, two times", {"scaling": "flow", "c_noise": "ln/4"}, ["phases=mf:8"], "and c_noise ln/4"),
        (
            "adm",
            {"scaling": "cloneofsimo"},
            ["phases=scd:8"],
            "trigflow or edm or boundary, got scaling cloneofsimo",
        ),
        (
            "adm",
            {"sigma_max": 90.0},
            ["phases=ect:8"],
            "its noise levels end at 90, the run's at 80; add --set sigma_max=90 ",
        ),
    ],
)
def test_a_model_that_the_run_cannot_go_on_from_is_refused(
    network: str, conventions: dict[str, Any], settings: list[str], words: str, write: Write, tmp_path: Path,
    call: Callable[..., Any], refused: Callable[..., None],
) -> None:  # fmt: skip
    file = write(network, **conventions)
    refused(call(main, *arguments(tmp_path / "run", [*QUICK, *settings]), "--init", file), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("levels", [{"sigma_min": 0.01}, {"sigma_max": 70.0, "sigmas": {1: (70.0,)}}], ids=str)
def test_a_teacher_that_does_not_know_all_noise_levels_of_the_run_is_refused(
    levels: dict[str, Any], write: Write, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    result = call(main, *arguments(tmp_path / "run", [*TINY, "phases=cd:8"]), "--teacher", write(**levels))
    refused(result, "it knows noise levels from", "the run has 0.002 to 80: change --set sigma_min, sigma_max")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["init", "teacher"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"no model", "a text that begins with 'no model'"),
        ("weights", "its image_size"),
    ],
    ids=["missing", "text", "incomplete"],
)
def test_a_file_that_is_no_model_is_refused(
    option: str, content: Any, words: str, write: Write, tmp_path: Path, call: Callable[..., Any],
    refused: Callable[..., None],
) -> None:  # fmt: skip
    file = tmp_path / "network.pt"
    if content == "weights":
        torch.save(dict(load_checkpoint(write()).weights), file)  # as OpenAI's files, which do not say everything
    elif content is not None:
        file.write_bytes(content)
    refused(call(main, *arguments(tmp_path / "run", [*QUICK, "phases=cd:8"]), f"--{option}", file), str(file), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["init", "teacher"])
def test_a_run_goes_on_with_the_models_that_it_began_with_and_with_no_others(
    option: str, write: Write, tmp_path: Path
) -> None:
    out, file = tmp_path / "run", write("adm", "one.pt", scaling="edm")
    settings = ["phases=cd:16", f"init={file}", *([f"teacher={file}"] if option == "teacher" else [])]
    model = load_checkpoint(run_here(out, *settings)).sha256()
    assert load_checkpoint(run_here(out, *settings)).sha256() == model

    other = tmp_path / "two.pt"
    shutil.copy(file, other)
    with pytest.raises(CmfastError, match=f"holds a run with another {option}; repeat the command"):
        run_here(out, *settings, f"{option}={other}")
    checkpoint = load_checkpoint(file)
    changed: dict[str, Tensor] = {**checkpoint.weights, "out.2.bias": checkpoint.weights["out.2.bias"] + 1}
    save_checkpoint(Checkpoint(spec=checkpoint.spec, network=checkpoint.network, weights=changed), file)
    with pytest.raises(CmfastError, match=r"holds a run with another models \(.*continue it where and with what it"):
        run_here(out, *settings)
    assert load_checkpoint(out / "model.pt").sha256() == model
