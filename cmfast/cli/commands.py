# SPDX-License-Identifier: MIT
"""Entry points of the runtime's commands. Each imports its module when it runs, so that starting stays fast."""

from __future__ import annotations

from cmfast.cli.interrupt import interruptible


def sample() -> None:
    """Run cmfast-sample."""
    with interruptible("cmfast-sample"):
        from cmfast.cli.sample import main

        main()


def edit() -> None:
    """Run cmfast-edit."""
    with interruptible("cmfast-edit"):
        from cmfast.cli.edit import main

        main()


def info() -> None:
    """Run cmfast-info."""
    with interruptible("cmfast-info"):
        from cmfast.cli.info import main

        main()


def bench() -> None:
    """Run cmfast-bench."""
    with interruptible("cmfast-bench"):
        from cmfast.cli.bench import main

        main()
