# SPDX-License-Identifier: MIT
"""OpenVINO's IR as a file: the manifest in its XML, the digest that binds its weights to it, hostile XML."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest
from cmfast.formats.openvino_ir import MAX_DEPTH, head_of, ir_sha256, parse_ir, with_manifest
from cmfast.formats.table import OPENVINO, files_beside, format_of, model_bytes, read_manifest
from helpers.specs import image_spec

GRAPH = b'<?xml version="1.0"?>\n<net name="graph" version="11">\n\t<layers />\n\t<edges />\n\t<rt_info />\n</net>\n'
WEIGHTS = bytes(range(64))
NAMES = ("a <b> & \"c\" 'd'", "\u00e9")  # what XML has to write otherwise


def write(folder: Path, graph: bytes = GRAPH, weights: bytes = WEIGHTS) -> Path:
    """Write model.xml and model.bin as an exporter does; return the first."""
    file = folder / "model.xml"
    spec = image_spec(image=(1, 4, 4), classes=2, class_names=NAMES)
    digest = ir_sha256(graph, head_of(graph, file), weights)
    file.write_bytes(with_manifest(graph, Manifest(kind="denoiser", spec=spec, graph_sha256=digest), file))
    file.with_suffix(".bin").write_bytes(weights)
    return file


@pytest.mark.parametrize("weights", [WEIGHTS, b""], ids=["weights", "no weights"])
@pytest.mark.parametrize("graph", [GRAPH, GRAPH.replace(b"\t<rt_info />\n", b"")], ids=["rt_info", "none"])
def test_what_is_written_is_read(graph: bytes, weights: bytes, tmp_path: Path) -> None:
    file = write(tmp_path, graph, weights)
    assert format_of(file) is OPENVINO
    manifest = read_manifest(file)
    assert manifest.spec.class_names == NAMES
    again = with_manifest(file.read_bytes(), replace(manifest, parity={"max_abs": 0.5}), file)
    file.write_bytes(again)
    assert read_manifest(file).parity == {"max_abs": 0.5}, "another manifest, the same digest"
    assert again.count(b"<rt_info>") == 1
    assert files_beside(file) == [tmp_path / "model.bin"]
    assert model_bytes(file) == len(again) + len(weights)


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "a weight": lambda xml, bin: bin.write_bytes(b"\xff" + WEIGHTS[1:]),
    "fewer weights": lambda xml, bin: bin.write_bytes(WEIGHTS[:-1]),
    "more weights": lambda xml, bin: bin.write_bytes(WEIGHTS + b"\0"),
    "the graph": lambda xml, bin: xml.write_bytes(xml.read_bytes().replace(b"<layers />", b"<layers/>")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_is_refused(change: str, tmp_path: Path) -> None:
    file = write(tmp_path)
    CHANGES[change](file, file.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match=r"model\.bin are not those that were verified: .*; export it again"):
        read_manifest(file)


def test_weights_that_are_missing_or_elsewhere_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path)
    weights = file.with_suffix(".bin")
    weights.rename(tmp_path / "other.bin")
    with pytest.raises(ArtifactError, match=r"its weights are in 'model\.bin', which is not beside it"):
        read_manifest(file)
    (tmp_path / "folder").mkdir()
    os.rename(tmp_path / "other.bin", tmp_path / "folder" / "other.bin")
    weights.symlink_to(tmp_path / "folder" / "other.bin")
    with pytest.raises(ArtifactError, match="a link to a file in another folder"):
        read_manifest(file)


DEEP = b"<net>" + b"<a>" * MAX_DEPTH + b"</a>" * MAX_DEPTH + b"</net>"
HOSTILE = {
    "entities": (b'<!DOCTYPE net [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><net>&b;</net>', "XML with a document type"),
    "an external entity": (b'<!DOCTYPE net SYSTEM "file:///etc/passwd"><net />', "XML with a document type"),
    "depth": (DEEP, f"XML of more than {MAX_DEPTH} levels"),
    "another root": (b"<html><body /></html>", "XML, and not OpenVINO's IR: it begins with <html>"),
    "cut off": (GRAPH[:60], "not whole XML (unclosed token"),
    "two roots": (GRAPH + b"<net />", "not whole XML (junk after document element"),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(20), "not OpenVINO's IR: it is a PNG image"),
    "an undefined entity": (b"<net>&nothing;</net>", "not whole XML (undefined entity"),
    "no manifest": (GRAPH, "OpenVINO's IR with no cmfast manifest, so its conventions are unknown; export it again"),
    "a manifest elsewhere": (
        b'<net><layers><rt_info><cmfast value="{}" /></rt_info></layers></net>', "IR with no cmfast manifest",
    ),
    "another tool's": (
        b'<net><rt_info><framework><cmfast value="{}" /></framework></rt_info></net>',
        "so its conventions are unknown: another tool converted it; convert the .onnx file",
    ),
    "two manifests": (
        b'<net><rt_info><cmfast value="{}" /><cmfast value="{}" /></rt_info></net>', "OpenVINO's IR with two manifests",
    ),
    "no JSON": (b'<net><rt_info><cmfast value="{" /></rt_info></net>', "the manifest is not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_xml_that_is_no_ir_of_ours_is_one_line(name: str, tmp_path: Path) -> None:
    data, words = HOSTILE[name]
    file = tmp_path / "model.xml"
    file.write_bytes(data)
    file.with_suffix(".bin").write_bytes(WEIGHTS)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_without_a_digest_is_refused_and_so_is_xml_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.xml"
    graph = with_manifest(GRAPH, Manifest(kind="denoiser", spec=image_spec()), file)
    with pytest.raises(ArtifactError, match="has no graph_sha256, which binds its weights to it"):
        parse_ir(graph, file)
    monkeypatch.setattr("cmfast.formats.openvino_ir.MAX_BYTES", len(graph) - 1)
    with pytest.raises(ArtifactError, match="MiB of XML; at most 0 are read"):
        parse_ir(graph, file)
