# SPDX-License-Identifier: MIT
"""Time of a whole process that samples one image in two steps: from exported files, and through PyTorch.

    python benchmarks/startup.py --json benchmarks/results/startup.json

Without files of your own it makes a random model of the mnist-large preset (7.7 million weights) and exports it.
`import cmfast` and an empty Python are timed along with it. The first process of each is not counted: it fills the
disk cache and writes the byte code that an installed package has. OpenVINO keeps compiled graphs in $CMFAST_CACHE.
OpenVINO and ncnn are left out where they are not installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from cmfast.bench import timing
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast.formats.manifest import check_file


@click.command("startup.py")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A model.pt; default: a random one is made.")
@click.option("--onnx", type=click.Path(path_type=Path), help="The same model exported; default: it is exported.")
@click.option("--runs", type=int, default=15, show_default=True, help="Counted processes of each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(checkpoint: Path | None, onnx: Path | None, runs: int, json_file: Path | None) -> None:
    """Time the start of cmfast-sample."""
    if runs < 1:
        raise CmfastError(f"--runs must be at least 1, got {runs}")
    if onnx is not None and checkpoint is None:
        raise CmfastError("--onnx needs the --checkpoint that it was exported from")
    check_outputs({"--json": json_file}, filter(None, (checkpoint, onnx)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = check_file(checkpoint).resolve() if checkpoint is not None else random_model(folder / "model.pt")
        onnx = check_file(onnx).resolve() if onnx is not None else export(checkpoint, folder / "model.onnx")
        commands = {
            "python, empty": ("-c", "pass"),
            "import cmfast": ("-c", "import cmfast"),
            "cmfast-sample model.onnx": sample_command(onnx, "onnx.png"),
            "cmfast-sample model.pt": sample_command(checkpoint, "pt.png"),
        }
        if find_spec("openvino"):
            more = ("--variant", "openvino")
            commands["cmfast-sample model.onnx --variant openvino"] = sample_command(onnx, "openvino.png", *more)
        if find_spec("ncnn") and find_spec("pnnx"):
            ncnn = export(checkpoint, folder / "model_ncnn", "--format", "ncnn")
            commands["cmfast-sample model_ncnn"] = sample_command(ncnn, "ncnn.png")
        for arguments in commands.values():
            start(arguments, folder)
        difference = max(compare(drawn, folder / "pt.png") for drawn in folder.glob("*.png"))
        before = timing.cpu_ticks()
        times = interleave(commands, runs, folder)
        steal = timing.steal_share(before, timing.cpu_ticks())
        model = describe(checkpoint, onnx)
    load = timing.load_average()
    warning = timing.noise_warning(times, load=load, steal=steal)
    rows = [{"command": name, **dataclasses.asdict(timing.summarise(each))} for name, each in times.items()]
    for row in rows:
        numbers = f"{row['median_ms']:7.0f} ms   p10 {row['p10_ms']:6.0f}   p90 {row['p90_ms']:6.0f}"
        click.echo(f"{row['command']:<46}{numbers}")
    if json_file is not None:
        conditions = {"load_average": load, "steal": steal, "warning": warning}
        record: dict[str, Any] = {"what": "startup", **timing.provenance(), **conditions, "model": model}
        record |= {"images": 1, "steps": 2, "max_difference": difference, "rows": rows}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if warning:
        click.echo(f"warning: {warning}")


def interleave(commands: dict[str, tuple[str, ...]], runs: int, folder: Path) -> dict[str, list[float]]:
    """Start every command `runs` times in turns, the order rotating; return the times, ms."""
    names = list(commands)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in range(runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(start(commands[name], folder))
    return times


def start(arguments: tuple[str, ...], folder: Path) -> float:
    """Run Python with these arguments in a folder; return how long the process lived, ms."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["CMFAST_CACHE"] = str(folder / "cache")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    elapsed = 1000 * (time.perf_counter() - began)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CmfastError(f"python {' '.join(arguments)} failed: {reason}")
    return elapsed


def sample_command(model: Path, out: str, *more: str) -> tuple[str, ...]:
    """Return Python's arguments that are cmfast-sample, installed as a command or not."""
    return ("-P", "-m", "cmfast.cli.sample", str(model), "-n", "1", "--steps", "2", "-o", out, *more)


def random_model(path: Path) -> Path:
    """Write a checkpoint of mnist-large with random weights, in a process of its own, and return its path."""
    code = (
        "import sys; from cmfast_train.checkpoint import Checkpoint, save_checkpoint\n"
        "from cmfast_train.training.initial_model import network_config\n"
        "from cmfast_train.networks.adm import AdmUnet, randomise\n"
        "from cmfast_train.config.presets import PRESETS\n"
        "config = PRESETS['mnist-large']; shape = network_config(config, 10)\n"
        "network = AdmUnet(shape); randomise(network)\n"
        "made = Checkpoint(spec=config.spec(10), network=shape, weights=network.state_dict())\n"
        "save_checkpoint(made, sys.argv[1])\n"
    )
    start(("-c", code, str(path)), path.parent)
    return path


def export(checkpoint: Path, path: Path, *more: str) -> Path:
    """Export a checkpoint and return the file or folder."""
    start(("-P", "-m", "cmfast_export.cli", str(checkpoint), "-o", str(path), *more), path.parent)
    return path


def compare(one: Path, other: Path) -> int:
    """Return the largest difference of two images, levels of 255; more than one level is a failed check."""
    pixels = [np.asarray(Image.open(file), np.int16) for file in (one, other)]
    difference = int(np.abs(pixels[0] - pixels[1]).max())
    if difference > 1:
        raise CheckFailed(f"the two commands drew different images: {difference} of 255 levels apart (allowed 1)")
    return difference


def describe(checkpoint: Path, onnx: Path) -> dict[str, Any]:
    """Return what the record says about the model."""
    from cmfast_train.checkpoint import load_checkpoint

    content = load_checkpoint(checkpoint)
    parameters = sum(weight.numel() for weight in content.weights.values())
    sizes = {"checkpoint_bytes": checkpoint.stat().st_size, "onnx_bytes": onnx.stat().st_size}
    return {"image": list(content.spec.image), "parameters": parameters, "sha256": content.sha256(), **sizes}


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
