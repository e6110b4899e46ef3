# SPDX-License-Identifier: MIT
"""Where the command of the exporter starts, as in `cmfast.cli.commands`."""

from __future__ import annotations

from cmfast.cli.interrupt import interruptible


def export() -> None:
    """Run cmfast-export."""
    with interruptible("cmfast-export"):
        from cmfast_export.cli import main

        main()
