# SPDX-License-Identifier: MIT
"""What needs a GPU, in as many seconds as there are: `make gpu`, or one of

    python benchmarks/gpu.py smoke --budget 45 --out smoke.jsonl
    python benchmarks/gpu.py bench --budget 225 --out bench.jsonl
    python benchmarks/gpu.py train --budget 240 --out train.jsonl --data-root DIR

The most valuable comes first, every item is on its own, and each has its line on disk as soon as it is measured
(`gpu_lines`), so nothing is lost when the command is cut. The same command goes on after the items that its file has.
Nothing is fetched; `--device cpu` is a rehearsal.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click

from cmfast.cli._run import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_target
from gpu_items import supervise, work
from gpu_lines import Line, Lines, begin

NETWORKS = {"cuda": ("mnist", "cifar10", "imagenet64"), "cpu": ("digits",)}
START_END_S = 1.0  # of the budget: starting this process and ending it
KNOWN = ("digits", "mnist", "cifar10", "imagenet64")  # networks.NAMES, which imports PyTorch


def _options(budget: float) -> Any:
    """Return the decorator with what all commands take."""

    def decorate(function: Any) -> Any:
        for option in reversed(
            (
                click.option("--budget", type=float, default=budget, show_default=True, help="Seconds, all in all."),
                click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON lines."),
                click.option(
                    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
                    help="cpu: a rehearsal.",
                ),
                click.option("--fresh", is_flag=True, help="Begin a new file instead of going on."),
                click.option("--networks", default="", help=f"Of {', '.join(KNOWN)}.", metavar="NAME,.."),
                click.option("--items", default="", metavar="TEXT,..", help="Only items whose name has one of these."),
                click.option("--pipe", type=int, hidden=True, help="Of a worker."),
                click.option("--until", type=float, hidden=True, help="Of a worker."),
            )
        ):  # fmt: skip
            function = option(function)
        return function

    return decorate


@click.group("gpu")
def command() -> None:
    """Check and time what needs a GPU."""


@command.command("smoke")
@_options(45)
def smoke(**options: Any) -> int | None:
    """Check drivers, kernels, CUDA graphs, dropout masks, precisions and a training step."""

    def items(lines: Lines, networks: tuple[str, ...], device: str) -> Any:
        from gpu_cells import Bench
        from gpu_smoke import smoke_items

        return smoke_items(Bench(lines, device), networks)

    return _run("smoke", items, options)


@command.command("bench")
@_options(225)
@click.option("--seconds", type=float, default=0.3, show_default=True, help="Counted time of each way.")
def bench(seconds: float, **options: Any) -> int | None:
    """Time every way to run each network against eager PyTorch."""

    def items(lines: Lines, networks: tuple[str, ...], device: str) -> Any:
        from gpu_bench import bench_items
        from gpu_cells import Bench

        return bench_items(Bench(lines, device, seconds), networks)

    return _run("bench", items, options, seconds=seconds)


@command.command("train")
@_options(240)
@click.option("--preset", type=click.Choice(["mnist", "digits"]), help="Default: mnist, of a rehearsal digits.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where MNIST's files are, packed or not.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of cmfast-train.")
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="Default: OUT without its suffix, _run.")
def train(
    preset: str | None, data_root: Path | None, settings: tuple[str, ...], run_folder: Path | None, **options: Any
) -> int | None:
    """Train a preset in these seconds, evaluate it, draw its samples."""
    out: Path = options["out"]
    preset = preset or ("mnist" if options["device"] == "cuda" else "digits")
    run_folder = run_folder or out.with_name(f"{out.stem}_run")
    if preset != "digits" and data_root is None:
        raise CmfastError(f"the preset {preset} needs its data: --data-root DIR")
    if options["fresh"] and options["pipe"] is None and run_folder.exists():
        shutil.rmtree(run_folder)

    def items(lines: Lines, networks: tuple[str, ...], device: str) -> Any:
        from gpu_train import Training, TrainRequest

        request = TrainRequest(
            preset=preset, settings=settings, data_root=data_root, run=run_folder, out=out, device=device,
            until=options["until"], budget=options["budget"],
        )  # fmt: skip
        return Training(request, lines).items()

    return _run("train", items, options, preset=preset, settings=list(settings))


def _run(what: str, items: Any, options: dict[str, Any], **more: Any) -> int | None:
    """Run the items as the worker, or start workers that do."""
    begun, out, device, budget = time.monotonic(), options["out"], options["device"], options["budget"]
    networks = tuple(options["networks"].split(",")) if options["networks"] else NETWORKS[device]
    if unknown := [name for name in networks if name not in KNOWN]:
        raise CmfastError(f"--networks {unknown[0]}: there are {', '.join(KNOWN)}")
    if options["pipe"] is not None:
        lines = Lines(out)
        texts = options["items"].split(",")
        wanted = (item for item in items(lines, networks, device) if any(text in item.name for text in texts))
        return work(wanted, lines, options["until"], options["pipe"])
    if not 1 <= budget <= 86400:
        raise CmfastError(f"--budget is a number of seconds from 1 to 86400, got {budget:g}")
    check_target(out)
    lines = begin(
        out,
        what,
        device,
        fresh=options["fresh"],
        budget=budget,
        networks=list(networks),
        items=options["items"],
        **more,
    )
    last = supervise([sys.executable, *sys.argv], lines, begun + budget - min(START_END_S, budget / 10))
    for line in lines.before:
        if words := _words(line):
            click.echo(words)
    counts = f"{last['measured']} measured, {last['failed']} failed, {last['skipped']} skipped for lack of time"
    click.echo(f"{counts}: {out}")
    if last["failed"] or "error" in last:
        raise CheckFailed(f"{last['failed']} failed, listed above")
    return None


def _words(line: Line) -> str:
    """Return what a line says in one for people; of a head nothing."""
    if "item" not in line or "skipped" in line:
        return ""
    for key in ("error", "not_here"):
        if key in line:
            return f"{line['item']}: {key.replace('_', ' ')}: {line[key]}"
    if line.get("kind") == "row":
        part = f", {line['of_roofline']:.0%} of the roofline" if "of_roofline" in line else ""
        return f"{line['item']}: {line['wall']['median_ms']:.3f} ms, {line['times_as_fast']:.2f}x eager{part}"
    if line.get("kind") == "ceiling":
        rate, unit = (line["flops_per_s"], "FLOP/s") if line["dtype"] else (line["bytes_per_s"], "B/s")
        return f"{line['item']}: {rate / 1e12:.3g} T{unit}"
    if line.get("kind") == "evaluation":
        return f"{line['item']}: Frechet distance {line['fd']:.3f}, halves of the data {line['halves']['fd']:.3f}"
    if line.get("kind") == "training":
        return f"{line['item']}: {line['images']:,} of {line['planned']:,} images, {line['images_per_s']} a second"
    if line.get("kind") == "sample":
        return f"{line['item']}: {line['images_per_s']:.0f} images/s, {line['of_network']:.0%} of the network's own"
    return f"{line['item']}: {'not ok' if line.get('ok') is False else 'ok'}"


if __name__ == "__main__":
    run_command(command)
