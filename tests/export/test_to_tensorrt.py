# SPDX-License-Identifier: MIT
"""Real engines, built by TensorRT-RTX without a GPU: every precision and kind, sizes, options, the cache."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cmfast.backends import tensorrt_library as library
from cmfast.conditions import class_label
from cmfast.errors import ArtifactError, BackendError, CheckFailed, CmfastError
from cmfast.files import atomic_file
from cmfast.formats.manifest import MAX_CHARACTERS, file_sha256, read_onnx
from cmfast.formats.tensorrt_plan import read_plan
from cmfast.formats.values import PRECISIONS
from cmfast_export import cli, conversion
from cmfast_export._options import parse_options
from cmfast_export.graphs.denoiser import denoiser_graph
from cmfast_export.graphs.sampler import sampler_graph
from cmfast_export.graphs.writer import write_with_manifest
from cmfast_export.targets import tensorrt_engine
from cmfast_export.targets.tensorrt_engine import build_engine
from cmfast_export.targets.tensorrt_options import BuildOptions
from cmfast_train.backends.pytorch import manifest_of
from cmfast_train.checkpoint import Checkpoint
from cmfast_train.config.presets import PRESETS
from cmfast_train.networks.adm import AdmConfig, AdmUnet, randomise
from cmfast_train.training.initial_model import network_config

rtx = pytest.importorskip("tensorrt_rtx")
Factory = Callable[..., Path]
LEVELS = (80.0, 0.8)
FEW_LAYERS = AdmConfig(
    image_size=8, channels=1, classes=10, model_channels=192, res_blocks=1, channel_mult=(1,), attention=(),
    head_channels=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """Return a factory of graphs of a network, random weights, not verified: that is test_export's subject.

    network  "few layers", which are as wide as those of a large network, or a preset
    """
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def make(name: str, precision: str, kind: str) -> Path:
        config = PRESETS["digits" if name == "few layers" else name]
        network = AdmUnet(FEW_LAYERS if name == "few layers" else network_config(config, 10))
        randomise(network)
        model = Checkpoint(spec=config.spec(10), network=network.config, weights=network.state_dict())
        manifest = replace(manifest_of(model), dtype=PRECISIONS[precision])
        graph = denoiser_graph(model.denoiser().to_precision(precision))
        names = {k: folder / f"{name}_{precision}_{k}.onnx" for k in ("denoiser", "sampler")}
        write_with_manifest(graph, manifest, new(names["denoiser"]))
        one = replace(manifest, kind="sampler", spec=replace(model.spec, sigmas={2: LEVELS}))
        write_with_manifest(sampler_graph(graph, LEVELS, model.spec), one, new(names["sampler"]))
        return names[kind]

    return make


def new(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("kind", ["denoiser", "sampler"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_digits_network_becomes_an_engine_with_a_dynamic_batch_that_describes_itself(
    precision: str, kind: str, onnx_file: Factory, tmp_path: Path
) -> None:
    onnx = onnx_file("digits", precision, kind)
    built = build_engine(onnx, tmp_path / "model.engine", BuildOptions(batch=(1, 8, 64)))
    manifest = read_plan(built.path)
    assert manifest == built.manifest
    assert (manifest.kind, manifest.dtype) == (kind, PRECISIONS[precision])
    about = manifest.engine
    assert about["library"] == "tensorrt_rtx"
    assert about["version"] == rtx.__version__
    assert about["compute_capability"][:4] == ["8.0", "8.6", "8.9", "12.0"]  # its documentation: from Ampere on
    assert about["cuda"] == "13"
    assert about["batch"] == [1, 8, 64]
    assert about["onnx_sha256"] == file_sha256(onnx)
    assert about["max_abs"].strip() == "not run"
    assert built.sha256 == file_sha256(built.path)
    assert not built.cached
    assert built.parity is None
    assert "no NVIDIA GPU can be used here" in built.not_run
    assert os.listdir(tmp_path) == ["model.engine"]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("few layers", "fp16"),
        *(pytest.param("mnist-large", precision, marks=pytest.mark.slow) for precision in ("fp32", "fp16")),
    ],
)
def test_two_steps_of_a_network_are_at_most_a_tenth_larger_than_one(
    name: str, precision: str, onnx_file: Factory, tmp_path: Path
) -> None:
    sizes = {}
    for kind in ("denoiser", "sampler"):
        onnx = onnx_file(name, precision, kind)
        sizes[kind] = build_engine(onnx, tmp_path / f"{kind}.engine", BuildOptions()).path.stat().st_size
        assert sizes[kind] > 0.9 * onnx.stat().st_size  # the weights are inside
    assert sizes["sampler"] <= 1.1 * sizes["denoiser"]


def test_a_name_that_is_not_utf_8_is_one_line(handmade_onnx: Factory, tmp_path: Path) -> None:
    onnx = tmp_path / os.fsdecode(b"m\xe9.onnx")
    shutil.copy(handmade_onnx(8), onnx)
    with pytest.raises(CmfastError, match=r"m\\udce9\.onnx: the library reads names in UTF-8 only; rename"):
        build_engine(onnx, tmp_path / "m.engine", BuildOptions())
    assert list(tmp_path.iterdir()) == [onnx]


def test_ctrl_c_ends_a_build_and_leaves_no_engine(
    handmade_onnx: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python raises it where the library calls back, and the library swallowed it: the engine was built anyway."""
    armed = []

    @contextmanager
    def build(trt: Any, config: Any) -> Iterator[None]:
        with library.ctrl_c_ends_build(trt, config):
            armed.append(True)
            yield

    class Log(type(library.make_logger(rtx))):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if armed and armed.pop():
                signal.raise_signal(signal.SIGINT)
            super().log(severity, message)

    monkeypatch.setattr(tensorrt_engine, "make_logger", lambda _: Log())
    monkeypatch.setattr(tensorrt_engine, "ctrl_c_ends_build", build)
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(handmade_onnx(8), tmp_path / "m.engine", BuildOptions())
    assert not armed
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is usual


