# SPDX-License-Identifier: MIT
"""cmfast-eval: the whole command on a tiny model, its record and chart, and one line for every wrong request."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from PIL import Image

import cmfast
from cmfast.errors import CmfastError, CmfastWarning
from cmfast.formats.manifest import Manifest
from cmfast.shards.files import write_shard
from cmfast_train.checkpoint import load_checkpoint, save_checkpoint
from cmfast_train.cli.evaluate import main
from cmfast_train.config.presets import PRESETS
from cmfast_train.data.images import load_data
from cmfast_train.evaluation import evaluate
from cmfast_train.evaluation.evaluate import Reference, few_steps, heun_steps
from cmfast_train.evaluation.features import SHIPPED, Pixels, load_features
from cmfast_train.evaluation.metrics import frechet_distance, precision_recall

Factory = Callable[..., Path]
Call = Callable[..., Any]


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def digits() -> torch.Tensor:
    images = load_data(PRESETS["digits"], None).__getitems__(list(range(1797)))[0]
    assert isinstance(images, torch.Tensor)
    return images


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row says of the images."""
    return {key: row[key] for key in ("fd", "kid_mean", "kid_std", "precision", "recall")}


# The whole way, as a user goes it.


def test_a_model_is_evaluated_at_each_number_of_calls(tiny_checkpoint: Factory, call: Call, tmp_path: Path) -> None:
    files = {"--json": tmp_path / "eval.json", "--plot": tmp_path / "eval.png"}
    arguments = ["--steps", "1,2", "--heun", "2,3", "-n", 70, "--seed", 3, "--batch", 32]
    written = [word for pair in files.items() for word in pair]
    result = call(main, tiny_checkpoint(10), "--data-set", "digits", *arguments, *written)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["Frechet", "KID", "precision", "recall", "ms/image"]
    names = ["1 step(s)", "2 step(s)", "Heun 2, 3 calls", "Heun 3, 5 calls", "one half of the data"]
    assert [line[:22].rstrip() for line in lines[1:6]] == names
    assert lines[6:] == [
        "70 samples against 1,797 images of digits, features: pixels",
        f"the record is in {files['--json']}",
        f"the chart is in {files['--plot']}",
    ]
    record = record_of(files["--json"])
    assert {"date", "machine", "versions", "commit"} <= record.keys()
    assert record["what"] == "evaluation"
    assert record["torchmetrics"][0].isdigit()
    source = record["model"].pop("source")
    assert source["sha256"] == load_checkpoint(tiny_checkpoint(10)).sha256()
    assert record["model"] == {"file": tiny_checkpoint(10).name, "engine": "PyTorch cpu"}
    assert (record["data_set"], record["data_images"]) == ("digits", 1797)
    assert record["features"] == {"name": "pixels", "dimensions": 64}
    assert record["metrics"] == ["fd", "kid", "pr"]
    assert (record["seed"], record["batch"], record["training"]) == (3, 32, None)
    assert [(row["calls"], row["n"]) for row in record["rows"]] == [(1, 70), (2, 70), (3, 70), (5, 70)]
    assert [row.get("steps") for row in record["rows"]] == [1, 2, None, None]
    assert [row.get("heun") for row in record["rows"]] == [None, None, 2, 3]
    assert [row.get("sigmas") for row in record["rows"]] == [[80.0], [80.0, 0.8], None, None]
    assert all(row["ms_per_image"] > 0 for row in record["rows"])
    assert len({row["fd"] for row in record["rows"]}) == 4
    for row, line in zip((*record["rows"], record["halves"]), lines[1:6], strict=True):
        assert line[22:].split()[:4] == [
            f"{row['fd']:.4g}", f"{row['kid_mean']:.3g}", f"{row['precision']:.3f}", f"{row['recall']:.3f}",
        ]  # fmt: skip
    with Image.open(files["--plot"]) as chart:
        assert chart.size == (1440, 600)


