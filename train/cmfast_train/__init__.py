# SPDX-License-Identifier: MIT
"""Training of few-step models with PyTorch: any module wrapped as a denoiser, checkpoints of ours and of others.

The names in `__all__` are the public interface; each is imported, and torch with it, when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmfast_train.checkpoint import Checkpoint, save_checkpoint
    from cmfast_train.config.phase import phase
    from cmfast_train.config.train_config import TrainConfig
    from cmfast_train.denoiser import Denoiser
    from cmfast_train.fitting import Trained, train
    from cmfast_train.importers import load_model
    from cmfast_train.wrapping import wrap

_MODULES = {
    "Checkpoint": "checkpoint",
    "Denoiser": "denoiser",
    "TrainConfig": "config.train_config",
    "Trained": "fitting",
    "load_model": "importers",
    "phase": "config.phase",
    "save_checkpoint": "checkpoint",
    "train": "fitting",
    "wrap": "wrapping",
}
__all__ = [
    "Checkpoint", "Denoiser", "TrainConfig", "Trained", "load_model", "phase", "save_checkpoint", "train", "wrap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        globals()[name] = getattr(import_module(f"cmfast_train.{_MODULES[name]}"), name)
        return globals()[name]
    raise AttributeError(f"module 'cmfast_train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
