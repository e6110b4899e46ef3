# SPDX-License-Identifier: MIT
"""Specs of models of images, in a few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cmfast.conditions import class_label
from cmfast.spec import ModelSpec


def named(label: Any) -> dict[str, Any]:
    """Return the conditions of a model of images: its label, if it has one."""
    return {} if label is None else {"label": label}


def image_spec(
    image: Sequence[int] = (1, 8, 8), classes: int = 0, class_names: Sequence[str] = (), **values: Any
) -> ModelSpec:
    """Return the spec of a model of images (C, H, W) with so many classes, 0 for none."""
    conditions = (class_label(classes, class_names),) if classes else ()
    return ModelSpec(shape=tuple(image), data="image", conditions=conditions, **values)
