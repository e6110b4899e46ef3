# SPDX-License-Identifier: MIT
"""The table of source formats: files of weights that are recognised by the names of their tensors.

A new format is a module beside this one and a row here. Another package uses an entry point of the group
"cmfast.sources" (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cmfast.errors import CmfastError
from cmfast_train.importers import cloneofsimo, edm, openai
from cmfast_train.importers.facts import Draft, Facts
from cmfast_train.importers.policies import unet1d

ENTRY_POINTS = "cmfast.sources"  # the group of source formats in other packages


class Matches(Protocol):
    """Whether tensors are named as in the format."""

    def __call__(self, weights: Mapping[str, Tensor], /) -> bool: ...


class Read(Protocol):
    """Reads what the tensors say; the rest is usual for the source, or required from the user: `facts`.

    Args:
        weights: by name, as they are in the file.
        facts: collects what is known and what says so.
        source: --source, "" where it is not given.
        file: named in errors.
    """

    def __call__(self, weights: Mapping[str, Tensor], facts: Facts, source: str, file: Path, /) -> Draft: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A row of the table.

    Attributes:
        names: what --source calls it, and its kin.
        matches: recognises it.
        draft: reads it.
    """

    names: tuple[str, ...]
    matches: Matches
    draft: Read


_OURS = (
    Source(names=("openai",), matches=openai.matches, draft=openai.draft),
    Source(names=("cloneofsimo",), matches=cloneofsimo.matches, draft=cloneofsimo.draft),
    Source(names=("edm", "ect", "fastgen", "sid", "cmt"), matches=edm.matches, draft=edm.draft),
    Source(names=tuple(unet1d.SYSTEMS), matches=unet1d.matches, draft=unet1d.draft),
)
FOLDERS_AND_OWN = ("cmfast", "diffusers", "lerobot")  # recognised by what holds the tensors, not by their names


def sources() -> tuple[Source, ...]:
    """Return the rows: ours, then those of installed packages, by name.

    Raises:
        CmfastError: an entry point is no `Source` of its name.
    """
    from importlib.metadata import entry_points  # slow to import

    found = list(_OURS)
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        row = entry.load()
        if not isinstance(row, Source) or entry.name not in row.names:
            raise CmfastError(f"the entry point {entry.value} of {ENTRY_POINTS} is not a Source called {entry.name}")
        if taken := {*FOLDERS_AND_OWN, *(name for each in found for name in each.names)} & set(row.names):
            raise CmfastError(f"a source {min(taken)} exists already; {entry.value} needs another name")
        found.append(row)
    return tuple(found)
