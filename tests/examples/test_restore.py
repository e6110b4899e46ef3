# SPDX-License-Identifier: MIT
"""The example of restoring images: a newcomer who follows its README gets there, in a run that is short."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from helpers import BENCHMARKS, ROOT

FOLDER = ROOT / "examples" / "restore"
MODULES = ("compare", "images", "network", "restore", "train")  # its scripts, which import each other by these names
SHORT = ("--teacher", "64", "--student", "64")

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the repository")


def commands(page: str) -> list[list[str]]:
    """Return the words of the indented lines of a README that start one of its scripts."""
    return [shlex.split(line) for line in re.findall(r"^    python (\S+\.py .*)$", page, re.MULTILINE)]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one of the scripts as Python does, in this process, which has torch already."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    runpy.run_path(str(FOLDER / words[0]), run_name="__main__")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the commands of the README one after the other; return the folder of the runs."""
    folder = tmp_path_factory.mktemp("restore")
    (folder / "photographs").mkdir()
    for i, digit in enumerate(load_digits().images[:1000]):  # of the same spread: traced once
        Image.fromarray(np.uint8(digit * 15.9)).save(folder / "photographs" / f"{i:04d}.png")
    forget_scripts()  # those of another example may have the same names
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commands((FOLDER / "README.md").read_text(encoding="utf-8")):
            run([*words, *(SHORT if words[0] == "train.py" else ())], patch)
    forget_scripts()
    return folder / "runs"


def forget_scripts() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_the_commands_of_the_readme_leave_what_it_says(followed: Path) -> None:
    names = [file.name for file in sorted((followed / "digits" / "original").iterdir())]
    assert len(names) == 180
    for kind, side in (("low", 4), ("original", 8), ("restored", 8), ("mean", 8), ("expected", 8)):
        assert [file.name for file in sorted((followed / "digits" / kind).iterdir())] == names
        assert pixels(followed / "digits" / kind / names[0]).shape == (side, side)
    assert pixels(followed / "digits" / "compare.png").shape == (4 * 66, 8 * 66)
    assert (followed / "photographs" / "restore.onnx").exists()


def test_restored_images_keep_the_averages_that_the_low_resolution_has(followed: Path) -> None:
    for file in sorted((followed / "digits" / "low").iterdir())[:20]:
        restored = pixels(followed / "digits" / "restored" / file.name).astype(float)
        inside = (restored > 0) & (restored < 255)
        blocks = restored.reshape(4, 2, 4, 2)
        kept = inside.reshape(4, 2, 4, 2).all(axis=(1, 3))  # where nothing was clipped
        difference = np.abs(blocks.mean(axis=(1, 3)) - pixels(file))[kept]
        assert difference.size == 0 or difference.max() <= 0.5  # four pixels, each rounded by up to half a level


def test_restoring_needs_no_pytorch(followed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None  # an import fails\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        f"runpy.run_path({str(FOLDER / 'restore.py')!r}, run_name='__main__')\n"
    )
    model, low, out = followed / "digits" / "restore.onnx", followed / "digits" / "low", tmp_path / "restored"
    told = [sys.executable, "-c", code, str(model), str(low), "-o", str(out)]
    done = subprocess.run(told, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in sorted((followed / "digits" / "restored").iterdir()):
        np.testing.assert_array_equal(pixels(out / file.name), pixels(file))  # the same file, the same seed


def test_the_readme_has_at_most_60_lines_and_its_links_are_files() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 60
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert [link for link in links if "://" not in link and not (FOLDER / link).exists()] == []
    assert {words[0] for words in commands(page)} == {"train.py", "restore.py", "compare.py"}
    assert set(re.findall(r"^\| `(\w+)\.py` \|", page, re.MULTILINE)) == set(MODULES)


def test_the_table_of_the_page_is_that_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    record = json.loads((BENCHMARKS / "results" / "restore.json").read_text(encoding="utf-8"))
    lines = importlib.import_module("restore").table(record)
    assert len(lines) == 9
    assert "\n".join(lines) in (ROOT / "docs" / "restore.md").read_text(encoding="utf-8")
    for found in record["data"].values():
        assert not found["commit"]["dirty"]
        assert max(row["gain"] for row in found["rows"]) >= 1.5  # dB: what the example is for
        assert found["cpu_s"] <= 1800  # 15 minutes on two cores
