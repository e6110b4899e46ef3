# SPDX-License-Identifier: MIT
"""Everything that needs a GPU: the tests marked gpu, and every engine of this machine on every network. `make gpu`.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Needs no network: what this machine does not have is listed with the reason, and left out. The record is written after
each part, and the same command again goes on where it stopped; what has no times is tried again, and other options add
to the record. Weights are random (`networks`).

A cell is a network at a batch size: all engines in one run of `cmfast-bench --keep-going`, which names what fails. A
file that could not be timed beside all others, who share the GPU's memory, runs once more with eager PyTorch alone.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cmfast.artifact import PRECISIONS
from cmfast.cli._run import run_command
from cmfast.cli._types import INTS
from cmfast.engines._tensorrt_library import LIBRARIES
from cmfast.errors import CheckFailed, CmfastError, EngineError, one_line
from cmfast.files import check_target, write_text
from cmfast.timing import provenance
from cmfast_train.checkpoint import save_checkpoint
from networks import NAMES, parameters, random_model

ROOT = Path(__file__).resolve().parent.parent
BARS = {1: 4.0, 64: 1.5}  # batch: how many times as fast as eager in the same precision the best engine is to be
# What cmfast-bench is asked for, by the words of a report: a variant of PyTorch's, of ONNX Runtime's, or a library.
PYTORCH = {"PyTorch": "", "torch.compile": "compiled", "PyTorch, CUDA graph": "cuda_graph"}
ONNX = {"ONNX Runtime": "", "ONNX Runtime, CUDA graph": "cuda_graph", "ONNX Runtime, TensorRT": "tensorrt"}
DISPENSABLE = ("compiled", "cuda_graph", *LIBRARIES)
KEPT = ("options", "warning", "included", "ceilings", "left_out", "rows", "starts")  # of a record of cmfast-bench


@click.command("gpu")
@click.option("--networks", default="mnist,cifar10,imagenet64", show_default=True, help=f"Of {', '.join(NAMES)}.")
@click.option("--batch", type=INTS, default="1,8,64,256", show_default=True, help="Images at a time.")
@click.option("--steps", type=INTS, default="1,2", show_default=True, help="Network calls an image.")
@click.option("--precision", default="fp32,fp16", show_default=True, help="Of eager PyTorch and the exported files.")
@click.option("--without", default="", metavar="NAME,..", help=f"Leave out, of {', '.join(DISPENSABLE)}.")
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Counted time of each at each setting.")
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="cpu: a rehearsal."
)
@click.option("--tests/--no-tests", default=True, show_default=True, help="Run the tests marked gpu.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Leave models and engines here.")
@click.option("--json", "out", type=click.Path(path_type=Path), required=True, help="The record.")
def command(
    networks: str,
    batch: tuple[int, ...],
    steps: tuple[int, ...],
    precision: str,
    without: str,
    seconds: float,
    device: str,
    tests: bool,
    keep: Path | None,
    out: Path,
) -> None:
    """Test and time all engines of this machine."""
    check_target(out)
    if min(batch, default=0) < 1 or min(steps, default=0) < 1 or not 0 < seconds < math.inf:
        raise CmfastError("--batch and --steps must be at least 1, --seconds a number greater than 0")
    names = _list("networks", networks, NAMES)
    asked = {
        "steps": list(steps),
        "precision": _list("precision", precision, tuple(PRECISIONS)),
        "without": sorted(_list("without", without, DISPENSABLE)) if without else [],
        "seconds": seconds,
        "engine_batch": [1, min(8, max(batch)), max(batch)],  # least, best, most
    }
    record = _begin(out, device)

    def save() -> None:
        write_text(out, json.dumps(record, indent=1) + "\n")

    have, record["missing"] = _engines(device, asked["without"])
    for name, why in record["missing"].items():
        click.echo(f"left out: {name}: {why}")
    if not have:
        raise EngineError(f"nothing on this machine runs on {device}, for the reasons above; nothing was measured")
    save()
    if tests and not (record["tests"] and record["tests"]["passed"] and not record["tests"]["failed"]):
        record["tests"] = _tests()
        save()
    for name in names:
        wanted = [n for n in batch if not any(_is(run, name, n, asked) and _rows(run) for run in record["runs"])]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            files = _prepare(name, folder, asked, device, have)
            for n in wanted:
                passes = _bench(files, folder, n, asked, device, have)
                about = {"network": name, "batch": n, "parameters": files["parameters"], "asked": asked}
                others = [run for run in record["runs"] if not _is(run, name, n, asked)]
                record["runs"] = [*others, {**about, "failed": files["failed"], "passes": passes}]
                save()
    record["summary"] = summary = list(_summary(record["runs"]))
    save()
    for row in summary:
        click.echo(row["words"])
    for words in _left_out(record["runs"]):
        click.echo(f"left out: {words}")
    failed = list(_failed(record))
    for words in failed:
        click.echo(f"failed: {words}")
    click.echo(f"the record is in {out}")
    if failed:
        raise CheckFailed(f"{len(failed)} failed, listed above; the same command tries again what has no times")


def _list(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in allowed]:
        raise CmfastError(f"--{option} {unknown[0]}: there are {', '.join(allowed)}")
    return names


def _begin(out: Path, device: str) -> dict[str, Any]:
    """Return the record of an earlier run of the same code on the same machine, or a new one."""
    new = {"what": "gpu", **provenance(), "device": device, "missing": {}, "tests": None, "runs": []}
    try:
        old: dict[str, Any] = json.loads(out.read_text())
    except (OSError, ValueError, RecursionError):
        return new
    if not isinstance(old, dict) or not old.keys() >= new.keys():
        return new
    differs = [key for key in ("what", "machine", "versions", "commit", "device") if old.get(key) != new[key]]
    if not differs and old["commit"] and not old["commit"]["dirty"]:
        return old
    why = f"its {differs[0]} is another" if differs else "its code is in no commit"
    click.echo(f"{out} is begun anew: {why}", err=True)
    return new


def _is(run: dict[str, Any], network: str, batch: int, asked: dict[str, Any]) -> bool:
    """Whether a run of the record is of this cell, with these options."""
    return (run["network"], run["batch"], run["asked"]) == (network, batch, asked)


def _rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for each in run["passes"] for row in each.get("rows", ())]


def _engines(device: str, without: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the engines of this machine that are wanted, and why it lacks others, by trying each on a small model."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(random_model("digits"), folder / "model.pt")
        export = ("--kind", "sampler", "--precision", "fp16", "-o", folder / "m.onnx")
        if why := _run("cmfast_export.cli", folder / "model.pt", *export):
            raise EngineError(f"not even a small model can be exported here: {why}")
        for name, variant in {**PYTORCH, **ONNX}.items():
            if variant not in without:
                file, precision = (folder / "m.onnx", "") if name in ONNX else (folder / "model.pt", "fp16")
                found[name] = _probe(file, device, variant, precision)
        for library, name in LIBRARIES.items():
            if library not in without:
                engine = folder / f"{library}.engine"
                build = ("--format", "engine", "--build", f"library={library}", "-o", engine)
                found[name] = _run("cmfast_export.cli", folder / "m.onnx", *build) or _probe(engine, device, "", "")
    return [name for name, why in found.items() if not why], {name: why for name, why in found.items() if why}


def _probe(file: Path, device: str, variant: str, precision: str) -> str:
    """Return why a file cannot be run in this way, or an empty string."""
    request = {
        "file": str(file), "device": device, "threads": None, "variant": variant, "precision": precision,
        "sigmas": [80.0], "batch": 2,
    }  # fmt: skip
    return _run("cmfast.cli._probe", json.dumps(request))


def _tests() -> dict[str, Any]:
    """Run the tests marked gpu; return their numbers, and the name of each that did not pass, with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        program = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", "--timeout=1200"]
        subprocess.run(program, cwd=ROOT)
        if not report.exists():
            why = "pytest did not start; run it by hand: pytest -m gpu"
            return {"passed": 0, "failed": {"all": why}, "skipped": {}}
        return _read_report(report)


