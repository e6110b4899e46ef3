# SPDX-License-Identifier: MIT
"""What several test modules share. Tests import from here, never from each other; fixtures are in conftest.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
BENCHMARKS = ROOT / "benchmarks"
DATA = TESTS / "data"
GOLDEN_NOISE = TESTS / "golden_noise.json"

# An assertion that fails in here shows its values, as in a test; to be set before a module of this package is imported.
pytest.register_assert_rewrite(*(f"{__name__}.{path.stem}" for path in HELPERS.glob("[a-z]*")))


def helpers_on_path() -> dict[str, str]:
    """Return the environment in which a test module that runs as a script of its own finds this package."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))}
