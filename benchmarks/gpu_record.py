# SPDX-License-Identifier: MIT
"""One record from the lines of several commands on one machine, checked; and the tables that documents take from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cmfast.errors import CmfastError
from gpu_items import kind_of
from gpu_lines import ROOT, Line, read_lines

SAME = ("machine", "versions", "commit", "code", "device")  # of the heads of all files
RESULTS = ROOT / "benchmarks" / "results"
NONE = "No record yet: nothing has been measured on a GPU."
BEGIN, END = "<!-- gpu table: benchmarks/gpu.py table -->", "<!-- end of gpu table -->"
# What a record of a card is to show: at these batches times as fast as eager in the same precision;
# of the roofline at batch 256; of the network's own rate by Model.sample; the Frechet distance of a short training.
TIMES_AS_FAST = {1: 4.0, 64: 1.8}
OF_ROOFLINE, OF_NETWORK, DISTANCE = 0.6, 0.8, 3.0
_NUMBER = (int, float)
_TIMES = {"median_ms": _NUMBER, "p10_ms": _NUMBER, "p90_ms": _NUMBER, "calls": int}
SCHEMA: dict[str, dict[str, Any]] = {  # what a line of a kind must have, by type; a mapping has these inside
    "device": {"machine": dict, "torch": str},
    "ceiling": {"dtype": (str, type(None))},
    "attention": {"dtype": str, "ok": bool, "nchw": {"kernels": list}, "channels_last": {"kernels": list}},
    "float32": {"ok": bool, "allowed": _NUMBER},
    "masks": {"ok": bool, "nchw": _NUMBER, "channels_last": _NUMBER},
    "replay": {"ok": bool, "network": str, "way": str, "difference": _NUMBER},
    "train": {"ok": bool, "network": str, "precision": str, "losses": list},
    "noise": {"values_per_s": _NUMBER, "numpy_values_per_s": _NUMBER},
    "row": {
        "network": str, "precision": str, "batch": int, "steps": int, "way": str, "wall": _TIMES, "eager": _TIMES,
        "times_as_fast": _NUMBER, "difference": _NUMBER, "allowed": _NUMBER, "flops": _NUMBER,
    },
    "sample": {"network": str, "images_per_s": _NUMBER, "network_images_per_s": _NUMBER, "of_network": _NUMBER},
    "profile": {"network": str, "total_ms": _NUMBER, "table": list},
    "plan": {"images": dict, "config": dict},
    "training": {"preset": str, "images": int, "planned": int, "curve": list},
    "grid": {"steps": int, "file": str},
    "evaluation": {"model": str, "calls": int, "n": int, "fd": _NUMBER, "halves": {"fd": _NUMBER}},
    "test": {"ok": bool},
}  # fmt: skip


def merge(files: Sequence[Path]) -> dict[str, Any]:
    """Return the record of the lines of some files.

    Raises:
        CmfastError: they are of different machines or code, two have the same item, or a line lacks something.
    """
    heads: list[Line] = []
    items: dict[str, Line] = {}
    sources: dict[str, Path] = {}
    for file in files:
        first, *rest = read_lines(file)
        if heads and (differs := [name for name in SAME if first.get(name) != heads[0].get(name)]):
            raise CmfastError(f"{file} has another {differs[0]} than {files[0]}; they are two records")
        heads.append(first)
        own: dict[str, Line] = {}
        for line in rest:
            if "item" not in line:
                continue
            name = f"{first['what']}: {line['item']}"
            if name in own and "skipped" in line:  # what an earlier run had no time for, a later one may have
                continue
            own[name] = line
        for name, line in own.items():
            if name in items and "skipped" not in line and "skipped" not in items[name]:
                raise CmfastError(
                    f"{name.partition(': ')[2]!r} is both in {sources[name]} and in {file}; leave one out"
                )
            if name not in items or "skipped" in items[name]:
                items[name], sources[name] = line, file
    for name, line in items.items():
        _check(line, sources[name])
    counts = {kind: sum(kind_of(line) == kind for line in items.values()) for kind in ("measured", "failed")}
    skipped = [name for name, line in items.items() if "skipped" in line]
    return {
        "what": "gpu",
        "date": heads[0]["date"],
        **{name: heads[0].get(name) for name in SAME},
        "runs": [{name: head[name] for name in ("what", "date", "options")} for head in heads],
        "counts": {**counts, "skipped": len(skipped)},
        "skipped": skipped,
        "lines": [{"of": name.partition(":")[0], **line} for name, line in items.items() if "skipped" not in line],
    }


def _check(line: Line, file: Path) -> None:
    """Raise unless a line has what its kind must have."""
    if "error" in line or "not_here" in line or "skipped" in line:
        return
    kind = line.get("kind")
    if kind not in SCHEMA:
        raise CmfastError(f"{file}: the item {line['item']!r} is of the kind {kind!r}, which no table knows")
    _check_fields(line, SCHEMA[kind], f"{file}: the item {line['item']!r}")
    if kind == "row" and not line["difference"] <= line["allowed"]:
        raise CmfastError(f"{file}: the item {line['item']!r} was timed although its images differ")


def _check_fields(values: Any, schema: dict[str, Any], where: str) -> None:
    for name, wanted in schema.items():
        found = values.get(name) if isinstance(values, dict) else None
        if isinstance(wanted, dict):
            _check_fields(found, wanted, f"{where}: {name}")
        elif not isinstance(found, wanted):
            raise CmfastError(f"{where}: {name} is {found!r}")


def bars(record: dict[str, Any]) -> list[str]:
    """Return what a record has of what it is to show, in words, and whether it does."""
    found = []
    for (network, precision, steps, batch), lines in _rows(record).items():
        where = f"{network} {precision} batch {batch} steps {steps}"
        best = max(lines, key=lambda line: _times(line, lines))
        if batch in TIMES_AS_FAST:
            times = _times(best, lines)
            words = f"{where}: {best['way']} {times:.2f}x eager"
            found.append(_held(words, times >= TIMES_AS_FAST[batch], f"{TIMES_AS_FAST[batch]:g}x"))
        closest = max(lines, key=lambda line: line.get("of_roofline", 0.0))
        if batch == 256 and "of_roofline" in closest and len(lines) > 1:
            words = f"{where}: {closest['way']} {closest['of_roofline']:.0%} of the roofline"
            found.append(_held(words, closest["of_roofline"] >= OF_ROOFLINE, f"{OF_ROOFLINE:.0%}"))
    for line in _of(record, "sample"):
        words = f"{line['network']}: Model.sample {line['of_network']:.0%} of the network's own rate"
        found.append(_held(words, line["of_network"] >= OF_NETWORK, f"{OF_NETWORK:.0%}"))
    for line in _of(record, "evaluation"):
        if line["model"] == "few steps" and line["calls"] <= 2:
            words = f"trained: {line['calls']} call(s), {line['n']:,} samples, Frechet distance {line['fd']:.2f}"
            found.append(_held(words, line["fd"] <= DISTANCE, f"{DISTANCE:g}"))
    return found


def _held(words: str, reached: bool, bar: str) -> str:
    return f"{words} ({'reaches' if reached else 'short of'} {bar})"


def records() -> list[dict[str, Any]]:
    """Return the records of the repository, by name."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("gpu_*.json"))]


