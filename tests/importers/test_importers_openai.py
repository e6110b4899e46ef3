# SPDX-License-Identifier: MIT
"""State dicts of openai/consistency_models: what their tensors say, what the released names say, what is asked."""

from __future__ import annotations

import dataclasses
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmfast.errors import ArtifactError, CmfastError, CmfastWarning
from cmfast_train import importers
from cmfast_train.importers import identify, load_model
from cmfast_train.importers.facts import CONVENTIONS, Draft, Given
from cmfast_train.importers.openai import NETWORKS, RELEASED, to_3hd
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.networks.build import build_network

TINY = AdmConfig(
    image_size=8, classes=10, model_channels=32, res_blocks=1, channel_mult=(1, 2), attention=(4,), head_channels=16
)
TOLD = Given(image_size=8, head_channels=16, qkv="3hd", scaling="boundary", grid=40)


def weights_of(config: AdmConfig, seed: int = 0) -> dict[str, Tensor]:
    network = AdmUnet(config)
    randomise(network, seed)
    return network.state_dict()


@pytest.fixture(autouse=True)
def shapes_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files stand for released ones, of gigabytes: one number expanded, which the reader itself refuses."""

    def content(file: Path, opened: object) -> Any:
        return torch.load(file, weights_only=True)

    monkeypatch.setattr(importers, "_content", content)


def released_file(name: str, folder: Path) -> Path:
    """Write a file with the names and shapes of a released one: every tensor one number, seen many times."""
    size = RELEASED[name].image_size
    config = AdmConfig(image_size=size, attention=(32, 16, 8), head_channels=64, **NETWORKS[size])
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in AdmUnet(config).state_dict().items()}
    path = folder / f"{name}.pt"
    torch.save({key: torch.full((1,), 0.01).expand(shape) for key, shape in shapes.items()}, path)
    return path


def draft_of(path: Path, source: str = "", given: Given | None = None) -> Draft:
    draft = identify(path, source, given)
    assert isinstance(draft, Draft)
    return draft


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "second"),
    [
        ("cd_imagenet64_l2", 295_899_267, 541, 1.382368),
        ("cd_imagenet64_lpips", 295_899_267, 541, 1.382368),
        ("ct_imagenet64", 295_899_267, 541, 1.912844),
        ("cd_bedroom256_l2", 526_304_771, 566, 3.519699),
        ("cd_bedroom256_lpips", 526_304_771, 566, 4.365562),
        ("ct_bedroom256", 526_304_771, 566, 3.991219),
        ("ct_cat256", 526_304_771, 566, 5.248503),
        ("cd_cat256_lpips", 526_304_771, 566, 4.365562),
    ],
)
def test_a_released_file_is_known_by_its_name_and_sampled_at_the_published_levels(
    name: str, parameters: int, tensors: int, second: float, tmp_path: Path
) -> None:
    draft = draft_of(released_file(name, tmp_path))
    assert not draft.facts.missing
    known = {fact.name: fact.value for fact in draft.facts.known}
    assert draft.network is not None
    with torch.device("meta"):  # the weights themselves would be gigabytes
        assert (known["parameters"], len(build_network(draft.network).state_dict())) == (parameters, tensors)
    spec = draft.spec
    assert spec is not None
    assert (spec.scaling, spec.c_noise, spec.renoise, spec.clip) == ("boundary", "250ln", "sqrt", True)
    assert (spec.classes, spec.image) == ((1000, (3, 64, 64)) if "imagenet" in name else (0, (3, 256, 256)))
    assert spec.sigmas == {1: (80.0,), 2: (80.0, pytest.approx(second, rel=1e-6))}
    assert spec.grid == (40 if name.startswith("cd") else 201 if "imagenet" in name else 151)
    assert draft.source == {"format": "openai", "name": name, "qkv": "3hd"}


def test_only_the_levels_that_nobody_published_are_marked_as_borrowed() -> None:
    assert {name for name, known in RELEASED.items() if known.borrowed} == {"cd_cat256_l2", "cd_cat256_lpips"}


@pytest.mark.parametrize("name", ["edm_imagenet64_ema", "edm_bedroom256_ema", "edm_cat256_ema"])
def test_a_released_teacher_has_the_scaling_of_a_diffusion_model_and_says_so(name: str, tmp_path: Path) -> None:
    draft = draft_of(released_file(name, tmp_path))
    assert draft.spec is not None
    assert draft.spec.scaling == "edm"
    assert "teacher" in draft.warnings[0]


def test_all_twelve_released_files_are_known() -> None:
    names = {f"edm_{data}_ema" for data in ("imagenet64", "bedroom256", "cat256")}
    names |= {f"cd_{data}_{loss}" for data in ("imagenet64", "bedroom256", "cat256") for loss in ("l2", "lpips")}
    assert RELEASED.keys() == names | {"ct_imagenet64", "ct_bedroom256", "ct_cat256"}


def test_a_file_of_another_name_is_asked_about_everything_that_its_tensors_do_not_show(tmp_path: Path) -> None:
    path = tmp_path / "model000100.pt"
    torch.save(weights_of(TINY), path)
    draft = draft_of(path)
    assert set(draft.facts.missing) == {"image_size", "head_channels", "qkv", *CONVENTIONS}
    with pytest.raises(CmfastError, match=r"its image_size.*cannot be inferred.*--set scaling=boundary"):
        load_model(path)


def test_saying_the_source_leaves_what_even_its_authors_files_differ_in(tmp_path: Path) -> None:
    path = tmp_path / "model000100.pt"
    torch.save(weights_of(TINY), path)
    assert set(draft_of(path, "openai").facts.missing) == {"image_size", "head_channels", "qkv", "scaling"}
    checkpoint = load_model(path, "openai", TOLD)
    assert checkpoint.network == TINY
    assert checkpoint.source["qkv"] == "3hd"
    assert (checkpoint.spec.scaling, checkpoint.spec.grid) == ("boundary", 40)


@pytest.mark.parametrize("source", ["openai:imagenet64-cd", "openai:cd_imagenet64_l2", "openai:imagenet64-cd-lpips"])
def test_a_renamed_released_file_is_read_by_what_its_owner_says(source: str, tmp_path: Path) -> None:
    path = released_file("cd_imagenet64_l2", tmp_path).rename(tmp_path / "mine.pt")
    draft = draft_of(path, source)
    assert draft.spec is not None
    assert draft.spec.sigmas[2] == (80.0, pytest.approx(1.382368, rel=1e-6))
    assert not draft.facts.missing


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("openai:bedroom256-cd", "several of the released files"),
        ("openai:imagenet64", "several"),
        ("openai:imagenet64-cd-cd", "none of the released files"),
        ("openai:imagenet512", "none of the released files; they are imagenet64-edm"),
        ("openai:bedroom256-ct", "model_channels=256"),  # but the tensors are ImageNet's
    ],
)
def test_a_source_that_does_not_fit_is_refused(source: str, words: str, tmp_path: Path) -> None:
    path = released_file("cd_imagenet64_l2", tmp_path).rename(tmp_path / "mine.pt")
    with pytest.raises(CmfastError, match=words):
        identify(path, source)


@pytest.mark.parametrize("source", ["openai:imagenet64-ct", "openai:imagenet64-edm", "openai:bedroom256-cd-l2"])
def test_a_source_that_contradicts_the_files_name_is_refused(source: str, tmp_path: Path) -> None:
    path = released_file("cd_imagenet64_l2", tmp_path)
    with pytest.raises(CmfastError, match="contradicts its name"):
        identify(path, source)
    assert draft_of(path, "openai:imagenet64-cd").spec == draft_of(path).spec


@pytest.mark.parametrize(
    "wrong",
    ["qkv=h3d", "head_channels=32", "heads=4", "scaling=edm", "c_noise=raw", "renoise=plain", "sigma_data=1",
     "image_size=128", "grid=201", "sigma_min=0.003", "sigma_max=40"],
)  # fmt: skip
def test_what_is_published_of_a_released_file_cannot_be_overridden(wrong: str, tmp_path: Path) -> None:
    path = released_file("cd_imagenet64_l2", tmp_path)
    with pytest.raises(CmfastError, match=f"--set {wrong}.* contradicts the file's name"):
        identify(path, given=Given.parse([wrong]))


def test_clipping_and_the_default_levels_of_a_released_file_can_be_chosen(tmp_path: Path) -> None:
    path = released_file("cd_imagenet64_l2", tmp_path)
    spec = draft_of(path, given=Given.parse(["clip=false", "sigmas=80:80,2,0.5"])).spec
    assert spec is not None
    assert (spec.clip, spec.sigmas) == (False, {1: (80.0,), 3: (80.0, 2.0, 0.5)})


def test_a_small_network_under_a_released_name_is_no_released_file(tmp_path: Path) -> None:
    path = tmp_path / "cd_imagenet64_l2.pt"
    torch.save(weights_of(TINY), path)
    with pytest.raises(
        CmfastError, match=r"the file's name.*model_channels=192, but its tensors have model_channels=32"
    ):
        load_model(path)


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize(
    ("channel_mult", "res_blocks", "attention", "classes", "channels"),
    [((1, 2), 1, (4,), 10, 3), ((1, 2, 2), 2, (8, 2), 0, 1), ((2, 1, 3), 3, (), 7, 3), ((1, 1, 2, 2), 1, (1,), 0, 3)],
)
def test_the_shape_of_any_such_network_follows_from_its_tensors(
    channel_mult: tuple[int, ...], res_blocks: int, attention: tuple[int, ...], classes: int, channels: int,
    scale_shift: bool, resblock_updown: bool, tmp_path: Path,
) -> None:  # fmt: skip
    config = AdmConfig(
        image_size=8, channels=channels, classes=classes, model_channels=32, res_blocks=res_blocks,
        channel_mult=channel_mult, attention=attention, head_channels=16, scale_shift=scale_shift,
        resblock_updown=resblock_updown,
    )  # fmt: skip
    path = tmp_path / "model.pt"
    torch.save(weights_of(config), path)
    checkpoint = load_model(path, "openai", TOLD)
    assert checkpoint.network == config


def test_an_imported_model_computes_what_the_network_computes(tmp_path: Path) -> None:
    weights = weights_of(TINY)
    path = tmp_path / "model.pt"
    torch.save(weights, path)
    denoiser = load_model(path, "openai", TOLD).denoiser()
    network = AdmUnet(TINY).eval()
    network.load_state_dict(weights)
    x, label = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 5, torch.tensor([0, 4, 9])
    sigma = torch.tensor([0.002, 1.0, 80.0])
    s = sigma[:, None, None, None]
    total = s**2 + 0.25
    with torch.no_grad():
        f = network(x / total.sqrt(), 250 * sigma.log(), label)
        want = 0.25 / ((s - 0.002) ** 2 + 0.25) * x + (s - 0.002) * 0.5 / total.sqrt() * f
        torch.testing.assert_close(
            denoiser(x, sigma, label=label), want, rtol=0, atol=1e-5
        )  # float32: the order of operations differs
    assert f.std() > 0.1


def test_half_precision_weights_of_a_target_network_are_read_as_float32(tmp_path: Path) -> None:
    weights = {  # as convert_to_fp16 leaves them: convolutions in half, the rest not
        name: value.half() if value.ndim == 4 and not name.startswith("out.") else value
        for name, value in weights_of(TINY).items()
    }
    path = tmp_path / "target_model000100.pt"
    torch.save(weights, path)
    checkpoint = load_model(path, "openai", TOLD)
    assert {value.dtype for value in checkpoint.weights.values()} == {torch.float32}
    assert "float16 and float32" in str(draft_of(path, "openai").facts.known)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_wrapped_modules_are_looked_through(prefix: str, tmp_path: Path) -> None:
    path = tmp_path / "wrapped.pt"
    torch.save({"state_dict": {prefix + name: value for name, value in weights_of(TINY).items()}}, path)
    assert load_model(path, "openai", TOLD).network == TINY


def test_one_of_several_sets_of_weights_has_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.save({"model": weights_of(TINY), "ema": weights_of(TINY, seed=1), "step": 3}, path)
    with pytest.raises(CmfastError, match=r"2 set\(s\) of weights \(model, ema\).*--set weights=ema"):
        load_model(path, "openai", TOLD)
    ema = load_model(path, "openai", dataclasses.replace(TOLD, weights="ema"))
    torch.testing.assert_close(ema.weights["out.2.weight"], weights_of(TINY, seed=1)["out.2.weight"])
    with pytest.raises(CmfastError, match="weights=net is not one of them"):
        load_model(path, "openai", dataclasses.replace(TOLD, weights="net"))


@pytest.mark.parametrize("order", ["h3d", "hd3", "3hd"])
def test_every_order_of_the_qkv_rows_becomes_queries_keys_values(order: str) -> None:
    heads, width = 2, 4
    index = {letter: range(n) for letter, n in (("3", 3), ("h", heads), ("d", width))}
    rows = []
    for values in itertools.product(*(index[letter] for letter in order)):
        at = dict(zip(order, values, strict=True))
        rows.append(100 * at["3"] + 10 * at["h"] + at["d"])
    got = to_3hd(torch.tensor(rows), order, width)
    want = [100 * t + 10 * h + d for t in range(3) for h in range(heads) for d in range(width)]
    assert got.tolist() == want


@pytest.mark.parametrize("order", ["h3d", "hd3"])
def test_a_model_with_another_row_order_computes_the_same_once_the_order_is_given(order: str, tmp_path: Path) -> None:
    ours = weights_of(TINY)
    permutation = to_3hd(torch.arange(3 * 64), order, 16).argsort()  # rows of 3hd to where `order` has them
    theirs = {name: value[permutation] if ".qkv." in name else value for name, value in ours.items()}
    assert not torch.equal(theirs["middle_block.1.qkv.weight"], ours["middle_block.1.qkv.weight"])
    path = tmp_path / "model.pt"
    torch.save(theirs, path)
    checkpoint = load_model(path, "openai", dataclasses.replace(TOLD, qkv=order))
    assert checkpoint.source["qkv"] == order
    for name, value in ours.items():
        assert torch.equal(checkpoint.weights[name], value), name


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.pop(name) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without("input_blocks.1.0.in_layers.2.bias"), "input_blocks.1.0.in_layers.2.bias is missing"),
        (_without("input_blocks.1.0.emb_layers.1.weight"), "incomplete"),
        (lambda w: w.update({"extra.weight": torch.zeros(2, 2)}), "extra.weight"),
        (lambda w: w.update({"out.2.weight": torch.zeros(6, 32, 3, 3), "out.2.bias": torch.zeros(6)}), "out.2.bias"),
    ],
    ids=["missing", "incomplete", "extra", "learned variance"],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    weights = weights_of(TINY)
    change(weights)
    path = tmp_path / "model.pt"
    torch.save(weights, path)
    with pytest.raises(ArtifactError, match=words):
        load_model(path, "openai", TOLD)


def test_a_teacher_that_is_loaded_warns_that_it_is_one(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(weights_of(TINY), path)
    with pytest.warns(CmfastWarning, match="diffusion model"):
        checkpoint = load_model(path, "openai", dataclasses.replace(TOLD, scaling="edm"))
    assert checkpoint.spec.scaling == "edm"


def test_what_is_given_wins_over_what_is_usual_and_bad_values_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(weights_of(TINY), path)
    enough = ["image_size=8", "head_channels=16", "qkv=3hd", "scaling=boundary"]
    given = Given.parse([*enough, "clip=false", "sigmas=80:80,1.5"])
    spec = load_model(path, "openai", given).spec
    assert (spec.clip, spec.sigmas) == (False, {1: (80.0,), 2: (80.0, 1.5)})
    for wrong, words in [
        ("scaling=best", "scaling must be one of"),
        ("qkv=dh3", "qkv must be one of 3hd"),
        ("image_size=9", "image_size=9 cannot be halved"),
        ("image_size=0", "image_size must be a whole number from 1 to 65536"),
        ("head_channels=0", "head_channels must be a whole number from 1"),
        ("heads=2", "heads and head_channels set the same thing"),
        ("sigmas=80:40", "two lists of the same length"),
        ("grid=100000", "grid must be 0 .none. or 2 to 65536"),
        ("colour=red", "no such field"),
        ("clip", "expected NAME=VALUE"),
    ]:
        others = [text for text in enough if text.partition("=")[0] != wrong.partition("=")[0]]
        with pytest.raises(CmfastError, match=words):
            load_model(path, "openai", Given.parse([*others, wrong]))
    with pytest.raises(CmfastError, match="scaling is given twice"):
        Given.parse(["scaling=boundary", "scaling=edm"])


@pytest.mark.parametrize("order", ["3hd", "h3d"])
def test_a_network_with_a_number_of_heads_is_not_one_with_a_width_of_heads(order: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, heads=2, attention=(8, 4), head_channels=32)
    ours = weights_of(config)
    inverse = {c: to_3hd(torch.arange(3 * c), order, c // 2).argsort() for c in (32, 64)}
    theirs = {n: v[inverse[v.shape[0] // 3]] if ".qkv." in n else v for n, v in ours.items()}
    path = tmp_path / "model.pt"
    torch.save(theirs, path)
    given = dataclasses.replace(TOLD, head_channels=None, heads=2, qkv=order)
    checkpoint = load_model(path, "openai", given)
    assert checkpoint.source["told"]["heads"] == 2
    network = AdmUnet(config).eval()
    network.load_state_dict(ours)
    x, label = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])
    with torch.no_grad():
        want = network(x, torch.tensor([3.0, 4.0]), label)
        torch.testing.assert_close(checkpoint.denoiser().network(x, torch.tensor([3.0, 4.0]), label), want)
        other = AdmUnet(dataclasses.replace(config, heads=0)).eval()
        other.load_state_dict(ours)
        assert (other(x, torch.tensor([3.0, 4.0]), label) - want).abs().max() > 1e-3  # the heads do matter


def test_a_file_that_somebody_compressed_again_is_read_right(tmp_path: Path) -> None:
    torch.save(weights_of(TINY), tmp_path / "stored.pt")
    with zipfile.ZipFile(tmp_path / "stored.pt") as old, zipfile.ZipFile(tmp_path / "model.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    checkpoint = load_model(tmp_path / "model.pt", "openai", TOLD)
    for name, value in weights_of(TINY).items():
        assert torch.equal(checkpoint.weights[name], value), name


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.long(),
        lambda t: t > 0,
        lambda t: t.to(torch.complex64),
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
    ],
    ids=["int64", "bool", "complex", "sparse", "meta"],
)
def test_tensors_that_are_no_plain_numbers_are_named(change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    weights = weights_of(TINY)
    weights["out.2.weight"] = change(weights["out.2.weight"])
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=r"out.2.weight is .*plain floating-point numbers"):
        load_model(tmp_path / "model.pt", "openai", TOLD)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weights = weights_of(TINY)
    weights["out.2.weight"] = weights["out.2.weight"].double() * 1e300  # infinite as float32
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match=r"out.2.weight has values that are not finite"):
        load_model(tmp_path / "model.pt", "openai", TOLD)


def test_a_set_inside_a_set_and_one_beside_it_are_two(tmp_path: Path) -> None:
    torch.save({**weights_of(TINY), "extra": {"ema": weights_of(TINY, seed=1)}}, tmp_path / "model.pt")
    with pytest.raises(CmfastError, match=r"2 set\(s\) of weights \(at the top, extra.ema\)"):
        load_model(tmp_path / "model.pt", "openai", TOLD)
    given = dataclasses.replace(TOLD, weights="ema")
    checkpoint = load_model(tmp_path / "model.pt", "openai", given)
    assert torch.equal(checkpoint.weights["out.2.weight"], weights_of(TINY, seed=1)["out.2.weight"])
    assert checkpoint.source["weights"] == "extra.ema"


def test_block_numbers_without_end_are_refused_at_once(tmp_path: Path) -> None:
    weights = weights_of(TINY)
    for number in ("99999999", "9" * 5000):
        weights[f"output_blocks.{number}.0.in_layers.0.weight"] = torch.zeros(3, 3)
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ArtifactError, match="no such tensor"):
        load_model(tmp_path / "model.pt", "openai", TOLD)
