# SPDX-License-Identifier: MIT
"""C++ programs for tests: which compilers there are, and one build of each program a session."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers import ROOT, TESTS

SOURCES = TESTS / "cpp"
INCLUDE = ROOT / "cmfast" / "include"
STRICT = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Where AddressSanitizer cannot be: in a library that Python loads, and beside OpenVINO, which uses RTLD_DEEPBIND.
UNDEFINED = ("-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all")


@functools.cache
def compiler(name: str = "g++") -> str | None:
    """Return g++ or clang++ where there is one, of clang the newest that the system has."""
    names = ["clang++", *(f"clang++-{version}" for version in range(25, 13, -1))] if name == "clang++" else [name]
    return next(filter(None, map(shutil.which, names)), None)


def need_compiler(name: str = "g++") -> str:
    """Return a compiler, or skip the test by its name."""
    found = compiler(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def build(folder: Path, source: Path, *flags: str, by: str = "g++", name: str = "") -> Path:
    """Compile one file to a program in a folder, as strictly as CI; return it."""
    program = folder / (name or source.stem)
    command = [
        need_compiler(by),
        *STRICT,
        *(flags or ("-O1",)),
        f"-I{INCLUDE}",
        str(source),
        "-o",
        str(program),
        "-ldl",
    ]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return program


def call(program: Path, *arguments: object, given: bytes = b"", code: int = 0, **environment: str) -> bytes:
    """Return what a program writes; of one that is to fail, its one line on stderr."""
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        input=given,
        capture_output=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == code, done.stderr.decode(errors="replace")
    return done.stderr if code else done.stdout


def onnxruntime_library() -> Path:
    """Return the shared library inside the wheel of ONNX Runtime, or skip."""
    found = find_spec("onnxruntime")
    places = [Path(place) / "capi" for place in (found.submodule_search_locations or [])] if found else []
    libraries = [library for place in places for library in sorted(place.glob("libonnxruntime.so*"))]
    if not libraries:
        pytest.skip("needs onnxruntime")
    return libraries[0]
