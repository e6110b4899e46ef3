# SPDX-License-Identifier: MIT
"""What images a folder or a .zip holds, and of which class each is.

    ROOT/class/name.png               a class per folder, in the order of the names; names that are numbers as numbers
    ROOT/00000/img00000000.png, ROOT/dataset.json    what EDM's and StyleGAN's dataset_tool write; dataset.json has the
                                      labels, {"labels": [["00000/img00000000.png", 6], ...]}, or null
    ROOT/name.png                     no classes

Hidden files and folders, and those that systems put beside images, are left out. `image_reader` reads the files.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmfast.conditions import MAX_NAME
from cmfast.errors import CmfastError, CmfastWarning, printable
from cmfast_train.border import naming, reading
from cmfast_train.data.image_reader import MAX_FILE

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LABELS = "dataset.json"  # of dataset_tool
OTHERS = frozenset({"__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})


@dataclass(frozen=True, kw_only=True)
class Found:
    """The images of a folder or .zip by their names in it, with the class of each."""

    files: tuple[tuple[str, int], ...]  # name with slashes, class
    classes: int = 0  # 0: they have none
    class_names: tuple[str, ...] = ()


def find_images(root: Path, classes: Mapping[str, int] | None = None, *, labelled: bool = True) -> Found:
    """Return the images of a folder.

    Args:
        root: The folder.
        classes: The class of each folder that is read; default: every folder is one.
        labelled: Whether classes are needed; without, nothing is required of dataset.json and of empty folders.

    Raises:
        CmfastError: There are no images, a class has none, or dataset.json does not fit; one line with the place.
    """
    with naming(root):
        if classes is None and os.path.lexists(root / LABELS):
            files = _walk(root, root)
            if not labelled:
                return _unlabelled(files, root / LABELS)
            if not (root / LABELS).is_file():  # its folders are no classes, whatever is wrong with it
                raise CmfastError(f"{root / LABELS}: {_no_file(root / LABELS)}")
            return _labelled(files, _read_bounded(root / LABELS), root / LABELS)
        if classes is not None:
            folders = {name: _walk(root / name, root) if (root / name).is_dir() else [] for name in classes}
            return _by_class(root, folders, classes, (), labelled)
        direct, names, others = _entries(root)
        folders = {name: _walk(root / name, root) for name in _sorted(names)}
        return _whole(root, folders, direct, others, labelled)


def find_zipped(file: Path, archive: zipfile.ZipFile, *, labelled: bool = True) -> Found:
    """Return the images of a .zip, laid out as a folder is, or within one folder that holds everything.

    Args:
        labelled: see `find_images`
    """
    with reading(file, "not a whole .zip file"):  # a name can be empty, which zipfile's is_dir does not survive
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
    shown = {name: entry for name, entry in entries.items() if not any(map(is_hidden, name.split("/")))}
    for name, entry in shown.items():
        if entry.flag_bits & 1:
            raise CmfastError(f"{file}: {printable(name)} in it is encrypted; make the .zip without a password")
    prefix = _common_folder(list(shown))
    names = [name.removeprefix(prefix) for name in shown]
    images = sorted((name for name in names if is_image(name)), key=lambda name: (name.rpartition("/")[0], name))
    if LABELS in names and not labelled:
        found = _unlabelled(images, f"{file}: {LABELS}")
    elif LABELS in names:
        entry = shown[prefix + LABELS]
        if entry.file_size > MAX_FILE:
            raise CmfastError(f"{file}: {LABELS} in it has {entry.file_size:,} bytes, at most {MAX_FILE:,} are read")
        with reading(file, "not a whole .zip file"):
            text = archive.read(entry)
        found = _labelled(images, text, f"{file}: {LABELS}")
    else:
        folders: dict[str, list[str]] = {name.split("/")[0]: [] for name in names if "/" in name}
        for name in images:
            if "/" in name:
                folders[name.split("/")[0]].append(name)
        direct = [name for name in images if "/" not in name]
        others = sum("/" not in name for name in names) - len(direct)
        found = _whole(file, {name: folders[name] for name in _sorted(folders)}, direct, others, labelled)
    files = tuple((prefix + name, label) for name, label in found.files)
    return Found(files=files, classes=found.classes, class_names=found.class_names)


def is_image(name: str) -> bool:
    """Whether a file's name ends as images' do."""
    return name.lower().endswith(SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's data: .ipynb_checkpoints, ._name.png, __MACOSX, ..."""
    return name.startswith(".") or name in OTHERS


