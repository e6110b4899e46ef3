# SPDX-License-Identifier: MIT
"""`cmfast-bench --suite cpu`: real contenders on a tiny model, compared first, in one record; workers; refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmfast.backends.openvino import products
from cmfast.bench import fastest, timing
from cmfast.bench.roofline import Ceilings
from cmfast.bench.suite import SuiteRequest, apart, files, measure, opening, rates, run_suite, show, suite, ways
from cmfast.bench.suite.opening import Opened
from cmfast.bench.suite.plain import Plain
from cmfast.bench.suite.record import CallRow
from cmfast.bench.suite.ways import FLOAT, NCNN, WAYS, Way
from cmfast.cli.bench import main
from cmfast.errors import BackendError, CheckFailed, CmfastError, MissingDependency
from cmfast.formats.manifest import Manifest
from cmfast.formats.table import read_manifest
from helpers.specs import image_spec

Factory = Callable[..., Path]
Call = Callable[..., Any]
REAL_RUN = subprocess.run
THREE = measure.Setting(3, 1)
ONNX_ONLY = {kind: name for kind, name in files.NAMES.items() if kind != NCNN}  # pnnx takes seconds
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls, small matrices, exports in this process, which has torch already."""
    usual = timing.interleave

    def interleave(contenders: Any, **options: Any) -> dict[str, list[float]]:
        return usual(contenders, **options | {"calls": 3, "warmup_s": 0})

    monkeypatch.setattr(timing, "interleave", interleave)
    monkeypatch.setattr(timing, "PAUSE_S", 0)
    monkeypatch.setattr(timing, "BURST_S", 0.002)
    monkeypatch.setattr(fastest, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "SIDES", (64,))
    monkeypatch.setattr(rates, "SECONDS", 0.005)
    rate = Ceilings(device="cpu", dtype="float32", flops_per_s=1e9, bytes_per_s=None, how="said so")
    monkeypatch.setattr(rates, "measure_machine", lambda *arguments: rate)
    monkeypatch.setattr(files.subprocess, "run", in_this_process)
    monkeypatch.setattr(files, "NAMES", ONNX_ONLY)