def full_tables(found: Sequence[dict[str, Any]]) -> str:
    """Return the tables of benchmarks/README.md."""
    return _per_record(found, (_card, _best, _ways, _samples, _training))


def short_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the tables of docs/results.md."""
    return _per_record(found, (_best, _training))


def fill(text: str, table: str) -> str:
    """Return a document with a table between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise CmfastError(f"a document has no place for the table: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _per_record(found: Sequence[dict[str, Any]], parts: Iterable[Callable[[dict[str, Any]], str]]) -> str:
    blocks = [part(record) for record in found for part in parts]
    return "\n\n".join(filter(None, blocks)) or NONE


def _of(record: dict[str, Any], kind: str) -> list[Line]:
    return [line for line in record["lines"] if line.get("kind") == kind]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body]) if body else ""


def _card(record: dict[str, Any]) -> str:
    machine, rates = record["machine"], {line["dtype"]: line for line in _of(record, "ceiling")}
    words = [
        f"{dtype} {rates[dtype]['flops_per_s'] / 1e12:,.0f} TFLOP/s"
        for dtype in ("bfloat16", "float16", "tf32", "float32")
        if dtype in rates
    ]
    words += [f"copy {rates[None]['bytes_per_s'] / 1e12:.2f} TB/s"] if None in rates else []
    counts = record["counts"]
    return (
        f"{machine['gpu']}, driver {machine['driver']}, PyTorch {record['versions'].get('torch')}; "
        f"{counts['measured']} items measured, {counts['failed']} failed, {counts['skipped']} left out for lack of "
        "time. "
        f"Ceilings: {', '.join(words)}."
    )