def check_labels(labels: list[int], what: object) -> int:
    """Return the number of classes of whole-number labels, 0 and up."""
    least, most = min(labels), max(labels)
    if least < 0:
        raise CmfastError(f"{what}: the label {least} is negative; classes are numbered from 0")
    if most >= max(len(labels), 2):
        raise CmfastError(f"{what}: the label {most} is too large for {len(labels)} images; classes are 0, 1, 2, ...")
    unused = sorted(set(range(most + 1)) - set(labels))
    if unused:
        few = ", ".join(map(str, unused[:3])) + (", .." if len(unused) > 3 else "")
        warnings.warn(
            f"{what}: {len(unused)} of the {most + 1} classes have no image ({few}), so the model will draw them "
            "without having seen any; number the labels without gaps",
            CmfastWarning,
            stacklevel=2,
        )
    return most + 1


def printable_names(names: tuple[str, ...], what: object) -> tuple[str, ...]:
    """Return the names if a checkpoint can carry them, else () and a warning."""
    odd = [name for name in names if not (0 < len(name) <= MAX_NAME and name.isprintable())]
    if not odd:
        return names
    warnings.warn(
        f"{what}: the class name {odd[0][:40]!r} is not 1 to {MAX_NAME} printable characters, so the model gets no "
        "class names; rename the folder",
        CmfastWarning,
        stacklevel=2,
    )
    return ()


def walk(root: Path) -> list[Path]:
    """Return the visible image files below a folder, in the order of their names."""
    return sorted(root / name for name in _walk(root, root))


def _whole(root: Path, folders: Mapping[str, list[str]], direct: list[str], others: int, labelled: bool) -> Found:
    """Return the images by class, or those of the root where no folder has any."""
    full = [name for name, files in folders.items() if files]
    if full and direct:
        one = printable(direct[0])
        warnings.warn(
            f"{root}: {len(direct)} images lie beside the class folders and are not read; {one} is one",
            CmfastWarning,
            stacklevel=2,
        )
    if direct and not full:
        return Found(files=tuple((name, 0) for name in sorted(direct)))
    if not full:
        why = f"{len(folders)} folders without images" if folders else f"no folders, {others} other files"
        raise CmfastError(
            f"{root} is not a folder of images by class (ROOT/class/name.png): it has {why}; images end in "
            f"{', '.join(SUFFIXES)}"
        )
    names = tuple(folders)
    return _by_class(root, folders, {name: label for label, name in enumerate(names)}, names, labelled)


def _by_class(
    root: Path, folders: Mapping[str, list[str]], classes: Mapping[str, int], names: tuple[str, ...], labelled: bool
) -> Found:
    if not labelled:
        return Found(files=tuple((file, 0) for files in folders.values() for file in files))
    empty = sorted(name for name, files in folders.items() if not files)
    if empty:
        few = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        raise CmfastError(
            f"{root} is not a folder of images by class (ROOT/class/name.png): no image in the folder(s) {few}; remove "
            "them, or put images there"
        )
    files = tuple((file, classes[name]) for name in folders for file in folders[name])
    return Found(files=files, classes=len(set(classes.values())), class_names=printable_names(names, root))


def _entries(root: Path) -> tuple[list[str], list[str], int]:
    """Return the images directly in a folder, its folders, and the number of other files; all visible."""
    direct, folders, others = [], [], 0
    with os.scandir(root) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image(entry.name) and _is_there(entry):
                direct.append(entry.name)
            else:
                others += 1
    return direct, folders, others


