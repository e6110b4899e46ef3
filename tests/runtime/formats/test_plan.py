# SPDX-License-Identifier: MIT
"""The manifest in a plan: read back from the bytes, and a file that is not whole, not ours or not as written refused.

The plans are real ones, built by TensorRT-RTX; only TensorRT's own, which need its card, are made up by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmfast.backends.tensorrt_library import make_logger
from cmfast.cli import info
from cmfast.errors import ArtifactError
from cmfast.formats.manifest import Manifest
from cmfast.formats.table import read_manifest
from cmfast.formats.tensorrt_plan import DIGITS, NOT_RUN, UNSEALED, digest, read_plan, seal
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions
from helpers.specs import image_spec

pytest.importorskip("tensorrt_rtx")
Factory = Callable[..., Path]


@pytest.fixture(scope="module")
def plan(handmade_onnx: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the smallest denoiser."""
    path = tmp_path_factory.mktemp("plan") / "model.engine"
    build_engine(handmade_onnx(8), path, BuildOptions(batch=(1, 4, 16)))
    return path


def made_up(library: str = "tensorrt", **engine: object) -> bytearray:
    """Bytes that look like a plan of TensorRT on the outside: its first letters, a manifest, something behind it."""
    about = {
        "library": library, "version": "11.4.0.106", "cuda": "13", "compute_capability": ["8.9"],
        "platform": "linux_x86_64", "batch": [1, 2, 4], "onnx_sha256": "0" * 64, "max_abs": NOT_RUN,
        "plan_sha256": UNSEALED, **engine,
    }  # fmt: skip
    manifest = Manifest(kind="denoiser", spec=image_spec(image=(1, 8, 8)), engine=about)
    return bytearray(b"ftrt" + bytes(96) + manifest.to_json().encode() + b"\x00\xff\xfe" * 500)


def test_the_manifest_of_a_real_plan_is_read_back_from_its_bytes(plan: Path, handmade_onnx: Factory) -> None:
    ours, onnx = read_plan(plan), read_manifest(handmade_onnx(8))
    assert (ours.kind, ours.spec, ours.dtype, ours.source) == (onnx.kind, onnx.spec, onnx.dtype, onnx.source)
    assert ours.engine["library"] == "tensorrt_rtx"
    assert ours.engine["batch"] == [1, 4, 16]
    assert ours.engine["max_abs"] == NOT_RUN
    assert read_manifest(plan) == ours


def test_a_name_changes_its_own_bytes_of_a_plan_and_no_others(handmade_onnx: Factory, tmp_path: Path) -> None:
    # `seal` writes into the plan: nothing else in it, such as a checksum, may depend on the name.
    trt = pytest.importorskip("tensorrt_rtx")
    plans = []
    for digit in "0f0":
        log = make_logger(trt)
        builder = trt.Builder(log)
        network = builder.create_network(0)
        assert trt.OnnxParser(network, log).parse_from_file(str(handmade_onnx(8)))
        network.name = f"cmfast {digit * 64}"
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("x", *[(n, 1, 8, 8) for n in (1, 2, 3)])
        profile.set_shape("sigma", *[(n,) for n in (1, 2, 3)])
        config.add_optimization_profile(profile)
        plans.append(np.frombuffer(builder.build_serialized_network(network, config), np.uint8).copy())
    one, other, again = plans
    assert len(one) == len(other) == len(again)
    noise = np.flatnonzero(one != again)  # builds are not all alike to the bit
    different = np.setdiff1d(np.flatnonzero(one != other), noise)
    assert len(different) == 64
    assert different.max() - different.min() == 63
    assert bytes(one[different]) == b"0" * 64


def test_the_digest_is_that_of_the_file_with_its_digits_zeroed(plan: Path) -> None:
    import hashlib

    digits = read_plan(plan).engine["plan_sha256"]
    data = plan.read_bytes()
    assert data.count(digits.encode()) == 1
    assert hashlib.sha256(data.replace(digits.encode(), b"0" * DIGITS)).hexdigest() == digits


@pytest.mark.parametrize("keep", [0.999999, 0.5, 0.1])
def test_a_truncated_plan_is_refused(keep: float, plan: Path, tmp_path: Path) -> None:
    whole = plan.read_bytes()
    short = tmp_path / "short.engine"
    short.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ArtifactError, match=rf"it is truncated: \d+ of {len(whole)} bytes; copy it again|cut off"):
        read_plan(short)


def test_bytes_behind_a_plan_are_refused(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "long.engine").write_bytes(plan.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="altered or damaged"):
        read_plan(tmp_path / "long.engine")


def test_any_changed_byte_is_refused(plan: Path, tmp_path: Path) -> None:
    whole = plan.read_bytes()
    manifest = whole.index(b'{"schema"')
    rng = np.random.default_rng(0)
    places = [0, 3, 17, 30, manifest, manifest + 50, manifest + 400, *rng.integers(64, len(whole), 25), len(whole) - 1]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(0, 7))
        (tmp_path / "changed.engine").write_bytes(changed)
        with pytest.raises(ArtifactError):
            read_plan(tmp_path / "changed.engine")
    (tmp_path / "changed.engine").write_bytes(whole)
    read_plan(tmp_path / "changed.engine")


