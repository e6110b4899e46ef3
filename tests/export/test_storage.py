# SPDX-License-Identifier: MIT
"""Weights stored as float16: half the file, float32 arithmetic, verified as every export is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from cmfast.errors import CmfastError
from cmfast.model import load
from cmfast_export.graphs.storage import SMALLEST, stored_as_float16
from cmfast_export.pipeline import export_onnx

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the same sampler of two steps with float32 and with float16 weights."""
    folder = tmp_path_factory.mktemp("weights")
    export_onnx(tiny_checkpoint(), folder / "float32.onnx", kind="sampler", steps=2)
    exported = export_onnx(tiny_checkpoint(), folder / "float16.onnx", kind="sampler", steps=2, weights="fp16")
    assert exported.tolerance == 5e-2  # that of float16, whose rounding the weights have
    return folder / "float32.onnx", folder / "float16.onnx"


def test_large_weights_are_float16_once_and_their_values_are_the_rounded_ones(files: tuple[Path, Path]) -> None:
    wide, half = (onnx.load(file) for file in files)
    want = {each.name: numpy_helper.to_array(each) for each in wide.graph.initializer}
    got = {each.name: each for each in half.graph.initializer}
    large = [name for name, value in want.items() if value.dtype == np.float32 and value.nbytes >= SMALLEST]
    assert len(large) > 10
    for name in large:
        assert name not in got
        stored = got[f"{name}.float16"]
        assert stored.data_type == TensorProto.FLOAT16
        np.testing.assert_array_equal(numpy_helper.to_array(stored), want[name].astype(np.float16))
    onnx.checker.check_model(half, full_check=True)
    casts = [node for node in half.graph.node if node.op_type == "Cast" and node.input[0].endswith(".float16")]
    assert len(casts) == len(large)  # the two steps share them


def test_the_file_is_nearly_half_and_draws_the_same_images_up_to_the_rounding(files: tuple[Path, Path]) -> None:
    wide, half = (load(file) for file in files)
    assert files[1].stat().st_size < 0.7 * files[0].stat().st_size
    large = sum(i.raw_data.__len__() for i in onnx.load(files[1]).graph.initializer if i.name.endswith(".float16"))
    assert files[0].stat().st_size - files[1].stat().st_size == pytest.approx(large, rel=0.1)
    assert (half.manifest.dtype, half.manifest.made_by["weights"]) == ("float32", "float16")
    difference = half.sample_float(8, seed=3) - wide.sample_float(8, seed=3)
    # A weight is rounded by at most 2^-11; 50 dB is a third of a grey level.
    assert 0 < np.sqrt(np.mean(difference**2)) < 2 * 10 ** (-50 / 20)


def test_a_weight_beyond_float16_is_refused_by_its_name() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([256]))
    tensor = ir.tensor(np.full(256, 7e4, np.float32), name="big")
    weight = ir.Value(name="big", type=ir.TensorType(tensor.dtype), shape=ir.Shape([256]), const_value=tensor)
    node = ir.node("Add", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18})
    with pytest.raises(CmfastError, match="the weight big has values up to 7e\\+04, and float16 ends at 65504"):
        stored_as_float16(ir.Model(graph, ir_version=8))


@pytest.mark.parametrize(("precision", "weights", "words"), [
    ("fp16", "fp16", "weights of precision fp16 are stored in it already"),
    ("fp32", "int8", "weights must be one of fp16, got 'int8'"),
])  # fmt: skip
def test_what_weights_cannot_be_is_one_line(precision: str, weights: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=words):
        export_onnx(tmp_path / "model.pt", tmp_path / "model.onnx", precision=precision, weights=weights)
