# SPDX-License-Identifier: MIT
"""cmfast-info: what it says of a file, and one line for a file that says nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import cmfast
from cmfast.cli.info import _table, main
from cmfast.conditions import class_label
from cmfast.formats.manifest import graph_sha256

Factory = Callable[..., Path]


def words_of(text: str) -> dict[str, str]:
    """Return {name: value} of the command's lines."""
    return {line[:12].strip(): line[13:] for line in text.splitlines()}


def test_an_exported_file_says_what_it_is_and_what_it_needs(handmade_onnx: Factory, call: Callable[..., Any]) -> None:
    result = call(main, handmade_onnx(8))
    assert (result.returncode, result.stderr) == (0, "")
    found = words_of(result.stdout)
    size = handmade_onnx(8).stat().st_size / 2**20
    assert found == {
        "file": f"{handmade_onnx(8)}, {size:.1f} MiB",
        "kind": "denoiser",
        "image": "1 x 8 x 8 (channels, height, width)",
        "classes": "unconditional",
        "sigma": "0.002 to 80, data 0.5",
        "steps": "1: 80; 2: 80, 0.8",
        "conventions": "scaling boundary, c_noise 250ln, renoise sqrt, clip true",
        "dtype": "float32",
        "source": "{}",
        "made by": "",
        "onnx": "IR 8, opset 18",
    }


