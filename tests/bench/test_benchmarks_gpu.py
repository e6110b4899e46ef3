# SPDX-License-Identifier: MIT
"""benchmarks/gpu.py: minutes on a card that somebody lends must leave a record, whatever fails on the way."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from cmfast_train.config.presets import PRESETS
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
MODULE = BENCHMARKS / "gpu.py"

pytestmark = pytest.mark.skipif(not MODULE.exists(), reason="needs the repository")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, all of which must be complete."""
    text = out.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def items_of(out: Path) -> dict[str, dict[str, Any]]:
    return {line["item"]: line for line in lines_of(out) if "item" in line}


def gpu(*words: object) -> list[str]:
    return [sys.executable, str(MODULE), *map(str, words)]


# The two processes, on items that take no library.

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from gpu_items import Item, NotHere, supervise, work
from gpu_lines import Lines, begin

out, budget = Path(sys.argv[1]), float(sys.argv[2])
log = out.with_suffix(".log")

def run(name, do=lambda: None, **limits):
    def call():
        with log.open("a") as file:
            file.write(name + "\\n")
        do()
        return {"value": name}
    return Item(name=name, run=call, **limits)

def refuse():
    raise NotHere("no such card")

def items():
    yield run("good", expect_s=0)
    yield run("raises", lambda: 1 / 0, expect_s=0)
    yield run("not here", refuse, expect_s=0)
    yield run("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV), expect_s=0)
    yield run("leaves", lambda: os._exit(7), expect_s=0)
    yield run("hangs", lambda: time.sleep(1000), expect_s=0, limit_s=0.3)
    yield run("too long", expect_s=100)
    yield run("last", expect_s=0)
    for i in range(int(sys.argv[3])):
        yield run(f"more {i}", lambda: time.sleep(0.01), expect_s=0)

if "--pipe" in sys.argv:
    lines = Lines(out)
    sys.exit(work(items(), lines, float(sys.argv[-1]), int(sys.argv[-3])))
begun = time.monotonic()
lines = begin(out, "test", "cpu", fresh="fresh" in sys.argv)
supervise([sys.executable, *sys.argv], lines, begun + budget)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return the command of a program with items that end in every way there is."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]))
    (tmp_path / "program.py").write_text(PROGRAM)

    def command(budget: float, more: int = 0, *words: str) -> list[str]:
        return [
            sys.executable,
            str(tmp_path / "program.py"),
            str(tmp_path / "out.jsonl"),
            str(budget),
            str(more),
            *words,
        ]

    return command


def test_whatever_an_item_does_it_is_one_line_and_the_next_goes_on(
    program: Callable[..., list[str]], tmp_path: Path
) -> None:
    subprocess.run(program(30), check=True, timeout=60)
    found = items_of(tmp_path / "out.jsonl")
    assert found["good"]["value"] == "good"
    assert found["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert found["not here"]["not_here"] == "no such card"
    assert found["dies"]["error"] == "its process died of signal 11"
    assert found["leaves"]["error"] == "its process ended with exit status 7"
    assert found["hangs"]["error"].startswith("hung: killed after 0.3")
    assert "it may take 100.0 s" in found["too long"]["skipped"]
    assert found["last"]["value"] == "last"
    head, *_, end = lines_of(tmp_path / "out.jsonl")
    assert (head["line"], head["what"], end["line"]) == ("head", "test", "end")
    assert {name: end[name] for name in ("measured", "failed", "not_here", "skipped")} == {
        "measured": 2, "failed": 4, "not_here": 1, "skipped": 1,
    }  # fmt: skip


def test_the_same_command_goes_on_after_the_items_that_have_a_line_and_fresh_begins_anew(
    program: Callable[..., list[str]], tmp_path: Path
) -> None:
    subprocess.run(program(30), check=True, timeout=60)
    log, out = tmp_path / "out.log", tmp_path / "out.jsonl"
    log.unlink()
    subprocess.run(program(30, 1), check=True, timeout=60)
    assert log.read_text().split("\n")[:-1] == ["more 0"], "what has a line ran again"
    assert [line["line"] for line in lines_of(out) if "line" in line] == ["head", "end", "again", "end"]
    subprocess.run(program(30, 1, "fresh"), check=True, timeout=60)
    assert log.read_text().splitlines()[1] == "good"
    assert [line["line"] for line in lines_of(out) if "line" in line] == ["head", "end"]


def test_the_budget_ends_a_hanging_item_which_is_tried_again_another_time(
    program: Callable[..., list[str]], tmp_path: Path
) -> None:
    from gpu_lines import Lines

    command = program(4.6)
    (tmp_path / "program.py").write_text(PROGRAM.replace("limit_s=0.3", "limit_s=1000"))
    begun = time.monotonic()
    subprocess.run(command, check=True, timeout=60)
    assert time.monotonic() - begun < 6.5  # 4.6 s, and starting Python on a busy machine
    found = items_of(tmp_path / "out.jsonl")
    assert "cut by the end of the budget" in found["hangs"]["skipped"]
    assert "hangs" not in Lines(tmp_path / "out.jsonl").done


@pytest.mark.parametrize("whole", [False, True], ids=["supervisor", "both"])
def test_killed_at_any_moment_it_leaves_complete_lines_and_goes_on(
    whole: bool, program: Callable[..., list[str]], tmp_path: Path
) -> None:
    out, log, draw = tmp_path / "out.jsonl", tmp_path / "out.log", random.Random(0)
    for _ in range(4):
        victim = subprocess.Popen(program(60, 40), start_new_session=True)
        time.sleep(draw.uniform(0.3, 1.2))
        children = _children(victim.pid)
        victim.kill()
        victim.wait()
        if whole:
            for child in children:
                os.kill(child, signal.SIGKILL)
        end = time.monotonic() + 10
        while any(_runs(child) for child in children):  # the worker ends by itself when its supervisor has gone
            assert time.monotonic() < end, "a worker outlived its supervisor"
            time.sleep(0.01)
        if out.exists() and out.stat().st_size:
            lines_of(out)
    subprocess.run(program(60, 40), check=True, timeout=120)
    assert set(items_of(out)) >= {"good", "last", *(f"more {i}" for i in range(40))}
    assert all("error" not in line for name, line in items_of(out).items() if name.startswith("more"))
    ran = log.read_text().split("\n")
    assert len([name for name in ran if name.startswith("more")]) <= 40 + 4, "only an item that was cut runs again"


def _children(process: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The file.


def test_a_file_of_another_machine_or_other_code_is_not_gone_on_with(tmp_path: Path) -> None:
    from cmfast.errors import CmfastError
    from gpu_lines import begin

    out = tmp_path / "out.jsonl"
    begin(out, "smoke", "cpu", fresh=False)
    first = lines_of(out)[0]
    begin(out, "smoke", "cpu", fresh=False)  # the same
    for name, other in (("machine", {"gpu": "L4"}), ("code", "abc"), ("versions", {"torch": "3"})):
        out.write_text(json.dumps(first | {name: other}) + "\n")
        with pytest.raises(CmfastError, match=f"is from a run with another {name}; add --fresh"):
            begin(out, "smoke", "cpu", fresh=False)
    with pytest.raises(CmfastError, match="another what"):
        begin(out, "bench", "cpu", fresh=False)
    begin(out, "bench", "cpu", fresh=True)
    assert [line["what"] for line in lines_of(out)] == ["bench"]


@pytest.mark.parametrize("content", ["", "{}\n", "[1]\n", '{"line": "head"}\n{"item": "a", "val', "\xff\n"])
def test_what_is_no_file_of_ours_is_refused_and_left_as_it_is(content: str, tmp_path: Path) -> None:
    from cmfast.errors import CmfastError
    from gpu_lines import begin

    out = tmp_path / "notes.txt"
    out.write_bytes(content.encode("latin-1"))
    if content == "":
        begin(out, "smoke", "cpu", fresh=False)
        return
    with pytest.raises(CmfastError):
        begin(out, "smoke", "cpu", fresh=False)
    assert out.read_bytes() == content.encode("latin-1")


def test_a_number_that_is_not_finite_is_written_as_a_word(tmp_path: Path) -> None:
    from gpu_lines import Lines

    out = tmp_path / "out.jsonl"
    Lines(out).write({"line": "head", "a": float("nan"), "b": [float("inf"), 1], "c": Path("x")})
    assert lines_of(out) == [{"line": "head", "a": "nan", "b": ["inf", 1], "c": "x"}]


# A copy of the repository on another machine.


def test_a_copy_without_git_says_what_it_is_a_copy_of(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cmfast", tmp_path / "cmfast", ignore=shutil.ignore_patterns("__pycache__"))
    program = "import json; from cmfast.bench.timing import commit; print(json.dumps(commit()))"

    def commit(**environment: str) -> Any:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "CMFAST_"))}
        found = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=kept | {"PYTHONPATH": str(tmp_path)} | environment,
        )  # fmt: skip
        return json.loads(found.stdout)

    assert commit() is None
    assert commit(CMFAST_COMMIT="abc1") == {"commit": "abc1", "dirty": False}
    assert commit(CMFAST_COMMIT="abc1-dirty") == {"commit": "abc1", "dirty": True}


