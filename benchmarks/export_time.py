# SPDX-License-Identifier: MIT
"""Seconds of an export, by part: cmfast-export, which verifies its file, and torch.onnx.export, which does not.

    python benchmarks/export_time.py --json benchmarks/results/export_time.json

Each export is a process of its own (export_parts.py), which begins with a checkpoint and ends with the file; the two
take turns. What the files compute is compared before the times are believed. CPU time, of all threads, stands beside
wall time. OMP_PROC_BIND keeps PyTorch's two threads on two cores: on a busy machine they can share one, and wait for
each other.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from cmfast.backends.onnxruntime_library import CPU, import_onnxruntime
from cmfast.bench import timing
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text

WAYS = ("cmfast", "torch")
PARTS = Path(__file__).with_name("export_parts.py")
ENVIRONMENT = {"OMP_PROC_BIND": "true"}
APART = 1e-4  # largest difference of two files, data units: what an export in float32 may be from PyTorch
WHOLE, END = "whole process", "end of the process"


@click.command("export_time.py")
@click.option("--networks", default="digits,mnist,cifar10", show_default=True, help="Names of benchmarks/networks.py.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Counted exports of each.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(networks: str, rounds: int, json_file: Path | None) -> None:
    """Time exports, by part."""
    if rounds < 1:
        raise CmfastError(f"--rounds must be at least 1, got {rounds}")
    check_outputs({"--json": json_file})
    before, rows, every = timing.cpu_ticks(), list[dict[str, Any]](), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        for network in networks.split(","):
            about, found, apart = measure(network, Path(folder), rounds)
            for way in WAYS:
                wall = [each[WHOLE]["wall_s"] for each in found[way]]
                every[f"{way}, {network}"] = [1000 * each for each in wall]
                rows.append(row := about | {"way": way, "parts": medians(found[way]), "wall_s": wall})
                show(row)
            rows[-2]["max_difference"] = rows[-1]["max_difference"] = apart
    load, steal = timing.load_average(), timing.steal_share(before, timing.cpu_ticks())
    warning = timing.noise_warning(every, load=load, steal=steal)
    if json_file is not None:
        record: dict[str, Any] = {"what": "export_time", **timing.provenance(), "environment": ENVIRONMENT}
        record |= {"rounds": rounds, "load_average": load, "steal": steal, "warning": warning, "rows": rows}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if warning:
        click.echo(f"warning: {warning}")


def measure(
    network: str, folder: Path, rounds: int
) -> tuple[dict[str, Any], dict[str, list[dict[str, dict[str, float]]]], float]:
    """Return what a network is, the parts of each export by way, and how far the two files are apart."""
    model = folder / f"{network}.pt"
    code = (
        "import sys; from networks import parameters, random_model\n"
        "from cmfast_train.checkpoint import save_checkpoint\n"
        "made = random_model(sys.argv[1]); save_checkpoint(made, sys.argv[2]); print(parameters(made))\n"
    )
    weights = int(run(("-c", code, network, str(model)))[0])
    files = {way: folder / f"{network}_{way}.onnx" for way in WAYS}
    found: dict[str, list[dict[str, dict[str, float]]]] = {way: [] for way in WAYS}
    for number in range(-1, rounds):  # the first fills the disk cache
        for way in WAYS if number % 2 else WAYS[::-1]:
            parts = export(way, model, files[way])
            if number >= 0:
                found[way].append(parts)
    apart = difference(files)
    for file in folder.iterdir():
        file.unlink()
    return {"network": network, "parameters": weights}, found, apart


def export(way: str, model: Path, out: Path) -> dict[str, dict[str, float]]:
    """Run one export; return wall and CPU seconds, by part, and its peak memory."""
    started = time.monotonic()
    printed, usage = run((str(PARTS), way, str(model), str(out), str(started)))
    whole = {"wall_s": time.monotonic() - started, "cpu_s": usage.ru_utime + usage.ru_stime}
    parts = {name: {"wall_s": wall, "cpu_s": cpu} for name, (wall, cpu) in json.loads(printed).items()}
    parts[END] = {key: whole[key] - sum(part[key] for part in parts.values()) for key in whole}
    return parts | {WHOLE: whole | {"peak_mib": usage.ru_maxrss / 1024}}


def run(arguments: Sequence[str]) -> tuple[str, Any]:
    """Run Python with these arguments beside this file; return what it printed and the resources that it used."""
    paths = os.pathsep.join(filter(None, (str(PARTS.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for stream in (output, errors):
            stream.seek(0)
        if process.returncode:
            reason = (errors.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise CmfastError(f"python {' '.join(arguments)} failed: {reason}")
        return output.read(), usage


def difference(files: Mapping[str, Path]) -> float:
    """Return the largest difference between what two files compute; beyond APART it is a failed check."""
    results = []
    for file in files.values():
        session = import_onnxruntime().InferenceSession(os.fspath(file), providers=[CPU])
        rng, sigma = np.random.default_rng(0), np.geomspace(0.002, 80, 5).astype(np.float32)
        shape = session.get_inputs()[0].shape[1:]
        x = rng.uniform(-1, 1, (5, *shape)) + sigma.reshape(-1, 1, 1, 1) * rng.standard_normal((5, *shape))
        values = {"x": x.astype(np.float32), "sigma": sigma, "label": np.arange(5)}
        results.append(session.run(None, values)[0])
    apart = float(np.abs(results[0] - results[1]).max())
    if not apart <= APART:
        raise CheckFailed(f"the two files compute results that are {apart:.1e} apart (allowed {APART:.0e})")
    return apart


def medians(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the median of each number over the exports."""
    return {
        part: {key: round(statistics.median(run[part][key] for run in runs), 3) for key in values}
        for part, values in runs[0].items()
    }


def show(row: Mapping[str, Any]) -> None:
    """Print the parts of one way."""
    click.echo(f"{row['network']}, {row['parameters'] / 1e6:.1f}M weights, {row['way']}")
    for name, part in row["parts"].items():
        click.echo(f"  {name:<24}{part['wall_s']:7.2f} s  CPU {part['cpu_s']:6.2f} s")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
