# SPDX-License-Identifier: MIT
"""Shards drawn by workers of a Ray cluster on this machine: the images of one process, also when a worker is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast.cli.sample import main
from cmfast.shards.files import read_shards
from cmfast_train.cli.evaluate import main as evaluate
from helpers.graphs import write_denoiser

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install 'cmfast[ray]'"),
    pytest.mark.filterwarnings("ignore"),  # of Ray's own
]
Call = Callable[..., Any]

KILLS = """
import os, signal, sys
from cmfast.cli.running import run_command
from cmfast.cli.sample import command
from cmfast.shards import on_ray

draw = on_ray.Workers.draw


def killing(self, request, parts):
    pids = self._ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in self.actors])
    for number, drawn in enumerate(draw(self, request, parts)):
        if number == 1:
            os.kill(pids[0], signal.SIGKILL)
        yield drawn


on_ray.Workers.draw = killing
run_command(command)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    label = {"name": "label", "kind": "class", "classes": 10}
    return write_denoiser(tmp_path_factory.mktemp("model") / "model.onnx", {"conditions": [label]})


def test_a_cluster_draws_what_one_process_draws_and_a_killed_worker_loses_nothing(model: Path, tmp_path: Path) -> None:
    options = [str(model), "-n", "1200", "--steps", "2", "--shard", "100", "--batch", "50", "-o", "samples"]
    command = [sys.executable, "-c", KILLS, *options, "--ray", "local"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = "samples: 12 shard(s) drawn, 0 there before: 2 step(s) at 80, 0.8, ONNX Runtime cpu on "
    assert done.stdout.startswith(said)
    assert len(done.stdout.splitlines()) == 1
    assert "A worker died or was killed" in done.stderr  # Ray's words
    samples, labels = read_shards(tmp_path / "samples")
    loaded = cmfast.load(model)
    np.testing.assert_array_equal(samples, loaded.sample(1200, steps=2, batch=50))
    np.testing.assert_array_equal(labels, loaded.labels(1200))


def test_an_evaluation_of_samples_from_a_cluster_has_the_numbers_of_one_process(call: Call, tmp_path: Path) -> None:
    rows = []
    for options in ([], ["--ray", "local"]):
        out = tmp_path / "eval.json"
        command = ["digits", "--data-set", "digits", "--metrics", "fd", "--steps", 2, "-n", 300, "--json", out]
        assert call(evaluate, *command, *options).returncode == 0
        rows += json.loads(out.read_text())["rows"]
    assert rows[0].pop("ms_per_image") > 0
    assert rows[0] == rows[1]


def test_there_is_no_cluster_to_find(
    call: Call, refused: Call, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    refused(call(main, model, "-n", 4, "--ray", "auto", "-o", tmp_path / "s"), "no Ray cluster at 'auto'")
    assert os.listdir(tmp_path) == []
