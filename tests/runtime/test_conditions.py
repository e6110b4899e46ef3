# SPDX-License-Identifier: MIT
"""Models of any shape with named conditions: what callers pass, what a file computes, what the commands write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import cmfast
from cmfast import CmfastError, Condition, ModelSpec, class_label
from cmfast.cli import info, sample
from cmfast.conditions import condition_values, some_values
from cmfast.formats.manifest import Manifest
from helpers.graphs import sampled, write_denoiser

STATE = {"name": "state", "kind": "tensor", "shape": [14]}
TEXT = {"name": "text", "kind": "tensor", "shape": ["words", 8]}
LABEL = {"name": "label", "kind": "class", "classes": 5, "class_names": ["up", "down", "left", "right", "stay"]}
ARRAYS = {"data": "array", "clip": False, "renoise": "sqrt"}
RNG = np.random.default_rng(5)
VALUES: dict[str, Any] = {
    "state": RNG.normal(size=(6, 14)).astype(np.float32), "text": RNG.normal(size=(6, 11, 8)).astype(np.float32),
    "label": [4, 0, 1, 2, 3, 3],
}  # fmt: skip


def offset(names: list[str]) -> Any:
    """Return what the conditions add in a denoiser of `helpers.graphs`, [6]."""
    parts = [np.asarray(VALUES[n]) / 16 if n == "label" else VALUES[n].reshape(6, -1).mean(axis=1) for n in names]
    return sum(parts, np.zeros(6))


@pytest.mark.parametrize(
    ("shape", "conditions"),
    [([7], [STATE]), ([16, 7], [STATE, TEXT]), ([3, 4, 5], [LABEL, STATE]), ([2, 3, 4, 5], [TEXT]), ([16, 7], [])],
    ids=["vector", "actions", "class and vector", "volume", "no condition"],
)
@pytest.mark.parametrize("second_time", [False, True])
@pytest.mark.parametrize("renoise", ["sqrt", "ddim"])
def test_a_model_of_any_shape_and_conditions_is_sampled_as_the_formulas_say(
    shape: list[int], conditions: list[dict[str, Any]], second_time: bool, renoise: str, tmp_path: Path
) -> None:
    changes = {**ARRAYS, "shape": shape, "conditions": conditions, "second_time": second_time, "renoise": renoise}
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx", changes))
    names = [each["name"] for each in conditions]
    given = {name: VALUES[name] for name in names}
    samples = model.sample(6, steps=3, seed=4, conditions=given, batch=4)
    assert (samples.dtype, samples.shape) == (np.float32, (6, *shape))
    z = np.stack([cmfast.gaussian(4, range(6), step, shape) for step in range(3)])
    np.testing.assert_allclose(samples, sampled(z, changes, 3, offset(names)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.from_noise(z, model.sigmas_for(3), conditions=given), samples)
    np.testing.assert_array_equal(model.sample_float(6, steps=3, seed=4, conditions=given), samples)


def test_one_value_serves_all_samples_and_a_label_is_drawn_or_passed_either_way(tmp_path: Path) -> None:
    changes = {**ARRAYS, "shape": [16, 7], "conditions": [LABEL, STATE]}
    model, state = cmfast.load(write_denoiser(tmp_path / "model.onnx", changes)), VALUES["state"][0]
    one = model.sample(6, conditions={"state": state, "label": "left"})
    each = model.sample(6, conditions={"state": np.tile(state, (6, 1))}, label=[2] * 6)
    np.testing.assert_array_equal(one, each)
    drawn = model.labels(6)
    assert drawn is not None
    np.testing.assert_array_equal(
        model.sample(6, conditions={"state": state}), model.sample(6, conditions={"state": state, "label": drawn})
    )


def test_a_flow_map_is_given_the_next_noise_level(tmp_path: Path) -> None:
    changes = {**ARRAYS, "shape": [3], "second_time": True}
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx", changes))
    x = np.ones((2, 3), np.float32)
    np.testing.assert_allclose(model.denoise(x, 1.0, sigma_next=[0.5, 0.25])[:, 0], [0.4375, 0.46875])
    np.testing.assert_array_equal(model.denoise(x, 1.0), model.denoise(x, 1.0, sigma_next=0.0))
    for wrong in (1.0, -0.1, [0.5], "low", float("nan")):
        with pytest.raises(CmfastError, match="sigma_next must be"):
            model.denoise(x, 1.0, sigma_next=wrong)  # type: ignore[arg-type]
    with pytest.raises(CmfastError, match="flow map: sample it in few steps"):
        model.sample_heun(1)
    plain = cmfast.load(write_denoiser(tmp_path / "plain.onnx", {**ARRAYS, "shape": [3]}))
    with pytest.raises(CmfastError, match="sigma_next is for flow maps"):
        plain.denoise(x, 1.0, sigma_next=0.5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, r"this model needs the condition state: float32 \[B, 14\]"),
    ({"state": VALUES["state"]}, r"needs the condition text: float32 \[B, words, 8\]"),
    ({"state": 0, "text": VALUES["text"]}, r"condition state must be \[14\] for all or \[6, 14\], got \[\]"),
    ({"state": np.zeros((6, 13)), "text": 0}, r"condition state must be \[14\], got \[6, 13\]"),
    ({"state": np.zeros((5, 14)), "text": 0}, r"must be \[14\] for all or \[6, 14\], got \[5, 14\]"),
    ({"state": "a.npy", "text": 0}, "condition state must be an array of numbers"),
    ({"state": np.full(14, np.nan), "text": 0}, "condition state has values that are not finite"),
    ({"state": np.full(14, 1e300), "text": 0}, "condition state has values that float32 cannot hold"),
    ({"state": np.zeros(14, complex), "text": 0}, "condition state must be an array of numbers"),
    ({"state": np.zeros(14), "text": np.zeros((6, 0, 8))}, r"condition text must be \[words, 8\], got \[6, 0, 8\]"),
    ({"state": np.zeros(14), "txt": 0}, "no condition 'txt'; it has state, text"),
    ({"state": np.zeros(14), "text": VALUES["text"], "label": 1}, "has no classes; it has state, text"),
]


@pytest.mark.parametrize(("given", "words"), BAD, ids=range(len(BAD)))
def test_a_wrong_condition_is_one_line_that_names_it(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    changes = {**ARRAYS, "shape": [16, 7], "conditions": [STATE, TEXT]}
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx", changes))
    for call in (
        lambda: model.sample(6, conditions=given),
        lambda: model.from_noise(np.zeros((1, 6, 16, 7), np.float32), (80.0,), conditions=given),
        lambda: model.denoise(np.zeros((6, 16, 7), np.float32), 1.0, conditions=given),
    ):
        with pytest.raises(CmfastError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_sizes_of_one_name_must_be_equal() -> None:
    conditions = (Condition(name="audio", shape=("time", 2)), Condition(name="mask", shape=("time",)))
    fits = condition_values(conditions, {"audio": np.zeros((3, 2)), "mask": np.ones(3)}, 4)
    assert [value.shape for value in fits.values()] == [(4, 3, 2), (4, 3)]
    with pytest.raises(CmfastError, match="condition mask has time = 4, and audio has 3; the two must be the same"):
        condition_values(conditions, {"audio": np.zeros((3, 2)), "mask": np.ones(4)}, 4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x"}, "an identifier other than x, sigma"),
        ({"name": "noise"}, "an identifier other than"),
        ({"name": "a b"}, "an identifier other than .*got 'a b'"),
        ({"name": "class"}, "an identifier other than"),
        ({"name": "é"}, "an identifier other than"),
        ({"name": "label", "shape": (3,)}, "this name is for a class"),
        ({"name": "s", "kind": "image"}, "kind must be class or tensor, got 'image'"),
        ({"name": "s", "shape": (0,)}, "sizes are whole numbers from 1 or names"),
        ({"name": "s", "shape": (2.0,)}, "sizes are whole numbers"),
        ({"name": "s", "shape": (1,) * 7}, "at most 6 sizes"),
        ({"name": "s", "classes": 3}, "a tensor has no classes"),
        ({"name": "s", "kind": "class"}, "classes must be a positive whole number, got 0"),
        ({"name": "s", "kind": "class", "classes": 2, "shape": (2,)}, "a class has no shape"),
    ],
)
def test_a_wrong_declaration_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        Condition(**values)


def test_a_class_may_have_one_number_more_that_stands_for_none(tmp_path: Path) -> None:
    label = class_label(5, null=5)
    assert (label.entries, class_label(5).entries, class_label(5, null=2).entries) == (6, 5, 5)
    assert Condition.from_dict(json.loads(json.dumps(label.to_dict()))) == label
    changes = {**ARRAYS, "shape": [3], "conditions": [label.to_dict()]}
    model = cmfast.load(write_denoiser(tmp_path / "model.onnx", changes))
    none = model.denoise(np.zeros((1, 3), np.float32), 1.0, 5)
    np.testing.assert_allclose(none, 5 / 16)
    drawn = model.labels(1000)
    assert drawn is not None
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}, "samples are drawn with a class"
    for wrong in (6, -1, 0.5, True, "5"):
        with pytest.raises(CmfastError, match="null must be a class from 0 to 5"):
            class_label(5, null=wrong)  # type: ignore[arg-type]
    with pytest.raises(CmfastError, match="null of the condition state must be a finite number"):
        Condition(name="state", shape=(3,), null=float("nan"))


def test_conditions_of_one_name_and_sizes_named_like_conditions_are_refused() -> None:
    state = Condition(name="state", shape=(3,))
    with pytest.raises(CmfastError, match="with different names"):
        ModelSpec(shape=(2,), conditions=(state, state))
    with pytest.raises(CmfastError, match="a dynamic size needs a name of its own, got 'state'"):
        ModelSpec(shape=(2,), conditions=(state, Condition(name="text", shape=("state",))))


def test_a_spec_with_everything_survives_its_manifest() -> None:
    conditions = (class_label(3, ("a", "b", "c")), Condition(name="text", shape=(None, 8)))  # type: ignore[arg-type]
    spec = ModelSpec(shape=(2, 3, 4, 5), conditions=conditions, second_time=True, c_noise="trig", clip=False)
    assert (spec.data, spec.classes, spec.class_names) == ("array", 3, ("a", "b", "c"))
    manifest = Manifest(kind="denoiser", spec=spec)
    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    assert [(each.name, each.shape) for each in manifest.inputs] == [
        ("x", ("batch", 2, 3, 4, 5)), ("sigma", ("batch",)), ("sigma_next", ("batch",)), ("label", ("batch",)),
        ("text", ("batch", "text_0", 8)),
    ]  # fmt: skip
    with pytest.raises(CmfastError, match=r"needs a model of images; this one draws arrays of \[2, 3, 4, 5\]"):
        spec.image  # noqa: B018


def test_values_for_timing_are_those_of_the_seed_whatever_the_batch() -> None:
    conditions = (class_label(7), Condition(name="text", shape=("words", 2)))
    whole, part = some_values(conditions, 5, seed=3), some_values(conditions, 2, seed=3, first=3)
    for name, value in whole.items():
        np.testing.assert_array_equal(value[3:], part[name])
    np.testing.assert_array_equal(whole["label"], cmfast.noise.labels(3, range(5), 7))
    assert np.std(whole["text"]) > 0.5


def test_two_classes_are_drawn_independently_so_that_a_swapped_pair_shows() -> None:
    conditions = (
        Condition(name="a", kind="class", classes=5),
        class_label(5),
        Condition(name="b", kind="class", classes=5),
    )
    drawn = some_values(conditions, 200)
    np.testing.assert_array_equal(drawn["label"], cmfast.noise.labels(0, range(200), 5))
    for one, other in (("a", "b"), ("a", "label"), ("b", "label")):
        assert 20 < int((drawn[one] == drawn[other]).sum()) < 60, "a fifth agrees by chance"


def test_the_number_of_no_condition_is_a_plain_one() -> None:
    null = Condition(name="state", shape=(2,), null=np.float32(0))  # type: ignore[arg-type]
    assert json.dumps(null.to_dict()) == '{"name": "state", "kind": "tensor", "shape": [2], "null": 0.0}'


# The commands.


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A model of actions [16, 7] with a state, a text of any length and a class."""
    changes = {**ARRAYS, "shape": [16, 7], "conditions": [STATE, TEXT, {**LABEL, "name": "task"}]}
    return write_denoiser(tmp_path / "policy.onnx", changes)