def _walk(folder: Path, root: Path) -> list[str]:
    """Return the images below a folder by their names in root: folder by folder, files in the order of their names.

    Links are followed, but not into a folder that the link lies in: that would go round and round.
    """
    found: dict[str, list[str]] = {}
    rest = [(str(folder), frozenset({_identity(root)}) if folder != root else frozenset())]
    while rest:
        place, above = rest.pop()
        own = _identity(place)
        if own in above:
            continue
        files = []
        with os.scandir(place) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    rest.append((entry.path, above | {own}))
                elif is_image(entry.name) and _is_there(entry):
                    files.append(entry.path)
        found[place] = sorted(files)
    start = len(str(root).rstrip(os.sep)) + 1 if str(root) != "." else 0
    paths = (path for place in sorted(found) for path in found[place])
    return [_below(path, root, start) for path in paths]


def _is_there(image: os.DirEntry[str]) -> bool:
    """Whether an image is a file; a link to nothing is refused, as the data would be less than they look."""
    if image.is_file():
        return True
    if image.is_symlink():
        raise CmfastError(f"{printable(image.path)}: {_no_file(Path(image.path))}")
    return False


def _no_file(path: Path) -> str:
    """Return what something is that should be a file."""
    if path.is_symlink() and not path.exists():
        return "a link to a file that is not there; get the file (git annex get, or copy it: cp -L), or remove the link"
    return "not a regular file; replace it, or remove it"


def _below(path: str, root: Path, start: int) -> str:
    return (os.path.relpath(path, root) if not start else path[start:]).replace(os.sep, "/")


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _sorted(names: Any) -> list[str]:
    """Return the names in order: as numbers where all are, else as text."""
    if all(name.isascii() and name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _common_folder(names: list[str]) -> str:
    """Return the folder, with its slash, that everything is in while that folder holds folders or dataset.json."""
    tops = {name.split("/")[0] for name in names}
    if len(tops) != 1 or not all("/" in name for name in names):
        return ""
    top = f"{tops.pop()}/"
    inside = [name.removeprefix(top) for name in names]
    return top if LABELS in inside or all("/" in name for name in inside if is_image(name)) else ""


def _read_bounded(file: Path) -> bytes:
    if file.stat().st_size > MAX_FILE:
        raise CmfastError(f"{file}: {file.stat().st_size:,} bytes, at most {MAX_FILE:,} are read")
    return file.read_bytes()


def _unlabelled(files: list[str], what: object) -> Found:
    """Return the files without classes, in the order of their names; `what` names the file beside them."""
    if not files:
        raise CmfastError(f"{what}: no images beside it; they end in {', '.join(SUFFIXES)}")
    return Found(files=tuple((name, 0) for name in sorted(files)))


def _labelled(files: list[str], text: bytes, what: object) -> Found:
    """Return the files with the labels of dataset.json, in the order of their names, as dataset_tool's readers do."""
    with reading(what, "not JSON"):
        content = json.loads(text)
    if not isinstance(content, dict) or "labels" not in content:
        raise CmfastError(
            f'{what}: not what dataset_tool writes, which is {{"labels": [["00000/img00000000.png", 6], ..]}}; rename '
            "the file if the folders are the classes"
        )
    found, pairs = _unlabelled(files, what), content["labels"]
    if pairs is None:
        return found
    files = [name for name, _ in found.files]
    if not isinstance(pairs, list):
        raise CmfastError(f"{what}: its labels are a {type(pairs).__name__}, not a list of [name, label]")
    labels: dict[str, int] = {}
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int):
            raise CmfastError(f"{what}: {json.dumps(pair)[:80]} is not [name, label] with a whole number as the label")
        if labels.setdefault(pair[0], pair[1]) != pair[1]:
            raise CmfastError(f"{what}: {printable(pair[0])} has two labels, {labels[pair[0]]} and {pair[1]}")
    have = set(files)
    unlabelled, absent = [n for n in files if n not in labels], [n for n in labels if n not in have]
    if unlabelled:
        raise CmfastError(
            f"{what}: {len(unlabelled)} of {len(files)} images have no label, {printable(unlabelled[0])} is one"
        )
    if absent:
        raise CmfastError(f"{what}: {len(absent)} of its images are not there, {printable(absent[0][:80])} is one")
    return Found(files=tuple((n, labels[n]) for n in files), classes=check_labels(list(labels.values()), what))
