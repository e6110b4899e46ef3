# SPDX-License-Identifier: MIT
"""Triton's kernels without a card: interpreted on the CPU, and compiled for cards that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes of a block at most, by capability


def interpret(script: Path) -> Any:
    """Return what a script prints as JSON that runs kernels by Triton's interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def for_every_card(*kernels: Any) -> list[Any]:
    """Return pairs of a kernel and a capability, those slow that are neither the first kernel's nor for an H100."""
    return [
        pytest.param(kernel, capability, marks=[pytest.mark.slow] if kernel != kernels[0] and capability != 90 else [])
        for kernel in kernels
        for capability in SHARED
    ]


def wide_reads(
    function: Any, signature: dict[str, str], constants: dict[str, Any], capability: int, folder: Path, warps: int = 4
) -> int:
    """Compile a kernel for a capability; assert that it fits and spills nothing, return its loads of 16 bytes at once.

    signature  the type of each argument that is no constant; pointers and `dense` numbers are multiples of 16
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dense = [name for name, kind in signature.items() if kind.startswith("*") or name in ("channels", "values")]
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in dense}
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        compiled = triton.compile(
            ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )  # fmt: skip
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED[capability]
    assembler = (knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas).path
    target = f"sm_{capability}{'a' if capability >= 90 else ''}"
    (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
    told = subprocess.run(
        [assembler, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"],
        capture_output=True, text=True, cwd=folder, check=True,
    ).stderr  # fmt: skip
    assert " 0 bytes spill stores, 0 bytes spill loads" in told
    return len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]))
