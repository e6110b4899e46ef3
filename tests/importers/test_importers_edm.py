# SPDX-License-Identifier: MIT
"""Checkpoints of EDM, ECT and FastGen: read from tensors and pickles, computing what the original code computes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cmfast.errors import ArtifactError, CmfastError, CmfastWarning
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import edm, identify, load_model
from cmfast_train.importers.edm import config_of
from cmfast_train.importers.facts import Draft, Facts, Given
from cmfast_train.networks.edm import DhariwalConfig, SongConfig, SongUnet
from helpers.foreign.edm import (
    CASES,
    GOLDEN,
    GOLDEN_ERROR,
    PUBLISHED,
    Precond,
    dhariwal,
    golden_inputs,
    golden_weights,
    new,
    song,
    weights_of,
)
from helpers.foreign.edm_pickles import PersistentPickler
from helpers.specs import named

TEACHER = pytest.mark.filterwarnings("ignore:.*a diffusion teacher")


def prefixed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def saved(folder: Path, weights: Mapping[str, Tensor], suffix: str = ".pt") -> Path:
    file = folder / f"network{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    else:
        torch.save(dict(weights), file)
    return file


def computes_golden(checkpoint: Checkpoint, name: str, whole: str = "") -> bool:
    """Whether a model is its scaling around the original's network, and the original's model where that is known."""
    spec, (x, sigma, label) = checkpoint.spec, golden_inputs(CASES[name])
    noised = x * sigma[:, None, None, None]
    got = checkpoint.denoiser()(noised, sigma, **named(label))
    # EDM, Table 1; ECT writes sigma - sigma_min where it evaluates.
    s, d, low = sigma[:, None, None, None], spec.sigma_data, spec.sigma_min if spec.scaling == "boundary" else 0.0
    network = checkpoint.denoiser().network(noised / (s**2 + d**2).sqrt(), sigma.log() / 4, label)
    want = noised * d**2 / ((s - low) ** 2 + d**2) + network * (s - low) * d / (s**2 + d**2).sqrt()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    if whole:  # by the original code; sums of float32 products in another order
        np.testing.assert_allclose(got, np.load(GOLDEN)[whole], rtol=0, atol=1e-5 * abs(want).max().item())
    raw = checkpoint.denoiser().network(x, sigma.log() / 4, label)
    golden = np.load(GOLDEN)[name]
    np.testing.assert_allclose(raw, golden, rtol=0, atol=GOLDEN_ERROR * abs(golden).max())
    return True


def known(draft: Draft | Checkpoint) -> dict[str, tuple[Any, str]]:
    assert isinstance(draft, Draft)
    return {fact.name: (fact.value, fact.where) for fact in draft.facts.known}


# The shape of a network, from its tensors.


FILTER = "enc.4x4_down.skip.resample_filter"


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_read_from_the_tensors(name: str) -> None:
    assert config_of(weights_of(name)) == CASES[name]


@pytest.mark.parametrize(
    ("config", "parameters"), [(row[1], row[3]) for row in PUBLISHED], ids=[r[0] for r in PUBLISHED]
)
def test_the_published_shapes_are_read_from_their_tensors(
    config: SongConfig | DhariwalConfig, parameters: int, tmp_path: Path
) -> None:
    with torch.device("meta"):
        state = new(config).state_dict()
    filters = golden_weights({n: torch.zeros(t.shape) for n, t in state.items() if n.endswith("resample_filter")})
    line = torch.tensor(getattr(config, "resample", (1, 1)), dtype=torch.float32)
    for tensor in filters.values():
        tensor.copy_(line[:, None] * line / line.sum() ** 2)
    draft = edm.draft(state | filters, Facts(Given()), "ect", tmp_path)
    assert draft.network == config
    assert known(draft)["parameters"] == (parameters, "the tensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("enc.8x8_conv.weight"), "the tensor 'enc.8x8_conv.weight' is missing"),
        (lambda w: w.pop("map_layer0.weight"), "the tensor 'map_layer0.weight' is missing"),
        (lambda w: w.pop("dec.4x4_in1.norm0.bias"), r"dec.4x4_in1.norm0.bias is missing, expected \[64\]"),
        (lambda w: w.update(extra=torch.ones(2)), r"extra is \[2\], expected no such tensor"),
        (lambda w: w.update({"map_layer1.bias": torch.ones(7)}), r"map_layer1.bias is \[7\], expected \[128\]"),
        (lambda w: w.update({"map_layer0.weight": torch.ones(130, 32)}), "shapes of its tensors do not fit together"),
        (lambda w: w.update({"map_layer0.weight": torch.ones(3)}), "shapes of its tensors do not fit together"),
        (lambda w: w.update({"map_label.weight": torch.ones(3)}), "shapes of its tensors do not fit together"),
        (lambda w: w.update({"enc.8x8_conv.weight": torch.ones(0, 3, 3, 3)}), "not a network of EDM's"),
        (lambda w: w["enc.4x4_down.skip.resample_filter"].mul_(2), "resample with a filter that is neither"),
        (lambda w: w.update({FILTER: torch.ones(3, 2)}), "shapes of its tensors do not fit together"),
        (lambda w: w.update({FILTER: torch.tensor(1.0)}), "shapes of its tensors do not fit together"),
        (lambda w: w.update({FILTER: torch.ones(1, 1, 3, 3)}), "shapes of its tensors do not fit together"),
        # Comparing its values would take half a terabyte.
        (lambda w: w.update({FILTER: torch.ones(1).half().expand(1 << 36, 2)}), "do not fit together"),
    ],
)
def test_tensors_that_are_no_network_are_named(change: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    weights = weights_of("ddpmpp")
    change(weights)
    with pytest.raises(ArtifactError, match=words) as refused:
        config_of(weights)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dhariwal(channel_mult=(1, 1)), "96 channels, no multiple of"),
        (song(), "model_channels must be a multiple of 32, got 48"),
    ],
    ids=["an attention of 96 channels", "a width of 48"],
)
def test_a_shape_of_edms_that_cmfast_does_not_have_is_called_not_supported(
    config: SongConfig | DhariwalConfig, words: str
) -> None:
    narrow, wide = config.model_channels, 96 if isinstance(config, DhariwalConfig) else 48
    weights = {
        name: tensor
        if name.endswith("filter")
        else torch.zeros([n * wide // narrow if n >= 32 else n for n in tensor.shape])
        for name, tensor in new(config).state_dict().items()
    }
    with pytest.raises(ArtifactError, match=f"of a shape that is not supported: .*{words}"):
        config_of(weights)


def test_only_tensors_with_edms_names_match() -> None:
    weights = weights_of("ddpmpp")
    assert edm.matches(weights)
    assert edm.matches(prefixed(weights))
    assert not edm.matches({"time_embed.0.weight": torch.ones(2, 2)})
    assert not edm.matches({"emb_noise.weight": torch.ones(2, 2), "enc.8x8_conv.weight": torch.ones(2, 2)})  # EDM2's


# State dicts.


@TEACHER
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("source", "name", "scaling", "sigma_min", "whole"),
    [
        ("edm", "ddpmpp-cond", "edm", 0.002, "EDMPrecond"), ("edm", "adm-cond", "edm", 0.002, ""),
        ("ect", "ncsnpp", "boundary", 0.003, "ECMPrecond"), ("fastgen", "ddpmpp-cond", "edm", 0.002, "EDMPrecond"),
    ],
)  # fmt: skip
def test_a_state_dict_computes_what_its_source_computes(
    source: str, name: str, scaling: str, sigma_min: float, whole: str, suffix: str, tmp_path: Path
) -> None:
    checkpoint = load_model(saved(tmp_path, prefixed(weights_of(name)), suffix), source)
    spec = checkpoint.spec
    assert (spec.scaling, spec.sigma_min, spec.c_noise, spec.renoise) == (scaling, sigma_min, "ln/4", "plain")
    assert (spec.clip, spec.grid, spec.sigma_max, spec.sigma_data) == (False, 0, 80.0, 0.5)
    assert (spec.image, spec.classes) == ((3, 8, 8), CASES[name].classes)
    assert checkpoint.source["system"] == source
    assert (checkpoint.source["format"], checkpoint.source["qkv"]) == ("edm", "hd3")
    assert computes_golden(checkpoint, name, whole)


def test_names_with_and_without_their_prefix_give_the_same_model(tmp_path: Path) -> None:
    weights = weights_of("ddpmpp")
    hashes = {load_model(saved(tmp_path, w), "ect").sha256() for w in (weights, prefixed(weights))}
    assert len(hashes) == 1


def test_fastgens_checkpoint_gives_its_average_without_the_loss_estimate(tmp_path: Path) -> None:
    average = prefixed(weights_of("ddpmpp"))
    average |= {"model.logvar_linear.weight": torch.ones(1, 32), "model.logvar_linear.bias": torch.ones(1)}
    other = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    file = tmp_path / "0350000.pth"
    torch.save({"model": {"net": other, "ema": average}, "optimizer": {}, "iteration": 350_000}, file)
    checkpoint = load_model(file, "fastgen", Given(weights="model.ema"))
    assert computes_golden(checkpoint, "ddpmpp")


def test_what_a_state_dict_does_not_say_is_requested_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path, weights_of("ddpmpp"))
    draft = identify(file)
    assert isinstance(draft, Draft)
    assert list(draft.facts.missing) == ["scaling", "sigma_min"]
    with pytest.raises(CmfastError) as refused:
        load_model(file)
    for words in (
        "DDPM++ (SongUNet) of EDM's family, 8 px", "its scaling, sigma_min",
        "--source ect (or edm, fastgen, sid, cmt)", "--set scaling=boundary --set sigma_min=",
    ):  # fmt: skip
        assert words in str(refused.value)
    checkpoint = load_model(file, given=Given(scaling="boundary", sigma_min=0.002))
    assert (checkpoint.spec.scaling, checkpoint.spec.sigma_min, checkpoint.spec.sigma_max) == ("boundary", 0.002, 80)
    assert "system" not in checkpoint.source
    assert computes_golden(checkpoint, "ddpmpp")


def test_what_is_given_is_taken_where_the_source_only_has_a_habit(tmp_path: Path) -> None:
    file = saved(tmp_path, weights_of("ddpmpp"))
    given = Given(scaling="boundary", sigma_min=0.003, sigmas=((80.0,), (80.0, 0.9)))  # FastGen's sigma_shift
    draft = identify(file, "fastgen", given)
    assert isinstance(draft, Draft)
    assert draft.spec is not None
    assert (draft.spec.scaling, draft.spec.sigma_min, draft.spec.sigmas[2]) == ("boundary", 0.003, (80.0, 0.9))
    assert known(draft)["scaling"] == ("boundary", "--set")
    assert known(draft)["c_noise"] == ("ln/4", "--source fastgen")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Given(image_size=32), "--set image_size=32 contradicts the tensors: image_size is 8"),
        (Given(qkv="3hd"), "--set qkv=3hd contradicts the format: qkv is hd3"),
        (Given(head_channels=64), "--set head_channels=64: the attention of DDPM.* has one head"),
    ],
    ids=str,
)
def test_what_contradicts_the_tensors_is_refused(given: Given, words: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=words):
        identify(saved(tmp_path, weights_of("ddpmpp")), "ect", given)


def test_half_tensors_among_others_are_read_as_float32(tmp_path: Path) -> None:
    weights = weights_of("ddpmpp")
    halves = {name: tensor.half() if i % 2 else tensor for i, (name, tensor) in enumerate(weights.items())}
    checkpoint = load_model(saved(tmp_path, halves), "ect")
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.float32}
    for name, tensor in halves.items():
        np.testing.assert_array_equal(checkpoint.weights[name], tensor.float())


@pytest.mark.parametrize(
    ("source", "side", "levels"),
    [
        ("ect", 32, (80.0, 0.821)), ("ect", 64, (80.0, 1.526)), ("ect", 16, None), ("edm", 32, None),
        ("fastgen", 32, None), ("fastgen", 64, None),  # CM, TCM, sCD and DMD2 start at levels of their own
    ],
)  # fmt: skip
def test_the_second_step_starts_where_the_source_starts_it(
    source: str, side: int, levels: tuple[float, ...] | None, tmp_path: Path
) -> None:
    network = SongUnet(song(image_size=side, attention=(side // 2,)))
    spec = edm.draft(network.state_dict(), Facts(Given()), source, tmp_path).spec
    assert spec is not None
    assert spec.sigmas == ({1: (80.0,), 2: levels} if levels else {1: (80.0,)})


def test_a_teacher_comes_with_a_warning(tmp_path: Path) -> None:
    file = saved(tmp_path, weights_of("ddpmpp"))
    with pytest.warns(CmfastWarning, match="a diffusion teacher.* many steps"):
        load_model(file, "edm")
    load_model(file, "ect")  # warnings are errors in these tests


def meanflow(name: str) -> dict[str, Tensor]:
    """Return weights whose first layer takes two times, as in FastGen's MeanFlow."""
    weights = weights_of(name)
    into = weights["map_layer0.weight"]
    return {**weights, "map_layer0.weight": torch.cat([into, into], dim=1)}


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm-cond"])
@pytest.mark.parametrize("logvar", [True, False])
def test_meanflow_is_refused_by_name(name: str, logvar: bool, tmp_path: Path) -> None:
    weights = meanflow(name)
    if logvar:
        weights["logvar_linear.weight"] = torch.ones(1, weights["map_layer0.weight"].shape[1] // 2)
    with pytest.raises(ArtifactError, match="a MeanFlow network, which takes two times"):
        identify(saved(tmp_path, weights), "fastgen")


def test_wide_waves_alone_are_not_taken_for_meanflow(tmp_path: Path) -> None:
    config = song(noise_mult=2)
    weights = golden_weights(SongUnet(config).state_dict()) | {"logvar_linear.weight": torch.ones(1, 64)}
    draft = identify(saved(tmp_path, weights), "fastgen")
    assert isinstance(draft, Draft)
    assert draft.network == config


@TEACHER
@pytest.mark.parametrize("source", ["edm", "ect"])
def test_wide_waves_of_edms_are_read_where_the_source_is_given(source: str, tmp_path: Path) -> None:
    config = song(noise_mult=2)
    file = saved(tmp_path, golden_weights(SongUnet(config).state_dict()))
    draft = identify(file, source)
    assert isinstance(draft, Draft)
    assert draft.network == config
    with pytest.raises(ArtifactError, match=r"a MeanFlow network.* \(if it is one of EDM's with wide waves"):
        identify(file)


def test_names_with_their_prefix_and_without_it_do_not_become_one_set(tmp_path: Path) -> None:
    weights = weights_of("ddpmpp")
    with pytest.raises(ArtifactError, match=r"some of its tensors are named model\. and more, others not") as refused:
        identify(saved(tmp_path, {**weights, **prefixed({n: 2 * t for n, t in weights.items()})}), "ect")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["edm-cifar10-32x32-uncond-vp", "edm-afhqv2-64x64-uncond-ve", "edm-x-64x64-cond-adm"])
