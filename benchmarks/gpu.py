# SPDX-License-Identifier: MIT
"""Everything that needs a GPU: the tests marked gpu, and every engine of this machine on every network. `make gpu`.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Needs no network: what this machine does not have is listed with the reason, and left out. The record is written after
each part, and the same command again goes on where it stopped. Weights are random (`networks`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cmfast.cli._run import run_command
from cmfast.cli._types import INTS
from cmfast.engines._tensorrt_library import LIBRARIES
from cmfast.errors import CmfastError
from cmfast.files import check_target, write_text
from cmfast.timing import provenance
from cmfast_train.checkpoint import save_checkpoint
from networks import NAMES, parameters, random_model

ROOT = Path(__file__).resolve().parent.parent
BARS = {1: 4.0, 64: 1.5}  # batch: how many times as fast as eager in the same precision the best engine is to be
# What cmfast-bench is asked for, by the words of a report: a variant of PyTorch's, of ONNX Runtime's, or a library.
PYTORCH = {"PyTorch": "", "torch.compile": "compiled", "PyTorch, CUDA graph": "cuda_graph"}
ONNX = {"ONNX Runtime": "", "ONNX Runtime, CUDA graph": "cuda_graph", "ONNX Runtime, TensorRT": "tensorrt"}


@click.command("gpu")
@click.option("--networks", default="mnist,cifar10,imagenet64", show_default=True, help=f"Of {', '.join(NAMES)}.")
@click.option("--batch", type=INTS, default="1,8,64,256", show_default=True, help="Images at a time.")
@click.option("--steps", type=INTS, default="1,2", show_default=True, help="Network calls an image.")
@click.option("--precision", default="fp32,fp16", show_default=True, help="Of eager PyTorch and the exported files.")
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
    seconds: float,
    device: str,
    tests: bool,
    keep: Path | None,
    out: Path,
) -> None:
    """Test and time all engines of this machine."""
    check_target(out)
    names, precisions = networks.split(","), precision.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise CmfastError(f"--networks {unknown[0]}: there are {', '.join(NAMES)}")
    record = _begin(out, device)
    record["missing"] = missing = _missing(device)
    for name, why in missing.items():
        click.echo(f"left out: {name}: {why}")
    write_text(out, json.dumps(record, indent=1) + "\n")
    if tests and record["tests"] is None:
        record["tests"] = _tests()
        write_text(out, json.dumps(record, indent=1) + "\n")
    for name in names:
        wanted = [n for n in batch if not any((r["network"], r["batch"]) == (name, n) for r in record["runs"])]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = (keep or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            files = _prepare(name, folder, steps, precisions, device, missing, max(batch))
            for n in wanted:
                run = _bench(files, folder, n, steps, precisions, seconds, device, missing)
                record["runs"].append({"network": name, "batch": n, "parameters": files["parameters"], **run})
                write_text(out, json.dumps(record, indent=1) + "\n")
    record["summary"] = summary = list(_summary(record["runs"]))
    write_text(out, json.dumps(record, indent=1) + "\n")
    for row in summary:
        click.echo(row["words"])
    click.echo(f"the record is in {out}")


def _begin(out: Path, device: str) -> dict[str, Any]:
    """Return the record of an interrupted run of the same code on the same machine, or a new one."""
    new = {"what": "gpu", **provenance(), "device": device, "missing": {}, "tests": None, "runs": []}
    try:
        old: dict[str, Any] = json.loads(out.read_text())
    except (OSError, ValueError):
        return new
    same = all(old.get(key) == new[key] for key in ("what", "machine", "versions", "commit", "device"))
    return old if same and old["commit"] and not old["commit"]["dirty"] else new


def _missing(device: str) -> dict[str, str]:
    """Return which engines this machine does not have, with the reason, by trying each on a small model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(random_model("digits"), folder / "model.pt")
        _run(
            "cmfast_export.cli",
            folder / "model.pt",
            "--kind",
            "sampler",
            "--precision",
            "fp16",
            "-o",
            folder / "m.onnx",
        )
        found = {}
        for name, variant in {**PYTORCH, **ONNX}.items():
            file = folder / ("m.onnx" if name in ONNX else "model.pt")
            found[name] = _probe(file, device, variant, "" if name in ONNX else "fp16")
        for library, name in LIBRARIES.items():
            engine = folder / f"{library}.engine"
            build = ("--format", "engine", "--build", f"library={library}", "-o", engine)
            found[name] = _run("cmfast_export.cli", folder / "m.onnx", *build) or _probe(engine, device, "", "")
    return {name: why for name, why in found.items() if why}


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
            return {
                "passed": 0,
                "failed": {"all": "pytest did not start; run it by hand: pytest -m gpu"},
                "skipped": {},
            }
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        other = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if other is None:
            found["passed"] += 1
        else:
            kind = "skipped" if other.tag == "skipped" else "failed"
            found[kind][name] = " ".join((other.get("message") or "").split())[:300]
    return found