def test_the_command_samples_with_conditions_and_writes_arrays(
    policy: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "text.npy", VALUES["text"][1])
    state = ",".join(map(str, VALUES["state"][0].tolist()))
    given = ["--condition", f"state={state}", "--condition", f"text={tmp_path / 'text.npy'}"]
    given += ["--condition", "task=left"]
    want = cmfast.load(policy).sample(
        3, seed=9, conditions={"state": VALUES["state"][0], "text": VALUES["text"][1], "task": 2}
    )
    for name in ("a.npz", "a.npy"):
        result = call(sample.main, policy, "-n", 3, "--seed", 9, *given, "-o", tmp_path / name)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert "3 sample(s), 1 step(s) at 80" in result.stdout
        got = np.load(tmp_path / name)
        np.testing.assert_allclose(got["arr_0"] if name == "a.npz" else got, want, rtol=0, atol=1e-6)  # decimal state


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "this model needs the condition state"),
        (["--condition", "state"], "expected NAME=VALUE"),
        (["--condition", "speed=1"], "--condition 'speed': the model has no such condition; it has state, text, task"),
        (["--condition", "state=1,x"], "need a file NAME.npy or numbers such as 0.5,1"),
        (["--condition", "state=gone.npy"], "gone.npy: no such file"),
        (["--condition", "state=bad.npy"], "bad.npy: not a .npy file; numpy.save writes one"),
        (["--condition", "state=objects.npy"], "objects.npy: an array of Python objects, which are never read; save"),
        (["--condition", "state=zip.npy"], "zip.npy: not a .npy file; numpy.save writes one"),
        (["--condition", "state=cut.npy"], "cut.npy: not a whole .npy file"),
        (["--condition", "state=1", "--condition", "state=2"], "--condition state: given twice"),
        (["--condition", "state=1,2"], "condition state must be [14], got [2]"),
        (["--condition", "task=west"], "this model needs the condition state"),
        (["--label", "1"], "a label was given, but the model has no classes; it has state, text, task"),
        (["-o", "grid.png"], "these samples are not images; write arrays"),
        (["-o", "folder"], "these samples are not images; write arrays"),
    ],
    ids=str,
)
def test_a_wrong_condition_on_the_command_line_is_one_line_and_writes_nothing(
    arguments: list[str], words: str, policy: Path, call: Callable[..., Any], refused: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.npy").write_bytes(b"no array")
    np.save("objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    np.savez("zip.npz", np.zeros(14))
    Path("zip.npz").rename("zip.npy")
    np.save("whole.npy", np.zeros(14))
    Path("cut.npy").write_bytes(Path("whole.npy").read_bytes()[:-8])
    before = sorted(tmp_path.iterdir())
    refused(call(sample.main, policy, *arguments), words)
    assert sorted(tmp_path.iterdir()) == before


def test_info_tells_shape_conditions_and_second_time(policy: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    said = call(info.main, policy).stdout
    assert "shape        16 x 7 (array)" in said
    assert "condition    state: float32 [B, 14]" in said
    assert "condition    text: float32 [B, words, 8]" in said
    assert "condition    task: a class from 0 to 4" in said
    assert "classes" not in said
    costly = write_denoiser(tmp_path / "costly.onnx", ARRAYS)
    file = onnx.load(costly)
    (entry,) = file.metadata_props
    entry.value = json.dumps(json.loads(entry.value) | {"cost": {"flops": 1200.0}})
    onnx.save(file, costly)
    assert "a sample     flops 1,200" in call(info.main, costly).stdout
    flow = write_denoiser(tmp_path / "flow.onnx", {**ARRAYS, "shape": [2], "second_time": True})
    assert "second time  sigma_next: a flow map" in call(info.main, flow).stdout
    assert json.loads(call(info.main, policy, "--json").stdout)["conditions"][0] == STATE
