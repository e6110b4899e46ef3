# SPDX-License-Identifier: MIT
"""What `gpu.py bench` measures, most valuable first: the card's ceilings, every way to run each network, the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import gpu_ceilings
import gpu_extra
from gpu_cells import EAGER, Bench, Cell
from gpu_items import Item

WAYS = ("channels_last", "cuda_graph", "channels_last cuda_graph", "fused cuda_graph")
FEW = (EAGER, *WAYS[2:])  # the ways in precisions other than bf16
COMPILED = ("reduce-overhead", "compiled")  # torch.compile: seconds, and minutes
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
BATCHES = (1, 8, 64, 256)
MAIN = (1, 64, 256)  # the batches that come first
EXPECT_S = {"digits": 0.5, "mnist": 2.0, "cifar10": 3.0, "imagenet64": 5.0}  # twice at batch 256, in float32
COMPILE_S = {"digits": 30.0, "mnist": 45.0, "cifar10": 60.0, "imagenet64": 120.0}


def bench_items(bench: Bench, networks: Sequence[str]) -> Iterator[Item]:
    """Yield all items, each once."""
    yield from ceiling_items(bench.device)
    done: set[str] = set()
    for item in _ordered(bench, networks):
        if item.name not in done:
            done.add(item.name)
            yield item


def ceiling_items(device: str) -> Iterator[Item]:
    """Yield the measurements of the card itself."""
    yield Item(name="ceiling copy", run=functools.partial(gpu_ceilings.copy_line, device))
    for dtype in gpu_ceilings.DTYPES:
        if device == "cuda" or dtype == "float32":
            yield Item(name=f"ceiling {dtype}", run=functools.partial(gpu_ceilings.product_line, device, dtype))


def _ordered(bench: Bench, networks: Sequence[str]) -> Iterator[Item]:
    def cells(
        precision: str, batches: Sequence[int], steps: int = 1, ways: Sequence[str] = (EAGER, *WAYS)
    ) -> Iterator[Item]:
        for network in networks:
            for batch in batches:
                cell = Cell(network=network, precision=precision, batch=batch, steps=steps)
                yield from (_item(bench, cell, way) for way in ways)

    yield from cells("bf16", MAIN)
    yield from gpu_extra.items(bench, networks)
    for precision in ("fp16", "tf32", "fp32"):  # a little of everything before all of anything
        yield from cells(precision, (64,), ways=FEW)
    yield from cells("bf16", (64,), 2, FEW)
    for precision in ("fp16", "tf32", "fp32"):
        yield from cells(precision, (1, 256) if precision == "fp16" else (1,), ways=FEW)
    yield from cells("bf16", MAIN, 2, FEW)
    for steps in (1, 2):
        for precision in PRECISIONS:
            yield from cells(precision, BATCHES, steps)
    for way in COMPILED:
        for network in networks:
            if network != "imagenet64":  # minutes of compiling
                yield from (_item(bench, Cell(network=network, precision="bf16", batch=b), way) for b in MAIN)


def _item(bench: Bench, cell: Cell, way: str) -> Item:
    large = (2 if cell.batch == 256 else 1) * (2 if cell.precision == "fp32" else 1)
    expect = EXPECT_S[cell.network] * large + (COMPILE_S[cell.network] if way in COMPILED else 0.0)
    run = functools.partial(bench.row, cell, way)
    return Item(name=f"{cell.name} {way or 'eager'}", run=run, expect_s=expect, limit_s=30 + 4 * expect)
