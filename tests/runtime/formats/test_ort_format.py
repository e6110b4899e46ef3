# SPDX-License-Identifier: MIT
"""The target ort and its reader: a file in ONNX Runtime's own format draws what its ONNX file draws, or is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from cmfast import load
from cmfast.cli.info import main as info
from cmfast.errors import ArtifactError, BackendError, CmfastError
from cmfast.formats.manifest import file_sha256
from cmfast.formats.ort_format import UNSEALED, parse_ort, read_ort, sealed
from cmfast_export.cli import main
from cmfast_export.conversion import convert
from cmfast_export.request import make_request
from cmfast_export.targets import ort_format
from helpers.graphs import write_denoiser

CONDITIONS = [
    {"name": "label", "kind": "class", "classes": 3, "class_names": ["a", "b", "c"]},
    {"name": "views", "kind": "tensor", "shape": ["count", 2]},
]


def converted(model: Path, out: Path, **options: Any) -> ort_format.Converted:
    made = convert(make_request(model=model, out=out, form="ort", **options))
    assert isinstance(made, ort_format.Converted)
    return made


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Return the .ort file of a denoiser written by hand."""
    file = write_denoiser(tmp_path / "model.onnx", {"conditions": CONDITIONS, "scaling": "edm"})
    return converted(file, tmp_path / "model.ort").path


def test_the_file_of_a_network_draws_what_its_onnx_file_draws(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, call: Callable[..., Any]
) -> None:
    onnx = tmp_path / "model.onnx"
    assert call(main, tiny_checkpoint(), "-o", onnx).returncode == 0
    done = call(main, onnx, "--format", "ort")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "model.ort"
    assert f"cmfast-sample {out}" in done.stdout
    first, second = load(onnx), load(out, sha256=file_sha256(out))
    wanted = first.sample_float(3, steps=2, seed=5)
    # extended optimisations fuse nodes, which rounds in another place
    np.testing.assert_allclose(second.sample_float(3, steps=2, seed=5), wanted, atol=1e-4, rtol=0)
    assert second.manifest.graph_sha256 not in ("", first.manifest.graph_sha256)
    assert call(info, out, "--selftest").stdout.startswith("self-test passed")
    assert "kind         denoiser" in call(info, out).stdout


def test_the_list_names_the_operators_that_the_file_has(small: Path) -> None:
    lines = small.with_suffix(".required_operators.config").read_text().splitlines()
    assert lines[0] == "# Operators of model.ort"
    listed = "\n".join(line for line in lines if line.startswith("ai.onnx;"))
    for name in ("Div", "ReduceMean", "Reshape", 'Cast{"inputs": {"0": ["int64_t"]}'):
        assert name in listed
    assert "Conv" not in listed


def test_the_parser_of_onnx_runtimes_build_reads_the_list_as_the_operators_of_the_optimised_graph(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, call: Callable[..., Any]
) -> None:
    """`tools/ci_build/build.py --include_ops_by_config` reads it with this parser, which the wheel has too."""
    parser = pytest.importorskip("onnxruntime.tools.reduced_build_config_parser")
    pytest.importorskip("flatbuffers")  # without it the parser ignores types
    onnx_file, optimised = tmp_path / "model.onnx", tmp_path / "optimised.onnx"
    assert call(main, tiny_checkpoint(), "-o", onnx_file).returncode == 0
    made = converted(onnx_file, tmp_path / "model.ort")
    operators, types = parser.parse_config(str(made.operators), enable_type_reduction=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 4
    onnxruntime.InferenceSession(onnx_file, options, providers=["CPUExecutionProvider"])
    model = onnx.load(optimised)
    opsets = {each.domain: each.version for each in model.opset_import}
    wanted: dict[str, dict[int, set[str]]] = {}
    for node in model.graph.node:  # the kernels are found by the version at which the operator last changed
        since = onnx.defs.get_schema(node.op_type, opsets[""]).since_version if not node.domain else opsets[node.domain]
        wanted.setdefault(node.domain or "ai.onnx", {}).setdefault(since, set()).add(node.op_type)
    assert operators == wanted
    assert {"Conv", "Gather"} <= {name for names in operators["ai.onnx"].values() for name in names}
    assert any("Gather" in line for line in types.get_cpp_entries())
    assert types.is_typed_registration_needed("ai.onnx", "Softmax", "float")
    assert not types.is_typed_registration_needed("ai.onnx", "Softmax", "double")


def test_conditions_are_read_and_given(small: Path, tmp_path: Path) -> None:
    views = np.arange(6, dtype=np.float32).reshape(3, 2)
    options: dict[str, Any] = {"seed": 2, "label": "b", "conditions": {"views": views}}
    found, wanted = (load(path).sample_float(2, **options) for path in (small, small.with_suffix(".onnx")))
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=0)  # one rounding more or less
    assert [each.name for each in load(small).spec.conditions] == ["label", "views"]


