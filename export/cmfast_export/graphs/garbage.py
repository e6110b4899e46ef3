# SPDX-License-Identifier: MIT
"""Python's search for garbage, put off while an export makes hundreds of thousands of objects that stay."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block, or the function: each search looks through all that the trace has made so far.

    What nothing refers to is freed as always; only cycles wait.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