def test_a_copy_with_the_history_of_another_day_is_of_the_commit_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cmfast.bench import timing

    monkeypatch.setenv("CMFAST_COMMIT", "abc2")
    assert timing.commit() == {"commit": "abc2", "dirty": False}


def test_offline_gives_absolute_folders_and_the_entry_points_of_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import offline

    printed = subprocess.run([sys.executable, "benchmarks/offline.py"], cwd=ROOT, capture_output=True, text=True)
    folders = [Path(part) for part in printed.stdout.strip().split(os.pathsep)]
    assert folders[:3] == [ROOT, ROOT / "train", ROOT / "export"]
    assert all(folder.is_absolute() for folder in folders)
    offline.write_metadata(tmp_path)
    (found,) = distributions(path=[str(tmp_path)])
    assert ("folder", "cmfast_train.backends.diffusers_pipeline:open_folder") in {
        (entry.name, entry.value) for entry in found.entry_points if entry.group == "cmfast.backends"
    }


def test_packed_files_of_mnist_are_put_where_torchvision_looks(tmp_path: Path) -> None:
    from gpu_train import MNIST_FILES, Training, TrainRequest

    (tmp_path / "data").mkdir()
    for name in MNIST_FILES:
        (tmp_path / "data" / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    request = TrainRequest(
        preset="mnist-large", settings=(), data_root=tmp_path / "data", run=tmp_path / "run",
        out=tmp_path / "out.jsonl", device="cpu", until=0.0, budget=1.0,
    )  # fmt: skip
    root = Training(request, None).data_root()  # type: ignore[arg-type]
    assert root is not None
    assert {file.name: file.read_text() for file in (root / "MNIST" / "raw").iterdir()} == {n: n for n in MNIST_FILES}


# Rehearsals.

SMOKE = {"device", "ceiling copy", "ceiling float32", "attention bfloat16", "float32", "dropout masks", "train bf16"}


def rehearse(tmp_path: Path, *words: object, budget: float) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Run the command on a CPU; it must end in time."""
    out = tmp_path / "out.jsonl"
    begun = time.monotonic()
    command = gpu(*words, "--device", "cpu", "--budget", budget, "--out", out)
    done = subprocess.run(command, capture_output=True, text=True, timeout=budget + 60, cwd=tmp_path)
    assert time.monotonic() - begun < budget + 5, "it did not end in time"  # a busy machine starts Python slowly
    return out, done


def test_a_rehearsal_of_smoke_has_a_line_of_everything(tmp_path: Path) -> None:
    from gpu_record import merge

    out, done = rehearse(tmp_path, "smoke", budget=60)
    found = items_of(out)
    assert done.returncode == 0, done.stdout
    assert set(found) >= SMOKE
    assert merge([out])["counts"]["failed"] == 0
    assert {line.get("ok", True) for line in found.values()} == {True}
    assert found["replay cuda_graph"]["not_here"] == "a CPU has no CUDA graphs"
    assert all(str(tmp_path) not in json.dumps(line) for line in found.values())


def test_a_rehearsal_of_bench_compares_and_times(tmp_path: Path) -> None:
    out, done = rehearse(tmp_path, "bench", "--seconds", "0.02", "--items", "fp32 batch 1 steps 1", budget=60)
    assert done.returncode == 0, done.stdout
    from gpu_record import merge

    assert merge([out])["counts"]["failed"] == 0
    rows = [line for line in lines_of(out) if line.get("kind") == "row"]
    assert [row["way"] for row in rows[:2]] == ["eager", "channels_last"]
    for row in rows:
        assert row["difference"] <= row["allowed"]
        assert row["wall"]["p10_ms"] <= row["wall"]["median_ms"] <= row["wall"]["p90_ms"]
        assert row["times_as_fast"] == row["eager"]["median_ms"] / row["wall"]["median_ms"]
        assert row["flops"] == 35_766_272
    assert lines_of(out)[-1]["line"] == "end"
    assert "x eager" in done.stdout


# What bench does fills any budget; a training has to come to its plan.
@pytest.mark.parametrize(("what", "budget"), [("bench", 6), ("train", 9)], ids=["bench", "train"])
def test_the_budget_ends_a_rehearsal_that_has_more_to_do(what: str, budget: int, tmp_path: Path) -> None:
    out, done = rehearse(tmp_path, what, budget=budget)
    assert lines_of(out)[-1]["line"] == "end"
    assert done.returncode in (0, 1)
    found = items_of(out)
    plan = found.get("plan", {})
    if "error" in plan:  # a busy machine may not come to it; nothing else may be wrong
        assert plan["error"].startswith(("hung", "its process")), plan
    if "kind" in plan:
        images = plan["images"]
        assert all(images[method] % PRESETS["digits"].batch == 0 < images[method] for method in ("edm", "ect", "sid"))
        assert plan["seconds_left"] < budget * 0.65


def test_a_training_that_was_killed_goes_on_with_its_plan_and_is_evaluated(tmp_path: Path) -> None:
    from gpu_record import merge

    out, words = tmp_path / "out.jsonl", ["train", "--set", "phases=edm:640,ect:320,sid:160", "--set", "batch=16"]
    command = gpu(*words, "--device", "cpu", "--budget", "60", "--out", out)
    victim = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, end = tmp_path / "out_run" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < end
        assert victim.poll() is None
        time.sleep(0.01)
    children = _children(victim.pid)
    victim.kill()
    victim.wait()
    while any(_runs(child) for child in children):
        assert time.monotonic() < end
        time.sleep(0.01)
    before = items_of(out)
    assert list(before) == ["plan"]
    out, done = rehearse(tmp_path, *words, budget=60)
    assert done.returncode == 0, done.stdout
    found = items_of(out)
    assert found["plan"] == before["plan"]
    assert [line["line"] for line in lines_of(out) if line.get("line") in ("head", "again")] == ["head", "again"]
    training = found["training"]
    assert training["planned"] == training["images"] == 1120
    assert (training["stopped"], training["curve"][-1]["images"]) == (False, 1120)
    assert list(training["images_per_s"]) == ["edm", "ect", "sid"]
    assert found["grid 2 step(s)"]["file"] == "out_2.png"
    assert (tmp_path / "out_1.png").exists()
    distances = {name: line["fd"] for name, line in found.items() if name.startswith("evaluation")}
    assert len(distances) == 5
    assert found["evaluation before the last phase 2 step(s) 200 samples"]["model"] == "before sid"
    assert all(distance > found["evaluation teacher 200 samples"]["halves"]["fd"] for distance in distances.values())
    assert merge([out])["counts"] == {"measured": len(found), "failed": 0, "skipped": 0}


def test_a_preset_whose_data_are_files_needs_them(tmp_path: Path) -> None:
    command = gpu("train", "--preset", "mnist-large", "--device", "cpu", "--out", tmp_path / "out.jsonl")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "gpu: the preset mnist-large needs its data; add --data-root DIR\n")
    assert not list(tmp_path.iterdir())


TESTS = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", [1, 2])
def test_passes(n):
    pass

def test_fails():
    assert 1 == 2

def test_dies():
    os._exit(11)

@pytest.fixture
def broken():
    raise OSError("no device")

def test_errs(broken):
    pass

def test_is_skipped():
    pytest.skip("needs TensorRT")
"""


def test_tests_that_fail_crash_or_cannot_be_imported_are_lines_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_bad.py").write_text("import a_library_that_is_not_there\n")
    files = ["test_bad.py", "test_some.py"]
    out, done = rehearse(tmp_path, "tests", *(tmp_path / name for name in files), budget=60)
    assert done.returncode == 1
    found = {name.removeprefix("collect ").rpartition("/")[2]: line for name, line in items_of(out).items()}
    assert found["test_some.py::test_passes[1]"]["ok"]
    assert found["test_some.py::test_passes[2]"]["ok"]
    assert found["test_some.py::test_fails"]["error"] == "assert 1 == 2"
    assert found["test_some.py::test_dies"]["error"] == "its process ended with exit status 11"
    assert found["test_some.py::test_errs"]["error"] == "OSError: no device"
    assert found["test_some.py::test_is_skipped"]["not_here"] == "needs TensorRT"
    assert "a_library_that_is_not_there" in found["test_bad.py"]["error"]
    assert len(found) == 7


def test_files_whose_fixtures_bring_the_mark_are_run_too_after_the_most_valuable_one() -> None:
    ask = "import gpu_pytest; print(*gpu_pytest.files_with_gpu_tests())"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT / "benchmarks")
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.split()
    assert first == "tests/gpu/test_gpu.py"
    marked = {"tests/gpu/test_gpu_tensorrt.py", "tests/backends/test_cuda.py", "tests/backends/test_cuda_drawing.py"}
    assert marked < set(others)


