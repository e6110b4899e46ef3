# SPDX-License-Identifier: MIT
"""What can go wrong and a user can mend. Bugs are not here: they keep their traceback.

The commands print the message as one line; `exit_code` is what they exit with.
"""

from __future__ import annotations

import unicodedata


class CmfastError(Exception):
    """A request that cannot be fulfilled; the message says what was got, what is needed, what to type."""

    exit_code = 2


class ArtifactError(CmfastError):
    """A model file is missing, damaged, of the wrong kind, or does not describe itself."""


class EngineError(CmfastError):
    """An engine or a device was asked for and cannot be had. There is no fallback."""


class CheckFailed(CmfastError):
    """Work was done, checked, and found wanting: an export that differs, a loss that is not finite."""

    exit_code = 1


class MissingDependency(CmfastError):
    """An optional package is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed: pip install 'cmfast[{extra}]'")


class CmfastWarning(UserWarning):
    """A request is fulfilled, and there is something that the user should know. The commands print one line."""


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
