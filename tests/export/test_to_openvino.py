# SPDX-License-Identifier: MIT
"""OpenVINO's IR: what is written is what was verified, in the precision that it says, and opens in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
import cmfast_export
import cmfast_train
from cmfast.backends.openvino import library
from cmfast.cli.info import main as info
from cmfast.errors import ArtifactError, CheckFailed
from cmfast.formats.manifest import file_sha256, read_onnx
from cmfast.formats.openvino_ir import read_ir
from cmfast_export.cli import main as export
from cmfast_train.denoiser import Denoiser
from helpers.graphs import write_denoiser
from helpers.own_networks import Mlp

pytestmark = pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")

Factory = Callable[..., Path]
PLAIN = {"scaling": "edm"}  # a network node by node that has no boundary at sigma_min
STATE = {"name": "state", "kind": "tensor", "shape": [3, None]}


def has_bf16() -> bool:
    return "BF16" in library.capabilities(library.import_openvino("this test").Core())


@functools.cache
def own_denoiser() -> Denoiser:
    """Return a denoiser whose c_noise is up to 1,095: more than bfloat16 holds with a digit behind the point."""
    network = Mlp(6, classes=10)
    return cmfast_train.wrap(network, shape=(6,), conditions={"label": 10}, scaling="edm", c_noise="250ln")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> cmfast_export.Converted:
    """Export a sampler with guidance, so that the loop of the reference has something to do."""
    file = tmp_path_factory.mktemp("ir") / "model.xml"
    denoiser = own_denoiser()
    precision = "bf16" if has_bf16() else "fp32"
    return cmfast_export.export_openvino(
        denoiser, file, kind="sampler", sigmas=(80.0, 0.8), precision=precision, guidance=1.5, null={"label": 9}
    )


def test_an_ir_is_verified_against_pytorch_in_the_precision_that_it_opens_in(made: cmfast_export.Converted) -> None:
    manifest = read_ir(made.path)
    assert manifest == made.manifest
    assert (manifest.kind, made.against) == ("sampler", "PyTorch")
    assert manifest.made_by["guidance"]
    model = cmfast.load(made.path)
    assert model.backend.name == f"OpenVINO cpu{' bfloat16' if has_bf16() else ''}"
    assert model.manifest.dtype == manifest.dtype == ("bfloat16" if has_bf16() else "float32")
    # The graph stays float32: what differs in bfloat16 is arithmetic, and it is what the manifest says.
    wide = cmfast.load(made.path, precision="fp32")
    difference = np.abs(model.sample_float(4) - wide.sample_float(4)).max()
    if has_bf16():
        assert 1e-4 < made.parity.worst.max_abs < made.tolerance
        assert 1e-4 < difference < made.tolerance
    assert [row.where for row in made.parity.rows] == [f"batch {n}, 2 step(s) at 80, 0.8" for n in (1, 2, 5)]
    for row in made.parity.rows:
        assert row.grey_levels == pytest.approx(127.5 * row.peak * 10 ** (-row.psnr_db / 20))


def test_the_noise_embedding_stays_float32_in_bfloat16(tmp_path: Path) -> None:
    """Else this network is about 25 dB from float32 at sigma 17.6, and with it above 60."""
    if not has_bf16():
        pytest.skip("this CPU has no bfloat16")
    made = cmfast_export.export_openvino(own_denoiser(), tmp_path / "model.xml", precision="bf16")
    assert made.parity.psnr_db > 50
    file = cmfast_export.export_onnx(own_denoiser(), tmp_path / "model.onnx").path
    ours, theirs = cmfast.load(file, variant="openvino", precision="bf16"), cmfast.load(file)
    x = 17.6 * np.random.default_rng(0).standard_normal((64, 6), dtype=np.float32)
    got, want = (model.denoise(x, 17.6, label=3) for model in (ours, theirs))
    assert np.sqrt(np.mean((got - want) ** 2)) < 2 * 10 ** (-50 / 20)


def test_weights_are_stored_as_float16_only_if_asked(tmp_path: Path) -> None:
    wide = cmfast_export.export_openvino(own_denoiser(), tmp_path / "wide.xml")
    half = cmfast_export.export_openvino(own_denoiser(), tmp_path / "half.xml", weights="fp16")
    sizes = [made.path.with_suffix(".bin").stat().st_size for made in (wide, half)]
    assert sizes[1] < 0.75 * sizes[0]  # of this network, whose small weights stay
    assert half.manifest.dtype == "float32"
    assert 1e-5 < half.parity.worst.max_abs < half.tolerance == half.manifest.selftest["atol"] == 5e-2
    assert wide.parity.worst.max_abs < 1e-5
    assert wide.manifest.selftest["atol"] == 1e-3


def test_its_files_are_plain_ir(made: cmfast_export.Converted) -> None:
    ov = library.import_openvino("this test")
    model = ov.Core().read_model(made.path)  # finds the weights by their name
    assert [node.get_any_name() for node in model.inputs] == ["noise", "label"]
    assert model.get_rt_info("cmfast") is not None
    assert made.path.read_bytes().count(b"graph_sha256") == 1, "the manifest of the ONNX file is gone"


def test_cmfast_info_reads_it_and_its_self_test_passes(made: cmfast_export.Converted, call: Callable[..., Any]) -> None:
    said = call(info, made.path)
    assert said.returncode == 0, said.stderr
    size = made.path.stat().st_size + made.path.with_suffix(".bin").stat().st_size
    assert f"file         {made.path}, {size / 2**20:.1f} MiB\n" in said.stdout
    assert "verified openvino cpu" in said.stdout
    tested = call(info, made.path, "--selftest")
    assert tested.stdout.startswith("self-test passed: OpenVINO cpu"), tested.stderr


def test_the_command_prints_decibels_and_grey_levels_of_each_noise_level(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    file = write_denoiser(tmp_path / "model.onnx", PLAIN)
    said = call(export, file, "--format", "openvino")
    assert said.returncode == 0, said.stderr
    assert "model.xml against ONNX Runtime in float32: 1e-03 allowed, by openvino cpu" in said.stdout
    assert all(word in said.stdout for word in ("largest difference", "dB", "grey levels", "sigma 0.002", "sigma 80"))
    assert f"cmfast-sample {tmp_path / 'model.xml'} -n 16" in said.stdout
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "model.onnx", "model.xml"]
    said = call(export, file, "--format", "openvino")
    assert said.returncode == 0, "the same command again replaces its own files"


@pytest.mark.parametrize("batch", ["B", 3])
def test_an_onnx_file_keeps_its_kind_conditions_and_batch(batch: Any, tmp_path: Path) -> None:
    changes = PLAIN | {"shape": [5, 4], "data": "array", "conditions": [STATE], "second_time": True, "renoise": "ddim"}
    file = write_denoiser(tmp_path / "model.onnx", changes, batch=batch)
    made = cmfast_export.export_openvino(file, tmp_path / "model.xml")
    assert made.manifest.spec == read_onnx(file)[0].spec
    ours, theirs = cmfast.load(made.path), cmfast.load(file)
    assert ours.backend.batch == theirs.backend.batch == (None if batch == "B" else batch)
    state = {"state": np.random.default_rng(0).standard_normal((3, 3, 7), dtype=np.float32)}
    want = theirs.sample_float(3, steps=2, conditions=state)
    np.testing.assert_allclose(ours.sample_float(3, steps=2, conditions=state), want, rtol=1e-5, atol=1e-5)


def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_denoiser(tmp_path / "model.onnx", PLAIN)
    ov = library.import_openvino("this test")
    save = ov.save_model

    def damaged(model: Any, path: str, **options: Any) -> None:
        save(model, path, **options)
        weights = Path(path).with_suffix(".bin")
        content = np.frombuffer(weights.read_bytes(), np.uint8).copy()
        (at,) = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(content, 4) == list(b"\0\0\x80\x3f")).all(1))[
            :1
        ]
        content[at : at + 4] = list(b"\0\0\x81\x3f")  # 1 + sigma becomes 1.0078 + sigma
        weights.write_bytes(content.tobytes())

    monkeypatch.setattr(ov, "save_model", damaged)
    with pytest.raises(
        CheckFailed, match=r"OpenVINO in float32 differs from ONNX Runtime cpu by .*; no file was written"
    ):
        cmfast_export.export_openvino(file, tmp_path / "model.xml")
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_an_ir_is_pinned_by_its_digest_and_never_compiled_from_weights_that_changed_meanwhile(tmp_path: Path) -> None:
    made = cmfast_export.export_openvino(write_denoiser(tmp_path / "model.onnx", PLAIN), tmp_path / "model.xml")
    right = file_sha256(made.path)
    with pytest.raises(ArtifactError, match=r"not 0{64} as requested; not opened"):
        cmfast.load(made.path, sha256="0" * 64)
    model = cmfast.load(made.path, sha256=right)
    first = model.sample_float(1)
    weights = made.path.with_suffix(".bin")
    with weights.open("r+b") as opened:
        opened.write(b"\1")
    os.utime(weights, ns=(0, 0))  # whatever the resolution of the file system's clock is
    np.testing.assert_array_equal(model.sample_float(1), first)
    with pytest.raises(ArtifactError, match=r"model\.xml: it was written to since it was opened; open it again"):
        model.sample_float(2)


REFUSED: dict[str, tuple[list[str], str]] = {
    "tf32": (["model.pt", "--precision", "tf32"], "OpenVINO computes in fp32, fp16, bf16; pass one of them"),
    "auto": (["model.pt", "--precision", "auto"], "--precision auto is not supported with --format openvino"),
    "cuda": (["model.pt", "--device", "cuda"], "verified on the CPU, where cmfast runs OpenVINO: leave --device out"),
    "weights of PyTorch": (["model.pt", "-o", "pytorch.xml"], "its weights would replace pytorch.bin"),
    "its own input": (["pytorch.bin"], "pytorch.bin is read by this command, so it is not overwritten"),
    "an IR": (["model.xml", "-o", "other.xml"], "an IR is made from a checkpoint or an .onnx file"),
    "a half-precision file": (["half.onnx"], "a graph in float16, and OpenVINO chooses types when it compiles"),
    "a precision of a file": (["model.onnx", "--precision", "bf16"], "exported already, so its kind and precision are"),
    "build": (["model.onnx", "--build", "batch=1"], "--build, --target and --cache are for --format engine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_one_line_before_the_work(
    name: str, call: Callable[..., Any], refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, words = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    write_denoiser(tmp_path / "model.onnx", PLAIN)
    write_denoiser(tmp_path / "half.onnx", {"dtype": "float16"})
    for other in ("model.pt", "pytorch.bin"):
        (tmp_path / other).write_bytes(b"never opened")
    if name == "an IR":
        cmfast_export.export_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
    before = sorted(os.listdir(tmp_path))
    refused(call(export, *arguments, "--format", "openvino"), words)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "pytorch.bin").read_bytes() == b"never opened"


def test_a_precision_that_this_cpu_lacks_is_refused_before_the_work(
    tiny_checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "capabilities", lambda core: frozenset({"FP32"}))
    with pytest.raises(cmfast.CmfastError, match=r"model\.xml: bfloat16, which OpenVINO lacks on this CPU"):
        cmfast_export.export_openvino(tiny_checkpoint(), tmp_path / "model.xml", precision="bf16")
    assert os.listdir(tmp_path) == []
