# SPDX-License-Identifier: MIT
# ruff: noqa: PT017  # whether it raises is what the last test looks at
"""What callers pass is checked where it enters: one CmfastError before the work, whatever the type."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cmfast
from cmfast import checks
from cmfast.checks import NotFinite
from cmfast.conditions import Condition
from cmfast.errors import BackendError, CmfastError
from cmfast.formats.manifest import Manifest
from cmfast.images import MAX_GRID_PIXELS, check_images, check_output
from cmfast.model import Model
from cmfast.noise import labels
from cmfast.sampling import Churn
from cmfast.spec import ModelSpec
from helpers.specs import image_spec

NAMES = ("cat", "dog", "car")
WRONG = ["8", None, True, [[80]], {}, object(), 1j, math.nan, math.inf, -1, 10**5000, np.zeros((2, 2)), b"8"]


class Scaled:
    """A backend in numpy: denoised = factor x; also of samplers."""

    batch: int | None = None
    name = "numpy"

    def __init__(self, factor: float = 0.01, kind: str = "denoiser", **values: Any) -> None:
        spec = image_spec(**{"image": (1, 2, 2), **values})
        if kind != "denoiser":
            spec = dataclasses.replace(spec, sigmas={2: (80.0, 0.8)})
        self.manifest, self.factor, self.calls = Manifest(kind=kind, spec=spec), np.float32(factor), 0

    def run(self, inputs: Any) -> npt.NDArray[np.float32]:
        self.calls += 1
        x = inputs["x"] if "x" in inputs else inputs["noise"][0]
        return np.asarray(x * self.factor)


class Looped(Scaled):
    """A LoopBackend."""

    def loop(self, noise: Any, sigmas: Any, label: Any) -> npt.NDArray[np.float32]:
        assert all(type(sigma) is float for sigma in sigmas)
        return np.asarray(noise[0] * self.factor)


def model(factor: float = 0.01, **values: Any) -> Model:
    return Model(Scaled(factor, **values))


X = np.ones((2, 1, 2, 2), np.float32)
Z = np.ones((2, 3, 1, 2, 2), np.float32)


# Noise levels.


@pytest.mark.parametrize("sigma", [0.0, -1, math.nan, math.inf, 1e-50, 113.2, [1.0, 0.0], [1.0, math.nan], np.zeros(2)])
def test_a_noise_level_that_no_model_denoises_is_one_error_that_says_what_is_allowed(sigma: Any) -> None:
    with pytest.raises(CmfastError, match=r"noise level \S+ cannot be denoised: .* takes 0 < sigma <= 113\.137"):
        model().denoise(X, sigma)


@pytest.mark.parametrize("sigma", ["80", None, True, 1j, [1, 2, 3], [[1.0]], ["a", 1], object(), [None, 1]])
def test_what_is_no_noise_level_is_an_error_and_no_traceback(sigma: Any) -> None:
    with pytest.raises(CmfastError, match="sigma must be"):
        model().denoise(X, sigma)


@pytest.mark.parametrize(
    "sigma", [80, np.float64(80), np.array(80.0), [80, 1], (0.002, 0.001), np.float32(2**0.5 * 80)]
)
def test_noise_levels_of_any_number_type_up_to_those_of_churn_are_denoised(sigma: Any) -> None:
    np.testing.assert_array_equal(model().denoise(X, sigma), X * np.float32(0.01))


@pytest.mark.parametrize("backend", [Scaled(), Looped(), Scaled(kind="sampler")], ids=["denoiser", "loop", "sampler"])
@pytest.mark.parametrize(
    "sigmas", [(80, math.nan), (0.8, 80), (80, 80), (80, -1), (80, 0.001), "80", 80.0, None, (), ("a", 1), [True, 1]]
)
def test_from_noise_refuses_levels_that_do_not_fall_whatever_runs_the_model(backend: Scaled, sigmas: Any) -> None:
    before = backend.calls
    with pytest.raises(CmfastError, match=r"noise level|sampler of 2 step"):
        Model(backend).from_noise(Z, sigmas)
    assert backend.calls == before


@pytest.mark.parametrize("backend", [Scaled(), Looped(), Scaled(kind="sampler")], ids=["denoiser", "loop", "sampler"])
def test_float64_levels_are_the_same_levels_for_every_backend(backend: Scaled) -> None:
    got = Model(backend).from_noise(Z, np.array([80, 0.8]))  # type: ignore[arg-type]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, Model(backend).from_noise(Z, (80.0, 0.8)))


@pytest.mark.parametrize("sigmas", ["8", 8, [80, math.nan], [1, 2], [80, -1], [80, 0.001], [], None, [True]])
def test_the_few_step_loop_and_model_sample_refuse_the_same_levels(sigmas: Any) -> None:
    with pytest.raises(CmfastError, match="noise levels must"):
        cmfast.sample(lambda x, sigma: x, Z, sigmas, image_spec(image=(1, 2, 2)))
    if sigmas is not None:
        with pytest.raises(CmfastError, match="noise level"):
            model().sample(1, sigmas=sigmas)


def test_more_levels_than_anyone_waits_for_are_refused_before_the_first_call() -> None:
    backend = Scaled()
    for ask in (
        lambda: Model(backend).sample(1, sigmas=np.linspace(80, 1, 10**6)),  # type: ignore[arg-type]
        lambda: Model(backend).sample(1, steps=10**9),
        lambda: Model(backend).sample_heun(1, steps=10**8),
        lambda: cmfast.karras_sigmas(10**9),
    ):
        with pytest.raises(CmfastError, match=r"10000|1048576"):
            ask()
    assert backend.calls == 0


# Numbers and memory.


@pytest.mark.parametrize("name", ["n", "batch", "first", "seed", "steps"])
@pytest.mark.parametrize("value", [each for each in WRONG if each is not None], ids=lambda each: type(each).__name__)
def test_a_number_of_the_wrong_type_or_size_is_named(name: str, value: Any) -> None:
    backend = Scaled()
    if name == "batch" and isinstance(value, int) and value > 1:
        return  # a larger batch than there are images is all of them
    with pytest.raises(CmfastError, match=r"whole number|at least 1|at most|of memory") as raised:
        Model(backend).sample(**{"n": 1, name: value})
    assert len(str(raised.value)) < 300
    assert backend.calls == 0


@pytest.mark.parametrize("value", [np.int64(2), np.uint8(2), np.array(2)])
def test_whole_numbers_of_numpy_are_whole_numbers(value: Any) -> None:
    want = model().sample_float(2, steps=2, seed=2, batch=2, first=2)
    np.testing.assert_array_equal(model().sample_float(value, steps=value, seed=value, batch=value, first=value), want)


@pytest.mark.parametrize("n", [10**14, 10**30])
def test_more_images_than_memory_holds_are_refused_with_both_sizes(n: int) -> None:
    for draw in (model().sample, model().sample_float, model(classes=3).sample, model().sample_heun):
        with pytest.raises(CmfastError, match=r"images \[1, 2, 2\] need .* of memory, and .* available; draw fewer"):
            draw(n)


def test_noise_labels_and_a_batch_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 2**30)
    backend = Scaled()
    backend.batch = 2**40
    for ask in (
        lambda: cmfast.gaussian(0, range(10**9), 0, (3, 64, 64)),
        lambda: labels(0, range(10**9), 10),
        lambda: model().sample_heun(10**5, steps=10_000, batch=10**5, churn=1),
        lambda: Model(backend).denoise(X, 1.0),
    ):
        with pytest.raises(CmfastError, match=r"of memory, and 1\.0 GiB are available"):
            ask()


def test_the_limit_of_a_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/meminfo": "MemAvailable: 4096 kB\n",
        "max": "3000000\n",
        "current": "2500000\n",
        "stat": "inactive_file 4\nactive_file 2\nslab_reclaimable 1\n",
    }
    monkeypatch.setattr(checks, "_read", lambda path: texts.get(path) or texts[path.rpartition(".")[2]])
    assert checks.available_memory() == 500_007
    texts["max"] = "max\n"
    assert checks.available_memory() == 4096 * 1024


def test_seeds_and_images_go_up_to_2_to_the_64() -> None:
    top, named = 2**64, model(classes=3)
    for first in (2**63 - 1, 2**63 - 2, top - 3):
        np.testing.assert_array_equal(
            named.sample_float(3, seed=top - 1, first=first, batch=2)[2:],
            named.sample_float(1, seed=top - 1, first=first + 2),
        )
        noise = cmfast.gaussian(0, range(first, first + 3), 0, (4,))
        np.testing.assert_array_equal(noise, [cmfast.gaussian(0, first + i, 0, (4,)) for i in range(3)])
        assert named.labels(3, first=first).tolist()[1:] == named.labels(2, first=first + 1).tolist()  # type: ignore[union-attr]
    with pytest.raises(CmfastError, match=r"first \+ n must be at most 2\*\*64"):
        named.sample(4, first=top - 3)
    np.testing.assert_array_equal(cmfast.gaussian(0, range(5, 0, -2), 0, (4,)), cmfast.gaussian(0, [5, 3, 1], 0, (4,)))


def test_labels_do_not_depend_on_how_the_images_are_split() -> None:
    named = model(classes=3)
    whole = named.labels(9, seed=4)
    assert whole is not None
    for cut in range(10):
        parts = [named.labels(cut, seed=4), named.labels(9 - cut, seed=4, first=cut)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)  # type: ignore[arg-type]


# Empty batches.


@pytest.mark.parametrize("backend", [Scaled(classes=3), Looped(classes=3), Scaled(kind="sampler", classes=3)])
def test_an_empty_batch_gives_an_empty_array_and_calls_nothing(backend: Scaled) -> None:
    none = Model(backend)
    empty = none.from_noise(Z[:, :0], (80.0, 0.8), np.zeros(0, np.int64))
    assert (empty.shape, empty.dtype) == ((0, 1, 2, 2), np.float32)
    if backend.manifest.kind == "denoiser":
        assert none.denoise(X[:0], 80.0, 1).shape == (0, 1, 2, 2)
        assert none.denoise(X[:0], [], []).shape == (0, 1, 2, 2)
    assert backend.calls == 0
    assert cmfast.gaussian(0, [], 0, (3, 2)).shape == (0, 3, 2)
    with pytest.raises(CmfastError, match=r"noise level 0 cannot|sampler graph has no denoiser"):
        none.denoise(X[:0], 0.0, 1) if backend.manifest.kind != "denoiser" else none.denoise(X[:1], 0.0, 1)


# What models return.


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_output_that_is_not_finite_is_a_failed_check_with_the_noise_level(factor: float) -> None:
    for ask, level in (
        (lambda: model(factor).sample(3, steps=2), "80"),
        (lambda: model(factor).sample_heun(3, steps=2), "80"),
        (lambda: model(factor).denoise(X, [3.5, 1.0]), "3.5, 1"),
        (lambda: model(factor, kind="sampler").sample(1), "80, 0.8"),
        (lambda: Model(Looped(factor)).sample(1, steps=2), "80, 0.8"),
    ):
        with pytest.raises(
            NotFinite, match=rf"numpy returned values that are not finite .* at noise level {level};"
        ) as raised:
            ask()
        assert raised.value.exit_code == 1


def test_infinity_is_not_clipped_to_white() -> None:
    with np.errstate(invalid="ignore"):
        x0 = cmfast.sample(lambda x, sigma: np.full_like(x, np.inf), Z, (80, 0.8), image_spec(image=(1, 2, 2)))
    assert np.isnan(x0).all()


def test_input_that_is_not_finite_is_the_callers() -> None:
    with pytest.raises(CmfastError, match="x has values that are not finite") as raised:
        model().denoise(X * np.float32(math.nan), 1.0)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("wrong", [np.zeros((1, 2, 2), np.float32), np.float32(1), np.zeros(X.shape), None])
def test_output_of_another_shape_or_type_is_an_error(wrong: Any) -> None:
    backend = Scaled()
    backend.run = lambda inputs: wrong  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"numpy returned .*, and its manifest promises float32 \[2, 1, 2, 2\]"):
        Model(backend).denoise(X, 1.0)


# Classes by name.


def test_classes_go_by_name_by_number_or_both() -> None:
    named = model(classes=3, class_names=NAMES)
    for label, want in (
        ("dog", [1, 1]), (["car", "cat"], [2, 0]), (["dog", 2], [1, 2]),
        (("2", "+0"), [2, 0]), (np.array(["cat", "car"]), [0, 2]),
        (np.int64(2), [2, 2]), (np.array(1), [1, 1]),
    ):  # fmt: skip
        assert named.labels(2, label=label).tolist() == want  # type: ignore[union-attr, arg-type]
    np.testing.assert_array_equal(named.denoise(X, 1.0, "dog"), named.denoise(X, 1.0, 1))


@pytest.mark.parametrize(
    ("label", "words"),
    [("dig", "label 'dig' is not a class of this model; it has dog, cat, car, or 0"), (["cat", "Dog"], "it has dog,"),
     ("3", "label 3 is out of range"),
     ("²", "'²' is not a class"), (True, "label must be"), (1.0, "label must be"),

     ([10**30, 0], "is out of range"), (["cat"], "one class or 2"),
     (["cat", None], "label must be"), ({}, "label must be"),
     ([[0, 1]], "label must be"), ("", "'' is not a class")],
    ids=str,
)  # fmt: skip
def test_a_label_that_is_no_class_is_named_with_the_nearest(label: Any, words: str) -> None:
    with pytest.raises(CmfastError) as raised:
        model(classes=3, class_names=NAMES).labels(2, label=label)
    assert words in str(raised.value)


def test_a_name_that_is_the_number_of_another_class_is_not_guessed() -> None:
    numbers = model(classes=3, class_names=("1", "2", "7"))
    with pytest.raises(
        CmfastError, match=r"'1' is the name of class 0 and the number of the class '2'; write .0 .* or .1"
    ):
        numbers.labels(1, label="1")
    found = [numbers.labels(1, label=label).tolist() for label in (1, "+1", "7", "0")]  # type: ignore[union-attr, arg-type]
    assert found == [[1], [1], [2], [0]]


# Images.


@pytest.mark.parametrize("channels", [2, 5, 6])
def test_channels_that_a_png_lacks_are_refused_before_and_go_into_arrays(channels: int, tmp_path: Path) -> None:
    for name in ("grid.png", "folder"):
        with pytest.raises(CmfastError, match=rf"a PNG has 1, 3 or 4 channels and these images have {channels}; .*npz"):
            check_images(tmp_path / name, 1, (channels, 8, 8))
    check_images(tmp_path / "a.npz", 10**12, (channels, 8, 8))
    cmfast.save_images(tmp_path / "a.NPZ", np.zeros((2, 8, 8, channels), np.uint8))
    with np.load(tmp_path / "a.NPZ") as arrays:
        assert arrays["arr_0"].shape == (2, 8, 8, channels)


def test_a_grid_that_no_program_opens_is_refused() -> None:
    check_images("a.png", 50_000, (3, 32, 32))
    with pytest.raises(CmfastError, match=f"at most {MAX_GRID_PIXELS:,}"):
        check_images("a.png", 10**12, (3, 64, 64))


@pytest.mark.parametrize(
    ("name", "kind"), [("GRID.PNG", ".png"), ("a.Npz", ".npz"), ("run_0.8", ""), ("v1.2.3", ""), ("epoch.best", "")]
)
def test_a_suffix_is_known_in_any_case_and_other_names_are_folders(name: str, kind: str, tmp_path: Path) -> None:
    assert check_output(tmp_path / name) == kind
    cmfast.save_images(tmp_path / name, np.zeros((2, 4, 4, 1), np.uint8))
    assert (tmp_path / name).is_dir() == (kind == "")


@pytest.mark.parametrize("name", ["x.JPG", "x.jpeg", "x.gif", "x.npy", "m.onnx", "m.pt", ".png", "", 5, None, b"a.png"])
def test_other_types_of_files_are_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match=r"NAME.png \(a grid\), NAME.npz, or a folder; got"):
        check_output(name if name in ("", None, 5, b"a.png") else tmp_path / name)


@pytest.mark.parametrize(
    ("images", "labels"),
    [(None, None), ("x", None), ([[1]], None), (np.zeros((0, 2, 2, 1), np.uint8), None),
     (np.zeros((2, 2, 1), np.uint8), None),
     (np.zeros((2, 2, 2, 1)), None), (np.zeros((2, 2, 2, 1), np.uint8), [1]),
     (np.zeros((2, 2, 2, 1), np.uint8), ["a", "b"])],
)  # fmt: skip
def test_what_is_no_image_or_label_is_not_written(images: Any, labels: Any, tmp_path: Path) -> None:
    with pytest.raises(CmfastError, match="must be"):
        cmfast.save_images(tmp_path / "a.npz", images, labels)
    assert not list(tmp_path.iterdir())


# The other public names.


@pytest.mark.parametrize("value", WRONG, ids=lambda each: type(each).__name__)
def test_no_public_name_answers_a_wrong_type_with_a_traceback(value: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: model().denoise(value, 1.0),
        lambda: model().from_noise(value, (80.0,)),
        lambda: cmfast.gaussian(value, 0, 0, (2,)),
        lambda: cmfast.gaussian(0, value, 0, (2,)),
        lambda: cmfast.gaussian(0, 0, value, (2,)),
        lambda: cmfast.gaussian(0, 0, 0, value),
        lambda: cmfast.karras_sigmas(value),
        lambda: cmfast.karras_sigmas(3, value),
        lambda: cmfast.karras_sigmas(3, rho=value),
        lambda: cmfast.load(value),
        lambda: cmfast.load("a.onnx", threads=0 if value is None else value),
        lambda: cmfast.load("a.onnx", variant=value),
        lambda: ModelSpec(shape=value),
        lambda: ModelSpec(shape=(1, 2, 2), data=value),
        lambda: ModelSpec(shape=(1, 2, 2), conditions=value),
        lambda: ModelSpec(shape=(1, 2, 2), second_time=value),
        lambda: Condition(name=value, shape=(2,)),
        lambda: Condition(name="state", kind=value),
        lambda: Condition(name="state", shape=value),
        lambda: Condition(name="label", kind="class", classes=value),
        lambda: model().sample(1, conditions=[] if value is None else value),
        lambda: image_spec(image=(1, 2, 2), sigma_max=value),
        lambda: image_spec(image=(1, 2, 2), sigmas=value),
        lambda: image_spec(image=(1, 2, 2), sigmas={1: value}),
        lambda: image_spec(image=(1, 2, 2), grid=40).sigmas_at(value),
        lambda: cmfast.sample(lambda x, sigma: x, value, (80.0,), image_spec(image=(1, 2, 2))),
        lambda: cmfast.sample(lambda x, sigma: x, Z[:1], (80.0,), value),
        lambda: Churn(s_noise=value),
        lambda: model().sample_heun(1, churn=value),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except CmfastError as err:
            assert len(str(err)) < 700, number
        else:
            passes = isinstance(value, (str, bytes, dict, bool, float)) and value not in (-1, math.nan)
            assert passes, number  # "8" is a file's name, {} no levels, True and inf are floats to somebody