def _rows(record: dict[str, Any]) -> dict[tuple[str, str, int, int], list[Line]]:
    """Return the rows of each network, precision, number of steps and batch."""
    cells: dict[tuple[str, str, int, int], list[Line]] = {}
    for line in _of(record, "row"):
        cells.setdefault((line["network"], line["precision"], line["steps"], line["batch"]), []).append(line)
    return cells


def _times(line: Line, lines: Sequence[Line]) -> float:
    """Return how many times as fast as eager PyTorch a way is, by the fastest of eager's runs in that cell.

    Eager is timed in turns with each way. At small batches it waits for the host, whose speed changes by a third
    between the runs: the fastest says the least for a way.
    """
    fastest: float = min(each["eager"]["median_ms"] for each in lines)
    return fastest / float(line["wall"]["median_ms"])


def _best(record: dict[str, Any]) -> str:
    """The fastest way of each cell in bf16, one step."""
    rows = []
    for (network, precision, steps, batch), lines in _rows(record).items():
        best = max(lines, key=lambda line: _times(line, lines))
        compared = any(line["way"] != "eager" for line in lines)  # else time was up before anything else ran
        if (precision, steps) == ("bf16", 1) and compared:
            rate = f"{best['images_per_s']:,.0f}"
            roof = f"{best['of_roofline']:.0%}" if "of_roofline" in best else ""
            fast = f"{_times(best, lines):.1f}x"
            rows.append((network, str(batch), best["way"], _ms(best["wall"]), fast, rate, roof))
    head = ("bf16, 1 step", "batch", "fastest", "ms (p10 to p90)", "eager in bf16", "images/s", "of the roofline")
    return _table(head, rows)


def _ways(record: dict[str, Any]) -> str:
    """Every way at every cell: how many times as fast as eager in the same precision."""
    ways = list(dict.fromkeys(line["way"] for line in _of(record, "row") if line["way"] != "eager"))
    rows = []
    for (network, precision, steps, batch), lines in _rows(record).items():
        by_way = {line["way"]: line for line in lines}
        eager = _ms(min((line["eager"] for line in lines), key=lambda times: times["median_ms"]))
        cells = [f"{_times(by_way[way], lines):.1f}x" if way in by_way else "" for way in ways]
        rows.append((network, precision, str(steps), str(batch), eager, *cells))
    return _table(("network", "precision", "steps", "batch", "eager, ms (p10 to p90)", *ways), rows)


def _samples(record: dict[str, Any]) -> str:
    rows = [
        (
            line["network"], line["way"], f"{line['images_per_s']:,.0f}", f"{line['network_images_per_s']:,.0f}",
            f"{line['of_network']:.0%}",
        )
        for line in _of(record, "sample")
    ]  # fmt: skip
    head = ("`Model.sample`, bf16, 1 step", "way", "images/s", "the network's own", "of it")
    return _table(head, rows)


def _training(record: dict[str, Any]) -> str:
    trained = _of(record, "training")
    rows = [
        (
            trained[0]["preset"], line["model"], str(line["calls"]), f"{line['n']:,}", f"{line['fd']:.2f}",
            f"{line['halves']['fd']:.2f}", f"{trained[0]['images']:,} images, {trained[0]['seconds']:.0f} s",
        )
        for line in _of(record, "evaluation")
        if trained
    ]  # fmt: skip
    head = ("training", "model", "calls", "samples", "Fréchet distance", "halves of the data", "trained on")
    return _table(head, rows)


def _ms(times: dict[str, float]) -> str:
    return f"{times['median_ms']:.2f} ({times['p10_ms']:.2f} to {times['p90_ms']:.2f})"
