# SPDX-License-Identifier: MIT
"""The configuration of a run: what a command line may change, what it may not, and every word it is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmfast.errors import CmfastError
from cmfast_train.cli.train import main
from cmfast_train.config.about import ABOUT, NOT_RUN, RECORDED, YOURS
from cmfast_train.config.overrides import lost_settings, override
from cmfast_train.config.phase import Phase, phase, types_of
from cmfast_train.config.presets import PRESETS
from cmfast_train.config.train_config import DATA, FREE_FIELDS, TrainConfig, from_dict, to_dict
from cmfast_train.methods import find, names
from cmfast_train.networks.build import build_network
from cmfast_train.networks.cloneofsimo import CloneofsimoConfig
from cmfast_train.training.initial_model import network_config

# The digits, by two methods whose settings most cases change.
DIGITS = override(PRESETS["digits"], ["batch=64", "phases=edm:40000,ect:50000", "ect.stages=1,6"])
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
Call = Callable[..., Any]

OURS = sorted(PRESETS.keys() - {"arrays"})  # of which is a custom network


@pytest.mark.parametrize("name", OURS)
def test_a_preset_is_a_run_whose_network_can_be_built(name: str) -> None:
    config = PRESETS[name]
    assert config.data == ("folder" if name == "flowers32" else name.removesuffix("-large"))
    assert network_config(config, 10).image_size == config.image_size
    assert config.images >= sum(phase.images for phase in config.phases) > 0
    then = {"digits": ["ict"], "mnist": ["ect", "sid"], "fashion-mnist": ["ect", "sid"]}
    assert [phase.method for phase in config.phases] == ["edm", *then.get(name, ["ect"])]
    assert config.sigmas[0] == (config.sigma_max,)


def test_every_data_set_has_a_preset_and_every_preset_a_line_of_help() -> None:
    assert {config.data for config in PRESETS.values()} == set(DATA)
    assert ABOUT.keys() == PRESETS.keys()
    assert len(ABOUT) == len(RECORDED) + len(YOURS) + len(NOT_RUN)


def phases_of(training: dict[str, Any]) -> tuple[Phase, ...]:
    """Return the phases of a record; one of before a field existed was made with its default."""
    return from_dict(to_dict(DIGITS) | {"phases": training["phases"]}).phases


@pytest.mark.parametrize(("beta2", "moves"), [(0.7, 1), (2 / 3, 10)])
def test_from_the_least_beta2_on_radam_divides_by_the_size_of_gradients(beta2: float, moves: float) -> None:
    small, large = (torch.zeros((), requires_grad=True) for _ in range(2))
    optimizer = torch.optim.RAdam([small, large], lr=1e-3, betas=(0.9, beta2))
    for _ in range(20):
        small.grad, large.grad = torch.tensor(1.0), torch.tensor(10.0)
        before = small.item(), large.item()
        optimizer.step()
    assert (large.item() - before[1]) / (small.item() - before[0]) == pytest.approx(moves, rel=1e-3)


def test_a_preset_with_a_record_has_one() -> None:
    for name in RECORDED:
        training = json.loads((RESULTS / f"shipped_{name}.json").read_text())["training"]
        assert phases_of(training) == PRESETS[name].phases
        assert training["batch"] == PRESETS[name].batch


def test_presets_that_were_not_run_are_behind_all(call: Call) -> None:
    plain, everything = call(main, "--help").stdout, call(main, "--all", "--help").stdout
    assert everything == call(main, "--help", "--all").stdout
    for name in PRESETS:
        listed = f"\n    {name} "
        assert listed in everything
        assert (listed in plain) == (name not in NOT_RUN)
    assert call(main, "digits", "--out", "x", "--all").returncode == 2


@pytest.mark.parametrize("name", OURS)
def test_a_presets_line_of_help_says_its_size(name: str) -> None:
    config = PRESETS[name]
    classes = {"flowers32": 5, "imagenet9": 9, "imagenet64": 1000}.get(name, 10)
    with torch.device("meta"):
        network = build_network(network_config(config, classes))
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    assert ABOUT[name].startswith(f"{millions:.{0 if millions > 10 else 1}f}M parameters, ")
    assert config.conditional


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_configuration_survives_json(name: str) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(PRESETS[name])))) == PRESETS[name]


def test_fields_that_may_change_while_a_run_continues_exist() -> None:
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= FREE_FIELDS


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("batch=32", "batch", 32),
        ("checkpoint_images=1_000", "checkpoint_images", 1000),
        ("dropout=0.1", "dropout", 0.1),
        ("sigma_data=1", "sigma_data", 1.0),
        ("data=folder", "data", "folder"),
        ("flip=true", "flip", True),
        ("conditional=No", "conditional", False),
        ("tensorboard=0", "tensorboard", False),
        ("channel_mult=1,2,2", "channel_mult", (1, 2, 2)),
        ("attention=", "attention", ()),
        ("attention=4,2", "attention", (4, 2)),
        ("c_noise=ln/4", "c_noise", "ln/4"),
        ("sigmas=80:80,0.8", "sigmas", ((80.0,), (80.0, 0.8))),
        ("phases=edm:500", "phases", (phase("edm", 500),)),
        ("phases=edm:500,ct:1000", "phases", (phase("edm", 500), phase("ct", 1000))),
        ("phases=edm:500,pd/4:1000", "phases", (phase("edm", 500), phase("pd", 1000, steps=4))),
        ("emas=0.9,0.99", "emas", (0.9, 0.99)),
    ],
)
def test_a_text_becomes_a_value_of_its_fields_type(text: str, field: str, value: Any) -> None:
    changed = override(DIGITS, [text])
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert dataclasses.replace(changed, **{field: getattr(DIGITS, field)}) == DIGITS  # nothing else changed


def test_a_method_before_the_dot_changes_every_phase_of_that_method_and_no_other() -> None:
    config = override(DIGITS, ["phases=edm:500,ect:100,edm:200", "edm.lr=0.5", "ect.stages=2,3"])
    assert [phase.lr for phase in config.phases] == [0.5, 1e-4, 0.5]
    assert config.phases[1].hyper.stages == (2, 3)


def test_a_later_assignment_wins() -> None:
    assert override(DIGITS, ["batch=16", "batch=32"]).batch == 32


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "texts",
    [
        ("sigma_max=40", "sigmas=40:40,0.8"),
        ("sigma_min=1.0", "sigmas=80:80,5"),
        ("batch=96", "accumulation=3"),
        ("phases=ct:100", "ct.s0=200", "ct.s1=300"),
        ("image_size=12", "channel_mult=1,2"),
        ("network=cloneofsimo", "conditional=false"),
    ],
    ids=lambda texts: texts[0],
)
def test_fields_that_only_fit_together_can_be_changed_together(texts: tuple[str, str], order: int) -> None:
    assert override(DIGITS, texts[::order]) != DIGITS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch", "--set batch: expected NAME=VALUE"),
        ("", "expected NAME=VALUE"),
        ("bacth=3", "--set bacth=3: no such field; there are accumulation, attention, batch, "),
        ("=3", "no such field"),
        (
            "edm.speed=3",
            "--set edm.speed=3: edm has no such field; there are beta2, clip_norm, ema, .* p_mean, p_std",
        ),
        ("ct.lr=1", "--set ct.lr=1: this run has no phase 'ct'; its phases: edm, ect"),
        ("batch=many", "--set batch=many: 'many' does not convert to int"),
        ("batch=1.5", "'1.5' does not convert to int"),
        ("dropout=", "'' does not convert to float"),
        ("flip=maybe", "'maybe' does not convert to bool"),
        ("channel_mult=1,x", r"'1,x' does not convert to tuple\[int, \.\.\.\]"),
        ("sigmas=80;0.8", "'80;0.8' does not convert to"),
        ("phases=edm", "'edm' does not convert to"),
        ("phases=sgd:100", "no method 'sgd'; there are edm, ct, cd, "),
        ("phases=edm:x", "'edm:x' does not convert to"),
        ("phases=ect/4:100", "'ect/4:100' does not convert to"),
        ("phases=pd/x:100", "'pd/x:100' does not convert to"),
        ("ect.stages=1,x", "'1,x' does not convert to"),
        ("edm.q=3", "--set edm.q=3: edm has no such field"),
        ("q=3", "no such field of the run, but of its phases: --set METHOD.q=3"),
        ("lr=3", "no such field of the run, but of its phases: --set METHOD.lr=3"),
        ("edm.method=ect", "edm has no such field"),
    ],
)
def test_a_text_that_cannot_be_read_is_repeated_with_what_is_needed(text: str, words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        override(DIGITS, [text])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "data=imagenet",
            "one of digits, mnist, fashion-mnist, cifar10, folder, imagenet9, imagenet64, arrays, got 'imagenet'",
        ),
        ("channels=2", "channels must be 1 or 3, got 2"),
        ("precision=int8", "precision must be auto, fp32, bf16 or fp16, got 'int8'"),
        ("device=tpu", "device must be auto, cpu or cuda, got 'tpu'"),
        ("batch=0", "batch must be greater than 0, got 0"),
        ("image_size=-8", "image_size must be a whole number from 1 to 65536 .*, or HEIGHTxWIDTH, got -8"),
        ("log_images=0", "log_images must be greater than 0"),
        ("checkpoint_images=0", "checkpoint_images must be greater than 0"),
        ("accumulation=3", "batch=64 does not divide into accumulation=3 micro-batches"),
        ("sigmas=70:70,1", r"default noise levels must begin with sigma_max=80"),
        ("sigmas=80:80,90", "90 follows 80"),
        ("sigma_min=-1", "must be positive numbers"),
        ("scaling=vp", "scaling must be one of"),
        ("c_noise=ln", "c_noise must be one of"),
        ("network=unet", "network must be one of adm, cloneofsimo, own, got 'unet'"),
        ("network=cloneofsimo", "network=cloneofsimo takes no label; add --set conditional=false"),
        ("phases=edm:0", "images must be greater than 0, got 0"),
        ("edm.lr=0", "lr must be greater than 0"),
        ("edm.lr=nan", "edm.lr must be a finite number, got nan"),
        ("edm.ema=1", "edm.ema must be at least 0 and below 1, got 1"),
        ("ect.lr_decay=2", "ect.lr_decay must be at least 0 and at most 1, got 2"),
        ("ect.stages=3,1", "ect.stages must be first,last with 0 <= first <= last"),
        ("ect.stages=3", "ect.stages must be first,last"),
        ("ect.stages=", "ect.stages must be first,last"),
        ("ect.stages=1,2,3", "ect.stages must be first,last"),
        ("phases=ct:8 ct.s0=1", "ct.s0 must be at least 2 and at most 65536, got 1"),
        ("phases=ict:8 ict.s0=4 ict.s1=3", "ict.s0 must be at most s1, got s0=4, s1=3"),
        ("phases=ct:8 ct.mu0=1", "ct.mu0 must be at least 0 and below 1, got 1"),
        ("phases=ct:8 ct.mu0=0", "ct.mu0=0 has no adaptive schedule; set mu=fixed as well"),
        ("edm.lr_warmup=-1", "edm.lr_warmup must be at least 0 and at most 1, got -1"),
        ("edm.beta2=1", "edm.beta2 must be at least 0.7 and below 1, got 1"),
        ("edm.beta2=0.6", "edm.beta2 must be at least 0.7 and below 1, got 0.6"),
        ("edm.clip_norm=-1", "edm.clip_norm must be at least 0, got -1"),
        ("edm.clip_norm=nan", "edm.clip_norm must be a finite number, got nan"),
        ("ect.q=1", "ect.q must be greater than 1, got 1"),
        (
            "ect.q=8",
            r"ect.q\^\(last stage \+ 1\), which divides the gap, must be at most 2\^17; got q=8 and last stage 6",
        ),
        ("ect.stages=0,17", "at most 2.17; got q=2 and last stage 17"),
        ("ect.loss=lpips", r"loss=lpips needs weights: --set lpips=vgg:FILE \(or alex, squeeze\), got ''"),
        ("ect.loss=l3", "ect.loss must be l1 or l2 or huber or lpips, got 'l3'"),
        ("phases=ct:8 ct.mu=none", "ct.mu must be adaptive or fixed, got 'none'"),
        ("phases=edm:8,cd:8 cd.solver=rk4", "cd.solver must be heun or euler, got 'rk4'"),
        ("phases=mf:8 mf.derivative=backward", "mf.derivative must be jvp or finite, got 'backward'"),
        ("phases=edm:8,pd/2:8 pd.steps=0", "pd.steps must be at least 1 and at most 65536, got 0"),
        ("phases=edm:8,pd/0:8", "pd.steps must be at least 1"),
        ("emas=0.9,1", "emas must be at least 0 and below 1, got "),
        ("ema_stds=0.3", "ema_stds must be fractions of a phase above 0 and up to 0.288, got "),
        ("ema_stds=0.1,0.1004", "ema_stds must differ by at least 0.001, got "),
        ("grid=0", "grid must be greater than 0, got 0"),
        ("workers=-1", "workers .*got -1"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_can(text: str, words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        override(DIGITS, text.split())


# Phases, and what they need of the rest.


@pytest.mark.parametrize("method", names())
def test_every_method_has_usual_values_and_runs_after_a_teacher(method: str) -> None:
    config = override(DIGITS, ["init=model.pt", f"phases={method}:800"])
    assert {phase.method for phase in config.phases} == {method}
    assert all(getattr(config.phases[0], name) == value for name, value in find(method).defaults.items())
    assert config.phases[0].values().keys() == {"method", *types_of(method)}
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_settings_that_a_new_list_of_phases_loses_are_named(call: Call) -> None:
    for name, texts, lost in (
        # A length keeps them, and what is given is meant.
        ("digits", ["edm.images=640", "ict.images=640", "ict.lr=1e-4"], []),
        ("digits", ["phases=mf:64"], []),
        ("digits", ["phases=ect:64,ict:64", "ict.lr=1e-4", "ict.s1=40"], ["ict.beta2", "ict.lr_decay", "ict.ema"]),
        (
            "digits",
            ["phases=ict:64,edm:64"],
            ["ict.lr", "ict.beta2", "ict.lr_decay", "ict.ema", "edm.beta2", "edm.lr_decay", "edm.ema"],
        ),
        ("mnist", ["phases=ect:96", "ect.lr=1e-4", "ect.ema=0.9"], ["ect.lr_decay", "ect.stages"]),
    ):
        assert lost_settings(PRESETS[name], texts, override(PRESETS[name], texts)) == lost
    result = call(main, "digits", "--out", "new", "--set", "phases=edm:64", "--dry-run")
    assert result.stderr == (
        "note: --set phases= takes the defaults of edm.beta2, edm.lr_decay, edm.ema, not what the preset has; "
        "--set edm.images=N changes a length and keeps the preset's settings\n"
    )


def test_progressive_distillation_is_a_phase_for_each_number_of_steps() -> None:
    phases = override(DIGITS, ["phases=edm:100,pd:1000", "pd.lr=0.5"]).phases
    assert [(phase.name, phase.images) for phase in phases] == [
        ("edm", 100), ("pd/8", 250), ("pd/4", 250), ("pd/2", 250), ("pd/1", 250),
    ]  # fmt: skip
    assert [phase.lr for phase in phases] == [1e-3, 0.5, 0.5, 0.5, 0.5]
    assert [phase.name for phase in override(DIGITS, ["phases=edm:100,pd/4:200"]).phases] == ["edm", "pd/4"]


@pytest.mark.parametrize(
    ("phases", "conventions"),
    [
        ("edm:8", ("boundary", "250ln")),
        ("ct:8", ("boundary", "250ln")),
        ("edm:8,cd:8", ("boundary", "250ln")),
        ("edm:8,pd:8", ("boundary", "250ln")),
        ("ict:8", ("boundary", "250ln")),
        ("sct:8", ("trigflow", "trig")),
        ("ect:8,edm:8,scd:8", ("trigflow", "trig")),
        ("mf:8", ("flow", "flow")),
        ("edm:8,mf:8", ("flow", "flow")),
    ],
)
def test_the_conventions_are_those_of_the_methods_unless_said(phases: str, conventions: tuple[str, str]) -> None:
    config = override(PRESETS["mnist-large"], [f"phases={phases}"])
    assert (config.scaling, config.c_noise) == conventions
    assert (config.spec(10).scaling, config.spec(10).c_noise) == conventions
    again = override(config, ["batch=32"])  # of the same phases
    assert (again.scaling, again.c_noise) == conventions
    back = override(config, ["phases=edm:8"])
    assert (back.scaling, back.c_noise) == ("boundary", "250ln")
    said = override(override(PRESETS["mnist-large"], ["c_noise=raw"]), [f"phases={phases}"])
    assert (said.scaling, said.c_noise) == (conventions[0], "raw")


def test_only_meanflow_has_a_network_of_two_times() -> None:
    assert network_config(override(DIGITS, ["phases=mf:8"]), 10) == dataclasses.replace(
        network_config(DIGITS, 10), two_times=True
    )


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["phases=cd:800"], r"cd distils a diffusion model: put one before it .*edm:50000,cd:100000.* --init FILE"),
        (["phases=scd:800,edm:800"], "scd distils a diffusion model"),
        (["phases=pd:800"], "pd/8 distils a diffusion model"),
        (["phases=ect:800,cd:800"], "cd distils a diffusion model"),
        (["phases=edm:800,pd/8:800,pd/2:800"], "pd/2 halves the steps of pd/4, not of pd/8"),
        (["phases=edm:800,pd/8:800,ect:800,pd/2:800"], "pd/2 halves the steps of pd/4, not of pd/8"),
        (["phases=ect:800,sid:800"], "sid distils a diffusion model"),
        (["phases=edm:800,sid:256"], "sid needs 5 optimiser steps, 320 images, to train the student; it has 4"),
        (
            ["phases=edm:800,sid:800", "sid.levels=0.3"],
            r"sid.levels must be low,high from sigma_min=0.002 to sigma_max=80",
        ),
        (["phases=edm:800,sid:800", "sid.levels=8,0.3"], "sid.levels must be low,high"),
        (["phases=edm:800,sid:800", "sid.levels=0.3,90"], "sid.levels must be low,high"),
        (
            ["phases=edm:800,sid:800", "sid.sigma_high=90"],
            "sid.sigma_high must be above sigma_min=0.002, at most 80, got 90",
        ),
        (["teacher=model.pt"], "--teacher: none of these phases distils; cd, cmt, sid, pd, scd do"),
        (["init=model.pt", "res_blocks=3"], "--set res_blocks: already set by the model of --init; remove it"),
        (["phases=sct:800", "compile=true", "dropout=0.1"], "compile=true draws other dropout masks .* dropout=0"),
        (["phases=sct:800", "scaling=boundary"], "sct needs scaling trigflow or edm, got scaling boundary"),
        (["phases=edm:800,scd:800", "scaling=flow"], "scd needs scaling trigflow or edm, got scaling flow"),
        (
            ["phases=mf:800", "scaling=boundary"],
            "mf needs scaling flow and c_noise flow or trig or raw, got scaling boundary and c_noise trig",
        ),
        (["phases=mf:800", "c_noise=ln/4"], "mf needs .*, got scaling flow and c_noise ln/4"),
        (["phases=mf:800,sct:800"], "mf needs scaling flow .*, got scaling trigflow and c_noise trig"),
        (
            ["phases=mf:800", "network=cloneofsimo", "conditional=false"],
            "needs a network that takes two times; network=cloneofsimo",
        ),
    ],
)
def test_phases_that_cannot_be_trained_are_refused_before_anything_is_read(texts: list[str], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        override(DIGITS, texts)


@pytest.mark.parametrize("method", [name for name in names() if find(name).distils])
def test_a_teacher_is_a_phase_before_it_or_a_file(method: str) -> None:
    for texts in (["phases=edm:8,M:320"], ["phases=M:320", "init=model.pt"], ["phases=M:320", "teacher=model.pt"]):
        assert override(DIGITS, [text.replace("M", method) for text in texts]).phases[-1].method == method


SEED = ["network=cloneofsimo", "conditional=false"]


def test_the_first_implementations_network_is_trained_at_any_width_with_any_scaling() -> None:
    config = override(DIGITS, [*SEED, "model_channels=64", "c_noise=250ln"])
    assert network_config(config, config.spec(10).classes) == CloneofsimoConfig(image_size=8, channels=1, width=64)
    assert (config.spec(10).scaling, config.spec(10).c_noise) == ("boundary", "250ln")
    as_it_was = override(config, ["scaling=cloneofsimo", "c_noise=raw"]).spec(10)
    assert (as_it_was.scaling, as_it_was.c_noise) == ("cloneofsimo", "raw")
    assert override(config, ["channel_mult=1,2,2,2,2", "head_channels=48"])  # adm's alone
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dropout=0.1", "network=cloneofsimo has no dropout, got dropout=0.1; add --set dropout=0"),
        ("image_size=10", "image_size=10 cannot be halved twice, .* multiple of 4"),
        ("model_channels=48", r"width \(in training: model_channels\) must be a multiple of 32, got 48"),
        ("model_channels=0", "width must be a whole number from 1"),
    ],
)
def test_what_the_first_implementations_network_cannot_be_is_named(text: str, words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        override(DIGITS, [*SEED, text])


def test_a_configuration_saved_before_there_was_a_choice_of_network_is_read_as_what_it_did() -> None:
    values = to_dict(PRESETS["mnist-large"])
    del values["network"], values["c_noise"]
    assert from_dict(values) == PRESETS["mnist-large"]


def test_a_run_without_phases_is_told_how_to_name_them() -> None:
    with pytest.raises(CmfastError, match="at least one phase, for example --set phases=edm:100000,ect:200000"):
        TrainConfig(data="digits", image_size=8, channels=1)


def test_lengths_are_in_images_rounded_up_to_whole_batches() -> None:
    config = override(DIGITS, ["phases=edm:100,ect:1", "batch=64"])
    assert [config.steps(phase) for phase in config.phases] == [2, 1]
    assert config.images == 192


@given(images=st.integers(1, 10**9), batch=st.integers(1, 4096))
def test_a_phase_has_just_enough_steps(images: int, batch: int) -> None:
    config = dataclasses.replace(DIGITS, batch=batch)
    steps = config.steps(phase("edm", images))
    assert (steps - 1) * batch < images <= steps * batch


def test_an_unconditional_run_on_data_with_classes_makes_an_unconditional_model() -> None:
    assert DIGITS.spec(10).classes == 10
    assert override(DIGITS, ["conditional=false"]).spec(10).classes == 0


@given(
    st.builds(
        lambda name, value: f"{name}={value}",
        st.sampled_from([field.name for field in dataclasses.fields(TrainConfig)])
        | st.builds(
            lambda method, field: f"{method}.{field}",
            st.sampled_from(names()),
            st.sampled_from(sorted({name for method in names() for name in types_of(method)})),
        ),
        st.integers(-3, 100).map(str)
        | st.floats().map(str)
        | st.text(max_size=5)
        | st.sampled_from([*DATA, *names(), "1,2"]),
    )
)
def test_whatever_is_set_it_is_a_run_or_our_error(text: str) -> None:
    try:
        config = override(DIGITS, [text])
    except CmfastError:
        return
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: phase("edm", 100, lrr=1), "edm has no field 'lrr'; there are images, lr, .*, p_mean"),
        (lambda: phase("edm", 100, hyper=1), "edm has no field 'hyper'"),
        (lambda: TrainConfig(phases="edm:100"), r'phases=\(phase\("edm", 100_000\),\); got .edm:100.'),
        (lambda: TrainConfig(phases=phase("edm", 100)), r'phases=\(phase\("edm", 100_000\),\); got Phase'),
        (lambda: TrainConfig(phases=(phase("edm", 100),), seed=-1), r"seed must be from 0 to 2\*\*32 - 1, got -1"),
        (lambda: TrainConfig(phases=(phase("edm", 100),), seed=2**64), r"seed must be from 0 to 2\*\*32 - 1, got 1844"),
    ],
)
def test_wrong_arguments_in_python_are_one_line(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        make()
