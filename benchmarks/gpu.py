# SPDX-License-Identifier: MIT
"""Checks and timings that need a GPU, within a budget of seconds: `make gpu`, or one of

    python benchmarks/gpu.py smoke --budget 45 --out smoke.jsonl
    python benchmarks/gpu.py bench --budget 225 --out bench.jsonl
    python benchmarks/gpu.py train --budget 240 --out train.jsonl --data-root DIR
    python benchmarks/gpu.py tests --budget 120 --out tests.jsonl

and then, on any machine, the record and the tables in the documentation

    python benchmarks/gpu.py record smoke.jsonl bench.jsonl train.jsonl --json benchmarks/results/gpu_h100.json
    python benchmarks/gpu.py table --write

The most valuable items come first, each is independent of the others, and its line is on disk as soon as it is measured
(`gpu_lines`), so nothing is lost if the command is killed. The same command continues after the items in its file.
Nothing is downloaded; `--device cpu` is a rehearsal.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from cmfast.cli.running import run_command
from cmfast.errors import CheckFailed, CmfastError
from cmfast.files import check_target, write_text
from gpu_items import Item, supervise, work
from gpu_lines import ROOT, Line, Lines, begin

NETWORKS = {"cuda": ("mnist", "cifar10", "imagenet64"), "cpu": ("digits",)}
KNOWN = ("digits", "mnist", "cifar10", "imagenet64")  # networks.NAMES, which imports PyTorch
START_END_S = 1.0  # of the budget, for starting and ending this process
PATH = click.Path(path_type=Path)
COMMON = (
    click.option("--out", type=PATH, required=True, help="JSON lines."),
    click.option(
        "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu: rehearse."
    ),
    click.option("--fresh", is_flag=True, help="Start a new file instead of continuing."),
    click.option("--items", default="", metavar="TEXT,..", help="Only items whose name contains one of these."),
    click.option("--pipe", type=int, hidden=True, help="For a worker."),
    click.option("--until", type=float, hidden=True, help="For a worker."),
)
networks_option = click.option("--networks", default="", metavar="NAME,..", help=f"Names from {', '.join(KNOWN)}.")


def _options(budget: float) -> Callable[[Any], Any]:
    """Return the decorator with the options of all commands that measure."""

    def decorate(function: Any) -> Any:
        for option in reversed(COMMON):
            function = option(function)
        return click.option("--budget", type=float, default=budget, show_default=True, help="Total, s.")(function)

    return decorate


@click.group("gpu")
def command() -> None:
    """Check and time what needs a GPU."""


@command.command("smoke")
@_options(45)
@networks_option
def smoke(networks: str, **common: Any) -> int | None:
    """Check drivers, kernels, CUDA graphs, dropout masks, precisions and a training step."""
    names = _networks(networks, common["device"])

    def items(lines: Lines) -> Iterable[Item]:
        from gpu_cells import Bench
        from gpu_smoke import smoke_items

        return smoke_items(Bench(lines, common["device"]), names)

    return _run("smoke", _worker(items, common), common, networks=list(names))


@command.command("bench")
@_options(225)
@networks_option
@click.option("--seconds", type=float, default=0.3, show_default=True, help="Timing per way, s.")
def bench(networks: str, seconds: float, **common: Any) -> int | None:
    """Time every way to run each network against eager PyTorch."""
    names = _networks(networks, common["device"])

    def items(lines: Lines) -> Iterable[Item]:
        from gpu_bench import bench_items
        from gpu_cells import Bench

        return bench_items(Bench(lines, common["device"], seconds), names)

    return _run("bench", _worker(items, common), common, networks=list(names), seconds=seconds)


@command.command("train")
@_options(240)
@click.option(
    "--preset", type=click.Choice(["mnist-large", "digits"]), help="Default: mnist-large; in a rehearsal digits."
)
@click.option("--data-root", type=PATH, help="Folder of MNIST's files, packed or not.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change a field, as in cmfast-train.")
@click.option("--run", "folder", type=PATH, help="Folder of the run; default: NAME_run beside --out.")
def train(
    preset: str | None, data_root: Path | None, settings: tuple[str, ...], folder: Path | None, **common: Any
) -> int | None:
    """Train a preset within the budget, evaluate it, draw samples."""
    out, preset = common["out"], preset or ("mnist-large" if common["device"] == "cuda" else "digits")
    folder = folder or out.with_name(f"{out.stem}_run")
    if preset != "digits" and data_root is None:
        raise CmfastError(f"the preset {preset} needs its data; add --data-root DIR")
    if common["fresh"] and common["pipe"] is None and folder.exists():
        if not (folder / "config.json").exists():
            raise CmfastError(f"--fresh: {folder} is not the folder of a run, so it is kept; pass another --run")
        shutil.rmtree(folder)

    def items(lines: Lines) -> Iterable[Item]:
        from gpu_train import Training, TrainRequest

        request = TrainRequest(
            preset=preset, settings=settings, data_root=data_root, run=folder, out=out, device=common["device"],
            until=common["until"], budget=common["budget"],
        )  # fmt: skip
        return Training(request, lines).items()

    return _run("train", _worker(items, common), common, preset=preset, settings=list(settings))


@command.command("tests")
@_options(120)
@click.argument("files", nargs=-1)
def tests(files: tuple[str, ...], **common: Any) -> int | None:
    """Run the tests marked gpu, in FILES or in all."""

    def worker(lines: Lines) -> int:
        from gpu_pytest import files_with_gpu_tests, run_tests

        return run_tests(files or files_with_gpu_tests(), common["items"], lines, common["until"], common["pipe"])

    return _run("tests", worker, common, files=list(files))


@command.command("record")
@click.argument("files", nargs=-1, required=True, type=PATH)
@click.option("--json", "json_file", type=PATH, required=True, help="The record.")
def record(files: tuple[Path, ...], json_file: Path) -> None:
    """Merge the lines of several commands on one machine into one record."""
    from gpu_record import bars, merge

    check_target(json_file, inputs=files)
    merged = merge(files)
    write_text(json_file, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
    for words in bars(merged):
        click.echo(words)
    counts = merged["counts"]
    click.echo(f"{counts['measured']} measured, {counts['failed']} failed, {counts['skipped']} skipped: {json_file}")


@command.command("table")
@click.option("--write", is_flag=True, help="Write them into docs/results.md and benchmarks/README.md.")
def table(write: bool) -> None:
    """Print the tables of the records in benchmarks/results."""
    from gpu_record import fill, full_tables, records, short_table

    found = records()
    click.echo(full_tables(found))
    for file, text in (("docs/results.md", short_table(found)), ("benchmarks/README.md", full_tables(found))):
        if write:
            document = ROOT / file
            write_text(document, fill(document.read_text(encoding="utf-8"), text))


def _networks(text: str, device: str) -> tuple[str, ...]:
    """Return the networks of an option."""
    names = tuple(text.split(",")) if text else NETWORKS[device]
    if unknown := [name for name in names if name not in KNOWN]:
        raise CmfastError(f"--networks takes names from {', '.join(KNOWN)}, got {unknown[0]}")
    return names


def _worker(items: Callable[[Lines], Iterable[Item]], common: dict[str, Any]) -> Callable[[Lines], int]:
    """Return the worker for the requested items; it imports PyTorch when it is called."""
    texts = common["items"].split(",")

    def worker(lines: Lines) -> int:
        wanted = (item for item in items(lines) if any(text in item.name for text in texts))
        return work(wanted, lines, common["until"], common["pipe"])

    return worker


def _run(what: str, worker: Callable[[Lines], int], common: dict[str, Any], **options: Any) -> int | None:
    """Be the worker, or start workers and print what they measured."""
    begun, out, budget = time.monotonic(), common["out"], common["budget"]
    if common["pipe"] is not None:
        return worker(Lines(out))
    if not 1 <= budget <= 86400:
        raise CmfastError(f"--budget takes 1 to 86400 seconds, got {budget:g}")
    check_target(out)
    options |= {"budget": budget, "items": common["items"]}
    lines = begin(out, what, common["device"], fresh=common["fresh"], **options)
    last = supervise([sys.executable, *sys.argv], lines, begun + budget - min(START_END_S, budget / 10))
    for words in (*filter(None, map(_words, lines.before)), *_not_here(lines.before)):
        click.echo(words)
    counts = f"{last['measured']} measured, {last['failed']} failed, {last['skipped']} skipped for lack of time"
    click.echo(f"{counts}: {out}")
    if last["failed"] or "error" in last:
        raise CheckFailed(last.get("error") or f"{last['failed']} failed, listed above")
    return None


def _words(line: Line) -> str:
    """Return a line as text; "" for what was not measured, unless it failed."""
    if "item" not in line or "skipped" in line or "not_here" in line:
        return ""
    name, kind = line["item"], line.get("kind")
    if "error" in line:
        return f"{name}: error: {line['error']}"
    if kind == "row":
        part = f", {line['of_roofline']:.0%} of the roofline" if "of_roofline" in line else ""
        return f"{name}: {line['wall']['median_ms']:.3f} ms, {line['times_as_fast']:.2f}x eager{part}"
    if kind == "ceiling":
        rate, unit = (line["flops_per_s"], "FLOP/s") if line["dtype"] else (line["bytes_per_s"], "B/s")
        return f"{name}: {rate / 1e12:.3g} T{unit}"
    if kind == "evaluation":
        return f"{name}: Frechet distance {line['fd']:.3f}, halves of the data {line['halves']['fd']:.3f}"
    if kind == "training":
        return f"{name}: {line['images']:,} of {line['planned']:,} images, {line['images_per_s']} per second"
    if kind == "sample":
        return f"{name}: {line['images_per_s']:.0f} images/s, {line['of_network']:.0%} of the network's own"
    return f"{name}: {'not ok' if line.get('ok') is False else 'ok'}"


def _not_here(lines: Iterable[Line]) -> list[str]:
    """Return why this machine cannot do some items, with their number and the first of them."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if "item" in line and "not_here" in line:
            found.setdefault(line["not_here"], []).append(line["item"])
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: not here: {why}"
        for why, names in found.items()
    ]


if __name__ == "__main__":
    run_command(command)