def test_a_teacher_is_known_by_its_name(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path, prefixed(weights_of("ddpmpp"))).rename(tmp_path / f"{name}.pth")
    draft = identify(file)
    assert known(draft)["scaling"] == ("edm", "the file's name")
    assert draft.source["system"] == "edm"
    with pytest.warns(CmfastWarning, match="a diffusion teacher"):
        load_model(file)
    assert known(identify(file, "edm"))["scaling"] == ("edm", "--source edm")
    for source in ("ect", "fastgen"):
        with pytest.raises(CmfastError, match=f"--source {source}, but its name is that of EDM's own network"):
            identify(file, source)


@pytest.mark.parametrize("name", ["edm-cifar10-32x32-uncond-vp-tuned", "edm2-img64-s-fid", "my-edm-x-vp"])
def test_a_name_like_a_teachers_is_not_enough(name: str, tmp_path: Path) -> None:
    draft = identify(saved(tmp_path, weights_of("ddpmpp")).rename(tmp_path / f"{name}.pth"))
    assert isinstance(draft, Draft)
    assert list(draft.facts.missing) == ["scaling", "sigma_min"]


def test_iddpm_is_refused_by_its_table(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="iDDPMPrecond"):
        identify(saved(tmp_path, {**prefixed(weights_of("adm")), "u": torch.ones(1001)}), "edm")


