# SPDX-License-Identifier: MIT
"""Write docs/cli.md: what each command prints with --help.

python docs/make_cli.py            # a test fails when the page differs
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
HEAD = """\
<!-- Written by docs/make_cli.py from --help: change the command, then run the script again. -->
# Commands

A command exits with 0 on success, 1 when a check fails, and 2 when the request cannot be fulfilled. An error is one
line on stderr: what it got, what it needs, what to type.
"""
# The entry point itself, called as the installed script calls it, so that a checkout that is not installed works too.
CALL = "import sys; from {module} import {name} as run; sys.argv = ['{command}', '--help']; run()"


def scripts() -> dict[str, str]:
    """Return the commands that the package installs, each with its entry point, in the order of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project["scripts"])


def help_of(command: str, target: str) -> str:
    """Return what `command --help` prints in a terminal of 80 columns."""
    module, _, name = target.partition(":")
    environment = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    code = CALL.format(module=module, name=name, command=command)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    return "\n".join(line.rstrip() for line in result.stdout.decode().splitlines())


def page() -> str:
    """Return the whole page: a section for each command."""
    sections = (f"\n## {name}\n\n```text\n{help_of(name, target)}\n```\n" for name, target in scripts().items())
    return HEAD + "".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
