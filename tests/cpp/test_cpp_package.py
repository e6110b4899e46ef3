# SPDX-License-Identifier: MIT
"""The C++ side as a user gets it: from the wheel, by the commands in docs/edge.md, outside the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cmfast
from cmfast.formats.selftest import record_selftest
from helpers import ROOT
from helpers.cpp import INCLUDE, STRICT, call, compiler, need_compiler, onnxruntime_library
from helpers.graphs import write_denoiser

# tensorrt.hpp needs NvInfer.h, which no package registry carries.
HEADERS = sorted(path.name for path in (INCLUDE / "cmfast").iterdir() if path.name != "tensorrt.hpp")
EXAMPLES = ROOT / "examples" / "cpp"


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like site-packages, with cmfast from its wheel and ONNX Runtime."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "No module named hatchling" in made.stderr:
        pytest.skip("needs hatchling")
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("cmfast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (folder / "site" / "onnxruntime").symlink_to(onnxruntime_library().parents[1])
    return folder / "site"


def environment(site: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CMFAST_", "ONNXRUNTIME_"))}
    return kept | {"PYTHONPATH": str(site), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def commands() -> list[str]:
    """Return the commands of docs/edge.md from `pip install` to a PNG."""
    page = (ROOT / "docs" / "edge.md").read_text()
    (block,) = re.findall(r"```bash\n(pip install .*?)```", page, re.DOTALL)
    return block.strip().splitlines()


def layouts(folder: Path) -> dict[str, dict[str, str]]:
    """Write ONNX Runtime as a release archive and as a system have it; return what finds each, and the wheel's."""
    release, system = folder / "onnxruntime-linux-x64-1.32.0", folder / "usr" / "local"
    for place in (release, system):
        (place / "lib").mkdir(parents=True)
        shutil.copyfile(onnxruntime_library(), place / "lib" / "libonnxruntime.so.1.32.0")
        for name in ("libonnxruntime.so.1", "libonnxruntime.so"):
            (place / "lib" / name).symlink_to("libonnxruntime.so.1.32.0")
    return {"wheel": {}, "release": {"ONNXRUNTIME_ROOT": str(release)}, "system": {"CMAKE_PREFIX_PATH": str(system)}}