# Pickles.


def test_an_ect_snapshot_computes_what_ect_computes(snapshot: Callable[..., Path]) -> None:
    file = snapshot("ncsnpp", "ECMPrecond", sigma_min=0.003)
    checkpoint = load_model(file)
    assert (checkpoint.spec.scaling, checkpoint.spec.sigma_min) == ("boundary", 0.003)
    assert checkpoint.source["system"] == "ect"
    assert computes_golden(checkpoint, "ncsnpp", "ECMPrecond")
    facts = known(identify(file))
    assert facts["weights"] == ("ema", "the pickle")
    assert facts["scaling"] == ("boundary", "the pickle's class ECMPrecond")
    assert facts["sigma_min"] == (0.003, "the pickle's class ECMPrecond")
    for name in ("renoise", "clip", "sigma_max", "grid", "sigmas"):
        assert facts[name][1] == "ECT's evaluation"
    assert facts["network"] == ("NCSN++ (SongUNet)", "the tensors")
    assert facts["qkv"] == ("hd3", "the format")


def test_an_edm_snapshot_computes_what_edm_computes_and_is_a_teacher(snapshot: Callable[..., Path]) -> None:
    file = snapshot("ddpmpp-cond", "EDMPrecond")
    with pytest.warns(CmfastWarning, match="a diffusion teacher"):
        checkpoint = load_model(file)
    assert (checkpoint.spec.scaling, checkpoint.spec.sigma_min, checkpoint.source["system"]) == ("edm", 0.002, "edm")
    assert computes_golden(checkpoint, "ddpmpp-cond", "EDMPrecond")
    where = {name: fact[1] for name, fact in known(identify(file)).items()}
    assert {where[name] for name in ("scaling", "c_noise", "sigma_data")} == {"the pickle's class EDMPrecond"}
    assert {where[name] for name in ("sigma_min", "sigma_max", "renoise", "clip", "grid")} == {"EDM's sampler"}
    facts = identify(file, given=Given(sigma_min=0.01))  # of the sampler, which is a choice
    assert known(facts)["sigma_min"] == (0.01, "--set")


