# SPDX-License-Identifier: MIT
"""Small denoisers written node by node, of any shape and with any conditions, and what they compute in numpy."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cmfast.formats.manifest import Manifest
from cmfast.formats.openvino_ir import head_of, ir_sha256, with_manifest

MANIFEST: dict[str, Any] = {
    "schema": "cmfast/2", "kind": "denoiser", "shape": [1, 4, 4], "data": "image", "conditions": [],
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "scaling": "boundary", "c_noise": "250ln",
    "renoise": "sqrt", "clip": True, "sigmas": {"1": [80.0], "2": [80.0, 0.8], "3": [80.0, 5.0, 0.8]},
    "dtype": "float32",
}  # fmt: skip


def write_denoiser(path: Path, changes: Mapping[str, Any] | None = None, batch: int | str = "B") -> Path:
    """Write x / (1 + sigma) + the mean of each tensor condition + label / 16 - sigma_next / 8; return its path."""
    manifest = MANIFEST | dict(changes or {})
    shape, flat = manifest["shape"], [1] * len(manifest["shape"])
    inputs = [value("x", [batch, *shape]), value("sigma", [batch])]
    weights = [
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("flat", TensorProto.INT64, [len(flat) + 1], [-1, *flat]),
        helper.make_tensor("eighth", TensorProto.FLOAT, [], [-0.125]),
        helper.make_tensor("sixteenth", TensorProto.FLOAT, [], [0.0625]),
    ]
    nodes = [
        helper.make_node("Add", ["sigma", "one"], ["above"]),
        helper.make_node("Reshape", ["above", "flat"], ["divisor"]),
        helper.make_node("Div", ["x", "divisor"], ["sum0"]),
    ]
    total = "sum0"

    def add(values: str) -> None:
        nonlocal total
        nodes.append(helper.make_node("Reshape", [values, "flat"], [f"{values}_flat"]))
        nodes.append(helper.make_node("Add", [total, f"{values}_flat"], [f"{total}0"]))
        total += "0"

    if manifest.get("second_time"):
        inputs.append(value("sigma_next", [batch]))
        nodes.append(helper.make_node("Mul", ["sigma_next", "eighth"], ["less"]))
        add("less")
    for each in manifest["conditions"]:
        name = each["name"]
        if each["kind"] == "class":
            inputs.append(value(name, [batch], TensorProto.INT64))
            nodes.append(helper.make_node("Cast", [name], [f"{name}_float"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [f"{name}_float", "sixteenth"], [f"{name}_part"]))
        else:
            sides = [f"{name}_{i}" if side is None else side for i, side in enumerate(each["shape"])]
            inputs.append(value(name, [batch, *sides]))
            axes = list(range(1, len(sides) + 1))
            weights.append(helper.make_tensor(f"{name}_axes", TensorProto.INT64, [len(axes)], axes))
            nodes.append(helper.make_node("ReduceMean", [name, f"{name}_axes"], [f"{name}_part"], keepdims=0))
        add(f"{name}_part")
    nodes.append(helper.make_node("Identity", [total], ["denoised"]))
    graph = helper.make_graph(nodes, "denoiser", inputs, [value("denoised", [batch, *shape])], weights)
    return save(path, graph, manifest)


def write_corpus(folder: Path) -> None:
    """Write files that the readers of manifests and of ONNX read: both schemas, conditions, a self-test."""
    conditions = [
        {"name": "label", "kind": "class", "classes": 3, "class_names": ["a", "b", "c"]},
        {"name": "views", "kind": "tensor", "shape": [3, "height", None]},
    ]
    tested = {"seed": 1, "conditions": {"label": 1}, "at": [0, 3], "values": [0.5, -0.25], "atol": 1e-4}
    first = {key: value for key, value in MANIFEST.items() if key not in ("shape", "data", "conditions")}
    first |= {
        "schema": "cmfast/1",
        "image": [1, 4, 4],
        "classes": 3,
        "class_names": ["a", "b", "c"],
        "parity": {"a": 1},
    }
    made = {"made_by": {"cmfast": "0.1"}, "source": {"a": [1, {"b": None}]}, "cost": {"flops": 1e9}, "grid": 40}
    second = MANIFEST | made | {"conditions": conditions, "selftest": tested}
    for name, manifest in (("first", first), ("second", second)):
        (folder / f"{name}.json").write_text(json.dumps(manifest))
    write_denoiser(folder / "model.onnx", {"conditions": conditions, "selftest": tested})


def write_ort(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the denoiser of `write_denoiser` in ONNX Runtime's own format; return its path."""
    from cmfast_export.conversion import convert
    from cmfast_export.request import make_request

    with tempfile.TemporaryDirectory() as folder:
        file = write_denoiser(Path(folder) / "model.onnx", {"scaling": "edm"} | dict(changes or {}))
        convert(make_request(model=file, out=Path(folder) / path.name, form="ort"))
        path.write_bytes((Path(folder) / path.name).read_bytes())
    return path


