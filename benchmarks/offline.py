# SPDX-License-Identifier: MIT
"""Lets you use a checkout without installing it, on a machine without a network, as `make gpu` does.

    PYTHONPATH=$(python3 benchmarks/offline.py) python3 benchmarks/gpu.py smoke --out smoke.jsonl

An installation also registers which backend runs which file (entry points). This script writes them, from
pyproject.toml, into build/offline, and prints the four folders for PYTHONPATH, absolute, so that child processes in
other folders find them.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_metadata(folder: Path) -> Path:
    """Write the metadata of an installed cmfast into `folder`, for PYTHONPATH; return it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    lines = [
        line for name, entries in groups.items() for line in (f"[{name}]", *(f"{k} = {v}" for k, v in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    return folder


def python_path() -> str:
    """Return PYTHONPATH for a checkout that is not installed, made of absolute paths."""
    folders = (ROOT, ROOT / "train", ROOT / "export", write_metadata(ROOT / "build" / "offline"))
    return os.pathsep.join(map(str, folders))


if __name__ == "__main__":
    print(python_path())
