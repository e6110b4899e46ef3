# SPDX-License-Identifier: MIT
"""cmfast-bench: outputs are compared before times are believed, and the record holds what a claim needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from PIL import Image

import cmfast
from cmfast.backends import open_backend
from cmfast.backends.openvino.library import capabilities, import_openvino
from cmfast.bench import comparison
from cmfast.bench.timing import FEW
from cmfast.checks import usable_cores
from cmfast.cli.bench import main
from cmfast.formats.manifest import Manifest
from cmfast_train.checkpoint import Checkpoint, save_checkpoint
from cmfast_train.networks.adm import AdmConfig, AdmUnet
from helpers.specs import image_spec

Factory = Callable[..., Path]
QUICK = ("--seconds", 0.05)


def content(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def scaled(handmade: Path, path: Path, factor: float, dtype: str = "float32") -> Path:
    """Write a handmade denoiser that computes factor x instead of 0.01 x, and calls its type what is asked."""
    model = onnx.load(handmade)
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 8, 8)), dtype=dtype)
    helper.set_model_props(model, {"cmfast": manifest.to_json()})
    model.graph.initializer[0].CopyFrom(helper.make_tensor("hundredth", onnx.TensorProto.FLOAT, [], [factor]))
    onnx.save(model, path)
    return path


def save_graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[int | str]], constants: dict[str, float], manifest: Manifest,
    path: Path,
) -> None:  # fmt: skip
    """Write a graph of float32 inputs and numbers, whose output is called "out"."""
    float32, batch = onnx.TensorProto.FLOAT, next(iter(inputs.values()))[-4]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Clip", ["out", "minus_one", "one"], ["images"])],
        "handmade",
        [helper.make_tensor_value_info(name, float32, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("images", float32, [batch, 1, 8, 8])],
        [
            *(
                helper.make_tensor(name, float32, [], [value])
                for name, value in {**constants, "minus_one": -1.0, "one": 1.0}.items()
            ),
            *(helper.make_tensor(f"index{k}", onnx.TensorProto.INT64, [], [k]) for k in range(2)),
            helper.make_tensor("per_image", onnx.TensorProto.INT64, [4], [-1, 1, 1, 1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"cmfast": manifest.to_json()})
    onnx.save(model, path)


def c_skip(sigma: float) -> float:
    """Return the c_skip of the scaling "boundary", arXiv:2303.01469, appendix C."""
    return 0.25 / ((sigma - 0.002) ** 2 + 0.25)


def new_checkpoint(path: Path) -> str:
    """Write a checkpoint that nobody trained, which computes c_skip(sigma) x; return the SHA-256 of its weights."""
    config = AdmConfig(
        image_size=8, channels=1, model_channels=32, res_blocks=1, channel_mult=(1,), attention=(), head_channels=32
    )
    weights = AdmUnet(config).state_dict()  # it ends in zeros
    checkpoint = Checkpoint(spec=image_spec(image=(1, 8, 8)), network=config, weights=weights)
    save_checkpoint(checkpoint, path)
    return checkpoint.sha256()


def handmade_denoiser(path: Path, source: dict[str, str], **values: Any) -> None:
    """Write c_skip(sigma) x, clipped, node by node; values are of its manifest."""
    node = helper.make_node
    nodes = [
        node("Sub", ["sigma", "sigma_min"], ["shifted"]),
        node("Mul", ["shifted", "shifted"], ["square"]),
        node("Add", ["square", "quarter"], ["sum"]),
        node("Div", ["quarter", "sum"], ["c_skip"]),
        node("Reshape", ["c_skip", "per_image"], ["factor"]),
        node("Mul", ["x", "factor"], ["out"]),
    ]
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 8, 8)), source=source, **values)
    save_graph(nodes, {"x": ["B", 1, 8, 8], "sigma": ["B"]}, {"sigma_min": 0.002, "quarter": 0.25}, manifest, path)


def handmade_sampler(
    path: Path, sigmas: tuple[float, float], batch: int | str = "B", source: dict[str, str] | None = None, **values: Any
) -> None:
    """Write two steps of the sampling of c_skip(sigma) x, node by node."""
    first, second = sigmas
    node = helper.make_node
    nodes = [
        node("Gather", ["noise", "index0"], ["z0"], axis=0),
        node("Gather", ["noise", "index1"], ["z1"], axis=0),
        node("Mul", ["z0", "first"], ["raw"]),
        node("Clip", ["raw", "minus_one", "one"], ["x0"]),
        node("Mul", ["z1", "renoise"], ["noise1"]),
        node("Add", ["x0", "noise1"], ["x1"]),
        node("Mul", ["x1", "second"], ["out"]),
    ]
    constants = {
        "first": first * c_skip(first),
        "renoise": (second**2 - 0.002**2) ** 0.5,
        "second": c_skip(second),
    }
    spec = image_spec(image=(1, 8, 8), sigmas={2: sigmas})
    manifest = Manifest(kind="sampler", spec=spec, source=source or {}, **values)
    save_graph(nodes, {"noise": [2, batch, 1, 8, 8]}, constants, manifest, path)


# The whole way.


def test_a_checkpoint_and_files_of_it_are_compared_timed_shown_and_recorded(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("model.pt", "model.onnx", "sampler.onnx")}
    checkpoint, model, sampler = files.values()
    source = {"sha256": new_checkpoint(checkpoint)}
    handmade_denoiser(model, source)
    handmade_sampler(sampler, (80.0, 0.8), source=source)
    result = call(
        main, sampler, model, "--baseline", checkpoint, "--steps", "1,2", "--batch", 3, "--threads", 1,
        *QUICK, "--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.png",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert content(tmp_path) == ["bench.json", "bench.png", *sorted(files)]
    text = (tmp_path / "bench.json").read_text()
    record = json.loads(text)

    # What was measured.
    plain = ["PyTorch cpu", "PyTorch cpu channels_last", "model.onnx"]
    names = {1: plain, 2: [*plain, "sampler.onnx"]}
    have = [(row["steps"], row["batch"], row["contender"]) for row in record["rows"]]
    assert have == [(steps, 3, name) for steps in (1, 2) for name in names[steps]]
    eager = {row["steps"]: row["median_ms"] for row in record["rows"] if row["contender"] == "PyTorch cpu"}
    for row in record["rows"]:
        assert row["reference"] == "PyTorch cpu"
        assert row["backend"] == (row["contender"] if "PyTorch" in row["contender"] else "ONNX Runtime cpu")
        assert row["sigmas"] == [80.0, 0.8][: row["steps"]]
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] <= row["max_ms"]
        assert row["calls"] >= FEW  # 20, unless these take three times --seconds
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
        assert row["times_as_fast"] == pytest.approx(eager[row["steps"]] / row["median_ms"])
        assert row["max_abs_diff"] <= 1e-6  # one formula, rounded twice
        assert (row["dtype"], row["tolerance"]) == ("float32", 1e-3)
        assert row["variant"] == ("channels_last" if "channels_last" in row["contender"] else "")
        assert row["reference_same_precision"] == "PyTorch cpu"
        assert row["times_as_fast_same_precision"] == row["times_as_fast"]
        assert {row[name] for name in ("device_times", "flops", "floor_ms", "of_roofline", "diagnosis")} == {None}
        assert row["contender"] != "PyTorch cpu" or (row["times_as_fast"], row["max_abs_diff"]) == (1, 0)

    # What each costs to start.
    starts = {row["contender"]: row for row in record["starts"]}
    assert list(starts) == names[2]
    for name, row in starts.items():
        file = files.get(name, checkpoint)
        assert (row["file"], row["file_mib"]) == (file.name, file.stat().st_size / 2**20)
        assert row["source"]["sha256"] == source["sha256"]
        assert (row["image"], row["dtype"]) == ([1, 8, 8], "float32")
        assert row["kind"] == ("sampler" if file == sampler else "denoiser")
        assert row["steps"] == (2 if file == sampler else 1)
        assert 0 < row["first_call_ms"] < 60_000
        assert 0 < row["load_s"] < 60
        assert row["peak_gpu_mib"] is None
    if starts["model.onnx"]["peak_mib"] is not None:
        assert 10 < starts["model.onnx"]["peak_mib"] < starts["PyTorch cpu"]["peak_mib"], "one that has no torch in it"

    # Where, with what, how.
    assert (record["what"], record["machine"]["cores"]) == ("sample", usable_cores())
    assert record["machine"]["cpu"]
    assert re.match(r"\d{4}-\d\d-\d\dT", record["date"])
    assert record["versions"] == {**record["versions"], "cmfast": cmfast.__version__, "numpy": np.__version__}
    assert {"torch", "onnxruntime"} <= set(record["versions"])
    assert {"commit", "load_average", "steal", "warning"} <= set(record)
    options = record["options"]
    assert (options["models"], options["baseline"]) == (["sampler.onnx", "model.onnx"], "model.pt")
    assert (options["threads"], options["seconds"], options["tolerance"]) == (1, 0.05, None)
    assert (options["precision"], options["variants"], record["left_out"]) == (None, None, [])
    assert record["included"]["median_ms"] == (
        "host wall time from numpy noise to numpy images, transfers in and out included"
    )
    assert record["ceilings"] == [], "no file says what it costs, so nothing was measured for it"
    assert str(tmp_path) not in text, "where the files lie is nobody's affair"

    assert {row["alone"] for row in record["rows"]} == {False}

    # What the user sees.
    for row in record["rows"]:
        line = rf"\s{row['steps']}\s+{row['batch']}\s+{re.escape(row['contender'])}\s+{row['median_ms']:,.2f}\s"
        assert re.search(line, result.stdout)
        assert f"{row['times_as_fast']:.2f}x" in result.stdout
    assert f"the record is in {tmp_path}/bench.json" in result.stdout
    assert f"the chart is in {tmp_path}/bench.png" in result.stdout
    assert ("warning: " in result.stdout) == bool(record["warning"])
    assert re.search(
        rf"^next: cmfast-sample {re.escape(str(tmp_path))}/\w+\.onnx --steps [12] -n 64 -o ",
        result.stdout,
        re.MULTILINE,
    )
    assert result.stderr.startswith("comparing the images\nstarting PyTorch cpu in a process of its own\n")
    assert "timing 2 step(s), batch 3: 4 contender(s)\n" in result.stderr
    with Image.open(tmp_path / "bench.png") as chart:
        assert (chart.format, min(chart.size) > 300) == ("PNG", True)
        assert len(chart.convert("RGB").getcolors(1 << 24) or []) > 50, "an empty picture"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs CUDA in PyTorch and in onnxruntime",
)
def test_on_a_gpu_every_contender_says_what_its_time_goes_to(call: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint, model, sampler = (tmp_path / name for name in ("model.pt", "model.onnx", "sampler.onnx"))
    known = {"source": {"sha256": new_checkpoint(checkpoint)}}
    cost = {"flops": 1_000_000, "weight_bytes": 100_000, "activation_bytes": 10_000}  # made up
    handmade_denoiser(model, **known, cost=cost)
    handmade_sampler(sampler, (80.0, 0.8), **known)
    result = call(
        main, model, sampler, "--baseline", checkpoint, "--device", "cuda", "--variants", "channels_last,cuda_graph",
        "--precision", "fp16", "--steps", 2, "--batch", 8, *QUICK, "--json", tmp_path / "bench.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    eager = ["PyTorch cuda", "PyTorch cuda channels_last", "PyTorch cuda cuda_graph"]
    half = [name.replace("cuda", "cuda fp16", 1) for name in eager]
    files = ["model.onnx", "model.onnx cuda_graph", "sampler.onnx", "sampler.onnx cuda_graph"]
    assert [row["contender"] for row in record["rows"]] == [*eager, *half, *files]
    for row in record["rows"]:
        times = row["device_times"]
        assert times["calls"] == 20
        assert min(times["copy_in_ms"], times["compute_ms"], times["copy_out_ms"]) > 0
        assert 0 < times["enqueue_ms"] <= times["host_ms"]
        assert row["diagnosis"]
        assert row["floor_ms"] > 0
    assert [each["dtype"] for each in record["ceilings"]] == ["float16", "float32"]
    assert record["machine"]["compute_capability"]


def test_files_without_a_baseline_are_compared_with_the_first_and_nothing_else_is_written(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.onnx", "two.onnx"):
        shutil.copy(handmade_onnx(8), tmp_path / name)
    result = call(main, "one.onnx", "two.onnx", "--steps", 2, "--batch", 4, *QUICK)
    assert result.returncode == 0, result.stderr
    assert "speed against one.onnx" in result.stdout
    assert re.search(r"2\s+4\s+two\.onnx", result.stdout)
    assert "PyTorch" not in result.stdout
    assert content(tmp_path) == ["one.onnx", "two.onnx"]


def test_a_record_is_replaced_by_the_next(handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("old")
    options = ("--steps", 1, "--batch", 1, *QUICK, "--json", tmp_path / "bench.json")
    assert call(main, handmade_onnx(8), *options).returncode == 0
    assert [row["contender"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["side8.onnx"]
    assert content(tmp_path) == ["bench.json"]


# Wrong answers are not timed.


def assert_stopped(result: Any, words: str) -> None:
    assert (result.returncode, result.stdout) == (1, "")
    first, last = result.stderr.splitlines()
    assert first == "comparing the images"
    assert last.startswith("cmfast-bench: ")
    assert re.search(words, last)
    assert "nothing was timed" in last


def test_a_model_that_computes_something_else_is_named_and_leaves_no_record(
    handmade_onnx: Factory, tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    files = ("--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.png")
    result = call(main, handmade_onnx(8), "--baseline", tiny_checkpoint(0), *QUICK, *files)
    assert_stopped(
        result, r"side8\.onnx at 1 step\(s\), batch 1 differs from PyTorch cpu by \d\.\d\de.\d\d \(allowed 0\.001\);"
    )
    assert "other weights" not in result.stderr  # nobody knows: this file does not say what it was made from
    assert content(tmp_path) == []


def test_other_weights_are_recognised(tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path) -> None:
    model = torch.load(tiny_checkpoint(0), weights_only=True)
    model["weights"]["out.2.bias"] += 0.1
    torch.save(model, tmp_path / "other.pt")
    result = call(main, tmp_path / "other.pt", "--baseline", tiny_checkpoint(0), *QUICK)
    assert_stopped(result, r"other\.pt at .* differs from .*; it was exported from other weights;")


@pytest.mark.parametrize(("factor", "words"), [(0.0101, r"by \d\.\d\de-0[23]"), (float("nan"), "by nan")])
def test_a_small_difference_and_no_number_at_all_are_differences(
    factor: float, words: str, handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    other = scaled(handmade_onnx(8), tmp_path / "other.onnx", factor)
    assert_stopped(call(main, handmade_onnx(8), other, *QUICK), rf"other\.onnx .* differs from side8\.onnx {words}")


def test_a_difference_within_the_tolerance_is_timed_and_shown(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    other = scaled(handmade_onnx(8), tmp_path / "other.onnx", 0.0101)
    options = ("--steps", 1, "--batch", 2, "--tolerance", 0.5, *QUICK, "--json", tmp_path / "bench.json")
    result = call(main, handmade_onnx(8), other, *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert 1e-3 < rows[1]["max_abs_diff"] < 0.1
    assert f"{rows[1]['max_abs_diff']:.1e}" in result.stdout


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-3), ("tf32", 4e-2), ("float16", None)])
def test_the_type_of_a_file_decides_what_difference_is_allowed(
    dtype: str, allowed: float | None, handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    other = scaled(handmade_onnx(8), tmp_path / "other.onnx", 0.01045, dtype)  # 0.045 off at 80
    files, record = (handmade_onnx(8), other), tmp_path / "bench.json"
    options = ("--steps", 1, "--batch", 2, *QUICK)
    if allowed is not None:
        words = rf"other\.onnx .* differs from side8\.onnx by 4\.\d\de-02 \(allowed {allowed:g}\)"
        assert_stopped(call(main, *files, *options), words)
        return
    assert call(main, *files, *options, "--json", record).returncode == 0
    assert [row["tolerance"] for row in json.loads(record.read_text())["rows"]] == [1e-3, 5e-2]
    assert call(main, *reversed(files), *options).returncode == 0, "the reference may be the less precise one"
    assert_stopped(call(main, *files, *options, "--tolerance", 0.01), r"allowed 0\.01")


def test_a_file_of_a_type_that_nobody_knows_is_refused(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    other = scaled(handmade_onnx(8), tmp_path / "other.onnx", 0.01)
    other.write_bytes(other.read_bytes().replace(b'"dtype": "float32"', b'"dtype": "integer"'))
    refused(call(main, handmade_onnx(8), other, *QUICK), "other.onnx", "dtype", "integer")


# What fails is named, and with --keep-going left out.


def only_in_pairs(handmade: Path, path: Path) -> Path:
    """Write the handmade denoiser so that it cannot run a batch of 3, whatever it says."""
    model = onnx.load(handmade)
    pair = helper.make_tensor("hundredth", onnx.TensorProto.FLOAT, [2, 1, 1, 1], [0.01, 0.01])
    model.graph.initializer[0].CopyFrom(pair)
    onnx.save(model, path)
    return path


def left_out(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("contender", "steps", "batch", "what")
    return [tuple(each[name] for name in names) for each in record["left_out"]]


def test_a_contender_that_fails_is_named_with_its_setting(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    pairs, record = only_in_pairs(handmade_onnx(8), tmp_path / "pairs.onnx"), tmp_path / "bench.json"
    result = call(main, handmade_onnx(8), pairs, "--steps", 2, "--batch", "2,3", *QUICK, "--json", record)
    assert (result.returncode, result.stdout, record.exists()) == (2, "", False)
    words = "cmfast-bench: pairs.onnx at 2 step(s), batch 3: ONNX Runtime cpu failed; if memory is short"
    assert result.stderr.splitlines()[-1].startswith(words)


def test_a_contender_that_fails_at_one_setting_can_be_left_out_there(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    pairs, file = only_in_pairs(handmade_onnx(8), tmp_path / "pairs.onnx"), tmp_path / "bench.json"
    options = ("--steps", 2, "--batch", "2,3", "--keep-going", *QUICK, "--json", file)
    result = call(main, handmade_onnx(8), pairs, *options)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text())
    have = [(row["batch"], row["contender"]) for row in record["rows"]]
    assert have == [(2, "side8.onnx"), (2, "pairs.onnx"), (3, "side8.onnx")]
    assert [row["contender"] for row in record["starts"]] == ["side8.onnx", "pairs.onnx"]
    assert left_out(record) == [("pairs.onnx", 2, 3, "run")]
    why = record["left_out"][0]["why"]
    assert why.startswith("ONNX Runtime cpu failed")
    assert f"left out: pairs.onnx at 2 step(s), batch 3: {why}\n" in result.stderr
    assert record["options"]["keep_going"] is True


def test_a_wrong_answer_is_left_out_by_name_and_never_timed(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    wrong, file = scaled(handmade_onnx(8), tmp_path / "wrong.onnx", 0.0101), tmp_path / "bench.json"
    options = ("--steps", 1, "--batch", 2, "--keep-going", *QUICK, "--json", file)
    assert call(main, handmade_onnx(8), wrong, *options).returncode == 0
    record = json.loads(file.read_text())
    assert [row["contender"] for row in record["rows"]] == ["side8.onnx"]
    assert [row["contender"] for row in record["starts"]] == ["side8.onnx"]
    assert left_out(record) == [("wrong.onnx", 1, 2, "images")]
    assert re.fullmatch(r"differs from side8\.onnx by \S+ \(allowed 0\.001\)", record["left_out"][0]["why"])


@pytest.mark.parametrize("first", ["wrong number", "fails"])
def test_without_the_reference_the_next_is_what_the_others_are_compared_with(
    first: str, handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    lost, wrong, file = tmp_path / "lost.onnx", tmp_path / "wrong.onnx", tmp_path / "bench.json"
    only_in_pairs(handmade_onnx(8), lost) if first == "fails" else scaled(handmade_onnx(8), lost, float("nan"))
    scaled(handmade_onnx(8), wrong, 0.0101)
    options = ("--steps", 1, "--batch", 3, "--keep-going", *QUICK, "--json", file)
    assert call(main, lost, handmade_onnx(8), wrong, *options).returncode == 0
    record = json.loads(file.read_text())
    (row,) = record["rows"]
    assert (row["contender"], row["reference"], row["max_abs_diff"]) == ("side8.onnx", "side8.onnx", 0)
    assert left_out(record) == [
        ("lost.onnx", 1, 3, "run" if first == "fails" else "images"), ("wrong.onnx", 1, 3, "images")]  # fmt: skip


def test_a_file_that_does_not_open_is_left_out_and_its_place_is_not_recorded(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    noise, file = tmp_path / "noise.onnx", tmp_path / "bench.json"
    noise.write_bytes(b"neither fish nor fowl")
    options = ("--steps", 1, "--batch", 1, *QUICK, "--json", file)
    refused(call(main, noise, handmade_onnx(8), *options), "noise.onnx: not a whole ONNX file")
    assert call(main, noise, handmade_onnx(8), "--keep-going", *options).returncode == 0
    record = json.loads(file.read_text())
    assert left_out(record) == [("noise.onnx", None, None, "opening")]
    assert record["left_out"][0]["why"].startswith("noise.onnx: not a whole ONNX file")
    assert str(tmp_path) not in file.read_text()


def test_when_nothing_is_left_the_first_reason_is_given(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    noise, pairs = tmp_path / "noise.onnx", only_in_pairs(handmade_onnx(8), tmp_path / "pairs.onnx")
    noise.write_bytes(b"neither fish nor fowl")
    for file, words in ((noise, "noise.onnx: noise.onnx: not a whole"), (pairs, "pairs.onnx at 1 step(s), batch 3: ")):
        result = call(main, file, "--steps", 1, "--batch", 3, "--keep-going", *QUICK, "--json", tmp_path / "b.json")
        assert (result.returncode, result.stdout) == (2, "")
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"cmfast-bench: no contender is left to time; the first that failed: {words}")
    assert content(tmp_path) == ["noise.onnx", "pairs.onnx"]


# Precisions and variants.


def names(result: Any) -> list[str]:
    """Return who would be timed, of a dry run at one setting."""
    assert result.returncode == 0, result.stderr
    return str(result.stdout).splitlines()[0].partition(": ")[2].split(", ")


EAGER = ["PyTorch cpu", "PyTorch cpu channels_last"]
HALF = ["PyTorch cpu fp16", "PyTorch cpu fp16 channels_last"]


def test_a_file_in_half_precision_is_compared_with_pytorch_in_both(call: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "model.pt", tmp_path / "half.onnx"
    handmade_denoiser(model, {"sha256": new_checkpoint(checkpoint)}, dtype="float16")
    options = ("--variants", "", "--steps", 1, "--batch", 2, *QUICK, "--json", tmp_path / "bench.json")
    result = call(main, model, "--baseline", checkpoint, *options)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["contender"]: row for row in record["rows"]}
    assert list(rows) == [EAGER[0], HALF[0], "half.onnx"]
    for name, row in rows.items():
        half = name not in EAGER
        same = "PyTorch cpu fp16" if half else "PyTorch cpu"
        assert (row["dtype"], row["tolerance"]) == (("float16", 5e-2) if half else ("float32", 1e-3))
        assert (row["reference"], row["reference_same_precision"]) == ("PyTorch cpu", same)
        assert row["times_as_fast"] == pytest.approx(rows["PyTorch cpu"]["median_ms"] / row["median_ms"])
        assert row["times_as_fast_same_precision"] == pytest.approx(rows[same]["median_ms"] / row["median_ms"])
        assert row["max_abs_diff"] <= 1e-6, "the images are those of float32"
    assert [row["dtype"] for row in record["starts"]] == ["float32", "float16", "float16"]
    assert "same type" in result.stdout
    assert f"{rows['half.onnx']['times_as_fast_same_precision']:.2f}x" in result.stdout


def test_the_precisions_of_the_baseline_are_those_that_are_requested(
    tiny_checkpoint: Factory, handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    half = scaled(handmade_onnx(8), tmp_path / "half.onnx", 0.01, "float16")
    options = ("--baseline", tiny_checkpoint(0), "--steps", 1, "--batch", 1, "--dry-run")
    brain = ["PyTorch cpu bf16", "PyTorch cpu bf16 channels_last"]
    assert names(call(main, *options)) == EAGER
    assert names(call(main, half, *options)) == [*EAGER, *HALF, "half.onnx"]
    assert names(call(main, half, *options, "--precision", "fp32")) == [*EAGER, "half.onnx"]
    assert names(call(main, half, *options, "--precision", "bf16,fp16")) == [*EAGER, *brain, *HALF, "half.onnx"]


def test_what_nobody_requested_by_name_is_left_out_and_that_is_said(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    checkpoint, model = tmp_path / "model.pt", tmp_path / "model.onnx"
    handmade_denoiser(model, {"sha256": new_checkpoint(checkpoint)}, dtype="tf32")
    options = ("--baseline", checkpoint, "--steps", 1, "--batch", 1, *QUICK)
    result = call(main, model, *options, "--variants", "", "--json", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    why = "precision tf32 is a GPU's way to multiply float32"
    assert result.stderr.startswith(f"left out: PyTorch cpu tf32: {why}")
    record = json.loads((tmp_path / "bench.json").read_text())
    (left_out,) = record["left_out"]
    assert left_out.pop("why").startswith(why)
    assert left_out == {
        "contender": "PyTorch cpu tf32",
        "what": "opening",
        "steps": None,
        "batch": None,
        "threads": None,
    }
    assert [row["contender"] for row in record["rows"]] == ["PyTorch cpu", "model.onnx"]
    assert [row["times_as_fast_same_precision"] for row in record["rows"]] == [1, None]
    refused(call(main, model, *options, "--precision", "tf32"), "precision tf32 is a GPU's way")


# Condition for removal: importing torch's compiler does not use what torch itself calls deprecated (torch 2.12 does).
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_the_variants_of_the_baseline_are_those_that_are_requested(
    tiny_checkpoint: Factory, call: Callable[..., Any]
) -> None:
    options = ("--baseline", tiny_checkpoint(0), "--steps", 1, "--batch", 1, "--dry-run")
    assert names(call(main, *options, "--variants", "")) == EAGER[:1]
    assert names(call(main, *options, "--variants", "compiled")) == ["PyTorch cpu", "PyTorch cpu compiled"]
    assert names(call(main, *options, "--variants", "compiled,channels_last")) == [*EAGER, "PyTorch cpu compiled"]
    assert names(call(main, *options, "--variants", "channels_last", "--compile")) == [*EAGER, "PyTorch cpu compiled"]


@pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")
def test_openvino_is_a_contender_in_each_precision_that_is_requested(
    handmade_onnx: Factory, tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"
    shutil.copy(handmade_onnx(8), model)
    settings = ("--steps", 1, "--batch", 2)
    options = (*settings, "--variants", "openvino,openvino throughput", "--precision", "fp32,bf16")
    ways = ["model.onnx", "model.onnx openvino", "model.onnx openvino throughput"]
    if "BF16" in capabilities(import_openvino("this test").Core()):
        both = [ways[0], *(f"{way}{word}" for way in ways[1:] for word in ("", " bf16"))]
        eager = ["PyTorch cpu", "PyTorch cpu bf16"]
        assert names(call(main, model, *options, "--baseline", tiny_checkpoint(0), "--dry-run")) == [*eager, *both]
        result = call(main, model, *options, *QUICK, "--no-starts", "--json", tmp_path / "bench.json")
        assert result.returncode == 0, result.stderr
        rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
        assert [row["contender"] for row in rows] == both
        found = {row["contender"]: (row["backend"], row["dtype"], row["tolerance"]) for row in rows}
        assert found["model.onnx openvino"] == ("OpenVINO cpu", "float32", 1e-3)
        assert found["model.onnx openvino bf16"] == ("OpenVINO cpu bfloat16", "bfloat16", 3e-1)
    assert names(call(main, model, *options[:-2], "--dry-run")) == ways


# What can be got wrong.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to time: pass a MODEL or a --baseline, for example cmfast-bench model.onnx"),
        (["nowhere.onnx"], "nowhere.onnx: no such file"),
        (["a.onnx", "--baseline", "nowhere.pt"], "nowhere.pt: no such file"),
        (["a.onnx", "empty.onnx"], "empty.onnx: the file is empty"),
        (["a.onnx", "a.onnx"], "a.onnx is given twice"),
        (["a.onnx", "./folder/../a.onnx"], "a.onnx is given twice"),
        (["noise.onnx"], "noise.onnx: not a whole ONNX file"),
        (["model.tflite"], "no backend runs files ending in .tflite"),
        (["a.onnx", "small.onnx"], "small.onnx draws images [1, 4, 4], a.onnx images [1, 8, 8]"),
        (["--baseline", "a.onnx"], "--baseline takes a checkpoint that PyTorch runs, got a.onnx; pass it as a MODEL"),
        (["a.onnx", "--compile"], "--compile needs a checkpoint to compile; add --baseline model.pt"),
        (["a.onnx", "--seconds", "0"], "--seconds must be greater than 0, got 0"),
        (["a.onnx", "--seconds", "nan"], "--seconds must be greater than 0, got nan"),
        (["a.onnx", "--seconds", "inf"], "--seconds must be greater than 0, got inf"),
        (["a.onnx", "--steps", "0"], "--steps takes distinct whole numbers from 1, got 0"),
        (["a.onnx", "--steps", "1,1"], "--steps takes distinct whole numbers from 1, got 1,1"),
        (["a.onnx", "--steps", "3"], "a.onnx has no default noise levels for 3 step(s); use --steps 1,2"),
        (["a.onnx", "--steps", "two"], "'two' is not a list of numbers"),
        (["a.onnx", "--batch", "1,0"], "--batch takes distinct whole numbers from 1, got 1,0"),
        (["a.onnx", "--threads", "0"], "threads must be at least 1, got 0"),
        (["a.onnx", "--tolerance", "0"], "--tolerance must be greater than 0, got 0"),
        (["a.onnx", "--budget", "0"], "--budget must be greater than 0, got 0"),
        (["a.onnx", "--tolerance", "nan"], "--tolerance must be greater than 0, got nan"),
        (["a.onnx", "--precision", "fp16"], "--precision needs a checkpoint that PyTorch runs, or OpenVINO; add"),
        (["--baseline", "model.pt", "--precision", "int8"], "distinct names from fp32, tf32, fp16, bf16, got int8"),
        (["--baseline", "model.pt", "--precision", "fp16,fp16"], "--precision takes distinct names"),
        (["a.onnx", "--variants", "fast"], "nhwc, nhwc cuda_graph, tensorrt, openvino, openvino throughput, got fast"),
        (["--baseline", "model.pt", "--variants", "fused cuda_graph"], "fused cuda_graph needs an NVIDIA GPU"),
        (["a.onnx", "--variants", "diffusers"], "--variants takes distinct names"),
        (["a.onnx", "--variants", "cuda_graph"], "--variants cuda_graph needs an NVIDIA GPU: add --device cuda"),
        (["a.onnx", "--variants", "tensorrt"], "--variants tensorrt needs an NVIDIA GPU: add --device cuda"),
        (["a.onnx", "--variants", "compiled"], "compiled needs a checkpoint (--baseline model.pt), and"),
        (["--baseline", "model.pt", "--device", "cuda", "--variants", "tensorrt"], "needs an .onnx file as a MODEL"),
        (["model.pt", "--device", "cuda", "--variants", "cuda_graph"], "or an .onnx file as a MODEL"),
        (["model.engine"], "model.engine: a TensorRT engine runs on an NVIDIA GPU only; add --device cuda"),
        (["model.engine", "--device", "cuda"], "model.engine: not a TensorRT engine"),
        (["--baseline", "model.engine", "--device", "cuda"], "--baseline takes a checkpoint that PyTorch runs"),
        (["a.onnx", "--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["a.onnx", "--json", "bench.txt"], "bench.txt: need a name ending in .json"),
        (["a.onnx", "--plot", "bench.svg"], "bench.svg: need a name ending in .png"),
        (["a.onnx", "--json", "nowhere/b.json"], "the folder nowhere does not exist; make it first: mkdir -p nowhere"),
        (["a.onnx", "--plot", "nowhere/b.png"], "the folder nowhere does not exist; make it first: mkdir -p nowhere"),
        (["a.onnx", "--json", "folder"], "folder is a folder; name a file"),
        (["a.onnx", "--fastest", "9"], "No such option"),
        (["two.onnx", "--steps", "1"], "two.onnx runs at none of these settings; it needs --steps 2 --batch 1"),
        (["three.onnx"], "three.onnx runs at none of these settings; it needs --steps 2 --batch 3"),
        (["two.onnx", "other.onnx"], "are samplers of 2 step(s) at different noise levels; time them separately"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_request_that_cannot_be_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, handmade_onnx: Factory, call: Callable[..., Any],
    refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(handmade_onnx(8), "a.onnx")
    shutil.copy(handmade_onnx(4), "small.onnx")
    handmade_sampler(tmp_path / "two.onnx", (80.0, 0.8))
    handmade_sampler(tmp_path / "other.onnx", (80.0, 5.0))
    handmade_sampler(tmp_path / "three.onnx", (80.0, 0.8), batch=3)
    for noise in ("noise.onnx", "model.tflite", "model.pt", "model.engine"):
        Path(noise).write_bytes(b"neither fish nor fowl")
    Path("empty.onnx").touch()
    Path("folder").mkdir()
    before = content(tmp_path)
    refused(call(main, *arguments), words)
    assert content(tmp_path) == before


# Time.


def test_a_budget_ends_the_timing_and_says_what_was_left_out(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    other, file = scaled(handmade_onnx(8), tmp_path / "other.onnx", 0.01), tmp_path / "bench.json"
    files = (handmade_onnx(8), other)
    begun = time.perf_counter()
    result = call(main, *files, "--batch", "1,2,3", "--steps", "1,2", "--seconds", 60, "--budget", 3, "--json", file)
    took = time.perf_counter() - begun
    assert result.returncode == 0, result.stderr
    assert took < 3 + 5, "without it these are twelve minutes"
    record = json.loads(file.read_text())
    assert [(row["steps"], row["batch"], row["contender"]) for row in record["rows"]] == [
        (steps, batch, name) for steps in (1, 2) for batch in (1, 2, 3) for name in ("side8.onnx", "other.onnx")
    ]
    assert min(row["calls"] for row in record["rows"]) >= 3
    assert (record["options"]["budget"], record["options"]["starts"]) == (3, True)
    # They come last, and as many as there is time for.
    started = [row["contender"] for row in record["starts"]]
    left = {each["contender"]: each for each in record["left_out"]}
    assert sorted([*started, *left]) == ["other.onnx", "side8.onnx"]
    for each in left.values():
        assert (each["what"], each["why"]) == ("start", "no time was left of --budget 3 s")


def test_settings_that_a_budget_has_no_time_for_are_named(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spent(comparison.Budget):
        """Used up once the first setting has been timed."""

        def left(self) -> float:
            return 0.0 if timed else 60.0

    timed: list[object] = []
    real = comparison.time_setting

    def time_setting(*arguments: Any) -> Any:
        timed.append(real(*arguments))
        return timed[-1]

    monkeypatch.setattr(comparison, "Budget", Spent)
    monkeypatch.setattr(comparison, "time_setting", time_setting)
    file = tmp_path / "bench.json"
    options = ("--batch", "1,2", "--steps", "1,2", *QUICK, "--budget", 60, "--json", file)
    result = call(main, handmade_onnx(8), *options)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text())
    assert [(row["steps"], row["batch"]) for row in record["rows"]] == [(1, 1)]
    assert left_out(record) == [
        ("side8.onnx", 1, 2, "budget"),
        ("side8.onnx", 2, 1, "budget"),
        ("side8.onnx", 2, 2, "budget"),
        ("side8.onnx", None, None, "start"),
    ]
    assert "left out: side8.onnx at 1 step(s), batch 2: no time was left of --budget 60 s\n" in result.stderr


def test_starting_in_processes_of_their_own_can_be_left_out(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--steps", 1, "--batch", 1, *QUICK, "--no-starts", "--json", tmp_path / "bench.json")
    result = call(main, handmade_onnx(8), *options)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert (len(record["rows"]), record["starts"], record["left_out"]) == (1, [], [])
    assert "process of its own" not in result.stdout + result.stderr


# Trying dry.


def test_a_dry_run_says_what_would_be_timed_and_writes_nothing(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(handmade_onnx(8), "a.onnx")
    handmade_sampler(tmp_path / "two.onnx", (80.0, 0.8))
    handmade_sampler(tmp_path / "four.onnx", (80.0, 0.8), batch=4)
    before = content(tmp_path)
    result = call(
        main, "two.onnx", "four.onnx", "a.onnx", "--batch", "1,4", "--seconds", 2, "--dry-run", "--json", "b.json",
        "--plot", "b.png",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [  # the denoiser first: it runs at every setting
        "1 step(s), batch 1: a.onnx",
        "1 step(s), batch 4: a.onnx",
        "2 step(s), batch 1: a.onnx, two.onnx",
        "2 step(s), batch 4: a.onnx, two.onnx, four.onnx",
        "at least 14 s of timing",
    ]
    assert content(tmp_path) == before


def test_a_dry_run_finds_what_is_wrong_too(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    refused(call(main, handmade_onnx(8), "-n", "--json", tmp_path / "bench.txt"), "need a name ending in .json")
    refused(call(main, handmade_onnx(8), "-n", "--steps", 3), "use --steps 1,2")


# Condition for removal: importing torch's compiler does not use what torch itself calls deprecated (torch 2.12 does).
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_the_baseline_is_run_in_each_way_that_was_requested(tiny_checkpoint: Factory, call: Callable[..., Any]) -> None:
    options = ("--baseline", tiny_checkpoint(0), "--steps", 1, "--batch", 1, "--dry-run")
    names = "1 step(s), batch 1: PyTorch cpu, PyTorch cpu channels_last"
    assert call(main, *options).stdout.splitlines()[0] == names
    assert call(main, *options, "--compile").stdout.splitlines()[0] == f"{names}, PyTorch cpu compiled"


def test_files_of_one_name_are_told_apart(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("old", "new"):
        Path(folder).mkdir()
        shutil.copy(handmade_onnx(8), f"{folder}/model.onnx")
    result = call(main, "old/model.onnx", "new/model.onnx", "--steps", 1, "--batch", 1, "-n")
    assert result.stdout.splitlines()[0] == "1 step(s), batch 1: old/model.onnx, new/model.onnx"


def test_the_variants_of_the_baseline_draw_what_it_draws(tiny_checkpoint: Factory) -> None:
    noise = cmfast.gaussian(0, range(2), 0, (1, 8, 8))
    inputs = {"x": 80 * noise, "sigma": np.full(2, 80, np.float32)}
    plain, channels_last = (
        open_backend(tiny_checkpoint(0), variant=variant).run(inputs) for variant in ("", "channels_last")
    )
    np.testing.assert_allclose(channels_last, plain, rtol=0, atol=1e-5)  # another memory layout sums in another order


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json", "a.onnx"], "a.onnx is read by this command"),
        (["--json", "link.json"], "link.json is read by this command"),
        (["--json", "/dev/null"], "--json: /dev/null is a device"),
        (["--json", "fifo.json"], "fifo.json is a FIFO"),
        (["--plot", "x.json", "--json", "x.json"], "--json and --plot name the same file"),
        (["--seconds", "1e300"], "--seconds must be at most 3600"),
        (["--batch", str(10**12)], "--batch takes numbers up to 65536"),
        (["--batch", "²"], "'²' is not a list of numbers"),
        (["--batch", ",".join(map(str, range(1, 200)))], "--batch takes at most 100 numbers"),
        (["--steps", str(10**9)], "--steps takes numbers up to 10000"),
        (["--threads", str(10**12)], "threads must be at most 1024"),
    ],
)
def test_absurd_requests_and_outputs_over_inputs_are_refused_before_the_work(
    options: list[str], words: str, handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(handmade_onnx(8), "a.onnx")
    os.symlink("a.onnx", "link.json")
    os.mkfifo("fifo.json")
    before = Path("a.onnx").read_bytes()
    refused(call(main, "a.onnx", *options), words)
    assert content(tmp_path) == ["a.onnx", "fifo.json", "link.json"]
    assert Path("a.onnx").read_bytes() == before