@pytest.mark.parametrize("value", [10**400, True, float("nan"), float("inf"), 0, -0.003, None, "0.003"], ids=repr)
def test_a_noise_level_that_is_none_is_refused_in_one_line(value: Any, snapshot: Callable[..., Path]) -> None:
    words = "the pickle's class ECMPrecond has no sigma_min that is a number above 0"
    with pytest.raises(ArtifactError, match=words) as refused:
        identify(snapshot("ncsnpp", "ECMPrecond", sigma_min=value))
    assert "\n" not in str(refused.value)


def test_a_name_in_a_snapshot_cannot_write_to_the_terminal(snapshot: Callable[..., Path]) -> None:
    with pytest.raises(CmfastError, match="no network 'ema'") as refused:
        identify(snapshot("ncsnpp", "ECMPrecond", key="a\nb\x1b[31m" + 1000 * "c"))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_whole_numbers_in_a_snapshot_are_no_weights(persistent: Callable[..., bytes], tmp_path: Path) -> None:
    network = new(CASES["ddpmpp"])
    network.map_layer0.weight = nn.Parameter(torch.ones(128, 32, dtype=torch.int64), requires_grad=False)
    file = tmp_path / "snapshot.pkl"
    file.write_bytes(persistent({"ema": type("EDMPrecond", (Precond,), {})(network)}))
    with pytest.raises(ArtifactError, match=r"model.map_layer0.weight is torch.int64, no floating-point numbers"):
        identify(file)