def test_a_truncated_an_altered_and_a_foreign_engine_are_refused(handmade_onnx: Factory, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    build_engine(handmade_onnx(8), path, BuildOptions())
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[len(whole) // 2] ^= 1
    log = library.make_logger(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    assert parser.parse_from_file(str(handmade_onnx(8)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("x", *[(n, 1, 8, 8) for n in (1, 2, 3)])
    profile.set_shape("sigma", *[(n,) for n in (1, 2, 3)])
    config.add_optimization_profile(profile)
    foreign = bytes(builder.build_serialized_network(network, config))
    for content, words in (
        (whole[:-1], "truncated"),
        (altered, "altered or damaged"),
        (foreign, "without a cmfast manifest"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=words):
            read_plan(path)


def test_float32_is_not_multiplied_in_tf32_unless_the_file_says_so(
    handmade_onnx: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = tensorrt_engine._configure

    def configure(trt: Any, config: Any, options: BuildOptions, *, tf32: bool) -> None:
        assert config.get_flag(trt.BuilderFlag.TF32)  # the library's default
        real(trt, config, options, tf32=tf32)
        seen.append(config.get_flag(trt.BuilderFlag.TF32))

    monkeypatch.setattr(tensorrt_engine, "_configure", configure)
    build_engine(handmade_onnx(8), tmp_path / "a.engine", BuildOptions())
    build_engine(
        with_manifest(handmade_onnx(8), tmp_path / "tf32.onnx", dtype="tf32"), tmp_path / "b.engine", BuildOptions()
    )
    assert seen == [False, True]


def with_manifest(onnx: Path, target: Path, **values: Any) -> Path:
    """Copy an ONNX file with some values of its manifest changed."""
    import onnx as library

    model = library.load(onnx)
    manifest = json.loads(model.metadata_props[0].value) | values
    library.helper.set_model_props(model, {"cmfast": json.dumps(manifest)})
    library.save(model, target)
    return target


@pytest.mark.parametrize(
    ("count", "kept"), [(10, True), (1000, False), (-1, False)], ids=["few", "many", "as many as an ONNX file holds"]
)
def test_names_of_classes_that_an_engine_has_no_room_for_are_left_out_with_a_warning(
    count: int, kept: bool, handmade_onnx: Factory, tmp_path: Path
) -> None:
    def named(names: list[str]) -> Path:
        label = class_label(len(names), names).to_dict()
        return with_manifest(handmade_onnx(8), tmp_path / "m.onnx", conditions=[label])

    def length(names: list[str]) -> int:
        return len(read_onnx(named(names))[0].to_json(0))

    names = [f"kind {i}" for i in range(count)]
    if count < 0:  # in the ONNX file they just fit, and an engine's manifest says more
        names = ["a", "b"]
        while length([*names, f"kind {len(names)}"]) <= MAX_CHARACTERS:
            names.append(f"kind {len(names)}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        built = build_engine(named(names), tmp_path / "m.engine", BuildOptions())
    spec = read_plan(built.path).spec
    assert (spec.classes, spec.class_names) == (len(names), tuple(names) if kept else ())
    words = [f"the names of the {len(names)} classes are left out" in str(each.message) for each in said]
    assert words == ([] if kept else [True])


def test_options_reach_the_builder(handmade_onnx: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = tensorrt_engine._add_profile

    def look(builder: Any, network: Any, config: Any, kind: str, options: BuildOptions) -> Any:
        seen.update(
            level=config.builder_optimization_level,
            workspace=config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE),
            target=[config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)],
        )
        return real(builder, network, config, kind, options)

    monkeypatch.setattr(tensorrt_engine, "_add_profile", look)
    options = BuildOptions(batch=(2,), level=1, workspace_mib=256, target=("8.9", "12.0"))
    built = build_engine(handmade_onnx(8), tmp_path / "model.engine", options)
    assert seen == {"level": 1, "workspace": 256 << 20, "target": ["SM89", "SM120"]}
    assert built.manifest.engine["batch"] == [2, 2, 2]
    assert built.manifest.engine["compute_capability"] == ["8.9", "12.0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": ("9.0",)}, r"target 9.0: this version builds for 7.5, 8.0, 8.6, 8.9, 12.0"),
        ({"timing_cache": "cache"}, "TensorRT-RTX has no timing_cache"),
        ({"hardware_compatible": "ampere+"}, "TensorRT-RTX has no hardware_compatible"),
        ({"version_compatible": True}, "TensorRT-RTX has no version_compatible"),
    ],
)
def test_what_the_library_cannot_do_is_refused_and_nothing_is_written(
    options: dict[str, Any], words: str, handmade_onnx: Factory, tmp_path: Path
) -> None:
    with pytest.raises(CmfastError, match=words):
        build_engine(handmade_onnx(8), tmp_path / "model.engine", BuildOptions(library="tensorrt_rtx", **options))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch": (4, 2, 8)}, "batch must be the smallest, the most frequent and the largest"),
        ({"batch": (1, 2)}, "for example batch=1,8,64"),
        ({"batch": (0, 2, 3)}, "got 0,2,3"),
        ({"level": 6}, "level must be from 0 to 5, got 6"),
        ({"library": "openvino"}, "library must be one of tensorrt, tensorrt_rtx"),
        ({"hardware_compatible": "hopper"}, "hardware_compatible must be ampere"),
        ({"workspace_mib": -1}, "workspace_mib"),
        ({"target": ("89",)}, "target takes different compute capabilities such as 8.9,12.0, got 89"),
        ({"target": ("8.9", "8.9")}, "got 8.9,8.9"),
        ({"target": ("08.9",)}, "got 08.9"),
    ],
)
def test_a_wrong_option_names_itself(values: dict[str, Any], words: str) -> None:
    with pytest.raises(CmfastError, match=words):
        BuildOptions(**values)


def test_options_are_said_as_texts() -> None:
    said = ("batch=1,4,16", "level=5", "version_compatible=true", "target=8.9, 12.0", "timing_cache=a file")
    assert parse_options(BuildOptions, "--build", said) == BuildOptions(
        batch=(1, 4, 16), level=5, version_compatible=True, target=("8.9", "12.0"), timing_cache="a file"
    )
    for wrong, words in (
        ("level", "--build level: expected NAME=VALUE, NAME one of library, batch"),
        ("levels=1", "expected NAME=VALUE"),
        ("level=fast", "'fast' is not a valid value for level"),
        ("version_compatible=yes", r"'yes' is not a valid value for version_compatible \(true or false\)"),
    ):
        with pytest.raises(CmfastError, match=words):
            parse_options(BuildOptions, "--build", [wrong])
    with pytest.raises(CmfastError, match="level is given twice"):
        parse_options(BuildOptions, "--build", ["level=1", "level=2"])


def test_a_fixed_batch_is_the_file_s_own(onnx_file: Factory, tiny_checkpoint: Factory, tmp_path: Path) -> None:
    from cmfast_export.pipeline import export_onnx

    export_onnx(tiny_checkpoint(0, levels=1), tmp_path / "model.onnx", batch=3)
    built = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", BuildOptions())
    assert built.manifest.engine["batch"] == [3, 3, 3]
    with pytest.raises(CmfastError, match="the ONNX file takes batches of 3 only"):
        build_engine(tmp_path / "model.onnx", tmp_path / "other.engine", BuildOptions(batch=(1, 2, 4)))


def test_a_file_that_changes_while_it_is_built_gives_no_engine(
    handmade_onnx: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(handmade_onnx(8), tmp_path / "model.onnx")
    real = tensorrt_engine._build

    def build(*arguments: Any) -> Any:
        plan = real(*arguments)
        shutil.copyfile(handmade_onnx(16), tmp_path / "model.onnx")
        return plan

    monkeypatch.setattr(tensorrt_engine, "_build", build)
    with pytest.raises(CheckFailed, match="changed while its engine was built; no file was written"):
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", BuildOptions())
    assert os.listdir(tmp_path) == ["model.onnx"]


# The cache.


def test_the_same_engine_is_built_once_and_found_by_content_not_by_name(handmade_onnx: Factory, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    renamed = tmp_path / "renamed.onnx"
    shutil.copyfile(handmade_onnx(8), renamed)
    first = build_engine(handmade_onnx(8), tmp_path / "a.engine", BuildOptions(), cache=cache)
    again = build_engine(renamed, tmp_path / "b.engine", BuildOptions(), cache=cache)
    assert (first.cached, again.cached) == (False, True)
    assert again.sha256 == first.sha256
    others = {
        "another size": (handmade_onnx(16), BuildOptions()),
        "another manifest": (with_manifest(renamed, tmp_path / "m.onnx", sigma_data=0.25), BuildOptions()),
        "another batch": (renamed, BuildOptions(batch=(1, 8, 32))),
        "another target": (renamed, BuildOptions(target=("8.9",))),
        "another level": (renamed, BuildOptions(level=2)),
    }
    for name, (onnx, options) in others.items():
        assert not build_engine(onnx, tmp_path / "c.engine", options, cache=cache).cached, name
        assert build_engine(onnx, tmp_path / "c.engine", options, cache=cache).cached, name
    assert len(os.listdir(cache)) == 1 + len(others)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (rtx, "__version__", "1.7.1.999"),
        (tensorrt_engine, "this_platform", lambda: "windows_amd64"),
        (tensorrt_engine, "cuda_major", lambda name: "14"),
        (tensorrt_engine, "_default_targets", lambda trt: ["8.9"]),
        (tensorrt_engine, "BUILDER", tensorrt_engine.BUILDER + 1),
    ],
)
def test_another_version_system_card_or_builder_is_another_engine(
    where: Any, name: str, value: Any, handmade_onnx: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    build_engine(handmade_onnx(8), tmp_path / "a.engine", BuildOptions(), cache=cache)
    with monkeypatch.context() as changed:
        changed.setattr(where, name, value)
        assert not build_engine(handmade_onnx(8), tmp_path / "b.engine", BuildOptions(), cache=cache).cached
    assert build_engine(handmade_onnx(8), tmp_path / "b.engine", BuildOptions(), cache=cache).cached


def test_an_engine_of_another_description_under_a_name_of_the_cache_is_built_again(
    handmade_onnx: Factory, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    build_engine(handmade_onnx(8), tmp_path / "a.engine", BuildOptions(), cache=cache)
    (kept,) = cache.iterdir()
    build_engine(handmade_onnx(16), kept, BuildOptions())
    again = build_engine(handmade_onnx(8), tmp_path / "b.engine", BuildOptions(), cache=cache)
    assert not again.cached
    assert read_plan(kept).spec.image == (1, 8, 8)


def test_a_damaged_engine_in_the_cache_is_built_again(handmade_onnx: Factory, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build_engine(handmade_onnx(8), tmp_path / "a.engine", BuildOptions(), cache=cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    again = build_engine(handmade_onnx(8), tmp_path / "b.engine", BuildOptions(), cache=cache)
    assert not again.cached
    assert read_plan(kept) == again.manifest


def test_a_build_that_dies_leaves_the_old_engine(
    handmade_onnx: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.engine"
    with atomic_file(path) as file:
        file.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_engine, "seal", fail)
    with pytest.raises(KeyboardInterrupt):
        build_engine(handmade_onnx(8), path, BuildOptions(), cache=tmp_path / "cache")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.engine"]


def test_a_graph_that_the_library_cannot_read_is_one_line(handmade_onnx: Factory, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(handmade_onnx(8))
    model.graph.node[0].op_type = "NotAnOperator"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BackendError, match=r"the library cannot read it: .*NotAnOperator") as caught:
        build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", BuildOptions())
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["model.onnx"]


# The command.


def test_the_command_takes_a_checkpoint_to_an_engine_and_says_what_it_did(
    tiny_checkpoint: Factory, call: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "two.engine"
    arguments = ["--format", "engine", "--kind", "sampler", "--steps", "2", "--precision", "fp16", "--target", "8.9"]
    result = call(cli.main, tiny_checkpoint(10, levels=1), "-o", out, *arguments, "--build", "batch=1,2,4")
    assert result.returncode == 0, result.stderr
    manifest = read_plan(out)
    assert (manifest.kind, manifest.dtype) == ("sampler", "float16")
    assert manifest.engine["batch"] == [1, 2, 4]
    assert manifest.engine["compute_capability"] == ["8.9"]
    for words in (
        "float16 PyTorch",
        "not run",
        f"sha256 {file_sha256(out)}",
        "load only what you trust",
        "cmfast-info",
    ):
        assert words in result.stdout
    assert os.listdir(tmp_path) == ["two.engine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--build", "timing_cache=cache"), "TensorRT-RTX has no timing_cache"),
        (("--cache", "file/folder"), "the cache file/folder cannot be a folder: "),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_export(
    arguments: tuple[str, ...], words: str, tiny_checkpoint: Factory, call: Callable[..., Any],
    refused: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    monkeypatch.setattr(conversion, "export_graph", None)
    refused(call(cli.main, tiny_checkpoint(0), "--format", "engine", "-o", "model.engine", *arguments), words)
    assert os.listdir(tmp_path) == ["file"]


def test_the_command_keeps_engines_where_it_is_told_to(
    handmade_onnx: Factory, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMFAST_CACHE", str(tmp_path / "cache"))
    for words in ("built in", "copied from the cache in"):
        result = call(cli.main, handmade_onnx(8), "--format", "engine", "-o", tmp_path / "model.plan")
        assert result.returncode == 0, result.stderr
        assert words in result.stdout
    assert len(os.listdir(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "engine", "-o", "model.onnx"], "the name must end in .engine or .plan"),
        (["--format", "engine", "--precision", "fp16"], "exported already, so its kind and precision are in it"),
        (
            ["--format", "onnx"],
            "exported already; --format engine, openvino, triton, ort or web takes it further",
        ),
        (["--format", "engine", "--build", "batch=3,2,1"], "batch must be the smallest"),
        (["--format", "engine", "--build", "bogus=1", "-n"], "expected NAME=VALUE, NAME one of library, batch"),
        (["--format", "engine", "--serve", "instances=1"], "--serve is for --format triton"),
        (["--format", "triton", "--target", "8.9"], "--build, --target and --cache are for --format engine"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], words: str, handmade_onnx: Factory, call: Callable[..., Any], refused: Callable[..., None],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(handmade_onnx(8), tmp_path / "model.onnx")
    refused(call(cli.main, "model.onnx", *arguments), words)
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_the_missing_libraries_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(CmfastError) as caught:
        library.import_library("tensorrt_rtx", "building model.engine")
    assert str(caught.value) == (
        "building model.engine needs tensorrt-rtx, which is not installed: pip install 'cmfast[rtx]'"
    )
