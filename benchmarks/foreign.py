# SPDX-License-Identifier: MIT
"""Export of OpenAI's two architectures at full size: time, memory, agreement with PyTorch, largest batch.

    python benchmarks/foreign.py --json benchmarks/results/foreign.json

The state dicts have every name and shape of the released files and random weights of trained scale: what is measured
does not depend on what the weights are, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from cmfast.backends import open_backend
from cmfast.backends.onnxruntime_library import import_onnxruntime
from cmfast.bench.timing import provenance
from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_outputs, write_text
from cmfast.formats.table import read_manifest
from cmfast.model import Model
from cmfast.noise import gaussian
from cmfast_train.importers.openai import HEAD_CHANNELS, NETWORKS, RELEASED
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise

NAMES = ("cd_imagenet64_l2", "cd_bedroom256_l2")
COMPARED = 16  # of a large batch: PyTorch's images do not depend on the batch they are in


@click.command("foreign")
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--batch", type=int, default=128, show_default=True, help="Largest batch, on ImageNet-64; 0: none.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Write the record here.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Leave the files here.")
def command(names: tuple[str, ...], batch: int, out: Path | None, keep: Path | None) -> None:
    """Export random weights under the released NAMEs; default: one of ImageNet-64, one of LSUN-256."""
    check_outputs({"--json": out})
    if batch < 0:
        raise CmfastError(f"--batch must be at least 0, got {batch}")
    if unknown := [name for name in names if name not in RELEASED]:
        raise CmfastError(f"{unknown[0]}: not a released file; there are {', '.join(RELEASED)}")
    rows = []
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            rows.append(_measure(name, folder, batch if RELEASED[name].image_size == 64 else 0))
        click.echo(json.dumps(rows[-1], indent=1))
    if out:
        write_text(out, json.dumps({"what": "foreign", **provenance(), "rows": rows}, indent=1) + "\n")


def _measure(name: str, folder: Path, batch: int) -> dict[str, Any]:
    size = RELEASED[name].image_size
    config = AdmConfig(image_size=size, attention=(32, 16, 8), head_channels=HEAD_CHANNELS, **NETWORKS[size])
    checkpoint, onnx = folder / f"{name}.pt", folder / f"{name}.onnx"
    with torch.device("meta"):
        network = AdmUnet(config)
    network.to_empty(device="cpu")
    randomise(network)
    torch.save(network.state_dict(), checkpoint)
    parameters = sum(p.numel() for p in network.parameters())
    del network
    seconds, gibibytes = _export(checkpoint, onnx)
    row = {
        "name": name,
        "parameters": parameters,
        "export_and_verify_s": round(seconds, 1),
        "peak_memory_gib": round(gibibytes, 2),
        "onnx_bytes": onnx.stat().st_size,
        "files": sorted(file.name for file in folder.glob(f"{name}*")),
        "parity": dict(read_manifest(onnx).parity),
    }
    return row | ({"large_batch": _large_batch(checkpoint, onnx, batch)} if batch else {})


def _export(checkpoint: Path, onnx: Path) -> tuple[float, float]:
    """Run cmfast-export as a user does; return the seconds and the peak memory (GiB) of the whole process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "cmfast_export.cli", str(checkpoint), "-o", str(onnx)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise CheckFailed(f"cmfast-export {checkpoint} failed with exit status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def _large_batch(checkpoint: Path, onnx: Path, batch: int) -> dict[str, Any]:
    """Run the file at one large batch, noise levels mixed, and compare some of its images with PyTorch."""
    sigmas = np.resize(np.geomspace(0.002, 80, 16).astype(np.float32), batch)
    reference = Model(open_backend(checkpoint))
    x = sigmas[:, None, None, None] * gaussian(5, range(batch), 0, reference.spec.image)
    label = reference.labels(batch, seed=5)
    theirs = reference.denoise(x[:COMPARED], sigmas[:COMPARED], None if label is None else label[:COMPARED])
    del reference

    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False  # it keeps what was freed, and the attention of 128 images takes 3 GB twice
    options.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    start = time.perf_counter()
    (ours,) = session.run(None, {"x": x, "sigma": sigmas, **({} if label is None else {"label": label})})
    return {
        "batch": batch,
        "s": round(time.perf_counter() - start, 1),
        "compared": COMPARED,
        "max_abs": float(np.abs(ours[:COMPARED] - theirs).max()),
        "finite": bool(np.isfinite(ours).all()),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    run_command(command)