def test_any_altered_byte_is_refused_before_the_file_is_opened(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small.read_bytes()
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    chance = random.Random(0)
    changed = [bytearray(whole) for _ in range(300)]
    for each in changed:
        each[chance.randrange(len(each))] ^= 1 << chance.randrange(8)
    cut = [whole[: chance.randrange(len(whole))] for _ in range(100)]
    for data in (*changed, *cut, whole + b"\0", b"", b"\0\0\0\0ORTM", b"\xff\xff\xff\x7fORTM", b"<!doctype html>"):
        small.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            load(small)
        assert "\n" not in str(caught.value)
    small.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(ArtifactError, match=r"not an \.ort file: it is a zip archive"):
        read_ort(small)


def test_offsets_that_lead_anywhere_are_errors(small: Path) -> None:
    """Sealed again, so that the digest is not what refuses them."""
    whole = small.read_bytes()
    digits = read_ort(small).graph_sha256.encode()
    open_again = whole.replace(digits, UNSEALED.encode())
    assert sealed(open_again, small) == whole
    chance = random.Random(1)
    for _ in range(1000):
        data = bytearray(whole)
        at = chance.choice([0, chance.randrange(64), chance.randrange(len(data) - 4)])
        data[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", chance.randbytes(4)])
        with pytest.raises(ArtifactError):
            parse_ort(bytes(data), small)


def test_what_an_ort_file_is_not_for_is_refused(
    small: Path, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    with pytest.raises(BackendError, match=r"an \.ort file is optimised for the CPU"):
        load(small, "cuda")
    with pytest.raises(ArtifactError, match="SHA-256"):
        load(small, sha256="0" * 64)
    stored = write_denoiser(tmp_path / "stored.onnx", {"made_by": {"weights": "float16"}})
    refused(call(main, stored, "--format", "ort"), "does not make it smaller; export the checkpoint without --weights")
    half = write_denoiser(tmp_path / "half.onnx", {"dtype": "bfloat16"})
    refused(call(main, half, "--format", "ort"), "computes in bfloat16, and an .ort file is for CPUs")
    server = write_denoiser(tmp_path / "server.onnx", {"kind": "server", "sigmas": {"1": [80.0]}})
    refused(call(main, server, "--format", "ort"), "server")
    refused(call(main, small, "--format", "ort", "-o", tmp_path / "again.ort"), "is made from an .onnx file")
    refused(call(main, small, "--format", "onnx"), "exported already")


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (write_denoiser(tmp_path / f"{name}.onnx", {"shape": [2], "data": "array"}) for name in "ab")
    other.write_bytes(other.read_bytes().replace(np.float32(1).tobytes(), np.float32(2).tobytes()))
    original = ort_format.in_ort_format
    monkeypatch.setattr(ort_format, "in_ort_format", lambda _, *rest: original(other, *rest))
    with pytest.raises(CmfastError, match=r"the \.ort file .* no file was written"):
        converted(model, tmp_path / "a.ort")
    assert not list(tmp_path.glob("*.ort"))
    assert not list(tmp_path.glob("*.config"))
