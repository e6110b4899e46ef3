# SPDX-License-Identifier: MIT
"""onnxruntime.hpp: model files drawn from in C++, through the library in the Python wheel, against Python."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cmfast
from cmfast import noise
from cmfast.sampling import to_uint8
from helpers.cpp import SANITIZE, SOURCES, build, call, onnxruntime_library
from helpers.graphs import MANIFEST, sampled, write_denoiser, write_ort

STATE = {"name": "state", "kind": "tensor", "shape": [3]}
LABEL = {"name": "label", "kind": "class", "classes": 10, "class_names": [f"class {i}" for i in range(10)]}
VIEWS = {"name": "views", "kind": "tensor", "shape": ["count", None]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    onnxruntime_library()
    return build(tmp_path_factory.mktemp("cpp"), SOURCES / "model.cpp", *SANITIZE)


@pytest.fixture(scope="module")
def draw(model: Path) -> Callable[..., npt.NDArray[np.float32]]:
    def draw(*arguments: object, given: bytes = b"") -> npt.NDArray[np.float32]:
        environment = {"CMFAST_ONNXRUNTIME": str(onnxruntime_library())}
        return np.frombuffer(call(model, "cpu", *arguments, given=given, **environment), np.float32)

    return draw


def refused(model: Path, *arguments: object, **environment: str) -> str:
    environment = {"CMFAST_ONNXRUNTIME": str(onnxruntime_library())} | environment
    (line,) = call(model, *arguments, code=2, **environment).decode().splitlines()
    return line


@pytest.mark.parametrize("kind", ["denoiser", "sampler", "server"])
def test_an_exported_model_draws_the_images_that_python_draws_and_passes_its_self_test(
    kind: str, draw: Callable[..., Any], model: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from cmfast_export.pipeline import export_onnx

    file = tmp_path / "model.onnx"
    export_onnx(tiny_checkpoint(10, levels=1), file, kind=kind, steps=None if kind == "denoiser" else 2)
    found = draw(file, "sample", 2, 5, 7, 3).reshape(5, 1, 8, 8)
    wanted = cmfast.load(file).sample_float(5, steps=2, seed=7, first=3)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)  # the same library: only threads may differ
    assert np.mean(to_uint8(found) == to_uint8(wanted)) > 0.999
    environment = {"CMFAST_ONNXRUNTIME": str(onnxruntime_library())}
    assert call(model, "cpu", file, "selftest", **environment).startswith(b"passed")


@pytest.mark.parametrize("batch", ["B", 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [5], "data": "array"},
        {"shape": [16, 7], "data": "array", "conditions": [STATE], "clip": False},
        {"shape": [3, 4, 4], "conditions": [LABEL]},
        {"shape": [2, 2, 3, 3], "data": "array", "conditions": [STATE, LABEL], "renoise": "plain"},
        {"shape": [6, 2], "data": "array", "renoise": "ddim", "second_time": True, "conditions": [VIEWS]},
    ],
)
def test_any_shape_with_any_conditions_is_drawn(
    changes: dict[str, Any], batch: int | str, draw: Callable[..., Any], tmp_path: Path
) -> None:
    file = write_denoiser(tmp_path / "model.onnx", changes, batch)
    names = [each["name"] for each in changes.get("conditions", [])]
    given, offset = [], np.zeros(4, np.float32)
    if "state" in names:
        given.append("state=" + ",".join(map(str, range(12))))  # one each, [4, 3]
        offset += np.arange(12, dtype=np.float32).reshape(4, 3).mean(1)
    if "views" in names:
        given.append("views=2x2:1,2,3,4")  # one for all
        offset += 2.5
    if "label" in names:
        offset += noise.labels(5, range(2, 6), 10) / 16  # drawn from the seed
    found = draw(file, "sample", 3, 4, 5, 2, *given)
    z = np.stack([noise.gaussian(5, range(2, 6), step, changes["shape"]) for step in range(3)])
    wanted = sampled(z, changes, 3, offset)
    # The sums of three numbers in another order.
    np.testing.assert_allclose(found, wanted.ravel(), atol=2e-6, rtol=1e-6)
    labels = ["label=3,1,4,1"] if "label" in names else []
    again = draw(file, "noise", 3, 4, *given, *labels, given=z.tobytes())
    moved = offset + (np.array([3, 1, 4, 1]) - noise.labels(5, range(2, 6), 10)) / 16 if labels else offset
    np.testing.assert_allclose(again, sampled(z, changes, 3, moved).ravel(), atol=2e-6, rtol=1e-6)


def test_a_file_in_onnx_runtimes_own_format_is_drawn_from(
    draw: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    file = write_ort(tmp_path / "model.ort", {"conditions": [STATE, LABEL]})
    found = draw(file, "sample", 2, 3, 4, 1, "state=1,2,3")
    wanted = cmfast.load(file).sample_float(3, steps=2, seed=4, first=1, conditions={"state": [1.0, 2.0, 3.0]})
    np.testing.assert_allclose(found, wanted.ravel(), atol=1e-6, rtol=0)  # one rounding more or less
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "it was altered or damaged since it was verified" in refused(model, "cpu", file, "selftest")


def test_a_class_has_a_name(draw: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx", {"conditions": [LABEL]})
    np.testing.assert_array_equal(
        draw(file, "sample", 1, 2, 0, 0, "label=+class 7"), draw(file, "sample", 1, 2, 0, 0, "label=7")
    )
    assert "label 'cat' is not a class of this model; it has class 0, class 1" in refused(
        model, "cpu", file, "sample", 1, 2, 0, 0, "label=+cat"
    )


def test_the_class_of_no_condition_is_drawn_with_as_in_python(
    draw: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    file = write_denoiser(tmp_path / "model.onnx", {"conditions": [LABEL | {"null": 10}]})
    loaded = cmfast.load(file)
    wanted = loaded.sample_float(2, seed=4, label=10)
    assert np.abs(wanted - loaded.sample_float(2, seed=4, label=9)).max() > 0.01
    # x / (1 + sigma) + 10 / 16: one rounding more or less
    np.testing.assert_allclose(draw(file, "sample", 1, 2, 4, 0, "label=10"), wanted.ravel(), atol=1e-6, rtol=0)
    drawn = loaded.sample_float(2, seed=4)  # a label left out is a class of the seed, not that of none
    np.testing.assert_allclose(draw(file, "sample", 1, 2, 4, 0), drawn.ravel(), atol=1e-6, rtol=0)
    with pytest.raises(cmfast.CmfastError) as caught:
        loaded.sample_float(2, seed=4, label=11)
    assert refused(model, "cpu", file, "sample", 1, 2, 4, 0, "label=11") == str(caught.value)


def test_the_raw_denoiser_is_not_clipped(draw: Callable[..., Any], tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx", {"second_time": True, "renoise": "ddim"})
    x = 8 * np.ones((3, 1, 4, 4), np.float32)
    np.testing.assert_array_equal(draw(file, "denoise", 1.0, 0.5, 3, given=x.tobytes()), np.full(48, 4 - 0.0625))


def test_an_open_file_is_compared_with_its_manifest(model: Path, tmp_path: Path) -> None:
    changes = {"conditions": [{"name": "other", "kind": "class", "classes": 10}]}
    file = write_denoiser(tmp_path / "model.onnx", changes)
    data = file.read_bytes()

    def altered(old: str, new: str) -> str:
        assert data.count(old.encode()) == 1
        file.write_bytes(data.replace(old.encode(), new.ljust(len(old)).encode()))
        return refused(model, "cpu", file, "sample", 1, 1, 0, 0)

    assert "the graph's x is [-1, 1, 4, 4], its manifest says samples of [1, 4, 5]" in altered(
        '"shape": [1, 4, 4]', '"shape": [1, 4, 5]'
    )
    assert "the graph's other is not float32" in altered(
        '"kind": "class", "classes": 10', '"kind":"tensor", "shape": []'
    )
    assert "inputs are [other, sigma, x], its manifest says [x, sigma]" in altered(
        '"conditions": [{"name": "other", "kind": "class", "classes": 10}]', '"conditions": []'
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", 7, 1, 0, 0, "state=1,2,3"), "default noise levels for these numbers of steps: 1, 2, 3; for 7"),
        (("sample", 1, 1, 0, 0), "this model needs the condition state: float32 [B, 3]"),
        (("sample", 1, 1, 0, 0, "state=1,2"), "state must be float32 [B, 3], so 3 values for each sample; got 2"),
        (("sample", 1, 3, 0, 0, "state=1,2,3,4,5,6"), "condition state was set for 2 samples, and 3 are drawn"),
        (("sample", 1, 1, 0, 0, "state=1,2,nan"), "condition state has values that are not finite"),
        (("sample", 1, 1, 0, 0, "other=1"), "this model has no condition 'other'; it has state"),
        (("selftest",), "this file has no self-test"),
        (("denoise", 0.0, 0.0, 1, "state=1,2,3"), "noise level 0 cannot be denoised"),
        (("denoise", 1.0, 2.0, 1, "state=1,2,3"), "sigma_next must be from 0 to sigma, got 2"),
    ],
)  # fmt: skip
def test_a_wrong_request_names_what_is_needed(
    arguments: tuple[Any, ...], words: str, model: Path, tmp_path: Path
) -> None:
    file = write_denoiser(tmp_path / "model.onnx", {"conditions": [STATE]})
    assert words in refused(model, "cpu", file, *arguments)


def test_what_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx")
    assert refused(model, "cpu", tmp_path / "other.onnx", "selftest") == f"{tmp_path / 'other.onnx'}: no such file"
    assert "not a whole ONNX file" in refused(model, "cpu", Path(__file__), "selftest")
    assert "it is truncated" in refused(model, "cpu", truncated(file), "selftest")
    nowhere = refused(model, "cpu", file, "selftest", CMFAST_ONNXRUNTIME=str(tmp_path))
    assert nowhere.startswith("cannot load ONNX Runtime from ")
    assert nowhere.endswith(
        "set CMFAST_ONNXRUNTIME to the library or its folder: python -m cmfast --onnxruntime prints it"
    )
    assert "device must be one of cpu, cuda, tensorrt, got 'tpu'" in refused(model, "tpu", file, "selftest")
    assert "the device was requested, but ONNX Runtime" in refused(model, "cuda", file, "selftest")


def truncated(file: Path) -> Path:
    short = file.with_name("short.onnx")
    short.write_bytes(file.read_bytes()[:-40])
    return short


def test_the_library_is_found_in_a_release_archive_and_in_a_folder(
    draw: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    file = write_denoiser(tmp_path / "model.onnx")
    release = tmp_path / "onnxruntime-linux-x64-1.32.0"
    (release / "lib").mkdir(parents=True)
    (release / "lib" / "libonnxruntime_providers_shared.so").write_bytes(b"not this one")
    shutil.copyfile(onnxruntime_library(), release / "lib" / "libonnxruntime.so.1.32.0")
    for name in ("libonnxruntime.so.1", "libonnxruntime.so"):
        (release / "lib" / name).symlink_to("libonnxruntime.so.1.32.0")
    wanted = draw(file, "sample", 2, 3, 0, 0).tobytes()
    for place in (release, release / "lib", onnxruntime_library().parent):
        assert call(model, "cpu", file, "sample", 2, 3, 0, 0, CMFAST_ONNXRUNTIME=str(place)) == wanted
    system = {"CMFAST_ONNXRUNTIME": "", "LD_LIBRARY_PATH": str(release / "lib")}
    assert call(model, "cpu", file, "sample", 2, 3, 0, 0, **system) == wanted


def test_the_self_test_says_how_far_the_machine_is_off(model: Path, tmp_path: Path) -> None:
    changes = {"conditions": [STATE, LABEL], "clip": False}
    z = noise.gaussian(3, range(1), 0, MANIFEST["shape"])[None]
    values = sampled(z, changes, 1, 2 + 7 / 16).ravel()[[0, 5, 15]].tolist()
    test = {"seed": 3, "conditions": {"state": [1, 2, 3], "label": 7}, "at": [0, 5, 15], "values": values, "atol": 1e-4}
    file = write_denoiser(tmp_path / "model.onnx", changes | {"selftest": test})
    environment = {"CMFAST_ONNXRUNTIME": str(onnxruntime_library())}
    assert call(model, "cpu", file, "selftest", **environment).startswith(b"passed")
    wrong = write_denoiser(tmp_path / "wrong.onnx", changes | {"selftest": test | {"values": [*values[:2], 9.0]}})
    with pytest.raises(AssertionError):
        call(model, "cpu", wrong, "selftest", **environment)


def test_the_positions_in_onnxruntimes_table_are_those_of_its_header(tmp_path: Path) -> None:
    places = [Path(os.environ.get("ONNXRUNTIME_ROOT", "/")) / "include"]
    places += [Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime"), Path("/usr/local/include")]
    header = next((place for place in places if (place / "onnxruntime_c_api.h").exists()), None)
    if header is None:
        pytest.skip("needs onnxruntime_c_api.h, which libonnxruntime-dev has")
    build(tmp_path, SOURCES / "positions.cpp", "-isystem", str(header))
