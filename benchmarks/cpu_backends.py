# SPDX-License-Identifier: MIT
"""What runs a network fastest on a CPU: PyTorch, ONNX Runtime, OpenVINO, in float32, bfloat16 and int8.

    python benchmarks/cpu_backends.py --threads 2 --json benchmarks/results/cpu_backends.json

One call of the denoiser is timed, from numpy to numpy, after each was compared with eager PyTorch in float32 at
eight noise levels (dB, images in [-1, 1]). CPU time, of all threads, stands beside wall time: on a shared machine it
moves less. `--keep FOLDER` keeps the exported files for the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch

import cmfast
from cmfast.bench import timing
from cmfast.checks import check_threads, psnr_db
from cmfast.cli.parameters import INTS
from cmfast.cli.running import run_command
from cmfast.conditions import some_values
from cmfast.errors import CheckFailed
from cmfast.files import check_outputs, write_text
from cmfast_export.pipeline import export_onnx
from cmfast_train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from networks import parameters, random_model

Floats = np.ndarray[Any, np.dtype[np.float32]]
LEAST_DB = {"fp32": 80.0, "bf16": 40.0, "int8": 35.0}
INT8 = "int8.onnx"


class Contender(NamedTuple):
    """A way to run a network."""

    name: str
    file: str  # of `exported`
    variant: str = ""
    precision: str = "fp32"
    tolerance_db: float | None = None  # of the variant "auto"

    @property
    def least_db(self) -> float:
        """The PSNR from eager PyTorch in float32 below which it would be another network that is timed."""
        return self.tolerance_db or LEAST_DB["int8" if self.file == INT8 else self.precision]

    @property
    def types(self) -> str:
        """What it computes in, for the record."""
        return f"int8, {self.precision}" if self.file == INT8 else self.precision


CONTENDERS = (
    Contender("PyTorch", "model.pt"),
    Contender("PyTorch channels_last", "model.pt", "channels_last"),
    Contender("PyTorch bf16", "model.pt", precision="bf16"),
    Contender("torch.compile", "model.pt", "compiled"),
    Contender("torch.compile bf16", "model.pt", "compiled", "bf16"),
    Contender("ONNX Runtime", "model.onnx"),
    Contender("OpenVINO", "model.onnx", "openvino"),
    Contender("OpenVINO bf16", "model.onnx", "openvino", "bf16"),
    Contender("ONNX Runtime int8", INT8),
    Contender("OpenVINO int8", INT8, "openvino"),
    Contender("OpenVINO int8, bf16", INT8, "openvino", "bf16"),  # bfloat16 around the int8 products
    Contender("OpenVINO throughput", "model.onnx", "openvino throughput"),
    Contender("OpenVINO throughput bf16", "model.onnx", "openvino throughput", "bf16"),
    Contender("auto", "model.onnx", "auto"),
    Contender("auto, 50 dB", "model.onnx", "auto", tolerance_db=50.0),
)


@click.command("cpu_backends.py")
@click.option("--networks", default="mnist,cifar10", show_default=True, help="Names of benchmarks/networks.py.")
@click.option("--batch", type=INTS, default="1", show_default=True, help="Images a call.")
@click.option("--threads", type=int, default=2, show_default=True, help="CPU threads of every contender.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Counted time for each.")
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile with frozen weights: minutes.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder of the models, kept.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(
    networks: str,
    batch: tuple[int, ...],
    threads: int,
    seconds: float,
    compiled: bool,
    keep: Path | None,
    json_file: Path | None,
) -> None:
    """Time one network call of each backend on this CPU."""
    check_outputs({"--json": json_file})
    check_threads(threads)
    torch.set_num_threads(threads)
    before, rows = timing.cpu_ticks(), list[dict[str, Any]]()
    every: dict[str, list[float]] = {}
    with contextlib.nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory() as folder:
        for network in networks.split(","):
            model, folder_of = exported(network, Path(folder) / network)
            opened = dict(open_all(folder_of, threads, compiled))
            for size in batch:
                found, times = measure(opened, size, seconds)
                about = {"network": network, "parameters": parameters(model), "batch": size}
                rows += [about | row for row in found]
                every |= {f"{name}, {network}, batch {size}": each for name, each in times.items()}
                show(about, found)
    load, steal = timing.load_average(), timing.steal_share(before, timing.cpu_ticks())
    warning = timing.noise_warning(every, load=load, steal=steal)
    if json_file is not None:
        record: dict[str, Any] = {"what": "cpu_backends", **timing.provenance(), "threads": threads}
        record |= {"load_average": load, "steal": steal, "warning": warning, "rows": rows}
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if warning:
        click.echo(f"warning: {warning}")


def exported(name: str, folder: Path) -> tuple[Checkpoint, Path]:
    """Return a random network and the folder with its model.pt, model.onnx and int8.onnx, made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, onnx = folder / "model.pt", folder / "model.onnx"
    if not checkpoint.exists() or not onnx.exists():
        save_checkpoint(random_model(name), checkpoint)
        export_onnx(checkpoint, onnx)
    if not (folder / INT8).exists():
        export_onnx(checkpoint, folder / INT8, precision="int8")
    return load_checkpoint(checkpoint), folder


