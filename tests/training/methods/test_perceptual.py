# SPDX-License-Identifier: MIT
"""LPIPS: the same number as torchmetrics gives, without its download, and a gradient for the images only."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_train.methods.perceptual import NETS, load_lpips
from cmfast_train.torchvision_cpu import torchvision_datasets

torchvision_datasets()
import torchvision  # noqa: E402, importable from here on
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity  # noqa: E402


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was begun")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)


def images(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("net", "height", "width"), [("alex", 256, 256), ("alex", 32, 32), ("squeeze", 32, 32), ("vgg", 32, 256)]
)
def test_it_is_the_number_that_torchmetrics_gives_for_the_same_network(
    net: str, height: int, width: int, weights: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = images(0, 2, 3, height, width), images(1, 2, 3, height, width)
    got = load_lpips(net, weights(net))(a, b)
    assert got.shape == (2,)
    assert got.dtype == torch.float32

    with torch.device("meta"):
        whole = getattr(torchvision.models, NETS[net][0])(weights=None).state_dict()
    whole = {name: torch.zeros(like.shape) for name, like in whole.items() if "classifier" in name}
    whole |= {name: tensor for name, tensor in torch.load(weights(net)).items() if "features" in name}
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: whole)
    if width < 256:
        a, b = (torch.nn.functional.interpolate(x, (224, 224), mode="bilinear") for x in (a, b))
    want = learned_perceptual_image_patch_similarity(a, b, net_type=net, reduction="none")  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_it_is_a_distance(net: str, weights: Callable[[str], Path]) -> None:
    lpips, a, b = load_lpips(net, weights(net)), images(0, 2, 3, 16, 16), images(1, 2, 3, 16, 16)
    assert (lpips(a, a) == 0).all()
    assert (lpips(a, b) > 0).all()
    np.testing.assert_array_equal(lpips(a, b), lpips(b, a))


def test_each_image_has_its_own_distance(weights: Callable[[str], Path]) -> None:
    lpips, a, b = load_lpips("alex", weights("alex")), images(0, 3, 3, 24, 24), images(1, 3, 3, 24, 24)
    one_by_one = torch.cat([lpips(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(lpips(a, b), one_by_one, rtol=1e-5)  # sums in another order
    assert len(set(one_by_one.tolist())) == 3


def test_grey_images_are_three_equal_channels(weights: Callable[[str], Path]) -> None:
    lpips, a, b = load_lpips("alex", weights("alex")), images(0, 2, 1, 32, 32), images(1, 2, 1, 32, 32)
    np.testing.assert_array_equal(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_narrow_images_are_resized_to_224_pixels_and_others_are_not(weights: Callable[[str], Path]) -> None:
    lpips = load_lpips("alex", weights("alex"))
    for side, same in [(255, True), (256, False)]:
        pair = [images(seed, 1, 3, side, side) for seed in (0, 1)]
        smaller = [torch.nn.functional.interpolate(x, (224, 224), mode="bilinear") for x in pair]
        assert (lpips(*pair) == lpips(*smaller)).all() == same


def test_the_gradient_flows_to_the_images_along_the_loss(weights: Callable[[str], Path]) -> None:
    lpips, a, b = load_lpips("alex", weights("alex")), images(0, 2, 3, 32, 32).requires_grad_(), images(1, 2, 3, 32, 32)
    before = lpips(a, b)
    before.sum().backward()
    assert a.grad is not None
    assert a.grad.flatten(1).norm(dim=1).min() > 0
    with torch.no_grad():
        # A step small enough for the slope to hold: the loss falls by the step times the squared gradient.
        step = 1e-3 * before.sum() / a.grad.square().sum()
        fall = before.sum() - lpips(a - step * a.grad, b).sum()
    assert fall.item() == pytest.approx(1e-3 * before.sum().item(), rel=0.05)


def test_the_gradient_of_equal_images_is_zero_and_finite(weights: Callable[[str], Path]) -> None:
    lpips, a = load_lpips("alex", weights("alex")), images(0, 1, 3, 32, 32).requires_grad_()
    lpips(a, a.detach()).sum().backward()
    assert a.grad is not None
    assert (a.grad == 0).all()


def test_the_network_is_frozen_and_its_mode_decides_nothing(weights: Callable[[str], Path]) -> None:
    lpips, a, b = load_lpips("alex", weights("alex")), images(0, 1, 3, 32, 32), images(1, 1, 3, 32, 32)
    (network,) = (cell.cell_contents for cell in lpips.__closure__)  # type: ignore[attr-defined]
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not lpips(a, b).requires_grad
    want = lpips(a, b)
    network.train()
    np.testing.assert_array_equal(lpips(a, b), want)


def test_autocast_and_half_precision_change_nothing_but_the_images(weights: Callable[[str], Path]) -> None:
    lpips, a, b = load_lpips("alex", weights("alex")), images(0, 1, 3, 32, 32), images(1, 1, 3, 32, 32)
    want = lpips(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(lpips(a, b), want)
    half = lpips(a.half(), b.half())
    assert half.dtype == torch.float32
    np.testing.assert_array_equal(half, lpips(a.half().float(), b.half().float()))


def test_loading_draws_no_random_numbers(weights: Callable[[str], Path]) -> None:
    before = torch.get_rng_state()
    load_lpips("alex", weights("alex"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_file_may_be_half_precision_and_may_go_away(weights: Callable[[str], Path], tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in torch.load(weights("alex")).items()}
    torch.save(state, tmp_path / "half.pth")
    lpips, a, b = load_lpips("alex", tmp_path / "half.pth"), images(0, 1, 3, 32, 32), images(1, 1, 3, 32, 32)
    (tmp_path / "half.pth").write_bytes(b"")  # in place: a mapping would read nothing now
    # Weights rounded to half precision, 5e-4 of each.
    assert lpips(a, b).item() == pytest.approx(load_lpips("alex", weights("alex"))(a, b).item(), rel=5e-3)


def test_an_unknown_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match="must be one of vgg, alex, squeeze, got 'resnet'"):
        load_lpips("resnet", tmp_path / "absent.pth")


def test_another_networks_weights_are_refused(weights: Callable[[str], Path]) -> None:
    with pytest.raises(
        CmfastError,
        match=r"torchvision's vgg16 \(vgg16-397923af.pth\): features.0.weight is .*\[64, 3, 11, 11\], expected float",
    ):
        load_lpips("vgg", weights("alex"))


def broken(state: dict[str, Tensor], how: str) -> Any:
    if how == "missing":
        del state["features.10.bias"]
    elif how == "nan":
        state["features.10.bias"][3] = math.nan
    elif how == "integers":
        state["features.10.bias"] = state["features.10.bias"].int()
    else:
        return list(state.values())
    return state


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "features.10.bias is missing"),
        ("nan", "features.10.bias is not finite"),
        ("integers", r"features.10.bias is torch.int32 \[256\], expected float \[256\]"),
        ("list", "it holds a list, no named weights"),
    ],
)
def test_a_file_of_something_else_is_refused_in_one_line(
    how: str, words: str, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    torch.save(broken(torch.load(weights("alex")), how), tmp_path / "odd.pth")
    with pytest.raises(CmfastError, match=words) as caught:
        load_lpips("alex", tmp_path / "odd.pth")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_absent_or_holds_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=r"absent.pth: no such file"):
        load_lpips("alex", tmp_path / "absent.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"features.0.weight": print}))
    with pytest.raises(CmfastError, match=r"code.pth: "):
        load_lpips("alex", tmp_path / "code.pth")


@pytest.mark.parametrize(
    ("a", "b"), [((1, 2, 8, 8), (1, 2, 8, 8)), ((3, 8, 8), (3, 8, 8)), ((2, 1, 8, 8), (1, 1, 8, 8))]
)
def test_what_are_no_two_batches_of_images_is_refused(
    a: tuple[int, ...], b: tuple[int, ...], weights: Callable[[str], Path]
) -> None:
    with pytest.raises(CmfastError, match=r"LPIPS compares images \[B, 1 or 3, H, W\], got \["):
        load_lpips("alex", weights("alex"))(torch.zeros(a), torch.zeros(b))
