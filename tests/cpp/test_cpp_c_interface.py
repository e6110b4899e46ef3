# SPDX-License-Identifier: MIT
"""cmfast.h: the shared library of the C interface, called from here with ctypes and from a C program."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmfast import noise
from helpers import ROOT
from helpers.cpp import INCLUDE, STRICT, call, need_compiler, onnxruntime_library
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
    flags = ("-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{INCLUDE}", "-o", str(library))
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
    command = [need_compiler("gcc"), "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
    source = ROOT / "examples" / "cpp" / "c" / "from_c.c"
    command += [str(source), str(shared), f"-Wl,-rpath,{shared.parent}", "-lm", "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert call(program, file, onnxruntime_library()).startswith(b"256 values, mean ")
