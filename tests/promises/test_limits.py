# SPDX-License-Identifier: MIT
"""Configurations from command lines, JSON, checkpoints and Python: wrong types and absurd sizes are refused by name."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmfast.errors import ArtifactError, CmfastError
from cmfast_train.checkpoint import Checkpoint, load_checkpoint
from cmfast_train.cli.train import main
from cmfast_train.config.checks import check_types, shown
from cmfast_train.config.overrides import override
from cmfast_train.config.phase import phase
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import LIMITS, TrainConfig, from_dict, to_dict
from cmfast_train.denoiser import Denoiser
from cmfast_train.methods.consistency import ict_pair
from cmfast_train.networks.adm import AdmConfig
from cmfast_train.networks.build import build_network, check_weights, network_from_dict, network_to_dict
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.networks.edm import DhariwalConfig, SongConfig
from cmfast_train.training.ema import Averages
from cmfast_train.training.step_networks import Student
from helpers.specs import image_spec, named

DIGITS = PRESETS["digits"]
ADM = AdmConfig(image_size=8, channels=1, model_channels=32, res_blocks=1, channel_mult=(1, 2), head_channels=32)
SONG = SongConfig(image_size=16, channels=1, model_channels=32, channel_mult=(1, 2, 2), res_blocks=1, attention=(8,))
DHARIWAL = DhariwalConfig(image_size=16, model_channels=64, channel_mult=(1, 2, 3), res_blocks=2, attention=(8,))
SEED = CloneofsimoConfig(image_size=8, channels=1, width=32)
NETWORKS = {
    "adm": ADM,
    "adm, conditional": dataclasses.replace(ADM, classes=7, attention=(8, 4), two_times=True, res_blocks=2),
    "adm, convolutions": dataclasses.replace(ADM, scale_shift=False, resblock_updown=False, attention=(4,), heads=2),
    "adm, one level": dataclasses.replace(ADM, channel_mult=(2,), channels=3),
    "adm, patches": dataclasses.replace(ADM, image_size=(16, 24), channels=3, patch=2, attention=(8,)),
    "adm, wide": dataclasses.replace(ADM, image_size=(8, 16), attention=(8,)),
    "cloneofsimo": SEED,
    "cloneofsimo, wider": CloneofsimoConfig(image_size=(4, 8), channels=3, width=64),
    "song": SONG,
    "song, NCSN++": dataclasses.replace(
        SONG, encoder="residual", embedding="fourier", resample=(1, 3, 3, 1), noise_mult=2, classes=4, augment=9
    ),
    "song, skip": dataclasses.replace(SONG, encoder="skip", decoder="skip", channel_mult=(2, 1), emb_mult=2),
    "song, one level": dataclasses.replace(SONG, channel_mult=(1,), attention=(16,), decoder="skip"),
    "dhariwal": DHARIWAL,
    "dhariwal, conditional": dataclasses.replace(DHARIWAL, classes=5, augment=9, attention=(16, 4), res_blocks=1),
}


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Sizes are counted before anything is built.


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_tensors_are_counted_from_its_configuration_alone(name: str) -> None:
    config = NETWORKS[name]
    with torch.device("meta"):
        weights = build_network(config).state_dict()
    check_weights(config, weights)
    first, *rest = weights
    with pytest.raises(CmfastError, match="the weights do not fit the network: they are "):
        check_weights(config, {key: weights[key] for key in rest})
    with pytest.raises(CmfastError, match=f"its configuration needs {len(weights):,} of "):
        check_weights(config, {**weights, first: torch.zeros(3)})


TOO_LARGE: list[tuple[str, Any, str]] = [
    ("res_blocks", 10**6, "2 levels .channel_mult. with res_blocks=1000000 are .* more than the 1,024"),
    ("res_blocks", 10**30, "res_blocks must be a whole number"),
    ("channel_mult", (1,) * 10**4, "channel_mult must be a list .* at most 1,000 entries"),
    ("channel_mult", (1,) * 900, "900 levels .channel_mult. with res_blocks=1 are 3,600 blocks"),
    ("channel_mult", (1, 10**9), "the network would have .* weights, more than the 10,000,000,000"),
    ("model_channels", 32_000_000, "the network would have .* weights, more than the 10,000,000,000"),
    ("classes", 10**12, "the network would have .* weights|takes no label"),
    ("image_size", 10**6, "image_size must be a whole number from 1 to 65536"),
    ("image_size", (65536, 65536), "image_size=65536 with channels=1: an image has at most 268,435,456 values"),
    ("channels", 10**9, "an image has at most 268,435,456 values"),
]


@pytest.mark.parametrize(
    ("network", "field", "value", "words"),
    [
        (network, *row)
        for network in ("adm", "song", "dhariwal", "cloneofsimo")
        for row in TOO_LARGE
        if network != "cloneofsimo" or row[0] not in ("res_blocks", "channel_mult")
    ],
)
def test_a_network_too_large_to_build_is_refused_at_once(network: str, field: str, value: Any, words: str) -> None:
    values = network_to_dict(dataclasses.replace(NETWORKS[network], channels=1, image_size=16))
    if network != "cloneofsimo":
        values |= {"channel_mult": [1, 1], "res_blocks": 1, "attention": []}
    if network == "cloneofsimo" and field == "model_channels":
        field = "width"
    start = time.process_time()
    with pytest.raises(CmfastError, match=words):
        network_from_dict({**values, field: list(value) if isinstance(value, tuple) else value})
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("res_blocks", 10**6, "more than the 1,024"),
        ("res_blocks", 100, "145 weights are too few for a network of 200 blocks"),
        ("model_channels", 64, "the weights do not fit the network: they are "),
        ("channel_mult", [1] * 10**4, "channel_mult"),
        ("dropout", float("nan"), "dropout must be a finite number, got nan"),
        ("speed", 3, "the network adm has no field 'speed'"),
        ("classes", True, "classes must be a whole number, .* got True"),
        ("attention", [[4]], "attention must be a list .*, got "),
        ("head_channels", 32.0, "head_channels must be a whole number"),
        ("scale_shift", 1, "scale_shift must be true or false, got 1"),
        ("type", ["adm"], "unknown network type"),
    ],
)
def test_a_checkpoint_is_not_built_from_a_description_that_its_weights_do_not_have(
    field: str, value: Any, words: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    content = torch.load(tiny_checkpoint(), weights_only=True)
    content["network"][field] = value
    torch.save(content, tmp_path / "model.pt")
    start = time.process_time()
    with pytest.raises(ArtifactError, match=words) as raised:
        load_checkpoint(tmp_path / "model.pt")
    assert time.process_time() - start < 1
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500 + len(str(tmp_path))


def test_a_description_without_its_size_or_names_is_refused_in_one_line() -> None:
    values = network_to_dict(ADM)
    del values["image_size"]
    with pytest.raises(CmfastError, match="the description of the network adm lacks image_size"):
        network_from_dict(values)
    with pytest.raises(CmfastError, match="described by names and values"):
        network_from_dict([1, 2])  # type: ignore[arg-type]


# What --set may not be.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("res_blocks=1000000", "more than the 1,024"),
        ("model_channels=32000000", "the network would have 7.7e.17 weights, more than the 10,000,000,000 "),
        ("channel_mult=" + ",".join(["1"] * 10_000), "channel_mult must be a list .* at most 1,000 entries"),
        ("attention=" + ",".join(["1"] * 100), "the number of attention must be at most 32, got 100"),
        ("image_size=1000000", "image_size must be a whole number from 1 to 65536"),
        ("image_size=60000x60000", "an image has at most 268,435,456 values"),
        ("image_size=²", r"'²' does not convert to int \| tuple\[int, int\] .pixels of square images"),
        ("image_size=32x", "'32x' does not convert .* HEIGHTxWIDTH, such as 32x64"),
        ("image_size=8x8x8", "'8x8x8' does not convert"),
        ("image_size=7x8", "image_size=7x8 cannot be halved 1 times"),
        ("grid=1000000000", "grid must be at most 4,096, got 1,000,000,000"),
        ("batch=1000000000000", "batch must be at most 1,048,576, got 1,000,000,000,000"),
        ("batch=1e3", r"'1e3' does not convert to int .a whole number, such as 1000."),
        ("batch=10" + "0" * 30, "batch must be a whole number, at most 1,000,000,000,000"),
        ("batch=1" + "0" * 5000, "does not convert to int"),
        ("accumulation=1000000000000", "does not divide into accumulation=1000000000000"),
        ("log_images=1" + "0" * 30, "log_images must be a whole number, at most"),
        ("checkpoint_images=1" + "0" * 30, "checkpoint_images must be a whole number, at most"),
        ("workers=1000000", "workers must be at most 256, got 1,000,000"),
        ("emas=" + ",".join(["0.9"] * 100), "the number of emas must be at most 32, got 100"),
        ("emas=" + ",".join(["0.9"] * 100_000), "emas must be a list"),
        ("ema_stds=" + ",".join(["0.1"] * 40), "the number of ema_stds must be at most 32, got 40"),
        ("phases=" + ",".join(["edm:1"] * 100_000), "--set phases: there are 100,000, more than 100"),
        ("phases=edm:1" + "0" * 30, "edm.images must be a whole number, at most 1,000,000,000,000"),
        ("seed=4294967296", "seed must be from 0 to 2.*32 - 1, got 4294967296"),
        ("seed=1" + "0" * 40, "seed must be from 0 to"),
        ("sigmas=80:80", "sigmas must be lists of different lengths"),
        ("sigma_max=inf", "sigma_max must be a finite number, got inf"),
        ("dropout=nan", "dropout must be a finite number, got nan"),
        ("lr=nan", "no such field of the run, but of its phases: --set METHOD.lr=nan"),
        ("edm.lr=-1", "lr must be greater than 0, got -1"),
        ("phases=ct:8 ct.s1=1000000", "ct.s1 must be at least 2 and at most 65536, got 1000000"),
        ("phases=ect:8 ect.stages=0,1" + "0" * 400, "ect.stages must be a list"),
        ("phases=edm:8,pd/1:8 pd.steps=1000000000", "pd.steps must be at least 1 and at most 65536"),
        ("class_names=a,b", "the names of the classes are given by the data"),
    ],
    ids=lambda text: text[:30],
)
def test_an_absurd_value_is_one_short_line(text: str, words: str) -> None:
    start = time.process_time()
    with pytest.raises(CmfastError, match=words) as raised:
        override(DIGITS, text.split())
    assert time.process_time() - start < 0.5
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_batch_or_a_grid_of_large_images_is_bounded_by_its_values() -> None:
    large = ["data=folder", "image_size=4096x2048", "channel_mult=1,2"]
    assert override(DIGITS, [*large, "batch=128", "grid=4"]).image_sides == (4096, 2048)
    for name in ("batch", "grid"):
        with pytest.raises(
            CmfastError, match=f"{name}=1024 images of 4096x2048 px are 8,589,934,592 values, more than"
        ):
            override(DIGITS, [*large, f"{name}=1024"])


@pytest.mark.parametrize("values", [(1000.0, 2.0), (-1000.0, 0.1), (0.0, 1e-12)], ids=str)
def test_a_law_of_noise_levels_that_draws_none_is_refused_before_the_run(values: tuple[float, float]) -> None:
    mean, std = values
    texts = ["phases=ict:100", f"ict.p_mean={mean}", f"ict.p_std={std}"]
    if abs(mean) > 1:
        with pytest.raises(CmfastError, match=r"ict.p_mean=.* draws no noise level from 0.002 to 80"):
            override(DIGITS, texts)
        with pytest.raises(CmfastError, match="draws no noise level"):
            ict_pair(10, torch.rand(3), mean, std, 0.002, 80.0)
    else:
        assert override(DIGITS, texts)  # all levels are about one


def test_one_name_set_twice_is_refused_by_the_command(
    call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    said = call(main, "digits", "--out", tmp_path, "--set", "batch=8", "--set", "batch=16")
    refused(said, "--set batch=16: batch is already set by batch=8; remove one of the two")
    said = call(main, "digits", "--out", tmp_path, "--set", "edm.lr=1", "--set", "ict.lr=1", "--set", "edm.lr=2")
    refused(said, "edm.lr is already set by edm.lr=1")
    refused(call(main, "digits", "--out", tmp_path, "--init", "a.pt", "--set", "init=b.pt"), "init is already set by")
    assert not list(tmp_path.iterdir())


# What JSON and Python may not hold.

WRONG: list[tuple[str, Any, str]] = [
    ("batch", True, "batch must be a whole number, .*, got True"),
    ("batch", 64.0, "batch must be a whole number, .*, got 64.0"),
    ("batch", "64", "batch must be a whole number, .*, got '64'"),
    ("batch", np.int64(64), "batch must be a whole number"),
    ("batch", None, "batch must be a whole number, .*, got None"),
    ("image_size", True, "image_size must be a number of pixels, or HEIGHTxWIDTH, got True"),
    ("image_size", (8.0, 16), "image_size must be a number of pixels, or HEIGHTxWIDTH"),
    ("image_size", (8, 16, 8), r"image_size must be a whole number from 1 to 65536 .*, got \(8, 16, 8\)"),
    ("seed", float("nan"), "seed must be a whole number"),
    ("seed", False, "seed must be a whole number"),
    ("dropout", "0.1", "dropout must be a finite number, got '0.1'"),
    ("dropout", True, "dropout must be a finite number, got True"),
    ("sigma_data", float("inf"), "sigma_data must be a finite number, got inf"),
    ("sigma_data", 10**400, "sigma_data must be a finite number"),
    ("flip", 1, "flip must be true or false, got 1"),
    ("flip", "yes", "flip must be true or false, got 'yes'"),
    ("data", 3, "data must be a text"),
    ("init", "x" * 10_000, "init must be a text of at most 4,096 characters"),
    ("channel_mult", 2, "channel_mult must be a list"),
    ("channel_mult", (1, 2.0), r"channel_mult must be a list .*, got \(1, 2.0\)"),
    ("channel_mult", (1, True), "channel_mult must be a list"),
    ("emas", (0.9, float("nan")), "emas must be a list"),
    ("sigmas", (80.0,), "sigmas must be a list"),
    ("class_names", ("a", 3), "class_names must be a list"),
    ("phases", ("edm",), "phases must be a tuple"),
]


@pytest.mark.parametrize(("field", "value", "words"), WRONG, ids=[f"{name}={shown(value)}" for name, value, _ in WRONG])
def test_a_field_of_another_type_is_refused_from_python_and_from_json(field: str, value: Any, words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        dataclasses.replace(DIGITS, **{field: value})
    if field != "phases":
        with pytest.raises(CmfastError, match=words):
            from_dict({**to_dict(DIGITS), field: list(value) if isinstance(value, tuple) else value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", True), ("images", 10.0), ("images", 10**30), ("images", "10"), ("lr", "fast"), ("lr", float("nan")),
        ("lr", 10**400), ("q", np.float32(2)), ("stages", (0, 7.0)), ("stages", [0, 7]), ("loss", 3), ("k", None),
        ("method", ["edm"]), ("hyper", None),
    ],
    ids=str,
)  # fmt: skip
def test_a_field_of_a_phase_of_another_type_is_refused(field: str, value: Any) -> None:
    tuned = phase("ect", 100)
    with pytest.raises(CmfastError, match=rf"{field} must be "):
        tuned.changed({field: value}) if field != "hyper" else dataclasses.replace(tuned, hyper=value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(speed=3), "the configuration has no field 'speed'; is it of a newer cmfast"),
        (lambda c: c.pop("data"), "the configuration lacks data"),
        (lambda c: c.pop("phases"), "at least one phase"),
        (lambda c: c.update(phases=3), "phases must be a list of at most 100 phases, got 3"),
        (lambda c: c.update(phases=c["phases"] * 10**5), "phases must be a list of at most 100 phases"),
        (lambda c: c.update(phases=["edm:8"]), "a phase of the configuration must be names and values, got 'edm:8'"),
        (lambda c: c["phases"][0].update(speed=3), "a phase of the configuration has no field 'speed'"),
        (lambda c: c["phases"][0].pop("method"), "a phase of the configuration lacks method"),
    ],
)
def test_a_damaged_configuration_of_an_earlier_run_is_one_line(change: Callable[[Any], Any], words: str) -> None:
    values = json.loads(json.dumps(to_dict(DIGITS)))
    change(values)
    with pytest.raises(CmfastError, match=words) as raised:
        from_dict(values)
    assert len(str(raised.value)) < 400
    with pytest.raises(CmfastError, match="the configuration must be names and values"):
        from_dict([values])  # type: ignore[arg-type]


def test_a_strange_value_is_shown_in_one_short_line() -> None:
    shared: Any = "x"
    for _ in range(60):
        shared = [shared, shared]
    for value in (shared, 10**5000, "a\nb" * 1000, {i: i for i in range(1000)}, b"\x00" * 10**6):
        assert len(shown(value)) <= 200
        assert "\n" not in shown(value)


def test_every_limit_is_on_a_field_and_no_preset_is_near_one() -> None:
    assert LIMITS.keys() <= {field.name for field in dataclasses.fields(TrainConfig)}
    for preset in PRESETS.values():
        check_types(preset)
        assert preset.batch * 64 < LIMITS["batch"]


# The names of the classes.


def test_class_names_go_from_the_configuration_into_the_spec_and_through_json() -> None:
    named = dataclasses.replace(DIGITS, class_names=("cat", "dog"))
    assert named.spec(2).class_names == ("cat", "dog")
    assert dataclasses.replace(named, conditional=False).spec(2).class_names == ()
    assert from_dict(json.loads(json.dumps(to_dict(named)))) == named
    values = to_dict(DIGITS)
    del values["class_names"]  # of an earlier version
    assert from_dict(values) == DIGITS


# Whatever torch's default is, weights are float32.


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_built_and_run_in_float32_whatever_the_default(name: str, float64_by_default: None) -> None:
    config = NETWORKS[name]
    torch.manual_seed(0)
    network = build_network(config)
    assert torch.get_default_dtype() == torch.float64
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    spec = image_spec(image=config.image_shape, classes=config.classes)
    denoiser = Denoiser(network, spec).eval()
    x, sigma = torch.zeros(2, *config.image_shape, dtype=torch.float32), torch.tensor([1.0, 80.0], dtype=torch.float32)
    label = torch.tensor([0, 1]) if config.classes else None
    assert denoiser(x, sigma, **named(label)).dtype == torch.float32


def test_new_weights_are_the_same_bits_whatever_the_default(float64_by_default: None) -> None:
    def drawn() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_network(ADM).state_dict()

    wide = drawn()
    torch.set_default_dtype(torch.float32)
    assert all(torch.equal(wide[name], tensor) for name, tensor in drawn().items())


def test_averages_students_and_checkpoints_are_float32_whatever_the_default(float64_by_default: None) -> None:
    network = build_network(ADM)
    average = Averages(dict(network.named_parameters()), rates=(0.9,))["0.9"]
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}
    student = Student(Denoiser(network, image_spec(image=(1, 8, 8))), log_variance=True)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    checkpoint = Checkpoint(spec=image_spec(image=(1, 8, 8)), network=ADM, weights=network.state_dict())
    assert {weight.dtype for weight in checkpoint.denoiser().parameters()} == {torch.float32}
