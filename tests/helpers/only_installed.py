# SPDX-License-Identifier: MIT
"""A machine that has PyTorch and little else: with `pytest -p helpers.only_installed` other packages are not there.

GPU machines are often such: an image with PyTorch, and a few wheels. What a distribution requires comes with it.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import Any

import pytest

INSTALLED = (
    "torch", "numpy", "onnx", "onnxruntime", "pytest", "pytest-timeout", "hypothesis", "scikit-learn", "torchmetrics",
    "accelerate", "click", "pillow", "rich", "safetensors", "matplotlib", "cmfast",
)  # fmt: skip

# What test modules may import although a machine lacks it: this module imitates one.
OPTIONAL = {"google", "ml_dtypes", "onnx_ir", "onnxscript", "tensorboard", "torchvision", "triton", "tritonclient"}


def missing() -> set[str]:
    """Return the importable names of all other distributions here."""
    there: set[str] = set()
    todo = list(INSTALLED)
    while todo:
        name = _plain(todo.pop())
        if name not in there:
            there.add(name)
            todo += _required(name) if name != "cmfast" else []
    owned = metadata.packages_distributions()
    return {module for module, owners in owned.items() if not there & {_plain(owner) for owner in owners}}


def _required(name: str) -> list[str]:
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # on another system
        return []
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines if "extra ==" not in line]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Hide them. None in sys.modules: an import fails, and find_spec finds nothing."""
    nowhere: dict[str, Any] = dict.fromkeys(missing())
    sys.modules.update(nowhere)
