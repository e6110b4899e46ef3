# SPDX-License-Identifier: MIT
"""Ctrl-C while a command is still being imported: one line and exit code 130. Nothing is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Run the block, which imports the command `name` and runs it."""
    try:
        yield
    except KeyboardInterrupt:
        import os

        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(130)  # modules may be half imported, and what they registered for the exit does not work