def write_ir(path: Path, changes: Mapping[str, Any] | None = None, weights: bytes = b"") -> Path:
    """Write an IR of OpenVINO with a manifest, whose digest is right, and its weights; return its path."""
    graph = b'<?xml version="1.0"?>\n<net version="11"><layers><layer id="0" name="x" /></layers></net>'
    digest = ir_sha256(graph, head_of(graph, path), weights)
    manifest = Manifest.from_json(json.dumps(MANIFEST | dict(changes or {}) | {"graph_sha256": digest}), "corpus")
    path.write_bytes(with_manifest(graph, manifest, path))
    if weights:
        path.with_suffix(".bin").write_bytes(weights)
    return path


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return data with a few changes. ASCII, because Python knows more characters that no terminal shows."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(12)
        if kind == 0:
            out[at : at + rng.randrange(8)] = rng.choice([b"-1", b"1.5", b'""', b"[]", b"{}", b"null", b"true", b"1e3"])
        elif kind == 1:
            del out[at : at + rng.randrange(8)]
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            out[at:at] = out[rng.randrange(len(out) + 1) :][: rng.randrange(20)]
        elif at < len(out):  # mostly one digit or letter for another
            out[at] = rng.choice(b"0123456789abcdefxyz_-.") if kind < 11 else rng.randrange(128)
    return bytes(out)


def save(path: Path, graph: onnx.GraphProto, manifest: Mapping[str, Any]) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {"cmfast": json.dumps(manifest)})
    onnx.save(model, path)
    return path


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def sampled(
    z: npt.NDArray[np.float32], changes: Mapping[str, Any], steps: int, offset: npt.NDArray[np.float32] | float = 0.0
) -> npt.NDArray[np.float32]:
    """Return what the loop draws with such a denoiser from noise [K, B, *shape]; offset: of the conditions, [B]."""
    manifest = MANIFEST | dict(changes)
    levels, renoise = manifest["sigmas"][str(steps)], manifest["renoise"]
    added = np.reshape(np.float32(offset), (-1, *[1] * len(manifest["shape"])))
    x, x0 = levels[0] * z[0], z[0]
    for step, sigma in enumerate(levels):
        if step and renoise == "ddim":
            x = x0 + sigma / levels[step - 1] * (x - x0)
        elif step:
            x = x0 + (sigma if renoise == "plain" else (sigma**2 - 0.002**2) ** 0.5) * z[step]
        following = levels[step + 1] if renoise == "ddim" and step + 1 < len(levels) else 0.0
        x0 = x / (np.float32(1) + np.float32(sigma))
        x0 = x0 - np.float32(following / 8) if manifest.get("second_time") else x0
        x0 = x0 + added
        x0 = x0.clip(-1, 1) if manifest["clip"] else x0
    return x0