# The record.

HEAD = {
    "line": "head", "what": "bench", "device": "cuda", "date": "2026-01-01",
    "machine": {"gpu": "H100", "driver": "580"}, "versions": {"torch": "2.11"},
    "commit": {"commit": "abc", "dirty": False}, "code": "0", "options": {},
}  # fmt: skip
TIMES = {"median_ms": 1.0, "p10_ms": 0.9, "p90_ms": 1.1, "max_ms": 2.0, "calls": 9}


def row(way: str, batch: int = 64, **values: Any) -> dict[str, Any]:
    return {
        "item": f"mnist bf16 batch {batch} steps 1 {way}", "seconds": 1.0, "kind": "row", "network": "mnist",
        "precision": "bf16", "batch": batch, "steps": 1, "way": way, "wall": TIMES, "eager": TIMES | {"median_ms": 2.5},
        "times_as_fast": 2.5 if way != "eager" else 1.0, "difference": 0.01, "allowed": 0.3, "flops": 1,
        "images_per_s": 64_000.0, "of_roofline": 0.65, **values,
    }  # fmt: skip


def write(path: Path, *lines: dict[str, Any], **head: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in (HEAD | head, *lines)))
    return path


def test_a_record_has_the_last_line_of_each_item_of_all_files(tmp_path: Path) -> None:
    from gpu_record import merge

    skipped = {"item": "mnist bf16 batch 1 steps 1 eager", "skipped": "0.1 s were left"}
    failed = {"item": "mnist bf16 batch 1 steps 1 fused", "error": "no kernel"}
    bench = write(tmp_path / "a.jsonl", skipped, row("eager"), failed, row("eager", 1), {**skipped, "item": "x"})
    smoke = write(tmp_path / "b.jsonl", {"item": "eager", "kind": "float32", "ok": True, "allowed": 1e-6}, what="smoke")
    record = merge([bench, smoke])
    assert [(line["of"], line["item"]) for line in record["lines"]] == [
        ("bench", "mnist bf16 batch 1 steps 1 eager"), ("bench", "mnist bf16 batch 64 steps 1 eager"),
        ("bench", "mnist bf16 batch 1 steps 1 fused"), ("smoke", "eager"),
    ]  # fmt: skip
    assert record["counts"] == {"measured": 3, "failed": 1, "skipped": 1}
    assert record["machine"] == HEAD["machine"]
    assert [run["what"] for run in record["runs"]] == ["bench", "smoke"]


