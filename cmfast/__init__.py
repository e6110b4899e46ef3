# SPDX-License-Identifier: MIT
"""cmfast: sampling from consistency models and other few-step generators. No torch.

    import cmfast

    model = cmfast.load("digits")                        # a small model that comes with cmfast: cmfast.models()
    model = cmfast.load("model.onnx")                    # the backend is chosen by suffix
    images = model.sample(16, steps=2, seed=0)           # uint8 [16, H, W, C]
    actions = policy.sample(1, conditions={"state": s})  # float32 [1, T, A]: what is no image stays an array
    x0 = model.denoise(x, sigma)                         # float32, the raw contract

The names below are the public interface; each is imported when it is first used. The algorithm is in `cmfast.sampling`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmfast.backends.protocol import Backend
    from cmfast.conditions import Condition, class_label
    from cmfast.errors import ArtifactError, BackendError, CheckFailed, CmfastError, EngineError, MissingDependency
    from cmfast.formats.manifest import Manifest
    from cmfast.formats.shipped import models
    from cmfast.formats.table import read_manifest
    from cmfast.images import save_images
    from cmfast.model import Model, load
    from cmfast.noise import gaussian
    from cmfast.sampling import sample
    from cmfast.schedule import DiscreteTimes, karras_sigmas
    from cmfast.spec import ModelSpec

__version__ = "0.1.0"

_HOMES = {  # the modules of the names below
    "ArtifactError": "errors",
    "Backend": "backends.protocol",
    "BackendError": "errors",
    "CheckFailed": "errors",
    "CmfastError": "errors",
    "Condition": "conditions",
    "DiscreteTimes": "schedule",
    "EngineError": "errors",
    "Manifest": "formats.manifest",
    "MissingDependency": "errors",
    "Model": "model",
    "ModelSpec": "spec",
    "class_label": "conditions",
    "gaussian": "noise",
    "karras_sigmas": "schedule",
    "load": "model",
    "models": "formats.shipped",
    "read_manifest": "formats.table",
    "sample": "sampling",
    "save_images": "images",
}
__all__ = [
    "ArtifactError",
    "Backend",
    "BackendError",
    "CheckFailed",
    "CmfastError",
    "Condition",
    "DiscreteTimes",
    "EngineError",
    "Manifest",
    "MissingDependency",
    "Model",
    "ModelSpec",
    "class_label",
    "gaussian",
    "karras_sigmas",
    "load",
    "models",
    "read_manifest",
    "sample",
    "save_images",
]


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose public names are imported when they are first used.

    Args:
        package: the name of the package.
        homes: public name -> its module, relative to the package. Modules that are no names of it are found too.

    Returns:
        The two functions of PEP 562.
    """

    def get(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
            vars(sys.modules[package])[name] = value
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}"):  # cmfast.noise is there without its own import
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


__getattr__, __dir__ = lazily(__name__, _HOMES)
