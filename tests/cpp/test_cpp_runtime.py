# SPDX-License-Identifier: MIT
"""cmfast.hpp against Python: the loop, pixels, the readers of manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from cmfast import noise
from cmfast.sampling import to_uint8
from helpers.cpp import SANITIZE, SOURCES, build, call
from helpers.graphs import write_denoiser, write_ir, write_ort
from helpers.plans import plan

BASE = {
    "schema": "cmfast/2", "kind": "denoiser", "shape": [1, 4, 4], "data": "image", "conditions": [],
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "scaling": "boundary", "c_noise": "250ln",
    "renoise": "sqrt", "clip": True, "sigmas": {"1": [80.0], "2": [80.0, 0.8]}, "dtype": "float32",
}  # fmt: skip

NULL = {"name": "label", "kind": "class", "classes": 3}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cpp"), SOURCES / "driver.cpp", *SANITIZE)


def floats(data: bytes) -> npt.NDArray[np.float32]:
    return np.frombuffer(data, np.float32)


def sigmas_text(levels: list[float]) -> str:
    return ",".join(map(repr, levels))


def python_loop(
    z: npt.NDArray[np.float32], levels: list[float], renoise: str, clip: bool, second: bool
) -> npt.NDArray[np.float32]:
    """The loop as cmfast/sampling.py and INTERFACE of flow maps have it, on the denoiser of driver.cpp."""
    x, x0 = levels[0] * z[0], z[0]
    for step, sigma in enumerate(levels):
        if step and renoise == "ddim":
            x = x0 + sigma / levels[step - 1] * (x - x0)
        elif step:
            x = x0 + (sigma if renoise == "plain" else (sigma**2 - 0.002**2) ** 0.5) * z[step]
        after = levels[step + 1] if renoise == "ddim" and step + 1 < len(levels) else 0.0
        x0 = x / (np.float32(1) + np.float32(sigma))
        x0 = x0 - np.float32(after) / np.float32(8) if second else x0
        x0 = x0.clip(-1, 1) if clip else x0
    return x0


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("renoise", ["sqrt", "plain", "ddim"])
@pytest.mark.parametrize("shape", [[5], [3, 7], [1, 4, 4], [2, 3, 2, 3]])
def test_the_loop_draws_what_pythons_draws_to_the_bit(
    driver: Path, shape: list[int], renoise: str, clip: bool, second: bool
) -> None:
    levels = [80.0, 7.1, 0.8]
    data = {"data": "image" if len(shape) == 3 else "array"}
    manifest = json.dumps(BASE | data | {"shape": shape, "renoise": renoise, "clip": clip, "second_time": second})
    found = floats(call(driver, "sample", manifest, sigmas_text(levels), 11, 3, 2))
    z = np.stack([noise.gaussian(11, range(3, 5), step, shape) for step in range(3)])
    wanted = python_loop(z, levels, renoise, clip, second)
    np.testing.assert_array_equal(found.view(np.uint32), wanted.ravel().view(np.uint32))
    given = call(driver, "sample", manifest, sigmas_text(levels), 11, 3, 2, "noise", given=z.tobytes())
    np.testing.assert_array_equal(floats(given), found)


def test_pixels_are_rounded_as_pythons(driver: Path) -> None:
    x0 = np.linspace(-1.2, 1.2, 3 * 32 * 32 * 4, dtype=np.float32).reshape(4, 3, 32, 32)
    x0[0, 0, 0, :3] = [0.0, 0.5 / 127.5, -1.0]  # halves go to even
    found = call(driver, "pixels", json.dumps(BASE | {"shape": [3, 32, 32]}), given=x0.tobytes())
    np.testing.assert_array_equal(np.frombuffer(found, np.uint8).reshape(4, 32, 32, 3), to_uint8(x0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "cmfast/3"}, "the manifest has schema 'cmfast/3'"),
        ({"shape": [1, 2, 3, 4, 5]}, "shape must be one to four whole numbers"),
        ({"shape": [65536] * 4, "data": "array"}, "at most 2**34 values"),
        ({"shape": [4, 4]}, "images have the shape (C, H, W), got [4, 4]"),
        ({"sigma_min": 90}, "need sigma_min < sigma_max, got 90 and 80"),
        ({"renoise": "none"}, "renoise must be one of sqrt, plain, ddim, got 'none'"),
        ({"sigmas": {"2": [80.0]}}, "the default noise levels for 2 steps are 1"),
        ({"sigmas": {"2": [80.0, 81.0]}}, "must strictly decrease and stay above 0.002: 81 follows 80"),
        ({"clip": 1}, "clip must be true or false, got 1"),
        ({"kind": "sampler"}, "a sampler has exactly one list of noise levels"),
        ({"conditions": [{"name": "x", "kind": "tensor", "shape": []}]}, "a condition's name must be an identifier"),
        ({"conditions": [{"name": "state", "kind": "tensor", "shape": [0]}]}, "sizes are whole numbers from 1"),
        ({"conditions": [{"name": "label", "kind": "class", "classes": 0}]}, "classes must be a positive whole number"),
        ({"conditions": [NULL | {"null": 4}]}, "condition label: null must be a class from 0 to 3, got 4"),
        ({"conditions": [NULL | {"null": True}]}, "condition label: null must be a finite number, got True"),
        ({"conditions": [{"name": "a", "kind": "tensor", "null": "0"}]}, "condition a: null must be a finite number"),
        ({"made_by": {"a\nb": "c"}}, "made_by must have printable keys"),
        ({"parity": {"max_abs": "small"}}, "parity.max_abs is wrong"),
    ],
)  # fmt: skip
def test_a_wrong_manifest_is_refused_by_the_name_of_its_key(driver: Path, change: dict[str, Any], words: str) -> None:
    (line,) = read(driver, "manifests", [json.dumps(BASE | change).encode()])
    assert line.startswith("no given: ")
    assert words in line


def read(driver: Path, command: str, inputs: list[bytes]) -> list[str]:
    framed = b"".join(len(each).to_bytes(4, "little") + each for each in inputs)
    return call(driver, command, given=framed).decode(errors="replace").splitlines()


def test_both_schemas_are_read_and_say_the_same(driver: Path) -> None:
    first = {key: value for key, value in BASE.items() if key not in ("shape", "data", "conditions")}
    first |= {"schema": "cmfast/1", "image": [1, 4, 4], "classes": 10, "scaling": "seed"}
    second = BASE | {"conditions": [{"name": "label", "kind": "class", "classes": 10}], "unknown": [{"a": None}]}
    lines = read(driver, "manifests", [json.dumps(first).encode(), json.dumps(second).encode()])
    assert lines[0] == lines[1]
    assert lines[0] == ("ok [1, 4, 4] image denoised sqrt 0.002 80 10 1[80] 2[80, 0.8] label: a class from 0 to 9")


def test_dynamic_sizes_have_names(driver: Path) -> None:
    conditions = [
        {"name": "image", "kind": "tensor", "shape": [3, "height", None]},
        {"name": "state", "kind": "tensor", "shape": [14]},
    ]
    (line,) = read(driver, "manifests", [json.dumps(BASE | {"conditions": conditions}).encode()])
    assert line.endswith("image: float32 [B, 3, height, image_2] state: float32 [B, 14]")


def test_what_stands_for_no_condition_is_read(driver: Path) -> None:
    tensor = {"name": "state", "kind": "tensor", "shape": [2], "null": -0.5}
    lists = [[NULL | {"null": 3}, tensor], [NULL | {"null": None}, tensor | {"null": None}]]
    given, none = read(driver, "manifests", [json.dumps(BASE | {"conditions": each}).encode() for each in lists])
    assert given.endswith("label: a class from 0 to 2 (null 3, 4 entries) state: float32 [B, 2] (null -0.5, 0 entries)")
    assert none.endswith("label: a class from 0 to 2 state: float32 [B, 2]")


def test_control_characters_of_a_file_stay_out_of_errors(driver: Path) -> None:
    twice = b'{"schema": "cmfast/2", "a\\nb": 1, "a\\nb": 2}'  # a line end in both keys, as JSON escapes it
    assert read(driver, "manifests", [twice]) == [
        "no given: the manifest is not a JSON object (the manifest has the key 'a\\x0ab' twice); "
        "export the model again with cmfast-export"
    ]


def test_the_manifest_of_a_file_is_read_whatever_its_format(driver: Path, tmp_path: Path) -> None:
    files = [
        write_denoiser(tmp_path / "model.onnx"),
        write_ort(tmp_path / "model.ort"),
        write_ir(tmp_path / "model.xml", weights=b"weights"),
        plan(tmp_path / "model.engine"),
    ]
    *models, engine = [call(driver, "file", file).decode() for file in files]
    assert models == ["[1, 4, 4] image denoised sqrt 0.002 80 10 1[80] 2[80, 0.8] 3[80, 5, 0.8]\n"] * 3
    assert engine == "[1, 8, 8] image images sqrt 0.002 80 10 2[80, 0.8] label: a class from 0 to 9\n"
    files[2].with_suffix(".bin").write_bytes(b"others")
    assert b"are not those that were verified" in call(driver, "file", files[2], code=2)


@pytest.mark.parametrize("magic", [b"ftrt", b"vtrt"])
def test_a_plan_is_read_as_it_was_sealed_and_refused_when_a_byte_changed(
    driver: Path, magic: bytes, tmp_path: Path
) -> None:
    whole = plan(tmp_path / "model.engine", magic=magic).read_bytes()
    altered = [whole[:-1], whole[:-1] + b"X", whole.replace(b'"clip": true', b'"clip": null'), whole + whole[64:]]
    good, *lines = read(driver, "plans", [whole, *altered, b"PK" + whole])
    assert good == "ok [1, 8, 8] image images sqrt 0.002 80 10 2[80, 0.8] label: a class from 0 to 9"
    assert [line.split(": ")[1].split(" (")[0][:34] for line in lines[:2]] == ["it was altered or damaged since it"] * 2
    assert lines[2].startswith("no given: ")
    assert "it holds two manifests" in lines[3]
    assert "not a TensorRT engine" in lines[4]