def _prepare(
    name: str,
    folder: Path,
    steps: tuple[int, ...],
    precisions: list[str],
    device: str,
    missing: dict[str, str],
    most: int,
) -> dict[str, Any]:
    """Return the files of one network: the checkpoint, and for each precision and number of steps graph and engines."""
    model = random_model(name)
    save_checkpoint(model, folder / "model.pt")
    files: dict[str, Any] = {
        "baseline": folder / "model.pt",
        "models": [],
        "parameters": parameters(model),
        "failed": {},
    }
    verify_on = "cuda" if device == "cuda" and "ONNX Runtime" not in missing else "cpu"
    for precision in precisions:
        for k in steps:
            onnx = folder / f"{precision}_{k}.onnx"
            export = ("--kind", "sampler", "--steps", k, "--precision", precision, "--device", verify_on, "-o", onnx)
            if why := _run("cmfast_export.cli", folder / "model.pt", *export):
                files["failed"][onnx.name] = why
                continue
            if "ONNX Runtime" not in missing:
                files["models"].append(onnx)
            for library, words in LIBRARIES.items():
                engine = folder / f"{precision}_{k}_{library}.engine"
                if words in missing:
                    continue
                build = ("--build", f"library={library}", "--build", f"batch=1,{min(8, most)},{most}", "-o", engine)
                if why := _run("cmfast_export.cli", onnx, "--format", "engine", *build):
                    files["failed"][engine.name] = why
                    continue
                files["models"].append(engine)
    return files


def _bench(
    files: dict[str, Any], folder: Path, batch: int, steps: tuple[int, ...], precisions: list[str], seconds: float,
    device: str, missing: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return what cmfast-bench says of all engines at one batch size; what fails is left out, by name."""
    record = folder / f"bench_{batch}.json"
    onnx = [name for name in ONNX if name not in missing]
    variants = [v for name, v in PYTORCH.items() if v and name not in missing]
    # The TensorRT provider of ONNX Runtime multiplies float32 in TF32 and is refused for it; its engines are here.
    variants += [v for name, v in ONNX.items() if v == "cuda_graph" and name in onnx and v not in variants]
    failed = dict(files["failed"])
    models = list(files["models"])
    while True:
        arguments = [
            *models, "--baseline", files["baseline"], "--device", device, "--batch", batch, "--precision",
            ",".join(precisions), "--variants", ",".join(variants), "--steps", ",".join(map(str, steps)),
            "--seconds", seconds, "--json", record,
        ]  # fmt: skip
        why = _run("cmfast.cli.bench", *arguments)
        if not why:
            content = json.loads(record.read_text())
            kept = ("options", "warning", "included", "ceilings", "left_out", "rows", "starts")
            return {**{key: content[key] for key in kept}, "failed": failed}
        guilty = next((model for model in models if model.name in why), None)
        variant = next((v for v in variants if v in why), None)
        if guilty is None and variant is None:
            return {"failed": {**failed, "all": why}, "rows": []}
        if guilty is not None:
            models.remove(guilty)
            failed[guilty.name] = why
        elif variant is not None:
            variants.remove(variant)
            failed[variant] = why


def _summary(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield, for each network, batch, number of steps and precision, the best engine against eager PyTorch."""
    for run in runs:
        for steps in dict.fromkeys(row["steps"] for row in run["rows"]):
            for dtype in dict.fromkeys(row["dtype"] for row in run["rows"]):
                rows = [
                    row
                    for row in run["rows"]
                    if (row["steps"], row["dtype"]) == (steps, dtype) and row["times_as_fast_same_precision"]
                ]
                if not rows:
                    continue
                best = max(rows, key=lambda row: row["times_as_fast_same_precision"])
                times, bar = best["times_as_fast_same_precision"], BARS.get(run["batch"])
                words = (
                    f"{run['network']}, batch {run['batch']}, {steps} step(s), {dtype}: {best['contender']} "
                    f"{best['median_ms']:.2f} ms, {times:.2f}x eager"
                )
                if bar:
                    words += f" ({'reaches' if times >= bar else 'short of'} {bar:g}x)"
                where = {"network": run["network"], "batch": run["batch"], "steps": steps, "dtype": dtype}
                yield {**where, "best": best["contender"], "times_as_fast": times, "bar": bar, "words": words}


def _run(module: str, *arguments: object) -> str:
    """Run a command of cmfast; return its last line on stderr where it failed, else an empty string."""
    program = [sys.executable, "-P", "-m", module, *map(str, arguments)]
    click.echo(f"running {module} {' '.join(map(str, arguments))}"[:160], err=True)
    done = subprocess.run(program, capture_output=True, text=True)
    if not done.returncode:
        return ""
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    why = re.sub(r"^(cmfast[\w.-]*|[\w.]*Error): ", "", why)
    return re.sub(r"\S*/(?=[^/\s]+\.(onnx|engine|pt)\b)", "", why)  # files of a temporary folder


if __name__ == "__main__":
    run_command(command)
