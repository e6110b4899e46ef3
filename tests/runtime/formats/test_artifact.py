# SPDX-License-Identifier: MIT
"""The manifest and the reader that finds it: against the onnx package, against damage, and against intent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, TensorProto, helper

from cmfast.errors import ArtifactError, CmfastError, CmfastWarning
from cmfast.formats.manifest import MAX_CHARACTERS, Manifest, check_file, read_onnx
from cmfast.formats.protobuf import read_onnx_model
from cmfast.formats.table import read_manifest
from cmfast.spec import ModelSpec
from helpers.specs import image_spec

SPEC = image_spec(image=(1, 2, 2), classes=10)
MANIFEST = Manifest(
    kind="denoiser", spec=SPEC, dtype="float16", source={"format": "cmfast", "sha256": "00ff"},
    made_by={"cmfast": "0.1.0", "torch": "2.13.0"}, parity={"max_abs": 1e-5, "psnr_db": 90.5, "boundary": 0.0},
)  # fmt: skip


def small_model(manifest: str | None = None) -> ModelProto:
    """A graph with an initialiser, a Constant, a subgraph and a function, and the manifest in its metadata."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    constant = helper.make_node(
        "Constant", [], ["constant"], value=helper.make_tensor("v", TensorProto.INT64, [1], [7])
    )
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [4])
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", [f"{name}_w"], ["out"])], name, [], [out],
            [helper.make_tensor(f"{name}_w", TensorProto.FLOAT, [4], [0.0] * 4)],
        )
        for name in ("then", "else")
    }  # fmt: skip
    graph = helper.make_graph(
        [
            constant,
            helper.make_node("If", ["condition"], ["y"], **branches),
            helper.make_node("F", ["x"], ["z"], domain="d"),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    imports = [helper.make_opsetid("d", 3), helper.make_opsetid("", 18)]
    function = helper.make_function(
        "d", "F", ["a"], ["b"],
        [helper.make_node("Constant", [], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [], [1.0])),
         helper.make_node("Add", ["a", "c"], ["b"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    helper.set_model_props(model, {"other": "läßt grüßen", "cmfast": manifest or MANIFEST.to_json()})
    return model


@pytest.fixture
def write(tmp_path: Path) -> Callable[[ModelProto | bytes], Path]:
    def write(content: ModelProto | bytes) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path

    return write


# The manifest.


def test_a_manifest_survives_json() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "here") == MANIFEST


def test_the_keys_are_the_contract() -> None:
    values = json.loads(MANIFEST.to_json())
    assert values["schema"] == "cmfast/2"
    assert list(values) == [
        "schema", "kind", "shape", "data", "conditions", "sigma_min", "sigma_max", "sigma_data", "scaling",
        "c_noise", "renoise", "clip", "sigmas", "dtype", "source", "made_by", "parity",
    ]  # fmt: skip


def test_unknown_keys_are_ignored() -> None:
    text = json.dumps({**json.loads(MANIFEST.to_json()), "invented_later": {"a": [1]}})
    assert Manifest.from_json(text, "here") == MANIFEST


def test_what_may_be_absent_has_a_default() -> None:
    values = json.loads(MANIFEST.to_json())
    for key in ("dtype", "source", "made_by", "parity"):
        del values[key]
    assert Manifest.from_json(json.dumps(values), "here") == Manifest(kind="denoiser", spec=SPEC)


@pytest.mark.parametrize("schema", ["cmfast/3", "", None, 1, ["cmfast/1"]])
def test_an_unknown_schema_is_refused_and_named(schema: Any) -> None:
    text = json.dumps({**json.loads(MANIFEST.to_json()), "schema": schema})
    with pytest.raises(
        ArtifactError, match=r"^here: the manifest has schema .*, this version reads 'cmfast/1'"
    ) as raised:
        Manifest.from_json(text, "here")
    assert repr(schema) in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{", '"cmfast/1"', "[" * 100_000, " " * 100_000 + "{}"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="the manifest is not a JSON object; export the model again"):
        Manifest.from_json(text, "here")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "upscaler"}, "kind must be one of denoiser, sampler, server, encoder, got 'upscaler'"),
        ({"kind": "sampler"}, "a sampler has exactly one list of noise levels"),
        ({"parity": 3}, "source, made_by, parity, cost, engine, encoders, selftest must be objects"),
        ({"shape": [1, 2]}, "images have the shape"),
        ({"shape": [1, 2, 3, 4, 5], "data": "array"}, "shape must be one to 4 positive whole numbers"),
        ({"sigmas": {"2": [80.0, 90.0]}}, "90 follows 80"),
        ({"sigma_min": float("nan")}, "must be positive numbers"),
    ],
)
def test_a_wrong_value_names_the_file_and_itself(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError, match=f"^here: .*{words}"):
        Manifest.from_json(json.dumps({**json.loads(MANIFEST.to_json()), **values}), "here")


NAMED = image_spec(image=(1, 2, 2), classes=3, class_names=("cat", "dog", "läßt"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"parity": {"max_abs": "x"}}, "parity.max_abs must be a finite number, got 'x'"),
        ({"parity": {"max_abs": True}}, "parity.max_abs must be a finite number"),
        ({"parity": {"max_abs": float("inf")}}, "parity.max_abs must be a finite number, got inf"),
        ({"cost": {"flops": None}}, "cost.flops must be a finite number, got None"),
        ({"cost": {"flops": 10**400}}, r"cost.flops must be a finite number, got 1000*\.\.\."),
        ({"cost": {"flops": -1}}, "cost.flops must be a finite number, got -1"),
        ({"made_by": {"cmfast": 3}}, "made_by.cmfast must be a printable text, got 3"),
        ({"made_by": {"cmfast": "1\x1b[31m"}}, r"made_by.cmfast must be a printable text, got '1\\x1b\[31m'"),
        ({"made_by": {"a\nb": "1"}}, r"made_by must have printable keys, got 'a\\nb'"),
        ({"source": {"format": "\ud800"}}, r"source.format must be printable texts.*got '\\ud800'"),
        ({"source": {"format": "a\u202eb"}}, r"source.format .*got 'a\\u202eb'"),
        ({"source": {"format": [[[[[1]]]]]}}, "source.format must be printable"),
        ({"dtype": "weird"}, "dtype must be one of float32, tf32, float16, bfloat16, got 'weird'"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        ({"graph_sha256": "A" * 64}, "graph_sha256 must be 64 hex digits"),
        ({"conditions": [{"name": "label", "kind": "class", "classes": True}]}, "classes must be .*got True"),
        ({"shape": [True, 2, 2]}, "shape must be whole numbers from 1 to 65536"),
        ({"grid": True}, "grid must be"),
        ({"sigma_min": True}, "must be positive numbers"),
        ({"sigma_max": 1e200}, "must be positive numbers, 1e-18 to 1e18"),
        ({"sigmas": {"1": "8"}}, "sigmas holds '8', which is not a list of noise levels"),
        ({"sigmas": {"1": [True]}}, "which is not a list of noise levels"),
        ({"sigmas": {"\u0661": [80.0]}}, "which is not a number of steps"),
        ({"kind": ["denoiser"]}, r"kind must be one of .*got \['denoiser'\]"),
    ],
    ids=str,
)
def test_every_value_is_checked_by_the_reader_and_quoted_harmlessly(values: dict[str, Any], words: str) -> None:
    text = json.dumps({**json.loads(MANIFEST.to_json()), **values})
    with pytest.raises(ArtifactError, match=f"^here: .*{words}") as caught:
        Manifest.from_json(text, "here")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^here: the manifest has the key 'kind' twice"):
        Manifest.from_json(MANIFEST.to_json()[:-1] + ', "kind": "sampler"}', "here")


def test_what_the_reader_would_refuse_is_not_written() -> None:
    with pytest.raises(CmfastError, match=r"source\.name must be printable"):
        Manifest(kind="denoiser", spec=SPEC, source={"name": "\x1b"}).to_json()


def test_two_manifests_in_one_file_are_refused(write: Callable[..., Path]) -> None:
    model = small_model()
    model.metadata_props.add(key="cmfast", value=model.metadata_props[0].value)
    with pytest.raises(ArtifactError, match="it holds two cmfast manifests"):
        read_onnx(write(model))


def test_an_onnx_file_with_the_manifest_of_an_engine_is_refused(write: Callable[..., Path]) -> None:
    engine = {**json.loads(MANIFEST.to_json()), "engine": {"batch": 5}}
    with pytest.raises(ArtifactError, match="an ONNX file with the manifest of a TensorRT engine"):
        read_onnx(write(small_model(json.dumps(engine))))


def test_names_of_the_classes_travel_where_they_fit_and_are_left_out_with_a_warning_where_not() -> None:
    named = Manifest(kind="denoiser", spec=NAMED)
    assert Manifest.from_json(named.to_json(), "here").spec.class_names == ("cat", "dog", "läßt")
    assert named.fitting() is named
    many = image_spec(image=(1, 2, 2), classes=1000, class_names=tuple(f"kind {i}" for i in range(1000)))
    with pytest.warns(CmfastWarning, match="the names of the 1000 classes are left out"):
        fits = Manifest(kind="denoiser", spec=many).fitting()
    assert (fits.spec.classes, fits.spec.class_names) == (1000, ())
    assert len(fits.to_json()) < MAX_CHARACTERS
    room = MAX_CHARACTERS - len(named.to_json())
    assert named.fitting(room) is named
    with pytest.warns(CmfastWarning):
        assert named.fitting(room + 1) != named


def test_a_manifest_too_long_for_tensorrt_is_not_written() -> None:
    long = Manifest(kind="denoiser", spec=SPEC, source={"note": "x" * MAX_CHARACTERS})
    with pytest.raises(CmfastError, match=r"the manifest has \d+ characters; at most 4000 are allowed"):
        long.to_json()
    room = MAX_CHARACTERS - len(Manifest(kind="denoiser", spec=SPEC, source={"note": ""}).to_json())
    assert len(Manifest(kind="denoiser", spec=SPEC, source={"note": "x" * room}).to_json()) == MAX_CHARACTERS


# The reader against the onnx package.


def test_the_reader_finds_what_the_onnx_package_wrote(write: Callable[..., Path]) -> None:
    model = small_model()
    path = write(model)
    read = read_onnx_model(path)
    assert read.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert (read.ir, read.opset, read.external) == (10, 18, [])
    assert read_onnx(path) == (MANIFEST, {"ir": 10, "opset": 18})
    assert read_manifest(str(path)) == MANIFEST


def test_the_default_domain_has_two_names(write: Callable[..., Path]) -> None:
    model = small_model()
    model.opset_import[1].domain = "ai.onnx"
    assert read_onnx(write(model))[1]["opset"] == 18


def test_a_handmade_model_of_real_size_is_read(handmade_onnx: Callable[..., Path]) -> None:
    assert read_manifest(handmade_onnx()).spec == image_spec(image=(1, 8, 8))


def test_a_file_cut_anywhere_is_refused(write: Callable[..., Path]) -> None:
    model = small_model()
    del model.functions[:]  # they come after the manifest, and protobuf has no mark at its end
    whole = model.SerializeToString()
    assert read_onnx(write(whole))[0] == MANIFEST
    for size in range(len(whole)):
        with pytest.raises(ArtifactError):
            read_onnx(write(whole[:size]))


def test_a_cut_file_is_called_truncated(write: Callable[..., Path]) -> None:
    whole = small_model().SerializeToString()
    with pytest.raises(ArtifactError, match=r"model\.onnx: not a whole ONNX file .*truncated.*export the model again"):
        read_onnx(write(whole[: len(whole) // 2]))


def test_a_model_without_a_manifest_is_refused_with_the_command_that_makes_one(write: Callable[..., Path]) -> None:
    model = small_model()
    del model.metadata_props[:]
    with pytest.raises(ArtifactError, match=r"without a cmfast manifest.*cmfast-export model\.pt"):
        read_onnx(write(model))


@pytest.mark.parametrize(
    "content", [b"\x89PNG\r\n\x1a\n", b"PK\x03\x04" + bytes(100), b"hello", bytes(64), b"\xff" * 64]
)
def test_another_kind_of_file_is_not_onnx(content: bytes, write: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="not a whole ONNX file"):
        read_onnx(write(content))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "model.pt").write_bytes(b"x")
    for name, words in (
        ("nowhere.onnx", "no such file"),
        ("empty.onnx", "the file is empty"),
        (".", "not a file"),
        ("model.pt", "files ending in .pt are not exported models; need .onnx"),
    ):
        with pytest.raises(ArtifactError, match=words):
            read_manifest(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ArtifactError, match="not a file"):  # and does not wait for a writer
        check_file(tmp_path / "pipe.onnx")


# Weights outside the file.


def external(location: str | None) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    if location is not None:
        tensor.external_data.add(key="location", value=location)
    return tensor


def in_initialiser(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.initializer.append(tensor)


def in_sparse_initialiser(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(values=tensor)


def in_sparse_indices(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add(indices=tensor)


def in_constant(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.node[0].attribute[0].t.CopyFrom(tensor)


def in_list_of_tensors(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.node[0].attribute.add(name="many", type=AttributeProto.TENSORS, tensors=[tensor])


def in_sparse_attribute(model: ModelProto, tensor: TensorProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="sparse", type=AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(tensor)


def in_subgraph(model: ModelProto, tensor: TensorProto) -> None:
    model.graph.node[1].attribute[1].g.initializer.append(tensor)


def in_list_of_graphs(model: ModelProto, tensor: TensorProto) -> None:
    graph = onnx.GraphProto(initializer=[tensor])
    model.graph.node[0].attribute.add(name="graphs", type=AttributeProto.GRAPHS, graphs=[graph])


def in_function(model: ModelProto, tensor: TensorProto) -> None:
    model.functions[0].node[0].attribute[0].t.CopyFrom(tensor)


def in_default_of_function(model: ModelProto, tensor: TensorProto) -> None:
    model.functions[0].attribute_proto.add(name="value", type=AttributeProto.TENSOR, t=tensor)


def in_training_info(model: ModelProto, tensor: TensorProto) -> None:
    model.training_info.add().initialization.initializer.append(tensor)


PLACES = [
    in_initialiser, in_sparse_initialiser, in_sparse_indices, in_constant, in_list_of_tensors, in_sparse_attribute,
    in_subgraph, in_list_of_graphs, in_function, in_default_of_function, in_training_info,
]  # fmt: skip


@pytest.mark.parametrize("put", PLACES, ids=lambda put: put.__name__)
def test_a_tensor_outside_the_folder_is_found_wherever_it_is(
    put: Callable[[ModelProto, TensorProto], None], write: Callable[..., Path]
) -> None:
    model = small_model()
    put(model, external("../secret.bin"))
    with pytest.raises(
        ArtifactError, match=r"its weights point to '\.\./secret\.bin', outside the model's folder; refused"
    ):
        read_onnx(write(model))


@pytest.mark.parametrize(
    "location",
    [
        "../w.bin", "/etc/passwd", "..", ".", "", None, "folder/w.bin", "./w.bin", "folder\\w.bin", "w.bin/", "folder",
        "symlink", "broken", "hardlink", "missing.bin", "w.bin\0", "pipe",
    ],
)  # fmt: skip
def test_weights_anywhere_but_in_a_plain_file_beside_the_model_are_refused(
    location: str | None, write: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path.parent, tmp_path / "folder"):
        folder.mkdir(exist_ok=True)
        (folder / "w.bin").write_bytes(bytes(4))
    (tmp_path / "symlink").symlink_to(tmp_path / "folder" / "w.bin")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing.bin")
    (tmp_path / "hardlink").hardlink_to(tmp_path / "folder" / "w.bin")
    os.mkfifo(tmp_path / "pipe")
    model = small_model()
    model.graph.initializer.append(external(location))
    with pytest.raises(ArtifactError, match=r"refused|which is not beside it"):
        read_onnx(write(model))


def test_weights_in_a_plain_file_beside_the_model_are_allowed(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(4))
    model = small_model()
    model.graph.initializer.append(external("w.bin"))
    assert read_onnx(write(model))[0] == MANIFEST


def test_weights_behind_links_into_the_folder_that_the_model_is_in_are_allowed_as_in_a_hub_cache(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    model = small_model()
    model.graph.initializer.append(external("w.bin"))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(model).rename(blobs / "aa11")
    (blobs / "bb22").write_bytes(bytes(4))
    (snapshot / "model.onnx").symlink_to("../../blobs/aa11")
    (snapshot / "w.bin").symlink_to("../../blobs/bb22")
    assert read_onnx(snapshot / "model.onnx")[0] == MANIFEST
    (tmp_path / "linked").symlink_to(snapshot)  # a link to the whole folder
    assert read_onnx(tmp_path / "linked" / "model.onnx")[0] == MANIFEST
    (tmp_path / "secret").write_bytes(bytes(4))
    (snapshot / "w.bin").unlink()
    (snapshot / "w.bin").symlink_to("../../secret")
    with pytest.raises(ArtifactError, match=r"a link to a file in another folder .*copy both: cp -L "):
        read_onnx(snapshot / "model.onnx")


def test_the_last_of_two_locations_does_not_hide_the_first(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(4))
    for first, last in (("w.bin", "../w.bin"), ("../w.bin", "w.bin")):
        model = small_model()
        tensor = external(first)
        tensor.external_data.add(key="location", value=last)
        model.graph.initializer.append(tensor)
        with pytest.raises(ArtifactError, match="refused"):
            read_onnx(write(model))


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def test_a_second_graph_is_looked_into_as_parsers_merge_them(write: Callable[..., Path]) -> None:
    graph = onnx.GraphProto(initializer=[external("../w.bin")]).SerializeToString()
    with pytest.raises(ArtifactError, match="refused"):
        read_onnx(write(small_model().SerializeToString() + message(7, graph)))


def test_a_graph_behind_an_oversized_field_number_is_not_overlooked(write: Callable[..., Path]) -> None:
    # C++ protobuf, which ONNX Runtime uses, keeps 32 bits of a tag: 2**29 + 7 is the graph's field 7 to it.
    graph = onnx.GraphProto(initializer=[external("../w.bin")]).SerializeToString()
    with pytest.raises(ArtifactError):
        read_onnx(write(small_model().SerializeToString() + message(2**29 + 7, graph)))


def test_graphs_nested_too_deeply_are_refused_and_not_recursed_into(write: Callable[..., Path]) -> None:
    graph = b""
    for _ in range(5000):
        graph = message(1, message(5, message(6, graph)))  # graph > node > attribute > graph
    with pytest.raises(ArtifactError, match="nested too deeply"):
        read_onnx(write(message(7, graph)))


# Damage.


WHOLE = small_model().SerializeToString()


def read_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        manifest, header = read_onnx(path)
    except ArtifactError as err:
        assert str(path) in str(err)  # noqa: PT017, the other outcome is as good
        return
    assert isinstance(manifest, Manifest)
    assert set(header) == {"ir", "opset"}


@settings(deadline=5000, max_examples=500)
@given(flips=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused_and_nothing_else(
    flips: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(WHOLE)
    for position, mask in flips:
        damaged[position] ^= mask
    read_or_refuse(tmp_path_factory.getbasetemp() / "flipped.onnx", bytes(damaged))


@settings(deadline=5000, max_examples=300)
@given(
    content=st.binary(max_size=60)
    | st.builds(lambda field, content: WHOLE + message(field, content), st.integers(1, 26), st.binary(max_size=40))
    | st.builds(
        lambda at, content: WHOLE[:at] + content + WHOLE[at:], st.integers(0, len(WHOLE)), st.binary(max_size=20)
    )
)
def test_foreign_bytes_are_read_or_refused_and_nothing_else(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    read_or_refuse(tmp_path_factory.getbasetemp() / "foreign.onnx", content or b"x")


@given(
    st.dictionaries(
        st.sampled_from(sorted(json.loads(MANIFEST.to_json()))),
        st.none()
        | st.integers()
        | st.text(max_size=4)
        | st.lists(st.floats(), max_size=3)
        | st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    )
)
def test_a_manifest_of_wrong_values_is_read_or_refused(values: dict[str, Any]) -> None:
    try:
        manifest = Manifest.from_json(json.dumps({**json.loads(MANIFEST.to_json()), **values}), "here")
    except ArtifactError as err:
        assert str(err).startswith("here: ")  # noqa: PT017, the other outcome is as good
        return
    assert isinstance(manifest.spec, ModelSpec)


# The SHA-256 of a file, said by whoever opens it.


def test_a_damaged_file_is_not_opened_where_its_sha256_was_said(
    handmade_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    import cmfast
    from cmfast.formats.manifest import file_sha256

    whole, short = handmade_onnx(8), tmp_path / "short.onnx"
    short.write_bytes(whole.read_bytes()[:-20])
    cmfast.load(whole, sha256=file_sha256(whole))
    with pytest.raises(
        ArtifactError, match=r"short\.onnx: its SHA-256 is [0-9a-f]{64}, not .* as requested; not opened"
    ):
        cmfast.load(short, sha256=file_sha256(whole))
    with pytest.raises(ArtifactError, match="not a whole ONNX file"):
        cmfast.load(short, sha256=file_sha256(short))
    with pytest.raises(CmfastError, match="this model is a folder"):
        cmfast.load(tmp_path, sha256="0" * 64)
