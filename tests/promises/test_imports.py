# SPDX-License-Identifier: MIT
"""The promises about what imports what, what starts without what, and what the wheel holds."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
import textwrap
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import cmfast
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]

STDLIB = sys.stdlib_module_names
BASE = {"numpy", "click", "rich", "PIL"}  # the dependencies of `pip install cmfast`
# Extras of the runtime: inside a function only.
LAZY = {"ncnn", "onnxruntime", "matplotlib", "tensorrt", "tensorrt_rtx", "cuda", "openvino", "ray"}
TRAIN = {"torch", "torchvision", "accelerate", "sklearn", "safetensors", "torchmetrics", "tensorboard"}
EXPORT = {"onnx", "onnxscript", "onnx_ir"}

# What a package may import: anywhere, and inside functions.
ARROWS = {
    "cmfast": (ROOT / "cmfast", BASE | {"cmfast"}, LAZY),
    "cmfast_train": (
        ROOT / "train" / "cmfast_train", BASE | TRAIN | {"cmfast", "cmfast_train"},
        {"diffusers", "matplotlib", "torch_fidelity"},
    ),
    "cmfast_export": (
        ROOT / "export" / "cmfast_export", BASE | TRAIN | EXPORT | {"cmfast", "cmfast_train", "cmfast_export"},
        LAZY | {"pnnx"},
    ),
}  # fmt: skip


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, top-level module, whether it is inside a function) of every import that runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef) and node.name == "lazily":
            continue  # imports modules of the package that calls it, which is the first argument of the call
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "lazily"
            and ast.unparse(node.args[0]) != "__name__"
        ):
            yield node.lineno, "(computed)", inside
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").split(".")[0] if not node.level else "(relative)", inside
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.JoinedStr) and "." in ast.unparse(first.values[0]):  # f"package.{module}"
                first = first.values[0]
            name = first.value if isinstance(first, ast.Constant) else "(computed)"
            yield node.lineno, str(name).split(".")[0], inside
        yield from imports(node, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def forbidden(source: str, allowed: set[str], lazy: set[str]) -> list[tuple[int, str]]:
    return [
        (line, module)
        for line, module, inside in imports(ast.parse(source))
        if module not in STDLIB and module not in allowed and not (inside and module in lazy)
    ]


@pytest.mark.parametrize("package", ARROWS)
def test_imports_only_go_along_the_arrows(package: str) -> None:
    folder, allowed, lazy = ARROWS[package]
    sources = sorted(folder.rglob("*.py"))
    assert len(sources) > 3
    wrong = {}
    for path in sources:
        here = {"triton"} if path.parent.name == "kernels" else set()  # which are imported inside functions only
        if found := forbidden(path.read_text(), allowed | here, lazy):
            wrong[str(path.relative_to(ROOT))] = found
    assert wrong == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", "torch"),
        ("import numpy, torch.nn as nn", "torch"),
        ("from cmfast_train.config.train_config import Phase", "cmfast_train"),
        ("def f():\n    import torch", "torch"),
        ("class A:\n    def f(self):\n        from cmfast_export import x", "cmfast_export"),
        ("try:\n    import torch\nexcept ImportError:\n    pass", "torch"),
        ("import onnxruntime", "onnxruntime"),
        ("from . import noise", "(relative)"),
        ("import importlib\nimportlib.import_module('torch')", "torch"),
        ("m = __import__('tor' + 'ch')", "(computed)"),
        ("m = __import__(f'{name}')", "(computed)"),
        ("m = __import__(f'torch.{name}')", "torch"),
        ("__getattr__, __dir__ = lazily('torch', _HOMES)", "(computed)"),
    ],
)
def test_the_walk_above_can_fail(source: str, found: str) -> None:
    _, allowed, lazy = ARROWS["cmfast"]
    assert [module for _, module in forbidden(source, allowed, lazy)] == [found]


def test_the_walk_allows_what_is_allowed() -> None:
    _, allowed, lazy = ARROWS["cmfast"]
    source = """
        from __future__ import annotations
        import os.path, numpy as np
        from typing import TYPE_CHECKING
        from cmfast.noise import gaussian
        if TYPE_CHECKING:
            import torch
        def open_it():
            import onnxruntime
    """
    assert forbidden(textwrap.dedent(source), allowed, lazy) == []


# What an import brings, and how long it takes.


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def brings(module: str, wanted: str) -> bool:
    result = python(f"import {module}, sys; print({wanted!r} in sys.modules)")
    return {"True\n": True, "False\n": False}[result.stdout]


EVERYTHING = "cmfast.model, cmfast.images, cmfast.formats.manifest, cmfast.sampling"  # what the public names come from


@pytest.mark.parametrize(
    "heavy", ["torch", "onnxruntime", "onnx", "cmfast_train", "cmfast_export", "matplotlib", "PIL"]
)
def test_the_runtime_does_not_import(heavy: str) -> None:
    assert not brings(EVERYTHING, heavy)


def test_the_check_above_can_fail() -> None:
    assert brings("json", "json")
    assert brings(EVERYTHING, "numpy")


def test_every_public_name_is_there_and_importing_the_package_alone_brings_none() -> None:
    assert not brings("cmfast", "numpy")
    for name in cmfast.__all__:
        assert getattr(cmfast, name).__name__ == {"EngineError": "BackendError"}.get(name, name)
        assert python(f"import cmfast; print(cmfast.{name}.__module__)").stdout.startswith("cmfast.")
    assert set(cmfast.__all__) <= set(dir(cmfast))
    with pytest.raises(AttributeError, match="'cmfast' has no attribute 'nothing'"):
        cmfast.nothing  # noqa: B018
    for module in ("noise", "backends", "schedule", "formats", "model", "errors", "sampling", "spec", "images"):
        assert python(f"import cmfast; print(cmfast.{module}.__name__)").stdout == f"cmfast.{module}\n"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which modules are compiled once, as an installer leaves them."""
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode"))}


