# SPDX-License-Identifier: MIT
"""cmfast-info: what it says of a file, and one line for a file that says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import cmfast
from cmfast.cli.info import main

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
        "onnx": "IR 10, opset 18",
    }


def test_the_parity_stands_where_the_file_has_one(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    model = onnx.load(handmade_onnx(8))
    manifest = json.loads(model.metadata_props[0].value)
    manifest |= {"parity": {"max_abs": 6.6e-07, "psnr_db": 140.3}, "classes": 10}
    helper.set_model_props(model, {"cmfast": json.dumps(manifest)})
    onnx.save(model, tmp_path / "model.onnx")
    found = words_of(call(main, tmp_path / "model.onnx").stdout)
    assert found["parity"] == "max_abs 6.6e-07, psnr_db 140.3"
    assert found["classes"] == "10"


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
    assert json.loads(want)["schema"] == "cmfast/1"


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
        ("future.onnx", "schema 'cmfast/2', this version reads 'cmfast/1'; update cmfast or export the model again"),
        ("model.trt", "model.trt: no engine runs files ending in .trt; there are some for .onnx, .engine, .plan, "),
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
            text = model.metadata_props[0].value.replace("cmfast/1", "cmfast/2")
            helper.set_model_props(model, {"cmfast": text} if kind == "future" else {"author": "somebody"})
            onnx.save(model, path)
    refused(call(main, path, *options), words)


def test_a_file_must_be_named(call: Callable[..., Any], refused: Callable[..., None]) -> None:
    refused(call(main), "Missing argument 'MODEL'")
