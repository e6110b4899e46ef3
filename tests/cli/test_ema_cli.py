# SPDX-License-Identifier: MIT
"""cmfast-ema: the file that it makes of a run's snapshots, and one line for a run that it cannot use."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cmfast_train.cli.ema import main
from cmfast_train.training.ema import Averages
from helpers.full_disk import files_of_at_most

STDS, WANTED = (0.05, 0.1), 0.15
BATCH, STEPS, EVERY = 4, 400, 100  # images; steps


@pytest.fixture(scope="module")
def trained(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """Return the folder of a run with snapshots, and the average of width WANTED at its end; treat as read-only."""
    run, start = tmp_path_factory.mktemp("run"), load_checkpoint(tiny_checkpoint(0))
    (run / "ema").mkdir()
    (run / "config.json").write_text(json.dumps({"batch": BATCH}))
    weights = {name: tensor.clone() for name, tensor in start.weights.items()}
    averages, generator = Averages(weights, stds=(*STDS, WANTED)), torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for tensor in weights.values():
            tensor.add_(torch.randn((), generator=generator), alpha=0.1)
        averages.update(weights, step)
        if (step + 1) % EVERY == 0:
            for std in STDS:
                source = {"format": "cmfast", "ema_std": std, "ema_step": step + 1}
                snapshot = dataclasses.replace(start, weights=averages[f"std{std}"], source=source)
                save_checkpoint(snapshot, run / "ema" / f"std{std:.3f}-{(step + 1) * BATCH:012d}.pt")
    return run, averages[f"std{WANTED}"]


@pytest.fixture
def run_folder(trained: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """Return a run with snapshots that a test may change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def snapshots(folder: Path) -> list[Path]:
    return sorted((folder / "ema").iterdir())


def test_it_writes_the_average_that_training_would_have_kept(
    trained: tuple[Path, dict[str, Tensor]], run_folder: Path, call: Callable[..., Any]
) -> None:
    result = call(main, run_folder, "--std", WANTED)
    out = run_folder / "model_std0.15.pt"
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{out}: std 0.15 at step 400, of 8 snapshots of std 0.05, 0.1; profile error ")
    assert result.stdout.splitlines()[-1] == f"next: cmfast-export {out}"
    written, snapshot = load_checkpoint(out), load_checkpoint(snapshots(run_folder)[-1])
    assert (written.spec, written.network) == (snapshot.spec, snapshot.network)
    assert written.source == {"format": "cmfast", "ema_std": 0.15, "ema_step": 400}
    assert written.weights.keys() == trained[1].keys()
    # training/test_ema.py says how near the two are: here, weights that wander by 0.1 a step differ by at most 0.1,
    # where the stored average that is nearest in width is three times as far away.
    off = max(float((written.weights[name] - want).abs().max()) for name, want in trained[1].items())
    stored = max(float((snapshot.weights[name] - want).abs().max()) for name, want in trained[1].items())
    assert snapshot.source["ema_std"] == 0.1
    assert off < 0.1 < stored / 3
    assert written.denoiser()(torch.zeros(1, 1, 8, 8), torch.tensor([80.0])).isfinite().all()


def test_a_width_that_was_kept_comes_back_to_the_bit_at_any_snapshot(
    run_folder: Path, call: Callable[..., Any]
) -> None:
    result = call(main, run_folder, "--std", 0.05, "--images", 800)
    assert result.returncode == 0, result.stderr
    written = load_checkpoint(run_folder / "model_std0.05-000000000800.pt")
    stored = load_checkpoint(run_folder / "ema" / "std0.050-000000000800.pt")
    assert written.source == {"format": "cmfast", "ema_std": 0.05, "ema_step": 200}
    for name, tensor in stored.weights.items():
        np.testing.assert_array_equal(written.weights[name], tensor)


def test_snapshots_of_earlier_phases_are_left_out(run_folder: Path, call: Callable[..., Any]) -> None:
    alone = call(main, run_folder, "--std", 0.12, "--dry-run").stdout
    for file in snapshots(run_folder):
        found = load_checkpoint(file)
        earlier = {name: torch.full_like(tensor, 1e30) for name, tensor in found.weights.items()}
        save_checkpoint(
            dataclasses.replace(found, source={**found.source, "ema_phase": 1}),
            file.with_name(file.name.replace("-0", "-1")),
        )
        save_checkpoint(dataclasses.replace(found, weights=earlier), file)
    assert call(main, run_folder, "--std", 0.12, "--dry-run").stdout == alone
    assert call(main, run_folder, "--std", 0.12).returncode == 0
    written = load_checkpoint(run_folder / "model_std0.12.pt")
    assert all(tensor.abs().max() < 1e6 for tensor in written.weights.values())


