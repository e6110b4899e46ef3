# SPDX-License-Identifier: MIT
"""What mkdocstrings must know of cmfast's style to build docs/api.md; mkdocs.yml loads it.

A field of a dataclass is described by the comment behind it. A docstring lists its arguments as aligned columns,

    sigma  noise level, data units

which Google style writes under "Args:"; `google` translates, until no docstring has such a list any more.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import griffe

COMMENT = re.compile(r"  # (?!type:|noqa|fmt:|pragma)(\S.*)$")
COLUMN = re.compile(r"(\w+) {2,}(\S.*)")


class Style(griffe.Extension):
    """Translates comments and lists of arguments once a package is loaded."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give each field without a docstring the comment behind it."""
        for attribute in cls.attributes.values():
            lines = attribute.source.splitlines()
            found = COMMENT.search(lines[0]) if lines and attribute.docstring is None else None
            if found:
                attribute.docstring = griffe.Docstring(found[1], parent=attribute)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Put the arguments of a docstring under "Args:"."""
        if func.docstring:
            func.docstring.value = google(func.docstring.value, [parameter.name for parameter in func.parameters])


def google(text: str, parameters: Collection[str]) -> str:
    """Return a docstring with its aligned list of arguments, if it has one, in Google style."""
    before: list[str] = []
    arguments: list[str] = []
    after: list[str] = []
    for line in text.splitlines():
        column = COLUMN.fullmatch(line)
        if column and column[1] in parameters and not after:
            arguments.append(f"    {column[1]}: {column[2]}")
        elif arguments and not after and line.startswith("  "):
            arguments.append(f"        {line.strip()}")
        else:
            (after if arguments else before).append(line)
    if not arguments:
        return text
    return "\n".join([*before, "", "Args:", *arguments, "", *after])
