# SPDX-License-Identifier: MIT
"""onnxruntime-web, which a page runs on: where its npm package is, and which files of it are copied.

It is in the folder that was passed, in $CMFAST_ONNXRUNTIME_WEB, or in node_modules here or above, as Node.js looks it
up. With `fetch` npm downloads it. Nothing is downloaded otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from cmfast.errors import CmfastError, shown

PACKAGE = "onnxruntime-web"
TESTED = "1.30.0"  # what our tests run, and what `fetch` gets
VARIABLE = "CMFAST_ONNXRUNTIME_WEB"
# Of dist/. The build for WebGPU by promise integration: that by Asyncify is a WASM file of more than 25 MB.
WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU = ("ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.mjs", "ort-wasm-simd-threaded.jspi.wasm")
LICENCES = ("LICENSE", "ThirdPartyNotices.txt")
PATIENCE_S = 300.0  # for npm


@dataclass(frozen=True, kw_only=True)
class WebOptions:
    """What `--build` sets of a page.

    Attributes:
        onnxruntime_web: folder of the npm package; "": see this module.
        fetch: let npm download the package.
        webgpu: bring what WebGPU needs, 17 MB more. The page offers it, and uses it if it passes the self-test.
        title: of the page; "": the model's name.
    """

    onnxruntime_web: str = ""
    fetch: bool = False
    webgpu: bool = False
    title: str = ""


def check_runtime(options: WebOptions) -> None:
    """Raise CmfastError where the package is not found: before the work, not after it."""
    if options.fetch and options.onnxruntime_web:
        raise CmfastError("--build onnxruntime_web=FOLDER and --build fetch=true exclude each other; pass one")
    if options.fetch:
        _npm()
    else:
        _files(_find(options.onnxruntime_web), options)


@contextmanager
def runtime(options: WebOptions) -> Iterator[tuple[str, list[Path]]]:
    """Give the version of the package and the files that a page needs of it, licences among them.

    Raises:
        CmfastError: there is no such package, it lacks a file, or npm could not get it.
    """
    if not options.fetch:
        folder = _find(options.onnxruntime_web)
        yield _version(folder), _files(folder, options)
        return
    with TemporaryDirectory() as temporary:
        folder = _fetch(Path(temporary))
        yield _version(folder), _files(folder, options)


def _find(given: str) -> Path:
    """Return the package's folder."""
    if given or (given := os.environ.get(VARIABLE, "")):
        return _package(Path(given))
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "node_modules" / PACKAGE).is_dir():
            return _package(folder / "node_modules" / PACKAGE)
    raise CmfastError(
        f"a page needs {PACKAGE}, which is not in node_modules here or above; npm install {PACKAGE}@{TESTED}, or name "
        "its folder, --build onnxruntime_web=FOLDER, or let npm fetch it: --build fetch=true"
    )


def _package(folder: Path) -> Path:
    """Return the folder if it is the package's; node_modules, or what holds it, stand for the package inside."""
    for inner in (folder, folder / PACKAGE, folder / "node_modules" / PACKAGE):
        if (inner / "package.json").is_file() and (inner / "dist").is_dir():
            _version(inner)
            return inner
    raise CmfastError(f"{folder} is not the folder of {PACKAGE}: there is no package.json beside a dist/ in it")


def _version(folder: Path) -> str:
    try:
        about = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    name, version = (about.get(key) if isinstance(about, dict) else None for key in ("name", "version"))
    if name != PACKAGE:
        raise CmfastError(f"{folder} is not the folder of {PACKAGE}: its package.json names {shown(name)}")
    return str(version)


def _files(folder: Path, options: WebOptions) -> list[Path]:
    """Return the files to copy."""
    files = [folder / "dist" / name for name in (*WASM, *(WEBGPU if options.webgpu else ()))]
    for file in files:
        if not file.is_file():
            raise CmfastError(
                f"{folder}: {PACKAGE} {_version(folder)} has no dist/{file.name}; npm install {PACKAGE}@{TESTED}"
            )
    return [*files, *_licences(folder)]


def _licences(folder: Path) -> list[Path]:
    """Return the licence and the notices: of the package, else, where it brings none, of ONNX Runtime's for Python."""
    found = find_spec("onnxruntime")
    places = [folder, *(Path(place) for place in (found.submodule_search_locations or [] if found else []))]
    found_at = {name: next((place for place in places if (place / name).is_file()), None) for name in LICENCES}
    files = [place / name for name, place in found_at.items() if place is not None]
    if not any(file.name == LICENCES[0] for file in files):
        raise CmfastError(
            f"{folder} has no {LICENCES[0]}, and a copy of {PACKAGE} must come with it; put the licence of "
            "github.com/microsoft/onnxruntime there"
        )
    return files


def _npm() -> str:
    if (npm := shutil.which("npm")) is None:
        raise CmfastError(
            f"--build fetch=true needs npm, which is not in PATH; install Node.js, or copy {PACKAGE} here"
        )
    return npm


def _fetch(folder: Path) -> Path:
    """Let npm download the package into an empty folder, and return where it was unpacked."""
    command = [_npm(), "pack", f"{PACKAGE}@{TESTED}", "--pack-destination", str(folder), "--loglevel", "error"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise CmfastError(f"npm took more than {PATIENCE_S:g} s to get {PACKAGE}; stopped") from None
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        said = " ".join(done.stderr.split())[:200]
        raise CmfastError(f"npm could not get {PACKAGE}@{TESTED}: {said or 'it wrote no archive'}")
    needed = {f"package/dist/{name}" for name in (*WASM, *WEBGPU)} | {f"package/{name}" for name in LICENCES}
    with tarfile.open(archives[0]) as archive:
        members = [each for each in archive if each.name in {*needed, "package/package.json"}]
        archive.extractall(folder, members=members, filter="data")
    return _package(folder / "package")