def test_out_names_the_file_and_its_kind(run_folder: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    assert call(main, run_folder, "--std", 0.12, "-o", tmp_path / "wide.safetensors").returncode == 0
    assert load_checkpoint(tmp_path / "wide.safetensors").source["ema_std"] == 0.12
    assert sorted(os.listdir(run_folder)) == ["config.json", "ema"]


def test_a_dry_run_says_the_same_and_writes_nothing(run_folder: Path, call: Callable[..., Any]) -> None:
    result = call(main, run_folder, "--std", 0.12, "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    out = run_folder / "model_std0.12.pt"
    assert not out.exists()
    said = result.stdout.removeprefix("would write ")
    assert call(main, run_folder, "--std", 0.12).stdout.startswith(said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--std", "0.4"], "at most 0.2887 (all steps weigh the same), for example 0.05 or 0.10; got 0.4"),
        (["--std", "0.28"], "20 % are allowed: a width nearer to theirs works, as would more snapshots"),
        (["--std", "0.1", "--images", "801"], "no snapshot was taken there; there are 400, 800, 1200, 1600"),
        (["--std", "0.1", "--images", "2000"], "no snapshot was taken there; there are 400, 800, 1200, 1600"),
        (["--std", "0.1", "-o", "model.onnx"], "a checkpoint's name ends in .pt or .safetensors"),
        (["--std", "0.1", "-o", "absent/model.pt"], "the folder absent does not exist"),
        ([], "Missing option '--std'"),
    ],
)
def test_a_request_that_cannot_be_fulfilled_is_one_line(
    arguments: list[str],
    words: str,
    run_folder: Path,
    call: Callable[..., Any],
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run_folder)
    refused(call(main, run_folder, *arguments), words)
    assert sorted(os.listdir(run_folder)) == ["config.json", "ema"]


def test_a_file_of_the_run_is_not_overwritten(run_folder: Path, call: Callable[..., Any], refused: Any) -> None:
    first = snapshots(run_folder)[0]
    (run_folder / "phases").mkdir()
    for name in ("model.pt", "state.pt", "phases/1_edm.pt", "ema/0.999.pt"):
        shutil.copy(first, run_folder / name)
        before = (run_folder / name).read_bytes()
        (run_folder / "link.pt").unlink(missing_ok=True)
        (run_folder / "link.pt").symlink_to(name)
        for out in (run_folder / name, run_folder / "link.pt"):
            refused(call(main, run_folder, "--std", "0.12", "-o", out), "that is a file of the run")
        assert (run_folder / name).read_bytes() == before


def test_an_average_without_space_is_one_line_and_leaves_nothing(
    run_folder: Path, call: Callable[..., Any], refused: Any
) -> None:
    with files_of_at_most(10_000):
        for name in ("wide.pt", "wide.safetensors"):
            refused(
                call(main, run_folder, "--std", "0.12", "-o", run_folder / name), f"cannot write {run_folder / name}"
            )
    assert sorted(os.listdir(run_folder)) == ["config.json", "ema"]


def absent(folder: Path) -> None:
    shutil.rmtree(folder)


def without_snapshots(folder: Path) -> None:
    shutil.rmtree(folder / "ema")


def a_model_among_them(folder: Path) -> None:
    first = load_checkpoint(snapshots(folder)[0])
    plain = Checkpoint(spec=first.spec, network=first.network, weights=dict(first.weights))
    save_checkpoint(plain, folder / "ema" / "std0.200-000000000400.pt")


def one_twice(folder: Path) -> None:
    shutil.copy(snapshots(folder)[0], folder / "ema" / "std0.050-000000000404.pt")


def another_network(folder: Path) -> None:
    first = load_checkpoint(snapshots(folder)[0])
    network: Any = dataclasses.replace(first.network, dropout=0.5)  # type: ignore[call-arg]
    save_checkpoint(dataclasses.replace(first, network=network), snapshots(folder)[1])


def a_cut_file(folder: Path) -> None:
    file = snapshots(folder)[0]
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (absent, "no such folder; name the folder of a run"),
        (without_snapshots, "holds no snapshots ema/std*-*.pt"),
        (a_model_among_them, "std0.200-000000000400.pt: a checkpoint, but no snapshot of a power-function average"),
        (one_twice, "holds two snapshots of one width and step"),
        (another_network, "another model than std0.050-000000000400.pt"),
        (a_cut_file, "std0.050-000000000400.pt: not a"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_that_cannot_be_used_is_one_line(
    how: Callable[[Path], None],
    words: str,
    run_folder: Path,
    tmp_path: Path,
    call: Callable[..., Any],
    refused: Callable[..., None],
) -> None:
    how(run_folder)
    refused(call(main, run_folder, "--std", 0.1, "-o", tmp_path / "out.pt"), words)
    assert not (tmp_path / "out.pt").exists()


def test_images_need_the_batch_of_the_run(
    run_folder: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    for text in ("", "{}", "[]", '{"batch": "many"}'):
        (run_folder / "config.json").write_text(text)
        refused(call(main, run_folder, "--std", 0.1, "--images", 800), "config.json does not say the batch")
    (run_folder / "config.json").unlink()
    assert call(main, run_folder, "--std", 0.1).returncode == 0  # nothing else needs it


def test_a_snapshot_is_not_written_over(
    run_folder: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    refused(call(main, run_folder, "--std", 0.12, "-o", snapshots(run_folder)[-1]), "that is a snapshot")


def test_without_torch_there_is_help_and_the_line_that_installs_it(
    tmp_path: Path, refused: Callable[..., None]
) -> None:
    code = "import sys; sys.modules['torch'] = None; from cmfast_train.cli.ema import main; main()"

    def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    result = without_torch("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: cmfast-ema ")
    assert "Examples:" in result.stdout
    refused(without_torch(tmp_path, "--std", 0.1), "holds no snapshots")
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "std0.050-000000000400.pt").write_bytes(b"never opened")
    refused(without_torch(tmp_path, "--std", 0.1), "torch, which is not installed: pip install 'cmfast[train]'")
