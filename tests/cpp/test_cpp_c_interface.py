# SPDX-License-Identifier: MIT
"""cmfast.h: the shared library of the C interface, called from here with ctypes and from a C program."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cmfast
from cmfast import noise
from cmfast.cli.installed import openvino_library
from cmfast.sampling import to_uint8
from helpers import ROOT
from helpers.cpp import INCLUDE, STRICT, UNDEFINED, call, need_compiler, onnxruntime_library
from helpers.graphs import sampled, write_denoiser

STATE = {"name": "state", "kind": "tensor", "shape": [3]}
LABEL = {"name": "label", "kind": "class", "classes": 10}
CHANGES: dict[str, Any] = {"shape": [4, 3], "data": "array", "conditions": [STATE, LABEL], "clip": False}
OK, REQUEST, ARTIFACT, BACKEND, CHECK = range(5)


class Error(ctypes.Structure):
    _fields_ = [("message", ctypes.c_char * 1024)]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("backend", ctypes.c_char_p),
        ("library", ctypes.c_char_p),
        ("device", ctypes.c_char_p),
        ("threads", ctypes.c_int),
    ]


class Condition(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("classes", ctypes.c_int64),
        ("rank", ctypes.c_size_t),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("c") / "libcmfast_c.so"
    flags = (*UNDEFINED, "-shared", "-fPIC", "-fvisibility=hidden", f"-I{INCLUDE}", "-o", str(library))
    source = ROOT / "cmfast" / "src" / "cmfast_c.cpp"
    made = subprocess.run([need_compiler(), *STRICT, *flags, str(source), "-ldl"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library


@pytest.fixture(scope="module")
def c(shared: Path) -> ctypes.CDLL:
    c = ctypes.CDLL(str(shared))
    c.cmfast_dims.restype = ctypes.POINTER(ctypes.c_int64)
    for name in ("cmfast_rank", "cmfast_condition_count"):
        getattr(c, name).restype = ctypes.c_size_t
    return c


@pytest.fixture
def opened(c: ctypes.CDLL, tmp_path: Path) -> Any:
    file = write_denoiser(tmp_path / "model.onnx", CHANGES)
    model, error = ctypes.c_void_p(), Error()
    options = Options(ctypes.sizeof(Options), b"onnxruntime", str(onnxruntime_library()).encode(), b"cpu", 1)
    status = c.cmfast_open(str(file).encode(), ctypes.byref(options), ctypes.byref(model), ctypes.byref(error))
    assert status == OK, error.message
    yield model
    c.cmfast_close(model)


def test_a_model_says_what_it_takes(c: ctypes.CDLL, opened: Any) -> None:
    assert c.cmfast_c_version() == 1
    assert c.cmfast_dims(opened)[: c.cmfast_rank(opened)] == [4, 3]
    found = []
    for index in range(c.cmfast_condition_count(opened)):
        condition = Condition(ctypes.sizeof(Condition))
        assert c.cmfast_get_condition(opened, ctypes.c_size_t(index), ctypes.byref(condition), None) == OK
        found.append((condition.name, condition.classes, condition.dims[: condition.rank]))
    assert found == [(b"state", 0, [3]), (b"label", 10, [])]


def test_samples_are_those_of_python(c: ctypes.CDLL, opened: Any) -> None:
    error = Error()
    floats, whole = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int64)
    state, label = np.array([1, 2, 3], np.float32), np.array([7], np.int64)
    dims = (ctypes.c_int64 * 1)(3)
    assert c.cmfast_set_steps(opened, 2, ctypes.byref(error)) == OK
    status = c.cmfast_set_tensor(
        opened, b"state", state.ctypes.data_as(floats), dims, ctypes.c_size_t(1), ctypes.byref(error)
    )
    assert status == OK, error.message
    assert c.cmfast_set_class(opened, b"label", label.ctypes.data_as(whole), ctypes.c_size_t(1), None) == OK
    out = np.empty((5, 4, 3), np.float32)
    seed, first, n = ctypes.c_uint64(9), ctypes.c_uint64(2), ctypes.c_size_t(5)
    assert c.cmfast_sample(opened, n, seed, first, out.ctypes.data_as(floats), ctypes.byref(error)) == OK
    z = np.stack([noise.gaussian(9, range(2, 7), step, (4, 3)) for step in range(2)])
    np.testing.assert_allclose(out, sampled(z, CHANGES, 2, 2 + 7 / 16), atol=2e-6, rtol=1e-6)
    again = np.empty_like(out)
    assert c.cmfast_from_noise(opened, z.ctypes.data_as(floats), n, again.ctypes.data_as(floats), None) == OK
    np.testing.assert_array_equal(again, out)
    unit = np.empty(12, np.float32)
    step, count = ctypes.c_uint32(1), ctypes.c_size_t(12)
    assert c.cmfast_gaussian(seed, first, step, count, unit.ctypes.data_as(floats), None) == OK
    np.testing.assert_array_equal(unit, z[1, 0].ravel())


def test_a_million_values_of_noise_are_equal_to_pythons_to_the_bit(c: ctypes.CDLL) -> None:
    seed, first, step, count = 2**63 + 5, 2**32 - 1, 3, 1_000_000
    found = np.empty(count, np.float32)
    out = found.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    where = ctypes.c_uint64(seed), ctypes.c_uint64(first), ctypes.c_uint32(step), ctypes.c_size_t(count)
    assert c.cmfast_gaussian(*where, out, None) == OK
    wanted = noise.gaussian(seed, first, step, (count,))
    np.testing.assert_array_equal(found.view(np.uint32), wanted.ravel().view(np.uint32))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_exported_model_draws_what_python_draws_and_passes_its_self_test(
    backend: str, c: ctypes.CDLL, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from cmfast_export.pipeline import export_onnx

    if backend == "openvino" and not find_spec("openvino"):
        pytest.skip("needs openvino")
    library = onnxruntime_library() if backend == "onnxruntime" else openvino_library()
    file = tmp_path / "model.onnx"
    export_onnx(tiny_checkpoint(10, levels=1), file)
    options = Options(ctypes.sizeof(Options), backend.encode(), str(library).encode(), None, 1)
    model, error = ctypes.c_void_p(), Error()
    status = c.cmfast_open(str(file).encode(), ctypes.byref(options), ctypes.byref(model), ctypes.byref(error))
    assert status == OK, error.message
    found = np.empty((5, 1, 8, 8), np.float32)
    out = found.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    seed, first, n = ctypes.c_uint64(7), ctypes.c_uint64(3), ctypes.c_size_t(5)
    assert c.cmfast_set_steps(model, 2, None) == OK
    assert c.cmfast_sample(model, n, seed, first, out, ctypes.byref(error)) == OK, error.message
    wanted = cmfast.load(file).sample_float(5, steps=2, seed=7, first=3)
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)  # sums in another order
    assert np.mean(to_uint8(found) == to_uint8(wanted)) > 0.999
    off, allowed = ctypes.c_double(-1), ctypes.c_double()
    assert c.cmfast_selftest(model, ctypes.byref(off), ctypes.byref(allowed), ctypes.byref(error)) == OK, error.message
    assert 0 <= off.value < allowed.value
    c.cmfast_close(model)


def test_a_self_test_that_fails_is_a_status_and_says_by_how_much(c: ctypes.CDLL, tmp_path: Path) -> None:
    tested = {"seed": 3, "conditions": {}, "at": [0], "values": [0.5], "atol": 1e-4}
    file = write_denoiser(tmp_path / "model.onnx", {"selftest": tested})
    options = Options(ctypes.sizeof(Options), b"onnxruntime", str(onnxruntime_library()).encode(), b"cpu", 1)
    model, error = ctypes.c_void_p(), Error()
    assert c.cmfast_open(str(file).encode(), ctypes.byref(options), ctypes.byref(model), None) == OK
    off, allowed = ctypes.c_double(), ctypes.c_double()
    assert c.cmfast_selftest(model, ctypes.byref(off), ctypes.byref(allowed), ctypes.byref(error)) == CHECK
    value = cmfast.load(file).sample_float(1, seed=3).ravel()[0]
    assert off.value == pytest.approx(abs(value - 0.5), abs=1e-6)
    assert b"\n" not in error.message
    assert b"self-test" in error.message
    c.cmfast_close(model)


def test_errors_are_a_status_and_one_line(c: ctypes.CDLL, opened: Any, tmp_path: Path) -> None:
    error, model = Error(), ctypes.c_void_p()
    assert c.cmfast_set_steps(opened, 7, ctypes.byref(error)) == REQUEST
    assert b"these numbers of steps: 1, 2, 3; for 7" in error.message
    assert c.cmfast_open(b"nothere.onnx", None, ctypes.byref(model), ctypes.byref(error)) == ARTIFACT
    assert error.message == b"nothere.onnx: no such file"
    assert not model.value
    assert c.cmfast_open(None, None, ctypes.byref(model), ctypes.byref(error)) == REQUEST
    assert error.message == b"path must not be NULL"
    options = Options(ctypes.sizeof(Options), b"onnxruntime", str(tmp_path).encode(), None, 0)
    file = str(tmp_path / "model.onnx").encode()
    assert c.cmfast_open(file, ctypes.byref(options), ctypes.byref(model), ctypes.byref(error)) == BACKEND
    assert b"cannot load ONNX Runtime" in error.message
    options.size = 3
    assert c.cmfast_open(file, ctypes.byref(options), ctypes.byref(model), ctypes.byref(error)) == REQUEST


def test_options_of_an_older_program_are_read_as_far_as_they_go(c: ctypes.CDLL, tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx")
    short = Options(24, b"onnxruntime", str(onnxruntime_library()).encode(), b"not read", 77)
    model = ctypes.c_void_p()
    assert c.cmfast_open(str(file).encode(), ctypes.byref(short), ctypes.byref(model), None) == OK
    c.cmfast_close(model)


def test_only_the_interface_is_visible(shared: Path) -> None:
    said = subprocess.run(["nm", "-D", "--defined-only", str(shared)], capture_output=True, text=True)
    if said.returncode:
        pytest.skip("needs nm")
    names = [line.split()[-1] for line in said.stdout.splitlines()]
    header = (INCLUDE / "cmfast" / "cmfast.h").read_text()
    ours = [name for name in names if name.startswith("cmfast")]
    assert len(ours) > 15
    assert all(f"{name}(" in header for name in ours)


def test_a_c_program_draws(shared: Path, tmp_path: Path) -> None:
    file = write_denoiser(tmp_path / "model.onnx", {"shape": [2, 8], "data": "array"})
    program = tmp_path / "from_c"
    command = [need_compiler("gcc"), "-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{INCLUDE}"]
    source = ROOT / "examples" / "cpp" / "c" / "from_c.c"
    command += [str(source), str(shared), f"-Wl,-rpath,{shared.parent}", "-lm", "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert call(program, file, onnxruntime_library()).startswith(b"256 values, mean ")