def test_the_numbers_are_those_of_the_images_that_the_model_draws(
    tiny_checkpoint: Factory, call: Call, tmp_path: Path
) -> None:
    options = ["--data-set", "digits", "--steps", 2, "-n", 40, "--json", tmp_path / "eval.json"]
    assert call(main, tiny_checkpoint(0), *options).returncode == 0
    (row,) = record_of(tmp_path / "eval.json")["rows"]
    drawn = cmfast.load(tiny_checkpoint(0)).sample(40, steps=2).transpose(0, 3, 1, 2)
    real, fake = (images.reshape(len(images), 64).double() / 127.5 - 1 for images in (digits(), torch.tensor(drawn)))
    assert row["fd"] == pytest.approx(frechet_distance(real, fake), rel=1e-6)  # pixels are rounded to float32
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert (row["precision"], row["recall"]) == precision_recall(real[order], fake)


@pytest.mark.parametrize("out", ["samples.npz", "folder", "shards"])
def test_a_file_of_samples_has_the_numbers_of_the_model_that_drew_it(
    out: str, tiny_checkpoint: Factory, call: Call, tmp_path: Path
) -> None:
    images = cmfast.load(tiny_checkpoint(0)).sample(30, steps=2)
    if out == "shards":
        for part in (range(20), range(20, 30)):
            write_shard(tmp_path / out, part, images[part.start : part.stop], None, {"seed": 0})
    else:
        cmfast.save_images(tmp_path / out, images)
    for what, options in ((tiny_checkpoint(0), ["--steps", 2, "-n", 30]), (tmp_path / out, [])):
        assert call(main, what, "--data-set", "digits", *options, "--json", tmp_path / f"{what.name}.json")
    of_model, of_file = (record_of(tmp_path / f"{name}.json") for name in (tiny_checkpoint(0).name, out))
    assert measured(of_file["rows"][0]) == measured(of_model["rows"][0])
    assert of_file["halves"] == of_model["halves"]
    assert of_file["samples"] == {"file": out, "images": 30}
    assert "model" not in of_file
    few = call(main, tmp_path / out, "--data-set", "digits", "-n", 20, "--json", tmp_path / "few.json")
    assert few.stdout.splitlines()[-2].startswith("20 samples against 1,797")
    assert record_of(tmp_path / "few.json")["rows"][0]["fd"] != of_file["rows"][0]["fd"]


def test_samples_that_are_the_data_are_at_no_distance(call: Call, tmp_path: Path) -> None:
    cmfast.save_images(tmp_path / "data.npz", digits().permute(0, 2, 3, 1).numpy())
    options = ["--data-set", "digits", "--metrics", "fd,pr", "--json", tmp_path / "eval.json"]
    result = call(main, tmp_path / "data.npz", *options)
    assert result.returncode == 0
    record = record_of(tmp_path / "eval.json")
    (row,) = record["rows"]
    assert row["fd"] == pytest.approx(0, abs=1e-6)
    assert (row["precision"], row["recall"]) == (1, 1)
    # 0.3094 in a record of cmfast 0.1.0, benchmarks/results/quality_digits.json
    assert record["halves"]["fd"] == pytest.approx(0.30939293, abs=1e-6)
    assert 0.8 < record["halves"]["precision"] < 1


