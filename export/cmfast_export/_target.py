# SPDX-License-Identifier: MIT
"""What an export reads and writes: never one and the same file, and never two writers of one target at a time."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from cmfast.files.locks import exclusive, lock_beside
from cmfast.formats.table import files_beside

P = ParamSpec("P")
R = TypeVar("R")

_ours: ContextVar[frozenset[Path]] = ContextVar("_ours", default=frozenset())  # locks that callers of ours hold


@contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a target while the block runs; inside another block of the same target do nothing.

    Raises:
        CmfastError: another process or thread writes there: "X is being written (pid N)".
    """
    lock = lock_beside(target)
    if lock in _ours.get():  # the command holds it for its whole work, and the function that it calls for its own
        yield
        return
    with exclusive(lock, f"{target} is being written"):
        token = _ours.set(_ours.get() | {lock})
        try:
            yield
        finally:
            _ours.reset(token)


def one_writer(check: Callable[[str | os.PathLike[str]], object]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: the function runs while it holds the lock of its argument `out`, which `check` passes."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            out = signature.bind(*args, **kwargs).arguments["out"]
            check(out)
            with writing(out):
                return function(*args, **kwargs)

        return call

    return decorate


def files_of(model: Path) -> list[Path]:
    """Return what a model is read from: its file, the weights beside it, a folder and what is in it."""
    if model.is_dir():
        return [model, *sorted(model.glob("*")), *sorted(model.glob("*/*"))]
    return [model, *files_beside(model)]
