# SPDX-License-Identifier: MIT
"""Where the commands of the trainer start, as in `cmfast.cli.commands`."""

from __future__ import annotations

from cmfast.cli.interrupt import interruptible


def train() -> None:
    """Run cmfast-train."""
    with interruptible("cmfast-train"):
        from cmfast_train.cli.train import main

        main()


def ema() -> None:
    """Run cmfast-ema."""
    with interruptible("cmfast-ema"):
        from cmfast_train.cli.ema import main

        main()


def evaluate() -> None:
    """Run cmfast-eval."""
    with interruptible("cmfast-eval"):
        from cmfast_train.cli.evaluate import main

        main()
