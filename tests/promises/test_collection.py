# SPDX-License-Identifier: MIT
"""`pytest -m gpu` collects on a machine that has PyTorch and little else, and skips only what cannot run there."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from helpers import BENCHMARKS, HELPERS, ROOT, TESTS, only_installed
from helpers.only_installed import OPTIONAL

OURS = {"cmfast", "cmfast_train", "cmfast_export"}
# What comes with those that are installed: scipy with scikit-learn, the rest with pytest.
THERE = {"PIL", "sklearn", "scipy", "_pytest"} | set(only_installed.INSTALLED)


def collected(*files: str) -> subprocess.CompletedProcess[str]:
    """Collect the GPU tests of some files, or of all, where only `only_installed.INSTALLED` are."""
    plugins = ("helpers.only_installed", "pytest_timeout", "_hypothesis_pytestplugin")
    command = [sys.executable, "-m", "pytest", *(f"-p{name}" for name in plugins), "-m", "gpu", "--collect-only", "-q"]
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
    environment.pop("PYTEST_ADDOPTS", None)
    targets = [str(TESTS / file) for file in files] or [str(TESTS)]
    return subprocess.run([*command, *targets], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)


def test_gpu_tests_are_collected_where_packages_of_the_export_are_missing() -> None:
    result = collected("gpu/test_gpu.py", "export/test_to_triton.py", "training/networks/test_dropout.py")
    assert result.returncode == 0, result.stdout[-2000:]
    assert "test_gpu.py::test_two_steps_of_training_have_finite_losses_in_every_precision[edm-bf16]" in result.stdout
    assert "test_gpu.py::test_pytorch_says_what_a_loop_cost[cuda_graph]" in result.stdout


@pytest.mark.slow
def test_all_gpu_tests_are_collected_where_packages_of_the_export_are_missing() -> None:
    result = collected()
    assert result.returncode == 0, result.stdout[-2000:]


def test_the_imitated_machine_lacks_what_it_is_to_lack() -> None:
    missing = only_installed.missing()
    assert {"onnx_ir", "onnxscript", "tritonclient", "torchvision", "diffusers", "cuda"} <= missing
    assert not missing & {"torch", "numpy", "onnx", "onnxruntime", "sklearn", "accelerate", *OURS}


@pytest.mark.parametrize("file", sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")))
def test_a_test_module_imports_what_is_there_or_known_to_be_optional(file: str) -> None:
    beside = {path.stem for folder in (HELPERS, BENCHMARKS) for path in folder.rglob("*.py")}
    known = sys.stdlib_module_names | beside | {"helpers"} | OURS | THERE | OPTIONAL
    for node in ast.parse((TESTS / file).read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= known, f"line {node.lineno}: import it inside the tests"
