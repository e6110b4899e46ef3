# SPDX-License-Identifier: MIT
"""What mkdocstrings must know of cmfast's style to build docs/api.md; mkdocs.yml loads it.

A field of a dataclass is described by the comment behind it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

COMMENT = re.compile(r"  # (?!type:|noqa|fmt:|pragma)(\S.*)$")


class Style(griffe.Extension):
    """Turns comments into docstrings once a package is loaded."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give each field without a docstring the comment behind it."""
        for attribute in cls.attributes.values():
            lines = attribute.source.splitlines()
            found = COMMENT.search(lines[0]) if lines and attribute.docstring is None else None
            if found:
                attribute.docstring = griffe.Docstring(found[1], parent=attribute)