def _read_report(report: Path) -> dict[str, Any]:
    """Return what a JUnit file says."""
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        other = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if other is None:
            found["passed"] += 1
        else:
            kind = "skipped" if other.tag == "skipped" else "failed"
            found[kind][name] = one_line(other.get("message") or "")
    return found


def _prepare(name: str, folder: Path, asked: dict[str, Any], device: str, have: list[str]) -> dict[str, Any]:
    """Return the files of one network: the checkpoint, and for each precision and number of steps graph and engines."""
    model = random_model(name)
    save_checkpoint(model, folder / "model.pt")
    models: list[Path] = []
    failed: dict[str, str] = {}
    verify_on = "cuda" if device == "cuda" and "ONNX Runtime" in have else "cpu"
    for precision in asked["precision"]:
        for k in asked["steps"]:
            onnx = folder / f"{precision}_{k}.onnx"
            export = ("--kind", "sampler", "--steps", k, "--precision", precision, "--device", verify_on, "-o", onnx)
            if why := _run("cmfast_export.cli", folder / "model.pt", *export):
                failed[onnx.name] = why
                continue
            if "ONNX Runtime" in have:
                models.append(onnx)
            for library in (library for library, words in LIBRARIES.items() if words in have):
                engine = folder / f"{precision}_{k}_{library}.engine"
                batch = ",".join(map(str, asked["engine_batch"]))
                build = ("--build", f"library={library}", "--build", f"batch={batch}", "-o", engine)
                if why := _run("cmfast_export.cli", onnx, "--format", "engine", *build):
                    failed[engine.name] = why
                    continue
                models.append(engine)
    return {"baseline": folder / "model.pt", "models": models, "parameters": parameters(model), "failed": failed}


