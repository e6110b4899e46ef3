# SPDX-License-Identifier: MIT
"""What a checkpoint is, of any format, for cmfast-info: what is known, what says so, and what is missing.

The runtime finds it through the entry point group "cmfast.describe".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from cmfast.formats.manifest import Manifest
from cmfast_train.backends.pytorch import manifest_of
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.importers import finish, identify
from cmfast_train.importers.facts import Given


def describe(
    path: str | os.PathLike[str], source: str, assignments: Sequence[str], manifest_needed: bool
) -> tuple[Manifest | None, list[tuple[str, str]]]:
    """Describe a checkpoint of any format.

    Args:
        path: the file or folder.
        source: what it is, as `--source` of cmfast-export.
        assignments: facts that it does not hold, as `--set` of cmfast-export.
        manifest_needed: read a foreign file's weights too; what is missing is an error then.

    Returns:
        The manifest, None of a foreign file unless it is needed; of a foreign file lines (name, text).
    """
    found = identify(path, source, Given.parse(assignments))
    if isinstance(found, Checkpoint):
        return manifest_of(found), []
    lines = [("format", f"{found.format}: {found.what}")]
    lines += [(fact.name, f"{_text(fact.value)}   ({fact.where})") for fact in found.facts.known]
    lines += [("warning", text) for text in found.warnings]
    if found.facts.missing:
        lines.append(("missing", found.to_pass))
    return (manifest_of(finish(found, path)) if manifest_needed else None), lines


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return (": " if value and isinstance(value[0], (tuple, list)) else ", ").join(_text(part) for part in value)
    return str(value)
