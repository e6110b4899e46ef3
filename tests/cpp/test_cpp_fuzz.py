# SPDX-License-Identifier: MIT
"""The C++ readers on mutated files: no crash, and the verdict of the Python readers. `make fuzz-cpp` runs longer."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest, parse_onnx
from cmfast.formats.openvino_ir import ir_sha256, parse_ir
from cmfast.formats.ort_format import parse_ort
from cmfast.formats.tensorrt_plan import parse_plan
from helpers.cpp import SANITIZE, SOURCES, build, call
from helpers.graphs import mutated, write_corpus, write_ir, write_ort
from helpers.plans import plan

ROUNDS = 4000
NULLS = [
    {"name": "label", "kind": "class", "classes": 3, "null": 3},
    {"name": "state", "kind": "tensor", "shape": [2], "null": -0.5},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    plan(folder / "model.engine")
    write_ort(folder / "model.ort")
    write_ir(folder / "model.xml", {"conditions": NULLS})
    return sorted(folder.iterdir())


def test_20000_mutated_files_are_read_or_refused_in_one_line(corpus: list[Path], tmp_path: Path) -> None:
    program = build(tmp_path, SOURCES / "fuzz.cpp", *SANITIZE, "-DINPUTS=20000")
    said = call(program, *corpus).decode()
    read = int(said.split()[0])
    assert 200 < read < 15_000, said  # the mutations reach what is behind the first check, and are seen


# What C++ does not interpret, and so does not refuse; and what JSON does not have, but Python's json reads.
# Behind an IR's manifest C++ reads no XML: OpenVINO does, and refuses it.
LENIENT = re.compile("scaling|c_noise|sigma_data|engine|weights|keyword|identifier|not whole XML")


def verdict(data: bytes, file: Path) -> str:
    """Return why Python refuses a manifest or an ONNX file, "" where it reads it."""
    try:
        if file.suffix == ".onnx":
            parse_onnx(memoryview(data), file)
        elif file.suffix == ".ort":
            parse_ort(data, file)
        elif file.suffix == ".xml":
            manifest, head = parse_ir(data, file)
            if ir_sha256(data, head, b"") != manifest.graph_sha256:
                return "another digest"
        elif file.suffix == ".engine":
            parse_plan(data, file)
        else:
            Manifest.from_json(data.decode(), str(file))
    except ArtifactError as err:
        return str(err)
    return ""


def test_c_plus_plus_refuses_what_python_refuses(corpus: list[Path], tmp_path: Path) -> None:
    program = build(tmp_path, SOURCES / "driver.cpp")
    rng = random.Random(0)
    verdicts = {True: 0, False: 0}
    for command, suffix in (
        ("manifests", ".json"), ("heads", ".onnx"), ("orts", ".ort"), ("irs", ".xml"), ("plans", ".engine"),
    ):  # fmt: skip
        given = tmp_path / f"given{suffix}"
        given.write_bytes(b"-")  # its head is looked at, to say what it is instead
        files = [path.read_bytes() for path in corpus if path.suffix == suffix]
        inputs = [mutated(rng.choice(files), rng) for _ in range(ROUNDS)]
        framed = b"".join(len(each).to_bytes(4, "little") + each for each in inputs)
        lines = call(program, command, given=framed).decode(errors="replace").splitlines()
        assert len(lines) == len(inputs)
        for data, line in zip(inputs, lines, strict=True):
            words = verdict(data, given)
            verdicts[not words] += 1
            if line.startswith("ok"):
                assert not words or LENIENT.search(words), (data, words)
            elif not words:
                assert "NaN" in str(data) or "selftest" in line or "Infinity" in str(data), (data, line)
    assert min(verdicts.values()) > ROUNDS / 10
