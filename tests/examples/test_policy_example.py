# SPDX-License-Identifier: MIT
"""The example of a robot's policy: a newcomer who follows its README gets there, in a run that is short."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

import cmfast
from helpers import ROOT

FOLDER = ROOT / "examples" / "policy"
MODULES = ("control", "evaluate", "network", "train", "world")  # its scripts, which import each other by these names
SHORT = {
    "train.py": ("--demonstrations", "64", "--teacher", "128", "--student", "128"),
    "evaluate.py": ("--episodes", "2"),
    "control.py": ("--cycles", "20"),
}

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs the repository")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Import the example's modules by the names that they have for their user, and forget them afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the commands of the README; return what each said, and the folder of the run."""
    folder, said = tmp_path_factory.mktemp("policy"), {}
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    python (\w+\.py [^#\n]*)", page, re.MULTILINE)
    assert len(page.splitlines()) <= 60
    assert [line.split()[0] for line in lines] == list(SHORT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in lines:
            words = [*shlex.split(line), *SHORT[line.split()[0]]]
            patch.setattr(sys, "argv", words)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                runpy.run_path(str(FOLDER / words[0]), run_name="__main__")
            said[words[0]] = printed.getvalue()
    return said | {"run": str(folder / "runs" / "policy")}


def test_the_commands_of_the_readme_say_what_the_policy_is_worth(followed: dict[str, str]) -> None:
    number = r"[\d.]+"
    for name in ("one step", "teacher, 18 Heun steps"):
        line = rf"{name}: {number}% reached the goal, {number}% collided; ({number}|nan)% of the successes passed"
        assert re.search(line, followed["evaluate.py"])
    assert re.match(rf"20 cycles at 50 Hz: p50 {number} ms, p99 {number} ms, worst {number} ms", followed["control.py"])


def test_two_files_plan_what_one_does_and_only_the_camera_sees_the_image(followed: dict[str, str]) -> None:
    import control
    import world

    run, scene = Path(followed["run"]), world.draw_scenes(1, np.random.default_rng(0))
    seen = {name: value[0] for name, value in world.observation(scene, scene.start, 0 * scene.start).items()}
    controller = control.Controller(run)
    controller.see(seen["image"])
    one = cmfast.load(run / "policy.onnx").sample(1, seed=3, conditions=seen)[0]
    np.testing.assert_allclose(controller.plan(seen["state"], 3), one * world.SCALE, atol=1e-5)  # rounding
    assert [each.name for each in onnx.load(run / "planner.onnx").graph.input] == ["noise", "state", "image_encoded"]


def test_the_control_loop_needs_no_pytorch(followed: dict[str, str]) -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import control, pathlib\n"
    code += f"control.loop(control.Controller(pathlib.Path({followed['run']!r})), 1000, 3)\n"
    code += "assert not {'torch', 'cmfast_train'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_task_has_two_ways_which_the_demonstrations_show_equally() -> None:
    import world

    rng = np.random.default_rng(0)
    scenes = world.draw_scenes(200, rng)
    for left in (False, True):
        driven = world.drive(scenes, world.expert(scenes, np.full(200, left)), rng)
        assert driven.success.all()
        assert (driven.left == left).all()
    shown = world.demonstrations(2000, rng)
    early = np.abs(shown["state"][:, 0] + 0.875) < 0.1  # drives that have just begun
    assert 0.4 < (shown["x"][early, 8, 1] > shown["x"][early, 0, 1]).mean() < 0.6


def test_a_policy_that_averages_the_two_ways_fails() -> None:
    import world

    scenes = world.draw_scenes(100, np.random.default_rng(0))
    ways = [world.expert(scenes, np.full(100, left)) for left in (False, True)]
    driven = world.drive(scenes, lambda seen: sum(way(seen) for way in ways) / 2, np.random.default_rng(1))
    assert not driven.success.any()


def test_the_figures_of_the_page_are_those_of_the_record_and_reach_the_bars() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "policy.json").read_text())
    page = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    assert record["commit"]["dirty"] is False
    assert record["episodes"] == 1000
    for seed in (0, 1, 2):
        one, teacher = (row for row in record["rows"] if row["seed"] == seed)
        ratio = one["success"] / teacher["success"]
        cells = [f"{row['success']:.1%} ({row['left']:.0%})" for row in (one, teacher)]
        assert f"| {seed} | {' | '.join(cells)} | {ratio:.3f} |" in page
        assert ratio >= 0.95
        assert 0.4 <= one["left"] <= 0.6
    for row in record["latency"]:
        cells = [f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['speed']:.2f}x"]
        assert f"| {row['call']} | {' | '.join(cells)} |" in page
    for row in record["loops"]:
        cells = [f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['worst_ms']:.1f}", str(row["late"])]
        assert f"| {row['loop']} | {' | '.join(cells)} |" in page
