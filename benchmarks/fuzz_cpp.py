# SPDX-License-Identifier: MIT
"""The C++ readers under AddressSanitizer and UBSan: libFuzzer on their bytes, then altered models opened whole.

    python benchmarks/fuzz_cpp.py --inputs 1000000 --json benchmarks/results/fuzz_cpp.json
    python benchmarks/fuzz_cpp.py --seconds 60      what `make fuzz-cpp` runs

One input goes to all readers: manifests, ONNX, .ort, IR, plans (tests/cpp/fuzz.cpp). Each must read it or throw one
line that names the file. A crash, a leak, undefined behaviour or an input of more than 5 s is a finding, and libFuzzer
leaves it in --folder. Altered models are ONNX files truncated or changed at random, opened by ONNX Runtime through
cmfast/onnxruntime.hpp in a process each (tests/cpp/model.cpp): samples come out, or one line.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from cmfast.bench.timing import provenance
from cmfast.cli.installed import include_dir, onnxruntime_library
from cmfast.cli.running import run_command
from cmfast.errors import CmfastError
from cmfast.files import check_outputs, write_text
from fuzz import mutated
from fuzz_corpus import READERS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "cpp"
MODEL = ROOT / "cmfast" / "models" / "digits.onnx"
CORPUS = ("manifest", "onnx", "ort", "ir", "plan")  # of READERS
SANITIZE = ("-g", "-fno-sanitize-recover=all", "-fsanitize=address,undefined")
MAX_BYTES = 8000  # of an input
HANGS_S = 60  # after which opening a model counts as a hang: it takes 1 s


@click.command("fuzz_cpp")
@click.option(
    "--inputs",
    type=click.IntRange(1, 10**9),
    help="How many inputs libFuzzer tries; default: as many as --seconds allow.",
)
@click.option(
    "--seconds", type=click.IntRange(1, 10**6), help="How long libFuzzer runs; default: 60, without --inputs."
)
@click.option("--models", type=click.IntRange(0, 10**6), default=0, show_default=True, help="Altered models to open.")
@click.option("--seed", type=click.IntRange(1, 2**31 - 1), default=1, show_default=True, help="Seed of the mutations.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keeps programs, corpus, findings; default: none.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the record here.")
def command(
    inputs: int | None, seconds: int | None, models: int, seed: int, folder: Path | None, json_file: Path | None
) -> int:
    """Fuzz the C++ readers; exit with 1 if one does anything but read or throw."""
    check_outputs({"--json": json_file})
    compiler = next(filter(None, map(shutil.which, ("clang++", "clang++-19", "clang++-14"))), None)
    if compiler is None:
        raise CmfastError("libFuzzer needs clang++; install it: apt-get install clang libclang-rt-dev")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if folder is None else folder.resolve()  # programs run inside it
        place.mkdir(parents=True, exist_ok=True)
        found = fuzzed(compiler, place, seed, inputs, seconds or (None if inputs else 60))
        click.echo(f"{found['inputs']:,} inputs in {found['seconds']:.0f} s, {found['findings']} finding(s)")
        opened = altered(compiler, place, seed, models) if models else {}
        if opened:
            click.echo("altered models: " + ", ".join(f"{name} {value}" for name, value in opened.items()))
    if json_file is not None:
        version = said([compiler, "--version"]).splitlines()[0]
        record = {"what": "fuzz_cpp", **provenance(), "compiler": version, "seed": seed, "libfuzzer": found}
        write_text(json_file, json.dumps(record | {"models": opened}, indent=1) + "\n")
    return 1 if found["findings"] or opened.get("findings") else 0


def fuzzed(compiler: str, folder: Path, seed: int, inputs: int | None, seconds: int | None) -> dict[str, Any]:
    """Run libFuzzer on the readers and return what it says at its end."""
    corpus, before = folder / "corpus", len(list(folder.glob("*-*")))
    corpus.mkdir(exist_ok=True)
    for name in CORPUS:
        with tempfile.TemporaryDirectory() as scratch:
            for index, data in enumerate(READERS[name].corpus(Path(scratch))):
                (corpus / f"{name}{index}").write_bytes(data)
    program = folder / "fuzz"
    said([*compile_command(compiler, "fuzz.cpp", program), "-O1", "-fsanitize=fuzzer"])
    limits = [f"-runs={inputs}"] if inputs else []
    limits += [f"-max_total_time={seconds}"] if seconds else []
    options = [f"-max_len={MAX_BYTES}", f"-seed={seed}", "-timeout=5", "-print_final_stats=1", "-verbosity=1"]
    begun, files = time.perf_counter(), len(list(corpus.iterdir()))
    done = subprocess.run([program, "corpus", *limits, *options], cwd=folder, capture_output=True, text=True)
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", done.stderr))
    covered = re.findall(r"cov: (\d+)", done.stderr)
    if "number_of_executed_units" not in stats:
        raise CmfastError(f"libFuzzer failed: {done.stderr.strip()[-300:]!r}")
    if done.returncode:
        click.echo(done.stderr[-3000:], err=True)
    return {
        "inputs": int(stats["number_of_executed_units"]),
        "seconds": round(time.perf_counter() - begun, 1),
        "corpus": files,
        "kept": int(stats["new_units_added"]),  # inputs that reached code no other had
        "edges": int(covered[-1]),  # of the control flow, reached
        "slowest_s": int(stats["slowest_unit_time_sec"]),
        "peak_mib": int(stats["peak_rss_mb"]),
        "findings": max(len(list(folder.glob("*-*"))) - before, int(done.returncode != 0)),
    }


def altered(compiler: str, folder: Path, seed: int, models: int) -> dict[str, int]:
    """Open altered models, each in a process: half of them truncated, half changed at random."""
    program = folder / "model"
    said([*compile_command(compiler, "model.cpp", program), "-O0"])
    whole = MODEL.read_bytes()
    environment = os.environ | {"CMFAST_ONNXRUNTIME": str(onnxruntime_library())}
    counts = {"opened": 0, "refused": 0, "findings": 0}
    for number in range(models):
        rng = random.Random(f"models {seed} {number}")
        data = whole[: rng.randrange(len(whole))] if number % 2 else mutated([whole], "models", seed, number)
        file = folder / "altered.onnx"
        file.write_bytes(data)
        outcome, why = opened_by([str(program), "cpu", str(file), "sample", "1", "1", "0", "0"], environment)
        counts[outcome] += 1
        if outcome == "findings":
            (folder / f"altered-{number}").write_bytes(data)
            click.echo(f"altered model {number}: {why}", err=True)
    return counts


def opened_by(command: list[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return whether a program opened or refused a model, or did what counts among "findings"; and what it said."""
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=HANGS_S)
    except subprocess.TimeoutExpired:
        return "findings", f"it did not end within {HANGS_S} s"
    lines = done.stderr.decode(errors="replace").splitlines()
    if done.returncode == 0 and not lines:
        return "opened", ""
    if done.returncode == 2 and len(lines) == 1:
        return "refused", lines[0]
    return "findings", f"exit status {done.returncode}, {lines[:3]}"


def compile_command(compiler: str, source: str, program: Path) -> list[str]:
    """Return the command that compiles a program of tests/cpp with the sanitizers."""
    paths = [f"-I{include_dir()}", str(SOURCES / source), "-o", str(program), "-ldl"]
    return [compiler, "-std=c++17", *SANITIZE, *paths]


def said(arguments: list[str]) -> str:
    """Run a program; return its output."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise CmfastError(f"{arguments[0]} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout


if __name__ == "__main__":
    run_command(command)
