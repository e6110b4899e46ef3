# SPDX-License-Identifier: MIT
"""benchmarks/fuzz_cpp.py: what counts as a finding, and a folder by a relative path, as `make fuzz-cpp` passes it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

HOME = {"PATH": os.environ["PATH"]}


@pytest.fixture
def fuzz_cpp(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("fuzz_cpp")


def test_a_program_that_hangs_is_a_finding(fuzz_cpp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_cpp, "HANGS_S", 0.2)
    outcome, said = fuzz_cpp.opened_by([sys.executable, "-c", "import time; time.sleep(60)"], HOME)
    assert (outcome, said) == ("findings", "it did not end within 0.2 s")


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("pass", "opened"),
        ("import sys; sys.exit('x')", "findings"),  # 1: neither 0 nor 2
        ("import os, sys; print('one line', file=sys.stderr); sys.exit(2)", "refused"),
        ("import sys; print('two\\nlines', file=sys.stderr); sys.exit(2)", "findings"),
        ("import os; os.abort()", "findings"),
        ("import sys; print('a sanitizer speaks', file=sys.stderr)", "findings"),
    ],
)
def test_only_a_result_or_one_line_is_no_finding(fuzz_cpp: Any, code: str, outcome: str) -> None:
    assert fuzz_cpp.opened_by([sys.executable, "-S", "-c", code], HOME)[0] == outcome


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_a_relative_folder_keeps_the_programs(
    fuzz_cpp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_cpp, "CORPUS", ("manifest",))
    done = call(lambda: fuzz_cpp.run_command(fuzz_cpp.command), "--inputs", 20, "--folder", "runs/fuzz")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "fuzz" / "fuzz").is_file()