def test_an_exported_denoiser_and_only_the_metrics_that_were_requested(
    handmade_onnx: Factory, call: Call, tmp_path: Path
) -> None:
    options = ["--data-set", "digits", "--metrics", "fd", "-n", 20, "--json", tmp_path / "eval.json"]
    result = call(main, handmade_onnx(8), *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].split() == ["Frechet", "ms/image"]
    record = record_of(tmp_path / "eval.json")
    assert [row["steps"] for row in record["rows"]] == [1, 2], "the model's own numbers of steps"
    assert record["model"]["engine"] == "ONNX Runtime cpu"
    assert record["halves"].keys() == {"fd"}
    assert record["rows"][0].keys() == {"steps", "calls", "sigmas", "n", "ms_per_image", "fd"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return an ImageFolder of two classes of 32 x 32 grey images."""
    noise = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(15):
            pixels = noise.integers(level - 40, level + 40, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def test_features_of_a_classifier_bring_the_score(
    photos: Path, handmade_onnx: Factory, call: Call, tmp_path: Path
) -> None:
    options = ["--data-set", "folder", "--data", photos, "--features", "mnist", "-n", 20, "--steps", 1]
    result = call(main, handmade_onnx(32), *options, "--json", tmp_path / "eval.json")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].split() == ["Frechet", "KID", "precision", "recall", "score", "ms/image"]
    record = record_of(tmp_path / "eval.json")
    assert record["metrics"] == ["fd", "kid", "pr", "is"]
    assert 1 <= record["rows"][0]["is_mean"] <= 10
    assert 1 <= record["halves"]["is_mean"] <= 10
    assert (record["features"]["name"], record["features"]["dimensions"]) == ("mnist", 64)
    assert record["features"]["test_accuracy"] > 0.99


# The data's side.


def test_all_data_count_for_the_distance_and_a_bounded_number_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    data, features = load_data(PRESETS["digits"], None), Pixels((1, 8, 8))
    samples = digits()[:300].permute(0, 2, 3, 1).contiguous().numpy() // 2
    whole = Reference(features, data, ("fd", "pr"))
    monkeypatch.setattr(evaluate, "KEPT", 100)
    monkeypatch.setattr(evaluate, "READ", 100)
    bounded = Reference(features, data, ("fd", "pr"))
    # Digits have pixels that are always black: of eigenvalues that are 0 the square roots are 1e-8, and add up.
    assert bounded.measure(samples)["fd"] == pytest.approx(whole.measure(samples)["fd"], rel=1e-6)
    assert bounded.halves["fd"] == pytest.approx(whole.halves["fd"], rel=1e-6)
    assert bounded.halves["precision"] != whole.halves["precision"]


def test_samples_may_be_measured_in_any_order_of_calls() -> None:
    reference = Reference(Pixels((1, 8, 8)), load_data(PRESETS["digits"], None), ("fd", "kid", "pr"))
    images = digits().permute(0, 2, 3, 1).contiguous().numpy()
    first = reference.measure(images[:100])
    reference.measure(images[100:300])
    assert reference.measure(images[:100]) == first


@pytest.mark.parametrize("n", [3, 4, 9])
def test_images_and_calls_do_not_depend_on_what_is_timed(n: int, tiny_checkpoint: Factory) -> None:
    model = cmfast.load(tiny_checkpoint(10))
    row = few_steps(model, (80.0, 0.8), n, seed=5, batch=4)
    np.testing.assert_array_equal(row["images"], model.sample(n, sigmas=(80.0, 0.8), seed=5, batch=4))
    assert (row["steps"], row["calls"], row["n"]) == (2, 2, n)
    row = heun_steps(model, 3, n, seed=5, batch=4)
    np.testing.assert_array_equal(row["images"], model.sample_heun(n, steps=3, seed=5, batch=4))
    assert (row["heun"], row["calls"], row["n"]) == (3, 5, n)


# The search.


def test_a_search_tries_levels_and_writes_nothing_unasked(tiny_checkpoint: Factory, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny_checkpoint(10, ".safetensors").read_bytes())
    options = ["--data-set", "digits", "-n", 30, "--search", "--search-calls", 3, "--json", tmp_path / "search.json"]
    result = call(main, path, *options)
    assert (result.returncode, result.stderr) == (0, "")
    assert path.read_bytes() == tiny_checkpoint(10, ".safetensors").read_bytes()
    record = record_of(tmp_path / "search.json")
    assert record["what"] == "search"
    assert [row["sigmas"][0] for row in record["rows"]] == [80.0] * 4
    tried = {row["sigmas"][1]: row["fd"] for row in record["rows"]}
    assert list(tried)[:3] == [0.8, 0.3783, 1.322]  # the level so far, then the golden sections of 0.05 to 10
    best = min(tried, key=tried.__getitem__)
    assert record["search"] == {"before": 0.8, "best": best, "fd": tried[best], "written": False}
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines[:4]] == [["sigma", f"{s:g}", f"{fd:.6g}"] for s, fd in tried.items()]
    assert lines[0].endswith("the level so far")
    assert lines[4] == f"best: {best:g}, with fd {tried[best]:.6g}; add --write to make it the default for 2 steps"


def test_a_level_that_is_written_is_that_of_the_checkpoint_and_old_exports_are_named(
    tiny_checkpoint: Factory, handmade_onnx: Factory, call: Call, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(tiny_checkpoint(10).read_bytes())
    before = load_checkpoint(path)
    for name, sha256 in (("model.onnx", before.sha256()), ("another.onnx", "0" * 64)):
        exported = onnx.load(handmade_onnx(8))
        manifest = Manifest(kind="denoiser", spec=before.spec, source={"format": "cmfast", "sha256": sha256})
        helper.set_model_props(exported, {"cmfast": manifest.to_json()})
        onnx.save(exported, tmp_path / name)
    (tmp_path / "broken.onnx").write_bytes(b"something")
    options = ["--data-set", "digits", "-n", 30, "--search", "--search-calls", 3, "--search-bounds", "0.5,20"]
    result = call(main, path, *options, "--write", "--json", tmp_path / "search.json")
    assert (result.returncode, result.stderr) == (0, "")
    record = record_of(tmp_path / "search.json")
    best = record["search"]["best"]
    assert record["search"]["written"]
    after = load_checkpoint(path)
    assert after.sha256() == before.sha256()
    assert all(torch.equal(after.weights[name], before.weights[name]) for name in before.weights)
    assert after.spec == replace(before.spec, sigmas={**before.spec.sigmas, 2: (80.0, best)})
    assert cmfast.load(path).sigmas_for(2) == (80.0, best)
    lines = result.stdout.splitlines()
    assert lines[4].startswith(f"{path}: 2 steps are now at 80, {best:g}, with fd ")
    assert lines[5] == f"with the level before, to be made anew: {tmp_path / 'model.onnx'}"
    assert lines[6] == f"next: cmfast-export {path}"
    assert sorted(os.listdir(tmp_path)) == ["another.onnx", "broken.onnx", "model.onnx", "model.pt", "search.json"]


def test_a_level_that_is_the_best_already_is_left_alone(tiny_checkpoint: Factory, call: Call, tmp_path: Path) -> None:
    options = ["--data-set", "digits", "-n", 30, "--search", "--search-calls", 3]
    assert call(main, tiny_checkpoint(10), *options, "--json", tmp_path / "search.json").returncode == 0
    best = record_of(tmp_path / "search.json")["search"]["best"]
    path = tmp_path / "model.pt"
    checkpoint = load_checkpoint(tiny_checkpoint(10))
    spec = replace(checkpoint.spec, sigmas={2: (80.0, best)})
    save_checkpoint(replace(checkpoint, spec=spec), path)
    content = path.read_bytes()
    result = call(main, path, *options, "--write")
    assert f"best: {best:g}, the level that {path} has" in result.stdout
    assert path.read_bytes() == content


# The length of training, for the record.


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"data": "digits", "batch": 8, "phases": [{"method": "edm"}]}))
    lines = [{"images": 100}, {"images": 200, "images_per_s": 50.0}, {"images": 300, "images_per_s": 25.0}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_log_of_a_run_says_how_long_it_was_trained(
    run_folder: Path, handmade_onnx: Factory, call: Call, tmp_path: Path
) -> None:
    options = ["--data-set", "digits", "-n", 10, "--steps", 1, "--metrics", "fd", "--train-log", run_folder]
    assert call(main, handmade_onnx(8), *options, "--json", tmp_path / "eval.json").returncode == 0
    training = record_of(tmp_path / "eval.json")["training"]
    assert training == {"images": 300, "seconds": 200 / 50 + 100 / 25, "batch": 8, "phases": [{"method": "edm"}]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", json.dumps({"data": "mnist", "batch": 8, "phases": []}), "was trained on mnist, not on digits"),
        ("config.json", "{", "its config.json or log.jsonl is damaged"),
        ("log.jsonl", "{}\n", "its config.json or log.jsonl is damaged"),
        ("log.jsonl", "", "log.jsonl: the file is empty"),
    ],
)
def test_a_log_of_another_run_or_a_damaged_one_is_refused(
    name: str, text: str, words: str, run_folder: Path, handmade_onnx: Factory, call: Call, refused: Callable[..., None]
) -> None:
    (run_folder / name).write_text(text)
    refused(call(main, handmade_onnx(8), "--data-set", "digits", "--train-log", run_folder), words)


# What a user can get wrong.

WRONG: list[tuple[str, list[Any], str]] = [
    ("model.pt", ["--data-set", "faces"], "'faces' is not one of"),
    ("nowhere.pt", ["--data-set", "digits"], "nowhere.pt: no such file"),
    ("nowhere.npz", ["--data-set", "digits"], "nowhere.npz: no such file"),
    ("grey.npz", ["--data-set", "digits", "--ray", "local"], "--plot and --ray are for a model"),
    ("digits", ["--data-set", "digits", "--ray", "local", "--search"], "--ray measures no time: leave --plot and"),
    ("digits", ["--data-set", "digits", "--ray", "here"], "--ray takes local, auto, HOST:PORT or ray://HOST:PORT"),
    ("grey.npz", ["--data-set", "mnist"], "the data set mnist is read from a folder: --data DIR, or CMFAST_DATA=DIR"),
    ("grey.npz", ["--data-set", "mnist", "--data", "nowhere"], "the data folder nowhere does not exist"),
    ("model.pt", ["--data-set", "mnist", "--features", "mnist"], "images [1, 32, 32], these are [1, 8, 8]"),
    ("model.pt", ["--data-set", "folder"], "no features are shipped for folder; pass --features: pixels, "),
    ("small.npz", ["--data-set", "digits"], "the samples are images [1, 4, 4], those of digits are [1, 8, 8]"),
    ("colour.npz", ["--data-set", "digits"], "the samples are images [3, 8, 8], those of digits are [1, 8, 8]"),
    ("float.npz", ["--data-set", "digits"], "samples are uint8 [N, H, W, 1 or 3]"),
    ("flat.npz", ["--data-set", "digits"], "these are uint8 [10, 64]"),
    ("other.npz", ["--data-set", "digits"], "no arr_0 in it, where cmfast-sample -o NAME.npz puts images"),
    ("cut.npz", ["--data-set", "digits"], "cut.npz: not a whole .npz file: "),
    ("mixed", ["--data-set", "digits"], "mixed: its images differ in size or colours: (4, 4, 1), (8, 8, 1)"),
    ("broken", ["--data-set", "digits"], "cannot read the image "),
    ("good.npz", ["--data-set", "digits", "-n", 11], "good.npz: 11 samples were requested, it has 10"),
    ("good.npz", ["--data-set", "digits", "--steps", 1], "these samples are drawn already; --steps, --heun, --search"),
    ("good.npz", ["--data-set", "digits", "--search"], "these samples are drawn already"),
    ("three.npz", ["--data-set", "digits"], "the metric kid needs at least 4 images of the data and 4 samples, there"),
    ("model.pt", ["--data-set", "digits", "-n", 0], "-n must be at least 1, got 0"),
    ("model.pt", ["--data-set", "digits", "-n", 1], "the metric fd needs at least 2 images"),
    ("model.pt", ["--data-set", "digits", "--batch", 0], "--batch must be at least 1, got 0"),
    ("model.pt", ["--data-set", "digits", "--seed", -1], "--seed must be from 0 to 2**32 - 1, got -1"),
    ("model.pt", ["--data-set", "digits", "--metrics", "fd,fid"], "'fd,fid' is not a list of fd, kid, pr, is"),
    ("model.pt", ["--data-set", "digits", "--metrics", "is"], "not a classifier's, so there is no score; leave it out"),
    ("model.pt", ["--data-set", "digits", "--steps", 3], "default noise levels for these numbers of steps: 1, 2;"),
    ("model.pt", ["--data-set", "digits", "--heun", 0], "at least"),
    ("model.pt", ["--data-set", "digits", "--features", "nothing.safetensors"], "nothing.safetensors: no such file"),
    ("model.pt", ["--data-set", "digits", "--features", "model.pt"], "not the weights of FID's Inception network"),
    ("model.pt", ["--data-set", "digits", "--json", "nowhere/eval.json"], "the folder nowhere does not exist"),
    ("model.pt", ["--data-set", "digits", "--plot", "a.png", "--metrics", "kid"], "--plot shows the fd at numbers"),
    ("model.pt", ["--data-set", "digits", "--write"], "--write writes what --search finds: add --search"),
    ("model.pt", ["--data-set", "digits", "--search", "--steps", 2], "--search compares two steps by their fd"),
    (
        "model.pt",
        ["--data-set", "digits", "--search", "--search-calls", 1],
        "--search-calls must be from 2 to 100, got",
    ),
    ("model.pt", ["--data-set", "digits", "--search", "--search-calls", 10**22], "must be from 2 to 100, got 1000000"),
    ("model.pt", ["--data-set", "digits", "--search", "--search-bounds", "5,1"], "are two noise levels, rising, "),
    ("model.onnx", ["--data-set", "digits", "--search"], "--search is for a checkpoint, model.pt or .safetensors"),
    ("foreign.pt", ["--data-set", "digits", "--search"], "not a checkpoint of cmfast; make it one: cmfast-export "),
]


@pytest.mark.parametrize(("name", "options", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_is_one_line_before_any_sampling(
    name: str,
    options: list[Any],
    words: str,
    tiny_checkpoint: Factory,
    handmade_onnx: Factory,
    call: Call,
    refused: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMFAST_DATA", raising=False)
    good = np.zeros([10, 8, 8, 1], np.uint8)
    arrays = {
        "good": good, "small": good[:, :4, :4], "colour": good.repeat(3, 3), "float": good / 255, "three": good[:3],
        "flat": good.reshape(10, 64), "grey": np.zeros([10, 32, 32, 1], np.uint8),
    }  # fmt: skip
    Path("model.pt").write_bytes(tiny_checkpoint(10).read_bytes())
    Path("model.onnx").write_bytes(handmade_onnx(8).read_bytes())
    torch.save({"weight": torch.zeros(3)}, "foreign.pt")
    for stem, array in arrays.items():
        np.savez(f"{stem}.npz", array)
    np.savez("other.npz", images=good)
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-200])
    for folder in ("mixed", "broken"):
        Path(folder).mkdir()
        Image.fromarray(good[0, ..., 0]).save(f"{folder}/0.png")
    Image.fromarray(good[0, :4, :4, 0]).save("mixed/1.png")
    Path("broken/1.png").write_bytes(Path("broken/0.png").read_bytes()[:30])
    before = sorted(os.listdir())
    result = call(main, name, *options)
    result = type(result)(result.args, result.returncode, result.stdout.removeprefix(HEADING), result.stderr)
    refused(result, words)
    assert sorted(os.listdir()) == before


HEADING = f"{'':22}{'Frechet':>11}{'KID':>11}{'precision':>11}{'recall':>11}{'ms/image':>11}\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_images_that_are_no_images_of_the_data_set_are_far_from_it_in_its_classifier(name: str, photos: Path) -> None:
    """The classifier sees more than noise: two kinds of noise are nearer to each other than either to a gradient."""
    config = PRESETS[name]
    image = (config.channels, config.image_size, config.image_size)
    features = load_features(name, image)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(400, *image, generator=generator) * 2 - 1
    ramp = (torch.linspace(-1, 1, image[2]).expand(400, *image) + 0.1 * noise).clamp(-1, 1)
    with torch.inference_mode():
        one, other, ramps = features(noise[:200]), features(noise[200:]), features(ramp)
    assert 10 * frechet_distance(one, other) < frechet_distance(one, ramps)


# Samples as others write them, and outputs that are inputs.


def png_samples(folder: Path, n: int = 10, form: str = "png", sub: bool = False, **palette: bool) -> Path:
    for i, image in enumerate(np.random.default_rng(0).integers(256, size=(n, 8, 8), dtype=np.uint8)):
        place = folder / f"{i // 4:06d}" if sub else folder
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image)
        if palette:
            picture = picture.convert("P")
            picture.putpalette([value for i in range(256) for value in [255 - i] * 3])
            picture = picture.point(lambda value: 255 - value)
        picture.save(place / f"{i:06d}.{form}")
    return folder


def test_samples_in_sub_folders_and_palettes_have_the_numbers_of_plain_ones(call: Call, tmp_path: Path) -> None:
    plain, sub = png_samples(tmp_path / "plain"), png_samples(tmp_path / "sub", sub=True)
    indexed = png_samples(tmp_path / "indexed", palette=True)
    rows = []
    for folder in (plain, sub, indexed):
        result = call(main, folder, "--data-set", "digits", "--json", tmp_path / "eval.json")
        assert (result.returncode, result.stderr) == (0, "")
        rows.append(measured(record_of(tmp_path / "eval.json")["rows"][0]))
    assert rows[0] == rows[1] == rows[2]


def test_jpeg_samples_are_read_with_a_warning(tmp_path: Path) -> None:
    folder = png_samples(tmp_path / "jpeg", form="jpg", sub=True)
    assert evaluate.is_samples(folder)
    with pytest.warns(CmfastWarning, match="10 of 10 samples are JPEGs, which are lossy"):
        assert evaluate.read_samples(folder, None).shape == (10, 8, 8, 1)


@pytest.mark.parametrize("name", ["grid.png", "000000/grid.png"])
def test_a_grid_among_samples_is_named(name: str, tmp_path: Path) -> None:
    folder = png_samples(tmp_path / "samples", sub=True)
    Image.new("L", (40, 40)).save(folder / name)
    with pytest.raises(CmfastError, match=rf"differ in size or colours: .*; {name} is \(40, 40, 1\), most are \(8, 8"):
        evaluate.read_samples(folder, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json", "m.pt"], "m.pt"),
        (["--json", "link.json"], "link.json"),
        (["--json", "eval.txt"], ".json"),
        (["--plot", "m.pt"], "m.pt"),
        (["--plot", "chart.json"], ".png"),
        (["--json", "data/dataset.json", "--data", "data"], "dataset.json"),
        (["--json", "run/config.json", "--train-log", "run"], "config.json"),
    ],
)
def test_no_output_replaces_an_input(
    options: list[str], words: str, tiny_checkpoint: Factory, call: Call, refused: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = tiny_checkpoint(10).read_bytes()
    Path("m.pt").write_bytes(content)
    os.symlink("m.pt", "link.json")
    for folder, name in (("data", "dataset.json"), ("run", "config.json")):
        Path(folder).mkdir()
        Path(folder, name).write_text("{}")
    refused(call(main, "m.pt", "--data-set", "digits", *options), words)
    assert Path("m.pt").read_bytes() == content
    assert Path("data/dataset.json").read_text() == Path("run/config.json").read_text() == "{}"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": 1e999, "images_per_s": 1}\n', '{"images": "x"}\n', "\xff"])
def test_a_log_that_is_made_to_be_trouble_is_one_line(text: str, run_folder: Path) -> None:
    (run_folder / "log.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(CmfastError, match=r"its config\.json or log\.jsonl is damaged"):
        evaluate.training_of(run_folder, "digits")
