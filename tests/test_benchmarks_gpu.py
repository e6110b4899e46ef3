# SPDX-License-Identifier: MIT
"""benchmarks/gpu.py: one run on a machine that somebody lends has to leave a record, whatever fails on the way."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cmfast.cli._run import run_command

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "benchmarks" / "gpu.py"
PLACE = {"date": "", "machine": {"gpu": "H100"}, "versions": {}, "commit": {"commit": "abc", "dirty": False}}
ALL = ["PyTorch", "torch.compile", "PyTorch, CUDA graph", "ONNX Runtime", "ONNX Runtime, CUDA graph", "TensorRT"]

pytestmark = pytest.mark.skipif(not MODULE.exists(), reason="needs the repository")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


def row(contender: str, times: float | None = 1.0, *, steps: int = 1, dtype: str = "float16") -> dict[str, Any]:
    ms = 8 / (times or 1)
    return {
        "contender": contender, "steps": steps, "dtype": dtype, "median_ms": ms, "times_as_fast_same_precision": times,
    }  # fmt: skip


def left(contender: str, what: str = "run", why: str = "CUDA failed in cudaMalloc") -> dict[str, Any]:
    return {"contender": contender, "what": what, "why": why, "steps": 1, "batch": 64}


def cell(*passes: dict[str, Any], network: str = "mnist", batch: int = 64, **values: Any) -> dict[str, Any]:
    return {"network": network, "batch": batch, "asked": {}, "failed": {}, "passes": list(passes)} | values


# What this machine has.


@pytest.fixture
def commands(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, ...]]]:
    """Let commands be simulated: each is kept, and answered by the first text of `answers` that is in it."""
    asked: list[tuple[str, ...]] = []

    def install(answers: dict[str, Any]) -> list[tuple[str, ...]]:
        def run(module: str, *arguments: object) -> str:
            words = (module, *map(str, arguments))
            asked.append(words)
            answer = next((answer for text, answer in answers.items() if text in " ".join(words)), "")
            if not isinstance(answer, dict):
                return str(answer)
            record = {key: [] for key in gpu.KEPT} | answer
            Path(words[words.index("--json") + 1]).write_text(json.dumps(record))
            return ""

        monkeypatch.setattr(gpu, "_run", run)
        return asked

    return install


def test_each_engine_is_tried_and_what_is_missing_has_its_reason(gpu: ModuleType, commands: Any) -> None:
    answers = {"library=tensorrt ": "needs tensorrt", '"tensorrt"': "no provider", 'rtx.engine",': "no RTX card"}
    asked = commands(answers)
    have, missing = gpu._engines("cuda", [])
    assert have == ALL[:5]
    assert missing == {
        "ONNX Runtime, TensorRT": "no provider", "TensorRT": "needs tensorrt", "TensorRT-RTX": "no RTX card",
    }  # fmt: skip
    requests = [json.loads(words[1]) for words in asked if words[0] == "cmfast.cli._probe"]
    tried = [(Path(each["file"]).name, each["variant"], each["precision"]) for each in requests]
    assert tried == [
        ("model.pt", "", "fp16"), ("model.pt", "compiled", "fp16"), ("model.pt", "cuda_graph", "fp16"),
        ("m.onnx", "", ""), ("m.onnx", "cuda_graph", ""), ("m.onnx", "tensorrt", ""), ("tensorrt_rtx.engine", "", ""),
    ]  # fmt: skip


def test_what_is_not_wanted_is_not_even_tried(gpu: ModuleType, commands: Any) -> None:
    asked = commands({})
    have, missing = gpu._engines("cuda", ["compiled", "tensorrt"])
    assert have == ["PyTorch", "PyTorch, CUDA graph", "ONNX Runtime", "ONNX Runtime, CUDA graph", "TensorRT-RTX"]
    assert missing == {}
    assert not any('"compiled"' in words[1] or "library=tensorrt" in words for words in asked)


def test_where_nothing_can_be_exported_it_stops_with_the_reason(gpu: ModuleType, commands: Any) -> None:
    commands({"cmfast_export": "needs onnx, which is not installed"})
    with pytest.raises(gpu.EngineError, match="not even a small model can be exported here: needs onnx"):
        gpu._engines("cuda", [])


# A cell.


ASKED = {"steps": [1, 2], "precision": ["fp32", "fp16"], "without": [], "seconds": 1.0, "engine_batch": [1, 8, 64]}


def bench(gpu: ModuleType, folder: Path, models: list[str], have: list[str]) -> Any:
    files = {"baseline": Path("model.pt"), "models": [Path(name) for name in models]}
    return gpu._bench(files, folder, 64, ASKED, "cuda", have)


def test_a_cell_is_one_run_of_all_engines_which_goes_on_when_one_fails(
    gpu: ModuleType, commands: Any, tmp_path: Path
) -> None:
    models = ["fp16_1.onnx", "fp16_1_tensorrt.engine"]
    rows = [row("PyTorch cuda"), row("fp16_1.onnx cuda_graph"), row("fp16_1_tensorrt.engine")]
    lost = [left("fp16_1.onnx"), left("PyTorch cuda fp16 compiled")]
    asked = commands({"": {"rows": rows, "left_out": lost}})
    (only,) = bench(gpu, tmp_path, models, ALL)
    assert (only["rows"], only["left_out"]) == (rows, lost)
    assert [" ".join(words) for words in asked] == [
        "cmfast.cli.bench fp16_1.onnx fp16_1_tensorrt.engine --baseline model.pt --device cuda --batch 64 --precision "
        f"fp32,fp16 --steps 1,2 --seconds 1.0 --keep-going --variants compiled,cuda_graph --json {tmp_path}/"
        "bench_64.json"
    ]


def test_files_that_nobody_timed_run_once_more_with_eager_pytorch_alone(
    gpu: ModuleType, commands: Any, tmp_path: Path
) -> None:
    first = {
        "rows": [row("PyTorch cuda"), row("one.onnx")],
        "left_out": [left("two.onnx"), left("wrong.onnx", "images")],
    }
    again = {"rows": [row("PyTorch cuda"), row("two.onnx"), row("three.engine")]}
    asked = commands({"bench_64.json": first, "again_64.json": again})
    passes = bench(gpu, tmp_path, ["one.onnx", "two.onnx", "wrong.onnx", "three.engine"], ["PyTorch", "ONNX Runtime"])
    assert [each["rows"] for each in passes] == [first["rows"], again["rows"]]
    words = asked[1]
    assert words[1:4] == ("two.onnx", "three.engine", "--baseline"), "a wrong answer is not asked for again"
    assert words[words.index("--variants") + 1] == ""


@pytest.mark.parametrize("models", [["one.onnx"], []])
def test_a_run_that_dies_is_followed_by_one_with_less(
    models: list[str], gpu: ModuleType, commands: Any, tmp_path: Path
) -> None:
    commands({"bench_64.json": "died of signal 11", "again_64.json": {"rows": [row("PyTorch cuda")]}})
    first, again = bench(gpu, tmp_path, models, ALL)
    assert first == {"failed": "died of signal 11"}
    assert again["rows"]


# Files.


def test_files_are_made_for_each_precision_and_number_of_steps_and_who_fails_is_named(
    gpu: ModuleType, commands: Any, tmp_path: Path
) -> None:
    asked = commands({f"-o {tmp_path}/fp16_2.onnx": "differs", "fp32_2_tensorrt.engine": "no memory"})
    files = gpu._prepare("digits", tmp_path, ASKED, "cuda", ALL)
    assert [file.name for file in files["models"]] == [
        "fp32_1.onnx", "fp32_1_tensorrt.engine", "fp32_2.onnx", "fp16_1.onnx", "fp16_1_tensorrt.engine"]  # fmt: skip
    assert files["failed"] == {"fp16_2.onnx": "differs", "fp32_2_tensorrt.engine": "no memory"}
    assert files["parameters"] == 777_313
    assert any("batch=1,8,64" in words for words in asked)
    assert not any("library=tensorrt_rtx" in words for words in asked), "this machine has none"


# The summary.


def test_the_best_engine_of_each_cell_is_held_against_its_bar(gpu: ModuleType) -> None:
    runs = [
        cell(
            {
                "rows": [
                    row("PyTorch cuda fp16"),
                    row("a.onnx", 1.4),
                    row("a.engine", 1.6),
                    row("b.engine", 1.2, steps=2),
                ]
            }
        ),
        cell({"rows": [row("a.engine", 3.9)]}, batch=1),
        cell({"rows": [row("a.engine", 2.0)]}, batch=8),
    ]
    assert [each["words"] for each in gpu._summary(runs)] == [
        "mnist, batch 64, 1 step(s), float16: a.engine 5.00 ms, 1.60x eager (reaches 1.5x)",
        "mnist, batch 64, 2 step(s), float16: b.engine 6.67 ms, 1.20x eager (short of 1.5x)",
        "mnist, batch 1, 1 step(s), float16: a.engine 2.05 ms, 3.90x eager (short of 4x)",
        "mnist, batch 8, 1 step(s), float16: a.engine 4.00 ms, 2.00x eager",
    ]
    first, *_, last = gpu._summary(runs)
    assert (first["best"], first["times_as_fast"], first["bar"], last["bar"]) == ("a.engine", 1.6, 1.5, None)


def test_passes_and_options_of_one_cell_are_summed_up_together(gpu: ModuleType) -> None:
    runs = [
        cell({"failed": "died"}, {"rows": [row("a.engine", 1.3)]}),
        cell({"rows": [row("b.engine", 1.7), row("c.engine", 2, dtype="bfloat16")]}, asked={"seconds": 2}),
        cell({"failed": "died"}, batch=1),
    ]
    assert [(each["best"], each["dtype"]) for each in gpu._summary(runs)] == [
        ("b.engine", "float16"), ("c.engine", "bfloat16")]  # fmt: skip


def test_where_eager_pytorch_does_not_run_the_fastest_is_named_without_a_factor(gpu: ModuleType) -> None:
    slow, fast = row("a.onnx", None) | {"median_ms": 9.0}, row("a.engine", None)
    (only,) = gpu._summary([cell({"rows": [slow, fast]}, batch=256)])
    assert only["words"] == "mnist, batch 256, 1 step(s), float16: a.engine 8.00 ms, and eager PyTorch did not run"
    assert only["times_as_fast"] is None


def test_failures_and_what_a_machine_cannot_do_are_told_apart(gpu: ModuleType) -> None:
    wrong, short = left("a.onnx", "images", "differs by 1"), left("b.onnx")
    whole = left("PyTorch cuda bf16", "opening", "the T4 has no bf16") | {"steps": None}
    runs = [
        cell({"rows": [row("PyTorch cuda")], "left_out": [wrong, short, whole]}, failed={"c.engine": "no memory"}),
        cell({"failed": "died of signal 11"}, batch=1),
    ]
    assert list(gpu._left_out(runs)) == [
        "mnist, batch 64: c.engine: no memory",
        "mnist, batch 64: b.onnx at 1 step(s) (run): CUDA failed in cudaMalloc",
        "mnist, batch 64: PyTorch cuda bf16 (opening): the T4 has no bf16",
        "mnist, batch 1: cmfast-bench: died of signal 11",
    ]
    assert list(gpu._failed({"tests": {"failed": {"test_gpu::test_a": "assert 1"}}, "runs": runs})) == [
        "test_gpu::test_a: assert 1",
        "mnist, batch 64: a.onnx at 1 step(s) (images): differs by 1",
        "mnist, batch 1: nothing could be timed",
    ]
    assert list(gpu._failed({"tests": None, "runs": []})) == []


# The same command again.


@pytest.fixture
def again(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], list[Any], str]]:
    """Return a function that runs the script on a machine of make-believe; it returns status, record, cells, words."""
    place = copy.deepcopy(PLACE)
    monkeypatch.setattr(gpu, "provenance", lambda: copy.deepcopy(place))
    monkeypatch.setattr(gpu, "_engines", lambda device, without: (ALL, {"TensorRT-RTX": "not installed"}))

    def run(*options: str, dies: Any = (), tests: dict[str, Any] | None = None, **where: Any) -> Any:
        place.update(where)
        done: list[Any] = []

        def prepare(name: str, *_: Any) -> dict[str, Any]:
            done.append(name)
            return {"failed": {}, "parameters": 1}

        def bench(_: Any, folder: Path, batch: int, *rest: Any) -> list[dict[str, Any]]:
            done.append(batch)
            return [{"failed": "died"} if batch in dies else {"rows": [row("PyTorch cuda")], "left_out": []}]

        def test() -> dict[str, Any]:
            done.append("tests")
            assert tests is not None
            return tests

        for name, function in {"_prepare": prepare, "_bench": bench, "_tests": test}.items():
            monkeypatch.setattr(gpu, name, function)
        chosen = () if tests else ("--no-tests",)
        out = tmp_path / "gpu.json"
        monkeypatch.setattr(sys, "argv", ["gpu", *options, *chosen, "--json", str(out)])
        with pytest.raises(SystemExit) as stopped:
            run_command(gpu.command)
        return stopped.value.code, json.loads(out.read_text()), done, "".join(capsys.readouterr())

    return run


SMALL = ("--networks", "mnist,digits", "--batch", "1,8")


def test_a_whole_run_leaves_cells_and_a_summary_and_is_not_repeated(again: Any) -> None:
    status, record, done, words = again(*SMALL)
    assert (status, done) == (0, ["mnist", 1, 8, "digits", 1, 8])
    assert record["missing"] == {"TensorRT-RTX": "not installed"}
    assert [(run["network"], run["batch"]) for run in record["runs"]] == [
        ("mnist", 1), ("mnist", 8), ("digits", 1), ("digits", 8)]  # fmt: skip
    assert record["runs"][0]["asked"] == ASKED | {"engine_batch": [1, 8, 8]}
    assert len(record["summary"]) == 4
    assert "left out: TensorRT-RTX: not installed\n" in words
    status, repeated, done, _ = again(*SMALL)
    assert (status, done, repeated) == (0, [], record)


def test_an_interrupted_run_goes_on_with_the_cells_that_are_missing(again: Any, tmp_path: Path) -> None:
    _, record, *_ = again(*SMALL)
    (tmp_path / "gpu.json").write_text(json.dumps(record | {"runs": record["runs"][:3]}))
    _, finished, done, _ = again(*SMALL)
    assert done == ["digits", 8]
    assert finished == record


def test_a_cell_that_failed_is_tried_again_and_replaced(again: Any) -> None:
    status, record, _, words = again(*SMALL, dies=(8,))
    assert status == 1
    assert len(record["runs"]) == 4
    assert "failed: mnist, batch 8: nothing could be timed\n" in words
    assert "gpu: 2 failed, listed above; the same command tries again what has no times\n" in words
    status, record, done, _ = again(*SMALL)
    assert (status, done) == (0, ["mnist", 8, "digits", 8])
    assert len(record["runs"]) == 4
    assert all(run["passes"][0]["rows"] for run in record["runs"])


@pytest.mark.parametrize(
    "options", [("--precision", "bf16"), ("--steps", "4"), ("--seconds", "2"), ("--without", "compiled,tensorrt")]
)
def test_other_options_are_other_cells_of_the_same_record(options: tuple[str, ...], again: Any) -> None:
    _, before, *_ = again(*SMALL)
    _, after, done, _ = again(*SMALL, *options)
    assert done == ["mnist", 1, 8, "digits", 1, 8]
    assert after["runs"][:4] == before["runs"]
    assert len(after["runs"]) == 8
    assert again(*SMALL)[2] == again(*SMALL, *options)[2] == []


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"versions": {"torch": "3"}}, "its versions is another"), ({"machine": {"gpu": "L4"}}, "its machine is another"),
     ({"commit": {"commit": "def", "dirty": False}}, "its commit is another")],
)  # fmt: skip
def test_another_machine_or_code_begins_a_record_anew_and_says_so(changed: Any, why: str, again: Any) -> None:
    again(*SMALL)
    *_, done, words = again(*SMALL, **changed)
    assert len(done) == 6
    assert f"gpu.json is begun anew: {why}\n" in words


def test_code_that_is_in_no_commit_cannot_be_known_to_be_the_same(again: Any) -> None:
    dirty = {"commit": {"commit": "abc", "dirty": True}}
    again(*SMALL, **dirty)
    *_, done, words = again(*SMALL, **dirty)
    assert len(done) == 6
    assert "its code is in no commit" in words


def test_tests_run_once_unless_none_of_them_passed(again: Any) -> None:
    none = {"passed": 0, "failed": {"all": "pytest did not start"}, "skipped": {}}
    status, _, done, words = again("--networks", "mnist", "--batch", "1", tests=none)
    assert (status, done) == (1, ["tests", "mnist", 1])
    assert "failed: all: pytest did not start\n" in words
    some = {"passed": 5, "failed": {}, "skipped": {}}
    assert again("--networks", "mnist", "--batch", "1", tests=some)[:3:2] == (0, ["tests"])
    assert again("--networks", "mnist", "--batch", "1", tests=some)[2] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--networks", "mnist,cats"), "--networks cats: there are digits, mnist"),
     (("--precision", "fp8"), "--precision fp8: there are fp32, tf32"),
     (("--without", "torch"), "--without torch: there are compiled, cuda_graph, tensorrt, tensorrt_rtx")],
)  # fmt: skip
def test_a_name_that_there_is_not_is_an_error(
    options: tuple[str, ...], words: str, gpu: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(gpu.CmfastError) as raised:
        gpu.command.main([*options, "--json", str(tmp_path / "gpu.json")], standalone_mode=False)
    assert str(raised.value).startswith(words)


# Children.


def test_the_report_of_pytest_is_read(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken():\n    raise OSError('no\\n device')\n"
        "def test_good():\n    pass\n"
        "def test_bad():\n    assert 1 == 2\n"
        "def test_error(broken):\n    pass\n"
        "@pytest.mark.skip(reason='needs TensorRT')\ndef test_skipped():\n    pass\n"
    )
    report = tmp_path / "report.xml"
    program = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", ".", f"--junitxml={report}"]
    subprocess.run([*program, "test_some.py"], cwd=tmp_path, capture_output=True)
    found = gpu._read_report(report)
    assert found["passed"] == 1
    assert found["skipped"] == {"test_some::test_skipped": "needs TensorRT"}
    assert list(found["failed"]) == ["test_some::test_bad", "test_some::test_error"]
    assert found["failed"]["test_some::test_bad"].startswith("assert 1 == 2")
    assert "OSError: no device" in found["failed"]["test_some::test_error"]


def test_a_command_that_fails_says_why_in_a_line_without_folders(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def child(code: str) -> str:
        (tmp_path / "child.py").write_text(f"import os, sys\n{code}\n")
        return str(gpu._run("child"))

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert child("") == ""
    assert child("sys.exit('cmfast-export: /tmp/x/a.onnx: no /tmp/x/b.engine')") == "a.onnx: no b.engine"
    assert child("raise RuntimeError('CUDA error')") == "CUDA error"
    assert child("os._exit(3)") == "exit status 3"
    assert child("print('timing', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)") == (
        "died of signal 11 after: timing"
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # every command of cmfast in a process of its own, torch imported in each
def test_the_rehearsal_on_a_cpu_leaves_a_whole_record(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    program = [
        sys.executable, str(MODULE), "--device", "cpu", "--networks", "digits", "--batch", "1", "--seconds", "0.1",
        "--no-tests", "--without", "compiled", "--json", str(out),
    ]  # fmt: skip
    done = subprocess.run(program, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    record = json.loads(text)
    assert {"PyTorch, CUDA graph", "ONNX Runtime, CUDA graph", "TensorRT-RTX"} <= set(record["missing"])
    assert not {"PyTorch", "torch.compile", "ONNX Runtime"} & set(record["missing"])
    (only,) = record["runs"]
    assert (only["failed"], [each["left_out"] for each in only["passes"]]) == ({}, [[]])
    rows = [(each["steps"], each["contender"]) for each in only["passes"][0]["rows"]]
    assert rows == [
        (steps, name)
        for steps in (1, 2)
        for name in ("PyTorch cpu", "PyTorch cpu fp16", f"fp32_{steps}.onnx", f"fp16_{steps}.onnx")
    ]
    assert [(each["steps"], each["dtype"]) for each in record["summary"]] == [
        (1, "float32"), (1, "float16"), (2, "float32"), (2, "float16")]  # fmt: skip
    assert all(each["words"] in done.stdout for each in record["summary"])
    assert "/tmp" not in text