def test_a_plan_altered_and_sealed_again_reads_but_is_another_file(plan: Path, tmp_path: Path) -> None:
    # A digest inside is no signature; the SHA-256 of the whole file, known from elsewhere, is what notices.
    from cmfast.formats.manifest import file_sha256

    changed = bytearray(plan.read_bytes())
    changed[-100] ^= 1
    seal(changed)
    (tmp_path / "changed.engine").write_bytes(changed)
    read_plan(tmp_path / "changed.engine")
    assert file_sha256(tmp_path / "changed.engine") != file_sha256(plan)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"\x00\x01\x02\x03" * 100, "not a TensorRT engine; make one: cmfast-export model.pt --format engine"),
        (b"ftrt" + bytes(500), "without a cmfast manifest, so its conventions are unknown"),
        (b"ftrt" + bytes(100) + b'{"schema": "cmfast/2", ', "its manifest is damaged"),
        (b"ftrt" + bytes(100) + b'{"schema": "cmfast/2"' + b" " * 10_000 + b"}", "its manifest is damaged or cut off"),
        (b"ftrt" + bytes(100) + b'{"schema": "cmfast/3"}' + bytes(100), "has schema 'cmfast/3'"),
        (b"ftrt" + bytes(100) + 2 * b'{"schema": "cmfast/2"}' + bytes(100), "it holds two manifests"),
        (bytes(made_up()).replace(b'"plan_sha256"', b'"plan_sha257"'), "has no digest of the file"),
        (bytes(made_up()), "its bytes do not hash to the digest"),
        (bytes(made_up(plan_sha256=chr(0x4E00) * 64)), "has no digest of the file"),
    ],
)  # fmt: skip
def test_what_is_no_plan_of_ours_is_refused_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "model.engine"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as caught:
        read_plan(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_plan_of_tensorrt_with_our_manifest_reads(tmp_path: Path) -> None:
    plan = made_up()
    seal(plan)
    (tmp_path / "model.plan").write_bytes(plan)
    assert read_manifest(tmp_path / "model.plan").engine["library"] == "tensorrt"


def test_a_manifest_of_the_other_library_is_refused(tmp_path: Path) -> None:
    plan = made_up("tensorrt_rtx")
    seal(plan)
    (tmp_path / "model.engine").write_bytes(plan)
    with pytest.raises(ArtifactError, match="a plan of tensorrt whose manifest says 'tensorrt_rtx'"):
        read_plan(tmp_path / "model.engine")


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"batch": 7}, "batch"), ({"batch": [1, 2]}, "batch"), ({"batch": [4, 2, 1]}, "batch"),
        ({"batch": [True, 2, 4]}, "batch"), ({"compute_capability": "8.9"}, "compute_capability"),
        ({"compute_capability": ["89"]}, "compute_capability"), ({"version": "eleven"}, "version"),
        ({"platform": None}, "platform"), ({"onnx_sha256": 3}, "onnx_sha256"),
        ({"max_abs": 0.1}, "max_abs"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_nonsense_of_the_engine_is_one_line(
    wrong: dict[str, object], name: str, tmp_path: Path, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    plan = made_up(**wrong)
    seal(plan)
    (tmp_path / "model.engine").write_bytes(plan)
    refused(
        call(info.main, tmp_path / "model.engine"), f"its manifest says {name} of the engine wrongly; build it again"
    )


def test_sealing_writes_what_was_measured_and_keeps_the_length(tmp_path: Path) -> None:
    plan = made_up()
    length = len(plan)
    seal(plan)
    seal(plan, 1.234e-4)
    assert len(plan) == length
    (tmp_path / "model.engine").write_bytes(plan)
    assert read_plan(tmp_path / "model.engine").engine["max_abs"] == "1.23e-04"
    for extreme in (0.0, 9.99e99):
        seal(plan, extreme)
        assert len(plan) == length


@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_make_the_reader_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, plan: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.engine"
    file.write_bytes(b"ftrt" + bytes(60) + b'{"schema": "cmfast/2", "x": ' + data if plan else data)
    with pytest.raises(ArtifactError):
        read_plan(file)


def test_the_digest_of_a_memory_map_is_that_of_its_bytes(plan: Path) -> None:
    data = bytearray(plan.read_bytes())
    at = data.index(b'"plan_sha256": "') + len('"plan_sha256": "')
    assert digest(data, at) == digest(bytes(data), at) == data[at : at + DIGITS].decode()


def test_cmfast_info_reads_an_engine_without_gpu_and_without_tensorrt(plan: Path, call: Callable[..., object]) -> None:
    result = call(info.main, plan)
    for words in (
        "tensorrt_rtx",
        "compute capability 8.0, 8.6, 8.9, 12.0",
        "1 to 16, best at 4",
        "not run where it was",
    ):
        assert words in result.stdout  # type: ignore[attr-defined]
    as_json = json.loads(call(info.main, plan, "--json").stdout)  # type: ignore[attr-defined]
    assert as_json == json.loads(read_plan(plan).to_json())