def test_the_values_in_a_snapshot_go_before_what_is_usual(snapshot: Callable[..., Path]) -> None:
    checkpoint = load_model(snapshot("ncsnpp", "ECMPrecond", sigma_min=0.01, sigma_data=0.4))
    assert (checkpoint.spec.sigma_min, checkpoint.spec.sigma_data) == (0.01, 0.4)
    assert computes_golden(checkpoint, "ncsnpp")


@pytest.mark.parametrize(
    ("kind", "source", "given", "words"),
    [
        ("VPPrecond", "", Given(), "its class VPPrecond is a baseline of EDM's paper"),
        ("VEPrecond", "", Given(), "its class VEPrecond is a baseline"),
        ("iDDPMPrecond", "", Given(), "its class iDDPMPrecond is a baseline"),
        ("StyleGAN", "", Given(), "a pickled 'StyleGAN', which is not known here; known are EDMPrecond, ECMPrecond"),
        (
            "ECMPrecond",
            "edm",
            Given(),
            "--source edm, but the pickle's class ECMPrecond is that of ECT or CMT; leave --source out",
        ),
        (
            "EDMPrecond",
            "",
            Given(scaling="boundary"),
            "--set scaling=boundary contradicts the pickle's class EDMPrecond: scaling is edm",
        ),
        ("EDMPrecond", "", Given(c_noise="250ln"), "c_noise is ln/4"),
        ("EDMPrecond", "", Given(sigma_data=0.6), "sigma_data is 0.5"),
        ("ECMPrecond", "", Given(sigma_min=0.002), "contradicts the pickle's class ECMPrecond: sigma_min is 0.003"),
        ("EDMPrecond", "", Given(image_size=64), "image_size is 8"),
        ("EDMPrecond", "", Given(weights="net"), "the pickle has no network 'net'; say --set weights=ema"),
    ],
)
def test_a_snapshot_that_is_something_else_is_refused(
    kind: str, source: str, given: Given, words: str, snapshot: Callable[..., Path]
) -> None:
    with pytest.raises(CmfastError, match=words) as refused:
        identify(snapshot("ddpmpp", kind, **({"sigma_min": 0.003} if kind == "ECMPrecond" else {})), source, given)
    assert "\n" not in str(refused.value)


