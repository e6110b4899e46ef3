# SPDX-License-Identifier: MIT
"""Signals that LLVM takes where Triton compiles a kernel, and how Python gets them back. Imports nothing of either.

LLVM sets handlers of its own, which end the process: of SIGTERM and SIGINT, at which a run saves its state, and of
SIGXFSZ, which Python ignores so that a file that may not grow is an error. It does so once in a process, at the first
compilation (seen with Triton 3.7.1).
"""

from __future__ import annotations

import signal
import threading

TAKEN = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGXFSZ") if hasattr(signal, name))


def take_back_signals() -> None:
    """Set the handlers that Python knows of these signals again; only the main thread can, others do nothing."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in TAKEN:
        if (handler := signal.getsignal(number)) is not None:  # else it was not Python's
            signal.signal(number, handler)
