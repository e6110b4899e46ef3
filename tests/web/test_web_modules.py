# SPDX-License-Identifier: MIT
"""The page's JavaScript in Node.js: noise to the bit, the few-step loop, manifests, models on onnxruntime-web."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from cmfast import load, noise
from cmfast.errors import ArtifactError, CmfastError
from cmfast.formats.manifest import Manifest
from cmfast.noise import _normal_quantile
from cmfast.sampling import sample, to_uint8
from helpers import GOLDEN_NOISE, TESTS
from helpers.graphs import MANIFEST, mutated, save, value, write_corpus, write_denoiser
from helpers.specs import image_spec
from helpers.web import decode, encode, in_node, need_runtime

GOLDEN: dict[str, Any] = json.loads(GOLDEN_NOISE.read_text())
BITS = np.arange(0, 2**32, 65_537, dtype=np.uint32)
SEED, FIRST = 2**63 + 5, 2**32 - 2  # so that both words of both change


def test_the_noise_is_equal_to_the_golden_values_to_the_bit() -> None:
    rows = [[int(word, 16) for word in each["counter"] + each["key"]] for each in GOLDEN["philox"]]
    bits = np.array([int(each["bits"], 16) for each in GOLDEN["quantile"]], np.uint32)
    longest: dict[tuple[str, str, int], int] = {}
    for each in GOLDEN["gaussian"]:
        where = each["seed"], each["sample"], each["step"]
        longest[where] = max(longest.get(where, 0), each["index"] + 1)
    calls = [("philox", rows), ("quantile", encode(bits))]
    calls += [
        ("noise", dict(zip(("seed", "sample", "step"), where, strict=True), count=n)) for where, n in longest.items()
    ]
    calls += [("noise", {name: each[name] for name in ("seed", "sample", "step", "count")}) for each in GOLDEN["sums"]]
    calls += [("label", {name: each[name] for name in ("seed", "sample", "classes")}) for each in GOLDEN["labels"]]
    words, quantiles, *results = in_node(calls)
    assert words == [[int(word, 16) for word in each["words"]] for each in GOLDEN["philox"]]
    values = decode(quantiles, np.float64).astype(np.float32).view(np.uint32)
    assert [f"{value:08x}" for value in values] == [each["value"] for each in GOLDEN["quantile"]]
    drawn = {where: decode(results.pop(0), np.uint32) for where in longest}
    for each in GOLDEN["gaussian"]:
        assert f"{drawn[each['seed'], each['sample'], each['step']][each['index']]:08x}" == each["value"]
    for each in GOLDEN["sums"]:
        assert f"{decode(results.pop(0), np.uint32).sum(dtype=np.uint32):08x}" == each["sum"]
    assert results == [each["label"] for each in GOLDEN["labels"]]
    assert results


def test_a_million_values_are_equal_to_pythons_to_the_bit() -> None:
    call = {"seed": str(SEED), "first": str(FIRST), "samples": 4, "step": 3, "count": 250_001}
    found, quantiles = in_node([("digest", call), ("quantile", encode(BITS))])
    wanted = noise.gaussian(SEED, range(FIRST, FIRST + 4), 3, (250_001,))
    assert found == hashlib.sha256(wanted.tobytes()).hexdigest()
    np.testing.assert_array_equal(decode(quantiles, np.float64), _normal_quantile(BITS))


def test_a_seed_out_of_range_is_refused() -> None:
    results = in_node(
        [
            ("seed", -1),
            ("seed", 0.5),
            ("seed", 2**53),
            ("noise", {"seed": str(2**64), "sample": 0, "step": 0, "count": 1}),
            ("seed", 7),
        ]
    )
    assert [isinstance(each, dict) for each in results] == [True, True, True, True, False]
    assert results[0]["error"] == "CmfastError: the seed must be a whole number from 0 to 2**64 - 1, got -1"


@pytest.fixture(scope="module")
def loops() -> dict[str, tuple[Any, Any]]:
    """Return, by name, what Python's loop and the page's draw of the same noise with the same denoiser."""
    z = noise.slices(3, [5], 3, (1, 4, 4))
    z = np.concatenate([z, -2 * z], axis=-1)  # so that something is clipped
    sigmas, cases, calls = (80.0, 5.0, 0.8), {}, []
    for renoise in ("sqrt", "plain", "ddim"):
        for clip in (True, False):
            for second in (False, True):
                spec = image_spec(image=(1, 4, 8), renoise=renoise, clip=clip, second_time=second)

                def denoise(x: Any, sigma: float, sigma_next: float = 0.0) -> Any:
                    return x / (np.float32(1) + np.float32(sigma)) - np.float32(sigma_next / 8)

                told = {"renoise": renoise, "clip": clip, "second_time": second, "sigma_min": spec.sigma_min}
                calls.append(("sample", {"slices": [encode(part) for part in z], "sigmas": sigmas, "spec": told}))
                cases[f"{renoise}, clip {clip}, second time {second}"] = sample(denoise, z, sigmas, spec)
    results = in_node(calls)
    return {name: (wanted, found) for (name, wanted), found in zip(cases.items(), results, strict=True)}


def test_the_loop_computes_what_pythons_does_to_the_bit(loops: Mapping[str, tuple[Any, Any]]) -> None:
    assert len(loops) == 12
    for name, (wanted, found) in loops.items():
        assert wanted.dtype == np.float32
        np.testing.assert_array_equal(decode(found, np.float32), wanted.ravel(), err_msg=name)
    assert len({wanted.tobytes() for wanted, _ in loops.values()}) == 8  # second_time matters with "ddim" alone


def test_images_are_rounded_as_python_rounds_them() -> None:
    halves = (np.arange(-3, 260, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5) - 1
    values = np.concatenate([halves, noise.gaussian(0, 0, 0, (261,)), [-9e9, 9e9, 1, -1]]).astype(np.float32)
    image = values[: 3 * 11 * 16].reshape(1, 3, 11, 16)
    (found,) = in_node([("uint8", {"values": encode(image), "shape": [3, 11, 16]})])
    np.testing.assert_array_equal(decode(found, np.uint8), to_uint8(image).ravel())


def test_noise_between_two_seeds_keeps_its_length_and_begins_and_ends_at_them() -> None:
    a, b = noise.gaussian(0, [0, 1], 0, (4096,))
    calls = [("between", {"a": encode(a), "b": encode(b), "t": t}) for t in (0, 0.5, 1)]
    first, middle, last = (decode(each, np.float32) for each in in_node(calls))
    np.testing.assert_array_equal(first, a)
    np.testing.assert_array_equal(last, b)
    psi = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    # half way the two weights are sin(psi / 2) / sin(psi); float32 inputs, float64 sums
    np.testing.assert_allclose(middle, np.sin(psi / 2) / np.sin(psi) * (a + b), atol=1e-6)
    assert np.linalg.norm(middle) == pytest.approx(np.linalg.norm(a), rel=0.05)


def test_manifests_of_both_schemas_are_read_from_their_files(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    first, second = ((tmp_path / f"{name}.json").read_text() for name in ("first", "second"))
    of_file, old, new = in_node([("onnx", str(tmp_path / "model.onnx")), ("manifest", first), ("manifest", second)])
    label = {"name": "label", "kind": "class", "classes": 3, "names": ["a", "b", "c"]}
    assert old["conditions"] == [label]
    assert (old["shape"], old["data"], old["sigmas"]) == ([1, 4, 4], "image", MANIFEST["sigmas"])
    views = {"name": "views", "kind": "tensor", "shape": [3, "height", "views_2"]}
    assert new["conditions"] == of_file["conditions"] == [label, views]
    assert of_file["selftest"]["at"] == [0, 3]


def test_a_wrong_manifest_is_refused_by_its_key() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"schema": "cmfast/3"}, 'has schema "cmfast/3", this page reads cmfast/1 and cmfast/2'),
        ({"kind": "teacher"}, "wrong kind"),
        ({"kind": "sampler"}, "wrong sigmas"),
        ({"shape": [1, 0, 4]}, "wrong shape"),
        ({"sigmas": {"2": [0.8, 80.0]}}, "wrong sigmas"),
        ({"renoise": "some"}, "wrong renoise"),
        ({"conditions": [{"name": "label", "kind": "class", "classes": 0}]}, "wrong condition label"),
        ({"conditions": [{"name": "label", "kind": "class", "classes": 3, "null": 4}]}, "wrong condition label"),
        ({"conditions": [{"name": "x y", "kind": "tensor"}]}, "wrong conditions"),
        ({"conditions": [{"kind": "tensor", "shape": []}]}, "wrong conditions"),
        ({"dtype": "int8"}, "wrong dtype"),
        ({"clip": 1}, "wrong clip"),
        ({"selftest": {"seed": 0}}, "wrong selftest"),
    ]
    results = in_node([("manifest", json.dumps(MANIFEST | changes)) for changes, _ in wrong])
    for (_, words), found in zip(wrong, results, strict=True):
        assert words in found["error"]
        assert found["error"].startswith("CmfastError")


@pytest.mark.parametrize("schema", ["first", "second"])
def test_a_key_that_python_needs_is_needed_by_the_page(schema: str, tmp_path: Path) -> None:
    """But for scaling and c_noise, which are in the graph: a default of its own would draw something else."""
    write_corpus(tmp_path)
    whole = json.loads((tmp_path / f"{schema}.json").read_text())
    keys = [key for key in whole if key not in ("scaling", "c_noise")]
    without = [{key: value for key, value in whole.items() if key != lost} for lost in keys]
    results = in_node([("manifest", json.dumps(each)) for each in [whole, *without]])
    assert "error" not in results[0]
    for lost, values, found in zip(keys, without, results[1:], strict=True):
        try:
            Manifest.from_json(json.dumps(values), "x")
        except CmfastError:
            assert "error" in found, lost
        else:
            assert "error" not in found, lost


# What the page does not interpret: it is in the graph, or only shown.
LENIENT = re.compile("scaling|c_noise|class_names|cost|parity|made_by|source|keyword")


def test_the_page_refuses_the_mutated_manifests_that_python_refuses(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    files = [(tmp_path / f"{name}.json").read_bytes() for name in ("first", "second")]
    files.append(json.dumps(MANIFEST | {"conditions": CONDITIONS[:2], "second_time": True}).encode())
    rng = random.Random(0)
    texts = [mutated(rng.choice(files), rng).decode() for _ in range(4000)]
    verdicts = [words_of_python(text) for text in texts]
    for text, words, found in zip(texts, verdicts, in_node([("manifest", text) for text in texts]), strict=True):
        if "error" in found:
            assert words, (text, found)
            assert found["error"].startswith("CmfastError: the manifest ")
        else:
            assert not words or LENIENT.search(words), (text, words)
    assert 200 < verdicts.count("") < 2000


def words_of_python(text: str) -> str:
    """Return why Python refuses a manifest, "" where it reads it."""
    try:
        Manifest.from_json(text, "x")
    except ArtifactError as err:
        return str(err)
    return ""


def test_a_key_that_is_there_twice_is_refused_as_in_python() -> None:
    """JSON.parse takes the last one; a reader that takes the first would compute something else."""
    text = json.dumps(MANIFEST | {"conditions": [{"name": "a", "kind": "tensor", "shape": []}]})
    twice = [
        (text.replace('"clip":', '"clip": true, "clip":'), '"clip"'),
        (text.replace('"clip":', '"cl\\u0069p": true, "clip" :'), '"clip"'),  # the same key, written otherwise
        (text.replace('"name": "a"', '"name": "b", "name": "a"'), '"name"'),  # in an object within a list
        (text.replace('"clip":', '"unknown": {"\\"": [{}, "{"], "\\"": 0}, "clip":'), '"\\""'),
    ]
    once = text.replace('"clip":', '"x": {"clip": [{"a": ":"}, {"a": "clip"}], "y": "clip"}, "clip":')
    *refused, read = in_node([("manifest", given) for given in [*(each for each, _ in twice), once]])
    for (given, key), found in zip(twice, refused, strict=True):
        assert found["error"] == f"CmfastError: the manifest has the key {key} twice; export the model again"
        with pytest.raises(CmfastError, match="twice"):
            Manifest.from_json(given, "x")
    assert read["clip"] == Manifest.from_json(once, "x").spec.clip


def test_what_is_no_whole_exported_file_is_refused(tmp_path: Path) -> None:
    whole = write_denoiser(tmp_path / "model.onnx").read_bytes()
    files = {
        "cut": whole[:-20],
        "text": b"<!doctype html>",
        "other": whole.replace(b"cmfast", b"cmfost", 1),
        "two": whole + whole[whole.rindex(b"\x0a\x06cmfast") - 3 :],
        "empty": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    results = in_node([("onnx", str(tmp_path / name)) for name in files])
    assert all("CmfastError" in each["error"] for each in results), results
    assert "the file holds two manifests" in results[list(files).index("two")]["error"]


CONDITIONS = [
    {"name": "label", "kind": "class", "classes": 3, "null": 3},
    {"name": "state", "kind": "tensor", "shape": [2, 3]},
    {"name": "views", "kind": "tensor", "shape": [1, "height", None]},
]
GIVEN = {"state": [[1, 2, 3], [4, 5, 6.5]], "views": [[[1, 2, 3, 4], [5, 6, 7, 8.25]]]}


def test_models_draw_what_python_draws_with_every_kind_of_condition(tmp_path: Path) -> None:
    runtime = need_runtime()
    plain = write_denoiser(tmp_path / "plain.onnx")
    flow = write_denoiser(tmp_path / "flow.onnx", {"second_time": True, "renoise": "ddim", "clip": False})
    given = write_denoiser(tmp_path / "given.onnx", {"conditions": CONDITIONS})
    array = write_denoiser(tmp_path / "array.onnx", {"shape": [5, 3], "data": "array"})
    arrays = {name: np.array(value, np.float32) for name, value in GIVEN.items()}
    cases: list[tuple[Path, dict[str, Any], dict[str, Any]]] = [
        (plain, {"seed": 3, "sample": 2, "steps": 3}, {}),
        (flow, {"seed": 3, "steps": 3}, {}),
        (array, {"seed": SEED}, {}),
        (
            given,
            {"seed": 4, "sample": 1, "steps": 2, "conditions": GIVEN},
            {"conditions": arrays},
        ),  # the label is drawn
        (
            given,
            {"seed": 4, "conditions": GIVEN | {"label": 3}},
            {"conditions": arrays, "label": 3},
        ),  # that of no class
    ]
    calls: list[tuple[str, Any]] = [
        ("draw", asked | {"file": str(file), "seed": str(asked["seed"])}) for file, asked, _ in cases
    ]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "needs the condition state"),
        (GIVEN | {"label": 4}, "label 4 is out of range"),
        (GIVEN | {"state": [1, 2]}, "condition state must be [2, 3], got [2]"),
        (GIVEN | {"state": [[1, 2, 3], [4, 5]]}, "condition state must be [2, 3]"),
        (GIVEN | {"colour": 1}, 'no condition "colour"'),
    ]
    calls += [("draw", {"file": str(given), "seed": "0", "conditions": values}) for values, _ in wrong]
    calls += [("draw", {"file": str(plain), "seed": "0", "steps": 7})]
    found = in_node(calls, runtime)
    for (file, asked, more), drawn in zip(cases, found, strict=False):
        model = load(file)
        one = model.sample_float(1, steps=asked.get("steps"), seed=asked["seed"], first=asked.get("sample", 0), **more)
        # x / (1 + sigma) and means: one rounding more or less at most
        np.testing.assert_allclose(decode(drawn, np.float32), one.ravel(), atol=1e-6, err_msg=str((file.name, asked)))
    for (_, words), got in zip(wrong, found[len(cases) :], strict=False):
        assert words in got["error"]
    assert "default noise levels for these numbers of steps: 1, 2, 3; got 7" in found[-1]["error"]


def test_a_sampler_file_gets_the_noise_of_every_step_in_order(tmp_path: Path) -> None:
    runtime = need_runtime()
    manifest = MANIFEST | {"kind": "sampler", "sigmas": {"2": [80.0, 0.8]}}
    nodes = [
        helper.make_node("Gather", ["noise", "first"], ["a"], axis=0),
        helper.make_node("Gather", ["noise", "second"], ["b"], axis=0),
        helper.make_node("Sub", ["a", "b"], ["images"]),
    ]
    indices = [helper.make_tensor(name, TensorProto.INT64, [], [i]) for i, name in enumerate(("first", "second"))]
    ports = value("noise", [2, "B", 1, 4, 4]), value("images", ["B", 1, 4, 4])
    graph = helper.make_graph(nodes, "sampler", [ports[0]], [ports[1]], indices)
    file = save(tmp_path / "sampler.onnx", graph, manifest)
    drawn, refused = in_node(
        [
            ("draw", {"file": str(file), "seed": "9", "sample": 3}),
            ("draw", {"file": str(file), "seed": "9", "steps": 1}),
        ],
        runtime,
    )
    np.testing.assert_array_equal(decode(drawn, np.float32), load(file).sample_float(1, seed=9, first=3).ravel())
    assert "for these numbers of steps: 2; got 1" in refused["error"]


def test_the_driver_knows_the_version_that_the_tests_fetch() -> None:
    from cmfast_export.targets.web.runtime import PACKAGE, TESTED

    assert f"wanted={PACKAGE}@{TESTED} " in (TESTS / "web" / "tools.sh").read_text()
