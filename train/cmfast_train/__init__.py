# SPDX-License-Identifier: MIT
"""Training of few-step models with PyTorch: any module wrapped as a denoiser, checkpoints of ours and of others.

The names in `__all__` are the public interface; each is imported, and torch with it, when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast import lazily

if TYPE_CHECKING:
    from cmfast_train.checkpoint import Checkpoint, save_checkpoint
    from cmfast_train.config.phase import phase
    from cmfast_train.config.train_config import TrainConfig
    from cmfast_train.denoiser import Denoiser
    from cmfast_train.importers import load_model
    from cmfast_train.train_custom import Trained, train
    from cmfast_train.wrapping import wrap

_HOMES = {  # the modules of the names below
    "Checkpoint": "checkpoint",
    "Denoiser": "denoiser",
    "TrainConfig": "config.train_config",
    "Trained": "train_custom",
    "load_model": "importers",
    "phase": "config.phase",
    "save_checkpoint": "checkpoint",
    "train": "train_custom",
    "wrap": "wrapping",
}
__all__ = [
    "Checkpoint", "Denoiser", "TrainConfig", "Trained", "load_model", "phase", "save_checkpoint", "train", "wrap",
]  # fmt: skip

__getattr__, __dir__ = lazily(__name__, _HOMES)