def test_another_set_of_weights_can_be_given(snapshot: Callable[..., Path]) -> None:
    file = snapshot("ncsnpp", "ECMPrecond", key="net", sigma_min=0.003)
    with pytest.raises(CmfastError, match="no network 'ema'; say --set weights=net"):
        load_model(file)
    assert computes_golden(load_model(file, given=Given(weights="net")), "ncsnpp", "ECMPrecond")


def test_a_snapshot_without_numbers_or_without_a_network_is_refused(
    snapshot: Callable[..., Path], persistent: Callable[..., bytes], tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="the pickle's class EDMPrecond has no sigma_data"):
        identify(snapshot("ddpmpp", "EDMPrecond", sigma_data="half"))
    empty = type("ECMPrecond", (Precond,), {})(nn.Linear(1, 1), sigma_min=0.003)
    (tmp_path / "empty.pkl").write_bytes(persistent({"ema": empty}))
    with pytest.raises(ArtifactError, match=r"not a whole network of EDM's|do not fit together"):
        identify(tmp_path / "empty.pkl")
    for content in ([1, 2], {"ema": None}, {7: empty}):
        buffer = io.BytesIO()
        PersistentPickler(buffer).dump(content)
        (tmp_path / "other.pkl").write_bytes(buffer.getvalue())
        with pytest.raises(ArtifactError, match="a pickle without a network in it"):
            identify(tmp_path / "other.pkl")