def in_this_process(program: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -P -c CODE ARGUMENTS` here."""
    if program[1:3] != ["-P", "-c"]:
        return REAL_RUN(program, **options)
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *program[4:]])
        try:
            exec(program[3], {})
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return subprocess.CompletedProcess(program, code, "", "")


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, and the files that the suite made of it."""
    folder = tmp_path_factory.mktemp("suite")
    checkpoint = folder / "model.pt"
    shutil.copy(tiny_checkpoint(10, levels=1), checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.subprocess, "run", in_this_process)
        patch.setattr(files, "NAMES", ONNX_ONLY)
        found, missing = files.files_of(SuiteRequest(baseline=checkpoint), folder / "kept", lambda line: None)
    assert missing == []
    return found


@needs_openvino
def test_every_way_is_compared_timed_shown_and_recorded(
    exported: dict[str, Path], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"what": "evaluation", "model": {"file": "model.onnx"}, "data_set": "digits"}
    evaluation["features"] = {"name": "pixels", "dimensions": 64}
    evaluation["rows"] = [{"steps": 1, "calls": 1, "fd": 0.5, "n": 9}, {"heun": 18, "calls": 35, "fd": 0.3, "n": 9}]
    (tmp_path / "quality.json").write_text(json.dumps(evaluation))
    # A folder that has the files already: nothing is exported.
    monkeypatch.setattr(files, "_export", lambda *arguments: pytest.fail("exported again"))
    result = call(
        main, "--suite", "cpu", "--baseline", exported["checkpoint"], "--keep", exported[FLOAT].parent,
        "--threads", 1, "--batch", 2, "--seconds", 0.001, "--no-starts",
        "--evaluation", tmp_path / "quality.json", "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "s.json").read_text()
    record = json.loads(text)
    names = [way.name for way in WAYS if way.variant not in ("compiled", "diffusers") and way.file != NCNN]
    can = [name for name in names if name not in {left["contender"] for left in record["left_out"]}]
    assert {"PyTorch", "plain ONNX Runtime", "plain OpenVINO", "ONNX Runtime int8", "OpenVINO", "auto"} <= set(can)
    assert [(row["contender"], row["batch"]) for row in record["calls"]] == [(name, 2) for name in can]
    for row in record["calls"]:
        assert 0 < row["wall_p10_ms"] <= row["wall_median_ms"] <= row["wall_p90_ms"] <= row["wall_max_ms"]
        assert row["cpu_median_ms"] > 0
        first = record["calls"][0]
        assert row["times_as_fast"] == pytest.approx(first["wall_median_ms"] / row["wall_median_ms"])
        assert row["times_less_cpu"] == pytest.approx(first["cpu_median_ms"] / row["cpu_median_ms"])
        assert len(row["decibels"]) == measure.LEVELS
        least = {"fp32": 80, "bf16": 40}.get(row["precision"], 35)
        least = {"auto, 50 dB": 50, "plain OpenVINO": 15}.get(row["contender"], least)
        assert min(row["decibels"].values()) >= least
        rate = {each["dtype"]: each["flops_per_s"] for each in record["rates"]}
        dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(row["precision"], "int8")
        share = record["flops"] * row["batch"] / (row["wall_median_ms"] / 1000) / rate[dtype]
        assert row["of_rate"] == pytest.approx(share)
        assert ("bf16" in row["precision"]) == ("bf" in row["backend"]), "also of what chose its precision itself"
    assert min(record["calls"][0]["decibels"].values()) == 200, "the reference is itself"
    assert [row["dtype"] for row in record["rates"]][:1] == ["float32"]

    steps = [(row["contender"], row["steps"], row["network_calls"]) for row in record["images"]]
    assert steps == [*((name, k, k) for name in can for k in (1, 2)), ("PyTorch", None, 35)]
    assert [row["what"] for row in record["beside"]] == ["noise of one step", "samples to uint8"]
    assert (record["starts"], record["processes"]) == ([], [])
    assert record["options"]["baseline"] == "model.pt"
    assert str(exported["checkpoint"].parent) not in text, "a record has names of files, not folders"
    assert record["evaluations"][0]["rows"][1]["fd"] == 0.3
    shown = " ".join(result.stdout.split())
    for words in ("One network call, 1 thread(s)", "speed against PyTorch", "Whole images from noise", "GFLOP/s"):
        assert words in shown
    with Image.open(tmp_path / "s.png") as chart:
        assert chart.width > 500
    last = result.stdout.splitlines()[-1]
    assert last.startswith("next: cmfast-sample ")
    assert " --threads 1 -n 64" in last


def contender(name: str, run: Callable[[Any], Any], least: str = "fp32") -> Opened:
    """Return a contender without a file."""
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 4, 4)))
    way = Way(name=name, file=FLOAT, precision=least)
    return Opened(
        way=way, manifest=manifest, denoise=lambda x, s, c: run(x), draw=lambda z, s, c: run(z[0]),
        about=lambda: (name, least),
    )  # fmt: skip


def measured(**options: Any) -> measure.Measured:
    return measure.Measured(seconds=0.001, say=lambda line: None, **{"keep_going": False, **options})


def test_a_contender_that_computes_something_else_is_named_and_not_timed() -> None:
    def boom(x: Any) -> Any:
        raise BackendError("no room")

    right, wrong = contender("right", lambda x: x * 0.5), contender("wrong", lambda x: x * 0.5 + 0.01)
    rounded = contender("rounded", lambda x: x * 0.5 + 0.01, "bf16")
    plain = ways.WAYS[6]
    assert (plain.least_db, replace(plain, precision="bf16").least_db) == (80, 15), "a library's choice is shown"
    with pytest.raises(
        CheckFailed, match=r"^wrong at batch 3, 1 thread\(s\): it is 46\.0 dB from right and needs 80 dB; "
    ):
        measure.network_calls([right, wrong], THREE, measured())
    with pytest.raises(BackendError, match=r"^failing at batch 3, 1 thread\(s\): no room$"):
        measure.network_calls([right, contender("failing", boom)], THREE, measured())
    kept = measured(keep_going=True)
    agreed = measure.network_calls([right, wrong, rounded, contender("failing", boom)], THREE, kept)
    assert [each.opened.way.name for each in agreed] == ["right", "rounded"], "46 dB are enough for bf16"
    assert [(left.contender, left.what, left.batch) for left in kept.left_out] == [
        ("wrong", "images", 3), ("failing", "run", 3)]  # fmt: skip
    assert set(kept.every_ms) == {"right, batch 3, 1 thread(s)", "rounded, batch 3, 1 thread(s)"}


def test_without_the_reference_the_next_of_its_precision_is_compared_with_and_none_of_a_lower_one() -> None:
    def boom(x: Any) -> Any:
        raise BackendError("no room")

    lost, bf16 = contender("first", boom), contender("rounded", lambda x: x * 0.5 + 0.01, "bf16")
    second, third = contender("second", lambda x: x * 0.5), contender("third", lambda x: x * 0.5)
    kept = measured(keep_going=True)
    agreed = measure.network_calls([lost, bf16, second, third], THREE, kept)
    assert [each.opened.way.name for each in agreed] == ["second", "third"]
    assert [(left.contender, left.why) for left in kept.left_out] == [
        ("first", "no room"), ("rounded", "there is nothing in fp32 to compare it with, for that has failed"),
    ]  # fmt: skip
    assert measure.network_calls([lost, bf16], THREE, measured(keep_going=True)) == []


def test_what_fails_while_it_is_timed_is_left_out_and_the_rest_is_timed() -> None:
    made = [0]

    def tires(x: Any) -> Any:
        made[0] += 1
        if made[0] > measure.LEVELS + 2:
            raise RuntimeError("out of memory")
        return x * 0.5

    right, tired = contender("right", lambda x: x * 0.5), contender("tired", tires)
    with pytest.raises(BackendError, match=r"^tired at batch 3, 1 thread\(s\): RuntimeError: out of memory$"):
        measure.network_calls([right, tired], THREE, measured())
    made[0], kept = 0, measured(keep_going=True)
    agreed = measure.network_calls([right, tired], THREE, kept)
    assert [each.opened.way.name for each in agreed] == ["right"]
    assert str(kept.left_out[0]) == "tired at batch 3, 1 thread(s): RuntimeError: out of memory"
    made[0], kept = 0, measured(keep_going=True)
    made[0] = measure.LEVELS + 2
    assert measure.whole_images([tired], (1,), THREE, kept) == []
    made[0] = measure.LEVELS - 1  # it draws, and fails when that is timed
    assert [row.contender for row in measure.whole_images([right, tired], (1,), THREE, kept)] == ["right", "right"]
    lost = [(left.contender, left.steps, left.batch) for left in kept.left_out]
    assert lost == [("tired", 1, 3), ("tired", None, 3), ("tired", 1, 3)], "the second is Heun's method"


def test_an_output_that_the_library_overwrites_is_compared_as_it_was() -> None:
    buffer = np.zeros((1, 1, 4, 4), np.float32)

    def reused(x: Any) -> Any:
        buffer[...] = x * 0.5
        return buffer

    agreed = measure.network_calls(
        [contender("right", lambda x: x * 0.5), contender("reused", reused)], measure.Setting(1, 1), measured()
    )
    assert set(agreed[1].decibels.values()) == {200.0}


def test_cpu_time_is_of_all_threads_and_wall_time_also_of_waiting() -> None:
    calls = {"asleep": lambda: time.sleep(0.01), "busy": lambda: sum(range(200_000))}
    walls = measure.timed(calls, THREE, measured())
    assert walls["asleep"].cpu_median_ms < 3 < 10 <= walls["asleep"].wall_median_ms
    assert walls["busy"].cpu_median_ms > 0.3 * walls["busy"].wall_median_ms


def test_shares_of_a_rate_and_speeds_are_ratios() -> None:
    wall = measure.Wall(wall_median_ms=2, wall_p10_ms=1, wall_p90_ms=3, wall_max_ms=4, wall_calls=5, cpu_median_ms=4)
    half = replace(wall, wall_median_ms=1, cpu_median_ms=1)
    agreed = [
        measure.Agreed(opened=contender(name, lambda x: x), decibels={}, wall=each)
        for name, each in (("first", wall), ("second", half))
    ]
    rate = Ceilings(device="cpu", dtype="float32", flops_per_s=4e9, bytes_per_s=None, how="")
    rows = suite._call_rows(agreed, 1, 3, 1e6, {"fp32": rate})
    assert [(row.times_as_fast, row.times_less_cpu, row.images_per_s) for row in rows] == [(1, 1, 1500), (2, 4, 3000)]
    assert [row.of_rate for row in rows] == [pytest.approx(0.375), pytest.approx(0.75)]  # 3e6 in 2 ms: 1.5 of 4 G/s
    assert suite._call_rows(agreed, 1, 3, None, {"fp32": rate})[0].of_rate is None
    assert suite._call_rows(agreed, 1, 3, 1e6, {})[0].of_rate is None
    assert {"wall_median_ms", "cpu_median_ms", "decibels", "times_as_fast"} <= asdict(rows[0]).keys()
    assert isinstance(rows[0], CallRow)


@needs_openvino
def test_products_of_8_bit_integers_and_of_float32_are_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates.measure_rates(("fp32", "int8"), 1, lambda line: None)
    assert [(name, each.dtype) for name, each in found.items()] == [("fp32", "float32"), ("int8", "int8")]
    assert found["int8"].flops_per_s is not None
    assert "product of 64 x 64 int8 matrices by OpenVINO" in found["int8"].how
    graph = products._graph(products.import_openvino("a test"), 8, quantized=True)
    assert [each.get_type_name() for each in graph.get_ordered_ops()].count("FakeQuantize") == 2
    plain = products._graph(products.import_openvino("a test"), 8, quantized=False)
    assert "FakeQuantize" not in [each.get_type_name() for each in plain.get_ordered_ops()]

    slow = {name: replace(each, flops_per_s=1.0) for name, each in found.items()}
    assert rates.faster(slow, found) == rates.faster(found, slow) == found

    def missing(*arguments: object) -> Any:
        raise MissingDependency("measuring", "openvino", "openvino")

    monkeypatch.setattr(rates, "product_call", missing)
    found = rates.measure_rates(("fp32", "bf16"), 1, lambda line: None)
    assert (found["fp32"].flops_per_s, found["bf16"].flops_per_s) == (1e9, None)
    assert found["bf16"].how.startswith("not measured: measuring needs openvino")


# Processes of their own.


def test_a_contender_is_started_and_run_by_several_processes_with_cores_of_their_own(
    exported: dict[str, Path],
) -> None:
    (way,) = (way for way in WAYS if way.name == "ONNX Runtime")
    (start,) = apart.starts([way], exported, 1, 2, measured())
    assert start.load_s > 0
    assert start.first_call_ms > 0
    assert start.peak_mib is None or start.peak_mib > 10
    (row,) = apart.several([way], exported, (2,), 3, measured())
    assert (row.processes, row.batch, row.cores) == (2, 3, apart.shares(2))
    assert row.images_per_s > 0
    assert row.peak_mib is None or row.peak_mib > 20
    lost = {**exported, FLOAT: exported[FLOAT].parent / "lost.onnx"}
    with pytest.raises(BackendError, match=r"^ONNX Runtime fails in a process of its own: .*lost\.onnx: no such file"):
        apart.starts([way], lost, 1, 1, measured())
    kept = measured(keep_going=True)
    assert apart.several([way], lost, (1,), 1, kept) == []
    assert [left.what for left in kept.left_out] == ["processes"]


def test_cores_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 4, 6, 8}, raising=False)
    assert apart.shares(1) == [[0, 2, 4, 6, 8]]
    assert apart.shares(2) == [[0, 2], [4, 6]], "each has as many; what is left over stays idle"
    assert apart.shares(5) == [[0], [2], [4], [6], [8]]
    assert apart.shares(7) == [[0], [2], [4], [6], [8], [0], [2]]


# Files and requests.


def test_quality_is_that_of_the_file_and_int8_has_none_without_its_own() -> None:
    def evaluation(file: str, fd: float) -> dict[str, Any]:
        return {"model": {"file": file}, "rows": [{"steps": 2, "fd": fd}, {"heun": 18, "fd": 0.1}]}

    def quality(precision: str, *evaluations: dict[str, Any], steps: int | None = 2, db: float = 90) -> float | None:
        record = SimpleNamespace(evaluations=evaluations, files={"float": "model.onnx", "int8": "model_int8.onnx"})
        row = SimpleNamespace(precision=precision, steps=steps, heun=None if steps else 18, decibels=db)
        return show._quality(record, row)  # type: ignore[arg-type]

    first, own = evaluation("teacher.onnx", 0.7), evaluation("model_int8.onnx", 0.9)
    assert quality("fp32", first, evaluation("model.onnx", 0.5), own) == 0.5
    assert quality("bf16", first, own) == 0.7
    assert (quality("int8, bf16", first), quality("int8, bf16", first, own)) == (None, 0.9)
    assert (quality("fp32", first, steps=4), quality("fp32", first, steps=None)) == (None, 0.1)
    assert (quality("fp32"), quality("bf16", db=56)) == (80, 56)


def test_the_few_step_quality_of_another_model_is_refused_and_a_teachers_is_not() -> None:
    def check(sha256: str | None, **row: int) -> None:
        record = {"model": {"source": {"sha256": "a" * 64}}, "rows": [{"calls": 1, "fd": 0.5, **row}]}
        suite._check_evaluations([Path("quality.json")], [record], sha256)

    with pytest.raises(CmfastError, match=r"--evaluation quality\.json: it is of another model"):
        check("b" * 64, steps=1)
    check("a" * 64, steps=1)
    check(None, steps=1)
    check("b" * 64, heun=18)


def test_which_ways_there_are_depends_on_the_files_and_the_precisions() -> None:
    def names(*kinds: str, precision: tuple[str, ...] = ways.PRECISIONS, **options: bool) -> list[str]:
        given = {"compiled": False, "diffusers": False, **options}
        return [way.name for way in ways.chosen(precision=precision, files=frozenset(kinds), **given)]

    assert names("float", precision=("fp32",)) == [
        "plain ONNX Runtime", "plain OpenVINO", "ONNX Runtime", "OpenVINO", "OpenVINO throughput", "auto"]  # fmt: skip
    assert names("checkpoint") == ["PyTorch", "PyTorch channels_last", "PyTorch bf16"]
    assert names("checkpoint", compiled=True)[3:] == ["torch.compile", "torch.compile bf16"]
    assert names("checkpoint", diffusers=True)[3:] == ["diffusers"]
    assert names("checkpoint", "int8", precision=("int8",)) == [
        "PyTorch", "ONNX Runtime int8", "OpenVINO int8", "OpenVINO int8, bf16"]  # fmt: skip
    assert len({way.name for way in WAYS}) == len(WAYS)


def test_without_the_exporter_what_needs_its_files_is_left_out(
    tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "exporter_is_installed", lambda: False)
    options = {"seconds": 0.001, "steps": (2,), "starts": False, "batch": (3, 1), "threads": (1,)}
    record = run_suite(SuiteRequest(baseline=tiny_checkpoint(10), **options))
    names = ["PyTorch", "PyTorch channels_last", "PyTorch bf16"]
    assert [(row.contender, row.batch) for row in record.calls] == [(name, batch) for batch in (3, 1) for name in names]
    assert [(row.contender, row.batch) for row in record.images] == [*((name, 3) for name in names), ("PyTorch", 3)]
    assert [row.batch for row in record.beside] == [3, 3, 1, 1]
    assert [left.what for left in record.left_out] == ["export", "export"]
    assert "pip install 'cmfast[export]'" in record.left_out[0].why
    assert {row.of_rate for row in record.calls} == {None}, "no file says how much work it is"


def test_a_folder_for_ncnn_is_exported_beside_the_onnx_file_where_ncnn_is_installed(
    tiny_checkpoint: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    programs: list[list[str]] = []

    def written(program: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        programs.append(program[4:])
        return subprocess.CompletedProcess(program, 0, "", "")

    monkeypatch.setattr(files, "NAMES", ONNX_ONLY | {NCNN: "model_ncnn"})
    monkeypatch.setattr(files.subprocess, "run", written)
    monkeypatch.setattr(files, "exporter_is_installed", lambda: True)
    request = SuiteRequest(baseline=tiny_checkpoint(10), precision=("fp32",))
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    found, (left,) = files.files_of(request, tmp_path, lambda line: None)
    assert left.contender == "every way to run model_ncnn"
    assert left.why == "ncnn is not installed: pip install 'cmfast[ncnn]'"
    monkeypatch.setattr(files, "find_spec", lambda name: name)
    found, missing = files.files_of(request, tmp_path, lambda line: None)
    assert missing == []
    assert found[NCNN] == tmp_path / "model_ncnn"
    assert programs[-1] == [str(request.baseline), "-o", str(tmp_path / "model_ncnn"), "--format", "ncnn"]
    only = files.files_of(replace(request, precision=("bf16",)), tmp_path, lambda line: None)
    assert only[0].keys() == {"checkpoint", FLOAT}, "what bf16 needs, and no more"


def test_the_folder_for_ncnn_beside_a_model_is_its_own(handmade_onnx: Factory, tmp_path: Path) -> None:
    model = tmp_path / "denoiser.onnx"
    shutil.copy(handmade_onnx(4), model)
    request = SuiteRequest(models=(model,))
    assert files.given_files(request) == {FLOAT: model}
    folder = tmp_path / "denoiser_ncnn"
    folder.mkdir()
    (folder / "model.param").write_text("7767517\n")
    assert files.given_files(request) == {FLOAT: model}, "nothing says what it is"
    (folder / "model.bin").write_bytes(b"weights")
    own = replace(read_manifest(model), graph_sha256=hashlib.sha256(b"7767517\nweights").hexdigest())
    for manifest, known in ((replace(own, source={"sha256": "0" * 64}), {}), (own, {NCNN: folder})):
        (folder / "manifest.json").write_text(manifest.to_json())
        assert files.given_files(request) == {FLOAT: model, **known}, "another model is not compared"
    assert "ncnn" in {way.name for way in suite.planned(request)}
    assert NCNN not in files.given_files(replace(request, precision=("bf16",)))


def test_what_was_timed_before_a_contender_failed_is_recorded_and_the_run_ends_with_the_failure(
    tiny_checkpoint: Factory, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opened(way: Way, *arguments: Any) -> Opened:
        each = opening.open_way(way, *arguments)

        def fails(x: Any, sigma: float, conditions: Any) -> Any:
            if (way.name, len(x)) in broken:
                raise BackendError("out of memory")
            assert each.denoise
            return each.denoise(x, sigma, conditions)

        return replace(each, denoise=fails)

    monkeypatch.setattr(suite, "open_way", opened)
    monkeypatch.setattr(files, "exporter_is_installed", lambda: False)
    record = tmp_path / "s.json"
    options = ("--suite", "cpu", "--baseline", tiny_checkpoint(10), "--precision", "fp32", "--threads", 1)
    options += ("--batch", "3,1,2", "--steps", 2, "--seconds", 0.001, "--no-starts", "--json", record)
    broken = {("PyTorch", 1), ("PyTorch", 2), ("PyTorch channels_last", 2)}
    result = call(main, *options)
    why = "PyTorch at batch 1, 1 thread(s): out of memory"
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2, f"cmfast-bench: {why}; the rest was measured",
    )  # fmt: skip
    found = json.loads(record.read_text())
    assert found["failed"] == found["left_out"][-3]
    assert (found["failed"]["contender"], found["failed"]["why"]) == ("PyTorch", "out of memory")
    rows = [(row["contender"], row["batch"], row["reference"]) for row in found["calls"]]
    two = "PyTorch channels_last"
    assert rows == [("PyTorch", 3, "PyTorch"), (two, 3, "PyTorch"), (two, 1, two)], "and none of batch 2"
    assert [row["reference"] for row in found["images"]] == ["PyTorch", "PyTorch", None]
    result = call(main, *options, "--keep-going")
    assert result.returncode == 0, result.stderr
    assert json.loads(record.read_text())["failed"] is None
    broken |= {("PyTorch", 3), ("PyTorch channels_last", 3)}
    result = call(main, *options, "--keep-going")
    assert result.returncode == 0, result.stderr
    found = json.loads(record.read_text())
    assert {row["batch"] for row in found["calls"]} == {row["batch"] for row in found["images"]} == {1}
    record.unlink()
    result = call(main, *options)
    assert (result.returncode, record.exists()) == (2, False), "nothing had been timed"
    assert result.stderr.splitlines()[-1] == "cmfast-bench: PyTorch at batch 3, 1 thread(s): out of memory"


def test_an_export_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "model.pt"
    checkpoint.write_bytes(b"neither fish nor fowl")
    monkeypatch.setattr(files.subprocess, "run", lambda program, **options: subprocess.CompletedProcess(
        program, 2, "", "warning: this\ncmfast-export: model.pt: not a checkpoint\n"))  # fmt: skip
    with pytest.raises(BackendError, match=r"^the export failed: model\.pt: not a checkpoint$"):
        files.files_of(SuiteRequest(baseline=checkpoint), tmp_path, lambda line: None)


def test_files_of_two_models_are_not_compared(
    exported: dict[str, Path], handmade_onnx: Factory, tiny_checkpoint: Factory
) -> None:
    options = {"seconds": 0.001, "steps": (), "starts": False, "precision": ("fp32",), "threads": (1,)}
    with pytest.raises(CmfastError, match=r"side4\.onnx is another model than .*model\.pt; delete it"):
        run_suite(SuiteRequest(baseline=exported["checkpoint"], models=(handmade_onnx(4),), **options))
    with pytest.raises(CmfastError, match=r"model\.onnx is another model than"):  # the same shape, other weights
        run_suite(SuiteRequest(baseline=tiny_checkpoint(10), models=(exported[FLOAT],), **options))


@pytest.mark.parametrize(
    "values",
    [
        {"features": "pixels"}, {"features": None}, {"features": {}}, {"features": {"name": 3}}, {"data_set": ["a"]},
        {"rows": []}, {"rows": [{"calls": 1, "fd": "1", "n": 9}]}, {"rows": [{"calls": 1, "fd": float("nan"), "n": 9}]},
        {"rows": [{"calls": 1, "fd": 1, "n": "9"}]}, {"rows": [{"calls": 1, "fd": 1}]}, {"rows": {"calls": 1}},
        {"model": {"source": 3}}, {"model": None}, {"what": "benchmark"},
    ],
)  # fmt: skip
def test_what_is_no_evaluation_is_refused_before_anything_is_run(values: dict[str, Any], tmp_path: Path) -> None:
    record = {"what": "evaluation", "model": {}, "data_set": "digits", "features": {"name": "pixels"}}
    record["rows"] = [{"calls": 1, "fd": 1, "n": 9}]
    file = tmp_path / "quality.json"
    for changes, good in (({}, True), (values, False)):
        file.write_text(json.dumps(record | changes))
        if good:
            assert suite._evaluation(file)["rows"] == record["rows"]
            continue
        with pytest.raises(
            CmfastError, match=r"quality\.json: not a record with Frechet distances; make one: cmfast-eval"
        ):
            suite._evaluation(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "gpu"], "'gpu' is not 'cpu'"),
        (["--suite", "cpu"], "nothing to measure: pass --baseline model.pt, or a MODEL that is an .onnx denoiser"),
        (
            ["--suite", "cpu", "model.pt"],
            "model.pt: --suite takes .onnx files and folders for ncnn as MODELs; pass a checkpoint as",
        ),
        (["--suite", "cpu", "a.onnx", "b.onnx"], "b.onnx and a.onnx are both in float32; remove one"),
        (["--suite", "cpu", "--baseline", "a.onnx"], "--baseline takes a checkpoint that PyTorch runs, got a.onnx"),
        (["--suite", "cpu", "a.onnx", "--compile"], "--compile needs a checkpoint to compile"),
        (["--suite", "cpu", "a.onnx", "--compile", "--precision", "int8"], "--compile is for fp32 and bf16"),
        (["--suite", "cpu", "a.onnx", "--diffusers"], "--diffusers needs a diffusers folder as --baseline"),
        (["--suite", "cpu", "a.onnx", "--variants", "openvino"], "--suite cpu takes no --variants; remove it"),
        (["--suite", "cpu", "a.onnx", "--budget", "9"], "--suite cpu takes no --budget; remove it"),
        (["--suite", "cpu", "a.onnx", "--device", "cuda"], "--suite cpu measures a CPU; remove --device cuda"),
        (["--suite", "cpu", "a.onnx", "--precision", "fp16"], "distinct names from fp32, bf16, int8, got fp16"),
        (["--suite", "cpu", "a.onnx", "--threads", "1,1"], "--threads takes distinct whole numbers from 1, got (1, 1)"),
        (["--suite", "cpu", "a.onnx", "--threads", "4096"], "threads must be at most 1024, got 4096"),
        (["--suite", "cpu", "a.onnx", "--processes", "0"], "--processes takes distinct whole numbers from 1"),
        (["--suite", "cpu", "a.onnx", "--processes", "999"], "--processes takes numbers up to 256, got 999"),
        (["--suite", "cpu", "a.onnx", "--seconds", "0"], "--seconds must be greater than 0"),
        (["--suite", "cpu", "a.onnx", "--evaluation", "no.json"], "no.json: no such file; make it: cmfast-eval"),
        (["--suite", "cpu", "a.onnx", "--evaluation", "other.json"], "other.json: not a record with Frechet distances"),
        (["--suite", "cpu", "a.onnx", "--evaluation", "other.json", "--json", "other.json"], "is read by this command"),
        (
            ["--suite", "cpu", "a.onnx", "--evaluation", "mnist.json", "--evaluation", "pixels.json"],
            "--evaluation pixels.json: 9 samples against mnist by features pixels, but mnist.json: 9 samples against",
        ),
        (["a.onnx", "--keep", "folder"], "--keep needs --suite cpu"),
        (["a.onnx", "--evaluation", "other.json"], "--evaluation needs --suite cpu"),
        (["a.onnx", "--processes", "2"], "--processes needs --suite cpu"),
        (["a.onnx", "--threads", "1,2"], "--threads takes several numbers with --suite cpu only; pass one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_suite_that_cannot_be_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, handmade_onnx: Factory, call: Call, refused: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(handmade_onnx(8), name)
    Path("model.pt").write_bytes(b"neither fish nor fowl")
    Path("other.json").write_text('{"what": "evaluation", "rows": [{"calls": 1}]}')
    quality = {"what": "evaluation", "model": {}, "data_set": "mnist", "rows": [{"calls": 1, "fd": 1.0, "n": 9}]}
    for name in ("mnist", "pixels"):
        Path(f"{name}.json").write_text(json.dumps(quality | {"features": {"name": name}}))
    before = sorted(os.listdir())
    refused(call(main, *arguments), words)
    assert sorted(os.listdir()) == before


def test_a_dry_run_lists_the_contenders(exported: dict[str, Path], call: Call) -> None:
    result = call(main, "--suite", "cpu", exported[FLOAT], "--precision", "fp32", "-n", "--batch", 1, "--seconds", 2)
    assert result.stdout.splitlines() == [
        "one network call each: plain ONNX Runtime, plain OpenVINO, ONNX Runtime, OpenVINO, OpenVINO throughput, auto",
        "at least 12 s of timing",
    ]


def test_steps_that_the_model_has_no_levels_for_are_refused_before_anything_is_timed(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "interleave", lambda *arguments, **options: pytest.fail("timed"))
    request = SuiteRequest(models=(exported[FLOAT],), precision=("fp32",), steps=(7,), threads=(1,))
    with pytest.raises(CmfastError, match="--steps 7: the model has default noise levels for "):
        run_suite(request)


@pytest.mark.parametrize("library", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_what_a_plain_library_raises_is_an_error_of_a_backend(library: str, exported: dict[str, Path]) -> None:
    opened = Plain(exported[FLOAT], library, 1)
    with pytest.raises(BackendError, match=r"model\.onnx: \w+: "):
        opened.denoise(np.zeros((2, 1, 8, 9), np.float32), 1.0, {"label": np.zeros(2, np.int64)})


SAYS = "import os, signal, sys; print('a library'); sys.stderr.write(200_000 * 'x' + chr(10)); "


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (SAYS + "print('cmfast: found')", ""),
        (SAYS + "os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        (SAYS + "raise SystemExit('no such thing')", "no such thing"),
    ],
)
def test_a_worker_may_chatter_and_its_end_is_named(code: str, words: str) -> None:
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            if words:
                with pytest.raises(BackendError, match=f"PyTorch fails in a process of its own: .*{words}"):
                    apart._read(WAYS[0], apart._Worker(process, said))
            else:
                assert apart._read(WAYS[0], apart._Worker(process, said)) == "found\n"
        finally:
            process.kill()
            process.communicate()
