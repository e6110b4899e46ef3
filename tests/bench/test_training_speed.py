# SPDX-License-Identifier: MIT
"""benchmarks/training.py: our loop beside the first public implementation's, which has to learn the same."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import BENCHMARKS

SCRIPT = BENCHMARKS / "training.py"
REFERENCE = os.environ.get("CMFAST_SEED", "")  # a clone of cloneofsimo/consistency_models, which has no licence

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the repository")


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Files in MNIST's format, sixteen images long."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = bytes(i % 251 for i in range(16 * 28 * 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 16, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 16) + bytes(16))
    return tmp_path / "data"


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_their_program_would_download_has_to_be_there(tmp_path: Path, mnist: Path) -> None:
    (tmp_path / "main.py").touch()
    missing = mnist / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    missing.unlink()
    done = run("--reference", tmp_path, "--data", mnist)
    assert done.returncode == 2
    assert f"{missing} is missing" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE, reason="CMFAST_SEED names no clone of cloneofsimo/consistency_models")
def test_both_loops_train_the_same_network_in_turns(tmp_path: Path, mnist: Path) -> None:
    size = ("--width", "64", "--batch", "4", "--rounds", "2")
    done = run("--reference", REFERENCE, "--data", mnist, *size, "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    theirs, *ours = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["contender"] for row in ours] == ["fp32", "bf16"]
    assert {row["parameters"] for row in (theirs, *ours)} == {1_641_098}
    for row in ours:
        assert row["multiplications"] < 0.55 * theirs["multiplications"]
        assert len(row["all_ms"]) == 2
    assert ours[0]["difference"]["gradient"] < 1e-4 < ours[1]["difference"]["gradient"]
