# SPDX-License-Identifier: MIT
"""The target cmfast: a foreign model as a cmfast checkpoint, .pt or .safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmfast_train.checkpoint import Checkpoint, save_checkpoint

if TYPE_CHECKING:
    from cmfast_export.request import Request


def write(model: Checkpoint, request: Request) -> None:
    """Write the checkpoint to `request.out`."""
    save_checkpoint(model, request.out)