def test_the_parity_stands_where_the_file_has_one(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = onnx.load(handmade_onnx(8))
    manifest = json.loads(model.metadata_props[0].value)
    manifest |= {"parity": {"max_abs": 6.6e-07, "psnr_db": 140.3}, "conditions": [class_label(10).to_dict()]}
    helper.set_model_props(model, {"cmfast": json.dumps(manifest)})
    onnx.save(model, tmp_path / "model.onnx")
    found = words_of(call(main, tmp_path / "model.onnx").stdout)
    assert found["parity"] == "max_abs 6.6e-07, psnr_db 140.3"
    assert found["classes"] == "10"


def with_manifest(original: Path, path: Path, /, **values: Any) -> Path:
    """Write a copy of a file with other values in its manifest."""
    model = onnx.load(original)
    manifest = json.loads(model.metadata_props[0].value) | values
    helper.set_model_props(model, {"cmfast": json.dumps(manifest)})
    onnx.save(model, path)
    return path


PARITY = {"max_abs": 6.6e-07, "psnr_db": 140.3}


def test_a_file_changed_after_its_verification_is_named_and_its_parity_not_shown(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    digest = graph_sha256(handmade_onnx(8))
    path = with_manifest(
        handmade_onnx(8), tmp_path / "model.onnx", parity=PARITY, cost={"flops": 5}, graph_sha256=digest,
        made_by={"cmfast": "0.1.0", "verified": "onnxruntime cpu"},
    )  # fmt: skip
    found = words_of(call(main, path).stdout)
    assert (found["parity"], found["made by"]) == (
        "max_abs 6.6e-07, psnr_db 140.3",
        "cmfast 0.1.0, verified onnxruntime cpu",
    )
    assert not {"verified", "unchecked"} & set(found)

    model = onnx.load(path)
    model.graph.initializer[0].float_data[0] = 0.02
    onnx.save(model, path)
    result = call(main, path)
    found = words_of(result.stdout)
    assert result.returncode == 0
    assert found["verified"].startswith("no: its graph or its weights were changed since they were verified")
    assert (found["dtype"], found["made by"]) == ("float32 when it was exported", "cmfast 0.1.0")
    assert not {"parity", "an image"} & set(found)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = call(main, path, "--json")
    assert "changed since they were verified; its parity and cost are left out" in result.stderr
    assert not {"cost"} & json.loads(result.stdout).keys()
    assert json.loads(result.stdout)["parity"] == {}


def test_a_parity_without_a_digest_is_marked_as_unchecked(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    found = words_of(call(main, with_manifest(handmade_onnx(8), tmp_path / "old.onnx", parity=PARITY)).stdout)
    assert found["unchecked"].startswith("its manifest has no digest")
    assert found["parity"].startswith("max_abs")


def test_names_of_the_classes_are_shown_and_many_are_shortened(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    for names, words in (
        (["cat", "läßt"], "2: cat, läßt"),
        ([f"c{i}" for i in range(30)], f"30: {', '.join(f'c{i}' for i in range(19))}, ..., c29"),
    ):
        label = class_label(len(names), names).to_dict()
        path = with_manifest(handmade_onnx(8), tmp_path / "named.onnx", conditions=[label])
        assert words_of(call(main, path).stdout)["classes"] == words


def test_no_file_writes_on_the_terminal(
    handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "a\x1b[31m\nkind         sampler.onnx"
    path.write_bytes(handmade_onnx(8).read_bytes())
    result = call(main, path)
    assert "\x1b" not in result.stdout
    assert words_of(result.stdout)["kind"] == "denoiser"
    assert r"a\x1b[31m\nkind" in words_of(result.stdout)["file"]
    for values in ({"source": {"format": "\x1b[2J"}}, {"schema": "\x1b[2J"}, {"parity": {"max_abs": "x"}}):
        result = call(main, with_manifest(handmade_onnx(8), tmp_path / "other.onnx", **values))
        refused(result, "other.onnx: ")
        assert "\x1b" not in result.stderr


def test_facts_of_foreign_files_are_printed_escaped() -> None:
    assert _table([("for\nmat", "x\ud800\x1b")]) == "for\\nmat     x\\ud800\\x1b"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_says_the_same_of_itself_without_onnx(
    suffix: str, tiny_checkpoint: Factory, call: Callable[..., Any]
) -> None:
    result = call(main, tiny_checkpoint(10, suffix))
    assert (result.returncode, result.stderr) == (0, "")
    found = words_of(result.stdout)
    assert (found["kind"], found["classes"], found["image"][:9]) == ("denoiser", "10", "1 x 8 x 8")
    assert cmfast.load(tiny_checkpoint(10)).manifest.source["sha256"] in found["source"]
    assert f"cmfast {cmfast.__version__}, torch " in found["made by"]
    assert not {"onnx", "parity"} & set(found)


def test_json_is_the_manifest_and_nothing_else(
    handmade_onnx: Factory, tiny_checkpoint: Factory, call: Callable[..., Any]
) -> None:
    assert call(main, handmade_onnx(8), "--json").stdout == cmfast.read_manifest(handmade_onnx(8)).to_json() + "\n"
    want = cmfast.load(tiny_checkpoint(10)).manifest.to_json()
    assert call(main, tiny_checkpoint(10), "--json").stdout == want + "\n"
    assert json.loads(want)["schema"] == "cmfast/2"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.onnx", "nowhere.onnx: no such file"),
        ("nowhere.pt", "nowhere.pt: no such file"),
        ("folder.onnx", "folder.onnx: not a file"),
        ("empty.onnx", "empty.onnx: the file is empty"),
        ("empty.pt", "empty.pt: the file is empty"),
        ("truncated.onnx", "truncated.onnx: not a whole ONNX file ("),
        ("truncated.pt", "truncated.pt: "),
        ("truncated.safetensors", "truncated.safetensors: not a whole safetensors file"),
        ("bare.onnx", "an ONNX file without a cmfast manifest, so its conventions are unknown; make one that has it: "),
        ("bare.pt", "bare.pt: "),
        (
            "future.onnx",
            "schema 'cmfast/3', this version reads 'cmfast/1' and 'cmfast/2'; update cmfast or export",
        ),
        ("model.trt", "model.trt: no backend runs files ending in .trt; there are some for .onnx, .engine, .plan, "),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_file_that_says_nothing_of_itself_is_one_line(
    name: str, words: str, options: list[str], handmade_onnx: Factory, tiny_checkpoint: Factory,
    call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path,
) -> None:  # fmt: skip
    import torch

    path = tmp_path / name
    match name.split("."):
        case ["folder", _]:
            path.mkdir()
        case ["empty" | "model", _]:
            path.write_bytes(b"" if name.startswith("empty") else b"something")
        case ["truncated", suffix]:
            whole = handmade_onnx(8) if suffix == "onnx" else tiny_checkpoint(10, f".{suffix}")
            path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
        case ["bare", "pt"]:
            torch.save({"weights": torch.zeros(3)}, path)
        case ["bare" | "future" as kind, _]:
            model = onnx.load(handmade_onnx(8))
            text = model.metadata_props[0].value.replace("cmfast/2", "cmfast/3")
            helper.set_model_props(model, {"cmfast": text} if kind == "future" else {"author": "somebody"})
            onnx.save(model, path)
    refused(call(main, path, *options), words)


def test_a_file_must_be_named(call: Callable[..., Any], refused: Callable[..., None]) -> None:
    refused(call(main), "Missing argument 'MODEL'")
