# SPDX-License-Identifier: MIT
"""One-step generators of SiD and SiDA, and CMT: EDM's networks and ECT's, recognised by class and by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cmfast
from cmfast.cli import info, sample
from cmfast.errors import CmfastError, CmfastWarning
from cmfast.sampling import to_uint8
from cmfast_export import cli as export
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import Draft, Given
from helpers.foreign.edm import CASES, new, weights_of

Snapshot = Callable[..., Path]
Call = Callable[..., Any]

SIGMA = 2.5
PUBLISHED = [  # a class and a name of each kind that was published
    ("EDMPrecond", "network-snapshot-1.200000-403968.pkl"),
    ("EDMPrecond", "cifar10_cond_sid_alpha1.2-053760.pkl"),
    ("EDMPrecond_EncoderDecoder", "cifar10_uncond_sida_alpha1-217920.pkl"),
    ("EDMPrecond_EncoderDecoder", "imgnet64_sid2a_alpha1.2-021471.pkl"),
    ("EDMPrecond_EncoderDecoder", "renamed.pkl"),
]


def generator(snapshot: Snapshot, name: str, kind: str = "EDMPrecond", case: str = "adm-cond") -> Path:
    """Return a snapshot as SiD writes it, of this name."""
    return snapshot(case, kind).rename(snapshot(case, kind).parent / name)


def original(case: str, z: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
    """Return what generate_onestep.py draws: EDMPrecond's formulas at one noise level."""
    network = new(CASES[case])
    network.load_state_dict(weights_of(case))
    sigma, data = torch.full((len(z), 1, 1, 1), SIGMA), 0.5
    x = SIGMA * z
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
    c_in, c_noise = 1 / (data**2 + sigma**2).sqrt(), sigma.log() / 4
    return c_skip * x + c_out * network(c_in * x, c_noise.flatten(), label)


@pytest.mark.parametrize(("kind", "name"), PUBLISHED)
def test_a_generator_is_known_by_its_name_or_by_its_class_and_called_once(
    kind: str, name: str, snapshot: Snapshot, recwarn: pytest.WarningsRecorder
) -> None:
    file = generator(snapshot, name, kind)
    draft = identify(file)
    assert isinstance(draft, Draft)
    assert "SiD's one-step generator" in draft.what
    facts = {fact.name: (fact.value, fact.where) for fact in draft.facts.known}
    where = "the file's name" if kind == "EDMPrecond" else f"the pickle's class {kind}"
    assert facts["system"] == ("sid", where)
    assert facts["sigma_max"] == (SIGMA, "SiD's generation")
    assert facts["scaling"] == ("edm", f"the pickle's class {kind}")
    spec = load_model(file).spec
    assert (spec.sigmas, spec.sigma_max, spec.scaling, spec.c_noise, spec.clip) == (
        {1: (SIGMA,)}, SIGMA, "edm", "ln/4", False,
    )  # fmt: skip
    assert not recwarn, "no teacher"


@pytest.mark.parametrize("case", ["ddpmpp", "adm-cond"])
def test_a_generator_draws_what_the_original_draws(case: str, snapshot: Snapshot) -> None:
    file = generator(snapshot, "network-snapshot-1.200000-000100.pkl", case=case)
    model = cmfast.load(file)
    labels = model.labels(3, seed=4)
    z = cmfast.gaussian(4, range(3), 0, model.spec.shape)
    want = original(case, torch.from_numpy(z), None if labels is None else torch.from_numpy(labels)).numpy()
    conditions = {} if labels is None else {"label": labels}
    # Values of about 1, and sums of hundreds of float32 products in another order.
    np.testing.assert_allclose(model.denoise(SIGMA * z, SIGMA, conditions=conditions), want, atol=1e-5)
    np.testing.assert_allclose(model.sample_float(3, seed=4), want, atol=1e-5)


def test_export_sample_and_info_need_no_flags(
    snapshot: Snapshot, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    file = generator(snapshot, "network-snapshot-1.200000-000100.pkl", case="ddpmpp")
    said = call(info.main, file)
    assert said.returncode == 0, said.stderr
    for words in ("SiD's one-step generator", "2.5", "the file's name"):
        assert words in said.stdout
    made = call(export.main, file, "-o", "model.onnx")
    assert made.returncode == 0, made.stderr
    drawn = call(sample.main, "model.onnx", "-n", 3, "--seed", 4, "-o", "images.npz")
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert "3 image(s), 1 step(s) at 2.5, " in drawn.stdout
    z = torch.from_numpy(cmfast.gaussian(4, range(3), 0, (3, 8, 8)))
    with np.load("images.npz") as arrays:
        want = to_uint8(original("ddpmpp", z, None).numpy())
        assert np.abs(arrays["arr_0"].astype(int) - want).max() <= 1  # a value between two levels may round to either


def test_without_its_name_it_takes_a_source_and_is_never_taken_for_edms_in_silence(
    snapshot: Snapshot, tmp_path: Path
) -> None:
    file = generator(snapshot, "mine.pkl")
    with pytest.warns(CmfastWarning, match=r"a diffusion teacher.*SiD's one-step generator: --source sid"):
        assert load_model(file).spec.sigma_max == 80
    assert load_model(file, "sid").spec.sigmas == {1: (SIGMA,)}
    with pytest.raises(CmfastError, match="is that of EDM or SiD"):
        load_model(file, "cmt")
    assert load_model(file, "sid", Given(sigma_max=4.0)).spec.sigmas == {1: (4.0,)}  # its --init_sigma
    with pytest.warns(CmfastWarning, match="a diffusion teacher"):
        assert load_model(generator(snapshot, "network-snapshot-1.200000-000100.pkl"), "edm").spec.sigma_max == 80
    with pytest.raises(CmfastError, match="but the pickle's class EDMPrecond_EncoderDecoder is that of SiD"):
        load_model(generator(snapshot, "mine.pkl", "EDMPrecond_EncoderDecoder"), "edm")
    state = {f"model.{key}": value for key, value in weights_of("ddpmpp").items()}
    average = state | {"model.map_layer0.weight": state["model.map_layer0.weight"] + 1}
    torch.save({"G_state": state, "G_ema_state": average}, tmp_path / "training-state.pt")
    model = load_model(tmp_path / "training-state.pt", "sid", Given(weights="G_ema_state"))
    assert model.spec.sigmas == {1: (SIGMA,)}
    torch.testing.assert_close(model.weights["map_layer0.weight"], average["model.map_layer0.weight"])


def test_cmt_is_ect_with_its_second_noise_level_at_every_size(snapshot: Snapshot) -> None:
    file = snapshot("ncsnpp", "ECMPrecond", sigma_min=0.003)
    ours, theirs = load_model(file, "cmt"), load_model(file)
    assert ours.spec == theirs.spec  # of 8 pixels neither has a second level
    assert ours.source["system"] == "cmt"
    draft = identify(file, "cmt")
    assert isinstance(draft, Draft)
    assert {fact.where for fact in draft.facts.known if fact.name in ("clip", "sigma_max")} == {"CMT's evaluation"}
    from cmfast_train.importers.edm import SECOND_LEVEL

    assert SECOND_LEVEL["cmt"] == {32: 0.821, 64: 0.821}
