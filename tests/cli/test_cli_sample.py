# SPDX-License-Identifier: MIT
"""cmfast-sample on a checkpoint: what it writes, and one line for everything that a user can get wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

import cmfast
from cmfast.cli.sample import main
from cmfast.formats.table import read_manifest
from cmfast.sampling import Churn
from cmfast_export.graphs.sampler import sampler_graph
from cmfast_export.graphs.writer import write_with_manifest
from helpers.graphs import write_denoiser

Factory = Callable[..., Path]


def content(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# The whole way, as a user goes it.


def test_the_command_draws_the_images_that_the_library_draws(
    tiny_checkpoint: Factory, run: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_checkpoint(10)
    result = run("cmfast.cli.sample", model, "-n", 5, "--steps", 2, "--seed", 7, "-o", tmp_path / "images.npz")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path}/images.npz: 5 image(s), 2 step(s) at 80, 0.8, PyTorch cpu\n"
    with np.load(tmp_path / "images.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], cmfast.load(model).sample(5, steps=2, seed=7))
        np.testing.assert_array_equal(arrays["arr_1"], cmfast.load(model).labels(5, seed=7))
    assert content(tmp_path) == ["images.npz"]


def test_an_error_of_the_backend_is_one_line_in_a_process_of_its_own(
    run: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    model = write_denoiser(tmp_path / "model.onnx", {"conditions": [{"name": "label", "kind": "class", "classes": 10}]})
    result = run("cmfast.cli.sample", model, "--label", 10, "-o", tmp_path / "grid.png")
    refused(result, "label 10 is out of range; this model has the classes 0 to 9")
    assert content(tmp_path) == ["model.onnx"]


# The same `main`, in this process.


def test_a_png_is_a_grid_a_folder_has_one_each_and_an_npz_the_arrays(
    tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    images = cmfast.load(tiny_checkpoint(0)).sample(4)
    for out in ("grid.png", "images.npz", "folder"):
        assert call(main, tiny_checkpoint(0), "-n", 4, "-o", tmp_path / out).returncode == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 50 + 2, 2 * 50 + 2)  # 8 pixels shown as 48
    with np.load(tmp_path / "images.npz") as arrays:
        assert list(arrays) == ["arr_0"]  # an unconditional model has no labels
        np.testing.assert_array_equal(arrays["arr_0"], images)
    for i in range(4):
        with Image.open(tmp_path / "folder" / f"{i:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), images[i, ..., 0])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_both_kinds_of_checkpoint_draw_the_same(suffix: str, tiny_checkpoint: Factory) -> None:
    drawn = cmfast.load(tiny_checkpoint(10, suffix)).sample(3, steps=2)
    np.testing.assert_array_equal(drawn, cmfast.load(tiny_checkpoint(10)).sample(3, steps=2))
    assert drawn.std() > 10


@pytest.mark.parametrize(
    "options", [["--batch", 2], ["--threads", 1], ["--sigmas", "80,0.8"], ["--steps", "2", "--batch", 5]]
)
def test_options_of_speed_and_another_spelling_do_not_change_the_images(
    options: list[Any], tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    plain = cmfast.load(tiny_checkpoint(10)).sample_float(5, sigmas=(80, 0.8))
    assert call(main, tiny_checkpoint(10), "-n", 5, *(["--steps", 2] if "--sigmas" not in options else []), *options,
                "-o", tmp_path / "a.npz").returncode == 0  # fmt: skip
    with np.load(tmp_path / "a.npz") as arrays:
        pixels = (plain.transpose(0, 2, 3, 1) + 1) * 127.5
        assert np.abs(arrays["arr_0"] - pixels).max() <= 0.51  # another batch size may round x0 differently by 1e-5


def test_the_first_image_and_the_labels_can_be_chosen(
    tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = cmfast.load(tiny_checkpoint(10))
    for name, options in {
        "whole": ["-n", 6],
        "rest": ["-n", 4, "--first", 2],
        "sevens": ["-n", 3, "--label", 7],
        "each": ["-n", 3, "--label", "1,2,3"],
    }.items():
        assert call(main, tiny_checkpoint(10), *options, "-o", tmp_path / f"{name}.npz").returncode == 0
    arrays = {name: np.load(tmp_path / f"{name}.npz") for name in ("whole", "rest", "sevens", "each")}
    assert arrays["sevens"]["arr_1"].tolist() == [7, 7, 7]
    assert arrays["each"]["arr_1"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(arrays["rest"]["arr_1"], arrays["whole"]["arr_1"][2:])
    difference = arrays["rest"]["arr_0"].astype(int) - arrays["whole"]["arr_0"][2:]
    assert np.abs(difference).max() <= 1  # batches of four and six round differently
    np.testing.assert_array_equal(arrays["sevens"]["arr_0"], model.sample(3, label=7))


@pytest.mark.parametrize(
    ("options", "churn"),
    [([], Churn()), (["--churn", "2"], Churn(s_churn=2)),
     (["--churn", "40,0.05,50,1.003"], Churn(s_churn=40, s_tmin=0.05, s_tmax=50, s_noise=1.003))],
    ids=str,
)  # fmt: skip
def test_heun_steps_draw_the_images_that_the_library_draws(
    options: list[str], churn: Churn, tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "images.npz"
    result = call(main, tiny_checkpoint(10), "-n", 3, "--heun", 4, *options, "--seed", 7, "--first", 2, "-o", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{out}: 3 image(s), 4 Heun step(s), 7 network call(s) per sample, PyTorch cpu\n"
    model = cmfast.load(tiny_checkpoint(10))
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], model.sample_heun(3, steps=4, churn=churn, seed=7, first=2))
        np.testing.assert_array_equal(arrays["arr_1"], model.labels(3, seed=7, first=2))
        assert arrays["arr_0"].std() > 10


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        (10, ["--label", "10"], "label 10 is out of range; this model has the classes 0 to 9"),
        (10, ["--label", "-1"], "label -1 is out of range"),
        (10, ["--label", "1,2"], "label must be one class or 16 of them"),
        (10, ["--label", "one"], "label 'one' is not a number, and this model has no class names; need 0 to 9"),
        (0, ["--label", "3"], "a label was given, but the model is unconditional: it has no classes"),
        (10, ["-n", "0"], "at least 1, got 0"),
        (10, ["-n", "-3"], "at least 1, got -3"),
        (10, ["-n", "many"], "'many' is not a valid integer"),
        (10, ["--sigmas", "0.8,80"], "80 follows 0.8"),
        (10, ["--sigmas", "81"], "the first noise level is 81, but this model was trained for 0.002 < sigma <= 80"),
        (10, ["--sigmas", "80,nan"], "must be finite numbers"),
        (10, ["--sigmas", "80;0.8"], "'80;0.8' is not a list of numbers such as 80,0.8"),
        (10, ["--sigmas", ""], "'' is not a list of numbers"),
        (10, ["--steps", "3"], "for these numbers of steps: 1, 2; for 3, pass them, for example sigmas 80"),
        (10, ["--steps", "0"], "the number of steps must be at least 1, got 0"),
        (10, ["--steps", "1", "--sigmas", "80,0.8"], "1 steps were requested with 2 noise levels; pass one of the two"),
        (10, ["--batch", "0"], "at least 1, got 0"),
        (10, ["--threads", "0"], "at least 1, got 0"),
        (10, ["--first", "-1"], "at least 0, got -1"),
        (10, ["--first", str(2**64)], "must be a whole number from 0"),
        (10, ["--seed", "-1"], "the seed must be a whole number from 0 to 2**64 - 1, got -1"),
        (10, ["--seed", str(2**64)], "the seed must be a whole number"),
        (10, ["--heun", "0"], "the number of Heun steps must be at least 1, got 0"),
        (10, ["--heun", "18", "--steps", "2"], "--heun has noise levels of its own; remove --steps, --sigmas"),
        (10, ["--heun", "18", "--sigmas", "80,0.8"], "--heun has noise levels of its own"),
        (10, ["--heun", "18", "--indices", "22,0"], "--heun has noise levels of its own"),
        (10, ["--churn", "40"], "--churn requires --heun N, such as --heun 18"),
        (10, ["--heun", "18", "--churn", "-1"], "s_churn must be a number from 0"),
        (10, ["--heun", "18", "--churn", "1,2,3,4,5"], "at most four numbers, got 5"),
        (10, ["--heun", "18", "--churn", "much"], "'much' is not a list of numbers"),
        (10, ["--heun", "2", "--label", "10"], "label 10 is out of range"),
        (10, ["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (10, ["--quality", "9"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_request_that_cannot_be_is_one_line_and_writes_nothing(
    classes: int, options: list[str], words: str, tiny_checkpoint: Factory, call: Callable[..., Any],
    refused: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    refused(call(main, tiny_checkpoint(classes), "-o", tmp_path / "grid.png", *options), words)
    assert content(tmp_path) == []


def test_heun_steps_of_a_sampler_file_are_refused_in_one_line(
    call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    model, levels = write_denoiser(tmp_path / "sampler.onnx", {"made_by": {"cmfast": "0.1"}}), (80.0, 0.8)
    manifest = read_manifest(model)
    sampler = replace(manifest, kind="sampler", spec=replace(manifest.spec, sigmas={2: levels}))
    graph = ir.load(model)
    for node in graph.graph:
        node.name = node.outputs[0].name  # from which each step makes one of its own
    write_with_manifest(sampler_graph(graph, levels, manifest.spec), sampler, model)
    result = call(main, model, "--heun", "18", "-o", tmp_path / "grid.png")
    refused(result, "a sampler graph has no denoiser to call; export one: cmfast-export model.pt --kind denoiser")
    assert content(tmp_path) == ["sampler.onnx"]


def test_a_device_that_is_not_there_is_an_error_and_not_a_cpu(
    tiny_checkpoint: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one here")
    result = call(main, tiny_checkpoint(), "--device", "cuda", "-o", tmp_path / "grid.png")
    refused(result, "device cuda was requested, but PyTorch")
    assert content(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.pt", "nowhere.pt: no such file"),
        ("empty.onnx", "empty.onnx: the file is empty"),
        ("empty.pt", "empty.pt: the file is empty"),
        ("folder", "folder: no model_index.json in it; name the folder of a whole ConsistencyModelPipeline"),
        ("model.tflite", "no backend runs files ending in .tflite; there are "),
        ("model", "no backend runs files ending in nothing"),
        ("noise.onnx", "noise.onnx: not a whole ONNX file"),
        ("noise.pt", "noise.pt: "),
        ("noise.safetensors", "noise.safetensors: a text that begins with 'neither fish nor fowl'; download"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(
    name: str, words: str, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for empty in ("empty.onnx", "empty.pt"):
        (tmp_path / empty).touch()
    for noise in ("model.tflite", "model", "noise.onnx", "noise.pt", "noise.safetensors"):
        (tmp_path / noise).write_bytes(b"neither fish nor fowl")
    before = content(tmp_path)
    refused(call(main, tmp_path / name, "-o", tmp_path / "grid.png"), words)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("grid.jpg", "images are written to NAME.png (a grid), NAME.npz, or a folder; got .jpg"),
        ("nowhere/grid.png", "nowhere does not exist; make it first: mkdir -p"),
        ("taken", "taken exists and is not an empty folder; name another or remove it"),
        ("taken.png", "taken.png is a folder; name a file"),
    ],
)
def test_a_place_where_images_cannot_go_is_named_before_the_model_is_opened(
    out: str, words: str, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").touch()
    refused(call(main, tmp_path / "no model.pt", "-o", tmp_path / out), words)
    assert content(tmp_path) == ["taken", "taken.png"]


def test_a_model_without_weights_enough_is_one_line(
    tiny_checkpoint: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    import torch

    model = torch.load(tiny_checkpoint(), weights_only=True)
    del model["weights"]["out.0.weight"]
    torch.save(model, tmp_path / "model.pt")
    refused(call(main, tmp_path / "model.pt", "-o", tmp_path / "grid.png"), "the weights do not fit the network")
    assert content(tmp_path) == ["model.pt"]


def test_classes_go_by_name_on_the_command_line(
    tiny_checkpoint: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    import torch

    model = torch.load(tiny_checkpoint(10), weights_only=True)
    model["spec"]["conditions"][0]["class_names"] = ["cat", "dog", "a, b", *"3456789"]
    torch.save(model, tmp_path / "model.pt")
    out = tmp_path / "a.npz"
    for label, want in (("dog,cat,3", [1, 0, 3]), ("a, b", [2, 2, 2]), ("9", [9, 9, 9]), ("dog, cat, +4", [1, 0, 4])):
        assert call(main, tmp_path / "model.pt", "-n", 3, "--label", label, "-o", out).returncode == 0
        with np.load(out) as arrays:
            assert arrays["arr_1"].tolist() == want
    words = "label 'dogs' is not a class of this model; it has dog, "
    refused(call(main, tmp_path / "model.pt", "--label", "dogs", "-o", tmp_path / "b.npz"), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-n", str(10**14), "-o", "folder"], "of memory, and"),
        (["-n", str(10**30), "-o", "a.npz"], "of memory, and"),
        (["-n", str(10**7)], "at most 178,956,970 are written"),
        (["--first", str(2**64 - 1)], "first + n must be at most 2**64"),
        (["--heun", str(10**8)], "must be a whole number from 1 to 10000, got 100000000"),
        (["--steps", str(10**9)], "the number of steps must be at most 10000"),
        (["--threads", str(10**12)], "threads must be at most 1024"),
        (["--batch", "²"], "'²' is not a valid integer"),
        (["--sigmas", ",".join(["80"] * 20_000)], "more than 10000 noise levels"),
        (["--label", "²"], "label '²' is not a number"),
        (["-o", "model.onnx"], "model.onnx: images are written to"),
    ],
)
def test_absurd_requests_are_refused_before_the_work(
    options: list[str], words: str, handmade_onnx: Factory, tiny_checkpoint: Factory, call: Callable[..., Any],
    refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = tiny_checkpoint(10) if "--label" in options else handmade_onnx(8)
    refused(call(main, model, "-o", "grid.png", *options), words)
    assert content(tmp_path) == []


def test_the_largest_first_image_is_drawn_and_a_model_called_png_is_not_overwritten(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    out = tmp_path / "GRID.PNG"
    assert call(main, handmade_onnx(8), "-n", 2, "--first", 2**63 - 1, "-o", out).returncode == 0
    with Image.open(out) as opened:
        assert opened.format == "PNG"
    before = out.read_bytes()
    refused(call(main, out, "-o", out), "GRID.PNG is read by this command, so it is not overwritten")
    assert out.read_bytes() == before


def test_a_model_whose_output_is_not_finite_draws_nothing_and_exits_with_1(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    import onnx

    graph = onnx.load(handmade_onnx(8))
    graph.graph.initializer[0].CopyFrom(onnx.helper.make_tensor("hundredth", onnx.TensorProto.FLOAT, [], [np.inf]))
    onnx.save(graph, tmp_path / "inf.onnx")
    refused(call(main, tmp_path / "inf.onnx", "-o", tmp_path / "a.png"), "not finite", "at noise level 80", code=1)
    assert content(tmp_path) == ["inf.onnx"]
