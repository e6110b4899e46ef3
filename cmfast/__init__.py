# SPDX-License-Identifier: MIT
"""cmfast: sampling from consistency models and other few-step generators. No torch.

    import cmfast

    model = cmfast.load("model.onnx")                 # the backend is chosen by suffix
    images = model.sample(16, steps=2, seed=0)        # uint8 [16, H, W, C]
    actions = policy.sample(1, conditions={"state": s})  # float32 [1, T, A]: what is no image stays an array
    x0 = model.denoise(x, sigma)                      # float32, the raw contract

The names below are the public interface; each is imported when it is first used. The algorithm is in `cmfast.sampling`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmfast.backends.protocol import Backend
    from cmfast.conditions import Condition, class_label
    from cmfast.errors import ArtifactError, BackendError, CheckFailed, CmfastError, EngineError, MissingDependency
    from cmfast.formats.manifest import Manifest
    from cmfast.formats.table import read_manifest
    from cmfast.images import save_images
    from cmfast.model import Model, load
    from cmfast.noise import gaussian
    from cmfast.sampling import sample
    from cmfast.schedule import DiscreteTimes, karras_sigmas
    from cmfast.spec import ModelSpec

__version__ = "0.1.0"

# Where the names below are looked for.
_MODULES = (
    "errors", "conditions", "schedule", "spec", "noise", "images", "sampling", "formats.manifest", "formats.table",
    "backends.protocol", "model",
)  # fmt: skip
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
    "read_manifest",
    "sample",
    "save_images",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (import_module(f"cmfast.{module}") for module in _MODULES)
        globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
        return globals()[name]
    if not name.startswith("_") and find_spec(f"cmfast.{name}"):  # cmfast.noise is there without its own import
        return import_module(f"cmfast.{name}")
    raise AttributeError(f"module 'cmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
