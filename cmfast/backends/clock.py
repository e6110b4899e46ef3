# SPDX-License-Identifier: MIT
"""The clock of a backend on a GPU; it runs only while the times are requested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cmfast.backends.protocol import DeviceTimes


class Clock:
    """Where calls leave what they cost. `timed` is the method of `cmfast.backends.TimedBackend`."""

    def __init__(self) -> None:
        self.times: list[DeviceTimes] | None = None  # None: not requested, so no clock runs

    @contextmanager
    def timed(self) -> Iterator[list[DeviceTimes]]:
        """Give a list to which every call appends its times, until the context ends."""
        self.times = []
        try:
            yield self.times
        finally:
            self.times = None
