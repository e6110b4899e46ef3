# SPDX-License-Identifier: MIT
"""How far a file may be from PyTorch follows what the scaling makes of an error of the network, in half precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from cmfast.backends import Inputs
from cmfast.checks import psnr_db
from cmfast.formats.manifest import ROUNDING, Manifest
from cmfast.preconditioning import scalings
from cmfast.spec import SCALINGS, ModelSpec
from cmfast_export import export_onnx
from cmfast_export.report import parity
from cmfast_export.verify import SIZES, allowance, denoiser_cases, verify
from cmfast_train.wrapping import wrap
from helpers.own_networks import Mlp

SIGMA = np.array([0.002, 0.5, 2, 80], np.float32)
TIMES = {"schedule": "linear", "steps": 100, "beta_start": 1e-4, "beta_end": 0.02}


def spec_of(scaling: str, sigma_data: float = 0.5) -> ModelSpec:
    times: dict[str, Any] = {"times": TIMES} if scaling.startswith("lcm") else {}
    return wrap(nn.Identity(), shape=(6,), scaling=scaling, c_noise="ln/4", sigma_data=sigma_data, **times).spec


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_half_precision_does_to_the_output_is_allowed_as_often_as_the_scaling_multiplies_it(scaling: str) -> None:
    spec = spec_of(scaling)
    c_out = np.abs(scalings(SIGMA, spec)[1])
    unit = 0.5 if scaling.endswith("x0") else 1.0
    np.testing.assert_allclose(allowance(spec, SIGMA, rounds=True), np.maximum(1, c_out * unit / 0.5), rtol=1e-6)
    eps = scaling.endswith("eps")
    np.testing.assert_allclose(allowance(spec, SIGMA, rounds=False), np.maximum(1, c_out if eps else 0), rtol=1e-6)


def test_the_networks_that_tolerances_were_measured_on_are_given_no_more() -> None:
    for scaling in ("edm", "boundary", "trigflow", "cloneofsimo", "x0", "vp_x0"):
        np.testing.assert_array_equal(allowance(spec_of(scaling), SIGMA, rounds=True), 1)
    np.testing.assert_allclose(allowance(spec_of("edm", 2.0), SIGMA, rounds=True)[-1], 4, rtol=1e-3)
    np.testing.assert_allclose(allowance(spec_of("eps"), SIGMA, rounds=True), [1, 1, 4, 160])


def test_float32_is_given_no_more_than_before() -> None:
    for scaling in SCALINGS:
        before = np.maximum(1, SIGMA) if scaling.endswith("eps") else np.ones_like(SIGMA)
        assert (allowance(spec_of(scaling), SIGMA, rounds=False) <= before * (1 + 1e-6)).all()


class Off:
    """A denoiser whose network predicts a noise of 0, or of `error`."""

    name, batch = "off", None

    def __init__(self, spec: ModelSpec, error: float, dtype: str = "float32") -> None:
        self.manifest, self.error = Manifest(kind="denoiser", spec=spec, dtype=dtype), np.float32(error)

    def run(self, inputs: Inputs) -> Any:
        c_skip, c_out, _ = scalings(inputs["sigma"].reshape(-1, *[1] * (inputs["x"].ndim - 1)), self.manifest.spec)
        return c_skip * inputs["x"] + c_out * self.error


@pytest.mark.parametrize("scaling", ["eps", "vp_eps", "vp_v", "flow", "edm"])
@pytest.mark.parametrize(("error", "passes"), [(0.095, True), (0.105, False)])
def test_the_same_error_of_the_network_passes_whatever_it_predicts(scaling: str, error: float, passes: bool) -> None:
    # 0.1 in F, whose standard deviation is 1: 0.05 in a model whose c_out is at most 0.5. The levels reach that limit.
    spec = spec_of(scaling)
    (found,) = verify(Off(spec, error, "float16"), [Off(spec, 0)])
    assert (found.failure(ROUNDING["float16"]) is None) == passes
    (exact,) = verify(Off(spec, error), [Off(spec, 0)])
    assert exact.failure(ROUNDING["float32"]) is not None, "float32 is held to float32"


def test_a_difference_that_is_refused_and_what_is_allowed_are_in_data_units() -> None:
    spec = spec_of("eps")
    (found,) = verify(Off(spec, 0.2, "float16"), [Off(spec, 0)])
    words = re.fullmatch(r"differs from PyTorch by (\S+) at sigma (\S+) \(allowed (\S+)\)", found.failure(5e-2) or "")
    assert words
    difference, sigma, allowed = map(float, words.groups())
    assert difference == pytest.approx(0.2 * sigma, rel=1e-2)
    assert allowed == pytest.approx(0.1 * sigma, rel=0.5), "one digit"


def test_the_report_says_what_is_allowed_at_each_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = Mlp(6)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    denoiser = wrap(net, shape=(6,), scaling="vp_eps", c_noise="ln/4")
    found = export_onnx(denoiser, tmp_path / "m.onnx", precision="fp16")
    parity(found, found.path)
    printed = capsys.readouterr().out
    assert "more is allowed where the scaling multiplies what the network predicts" in printed
    (row,) = (line for line in printed.splitlines() if "sigma 80 " in line)
    worst = next(each for each in found.denoiser.parity.rows if each.where == "sigma 80")
    assert (worst.factor, f"{worst.difference:.1e}" in row, "8.0e+00" in row) == (160, True, True)
    assert worst.difference > 1e-4 > found.manifest.parity["max_abs"] / 100


@pytest.mark.parametrize(("shape", "peak"), [((6,), None), ((1, 2, 2), 2.0)])
def test_decibels_and_grey_levels_are_of_the_difference_itself_whatever_is_allowed(
    shape: tuple[int, ...], peak: float | None
) -> None:
    spec = wrap(nn.Identity(), shape=shape, scaling="eps", c_noise="ln/4", sigma_max=64.0).spec
    off, exact = Off(spec, 0.01, "float16"), Off(spec, 0)
    (found,) = verify(off, [exact])
    row = next(each for each in found.rows if each.where == "sigma 64")
    assert (row.factor, row.difference) == (128, pytest.approx(0.64, rel=1e-4))  # 64 times 0.01
    assert row.grey_levels == pytest.approx(127.5 * 0.64, rel=1e-4)
    decibels = 20 * np.log10((peak or row.peak) / 0.64)
    assert found.psnr_db == row.psnr_db == pytest.approx(decibels, abs=1e-3), "the worst level"
    assert [found.largest, row.largest] == pytest.approx([0.64, 0.64], rel=1e-4)
    assert found.failure(5e-2) is None
    assert f"is {decibels:.1f} dB from PyTorch at sigma 64" in (found.failure(np.inf, least_db=60) or "")


def test_decibels_of_data_that_are_no_images_are_those_of_the_variant_auto() -> None:
    spec = wrap(nn.Identity(), shape=(6,), scaling="edm", c_noise="ln/4").spec
    (found,) = verify(Off(spec, 0.01), [Off(spec, 0)], batches=[1])
    cases = list(denoiser_cases(spec, [1], SIZES, lambda n, seed, size: {}))
    got, want = ([Off(spec, e).run({"x": c.x, "sigma": c.sigma}) for c in cases] for e in (0.01, 0))
    assert found.psnr_db == pytest.approx(psnr_db(got, want, image=False), abs=0.01)  # float32 and the clip of denoise
    assert found.psnr_db != pytest.approx(psnr_db(got, want, image=True), abs=0.5)
