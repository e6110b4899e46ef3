# SPDX-License-Identifier: MIT
"""C++ against Python: the start of a process, what the headers add to the backend's time, a robot's loop.

    python benchmarks/cpp_timing.py --json benchmarks/results/cpp.json

Compiles examples/cpp with g++ -O2. The model is the one of startup.py, the policy a small one that is made here. The
robot's loop runs like any program, and, where Linux allows it, with real-time priority on the last core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper

import startup
from cmfast.bench import timing
from cmfast.cli.installed import include_dir, onnxruntime_library
from cmfast.cli.running import run_command
from cmfast.conditions import Condition
from cmfast.errors import CmfastError
from cmfast.files import check_outputs, write_text
from cmfast.formats.manifest import Manifest
from cmfast.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[1]
# As docs/edge.md advises: nothing else runs on the core but the kernel's own interrupts.
REAL_TIME = ("taskset", "-c", str((os.cpu_count() or 1) - 1), "chrt", "-f", "10")
HIDDEN = (256, 1024)  # widths of the policies: 0.12 and 1.3 million parameters


@click.command("cpp_timing.py")
@click.option("--runs", type=int, default=15, show_default=True, help="Counted processes of each.")
@click.option("--calls", type=int, default=100, show_default=True, help="Calls whose overhead is measured.")
@click.option("--loop", type=int, default=10_000, show_default=True, help="Steps of the robot's loop.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(runs: int, calls: int, loop: int, json_file: Path | None) -> None:
    """Time C++ programs beside Python."""
    check_outputs({"--json": json_file}, ())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = startup.random_model(folder / "model.pt")
        file = startup.export(checkpoint, folder / "model.onnx")
        programs = {
            name: compiled(ROOT / source, folder / name)
            for name, source in (
                ("draw", "examples/cpp/draw/draw.cpp"),
                ("policy", "examples/cpp/policy/policy.cpp"),
                ("overhead", "benchmarks/cpp_overhead.cpp"),
            )
        }
        commands = {
            "C++ draw model.onnx": [str(programs["draw"]), str(file), "cpp.png", "2", "0", "1"],
            "cmfast-sample model.onnx": [sys.executable, *startup.sample_command(file, "onnx.png")],
            "cmfast-sample model.pt": [sys.executable, *startup.sample_command(checkpoint, "pt.png")],
        }
        for arguments in commands.values():
            started(arguments, folder)
        before = timing.cpu_ticks()
        times = interleaved(commands, runs, folder)
        overhead = np.array(json.loads(said([str(programs["overhead"]), str(file), "2", str(calls)], folder)))
        loops = []
        for hidden in HIDDEN:
            policy = small_policy(folder / "policy.onnx", hidden)
            for prefix in filter(allowed, ((), REAL_TIME)):
                words = said([*prefix, str(programs["policy"]), str(policy), "1000000", str(loop)], folder)
                loops.append({"hidden": hidden, "real_time": bool(prefix), **loop_of(words)})
        steal = timing.steal_share(before, timing.cpu_ticks())
        model = startup.describe(checkpoint, file)
    load = timing.load_average()
    rows = [{"command": name, **dataclasses.asdict(timing.summarise(each))} for name, each in times.items()]
    share = statistics.median((overhead[:, 0] - overhead[:, 1]) / overhead[:, 1])
    record: dict[str, Any] = {"what": "cpp", **timing.provenance(), "load_average": load, "steal": steal}
    record |= {"warning": timing.noise_warning(times, load=load, steal=steal), "model": model, "steps": 2}
    record |= {"rows": rows, "overhead": {"share": share, "call_ms": statistics.median(overhead[:, 0]), "calls": calls}}
    record["loops"] = loops
    for row in rows:
        click.echo(
            f"{row['command']:<26}{row['median_ms']:7.0f} ms   p10 {row['p10_ms']:6.0f}   p90 {row['p90_ms']:6.0f}"
        )
    click.echo(f"overhead of the headers: {share:.2%} of the backend's time")
    for each in loops:
        ratio = each["p99_ms"] / each["p50_ms"]
        click.echo(f"robot's loop: {each}, p99 {ratio:.2f} times p50")
    if json_file is not None:
        write_text(json_file, json.dumps(record, indent=1) + "\n")
        click.echo(f"the record is in {json_file}")
    if record["warning"]:
        click.echo(f"warning: {record['warning']}")


def allowed(prefix: Sequence[str]) -> bool:
    """Whether this machine starts a program so."""
    with contextlib.suppress(OSError):
        return subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return False


def compiled(source: Path, program: Path) -> Path:
    """Compile a program and return it."""
    said(["g++", "-std=c++17", "-O2", f"-I{include_dir()}", str(source), "-o", str(program), "-ldl"], program.parent)
    return program


def said(arguments: Sequence[str], folder: Path) -> str:
    """Run a program with the library of the wheel; return its output."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    kept["CMFAST_ONNXRUNTIME"] = str(onnxruntime_library())
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=kept)
    if done.returncode:
        raise CmfastError(f"{arguments[0]} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout


def started(arguments: Sequence[str], folder: Path) -> float:
    """Return how long a process lived, ms."""
    began = time.perf_counter()
    said(arguments, folder)
    return 1000 * (time.perf_counter() - began)


def interleaved(commands: Mapping[str, Sequence[str]], runs: int, folder: Path) -> dict[str, list[float]]:
    """Start every command `runs` times in turns, the order rotating; return the times, ms."""
    names = list(commands)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in range(runs):
        first = run % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(started(commands[name], folder))
    return times


def loop_of(words: str) -> dict[str, float]:
    """Return the numbers of the policy example's line."""
    found = re.search(r"(\d+) steps .* p50 ([\d.]+) ms, p99 ([\d.]+) ms, worst ([\d.]+) ms", words)
    if found is None:
        raise CmfastError(f"the policy example wrote {words!r}")
    steps, p50, p99, worst = map(float, found.groups())
    return {"steps": steps, "p50_ms": p50, "p99_ms": p99, "worst_ms": worst}


def small_policy(path: Path, hidden: int) -> Path:
    """Write a denoiser of actions [16, 7] on a state [14]: two hidden layers with random weights."""
    rng = np.random.default_rng(0)
    sizes = [16 * 7 + 14 + 1, hidden, hidden, 16 * 7]
    weights = [
        helper.make_tensor(f"w{i}", TensorProto.FLOAT, [a, b], (rng.standard_normal((a, b)) / a**0.5).ravel().tolist())
        for i, (a, b) in enumerate(pairwise(sizes))
    ]
    for name, shape in (("flat", [-1, 112]), ("column", [-1, 1]), ("actions", [-1, 16, 7])):
        weights.append(helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape))
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["x_flat"]),
        helper.make_node("Reshape", ["sigma", "column"], ["s"]),
        helper.make_node("Concat", ["x_flat", "state", "s"], ["h0"], axis=1),
        helper.make_node("Tanh", ["h0"], ["t0"]),
    ]
    for i in range(3):
        nodes += [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"h{i + 1}"])]
        nodes += [helper.make_node("Tanh", [f"h{i + 1}"], [f"t{i + 1}"])]
    nodes.append(helper.make_node("Reshape", ["t3", "actions"], ["denoised"]))
    value = helper.make_tensor_value_info
    inputs = [
        value("x", TensorProto.FLOAT, ["B", 16, 7]), value("sigma", TensorProto.FLOAT, ["B"]),
        value("state", TensorProto.FLOAT, ["B", 14]),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "policy", inputs, [value("denoised", TensorProto.FLOAT, ["B", 16, 7])], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    spec = ModelSpec(shape=(16, 7), conditions=(Condition(name="state", shape=(14,)),))
    helper.set_model_props(model, {"cmfast": Manifest(kind="denoiser", spec=spec).to_json()})
    onnx.save(model, path)
    return path


def main() -> None:
    """Run the command."""
    run_command(command)


if __name__ == "__main__":
    main()
