# SPDX-License-Identifier: MIT
"""The self-test of a model file: a few values of one sample, so that a machine can show that it computes the same.

In the manifest it is {"seed", "conditions", "at", "values", "atol"}: sample 0 of the seed, in the fewest steps, has
these `values` at these flat indices (`at`), within `atol`. Conditions that it does not name are those of
`cmfast.conditions.some_values`. Exporters record it from PyTorch; cmfast-info --selftest, C++ and C compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cmfast.conditions import some_values
from cmfast.errors import CmfastError
from cmfast.formats.values import check_selftest
from cmfast.spec import ModelSpec

COUNT = 8  # values that are recorded


class Samples(Protocol):
    """As much of `cmfast.Model` as it takes."""

    spec: ModelSpec

    def sample_float(
        self, n: int, *, sigmas: Sequence[float] | None, seed: int, conditions: Mapping[str, Any] | None
    ) -> Any:
        """Draw n samples, float32 [n, *shape]."""
        ...


@dataclass(frozen=True)
class SelftestResult:
    """How far a machine is from the recorded values."""

    max_abs: float  # largest difference, data units
    atol: float  # allowed

    @property
    def passed(self) -> bool:
        """Whether it computes the same."""
        return self.max_abs <= self.atol


def record_selftest(model: Samples, atol: float, sigmas: Sequence[float] | None = None) -> dict[str, Any]:
    """Return what a manifest records of a model.

    Args:
        model: The reference.
        atol: Largest difference that another backend may have, data units.
        sigmas: The noise levels of a sampler; None: those of the fewest steps.
    """
    sample = _sample(model, {"seed": 0}, sigmas)
    at = sorted({(2 * i + 1) * sample.size // (2 * COUNT) for i in range(COUNT)})
    return {"seed": 0, "conditions": {}, "at": at, "values": [float(f"{sample[i]:.6g}") for i in at], "atol": atol}


def run_selftest(model: Samples, recorded: Mapping[str, Any]) -> SelftestResult:
    """Draw the recorded sample and compare.

    Raises:
        CmfastError: the file has no self-test, or a wrong one.
    """
    if not recorded:
        raise CmfastError("this file has no self-test; export the model again with cmfast-export")
    check_selftest(recorded)
    sample = _sample(model, recorded, None)
    if max(recorded["at"]) >= sample.size:
        raise CmfastError(f"selftest.at has an index beyond the {sample.size} values of a sample")
    pairs = zip(recorded["at"], recorded["values"], strict=True)
    return SelftestResult(max(abs(float(sample[i]) - value) for i, value in pairs), recorded["atol"])


def _sample(model: Samples, recorded: Mapping[str, Any], sigmas: Sequence[float] | None) -> Any:
    """Return sample 0 of the seed, flat."""
    drawn = some_values(model.spec.conditions, 1, seed=recorded["seed"])
    conditions = {**drawn, **recorded.get("conditions", {})}
    return model.sample_float(1, sigmas=sigmas, seed=recorded["seed"], conditions=conditions).ravel()
