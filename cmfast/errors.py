# SPDX-License-Identifier: MIT
"""Errors that a user can fix. Bugs are not here: they keep their traceback.

The commands print the message as one line; `exit_code` is what they exit with.
"""

from __future__ import annotations

import copyreg
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class CmfastError(Exception):
    """A request that cannot be fulfilled; the message says what was got, what is needed, what to type."""

    exit_code = 2


class ArtifactError(CmfastError):
    """A model file is missing, damaged, of the wrong kind, or does not describe itself."""


class BackendError(CmfastError):
    """A backend or a device is unavailable, or failed. There is no fallback."""


EngineError = BackendError
"""The first name of `BackendError`: the same class, so `except cmfast.EngineError` stays valid."""


class OutOfMemory(BackendError):
    """A device has too little memory, perhaps only beside what else is on it: see `backend_error`."""


class CheckFailed(CmfastError):
    """Work was done, checked, and found wanting: an export that differs, a loss that is not finite."""

    exit_code = 1


class MissingDependency(CmfastError):
    """An optional package is not installed.

    Args:
        what: what was to be done, the start of the message.
        package: the package that is missing.
        extra: the extra of cmfast that brings it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'cmfast[{extra}]'")

    def __reduce__(self) -> tuple[object, ...]:
        """Be pickled by the message: a process pool or a cluster raises it again where it was called."""
        return copyreg.__newobj__, (type(self), *self.args)  # type: ignore[attr-defined]


class CmfastWarning(UserWarning):
    """A request is fulfilled, and there is something that the user should know. The commands print one line."""

    def __init__(self, text: object = "") -> None:
        super().__init__(under_its_name(str(text)))


_NO_MEMORY = ("out of memory", "alloc_failed", "failed to allocate", "not enough memory", "can't allocate memory")


def backend_error(message: str) -> BackendError:
    """Return the error of a backend, OutOfMemory where the library's words in the message say so."""
    short = any(words in message.lower() for words in _NO_MEMORY)
    return OutOfMemory(message) if short else BackendError(message)


# What a file is read from for now, and the path that the user knows. Unlike catch_warnings it belongs to one thread.
_reading_as: ContextVar[tuple[str, str]] = ContextVar("_reading_as", default=("", ""))


@contextmanager
def known_as(place: object, name: object) -> Iterator[None]:
    """Let errors and warnings of ours that name `place` name `name` instead, in this thread, while the block runs."""
    token = _reading_as.set((str(place), str(name)))
    try:
        yield
    except CmfastError as err:
        err.args = (under_its_name(str(err)),)
        raise
    finally:
        _reading_as.reset(token)


def under_its_name(text: str) -> str:
    """Return a text with the path that the user knows, see `known_as`."""
    place, name = _reading_as.get()
    return text.replace(place, name) if place else text


def one_line(err: BaseException | str, limit: int = 300) -> str:
    """Return what another library says as one line of at most so many characters."""
    return " ".join(str(err).split())[:limit]


def printable(text: str) -> str:
    """Return a text for a terminal: control characters, line ends, lone surrogates and the like as escapes."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def shown(value: object, limit: int = 100) -> str:
    """Return a value from a file as Python writes it, in one line of about so many characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists a thousand deep
        return f"a {type(value).__name__} too long to print"
    return printable(text) if len(text) <= limit else f"{printable(text[:limit])}..."