def test_importing_the_runtime_takes_a_tenth_of_a_second(compiled: dict[str, str]) -> None:
    # CPU time, best of five: other programs on the machine are not what is measured. numpy is most of it, so a slow
    # machine is one on which numpy alone is slow.
    clock = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
    numpy_s, cmfast_s = (
        min(float(python(clock.format(module), **compiled).stdout) for _ in range(6))
        for module in ("numpy", EVERYTHING)
    )
    assert cmfast_s < max(0.15, 1.5 * numpy_s)


WITHOUT = "import sys; sys.modules.update(dict.fromkeys({!r})); from {} import {} as main; sys.argv[0] = {!r}; main()"
HEAVY = ["torch", "onnxruntime", "onnx", "onnx_ir", "onnxscript", "torchvision", "accelerate", "safetensors", "sklearn"]
HEAVY += ["openvino", "tensorrt", "tensorrt_rtx", "cuda", "torchmetrics", "torch_fidelity", "matplotlib", "ray"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_at_once_and_needs_no_extra(command: str, compiled: dict[str, str]) -> None:
    module, function = COMMANDS[command].split(":")
    code, seconds = WITHOUT.format(HEAVY, module, function, command), []
    for _ in range(4):  # the first compiles
        begun = time.perf_counter()
        result = python(code, "--help", **compiled)
        seconds.append(time.perf_counter() - begun)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"Usage: {command} ")
        assert "Examples:" in result.stdout
    # Half a second, the best of three; on a machine where Python itself takes long to start, ten times that.
    assert min(seconds[1:]) < max(0.5, 10 * least_time_of_python())


def least_time_of_python() -> float:
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        python("pass")
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("cmfast-train", ["digits", "--out", "run"], "torch, which is not installed: pip install 'cmfast[train]'"),
        ("cmfast-eval", ["model.pt", "--data-set", "digits"], "pip install 'cmfast[train]'"),
        ("cmfast-sample", ["model.pt"], "torch, which is not installed: pip install 'cmfast[train]'"),
        ("cmfast-sample", ["model.onnx"], "onnxruntime, which is not installed: pip install 'cmfast[cpu]'"),
        ("cmfast-sample", ["model.onnx", "--ray", "local"], "ray, which is not installed: pip install 'cmfast[ray]'"),
        ("cmfast-export", ["model.pt"], "which is not installed: pip install 'cmfast[export"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_named_with_the_line_that_installs_it(
    command: str,
    arguments: list[str],
    words: str,
    handmade_onnx: Callable[..., Path],
    refused: Callable[..., None],
    tmp_path: Path,
) -> None:
    (tmp_path / "model.pt").write_bytes(b"never opened")
    (tmp_path / "model.onnx").write_bytes(handmade_onnx().read_bytes())
    module, function = COMMANDS[command].split(":")
    code = f"import os; os.chdir({str(tmp_path)!r}); " + WITHOUT.format(HEAVY, module, function, command)
    refused(python(code, *arguments), words)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.pt"]


# The wheel.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("cmfast-*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_our_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cmfast", "cmfast_train", "cmfast_export"}


def test_the_wheel_holds_every_module_and_no_weights_but_the_small_models(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package, (folder, _, _) in ARROWS.items():
        assert {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")} <= names
    assert {
        f"cmfast_export/targets/web/assets/{name}" for name in ("index.html", "page.js", "cmfast/noise.js")
    } <= names
    assert "cmfast/backends/cuda/sampling.ptx" in names
    data_sets = ("cifar10", "fashion-mnist", "flowers32", "mnist")
    classifiers = {f"cmfast_train/evaluation/features_data/{name}.safetensors" for name in data_sets}
    shipped = {f"cmfast/models/{name}.onnx" for name in cmfast.models()}
    weights = {name for name in names if name.endswith((".pt", ".onnx", ".safetensors", ".png", ".pyc"))}
    assert weights == classifiers | shipped
    sizes = {info.filename: info.file_size for info in wheel.infolist()}
    assert all(sizes[name] < 1_000_000 for name in classifiers)
    assert sum(size for name, size in sizes.items() if name not in weights) < 2_400_000
    assert sum(info.compress_size for info in wheel.infolist()) < 12_000_000


def test_the_wheel_announces_its_commands_and_backends(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    text = wheel.read(name).decode()
    for command, target in COMMANDS.items():
        assert f"{command} = {target}\n" in text
    groups = configparser.ConfigParser()
    groups.read_string(text)
    suffixes = {"pt", "pth", "ckpt", "bin", "safetensors", "pkl", "folder"}
    assert groups["cmfast.backends"].keys() == groups["cmfast.describe"].keys() == suffixes
    for suffix in suffixes:  # each can be loaded
        for group in ("cmfast.backends", "cmfast.describe"):
            assert callable(EntryPoint(suffix, groups[group][suffix], group).load())


def requirement_names(requirements: list[Any]) -> set[str]:
    return {str(line).split(">")[0].split("[")[0] for line in requirements}


def test_the_base_depends_on_four_small_packages_and_no_onnxruntime() -> None:
    assert requirement_names(PROJECT["project"]["dependencies"]) == {"numpy", "pillow", "click", "rich"}
