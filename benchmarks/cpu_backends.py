# SPDX-License-Identifier: MIT
"""What runs a network fastest on a CPU: the CPU suite of cmfast-bench on networks of random weights.

    python benchmarks/cpu_backends.py --threads 2 --batch 1,8 --json benchmarks/results/cpu_backends.json

One call of the denoiser is timed, from numpy to numpy, after each contender was compared with eager PyTorch in float32
at eight noise levels. `cmfast-bench --suite cpu --baseline model.pt` does the same, and more, for a model of your own.
`--keep FOLDER` keeps the exported files for the next run.

ONEDNN_MAX_CPU_ISA=AVX2 before the command makes PyTorch and OpenVINO compute as on a CPU without AVX-512; the record
says so. ONNX Runtime and ncnn have no such limit, and use what the CPU has; OpenVINO still tries bfloat16, which then
fails, and PyTorch takes a hundred times as long in it: add --precision fp32,int8 --keep-going.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

from cmfast.bench import timing
from cmfast.bench.suite import SuiteRecord, SuiteRequest, run_suite
from cmfast.bench.suite.files import NAMES
from cmfast.bench.suite.show import show
from cmfast.bench.suite.ways import PRECISIONS
from cmfast.checks import check_threads
from cmfast.cli.parameters import INTS
from cmfast.cli.running import run_command
from cmfast.files import check_outputs, write_text
from cmfast_train.checkpoint import load_checkpoint, save_checkpoint
from networks import parameters, random_model

ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"  # of PyTorch and OpenVINO


@click.command("cpu_backends.py")
@click.option("--networks", default="mnist,cifar10", show_default=True, help="Names of benchmarks/networks.py.")
@click.option("--batch", type=INTS, default="1", show_default=True, help="Images a call.")
@click.option("--threads", type=int, default=2, show_default=True, help="CPU threads of every contender.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Counted time for each.")
@click.option("--precision", default=",".join(PRECISIONS), show_default=True, help="Contenders that compute in these.")
@click.option("--compile", "compiled", is_flag=True, help="Also torch.compile with frozen weights: minutes.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Folder of the models, kept.")
@click.option("--keep-going", is_flag=True, help="Leave out and record what fails.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(
    networks: str,
    batch: tuple[int, ...],
    threads: int,
    seconds: float,
    precision: str,
    compiled: bool,
    keep: Path | None,
    keep_going: bool,
    json_file: Path | None,
) -> None:
    """Time one network call of each backend on this CPU."""
    check_outputs({"--json": json_file})
    check_threads(threads)
    before, rows, warnings, records = timing.cpu_ticks(), list[dict[str, Any]](), list[str](), list[SuiteRecord]()
    rates, left_out = list[dict[str, Any]](), list[dict[str, Any]]()
    with contextlib.nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory() as folder:
        for network in networks.split(","):
            place = Path(folder) / network
            checkpoint = random_checkpoint(network, place)
            request = SuiteRequest(
                baseline=checkpoint, batch=batch, threads=(threads,), seconds=seconds, compiled=compiled,
                keep=place, steps=(), starts=False, precision=tuple(precision.split(",")),
                keep_going=keep_going,
            )  # fmt: skip
            record = run_suite(request, functools.partial(click.echo, err=True))
            records.append(record)
            rows += rows_of(network, parameters(load_checkpoint(checkpoint)), record)
            rates += [{"network": network, "threads": number, **vars(rate)} for number, rate in record.rates]
            left_out += [{"network": network, **vars(left)} for left in record.left_out]
            warnings += [f"{network}: {record.warning}"] if record.warning else []
            click.echo(network)
            show(record)
    if json_file is not None:
        steal = timing.steal_share(before, timing.cpu_ticks())
        whole: dict[str, Any] = {"what": "cpu_backends", **timing.provenance(), "threads": threads}
        whole["isa_limit"] = os.environ.get(ISA_LIMIT)
        whole |= {"load_average": timing.load_average(), "steal": steal, "warning": "; ".join(warnings) or None}
        write_text(json_file, json.dumps(whole | {"rates": rates, "left_out": left_out, "rows": rows}, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    for warning in warnings:
        click.echo(f"warning: {warning}")
    for record in records:
        record.raise_failure()


def random_checkpoint(name: str, folder: Path) -> Path:
    """Return a checkpoint of a random network, made where there is none; files of another one are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "model.pt"
    if not checkpoint.exists():
        for exported in NAMES.values():
            if (folder / exported).is_dir():
                shutil.rmtree(folder / exported)
            (folder / exported).unlink(missing_ok=True)
        save_checkpoint(random_model(name), checkpoint)
    return checkpoint


def rows_of(network: str, size: int, record: SuiteRecord) -> list[dict[str, Any]]:
    """Return the rows of the record: a network call each, with the network and its number of weights."""
    return [{"network": network, "parameters": size, **dataclasses.asdict(row)} for row in record.calls]


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