def _bench(
    files: dict[str, Any], folder: Path, batch: int, asked: dict[str, Any], device: str, have: list[str]
) -> list[dict[str, Any]]:
    """Return what cmfast-bench says of all engines at one batch size, and of those once more that then had no row."""
    # The TensorRT provider of ONNX Runtime multiplies float32 in TF32 and is refused for it; its engines are here.
    variants = dict.fromkeys(
        variant for name, variant in {**PYTORCH, **ONNX}.items() if name in have and variant not in ("", "tensorrt")
    )
    common = [
        "--baseline", files["baseline"], "--device", device, "--batch", batch, "--precision",
        ",".join(asked["precision"]), "--steps", ",".join(map(str, asked["steps"])), "--seconds", asked["seconds"],
        "--keep-going",
    ]  # fmt: skip
    first = _pass(folder / f"bench_{batch}.json", *files["models"], *common, "--variants", ",".join(variants))
    untimed = _untimed(files["models"], first)
    if not untimed and "failed" not in first:
        return [first]
    return [first, _pass(folder / f"again_{batch}.json", *untimed, *common, "--variants", "")]


def _pass(record: Path, *arguments: object) -> dict[str, Any]:
    """Return what matters of a record of cmfast-bench, or why there is none."""
    if why := _run("cmfast.cli.bench", *arguments, "--json", record):
        return {"failed": why}
    content = json.loads(record.read_text())
    return {key: content[key] for key in KEPT}


def _untimed(models: list[Path], done: dict[str, Any]) -> list[Path]:
    """Return the files without a row, in any variant; a wrong answer is one, and not asked for again."""
    timed = {row["contender"].split()[0] for row in done.get("rows", ())}
    wrong = {left["contender"] for left in done.get("left_out", ()) if left["what"] == "images"}
    return [model for model in models if model.name not in timed | wrong]


def _summary(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, for each network, batch, number of steps and precision, the best engine against eager PyTorch."""
    cells: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in _rows(run):
            cells.setdefault((run["network"], run["batch"], row["steps"], row["dtype"]), []).append(row)
    for (network, batch, steps, dtype), rows in cells.items():
        compared = [row for row in rows if row["times_as_fast_same_precision"]]
        if compared:
            best = max(compared, key=lambda row: row["times_as_fast_same_precision"])
        else:
            best = min(rows, key=lambda row: row["median_ms"])
        times, bar = best["times_as_fast_same_precision"], BARS.get(batch)
        words = f"{network}, batch {batch}, {steps} step(s), {dtype}: {best['contender']} {best['median_ms']:.2f} ms, "
        words += f"{times:.2f}x eager" if times else "and eager PyTorch did not run"
        if times and bar:
            words += f" ({'reaches' if times >= bar else 'short of'} {bar:g}x)"
        where = {"network": network, "batch": batch, "steps": steps, "dtype": dtype}
        yield {**where, "best": best["contender"], "times_as_fast": times, "bar": bar, "words": words}


def _left_out(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what could not be made or run, where it may be that this machine cannot do it."""
    for run in runs:
        where = f"{run['network']}, batch {run['batch']}"
        for name, why in run["failed"].items():
            yield f"{where}: {name}: {why}"
        for each in run["passes"]:
            if "failed" in each:
                yield f"{where}: cmfast-bench: {each['failed']}"
            for left in each.get("left_out", ()):
                if left["what"] != "images":
                    yield f"{where}: {_words(left)}"


def _failed(record: dict[str, Any]) -> Iterator[str]:
    """Yield what nothing excuses: tests that fail, wrong images, a cell without any time."""
    if record["tests"]:
        yield from (f"{name}: {why}" for name, why in record["tests"]["failed"].items())
    for run in record["runs"]:
        where = f"{run['network']}, batch {run['batch']}"
        if not _rows(run):
            yield f"{where}: nothing could be timed"
        for each in run["passes"]:
            yield from (f"{where}: {_words(left)}" for left in each.get("left_out", ()) if left["what"] == "images")


def _words(left: dict[str, Any]) -> str:
    steps = f" at {left['steps']} step(s)" if left["steps"] else ""
    return f"{left['contender']}{steps} ({left['what']}): {left['why']}"


def _run(module: str, *arguments: object) -> str:
    """Run a command of cmfast; return why it failed, its last line on stderr, or an empty string."""
    program = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    click.echo(f"running {module} {' '.join(map(str, arguments))}"[:160], err=True)
    done = subprocess.run(program, capture_output=True, text=True)
    if not done.returncode:
        return ""
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode < 0:
        why = f"died of signal {-done.returncode} after: {why}"
    why = re.sub(r"^(cmfast[\w.-]*|[\w.]*Error): ", "", why)
    return re.sub(r"\S*/(?=[^/\s]+\.(onnx|engine|pt)\b)", "", why)  # files of a temporary folder


if __name__ == "__main__":
    run_command(command)
