# SPDX-License-Identifier: MIT
"""Ctrl-C while a command is still being imported: one line and exit code 130. Nothing is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Run the block, which imports the command `name` and runs it.

    Ctrl-C within an import ends the process at once. Raised there, it can get lost or become another error: extension
    modules make ImportError of it, half-imported packages recurse, callbacks of weak references drop it.
    """

    def end_imports(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                _end(name)
            frame = frame.f_back
        raise KeyboardInterrupt

    try:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_imports)
        yield
    except KeyboardInterrupt:
        _end(name)


def _end(name: str) -> None:
    import os

    os.write(2, f"{name}: interrupted\n".encode())
    os._exit(130)  # modules may be half imported, and what they registered for the exit does not work
