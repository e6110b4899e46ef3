# SPDX-License-Identifier: MIT
"""`python -m cmfast`: where the C++ side of this installation is, for build systems and shells."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import click

from cmfast import __version__
from cmfast.errors import CmfastError

_PACKAGE = Path(__file__).resolve().parents[1]


def cmake_dir() -> Path:
    """Return the folder of cmfastConfig.cmake, for CMake's -Dcmfast_DIR."""
    return _PACKAGE / "cmake"


def include_dir() -> Path:
    """Return the folder that a C++ compiler is given with -I."""
    return _PACKAGE / "include"


def pkgconfig_dir() -> Path:
    """Return the folder of cmfast.pc, for PKG_CONFIG_PATH."""
    return _PACKAGE / "pkgconfig"


def library_of(package: str, folder: str, pattern: str) -> Path:
    """Return a shared library inside an installed package.

    Raises:
        CmfastError: the package is not installed, or has no such library.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise CmfastError(f"{package} is not installed in {sys.prefix}: pip install {package}")
    for place in found.submodule_search_locations:
        for library in sorted(Path(place, folder).glob(pattern)):
            return library
    raise CmfastError(f"{package} is installed without {folder}/{pattern}; install its wheel: pip install {package}")


def onnxruntime_library() -> Path:
    """Return the shared library of ONNX Runtime that its wheel brings, for CMFAST_ONNXRUNTIME."""
    pattern = {"win32": "onnxruntime.dll", "darwin": "libonnxruntime*.dylib"}.get(sys.platform, "libonnxruntime.so*")
    return library_of("onnxruntime", "capi", pattern)


def openvino_library() -> Path:
    """Return the library of OpenVINO's C interface that its wheel brings, for CMFAST_OPENVINO."""
    pattern = {"win32": "openvino_c.dll", "darwin": "libopenvino_c*.dylib"}.get(sys.platform, "libopenvino_c.so*")
    return library_of("openvino", "libs", pattern)


@click.command(name="python -m cmfast", no_args_is_help=True)
@click.option("--includes", is_flag=True, help="Compiler flags: -I and the folder of the headers.")
@click.option("--cmakedir", is_flag=True, help="Folder of cmfastConfig.cmake: cmake -Dcmfast_DIR=...")
@click.option("--pkgconfigdir", is_flag=True, help="Folder of cmfast.pc: PKG_CONFIG_PATH=...")
@click.option("--onnxruntime", is_flag=True, help="The shared library of ONNX Runtime: CMFAST_ONNXRUNTIME=...")
@click.option("--openvino", is_flag=True, help="The library of OpenVINO's C interface: CMFAST_OPENVINO=...")
@click.version_option(__version__)
def main(includes: bool, cmakedir: bool, pkgconfigdir: bool, onnxruntime: bool, openvino: bool) -> None:
    """Print where the C++ side of cmfast is installed, one line an option."""
    try:
        lines = [f"-I{include_dir()}"] if includes else []
        lines += [str(cmake_dir())] if cmakedir else []
        lines += [str(pkgconfig_dir())] if pkgconfigdir else []
        lines += [str(onnxruntime_library())] if onnxruntime else []
        lines += [str(openvino_library())] if openvino else []
    except CmfastError as err:
        print(f"cmfast: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    print("\n".join(lines))