def test_five_commands_lead_from_pip_install_to_the_png_that_python_draws(installed: Path, tmp_path: Path) -> None:
    """With the library of the wheel, of a release archive and of the system, which is copied beside the program."""
    need("cmake")
    need_compiler()
    five = commands()
    assert len(five) == 5
    assert five[0] == "pip install 'cmfast[cpu]'"  # what the fixture did
    shutil.copytree(EXAMPLES / "draw", tmp_path / "examples" / "cpp" / "draw")
    changes = {"shape": [3, 6, 5]}
    file = write_denoiser(tmp_path / "model.onnx", changes)
    write_denoiser(file, changes | {"selftest": record_selftest(cmfast.load(file), 1e-4)})
    wanted = cmfast.load(file).sample(8, steps=2, seed=0)
    wheels = installed / "onnxruntime"
    target = wheels.readlink()
    for layout, variables in layouts(tmp_path).items():
        if layout != "wheel":
            wheels.unlink(missing_ok=True)
        try:
            for command in five[1:]:
                if command.startswith("cmfast-info") and (layout != "wheel" or shutil.which("cmfast-info") is None):
                    continue
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=tmp_path,
                    env=environment(installed) | variables | {"CXXFLAGS": " ".join(STRICT)},
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, f"{layout}: {command}\n{done.stdout}{done.stderr}"
        finally:
            if not wheels.exists():
                wheels.symlink_to(target)
        images = np.asarray(Image.open(tmp_path / "images.png")).reshape(8, 6, 5, 3)
        np.testing.assert_array_equal(images, wanted, err_msg=layout)
        if layout == "release":  # what is installed elsewhere brings its library along
            placed = ["cmake", "--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "installed")]
            subprocess.run(placed, check=True, capture_output=True)
            drawn = tmp_path / "elsewhere.png"
            call(tmp_path / "installed" / "bin" / "draw", file, drawn, 2, CMFAST_ONNXRUNTIME="", LD_LIBRARY_PATH="")
            assert drawn.read_bytes() == (tmp_path / "images.png").read_bytes()
        for made in ("images.png", "build/draw", "build/libonnxruntime.so.1"):
            (tmp_path / made).unlink()  # the next layout makes them again, and compiles nothing


def test_the_library_of_a_release_archive_is_deployed_beside_the_program(installed: Path, tmp_path: Path) -> None:
    need("cmake")
    need_compiler()
    release = tmp_path / "release"
    (release / "lib").mkdir(parents=True)
    shutil.copyfile(onnxruntime_library(), release / "lib" / "libonnxruntime.so.1.32.0")
    (release / "lib" / "libonnxruntime.so").symlink_to("libonnxruntime.so.1.32.0")
    for arguments in (
        ["-S", str(EXAMPLES / "policy"), "-B", "build", f"-DONNXRUNTIME_ROOT={release}", "-DCMAKE_BUILD_TYPE=Release",
         f"-Dcmfast_DIR={installed / 'cmfast' / 'cmake'}", f"-DCMAKE_CXX_FLAGS={' '.join(STRICT)}"],
        ["--build", "build"],
    ):  # fmt: skip
        made = subprocess.run(["cmake", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    shutil.rmtree(release)
    seen = [{"name": name, "kind": "tensor", "shape": shape} for name, shape in (("state", [14]), ("image", [2, 3, 4]))]
    file = write_denoiser(tmp_path / "policy.onnx", {"shape": [16, 7], "data": "array", "conditions": seen})
    said = call(tmp_path / "build" / "policy", file, 500, 50).decode()
    assert re.fullmatch(r"50 steps at 500 Hz: p50 [\d.]+ ms, p99 [\d.]+ ms, worst [\d.]+ ms, \d+ late\n", said)


def configured(folder: Path, installed: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Configure a project of these lines with CMake; return what became of it."""
    (folder / "CMakeLists.txt").write_text("\n".join(["cmake_minimum_required(VERSION 3.20)", *lines, ""]))
    paths = ["-S", str(folder), "-B", str(folder / "b"), f"-Dcmfast_DIR={installed / 'cmfast' / 'cmake'}"]
    return subprocess.run(["cmake", *paths], capture_output=True, text=True)


def test_an_unknown_component_is_refused_by_its_name(installed: Path, tmp_path: Path) -> None:
    need("cmake")
    find = "find_package(cmfast CONFIG REQUIRED COMPONENTS cuda)"
    made = configured(tmp_path, installed, "project(p LANGUAGES NONE)", find)
    assert made.returncode != 0
    assert "no component cuda; there are onnxruntime, openvino, tensorrt and c" in made.stderr.replace("\n  ", " ")


def test_components_are_targets_and_the_one_whose_sdk_is_not_here_says_what_it_needs(
    installed: Path, tmp_path: Path
) -> None:
    need("cmake")
    need_compiler()
    made = configured(
        tmp_path, installed, "project(p LANGUAGES CXX)",
        "find_package(cmfast 0.1 CONFIG REQUIRED COMPONENTS onnxruntime openvino c)",
        "foreach(each cmfast onnxruntime openvino c)",
        "  if(NOT TARGET cmfast::${each})\n    message(FATAL_ERROR \"no target ${each}\")\n  endif()\nendforeach()",
        "find_package(cmfast CONFIG COMPONENTS onnxruntime OPTIONAL_COMPONENTS tensorrt)",
        'message(STATUS "found: ${cmfast_FOUND} ${cmfast_onnxruntime_FOUND} ${cmfast_tensorrt_FOUND}")',
        "find_package(cmfast CONFIG REQUIRED COMPONENTS tensorrt)",
    )  # fmt: skip
    if "found: 1 TRUE TRUE" in made.stdout:
        pytest.skip("TensorRT's SDK is here")
    assert "found: 1 TRUE FALSE" in made.stdout, made.stdout + made.stderr
    assert made.returncode != 0
    assert "tensorrt needs NvInfer.h, nvinfer and the CUDA toolkit: set TensorRT_ROOT" in " ".join(made.stderr.split())


def test_pkg_config_and_plain_compilers_find_the_headers(installed: Path, tmp_path: Path) -> None:
    need("pkg-config")
    (tmp_path / "p.cpp").write_text(
        "#include <cmfast/cmfast.hpp>\nint main() { return cmfast::Spec().sigmas_for(1).size() == 1 ? 0 : 1; }\n"
    )
    asked = {"PKG_CONFIG_PATH": str(installed / "cmfast" / "pkgconfig")}
    flags = call(Path("pkg-config"), "--cflags", "--libs", "cmfast", **asked).decode().split()
    includes = subprocess.run(
        [sys.executable, "-m", "cmfast", "--includes"],
        cwd=tmp_path,
        env=environment(installed),
        capture_output=True,
        text=True,
    )
    assert includes.stdout == f"-I{installed / 'cmfast' / 'include'}\n"
    for given in (flags, [*includes.stdout.split(), "-std=c++17"]):
        command = [need_compiler(), str(tmp_path / "p.cpp"), *given, "-o", str(tmp_path / "p")]
        subprocess.run(command, check=True)
        call(tmp_path / "p")


def test_versions_are_those_of_the_package() -> None:
    for name in ("cmake/cmfastConfigVersion.cmake", "pkgconfig/cmfast.pc"):
        assert cmfast.__version__ in (ROOT / "cmfast" / name).read_text()


@pytest.mark.parametrize("header", HEADERS)
def test_each_header_stands_alone_and_gives_no_warning(header: str, tmp_path: Path) -> None:
    (tmp_path / "p.cpp").write_text(f"#include <cmfast/{header}>\nint main() {{ return 0; }}\n")
    by = "clang++" if compiler("clang++") else "g++"  # of other tests' programs, too
    command = [need_compiler(by), *STRICT, "-fsyntax-only", f"-I{INCLUDE}", str(tmp_path / "p.cpp")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("source", ["cmfast/src/cmfast_c", "examples/cpp/draw/draw", "examples/cpp/policy/policy"])
def test_clang_gives_no_warning_either(source: str) -> None:
    command = [need_compiler("clang++"), *STRICT, "-fsyntax-only", f"-I{INCLUDE}", str(ROOT / f"{source}.cpp")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_examples_are_short() -> None:
    for file in EXAMPLES.rglob("*.c*"):
        assert len(file.read_text().splitlines()) < 80, file
