# SPDX-License-Identifier: MIT
"""The digest of graph and weights: what leaves it alone, what changes it, and who looks at it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest, as_verified, check_unchanged, graph_sha256, read_onnx
from cmfast_export import cli
from cmfast_export.targets import tensorrt_engine
from cmfast_export.targets.triton_repository import write_repository
from helpers.specs import image_spec

SPEC = image_spec(image=(1, 8, 8))
WEIGHT = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)


@pytest.fixture
def model() -> onnx.ModelProto:
    """x times a weight of 64 numbers, as a denoiser."""
    sizes = ["B", 1, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["t"]), helper.make_node("Identity", ["t"], ["denoised"])],
        "denoiser",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", sizes), ("sigma", ["B"]))],
        [helper.make_tensor_value_info("denoised", TensorProto.FLOAT, sizes)],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(WEIGHT + 1, "unused")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8, producer_name="us")
    helper.set_model_props(made, {"cmfast": Manifest(kind="denoiser", spec=SPEC).to_json()})
    return made


def digest_of(model: onnx.ModelProto, tmp_path: Path) -> str:
    path = tmp_path / "digest.onnx"
    path.write_bytes(model.SerializeToString())
    return graph_sha256(path)


def test_the_digest_is_what_its_description_says(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", dims=[2], data_type=1, raw_data=b"01234567")
    node = helper.make_node("Identity", ["w"], ["y"]).SerializeToString()
    graph = onnx.GraphProto(name="g", initializer=[tensor])
    graph.node.add().ParseFromString(node)
    made = onnx.ModelProto(ir_version=8, producer_name="p", graph=graph, opset_import=[helper.make_opsetid("", 18)])
    opset = made.opset_import[0].SerializeToString()
    written = b"7{\n1:%d\n%s2:1\ng5{\n1=2\n2=1\n8:1\nw9:8\n01234567}\n}\n8:%d\n%s" % (
        len(node),
        node,
        len(opset),
        opset,
    )
    assert digest_of(made, tmp_path) == hashlib.sha256(written).hexdigest()


def moved_outside(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "digest.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert len((tmp_path / "w.bin").read_bytes()) >= 512
    model.CopyFrom(onnx.load(tmp_path / "digest.onnx", load_external_data=False))


def graph_in_two_pieces(model: onnx.ModelProto, tmp_path: Path) -> None:
    weights = onnx.ModelProto(graph=onnx.GraphProto(initializer=model.graph.initializer)).SerializeToString()
    del model.graph.initializer[:]
    (tmp_path / "pieces.onnx").write_bytes(weights + model.SerializeToString())  # as protobuf merges them
    model.CopyFrom(onnx.load(tmp_path / "pieces.onnx"))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, tmp_path: None,
        lambda model, tmp_path: setattr(model, "ir_version", 10),
        lambda model, tmp_path: setattr(model, "producer_name", "somebody"),
        lambda model, tmp_path: setattr(model.graph.initializer[0], "doc_string", "of ours"),
        lambda model, tmp_path: helper.set_model_props(model, {"author": "somebody"}),
        moved_outside,
        graph_in_two_pieces,
    ],
    ids=["saved again", "IR", "producer", "text", "metadata", "external data", "two pieces"],
)
def test_what_computes_the_same_has_the_same_digest(
    change: Callable[..., None], model: onnx.ModelProto, tmp_path: Path
) -> None:
    before = digest_of(model, tmp_path)
    change(model, tmp_path)
    assert digest_of(model, tmp_path) == before


def another_weight(model: onnx.ModelProto) -> None:
    changed = WEIGHT.copy()
    changed[0, 0, 7, 7] = np.nextafter(changed[0, 0, 7, 7], np.float32(2))
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, "w"))


def half_precision(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT.astype(np.float16), "w"))


def swapped_weights(model: onnx.ModelProto) -> None:
    one, other = model.graph.initializer
    one.raw_data, other.raw_data = other.raw_data, one.raw_data


@pytest.mark.parametrize(
    "change",
    [
        another_weight, half_precision, swapped_weights,
        lambda model: setattr(model.graph.node[0], "op_type", "Add"),
        lambda model: model.graph.node.reverse(),
        lambda model: setattr(model.opset_import[0], "version", 19),
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 16),
        lambda model: model.graph.initializer[0].dims.reverse(),
        lambda model: model.functions.add(),
    ],
    ids=["a bit", "half", "swapped", "operator", "order", "opset", "shape", "dims", "function"],
)  # fmt: skip
def test_what_may_compute_something_else_has_another_digest(
    change: Callable[[onnx.ModelProto], Any], model: onnx.ModelProto, tmp_path: Path
) -> None:
    before = digest_of(model, tmp_path)
    change(model)
    assert digest_of(model, tmp_path) != before


def test_bytes_of_a_data_file_are_part_of_it_and_no_place_outside_it_is_read(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    moved_outside(model, tmp_path)
    before = digest_of(model, tmp_path)
    content = bytearray((tmp_path / "w.bin").read_bytes())
    content[5] ^= 1
    (tmp_path / "w.bin").write_bytes(content)
    assert digest_of(model, tmp_path) != before
    (tmp_path / "w.bin").write_bytes(content[:100])
    with pytest.raises(ArtifactError, match="its data file is shorter than its weights"):
        digest_of(model, tmp_path)
    for key, value, words in (
        ("offset", "-4", "is not a number"), ("length", "²", "is not a number"),
        ("offset", "9" * 400, "is not a number"),
        ("location", "../w.bin", "refused"), ("location", "nowhere", "not beside it"),
    ):  # fmt: skip
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        (entry,) = [entry for entry in changed.graph.initializer[0].external_data if entry.key == key]
        entry.value = value
        with pytest.raises(ArtifactError, match=words):
            digest_of(changed, tmp_path)


def test_a_weight_that_is_inside_and_outside_has_no_digest(model: onnx.ModelProto, tmp_path: Path) -> None:
    # ONNX Runtime takes the one that data_location says, other readers the one they find.
    moved_outside(model, tmp_path)
    for change in (
        lambda tensor: setattr(tensor, "data_location", TensorProto.DEFAULT),
        lambda tensor: setattr(tensor, "raw_data", WEIGHT.tobytes()),
        lambda tensor: tensor.float_data.extend([9.0] * 64),
        lambda tensor: tensor.ClearField("external_data"),
    ):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        change(changed.graph.initializer[0])
        with pytest.raises(ArtifactError, match=r"both inside and outside|refused"):
            digest_of(changed, tmp_path)


# Who looks at it.


@pytest.fixture
def server(model: onnx.ModelProto, tmp_path: Path) -> Path:
    """A file of the kind that every consumer takes, with the digest that an export gives it."""
    digest = digest_of(model, tmp_path)
    (tmp_path / "digest.onnx").unlink()
    manifest = Manifest(kind="server", spec=replace(SPEC, sigmas={1: (80.0,)}), graph_sha256=digest)
    helper.set_model_props(model, {"cmfast": manifest.to_json()})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def halved(source: Path, path: Path) -> Path:
    """Do what converters to half precision do, as far as it matters here: other weights, the metadata kept."""
    model = onnx.load(source)
    half_precision(model)
    onnx.save(model, path)
    return path


def test_a_file_that_was_changed_is_known_by_its_manifest(server: Path, tmp_path: Path) -> None:
    manifest, _ = read_onnx(server)
    assert as_verified(server, manifest) is True
    check_unchanged(server, manifest)
    assert as_verified(server, replace(manifest, graph_sha256="")) is None
    changed = halved(server, tmp_path / "half.onnx")
    assert as_verified(changed, read_onnx(changed)[0]) is False


def test_neither_engines_nor_repositories_are_made_of_a_changed_file(server: Path, tmp_path: Path) -> None:
    changed = halved(server, tmp_path / "half.onnx")
    words = r"half\.onnx: its graph or its weights were changed since they were verified.*export the model again"
    with pytest.raises(ArtifactError, match=words):
        write_repository(tmp_path / "repository", [changed])
    with pytest.raises(ArtifactError, match=words):
        tensorrt_engine.build_engine(changed, tmp_path / "model.engine", tensorrt_engine.BuildOptions())
    assert set(tmp_path.iterdir()) == {changed, server}
    with pytest.raises(ArtifactError, match="the graph has"):  # it came further: this graph has no noise
        write_repository(tmp_path / "repository", [server])


@pytest.mark.parametrize("out", ["model.engine", "model.plan", "repository"])
def test_the_command_makes_nothing_of_a_changed_file(
    out: str, server: Path, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    changed = halved(server, tmp_path / "half.onnx")
    form = ["--format", "triton" if out == "repository" else "engine"]
    words = "half.onnx: its graph or its weights were changed since they were verified"
    refused(call(cli.main, changed, *form, "-o", tmp_path / out), words, "export the model again")
    assert set(tmp_path.iterdir()) == {changed, server}