def open_all(folder: Path, threads: int, compiled: bool) -> Iterator[tuple[str, cmfast.Model]]:
    """Yield each contender that there is on this machine, opened."""
    for each in CONTENDERS:
        if each.variant == "compiled" and not compiled:
            continue
        precision = "" if each.precision == "fp32" else each.precision
        try:
            yield (
                each.name,
                cmfast.load(
                    folder / each.file, "cpu", threads, variant=each.variant, precision=precision,
                    tolerance_db=each.tolerance_db,
                ),
            )  # fmt: skip
        except cmfast.BackendError as err:
            click.echo(f"left out: {each.name}: {err}")


def measure(
    opened: Mapping[str, cmfast.Model], batch: int, seconds: float
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Return a row for each contender, the first of which is the reference, and the wall times, ms."""
    about = {each.name: each for each in CONTENDERS}
    reference = next(iter(opened.values()))
    spec = reference.spec
    levels = np.geomspace(spec.sigma_min, spec.sigma_max, 8).astype(np.float32)
    conditions = some_values(spec.conditions, batch)
    rng = np.random.default_rng(0)
    clean = rng.uniform(-1, 1, (batch, *spec.shape)).astype(np.float32)
    inputs = [(clean + s * rng.standard_normal(clean.shape, dtype=np.float32), float(s)) for s in levels]
    expected = [reference.denoise(x, s, conditions=conditions) for x, s in inputs]
    image, decibels = spec.data == "image", dict[str, list[float]]()
    with frozen():
        for name, model in opened.items():
            got = [model.denoise(x, s, conditions=conditions) for x, s in inputs]
            decibels[name] = [psnr_db([a], [b], image=image) for a, b in zip(got, expected, strict=True)]
            if min(decibels[name]) < about[name].least_db:
                raise CheckFailed(f"{name} is {min(decibels[name]):.1f} dB from eager PyTorch; nothing was timed")
        x, sigma = inputs[-1]
        cpu_ms: dict[str, list[float]] = {name: [] for name in opened}

        def calling(name: str, model: cmfast.Model) -> Callable[[], None]:
            def call() -> None:
                begun = time.process_time()
                model.denoise(x, sigma, conditions=conditions)
                cpu_ms[name].append(1000 * (time.process_time() - begun))

            return call

        times = timing.interleave({name: calling(name, m) for name, m in opened.items()}, seconds=seconds, most_s=9)
    wall = {name: timing.summarise(each) for name, each in times.items()}
    cpu = {name: statistics.median(each) for name, each in cpu_ms.items()}
    first = next(iter(opened))
    rows = []
    for name, model in opened.items():
        row: dict[str, Any] = {"contender": name, "backend": model.backend.name, "precision": about[name].types}
        row |= {"decibels": {f"{s:.4g}": round(db, 1) for s, db in zip(levels, decibels[name], strict=True)}}
        row |= {f"wall_{key}": value for key, value in dataclasses.asdict(wall[name]).items()}
        row |= {"cpu_median_ms": cpu[name], "times_as_fast": wall[first].median_ms / wall[name].median_ms}
        rows.append(row | {"times_less_cpu": cpu[first] / cpu[name]})
    return rows, times


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Let torch.compile take weights for constants, as the other backends do."""
    import torch._inductor.config as config

    with config.patch(freezing=True), torch.no_grad():
        yield


def show(about: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the rows of one setting."""
    click.echo(f"{about['network']}, {about['parameters'] / 1e6:.1f}M weights, batch {about['batch']}")
    for row in rows:
        wall = f"{row['wall_median_ms']:8.1f} ms ({row['wall_p10_ms']:.1f} to {row['wall_p90_ms']:.1f})"
        ratios = f"wall {row['times_as_fast']:.2f}x, CPU {row['cpu_median_ms']:.1f} ms, {row['times_less_cpu']:.2f}x"
        click.echo(f"  {row['contender']:<26}{wall}  {ratios}  {min(row['decibels'].values()):.1f} dB")


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
