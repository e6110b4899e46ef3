# SPDX-License-Identifier: MIT
"""Small trained models that come with cmfast, found by name.

    cmfast.models()            # the names
    cmfast.load("digits")      # as if it were the path of a file

`models/README.md` says what each was trained on, how good its samples are, and how to make it again.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "models"
SUFFIX = ".onnx"
NCNN = "model.param"


def models() -> tuple[str, ...]:
    """Return the names of the models that come with cmfast; `cmfast.load` takes them in place of a path."""
    return tuple(sorted(file.stem for file in FOLDER.glob(f"*{SUFFIX}")))


def find(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path, or the file of a model that comes with cmfast if `path` is its name.

    A name stands for such a model only where nothing on the disk has that name. A folder that was written for ncnn
    stands for the graph in it.
    """
    file = Path(path)
    if (file / NCNN).is_file():
        return file / NCNN
    known = file.name == str(file) and not file.suffix and file.name in models() and not os.path.lexists(file)
    return FOLDER / f"{file.name}{SUFFIX}" if known else file


def hidden(path: Path) -> str:
    """Return what to add to an error about a file or folder that has the name of a model that comes with cmfast."""
    same = path.name == str(path) and path.name in models()
    return f"; it hides the model {path.name} that comes with cmfast" if same else ""


def hint(file: Path) -> str:
    """Return what to add to "no such file" where a name may have been meant."""
    return "" if file.suffix or file.name != str(file) else f"; models that come with cmfast: {', '.join(models())}"