def test_lines_of_other_machines_code_or_schema_and_items_twice_are_refused(tmp_path: Path) -> None:
    from cmfast.errors import CmfastError
    from gpu_record import merge

    good = write(tmp_path / "good.jsonl", row("eager"))
    for name, other in (("machine", {"gpu": "L4"}), ("commit", None), ("versions", {}), ("code", "1")):
        bad = write(tmp_path / "bad.jsonl", row("fused"), **{name: other})
        with pytest.raises(CmfastError, match=f"bad.jsonl has another {name} than .*good.jsonl"):
            merge([good, bad])
    with pytest.raises(CmfastError, match=r"is both in .*good.jsonl and in .*bad.jsonl; leave one out"):
        merge([good, write(tmp_path / "bad.jsonl", row("eager"))])
    for line, words in (
        (row("eager", times_as_fast=None), "times_as_fast is None"),
        (row("eager", wall={}), "wall: median_ms is None"),
        (row("eager", kind="guess"), "the kind 'guess', which no table knows"),
        (row("eager", difference=0.4), "was timed although its images differ"),
    ):
        with pytest.raises(CmfastError, match=words):
            merge([write(tmp_path / "bad.jsonl", line)])


def test_tables_name_the_fastest_way_and_stand_between_their_markers(tmp_path: Path) -> None:
    from cmfast.errors import CmfastError
    from gpu_record import BEGIN, END, bars, fill, full_tables, merge, short_table

    slow, slower = ({"median_ms": ms, "p10_ms": ms - 0.1, "p90_ms": ms + 0.1, "calls": 9} for ms in (2.5, 4.0))
    lines = [
        row("eager", wall=slower, eager=slower),
        row("cuda_graph", eager=slower, times_as_fast=4.0),
        row("channels_last", wall=slow, eager=slow),
    ]
    record = merge([write(tmp_path / "a.jsonl", *lines)])  # eager's fastest run, 2.5 ms, is what counts
    assert bars(record) == ["mnist bf16 batch 64 steps 1: cuda_graph 2.50x eager (reaches 1.8x)"]
    assert "| mnist | 64 | cuda_graph | 1.00 (0.90 to 1.10) | 2.5x | 64,000 | 65% |" in short_table([record])
    assert "| mnist | bf16 | 1 | 64 | 2.50 (2.40 to 2.60) | 2.5x | 1.0x |" in full_tables([record])
    assert fill(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(CmfastError, match="no place for the table"):
        fill("nothing", "new")


def test_documents_have_the_tables_of_the_records_that_there_are() -> None:
    from gpu_record import fill, full_tables, records, short_table

    found = records()
    for file, text in (("docs/results.md", short_table(found)), ("benchmarks/README.md", full_tables(found))):
        document = (ROOT / file).read_text(encoding="utf-8")
        assert document == fill(document, text), f"{file} differs from benchmarks/results: gpu.py table --write"


def test_the_count_of_a_network_is_that_of_its_exported_graph(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import cmfast
    import gpu_cost
    from cmfast_export.pipeline import export_onnx
    from cmfast_train.checkpoint import load_checkpoint

    model = load_checkpoint(tiny_checkpoint(10))
    counted = gpu_cost.count(model.denoiser(), model.spec.image, model.spec.classes, "cpu")
    export_onnx(tiny_checkpoint(10), tmp_path / "model.onnx")
    exported = cmfast.load(tmp_path / "model.onnx").manifest.cost
    assert counted["flops"] == exported["flops"]
    for name in ("weight_bytes", "activation_bytes"):  # the graph has some constants, and embeds with products
        assert counted[name] == pytest.approx(exported[name], rel=0.03)
